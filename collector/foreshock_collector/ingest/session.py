"""What the collector knows about one recorder's stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from foreshock_collector.access.tokens import Token


class RefusedError(ValueError):
    """A message that no recorder of this schema version sends. The text says what is wrong, `reason` names its kind."""

    def __init__(self, text: str, *, reason: str = "invalid_value") -> None:
        super().__init__(text)
        self.reason = reason
        """One of `catalogue.REFUSAL_REASONS`."""


@dataclass(frozen=True, kw_only=True)
class Sender:
    """Names a rank in the log."""

    instance: str
    run: str
    rank: int
    node: str


@dataclass
class Session:
    """Tracks the instances that one stream has introduced by a hello."""

    peer: str = "unknown"
    """Network address of the recorder."""
    registered: set[str] = field(default_factory=set)
    """Instances whose hello was accepted."""
    refused: dict[str, str] = field(default_factory=dict)
    """Instances whose hello was refused, and why. Their further messages are ignored; other instances go on."""
    resuming: set[str] = field(default_factory=set)
    """Instances that have asked for the history of the attempt before."""
    mirroring: set[str] = field(default_factory=set)
    """Instances that have asked for notices of their run."""

    token: Token | None = None
    """The token that the recorder showed; None if the collector asks for none."""
    open: bool = True
    """Whether the stream is."""

    @property
    def host(self) -> str:
        """Address of the recorder's machine, without the port."""
        return self.peer.rpartition(":")[0] or self.peer

    def includes(self, instances: set[str]) -> bool:
        """Whether any of these instances has sent a hello here."""
        return not instances.isdisjoint(self.registered) or not instances.isdisjoint(self.refused)
