"""The whole job, as a scheduler runs it: a process, a folder or a bucket, signals."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, Job, job_environment
from tests.forked import Forked, Forks
from tests.push_hub import TOKEN, serve
from tests.resume_proof import trajectory

Start = Callable[[str], Forked]


@pytest.fixture(scope="module")
def base(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, with a generation config that does not stop where its template ends a turn, and punishes repeats."""
    folder = Path(shutil.copytree(demo / "base", tmp_path_factory.mktemp("spoilt") / "base"))
    settings = {"eos_token_id": 494, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def spec(demo: Path, base: Path) -> dict[str, Any]:
    return {
        "name": "small demo",
        "model": {"name_or_path": str(base)},
        "lora": {"r": 16, "lora_alpha": 32},
        "dataset": {"path": str(demo / "data"), "group_column": "patient_id", "eval_fraction": 0.25},
        "training": {"num_train_epochs": 5, "learning_rate": 3e-3},
        "checkpoint": {"save_steps": 20},
        "evaluation": {
            "max_rows": 60,
            "max_new_tokens": 40,
            "batch_size": 30,
            "labels": {"finding": {"column": "finding"}},
            "groups": ["modality"],
        },
    }


def to(spec: dict[str, Any], url: Path | str, **sections: dict[str, Any]) -> str:
    return yaml.safe_dump(spec | {"output": {"url": str(url)}} | sections)


@pytest.fixture(scope="module")
def finished(spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "-m", "job", "run"]
    environment = job_environment(folder, JOB_SPEC=to(spec, folder / "output"))
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=240)
    return folder / "output"


def read(output: Path, name: str) -> Any:
    return json.loads((output / name).read_text())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_model_learns_to_look(finished: Path):
    metrics = read(finished, "evaluation/metrics.json")
    assert metrics["labels"]["finding"]["commonest_share"] <= 0.35
    assert metrics["before"]["finding_accuracy"]["value"] <= 0.35
    assert metrics["after"]["finding_accuracy"]["value"] >= 0.7
    assert metrics["change"]["rougeL"]["value"] >= 0.3
    for part in ("before", "after", "change"):
        assert set(metrics[part]["rougeL"]) >= {"value", "low", "high", "n"}


def test_held_out_patients_are_not_trained_on(finished: Path, demo: Path):
    rows = [json.loads(line) for line in (demo / "data" / "metadata.jsonl").read_text().splitlines()]
    held = [json.loads(line)["id"] for line in (finished / "evaluation" / "after.jsonl").read_text().splitlines()]
    patients = {rows[int(identity.removeprefix("row-"))]["patient_id"] for identity in held}
    assert len(patients) > 3
    assert read(finished, "RESULT.json")["metrics"]["after"]["rougeL"]["n"] == len(held) == 60


def test_the_result_names_every_published_file_with_its_digest(finished: Path):
    files = read(finished, "RESULT.json")["files"]
    there = {
        str(p.relative_to(finished)) for d in ("adapter", "merged") for p in (finished / d).rglob("*") if p.is_file()
    }
    assert set(files) == there
    for name, facts in files.items():
        assert (digest(finished / name), (finished / name).stat().st_size) == (facts["sha256"], facts["size"])


def test_the_gate_saw_the_adapter_in_the_merged_weights(finished: Path):
    gate = read(finished, "RESULT.json")["gate"]
    assert gate["token_agreement"] >= 0.97
    assert gate["mean_logit_difference"] < 0.05 < gate["mean_difference_from_base"]
    assert gate["wrong"] == []
    assert gate["loss_merged"] < gate["loss_base"] - 0.5
    assert "Proof of the merge" in (finished / "merged" / "README.md").read_text()
    assert "Rounding logit difference" in (finished / "report.html").read_text()


def test_the_report_of_the_demo_says_first_what_follows(finished: Path):
    page = (finished / "report.html").read_text()
    top = page.partition("<body>")[2].partition("<h2")[0]
    for words in ("Report of <time", "<strong>Not a medical device.</strong>", '<p class="conclusion"><strong>'):
        assert words in top, words
    for title in ("Gates", "Results", "Labels", "Errors", "Samples", "Lineage", "How it was measured"):
        assert f">{title}</h2>" in page, title
    assert ">failed</span>" not in page


