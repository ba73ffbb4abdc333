"""The processes of one run, one for each device: who is which, what they tell each other, and who is missing.

torchrun, accelerate, srun or Kubernetes start them and say who is who. Rank 0 tells the story of `job.run` and alone
writes to the output; the others do what it asks for. They speak through the key-value store that torch keeps at
MASTER_ADDR, where each also says twice a second that it lives and where it is. Nobody waits for one that has gone: the end
of any rank is to all others what a notice is (`job.preemption`), with the code of that end.

Gradients take another way: `job.train.together`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from job.errors import BUG, JobError, RankEnded, SpecError, Unavailable
from job.place import Place, hide, one_gpu, place
from job.preemption import Preemption

log = logging.getLogger("job")

JOIN_SECONDS = 900.0
"""For all ranks to come: one node may still pull the image."""
LONGEST_WAIT = 6 * 3600.0
"""For what another rank does alone, while it lives: fetching a base, exporting."""
LEAVE_SECONDS = 10.0
"""Between the end of rank 0 and that of the others."""
BEAT_SECONDS = 0.5
T = TypeVar("T")
R = TypeVar("R")


class _Words:
    """The store for the main thread. One that is gone is the end of this rank, not an error of its own."""

    def __init__(self, store: Any, ranks: Ranks) -> None:
        self._store, self._ranks = store, ranks

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return getattr(self._store, name)(*arguments)
            except RuntimeError:
                self._ranks.lose_store()
                self._ranks.preemption.check()
                raise

        return call


class Ranks:
    """This process among the others. For one that is alone, everything here comes down to doing it itself.

    `silence` is after how many seconds without a sign a rank is taken for dead.
    """

    store: Any
    words: _Words
    run: str

    def __init__(self, place: Place, preemption: Preemption, silence: float = 60.0) -> None:
        self.place, self.rank, self.world = place, place.rank, place.world
        self.preemption, self.silence = preemption, silence
        self.where: Callable[[], str] = lambda: "joining"
        self.states: dict[int, dict[str, Any]] = {}
        self._mine: dict[str, Any] = {"host": socket.gethostname(), "beat": 0, "code": None, "gone": False}
        self._mine["makes"] = place.local_rank == 0  # what is made once a node
        self._ticked = time.monotonic()
        self._over = threading.Event()
        self._telling = threading.Lock()
        self._counts: dict[str, int] = {}
        self._made: list[Path] = []

    # What ranks tell each other

    def shared(self, name: str, value: T) -> T:
        """The value of rank 0, everywhere."""
        if self.world == 1:
            return value
        key = self._key(name)
        if self.rank == 0:
            self.words.set(key, pickle.dumps(value))
            return value
        self.until(lambda: self.words.check([key]), f"rank 0 to say: {name}")
        said: T = pickle.loads(self.words.get(key))
        return said

    def ask(self, task: str, *details: Any) -> None:
        """Rank 0 has the others take part in a task."""
        self.shared("task", (task, details))

    def asked(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """For the others: tasks as they come. Ends by RankEnded, with the code of rank 0."""
        while True:
            yield self.shared("task", ("", ()))

    def gathered(self, name: str, value: T) -> list[T]:
        """For rank 0 the values of all ranks, in order; for the others none."""
        if self.world == 1:
            return [value]
        key = self._key(name)
        if self.rank:
            self.words.set(f"{key} of {self.rank}", pickle.dumps(value))
            return []
        keys = [f"{key} of {rank}" for rank in range(1, self.world)]
        self.until(lambda: self.words.check(keys), name)
        found = [value, *(pickle.loads(self.words.get(each)) for each in keys)]
        for each in keys:
            self.words.delete_key(each)
        return found

    def spread(self, name: str, pieces: Sequence[T], work: Callable[[T], R]) -> Iterator[R]:
        """Each rank takes the next piece until none is left. Rank 0 is given the results as they come, the others nothing.

        All call it with the same `pieces`.
        """
        if self.world == 1:
            yield from map(work, pieces)
            return
        key = self._key(name)
        got, left = 0, True
        while left or (self.rank == 0 and got < len(pieces)):
            self.preemption.check()
            if left and (number := self.words.add(f"{key} taken", 1) - 1) < len(pieces):
                result = work(pieces[number])
                if self.rank == 0:
                    yield result
                    got += 1
                else:
                    self.words.set(f"{key} {self.words.add(f'{key} done', 1)}", pickle.dumps(result))
            else:
                left = False
            while self.rank == 0 and self.words.check([fetched := f"{key} {self._counts.setdefault(key, 1)}"]):
                self._counts[key] += 1
                yield pickle.loads(self.words.get(fetched))
                self.words.delete_key(fetched)
                got += 1
            if not left and self.rank == 0 and got < len(pieces):
                time.sleep(0.02)

    def once_per_node(self, folder: Path, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, made by one process of each node, under a lock, and read by the others from `folder`."""
        if self.world == 1:
            return make()
        made = folder / f"{name}.{self.run}"
        if self.place.local_rank == 0:
            with (folder / "lock").open("w") as lock:
                self.until(lambda: _locked(lock), f"the lock of {folder}")
                if not made.exists():  # another node may use this very folder
                    part = made.with_suffix(".part")
                    part.write_bytes(pickle.dumps(make()))
                    part.replace(made)
                    self._made.append(made)
                self.words.add(f"{name} made", 1)
        makers = sum(state["makes"] for state in self.states.values())
        self.until(lambda: made.exists() or self.words.add(f"{name} made", 0) == makers, name)
        try:
            found: T = pickle.loads(made.read_bytes())
        except FileNotFoundError:
            raise SpecError(
                f"JOB_SCRATCH: rank {self.rank} does not see {made}; ranks of one node must share it"
            ) from None
        return found

    def until(self, true: Callable[[], object], what: str, seconds: float = LONGEST_WAIT) -> None:
        """Wait for something that other ranks do. Raises Preempted on a notice, or when one of them has gone, Unavailable
        when it takes longer than `seconds`."""
        began, waited = time.monotonic(), 0.0
        while not true():
            self.preemption.check()
            if waited > seconds:
                raise Unavailable(f"rank {self.rank} waited {seconds:.0f} s for {what}; {self.table()}")
            time.sleep(min(max(waited / 100, 0.0002), 0.05))  # never a hundredth too long
            waited = time.monotonic() - began

    def apart(self, work: Callable[[], T], what: str) -> T:
        """What `work` returns. A thread of its own does it, for work that would hear no signal."""
        done = Future[T]()

        def do() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=do, name="apart", daemon=True).start()
        self.until(done.done, what)
        return done.result()

    def table(self) -> str:
        """Where all ranks are, in words."""
        return ", ".join(f"rank {rank} on {each['host']}: {each['where']}" for rank, each in self.states.items())

    def _key(self, name: str) -> str:
        """Names may come again: each time is another key, the same on all ranks."""
        self._counts[name] = self._counts.get(name, 0) + 1
        return f"{name} {self._counts[name]}"

    # Who lives

    def meet_at(self, store: Any) -> None:
        self.store, self.words = store, _Words(store, self)

    def join(self) -> None:
        """Wait for all ranks, and begin to watch them."""
        keys = [f"rank {rank}" for rank in range(self.world)]
        self._tell(self.store)
        try:
            self.until(lambda: self.store.check(keys), "all ranks to come", JOIN_SECONDS)
        except Unavailable:
            missing = [key for key in keys if not self.store.check([key])]
            raise Unavailable(f"{', '.join(missing)} did not come within {JOIN_SECONDS:.0f} s") from None
        self._ticked = time.monotonic()
        self.states = {rank: json.loads(self.store.get(key)) for rank, key in enumerate(keys)}
        for work in (self._live, self._guard):
            threading.Thread(target=work, name="ranks", daemon=True).start()
        self.run = self.shared("run", secrets.token_hex(4))

    def _tell(self, store: Any) -> None:
        with self._telling:  # nothing older is written after it
            self._mine["beat"] += 1
            reason = self.preemption.reason if self.preemption.code is None else None
            stop = None if reason is None else [reason, self.preemption.remaining]
            store.set(f"rank {self.rank}", json.dumps(self._mine | {"where": self.where(), "stop": stop}))

    def _live(self) -> None:
        """Say that this rank lives, and look at the others."""
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
                    self._lose(f"rank {rank} on {state['host']} is silent for {self.silence:.0f} s", rank)

    def _guard(self) -> None:
        """A store whose machine has lost its power answers nothing, not even with an error."""
        while not self._over.wait(1):
            if time.monotonic() - self._ticked > self.silence:
                self._lose(f"the ranks' store, with rank 0, is silent for {self.silence:.0f} s")
                return

    def lose_store(self) -> None:
        self._lose("the ranks' store does not answer: rank 0, or the torchrun that keeps it, is gone")

    def _lose(self, why: str, rank: int = 0) -> None:
        last = self.states.get(rank, {}).get("where", "joining")
        if not self._over.is_set() and self.preemption.code is None:
            log.error("%s; it was last at: %s", why, last)
            self.preemption.request(f"{why}; it was last at: {last}; run again", code=Unavailable.exit_code)

    # How it ends

    def part(self, code: int, reason: str, own: bool) -> tuple[int, str]:
        """Tell the others how this rank ends (`own`: by itself), and return how the run does: as rank 0 says."""
        with suppress(RuntimeError):  # the store may be gone, and with it all that there is to learn
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
        for made in self._made:
            made.unlink(missing_ok=True)
        return code, reason


