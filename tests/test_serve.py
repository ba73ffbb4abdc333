"""`job serve` prints the commands that the served gate uses, and becomes the one that is asked for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.conftest import Job
from tests.test_predict import Made, made

__all__ = ["made"]


def commands(text: str) -> dict[str, list[str]]:
    """By the comment before each."""
    lines = text.splitlines()
    return {lines[n - 1]: shlex.split(line) for n, line in enumerate(lines) if line and not line.startswith("#")}


def test_each_server_has_a_command_and_what_no_file_says_is_told(job: Job, made: Made) -> None:
    done = job("serve", str(made.output), JOB_SERVE_PYTHON="/vllm/bin/python")
    assert done.returncode == 0, done.stderr
    found = commands(done.stdout)
    assert [comment.split(",")[0] for comment in found] == [
        "# merged/ with vLLM",
        "# merged/ with SGLang",
        "# adapter/ with vLLM",
    ]
    merged, sglang, adapter = found.values()
    vllm = ["/vllm/bin/python", "-m", "vllm.entrypoints.cli.main", "serve"]
    merged_folder, adapter_folder = str(made.output / "merged"), str(made.output / "adapter")
    shared = ["--dtype", "float32", "--max-model-len", "524"]
    assert merged == [*vllm, merged_folder, "--served-model-name", "tuned", *shared]
    assert sglang[:5] == ["python", "-m", "sglang.launch_server", "--model-path", merged_folder]
    assert adapter[:5] == [*vllm, str(made.base)]
    assert adapter[-len(shared) :] == shared
    settings = json.loads((made.output / "adapter" / "processor_config.json").read_text())["image_processor"]["size"]
    for words in (
        ["--tokenizer", adapter_folder],
        ["--generation-config", adapter_folder],
        ["--chat-template", f"{adapter_folder}/chat_template.jinja"],
        ["--lora-modules", f"tuned={adapter_folder}"],
        ["--max-lora-rank", "8"],
        [
            "--mm-processor-kwargs",
            json.dumps({"min_pixels": settings["shortest_edge"], "max_pixels": settings["longest_edge"]}),
        ],
    ):
        assert adapter[adapter.index(words[0]) + 1] == words[1]
    assert {"--enable-lora", "--enable-tower-connector-lora"} < {*adapter}
    assert "tried with 0.32" in done.stdout
    assert "# Requests must follow what no published file says: the system prompt." in done.stdout


def test_run_becomes_the_command_that_is_asked_for(job: Job, made: Made, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "vllm").write_text('#!/bin/sh\necho "$@"; exit 5\n')
    (programs / "vllm").chmod(0o755)
    merged, _, adapter = commands(job("serve", str(made.output)).stdout).values()
    for weights, words in (("merged", merged), ("adapter", adapter)):
        done = job("serve", str(made.output), "--run", "--weights", weights, PATH=f"{programs}:/bin:/usr/bin")
        assert (done.returncode, done.stdout.split()) == (5, " ".join(words[1:]).split())


def test_a_server_that_is_not_there_is_one_sentence(job: Job, made: Made, tmp_path: Path) -> None:
    def ending(*arguments: str) -> str:
        return job("serve", *arguments, PATH=str(tmp_path)).stderr.splitlines()[-1]

    assert ending(str(made.output), "--run").startswith("exit 78: --run: vllm cannot be started (No such file")
    wrong = ending(str(made.output), "--run", "--engine", "sglang", "--weights", "adapter")
    assert wrong.startswith("exit 78: --run: no such command; this output has --engine vllm --weights merged, ")
    assert (
        ending(str(tmp_path))
        == f"exit 65: {tmp_path} holds no published model: RESULT.json is missing or names no files"
    )
