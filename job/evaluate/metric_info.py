"""Describes and formats metrics: title, unit, whether more is better, and the one-sentence verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from job.config.schema import BY_CHEXBERT, CHEXBERT, rates
from job.evaluate.records import Change, Comparison, Estimate, Gap, LabelTable

FEW = 10
"""Samples, or patients, below which no number is reliable."""
MOST_ITEMS = 40
MOST_CLASSES = 24
"""Maximum rows and columns of a confusion table: with free text as labels, it would make a page of 30 MB."""
JOINED = "\u00a0"  # keeps a number and its unit on one line


def unwritten(things: Sequence[str]) -> str:
    """Says what a server must be given (see `job.export.serving`)."""
    return f"It was measured with what no published file can say: {'; '.join(things)}. job predict repeats all of it."


def choosing(rows: int, groups: int) -> str:
    """Says which rows choose the step, and what that costs."""
    return (
        f"{rows:,} rows of {groups:,} groups (patients) choose the step by their loss. They are neither trained on nor held out, "
        "so that choosing flatters only that loss; the price is fewer rows to train on."
    )


@dataclass(frozen=True)
class About:
    """`better` is 1 where more is better, -1 where less is, 0 where neither. `top` is the end of the metric's scale."""

    title: str
    kind: Literal["share", "fraction", "points", "number"]
    better: Literal[1, 0, -1]
    meaning: str
    top: float | None = None


ABOUT = {
    "rougeL": About("ROUGE-L", "fraction", 1, "longest common word sequence with the reference, F-measure", 1),
    "rouge1": About("ROUGE-1", "fraction", 1, "common words with the reference, F-measure", 1),
    "rouge2": About("ROUGE-2", "fraction", 1, "common word pairs with the reference, F-measure", 1),
    "bleu": About("BLEU", "points", 1, "n-gram precision over the whole set, 0 to 100", 100),
    "chrf": About("chrF", "points", 1, "character n-gram F-score over the whole set, 0 to 100", 100),
    "exact_match": About("Exact match", "share", 1, "same words, ignoring case, punctuation and articles", 1),
    "token_f1": About("Token F1", "fraction", 1, "common words in any order, without articles", 1),
    "closed_accuracy": About("Yes/no correct", "share", 1, "the first word is the yes or no of the reference", 1),
    "open_recall": About(
        "Open recall", "fraction", 1, "words of the reference that the answer has; long answers gain", 1
    ),
    "open_token_f1": About("Open token F1", "fraction", 1, "token F1 of the answers that are neither yes nor no", 1),
    "length_ratio": About("Length ratio", "number", 0, "generated words per reference word; 1 is equally long"),
    "empty": About("Empty outputs", "share", -1, "answers that hold no words", 1),
    "repeated": About("Repeating outputs", "share", -1, "a phrase three times or more in a row", 1),
    "loss": About("Loss", "number", -1, "mean over held-out answer tokens, in nats"),
    "perplexity": About("Perplexity", "number", -1, "exponential of the loss"),
}
EXTRA = {
    "bertscore": About("BERTScore", "fraction", 1, "similarity of word pieces as an encoder sees them, F1", 1),
    "radgraph": About("RadGraph F1", "fraction", 1, "entities and relations in common with the reference", 1),
    "chexbert": About("CheXbert", "share", 1, "share of the five main findings labelled as in the reference", 1),
    "ratescore": About("RaTEScore", "fraction", 1, "medical entities in common with the reference, by meaning", 1),
    "radcliq": About("RadCliQ-v1", "number", -1, "radiologists' errors as estimated from four other metrics"),
    "srrbert": About("SRR-BERT F1", "fraction", 1, "fine-grained findings with their status, as in the reference", 1),
    "green": About("GREEN", "fraction", 1, "a language model's count of clinically significant errors", 1),
    "crimson": About("CRIMSON", "number", 1, "errors as a language model weighs them by urgency, from −1 to 1"),
}
OF_CHEXBERT = {
    name: About(f"CheXbert {kind}-F1, {count}", "fraction", 1, f"F1 of CheXbert's labels, {how}", 1)
    for name in CHEXBERT
    for _, count, kind, _ in [name.split("_")]
    for how in ["over all together" if kind == "micro" else "each with equal weight"]
}
OF_LABELS: dict[str, tuple[str, Literal["share", "fraction"], str]] = {
    "_macro_f1": ("macro-F1", "fraction", "F1 of each class, averaged with equal weight"),
    "_micro_f1": ("micro-F1", "fraction", "F1 over all findings together"),
    "_uncertain_f1": ("uncertain F1", "fraction", "F1 of what is left open, over all findings together"),
    "_sensitivity": ("sensitivity", "share", "stated as present, of the rows in which it is"),
    "_specificity": ("specificity", "share", "not mentioned or denied, of the rows in which it is absent"),
    "_ppv": ("PPV", "share", "present, of the rows that state it"),
    "_npv": ("NPV", "share", "absent, of the rows that do not mention or deny it"),
}
OPEN = ("open_recall", "open_token_f1")
OF_WORDS = ("rougeL", "rouge1", "rouge2", "bleu", "chrf", "exact_match", "token_f1", "closed_accuracy", *OPEN)
"""Metrics that compare the words of an answer with those of the reference."""
ABBREVIATIONS = {
    **{word: word.upper() for word in ("gpu", "cpu", "mlp", "id", "url", "bleu", "rouge", "trl", "gb")},
    **{"lora": "LoRA", "chrf": "chrF", "peft": "PEFT"},
}
UNSEEN = (
    "ROUGE, BLEU, chrF and token F1 compare words with one reference text. They do not see whether a statement is "
    "true: “no pneumothorax” and “pneumothorax” share nearly all their words, a finding on the wrong side costs one "
    "word, and a right description in other words scores low. Read the samples, and have a qualified reader check "
    "findings."
)

