"""Hugging Face's Trainer with Foreshock's callback, on CPUs.

    pip install '.[transformers]'
    torchrun --nproc-per-node 2 examples/transformers_trainer.py --lr 0.3 --max-grad-norm 0

A learning rate of 0.03 trains well. With 0.3 and no clipping, the warm-up goes too far and the gradients explode. With
`--clip 1.0`, Foreshock clips in place of the trainer's `max_grad_norm`.
"""

import argparse
import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from foreshock.integrations.transformers import ForeshockCallback

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.03)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--max-grad-norm", type=float, default=1.0, help="by which the trainer clips; 0: not at all")
parser.add_argument("--clip", type=float, help="by which Foreshock clips instead")
options = parser.parse_args()


class Regressor(nn.Module):
    """Predicts a number from 32; returns its loss, as the trainer expects it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 1)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss and the predictions."""
        predicted = self.layers(x)
        return {"loss": ((predicted - labels) ** 2).mean(), "logits": predicted}


set_seed(0)  # the same weights on every rank
torch.set_num_threads(1)
model = Regressor()
inputs = torch.randn(64 * 2 * options.steps, 32)  # the trainer gives each rank its own part
data = [{"x": x, "labels": x.sin().sum().reshape(1)} for x in inputs]
optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 200))
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=options.steps,
    per_device_train_batch_size=64,
    max_grad_norm=options.max_grad_norm,
    logging_steps=50,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    ddp_backend="gloo",
    ddp_find_unused_parameters=False,
)
callback = ForeshockCallback(clip=options.clip)
Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, warm_up), callbacks=[callback]).train()
