"""The ranks of one run, one for each device, and the messages between them.

torchrun, accelerate, srun or Kubernetes start them and say which is which. Every rank runs `job.run`, and only rank 0 writes to
the output. They communicate through the key-value store that torch keeps at MASTER_ADDR, and no rank waits for one that is gone
(`job.distributed.liveness`). Gradients take another way: `job.distributed.allreduce`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from job.distributed.launch_env import LaunchEnv, hide_launch_env, one_gpu, read_launch_env
from job.distributed.liveness import JOIN_SECONDS, Liveness
from job.errors import BUG, JobError, RankEnded, SpecError, Unavailable
from job.runtime.exit import traced
from job.runtime.preemption import Preemption

log = logging.getLogger("job")

T = TypeVar("T")
R = TypeVar("R")


class _Words:
    """The store for the main thread. The loss of the store ends this rank; it is not an error by itself."""

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


class Ranks(Liveness):
    """Messages between ranks. With a single rank, every method does the work itself."""

    words: _Words
    run: str

    def __init__(self, place: LaunchEnv, preemption: Preemption, silence: float = 60.0) -> None:
        super().__init__(place, preemption, silence)
        self._counts: dict[str, int] = {}
        self._made: list[Path] = []

    def meet_at(self, store: Any) -> None:
        self.store, self.words = store, _Words(store, self)

    def join(self) -> None:
        super().join()
        self.run = self.shared("run", secrets.token_hex(4))

    def part(self, code: int, reason: str, own: bool) -> tuple[int, str]:
        ending = super().part(code, reason, own)
        for made in self._made:
            made.unlink(missing_ok=True)
        return ending

    def shared(self, name: str, value: T) -> T:
        """Return the value of rank 0, on every rank."""
        if self.world == 1:
            return value
        key = self._key(name)
        if self.rank == 0:
            self.words.set(key, pickle.dumps(value))
            return value
        self.until(lambda: self.words.check([key]), f"rank 0 to say: {name}")
        said: T = pickle.loads(self.words.get(key))
        return said

    def end_with_rank_0(self) -> None:
        """Wait until rank 0 has ended. Raises RankEnded with its code."""
        self.until(lambda: False, "rank 0 to end")

    def gathered(self, name: str, value: T) -> list[T]:
        """Return the values of all ranks, in order, on rank 0; an empty list on the others."""
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
        """Let each rank take the next piece until none is left. Rank 0 yields the results as they arrive, the others nothing.

        All ranks call it with the same `pieces`.
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
        """Return what `make` returns. One process of each node calls it, under a lock; the others read the result from
        `folder`."""
        if self.world == 1:
            return make()
        made = folder / f"{name}.{self.run}"
        if self.place.local_rank == 0:
            with (folder / "lock").open("w") as lock:
                self.until(lambda: _locked(lock), f"the lock of {folder}")
                try:
                    if not made.exists():  # another node may use the same folder
                        part = made.with_suffix(".part")
                        part.write_bytes(pickle.dumps(make()))
                        part.replace(made)
                        self._made.append(made)
                finally:
                    with suppress(OSError):
                        fcntl.flock(lock, fcntl.LOCK_UN)  # closing does not release it if `make` left forked processes
                self.words.add(f"{name} made", 1)
        makers = sum(state["makes"] for state in self.states.values())
        self.until(lambda: made.exists() or self.words.add(f"{name} made", 0) == makers, name)
        try:
            found: T = pickle.loads(made.read_bytes())
        except FileNotFoundError:
            raise SpecError(
                f"JOB_SCRATCH: rank {self.rank} does not see {made}; all ranks of a node must share it"
            ) from None
        return found

    def apart(self, work: Callable[[], T], what: str) -> T:
        """Return what `work` returns. It runs in a separate thread, because it would not react to signals."""
        done = Future[T]()

        def do() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=do, name="apart", daemon=True).start()
        self.until(done.done, what)
        return done.result()

    def _key(self, name: str) -> str:
        """A name may be used again: each use has another key, the same on all ranks."""
        self._counts[name] = self._counts.get(name, 0) + 1
        return f"{name} {self._counts[name]}"


ONE = Ranks(LaunchEnv(), Preemption())
"""A single process."""


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # Lustre mounted without `flock` refuses: nodes that share it may then do the same work twice
        pass
    return True


@contextmanager
def join_ranks(
    environment: MutableMapping[str, str], preemption: Preemption, folder: Path, silence: float, run: str
) -> Iterator[Ranks]:
    """Join the ranks of `run`, which names it, while the block runs; all of them end as rank 0 does. A rank that meets another
    run's rank 0, at a port that both chose, disturbs nobody and waits until its time is up.

    What ranks other than 0 print is appended to `folder/rank-N.log`; their last line is printed all the same.
    """
    here = read_launch_env(environment)
    one_gpu(environment, here.local_rank)
    if here.world == 1:
        hide_launch_env(environment)
        yield Ranks(here, preemption)
        return
    if environment.get("ACCELERATE_USE_FSDP", "false") == "true" or environment.get("ACCELERATE_USE_DEEPSPEED"):
        raise SpecError(
            "accelerate is set up to shard the model, which the job does itself (training.shard); choose plain multi-GPU"
        )
    ranks = Ranks(here, preemption, silence)
    with preemption.leave_at_once():
        ranks.meet_at(_connected(ranks, environment, run))
    hide_launch_env(environment)
    caught: Exception | None = None
    with _quiet(folder / f"rank-{here.rank}.log", here.rank > 0):
        try:
            with preemption.leave_at_once():
                ranks.join()
            yield ranks
        except Exception as error:
            caught = error
            if here.rank:
                why = error if isinstance(error, JobError) else traced(error, show=False)
                log.info("rank %d stops: %s", here.rank, why)
        code = caught.exit_code if isinstance(caught, JobError) else BUG if caught else 0
        own = caught is not None and not isinstance(caught, RankEnded)
        # The message of a bug may contain a patient's text, and what is reported here goes to the output's status.
        known = str(caught or "published") if code != BUG else f"a bug: {type(caught).__name__}"
        ending, reason = ranks.part(code, known, own)
    if caught is not None and ending == code and (own or here.rank == 0):
        raise caught
    if ending:
        raise RankEnded(reason, ending) from caught


def _connected(ranks: Ranks, environment: MutableMapping[str, str], run: str) -> Any:
    """Return the store of this start. Raises SpecError if its address is not given, Unavailable if it cannot be reached."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if environment.get(f"PET_{name}"):
            environment.setdefault(name, environment[f"PET_{name}"])
    address = f"{environment.get('MASTER_ADDR', '')}:{environment.get('MASTER_PORT', '')}"
    if not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT", "").isdecimal()):
        raise SpecError(f"MASTER_ADDR and MASTER_PORT are {address}; set them to the address of rank 0")
    url = f"env://?rank={ranks.rank}&world_size={ranks.world}"
    limit = timedelta(seconds=JOIN_SECONDS)
    try:
        store = ranks.apart(
            lambda: next(iter(rendezvous(url, timeout=limit)))[0], f"the store of the ranks at {address}"
        )
    except RuntimeError as error:
        raise Unavailable(f"the store of the ranks at {address} cannot be reached: {error}") from error
    return PrefixStore(f"vision-lora-job {run} {environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def _quiet(file: Path, quiet: bool) -> Iterator[None]:
    """Redirect everything written to stdout and stderr, by any library, to the file."""
    if not quiet:
        yield
        return
    kept = [os.dup(number) for number in (1, 2)]
    with file.open("a") as stream:  # an attempt that waits for the lease must not empty its holder's log
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