OCCLUSION = (
    "Orange in a map: covering this part made the tuned model's own answer less likely (occlusion, relative to the strongest "
    "cell). It shows what the answer depends on, not whether it is right; evidence in two places is not found. Where no "
    "cell stands out from the others, no map is drawn."
)


def about(metric: str) -> About:
    """Return the description of `metric`; label metrics are recognised by their suffix."""
    known = ABOUT | EXTRA | OF_CHEXBERT
    if metric in known:
        return known[metric]
    if metric.endswith("_accuracy"):
        label = readable(metric.removesuffix("_accuracy"))
        return About(f"{label} correct", "share", 1, "the text states exactly the reference label", 1)
    rate = metric.removesuffix(BY_CHEXBERT)
    reader = ", read by CheXbert" if rate != metric else ""
    for suffix, (title, kind, meaning) in OF_LABELS.items():
        if rate.endswith(suffix):
            return About(f"{readable(rate.removesuffix(suffix))} {title}{reader}", kind, 1, meaning, 1)
    return About(readable(metric), "number", 0, "")


def needs_model(metric: str) -> bool:
    return metric in EXTRA or metric in OF_CHEXBERT or metric.endswith(BY_CHEXBERT)


def overall(measured: Iterable[str]) -> list[str]:
    """Return the metrics that are not about a single finding."""
    return [name for name in measured if not name.endswith(tuple(rates([""], chexbert=True)))]


def too_few(measured: Comparison) -> str:
    """Return a warning when the whole measurement rests on a few samples or patients, else an empty string."""
    units = measured.settings.units
    of = "samples" if units == measured.settings.rows else "patients or other units"
    return f"Too few to judge by: only {units} held-out {of}." if units is not None and units < FEW else ""


def unmeasured(measured: Comparison) -> str:
    """Return a sentence on the metrics that need a model which this run did not have; empty when it had all."""
    missing = [known.title for metric, known in EXTRA.items() if metric not in measured.change]
    why = "each needs a model of its own, named in evaluation.extra_metrics, and this run had none"
    return f"Not measured: {', '.join(missing)}; {why}." if missing else ""


def readable(name: str) -> str:
    """Convert `age_band` to `Age band`, `gpu_memory` to `GPU memory`."""
    text = " ".join(ABBREVIATIONS.get(word, word) for word in name.replace("_", " ").split())
    return text if text.split(" ")[0] in ABBREVIATIONS.values() else text[:1].upper() + text[1:]


def number(value: float | None, kind: str, *, signed: bool = False) -> str:
    """Format `value` in the unit of its `kind`; a signed share is a change, in percentage points."""
    if value is None:
        return "–"
    digits = {"share": 1, "fraction": 3, "points": 1, "number": 3}[kind]
    shown = 100 * value if kind == "share" else value
    if abs(shown) >= 10_000:
        digits = 0
    text = f"{shown:+,.{digits}f}" if signed else f"{shown:,.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−") + ((f"{JOINED}pp" if signed else f"{JOINED}%") if kind == "share" else "")


def span(estimate: Estimate, kind: str, *, signed: bool = False) -> str:
    """Format an interval: `0.302 to 0.341`, `+3.1 to +7.0 pp`."""
    if estimate.low is None:
        return "–"
    low, high = (number(bound, kind, signed=signed) for bound in (estimate.low, estimate.high))
    return f"{low.split(JOINED)[0]} to {high}"


def moved_span(change: Change, kind: str) -> str:
    """Format the interval of a change; where no row scores differently, an interval would say less than that."""
    return f"the same in all {change.n:,}" if change.moved == 0 else span(change, kind, signed=True)


def p_text(p: float | None) -> str:
    """Format `p < 0.001`, `p = 0.012`; empty without a p."""
    if p is None:
        return ""
    return f"p{JOINED}<{JOINED}0.001" if p < 0.001 else f"p{JOINED}={JOINED}{p:.3f}"


