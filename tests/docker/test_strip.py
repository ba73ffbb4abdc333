"""docker/strip.py: libraries lose what is never loaded, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("strip") is None or shutil.which("gcc") is None, reason="it takes gcc and binutils"
)


def packages(name: str) -> Path:
    found = find_spec(name)
    assert found
    return Path(str(found.origin)).parents[1]


def test_a_library_loses_its_symbols_its_copies_become_links_and_it_still_loads(tmp_path: Path):
    (tmp_path / "a.c").write_text(
        "int answer(void) { return 42; }\nstatic int hidden(void) { return answer(); }\nint (*f)(void) = hidden;\n"
    )
    subprocess.run(["gcc", "-g", "-shared", "-fPIC", tmp_path / "a.c", "-o", tmp_path / "liba.so.1.2"], check=True)
    shutil.copy(tmp_path / "liba.so.1.2", tmp_path / "liba.so")
    before = (tmp_path / "liba.so.1.2").stat().st_size
    subprocess.run([sys.executable, ROOT / "docker/strip.py", tmp_path], check=True)
    assert (tmp_path / "liba.so.1.2").stat().st_size < before
    assert (tmp_path / "liba.so").readlink() == Path("liba.so.1.2")
    loads = f"import ctypes; print(ctypes.CDLL({str(tmp_path / 'liba.so')!r}).answer())"
    assert subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True).stdout == "42\n"
    sections = subprocess.run(
        ["readelf", "-SW", tmp_path / "liba.so"], capture_output=True, text=True, check=True
    ).stdout
    assert ".debug" not in sections
    assert ".symtab" not in sections


def test_a_library_that_would_not_load_any_more_is_left_as_it_is(tmp_path: Path):
    """NumPy's libgfortran, which patchelf has rewritten: of it, `strip` makes a file that the loader refuses."""
    files = list((packages("numpy") / "numpy.libs").glob("libgfortran*"))
    if not files:
        pytest.skip("this NumPy brings no libgfortran")
    shutil.copy(files[0], tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "docker/strip.py", tmp_path], capture_output=True, text=True, check=True
    )
    assert (tmp_path / files[0].name).read_bytes() == files[0].read_bytes()
    assert f"left as they were: {files[0].name}" in done.stdout
