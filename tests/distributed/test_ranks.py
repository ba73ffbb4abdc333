"""Several processes do one job: same order, same losses, one writer, one ending."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.distributed.allreduce import AllReduce
from job.distributed.launch_env import LaunchEnv, one_gpu, read_launch_env
from job.distributed.liveness import STUCK_SECONDS
from job.distributed.ranks import Ranks, join_ranks
from job.errors import DataError, JobError, SpecError
from job.output.identity import Identity
from job.planning.stage_in import refuse_other_rows
from job.runtime.preemption import Preemption
from job.store import ReadOnly, open_store
from job.store.lease import acquire
from tests.conftest import ROOT, Job, job_environment
from tests.forked import Forks
from tests.resume_proof import small_spec, trajectory
from tests.tiny import job_spec

SILENCE = 6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Run:
    """`world` processes of one job with the variables that srun and rank.sh give them. None sees to the others. They are forks;
    tests/test_torchrun.py and tests/cluster start several that are not."""

    def __init__(self, forks: Forks, world: int, spec: str, folder: Path, scratch: Path | None = None) -> None:
        self.output = Path(yaml.safe_load(spec)["output"]["url"])
        there = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        there |= {
            "JOB_SPEC": spec,
            "JOB_LEASE_SECONDS": str(SILENCE),
            "JOB_SCRATCH": str(scratch or folder / "scratch"),
        }
        self.said = [folder / f"stderr-{rank}" for rank in range(world)]
        self.processes = []
        for rank, said in enumerate(self.said):
            environment = job_environment(folder, **there, RANK=str(rank), LOCAL_RANK=str(rank))
            with said.open("w") as stream:
                self.processes.append(forks.start(["run"], environment, stream))

    def send(self, number: signal.Signals, rank: int, step: int) -> None:
        """A signal to one rank, once the checkpoint of `step` or a later one is committed."""
        while not any(saved >= step for saved in committed(self.output)):
            assert all(process.poll() is None for process in self.processes), self.words()
            time.sleep(0.02)
        self.processes[rank].send_signal(number)

    def end(self) -> list[int]:
        return [process.wait(timeout=200) for process in self.processes]

    def words(self) -> str:
        return "\n".join(file.read_text() for file in self.said)


def committed(output: Path) -> list[int]:
    return sorted(int(file.parent.name.removeprefix("step-")) for file in output.glob("checkpoints/*/MANIFEST.json"))


def spec_of(demo: Path, output: Path, **training: Any) -> str:
    """58 rows of 78 in steps of 8: with four ranks two of them have no row in the last step of an epoch."""
    tree = yaml.safe_load(small_spec(demo, str(output)))
    tree["dataset"]["max_rows"], tree["lora"]["lora_dropout"] = 78, 0.0
    tree["training"] |= {"num_train_epochs": 2, "per_device_train_batch_size": 1} | training
    tree["checkpoint"] = {"save_steps": 3, "keep": 3}
    tree["evaluation"] |= {"eval_steps": 5, "take": "best"}
    return yaml.safe_dump(tree)


def held_out(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def close(one: list[Any], other: list[Any]) -> bool:
    return bool(one == pytest.approx(other, rel=1e-4, abs=1e-5))


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The output of one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    alone = Run(forks, 1, spec_of(demo, folder / "output"), folder)
    assert alone.end() == [0], alone.words()
    return folder / "output"


@pytest.mark.timeout(600)
def test_two_ranks_then_one_then_four_do_what_one_process_does(demo: Path, whole: Path, tmp_path: Path, forks: Forks):
    """Stopped at one rank, killed at another, resumed on other numbers of them; nothing but rounding differs."""
    from safetensors.torch import load_file

    output = tmp_path / "output"
    two = Run(forks, 2, spec_of(demo, output), tmp_path)
    two.send(signal.SIGTERM, 1, 3)
    assert two.end() == [75, 75], two.words()
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["ranks"]) == ("preempted", 75, 2)
    assert status["last_checkpoint"] == status["step"] == committed(output)[-1] < 6
    assert "evaluate before has" not in two.words()  # only rank 0 speaks
    assert two.said[1].read_text() == "exit 75: stopped on SIGTERM; run again to continue\n"

    two = Run(forks, 2, spec_of(demo, output), tmp_path)
    two.send(signal.SIGKILL, 1, 6)
    assert two.end() == [69, -signal.SIGKILL], two.words()
    # Sooner, where the connection to it broke in the middle of a sum.
    gone = (
        rf"rank 1 on {re.escape(socket.gethostname())} has been silent for [5{SILENCE}] s; it was last at: train, step"
    )
    assert re.search(gone, two.words())
    assert committed(output)[-1] == json.loads((output / "status.json").read_text())["step"]

    one = Run(forks, 1, spec_of(demo, output), tmp_path)
    one.send(signal.SIGTERM, 0, committed(output)[-1] + 3)
    assert one.end() == [75], one.words()
    four = Run(forks, 4, spec_of(demo, output), tmp_path)
    assert four.end() == [0, 0, 0, 0], four.words()
    assert "resuming from step" in four.words()

    lines = map(json.loads, (output / "logs/metrics.jsonl").read_text().splitlines())
    waits = {line["step"]: line.get("rank_wait_seconds") for line in lines if "loss" in line}
    assert [len(waits[step]) for step in (2, 16)] == [2, 4]
    ours, theirs = (trajectory((folder / "logs/metrics.jsonl").read_bytes()) for folder in (output, whole))
    assert [(step, rate, rows) for step, _, rate, _, rows in ours] == [(s, r, rows) for s, _, r, _, rows in theirs]
    assert close([line[1] for line in ours], [line[1] for line in theirs])
    assert [step for step, _ in held_out(output)] == [5, 10, 15, 16]
    assert close([loss for _, loss in held_out(output)], [loss for _, loss in held_out(whole)])
    adapters = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (output, whole)]
    assert max(float((adapters[0][name] - adapters[1][name]).abs().max()) for name in adapters[1]) < 1e-4
    answers = [(folder / "evaluation/after.jsonl").read_text().splitlines() for folder in (output, whole)]
    generated = [[json.loads(line)["generated"] for line in lines] for lines in answers]
    assert sum(a == b for a, b in zip(*generated, strict=True)) >= 7


def test_two_ranks_have_each_step_in_one_line_of_numbers(demo: Path, whole: Path, tmp_path: Path, forks: Forks):
    """With a line every fourth step, for a run that is stopped between two lines and resumed."""
    output = tmp_path / "output"
    two = Run(forks, 2, spec_of(demo, output, logging_steps=4), tmp_path)
    two.send(signal.SIGTERM, 1, 6)
    assert two.end() == [75, 75], two.words()
    stopped = committed(output)[-1]
    two = Run(forks, 2, spec_of(demo, output, logging_steps=4), tmp_path)
    assert two.end() == [0, 0], two.words()
    each_step, lines = (trajectory((folder / "logs/metrics.jsonl").read_bytes()) for folder in (whole, output))
    steps = [step for step, *_ in lines]
    assert steps == sorted({*range(4, 17, 4), *range(3, 17, 3), stopped, 16})
    for first, (last, loss, rate, _, rows) in zip([0, *steps], lines, strict=False):
        within = each_step[first:last]
        assert rows == [row for *_, of_step in within for row in of_step]
        assert close([loss, rate], [sum(line[1] for line in within) / len(within), within[-1][2]])


def test_a_second_attempt_at_an_output_leaves_the_files_of_the_first_alone(demo: Path, tmp_path: Path, forks: Forks):
    """On one node and one scratch, with a rank each that has files of its own."""
    output, spec = tmp_path / "output", spec_of(demo, tmp_path / "output", num_train_epochs=40)
    first = Run(forks, 2, spec, tmp_path)
    while not committed(output):
        assert all(process.poll() is None for process in first.processes), first.words()
        time.sleep(0.02)
    (log,) = tmp_path.glob("scratch/*/rank-1.log")
    (numbers,) = tmp_path.glob("scratch/*.rank-1/metrics.jsonl")
    said, there = log.read_text(), numbers.stat().st_ino
    (tmp_path / "second").mkdir()
    second = Run(forks, 2, spec, tmp_path / "second", scratch=tmp_path / "scratch")
    assert second.end() == [75, 75], second.words()
    assert "holds its lease and is alive" in second.words()
    assert log.read_text().startswith(said)
    assert numbers.stat().st_ino == there
    first.send(signal.SIGTERM, 1, 3)
    assert first.end() == [75, 75], first.words()
    steps = [step for step, *_ in trajectory((output / "logs/metrics.jsonl").read_bytes())]
    assert steps == list(range(1, committed(output)[-1] + 1))


def test_without_rank_0_the_others_end(demo: Path, tmp_path: Path, forks: Forks):
    output = tmp_path / "output"
    with acquire(open_store(str(output)), "another writer", 300):  # rank 0 waits to see whether it lives
        two = Run(forks, 2, spec_of(demo, output), tmp_path)
        while "waiting up to" not in two.words():
            assert all(process.poll() is None for process in two.processes), two.words()
            time.sleep(0.02)
        two.processes[0].kill()
        assert two.end() == [-signal.SIGKILL, 69], two.words()
    assert "the ranks' store does not answer: rank 0, or the torchrun that hosts it, is gone" in two.words()


@pytest.fixture
def pair() -> Iterator[list[Ranks]]:
    """Two ranks in one process."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    port = free_port()
    server = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    stores = [server, TCPStore("127.0.0.1", port, 2, is_master=False)]
    ranks = [Ranks(LaunchEnv(rank, rank, 2), Preemption(), silence=20) for rank in (0, 1)]
    for one, store in zip(ranks, stores, strict=True):
        one.meet_at(PrefixStore("test", store))
    both(ranks, Ranks.join)
    yield ranks
    both(ranks, lambda one: one.part(0, "published", own=False))


