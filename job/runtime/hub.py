"""Recognises names on the hub, and turns the errors of its libraries into ours."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

from job.errors import JobError, NoHub, NotAllowed, SpecError, Unavailable
from job.runtime.status import one_line

log = logging.getLogger("job")

HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.|\.git$))(?:\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?|\w(?:[\w-]{0,94}\w)?)", re.ASCII
)
"""As in huggingface_hub's `validate_repo_id`."""
TABLES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".xlsx", ".xlsm"}
"""Suffixes of files that hold rows."""
FILES = TABLES | {".zip", ".gz", ".tgz", ".txt", ".xls", ".xlsb", ".ods", ".feather", ".dcm", ".h5"}
"""Suffixes of files, which are never a hub dataset."""
TRIES = 5
PAUSE = 2.0
"""Seconds before the second try of a push; doubled before each later one."""
PASSING = (408, 409, 412, 423, 425, 429)
"""Statuses for too many requests, or while another commit to the same repository is in progress."""
T = TypeVar("T")


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and Path(name).suffix.lower() not in FILES


@contextmanager
def hub_errors(name: str, field: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the hub's libraries while they read `name` into SpecError, NotAllowed, NoHub or Unavailable that name the
    field: `model.name_or_path`, or one of `dataset`."""
    from httpx import HTTPError, InvalidURL

    try:
        yield
    except (HTTPError, InvalidURL, OSError, ValueError) as error:  # OSError: offline and not on this disk
        raise _read_error(error, name, field, revision) from error


def _read_error(error: Exception, name: str, field: str, revision: str | None) -> JobError:
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    section = field.partition(".")[0]
    what, here, folder = ("dataset", "file or folder", "datasets/") if section == "dataset" else ("model", "folder", "")
    looked = f"{field}: there is no {here} {name} here (looked in {Path.cwd()})"
    lost = type(error).__name__ == "DatasetNotFoundError"  # of datasets, which tells the three apart by words alone
    if isinstance(error, GatedRepoError) or (lost and "gated" in str(error)):
        page = f"https://huggingface.co/{folder}{name}"
        return NotAllowed(f"{field}: {name} is gated; accept its terms at {page} and set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError) or (lost and revision and "evision" in f"{error} {error.__cause__}"):
        return SpecError(f"{section}.revision: {name} has no revision {revision}")
    if lost or isinstance(error, RepositoryNotFoundError | HFValidationError):
        return SpecError(f"{looked}, and the hub has no {what} of that name that this token may see")
    if is_offline_mode():
        return SpecError(f"{looked}, and HF_HUB_OFFLINE is set; gather it with job prefetch")
    if why := _unusable(error):
        return SpecError(f"{looked}, and {why}")
    if _out_of_reach(error):
        unheard = NoHub(looked, f"fix the path, or gather the {what} with job prefetch")
        path_meant = section == "dataset" and "/" in name and Path(name).parent.is_dir()
        return SpecError(str(unheard)) if path_meant else unheard
    return Unavailable(f"{looked}, and the hub does not answer ({type(error).__name__})")


def _out_of_reach(error: BaseException) -> bool:
    """Return whether no connection was made at all: no such host, or no route to it. A service that answers or breaks off was
    reached."""
    import httpx

    causes: list[BaseException | None] = [error, error.__cause__, error.__context__]
    return any(isinstance(each, httpx.ConnectError | httpx.ConnectTimeout) for each in causes)


def _unusable(error: Exception) -> str | None:
    """Explain why the hub was not even contacted, and never will be: an environment variable has an unusable value."""
    import httpx

    garbled = isinstance(error, UnicodeError | JSONDecodeError)  # an answer, such as a proxy's page
    wrong = isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL | ValueError) and not garbled
    if not (wrong or type(error) is FileNotFoundError):  # subclasses mean that the hub, or its cache, lacks it
        return None
    return f"the hub cannot be asked: {error}; check HF_ENDPOINT, HTTPS_PROXY and SSL_CERT_FILE"


def patiently(ask: Callable[[], T], what: str) -> T:
    """Call the hub to push, retrying after a pause when it or the network fails. Raises NotAllowed, SpecError or Unavailable."""
    from httpx import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(TRIES):
        try:
            return ask()
        except OfflineModeIsEnabled as error:
            raise SpecError("export.hub: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
        except (HfHubHTTPError, TransportError, OSError, RuntimeError, JSONDecodeError) as error:
            cause = (type(error) is RuntimeError and error.__cause__) or error  # it may wrap the error of one file
            status = getattr(getattr(cause, "response", None), "status_code", None)
            said = one_line(cause)[:200]
            if status in (401, 403, 404):
                raise NotAllowed(
                    f"export.hub: the hub refuses {what} ({status}): {said}; set HF_TOKEN to a token that may write there"
                ) from error
            if status is not None and status < 500 and status not in PASSING:
                raise SpecError(f"export.hub: the hub rejects {what} ({status}): {said}") from error
            log.warning("the hub did not answer for %s: %s; try %d of %d", what, said, attempt + 1, TRIES)
        except ValueError as error:  # the hub refuses a name or a file
            raise SpecError(f"export.hub: the hub rejects {what}: {one_line(error)[:200]}") from error
        time.sleep(PAUSE * 2**attempt)
    raise Unavailable(f"export.hub: the hub did not answer for {what} in {TRIES} tries: {said}")
