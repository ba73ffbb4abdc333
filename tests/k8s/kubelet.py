"""Runs a pod's container as the kubelet would, without a cluster: its own root, read-only; its volumes; its user, with no
capability and no network; process 1 of its own; its probes; SIGTERM, the grace, SIGKILL. Needs root on Linux.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

UNSHARE = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
# What a runtime prepares: an overlay over the image, so that mount points can be made, then nothing of it is writable.
PREPARE = """
set -e
mount --make-rprivate /
mount -t tmpfs none $work
mkdir $work/upper $work/own $work/root
mount -t overlay overlay -o lowerdir=$image,upperdir=$work/upper,workdir=$work/own $work/root
root=$work/root
chmod o+x $root/root || true
for folder in proc dev tmp; do mkdir -p $root/$folder; done
mount -t proc none $root/proc
mount -t tmpfs -o mode=755 none $root/dev
for device in null zero random urandom; do touch $root/dev/$device; mount --bind /dev/$device $root/dev/$device; done
touch $root/dev/termination-log
mount --bind $message $root/dev/termination-log
"""
# A folder of this machine as part of the image, at its own place: also where another file system or a volume covers that,
# and for users who may not look into it out here.
SHOW = """
show() {
  mkdir -p "$root$1" $work/$2-upper $work/$2-own
  mount -t overlay overlay -o "lowerdir=$1,upperdir=$work/$2-upper,workdir=$work/$2-own" "$root$1"
  chmod o+rx "$root$1"
  mount -o remount,ro "$root$1"
  parent=$(dirname "$1")
  while [ "$parent" != / ]; do chmod o+x "$root$parent"; parent=$(dirname "$parent"); done
}
"""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` as Kubernetes reads it: unknown names stay, and `$$` is one `$`."""
    pattern = r"\$(\$|\(([^)]*)\))"
    return re.sub(pattern, lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), text)


def variables(container: dict[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """A container's environment. `given` is what a controller or an image adds before it."""
    found = dict(given)
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        if "resourceFieldRef" in source:
            found[entry["name"]] = container["resources"]["requests"][
                source["resourceFieldRef"]["resource"].partition(".")[2]
            ]
        elif "value" in entry:
            found[entry["name"]] = expand(entry["value"], found)
        else:
            assert source.get("secretKeyRef", {}).get("optional") is True, entry
    return found


class Container:
    """A container that runs."""

    def __init__(self, process: subprocess.Popen[bytes], pod: dict[str, Any], folder: Path, prefix: list[str]) -> None:
        self.process, self.pod, self._folder, self._prefix = process, pod, folder, prefix

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    @property
    def message(self) -> str:
        """What it wrote to its termination log."""
        return (self._folder / "message").read_text()

    @property
    def first(self) -> int:
        """The number outside of what is process 1 inside."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def passes(self, probe: dict[str, Any]) -> bool:
        try:
            inside = ["nsenter", f"--target={self.first}", "--mount", "--pid", f"--root=/proc/{self.first}/root"]
        except (OSError, IndexError):
            return False
        command = [*inside, *self._prefix, *probe["exec"]["command"]]
        try:
            done = subprocess.run(command, timeout=probe["timeoutSeconds"], check=False, stderr=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def kill(self) -> None:
        """All of it: with process 1 of a process namespace goes everything else in there."""
        with contextlib.suppress(OSError, IndexError):
            os.kill(self.first, signal.SIGKILL)

    def delete(self) -> tuple[int, float]:
        """As when the pod is deleted or evicted. Exit code, and seconds from the notice to the end."""
        began, grace = time.monotonic(), self.pod["terminationGracePeriodSeconds"]
        os.kill(self.first, signal.SIGTERM)
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
            return 128 + signal.SIGKILL, grace
        return self.process.returncode, time.monotonic() - began


@contextlib.contextmanager
def running(
    pod: dict[str, Any],
    folder: Path,
    *,
    image: Path,
    given: Mapping[str, str],
    claims: Mapping[str, Path],
    shown: Iterable[Path] = (),
) -> Iterator[Container]:
    """Start the pod's first container from `image`, a root file system. `claims` are the folders behind its PVCs, `shown`
    folders of this machine that belong to the image."""
    container, security = pod["containers"][0], pod["securityContext"]
    folder.mkdir()
    message, work = folder / "message", folder / "work"
    message.touch()
    message.chmod(0o666)
    work.mkdir()
    script = [f"image={image} work={work} message={message}", PREPARE, SHOW]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        volume, place = volumes[mount["name"]], f"$root{mount['mountPath']}"
        script.append(f"mkdir -p {place}")
        if "emptyDir" in volume:
            limit = volume["emptyDir"]["sizeLimit"].removesuffix("i")  # a tmpfs knows no decimal units
            script.append(f"mount -t tmpfs -o mode=2777,gid={security['fsGroup']},size={limit} none {place}")
        else:
            script.append(f"mount --bind {claims[volume['persistentVolumeClaim']['claimName']]} {place}")
            script.append(f"mount -o remount,bind,ro {place}" if mount.get("readOnly") else "true")
    script += [f"show {shlex.quote(str(place))} {number}" for number, place in enumerate(shown)]
    script.append("mount -o remount,ro $root")
    environment = [f"{name}={value}" for name, value in variables(container, given).items()]
    user = [f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}", f"--groups={security['fsGroup']}"]
    prefix = ["setpriv", *user, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "env", "-i", *environment]
    command = [expand(word, dict(entry.split("=", 1) for entry in environment)) for word in container["command"]]
    script.append(f"exec chroot $root {shlex.join([*prefix, *command])}")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*UNSHARE, "bash", "-c", "\n".join(script)], stdout=log, stderr=log)
    started = Container(process, pod, folder, prefix)
    try:
        yield started
    finally:
        started.kill()
        process.wait()


def missing(folder: Path) -> str | None:
    """Why containers cannot be run here; None when they can."""
    if os.geteuid() != 0:
        return "needs root"
    (folder / "work").mkdir(parents=True)
    (folder / "message").touch()
    trial = f"image=/ work={folder}/work message={folder}/message\n{PREPARE}"
    result = subprocess.run([*UNSHARE, "bash", "-c", trial], capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else f"this machine lets nobody mount: {result.stderr.strip()}"
