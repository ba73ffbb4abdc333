"""A base whose files were cut, changed or made up is refused by name before anything is loaded."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError, SpecError
from job.model import template
from job.model.base_model import base_facts
from job.model.collator import MOST_CHARACTERS, render
from job.model.header import read_header
from job.model.transformers_backend import load_processor
from tests.tiny import job_spec, row


@pytest.fixture
def base(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "base")


def write(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


GOOD = {"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", GOOD | {"__metadata__": {"format": "pt"}}, bytes(16))
    assert read_header(tmp_path / "model.safetensors")[0] == GOOD


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        (GOOD, 15, "16 bytes should follow its header, and 15 do"),
        (GOOD, 17, "16 bytes should follow its header, and 17 do"),
        (b"[" * 50_000, 0, "not all of it"),
        ([], 0, "not a JSON object"),
        ({"a": 5}, 0, "lacks the type, shape or position of a"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8, "lacks the type, shape or position of a"),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "lacks the type, shape or position of a"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8, "the size of a does not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12, "the data of a begin at 4 and not at 0"),
    ],
)
def test_a_file_of_weights_that_is_not_whole_is_refused(tmp_path: Path, header: Any, size: int, reason: str) -> None:
    write(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(SpecError, match=f"^model.name_or_path: .*{reason}.*fetch or save it again"):
        read_header(tmp_path / "model.safetensors")


def test_half_a_base_is_refused(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SpecError, match="not all of it"):
        base_facts(base)


@pytest.mark.parametrize("weights", [5, [], {"a": None}, {"a": "../model.safetensors"}, {"a": "\0.safetensors"}, None])
def test_an_index_names_files_beside_it(base: Path, weights: Any) -> None:
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(SpecError, match="beside it"):
        base_facts(base)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": 5}, "architectures"),
        ({"vision_config": []}, "vision_config"),
        ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size"),
        ({"vision_config": {"image_size": [448, 0]}}, "vision_config.image_size"),
        ({"vision_config": {"image_size": []}}, "vision_config.image_size"),
        ({"text_config": {"vocab_size": "many"}}, "text_config.vocab_size"),
    ],
)
def test_a_configuration_that_no_plan_can_count_with_is_refused(base: Path, change: dict[str, Any], named: str) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SpecError, match=f"config.json has no usable {named};"):
        base_facts(base)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "{", "[" * 50_000, '{"model": 5}', '{"image_processor": []}'])
def test_a_processor_that_its_libraries_cannot_read_is_the_bases_fault(base: Path, name: str, text: str) -> None:
    (base / name).write_text(text)
    try:
        load_processor(job_spec().model, base)
    except SpecError as error:
        assert str(base) in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{% for i in range(20) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}{{ 2 ** 800000000 }}",
        "{% for i in range(99999) %}{{ messages }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_refused_in_seconds(base: Path, text: str) -> None:
    (base / "chat_template.jinja").write_text(text)
    begun = time.process_time()
    with pytest.raises(SpecError, match="the chat template of .* takes seconds, 512 MB or 100,000 characters"):
        load_processor(job_spec().model, base)
    assert time.process_time() - begun < 5


RECURSION = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"


@pytest.mark.parametrize("text", [None, RECURSION, "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}"])
def test_a_template_that_ends_has_five_times_what_it_takes(
    base: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text:
        (base / "chat_template.jinja").write_text(text)
    monkeypatch.setattr(template, "_tried", set())
    monkeypatch.setattr(template, "SECONDS", template.SECONDS / 5)
    monkeypatch.setattr(template, "SECONDS_AGAIN", template.SECONDS_AGAIN / 5)
    assert str(load_processor(job_spec().model, base).chat_template) in template._tried


def test_a_template_that_failed_is_not_tried_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "chat_template.jinja").write_text(RECURSION)
    monkeypatch.setattr(template, "_tried", set())
    monkeypatch.setattr(template, "SECONDS_AGAIN", 1e-6)
    assert load_processor(job_spec().model, base).chat_template == RECURSION
    assert template._tried == {RECURSION}


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", RECURSION])
def test_whatever_a_template_fails_with_is_told_of_the_rows(base: Path, text: str) -> None:
    (base / "chat_template.jinja").write_text(text)
    processor = load_processor(job_spec().model, base)
    with pytest.raises(DataError, match="chat template refuses the conversation"):
        render(processor, row(1)["messages"])


def test_a_template_that_multiplies_what_a_row_says_is_bounded(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{% for i in range(300) %}{{ messages[0].content[1].text }}{% endfor %}")
    processor = load_processor(job_spec().model, base)
    with pytest.raises(DataError, match="renders the conversation to"):
        render(processor, row(1, question="x" * (MOST_CHARACTERS // 250))["messages"])
