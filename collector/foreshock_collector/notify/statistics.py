"""What the collector counts about its notifications, since its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from foreshock_collector.catalogue import NOTIFICATION_RESULTS


@dataclass
class NotificationStatistics:
    """Counts messages by their result, and those that wait."""

    results: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NOTIFICATION_RESULTS, 0))
    pending: int = 0
    """Messages that wait for their first attempt or for another one."""
