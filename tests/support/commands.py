"""The `foreshock` command, as this environment has it."""

from __future__ import annotations

import sys

FORESHOCK = [sys.executable, "-c", "import sys; from foreshock._cli import main; sys.exit(main())"]
