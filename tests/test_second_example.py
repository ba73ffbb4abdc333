"""The second example, as far as it costs no training: `make example-vqa` runs it whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, Job


def test_its_studies_are_read_with_both_images_and_every_finding(job: Job, demo: Path, tmp_path: Path):
    made = [sys.executable, ROOT / "examples" / "make_vqa.py", tmp_path / "data", "--patients", "10"]
    assert "20 questions about 10 studies" in subprocess.run(made, capture_output=True, text=True, check=True).stdout
    places = {"JOB__MODEL__NAME_OR_PATH": str(demo / "base"), "JOB__DATASET__PATH": str(tmp_path / "data")}
    places |= {"JOB__OUTPUT__URL": str(tmp_path / "output")}
    checked = job("check", "--data", "--example", str(ROOT / "examples" / "vqa.yaml"), **places)
    assert checked.returncode == 0, checked.stderr
    assert "20 rows" in checked.stdout
    assert " 0 set aside" in checked.stdout
    assert "images: 40, smallest 112×112" in checked.stdout
