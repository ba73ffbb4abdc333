"""Words what a run had to meet before it was published: each bound, whether it was met, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from job.evaluate.metric_info import JOINED, about
from job.report.contents import Contents


@dataclass(frozen=True)
class Gate:
    """`passed` is None for what was not judged."""

    name: str
    passed: bool | None
    said: str


def _share(value: float) -> str:
    return f"{100 * value:.3g}{JOINED}%"


def gates(contents: Contents) -> list[Gate]:
    """Returns every gate of a run; empty if the spec required nothing and nothing was merged."""
    found = [Gate(about(each.metric).title, each.met, f"{each.said}.") for each in contents.requirements]
    measured: Mapping[str, Any] = contents.gate
    limits: Mapping[str, float] = measured.get("limits") or {}
    if "token_agreement" in measured and limits:
        found += _merged(measured, limits)
    for name, each in (measured.get("smaller") or {}).items():
        shares = [f"{_share(kept)} of the gain in {about(metric).title}" for metric, kept in each["gain_kept"].items()]
        least = f"; at least {_share(limits['gain_kept'])} must be left" if "gain_kept" in limits else ""
        said = each["refused"] or each["note"] or f"It keeps {' and '.join(shares)}{least}"
        found.append(Gate(f"{name}/", None if each["note"] else not each["refused"], f"{said}."))
    for key, each in measured.items():
        if key.startswith("served_") and limits:
            found.append(_served(key.removeprefix("served_"), each, limits, str(measured.get("refused") or "")))
    return found


def _merged(measured: Mapping[str, Any], limits: Mapping[str, float]) -> Iterator[Gate]:
    wrong, compared = measured.get("wrong") or [], measured.get("compared", 0)
    difference, agreed = measured["mean_logit_difference"], measured["token_agreement"]
    yield Gate(
        "Merged weights: numbers",
        not wrong,
        f"{len(wrong):,} of {compared:,} compared tensors are not base + adapter; none may be.",
    )
    yield Gate(
        "Merged weights: logits",
        difference <= limits["mean_logit_difference"],
        f"They differ from those of base + adapter by {_share(difference)} of their spread on average; at most "
        f"{_share(limits['mean_logit_difference'])} is allowed.",
    )
    yield Gate(
        "Merged weights: answers",
        agreed >= limits["token_agreement"],
        f"At {_share(agreed)} of the tokens they rank the same token first as base + adapter; at least "
        f"{_share(limits['token_agreement'])} is required.",
    )


def _served(name: str, each: Mapping[str, Any], limits: Mapping[str, float], refused: str) -> Gate:
    agreed = (
        f"At {_share(each['token_agreement'])} of the tokens {each['server']} ranks the same token first as measured"
    )
    least = f"at least {_share(limits['served_agreement'])} is required" if "served_agreement" in limits else ""
    denied = f"does not answer from {name}/" in refused
    return Gate(f"Served: {name}/", not denied, f"{refused if denied else '; '.join(filter(None, [agreed, least]))}.")
