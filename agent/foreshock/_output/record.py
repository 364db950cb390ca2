"""A record of each step: what the host knows at its begin, and what was measured and observed of it."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Norms, NormSummary, Number
from foreshock._measure.rank_sums import Sums
from foreshock._step import Observation, Step
from foreshock_protos.columns import MEASURED_COLUMNS, MEASURED_NAMES, REDUCED_COLUMNS, Part
from foreshock_recorder.ring import Ring

_OWN = tuple(column for column in MEASURED_COLUMNS if column.part is not Part.REDUCED)
assert MEASURED_COLUMNS == _OWN + REDUCED_COLUMNS
_LOSSES = ("reduced_loss_count", "reduced_nan_losses", "reduced_inf_losses")


class Record:
    """Writes the three parts of each step's record into a rank's ring, at once: floats, or tensors on a CPU."""

    def __init__(self, ring: Ring, arithmetic: Arithmetic) -> None:
        self.ring = ring
        self.sums: Sums | None = None
        """Sums over ranks that go into the records."""
        self._arithmetic = arithmetic
        self.sequence = 0
        """Sequence number of the newest record; 0 before the first."""
        self._closed = False
        constants = {c.missing: arithmetic.constant(c.missing) for c in MEASURED_COLUMNS}
        self._missing = [(column.name, constants[column.missing]) for column in _OWN]
        self._no_sums = [constants[column.missing] for column in REDUCED_COLUMNS]
        self._no_layers = arithmetic.zeros(ring.layout.layers)
        self.nothing = NormSummary(
            total=constants[0.0],
            nan_parameters=constants[0.0],
            inf_parameters=constants[0.0],
            first_nonfinite=constants[-1.0],
            layers=self._no_layers,
        )
        """Summary of a gradient that was not measured."""

    @property
    def ranks_with_loss(self) -> int:
        """Number of ranks that observed a loss, by the newest sum over ranks that has reached the ring."""
        newest = self.ring.measured
        if not newest:
            return 0
        row = struct.unpack_from(f"<{len(MEASURED_NAMES)}d", self.ring.memory, self.ring.measured_offset(newest))
        return int(sum(row[MEASURED_NAMES.index(name)] for name in _LOSSES))

    def begin(self, step: Step) -> None:
        """Begin the record of a step, with what the host knows."""
        if not self._closed:
            self.ring.begin_step(
                self.sequence + 1,
                step=step.number,
                wall=time.time(),
                monotonic=time.monotonic(),
                learning_rate=step.learning_rate,
                flags=step.flags,
            )
        self.sequence += 1
        step.begun = True

    def write(self, step: Step) -> None:
        """Write what the script observed, and what was measured if all of it was."""
        if not step.begun or self._closed:
            return
        row = self._row(step) if step.complete else None
        if step.observation is not None:
            number, loss = step.observation
            self.ring.write_observed(self.sequence, step=number, loss=None if loss is None else float(loss))
        if row is not None:
            if step.weights is not None and step.weights.layers is not None:
                self.ring.write_weights(self.sequence, step.weights.layers)  # type: ignore[arg-type]
            self.ring.write_measured(self.sequence, row)  # type: ignore[arg-type]

    def observe(self, observation: Observation) -> None:
        """Write what the script observed of the newest record's step."""
        self.write(Step(sequence=self.sequence, number=0, observation=observation, begun=True))

    def drain(self) -> None:
        """Move into the ring what has arrived of the device."""

    def flush(self) -> bool:
        """Wait a limited time for everything under way, at the end of a run. Return whether all has arrived.

        A device that waits for a rank that has gone never finishes: the process must end all the same.
        """
        return True

    def close(self) -> None:
        """Keep counting, and write no more: after the exit, nothing is sent to the collector."""
        self._closed = True

    def _row(self, step: Step) -> Norms:
        """Return the measured part as the ring lays it out, [columns]."""
        summary = step.summary or self.nothing
        values: dict[str, Number | None] = {
            **({} if step.weights is None else step.weights.columns),
            "loss_scale": step.loss_scale,
            "global_norm": summary.total,
            "clip_coefficient": step.coefficient,
            "global_nan_parameters": summary.nan_parameters,
            "global_inf_parameters": summary.inf_parameters,
            "first_nonfinite_global": summary.first_nonfinite,
            "gradient_absolute_maximum": summary.largest,
            "skipped": step.found_inf,
            "shadow": step.shadow,
        }
        local_layers = self._no_layers
        if step.local is not None:
            values["local_norm"] = step.local.total
            values["local_nan_parameters"] = step.local.nan_parameters
            values["local_inf_parameters"] = step.local.inf_parameters
            values["first_nonfinite_local"] = step.local.first_nonfinite
            local_layers = step.local.layers
        row = [missing if (value := values.get(name)) is None else value for name, missing in self._missing]
        reduced: Sequence[Number] = self._no_sums if self.sums is None else self.sums.collect(step.loss_scale)
        return self._arithmetic.row([*row, *reduced], summary.layers, local_layers)