def both(ranks: list[Ranks], work: Any) -> list[Any]:
    found: dict[int, Any] = {}

    def do(one: Ranks) -> None:
        found[one.rank] = work(one)

    threads = [threading.Thread(target=do, args=(one,)) for one in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[one.rank] for one in ranks]


def test_ranks_share_gather_and_do_pieces_once(pair: list[Ranks], tmp_path: Path):
    assert [one.on_this_node() for one in (*pair, Ranks(LaunchEnv(), Preemption()))] == [2, 2, 1]
    assert both(pair, lambda one: one.shared("what", f"of {one.rank}")) == ["of 0", "of 0"]
    assert both(pair, lambda one: one.gathered("rows", one.rank)) == [[0, 1], []]
    done = []

    def work(piece: int) -> int:
        time.sleep(0.01)
        done.append(piece)
        return piece * piece

    results = both(pair, lambda one: list(one.spread("squares", range(40), work)))
    assert (sorted(results[0]), results[1]) == ([piece * piece for piece in range(40)], [])
    assert sorted(done) == list(range(40))
    made = both(pair, lambda one: one.once_per_node(tmp_path, "thing", lambda: f"by {one.rank}"))
    assert made == ["by 0", "by 0"]
    (tmp_path / "other").mkdir()

    def apart(one: Ranks) -> str:
        try:
            return one.once_per_node(tmp_path / "other" if one.rank else tmp_path, "second", lambda: "made")
        except SpecError as error:
            return str(error)

    assert both(pair, apart)[1].startswith("JOB_SCRATCH: rank 1 does not see")


