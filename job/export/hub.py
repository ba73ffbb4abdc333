"""The way to a model hub. Nothing of merged weights gets here before the gate has let them through.

An upload that broke off goes on with what is missing: the hub knows by their digests which files it has. One commit
brings all files of a repository or none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from job.errors import NotAllowed, SpecError, Unavailable
from job.record import one_line
from job.spec import HubSpec

log = logging.getLogger("job")

TRIES = 5
PAUSE = 2.0
"""Seconds before the second try; twice as many before each later one."""
T = TypeVar("T")


def check_token(spec: HubSpec) -> None:
    """Whether there is a token that the hub knows, asked before hours are spent. Asks nothing when nothing is pushed."""
    if spec.adapter_repo is None and spec.merged_repo is None:
        return
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise NotAllowed("export.hub: there is no token to push with; set HF_TOKEN to one that may write")
    patiently(lambda: HfApi().whoami(), "the token")


def push(spec: HubSpec, folders: Mapping[str, Path]) -> dict[str, str]:
    """Push adapter and merged weights to the repositories that the spec names. Returns the addresses of the commits."""
    wanted = {"adapter": spec.adapter_repo, "merged": spec.merged_repo}
    return {name: _push(repo, folders[name], spec.private) for name, repo in wanted.items() if repo is not None}


def _push(repo: str, folder: Path, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    patiently(lambda: api.create_repo(repo, private=private, exist_ok=True), repo)
    if private and not patiently(lambda: api.model_info(repo), repo).private:
        raise SpecError(
            f"export.hub: {repo} is public, and export.hub.private is true; make it private, or set private to false"
        )
    message = "Adapter and weights as vision-lora-job made and measured them"
    address = patiently(lambda: api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message), repo)
    log.info("pushed %s to %s", folder.name, repo)
    return str(address.commit_url)


def patiently(ask: Callable[[], T], what: str) -> T:
    """Ask the hub, again after a pause when it or the way to it fails. Raises NotAllowed, SpecError or Unavailable."""
    from httpx import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(TRIES):
        try:
            return ask()
        except OfflineModeIsEnabled as error:
            raise SpecError("export.hub: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
        except (HfHubHTTPError, TransportError, OSError, RuntimeError) as error:
            cause = error.__cause__ if type(error) is RuntimeError else error  # it wraps what became of one file
            if not isinstance(cause, HfHubHTTPError | TransportError | OSError):
                raise
            status = getattr(getattr(cause, "response", None), "status_code", None)
            said = one_line(cause)[:200]
            if status in (401, 403, 404):
                raise NotAllowed(
                    f"export.hub: the hub refuses {what} ({status}): {said}; set HF_TOKEN to a token that may write there"
                ) from error
            if status is not None and status < 500 and status not in (408, 429):
                raise SpecError(f"export.hub: the hub does not take {what} ({status}): {said}") from error
            log.warning("the hub did not answer for %s: %s; try %d of %d", what, said, attempt + 1, TRIES)
        time.sleep(PAUSE * 2**attempt)
    raise Unavailable(f"export.hub: the hub did not answer for {what} in {TRIES} tries: {said}")
