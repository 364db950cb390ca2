"""A job of Hugging Face's Trainer. What happens to it comes as JSON."""

import json
import math
import sys

import torch
import torch.distributed as dist

from foreshock._output import recorder_process
from foreshock.integrations.transformers import ForeshockCallback
from tests.agent.scenarios.trainer import Regression, trainer_with

options = {
    # Arguments of our callback and of the trainer.
    "callback": {}, "trainer": {},
    # The step at which rank 1 meets a NaN.
    "nan_at": None,
    # Whether to go on from the newest checkpoint.
    "resumes": False,
    # How long attach waits for the collector's history of norms, in seconds.
    "history_seconds": recorder_process.HISTORY_SECONDS,
} | json.loads(sys.argv[1])  # fmt: skip
recorder_process.HISTORY_SECONDS = options["history_seconds"]
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = Regression(nan_input=options["nan_at"] if dist.get_rank() == 1 else None)
callback = ForeshockCallback(**options["callback"])
trainer = trainer_with(callback, model=model, optim="adamw_torch_fused", **options["trainer"])
trainer.train(resume_from_checkpoint=options["resumes"])
finite = all(math.isfinite(float(p.detach().sum())) for p in model.parameters())
sys.stdout.write(f"weights are {'finite' if finite else 'lost'}\n")
