"""What this process may really use: files as kernels show them in containers, and one real limit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job.config.environment import Environment
from job.runtime.limits import cores, disk, host_memory, kills
from job.runtime.peaks import used_bytes
from job.runtime.scratch import disk_of
from tests.conftest import ROOT, job_environment
from tests.planning.conftest import Enter

GB, KB = 10**9, 1024
GIB = 2**30
MACHINE = "MemTotal:       131072000 kB\nMemFree:  1000 kB\nMemAvailable:   104857600 kB\n"
STATUS = "Name:\tpython\nVmSize:\t 8388608 kB\nVmData:\t 3145728 kB\nRssAnon:\t 1048576 kB\nRssFile:\t 99 kB\nRssShmem:\t 0 kB\n"
V2 = "30 23 0:26 {top} /sys/fs/cgroup ro,nosuid,nodev - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory\\040of\\040v1 rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "36 31 0:33 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
)
NO_LIMIT_V1 = "9223372036854771712\n"
Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A root with /proc of a process that holds 1 GiB on a machine of 125 GiB, and the files given by their paths."""

    def make(files: dict[str, str]) -> Path:
        there = {"proc/meminfo": MACHINE, "proc/self/status": STATUS} | files
        for name, text in there.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def v2(own: str, top: str, files: dict[str, str]) -> dict[str, str]:
    where = {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": V2.format(top=top)}
    return where | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}


def v1(own: str, top: str, files: dict[str, str]) -> dict[str, str]:
    cgroup = f"12:cpu,cpuacct:{own}\n5:memory:{own}\n1:name=systemd:/\n0::/\n"
    where = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": V1.format(top=top)}
    return where | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}


def test_without_limits_it_is_the_machine_s_less_what_others_hold(machine: Machine):
    found = host_memory(machine({}))
    assert (found.limit, found.source) == (131072000 * KB, "the machine")
    assert found.free == (104857600 + 1048576) * KB  # what is available, and what this process holds


