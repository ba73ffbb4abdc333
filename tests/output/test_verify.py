"""`job verify`: any byte that differs from what was published is found, and its file named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import DataError
from job.output import verify as module
from job.output.verify import verify
from job.store import Store, open_store
from tests.conftest import ROOT, Job

FILES = {"adapter/config.json": b"{}", "merged/a.safetensors": bytes(range(256)) * 40, "merged/empty": b""}


def publish(store: Store) -> None:
    for key, data in FILES.items():
        store.write(key, data)
    named = {key: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for key, data in FILES.items()}
    store.write("RESULT.json", json.dumps({"files": named}).encode())
    store.write("report.html", b"may be made anew")


def test_an_untouched_output_passes(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    publish(store)
    told = list[str]()
    found = verify(store, told.append)
    assert (found.files, found.size) == (3, 10242)
    assert found.result == hashlib.sha256(store.read("RESULT.json")).hexdigest()
    assert sorted(told) == sorted(FILES)


FLIPPED = bytearray(FILES["merged/a.safetensors"])
FLIPPED[-1] ^= 1
CHANGES: dict[str, Callable[[Store], object]] = {
    "merged/a.safetensors: its SHA-256 differs": lambda store: store.write("merged/a.safetensors", bytes(FLIPPED)),
    "adapter/config.json: has 3 bytes in place of 2": lambda store: store.write("adapter/config.json", b"{ }"),
    "merged/empty: is missing": lambda store: store.delete(["merged/empty"]),
    "merged/modeling.py: was not published": lambda store: store.write("merged/modeling.py", b"import os"),
    "gguf/model.gguf: was not published": lambda store: store.write("gguf/model.gguf", b"of another base"),
}


def test_every_change_is_named(store: Store):
    publish(store)
    for change in CHANGES.values():
        change(store)
    with pytest.raises(DataError) as caught:
        verify(store)
    assert sorted(str(caught.value).splitlines()[1:-1]) == sorted(f"  - {problem}" for problem in CHANGES)


@pytest.mark.parametrize("text", [None, "[]", '{"files": null}', '{"files": {}}', '{"files": {"a": {}}}', "not JSON"])
def test_an_output_without_a_result_is_told(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "RESULT.json").write_text(text)
    with pytest.raises(DataError, match="holds no published result"):
        verify(open_store(str(tmp_path)))


def test_the_command_ends_with_a_code_that_a_script_can_use(tmp_path: Path, job: Job):
    publish(open_store(str(tmp_path)))
    done = job("verify", str(tmp_path))
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "3 files (10.2 kB) are as published")
    (tmp_path / "merged/empty").write_text("x")
    done = job("verify", str(tmp_path))
    assert (done.returncode, done.stdout) == (65, "")
    assert "merged/empty: has 1 bytes in place of 0" in done.stderr


@pytest.mark.parametrize("tool", ["ssh-keygen", "model_signing"])
def test_the_page_on_signing_is_right(tool: str, tmp_path: Path):
    """The latter runs in `make test-trackers`."""
    program = shutil.which(tool) or shutil.which(tool, path=Path(sys.executable).parent)
    if program is None:
        pytest.skip(f"{tool} is not installed")
    page = (ROOT / "docs" / "how-to" / "verify-and-sign.md").read_text()
    sign, check = re.findall(rf"^{tool} .*?(?=  +#|$)", page, re.MULTILINE)
    publish(open_store(str(tmp_path)))

    def run(command: str) -> int:
        said = command.replace("/runs/chest-1/", "").replace("~/.ssh/release_key", "key").replace(tool, program, 1)
        return subprocess.run(said, shell=True, cwd=tmp_path, capture_output=True, check=False).returncode

    if tool == "ssh-keygen":
        assert run("ssh-keygen -q -t ed25519 -N '' -f key") == 0
        (tmp_path / "signers").write_text(f"release@clinic.example {(tmp_path / 'key.pub').read_text()}")
    else:
        (making,) = re.findall(r"`(openssl ecparam [^`]*)`", page)
        subprocess.run(
            f"{making} && openssl ec -in key.pem -pubout -out public.pem", shell=True, cwd=tmp_path, check=True
        )
    assert (run(sign), run(check)) == (0, 0)
    changed = tmp_path / ("RESULT.json" if tool == "ssh-keygen" else "merged/a.safetensors")
    changed.write_bytes(changed.read_bytes() + b" ")
    assert run(check) != 0
