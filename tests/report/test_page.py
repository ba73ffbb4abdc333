"""The page and its Markdown, as text; `test_page_in_browser.py` looks at the page as a reader does."""

from __future__ import annotations

import inspect
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from job.evaluate.records import Comparison, from_json
from job.evaluate.stage import pictures
from job.report import model_card
from job.report import page as report
from job.train import callbacks, eval_callback, gpu_stats
from tests.evaluate.conftest import contents_of

ATTACK = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'--></style>{{ 7 * 7 }}|*_`"


class Tags(HTMLParser):
    """Every start tag of a page with its attributes, and all text outside `style`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def attacked(value: Any) -> Any:
    """`value` with ATTACK in every text and every name that comes from data."""
    if isinstance(value, dict):
        return {key: attacked(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [attacked(entry) for entry in value]
    return value + ATTACK if isinstance(value, str) else value


def test_every_part_is_there(facts: dict[str, Any]) -> None:
    page = report.render(contents_of(facts))
    for heading in ("Results", "Labels", "Groups", "Samples", "Training", "Merged weights", "Data", "Plan", "Lineage"):
        assert f">{heading}</h2>" in page
    text = " ".join(Tags(page).text.split())
    assert "Finding correct" in text
    assert "Learning rate over 100 steps: learning rate from 2e-4 to 0." in text
    assert "They do not see whether a statement is true" in text
    assert facts["lineage"]["spec_digest"] in text
    assert "Not a medical device" in text


@pytest.mark.parametrize(
    "missing", ["name", "metrics", "before", "after", "log", "plan", "lineage", "gate", "data", "privacy", "base"]
)
def test_what_is_missing_is_left_out(facts: dict[str, Any], missing: str) -> None:
    without = {key: value for key, value in facts.items() if key != missing}
    assert report.render(contents_of(without)).endswith("</html>\n")
    assert report.render(contents_of({**facts, missing: None})).endswith("</html>\n")


def test_nothing_at_all_is_still_a_page() -> None:
    assert "Nothing was measured" in report.render(contents_of({}))
    assert report.markdown(Comparison()) == ""


def test_text_from_data_is_inert(facts: dict[str, Any]) -> None:
    rows = {key: attacked(facts[key]) for key in ("before", "after", "lineage", "data", "plan", "gate")}
    stored = json.loads(
        json.dumps(facts["metrics"]).replace('"North"', json.dumps(ATTACK)).replace('"nodule"', json.dumps(ATTACK))
    )
    page = report.render(contents_of({**facts, **rows, "name": ATTACK, "metrics": stored}))
    plain = Tags(report.render(contents_of(facts)))
    tags = Tags(page)
    assert {tag for tag, _ in tags.found} <= {tag for tag, _ in plain.found} | {"em"}
    assert not [attributes for _, attributes in tags.found if any(name.startswith("on") for name in attributes)]
    assert "alert(1)" in tags.text
    assert "{{ 7 * 7 }}" in tags.text


def test_the_page_asks_nothing_of_the_network(facts: dict[str, Any]) -> None:
    tags = Tags(report.render(contents_of(facts), dict.fromkeys(report.gallery_ids(contents_of(facts)), b"picture")))
    links = [
        attributes[name] or ""
        for _, attributes in tags.found
        for name in ("src", "href", "srcset")
        if name in attributes
    ]
    assert links
    assert all(link.startswith(("#", "data:image/")) for link in links)
    policy = next(entry["content"] for _, entry in tags.found if entry.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


def test_privacy_leaves_out_images_texts_and_ids(facts: dict[str, Any]) -> None:
    private = {**facts, "privacy": {"report_images": False}}
    assert report.gallery_ids(contents_of(private)) == []
    page = report.render(contents_of(private), {row["id"]: b"picture" for row in facts["after"]})
    assert "<img" not in page
    assert "patient-" not in page
    assert "heart" not in page
    assert "privacy.report_images" in page
    assert "Finding correct" in page


def test_a_default_gallery_of_large_images_stays_under_five_megabytes(facts: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    rows = Dataset.from_list([{"_row": number, "images": []} for number in range(16)])
    ids = report.gallery_ids(contents_of(facts))
    assert len(ids) == 16
    rows.set_transform(lambda batch: {"images": [[Image.fromarray(noise)] for _ in batch["_row"]]})
    made = pictures(rows, [f"row-{number}" for number in range(16)])
    images = dict(zip(ids, made.values(), strict=True))
    facts["occlusion"] = {key: [[1.0]] for key in ids[:3]}
    assert len(report.render(contents_of(facts), images).encode()) < 5_000_000


def test_links_within_the_page_lead_somewhere(facts: dict[str, Any]) -> None:
    tags = Tags(report.render(contents_of(facts)))
    ids = [entry["id"] for _, entry in tags.found if "id" in entry]
    targets = {str(entry["href"])[1:] for tag, entry in tags.found if tag == "a"}
    assert len(ids) == len(set(ids))
    assert targets <= set(ids)


def test_the_same_facts_give_the_same_page(facts: dict[str, Any]) -> None:
    assert report.render(contents_of(facts)) == report.render(contents_of(json.loads(json.dumps(facts))))


def test_an_adapter_that_rounding_ate_is_said_on_the_page_and_in_the_card_of_what_was_rounded(
    facts: dict[str, Any],
) -> None:
    said = "Rounding loses this adapter: the merged weights keep 5% of its effect."
    contents = contents_of({**facts, "gate": {"warning": said, "rows": 4}})
    assert f"<strong>The merged weights.</strong> {said}" in report.render(contents)
    assert f"- **{said}**" in model_card.render(contents, "merged")
    assert said not in model_card.render(contents, "adapter")


def test_a_refused_merge_is_said_first(facts: dict[str, Any]) -> None:
    page = report.render(contents_of({**facts, "gate": {"refused": "token agreement 0.50 is under 0.97"}}))
    assert page.index("Refused.") < page.index(">Results</h2>")
    assert "Refused." not in report.render(contents_of(facts))


def test_a_worse_model_is_called_worse(facts: dict[str, Any]) -> None:
    facts["metrics"]["verdict"] |= {"said": "worse", "change": {"value": -0.2, "low": -0.3, "high": -0.1, "p": 0.001}}
    page = report.render(contents_of(facts))
    assert len(re.findall(r'class="tag worse"', page)) == 2
    assert "Worse: Finding correct changed by −20.0" in page


def test_markdown_tables_keep_their_columns_whatever_the_names(facts: dict[str, Any]) -> None:
    stored = json.loads(json.dumps(facts["metrics"]).replace('"North"', json.dumps("a|b\n<script>")))
    text = report.markdown(from_json(Comparison, stored))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "<script>" not in text


def test_markdown_says_what_the_page_says(facts: dict[str, Any]) -> None:
    text, change = report.markdown(from_json(Comparison, facts["metrics"])), facts["metrics"]["change"]["rougeL"]
    assert f"{change['low']:+.3f} to {change['high']:+.3f}" in text
    assert "too few rows" not in text
    assert "patient-" not in text


def test_a_label_of_very_many_values_shows_those_that_occur_most(facts: dict[str, Any]) -> None:
    label = facts["metrics"]["labels"]["finding"]
    label["stated"] = [*label["stated"], *(f"text {n}" for n in range(3000))]
    page = report.render(contents_of(facts))
    assert f" most frequent of {len(label['stated']):,} values are shown" in page
    assert len(page) < 500_000
    for reference in label["confusion"]["after"]:
        assert f'<th scope="row">{reference}</th>' in page


def test_few_samples_are_said_first(facts: dict[str, Any]) -> None:
    """Of an output of an earlier version too, which stores no verdict."""
    facts["metrics"] |= {"settings": facts["metrics"]["settings"] | {"units": 4}, "verdict": None}
    said = "Too few to judge by: only 4 held-out patients or other units."
    assert f"<strong>{said}</strong>" in report.render(contents_of(facts))
    assert report.markdown(from_json(Comparison, facts["metrics"])).lstrip().startswith(f"**{said}**")
    assert "Too few to judge" not in report.render(
        contents_of(facts | {"metrics": facts["metrics"] | {"settings": {"units": 24, "rows": 48}}})
    )


def test_energy_and_cost_are_sums_over_all_steps(facts: dict[str, Any]) -> None:
    """A hundred steps of 2.5 s at 288 W: 0.02 kWh; 250 s at 3.6 an hour: 0.25."""
    facts["log"] = [line | {"gpu_power_watts": 288.0} for line in facts["log"] if line["step"] % 10 == 0]
    facts["lineage"]["price_per_hour"] = "3.6"
    page = report.render(contents_of(facts))
    assert "0.020\u00a0kWh" in page
    assert "<dd>0.25</dd>" in page
    assert "kWh" not in report.render(
        contents_of(facts | {"log": [{"step": 1, "step_seconds": 1.0}, {"step": 2, "step_seconds": 1.0}]})
    )


def test_what_is_not_measured_is_said(facts: dict[str, Any]) -> None:
    page = report.render(contents_of(facts))
    assert re.search(r"Not measured: BERTScore, RadGraph F1, [\w ,-]*CheXbert[\w ,-]*; each needs a model", page)
    for when in ("before", "after", "change"):
        facts["metrics"][when]["bertscore"] = facts["metrics"][when]["rougeL"]
    page = report.render(contents_of(facts))
    assert "Not measured: RadGraph F1, " in page
    assert "similarity of word pieces" in page


def test_rows_that_the_spec_leaves_out_are_counted(facts: dict[str, Any]) -> None:
    said = "rows of the data were left out by <code>dataset.filter</code>"
    assert said not in report.render(contents_of(facts))
    facts["data"] = {"filtered": 4321}
    assert f"4,321 {said}" in report.render(contents_of(facts))


def test_the_curves_are_of_numbers_that_training_writes(facts: dict[str, Any]) -> None:
    written = inspect.getsource(callbacks.Numbers) + inspect.getsource(gpu_stats) + inspect.getsource(eval_callback)
    for key in {*report.SPEED, *(key for keys, _ in report.CURVES.values() for key in keys), "gpu_power_watts"}:
        assert f"{key}=" in written or f'"{key}"' in written, key
    facts["log"] = [line | {"gpu_memory_peak_gb": 30 + line["step"] / 100} for line in facts["log"]]
    assert "GPU memory over 100 steps: peak from 30.01 to 31 GB." in report.render(contents_of(facts))
