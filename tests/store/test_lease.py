"""One writer, whatever happens when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.checkpoint import commit, steps
from job.errors import Preempted
from job.layout import LEASE_KEY
from job.store import Store, open_store
from job.store.lease import Lease, acquire

TTL = 0.6


@pytest.fixture
def out(store: Store) -> Iterator[Store]:
    store.write("something", b"")
    yield store
    store.delete([LEASE_KEY])


def die(lease: Lease) -> None:
    """As a killed process does: the heartbeat stops and nothing is released."""
    lease._end.set()
    lease._thread.join()


def test_a_live_lease_stops_the_second_job_naming_the_first(out: Store) -> None:
    with acquire(out, "job 17 on node a", 30), pytest.raises(Preempted, match="job 17 on node a") as refused:
        acquire(out, "job 18", 30)
    assert refused.value.exit_code == 75


def test_a_heartbeat_outlives_the_first_term(out: Store) -> None:
    with acquire(out, "a", 3.0) as lease:
        first = lease._until
        while lease._until < first + 1:
            assert lease._thread.is_alive()
            time.sleep(0.05)
        with pytest.raises(Preempted):
            acquire(out, "b", 3.0)


def test_a_released_lease_is_free_at_once_and_its_token_grows(out: Store) -> None:
    first = acquire(out, "a", 30)
    first.release()
    with pytest.raises(Preempted, match="released"):
        first.check()
    with acquire(out, "b", 30) as second:
        assert second.token == first.token + 1


def test_a_stale_lease_is_taken_over_after_a_wait(out: Store) -> None:
    lost: list[str] = []
    first = acquire(out, "a", TTL, on_loss=lost.append)
    die(first)
    with acquire(out, "b", TTL, wait=20) as second:
        assert second.token == first.token + 1
        for _ in range(2):
            with pytest.raises(Preempted, match="taken over by b"):
                first.confirm()
        assert lost == [f"the loss of the lease on {out.url} to b"]
        with pytest.raises(Preempted):
            first.check()


def test_a_wait_ends_at_once_when_the_holder_renews(out: Store) -> None:
    with acquire(out, "a", 6.0):
        began = time.monotonic()
        with pytest.raises(Preempted):
            acquire(out, "b", 6.0, wait=600)
        assert time.monotonic() - began < 60


def test_a_lease_that_could_not_be_renewed_is_not_believed(out: Store) -> None:
    now = [0.0]
    lease = acquire(out, "a", 30, clock=lambda: now[0])
    lease.check()
    now[0] = 30.0
    with pytest.raises(Preempted, match="expired"):
        lease.check()
    lease.confirm()  # nobody took it: it may be had back
    lease.check()
    lease.release()


def test_a_lease_that_was_removed_is_lost(out: Store) -> None:
    with acquire(out, "a", 30) as lease:
        out.delete([LEASE_KEY])
        with pytest.raises(Preempted, match="deleted"):
            lease.confirm()


def test_nonsense_in_the_lease_counts_as_a_lease(out: Store) -> None:
    out.write(LEASE_KEY, b"[1, 2")
    with pytest.raises(Preempted, match="unknown"):
        acquire(out, "b", 30)


def test_a_writer_that_lost_its_lease_commits_nothing(out: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    first = acquire(out, "a", TTL)
    die(first)
    with acquire(out, "b", TTL, wait=20):
        first._until = float("inf")  # as if its clock stood still, so that it does not suspect anything
        with pytest.raises(Preempted):
            commit(out, tmp_path, step=1, epoch=0, spec_digest="d", attempt=0, lease=first)
    assert steps(out) == []


def test_a_writer_that_slept_between_confirming_and_writing_takes_its_manifest_back(
    out: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"x")
    now = [0.0]
    lease = acquire(out, "a", 30, clock=lambda: now[0])
    write = out.write

    def slow_write(key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        now[0] += 31.0 if key.endswith("MANIFEST.json") else 0.0
        return write(key, data, if_absent=if_absent, if_match=if_match)

    monkeypatch.setattr(out, "write", slow_write)
    with pytest.raises(Preempted, match="expired"):
        commit(out, tmp_path, step=1, epoch=0, spec_digest="d", attempt=0, lease=lease)
    assert steps(out) == []
    lease.release()


class SteppedStore:
    """A store whose clock is moved by the test. Everything else is a real folder."""

    def __init__(self, store: Store, now: list[float]) -> None:
        self._store = store
        self._now = now
        self._written = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def age(self, key: str) -> float:
        self._store.version(key)
        return self._now[0] - self._written

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        version = self._store.write(key, data, if_absent=if_absent, if_match=if_match)
        self._written = self._now[0]
        return version


def test_a_clock_that_was_set_back_keeps_no_dead_lease_alive(out: Store) -> None:
    """The store's, by which the lease is an hour from the future: that nobody renews it is seen by the taker's own clock."""
    die(acquire(out, "a", TTL))
    back = SteppedStore(out, [-3600.0])
    with pytest.raises(Preempted):
        acquire(back, "b", TTL)  # type: ignore[arg-type]
    with acquire(back, "b", TTL, wait=20) as second:  # type: ignore[arg-type]
        assert second.token == 2


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    acts=st.lists(
        st.tuples(st.sampled_from(["acquire", "confirm", "release", "sleep"]), st.integers(0, 2), st.integers(1, 60)),
        max_size=25,
    )
)
def test_in_any_interleaving_at_most_one_believes_and_tokens_grow(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int, int]]
) -> None:
    now = [0.0]
    store = SteppedStore(open_store(str(tmp_path_factory.mktemp("lease"))), now)
    held: dict[int, Lease] = {}
    tokens: list[int] = []
    for act, who, seconds in acts:
        try:
            if act == "sleep":
                now[0] += seconds
            elif act == "acquire":
                held[who] = acquire(store, str(who), 30, clock=lambda: now[0])  # type: ignore[arg-type]
                die(held[who])  # heartbeats come from the list of acts
                tokens.append(held[who].token)
            elif who in held:
                held[who].confirm() if act == "confirm" else held[who].release()
        except Preempted:
            pass
        believers = []
        for other, lease in held.items():
            try:
                lease.check()
                believers.append(other)
            except Preempted:
                pass
        assert len(believers) <= 1
    assert tokens == sorted(set(tokens))
