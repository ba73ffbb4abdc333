"""What Inductor, Triton and Unsloth compiled, kept in the output: a job resumed on a new node does not compile again.

It is one archive a combination of versions and card, under `cache/`. It is code: whoever can write to the output can have
it run. `checkpoint.compile_cache: false` neither makes nor reads it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tarfile
from pathlib import Path

from job.errors import JobError, Preempted
from job.record import bytes_text, versions
from job.store import Store
from job.store.protocol import Missing

log = logging.getLogger("job")

FOLDERS = ("inductor", "triton", "unsloth")
MOST_BYTES = 2_000_000_000


def key(card: str) -> str:
    """The archive's key for a card by its name and compute capability, and the versions that are installed here."""
    facts = [versions(), platform.machine(), card]
    return f"cache/compiled-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}.tar"


class CompileCache:
    """The compiled files below `folder` (scratch's cache folder), and their archive in the store."""

    def __init__(self, store: Store, folder: Path, card: str) -> None:
        self.store, self.folder, self.key = store, folder, key(card)
        self.kept = self._files()

    def restore(self) -> None:
        """Fetch and unpack, unless this node has compiled files already. What goes wrong is told and stops nothing."""
        if self.kept:
            return
        archive = self.folder / "compiled.tar"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.store.download(self.key, archive)
            with tarfile.open(archive) as tar:
                tar.extractall(self.folder, filter="data")
            log.info("compiled code restored: %s", bytes_text(archive.stat().st_size))
        except (Missing, Preempted):
            return
        except (JobError, OSError, tarfile.TarError) as error:
            log.warning("compiled code is not restored, so it is compiled again: %s", error)
        finally:
            archive.unlink(missing_ok=True)
        self.kept = self._files()

    def keep(self) -> None:
        """Send the compiled files when there are others than those that were restored or sent before."""
        files = self._files()
        if not files or files == self.kept or sum(files.values()) > MOST_BYTES:
            return
        archive = self.folder / "compiled.tar"
        try:
            with tarfile.open(archive, "w") as tar:
                for name in files:
                    tar.add(self.folder / name, name, recursive=False)
            self.store.upload(archive, self.key)
            self.kept = files
        except (JobError, OSError) as error:
            log.warning("compiled code is not kept, so the next node compiles again: %s", error)
        finally:
            archive.unlink(missing_ok=True)

    def _files(self) -> dict[str, int]:
        """Sizes by name. Files that another process is writing at this moment have names of their own."""
        found = {}
        for top in FOLDERS:
            for path in sorted((self.folder / top).rglob("*")):
                if path.is_file() and ".tmp" not in path.name and path.suffix != ".lock":
                    found[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return found
