"""Lightning's Trainer with Foreshock's callback, on CPUs.

    pip install '.[lightning]'
    torchrun --nproc-per-node 2 examples/lightning_trainer.py --lr 0.3

A learning rate of 0.03 trains well. With 0.3, the warm-up goes too far and the gradients explode. With `--clip 1.0`,
Foreshock clips.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from foreshock.integrations.lightning import ForeshockCallback

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.03)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--clip", type=float, help="by which Foreshock clips")
options = parser.parse_args()


class Regressor(LightningModule):
    """Predicts a number from 32."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 1)
        )

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return ((self.layers(x) - x.sin().sum(1, keepdim=True)) ** 2).mean()

    def configure_optimizers(self) -> dict:
        """Return SGD with a warm-up of its rate."""
        optimizer = torch.optim.SGD(self.parameters(), lr=options.lr, momentum=0.9)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 200))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        """Return batches of random numbers; the trainer gives each rank its own part."""
        return DataLoader(torch.randn(64 * 2 * options.steps, 32), batch_size=64)


seed_everything(0)  # the same weights on every rank
torch.set_num_threads(1)
trainer = Trainer(
    accelerator="cpu",
    strategy="ddp",
    devices=2,
    max_steps=options.steps,
    logger=False,
    enable_checkpointing=False,
    callbacks=[ForeshockCallback(clip=options.clip)],
)
trainer.fit(Regressor())
