"""The long form: `make fuzz`, `make fuzz ARGS="--count 1000 --seed 7"`. Ends where an example fails, and shows it."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from benchmarks.fuzz.histories import History, diagnosed, histories, live
from benchmarks.fuzz.live import unmuffled
from benchmarks.fuzz.messages import conversation, conversations

_AT_A_TIME = 100
"""hypothesis remembers each example of a batch, and looks for new ones beside them."""


def main() -> None:
    """Histories, then messages."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument(
        "--count", type=int, default=100_000, help="of histories, and of messages (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=None, help="the same examples again; default: another each time")
    options = parser.parse_args()
    start = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {start}", flush=True)
    with unmuffled():
        _run("histories", histories, _both, options.count, start)
        _run("messages", conversations, conversation, options.count, start, weigh=len)


def _both(history: History) -> None:
    diagnosed(history)
    live(history)


def _run(
    what: str,
    strategy: SearchStrategy[Any],
    holds: Callable[[Any], None],
    count: int,
    start: int,
    *,
    weigh: Callable[[Any], int] = lambda _: 1,
) -> None:
    done, began, told = 0, time.monotonic(), time.monotonic()
    batch = start
    while done < count:
        batch += 1

        @seed(batch)
        @settings(
            max_examples=_AT_A_TIME,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def test(example: Any) -> None:
            nonlocal done
            holds(example)
            done += weigh(example)

        try:
            test()
        except Exception:
            print(f"after {done} {what}; again: --seed {batch - 1} --count 1", flush=True)
            raise
        if time.monotonic() - told > 5 or done >= count:
            told = time.monotonic()
            pace = done / (told - began)
            print(
                f"{what}: {done:,} of {count:,}, {pace:.0f} a second, {(count - done) / pace:.0f} s to go", flush=True
            )


if __name__ == "__main__":
    main()
