"""The report people are shown: one HTML page that needs nothing else, and its tables as Markdown for the model card.

Both are made from the stored files of a run alone (`facts`, see `render`), so that `job report` can make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from job.evaluate import charts, gallery, wording

PARTS = {
    "changed": "Most changed",
    "worst": "Worst after tuning",
    "best": "Best after tuning",
    "random": "At random",
}
CURVES = {
    "Loss": ({"loss": "training loss", "eval_loss": "held-out loss"}, ""),
    "Learning rate": ({"learning_rate": "learning rate"}, ""),
    "Gradient norm": ({"grad_norm": "gradient norm"}, ""),
    "Throughput": ({"samples_per_second": "samples per second"}, " samples/s"),
    "Memory": ({"memory_gb": "allocated", "peak_memory_gb": "peak"}, " GB"),
}
SPEED: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "samples_per_second": ("Samples per second, median", median),
    "step_seconds": ("Seconds per step, median", median),
    "tokens_per_second": ("Tokens per second, median", median),
    "peak_memory_gb": ("Peak GPU memory, GB", max),
}


def render(facts: Mapping[str, Any], images: Mapping[str, bytes] | None = None) -> str:
    """The page. `images` are PNG or JPEG bytes by row id, of the rows that `gallery_ids` names.

    `facts`: `name`; `metrics` (metrics.json); `before`, `after` (rows of the evaluations); `log` (lines of
    logs/metrics.jsonl); `plan`, `lineage`, `gate`, `data` (any nesting of names and values); `privacy`
    ({"report_images": bool}). A `refused` in the gate is a reason, and is said first. What is missing is left out. With
    `report_images` false no image, no text and no id of a row is in the page. All text is escaped, and the page's own
    policy forbids scripts and every request.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = wording.readable
    measured = facts.get("metrics") or {}
    return environment.get_template("report.html").render(
        name=str(facts.get("name") or "vision-lora"),
        measured=measured,
        settings=measured.get("settings") or {},
        wording=wording,
        headlines=_headlines(measured),
        rows=_rows(measured),
        labels=_labels(measured),
        groups=_groups(measured),
        curves=_curves(facts.get("log") or []),
        speed=_speed(facts.get("log") or [], (facts.get("lineage") or {}).get("price_per_hour")),
        shown=_shown(facts, images or {}),
        withheld=not shows_rows(facts),
        sections={
            title: wording.flat(facts[key])
            for key, title in (("gate", "Merged weights"), ("data", "Data"), ("plan", "Plan"), ("lineage", "Lineage"))
            if facts.get(key)
        },
        gate={"refused": "", **(facts.get("gate") or {})},
    )


def gallery_ids(facts: Mapping[str, Any]) -> list[str]:
    """The ids of the rows whose images the page shows; empty where privacy keeps them out."""
    if not shows_rows(facts):
        return []
    return [str(facts["after"][index]["id"]) for rows in gallery.chosen(facts).values() for index in rows]


def shows_rows(facts: Mapping[str, Any]) -> bool:
    return bool((facts.get("privacy") or {}).get("report_images", True))


def markdown(facts: Mapping[str, Any]) -> str:
    """The headline and the tables of before and after, labels and groups; empty without metrics."""
    measured = facts.get("metrics") or {}
    if not measured.get("change"):
        return ""
    level = wording.confidence(measured)
    lines = [f"- {cell(headline['sentence'])}" for headline in _headlines(measured)]
    lines += [
        "",
        f"| Metric | Before | After | Change | {level} interval of the change | n |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {cell(row['title'])} | {row['before']} | {row['after']} | {row['change']} | {row['span']} | {row['n']} |"
        for row in _rows(measured)
    ]
    for group in _groups(measured):
        lines += ["", f"By {cell(group['title'])}:", ""]
        lines += ["| " + " | ".join(["Group", "n", *map(cell, group["metrics"])]) + " |"]
        lines += ["|---|--:|" + "--:|" * len(group["metrics"])]
        for row in group["rows"]:
            entries = [f"{entry['after']} ({entry['span']})" for entry in row["cells"]]
            few = " (too few rows to judge)" if row["too_few"] else ""
            lines.append(f"| {cell(row['value'])} | {row['n']}{few} | " + " | ".join(entries) + " |")
        lines += ["", *(cell(gap["sentence"]) for gap in group["gaps"])]
    lines += ["", wording.UNSEEN]
    return "\n".join(lines) + "\n"


