"""Kill a writer at random moments, and see after each death that what it had committed is there, whole.

    python tests/checkpoint/kill_proof.py 200

The writer commits checkpoints as fast as it can, each line of its output saying `committed STEP`. It is killed with
SIGKILL at a random moment, mid-upload included. Then `restore` must bring back a step no older than the last one it
said, every byte verified: else that is a lost commit, or a torn one. Half of the kills are on S3, half on a folder.
Without AWS_ENDPOINT_URL_S3 in the environment the S3 server is moto's.
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from job.checkpoint import commit, prune, restore
from job.store import Store, open_store
from job.store.lease import acquire

PART = 5 * 2**20
LARGE = 2 * PART + 12345  # three parts


def open_small(url: str) -> Store:
    store = open_store(url)
    if url.startswith("s3://"):
        store.part_size = PART  # type: ignore[attr-defined]
    return store


def write(url: str, first: int) -> None:
    """Commit for ever. Each step's content follows from its number, so that the reader can tell the bytes are right."""
    store = open_small(url)
    with tempfile.TemporaryDirectory() as work, acquire(store, f"writer {os.getpid()}", 0.5, wait=60) as lease:
        folder = Path(work)
        (folder / "frozen").write_bytes(b"never changes" * 1000)
        for step in range(first, first + 10_000):
            (folder / "weights").write_bytes(content(step))
            (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
            commit(store, folder, step=step, epoch=0.0, spec_digest="kill", attempt=0, lease=lease)
            print("committed", step, flush=True)
            prune(store, keep=2, verified=step)


def content(step: int) -> bytes:
    return random.Random(step).randbytes(LARGE)


def kill_once(url: str, last: int, chance: random.Random) -> int:
    """Start a writer, kill it, and return the newest step it said it had committed."""
    writer = subprocess.Popen([sys.executable, __file__, "--write", url, str(last + 1)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(writer.stdout, selectors.EVENT_READ)
        selector.select(120)
        time.sleep(chance.uniform(0, 0.6))
    writer.send_signal(signal.SIGKILL)
    said = [int(line.split()[1]) for line in writer.stdout.read().decode().splitlines()]
    writer.stdout.close()
    writer.wait()
    return max(said, default=last)


def prove(kills: int, urls: list[str]) -> tuple[int, int]:
    """Kill `kills` writers in turn. Returns how many checkpoints were torn and how many commits lost."""
    chance = random.Random(kills)
    torn = lost = 0
    newest = dict.fromkeys(urls, 0)
    for number in range(kills):
        url = urls[number % len(urls)]
        said = kill_once(url, newest[url], chance)
        skipped: list[int] = []
        with tempfile.TemporaryDirectory() as into:
            found = restore(open_small(url), Path(into), on_skip=partial(skip, skipped))
            step = found.manifest.step if found else 0
            right = found is None or digest(found.folder / "weights") == hashlib.sha256(content(step)).hexdigest()
        torn += len(skipped) + (not right)
        lost += step < said
        newest[url] = max(step, said)
        print(f"{number + 1} {url.split(':')[0]} said={said} found={step} skipped={skipped}", flush=True)
    return torn, lost


def skip(skipped: list[int], step: int, reason: str) -> None:
    skipped.append(step)
    print(f"step {step} was passed over: {reason}", flush=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(kills: int) -> int:
    import pytest

    from tests.s3 import make_bucket, moto, point_at

    with tempfile.TemporaryDirectory() as folder, moto() as server, pytest.MonkeyPatch.context() as patch:
        point_at(server, patch)
        torn, lost = prove(kills, [f"s3://{make_bucket()}/out", f"{folder}/{secrets.token_hex(4)}"])
    print(f"kills={kills} torn={torn} lost={lost}")
    return int(torn + lost > 0)


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main(int(sys.argv[1])))