ONE = Ranks(Place(), Preemption())
"""A process that is alone."""


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a Lustre mounted without `flock` refuses: nodes that share it may then do the same twice
        pass
    return True


@contextmanager
def joined(
    environment: MutableMapping[str, str], preemption: Preemption, scratch: Path, silence: float
) -> Iterator[Ranks]:
    """The ranks of this run, while the block runs; all of them end as rank 0 does.

    What ranks other than 0 say goes to `scratch/rank-N.log`; their last words come out all the same.
    """
    here = place(environment)
    one_gpu(environment, here.local_rank)
    if here.world == 1:
        hide(environment)
        yield Ranks(here, preemption)
        return
    if environment.get("ACCELERATE_USE_FSDP", "false") == "true" or environment.get("ACCELERATE_USE_DEEPSPEED"):
        raise SpecError("accelerate is set up to shard the model, which this job does not do; choose plain multi-GPU")
    ranks = Ranks(here, preemption, silence)
    with preemption.leave_at_once():
        ranks.meet_at(_connected(ranks, environment))
    hide(environment)
    caught: Exception | None = None
    with _quiet(scratch / f"rank-{here.rank}.log", here.rank > 0):
        try:
            with preemption.leave_at_once():
                ranks.join()
            yield ranks
        except Exception as error:
            caught = error
            if here.rank:
                log.info("rank %d leaves: %s", here.rank, error, exc_info=not isinstance(error, JobError))
        code = caught.exit_code if isinstance(caught, JobError) else BUG if caught else 0
        own = caught is not None and not isinstance(caught, RankEnded)
        # The words of a bug may be a patient's, and what is told here goes to the output's status.
        known = str(caught or "published") if code != BUG else f"a bug: {type(caught).__name__}"
        ending, reason = ranks.part(code, known, own)
    if caught is not None and ending == code and (own or here.rank == 0):
        raise caught
    if ending:
        raise RankEnded(reason, ending) from caught


