"""Computes metrics as per-row sums, so that any resample of rows is scored without scoring text again.

Every metric here is a function of per-row sums: a mean is (sum, count), BLEU is 10 n-gram counts, chrF is 18, macro-F1 is
three counts per class. One matrix product then scores a thousand resamples (`bootstrap`), and corpus-level BLEU and chrF equal
sacrebleu's, which a mean of sentence scores does not.

ROUGE is the F-measure in 0..1 without a stemmer (the default of rouge-score; its stemmer knows only English), averaged over
rows. Words are lower-cased runs of letters and digits in any script, and single characters in Chinese, Japanese and Korean. On
ASCII text that equals rouge-score's own tokeniser, which drops every other letter. BLEU and chrF are 0..100.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.helpers import extract_all_char_ngrams

from job.config.schema import BY_CHEXBERT, CHEXBERT, LabelSpec
from job.evaluate import label_metrics as label_fields
from job.evaluate.findings import as_chexbert_reads, codes, finding_rates, finding_sums
from job.evaluate.radeval import LABELS
from job.evaluate.records import Answer, PerRow
from job.evaluate.sums import Floats, Sums, macro_f1_from_sums, macro_f1_over_all, micro_f1_from_sums, ratio, share

UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
ARTICLE = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
LONGEST_LOOP = 20
FIVE = (1, 4, 5, 7, 9)
"""Places of cardiomegaly, edema, consolidation, atelectasis and pleural effusion among CheXbert's 14 labels."""
WHOLE_BLEU, WHOLE_CHRF = BLEU(force=True), CHRF()


def sample_scores(rows: Sequence[Answer], labels: Mapping[str, LabelSpec], extra: PerRow) -> dict[str, Sums]:
    """Return every metric of `rows` by name, in the order of a report."""
    references, generated = [row.reference for row in rows], [row.generated for row in rows]
    texts = list(zip(references, generated, strict=True))
    scores: dict[str, Sums] = {}
    for name, spec in labels.items():
        scores |= _label_scores(rows, name, spec, extra.get(LABELS))
    scores |= rouge(references, generated)
    scores["bleu"] = _corpus(bleu_counts, bleu_from_sums, texts)
    scores["chrf"] = _corpus(chrf_counts, chrf_from_sums, texts)
    pairs = [(_squad_words(one), _squad_words(other)) for one, other in texts]
    scores["exact_match"] = _mean([one == other for one, other in pairs], proportion=True)
    scores["token_f1"] = _mean([bag_f1(one, other) for one, other in pairs])
    scores = _closed_and_open(pairs) | scores
    lengths = [[len(words(text)), len(words(reference))] for reference, text in texts]
    scores["length_ratio"] = Sums(np.array(lengths, float), np.ones(len(rows), bool), ratio)
    scores["empty"] = _mean([not words(text) for text in generated], proportion=True)
    scores["repeated"] = _mean([is_repeated(text) for text in generated], proportion=True)
    for metric, values in extra.items():
        scores |= chexbert_sums(values) if metric == LABELS else {metric: _known(values)}
    return scores | _losses(rows)


def is_closed(reference: str) -> bool:
    """Whether a row asks for yes or no."""
    return _squad_words(reference) in (["yes"], ["no"])


def _closed_and_open(pairs: Sequence[tuple[list[str], list[str]]]) -> dict[str, Sums]:
    """Return metrics of the rows whose reference is yes or no, and of the others, from the words of reference and answer; none if
    no row is of the first kind. Recall is that of LLaVA-Med (Li et al. 2023) on open questions."""
    closed = np.array([theirs in (["yes"], ["no"]) for theirs, _ in pairs], bool)
    if not closed.any():
        return {}
    right = np.array([theirs[:1] == ours[:1] for theirs, ours in pairs], bool)
    recalled = [(Counter(theirs) & Counter(ours)).total() / max(len(theirs), 1) for theirs, ours in pairs]
    return {
        "closed_accuracy": share(right & closed, closed),
        "open_recall": _mean(recalled, ~closed),
        "open_token_f1": _mean([bag_f1(*pair) for pair in pairs], ~closed),
    }


def words(text: str) -> list[str]:
    """Return the lower-cased words of `text` in any script (see the module's docstring)."""
    return WORD.findall(text.lower())


