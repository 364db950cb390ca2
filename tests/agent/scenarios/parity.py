"""Trains the same small model twice in one job, with and without Foreshock, and prints how far apart they are."""

import itertools
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock
from foreshock_recorder.reader import RingReader
from tests.agent.scenarios.training import ring_of

STEPS = 20
CASES = json.loads(sys.argv[1])


def model_for(case):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    layers = layers.to(getattr(torch, case.get("dtype", "float32")))
    if case.get("unused"):
        layers.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=layers[0].weight.dtype)))
    return DistributedDataParallel(
        layers,
        gradient_as_bucket_view=case.get("view", False),
        find_unused_parameters=bool(case.get("unused")),
        static_graph=case.get("static", False),
        bucket_cap_mb=0.001,
    )


def optimizer_for(case, model):
    kind = getattr(torch.optim, case.get("optimizer", "AdamW"))
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    return kind(model.parameters(), lr=0.01, fused=case.get("fused", False), **extra)


def train(case, *, stock):
    model = model_for(case)
    optimizer = optimizer_for(case, model)
    clip = case.get("clip")
    watch = None if stock else foreshock.attach(model, optimizer, clip=clip, local_norms=case.get("local", True))
    dtype = next(model.parameters()).dtype
    torch.manual_seed(7 + dist.get_rank())
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=not case.get("view", False))
        accumulate = case.get("accumulate", 1)
        for part in range(accumulate):
            x = torch.randn(8, 12, dtype=dtype)
            with model.no_sync() if part < accumulate - 1 else torch.enable_grad():
                loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
                loss.backward()
        if step == 3 and case.get("huge"):
            for p in model.parameters():
                p.grad = None
            # Through DDP: a loss whose gradient is 1e25 in every element of one weight.
            (model(torch.zeros(1, 12)).sum() * 0 + 1e25 * model.module[2].weight.sum()).backward()
        if stock:
            if clip is not None and not case.get("huge"):
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
            else:
                norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
    if watch is not None:
        with ring_of(watch) as path:
            reader = RingReader(path)
            norms = [reader.read(i + 1).measured[1] for i in range(STEPS)]
            locals_ = [reader.read(i + 1).measured[3] for i in range(STEPS)]
        watch.detach()
        return norms, [p.detach().clone() for p in model.parameters()], locals_
    return norms, [p.detach().clone() for p in model.parameters()], None


torch.set_num_threads(1)
dist.init_process_group("gloo")
results = []
for case in CASES:
    norms, weights, _ = train(case, stock=True)
    our_norms, our_weights, locals_ = train(case, stock=False)
    results.append(
        {
            "identical": all(torch.equal(a, b) for a, b in zip(weights, our_weights, strict=True)),
            "weights": max(
                float(((a - b).abs() / (a.abs() + 1e-3)).max()) for a, b in zip(weights, our_weights, strict=True)
            ),
            "norms": max(abs(a - b) / a for a, b in itertools.islice(zip(norms, our_norms, strict=True), STEPS)),
            "our_norms": our_norms,
            "locals": locals_,
        }
    )
if dist.get_rank() == 0:
    sys.stdout.write("RESULT " + json.dumps(results) + "\n")
    sys.stdout.flush()
dist.barrier()
# Not through the interpreter's end: a thread of gloo that lets go of a collective meanwhile aborts the process, in
# trainings without Foreshock too (torch 2.13).
os._exit(0)
