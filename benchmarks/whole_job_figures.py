"""What the starts of one job say about it: the arithmetic of whole_job.py, which measures.

A step is made when its line of numbers is there. `pace` is the median of `step_seconds` over all steps but the first one of
each start.

- Goodput = steps × pace ÷ seconds from each start to its end, summed over the starts, up to the end of training. The stage
  `evaluate before` is not in it (it is counted with what is not training), nor is the time between two starts.
- A start costs (start → first step) − `evaluate before` − pace, and for each later step what it takes longer than pace.
  A notice costs what lies between the last finished step and the exit: the dropped half-made step, and the save.
- Goodput projected for S steps and two notices = S × pace ÷ (S × pace + cost of the first start + 2 × (mean cost of the two
  later starts + cost of the notice)). S is 742: three epochs of Radiology_mini at 8 rows.
- Not training, projected = the stages `evaluate before` and `evaluate after`, each taken to 13 batches of 16 (200 rows) by its
  seconds a batch, and all else behind the last step; as a share of that and of the projected training. Seconds a batch hold
  what the first batch alone costs, so for the one batch of 16 rows the share is an upper bound.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

STEPS, ROWS, BATCH = 742, 200, 16
PEAKS = {"device": "device_peak", "host": "host_anonymous", "scratch": "scratch"}
"""What is foreseen, and what it is compared with: mapped files are host memory that nobody needs."""


@dataclass
class Attempt:
    """One start of the job; times are seconds of one clock. `resumed` is the step it went on from, `lines` are the numbers of
    the steps it made, `first` and `last` when the first and the newest of them were seen, `cut` when a signal was sent."""

    name: str
    began: float
    resumed: int = 0
    first: float | None = None
    last: float | None = None
    cut: float | None = None
    ended: float = 0.0
    code: int | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    foreseen: dict[str, dict[str, float]] = field(default_factory=dict)

    def told(self) -> str:
        said = [f"ended with {self.code} after {self.ended - self.began:.1f} s"]
        if self.first is not None:
            said.append(f"first step after {self.first - self.began:.1f} s")
            said.append(f"steps {self.lines[0]['step']} to {self.lines[-1]['step']}")
        if self.cut is not None:
            said.append(f"signal → exit {self.ended - self.cut:.1f} s")
        return ", ".join(said)


@dataclass(frozen=True)
class Figure:
    """One row of results.jsonl."""

    case: str
    value: float
    unit: str
    goal: str = ""
    meets: bool | None = None
    detail: str = ""

    def __str__(self) -> str:
        verdict = "" if self.meets is None else f" ({'meets' if self.meets else 'MISSES'} {self.goal})"
        return f"{self.case}: {self.value:.4g} {self.unit}{verdict}" + (f"; {self.detail}" if self.detail else "")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of steps in a metrics.jsonl; one that is being written is left out."""
    try:
        whole = path.read_text().rpartition("\n")[0]
    except FileNotFoundError:  # the job takes up the numbers of a checkpoint just now
        return []
    return [line for line in map(json.loads, whole.splitlines()) if "loss" in line]


def apart(mine: list[dict[str, Any]], uncut: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """Largest difference of a step's loss, as a share of the uncut run's; and what is wrong with the steps or their rows."""
    if [(line["step"], line["rows"]) for line in mine] != [(line["step"], line["rows"]) for line in uncut]:
        return math.nan, [f"{len(mine)} steps were published and {len(uncut)} of the uncut run, or they had other rows"]
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(mine, uncut, strict=True)), []


def pace_of(attempts: list[Attempt]) -> float:
    return float(statistics.median(chain(*([line["step_seconds"] for line in each.lines[1:]] for each in attempts))))


def measuring(attempt: Attempt) -> float:
    """Seconds of an attempt before its first step that are not training's."""
    return attempt.stages.get("evaluate before", {}).get("seconds", 0.0)


def start_cost(attempt: Attempt, pace: float) -> float:
    assert attempt.first is not None
    slower = float(sum(line["step_seconds"] - pace for line in attempt.lines[1:]))
    return attempt.first - attempt.began - measuring(attempt) - pace + slower


def projected(attempts: list[Attempt]) -> tuple[float, float]:
    """Goodput with two notices, and the seconds that training then takes, for `STEPS` steps."""
    notice, pace = attempts[0], pace_of(attempts)
    assert notice.last is not None
    later = statistics.mean(start_cost(each, pace) for each in attempts[1:])
    steps = STEPS * pace
    whole = steps + start_cost(notice, pace) + 2 * (later + notice.ended - notice.last)
    return steps / whole, whole


def goodput(attempts: list[Attempt], steps: int) -> float:
    """Of this job, as it was cut."""
    *cut, last = attempts
    assert last.last is not None
    seconds = sum(each.ended - each.began for each in cut) + last.last - last.began
    return steps * pace_of(attempts) / (seconds - sum(map(measuring, attempts)))


def not_training(attempts: list[Attempt], rows: int) -> float:
    """Share of the whole, projected for `STEPS` steps and `ROWS` held-out rows; `rows` were measured here."""
    stages, last = stages_of(attempts), attempts[-1]
    assert last.last is not None
    times = math.ceil(ROWS / BATCH) / math.ceil(rows / BATCH)
    before, after = (stages[f"evaluate {when}"]["seconds"] for when in ("before", "after"))
    other = times * (before + after) + (last.ended - last.last - after)
    return other / (other + projected(attempts)[1])