def test_merged_weights_load_without_us_and_answer_as_measured(finished: Path, demo: Path):
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(finished / "merged", dtype=torch.float32).eval()
    assert (finished / "merged" / "config.json").read_bytes() == (demo / "base" / "config.json").read_bytes()
    processor = AutoProcessor.from_pretrained(finished / "merged")
    rows = [json.loads(line) for line in (demo / "data" / "metadata.jsonl").read_text().splitlines()]
    measured = [json.loads(line) for line in (finished / "evaluation" / "after.jsonl").read_text().splitlines()][:8]
    same = 0
    for record in measured:
        image = Image.open(demo / "data" / rows[int(record["id"].removeprefix("row-"))]["file_name"]).convert("RGB")
        text = "You are an expert radiographer. Describe accurately what you see in this image."
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        same += processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == record["generated"]
    assert same >= 7


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_of_a_card_answers_as_measured(
    finished: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
):
    record = json.loads((finished / "evaluation" / "after.jsonl").read_text().splitlines()[0])
    rows = [json.loads(line) for line in (demo / "data" / "metadata.jsonl").read_text().splitlines()]
    image = demo / "data" / rows[int(record["id"].removeprefix("row-"))]["file_name"]
    card = (finished / kind / "README.md").read_text()
    assert "left out: `no_repeat_ngram_size`, `repetition_penalty`." in card
    code = card.split("```python\n")[1].split("\n```")[0]
    assert "max_new_tokens=40" in code
    monkeypatch.chdir(finished)
    exec(code.replace('"image.png"', repr(str(image))), {})
    assert capsys.readouterr().out.strip().endswith(record["generated"])
    assert 3 < record["tokens"] < 40


