"""The page as a reader meets it: on a desk and a phone, light and dark, by keyboard, on paper, with nothing to fetch."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.report import page as report
from job.report.contents import Contents
from tests.conftest import CACHE
from tests.evaluate.conftest import contents_of

DESK, PAPER, PHONE = 1280, 718, 390
"""Widths in CSS pixels; PAPER is A4 within its margins."""
CONTRAST = """
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
const parse = c => c.match(/[\\d.]+/g).map(Number)
const light = c => { const [r, g, b] = parse(c); return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b) }
const ground = e => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor; if (parse(c)[3] !== 0) return c }
  return 'rgb(255, 255, 255)' }
const low = []
for (const e of document.body.querySelectorAll('*')) {
  if (e.closest('svg') || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue
  const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x)
  if ((a + 0.05) / (b + 0.05) < 4.5) low.push(e.tagName + '.' + e.className + ' ' + (a + 0.05) / (b + 0.05))
}
return low"""


@pytest.fixture
def page(facts: dict[str, Any], tmp_path: Path) -> str:
    """The address of a report with images, in which every caption also tries to run a script."""
    attack = " <script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    for row in facts["before"] + facts["after"]:
        row["reference"] += attack
        row["generated"] += attack
    images = {}
    for number, identity in enumerate(report.gallery_ids(contents_of(facts))):
        stream = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (96, 128), np.uint8)
        Image.fromarray(noise).save(stream, "JPEG")
        images[identity] = stream.getvalue()
    path = tmp_path / "report.html"
    path.write_text(report.render(contents_of(facts), images), encoding="utf-8")
    return path.as_uri()


BROKEN = """
// Words of prose that stand on two lines. Ids, hashes and file names may: longer ones, and those with digits or signs.
const broken = [], range = document.createRange()
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
while (walk.nextNode()) {
  const node = walk.currentNode, holder = node.parentElement
  if (holder.closest('svg, .told') || !holder.getClientRects().length) continue
  for (const word of node.textContent.matchAll(/[^\\s\u00a0-]+/g)) {
    if (word[0].length > 20 || /[\\d_|/:]./.test(word[0])) continue
    range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length)
    const lines = new Set([...range.getClientRects()].filter(r => r.width).map(r => Math.round(r.top)))
    if (lines.size > 1) broken.push(word[0])
  }
}
return broken"""


@pytest.fixture(params=["good", "bad"])
def run_page(request: Any, good_run: Contents, bad_run: Contents, images: dict[str, bytes], tmp_path: Path) -> str:
    """The address of the report of a good run, and of a bad one, with long file names and maps."""
    path = tmp_path / f"{request.param}.html"
    path.write_text(report.render(good_run if request.param == "good" else bad_run, images), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize(
    ("width", "media"), [*((width, "screen") for width in (DESK, PAPER, PHONE, 320)), (PAPER, "print")]
)
def test_no_word_is_broken_and_nothing_sticks_out(browser: Any, run_page: str, width: int, media: str) -> None:
    browser.show_as(width=width, media=media)
    browser.open(run_page)
    assert browser.run(BROKEN) == []
    assert browser.run("return document.scrollingElement.scrollWidth") <= width


def test_wide_tables_are_whole_on_paper(browser: Any, run_page: str) -> None:
    browser.show_as(width=PAPER, media="print")
    browser.open(run_page)
    cut = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.ariaLabel)"
    assert browser.run(cut) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_all_text_of_both_runs_has_contrast_and_is_kept_to_be_looked_at(
    browser: Any, run_page: str, width: int, scheme: str
) -> None:
    browser.show_as(width=width, scheme=scheme)
    browser.open(run_page)
    assert browser.run(CONTRAST) == []
    keep_picture(browser, f"report-{Path(run_page).stem}-{width}-{scheme}")


@pytest.mark.parametrize("width", [DESK, PHONE, 320])
def test_the_page_never_scrolls_sideways(browser: Any, page: str, width: int) -> None:
    browser.show_as(width=width)
    browser.open(page)
    assert browser.run("return document.scrollingElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_all_text_has_contrast(browser: Any, page: str, width: int, scheme: str) -> None:
    browser.show_as(width=width, scheme=scheme)
    browser.open(page)
    assert browser.run(CONTRAST) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_picture_of_the_page_is_kept_to_be_looked_at(browser: Any, page: str, width: int, scheme: str) -> None:
    """build/tests/report-1280-light.png and so on: what no check of a style sheet sees, a person does."""
    browser.show_as(width=width, scheme=scheme)
    browser.open(page)
    with keep_picture(browser, f"report-{width}-{scheme}") as picture:
        assert width - 20 < picture.width <= width  # a desktop shows a scroll bar
        assert picture.height > 3000
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 100


def keep_picture(browser: Any, name: str) -> Image.Image:
    shot = browser.devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"]
    picture = Image.open(io.BytesIO(base64.b64decode(shot)))
    CACHE.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").save(CACHE / f"{name}.png")
    return picture


def test_dark_and_light_differ(browser: Any, page: str) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        browser.show_as(width=DESK, scheme=scheme)
        browser.open(page)
        grounds.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_nothing_runs_and_nothing_is_fetched(browser: Any, page: str) -> None:
    browser.ask("se/log", {"type": "performance"})
    browser.show_as(width=DESK)
    browser.open(page)
    assert browser.run("return window.pwned") is None
    sent = [json.loads(entry["message"])["message"] for entry in browser.ask("se/log", {"type": "performance"})]
    asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert page in asked
    assert [url for url in asked if url != page and not url.startswith("data:")] == []
    assert browser.ask("se/log", {"type": "browser"}) == []


def test_every_image_is_shown_and_described(browser: Any, page: str) -> None:
    browser.show_as(width=PHONE)
    browser.open(page)
    shown = browser.run("return Promise.all([...document.images].map(i => i.decode().then(() => i.alt.length > 10)))")
    assert shown == [True] * 16


def test_screen_readers_are_told_of_parts_tables_and_charts(browser: Any, page: str) -> None:
    browser.show_as(width=DESK)
    browser.open(page)
    browser.devtools("Accessibility.enable")
    nodes = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    roles = {role for role, _ in told}
    assert {"main", "banner", "navigation", "contentinfo", "table", "columnheader", "rowheader"} <= roles
    assert all(name for role, name in told if role in ("region", "table", "image", "img", "article", "link"))
    assert [name for role, name in told if role in ("image", "img") and name.startswith("Loss over")]
    assert {"insertion", "deletion"} <= roles
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_keyboard_reaches_the_results_first_and_wide_tables_too(browser: Any, page: str) -> None:
    browser.show_as(width=PHONE)
    browser.open(page)
    press = {
        "type": "key",
        "id": "keys",
        "actions": [{"type": "keyDown", "value": "\ue004"}, {"type": "keyUp", "value": "\ue004"}],
    }
    reached = []
    for _ in range(40):
        browser.ask("actions", {"actions": [press]})
        reached.append(
            browser.run(
                "const e = document.activeElement; return e.getAttribute('href') || e.getAttribute('aria-label') || e.tagName"
            )
        )
    assert reached[0] == "#main"
    assert "All metrics" in reached
    assert "Results by Site" in reached
    assert "SUMMARY" in reached


def test_paper_is_white_without_navigation_and_nothing_is_cut_off(browser: Any, page: str) -> None:
    browser.show_as(width=PAPER, scheme="dark", media="print")
    browser.open(page)
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("return document.scrollingElement.scrollWidth") <= PAPER
    assert browser.run(CONTRAST) == []
    assert base64.b64decode(browser.ask("print", {})).startswith(b"%PDF")
