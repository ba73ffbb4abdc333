"""What was measured is what is served: `job predict` gives the answers of the evaluation, about the original files."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from job.store import open_store, upload_folder
from tests.conftest import Job, job_environment
from tests.data.test_dicom import made as dicom
from tests.data.test_dicom import pictures
from tests.forked import Forks

SYSTEM = "You are a helpful assistant. Name the side."
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "mllama")
SHAPES = ((1000, 760), (500, 1200), (1200, 410), (800, 800), (80, 60))


class Made(NamedTuple):
    family: str
    base: Path
    data: Path
    output: Path

    def measured(self) -> dict[str, str]:
        """Answers of the evaluation by the original file."""
        rows = [json.loads(line) for line in (self.data / "metadata.jsonl").read_text().splitlines()]
        lines = (self.output / "evaluation" / "after.jsonl").read_text().splitlines()
        answers = {row["id"]: row["generated"] for row in map(json.loads, lines)}
        return {
            str(self.data / row["file_name"]): answers[f"row-{number}"]
            for number, row in enumerate(rows)
            if f"row-{number}" in answers
        }


def make_data(folder: Path) -> Path:
    """Pictures of many sizes, larger than those that training sees, as PNG and as JPEG, one of them turned by its EXIF."""
    from PIL import Image

    from tests.tiny import picture

    folder.mkdir()
    lines = []
    for number in range(16):
        width, height = SHAPES[number % len(SHAPES)]
        shown, name = picture(number, width, height), f"{number}.{'jpg' if number % 2 else 'png'}"
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 4 == 3 else 1
        shown.save(folder / name, exif=exif)
        said = "There is a nodule in the left upper zone." if number % 3 else "The heart is of normal size."
        lines.append(json.dumps({"file_name": name, "caption": said}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def make_base(family: str, tiny: Callable[..., Path], folder: Path) -> Path:
    """A base that punishes repeats, and that would take larger pictures than fit the rows of the job."""
    shutil.copytree(tiny(family), folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.3}))
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    if "longest_edge" in settings["image_processor"]["size"]:
        settings["image_processor"]["size"]["longest_edge"] = 1 << 20
        file.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module", params=FAMILIES[:1])
def made(
    request: pytest.FixtureRequest, tiny: Callable[..., Path], forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """A published output of a job with a system prompt."""
    family, folder = request.param, tmp_path_factory.mktemp("made")
    base, data = make_base(family, tiny, folder / "base"), make_data(folder / "data")
    spec = {
        "model": {"name_or_path": str(base)},
        "lora": {"r": 8, "lora_alpha": 32},
        "dataset": {"path": str(data), "eval_rows": 8, "system_prompt": SYSTEM, "instruction": "What is it?"},
        "training": {"max_steps": 2, "learning_rate": 5e-3, "max_length": 512},
        "evaluation": {"max_new_tokens": 12, "explained_rows": 0},
        "export": {"gate": {"rows": 2}},
        "output": {"url": str(folder / "output")},
    }
    done = forks.run(["run"], job_environment(folder, JOB_SPEC=yaml.safe_dump(spec)), timeout=600)
    assert done.returncode == 0, done.stderr
    return Made(family, base, data, folder / "output")


def lines(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines()]


def predicted(job: Job, output: Path | str, images: Iterable[str], *arguments: str) -> dict[str, str]:
    done = job("predict", str(output), *images, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {line["image"]: line["answer"] for line in lines(done.stdout)}


@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_predictions_are_the_answers_that_were_measured(job: Job, made: Made) -> None:
    measured = made.measured()
    assert len(set(measured.values())) > 2
    for weights in ("adapter", "merged"):
        assert predicted(job, made.output, measured, "--weights", weights) == measured


@pytest.mark.filterwarnings("ignore")  # of libraries, about devices and offloading
@pytest.mark.parametrize("made", FAMILIES, indirect=True)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_of_the_card_gives_the_answers_that_were_measured(
    made: Made, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (made.output / kind / "README.md").read_text()
    code = re.search(r"^(`{3,})python\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / kind).symlink_to(made.output / kind)
    said = {}
    for image in made.measured():
        shutil.copy(image, tmp_path / "image.png")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code[2], "card", "exec"), {})
        said[image] = printed.getvalue().removesuffix("\n")
    assert said == made.measured()
    told = "the system prompt" + ("; the date in the system turn (26 Jul 2024)" if made.family == "mllama" else "")
    assert told in card
    assert told in (made.output / "report.html").read_text()


@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_published_files_say_what_was_measured_with(made: Made) -> None:
    for kind in ("adapter", "merged"):
        settings = json.loads((made.output / kind / "generation_config.json").read_text())
        assert (settings["repetition_penalty"], settings["max_new_tokens"]) == (1.0, 12)
        assert settings["do_sample"] is False
        assert "how far pictures were shrunk" not in (made.output / kind / "README.md").read_text()
        ours = json.loads((made.output / kind / "processor_config.json").read_text())["image_processor"]
        theirs = json.loads((made.base / "processor_config.json").read_text())["image_processor"]
        if made.family.startswith("qwen"):
            assert 512 * 0.6 < ours["size"]["longest_edge"] / (ours["patch_size"] * 2) ** 2 < 512 * 0.8
            ours["size"] = theirs["size"]
        assert ours == theirs


def test_another_question_has_other_answers_and_without_json_they_are_lines(job: Job, made: Made) -> None:
    measured = made.measured()
    done = job("predict", str(made.output), *measured, "--instruction", "Is there a fracture of the left clavicle?")
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert said.keys() & measured.keys()
    assert any(answer.strip() != measured[image] for image, answer in said.items() if image in measured)


def test_a_dicom_file_is_windowed_and_a_file_that_is_no_image_is_one_bad_input(
    job: Job, made: Made, tmp_path: Path
) -> None:
    ramp = np.kron(np.arange(0, 1024, 4).reshape(16, 16), np.ones((60, 60), int))
    scan, same, text = tmp_path / "scan.dcm", tmp_path / "scan.png", tmp_path / "notes.txt"
    scan.write_bytes(dicom(ramp, WindowCenter=300, WindowWidth=200, BurnedInAnnotation="NO"))
    pictures(scan.read_bytes())[0].save(same)
    text.write_text("no image")
    done = job("predict", str(made.output), *map(str, (scan, text, same)), "--json")
    first, bad, last = lines(done.stdout)
    assert first["answer"] == last["answer"] != ""
    assert bad == {"image": str(text), "error": "image of an unknown format"}
    assert done.returncode == 65
    assert done.stderr.splitlines()[-1] == f"exit 65: 1 of 3 images: {text}: image of an unknown format"


def test_an_output_in_a_bucket_answers_with_what_it_has(job: Job, made: Made, bucket: str) -> None:
    measured = made.measured()
    store = open_store(f"s3://{bucket}")
    upload_folder(store, made.output / "merged", "run/merged")
    for name in ("RESULT.json", "spec.yaml"):
        store.write(f"run/{name}", (made.output / name).read_bytes())
    assert predicted(job, f"s3://{bucket}/run/", measured) == measured


def test_what_is_missing_is_one_sentence(job: Job, made: Made, tiny: Callable[..., Path], tmp_path: Path) -> None:
    def ending(*arguments: str) -> str:
        return job("predict", *arguments).stderr.splitlines()[-1]

    image, adapter = next(iter(made.measured())), tmp_path / "adapter only"
    assert (
        ending(str(tmp_path), image)
        == f"exit 65: {tmp_path} holds no published model: RESULT.json is missing or names no files"
    )
    shutil.copytree(made.output, adapter, ignore=lambda _, names: {"merged"} & {*names})
    result = json.loads((adapter / "RESULT.json").read_text())
    result["files"] = {key: digest for key, digest in result["files"].items() if key.startswith("adapter/")}
    (adapter / "RESULT.json").write_text(json.dumps(result))
    assert "has only adapter; leave the option out" in ending(str(adapter), image, "--weights", "merged")
    assert "is no adapter of" in ending(str(adapter), image, "--base", str(tiny("gemma3")))
    gone = ending(str(adapter), image, "--base", str(tmp_path / "gone"))
    assert gone.startswith("exit 78: model.name_or_path: ")
    assert gone.endswith("name the base model of this adapter with --base")
    assert ending(str(adapter)).startswith("exit 78: command line: Missing argument 'IMAGE...'")