def test_a_published_job_ends_at_once_without_torch(finished: Path, spec: dict[str, Any], tmp_path: Path, job: Job):
    before = digest(finished / "RESULT.json")
    result = job("run", JOB_SPEC=to(spec, finished), PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    assert "already published" in result.stderr
    assert "job.run" in result.stderr
    for heavy in ("torch", "transformers", "datasets", "numpy"):
        assert f"| {heavy}\n" not in result.stderr.replace("  ", "")
    assert digest(finished / "RESULT.json") == before


def test_status_shows_the_change_and_the_report(finished: Path, job: Job):
    shown = job("status", str(finished)).stdout
    assert "small demo: published" in shown
    assert "finding_accuracy" in shown
    assert f"report: {finished}/report.html" in shown


def test_the_report_is_made_again_from_the_output_alone_without_torch(finished: Path, tmp_path: Path, job: Job):
    result = job("report", str(finished), "--to", str(tmp_path / "again.html"), PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again.html").read_bytes() == (finished / "report.html").read_bytes()
    assert b"data:image/" in (tmp_path / "again.html").read_bytes()
    for heavy in ("torch", "transformers", "datasets"):
        assert f"| {heavy}\n" not in result.stderr.replace("  ", "")


def test_another_spec_on_the_same_output_is_refused_by_field(finished: Path, spec: dict[str, Any], job: Job):
    changed = to(spec, finished, lora={"r": 8, "lora_alpha": 32})
    for command in ("run", "check"):
        result = job(command, JOB_SPEC=changed)
        assert result.returncode == 78
        assert "lora.r: 16 → 8" in result.stderr


def test_what_is_measured_may_change_when_training_is_over(
    finished: Path, spec: dict[str, Any], demo: Path, tmp_path: Path, job: Job
):
    """Another label, other groups, shorter answers, and the same rows elsewhere: measured again, published again, not trained."""
    output, moved = tmp_path / "output", tmp_path / "moved"
    shutil.copytree(finished, output)
    shutil.copytree(demo / "data", moved)
    labels = {"side": {"column": "modality"}}
    asked = {"labels": labels, "groups": ["finding"], "max_new_tokens": 6, "max_rows": 20, "explained_rows": 0}
    changed = to(spec, output, evaluation=spec["evaluation"] | asked, dataset=spec["dataset"] | {"path": str(moved)})
    told = job("check", JOB_SPEC=changed)
    assert re.search(r"evaluate before +do ", told.stderr + told.stdout)
    assert re.search(r"train +skip", told.stderr + told.stdout)
    result = job("run", JOB_SPEC=changed)
    assert result.returncode == 0, result.stderr
    assert "step 140 was already saved" in result.stderr
    assert digest(output / "adapter/adapter_model.safetensors") == digest(
        finished / "adapter/adapter_model.safetensors"
    )
    metrics = read(output, "RESULT.json")["metrics"]
    assert "side_accuracy" in metrics["after"]
    assert "finding_accuracy" not in metrics["after"]
    assert metrics["after"]["rougeL"]["n"] == 20
    answers = [json.loads(line) for line in (output / "evaluation/after.jsonl").read_text().splitlines()]
    assert all(
        row["tokens"] <= 6 and [*row["labels"]] == ["side"] and [*row["groups"]] == ["finding"] for row in answers
    )
    assert "already published" in job("run", JOB_SPEC=changed).stderr


@pytest.fixture
def start(tmp_path: Path, forks: Forks) -> Start:
    """Start a job that the test stops or kills."""
    return lambda spec: forks.start(["run"], job_environment(tmp_path, JOB_SPEC=spec))


def wait_for(condition: Any, process: Forked) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def committed(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoints/step-*/MANIFEST.json"))


def ended(process: Forked) -> tuple[int, str]:
    return process.wait(timeout=100), process.communicate()[1]


@pytest.fixture
def accumulating(spec: dict[str, Any]) -> dict[str, Any]:
    """Four micro-batches a step, dropout on: what a sloppy resume gets wrong."""
    return spec | {
        "training": spec["training"] | {"max_steps": 40, "per_device_train_batch_size": 2},
        "lora": spec["lora"] | {"lora_dropout": 0.1},
        "checkpoint": {"save_steps": 10, "keep": 3},
        "export": {"merged": False},
        "evaluation": spec["evaluation"] | {"max_rows": 10, "explained_rows": 0},
    }


def test_a_job_stopped_and_resumed_cannot_be_told_from_one_that_was_not(
    accumulating: dict[str, Any], tmp_path: Path, job: Job, start: Start
):
    whole = to(accumulating, tmp_path / "whole")
    assert job("run", JOB_SPEC=whole).returncode == 0
    output = tmp_path / "output"
    stopped = to(accumulating, output)

    process = start(stopped)
    wait_for(lambda: len(committed(output)) == 1, process)
    process.send_signal(signal.SIGTERM)
    code, stderr = ended(process)
    assert code == 75, stderr
    assert stderr.strip().splitlines()[-1] == "exit 75: stopped on SIGTERM; run again to continue"
    assert re.search(
        r"cached by an earlier run in \S*/before", stderr
    )  # the whole run's, through the scratch that both have
    assert read(output, "status.json")["state"] == "preempted"
    assert read(output, f"{committed(output)[-1].relative_to(output)}")["step"] >= 10

    process = start(stopped)
    wait_for(lambda: len(committed(output)) >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    ended(process)

    result = job("run", JOB_SPEC=stopped)
    assert result.returncode == 0, result.stderr
    assert "resuming from step" in result.stderr
    for name in ("adapter/adapter_model.safetensors", "evaluation/after.jsonl", "evaluation/before.jsonl"):
        assert digest(output / name) == digest(tmp_path / "whole" / name), name
    seen = [trajectory((folder / "logs/metrics.jsonl").read_bytes()) for folder in (output, tmp_path / "whole")]
    assert [step for step, *_ in seen[0]] == list(range(1, 41))
    assert seen[0] == seen[1]


def test_rows_that_changed_between_attempts_end_the_next_at_stage_in(
    accumulating: dict[str, Any], demo: Path, tmp_path: Path, job: Job, start: Start
):
    output, data = tmp_path / "output", tmp_path / "data"
    shutil.copytree(demo / "data", data)
    lines = (data / "metadata.jsonl").read_text().splitlines()[:40]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    accumulating |= {
        "dataset": accumulating["dataset"] | {"path": str(data)},
        "checkpoint": {"save_steps": 1},
        "training": accumulating["training"] | {"max_steps": 8},
        "evaluation": {"max_rows": 2, "max_new_tokens": 2, "explained_rows": 0},
    }
    process = start(to(accumulating, output))
    wait_for(lambda: committed(output), process)
    process.kill()
    ended(process)
    there = {path: digest(path) for path in output.glob("checkpoints/*/adapter_model.safetensors")}
    rows = [json.loads(line) for line in lines]
    rows = [row | {"caption": "Nothing can be said."} for row in rows] + [rows[0] | {"patient_id": "another"}]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for command in ("check", "run"):
        result = job(command, JOB_SPEC=to(accumulating, output))
        assert result.returncode == 65, result.stderr
        assert re.search(
            r"dataset.path: .* \d+ with different texts or values, 1 added", result.stderr.splitlines()[-1]
        )
        assert "train:" not in result.stderr
    assert {path: digest(path) for path in there} == there
    anew = yaml.safe_load(to(accumulating, output))
    anew["output"]["on_conflict"] = "restart"
    result = job("run", JOB_SPEC=yaml.safe_dump(anew))
    assert result.returncode == 0, result.stderr
    assert "restart deletes checkpoints/step-" in result.stderr
    assert "resuming" not in result.stderr
    assert (
        json.loads((output / "evaluation" / "before.jsonl").read_text().splitlines()[0])["reference"]
        == "Nothing can be said."
    )


def test_a_checkpoint_with_a_flipped_byte_is_passed_over_for_the_older(
    accumulating: dict[str, Any], tmp_path: Path, job: Job, start: Start
):
    output = tmp_path / "output"
    accumulating["training"] |= {"max_steps": 24}
    process = start(to(accumulating, output))
    wait_for(lambda: len(committed(output)) == 2, process)
    process.kill()
    ended(process)
    newest = committed(output)[-1]
    weights = newest.parent / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    result = job("run", JOB_SPEC=to(accumulating, output))
    assert result.returncode == 0, result.stderr
    step = int(newest.parent.name.removeprefix("step-"))
    assert f"checkpoint of step {step} is skipped" in result.stderr
    assert "resuming from step" in result.stderr


def test_a_gate_that_refuses_publishes_no_merged_weights(accumulating: dict[str, Any], tmp_path: Path, job: Job):
    accumulating["training"] |= {"max_steps": 4}
    gate = {"max_mean_logit_difference": 1e-9, "rounding_allowance": 0}
    export = {"merged": True, "scratch_copy": False, "gate": gate, "hub": {"adapter_repo": "clinic/adapter"}}
    with serve() as hub:
        token = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        result = job("run", JOB_SPEC=to(accumulating, tmp_path / "output", export=export), **token)
        assert hub.requests == ["GET /api/whoami-v2", "GET /api/models/clinic/adapter"]  # asked, and pushed nothing
    assert result.returncode == 76, result.stderr
    assert "merged weights differ from base + adapter" in result.stderr.strip().splitlines()[-1]
    assert (tmp_path / "output" / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "output" / "merged").exists()
    assert not (tmp_path / "output" / "RESULT.json").exists()


def test_a_model_that_is_not_as_good_as_demanded_is_not_published_until_the_demand_is_lowered(
    accumulating: dict[str, Any], tmp_path: Path, job: Job
):
    output = tmp_path / "output"
    short = accumulating | {"training": accumulating["training"] | {"max_steps": 2}, "export": {"merged": True}}

    def demanding(least: float) -> str:
        return to(short, output, evaluation=short["evaluation"] | {"require": {"rougeL": {"min_change": least}}})

    result = job("run", JOB_SPEC=demanding(0.99))
    assert result.returncode == 76, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(r"rougeL changed by .+ interval .+ below evaluation.require.rougeL.min_change = 0.99; only", last)
    assert "Refused." in (output / "report.html").read_text()
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    assert not (output / "merged").exists()
    assert not (output / "RESULT.json").exists()
    lowered = job("run", JOB_SPEC=demanding(-1))
    assert lowered.returncode == 0, lowered.stderr
    assert "step 2 was already saved" in lowered.stderr
    assert (output / "merged" / "config.json").exists()


def test_restart_deletes_the_run_of_the_other_spec(accumulating: dict[str, Any], tmp_path: Path, job: Job):
    output = tmp_path / "output"
    short = accumulating | {"training": accumulating["training"] | {"max_steps": 3}}
    assert job("run", JOB_SPEC=to(short, output)).returncode == 0
    mine = [output / name for name in ("notes/mine.txt", "data/train/mine.txt", "merged/mine.txt", "logs/mine.txt")]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("not the job's")
    other = yaml.safe_load(to(short | {"lora": {"r": 4}}, output))
    other["output"]["on_conflict"] = "restart"
    other["export"]["hub"] = {"adapter_repo": "clinic/adapter"}
    with serve() as hub:
        token = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        result = job("run", JOB_SPEC=yaml.safe_dump(other), **token)
    assert result.returncode == 0, result.stderr
    assert read(output, "RESULT.json")["hub"] == {"adapter": f"{hub.url}/clinic/adapter/commit/1"}
    there = {file.name: file.read_bytes() for file in (output / "adapter").iterdir()}
    assert hub.repos["clinic/adapter"] == {"private": True, "files": there}
    assert read(output, "adapter/adapter_config.json")["r"] == 4
    assert all(file.read_text() == "not the job's" for file in mine)


def test_everything_can_live_in_a_bucket(
    accumulating: dict[str, Any], demo: Path, tmp_path: Path, job: Job, start: Start, bucket: str
):
    """Spec, base, data and output; stopped once on the way."""
    from job.store import open_store, upload_folder

    url = f"s3://{bucket}/some folder"
    store = open_store(url)
    upload_folder(store, demo / "base", "base")
    upload_folder(store, demo / "data", "data")
    spec = yaml.safe_load(to(accumulating, f"{url}/output"))
    spec["model"]["name_or_path"], spec["dataset"]["path"] = f"{url}/base", f"{url}/data"
    spec["training"]["max_steps"] = 15
    spec["export"] = {"scratch_copy": False}
    store.write("spec.yaml", yaml.safe_dump(spec).encode())
    process = start(f"{url}/spec.yaml")
    wait_for(lambda: any("0010/MANIFEST" in entry.key for entry in store.list("output/checkpoints/")), process)
    process.terminate()
    code, stderr = ended(process)
    assert code in (0, 75), stderr
    result = job("run", JOB_SPEC=f"{url}/spec.yaml")
    assert result.returncode == 0, result.stderr
    assert "small demo: published" in job("status", f"{url}/output").stdout
    keys = {entry.key for entry in store.list("output/")}
    assert {"output/RESULT.json", "output/report.html", "output/adapter/adapter_model.safetensors"} <= keys
    files = json.loads(store.read("output/RESULT.json"))["files"]
    assert {f"output/{key}" for key in files} == {
        key for key in keys if key.startswith(("output/adapter", "output/merged"))
    }
    merged = store.read("output/merged/model.safetensors")
    assert hashlib.sha256(merged).hexdigest() == files["merged/model.safetensors"]["sha256"]
    assert not list(tmp_path.glob("scratch/*/export/merged/*.safetensors"))


def test_a_published_adapter_is_a_start_for_the_next_job(
    accumulating: dict[str, Any], finished: Path, tmp_path: Path, job: Job, bucket: str
):
    from job.store import open_store, upload_folder

    url = f"s3://{bucket}/first/adapter"
    upload_folder(open_store(f"s3://{bucket}"), finished / "adapter", "first/adapter")
    spec = accumulating | {"training": accumulating["training"] | {"max_steps": 1, "learning_rate": 1e-9}}
    spec["lora"] = spec["lora"] | {"init_adapter": url, "lora_alpha": 12, "use_rslora": True}
    planned = job("check", JOB_SPEC=to(spec, tmp_path / "output"))
    assert f"the scale of {url} is 2, this job's is 3 (" in planned.stdout
    result = job("run", JOB_SPEC=to(spec, tmp_path / "output"))
    assert result.returncode == 0, result.stderr
    had, has = (losses(folder) for folder in (finished, tmp_path / "output"))
    assert has == pytest.approx({row: had[row] for row in has}, abs=1e-4)
    earlier, later = (read(folder, "evaluation/metrics.json") for folder in (finished, tmp_path / "output"))
    assert later["after"]["rougeL"]["value"] > 0.9 < earlier["after"]["rougeL"]["value"]
    assert later["before"]["rougeL"]["value"] < 0.5
    lineage = read(tmp_path / "output", "RESULT.json")["lineage"]
    assert lineage["parent_adapter"] == url
    assert lineage["parent_sha256"] == digest(finished / "adapter" / "adapter_model.safetensors")


def losses(output: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (output / "evaluation" / "after.jsonl").read_text().splitlines()]
    return {row["id"]: row["loss"] for row in rows}


def test_an_adapter_for_other_layers_is_refused(accumulating: dict[str, Any], finished: Path, tmp_path: Path, job: Job):
    lora = accumulating["lora"] | {"init_adapter": str(finished / "adapter"), "finetune_vision_layers": False}
    for command in ("check", "run"):
        result = job(command, JOB_SPEC=to(accumulating, tmp_path / "output", lora=lora))
        assert result.returncode == 78
        assert "was made for other layers: it also adapts" in result.stderr
