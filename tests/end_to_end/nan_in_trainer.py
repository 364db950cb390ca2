"""A job of Hugging Face's Trainer that meets a NaN on rank 1. Arguments of callback and trainer come as JSON."""

import json
import math
import sys

import torch
import torch.distributed as dist

from foreshock.integrations.transformers import ForeshockCallback
from tests.agent.scenarios.trainer import Regression, trained

STEPS, NAN_AT = 60, 40

callback, trainer = json.loads(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = Regression(nan_input=NAN_AT if dist.get_rank() == 1 else None)
trained(ForeshockCallback(**callback), model=model, max_steps=STEPS, optim="adamw_torch_fused", **trainer)
finite = all(math.isfinite(float(p.detach().sum())) for p in model.parameters())
sys.stdout.write(f"weights are {'finite' if finite else 'lost'}\n")
