"""What the collector counts about its own work, since its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from foreshock_collector.catalogue import COMMIT_DURATION, REFUSAL_REASONS
from foreshock_collector.state.totals import Histogram


@dataclass
class IngestStatistics:
    """Counts streams, messages, records, refusals and commits."""

    streams: int = 0
    """Streams that are open now."""
    messages: int = 0
    """Messages received, refused ones included."""
    skipped: int = 0
    """Messages of a kind that this version does not know."""
    records: int = 0
    """Step records received, repeated ones included."""
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REFUSAL_REASONS, 0))
    """Refused streams and instances by reason."""
    commit_seconds: Histogram = field(default_factory=lambda: Histogram(COMMIT_DURATION.buckets))
    """Durations of commits, failed ones included."""
    otlp_failures: int = 0
    """Exports to `--otlp-endpoint` that failed."""
    flush_seconds: float = 0.0
    """Interval at which recorders are asked to send."""
    urgent_commits: int = 0
    """Commits that could not wait: what they show should be seen at once."""
    waiting_since: dict[str, float] = field(default_factory=dict)
    """By run, the Unix time at which the oldest record was received that is not committed yet."""

    def move_clock(self, seconds: float) -> None:
        """Add so many seconds to each time."""
        self.waiting_since = {run: since + seconds for run, since in self.waiting_since.items()}

    def lag_seconds(self, now: float) -> float:
        """Return how long the oldest record has been waiting for its commit; 0 if none is."""
        return max(0.0, now - min(self.waiting_since.values(), default=now))
