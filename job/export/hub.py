"""The way to a model hub. Nothing of merged weights gets here before the gate has let them through.

An upload that broke off goes on with what is missing: the hub knows by their digests which files it has. One commit
brings all files of a repository or none; `upload_folder`, where hf-xet is installed, makes one every five minutes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from job.errors import NotAllowed, SpecError, Unavailable
from job.record import one_line
from job.spec import HubSpec

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("job")

TRIES = 5
PAUSE = 2.0
"""Seconds before the second try; twice as many before each later one."""
PASSING = (408, 409, 412, 423, 425, 429)
"""What is answered to those who come too often, or while another commit to the same repository is being made."""
T = TypeVar("T")


def check_token(spec: HubSpec) -> None:
    """Whether there is a token that the hub knows, and the repositories are such as may be pushed to, as far as can be told
    before hours are spent. Asks nothing when nothing is pushed."""
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
    """Push adapter and merged weights to the repositories that the spec names. Returns the addresses of the commits."""
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
    """Raises SpecError for a repository that is public although what is pushed shall be private."""
    if private and not patiently(lambda: api.model_info(repo), repo).private:
        raise SpecError(
            f"export.hub: {repo} is public, and export.hub.private is true; make it private, or set private to false"
        )


def patiently(ask: Callable[[], T], what: str) -> T:
    """Ask the hub, again after a pause when it or the way to it fails. Raises NotAllowed, SpecError or Unavailable."""
    from httpx import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(TRIES):
        try:
            return ask()
        except OfflineModeIsEnabled as error:
            raise SpecError("export.hub: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
        except (HfHubHTTPError, TransportError, OSError, RuntimeError, JSONDecodeError) as error:
            cause = (type(error) is RuntimeError and error.__cause__) or error  # it may wrap what became of one file
            status = getattr(getattr(cause, "response", None), "status_code", None)
            said = one_line(cause)[:200]
            if status in (401, 403, 404):
                raise NotAllowed(
                    f"export.hub: the hub refuses {what} ({status}): {said}; set HF_TOKEN to a token that may write there"
                ) from error
            if status is not None and status < 500 and status not in PASSING:
                raise SpecError(f"export.hub: the hub does not take {what} ({status}): {said}") from error
            log.warning("the hub did not answer for %s: %s; try %d of %d", what, said, attempt + 1, TRIES)
        except ValueError as error:  # of a name, or of a file that the hub would not have
            raise SpecError(f"export.hub: the hub does not take {what}: {one_line(error)[:200]}") from error
        time.sleep(PAUSE * 2**attempt)
    raise Unavailable(f"export.hub: the hub did not answer for {what} in {TRIES} tries: {said}")
