"""Signals, for real."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from job.errors import Preempted
from job.output.attempts import count_attempt
from job.runtime.preemption import Preemption, end_time
from job.store import open_store


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request_with_a_deadline(number: signal.Signals):
    with Preemption(grace_seconds=5).listening() as preemption:
        assert preemption.remaining == float("inf")
        os.kill(os.getpid(), number)
        assert preemption.requested
        assert 4 < preemption.remaining <= 5
        with pytest.raises(Preempted, match=f"stopped on {number.name}; run again to continue"):
            preemption.check()


def test_where_nothing_is_worth_keeping_the_signal_raises_at_once():
    with Preemption().listening() as preemption:
        began = time.monotonic()
        with pytest.raises(Preempted), preemption.leave_at_once():
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        assert time.monotonic() - began < 20


def test_a_request_made_before_raises_on_entry():
    preemption = Preemption()
    preemption.request("a spot notice")
    with pytest.raises(Preempted, match="a spot notice"), preemption.leave_at_once():
        pytest.fail("the block was entered")


def test_former_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption().listening():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_exits_at_once(first: signal.Signals):
    """Of a job that has a notice already, too."""
    code = (
        "import time\nfrom job.runtime.preemption import Preemption\n"
        "with Preemption(1000).listening() as preemption:\n print('up', flush=True)\n"
        " while not preemption.requested: time.sleep(0.1)\n"
        " print('heard', flush=True)\n time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(first)
    assert process.stdout.readline() == b"heard\n"
    while process.poll() is None:  # one may swallow the next where the process is slow to hear it
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.returncode == 75
    process.stdout.close()


def test_usr1_ahead_of_the_end_leaves_all_the_time_until_then():
    with Preemption(grace_seconds=5, end_time=time.time() + 100).listening() as preemption:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert 90 < preemption.remaining <= 100
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.remaining <= 5


def test_the_end_time_is_what_slurm_says():
    assert end_time({"SLURM_JOB_END_TIME": "1790000000"}) == 1790000000
    assert end_time({}) is None


def test_a_stage_that_does_not_notice_is_left_at_the_deadline_with_75_and_is_no_death(tmp_path: Path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom job.output.attempts import count_attempt\n"
        "from job.runtime.preemption import Preemption\nfrom job.runtime.status import Record\nfrom job.store import open_store\n"
        "store, preemption = open_store(sys.argv[1]), Preemption(4)\n"
        "record = Record(store, Path(sys.argv[1]), attempt=count_attempt(store, 1))\n"
        "preemption.last_words = record.leave\n"
        "with preemption.listening(too_late=lambda reason: print(reason, flush=True)), record.kept():\n"
        " record.write(stage='train')\n print('up', flush=True)\n while True: time.sleep(0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "in the middle of a stage" in out
    status = json.loads((tmp_path / "status.json").read_text())
    assert {"state": "preempted", "exit_code": 75, "attempt": 1}.items() <= status.items()
    assert count_attempt(open_store(str(tmp_path)), 1) == 2


@pytest.mark.parametrize("module", ["click", "pydantic", "yaml", "torch"])
def test_a_notice_during_any_import_is_heard(tmp_path, module: str):
    """The signal comes from inside the import itself, so that no luck with timing is needed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Notice:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r} and not sys.modules.get('noticed'):\n"
        "            sys.modules['noticed'] = sys\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Notice())\n"
    )
    spec = "{model: {name_or_path: /no}, dataset: {path: /no}, output: {url: %s}}" % (tmp_path / "output")
    result = subprocess.run(
        [sys.executable, "-m", "job", "check"],
        env=os.environ | {"JOB_SPEC": spec, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 75, result.stderr
    assert result.stderr.strip().splitlines()[-1] == "exit 75: stopped on SIGTERM; run again to continue"


def test_a_notice_that_a_library_caught_is_raised_again():
    preemption = Preemption()
    began = time.monotonic()
    with preemption.listening(), pytest.raises(Preempted, match="SIGTERM"), preemption.leave_at_once():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        time.sleep(60)
    assert time.monotonic() - began < 40


def test_who_cleans_up_after_a_notice_has_a_moment_for_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "job.runtime.preemption.AGAIN_SECONDS", 20.0
    )  # half a second is short where tests run beside each other
    cleaned = []

    def clean() -> None:
        time.sleep(0.3)
        cleaned.append(True)

    preemption = Preemption()
    with preemption.listening():
        time.sleep(1)
        with pytest.raises(Preempted), preemption.leave_at_once(), contextlib.ExitStack() as stack:
            stack.callback(clean)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
    assert cleaned


def test_a_notice_of_a_cloud_is_raised_too():
    preemption = Preemption()
    with preemption.listening(), pytest.raises(Preempted, match="spot"), preemption.leave_at_once():
        threading.Timer(0.1, preemption.request, ["spot notice", 100.0]).start()
        time.sleep(20)
        pytest.fail("nobody heard it")


@pytest.mark.parametrize("then", [lambda: None, lambda: __import__("no.such.module")])
def test_a_notice_that_a_library_caught_is_honoured_all_the_same(then):
    preemption = Preemption()
    with preemption.listening(), pytest.raises(Preempted, match="SIGTERM"), preemption.leave_at_once():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        then()
