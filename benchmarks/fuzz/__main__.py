"""The long form: `make fuzz`, `make fuzz ARGS="--count 1000 --seed 7"`. Ends where an example fails, and shows it."""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from benchmarks.fuzz.histories import History, diagnosed, histories, live
from benchmarks.fuzz.live import unmuffled
from benchmarks.fuzz.messages import conversation, conversations

_AT_A_TIME = 50
"""Examples of a batch: hypothesis remembers them all, and looks for new ones beside them."""


class Kind(NamedTuple):
    """What is tried, on what, and how many an example counts for."""

    examples: SearchStrategy[Any]
    holds: Callable[[Any], None]
    weight: Callable[[Any], int]


def _history(history: History) -> None:
    diagnosed(history)
    live(history)


KINDS = {
    "histories": Kind(histories, _history, lambda _: 1),
    "messages": Kind(conversations, conversation, len),
}


def main() -> None:
    """Histories, then messages, on all cores."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument(
        "--count", type=int, default=100_000, help="of histories, and of messages (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=None, help="the same examples again; default: another each time")
    options = parser.parse_args()
    first = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {first}", flush=True)
    with ProcessPoolExecutor() as pool:
        for kind in KINDS:
            _run(pool, kind, options.count, first)


def _run(pool: ProcessPoolExecutor, kind: str, count: int, first: int) -> None:
    done, began, told = 0, time.monotonic(), time.monotonic()
    side_by_side = os.cpu_count() or 1
    while done < count:
        for number in pool.map(_batch, [kind] * side_by_side, range(first, first + side_by_side)):
            done += number
        first += side_by_side
        if time.monotonic() - told > 5 or done >= count:
            told = time.monotonic()
            pace = done / (told - began)
            left = max(0.0, (count - done) / pace)
            print(f"{kind}: {done:,} of {count:,}, {pace:.0f} a second, {left:.0f} s to go", flush=True)


def _batch(name: str, number: int) -> int:
    """How many it was."""
    kind, done = KINDS[name], 0

    @seed(number)
    @settings(
        max_examples=_AT_A_TIME,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.examples)
    def test(example: Any) -> None:
        nonlocal done
        kind.holds(example)
        done += kind.weight(example)

    with unmuffled():
        try:
            test()
        except Exception as error:
            error.add_note(f"Again: make fuzz ARGS='--count 1 --seed {number}'")
            raise
    return done


if __name__ == "__main__":
    main()
