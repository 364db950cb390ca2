"""`foreshock run` starts a command with a hook that waits for torch, and does nothing where nothing trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock._run.command import STARTUP, environment_of, parsed
from tests.support.commands import FORESHOCK
from tests.support.waiting import WAIT_SECONDS

TORCH = {
    "__init__.py": "from torch import compiler, optim\n",
    "compiler.py": "def is_compiling():\n    return False\n",
    "optim/__init__.py": "",
    "optim/optimizer.py": "hooks = []\n\ndef register_optimizer_step_pre_hook(hook):\n    hooks.append(hook)\n",
}
"""As much of torch as the hook needs at its import."""
STEPS = """
import torch.optim.optimizer
for step in range(3):
    for hook in torch.optim.optimizer.hooks:
        hook(step, (), {})
print("trained")
"""


BARE_PYTHON = str(Path(sys.base_prefix) / "bin" / "python3")
"""An interpreter that does not have what this one has installed."""


def run(*command: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments under `foreshock run`."""
    return subprocess.run(
        [*FORESHOCK, "run", "--", python, *command],
        capture_output=True, text=True, timeout=WAIT_SECONDS, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def test_options_become_variables_and_win_over_those_of_the_environment() -> None:
    options = parsed(["--clip", "1.0", "--skip", "--no-local-norms", "--run", "lr0.3", "--", "torchrun", "--skip"])
    assert options.command == ["torchrun", "--skip"]
    environment = environment_of(options, {"FORESHOCK_CLIP": "2.0", "FORESHOCK_EXPERIMENT": "mine", "PATH": "/bin"})
    assert environment == {
        "FORESHOCK_CLIP": "1.0",
        "FORESHOCK_SKIP": "1",
        "FORESHOCK_LOCAL_NORMS": "0",
        "FORESHOCK_RUN": "lr0.3",
        "FORESHOCK_EXPERIMENT": "mine",
        "PATH": "/bin",
        "PYTHONPATH": str(STARTUP),
    }
    assert environment_of(options, {"PYTHONPATH": "a:b"})["PYTHONPATH"] == f"{STARTUP}:a:b"


@pytest.mark.integration
def test_a_process_without_torch_imports_nothing_more() -> None:
    show = "import sys; print(*sorted(sys.modules)); print(*sys.path)"
    done = run("-c", show)
    alone = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    theirs, ours = (each.stdout.splitlines() for each in (alone, done))
    assert set(ours[0].split()) - set(theirs[0].split()) == {"__future__", "sitecustomize"}
    assert ours[1] == theirs[1] and done.stderr == ""


@pytest.mark.integration
def test_a_hidden_sitecustomize_runs_too_and_its_error_is_its_own(tmp_path: Path) -> None:
    theirs = write(tmp_path, {"sitecustomize.py": "import sys\nsys.theirs = True\n"})
    show = "import sys, sitecustomize; print(sys.theirs, sitecustomize.__file__)"
    assert run("-c", show, PYTHONPATH=theirs).stdout == f"True {tmp_path}/sitecustomize.py\n"
    write(tmp_path, {"sitecustomize.py": "import missing\n"})
    done = run("-c", "print('trained')", PYTHONPATH=theirs)
    assert done.stdout == "trained\n" and "missing" in done.stderr and "foreshock" not in done.stderr


@pytest.mark.integration
@pytest.mark.parametrize(
    ("torch", "said"),
    [
        (TORCH, "foreshock: not watching: ModuleNotFoundError: No module named 'foreshock'\n"),
        ({**TORCH, "optim/optimizer.py": "hooks = []\n"}, "foreshock: not watching: ImportError: cannot import name"),
    ],
    ids=["foreshock is missing", "torch is of another version"],
)
def test_what_fails_in_the_hook_is_one_line_and_the_script_goes_on(
    tmp_path: Path, torch: dict[str, str], said: str
) -> None:
    path = write(tmp_path, {f"torch/{name}": text for name, text in torch.items()})
    done = run("-c", STEPS, python=BARE_PYTHON, PYTHONPATH=path)
    assert done.stdout == "trained\n"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


@pytest.mark.integration
def test_an_import_of_torch_that_fails_fails_as_alone(tmp_path: Path) -> None:
    path = write(tmp_path, {"torch/__init__.py": "raise ImportError('no driver')\n"})
    done = run("-c", "import torch", python=BARE_PYTHON, PYTHONPATH=path)
    assert done.returncode == 1 and done.stderr.endswith("ImportError: no driver\n")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "foreshock run: give the command after --, as in: foreshock run -- torchrun train.py\n"),
        (
            ["--embedded", "--collector", "monitor:4327", "--", "true"],
            2,
            "foreshock run: --embedded starts a collector of its own; leave out --collector\n",
        ),
        (["--", "no-such-launcher"], 127, "foreshock run: cannot start no-such-launcher: No such file or directory\n"),
        (["--", sys.executable, "-c", "import sys; sys.exit(7)"], 7, ""),
    ],
    ids=["nothing", "two collectors", "unknown", "ends"],
)
def test_its_exit_code_is_that_of_the_command(arguments: list[str], code: int, said: str) -> None:
    done = subprocess.run([*FORESHOCK, "run", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)
