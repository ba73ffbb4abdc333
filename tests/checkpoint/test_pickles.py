"""Nothing that could run code is ever read."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from job.checkpoint import commit, load_weights, refuse_pickles, restore
from job.errors import DataError
from job.store import Store


class Bomb:
    """Creates a file when it is unpickled; a real one would do worse."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def write_bomb(folder: Path, name: str, how: str) -> Path:
    mark = folder.parent / "it went off"
    folder.mkdir(exist_ok=True)
    if how == "torch":
        torch.save({"state": {"weight": torch.zeros(3)}, "more": Bomb(mark)}, folder / name)
    elif how == "old torch":
        torch.save([Bomb(mark)], folder / name, _use_new_zipfile_serialization=False)
    else:
        (folder / name).write_bytes(pickle.dumps(Bomb(mark), protocol=int(how)))
    return mark


@pytest.mark.parametrize("how", ["torch", "old torch", "0", "2", "5"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.bin", "x.pkl"])
def test_bombs_are_refused_without_going_off(tmp_path: Path, how: str, name: str) -> None:
    mark = write_bomb(tmp_path / "in", name, how)
    with pytest.raises(DataError, match="could run code"):
        refuse_pickles(tmp_path / "in")
    assert not mark.exists()


@pytest.mark.parametrize("how", ["torch", "old torch", "2", "5"])
def test_a_bomb_under_an_innocent_name_is_refused_too(tmp_path: Path, how: str) -> None:
    write_bomb(tmp_path / "in", "README.md", how)
    with pytest.raises(DataError, match=r"README\.md"):
        refuse_pickles(tmp_path / "in")


def test_a_checkpoint_with_a_bomb_is_passed_over(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save({"weight": torch.ones(2)}, folder / "optimizer.pt")
    commit(store, folder, step=1, epoch=0, spec_digest="d", attempt=0)
    mark = write_bomb(folder, "optimizer.pt", "torch")
    commit(store, folder, step=2, epoch=0, spec_digest="d", attempt=0)
    skips: list[str] = []
    found = restore(store, tmp_path / "out", on_skip=lambda step, why: skips.append(why))
    assert found is not None
    assert found.manifest.step == 1
    assert "could run code" in skips[0]
    assert not mark.exists()


def test_what_a_trainer_writes_is_accepted(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict(), tmp_path / "scheduler.pt")
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(states, tmp_path / "rng_state.pth")
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    refuse_pickles(tmp_path)
    back = load_weights(tmp_path / "rng_state.pth")
    assert back["python"] == random.getstate()
    assert (back["numpy"][1] == states["numpy"][1]).all()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(DataError, match="damaged"):
        refuse_pickles(tmp_path)
