"""`foreshock demo`: a real training job explodes, survives with clipping, and meets a bad batch."""


class DemoError(RuntimeError):
    """The demo cannot run on this machine; the message says why."""
