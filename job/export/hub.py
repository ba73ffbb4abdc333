"""Pushes to a model hub. Merged weights reach it only after passing the gate.

An interrupted upload continues with the missing files, since the hub identifies existing ones by digest. One commit adds all
files of a repository or none; `upload_folder`, where hf-xet is installed, commits every five minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from job.config.schema import HubSpec
from job.errors import NotAllowed, SpecError
from job.runtime.hub import patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("job")


def check_token(spec: HubSpec) -> None:
    """Check that the hub accepts the token and that the repositories may be pushed to, as far as can be told before hours are
    spent. Sends no request when nothing is pushed."""
    repos = [repo for repo in (spec.adapter_repo, spec.merged_repo) if repo is not None]
    if not repos:
        return
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise NotAllowed("export.hub: there is no token to push with; set HF_TOKEN to one that may write")
    api = HfApi()
    patiently(api.whoami, "the token")
    for repo in repos:
        if patiently(partial(api.repo_exists, repo), repo):
            check_private(api, repo, spec.private)


def push(spec: HubSpec, folders: Mapping[str, Path]) -> dict[str, str]:
    """Push adapter and merged weights to the repositories in the spec. Returns the commits' URLs."""
    wanted = {"adapter": spec.adapter_repo, "merged": spec.merged_repo}
    return {name: _push(repo, folders[name], spec.private) for name, repo in wanted.items() if repo is not None}


def _push(repo: str, folder: Path, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    patiently(lambda: api.create_repo(repo, private=private, exist_ok=True), repo)
    check_private(api, repo, private)
    message = "Adapter and weights as vision-lora-job made and measured them"
    there = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    files = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in there]
    address = patiently(lambda: api.create_commit(repo, files, commit_message=message), repo)
    log.info("pushed %s to %s", folder.name, repo)
    return str(address.commit_url)


def check_private(api: HfApi, repo: str, private: bool) -> None:
    """Raises SpecError for a public repository when the push must be private."""
    if private and not patiently(lambda: api.model_info(repo), repo).private:
        raise SpecError(
            f"export.hub: {repo} is public, and export.hub.private is true; make it private, or set private to false"
        )
