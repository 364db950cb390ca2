"""How well detection and diagnosis do on the fault corpus, beside what else is in use, on the same traces.

`make bench-detection` prints the test part; `--part tune` what the constants were chosen on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.faults.outcome import bad_steps
from benchmarks.faults.traces import Trace, all_traces
from benchmarks.peers import Log, compare
from foreshock_collector.analysis.channel import ChannelState
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay
from foreshock_collector.state.events import DetectedEvent, RunEvent
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.runs import Run
from foreshock_protos.v1 import telemetry_pb2 as pb

EPISODE_STEPS = 10
"""Alarms closer together than this are one, for every rule alike."""
RELAUNCHED_STEPS = 50
"""An attempt has just been resumed for so many steps."""
PACES = (0.2, 1.0, 10.0)
"""Steps a second."""
_STALL_SECONDS = 1200.0
"""A trace that stops is waited for so long, with all ranks reporting."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the collector says of one trace."""

    build_ups: list[int]
    """Steps, from 0, over all attempts."""
    resumed: int
    """Attempts that began with the history of the one before."""
    cause: str
    """Of the first incident; `healthy` without one."""
    root: str | None
    rank: int | None


def told(trace: Trace) -> Told:
    """Tell the trace to a collector's state, as its recorder did."""
    runs, now = Runs(), trace.hello.started_seconds
    events: list[RunEvent] = []
    for attempt in range(len(trace.starts)):
        ranks = [runs.register(hello, now) for hello in trace.hellos(attempt)]
        run = _run(runs, trace)
        for rank, batch in trace.batches(attempt):
            now += 0.01
            run.ingest(ranks[rank], batch, now)
            run.finalize_steps(now)
            events += run.events.unsaved
            run.mark_stored()
        now = _end(trace, attempt, run, ranks, now)
        events += run.events.unsaved
        run.mark_stored()
    run = _run(runs, trace)
    found = (each.event for each in events if isinstance(each, DetectedEvent))
    build_ups = [trace.starts[event.attempt] + event.sequence - 1 for event in found if event.kind == "build_up"]
    resumed = sum(attempt.inherited is not None for attempt in run.attempts)
    if not run.incidents.kept:
        return Told(build_ups=build_ups, resumed=resumed, cause="healthy", root=None, rank=None)
    first = run.incidents.kept[0].verdict
    return Told(build_ups=build_ups, resumed=resumed, cause=first.cause, root=first.likely_root, rank=first.rank)


def _run(runs: Runs, trace: Trace) -> Run:
    run = runs.get(trace.case.name)
    assert run is not None
    return run


def _end(trace: Trace, attempt: int, run: Run, ranks: Sequence[Instance], now: float) -> float:
    if trace.case.cause == "stalled":
        # Every rank's recorder goes on reporting; nobody has left.
        for _ in range(int(_STALL_SECONDS / 30)):
            now += 30.0
            for instance in ranks:
                run.heartbeat(instance, now)
            run.finalize_steps(now)
        return now
    for order, (rank, reason, detail, ended) in enumerate(trace.ends):
        if ended != attempt:
            continue
        instance = ranks[rank]
        if reason == "LOST":
            event = pb.Event(instance=instance.name, kind=pb.Event.RANK_LOST, wall_seconds=now + 0.01 * order)
            run.record_event(instance, event, now)
        exit_message = pb.Exit(instance=instance.name, reason=reason, detail=detail)
        exit_message.last_sequence = instance.position
        run.close(instance, exit_message, now)
    for _ in range(10):
        now += 1.0
        run.finalize_steps(now)
    return now


def norms_of(trace: Trace) -> tuple[list[float], list[bool]]:
    """Global norm of each step that any rank told, and whether the step is bad."""
    rows = trace.records
    first = (rows["sequence"] > 0).argmax(axis=1)
    norms = rows["global_norm"][np.arange(len(rows)), first]
    return norms.tolist(), bad_steps(trace).tolist()


def builds_up(norms: Sequence[float], bad: Sequence[bool]) -> bool:
    """By the data alone: 3 steps in a row, up to the first that is not finite, at 3 times the median of 50 before."""
    if not any(bad):
        return False
    first = list(bad).index(True)
    if first < 4:
        return False
    return all(norms[i] >= 3 * median(norms[max(0, i - 50) : i]) for i in range(first - 3, first))


