"""A job of Hugging Face's Trainer. What happens to it comes as JSON."""

import json
import math
import sys

import torch
import torch.distributed as dist

from foreshock._output import recorder_process
from foreshock.integrations.transformers import ForeshockCallback
from tests.agent.scenarios.trainer import Regression, trainer_with
from tests.agent.scenarios.training import WIDTH


class Recurrent(torch.nn.Module):
    """Multiplies by one matrix again and again: where it exceeds 1, outputs and gradients grow with each time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.output = torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.nn.Linear(WIDTH, 1)
        torch.nn.init.orthogonal_(self.cell.weight, gain=0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(48):
            x = self.cell(x)
        output: torch.Tensor = self.output(x)
        return output


options = {
    # Arguments of our callback and of the trainer.
    "callback": {}, "trainer": {},
    # The step at which rank 1 meets a NaN.
    "nan_at": None,
    # Whether the model is recurrent and its learning rate climbs from step 60 on, to 200 times what it was.
    "explodes": False,
    # Whether to go on from the newest checkpoint.
    "resumes": False,
    # How long attach waits for the collector's history of norms, in seconds.
    "history_seconds": recorder_process.HISTORY_SECONDS,
} | json.loads(sys.argv[1])  # fmt: skip
recorder_process.HISTORY_SECONDS = options["history_seconds"]
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = Regression(nan_input=options["nan_at"] if dist.get_rank() == 1 else None)
if options["explodes"]:
    model.layers = torch.nn.Sequential(Recurrent())
callback = ForeshockCallback(**options["callback"])
trainer = trainer_with(callback, model=model, optim="adamw_torch_fused", **options["trainer"])
if options["explodes"]:
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: min(200.0, 1.3 ** max(0, step - 60))
    )
trainer.train(resume_from_checkpoint=options["resumes"])
finite = all(math.isfinite(float(p.detach().sum())) for p in model.parameters())
sys.stdout.write(f"weights are {'finite' if finite else 'lost'}\n")
