"""`python -m foreshock_collector` is `foreshock collector`."""

import sys

from foreshock_collector.commands.cli import collector

if __name__ == "__main__":
    sys.exit(collector(sys.argv[1:]))
