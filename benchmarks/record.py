"""Where measurements go: one JSON object a line in results.jsonl, rendered as RESULTS.md.

python benchmarks/record.py      renders
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
PAGE = FOLDER / "RESULTS.md"


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
        "command": shlex.join(["python", *(arg.removeprefix(f"{FOLDER.parent}/") for arg in sys.argv)]),
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


def render(rows: Iterable[dict[str, Any]]) -> str:
    """The newest value of each case on each machine, by benchmark; behind a device's comma is how much of it was granted."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        newest[row["bench"], row["case"], row["device"].partition(",")[0]] = row
    lines = ["# Results", "", "Rendered by `python benchmarks/record.py` from `results.jsonl`, which holds every run."]
    for bench in sorted({bench for bench, _, _ in newest}):
        lines += [
            "",
            f"## {bench}",
            "",
            "| case | value | goal | met | on | commit | date |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in (row for (name, _, _), row in newest.items() if name == bench):
            met = {True: "yes", False: "**no**", None: ""}[row["meets"]]
            cells = [row["case"], f"{row['value']:g} {row['unit']}{_detail(row)}", row["goal"], met]
            cells += [row["device"], row["commit"], row["date"][:10]]
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
        commands = {row["command"] for (name, _, _), row in newest.items() if name == bench}
        lines += ["", *(f"    {command}" for command in sorted(commands))]
    return "\n".join(lines) + "\n"


def _verdict(row: dict[str, Any]) -> str:
    return "" if row["meets"] is None else f" ({'meets' if row['meets'] else 'MISSES'} {row['goal']})"


def _detail(row: dict[str, Any]) -> str:
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