def cell(text: object) -> str:
    """Text for a Markdown table or line: no pipe, markup, HTML or line break in it means anything."""
    escaped = "".join(f"\\{mark}" if mark in r"\`*_[]|~#" else mark for mark in " ".join(str(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _headlines(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for metric in wording.primary(measured.get("change") or {}):
        kind, change = wording.about(metric).kind, measured["change"][metric]
        found.append(
            {
                "title": wording.about(metric).title,
                "before": wording.number(measured["before"][metric]["value"], kind),
                "after": wording.number(measured["after"][metric]["value"], kind),
                "change": wording.number(change["value"], kind, signed=True),
                "span": wording.span(change, kind, signed=True),
                "verdict": wording.verdict(metric, change),
                "p": wording.p_text(change.get("p")),
                "n": change["n"],
                "chance": wording.chance(measured, metric),
                "sentence": wording.headline(measured, metric),
            }
        )
    return found


def _rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of all metrics, the numbers as text."""
    rows = []
    for metric, change in (measured.get("change") or {}).items():
        known, before, after = wording.about(metric), measured["before"][metric], measured["after"][metric]
        drawn = known.top and None not in (before["value"], after["value"], after["low"])
        rows.append(
            {
                "title": known.title,
                "meaning": known.meaning,
                "before": wording.number(before["value"], known.kind),
                "before_span": wording.span(before, known.kind),
                "after": wording.number(after["value"], known.kind),
                "after_span": wording.span(after, known.kind),
                "change": wording.number(change["value"], known.kind, signed=True),
                "span": wording.span(change, known.kind, signed=True),
                "p": wording.p_text(change.get("p")),
                "n": change["n"],
                "verdict": wording.verdict(metric, change),
                "bar": Markup(
                    charts.dumbbell(before["value"], after["value"], after["low"], after["high"], known.top or 1)
                    if drawn
                    else ""
                ),
            }
        )
    return rows


def _labels(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each label, its confusion tables; a row is (reference, total, [(count, share of the row, right)])."""
    found = []
    for name, label in (measured.get("labels") or {}).items():
        answers = {value for table in label["confusion"].values() for row in table.values() for value in row}
        stated = [*label["classes"], *sorted(answers - set(label["classes"]))]
        tables = []
        for when, counts in label["confusion"].items():
            rows = []
            for reference, row in counts.items():
                total = sum(row.values())
                cells = [(row.get(value, 0), row.get(value, 0) / total, value == reference) for value in stated]
                rows.append((reference, total, cells))
            tables.append({"when": when, "rows": rows})
        found.append({"title": wording.readable(name), "stated": stated, "tables": tables})
    return found


def _groups(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = wording.primary(measured.get("change") or {})
    level = wording.confidence(measured)
    tables = []
    for column, values in (measured.get("groups") or {}).items():
        rows = [
            {
                "value": value,
                "n": group["rows"],
                "too_few": group["too_few"],
                "cells": [_group_cell(group, metric) for metric in metrics],
            }
            for value, group in values.items()
        ]
        gaps = [
            {"flagged": gap["flagged"], "sentence": _gap_sentence(metric, gap, level)}
            for metric, gap in ((measured.get("gaps") or {}).get(column) or {}).items()
        ]
        titles = [wording.about(metric).title for metric in metrics]
        tables.append({"title": wording.readable(column), "metrics": titles, "rows": rows, "gaps": gaps})
    return tables


def _group_cell(group: Mapping[str, Any], metric: str) -> dict[str, str]:
    kind, after = wording.about(metric).kind, group["after"].get(metric)
    if after is None:
        return {"after": "–", "span": "–", "change": "–", "change_span": "–"}
    change = group["change"][metric]
    return {
        "after": wording.number(after["value"], kind),
        "span": wording.span(after, kind),
        "change": wording.number(change["value"], kind, signed=True),
        "change_span": wording.span(change, kind, signed=True),
    }


def _gap_sentence(metric: str, gap: Mapping[str, Any], level: str) -> str:
    known = wording.about(metric)
    width = wording.number(gap["value"], known.kind, signed=True).lstrip("+")
    sure = "more than chance explains" if gap["flagged"] else f"within what chance explains at the {level} level"
    return (
        f"{known.title}: the largest gap is {width}, between {gap['highest']} (highest) and {gap['lowest']} (lowest); "
        f"{sure} ({wording.p_text(gap['p'])})."
    )


def _curves(log: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for title, (keys, unit) in CURVES.items():
        lines = {name: charts.series(log, key) for key, name in keys.items()}
        lines = {name: points for name, points in lines.items() if len(points) > 1}
        if drawing := charts.line_chart(title, lines, unit):
            every = [(name, points[:: max(1, len(points) // 10)]) for name, points in lines.items()]
            found.append({"title": title, "drawing": Markup(drawing), "lines": every})
    return found


def _speed(log: list[Mapping[str, Any]], price: Any) -> list[tuple[str, str]]:
    """Training in numbers: steps, losses, and the medians, which one slow step (a resume, a save) does not move."""
    points = {key: [point.y for point in charts.series(log, key)] for key in SPEED}
    lines = [(name, wording.plain(pick(points[key]))) for key, (name, pick) in SPEED.items() if points[key]]
    losses = charts.series(log, "loss")
    if losses:
        first_and_last = f"{wording.number(losses[0].y, 'number')} → {wording.number(losses[-1].y, 'number')}"
        lines = [("Steps", wording.plain(int(losses[-1].x))), ("Training loss, first → last", first_and_last), *lines]
    return lines + _spent(log, price)


def _spent(log: list[Mapping[str, Any]], price: Any) -> list[tuple[str, str]]:
    """Hours of training steps, the energy that the card told of at each line, and their cost where a price is known."""
    seconds, watts = charts.series(log, "step_seconds"), dict(charts.series(log, "gpu_power_watts"))
    starts = [0.0, *(point.x for point in seconds)]
    spent = [(point.x, point.y * (point.x - start)) for point, start in zip(seconds, starts, strict=False)]
    hours = sum(took for _, took in spent) / 3600
    lines = [("Hours of training steps", f"{hours:.2f}")] if spent else []
    if watts:
        energy = sum(took * watts.get(step, 0.0) for step, took in spent) / 3.6e6
        lines.append(("Energy of the GPU in them, from its power at each line", f"{energy:.3f}{wording.JOINED}kWh"))
    try:
        return [*lines, ("Their cost at the price given", f"{hours * float(price):.2f}")] if price and spent else lines
    except ValueError:
        return lines


def _shown(facts: Mapping[str, Any], images: Mapping[str, bytes]) -> list[dict[str, Any]]:
    if not shows_rows(facts):
        return []
    return [
        {"title": PARTS[part], "samples": [gallery.sample(facts, index, images) for index in rows]}
        for part, rows in gallery.chosen(facts).items()
    ]
