"""Freeze whole jobs before a change to their output, let another job take over, thaw them, and look at what is published.

    python -m tests.fence_proof N [SEED] [unfenced]

Each case is two processes with a tiny model, on a folder or on an S3 server. The first is stopped by SIGSTOP between the
question to its lease and the change itself; the second waits for the lease, and runs to its end: the same spec, or another one
that restarts, or the same one where both restart over a finished job of another. The first is thawed when the second has ended,
or while the second is frozen itself, somewhere on its way. Then the first must end with 75, `RESULT.json` must be the second's
and name the bytes that lie there, its answers must be those of a job that nobody disturbed, and a first that thaws at the end
must have changed and deleted nothing. Closes with a table, and with 1 where anything differed. `unfenced` shows what would.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from job.store import LocalStore, OwnedStore, open_store, upload
from job.store.s3 import S3Store

CHANGES = ("write", "upload", "upload_pieces", "delete")
TTL = 1.0
LONGEST = 120.0
"""Seconds for a job of five."""
FIRST = {"same": "same", "another": "same", "restarted": "another"}
SECOND = {"same": "same", "another": "another", "restarted": "another"}
"""The specs of the first and of the second by the kind of the case. What is restarted was a finished job."""
THAWED = ("at the end", "on the way")
SAID_LAST = ("status.json", "written.json")
ANSWERS = ("evaluation/before.jsonl", "evaluation/after.jsonl")


def load_all() -> None:
    """Import what a job imports, once, so that each is only forked."""
    import job.export.gate
    import job.export.merge
    import job.publish
    import job.report.page
    import job.run
    import job.train.stage  # noqa: F401


def make_inputs(folder: Path) -> None:
    """A tiny base, and pictures with captions."""
    from tests.tiny import make_model, picture

    make_model("llava", folder / "base")
    (folder / "data").mkdir()
    rows = [{"file_name": f"{number}.png", "caption": f"There is finding number {number}."} for number in range(12)]
    for number, row in enumerate(rows):
        picture(number).save(folder / "data" / row["file_name"])
    (folder / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def spec_of(inputs: Path, url: str, which: str) -> str:
    """Four steps, a checkpoint behind every second one."""
    return yaml.safe_dump(
        {
            "name": which,
            "model": {"name_or_path": str(inputs / "base")},
            "lora": {"r": 4},
            "dataset": {"path": str(inputs / "data"), "eval_fraction": 0.34},
            "training": {"max_steps": 4, "learning_rate": 1e-2 if which == "same" else 3e-2, "effective_batch_size": 2},
            "checkpoint": {"save_steps": 2},
            "preemption": {"max_attempts_without_progress": 99},
            "evaluation": {"max_new_tokens": 4, "batch_size": 2, "explained_rows": 1, "bootstrap_samples": 100},
            "export": {"gate": {"rows": 2}},
            "output": {"url": url, "on_conflict": "refuse" if which == "same" else "restart"},
        }
    )


class Process:
    """One job in a process of its own, which stops itself before its `at`-th change to the output (0: never)."""

    def __init__(self, spec: str, folder: Path, at: int) -> None:
        folder.mkdir(parents=True)
        self.changes, self.requests, self.stderr = (folder / name for name in ("changes", "requests", "stderr"))
        self.changes.touch()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                code = work(spec, folder, at)
            finally:
                os._exit(code)

    def wait(self) -> int | None:
        """Its exit code, or None as soon as it has stopped itself."""
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid:
                return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        raise TimeoutError(self.stderr.read_text())

    def thaw(self) -> int:
        os.kill(self.pid, signal.SIGCONT)
        code = self.wait()
        assert code is not None
        return code

    @property
    def last(self) -> str:
        """The change that it made last, or stopped before."""
        return self.changes.read_text().splitlines()[-1]

    @property
    def reason(self) -> str:
        return self.stderr.read_text().splitlines()[-1]


def work(spec: str, folder: Path, at: int) -> int:
    """What `job run` does, in a forked process."""
    from job import run
    from job.cli import finish
    from job.config.loader import validate
    from job.config.parsing import parse
    from job.store import lease

    with (folder / "stderr").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
        os.dup2(stderr.fileno(), 1)
    sys.stderr = sys.stdout = open(2, "w", buffering=1)  # noqa: SIM115
    os.environ |= {"JOB_SCRATCH": str(folder / "scratch"), "JOB_LEASE_SECONDS": str(TTL)}
    parsed = validate(parse(spec))
    if not parsed.output.url.startswith("s3:"):
        lease.SLACK = 0.1  # a folder's times are finer than seconds
    stop_before(parsed.output.url, at, folder / "changes")
    try:
        finish(lambda environment, preemption: run.run(parsed, environment, preemption))
    except SystemExit as end:
        return int(end.code or 0)


def stop_before(url: str, at: int, changes: Path) -> None:
    """Write each change to the store at `url` into a file, and stop this process between the `at`-th and what led to it."""
    count, nested, turn = 0, threading.local(), threading.Lock()

    def changing(what: str) -> None:
        nonlocal count
        with turn, changes.open("a") as noted:
            count += 1
            noted.write(f"{what}\n")
            noted.flush()
            if count == at:
                os.kill(os.getpid(), signal.SIGSTOP)

    def hooked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def hook(store: Any, *arguments: Any, **named: Any) -> Any:
            named_keys = next((each for each in arguments if isinstance(each, (str, list))), "")
            key = named_keys if isinstance(named_keys, str) else " ".join(named_keys)
            if store.url != url or key.startswith(("lease.json", "probe-")) or getattr(nested, "inside", False):
                return real(store, *arguments, **named)
            changing(f"{name} {key}")
            nested.inside = True
            try:
                return real(store, *arguments, **named)
            finally:
                nested.inside = False

        return hook

    def complete(store: S3Store, key: str, *arguments: Any) -> str:
        if store.url == url:
            changing(f"complete {key}")
        return completed(store, key, *arguments)

    for kind in (LocalStore, S3Store):
        for name in CHANGES:
            setattr(kind, name, hooked(name, getattr(kind, name)))

    def ask(store: S3Store, method: str, *arguments: Any, **named: Any) -> Any:
        if store.url == url:
            with changes.with_name("requests").open("a") as noted:
                noted.write(f"{'lease' if arguments[1] == 'lease.json' else method}\n")
        return asked(store, method, *arguments, **named)

    asked, completed = S3Store.ask, upload._complete
    S3Store.ask = ask  # type: ignore[method-assign]
    upload._complete = complete
    upload.PART = 16 * 2**10


def digests(url: str) -> dict[str, str]:
    """SHA-256 of all that lies in an output, but for the lease and what is made for one moment."""
    store = open_store(url)
    return {
        entry.key: hashlib.sha256(store.read(entry.key)).hexdigest()
        for entry in store.list()
        if entry.key != "lease.json"
    }


def faults(url: str, which: str, expected: dict[str, str], there: dict[str, str]) -> Iterator[str]:
    """What of an output is not as the job `which` alone would have left it."""
    store = open_store(url)
    if "RESULT.json" not in there:
        yield "RESULT.json is gone"
        return
    result = json.loads(store.read("RESULT.json"))
    for key, facts in result["files"].items():
        if there.get(key) != facts["sha256"]:
            yield f"{key} is not what RESULT.json says"
    for key in ANSWERS:
        if there.get(key) != expected[key]:
            yield f"{key} is another's"
    names = {
        "RESULT.json": result["name"],
        "spec.yaml": yaml.safe_load(store.read("spec.yaml"))["name"],
        "status.json": json.loads(store.read("status.json"))["name"],
        "evaluation/report.json": json.loads(store.read("evaluation/report.json"))["name"],
    }
    yield from (f"{key} is another's" for key, name in names.items() if name != which)
    if json.loads(store.read("status.json"))["state"] != "published":
        yield "status.json is another's"


@dataclass
class Tally:
    """What became of the cases."""

    cases: Counter[str] = field(default_factory=Counter)
    frozen: Counter[str] = field(default_factory=Counter)
    differed: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


class Bench:
    """Inputs, and what jobs do that nobody disturbs."""

    def __init__(self, folder: Path, places: dict[str, Callable[[], str]], *, fenced: bool = True) -> None:
        load_all()
        if not fenced:
            OwnedStore.hold = lambda *_: None  # type: ignore[method-assign]
        self.folder, self.places, self.number = folder, places, 0
        self.undisturbed = cache(self._undisturbed)
        make_inputs(folder)

    def _undisturbed(self, place: str, which: str) -> tuple[str, dict[str, str], int]:
        """The output of such a job, its digests, and how many changes it made."""
        url = self.places[place]()
        alone = self.start(url, which, 0)
        assert alone.wait() == 0, alone.stderr.read_text()
        there = digests(url)
        assert not list(faults(url, which, there, there))
        if alone.requests.exists():
            asked = Counter(alone.requests.read_text().splitlines())
            print(
                f"requests of a job that nobody disturbs: {asked.total()} ({dict(sorted(asked.items()))})", flush=True
            )
        return url, there, len(alone.changes.read_text().splitlines())

    def start(self, url: str, which: str, at: int) -> Process:
        self.number += 1
        return Process(spec_of(self.folder, url, which), self.folder / f"job-{self.number}", at)

    def output(self, place: str, kind: str) -> str:
        """An empty output, or one of a finished job, for a restart to delete."""
        url = self.places[place]()
        if kind == "restarted":
            finished, made = open_store(self.undisturbed(place, "same")[0]), open_store(url)
            for entry in finished.list():
                made.write(entry.key, finished.read(entry.key))
        return url

    def case(self, place: str, kind: str, thaw: str, tally: Tally, chance: random.Random) -> list[str]:
        """One case. Returns what was wrong with it."""
        expected, changes = self.undisturbed("folder", SECOND[kind])[1], self.undisturbed(place, "same")[2]
        url = self.output(place, kind)
        first = self.start(url, FIRST[kind], chance.randint(1, changes))
        tally.cases[f"{place}, {kind}, thawed {thaw}"] += 1
        assert first.wait() is None, first.stderr.read_text()
        tally.frozen[first.last.split("/")[0].split(".")[0]] += 1
        # Where all but the last word of the first was said, the same spec finds it published, and takes nothing over.
        over = kind != "another" and "RESULT.json" in digests(url) and first.last.split()[1] in SAID_LAST
        second = self.start(url, SECOND[kind], 0 if thaw == "at the end" else chance.randint(1, changes))
        code, late = second.wait(), dict[str, str]()
        if code is None:
            code_of_first = first.thaw()
            code = second.thaw()
        else:
            late = digests(url)
            code_of_first = first.thaw()
        there = digests(url)
        wrong = list(faults(url, SECOND[kind], expected, there)) if code == 0 else []
        if code != 0:
            wrong.append(f"the second ended with {code}: {second.reason}")
        if code_of_first != (0 if over else 75):
            wrong.append(f"the first ended with {code_of_first}: {first.reason}")
        if late:
            wrong += [f"{key} was changed late" for key in late if there.get(key) != late[key] and not over]
            tally.left.update(key for key in there if key not in late)
        print(f"{place}, {kind}, {thaw}, frozen before {first.last[:60]}: {'; '.join(wrong) or 'well'}", flush=True)
        tally.differed.update(wrong)
        return wrong


@contextmanager
def on_both() -> Iterator[dict[str, Callable[[], str]]]:
    """A folder and an S3 server: each makes an empty output at each call."""
    import pytest

    from tests.s3 import make_bucket, moto, point_at

    with tempfile.TemporaryDirectory() as folder, moto() as server, pytest.MonkeyPatch.context() as patch:
        point_at(server, patch)
        number = iter(range(10**9))
        yield {"folder": lambda: f"{folder}/{next(number)}", "s3": lambda: f"s3://{make_bucket()}/run"}


def prove(bench: Bench, cases: int, seed: int) -> Tally:
    """So many cases of all kinds in turn, frozen at random."""
    tally, chance = Tally(), random.Random(seed)
    kinds = [(place, kind, thaw) for kind in FIRST for thaw in THAWED for place in bench.places]
    chance.shuffle(kinds)
    for number in range(cases):
        bench.case(*kinds[number % len(kinds)], tally, chance)
    return tally


def main(cases: int, seed: int, fenced: bool) -> int:
    with on_both() as places, tempfile.TemporaryDirectory() as folder:
        tally = prove(Bench(Path(folder), places, fenced=fenced), cases, seed)
    for title, counted in vars(tally).items():
        print(f"\n{title}:")
        for name, count in sorted(counted.items(), key=lambda each: -each[1]):
            print(f"{count:6} {name}")
    print(f"\nruns={cases} differed={sum(tally.differed.values())}")
    return int(bool(tally.differed))


if __name__ == "__main__":
    given = [int(each) for each in sys.argv[1:] if each.isdigit()]
    cases, seed = given + [100, 0][len(given) :]
    sys.exit(main(cases, seed, "unfenced" not in sys.argv))
