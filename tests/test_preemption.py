"""Signals, for real."""

import os
import signal
import subprocess
import sys
import time

import pytest

from job.errors import Preempted
from job.preemption import Preemption, grace_seconds


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
def test_a_grace_that_is_no_time_is_refused(text: str):
    with pytest.raises(ValueError, match=r".+"):
        grace_seconds({"JOB_GRACE_SECONDS": text})


def test_the_grace_is_thirty_seconds_unless_told():
    assert grace_seconds({}) == 30
    assert grace_seconds({"JOB_GRACE_SECONDS": "120"}) == 120
