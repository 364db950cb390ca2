"""The plan of what is measured, and how parameters become layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foreshock._arithmetic.parameters import MAX_LAYERS, group_layers, model_summary, plan_parameters


def test_parameters_of_one_module_are_one_layer() -> None:
    names = ["rnn.weight", "rnn.bias", "head.0.weight", "head.0.bias", "head.2.weight"]
    assert group_layers(names) == (("rnn", "head.0", "head.2"), (0, 0, 1, 1, 2))


def test_a_parameter_outside_any_module_is_a_layer_of_its_own() -> None:
    assert group_layers(["scale", "shift", "head.weight"]) == (("scale", "shift", "head"), (0, 1, 2))


def test_too_many_layers_are_grouped_by_shorter_paths() -> None:
    names = [f"blocks.{b}.{part}.weight" for b in range(4) for part in ("attention", "mlp")]
    assert group_layers(names, limit=8)[0][:2] == ("blocks.0.attention", "blocks.0.mlp")
    assert group_layers(names, limit=7) == (tuple(f"blocks.{b}" for b in range(4)), (0, 0, 1, 1, 2, 2, 3, 3))
    assert group_layers(names, limit=3) == (("blocks",), (0,) * 8)


def test_neighbors_are_merged_where_paths_cannot_be_shorter() -> None:
    assert group_layers([f"p{i}" for i in range(7)], limit=3) == (("p0", "p3", "p6"), (0, 0, 0, 1, 1, 1, 2))


def test_no_parameters_are_no_layers() -> None:
    assert group_layers([]) == ((), ())


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join), unique=True, max_size=60),
    st.integers(1, 10),
)
def test_every_parameter_has_a_layer_and_there_are_never_too_many(names: list[str], limit: int) -> None:
    layers, layer_of = group_layers(names, limit)
    assert len(layers) <= limit
    assert len(layer_of) == len(names)
    assert sorted(set(layer_of)) == list(range(len(layers)))
    assert len(set(layers)) == len(layers)


class Tied(nn.Module):
    """A language model's usual trick: the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_a_plan_is_in_the_models_order_and_counts_shared_parameters_once() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(list(model.parameters())[::-1], lr=0.1)
    plan = plan_parameters(model, optimizer)
    assert plan.names == ("embedding.weight", "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias")
    assert plan.layers == ("embedding", "body.0", "body.2") and plan.layer_of == (0, 1, 1, 2, 2)
    assert [plan.index[p] for p in model.parameters()] == [0, 1, 2, 3, 4]


def test_a_plan_leaves_out_what_is_frozen_or_not_optimized() -> None:
    model = Tied()
    model.body[0].weight.requires_grad_(False)
    plan = plan_parameters(model, torch.optim.SGD(model.body.parameters(), lr=0.1))
    assert plan.names == ("body.0.bias", "body.2.weight", "body.2.bias")


def test_a_plan_leaves_out_what_ddp_does_not_average() -> None:
    model, other = Tied(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([other, *model.body.parameters()], lr=0.1)
    plan = plan_parameters(model, optimizer, {"body.0.weight", "body.2.bias"})
    assert plan.names == ("body.0.bias", "body.2.weight")


def test_a_summary_says_what_the_collector_needs() -> None:
    model = Tied()
    said = model_summary(model, plan_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert said["type"] == "Tied"
    assert said["module_types"] == {"Embedding": 1, "Sequential": 1, "Linear": 3, "ReLU": 1}
    assert said["parameter_sizes"] == [20, 16, 4, 16, 4]
    assert [said["layers"][i] for i in said["parameter_layers"]] == ["embedding"] + 2 * ["body.0"] + 2 * ["body.2"]


@pytest.mark.parametrize("blocks", [10, 300])
def test_a_deep_model_stays_within_the_limit(blocks: int) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(blocks)))
    plan = plan_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(plan.parameters) == 4 * blocks and len(plan.layers) <= MAX_LAYERS
