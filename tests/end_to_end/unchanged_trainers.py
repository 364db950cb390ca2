"""A job of Hugging Face's Trainer, of Lightning's, or of a loop with Accelerate. It knows nothing of Foreshock.

Leaves its weights, and the norms that it has measured by itself before it clips at 0.5.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

STEPS, ROWS, MAX_NORM = 12, 4, 0.5
torch.set_num_threads(1)
torch.manual_seed(1)
inputs = torch.randn(2 * ROWS * STEPS, 8)
torch.manual_seed(0)
layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(x: Tensor) -> Tensor:
    return (layers(x) - x.sum(1, keepdim=True)).square().mean()  # type: ignore[no-any-return]


def transformers() -> list[float]:
    """Hugging Face's Trainer, which logs its norms."""
    from transformers import Trainer, TrainingArguments

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(x)}

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, ddp_backend="gloo", max_steps=STEPS, logging_steps=1,
        per_device_train_batch_size=ROWS, max_grad_norm=MAX_NORM, report_to=[], save_strategy="no",
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = Trainer(Regression(), arguments, train_dataset=[{"x": x} for x in inputs])
    trainer.train()
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


def lightning() -> list[float]:
    """Lightning's Trainer; a hook of the module takes the norms."""
    from lightning.pytorch import LightningModule, Trainer

    norms: list[float] = []

    class Regression(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def training_step(self, x: Tensor) -> Tensor:
            return loss_of(x)

        def on_before_optimizer_step(self, _: Any) -> None:
            norms.append(float(nn.utils.get_total_norm([p.grad for p in layers.parameters() if p.grad is not None])))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_steps=STEPS, gradient_clip_val=MAX_NORM, logger=False,
        enable_checkpointing=False, default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(Regression(), DataLoader(inputs, batch_size=ROWS))  # type: ignore[arg-type]
    return norms


def accelerate() -> list[float]:
    """A loop with Accelerate, whose clipping returns the norms."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.01)
    loader: Any = DataLoader(inputs, batch_size=ROWS)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(layers, optimizer, loader)
    norms = []
    for x in loader:
        accelerator.backward((model(x) - x.sum(1, keepdim=True)).square().mean())
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


if __name__ == "__main__":
    folder, name = sys.argv[1:]
    norms = {"transformers": transformers, "lightning": lightning, "accelerate": accelerate}[name]()
    # Lightning starts its other ranks with the second.
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    torch.save({"weights": list(layers.parameters()), "norms": norms}, Path(folder, f"{name}-{rank}.pt"))