def direction(
    metric: str, change: Change, confidence: float
) -> Literal["better", "worse", "changed", "no clear change"]:
    """Return the direction of a change if its whole interval lies on one side of zero and its permutation test agrees."""
    low, high, better = change.low, change.high, about(metric).better
    if low is None or high is None or low <= 0 <= high or change.p is None or change.p >= 1 - confidence:
        return "no clear change"
    if not better:
        return "changed"
    return "better" if (low > 0) == (better > 0) else "worse"


def noticeable(change: Change, confidence: float) -> float | None:
    """Return the size of a true change that as many samples, as noisy as these, would show as a verdict four times in five; None
    without an interval.

    An interval of half width h = z·e at the given confidence comes from a standard error e; a true change of (z + z80)·e lies
    beyond it in 80 % of samples. `make verdict-proof` counts.
    """
    if change.low is None or change.high is None or change.low == change.high:
        return None
    normal = NormalDist()
    return (change.high - change.low) / 2 * (1 + normal.inv_cdf(0.8) / normal.inv_cdf((1 + confidence) / 2))


def primary(measured: Iterable[str], judged: str = "") -> list[str]:
    """Return the metrics to read first: the one that the verdict is about (`judged`), whether each label is right, then how
    similar the wording is."""
    found = [name for name in measured if name == judged or name.endswith("_accuracy") or name == "rougeL"]
    return sorted(found, key=lambda name: name != judged)


def classes(label: LabelTable) -> list[str]:
    """Return the classes of a confusion table: all that may be stated, or, if very many, the most frequent as reference or
    answer."""
    seen = Counter[str]()
    for table in label.confusion.values():
        for reference, row in table.items():
            seen.update({reference: sum(row.values())})
            seen.update(row)
    most = {value for value, _ in seen.most_common(MOST_CLASSES)}
    return [value for value in label.stated if len(label.stated) <= MOST_CLASSES or value in most]


def headline(measured: Comparison, metric: str) -> str:
    """Return one sentence: values before and after, change, uncertainty and number of rows."""
    known, change = about(metric), measured.change[metric]
    before, after = measured.before[metric].value, measured.after[metric].value
    if too_few(measured):
        return f"{known.title}: {number(before, known.kind)} before, {number(after, known.kind)} after."
    if change.moved == 0:
        return f"{known.title}: {number(after, known.kind)} before and after, unchanged in all {change.n:,} held-out samples."
    text = (
        f"{known.title}: {number(before, known.kind)} before, {number(after, known.kind)} after on the same "
        f"{change.n:,} held-out samples, a change of {number(change.value, known.kind, signed=True)} "
        f"({confidence(measured)} interval {span(change, known.kind, signed=True)}; {p_text(change.p)})."
    )
    return f"{text} {chance(measured, metric)}".strip()


def chance(measured: Comparison, metric: str) -> str:
    """Return the baseline for the accuracy of a label; empty for other metrics."""
    share = measured.labels.get(metric.removesuffix("_accuracy"), LabelTable()).commonest_share
    if not metric.endswith("_accuracy") or share is None:
        return ""
    return f"Always answering the commonest label would be right in {number(share, 'share')}."


def confidence(measured: Comparison) -> str:
    return f"{100 * measured.settings.confidence:g}{JOINED}%"


def gap(metric: str, gap: Gap, measured: Comparison) -> str:
    """Return one sentence on the largest difference between groups."""
    known, chance = about(metric), f"within what chance explains at the {confidence(measured)} level"
    if not gap.value:
        return f"{known.title}: no gap between groups."
    width = number(gap.value, known.kind, signed=True).lstrip("+")
    return (
        f"{known.title}: the largest gap is {width}, between {gap.highest} (highest) and {gap.lowest} (lowest); "
        f"{'more than chance explains' if gap.flagged else chance} ({p_text(gap.p)})."
    )


def flat(facts: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested facts to (name, text) lines, without empty ones; of a long list only the first `MOST_ITEMS`."""
    lines: list[tuple[str, str]] = []
    items = list(facts.items() if isinstance(facts, Mapping) else enumerate(facts, 1))
    for key, value in items[:MOST_ITEMS]:
        name = f"{prefix}{readable(str(key))}"
        if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(one, Mapping) for one in value)):
            lines += flat(value, f"{name} · ")
        elif isinstance(value, list | tuple):
            more = f" and {len(value) - MOST_ITEMS:,} more" if len(value) > MOST_ITEMS else ""
            lines += [(name, ", ".join(map(plain, value[:MOST_ITEMS])) + more)] if value else []
        elif value is not None and value != "":
            lines.append((name, plain(value)))
    return lines + ([(f"{prefix}and more", f"{len(items) - MOST_ITEMS:,}")] if len(items) > MOST_ITEMS else [])


def plain(value: object) -> str:
    """Format one value for readers."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
