"""What the tests of Triton's kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from tests.support.interpreter import hasten
from tests.support.kernels import INTERPRETED

if INTERPRETED and find_spec("triton") is not None:
    hasten()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """NumPy, which the interpreter computes with, warns of what a GPU does without a word."""
    with np.errstate(all="ignore"):
        yield