def is_repeated(text: str) -> bool:
    """Whether `text` repeats a phrase of up to 20 words three or more times in a row, over at least six words."""
    tokens = words(text)
    for period in range(1, min(LONGEST_LOOP, len(tokens) // 3) + 1):
        needed, run = max(2 * period, 6 - period), 0
        for here, there in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if here == there else 0
            if run >= needed:
                return True
    return False


def bag_f1(reference: Sequence[str], generated: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words as bags (Rajpurkar et al. 2016, SQuAD); 1 when both are empty."""
    if not reference or not generated:
        return float(reference == generated)
    common = (Counter(reference) & Counter(generated)).total()
    return 2 * common / (len(reference) + len(generated))


def signatures() -> dict[str, str]:
    """Return how ROUGE, BLEU and chrF were computed, in the form that sacrebleu asks people to report."""
    WHOLE_BLEU.corpus_score([""], [[""]])
    WHOLE_CHRF.corpus_score([""], [[""]])
    rouge = f"rouge-score {version('rouge-score')}, F-measure, no stemmer, words of any script, mean over rows"
    return {"rouge": rouge, "bleu": str(WHOLE_BLEU.get_signature()), "chrf": str(WHOLE_CHRF.get_signature())}


class _Words:
    """The tokeniser interface of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge(references: Sequence[str], generated: Sequence[str]) -> dict[str, Sums]:
    """ROUGE-L, -1 and -2 (Lin 2004) of each row, as computed by rouge-score."""
    names = ["rougeL", "rouge1", "rouge2"]
    scorer = RougeScorer(names, tokenizer=_Words())
    scored = [scorer.score(one, other) for one, other in zip(references, generated, strict=True)]
    return {name: _mean([row[name].fmeasure for row in scored]) for name in names}


def bleu_from_sums(sums: Floats) -> Floats:
    """Corpus BLEU (Papineni et al. 2002) with sacrebleu's smoothing (`exp`), from (…, 10) sums: generated and reference words,
    then matching and all generated n-grams, n from 1 to 4."""
    said, told, right, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        smoothing = 2.0 ** np.cumsum(right == 0, axis=-1)
        precisions = np.where(right == 0, 1 / smoothing, right) / total
        brevity = np.exp(np.minimum(0, 1 - told / said))
        scores = 100 * brevity * np.exp(np.log(precisions).mean(axis=-1))
    return np.asarray(np.where(right.any(axis=-1) & (total > 0).all(axis=-1), scores, 0.0))


def chrf_from_sums(sums: Floats) -> Floats:
    """chrF2 (Popović 2015) as computed by sacrebleu, from (…, 18) sums: for each n from 1 to 6 the generated character
    n-grams, those of the reference, and those of both. An n that either lacks is left out."""
    said, told, both = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    known = (said > 0) & (told > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (np.where(known, both / of, 0).sum(axis=-1) / known.sum(axis=-1) for of in (said, told))
        return np.asarray(np.where(precision + recall > 0, 500 * precision * recall / (4 * precision + recall), 0.0))


def bleu_counts(reference: str, said: str) -> list[int]:
    """One row's contribution to the sums of `bleu_from_sums`."""
    score = WHOLE_BLEU.corpus_score([said], [[reference]])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def chrf_counts(reference: str, said: str) -> list[int]:
    """One row's contribution to the sums of `chrf_from_sums`. As in sacrebleu, generated n-grams count only for an n of which
    the reference has n-grams."""
    both = (extract_all_char_ngrams(text, WHOLE_CHRF.char_order) for text in (said, reference))
    return [
        count
        for ours, theirs in zip(*both, strict=True)
        for count in (ours.total() if theirs else 0, theirs.total(), (ours & theirs).total())
    ]


def _corpus(
    counts: Callable[[str, str], list[int]], finish: Callable[[Floats], Floats], texts: Sequence[tuple[str, str]]
) -> Sums:
    """A corpus metric of sacrebleu from counts per row. Its own formula takes one set of sums at a time: with a thousand
    resamples per group, that would dominate the time of a comparison."""
    return Sums(np.array([counts(*pair) for pair in texts], float), np.ones(len(texts), bool), finish)


def _label_scores(
    rows: Sequence[Answer], name: str, spec: LabelSpec, read: Sequence[Sequence[int]] | None
) -> dict[str, Sums]:
    """`read` is what CheXbert reads of each row (`LABELS`), if it was asked."""
    if label_fields.has_several(rows, name):
        findings, true, said = codes(rows, name, spec, [row.generated for row in rows])
        scores = finding_sums(name, findings, true, said)
        if read is not None:
            known, of_known, _, said = as_chexbert_reads(findings, true, read)
            scores |= finding_rates(known, of_known, said, BY_CHEXBERT)
        return scores
    return label_sums(name, *label_fields.stated_and_right(rows, name, spec))


def label_sums(name: str, classes: Sequence[str], pairs: Sequence[tuple[str, str] | None]) -> dict[str, Sums]:
    """Accuracy and macro-F1 of a label from (reference label, stated label) of each row."""
    column = {value: 3 * index for index, value in enumerate(classes)}
    counts = np.zeros((len(pairs), 3 * len(classes)))
    for row, pair in enumerate(pairs):
        if pair is None:
            continue
        reference, stated = pair
        if reference == stated:
            counts[row, column[reference]] = 1
        else:
            counts[row, column[reference] + 2] = 1
            if stated in column:
                counts[row, column[stated] + 1] = 1
    counted = np.array([pair is not None for pair in pairs], bool)
    right = [pair is not None and pair[0] == pair[1] for pair in pairs]
    return {
        f"{name}_accuracy": _mean(right, counted, proportion=True),
        f"{name}_macro_f1": Sums(counts, counted, macro_f1_from_sums),
    }


def _losses(rows: Sequence[Answer]) -> dict[str, Sums]:
    """Mean answer-token loss in nats, weighted by answer tokens, and its exponential, the perplexity."""
    counted = np.array([row.loss is not None and row.answer_tokens > 0 for row in rows], bool)
    tokens = np.array([row.answer_tokens for row in rows], float) * counted
    loss = np.array([row.loss or 0.0 for row in rows], float)
    sums = np.stack([loss * tokens, tokens], axis=-1)
    return {"loss": Sums(sums, counted, ratio), "perplexity": Sums(sums, counted, lambda sums: np.exp(ratio(sums)))}


def losses(rows: Sequence[Answer], *, swapped: bool) -> Sums:
    """The loss of the rows that have it both with their own images and with those of another row, of which `swapped` chooses
    one."""
    both = [row if row.swapped_loss is not None else replace(row, loss=None) for row in rows]
    return _losses([replace(row, loss=row.swapped_loss) for row in both] if swapped else both)["loss"]


def _known(values: Sequence[float | None]) -> Sums:
    """The mean of the rows that have a value."""
    return _mean([value or 0.0 for value in values], np.array([value is not None for value in values], bool))


def _mean(values: Sequence[float], counted: NDArray[np.bool_] | None = None, *, proportion: bool = False) -> Sums:
    present = np.ones(len(values), bool) if counted is None else counted
    sums = np.stack([np.array(values, float) * present, present.astype(float)], axis=-1)
    return Sums(sums, present, ratio, proportion)


def chexbert_sums(values: Sequence[Sequence[int]]) -> dict[str, Sums]:
    """CheXbert's micro and macro F1 over 14 and over 5 labels, as in RadEval, from `LABELS` of each row."""
    true, said = np.hsplit(np.array(values, bool).reshape(len(values), 28), 2)
    found = {}
    for count, places in (("14", tuple(range(14))), ("5", FIVE)):
        theirs, ours = true[:, places], said[:, places]
        counts = np.stack([theirs & ours, ours & ~theirs, theirs & ~ours], axis=-1)
        sums = counts.reshape(len(values), 3 * len(places)).astype(float)
        for kind, finish in (("micro", micro_f1_from_sums), ("macro", macro_f1_over_all)):
            found[f"chexbert_{count}_{kind}_f1"] = Sums(sums, np.ones(len(values), bool), finish)
    assert tuple(found) == CHEXBERT
    return found


def _squad_words(text: str) -> list[str]:
    """Split words as SQuAD's scorer does: lower case, no punctuation, no articles."""
    return ARTICLE.sub(" ", text.lower().translate(PUNCTUATION)).split()
