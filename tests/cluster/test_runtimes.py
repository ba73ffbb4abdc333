"""slurm/runtimes.sh: what each runtime is asked to do. Those that can run here run in tests/docker/test_in_slurm.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

RUNTIMES = ("apptainer", "pyxis", "podman", "docker", "charliecloud", "venv")
SHOW = """
. slurm/runtimes.sh
compose "$python" -m job run
printf '%s\\n' "${command[@]}"
echo ---
env
"""


def ask(runtime: str, tmp_path: Path, **more: str) -> tuple[list[str], dict[str, str]]:
    """The command's words, and the environment that it inherits."""
    for name in ("podman", "docker"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": "/home/me",
        "JOB_HOME": str(ROOT),
        "JOB_SITE": "/dev/null",
        "JOB_RUNTIME": runtime,
        "JOB_IMAGE": str(tmp_path / "image"),
        "JOB_NODE_SCRATCH": "/local",
        "JOB_MOUNTS": "/lustre/runs /lustre/data:ro",
        "JOB_PASS_ENV": "OMP_* WANDB_MODE",
        "JOB_SPEC": "name: a 'b' $(c)\nmodel: {}\n",
        "JOB__LORA__R": "8",
        "AWS_SECRET_ACCESS_KEY": "do-not-show",
        "HTTPS_PROXY": "http://proxy:3128",
        "OMP_NUM_THREADS": "4",
        "PASSWORD": "of mine",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_GPUS": "2,3",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    done = subprocess.run(
        ["bash", "-c", SHOW], cwd=ROOT, env=environment | more, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    words, _, inherited = done.stdout.partition("---\n")
    return words.splitlines(), dict(line.split("=", 1) for line in inherited.splitlines() if "=" in line)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_no_value_of_the_environment_is_on_a_command_line(runtime: str, tmp_path: Path):
    """Anyone on the node can read it there."""
    words, _ = ask(runtime, tmp_path)
    assert not any("do-not-show" in word or "of mine" in word or "name: a" in word for word in words)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_job_sees_its_own_variables_and_those_that_the_site_names(runtime: str, tmp_path: Path):
    words, inherited = ask(runtime, tmp_path)
    if runtime == "apptainer":
        prefix = "APPTAINERENV_"
        seen = {name.removeprefix(prefix) for name in inherited if name.startswith(prefix)}
        assert "--cleanenv" in words
    elif runtime == "pyxis":
        seen = set(next(word for word in words if word.startswith("--export=")).removeprefix("--export=").split(","))
    elif runtime in ("podman", "docker"):
        seen = {words[place + 1] for place, word in enumerate(words) if word == "--env"}
    else:
        seen = set(inherited)
    wanted = {"JOB_SPEC", "JOB__LORA__R", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "OMP_NUM_THREADS", "JOB_SCRATCH"}
    assert wanted <= seen
    assert not {"PASSWORD", "JOB_IMAGE", "JOB_MOUNTS", "JOB_PASS_ENV"} & seen


@pytest.mark.parametrize("runtime", RUNTIMES[:-1])
def test_folders_and_gpus_of_the_job_are_there_and_the_home_is_not(runtime: str, tmp_path: Path):
    for folder in ("scratch", "lustre/runs", "lustre/data"):  # Charliecloud makes its mount points in the image
        (tmp_path / "image" / folder).mkdir(parents=True)
    words, inherited = ask(runtime, tmp_path)
    text = " ".join(words)
    assert "/local/vision-lora-7:/scratch" in text
    assert "/lustre/runs:/lustre/runs" in text
    assert "/home/me" not in text
    if runtime != "charliecloud":  # which mounts as it is told and makes nothing read-only but the image
        assert "/lustre/data:/lustre/data:ro" in text
    gpus = {"apptainer": "--nv", "docker": '--gpus "device=2,3"', "podman": "nvidia.com/gpu=3"}
    assert gpus.get(runtime, "") in text
    if runtime == "apptainer":
        assert inherited["APPTAINERENV_CUDA_VISIBLE_DEVICES"] == "0,1"
    without, _ = ask(runtime, tmp_path, SLURM_JOB_GPUS="")
    assert not any(gpu in " ".join(without) for gpu in gpus.values())


def start(tmp_path: Path, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script that has sourced slurm/start.sh."""
    (tmp_path / "bin").mkdir()
    for name in ("scontrol", "squeue"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "JOB_HOME": str(ROOT), "JOB_SITE": "/dev/null"}
    environment |= {"JOB_IMAGE": "x", "JOB_SPEC": "x", "JOB_NODE_SCRATCH": str(tmp_path), "SLURM_JOB_ID": "7"} | more
    command = ["bash", "-c", f". slurm/start.sh; {script}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_killed_start_is_not_told_by_the_code_of_an_earlier_one(tmp_path: Path):
    """Slurm may kill the script while it cleans up, and requeue it to the same node."""
    (tmp_path / "vision-lora-7.code").write_text("75\n")
    assert start(tmp_path, "die() { kill -KILL $BASHPID; }; to_its_end die").returncode == 137


def test_the_code_is_told_where_the_node_s_disk_is_full(tmp_path: Path):
    (tmp_path / "vision-lora-7.code").mkdir()  # where nothing can be written either
    assert start(tmp_path, "end() { return 69; }; to_its_end end").returncode == 69


def test_a_cap_on_requeues_that_is_no_number_is_told(tmp_path: Path):
    done = start(tmp_path, "true", JOB_MAX_RESTARTS="none")
    assert (done.returncode, done.stderr) == (78, "slurm: JOB_MAX_RESTARTS is none; it is a number\n")


def test_a_rank_is_given_the_gpus_of_its_own_node(tmp_path: Path):
    """Slurm hands the job's on from its first node, where others may be free."""
    words, _ = ask("docker", tmp_path, SLURM_STEP_GPUS="0")
    assert '"device=0"' in words


@pytest.mark.parametrize("runtime", ["docker", "podman"])
def test_prometheus_reaches_the_port_of_rank_0_through_a_container_s_own_network(runtime: str, tmp_path: Path):
    words, _ = ask(runtime, tmp_path, JOB_METRICS_PORT="9400", RANK="0")
    assert words[words.index("--publish") + 1] == "9400:9400"
    assert "--publish" not in ask(runtime, tmp_path, JOB_METRICS_PORT="9400", RANK="1")[0]
    assert "--publish" not in ask(runtime, tmp_path)[0]


@pytest.mark.parametrize("runtime", ["venv", "docker"])
def test_every_variable_that_the_job_reads_reaches_it(runtime: str, tmp_path: Path):
    sources = "".join(path.read_text() for path in (ROOT / "job").rglob("*.py"))
    ours = set(re.findall(r'"(JOB_[A-Z_]*[A-Z])"', sources)) - {"JOB_IMAGE"}
    words, inherited = ask(runtime, tmp_path, **dict.fromkeys(ours, "s3://bucket/x"))
    assert len(ours) > 8
    assert ours <= set(inherited if runtime == "venv" else words)


def test_an_unknown_runtime_or_no_image_is_told(tmp_path: Path):
    with pytest.raises(AssertionError, match="it can be apptainer, pyxis"):
        ask("singularity", tmp_path)
    with pytest.raises(AssertionError, match="JOB_IMAGE is empty"):
        ask("venv", tmp_path, JOB_IMAGE="")


def test_prefetch_gathers_image_and_bundle_on_a_login_node(tmp_path: Path, demo: Path):
    """The image by a stand-in for Apptainer, which starts it by leaving the container out; the bundle is real."""
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/bash\n"
        'if [ "$1" = pull ]; then echo "$3" > "$2"; exit; fi\n'
        'while [ "$1" != /opt/venv/bin/python ]; do shift; done\n'
        'for name in $(compgen -e APPTAINERENV_JOB); do export ${name#APPTAINERENV_}="${!name}"; done\n'
        f'export JOB_SCRATCH={tmp_path}/scratch PYTHONPATH={ROOT}\nexec {sys.executable} "${{@:2}}"\n'
    )
    program.chmod(0o755)
    spec, image = tmp_path / "spec.yaml", tmp_path / "image.sif"
    tree = {"model": {"name_or_path": str(demo / "base")}, "dataset": {"path": str(demo / "data"), "max_rows": 9}}
    spec.write_text(yaml.safe_dump(tree | {"output": {"url": str(tmp_path / "output")}}))
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "JOB_RUNTIME": "apptainer",
        "JOB_IMAGE": str(image),
        "JOB_IMAGE_SOURCE": "docker://registry/image@sha256:abc",
        "JOB_SPEC": str(spec),
        "JOB_BUNDLE": str(tmp_path / "bundle"),
        "JOB_NODE_SCRATCH": str(tmp_path),
    }
    done = subprocess.run([ROOT / "slurm/prefetch.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert image.read_text() == "docker://registry/image@sha256:abc\n"
    assert Path(f"{image}.digest").read_text() == "registry/image@sha256:abc\n"
    assert (tmp_path / "bundle/BUNDLE.json").exists()
    assert (tmp_path / "bundle/model/config.json").exists()


def test_a_scratch_folder_on_a_node_that_is_a_link_is_refused(tmp_path: Path):
    """Its name is easy to guess, and it lies where all may write."""
    (tmp_path / "link").symlink_to(tmp_path)
    script = 'fail() { echo "$1"; exit 78; }; . slurm/carry_out.sh; scratch=$1; make_scratch'
    for name, code in (("link", 78), ("own", 0), ("own", 0)):
        command = ["bash", "-c", script, "bash", str(tmp_path / name)]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (made.returncode, "is a link or another user's" in made.stdout) == (code, bool(code)), made.stderr
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700


def test_prefetch_makes_no_folder_of_a_bucket(tmp_path: Path):
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "venv/bin/python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "JOB_RUNTIME": "venv", "JOB_IMAGE": str(tmp_path / "venv")}
    environment |= {"JOB_SITE": "/dev/null", "JOB_NODE_SCRATCH": str(tmp_path), "JOB_SPEC": "s3://bucket/spec.yaml"}

    def prefetch(bundle: str) -> subprocess.CompletedProcess[str]:
        given = environment | {"JOB_BUNDLE": bundle}
        command = [ROOT / "slurm/prefetch.sh"]
        return subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)

    assert prefetch("s3://bucket/bundle").stdout == "-m job prefetch s3://bucket/spec.yaml s3://bucket/bundle\n"
    assert [path.name for path in tmp_path.iterdir()] == ["venv"]
    relative = prefetch("bundle")
    assert (relative.returncode, "give its whole path" in relative.stderr) == (78, True)
