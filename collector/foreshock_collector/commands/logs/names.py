"""Finds by meaning which column of a log is the step, the loss, the gradient norm and the learning rate."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+(?:\.\d+)?")
_CONTEXT = {"info", "log", "logs", "metric", "metrics", "optim", "optimizer", "train", "trainer", "training"}
"""Words that say where a value comes from, and nothing about what it is."""
_EVALUATION = {"dev", "eval", "evaluation", "test", "val", "valid", "validation"}
_MEANINGS = {
    "step": (
        *("global step", "global step max steps", "step", "iteration", "iter", "current steps", "num updates"),
        *("steps", "iterations", "updates", "iter num", "s", "counted step"),
    ),
    "epoch": ("epoch",),
    "loss": (
        *("loss", "loss step", "step loss", "batch loss", "lm loss", "cross entropy loss", "ce loss", "total loss"),
        *("loss total", "trl", "loss global avg loss", "global avg loss", "avg loss", "loss avg", "mean loss"),
        *("loss mean", "running loss", "loss epoch"),
    ),
    "norm": (
        *("grad norm", "gradient norm", "gnorm", "total grad norm", "grad norm total", "global grad norm"),
        *("global gradient norm", "gradient norm total", "global norm", "total norm", "grad 2.0 norm total"),
        *("grad 2 norm total", "grad l 2 norm", "grad norm step", "actor grad norm", "norm"),
    ),
    "rate": ("lr", "learning rate", "lr group 0", "learning rate group 0", "lr 0", "actor lr", "base lr"),
}
"""Words of the names of each column, the best first; words of context are left out of them."""
_MOST_NOTED, _MOST_SHOWN = 400, 40
_OPTIONS = {"step": "step", "loss": "loss", "norm": "norm", "lr": "rate"}
"""Key of `--columns`: the column's meaning."""


class Names:
    """Holds the chosen name of each column, None while there is none. A choice made is kept for the whole log."""

    def __init__(self, given: dict[str, str], run: str = "") -> None:
        self.given = given
        """Names that the user chose, by meaning."""
        self._run = run
        self._runs: dict[str, None] = {}
        self._chosen = dict(given)
        self._found: dict[str, None] = {}
        self._noted: dict[str, None] = {}

    @property
    def step(self) -> str | None:
        """Name of the column with the step."""
        return self._chosen.get("step")

    @property
    def epoch(self) -> str | None:
        """Name of the column with the epoch."""
        return self._chosen.get("epoch")

    @property
    def loss(self) -> str | None:
        """Name of the column with the loss."""
        return self._chosen.get("loss")

    @property
    def norm(self) -> str | None:
        """Name of the column with the gradient norm."""
        return self._chosen.get("norm")

    @property
    def rate(self) -> str | None:
        """Name of the column with the learning rate."""
        return self._chosen.get("rate")

    @property
    def recognized(self) -> bool:
        """Whether a loss or a gradient norm was found."""
        return self.loss is not None or self.norm is not None

    @property
    def silences_nan(self) -> bool:
        """Whether Hugging Face's Trainer wrote this log, as its names show: by default it writes 0.0 for NaN."""
        return self._found.keys() >= {"loss", "learning_rate", "epoch"} or "log_history" in self._found

    def add(self, fields: Iterable[str]) -> None:
        """Note further columns, and choose for each meaning that has none yet."""
        new = [field for field in fields if field not in self._found]
        if not new:
            return
        self._found.update(dict.fromkeys(new))
        self._runs.update(dict.fromkeys(run for field in new if (run := _run_of(field))))
        if self._run in self._runs:
            new = [field for field in new if _run_of(field) in ("", self._run)]
        for meaning in _MEANINGS.keys() - self._chosen.keys():
            # What the user gave is complete as to loss and norm: a second one that happens to be there is not meant.
            if self.given.keys() & {"loss", "norm"} and meaning in ("loss", "norm"):
                continue
            ranked = sorted((rank, field) for field in new if (rank := _rank(meaning, field)) is not None)
            if ranked:
                self._chosen[meaning] = ranked[0][1]

    def note(self, fields: Iterable[str]) -> None:
        """Note columns for an error message only."""
        if len(self._noted) < _MOST_NOTED:
            self._noted.update(dict.fromkeys(fields))

    def has_values(self, fields: Collection[str]) -> bool:
        """Return whether one of these is a loss or a norm, by choice or by meaning."""
        return self.loss in fields or self.norm in fields or any(map(has_meaning, fields))

    def check(self, name: str) -> None:
        """Raise `ValueError` with what was found, if there is no loss and no norm, or a given column is missing.

        name: how the message calls the file.
        """
        names = list(self._found | self._noted)
        found = ", ".join(names[:_MOST_SHOWN]) or "nothing"
        if len(names) > _MOST_SHOWN:
            found += f" and {len(names) - _MOST_SHOWN} more"
        for meaning, field in self.given.items():
            if field not in self._found:
                key = next(key for key, value in _OPTIONS.items() if value == meaning)
                raise ValueError(f"{name}: --columns {key}={field}: no such column; found {found}")
        if len(self._runs) > 1 and self._run not in self._runs and not self.given:
            raise ValueError(f"{name}: several runs, choose one with --run; found {', '.join(self._runs)}")
        if not self.recognized:
            raise ValueError(
                f"{name}: neither a loss nor a gradient norm; found {found}; "
                "name the columns with --columns step=...,loss=...,norm=...,lr=..."
            )


def parse_columns(text: str) -> dict[str, str]:
    """Return what `--columns` gives, by meaning. Raises `ValueError`."""
    given: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, separator, field = part.partition("=")
        if key.strip() not in _OPTIONS or not separator or not field.strip():
            raise ValueError(f"--columns {text}: expected step=NAME,loss=NAME,norm=NAME,lr=NAME, any of them")
        given[_OPTIONS[key.strip()]] = field.strip()
    return given


def is_evaluation(field: str) -> bool:
    """Return whether a name belongs to an evaluation."""
    return bool(_EVALUATION.intersection(_words(field)))


def has_meaning(field: str) -> bool:
    """Return whether the name is one of a loss or a gradient norm."""
    return any(_rank(meaning, field) is not None for meaning in ("loss", "norm"))


def _run_of(field: str) -> str:
    """Return the run that W&B puts in front, "brisk-sun-12" of "brisk-sun-12 - train/loss"; empty if there is none."""
    return field.rpartition(" - ")[0]


def _words(field: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(field.rpartition(" - ")[2])]


def _rank(meaning: str, field: str) -> tuple[int, int] | None:
    """Return how well a name fits, smaller is better: first by its words, then by how little else it has."""
    words = _words(field)
    if _EVALUATION.intersection(words):
        return None
    plain = [word for word in words if word not in _CONTEXT]
    key, names = " ".join(plain), _MEANINGS[meaning]
    if key in names:
        return names.index(key), len(words) - len(plain)
    # Lightning's LearningRateMonitor names a rate after the optimizer: "lr-AdamW".
    return (len(names), len(words)) if meaning == "rate" and plain[:1] == ["lr"] else None