def stages_of(attempts: list[Attempt]) -> dict[str, dict[str, float]]:
    """Each stage as the last attempt that made it measured it."""
    return {name: stage for each in attempts for name, stage in each.stages.items()}


def foreseen_of(attempts: list[Attempt]) -> dict[str, dict[str, float]]:
    """What was foreseen for each stage, in bytes; empty when the job does not tell."""
    return {name: stage for each in attempts for name, stage in each.foreseen.items()}


LITTLE = 2e9
"""Bytes. A stage that takes less, and was foreseen to, is left out of the shares: half of it more would matter to nobody."""


def shares(attempts: list[Attempt], kind: str) -> dict[str, float]:
    """Peak over what was foreseen, by stage."""
    stages, foreseen = stages_of(attempts), foreseen_of(attempts)
    return {
        name: stage[PEAKS[kind]] / foreseen[name][kind]
        for name, stage in stages.items()
        if PEAKS[kind] in stage
        and foreseen.get(name, {}).get(kind)
        and max(stage[PEAKS[kind]], foreseen[name][kind]) >= LITTLE
    }


def figures(
    attempts: list[Attempt], result: dict[str, Any], rows: int, apart_by: float | None, *, published: bool
) -> list[Figure]:
    """The rows of a job that published. `apart_by` is None without an uncut run."""
    seconds, said = sum(each.ended - each.began for each in attempts), f"{result['steps']} steps"
    if len(attempts) > 1:
        said += f", {attempts[1].lines[-1]['step'] - attempts[-1].resumed} lost by the kill"
    found = [Figure("ends published", seconds, "s", "published", published, said)]
    if len(attempts) > 1:
        found += starts_and_stops(attempts, result["steps"], rows)
    found.append(Figure("token agreement in the gate", result["gate"]["token_agreement"], "share"))
    if apart_by is not None:
        found.append(Figure("losses apart from an uncut run, largest", 100 * apart_by, "%", "under 1", apart_by < 0.01))
    for kind in PEAKS:
        if near := shares(attempts, kind):
            stage = max(near, key=lambda name: abs(near[name] - 1))
            good = abs(near[stage] - 1) <= 0.15
            case = f"{kind} over what was foreseen, furthest"
            found.append(Figure(case, near[stage], "times", "within 15 %", good, stage))
    return found + [
        Figure(f"stage {name}", stage["seconds"], "s", detail=peaks_text(stage, foreseen_of(attempts).get(name, {})))
        for name, stage in stages_of(attempts).items()
    ]


def starts_and_stops(attempts: list[Attempt], steps: int, rows: int) -> list[Figure]:
    """What the notice, the kill and the starts cost."""
    notice = attempts[0]
    firsts = [each.first - each.began for each in attempts if each.first is not None]
    cold, warm = firsts[0] - measuring(notice), max(firsts[1:])
    share, other = projected(attempts)[0], not_training(attempts, rows)
    exit_seconds = notice.ended - (notice.cut or 0)
    return [
        Figure("start to first step", cold, "s", "at most 28", cold <= 28),
        Figure("start to first step, on a new node", warm, "s", "at most 28", warm <= 28),
        Figure("SIGTERM to exit", exit_seconds, "s", "within the grace, 30", exit_seconds <= 30),
        Figure("a steady step", pace_of(attempts), "s"),
        Figure("goodput of this job", 100 * goodput(attempts, steps), "%"),
        Figure(f"goodput, projected for {STEPS} steps", 100 * share, "%", "at least 93", share >= 0.93),
        Figure(f"not training, projected for {ROWS} rows", 100 * other, "%", "under 15", other < 0.15),
    ]


def unpublished(attempts: list[Attempt]) -> Figure:
    """The row of a job that did not."""
    seconds = sum(each.ended - each.began for each in attempts)
    return Figure("ends published", seconds, "s", "published", False, f"{attempts[-1].name}: {attempts[-1].told()}")


def peaks_text(stage: dict[str, float], foreseen: dict[str, float]) -> str:
    """The peaks of a stage, each with what was foreseen; host memory with mapped files too."""
    said = []
    for kind, peak in (PEAKS | {"output": "output"}).items():
        if peak in stage:
            more = [f"{foreseen[kind] / 1e9:.2f} foreseen"] if foreseen.get(kind) else []
            more += [f"{stage['host_peak'] / 1e9:.2f} with mapped files"] if kind == "host" else []
            said.append(f"{kind} {stage[peak] / 1e9:.2f} GB" + (f" ({', '.join(more)})" if more else ""))
    return ", ".join(said)


def table(attempts: list[Attempt]) -> str:
    """Starts and stages, for people."""
    lines = [f"{each.name:<16} {each.told()}" for each in attempts]
    foreseen = foreseen_of(attempts)
    for name, stage in stages_of(attempts).items():
        lines.append(f"{name:<16} {stage['seconds']:8.1f} s  {peaks_text(stage, foreseen.get(name, {}))}")
    return "\n".join(lines)
