"""The table of `make chaos`: each step belongs to the fault that began last before it."""

from __future__ import annotations

from benchmarks.chaos.ledger import Mark, table


def test_what_is_lost_and_slow_is_told_of_the_fault_before_it() -> None:
    marks = [
        Mark(fault="cut", launch="first", steps=2, regressions=0),
        Mark(fault="kill", launch="first", steps=4, regressions=1),
        Mark(fault="cut", launch="second", steps=1, regressions=1),
    ]
    finished = {"first": [(1e-6, 1e-6)] * 4 + [(3e-6, 2e-6)], "second": [(3e-6, 2e-6)] + [(5e-6, 4e-6)] * 9}
    kept = {"first": {1, 2, 4, 5}, "second": set(range(1, 10))}
    _, cut, kill = (line.split() for line in table(marks, finished, kept, regressions=3))
    # Two steps of the first launch, of which the third is lost, and all but one of the second, whose last is.
    assert cut == ["cut", "2", "11", "9", "2", "3", "5", "4", "5", "4"]
    assert kill == ["kill", "1", "2", "2", "0", "0", "3", "2", "3", "2"]