def explodes_cold(norms: Sequence[float], losses: Sequence[float], bad: Sequence[bool]) -> int | None:
    """By the data alone: the first of 3 steps in a row with norm and loss at 3 times the first, among 25; None without.

    Only of a run that stays finite.
    """
    if any(bad) or len(norms) < 4:
        return None
    high = [norm >= 3 * norms[0] and loss >= 3 * losses[0] for norm, loss in zip(norms[:25], losses[:25], strict=True)]
    return next((step for step in range(1, len(high) - 2) if all(high[step : step + 3])), None)


# -- what else is in use -----------------------------------------------------------------------------------------------


def ten_times_median(norms: Sequence[float], bad: Sequence[bool]) -> list[int]:
    """Ten times the median of the last 50 finite norms."""
    seen: list[float] = []
    alarms = []
    for step, (norm, is_bad) in enumerate(zip(norms, bad, strict=True)):
        if is_bad:
            continue
        if len(seen) >= 10 and norm > 10 * median(seen[-50:]):
            alarms.append(step)
        seen.append(norm)
    return alarms


def zclip(norms: Sequence[float], bad: Sequence[bool]) -> list[int]:
    """z > 2.5 over an EMA (0.97) of mean and variance, from 25 steps on, fed with what it clips to (ZClip)."""
    mean = variance = math.nan
    first: list[float] = []
    alarms = []
    for step, norm in enumerate(norms):
        if len(first) < 25:
            first.append(norm)
            with np.errstate(all="ignore"):
                mean, variance = float(np.mean(first)), float(np.var(first))
            continue
        deviation = math.sqrt(variance) if variance >= 0 else math.nan
        z = (norm - mean) / (deviation + 1e-6)
        if z > 2.5:
            alarms.append(step)
            norm = mean + 2.5 * deviation / (z / 2.5)
        # A NaN enters here for good: z > 2.5 is false from then on.
        mean, variance = 0.97 * mean + 0.03 * norm, 0.97 * variance + 0.03 * (norm - mean) ** 2
    return alarms


def olmo(norms: Sequence[float], bad: Sequence[bool]) -> list[int]:
    """Six deviations over the last 128 steps, from 64 on, outliers included (OLMo-core's skip-step)."""
    alarms = []
    values = np.array(norms)
    with np.errstate(all="ignore"):
        # A window with a NaN has no deviation: every comparison with it is false.
        for step in range(64, len(values)):
            window = values[max(0, step - 128) : step]
            if abs(values[step] - window.mean()) > 6 * window.std():
                alarms.append(step)
    return alarms


def megatron(norms: Sequence[float], bad: Sequence[bool]) -> list[int]:
    """Ten times the largest of the first 100 (Megatron's "unexpectedly large")."""
    largest = max((n for n in norms[:100] if math.isfinite(n)), default=math.inf)
    return [step for step in range(100, len(norms)) if math.isfinite(norms[step]) and norms[step] >= 10 * largest]


Rule = Callable[[Sequence[float], Sequence[bool]], list[int]]
"""Steps at which it alarms, from norms and which steps are bad."""
BASELINES: dict[str, Rule] = {
    "10x running median": ten_times_median,
    "ZClip z > 2.5": zclip,
    "OLMo-core 6 sigma / 128": olmo,
    "Megatron 10x first 100": megatron,
}


def episodes(alarms: Sequence[int]) -> list[int]:
    """The first of each run of alarms."""
    return [step for i, step in enumerate(alarms) if not i or step - alarms[i - 1] > EPISODE_STEPS]


# -- the report --------------------------------------------------------------------------------------------------------