def test_scratch_on_a_file_system_without_locks_will_do(
    pair: list[Ranks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuses)
    assert both(pair, lambda one: one.once_per_node(tmp_path, "thing", lambda: one.rank)) == [0, 0]


def test_a_node_with_an_older_copy_of_the_rows_is_refused(pair: list[Ranks]):
    def ending(one: Ranks, rows: Identity) -> str:
        try:
            refuse_other_rows(one, rows)
        except DataError as error:
            return str(error)
        return ""

    same, other = Identity(b"a" * 16, b"b" * 16), Identity(b"a" * 16, b"c" * 16)
    assert both(pair, lambda one: ending(one, same)) == ["", ""]
    told = both(pair, lambda one: ending(one, other if one.rank else same))
    assert told[0] == ""
    assert told[1].startswith("dataset: rank 1 on ")
    assert "has other rows than rank 0" in told[1]


def test_a_rank_that_is_silent_is_named_with_where_it_was(pair: list[Ranks]):
    pair[1].where = lambda: "train, step 7"
    time.sleep(1)
    pair[0].silence = 2
    pair[1]._over.set()
    with pytest.raises(
        JobError, match=r"rank 1 on .* has been silent for 2 s; it was last at: train, step 7"
    ) as caught:
        pair[0].until(lambda: False, "the other", 20)
    assert caught.value.exit_code == 69


def test_a_notice_at_one_rank_is_one_at_all_and_so_is_an_end(pair: list[Ranks]):
    pair[1].preemption.request("a spot notice", 50)
    with pytest.raises(JobError, match="stopped on a spot notice"):
        pair[0].until(lambda: False, "the other", 20)
    assert 40 < pair[0].preemption.remaining < 50


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, LaunchEnv()),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, LaunchEnv(3, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, LaunchEnv(1, 0, 2)),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}, LaunchEnv(5, 1, 8)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, LaunchEnv()),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "1"}, LaunchEnv(1, 0, 2)),
        ({"WORLD_SIZE": "4"}, LaunchEnv(0, 0, 4)),
    ],
)
def test_every_launcher_s_variables_are_read(variables: dict[str, str], found: LaunchEnv):
    assert read_launch_env(variables) == found


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "two"},
    ],
)
def test_variables_that_place_no_process_are_refused(variables: dict[str, str]):
    with pytest.raises(SpecError):
        read_launch_env(variables)


