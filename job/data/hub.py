"""Loads data sets from the Hub, and explains names that exist neither on this machine nor there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.config.schema import DatasetSpec
from job.errors import DataError, NotAllowed, SpecError, Unavailable
from job.runtime.hub import hub_errors

if TYPE_CHECKING:
    from datasets import Dataset

PATIENCE = 10.0
"""Seconds allowed for one request to the Hub."""


def not_there(name: str, field: str) -> SpecError:
    """Explains a path that does not exist and is not a Hub id either."""
    if "://" in name and not name.startswith("file://"):
        return SpecError(f"{field}: this job cannot read {name}; name a path, s3://bucket/prefix or a hub id")
    looked = "" if Path(name).is_absolute() or name[:1] == "~" or "://" in name else f" (looked in {Path.cwd()})"
    return SpecError(f"{field}: {name} does not exist{looked}")


def from_hub(spec: DatasetSpec, path: str, split: str, cache: Path, field: str) -> Dataset:
    """Raises SpecError, NotAllowed, DataError or Unavailable with the reason why there are no rows."""
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from httpx import HTTPError
    from huggingface_hub.constants import is_offline_mode

    with hub_errors(path, field, spec.revision):
        try:
            rows = load_dataset(path, spec.name, split=split, revision=spec.revision, cache_dir=str(cache))
        except ValueError as error:
            raise DataError(f"{field}: {path}: {str(error).splitlines()[0]}") from error
        except (OSError, HTTPError) as error:
            if isinstance(error, DatasetNotFoundError) or is_offline_mode():
                raise
            ask_hub(path, field)
            raise Unavailable(f"{field}: the hub failed while {path} was fetched ({type(error).__name__})") from error
    assert isinstance(rows, Dataset)
    return rows


def ask_hub(name: str, field: str) -> None:
    """Raises SpecError if the Hub has no such data set, NoHub if it cannot be reached from here, Unavailable if it does not
    answer or may not be asked. Fetches nothing."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise Unavailable(f"{field}: {name} is not here, and HF_HUB_OFFLINE is set")
    with suppress(NotAllowed), hub_errors(name, field):  # a gated one exists
        HfApi().dataset_info(name, timeout=PATIENCE)
