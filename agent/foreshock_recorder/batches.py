"""From a rank's ring to wire messages: which records are ready, and how their columns are packed."""

from __future__ import annotations

import math
import time
from pathlib import Path

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.ring import DEVICE_COLUMNS, Farewell, ReadOutcome, Record, RingReader

OBSERVE_SECONDS = 0.5
"""How long a measured record may wait for the script to tell its loss."""
FIRST_OBSERVE_SECONDS = 5.0
"""The same for a rank's first record: only then may a resumed script tell its step number."""
_WIRE_COLUMNS = tuple(name for name in DEVICE_COLUMNS if name != "skipped")
_POSITION = {name: i for i, name in enumerate(DEVICE_COLUMNS)}
_TROUBLE_COLUMNS = ("global_nan_parameters", "global_inf_parameters", "local_nan_parameters", "local_inf_parameters")
_JUMP = 3.0
"""A norm this many times the largest of the batch before does not wait for the next flush."""


class RankRing:
    """One rank's ring, and how far it has been read and stored."""

    def __init__(self, path: Path) -> None:
        self.reader = RingReader(path)
        identity = self.reader.identity
        self.instance: str = identity["instance"]
        self.rank: int = identity["rank"]
        self.local_norms = "local_norms" in identity["capabilities"]
        self.sent = self.reader.acknowledged
        self.acknowledged = self.reader.acknowledged
        self.closed = False
        self.greeted = False
        self.said_goodbye = False
        self.last_sent = 0.0
        self.largest_norm = math.inf
        self.dead = False
        self._waiting_since: tuple[int, float] = (0, 0.0)

    @property
    def gone(self) -> bool:
        """No further record will be launched."""
        return self.dead or self.reader.farewell is not Farewell.NONE

    def rewind(self, stored: int | None = None) -> None:
        """Read on from what is stored: a new stream, or a collector that knows less."""
        self.acknowledged = self.acknowledged if stored is None else stored
        self.sent = self.acknowledged
        self.said_goodbye = False

    def ready(self, now: float, limit: int) -> list[Record]:
        """Records above `sent`, in order, that are complete or will never be. At most `limit`. now: monotonic."""
        records: list[Record] = []
        # Asked before the rank's last word is looked for: what it wrote until then is there.
        gone = self.gone
        sequence = max(self.sent + 1, self.reader.launched - self.reader.layout.slot_count + 1)
        while len(records) < limit:
            record = self.reader.read(sequence)
            if record is ReadOutcome.NOT_YET:
                break
            if isinstance(record, ReadOutcome):
                if records:
                    break
                sequence += 1
                continue
            if not gone and not self._settled(record, now):
                break
            records.append(record)
            sequence += 1
        return records

    def _settled(self, record: Record, now: float) -> bool:
        newer = record.sequence < self.reader.launched
        if record.measured is None:
            # Skipped by an internal error if a later one is measured; else the device is still at it.
            later = self.reader.read(record.sequence + 1)
            return isinstance(later, Record) and later.measured is not None
        if record.observed or newer:
            return True
        if self._waiting_since[0] != record.sequence:
            self._waiting_since = (record.sequence, now)
        patience = FIRST_OBSERVE_SECONDS if record.sequence == 1 else OBSERVE_SECONDS
        return now - self._waiting_since[1] >= patience

    def hello(self) -> pb.FromRecorder:
        """Full state of the instance."""
        i = self.reader.identity
        return pb.FromRecorder(
            hello=pb.Hello(
                schema_version=i["schema_version"],
                instance=i["instance"],
                experiment=i["experiment"],
                run=i["run"],
                launch=i["launch"],
                started_seconds=i["started_seconds"],
                topology=pb.Topology(
                    rank=i["rank"], local_rank=i["local_rank"], world_size=i["world_size"], node=i["node"]
                ),
                model=pb.ModelSummary(**i["model"]),
                optimizer=pb.OptimizerSummary(**i["optimizer"]),
                clip=i["clip"],
                capabilities=i["capabilities"],
                versions=i["versions"],
                pid=self.reader.pid,
            )
        )

    def batch(self, records: list[Record]) -> pb.FromRecorder:
        """Columns of these records; of none, a sign of life."""
        layers = self.reader.layout.layers
        first = len(DEVICE_COLUMNS)
        unmeasured = memoryview(bytes(8 * self.reader.layout.columns)).cast("d")
        rows = [unmeasured if r.measured is None else r.measured for r in records]
        steps = pb.StepBatch(
            instance=self.instance,
            first_sequence=records[0].sequence if records else self.sent + 1,
            step=[r.step for r in records],
            wall_seconds=[r.wall_seconds for r in records],
            monotonic_seconds=[r.monotonic_seconds for r in records],
            learning_rate=[r.learning_rate for r in records],
            flags=[self._flags(r) for r in records],
            loss=[math.nan if r.loss is None else r.loss for r in records],
            dropped=self.reader.dropped,
        )
        for name in _WIRE_COLUMNS:
            getattr(steps, name).extend(row[_POSITION[name]] for row in rows)
        for row in rows:
            if self.rank == 0:
                steps.global_layer_norms.extend(row[first : first + layers])
            if self.local_norms:
                steps.local_layer_norms.extend(row[first + layers : first + 2 * layers])
        return pb.FromRecorder(steps=steps)

    def _flags(self, record: Record) -> int:
        flags = 0 if record.loss is None else pb.LOSS_OBSERVED
        flags |= pb.EDITED if record.edited else 0
        flags |= pb.LOCAL_NORMS if self.local_norms else 0
        if record.measured is None:
            return flags | pb.INCOMPLETE
        return flags | (pb.SKIPPED if record.measured[_POSITION["skipped"]] > 0 else 0)

    def urgent(self, records: list[Record]) -> bool:
        """Trouble in these records does not wait for the next flush."""
        return any(self._troubled(record) for record in records)

    def note_sent(self, records: list[Record]) -> None:
        """Go on above these."""
        if records:
            self.sent = records[-1].sequence
            norms = [r.measured[_POSITION["global_norm"]] for r in records if r.measured is not None]
            self.largest_norm = max((norm for norm in norms if math.isfinite(norm)), default=self.largest_norm)
        self.last_sent = time.monotonic()

    def _troubled(self, record: Record) -> bool:
        if record.loss is not None and not math.isfinite(record.loss):
            return True
        row = record.measured
        if row is None:
            return False
        norm = row[_POSITION["global_norm"]]
        bad = any(row[_POSITION[name]] > 0 for name in _TROUBLE_COLUMNS)
        return bad or not math.isfinite(norm) or norm > _JUMP * self.largest_norm

    def goodbye(self) -> pb.FromRecorder:
        """The rank's own last word, or ours for a rank that could not say it."""
        reason = Farewell.LOST if self.reader.farewell is Farewell.NONE else self.reader.farewell
        return pb.FromRecorder(
            goodbye=pb.Goodbye(
                instance=self.instance,
                reason=pb.Goodbye.Reason.Name(reason),
                detail=self.reader.detail,
                last_sequence=self.reader.launched,
            )
        )

    def events(self) -> list[pb.FromRecorder]:
        """What happened to the rank besides its steps. Sent anew on every stream; the collector keeps one of a kind."""
        events = []
        kinds: list[tuple[pb.Event.Kind, str]] = []
        if self.dead and self.reader.farewell is Farewell.NONE:
            kinds.append((pb.Event.RANK_LOST, "the process ended without a goodbye"))
        if self.reader.dropped.get("probe_error"):
            kinds.append((pb.Event.PROBE_ERROR, self.reader.detail))
        for kind, detail in kinds:
            event = pb.Event(
                instance=self.instance, kind=kind, step=self._last_step(), wall_seconds=time.time(), detail=detail
            )
            events.append(pb.FromRecorder(event=event))
        return events

    def _last_step(self) -> int:
        record = self.reader.read(self.reader.launched) if self.reader.launched else None
        return record.step if isinstance(record, Record) else 0
