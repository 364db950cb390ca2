"""Foreshock: warns before a training run dies, and names the cause, the rank and the layer.

    watch = foreshock.attach(model, optimizer, clip=1.0)

Importing does nothing: no thread, no process, no socket. This package needs torch and the standard library alone, and
torch only once a name is used: the `foreshock` command works on machines without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foreshock._version import __version__

if TYPE_CHECKING:
    from foreshock._attach.attach import attach
    from foreshock._control.clip import AdaptiveClip, NormClip, ValueClip
    from foreshock._errors import AttachError, ForeshockError, SettingsError
    from foreshock._handle import Watch
    from foreshock._hooks.ddp import local_norms_wrapper

__all__ = [
    "AdaptiveClip",
    "AttachError",
    "ForeshockError",
    "NormClip",
    "SettingsError",
    "ValueClip",
    "Watch",
    "__version__",
    "attach",
    "local_norms_wrapper",
]

_MODULES = {
    "AdaptiveClip": "_control.clip",
    "AttachError": "_errors",
    "ForeshockError": "_errors",
    "NormClip": "_control.clip",
    "SettingsError": "_errors",
    "ValueClip": "_control.clip",
    "Watch": "_handle",
    "attach": "_attach.attach",
    "local_norms_wrapper": "_hooks.ddp",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"foreshock.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
