"""Runs at the start of each Python process under `foreshock run`, and waits for the first step of an optimizer.

Nothing is imported before that, neither torch nor Foreshock, and an error here leaves the process as it was. It hides
another `sitecustomize` on the path, and so runs that one too.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's own would have to be imported, in every process
if TYPE_CHECKING:
    from typing import Any


class _TorchWaiter:
    """Finds torch as the other finders do, and waits for the first step once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        try:
            sys.meta_path.remove(self)
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
            spec = next(filter(None, found), None)
            if spec is not None and spec.loader is not None:
                _wait_after(spec.loader)
        except Exception as error:
            # The other finders are asked next, and import torch as they would without this one.
            _give_up(error)
            return None
        return spec


def _wait_after(loader: Any) -> None:
    """Let a loader of torch call `_wait_for_step` with the module."""
    execute = loader.exec_module

    def exec_module(torch: Any) -> None:
        del loader.exec_module
        execute(torch)
        try:
            _wait_for_step(torch)
        except Exception as error:
            _give_up(error)

    loader.exec_module = exec_module


def _wait_for_step(torch: Any) -> None:
    """Register a hook that runs before each step of every optimizer."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    is_compiling = torch.compiler.is_compiling
    failed = False

    def before_step(optimizer: Any, *_: Any) -> None:
        nonlocal failed
        if is_compiling() or failed:
            return
        try:
            from foreshock._run.first_step import before_step

            before_step(optimizer)
        except Exception as error:
            failed = True
            _give_up(error)

    register_optimizer_step_pre_hook(before_step)


def _give_up(error: Exception) -> None:
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
        sys.stderr.write(f"foreshock: not watching: {type(error).__name__}: {error}\n")


def _run_hidden() -> None:
    """Run the `sitecustomize` that this one hides, if there is one."""
    folder = os.path.dirname(__file__)  # noqa: PTH120
    sys.path[:] = [entry for entry in sys.path if entry != folder]
    ours = sys.modules.pop("sitecustomize")
    try:
        __import__("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", ours)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _TorchWaiter())
    _run_hidden()
