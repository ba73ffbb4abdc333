"""Wrong input of every kind, put through `job check` as a user would: `python -m tests.fuzz [N] [--specs M] [--seed S]`.

Each case is a process of its own, forked from one that has the libraries loaded. Specs are read besides as `check` reads them,
`BATCH` in a process: all is done that looks at the spec alone.

A case must end with a code of the table that is not 70, say one sentence without a traceback as its last line, within `SECONDS`
and `MEMORY`, and die of nothing. Cases that do not are kept below build/fuzz, and what was tried is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import fuzz_inputs as inputs

ROOT = Path(__file__).parents[1]
SECONDS = 5.0
"""Of a processor, which a busy machine does not change."""
WAIT = 30.0
"""Seconds of the clock, for what waits and does not work."""
MEMORY = 2**30
"""Bytes of RAM that a case may take beside what its libraries take."""
BATCH = 500
SAID = 10_000
"""Characters that a sentence may have at most."""
KEPT = ROOT / "build" / "fuzz"


@dataclass(frozen=True)
class Verdict:
    """How a case ended: `code` of its process (negative: the signal that it died of), seconds, bytes and stderr. `fault` is
    empty where all is well."""

    kind: str
    code: int
    seconds: float
    memory: int
    said: str

    @property
    def fault(self) -> str:
        from job.errors import BUG, EXIT_CODES

        if self.seconds > SECONDS or self.code == -signal.SIGXCPU:
            return f"over {SECONDS:g} s"
        if self.code < 0:
            return f"died of {signal.Signals(-self.code).name}"
        if self.code == BUG or self.code not in {each.code for each in EXIT_CODES}:
            return f"exit {self.code}"
        if self.memory > MEMORY:
            return f"took {self.memory / 2**20:.0f} MB"
        if "Traceback (most recent call last)" in self.said:
            return "a traceback"
        last = self.said.strip().rpartition("\n")[2]
        if self.code and not (last.startswith(f"exit {self.code}: ") and len(last) < SAID):
            return "no sentence"
        return ""


@dataclass
class Table:
    """What was tried, by kind."""

    tried: Counter[str] = field(default_factory=Counter)
    codes: dict[str, Counter[int]] = field(default_factory=dict)
    failed: dict[str, Counter[str]] = field(default_factory=dict)
    slowest: float = 0.0
    memory: int = 0

    def add(self, verdict: Verdict) -> None:
        self.tried[verdict.kind] += 1
        self.codes.setdefault(verdict.kind, Counter())[verdict.code] += 1
        self.slowest, self.memory = max(self.slowest, verdict.seconds), max(self.memory, verdict.memory)
        if verdict.fault:
            self.failed.setdefault(verdict.kind, Counter())[verdict.fault] += 1

    def __str__(self) -> str:
        lines = [f"{'kind':<34}{'tried':>7}{'failed':>8}  codes; faults"]
        for kind, count in sorted(self.tried.items()):
            faults = self.failed.get(kind, Counter())
            codes = " ".join(f"{code}:{times}" for code, times in sorted(self.codes[kind].items()))
            said = "".join(f"; {times} × {fault}" for fault, times in faults.most_common())
            lines.append(f"{kind:<34}{count:>7}{faults.total():>8}  {codes}{said}")
        failed = sum(faults.total() for faults in self.failed.values())
        lines.append(f"{'all':<34}{self.tried.total():>7}{failed:>8}")
        return "\n".join([*lines, f"slowest {self.slowest:.1f} s; most memory {self.memory / 2**20:.0f} MB"])


def load_libraries() -> None:
    """All that `check` imports, so that a case begins at once."""
    import datasets  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def tried(case: inputs.Case, folder: Path, *, forked: bool = True) -> Verdict:
    """Put one case through `job check`, in a fork of this process, or in a new one."""
    said = folder / "stderr"
    environment = {
        "JOB_SCRATCH": str(folder / "scratch"),
        "HF_HUB_OFFLINE": "1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        **case.environment,
    }
    begun = time.monotonic()
    process = os.fork()
    if process == 0:
        _be_the_job(case.arguments, environment, said, forked)
    code, usage = _awaited(process, WAIT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if forked else 0
    memory = max(0, usage.ru_maxrss - before) * 1024
    text = said.read_text(errors="replace") if said.exists() else ""
    waited = time.monotonic() - begun
    return Verdict(case.kind, code, waited if waited > WAIT else usage.ru_utime + usage.ru_stime, memory, text)


def _be_the_job(arguments: tuple[str, ...], environment: dict[str, str], said: Path, forked: bool) -> None:
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(each, "w", errors="backslashreplace", closefd=False) for each in (1, 2))
        for name in [name for name in os.environ if name.startswith(("JOB_", "AWS_"))]:
            del os.environ[name]
        os.environ.update(environment | {"PYTHONPATH": str(ROOT)})
        os.chdir(said.parent)  # relative places are made there
        sys.argv = ["job", *arguments]
        if not forked:
            os.execv(sys.executable, [sys.executable, "-m", "job", *arguments])
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + 4 * MEMORY,) * 2)  # one that runs away spares the machine
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(SECONDS) + 1,) * 2)
        from job.__main__ import main

        main()
    finally:
        os._exit(70)


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _awaited(process: int, seconds: float) -> tuple[int, resource.struct_rusage]:
    """Its code and usage; it is killed after so many seconds."""
    watch = os.pidfd_open(process)
    try:
        if not select.select([watch], [], [], seconds)[0]:
            os.kill(process, signal.SIGKILL)
        _, status, usage = os.wait4(process, 0)
    finally:
        os.close(watch)
    return os.waitstatus_to_exitcode(status), usage


def read_specs(target: str, numbers: range, seed: int, ground: inputs.Ground) -> list[tuple[int, Verdict]]:
    """Read the specs of these cases in a fork of this process. Where it dies, the case is named that it died of, and the rest
    is read in another."""
    found = list[tuple[int, Verdict]]()
    while len(found) < len(numbers):
        rest = numbers[len(found) :]
        out, into = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(out)
            _read_each(target, rest, seed, ground, into)
        os.close(into)
        with os.fdopen(out) as stream:
            done = [Verdict(*json.loads(line)) for line in stream]
        code, _ = _awaited(process, WAIT)
        found += zip(rest, done, strict=False)
        if len(done) < len(rest):
            found.append((rest[len(done)], Verdict("spec: read alone", code or 70, 0, 0, "")))
    return found


def _read_each(target: str, numbers: range, seed: int, ground: inputs.Ground, into: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + 4 * MEMORY,) * 2)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        with os.fdopen(into, "w") as stream:
            for number in numbers:
                ground.clear()
                case = TARGETS[target](random.Random(f"{seed} {target} {number}"), ground)
                signal.setitimer(signal.ITIMER_PROF, SECONDS + 1)  # which ends this process
                stream.write(f"{json.dumps(_read(case))}\n")
                stream.flush()
    finally:
        os._exit(0)


def _read(case: inputs.Case) -> tuple[str, int, float, int, str]:
    """The fields of a Verdict on a spec alone: read, compared with the environment, written and read again."""
    import yaml

    from job.config.environment import Environment
    from job.config.loader import load_spec
    from job.errors import JobError
    from job.output.overlap import refuse_overlap
    from job.runtime.status import one_line

    code, said, begun = 0, "", time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        spec = load_spec(case.environment, case.arguments[1] if len(case.arguments) > 1 else None)
        refuse_overlap(spec, Environment.read(case.environment))
        if yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json"), allow_unicode=True)) != spec.model_dump(
            mode="json"
        ):
            code, said = 70, "the resolved spec reads back otherwise"
    except JobError as error:
        code, said = error.exit_code, f"exit {error.exit_code}: {one_line(error)}"
    except BaseException:
        code, said = 70, traceback.format_exc()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"{case.kind}, alone", code, time.process_time() - begun, memory, said


Maker = Callable[[random.Random, inputs.Ground], inputs.Case]
TARGETS: dict[str, Maker] = {
    "specs": inputs.spec_case,
    "bases": inputs.base_case,
    "adapters": inputs.adapter_case,
    "templates": inputs.template_case,
    "rows": inputs.rows_case,
    "environment": inputs.environment_case,
}


def fuzz(
    targets: list[str],
    count: int,
    seed: int,
    *,
    specs: int = 0,
    new_process_every: int = 0,
    keep: Path | None = None,
) -> Table:
    """Try `count` cases of each target; every so many-th in a new process and not in a fork; and read so many `specs` besides.
    The same seed gives the same cases. Those that fail are kept below `keep`. Interrupted, it says what was tried until then."""
    load_libraries()
    table = Table()
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as name, suppress(KeyboardInterrupt):
        ground = inputs.make_ground(Path(name))
        for target in targets:
            for number in range(count):
                ground.clear()
                case = TARGETS[target](random.Random(f"{seed} {target} {number}"), ground)
                new = new_process_every and number % new_process_every == new_process_every - 1
                verdict = tried(case, ground.case, forked=not new)
                if new and verdict.seconds <= WAIT:  # of these the libraries take most
                    verdict = Verdict(case.kind, verdict.code, 0, 0, verdict.said)
                table.add(verdict)
                if verdict.fault and keep is not None:
                    _keep(keep / f"{target}-{seed}-{number}", case, verdict, ground.case)
        for start in range(count, count + specs, BATCH):
            for number, verdict in read_specs("specs", range(start, min(start + BATCH, count + specs)), seed, ground):
                table.add(verdict)
                if verdict.fault and keep is not None:
                    ground.clear()
                    case = inputs.spec_case(random.Random(f"{seed} specs {number}"), ground)
                    _keep(keep / f"specs-{seed}-{number}", case, verdict, ground.case)
    return table


def _keep(place: Path, case: inputs.Case, verdict: Verdict, folder: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place, symlinks=True, ignore=shutil.ignore_patterns("scratch", "large"))
    (place / "said").write_text(verdict.said, errors="backslashreplace")
    facts: dict[str, Any] = {"kind": case.kind, "fault": verdict.fault, "arguments": case.arguments}
    (place / "case.json").write_text(json.dumps(facts | {"environment": dict(case.environment)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=1000, help="cases of each target")
    parser.add_argument("--specs", type=int, default=100_000, help="specs that are read alone, besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", choices=[*TARGETS], default=[*TARGETS])
    chosen = parser.parse_args()
    for notice in (signal.SIGINT, signal.SIGTERM):
        signal.signal(notice, signal.default_int_handler)
    begun = time.monotonic()
    table = fuzz(chosen.targets, chosen.count, chosen.seed, specs=chosen.specs, new_process_every=200, keep=KEPT)
    print(f"{table}; {table.tried.total() / (time.monotonic() - begun) * 60:.0f} a minute")
    sys.exit(bool(table.failed))


if __name__ == "__main__":
    main()
