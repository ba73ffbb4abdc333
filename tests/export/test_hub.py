"""The push to a hub, against a server that speaks its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from job.config.schema import HubSpec
from job.errors import NotAllowed, SpecError, Unavailable
from job.export import hub as ours
from job.runtime import hub as mapping
from tests import push_hub as theirs

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # httpx, of huggingface_hub
SPEC = HubSpec(adapter_repo="clinic/chest-adapter", merged_repo="clinic/chest")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[theirs.Hub]:
    with theirs.serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(mapping, "PAUSE", 0.01)
        monkeypatch.setenv("HF_TOKEN", theirs.TOKEN)
        yield server


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two weight files in each, of different content, beside small ones."""
    for seed, name in enumerate(("adapter", "merged")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A card\n")
        (tmp_path / name / "config.json").write_text("{}")
        for number in range(2):
            weights = {"w": torch.full((1000,), float(10 * seed + number))}
            save_file(weights, tmp_path / name / f"model-{number}.safetensors")
    return {name: tmp_path / name for name in ("adapter", "merged")}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_both_folders_arrive_whole_in_private_repositories(hub: theirs.Hub, folders: dict[str, Path]) -> None:
    ours.check_token(SPEC)
    pushed = ours.push(SPEC, folders)
    assert pushed == {
        name: f"{hub.url}/{repo}/commit/1"
        for name, repo in (("adapter", SPEC.adapter_repo), ("merged", SPEC.merged_repo))
    }
    assert {name: repo["private"] for name, repo in hub.repos.items()} == {
        "clinic/chest-adapter": True,
        "clinic/chest": True,
    }
    assert hub.repos["clinic/chest"]["files"] == files(folders["merged"])
    assert hub.repos["clinic/chest-adapter"]["files"] == files(folders["adapter"])


def test_nothing_is_asked_of_a_hub_that_the_spec_does_not_name(hub: theirs.Hub, folders: dict[str, Path]) -> None:
    ours.check_token(HubSpec())
    assert ours.push(HubSpec(), folders) == {}
    assert hub.requests == []


def test_an_upload_that_broke_off_goes_on_with_what_is_missing(hub: theirs.Hub, folders: dict[str, Path]) -> None:
    spec = HubSpec(merged_repo="clinic/chest")
    hub.failures = 3
    ours.push(spec, folders)
    assert hub.repos["clinic/chest"]["files"] == files(folders["merged"])
    assert hub.requests.count("POST /api/models/clinic/chest/commit/main") == 1
    hub.requests.clear()
    ours.push(spec, folders)
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_one_commit_brings_a_whole_folder_with_hf_xet_too(
    hub: theirs.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many files its own way makes two commits: whoever reads the repository between them has half of it."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for number in range(300):
        (tmp_path / f"{number}.json").write_text(str(number))
    ours.push(HubSpec(merged_repo="clinic/chest"), {"merged": tmp_path})
    assert hub.requests.count("POST /api/models/clinic/chest/commit/main") == 1
    assert hub.repos["clinic/chest"]["files"] == files(tmp_path)


def test_a_busy_hub_is_asked_again(hub: theirs.Hub, folders: dict[str, Path]) -> None:
    hub.statuses = [409, 412, 429, 503]
    ours.push(HubSpec(merged_repo="clinic/chest"), folders)
    assert hub.repos["clinic/chest"]["files"] == files(folders["merged"])


def test_a_name_that_the_hub_does_not_take_is_told_before_the_work(hub: theirs.Hub) -> None:
    with pytest.raises(SpecError, match="the hub rejects clinic/chest--2"):
        ours.check_token(HubSpec(adapter_repo="clinic/chest--2"))


def test_a_public_repository_takes_nothing_that_shall_be_private(hub: theirs.Hub, folders: dict[str, Path]) -> None:
    hub.repos["clinic/chest"] = {"private": False, "files": {}}
    with pytest.raises(SpecError, match="clinic/chest is public, and export.hub.private is true"):
        ours.check_token(HubSpec(merged_repo="clinic/chest"))
    with pytest.raises(SpecError, match="clinic/chest is public, and export.hub.private is true"):
        ours.push(HubSpec(merged_repo="clinic/chest"), folders)
    ours.push(HubSpec(merged_repo="clinic/chest", private=False), folders)
    assert hub.repos["clinic/chest"]["files"] == files(folders["merged"])


@pytest.mark.parametrize(
    ("token", "says"), [("", "there is no token to push with"), ("hf_wrong", "refuses the token .401.")]
)
def test_a_token_that_will_not_do_is_told_before_the_work(
    hub: theirs.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str, says: str
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(NotAllowed, match=says):
        ours.check_token(SPEC)


def test_a_hub_that_refuses_or_does_not_answer_ends_with_its_own_code(
    hub: theirs.Hub, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    hub.may_write = False
    with pytest.raises(NotAllowed, match=r"the hub refuses clinic/chest-adapter \(403\)"):
        ours.push(SPEC, folders)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="did not answer for clinic/chest-adapter in 5 tries"):
        ours.push(SPEC, folders)
