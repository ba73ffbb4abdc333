"""Which backend trains: what the spec asks for, what is installed, what the machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.config.rules import contradictions
from job.config.schema import ModelSpec
from job.errors import SpecError
from job.model.load import choose_backend
from tests.tiny import job_spec


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)


def model(**settings: str) -> ModelSpec:
    return ModelSpec.model_validate({"name_or_path": "base"} | settings)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("settings", "cuda", "backend"),
    [
        ({}, True, "unsloth"),
        ({}, False, "transformers"),
        ({"backend": "unsloth"}, True, "unsloth"),
        ({"backend": "transformers"}, True, "transformers"),
        ({"attn_implementation": "eager"}, True, "transformers"),
    ],
)
def test_where_unsloth_is_installed(settings: dict[str, str], cuda: bool, backend: str) -> None:
    assert choose_backend(model(**settings), cuda) == backend


def test_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert choose_backend(model(), True) == "transformers"
    with pytest.raises(SpecError, match="unsloth is not installed; install the gpu extra, or choose transformers"):
        choose_backend(model(backend="unsloth"), True)


@pytest.mark.usefixtures("installed")
def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(SpecError, match="needs an NVIDIA GPU"):
        choose_backend(model(backend="unsloth"), False)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"model": {"name_or_path": "base", "backend": "unsloth", "attn_implementation": "eager"}},
            "model: backend unsloth chooses its own attention; remove attn_implementation",
        ),
        (
            {
                "model": {"name_or_path": "base", "backend": "transformers"},
                "training": {"gradient_checkpointing": "unsloth"},
            },
            "training: gradient_checkpointing: unsloth does not work with model.backend transformers; set it to true",
        ),
    ],
)
def test_what_a_backend_does_not_do_is_a_contradiction(sections: dict[str, Any], says: str) -> None:
    assert contradictions(job_spec(**sections)) == [says]
