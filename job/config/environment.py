"""Parses every JOB_* variable that the job reads, except the spec's JOB__SECTION__FIELD, which `job.config.loader` reads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from job.errors import SpecError

SECONDS, GIGABYTES = "a number of seconds above 0", "a number of gigabytes above 0"


@dataclass(frozen=True)
class Environment:
    """The field `scratch_gb` holds the variable JOB_SCRATCH_GB, and so on. Unset or blank variables have their defaults.

    docs/environment.md shows these sentences as a table, and a test compares the two.
    """

    spec: str = ""
    """The job spec: its text in YAML or JSON, its path, or its `file://` or `s3://` URL. The argument of `job run SPEC` takes
    precedence."""
    bundle: str = ""
    """The folder or `s3://` prefix that `job prefetch` filled. Base model and data come from it, and nothing comes from a
    network."""
    scratch: Path | None = None
    """The folder for everything written on this machine. It may contain the data but not lie inside it; jobs may share it.
    Default: a private folder below the temporary folder."""
    scratch_gb: float | None = None
    """Size limit of scratch in gigabytes, if its disk does not report one: the `sizeLimit` of an emptyDir, a quota. Default: the
    free space."""
    grace_seconds: float = 30.0
    """Seconds between a preemption notice and the kill."""
    lease_seconds: float = 60.0
    """Seconds until the lease of a killed job expires, and until a silent rank counts as dead."""
    gpu_memory_gb: float = float("inf")
    """Gigabytes of a shared GPU that tensors may use; CUDA's own memory comes on top. Where there is no GPU, `check` plans for
    one of that size. Default: all of them."""
    price_per_hour: str | None = None
    """Price of an hour on this machine, as a number. The report then shows the cost of training."""
    serve_python: str | None = None
    """The Python of an environment with vLLM, for `export.serve` and `job serve`."""
    radeval_python: str | None = None
    """The Python of an environment with RadEval, for `evaluation.extra_metrics` and `job score`."""
    image_digest: str | None = None
    """Digest of the running image, for the lineage in `RESULT.json`."""
    metrics_port: int | None = None
    """Port on which `/metrics` reports the step, the loss and more to Prometheus. Jobs on one node need different ports."""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Environment:
        """Parse the variables. Raises SpecError for an invalid value."""
        given = {name: text for name, value in variables.items() if (text := value.strip())}
        return cls(
            spec=variables.get("JOB_SPEC", cls.spec),
            bundle=given.get("JOB_BUNDLE", cls.bundle),
            scratch=_folder(given.get("JOB_SCRATCH")),
            scratch_gb=_above_0(given, "JOB_SCRATCH_GB", GIGABYTES),
            grace_seconds=_above_0(given, "JOB_GRACE_SECONDS", SECONDS) or cls.grace_seconds,
            lease_seconds=_above_0(given, "JOB_LEASE_SECONDS", SECONDS) or cls.lease_seconds,
            gpu_memory_gb=_above_0(given, "JOB_GPU_MEMORY_GB", GIGABYTES) or cls.gpu_memory_gb,
            price_per_hour=given.get("JOB_PRICE_PER_HOUR"),
            serve_python=given.get("JOB_SERVE_PYTHON"),
            radeval_python=given.get("JOB_RADEVAL_PYTHON"),
            image_digest=given.get("JOB_IMAGE_DIGEST"),
            metrics_port=int(port) if (port := _above_0(given, "JOB_METRICS_PORT", "a free port")) else None,
        )


def _above_0(given: Mapping[str, str], name: str, what: str) -> float | None:
    if name not in given:
        return None
    with suppress(ValueError):
        if 0 < (number := float(given[name])) < float("inf"):
            return number
    raise SpecError(f"{name} is {given[name]!r}; give {what}")


def _folder(text: str | None) -> Path | None:
    if text is not None and "://" in text:
        raise SpecError(f"JOB_SCRATCH is {text}; name a folder of this machine by its path")
    try:
        return None if text is None else Path(text).expanduser()
    except RuntimeError:
        raise SpecError(f"JOB_SCRATCH: {text} starts with the home of a user that this machine does not have") from None
