"""What a store does wrong is told as what it is, and a listing that lags stops nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.checkpoint import commit, prune, restore, steps
from job.publish import ensure_published
from job.store import OwnedStore, open_store
from tests.s3 import ON_CEPH, address, point_at
from tests.store.hostile import KINDS, table, try_all
from tests.store.lagging import Lagging
from tests.store.proxy import Proxy


@pytest.mark.skipif(ON_CEPH, reason="a matter of the proxy and the client alone")
def test_every_hostile_store_is_told_as_what_it_is(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({(kind.operation, kind.name) for kind in KINDS}) == len(KINDS) >= 29
    found = try_all(s3_server, monkeypatch)
    print(f"\n{table(found)}")
    wrong = [
        (kind.name, code, said)
        for kind, code, _, said, _ in found
        if code != kind.code or not re.search(kind.says, said) or bool(said) != bool(code)
    ]
    assert wrong == []


@pytest.fixture
def lagging(bucket: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lagging]:
    """Its listings stay as they were when `freeze` was called last."""
    lagging = Lagging(open_store(f"s3://{bucket}"))
    with Proxy(address(s3), before=lagging.before) as proxy:
        point_at(proxy.url, monkeypatch)
        yield lagging


def checkpoint(folder: Path, step: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "weights.dat").write_bytes(b"w" * step)
    return folder


def test_a_listing_that_lags_hides_no_checkpoint_and_stops_no_publishing(
    lagging: Lagging, bucket: str, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/out"
    store = OwnedStore(open_store(url))
    for step in (1, 2):  # the listing stays empty
        commit(store, checkpoint(tmp_path / "made", step), step=step, epoch=0, spec_digest="d", attempt=1)
    assert [*open_store(url).list()] == []
    assert steps(store) == [2, 1]
    successor = OwnedStore(open_store(url))
    assert len(successor.take_up()) == 4
    found = restore(successor, tmp_path / "restored", on_skip=lambda step, reason: pytest.fail(reason))
    assert found is not None
    assert found.manifest.step == 2
    lagging.freeze()  # from now on it shows what was there, and nothing else
    assert prune(successor, keep=1) == [1]
    assert steps(successor) == [2]
    for step in (1, 3):
        commit(successor, checkpoint(tmp_path / "made", step), step=step, epoch=0, spec_digest="d", attempt=2)
    assert steps(successor) == [3, 2, 1]
    digest = successor.upload(tmp_path / "made" / "weights.dat", "adapter/weights.dat")
    lagging.freeze()
    (tmp_path / "made" / "weights.dat").write_bytes(b"more than was listed")
    newer = successor.upload(tmp_path / "made" / "weights.dat", "adapter/weights.dat")
    ensure_published(successor, {"adapter/weights.dat": newer}, {})
    with pytest.raises(Exception, match="adapter/weights.dat is not the file that was sent"):
        ensure_published(successor, {"adapter/weights.dat": digest}, {})
