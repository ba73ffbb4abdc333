"""Describes the state of a job from its output only."""

from __future__ import annotations

from datetime import UTC, datetime

from job.checkpoint import steps
from job.errors import DataError
from job.layout import REPORT_KEY, RESULT_KEY, STATUS_KEY
from job.output.ownership import read_json
from job.runtime.status import HEARTBEAT_SECONDS
from job.store import Store

SILENT_AFTER = 4 * HEARTBEAT_SECONDS


def describe_status(store: Store) -> str:
    """Describe a job in a few lines for people. Raises DataError if no job was ever there."""
    status, result = read_json(store, STATUS_KEY), read_json(store, RESULT_KEY)
    if status is None and result is None:
        raise DataError(f"{store.url} holds no job: there is no {STATUS_KEY}")
    status = status or {}
    lines = [f"{status.get('name', 'job')}: {_state(status, published=result is not None)}"]
    if "step" in status:
        loss = f", loss {status['loss']:.4f}" if "loss" in status else ""
        lines.append(f"step {status['step']} of {status.get('steps', '?')}{loss}")
    if status.get("state") == "running" and "seconds_left" in status:
        lines.append(f"training ends in about {status['seconds_left']} s")
    saved = steps(store)
    if saved:
        lines.append(f"checkpoints: {', '.join(map(str, sorted(saved)))}")
    if "attempt" in status:
        lines.append(f"attempt {status['attempt']} on {status.get('host', '?')}, since {status.get('started', '?')}")
    verdict = (result or {}).get("verdict") or {}
    if verdict.get("said"):
        lines.append(f"verdict on {verdict['metric']}: {verdict['said']}")
    metrics = (result or {}).get("metrics") or {}
    for name, change in sorted(metrics.get("change", {}).items()):
        before, after = (_number(metrics[when][name]["value"]) for when in ("before", "after"))
        none = change["low"] is None
        span = "too few rows for an interval" if none else f"change {change['low']:+.4f} to {change['high']:+.4f}"
        lines.append(f"  {name:<24} {before:>9} → {after:>9}  ({span})")
    if result is not None:
        lines.append(f"report: {store.url.rstrip('/')}/{REPORT_KEY}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _state(status: dict[str, object], *, published: bool) -> str:
    if published:
        return "published"
    if status.get("state") != "running":
        return f"{status.get('state')}, exit {status.get('exit_code')}: {status.get('reason')}"
    updated = datetime.fromisoformat(str(status.get("updated", "1970-01-01T00:00:00Z")))
    silent = (datetime.now(UTC) - updated).total_seconds()
    if silent > SILENT_AFTER:
        return f"silent for {silent:.0f} s in stage {status.get('stage')}; killed, or cut off from its store"
    return f"running, stage {status.get('stage')}"
