"""Polls a cloud for spot notices, which announce that it is about to take the machine away. Opt-in by the spec.

AWS: EC2 instance metadata v2, `spot/instance-action`, two minutes ahead. GCP: `instance/preempted`, thirty seconds ahead. Azure:
scheduled events of type Preempt, thirty seconds ahead. All three answer on a link-local address.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from job.runtime.preemption import Preemption

log = logging.getLogger("job")

EVERY_SECONDS = 2.0
TIMEOUT_SECONDS = 2.0
FAILURES_TO_TELL = 5
SECONDS_AHEAD = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}


def aws(environment: Mapping[str, str]) -> str | None:
    """Return EC2's spot notice, or None. Raises OSError if the metadata service does not answer."""
    root = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    token = _ask(f"{root}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    answer = _ask(f"{root}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    return None if answer is None else f"a spot notice of AWS ({json.loads(answer)['action']})"


def gcp(environment: Mapping[str, str]) -> str | None:
    """Return Compute Engine's spot notice, or None."""
    host = environment.get("GCE_METADATA_HOST", "metadata.google.internal")
    answer = _ask(f"http://{host}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return "a spot notice of GCP" if answer is not None and answer.strip() == "TRUE" else None


def azure(environment: Mapping[str, str]) -> str | None:
    """Return Azure's spot notice, or None."""
    root = environment.get("AZURE_METADATA_ENDPOINT", "http://169.254.169.254").rstrip("/")
    answer = _ask(f"{root}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    events = json.loads(answer or "{}").get("Events", [])
    return "a spot notice of Azure" if any(event.get("EventType") == "Preempt" for event in events) else None


CLOUDS: dict[str, Callable[[Mapping[str, str]], str | None]] = {"aws": aws, "gcp": gcp, "azure": azure}


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """Return the body, or None for 404, which these services answer while there is no notice."""
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would answer for its own machine
    try:
        with opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
            body: bytes = answer.read()
            return body.decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


@contextmanager
def watch_spot_notices(cloud: str | None, preemption: Preemption, environment: Mapping[str, str]) -> Iterator[None]:
    """Poll every `EVERY_SECONDS` while the block runs. A notice requests a stop, with that cloud's own warning time.

    A metadata service that does not answer is logged once and never stops the run.
    """
    if cloud is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_poll, args=(cloud, preemption, environment, ended), name="spot", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * TIMEOUT_SECONDS)


def _poll(cloud: str, preemption: Preemption, environment: Mapping[str, str], ended: threading.Event) -> None:
    failures = 0
    while not ended.is_set():
        try:
            notice = CLOUDS[cloud](environment)
            failures = 0
        except Exception as error:  # anything may answer at that address: keep asking
            failures += 1
            if failures == FAILURES_TO_TELL:
                log.warning(
                    "the metadata service of %s gives no usable answer (%s): spot notices are not seen", cloud, error
                )
            notice = None
        if notice is not None:
            preemption.request(notice, SECONDS_AHEAD[cloud])
            os.kill(os.getpid(), signal.SIGUSR1)  # so that the main thread leaves at once where it can
            return
        ended.wait(EVERY_SECONDS)
