"""Heartbeats between ranks. Each rank reports twice a second that it is alive, and where it is. The end of any rank acts on
all others as a preemption notice (`job.runtime.preemption`), with the exit code of that end."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from job.distributed.launch_env import LaunchEnv
from job.errors import Unavailable
from job.runtime.preemption import Preemption

log = logging.getLogger("job")

JOIN_SECONDS = 900.0
"""Seconds for all ranks to join: one node may still be pulling the image."""
LONGEST_WAIT = 6 * 3600.0
"""Seconds for what another rank does by itself while it is alive: fetching a base model, exporting."""
LEAVE_SECONDS = 10.0
"""Seconds between the end of rank 0 and that of the others."""
STUCK_SECONDS = 4.0
"""Seconds until a rank ends that waits inside the model for one that is gone: nothing but its end can end that wait."""
BEAT_SECONDS = 0.5


class Liveness:
    """This rank among the others. `states` is what each rank reported last; `silence` is how many seconds without a heartbeat
    make a rank count as dead. They report through `store`."""

    store: Any

    def __init__(self, place: LaunchEnv, preemption: Preemption, silence: float = 60.0) -> None:
        self.place, self.rank, self.world = place, place.rank, place.world
        self.preemption, self.silence = preemption, silence
        self.where: Callable[[], str] = lambda: "joining"
        self.states: dict[int, dict[str, Any]] = {}
        self._mine: dict[str, Any] = {"host": socket.gethostname(), "beat": 0, "code": None, "gone": False}
        self._mine["makes"] = place.local_rank == 0  # makes what is made once per node
        self._ticked = time.monotonic()
        self.inside = False
        """Whether this rank is where it cannot notice that another one is gone: in a gather of weights."""
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._telling = threading.Lock()

    def until(
        self, true: Callable[[], object], what: str, seconds: float = LONGEST_WAIT, *, patient: bool = False
    ) -> None:
        """Wait for something that other ranks do. Raises Preempted on a notice (`patient`: only once one of them ends), or when
        one of them is gone, Unavailable when it takes longer than `seconds`."""
        began, waited = time.monotonic(), 0.0
        while not true():
            if not patient or self.preemption.code is not None or self._others_end():
                self.preemption.check()
            if waited > seconds:
                raise Unavailable(f"rank {self.rank} waited {seconds:.0f} s for {what}; {self.table()}")
            time.sleep(min(max(waited / 100, 0.0002), 0.05))  # overshoots by at most a hundredth
            waited = time.monotonic() - began

    def _others_end(self) -> bool:
        return any(state["code"] is not None for rank, state in self.states.items() if rank != self.rank)

    def on_this_node(self) -> int:
        """Count the ranks that share this node, and so its scratch."""
        return [each["host"] for each in self.states.values()].count(self._mine["host"]) or 1

    def table(self) -> str:
        """Describe where all ranks are."""
        return ", ".join(f"rank {rank} on {each['host']}: {each['where']}" for rank, each in self.states.items())

    def join(self) -> None:
        """Wait for all ranks, and start watching them."""
        keys = [f"rank {rank}" for rank in range(self.world)]
        self._tell(self.store)
        try:
            self.until(lambda: self.store.check(keys), "all ranks to join", JOIN_SECONDS)
        except Unavailable:
            missing = [key for key in keys if not self.store.check([key])]
            raise Unavailable(f"{', '.join(missing)} did not join within {JOIN_SECONDS:.0f} s") from None
        self._ticked = time.monotonic()
        self.states = {rank: json.loads(self.store.get(key)) for rank, key in enumerate(keys)}
        self._threads = [threading.Thread(target=work, name="ranks", daemon=True) for work in (self._live, self._guard)]
        for thread in self._threads:
            thread.start()

    def _tell(self, store: Any) -> None:
        with self._telling:  # so that no older state is written after a newer one
            self._mine["beat"] += 1
            reason = self.preemption.reason if self.preemption.code is None else None
            stop = None if reason is None else [reason, self.preemption.remaining]
            store.set(f"rank {self.rank}", json.dumps(self._mine | {"where": self.where(), "stop": stop}))

    def _live(self) -> None:
        """Send this rank's heartbeat, and check those of the others."""
        store = self.store.clone()
        beats = dict.fromkeys(range(self.world), (0, time.monotonic()))
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._tell(store)
                told = store.multi_get([f"rank {rank}" for rank in range(self.world)])
            except RuntimeError:
                self.lose_store()
                return
            self._ticked = time.monotonic()
            self.states = {rank: json.loads(text) for rank, text in enumerate(told)}
            for rank, state in self.states.items():
                if rank == self.rank or state["gone"]:
                    continue
                if state["beat"] != beats[rank][0]:
                    beats[rank] = (state["beat"], self._ticked)
                if state["code"] is not None:
                    self.preemption.request(state["reason"], code=state["code"])
                elif state["stop"] and not self.preemption.requested:
                    self.preemption.request(*state["stop"])
                elif self._ticked - beats[rank][1] > self.silence:
                    self._lose(f"rank {rank} on {state['host']} has been silent for {self.silence:.0f} s", rank)

    def _guard(self) -> None:
        """Detect a store whose machine has lost power: it answers nothing, not even with an error."""
        while not self._over.wait(1):
            if time.monotonic() - self._ticked > self.silence:
                self._lose(f"the ranks' store, beside rank 0, has been silent for {self.silence:.0f} s")
                return

    def lose_store(self) -> None:
        self._lose("the ranks' store does not answer: rank 0, or the torchrun that hosts it, is gone")

    def _lose(self, why: str, rank: int = 0) -> None:
        last = self.states.get(rank, {}).get("where", "joining")
        if not self._over.is_set() and self.preemption.code is None:
            log.error("%s; it was last at: %s", why, last)
            seconds = STUCK_SECONDS if self.inside else None
            self.preemption.request(f"{why}; it was last at: {last}; run again", seconds, code=Unavailable.exit_code)

    def part(self, code: int, reason: str, own: bool) -> tuple[int, str]:
        """Tell the others how this rank ends (`own`: by itself), and return how the run ends: as rank 0 says."""
        with suppress(RuntimeError):  # the store may be gone, and with it everything to be learnt
            if self.rank == 0 or own:
                self._mine |= {"code": code, "reason": reason if self.rank == 0 else f"rank {self.rank}: {reason}"}
                self._tell(self.store)
            began, beats = time.monotonic(), {rank: state["beat"] for rank, state in self.states.items()}
            patience = LEAVE_SECONDS if self.rank == 0 else self.preemption.grace_seconds + LEAVE_SECONDS
            while (waited := time.monotonic() - began) < min(patience, self.preemption.remaining - 2 + waited):
                told = [json.loads(self.store.get(f"rank {rank}")) for rank in range(self.world)]
                if self.rank and told[0]["code"] is not None:
                    code, reason = told[0]["code"], told[0]["reason"]
                    break
                dead = {
                    rank for rank, beat in beats.items() if told[rank]["beat"] == beat and waited > 4 * BEAT_SECONDS
                }
                if self.rank == 0 and all(told[rank]["gone"] or rank in dead for rank in range(1, self.world)):
                    break
                time.sleep(0.05)
            self._over.set()
            self._mine["gone"] = True
            self._tell(self.store)
        self._over.set()
        for thread in self._threads:  # Python aborts when it ends while a thread is inside the store
            thread.join(2 * BEAT_SECONDS)
        return code, reason