def _connected(ranks: Ranks, environment: MutableMapping[str, str]) -> Any:
    """The store of this start. Raises SpecError when nobody says where it is, Unavailable when it is not there."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if environment.get(f"PET_{name}"):
            environment.setdefault(name, environment[f"PET_{name}"])
    address = f"{environment.get('MASTER_ADDR', '')}:{environment.get('MASTER_PORT', '')}"
    if not all(address.split(":")):
        raise SpecError(f"MASTER_ADDR and MASTER_PORT are {address}; the launcher must say where rank 0 is")
    url = f"env://?rank={ranks.rank}&world_size={ranks.world}"
    limit = timedelta(seconds=JOIN_SECONDS)
    try:
        store = ranks.apart(
            lambda: next(iter(rendezvous(url, timeout=limit)))[0], f"the store of the ranks at {address}"
        )
    except RuntimeError as error:
        raise Unavailable(f"the store of the ranks at {address} cannot be reached: {error}") from error
    return PrefixStore(f"vision-lora-job {environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def _quiet(file: Path, quiet: bool) -> Iterator[None]:
    """Whatever is written to stdout and stderr, by whichever library, goes to the file."""
    if not quiet:
        yield
        return
    kept = [os.dup(number) for number in (1, 2)]
    with file.open("w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    try:
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(copy, number)
            os.close(copy)
