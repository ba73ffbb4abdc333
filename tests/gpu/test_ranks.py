"""Two processes with a GPU each, which NCCL connects: `make test-gpu`. Skipped, with the reason, where there are not two."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")
if torch.cuda.device_count() < 2:
    pytest.skip("there are no two NVIDIA GPUs here", allow_module_level=True)

from tests.tiny import make_model, picture

ROOT = Path(__file__).parents[2]
SILENCE = 8
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
"""As between two nodes: NCCL then learns of a dead peer by its connection, and not at all through shared memory."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("job")
    lines = [{"file_name": f"{n}.png", "caption": "There is a nodule. " * (1 + n % 5)} for n in range(64)]
    (folder / "rows").mkdir()
    for number, line in enumerate(lines):
        picture(number).save(folder / "rows" / str(line["file_name"]))
    (folder / "rows" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = make_model("mllama", folder / "model", dtype=torch.bfloat16)
    return {
        "model": {"name_or_path": str(model), "precision": "16bit", "backend": "transformers"},
        "lora": {"r": 4},
        "dataset": {"path": str(folder / "rows"), "eval_rows": 8},
        "training": {"num_train_epochs": 12, "learning_rate": 2e-4, "per_device_train_batch_size": 2},
        "checkpoint": {"save_steps": 4},
        "evaluation": {"max_new_tokens": 8, "batch_size": 4, "explained_rows": 0},
        "export": {"merged": False},
    }


class Ranks:
    """`world` processes of one job, as srun starts them. None sees to the others."""

    def __init__(self, world: int, spec: dict[str, Any], output: Path, **variables: str) -> None:
        self.output = output
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        there = {"JOB_SPEC": yaml.safe_dump(spec | {"output": {"url": str(output)}}), "JOB_LEASE_SECONDS": str(SILENCE)}
        there |= {"JOB_SCRATCH": f"{output}.scratch", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.said = [output.with_suffix(f".{time.time_ns()}-{rank}.log") for rank in range(world)]
        self.processes = []
        for rank, said in enumerate(self.said):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            with said.open("w") as stream:
                command = [sys.executable, "-m", "job", "run"]
                environment = {**os.environ, **there, **place, **variables}
                self.processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=stream))

    def send(self, number: signal.Signals, rank: int, step: int) -> None:
        """A signal to one rank, once the checkpoint of `step` or a later one is committed."""
        while not any(saved >= step for saved in self.committed()):
            assert all(process.poll() is None for process in self.processes), self.words()
            time.sleep(0.01)
        self.processes[rank].send_signal(number)

    def end(self) -> list[int]:
        return [process.wait(timeout=240) for process in self.processes]

    def committed(self) -> list[int]:
        found = self.output.glob("checkpoints/*/MANIFEST.json")
        return sorted(int(file.parent.name.removeprefix("step-")) for file in found)

    def words(self) -> str:
        return "\n".join(file.read_text() for file in self.said)


def losses(output: Path) -> list[tuple[int, list[int], float]]:
    lines = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["rows"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the same job on one GPU."""
    output = tmp_path_factory.mktemp("alone") / "output"
    one = Ranks(1, spec, output)
    assert one.end() == [0], one.words()
    return output


@pytest.mark.parametrize("variables", [{}, SOCKETS], ids=["one node", "as on two nodes"])
def test_a_rank_that_is_killed_ends_the_other_and_the_next_attempt_goes_on(
    variables: dict[str, str], spec: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    two = Ranks(2, spec, output, **variables)
    two.send(signal.SIGTERM, 1, 4)
    assert two.end() == [75, 75], two.words()
    stopped = two.committed()[-1]
    assert stopped == json.loads((output / "status.json").read_text())["step"]

    two = Ranks(2, spec, output, **variables)
    two.send(signal.SIGKILL, 1, stopped + 4)
    began = time.monotonic()
    assert two.end() == [69, -signal.SIGKILL], two.words()
    print(f"the other ended {time.monotonic() - began:.1f} s after the kill; a rank is waited for {SILENCE} s")
    assert re.search(r"rank 1 on .* has been silent for \d+ s; it was last at: train, step", two.words())
    assert two.committed()[-1] == json.loads((output / "status.json").read_text())["step"]

    two = Ranks(2, spec, output, **variables)
    assert two.end() == [0, 0], two.words()
    assert "resuming from step" in two.words()
    ours, theirs = losses(output), losses(alone)
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    assert [line[2] for line in ours] == pytest.approx([line[2] for line in theirs], rel=0.02)
