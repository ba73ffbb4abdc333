"""Whole jobs whose scratch dies, fills up or becomes read-only in each stage; prints how each ended.

    python -m tests.disk_proof [STAGE …]

Every call of libc's that touches a file below scratch fails with an errno from the moment at which the stage begins: a library
that is loaded before libc puts it there, so Python, Rust and C++ all get it as from a kernel.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.conftest import CACHE, ROOT, job_environment

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/* The errno that calls below DYING fail with: what the file DYING.errno says; 0 while there is none. */
static int said(void) {
  static int known = 0;
  if (known) return known;
  char name[4096], text[16] = {0};
  snprintf(name, sizeof name, "%s.errno", getenv("DYING"));
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
  int file = real(name, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  ssize_t (*get)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
  if (get(file, text, 15) > 0) known = atoi(text);
  close(file);
  return known;
}
static int below(const char *path) {
  const char *dying = getenv("DYING");
  return dying && path && !strncmp(path, dying, strlen(dying)) && path[strlen(dying)] == '/';
}
static int fails(const char *path, int reads) {
  if (!below(path)) return 0;
  int saved = errno, why = said();
  errno = saved;
  return reads && why != EIO ? 0 : why;
}
static int fd_fails(int fd, int reads) {
  char link[64], path[4096];
  if (fd < 3 || !getenv("DYING")) return 0;
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (size <= 0) return 0;
  path[size] = 0;
  return fails(path, reads);
}
#define REAL(name) __typeof__(&name) real = dlsym(RTLD_NEXT, #name)
#define FAIL(why) do { int w = (why); if (w) { errno = w; return -1; } } while (0)
#define OPENS(flags) (((flags) & O_ACCMODE) == O_RDONLY && !((flags) & O_CREAT))
#define MODE(flags) mode_t mode = 0; va_list rest; va_start(rest, flags); \
  if ((flags) & (O_CREAT | O_TMPFILE)) mode = va_arg(rest, int); va_end(rest)

int open(const char *p, int f, ...) { MODE(f); REAL(open); FAIL(fails(p, OPENS(f))); return real(p, f, mode); }
int open64(const char *p, int f, ...) { MODE(f); REAL(open64); FAIL(fails(p, OPENS(f))); return real(p, f, mode); }
int openat(int d, const char *p, int f, ...) { MODE(f); REAL(openat); FAIL(fails(p, OPENS(f))); return real(d, p, f, mode); }
int openat64(int d, const char *p, int f, ...) { MODE(f); REAL(openat64); FAIL(fails(p, OPENS(f))); return real(d, p, f, mode); }
ssize_t write(int d, const void *b, size_t n) { REAL(write); FAIL(fd_fails(d, 0)); return real(d, b, n); }
ssize_t pwrite64(int d, const void *b, size_t n, off64_t o) { REAL(pwrite64); FAIL(fd_fails(d, 0)); return real(d, b, n, o); }
ssize_t read(int d, void *b, size_t n) { REAL(read); FAIL(fd_fails(d, 1)); return real(d, b, n); }
ssize_t pread64(int d, void *b, size_t n, off64_t o) { REAL(pread64); FAIL(fd_fails(d, 1)); return real(d, b, n, o); }
int fsync(int d) { REAL(fsync); FAIL(fd_fails(d, 0)); return real(d); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); FAIL(fails(p, 0)); return real(p, m); }
int rename(const char *a, const char *b) { REAL(rename); FAIL(fails(b, 0)); return real(a, b); }
"""

FAULTS = {"dies": errno.EIO, "is full": errno.ENOSPC, "is over its quota": errno.EDQUOT, "turns read-only": errno.EROFS}
STAGES = ("stage in", "load", "evaluate before", "train", "evaluate after", "export", "publish")


class Ending(NamedTuple):
    stage: str
    fault: str
    code: int
    said: str


def shim(folder: Path) -> Path:
    """The library. Raises FileNotFoundError where there is no C compiler."""
    (folder / "dying.c").write_text(SOURCE)
    made = folder / "dying.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", made, folder / "dying.c", "-ldl"], check=True)
    return made


def tried(folder: Path, library: Path, demo: Path, stage: str, fault: str) -> Ending:
    """One job on a scratch that fails when its status says that the stage has begun."""
    scratch, output = folder / "scratch", folder / "output"
    spec = {
        "model": {"name_or_path": str(demo / "base")},
        "dataset": {"path": str(demo / "data"), "group_column": "patient_id", "max_rows": 24},
        "training": {"max_steps": 3},
        "checkpoint": {"save_steps": 1},
        "evaluation": {"max_rows": 4, "max_new_tokens": 4, "explained_rows": 0},
        "export": {"gate": {"rows": 2}},
        "output": {"url": str(output)},
    }
    environment = job_environment(
        folder, JOB_SPEC=yaml.safe_dump(spec), LD_PRELOAD=str(library), DYING=str(scratch), PYTHONDONTWRITEBYTECODE="1"
    )
    job = subprocess.Popen(
        [sys.executable, "-m", "job", "run"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    while job.poll() is None and stage_of(output) != stage:
        time.sleep(0.005)
    (folder / "scratch.errno").write_text(str(FAULTS[fault]))
    _, said = job.communicate(timeout=300)
    return Ending(stage, fault, job.returncode, said.splitlines()[-1])


def stage_of(output: Path) -> str | None:
    try:
        return str(json.loads((output / "status.json").read_text())["stage"])
    except (OSError, ValueError):
        return None


def line(ending: Ending) -> str:
    right = ending.code in (0, 69)
    return f"{ending.stage:16} scratch {ending.fault:18} {ending.code}{'' if right else ' WRONG'} {ending.said[:150]}"


if __name__ == "__main__":
    subprocess.run([sys.executable, "examples/make_demo.py", str(CACHE / "demo"), "--small"], cwd=ROOT, check=True)
    ends = []
    with tempfile.TemporaryDirectory() as root:
        library = shim(Path(root))
        for stage in sys.argv[1:] or STAGES:
            for fault in FAULTS:
                (folder := Path(root) / f"{len(ends)}").mkdir()
                ends.append(tried(folder, library, CACHE / "demo", stage, fault))
                print(line(ends[-1]), flush=True)
    wrong = [ending for ending in ends if ending.code not in (0, 69)]
    print(
        f"{len(ends)} jobs, {len(wrong)} ended with another code than 69 (or 0, where nothing more was wanted of scratch)"
    )
    raise SystemExit(bool(wrong))
