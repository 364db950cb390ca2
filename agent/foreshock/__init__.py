"""Foreshock: know that a training run is about to die, why, and which rank and layer did it.

    watch = foreshock.attach(model, optimizer, clip=1.0)

Importing does nothing: no thread, no process, no socket. This package needs torch and the standard library alone.
"""

from foreshock._attach import attach
from foreshock._clip import NormClip, ValueClip
from foreshock._errors import AttachError, ForeshockError, SettingsError
from foreshock._version import __version__
from foreshock._watch import Watch

__all__ = [
    "AttachError",
    "ForeshockError",
    "NormClip",
    "SettingsError",
    "ValueClip",
    "Watch",
    "__version__",
    "attach",
]