def test_who_was_asked_to_stop_adds_nothing_half_counted(tmp_path: Path):
    """Its share would be taken for that of all its rows by ranks that have not heard of the notice yet."""
    import torch

    from job.context import RunContext
    from job.distributed.allreduce import AllReduce
    from job.model.loaded import Loaded
    from job.runtime.status import Record
    from job.store.lease import Lease
    from job.train.eval_callback import HeldOut
    from job.train.oom_retry import StepRetry

    store, preemption = open_store(str(tmp_path)), Preemption()
    group = AllReduce(Ranks(LaunchEnv(0, 0, 2), preemption))
    preemption.request("SIGTERM")
    with pytest.raises(JobError, match="stopped on SIGTERM"):
        group.sums(1.0)
    record = Record(store, tmp_path)
    attempt = RunContext(job_spec(), store, Lease(store, "test", 60.0), tmp_path, record, preemption, 1)
    model = Loaded(None, None, tmp_path, "transformers", "32bit", torch.device("cpu"), {})
    held_out = HeldOut(attempt, model, [], StepRetry(1), group)
    assert math.isnan(held_out._mean())  # and the step goes on to its line of numbers


ENDS_BY_A_BUG = """
import os, sys, time
from pathlib import Path
from job.runtime.preemption import Preemption
from job.distributed.ranks import join_ranks
with join_ranks(os.environ, Preemption(), Path(sys.argv[1]), 30, "a run") as ranks:
    if ranks.rank:
        raise ValueError("a patient's words")
    ranks.until(lambda: False, "the other")
"""


