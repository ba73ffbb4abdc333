"""Signals, for real."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from job.errors import Preempted, SpecError
from job.preemption import Preemption, end_time, grace_seconds


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
            time.sleep(5)
        assert time.monotonic() - began < 1


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


def test_a_second_interrupt_exits_at_once():
    code = (
        "import time\nfrom job.preemption import Preemption\n"
        "with Preemption().listening():\n print('up', flush=True)\n for _ in range(100): time.sleep(0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(timeout=5) == 75
    process.stdout.close()


@pytest.mark.parametrize("text", ["soon", "-1", "0", "inf", "nan"])
def test_a_time_that_is_none_is_refused(text: str):
    with pytest.raises(SpecError, match=f"JOB_GRACE_SECONDS is {text}; give a number of seconds above 0"):
        grace_seconds({"JOB_GRACE_SECONDS": text})


def test_the_grace_is_thirty_seconds_unless_told():
    assert grace_seconds({}) == 30
    assert grace_seconds({"JOB_GRACE_SECONDS": "120"}) == 120


def test_usr1_ahead_of_the_end_leaves_all_the_time_until_then():
    with Preemption(grace_seconds=5, end_time=time.time() + 100).listening() as preemption:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert 90 < preemption.remaining <= 100
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.remaining <= 5


def test_the_end_time_is_what_slurm_says():
    assert end_time({"SLURM_JOB_END_TIME": "1790000000"}) == 1790000000
    assert end_time({}) is None


def test_a_stage_that_does_not_notice_is_left_at_the_deadline_with_75():
    code = (
        "import time\nfrom job.preemption import Preemption\n"
        "with Preemption(2).listening(too_late=lambda reason: print(reason, flush=True)):\n"
        " print('up', flush=True)\n while True: time.sleep(0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.terminate()
    began = time.monotonic()
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 75
    assert "in the middle of a stage" in out
    assert time.monotonic() - began < 3


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
        time.sleep(20)
    assert time.monotonic() - began < 10


def test_who_cleans_up_after_a_notice_has_a_moment_for_it():
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
            time.sleep(5)
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
