"""`python -m benchmarks.faults`: record the corpus, all of it or the cases of a pattern."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase

from benchmarks.faults.cases import Part, cases
from benchmarks.faults.record import record


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose name fits, such as 'bit_flip-*'")
    parser.add_argument("--part", choices=("tune", "test"), help="one part; default: both")
    parser.add_argument("--list", action="store_true", help="say which, and record nothing")
    options = parser.parse_args()
    parts: tuple[Part, ...] = (options.part,) if options.part else ("tune", "test")
    chosen = [case for part in parts for case in cases(part) if fnmatchcase(case.name, options.only)]
    if options.list:
        for case in chosen:
            print(case.part, case.kind, case.name, case.ranks, case.steps, case.cause)
        return 0
    wrong = record(chosen)
    for text in wrong:
        sys.stderr.write(f"not what it should be: {text}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
