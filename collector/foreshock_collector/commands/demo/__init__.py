"""`foreshock demo`: a real training job explodes, is saved by clipping, meets a bad batch, and all parts watch."""


class DemoError(RuntimeError):
    """It cannot be shown here; the text says why."""
