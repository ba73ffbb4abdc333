"""Real files of public test collections are shown as a person who looked at them found right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nibabel", reason="needs the extra nifti")

from tests.data import real_files

DIFFERENCE = 1.5
"""Mean difference of shades, of 255, that decoders of other versions may make."""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def test_every_real_file_is_the_image_or_has_the_reason_that_is_recorded(tmp_path: Path):
    expected = json.loads((real_files.KEPT / "expected.json").read_text())
    found = real_files.found(real_files.prepared(tmp_path))
    assert {*found} == {*expected}
    for name, wanted in expected.items():
        assert found[name] == (wanted if isinstance(wanted, str) else pytest.approx(wanted, abs=DIFFERENCE)), name


@pytest.mark.parametrize("name", real_files.PICTURES)
def test_a_picture_is_as_it_was_when_a_person_looked_at_it(name: str):
    made, kept = (
        np.asarray(image.convert("RGB"), dtype=float)
        for image in (real_files.picture(name), Image.open(real_files.KEPT / f"{name}.png"))
    )
    assert made.shape == kept.shape
    assert np.abs(made - kept).mean() < DIFFERENCE
    assert np.abs(made[::-1] - kept).mean() > DIFFERENCE  # another orientation would be noticed
