"""Renders the report: one self-contained HTML page, and its tables as Markdown for the model card.

Both are made only from `Contents`, which are stored in the output, so that `job report` can render them again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from job.evaluate import error_groups, examples, metric_info
from job.evaluate.records import Comparison
from job.report import charts, conclusion, gallery
from job.report.contents import Contents, Numbers
from job.report.gates import gates

CURVES = {
    "Loss": ({"loss": "training loss", "eval_loss": "{kind} loss"}, ""),
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
LISTED = {"gate": "Merged weights", "data": "Data", "plan": "Plan", "lineage": "Lineage"}


def render(contents: Contents, images: Mapping[str, bytes] | None = None) -> str:
    """Returns the page. `images` maps the row ids from `gallery_ids` to JPEG bytes.

    If `privacy.report_images` is false, the page contains no images, texts or ids of rows. All text is escaped, and the page's
    content security policy forbids scripts and all requests.
    """
    listed, shows_rows = contents.to_json(), contents.privacy.report_images
    return fill(
        "page.html",
        autoescape=True,
        contents=contents,
        method=metric_info.flat(asdict(contents.metrics.settings)),
        curves=_curves(contents),
        gates=gates(contents),
        errors=_errors(contents),
        error_names=error_groups.NAMES,
        speed=_speed(contents.log, contents.lineage.price_per_hour),
        shown=gallery.shown(contents, images or {}) if shows_rows else {},
        while_training=gallery.while_training(contents.samples) if shows_rows else {},
        sections={title: lines for key, title in LISTED.items() if (lines := metric_info.flat(listed[key]))},
    )


def markdown(measured: Comparison) -> str:
    """Returns the main results as sentences, and the tables of metrics and groups; empty if nothing was measured."""
    return fill("page.md", autoescape=False, measured=measured) if measured.change else ""


def fill(file: str, *, autoescape: bool, **values: Any) -> str:
    """Renders a template of this package. Templates can use `wording` (`metric_info`) and the filters `readable` and `cell`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"readable": metric_info.readable, "cell": cell, "breakable": breakable}
    environment.globals |= {"wording": metric_info, "concluded": conclusion}
    return str(environment.get_template(file).render(**values))


def gallery_ids(contents: Contents) -> list[str]:
    """Returns the ids of the rows whose images the page shows; empty if privacy excludes them."""
    if not contents.privacy.report_images:
        return []
    parts = examples.chosen(contents.before, contents.after, contents.metrics)
    return [contents.after[index].id for rows in parts.values() for index in rows]


def cell(text: object) -> str:
    """Escapes text for one line or table cell of Markdown, where its pipes, markup, HTML and line breaks have no effect."""
    escaped = "".join(f"\\{mark}" if mark in r"\`*_[]|~#" else mark for mark in " ".join(str(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def breakable(text: str) -> Markup:
    """Escapes text, and lets long names break after their dots, slashes and underscores, where a phone has no room for them."""
    return Markup(re.sub(r"(?<=\w)([._/])(?=\w)(?!\d)", r"\1<wbr>", str(escape(text))))


def _errors(contents: Contents) -> dict[str, tuple[error_groups.Errors, error_groups.Errors]]:
    """Returns the errors of each kind before and after tuning."""
    labels = examples.labels_read(contents.metrics)
    old, new = (error_groups.error_groups(rows, labels) for rows in (contents.before, contents.after))
    return {kind: (old[kind], new[kind]) for kind in new if kind in old}


def _curves(contents: Contents) -> list[dict[str, Any]]:
    found = []
    kind = "validation" if contents.data.get("validation") else "held-out"
    for title, (keys, unit) in CURVES.items():
        lines = {name.format(kind=kind): charts.series(contents.log, key) for key, name in keys.items()}
        lines = {name: points for name, points in lines.items() if len(points) > 1}
        if lines:
            some = {name: points[:: max(1, len(points) // 10)] for name, points in lines.items()}
            found.append({"title": title, "drawing": Markup(charts.line_chart(title, lines, unit)), "lines": some})
    return found


def _speed(log: Sequence[Numbers], price: str | None) -> list[tuple[str, str]]:
    """Returns names and values that summarise training: steps, losses, speed, hours, energy (from the GPU power in each line of
    the log), and the cost if a price is known. Speeds are medians, so that a few slow steps (a resume, a save) do not count."""
    points = {key: [value for _, value in charts.series(log, key)] for key in SPEED}
    lines = [(name, metric_info.plain(pick(points[key]))) for key, (name, pick) in SPEED.items() if points[key]]
    if losses := charts.series(log, "loss"):
        first, last = (metric_info.number(losses[place][1], "number") for place in (0, -1))
        lines = [
            ("Steps", metric_info.plain(int(losses[-1][0]))),
            ("Training loss, first → last", f"{first} → {last}"),
            *lines,
        ]
    seconds, watts = charts.series(log, "step_seconds"), dict(charts.series(log, "gpu_power_watts"))
    starts = [0.0, *(step for step, _ in seconds)]
    spent = {step: each * (step - start) for (step, each), start in zip(seconds, starts, strict=False)}
    hours = sum(spent.values()) / 3600
    if spent:
        lines.append(("Hours in training steps", f"{hours:.2f}"))
    if watts:
        energy = sum(took * watts.get(step, 0.0) for step, took in spent.items()) / 3.6e6
        lines.append(("GPU energy of training steps, from the logged power", f"{energy:.3f}{metric_info.JOINED}kWh"))
    with suppress(ValueError):  # not a number
        lines += (
            [("Cost of training steps at the given price", f"{hours * float(price):.2f}")] if spent and price else []
        )
    return lines
