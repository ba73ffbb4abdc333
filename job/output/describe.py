"""Describes the state of a job from its output only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from job.checkpoint import steps
from job.errors import DataError
from job.layout import REPORT_KEY, RESULT_KEY, STATUS_KEY
from job.output.stored import read_json
from job.runtime.status import HEARTBEAT_SECONDS
from job.store import Store, open_store

SILENT_AFTER = 2.5 * HEARTBEAT_SECONDS
"""Seconds: two heartbeats did not come."""
AGAIN = (69, 75)
"""Exit codes after which a scheduler starts the job again."""


def read_status(store: Store) -> dict[str, Any]:
    """Return the last status of the job, with `state` as it is now ("published", "running", "silent", "preempted" or "failed"),
    `silent_seconds` since its last sign of life, and of a published one `verdict` and `metrics`.

    `silent` means that the job was killed or is cut off from its store. Raises DataError if no job was ever there.
    """
    status, result = read_json(store, STATUS_KEY), read_json(store, RESULT_KEY)
    if status is None and result is None:
        raise DataError(f"{store.url} holds no job: there is no {STATUS_KEY}")
    status = {"name": "job", "state": "failed"} | (status or {})
    updated = datetime.fromisoformat(str(status.get("updated", "1970-01-01T00:00:00Z")))
    silent = max(0, round((datetime.now(UTC) - updated).total_seconds()))
    if result is not None:
        return (
            status
            | {"state": "published", "exit_code": 0}
            | {name: result.get(name) for name in ("verdict", "metrics")}
        )
    if status["state"] == "running":
        status |= {"silent_seconds": silent, "state": "silent" if silent > SILENT_AFTER else "running"}
    return status


def has_ended(status: dict[str, Any]) -> bool:
    """Return whether nothing more will happen by itself: it is published, or it failed in a way that no retry mends."""
    return status["state"] == "published" or (status["state"] == "failed" and status.get("exit_code") not in AGAIN)


def describe_status(store: Store, status: dict[str, Any] | None = None) -> str:
    """Describe a job in a few lines for people. `status` is that of `read_status`, if it was read before."""
    status = read_status(store) if status is None else status
    lines = [f"{status['name']}: {_state(status)}"]
    if "step" in status:
        loss = f", loss {status['loss']:.4f}" if "loss" in status else ""
        lines.append(f"{_step(status)}{loss}")
    if status["state"] == "running" and status.get("stage") == "train" and "seconds_left" in status:
        lines.append(f"training ends in about {status['seconds_left']} s")
    saved = steps(store)
    if saved:
        lines.append(f"checkpoints: {', '.join(map(str, sorted(saved)))}")
    if "attempt" in status:
        lines.append(f"attempt {status['attempt']} on {status.get('host', '?')}, since {status.get('started', '?')}")
    lines += _measured(status.get("verdict") or {}, status.get("metrics") or {})
    if status["state"] == "published":
        lines.append(f"report: {store.url.rstrip('/')}/{REPORT_KEY}")
    return "\n".join(lines)


def jobs_below(store: Store) -> dict[str, Store]:
    """Return the output of each job below a folder or prefix, by place, 2 before 10. Raises DataError if there is none."""
    keys = (entry.key.rpartition("/") for entry in store.list())
    places = {place for place, _, name in keys if name in (STATUS_KEY, RESULT_KEY)}
    if not places:
        raise DataError(f"{store.url} holds no job: there is no {STATUS_KEY} below it")
    ordered = sorted(
        places, key=lambda place: [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", place)]
    )
    return {place: open_store(f"{store.url.rstrip('/')}/{place}".rstrip("/")) for place in ordered}


def describe_all(store: Store) -> Iterator[str]:
    """Yield a line for each job below a folder or prefix, sorted by place. Raises DataError if there is none."""
    for place, output in jobs_below(store).items():
        status = read_status(output)
        step = f", {_step(status)}" if "step" in status else ""
        verdict = status.get("verdict") or {}
        said = f"; {verdict['metric']}: {verdict['said']}" if verdict.get("said") else ""
        yield f"{place or '.'}: {_state(status)}{step}{said}"


def _measured(verdict: dict[str, Any], metrics: dict[str, Any]) -> Iterator[str]:
    """The verdict, and each metric before and after with its change and that change's interval: the primary metric first, then
    the others in the order of the report."""
    if verdict.get("said"):
        yield f"verdict on {verdict['metric']}: {verdict['said']}"
    changes = metrics.get("change", {})
    for name in sorted(changes, key=lambda name: name != verdict.get("metric")):
        before, after = (_number(metrics[when][name]["value"]) for when in ("before", "after"))
        yield f"  {name:<24} {before:>9} → {after:>9}  ({_change(changes[name])})"


def _change(change: dict[str, Any]) -> str:
    if change["low"] is None:
        return "too few rows for an interval"
    return f"{change['value']:+.4f}, 95 % interval {change['low']:+.4f} to {change['high']:+.4f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _step(status: dict[str, Any]) -> str:
    return f"step {status['step']} of {status.get('steps', '?')}"


def _state(status: dict[str, Any]) -> str:
    stage = f"stage {status.get('stage')}"
    if str(status.get("stage")).startswith("evaluate") and "of_rows" in status:
        stage += f", {status['rows']} of {status['of_rows']} rows"
    match status["state"]:
        case "published":
            return "published"
        case "running":
            return f"running, {stage}; last sign of life {status['silent_seconds']} s ago"
        case "silent":
            return (
                f"no sign of life for {status['silent_seconds']} s in {stage}; one should come every {HEARTBEAT_SECONDS:.0f} s, "
                "so it was killed, or is cut off from its store"
            )
    return f"{status['state']}, exit {status.get('exit_code')}: {status.get('reason')}"
