"""Compiled files travel through the output to a new node, and nothing that goes wrong with them stops a run."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from job.model.compile_cache import CompileCache
from job.store import open_store


def compiled(folder: Path) -> Path:
    for name in ("inductor/ab/code.py", "triton/kernel/x.cubin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "inductor" / "being-written.tmp").write_text("half")
    (folder / "datasets").mkdir()
    (folder / "datasets" / "rows.arrow").write_text("not code")
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_new_node_finds_what_the_last_one_compiled(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    CompileCache(store, compiled(tmp_path / "old"), "card").keep()  # nothing is new since it began
    assert not list(store.list("cache/"))
    cache = CompileCache(store, tmp_path / "fresh", "card")
    compiled(tmp_path / "fresh")
    cache.keep()
    CompileCache(store, tmp_path / "new", "card").restore()
    assert files(tmp_path / "new") == {"inductor/ab/code.py", "triton/kernel/x.cubin"}
    CompileCache(store, tmp_path / "other card", "another card").restore()
    assert files(tmp_path / "other card") == set()


def test_a_broken_archive_or_one_that_reaches_outside_is_told_and_left(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    cache = CompileCache(store, tmp_path / "node" / "cache", "card")
    store.write(cache.key, b"not a tar")
    cache.restore()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo("../../escaped")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    store.write(cache.key, stream.getvalue())
    cache.restore()
    assert files(tmp_path / "node") == set()
    assert not (tmp_path / "escaped").exists()
