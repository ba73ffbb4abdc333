"""Rows of a made-up evaluation, and a real browser."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from job.evaluate import compare, examples
from job.evaluate.records import Answer, Comparison, Sample, Settings, from_json
from job.report.contents import KEPT, Contents

FINDINGS = ["effusion", "fracture", "nodule", "pneumothorax"]
SIDES = ["left", "right"]
LABELS = {
    "finding": SimpleNamespace(values=FINDINGS, pattern=None),
    "side": SimpleNamespace(values=SIDES, pattern=None),
}
Rows = list[dict[str, Any]]


def answers_of(rows: Iterable[dict[str, Any]]) -> list[Answer]:
    return [from_json(Answer, row) for row in rows]


def contents_of(facts: dict[str, Any]) -> Contents:
    """What a report shows, of the JSON of its parts."""
    known = {key: value or [] for key, value in facts.items() if key in ("before", "after", "samples", "log")}
    return replace(
        from_json(Contents, {key: value for key, value in facts.items() if key in KEPT}),
        metrics=from_json(Comparison, facts.get("metrics") or {}),
        before=answers_of(known.get("before", [])),
        after=answers_of(known.get("after", [])),
        samples=[from_json(Sample, line) for line in known.get("samples", [])],
        log=known.get("log", []),
    )


def evaluated(share_known: float, rows: int = 48, *, wordy: bool = True) -> Rows:
    """Rows of an evaluation in which each label is right in `share_known` of the texts, and else guessed."""
    made = []
    for index in range(rows):
        row, answer = random.Random(index), random.Random(f"{index} {share_known} {wordy}")
        finding, side = row.choice(FINDINGS), row.choice(SIDES)
        said = finding if answer.random() < share_known else answer.choice(FINDINGS)
        where = side if answer.random() < share_known else answer.choice(SIDES)
        text = "There is a {} in the {} zone. The heart is of normal size."
        made.append(
            {
                "id": f"patient-{index // 2}-{index}.png",
                "unit": index // 2,
                "reference": text.format(finding, side),
                "generated": text.format(said, where) if wordy else f"a picture of a {said}",
                "labels": {"finding": finding, "side": side},
                "groups": {"sex": "FM"[index // 2 % 2], "site": ["North", "South", "East"][index // 2 % 3]},
                "tokens": 17,
                "loss": answer.expovariate(1 + share_known),
                "answer_tokens": 15 + index % 3,
            }
        )
    return made


@pytest.fixture
def make_rows() -> Callable[..., Rows]:
    return evaluated


@pytest.fixture
def facts() -> dict[str, Any]:
    """All that a report and a card are made of, as JSON."""
    before, after = evaluated(0.2, wordy=False), evaluated(0.9)
    log = [
        {
            "step": step,
            "loss": 3 / step + 0.2,
            "learning_rate": 2e-4 * (1 - step / 100),
            "grad_norm": 1.0,
            "samples_per_second": 3.2,
            "step_seconds": 2.5,
        }
        for step in range(1, 101)
    ]
    return {
        "name": "chest-captions",
        "metrics": asdict(
            compare.compare(answers_of(before), answers_of(after), LABELS, ["sex", "site"], Settings(300, 0.95, 1))
        ),
        "before": before,
        "after": after,
        "log": log,
        "plan": {"steps": 100, "trainable parameters": {"vision": {"attention": 120_000}}},
        "lineage": {"spec_digest": "sha256:" + "ab" * 32, "base_revision": "0123abc", "attempts": 2},
        "gate": {"mean_logit_difference": 0.0012, "token_agreement": 1.0},
        "data": {"rows": 480, "train": 432, "evaluation": 48, "quarantined": 0},
        "privacy": {"report_images": True},
        "base": {"name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct", "model_type": "mllama"},
        "instruction": "Describe what you see.",
    }


def chosen(facts: dict[str, Any]) -> dict[str, list[int]]:
    contents = contents_of(facts)
    return examples.chosen(contents.before, contents.after, contents.metrics)


@dataclass
class Browser:
    """Chromium over the W3C WebDriver protocol. Its own commands run under a page's policy, unlike the page's scripts."""

    session: str

    def ask(self, verb: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.session}/{verb}".rstrip("/"), data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=240) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"{verb}: {error.read().decode()[:500]}") from error

    def open(self, url: str) -> None:
        """Show `url`, and return when it has been painted: before, it may have no focus to move and no roles to tell."""
        self.ask("url", {"url": url})
        self.devtools("Page.bringToFront")
        loaded = f"document.readyState === 'complete' && location.href === {json.dumps(url)}"
        deadline = time.monotonic() + 120
        while not self.run(f"return {loaded}") and time.monotonic() < deadline:
            time.sleep(0.05)
        self.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        return self.ask("execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.ask("goog/cdp/execute", {"cmd": command, "params": parameters})

    def show_as(self, *, width: int, height: int = 900, scheme: str = "light", media: str = "screen") -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=features)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium or not (_starts(driver) and _starts(chromium)):
        pytest.skip("no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)")
    log = tmp_path_factory.mktemp("browser") / "log"
    with (
        TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as folder,  # it leaves files there
        log.open("wb") as stream,
        subprocess.Popen(
            [driver, "--port=0"], stdout=stream, stderr=stream, env=os.environ | {"TMPDIR": folder}
        ) as process,
    ):
        try:
            started = _session(f"http://127.0.0.1:{_port(log)}", chromium)
            yield started
            started.ask("", method="DELETE")  # without its driver alone, the browser would stay for ever
        finally:
            process.terminate()


def _starts(program: str) -> bool:
    """Ubuntu's packages of these names hold a script that asks for a snap."""
    return subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0


def _port(log: Any) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if "started successfully on port" in line:
                return int(line.rstrip(".").split()[-1])
        time.sleep(0.1)
    raise TimeoutError("chromedriver did not start")


def _session(address: str, chromium: str) -> Browser:
    options = {
        "binary": chromium,
        "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
    }
    wanted = {
        "capabilities": {
            "alwaysMatch": {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
            }
        }
    }
    started = Browser(address).ask("session", wanted)
    return Browser(f"{address}/session/{started['sessionId']}")