def test_the_words_of_a_bug_stay_with_the_rank_that_has_it(tmp_path: Path):
    there = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", ENDS_BY_A_BUG, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env=there | {"RANK": rank}, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert "RankEnded: rank 1: a bug: ValueError" in said[0]
    assert "a patient's words" not in said[0]
    assert "ValueError: a patient's words" in said[1]


SPEAKS = """
import os, sys, threading
from pathlib import Path
from job.runtime.preemption import Preemption
from job.distributed.ranks import join_ranks
with join_ranks(os.environ, Preemption(), Path(sys.argv[1]), 30, sys.argv[2]) as ranks:
    said = ranks.shared("what", f"said in {sys.argv[2]}")
assert not [thread for thread in threading.enumerate() if thread.name == "ranks"]  # one in the store would abort the exit
Path(sys.argv[1], f"{sys.argv[2]} {os.getpid()}").write_text(said)
"""


def test_a_rank_of_another_run_at_the_same_port_disturbs_nobody(tmp_path: Path):
    there = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start(run: str, rank: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", SPEAKS, str(tmp_path), run], env=there | {"RANK": rank}, cwd=ROOT
        )

    with start("another", "1") as stranger:
        try:
            assert [process.wait(60) for process in (start("ours", "0"), start("ours", "1"))] == [0, 0]
            assert [file.read_text() for file in tmp_path.glob("ours *")] == ["said in ours"] * 2
        finally:
            stranger.kill()
    assert not list(tmp_path.glob("another *"))


@pytest.mark.parametrize("sharded", [False, True])
def test_only_inside_a_sharded_model_is_there_no_time_to_save(sharded: bool):
    ranks = Ranks(read_launch_env({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}), Preemption())
    with AllReduce(ranks).connected(sharded):
        ranks.lose_store()
    assert (ranks.preemption.remaining > STUCK_SECONDS) is not sharded


def test_a_process_that_is_alone_sees_one_gpu_too(tmp_path: Path):
    """Of several, transformers would make a batch each."""
    environment = {"CUDA_VISIBLE_DEVICES": "4,5"}
    with join_ranks(environment, Preemption(), tmp_path, 1, "a run"):
        assert environment["CUDA_VISIBLE_DEVICES"] == "4"


@pytest.mark.parametrize(
    ("seen", "local_rank", "device"), [(None, 2, "2"), ("4,5,6", 1, "5"), ("GPU-1", 3, "GPU-1"), ("", 1, "")]
)
def test_a_rank_sees_one_gpu(seen: str | None, local_rank: int, device: str):
    environment = {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen}
    one_gpu(environment, local_rank)
    assert environment["CUDA_VISIBLE_DEVICES"] == device


def test_a_rank_without_a_gpu_of_its_own_is_refused():
    with pytest.raises(SpecError, match="start one process per GPU"):
        one_gpu({"CUDA_VISIBLE_DEVICES": "0,1"}, 2)


def test_who_may_only_read_an_output_cannot_write_to_it(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.write("spec.yaml", b"there")
    reader = ReadOnly(store)
    assert (reader.read("spec.yaml"), [entry.key for entry in reader.list()]) == (b"there", ["spec.yaml"])
    for attempt in (lambda: reader.write("x", b""), lambda: reader.delete(["spec.yaml"])):
        with pytest.raises(JobError, match="only rank 0 writes"):
            attempt()
    assert [file.name for file in tmp_path.iterdir()] == ["spec.yaml"]


def test_a_launcher_that_names_no_port_is_told(job: Job, tmp_path: Path):
    spec = f"{{model: {{name_or_path: m}}, dataset: {{path: d}}, output: {{url: {tmp_path}/o}}}}"
    there = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "tcp"}
    result = job("run", spec, **there)
    assert result.returncode == 78, result.stderr
    assert (
        "MASTER_ADDR and MASTER_PORT are 127.0.0.1:tcp; set them to the address of rank 0"
        in result.stderr.splitlines()[-1]
    )
