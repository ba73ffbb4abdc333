"""The report people are shown: one HTML page that needs nothing else, and its tables as Markdown for the model card.

Both are made from the stored files of a run alone (`facts`, see `render`), so that `job report` can make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from job.evaluate import charts, gallery, wording

CURVES = {
    "Loss": ({"loss": "training loss", "eval_loss": "held-out loss"}, ""),
    "Learning rate": ({"learning_rate": "learning rate"}, ""),
    "Gradient norm": ({"grad_norm": "gradient norm"}, ""),
    "Throughput": ({"samples_per_second": "samples per second"}, " samples/s"),
    "GPU memory": ({"gpu_memory_peak_gb": "peak", "gpu_memory_reserved_gb": "reserved"}, " GB"),
}
SPEED: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "samples_per_second": ("Samples per second, median", median),
    "step_seconds": ("Seconds per step, median", median),
    "tokens_per_second": ("Tokens per second, median", median),
    "gpu_memory_peak_gb": ("Peak GPU memory, GB", max),
}
FACTS = {"gate": "Merged weights", "data": "Data", "plan": "Plan", "lineage": "Lineage"}


def render(facts: Mapping[str, Any], images: Mapping[str, bytes] | None = None) -> str:
    """The page. `images` are JPEG bytes by row id, of the rows that `gallery_ids` names.

    `facts`: `name`; `metrics` (metrics.json); `before`, `after` (rows of the evaluations); `samples` (what was said while
    training); `log` (lines of logs/metrics.jsonl); `plan`, `lineage`, `gate`, `data` (any nesting of names and values);
    `privacy` ({"report_images": bool}). A `refused` in the gate is a reason, and is said first. What is missing is left
    out. With `report_images` false no image, no text and no id of a row is in the page. All text is escaped, and the
    page's own policy forbids scripts and every request.
    """
    log = facts.get("log") or []
    return fill(
        "report.html",
        autoescape=True,
        facts={key: value for key, value in facts.items() if value},
        measured=facts.get("metrics") or {},
        curves=_curves(log),
        speed=_speed(log, (facts.get("lineage") or {}).get("price_per_hour")),
        shown=gallery.shown(facts, images or {}) if shows_rows(facts) else {},
        while_training=gallery.while_training(facts) if shows_rows(facts) else {},
        withheld=not shows_rows(facts),
        sections={title: wording.flat(facts[key]) for key, title in FACTS.items() if facts.get(key)},
    )


def markdown(facts: Mapping[str, Any]) -> str:
    """The headline and the tables of before and after, labels and groups; empty without metrics."""
    measured = facts.get("metrics") or {}
    return fill("report.md", autoescape=False, measured=measured) if measured.get("change") else ""


def fill(file: str, *, autoescape: bool, **values: Any) -> str:
    """A template of this room, or of export, with its values; it has `wording`, and the filters `readable` and `cell`."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, Path(__file__).parents[1] / "export"]),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"readable": wording.readable, "cell": cell}
    environment.globals["wording"] = wording
    return str(environment.get_template(file).render(**values))


def gallery_ids(facts: Mapping[str, Any]) -> list[str]:
    """The ids of the rows whose images the page shows; empty where privacy keeps them out."""
    if not shows_rows(facts):
        return []
    return [str(facts["after"][index]["id"]) for rows in gallery.chosen(facts).values() for index in rows]


def shows_rows(facts: Mapping[str, Any]) -> bool:
    return bool((facts.get("privacy") or {}).get("report_images", True))


def cell(text: object) -> str:
    """Text for a Markdown table or line: no pipe, markup, HTML or line break in it means anything."""
    escaped = "".join(f"\\{mark}" if mark in r"\`*_[]|~#" else mark for mark in " ".join(str(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _curves(log: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for title, (keys, unit) in CURVES.items():
        lines = {name: charts.series(log, key) for key, name in keys.items()}
        lines = {name: points for name, points in lines.items() if len(points) > 1}
        if lines:
            some = {name: points[:: max(1, len(points) // 10)] for name, points in lines.items()}
            found.append({"title": title, "drawing": Markup(charts.line_chart(title, lines, unit)), "lines": some})
    return found


def _speed(log: list[Mapping[str, Any]], price: Any) -> list[tuple[str, str]]:
    """Training in numbers: steps, losses, the medians, which one slow step (a resume, a save) does not move; hours of steps,
    the energy that the card told of at each line, and their cost where a price is known."""
    points = {key: [value for _, value in charts.series(log, key)] for key in SPEED}
    lines = [(name, wording.plain(pick(points[key]))) for key, (name, pick) in SPEED.items() if points[key]]
    if losses := charts.series(log, "loss"):
        first, last = (wording.number(losses[place][1], "number") for place in (0, -1))
        lines = [
            ("Steps", wording.plain(int(losses[-1][0]))),
            ("Training loss, first → last", f"{first} → {last}"),
            *lines,
        ]
    seconds, watts = charts.series(log, "step_seconds"), dict(charts.series(log, "gpu_power_watts"))
    starts = [0.0, *(step for step, _ in seconds)]
    spent = {step: each * (step - start) for (step, each), start in zip(seconds, starts, strict=False)}
    hours = sum(spent.values()) / 3600
    if spent:
        lines.append(("Hours of training steps", f"{hours:.2f}"))
    if watts:
        energy = sum(took * watts.get(step, 0.0) for step, took in spent.items()) / 3.6e6
        lines.append(("Energy of the GPU in them, from its power at each line", f"{energy:.3f}{wording.JOINED}kWh"))
    with suppress(TypeError, ValueError):  # no price, or one that is no number
        lines += [("Their cost at the price given", f"{hours * float(price):.2f}")] if spent else []
    return lines