def measure(part: str, baselines: Mapping[str, Rule] | None = None, *, peers: Path | None = None) -> dict[str, Any]:
    """All figures of a part. baselines: other rules, by name; default: all. peers: Python with the other programs."""
    baselines = BASELINES if baselines is None else baselines
    traces = all_traces(part)  # type: ignore[arg-type]
    steps: Counter[str] = Counter()
    alarms: dict[str, Counter[str]] = defaultdict(Counter)
    leads: dict[str, list[int]] = defaultdict(list)
    missed: dict[str, list[str]] = defaultdict(list)
    climbing = cold = 0
    cold_warned: Counter[str] = Counter()
    confusion: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    roots: Counter[bool] = Counter()
    log_wrong: list[str] = []
    logs: list[Log] = []
    relaunches: Counter[str] = Counter()
    for number, trace in enumerate(traces, 1):
        _progress(number, len(traces))
        case = trace.case
        norms, bad = norms_of(trace)
        steps[case.kind] += len(norms)
        said = told(trace)
        relaunches["attempts"] += len(trace.starts) - 1
        relaunches["with_history"] += said.resumed
        after = {start + step for start in trace.starts[1:] for step in range(RELAUNCHED_STEPS)}
        if case.kind != "failing":
            relaunches["false_alarms"] += len(after.intersection(episodes(said.build_ups)))
        elif True in bad and (end := bad.index(True)) in after:
            relaunches["exploding"] += 1
            relaunches["warned"] += any(end - 32 <= place < end for place in said.build_ups)
        found = {"Foreshock": said.build_ups} | {name: rule(norms, bad) for name, rule in baselines.items()}
        if case.kind == "failing" and builds_up(norms, bad):
            climbing += 1
            end = bad.index(True)
            logs.append(Log(_rows(trace)[:end], "climb", trouble=True))
            for name, places in found.items():
                before = [place for place in places if end - 32 <= place < end]
                leads[name] += [end - before[0]] if before else []
                missed[name] += [] if before else [case.name]
        elif case.kind == "failing" and (start := explodes_cold(norms, _losses(trace), bad)) is not None:
            cold += 1
            logs.append(Log(_rows(trace)[: start + 3], "cold", trouble=True))
            cold_warned.update(name for name, places in found.items() if any(start <= p < start + 3 for p in places))
        elif case.kind != "failing":
            for name, places in found.items():
                alarms[name][case.kind] += len(episodes(places))
        expected = "healthy" if case.cause == "amp_overflow" else case.cause
        confusion[expected, said.cause] += 1
        if said.cause != expected:
            wrong.append(f"{case.name}: {said.cause}, not {expected}")
        if case.root and said.cause == case.cause:
            roots[said.root == case.root] += 1
            if said.root != case.root:
                wrong.append(f"{case.name}: root {said.root}, not {case.root}")
        if case.cause in _IN_LOGS:
            trouble = case.cause not in ("healthy", "amp_overflow")
            logs.append(Log(rows := _rows(trace), "whole", trouble=trouble))
            cause = replay(rows).verdict.cause
            if cause != case.cause:
                log_wrong.append(f"{case.name}: {cause}, not {case.cause}")
            if case.clip is not None and (cause := replay(_rows(trace, clipped=True)).verdict.cause) != case.cause:
                log_wrong.append(f"{case.name}, norms after clipping: {cause}, not {case.cause}")
    right = sum(count for (is_so, said_so), count in confusion.items() if is_so == said_so)
    judged_roots = roots[True] + roots[False]
    return {
        "part": part,
        "traces": len(traces),
        "steps": dict(steps),
        "building_up": climbing,
        "exploding_cold": cold,
        "relaunches": {
            name: relaunches[name] for name in ("attempts", "with_history", "false_alarms", "exploding", "warned")
        },
        "rules": {
            name: {
                "warned": climbing - len(missed[name]),
                "cold_warned": cold_warned[name],
                "median_lead_steps": median(leads[name]) if leads[name] else None,
                "alarms_per_10000_healthy_steps": 1e4 * alarms[name]["healthy"] / max(1, steps["healthy"]),
                "alarms_per_10000_recovering_steps": 1e4 * alarms[name]["recovering"] / max(1, steps["recovering"]),
                "missed": missed[name],
            }
            for name in ("Foreshock", *baselines)
        },
        "verdicts": {"right": right, "of": sum(confusion.values()), "share": right / max(1, sum(confusion.values()))},
        "roots": {"right": roots[True], "of": judged_roots, "share": roots[True] / max(1, judged_roots)},
        "confusion": [[is_so, said_so, count] for (is_so, said_so), count in sorted(confusion.items())],
        "wrong": wrong,
        "wrong_in_logs": log_wrong,
        "peers": {} if peers is None else compare(peers, logs),
    }


_IN_LOGS = ("healthy", "exploding_gradients", "first_step_nonfinite", "sudden_nonfinite", "amp_overflow")
"""What loss, norm and learning rate alone can tell."""


def _rows(trace: Trace, *, clipped: bool = False) -> list[Row]:
    """What a script's own log would hold: rank 0's learning rate, the norm, and the mean loss.

    clipped: the norm after clipping.
    """
    norms, _ = norms_of(trace)
    if clipped:
        norms = (np.array(norms) * trace.records["clip_coefficient"][:, 0]).tolist()
    rates = trace.records["learning_rate"][:, 0].tolist()
    return [
        Row(step=step, loss=loss, norm=norm, rate=rate)
        for step, (loss, norm, rate) in enumerate(zip(_losses(trace), norms, rates, strict=True))
    ]


