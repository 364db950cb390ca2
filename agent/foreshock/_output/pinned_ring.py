"""The ring as pinned memory: the device writes its records straight into their slots, and nothing moves them later.

A part is two copies on the current stream: the payload with its checksum, then the end marker. They arrive in this
order, so a reader that finds the marker has the payload. What the device had finished when its process was killed is in
the ring.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreshock._arithmetic.norms import Norms, Number
from foreshock._log import warn_once
from foreshock._output.staging import FLUSH_SECONDS, POLL_SECONDS
from foreshock_recorder.layout import HAS_LOSS, HAS_STEP, MEASURED_BEGIN, OBSERVED
from foreshock_recorder.ring import Ring

ObservedWords = Callable[[Number, int | None, int], Tensor]
"""Return an observed part from payload to end marker, int64, [OBSERVED.words + 2]: loss, step number, sequence."""


class PinnedRing:
    """Copies records from the device into a ring whose memory is registered with CUDA."""

    def __init__(self, ring: Ring, cudart: Any) -> None:
        """cudart: `torch.cuda.cudart()`. Raises `RuntimeError` where CUDA does not register the memory."""
        self._ring = ring
        self._words = torch.frombuffer(ring.memory, dtype=torch.int64, count=len(ring.memory) // 8)
        address = self._words.data_ptr()
        status = int(cudart.cudaHostRegister(address, ring.layout.file_bytes, 0))
        if status != 0:
            raise RuntimeError(f"cudaHostRegister returned {status}")
        self._unregister = weakref.finalize(self, _unregister, cudart, address)
        # At the interpreter's exit the context may be gone, and the process's memory goes with it.
        self._unregister.atexit = False
        self.observed_words: ObservedWords = observed_words
        """How an observed part is made."""
        self._weights: Tensor | None = None
        self._newest = self._newest_observed = 0

    def write_observed(self, sequence: int, number: int | None, loss: Number) -> None:
        """Start the copies of what the script observed of a record's step. Never waits, as all that follow."""
        self._ring.open_observed(sequence)
        self._copy(self.observed_words(loss, number, sequence), self._ring.layout.word(sequence) + OBSERVED.begin + 1)
        self._newest_observed = sequence

    def write_weights(self, sequence: int, blocks: Norms) -> None:
        """Start the copies of what was measured of the weights by layer. blocks: float64, on the device."""
        self._ring.open_weights(sequence)
        self._copy(self._checked(blocks, sequence), self._ring.layout.weights_word(sequence) + 1)

    def write_measured(self, sequence: int, row: Norms) -> None:
        """Start the copies of the measured part. row: float64, [columns], on the device."""
        self._ring.open_measured(sequence)
        self._copy(self._checked(row, sequence), self._ring.layout.word(sequence) + MEASURED_BEGIN + 1)
        self._newest = sequence

    def write_words(self, sequence: int, words: Tensor, *, observed: bool) -> None:
        """Start the copies of the measured part and, if the device has it, of the observed part, in the same two.

        words: int64, on the device, `StepKernel.words`. The begun part is written already.
        """
        ring, layout = self._ring, self._ring.layout
        ring.open_measured(sequence)
        if observed:
            ring.open_observed(sequence)
        begin = layout.word(sequence) + (OBSERVED.begin if observed else MEASURED_BEGIN) + 1
        self._copy(words[begin - layout.word(sequence) - OBSERVED.begin - 1 :], begin)
        self._newest = sequence

    def flush(self) -> bool:
        """Wait a limited time for the newest record. Return whether it has arrived.

        A device that waits for a rank that has gone never finishes: the process must end all the same.
        """
        deadline = time.monotonic() + FLUSH_SECONDS
        while not self._has_arrived():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def close(self) -> None:
        """Give the memory back to the host, unless the device is still to write there: CUDA might wait for it."""
        if self._has_arrived():
            self._unregister()
        else:
            self._unregister.detach()

    def _copy(self, words: Tensor, begin: int) -> None:
        end = begin + len(words)
        self._words[begin : end - 1].copy_(words[:-1], non_blocking=True)
        self._words[end - 1 : end].copy_(words[-1:], non_blocking=True)

    def _checked(self, values: Any, sequence: int) -> Tensor:
        """Return a payload with its checksum, `device_checksum`, and its end marker: int64, [values + 2]."""
        bits: Tensor = values.view(torch.int64)
        if self._weights is None:
            layout = self._ring.layout
            most = max(layout.columns, layout.weights.words)
            self._weights = torch.arange(1, 2 * most, 2, dtype=torch.int64, device=bits.device)
        checksum = (bits * self._weights[: len(bits)]).sum().reshape(1)
        return torch.cat((bits, checksum, torch.full_like(checksum, sequence)))

    def _has_arrived(self) -> bool:
        newest, layout = self._newest_observed, self._ring.layout
        observed = not newest or int(self._words[layout.word(newest) + OBSERVED.end]) == newest
        return observed and self._ring.measured >= self._newest


def pinned_ring(ring: Ring, cudart: Any) -> PinnedRing | None:
    """Register a ring's memory with CUDA; None, and one line in the log, where that fails."""
    try:
        return PinnedRing(ring, cudart)
    except (RuntimeError, AttributeError) as error:
        warn_once(
            "pinned ring",
            f"the flight recorder's memory could not be pinned ({error}): records pass through a buffer, and the last "
            "step before a kill may be missing",
        )
        return None


def observed_words(loss: Number, number: int | None, sequence: int) -> Tensor:
    """Return an observed part by tensor operations, as `ObservedWords`. loss: float64, no dimensions."""
    bits = torch.as_tensor(loss).reshape(1).view(torch.int64)
    flags = HAS_LOSS | (0 if number is None else HAS_STEP)
    known = [torch.full_like(bits, value) for value in (number or 0, flags, sequence)]
    checksum = bits * 3 + ((number or 0) + 5 * flags)
    return torch.cat((known[0], bits, known[1], checksum, known[2]))


def _unregister(cudart: Any, address: int) -> None:
    # A device that has failed answers with its error, and the memory goes with the process.
    cudart.cudaHostUnregister(address)
