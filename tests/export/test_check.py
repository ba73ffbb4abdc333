"""What cannot be exported is refused before anything is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.config.schema import ExportSpec, ServeSpec
from job.errors import SpecError
from job.export.gguf import converter, write_gguf
from job.export.served import interpreter, server_version
from job.export.stage import check_export
from job.model.base_model import BaseFacts, base_facts
from job.model.lora_targets import Linear

CONVERTER = """
import json, pathlib, sys
assert sys.argv[1].endswith("merged") and sys.argv[2] == "--outfile", sys.argv
pathlib.Path(sys.argv[3]).write_text(json.dumps(sys.argv[4:]))
if not pathlib.Path(sys.argv[1]).is_dir():
    sys.exit("ERROR:hf-to-gguf:no such folder")
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program that takes the converter's arguments and writes them down."""
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    return tmp_path


def base(model_type: str = "qwen3_vl", **linears: Linear) -> BaseFacts:
    return BaseFacts(model_type, "Model", 0, 0, linears)


def test_a_base_that_is_stored_quantised_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_vl", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match="is quantised, .* name the 16-bit base model"):
        base_facts(tmp_path)


def test_int4_is_refused_where_its_groups_do_not_divide_a_width() -> None:
    names = {"visual.blocks.0.mlp.fc1": 80, "model.layers.0.self_attn.q_proj": 256, "lm_head": 100}
    fits = {name: Linear(256, width) for name, width in names.items()}
    check_export(ExportSpec(merged_int4=True), base(**fits))
    odd = fits | {"model.layers.0.mlp.down_proj": Linear(256, 192)}
    check_export(ExportSpec(), base(**odd))
    with pytest.raises(SpecError, match="merged_int4: 128 columns .* model.layers.0.mlp.down_proj has 192,"):
        check_export(ExportSpec(merged_int4=True), base(**odd))


def test_gguf_is_refused_with_the_reason_where_llama_cpp_lacks_the_family(sources: Path) -> None:
    check_export(ExportSpec(gguf=True), base())
    for family, says in (
        ("mllama", "does not know MllamaForConditionalGeneration"),
        ("llava", "Pixtral"),
        ("new", "not known"),
    ):
        with pytest.raises(SpecError, match=f"llama.cpp does not support {family} models .*{says}"):
            check_export(ExportSpec(gguf=True), base(family))


def test_gguf_needs_llama_cpps_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(SpecError, match="set LLAMA_CPP to a folder with llama.cpp's sources"):
        check_export(ExportSpec(gguf=True), base())


def test_the_converter_makes_one_file_for_the_model_and_one_for_its_tower(tmp_path: Path, sources: Path) -> None:
    (tmp_path / "merged").mkdir()
    write_gguf(converter("qwen3_vl"), tmp_path / "merged", tmp_path / "gguf")
    made = {file.name: json.loads(file.read_text()) for file in (tmp_path / "gguf").iterdir()}
    assert made == {"model.gguf": ["--outtype", "bf16"], "mmproj.gguf": ["--outtype", "bf16", "--mmproj"]}
    with pytest.raises(SpecError, match="cannot make model.gguf of .*; it said: ERROR:hf-to-gguf:no such folder"):
        write_gguf(converter("qwen3_vl"), tmp_path / "nowhere-merged", tmp_path / "gguf")


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ({"merged": False, "merged_4bit": True}, "merged_4bit needs merged weights on scratch; set merged to true"),
        ({"scratch_copy": False, "gguf": True}, "gguf needs merged weights on scratch; set scratch_copy to true"),
        ({"scratch_copy": False, "hub": {"merged_repo": "a/b"}}, "hub.merged_repo needs merged weights on scratch"),
        ({"hub": {"adapter_repo": "no slash"}}, "export.hub.adapter_repo"),
    ],
)
def test_choices_that_cannot_hold_together_are_told(tree: dict[str, Any], export: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        validate(tree | {"export": export})


def test_a_server_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    serve = ServeSpec(engine="vllm")
    with pytest.raises(
        SpecError, match="export.serve.python: name the Python of an environment with vllm, here or in JOB_SERVE"
    ):
        interpreter(serve, {})
    assert interpreter(serve, {"JOB_SERVE_PYTHON": "/a/python"}) == "/a/python"
    assert interpreter(ServeSpec(python="/b/python"), {"JOB_SERVE_PYTHON": "/a/python"}) == "/b/python"
    for python in (str(tmp_path / "none"), sys.executable):
        with pytest.raises(SpecError, match="is no Python with vllm; name one, or remove export.serve.engine"):
            server_version(serve, python)
    (tmp_path / "python").write_text("#!/bin/sh\necho 0.32.0\n")
    (tmp_path / "python").chmod(0o755)
    assert server_version(serve, str(tmp_path / "python")) == "0.32.0"
    check_export(ExportSpec(serve=serve), base("qwen3_vl"))
    check_export(ExportSpec(serve=serve), base("a_new_one"))
    with pytest.raises(SpecError, match="no vLLM is known to serve qwen3_5; remove it"):
        check_export(ExportSpec(serve=serve), base("qwen3_5"))
