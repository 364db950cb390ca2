"""What `/metrics` shows of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from foreshock_collector.catalogue import CATALOGUE, INCIDENT_VERDICTS
from foreshock_collector.server import Server
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import Stream, config, families, hello, serving, steps, value


def test_names_that_cannot_be_printed_refuse_nothing_and_are_shown_as_python_writes_them(tmp_path: Path) -> None:
    async def test() -> None:
        model = pb.ModelSummary(
            type="M\n", module_types={"a\tb": 1}, parameters=["a\nb.w"], parameter_sizes=[1], layers=["a\nb" * 999]
        )
        model.parameter_layers.append(0)
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(hello(model=model, clip="norm\n1"), steps(1, [2.0], global_layer_norms=[2.0]))
            await stream.stored(1)
            found = await families(server)
            assert value(found, "foreshock_run_info", model=r"M\n", clip=r"norm\n1") == 1
            (sample,) = found["foreshock_layer_gradient_norm"].samples
            assert sample.labels["layer"].startswith(r"a\nba\nb")
            assert len(sample.labels["layer"]) == 2000
            await stream.close()

    serving(test())


def test_what_is_looked_at_now_and_then_keeps_its_newest_value(tmp_path: Path) -> None:
    async def test() -> None:
        looked: dict[str, Any] = {
            "gradient_absolute_maximum": [0.25, 0, 0],
            "parameter_norm": [12.0, 0, 0],
            "update_ratio": [0, 1e-3, 0],
            "first_moment_norm": [0, 0, 0.5],
            "second_moment_norm": [0, 2.0, 0],
        }
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(hello())
            await stream.send(steps(1, [1.0] * 3))
            await stream.stored(3)
            found = await families(server)
            assert not any(found[f"foreshock_{name}"].samples for name in looked)
            await stream.send(steps(4, [1.0] * 3, **looked), steps(7, [1.0], gradient_absolute_maximum=[math.nan]))
            await stream.stored(7)
            found = await families(server)
            assert {name: value(found, f"foreshock_{name}") for name in looked} == {
                name: max(values) for name, values in looked.items()
            }
            await stream.close()

    serving(test())


def test_every_counter_is_there_at_zero_from_the_hello_on_and_all_is_in_the_catalogue(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello())
            await stream.stored(0)
            await stream.close()
            found = await families(server)
            for source in ("loss", "gradient"):
                for kind in ("nan", "inf"):
                    assert value(found, "foreshock_nonfinite_steps", source=source, kind=kind) == 0
            for verdict in INCIDENT_VERDICTS:
                assert value(found, "foreshock_incidents", verdict=verdict) == 0
            assert found.keys() == {series.name.removesuffix("_total") for series in CATALOGUE}
            labels = {series.name.removesuffix("_total"): set(series.labels) for series in CATALOGUE}
            for name, family in found.items():
                for sample in family.samples:
                    assert sample.labels.keys() - {"le"} == labels[name], sample

    serving(test())


def test_a_nan_is_counted_and_never_exported_as_a_gauge(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            flags = [pb.LOSS_OBSERVED] * 3
            bad = steps(
                1, [1.0, 2.0, float("nan")], flags=flags, loss=[1, 1, float("nan")], global_nan_parameters=[0, 0, 1]
            )
            await stream.send(hello(), bad)
            await stream.stored(3)
            await stream.close()
            found = await families(server)
            while value(found, "foreshock_steps") < 3:
                found = await families(server)
            assert value(found, "foreshock_global_gradient_norm") == 2.0
            assert value(found, "foreshock_nonfinite_steps", source="loss", kind="nan") == 1
            assert value(found, "foreshock_incidents", verdict="sudden_nonfinite") == 1
            for family in found.values():
                assert all(sample.value == sample.value for sample in family.samples)

    serving(test())