def _losses(trace: Trace) -> list[float]:
    """Mean loss of each step over the ranks."""
    rows = trace.records
    with np.errstate(all="ignore"):
        losses = np.where(rows["sequence"] > 0, rows["loss"], 0).mean(axis=1)
    return losses.tolist()  # type: ignore[no-any-return]


def speed() -> float:
    """Steps a second through the run-level channel, on one core: heavy-tailed noise, a million of them."""
    values = np.exp(0.3 * np.random.default_rng(0).standard_t(3, 1_000_000)).tolist()
    channel = ChannelState()
    # By the processor's time: what else runs on the machine is not the channel's.
    begun = time.process_time()
    channel.scan(values, DEFAULT.gradient)
    return len(values) / (time.process_time() - begun)


def show(found: dict[str, Any]) -> str:
    """For people."""
    steps = found["steps"]
    lines = [
        f"{found['part']} part: {found['traces']} traces; steps: "
        + ", ".join(f"{count:,} {kind}" for kind, count in sorted(steps.items())),
        f"{found['building_up']} failing runs build up by the data alone.",
        f"{found['exploding_cold']} failing runs explode in their first steps and stay finite: cold.",
        _relaunches(found["relaunches"]),
        "",
        f"{'rule':26}{'warned':>10}{'lead':>8}{'cold':>8}{'per 10k healthy':>18}{'per 10k recovering':>20}",
    ]
    for name, rule in found["rules"].items():
        lead = "-" if rule["median_lead_steps"] is None else f"{rule['median_lead_steps']:g}"
        lines.append(
            f"{name:26}{rule['warned']:>6}/{found['building_up']:<3}{lead:>8}"
            f"{rule['cold_warned']:>6}/{found['exploding_cold']}"
            f"{rule['alarms_per_10000_healthy_steps']:>18.2f}{rule['alarms_per_10000_recovering_steps']:>20.2f}"
        )
    lines += ["", "false alarms per run and day, healthy, at a pace of " + ", ".join(f"{p:g}/s" for p in PACES) + ":"]
    for name, rule in found["rules"].items():
        daily = [rule["alarms_per_10000_healthy_steps"] / 1e4 * pace * 86400 for pace in PACES]
        lines.append(f"{name:26}" + "".join(f"{value:>12.1f}" for value in daily))
    for name in ("verdicts", "roots"):
        lines.append(f"{name}: {found[name]['right']} of {found[name]['of']} right, {found[name]['share']:.1%}")
    lines += ["", "confusion, right verdict -> given verdict:"]
    lines += [f"  {is_so:24}-> {said:24}{count:>5}" for is_so, said, count in found["confusion"]]
    lines += ["", "missed: " + (", ".join(found["rules"]["Foreshock"]["missed"]) or "none")]
    lines += ["wrong:", *(f"  {text}" for text in found["wrong"])] if found["wrong"] else ["wrong: none"]
    in_logs = [f"  {text}" for text in found["wrong_in_logs"]]
    lines += ["wrong from the log alone:", *in_logs] if in_logs else ["wrong from the log alone: none"]
    if found["peers"]:
        lines += ["", f"{'program, on the logs alone':26}{'warned':>10}{'cold':>8}{'right':>12}{'per 10k calm':>15}"]
    for name, peer in found["peers"].items():
        lines.append(
            f"{name:26}{peer['warned']:>6}/{found['building_up']:<3}{peer['cold_warned']:>6}/{found['exploding_cold']}"
            f"{peer['right']:>8}/{peer['of']}{peer['alarms_per_10000_calm_steps']:>15.2f}"
        )
    lines.append(f"run-level channel: {found['channel_steps_per_second'] / 1e6:.2f} M steps/s on one core")
    return "\n".join(lines)


def _relaunches(found: dict[str, int]) -> str:
    resumed = f"{found['attempts']} attempts resume from a checkpoint, {found['with_history']} with the history before."
    warned = f"{found['exploding']} explode, warned: {found['warned']}."
    return f"{resumed}\nWithin {RELAUNCHED_STEPS} steps: {found['false_alarms']} false alarms; {warned}"


def _progress(number: int, of: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{number}/{of}" + ("\n" if number == of else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("tune", "test"), default="test")
    parser.add_argument("--json", action="store_true", help="one object")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="of an environment with requirements-peers.txt")
    options = parser.parse_args()
    found = measure(options.part, peers=options.peers) | {"channel_steps_per_second": speed()}
    print(json.dumps(found) if options.json else show(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