def test_a_kill_for_want_of_memory_is_counted_where_it_happened(machine: Machine):
    events = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 1\noom_group_kill 0\n"
    own = {"job/step/memory.events": events, "memory.events": events.replace("oom_kill 1", "oom_kill 7")}
    assert kills(machine(v2("/job/step", "/", own))) == 1
    old = {"memory of v1/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}
    assert kills(machine(v1("/job", "/", old))) == 3
    assert kills(machine({"proc/self/mountinfo": ""})) == 0


def test_a_pod_limit_is_the_memory_not_the_host_s(machine: Machine):
    """In a container with a cgroup namespace of its own, the container's cgroup is the root that it sees."""
    found = host_memory(machine(v2("/", "/", {"memory.max": f"{4 * GIB}\n", "memory.high": "max\n"})))
    assert (found.limit, found.free, found.used) == (4 * GIB, 4 * GIB, GIB)
    assert "memory.max" in found.source


def test_the_least_limit_above_the_process_counts(machine: Machine):
    files = {
        "slurm/memory.max": f"{8 * GIB}\n",
        "slurm/job_7/memory.max": "max\n",
        "slurm/job_7/step_0/memory.max": f"{64 * GIB}\n",
        "other/memory.max": f"{GIB}\n",
    }
    found = host_memory(machine(v2("/slurm/job_7/step_0", "/", files)))
    assert (found.limit, found.source) == (8 * GIB, "memory.max of cgroup slurm")


def test_where_the_kernel_slows_a_process_down_it_has_no_more_memory(machine: Machine):
    files = {"memory.max": f"{8 * GIB}\n", "memory.high": f"{6 * GIB}\n"}
    assert host_memory(machine(v2("/", "/", files))).limit == 6 * GIB


def test_what_others_hold_in_the_cgroup_is_not_free_and_cache_and_our_own_are(machine: Machine):
    stat = (
        f"anon {3 * GIB}\nfile {4 * GIB}\nshmem {GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\nslab_reclaimable 0\n"
    )
    files = {"memory.max": f"{16 * GIB}\n", "memory.current": f"{7 * GIB}\n", "memory.stat": stat}
    found = host_memory(machine(v2("/", "/", files)))
    # Of 7 in use 3 are cache and 1 is ours: others hold 2, and a tmpfs 1.
    assert (found.limit, found.free) == (16 * GIB, 13 * GIB)


@pytest.mark.parametrize(
    ("own", "top"), [("/docker/abc", "/docker/abc"), ("/kube/pod/abc", "/"), ("/../elsewhere", "/")]
)
def test_version_1_is_read_whether_the_container_s_own_cgroup_is_mounted_or_the_whole_tree(
    machine: Machine, own: str, top: str
):
    inside = "memory of v1" + (own if top == "/" and ".." not in own else "")
    files = {
        f"{inside}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{inside}/memory.usage_in_bytes": f"{3 * GIB}\n",
        f"{inside}/memory.stat": f"total_active_file {GIB // 2}\ntotal_inactive_file {GIB // 2}\n",
    }
    found = host_memory(machine(v1(own, top, files)))
    assert (found.limit, found.free) == (4 * GIB, 3 * GIB)


def test_the_huge_number_of_version_1_is_no_limit_but_that_of_a_cgroup_above_is(machine: Machine):
    folder = "memory of v1/job"
    free = machine(v1("/job", "/", {f"{folder}/memory.limit_in_bytes": NO_LIMIT_V1}))
    assert host_memory(free).source == "the machine"
    bound = machine({f"sys/fs/cgroup/{folder}/memory.stat": f"hierarchical_memory_limit {2 * GIB}\n"})
    assert host_memory(bound).limit == 2 * GIB


@pytest.mark.parametrize(
    ("title", "name", "taken"), [("address space", "RLIMIT_AS", 7), ("data size", "RLIMIT_DATA", 2)]
)
def test_limits_of_the_process_count_with_what_is_mapped(machine: Machine, title: str, name: str, taken: int):
    line = f"Max {title}         {20 * GIB}          unlimited            bytes\n"
    found = host_memory(machine({"proc/self/limits": f"Limit    Soft Limit\n{line}Max processes  5  5  processes\n"}))
    assert (found.limit, found.free, found.source) == (20 * GIB, (20 - taken) * GIB, name)


def test_cores_are_those_whose_time_the_cgroup_grants(machine: Machine):
    mine = len(os.sched_getaffinity(0))
    assert cores(machine({})) == mine
    assert cores(machine(v2("/pod", "/", {"pod/cpu.max": "50000 100000\n"}))) == 1
    assert cores(machine(v2("/pod", "/", {"pod/cpu.max": "max 100000\n"}))) == mine


def test_cores_of_version_1(machine: Machine):
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "30000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}
    assert cores(machine(v1("/", "/", files))) == 1


def test_check_in_a_real_cgroup_of_4_gib_says_4_gib(
    cgroup: Callable[[int], Enter], tiny: Callable[..., Path], tmp_path: Path
):
    spec = f"{{model: {{name_or_path: {tiny('llava')}}}, dataset: {{path: none/none}}, output: {{url: {tmp_path}/o}}}}"
    said = subprocess.run(
        [sys.executable, "-m", "job", "check", spec],
        env=job_environment(tmp_path, HF_HUB_OFFLINE="1"),
        cwd=ROOT,
        preexec_fn=cgroup(4 * GIB),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "device: CPU, " in said
    assert f"cores, {4 * GIB / GB:.1f} GB" in said


KILLED = """
import subprocess, sys
from pathlib import Path
from job.runtime.exit import run_and_exit
from job.runtime.scratch import explain_shortages
def work():
    with explain_shortages(Path("/tmp")):
        child = subprocess.run([sys.executable, "-S", "-c", "bytearray(10**9)"])
        if child.returncode:
            raise RuntimeError(f"a worker ended with {child.returncode}")
run_and_exit(work)
"""


def test_a_worker_that_the_kernel_killed_for_want_of_memory_ends_the_job_with_71(cgroup: Callable[[int], Enter]):
    for limit, code, reason in ((200 * 2**20, 71, "host memory ran out"), (4 * GIB, 0, "")):
        job = [sys.executable, "-c", KILLED]
        ended = subprocess.run(job, cwd=ROOT, preexec_fn=cgroup(limit), stderr=subprocess.PIPE, text=True)
        assert (ended.returncode, reason in ended.stderr) == (code, True), ended.stderr


def test_an_address_space_of_4_gib_is_the_memory(tmp_path: Path):
    program = "from job.runtime.limits import host_memory; m = host_memory(); print(m.limit, m.source)"
    limited = ["bash", "-c", f'ulimit -v {4 * 2**20}; exec "$@"', "bash", sys.executable, "-c", program]
    said = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(4 * GIB), "RLIMIT_AS"]


def test_what_lies_in_scratch_counts_against_what_was_granted(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(bytes(3_000_000))
    with (tmp_path / "hollow").open("wb") as file:
        file.truncate(10**9)
    lies = used_bytes(tmp_path)
    assert 3_000_000 <= lies < 3_100_000
    found = disk_of(tmp_path / "a", Environment(scratch=tmp_path, scratch_gb=0.01))
    assert found is not None
    assert found.room == 9_800_000 - lies
    assert disk_of(tmp_path, Environment(scratch=tmp_path, scratch_gb=0.001)).room == 0  # type: ignore[union-attr]


def test_without_the_variable_scratch_has_what_its_disk_has(tmp_path: Path):
    found = disk_of(folder := tmp_path / "not" / "there yet", Environment(scratch=folder))
    facts = os.statvfs(tmp_path)
    assert found is not None
    assert found.room == pytest.approx(facts.f_bavail * facts.f_frsize, rel=0.05)
    assert found.device == tmp_path.stat().st_dev


def test_a_file_system_that_does_not_say_its_size_is_not_full():
    assert os.statvfs("/proc").f_blocks == 0
    assert disk(Path("/proc/self")) is None
