"""Defines what makes a folder of files a checkpoint: `MANIFEST.json`, written last."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from job.errors import DataError
from job.layout import CHECKPOINTS, MANIFEST
from job.store import Store, checked_key

SEAL = "manifest_sha256"
_FOLDER = re.compile(rf"^{CHECKPOINTS}/step-(\d{{8,}})/")


def _checked(key: str) -> str:
    try:
        return checked_key(key)
    except DataError as error:
        raise ValueError(str(error)) from None


Key = Annotated[str, AfterValidator(_checked)]


class File(BaseModel):
    """One file of a checkpoint. Its bytes are stored under `key`, which for an unchanged file is that of an older step."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    size: int = Field(ge=0, description="Bytes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the whole content, in hex.")
    key: Key = Field(description="Where the bytes are, relative to the root of the output.")


class Manifest(BaseModel):
    """What was committed. Unknown fields are ignored, so that an older job can read a newer one's checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    step: int = Field(ge=0, description="The optimizer steps that were finished.")
    epoch: float = Field(description="The position in the data, in passes over it.")
    spec_digest: str = Field(description="The digest of the job spec that this state belongs to.")
    attempt: int = Field(ge=0, description="Which start of the job wrote it.")
    token: int = Field(default=0, ge=0, description="The fencing token of the lease under which it was written.")
    created: str = Field(description="ISO 8601, UTC.")
    versions: dict[str, str] = Field(default_factory=dict, description="The packages that wrote it.")
    files: dict[Key, File] = Field(description="By name, relative to the folder that is restored.")
    extra: dict[str, Any] = Field(default_factory=dict, description="What the caller wants back on resume. JSON.")


def folder_of(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:08d}"


def step_of(key: str) -> int | None:
    """Return the step of a key that is inside a folder which `folder_of` could have named, else None."""
    match = _FOLDER.match(key)
    return int(match[1]) if match and key.startswith(folder_of(int(match[1])) + "/") else None


def to_json(manifest: Manifest) -> bytes:
    """Write readable JSON, sealed by a digest of itself, so that a flipped byte anywhere is detected."""
    fields = manifest.model_dump()
    return json.dumps({**fields, SEAL: _seal(fields)}, indent=1, ensure_ascii=False).encode()


def from_json(data: bytes, where: str) -> Manifest:
    """Parse what `to_json` wrote. Raises DataError for anything else."""
    try:
        fields = json.loads(data)
        if fields.pop(SEAL) != _seal(fields):
            raise DataError(f"{where} is damaged: its SHA-256 is not the recorded one.")
        return Manifest.model_validate(fields)
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is not a manifest: {(str(error).splitlines() or [''])[0]}.") from None


def _seal(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(store: Store, step: int) -> Manifest:
    """Read the manifest of a step. Raises Missing if the step was never committed, DataError if this is not a manifest of this
    step."""
    key = f"{folder_of(step)}/{MANIFEST}"
    manifest = from_json(store.read(key), key)
    if manifest.step != step:
        raise DataError(f"{key} is the manifest of step {manifest.step}.")
    return manifest


def steps(store: Store) -> list[int]:
    """List the committed steps, newest first: those whose folder holds a manifest."""
    return steps_in([entry.key for entry in store.list(f"{CHECKPOINTS}/")])


def steps_in(keys: list[str]) -> list[int]:
    found = [step for key in keys if (step := step_of(key)) is not None and key == f"{folder_of(step)}/{MANIFEST}"]
    return sorted(found, reverse=True)
