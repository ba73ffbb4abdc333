"""`job look`: a page of the rows as the model will see them, the odd ones first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import Job
from tests.data.test_dicom import made

PART = re.compile(r'<h2 id="[^"]+">(.*?)</h2>(.*?)(?=<h2|</main>)', re.DOTALL)


def film(number: int, width: int = 120, height: int = 100) -> Image.Image:
    """Soft spots, as in a film."""
    spots = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def spec(tmp_path: Path, tiny: Callable[..., Path]) -> Path:
    """Thirty rows: one is blank, one tiny, one large, one may have text, one is nearly a copy of a held-out one, one is
    damaged, and two have odd answers."""
    data = tmp_path / "data"
    lines = []
    for side, count in (("train", 24), ("test", 6)):
        (data / side).mkdir(parents=True)
        for number in range(count):
            image = film(number + 100 * (side == "test"), 120, 100)
            if (side, number) == ("train", 3):
                image = Image.new("RGB", (120, 100), (7, 7, 7))
            if (side, number) == ("train", 5):
                image = film(5, 20, 18)
            if (side, number) == ("train", 7):
                image = film(101)
                image.putpixel((0, 0), (0, 0, 0))
            name = f"{number}.png"
            if (side, number) == ("train", 15):
                image = film(15, 480, 400)
            image.save(data / side / name)
            if (side, number) == ("train", 17):
                name = "17.dcm"
                grey = np.asarray(film(17).convert("L"), dtype=np.uint16)
                (data / side / name).write_bytes(made(grey, Modality="US", WindowCenter=128, WindowWidth=256))
            caption = {9: "No.", 11: "Clear. " * 30 + "<b>End</b>."}.get(number, f"There is a nodule of {number} mm.")
            lines.append(json.dumps({"file_name": name, "caption": caption}))
        (data / side / "metadata.jsonl").write_text("\n".join(lines))
        lines.clear()
    (data / "train" / "13.png").write_bytes(b"no image")
    tree = {
        "name": "odd rows",
        "model": {"name_or_path": str(tiny("qwen2_5_vl"))},
        "dataset": {
            "path": str(data / "train"),
            "eval_path": str(data / "test"),
            "max_bad_fraction": 0.1,
            "image_max_side": 240,
        },
        "privacy": {"look_for_text": False},
        "output": {"url": str(tmp_path / "output")},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "spec.yaml"


def test_odd_rows_come_first_each_once_with_the_learned_text_marked(spec: Path, tmp_path: Path, job: Job) -> None:
    page = tmp_path / "page.html"
    done = job("look", str(spec), "--to", str(page))
    assert done.returncode == 0, done.stderr
    html = page.read_text()
    parts = {
        title: re.findall(r'<article class="[^"]*" aria-label="([^"]+)"', body) for title, body in PART.findall(html)
    }
    assert list(parts) == [
        "Rows set aside",
        "Nearly the same image in training and held-out rows",
        "Almost blank images",
        "Possible burned-in text",
        "Images shrunk most",
        "Smallest images",
        "Shortest answers",
        "Longest answers",
        "Evenly spread",
    ]
    assert parts["Nearly the same image in training and held-out rows"] == ["row-1, held out", "row-7, training"]
    assert parts["Almost blank images"] == ["row-3, training"]
    assert parts["Possible burned-in text"] == ["row-17, training"]
    assert parts["Images shrunk most"] == ["row-15, training"]
    assert parts["Smallest images"][0] == "row-5, training"
    assert parts["Shortest answers"][0] == "row-9, training"
    assert parts["Longest answers"][0] == "row-11, training"
    shown = [each for rows in parts.values() for each in rows]
    assert len(shown) == len({*shown})
    assert "row 13" in html
    assert re.search(r"<mark>No\.", html)
    assert "&lt;b&gt;End" in html
    assert not (tmp_path / "output").exists()


def test_fewer_rows_to_choose_from_and_private_rows(spec: Path, tmp_path: Path, job: Job) -> None:
    page = tmp_path / "page.html"
    assert job("look", str(spec), "--rows", "6", "--to", str(page)).returncode == 0
    assert "chosen from 5 of them" in page.read_text()
    private = job("look", str(spec), "--to", str(tmp_path / "none.html"), JOB__PRIVACY__REPORT_IMAGES="false")
    assert private.returncode == 78
    assert "privacy.report_images is false, and this page shows images and texts" in private.stderr
    assert not (tmp_path / "none.html").exists()
