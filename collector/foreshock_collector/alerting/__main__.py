"""Print the Prometheus rule file: `python -m foreshock_collector.alerting > foreshock.rules.yml`."""

from __future__ import annotations

import argparse
import sys

from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.rule_file import rule_file

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m foreshock_collector.alerting", description=__doc__)
    Addresses.add_options(parser)
    sys.stdout.write(rule_file(Addresses.from_options(parser.parse_args())))
