"""Of a run with more ranks than its share of series, the first ranks have theirs, and those that stand out."""

from __future__ import annotations

import re

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from foreshock_collector.config import ConfigError, config_from
from foreshock_collector.web.exposition import RunSeries
from foreshock_collector.web.rendering import Renderer
from foreshock_collector.web.shown_ranks import OUTSTANDING, outstanding
from tests.support.job_in_memory import NAN, Job

RANKS, FIRST = 60, 4


def shown(text: str, series: str = "foreshock_local_gradient_norm") -> list[int]:
    return [int(rank) for rank in re.findall(rf'^{series}{{.*rank="(\d+)"', text, re.MULTILINE)]


def lines(text: str) -> int:
    return sum(not line.startswith("#") for line in text.splitlines())


def withheld(text: str) -> float:
    (found,) = re.findall(r"^foreshock_run_series_withheld{.*} (.*)$", text, re.MULTILINE)
    return float(found)


def test_ranks_that_stand_out_have_series_and_all_others_keep_theirs() -> None:
    job = Job(ranks=RANKS)

    def step(**norms: float) -> None:
        for rank in range(RANKS):
            job.tell(rank, [1.0], local_norm=[norms.get(f"r{rank}", 1.0)])
        job.settle(5.0)

    step()
    everything = Renderer(
        (RunSeries(job.runs, lambda: job.now, ended_seconds=900.0, silent=900.0),), CollectorRegistry()
    )
    text = everything.render().decode()
    assert shown(text) == list(range(RANKS))
    assert withheld(text) == 0
    # But for the ranks, the errors, and the line that says how many are withheld.
    own = lines(text) - 2 * RANKS - 5 - 1
    most = own + 2 * (FIRST + OUTSTANDING)
    limited = Renderer(
        (RunSeries(job.runs, lambda: job.now, ended_seconds=900.0, silent=900.0, most=most),), CollectorRegistry()
    )

    def check(*some: int) -> list[int]:
        text = limited.render().decode()
        ranks = shown(text)
        assert ranks == shown(text, "foreshock_last_report_timestamp_seconds")
        assert ranks[:FIRST] == list(range(FIRST))
        assert set(some) <= set(ranks)
        assert len(ranks) == FIRST + OUTSTANDING
        assert withheld(text) == 2 * (RANKS - len(ranks))
        assert lines(text) == most + 5 + 1
        return ranks

    assert 59 not in check()
    step(r59=5.0)
    before = check(59)
    step(r59=1.5)
    assert check(59) == before, "nothing else stands out"
    step(r59=1.5, r58=1.6)
    assert 58 in check(58, 59), "the place of a rank that is like all others"
    step(r57=NAN)
    check(57)


def test_one_that_stands_out_keeps_its_place_until_another_does_twice_as_far() -> None:
    deviation, silence = np.linspace(1.0, 2.0, 3 * OUTSTANDING), np.zeros(3 * OUTSTANDING)
    first = outstanding(deviation, silence, np.zeros(3 * OUTSTANDING, bool))
    assert sorted(first) == list(range(2 * OUTSTANDING, 3 * OUTSTANDING))
    kept = np.isin(np.arange(3 * OUTSTANDING), first)
    assert sorted(outstanding(deviation[::-1] - 0.5, silence, kept)) != sorted(first), (
        "others do so more than twice as far"
    )
    assert sorted(outstanding(deviation[::-1], silence, kept)) == sorted(first)
    silence[5] = 40.0
    assert outstanding(deviation, silence, kept)[0] == 5, "one that does not report comes first"


def test_a_limit_that_leaves_no_room_for_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="--run-series must be at least 1000, not 999"):
        config_from(["--run-series", "999"], {})
    assert config_from(["--run-series", "1000"], {}).run_series == 1000
