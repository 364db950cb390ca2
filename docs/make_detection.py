"""Draw docs/detection.svg, six short histories as the detector sees them; with --check, only verify it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foreshock_collector.analysis.detection import Detector
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay

PICTURE = Path(__file__).with_name("detection.svg")
_WIDTH, _HEIGHT, _MARGIN, _COLUMNS = 360, 190, 34, 2
"""Of a panel, in pixels."""
_TEXT, _LINE, _BAND, _FAINT, _ALERT = "#1f2328", "#0969da", "#ddeeff", "#8c959f", "#cf222e"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One history, and what is to be seen in it."""

    title: str
    norms: Sequence[float]
    losses: Sequence[float] = ()
    rates: Sequence[float] = ()
    shows_loss: bool = False
    """Whether the curve is the loss instead of the norm."""

    def rows(self) -> list[Row]:
        """Return the log of this history."""
        losses = self.losses or [2.0] * len(self.norms)
        rates = self.rates or [1e-3] * len(self.norms)
        columns = zip(losses, self.norms, rates, strict=True)
        return [Row(step=step, loss=loss, norm=norm, rate=rate) for step, (loss, norm, rate) in enumerate(columns)]


def cases() -> list[Case]:
    """Return the six histories, noise included."""
    calm = _noisy([1.0] * 60, seed=1)
    fallen = _noisy([1.0] * 30 + [0.01 ** (step / 40) for step in range(40)] + [0.01] * 10, seed=2)
    died = [(2.3, 0.4), *[(900.0, 60.0), (420.0, 25.0), (650.0, 90.0), (380.0, 40.0)] * 15]
    climb = _noisy([3.0] * 40 + [3.0 + 0.1 * step for step in range(40)], seed=5, deviation=0.02)
    return [
        Case(title="A climb after a long decay", norms=[*fallen, 0.05, 0.3, 2.0, 9.0, math.nan]),
        Case(title="A lone spike", norms=[*calm, 30.0, *_noisy([1.0] * 20, seed=3)]),
        Case(title="Two equally hard batches", norms=[*calm, 30.0, 40.0, *_noisy([1.0] * 20, seed=4)]),
        Case(
            title="A learning rate that runs away",
            norms=[*calm, *(4.0**step for step in range(1, 8)), math.nan],
            rates=[*[1e-3] * 60, *(1e-3 * 1.6**step for step in range(1, 8)), 1.0],
        ),
        Case(
            title="Dead after the first updates, and finite",
            norms=[norm for _, norm in died],
            losses=[loss for loss, _ in died],
        ),
        Case(
            title="A loss that climbs at a flat norm",
            norms=_noisy([2.0] * 80, seed=6),
            losses=climb,
            shows_loss=True,
        ),
    ]


def picture() -> str:
    """Return the whole picture."""
    panels = [_panel(case, place) for place, case in enumerate(cases())]
    width, height = _COLUMNS * _WIDTH, math.ceil(len(panels) / _COLUMNS) * _HEIGHT + 30
    legend = [
        f'<rect x="{_MARGIN}" y="{height - 22}" width="18" height="10" fill="{_BAND}"/>',
        _text(_MARGIN + 24, height - 13, "usual band"),
        f'<circle cx="{_MARGIN + 120}" cy="{height - 17}" r="4" fill="none" stroke="{_ALERT}"/>',
        _text(_MARGIN + 130, height - 13, "spike: recorded"),
        f'<circle cx="{_MARGIN + 250}" cy="{height - 17}" r="4" fill="{_ALERT}"/>',
        _text(_MARGIN + 260, height - 13, "build-up, or lasting fault: alerts"),
        _text(_MARGIN + 470, height - 13, "✕ not finite"),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    background = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, background, *panels, *legend, "</svg>\n"])


def _panel(case: Case, place: int) -> str:
    rows = case.rows()
    values = [row.loss if case.shows_loss else row.norm for row in rows]
    bands = [(math.nan, math.nan)] * len(rows) if case.shows_loss else _bands(rows)
    shown = [value for value in values if value is not None and 0 < value < math.inf]
    low, high = math.log(min(shown)), math.log(max(shown))
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    left, top = place % _COLUMNS * _WIDTH, place // _COLUMNS * _HEIGHT

    def x(step: float) -> str:
        return f"{left + _MARGIN + step / (len(rows) - 1) * (_WIDTH - 1.5 * _MARGIN):.1f}"

    def y(value: float) -> str:
        part = (math.log(value) - low) / (high - low)
        return f"{top + _HEIGHT - 14 - min(max(part, 0.0), 1.0) * (_HEIGHT - 60):.1f}"

    known = [step for step, (lower, _) in enumerate(bands) if lower == lower]
    edges = [f"{x(step)},{y(bands[step][1])}" for step in known]
    edges += [f"{x(step)},{y(bands[step][0])}" for step in reversed(known)]
    points = [f"{x(step)},{y(value)}" for step, value in enumerate(values) if value is not None and value == value]
    found = replay(rows)
    marks = [_text(left + _MARGIN, top + 20, case.title, size=13)]
    marks += [_text(left + 4, float(y(value)) + 4, f"{value:.2g}", color=_FAINT) for value in (min(shown), max(shown))]
    for event in found.events:
        value = values[event.step]
        if event.kind in ("spike", "build_up") and value is not None:
            fill = _ALERT if event.kind == "build_up" else "none"
            marks.append(f'<circle cx="{x(event.step)}" cy="{y(value)}" r="4" fill="{fill}" stroke="{_ALERT}"/>')
    if found.verdict.cause == "loss_divergence" and case.shows_loss:
        begins = found.verdict.first_bad_step
        marks.append(f'<circle cx="{x(begins)}" cy="{y(values[begins] or 1.0)}" r="4" fill="{_ALERT}"/>')
    if found.first_nonfinite is not None:
        marks.append(_text(float(x(found.first_nonfinite)) - 4, top + 44, "✕"))
    verdict = found.verdict.cause + ("" if found.verdict.likely_root is None else f", {found.verdict.likely_root}")
    marks.append(_text(left + _MARGIN, top + 35, verdict, color=_FAINT))
    return "\n".join(
        [
            f'<polygon points="{" ".join(edges)}" fill="{_BAND}"/>' if edges else "",
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{_LINE}" stroke-width="1.2"/>',
            *marks,
        ]
    )


def _bands(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return the usual band before each step, NaN while there is none."""
    detector, found = Detector(), []
    for step, row in enumerate(rows):
        norm = math.nan if row.norm is None else row.norm
        found.append(detector.gradient.band(DEFAULT.gradient) or (math.nan, math.nan))
        detector.update(
            attempt=0,
            sequence=step + 1,
            step=step,
            norm=norm,
            loss=row.loss,
            rate=row.rate or math.nan,
            nonfinite=not math.isfinite(norm),
        )
    return found


def _noisy(levels: Sequence[float], *, seed: int, deviation: float = 0.1) -> list[float]:
    noise = np.random.default_rng(seed).standard_normal(len(levels))
    return (np.array(levels) * np.exp(deviation * noise)).tolist()  # type: ignore[no-any-return]


def _text(x: float, y: float, text: str, *, size: int = 11, color: str = _TEXT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}">{text}</text>'


def main() -> None:
    """Draw the picture, or compare it."""
    if sys.argv[1:] != ["--check"]:
        PICTURE.write_text(picture(), encoding="utf-8")
    elif PICTURE.read_text(encoding="utf-8") != picture():
        sys.exit("docs/detection.svg is out of date; run: make docs")


if __name__ == "__main__":
    main()
