"""Where measurements go: one JSON object a line in results.jsonl, rendered as RESULTS.md.

python benchmarks/results.py      renders
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
PAGE = FOLDER / "RESULTS.md"


PLACES = ("--model", "--folder", "--limit", "--json", "--scratch")
"""Options that decide where a benchmark runs, and how long it may, and nothing of what it measures."""
ROUNDS = ("--rounds", "--saves", "--seconds")
"""Options that decide how often something is measured, or for how long."""
SPEED: tuple[str, ...] = (
    "model, layers",
    "peer",
    "job, samples/s",
    "peer, samples/s",
    "job over peer",
    "job, share of the limit",
)
SPEED += ("peer, share of the limit", "first loss apart", "card", "commit")
HOUR = timedelta(hours=1)
Row = dict[str, Any]


def without_places(arguments: Sequence[str], left_out: Sequence[str] = PLACES) -> list[str]:
    """The command line for others to repeat."""
    kept = [arg.removeprefix(f"{FOLDER.parent}/") for arg in arguments]
    return [arg for n, arg in enumerate(kept) if arg not in left_out and (n == 0 or kept[n - 1] not in left_out)]


def append(
    bench: str,
    case: str,
    value: float,
    unit: str,
    *,
    goal: str = "",
    meets: bool | None = None,
    detail: str = "",
    device: str = "",
) -> None:
    """Add one measurement. `goal` says in words what was aimed at, `meets` whether it was reached (None: no goal), `detail`
    what belongs to the value and is no case of its own."""
    row = {
        "bench": bench,
        "case": case,
        "value": round(value, 4),
        "unit": unit,
        "goal": goal,
        "meets": meets,
        "detail": detail,
        "device": device or this_machine(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *without_places(sys.argv)]),
    }
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{bench} · {case}: {row['value']} {unit}{_verdict(row)}", flush=True)


def this_machine() -> str:
    """The processor and how many of its cores there are."""
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.machine()


def commit() -> str:
    """The commit that was measured, with a plus when the tree held changes; empty outside a repository."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each case on each machine, of commands that can still be given, in the order of their first runs.

    Of each command, however often it measures, the newest run alone counts: a case that it left out is one that the benchmark
    has no more. A run ends where a case comes again, or an hour has gone by.
    """
    runs: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if can_be_given(row["command"]):
            run = runs.setdefault((*what_it_measures(row["command"]), *_against(row)), {})
            last = next(reversed(run.values()), row)
            if row["case"] in run or _time(row) - _time(last) > HOUR:
                run.clear()
            run[row["case"]] = row
    found: dict[tuple[str, ...], Row] = {}
    for row in sorted((row for run in runs.values() for row in run.values()), key=lambda row: str(row["date"])):
        found[row["bench"], row["case"], *_against(row)] = row
    return list(found.values())


def can_be_given(command: str) -> bool:
    """Whether the benchmark of a recorded command is there, and knows all its options."""
    script, *arguments = shlex.split(command)[1:]
    text = "".join(_read(str(FOLDER.parent / script)))
    return bool(text) and all(f'"{option}"' in text for option in arguments if option.startswith("--"))


def what_it_measures(command: str) -> list[str]:
    """A recorded command without places and counts of rounds."""
    return [arg for arg in without_places(shlex.split(command), (*PLACES, *ROUNDS)) if not arg.startswith("/")]


def _time(row: Row) -> datetime:
    return datetime.fromisoformat(row["date"])


def _against(row: Row) -> tuple[str, str]:
    """The device, without how much of it was granted, and the store with a version that a case may begin with."""
    store = re.match(r"\w+ \d+\.\d+\.\d+ ", row["case"])
    return str(row["device"]).partition(",")[0], store[0] if store else ""


def render(rows: Iterable[Row]) -> str:
    """What `newest` keeps, by benchmark."""
    kept = newest(rows)
    lines = ["# Results", "", "The newest run of each case on each machine; `results.jsonl` holds every run."]
    lines += ["Rendered by `python benchmarks/results.py`.", *speed(kept)]
    for bench in sorted({row["bench"] for row in kept}):
        lines += [
            "",
            f"## {bench}",
            "",
            "| case | value | goal | met | on | commit | date |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in (row for row in kept if row["bench"] == bench):
            met = {True: "yes", False: "**no**", None: ""}[row["meets"]]
            cells = [row["case"], f"{row['value']:g} {row['unit']}{_detail(row)}", row["goal"], met]
            cells += [row["device"], row["commit"], row["date"][:10]]
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
        commands = {shlex.join(without_places(shlex.split(row["command"]))) for row in kept if row["bench"] == bench}
        lines += ["", *(f"    {command}" for command in sorted(commands))]
    return "\n".join(lines) + "\n"


def speed(kept: Sequence[Row]) -> list[str]:
    """One line for each flow that was timed beside the job on the same GPU, in the same run."""
    flows: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in kept:
        what, _, figure = str(row["case"]).partition(": ")
        if row["bench"] == "throughput" and figure:
            flows.setdefault((what, *_against(row)), {})[figure] = row
    lines = [
        "",
        "## Training speed beside a notebook",
        "",
        "The same model, rows, order, start and effective batch of 8 in one run; samples are rows of one image and its answer.",
        "The limit is the card's dense bf16 product, as the vendor states it.",
        "",
        "| " + " | ".join(SPEED) + " |",
        "|" + "---|" * len(SPEED),
    ]
    for (what, *_), found in flows.items():
        if ratio := found.get("job over notebook"):
            model, _, rest = what.partition(", ")
            layers, _, peer = (rest or model).partition(", ")
            model = model if rest else "mllama 4bit"
            shares = ["job, share of bf16 limit", "notebook, share of bf16 limit"]
            cells = [
                f"{model}, {layers}",
                {"": "plain", "tuned peer": "tuned"}.get(peer, peer.removeprefix("notebook ")),
            ]
            cells += [_figure(found, name) for name in ("job", "notebook", "job over notebook", *shares)]
            cells += [_figure(found, "first loss apart"), ratio["device"], ratio["commit"]]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _figure(found: dict[str, Row], name: str) -> str:
    if name not in found:
        return ""
    unit = {"%": " %", "times": "×"}.get(found[name]["unit"], "")
    return f"{found[name]['value']:.3g}{unit}"


def _verdict(row: Row) -> str:
    return "" if row["meets"] is None else f" ({'meets' if row['meets'] else 'MISSES'} {row['goal']})"


def _detail(row: Row) -> str:
    return f"; {row['detail']}" if row.get("detail") else ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=FOLDER, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def main() -> None:
    PAGE.write_text(render(json.loads(line) for line in _read(str(RESULTS))), encoding="utf-8")


if __name__ == "__main__":
    main()
