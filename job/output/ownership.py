"""Determines who owns an output, and how far it got, from its files. Needs neither torch nor the training libraries."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import yaml

from job.config.rules import differences
from job.config.schema import ANSWERS, JobSpec
from job.errors import DataError, NoHub, SpecError, Unavailable
from job.layout import (
    ANSWER_KEYS,
    ATTEMPTS_KEY,
    EVALUATION,
    EXTRA_KEY,
    IDENTITY_KEY,
    LEASE_KEY,
    MANIFEST,
    OCCLUSION_KEY,
    RESULT_KEY,
    SPEC_KEY,
    STATUS_KEY,
    WORK,
)
from job.output.attempts import count_attempt
from job.output.identity import Identity, changes, from_json
from job.output.stored import read_json, stored_spec
from job.runtime.status import bytes_text
from job.store import Entry, Missing, OwnedStore, Store, lease

PROBE = re.compile("probe-[0-9a-f]{12}")
"""Objects that `job.store.check_writable` writes and deletes."""
SHOWN = 3
"""Number of files that a sentence names."""

log = logging.getLogger("job")


def is_published(store: Store, spec: JobSpec) -> bool:
    """Whether this job has been published here, with what the spec measures and publishes now. Images that the spec no longer
    wants in the report do not count: `job.report.rebuild.withdraw_rows` removes them from what is published."""
    digests = {spec.result_digest}
    if not spec.privacy.report_images:
        shown = spec.privacy.model_copy(update={"report_images": True})
        digests.add(spec.model_copy(update={"privacy": shown}).result_digest)
    return (read_json(store, RESULT_KEY) or {}).get("result_digest") in digests


def outdated(store: Store, spec: JobSpec) -> list[str]:
    """List the keys of answers, and of what was made from them, that were generated under other settings than the spec has
    now."""
    stored = stored_spec(store)
    if stored is None or all(getattr(stored.evaluation, each) == getattr(spec.evaluation, each) for each in ANSWERS):
        return []
    return [
        each.key for each in store.list(EVALUATION) if each.key.startswith((*ANSWER_KEYS, EXTRA_KEY, OCCLUSION_KEY))
    ]


def check_owner(store: OwnedStore, spec: JobSpec) -> bool:
    """Return whether the output holds a run of another spec that is to be deleted. Raises SpecError if the spec does not say
    so, unless that run produced nothing, for example because its spec was wrong. Also raises SpecError for an output that is
    not empty and in which no job recorded files."""
    recorded = store.read_record()
    _refuse_foreign(store, recorded)
    if recorded is None or SPEC_KEY not in recorded:
        return False
    try:
        stored = stored_spec(store)
    except SpecError:
        if _refuses(store, spec, recorded):
            raise
        return True
    if stored is None or stored.digest == spec.digest:
        return False
    if _refuses(store, spec, recorded):
        raise SpecError(_conflict(store, spec))
    return True


def _refuse_foreign(store: OwnedStore, recorded: frozenset[str] | None) -> None:
    """Raises SpecError for an output that has files but no job that recorded any. Leftovers of a job that died before it
    recorded anything do not count."""
    there = [entry.key for entry in store.list() if not PROBE.fullmatch(entry.key)]
    if LEASE_KEY in there and lease.is_lease(store.read(LEASE_KEY)):
        there.remove(LEASE_KEY)
    if recorded is not None:
        there = [key for key in there if key == LEASE_KEY]
    if there:
        shown = ", ".join(there[:SHOWN]) + (", …" if len(there) > SHOWN else "")
        count = f"{len(there)} files" if len(there) > 1 else "a file"
        raise SpecError(
            f"output.url: {store.url} is not empty: it holds {count} that no job of this version recorded as its own ({shown}); "
            "choose an empty folder or prefix, so that none of them is overwritten or deleted"
        )


def _refuses(store: OwnedStore, spec: JobSpec, recorded: frozenset[str]) -> bool:
    """Return whether the output holds work that the spec does not give up."""
    return spec.output.on_conflict == "refuse" and holds_work(store, recorded)


def holds_work(store: OwnedStore, recorded: frozenset[str]) -> bool:
    """Return whether jobs left more in the output than each start writes anew."""
    return any(entry.key in recorded and entry.key.startswith((*WORK, RESULT_KEY)) for entry in store.list())


def begin(store: OwnedStore, spec: JobSpec) -> int:
    """Make the output this spec's and return the attempt's number, from 1.

    Raises SpecError if it holds the work of another spec, unless `on_conflict` is restart, which deletes that run. Raises
    NoProgress if the last attempts all died and left nothing new.
    """
    restarts = check_owner(store, spec)
    store.take_up()
    if restarts:
        # All but the other spec, which ours replaces below: if this is killed, the next attempt finds that spec and continues.
        delete_run(store, keep=(SPEC_KEY,))
    else:
        store.delete(outdated(store, spec))  # before spec.yaml has the settings of the new answers
    number = count_attempt(store, spec.preemption.max_attempts_without_progress)
    write_spec(store, spec)
    return number


def write_spec(store: OwnedStore, spec: JobSpec) -> None:
    text = f"# sha256 of what decides the training: {spec.digest}\n" + yaml.safe_dump(
        spec.model_dump(mode="json", exclude_unset=False), sort_keys=False, allow_unicode=True
    )
    store.write(SPEC_KEY, text.encode())


def take_data(store: OwnedStore, spec: JobSpec, data: Identity) -> bool:
    """Make these rows those of the run in the output. Returns whether its work was deleted because it began with other rows.

    Raises DataError if it did and the spec does not say restart. Rows that changed before there was any work are accepted as they
    are now.
    """
    restarts = check_data(store, spec, data)
    if restarts:
        # The other rows stay on record until ours replace them: if this is killed, the next attempt finds them and continues.
        delete_run(store, keep=(SPEC_KEY, ATTEMPTS_KEY, STATUS_KEY, IDENTITY_KEY))
    if _stored_data(store) != data:
        store.write(IDENTITY_KEY, data.to_json())
    if not is_published(store, spec):  # it was measured or published differently
        store.delete([RESULT_KEY])
    return restarts


def check_data(store: OwnedStore, spec: JobSpec, data: Identity) -> bool:
    """Return whether the run in the output began with other rows and is to be deleted for them. Raises DataError if the spec
    does not say so."""
    before, recorded = _stored_data(store), store.read_record() or frozenset()
    if before is None or not (changed := changes(before, data)) or not holds_work(store, recorded):
        return False
    said = (
        f"dataset.path: {spec.dataset.path} is not the data that the run in {spec.output.url} began with; {'; '.join(changed)}; "
        "restore it, or set output.on_conflict to restart, which deletes that run and starts over with the data as it is"
    )
    if spec.output.on_conflict == "refuse":
        raise DataError(said)
    log.warning("%s", said.partition("; restore it")[0])
    return True


def began_with_more(store: Store, data: Identity | None) -> bool:
    """Return whether the run in the output began with more rows than these, or with any if `data` is None: too few are good."""
    before = _stored_data(store)
    counts = [each.rows if each else 0 for each in (before, data)]
    return counts[0] > counts[1]


@contextmanager
def found_before(store: Store) -> Iterator[None]:
    """Raise Unavailable instead of NoHub if the block cannot reach the hub, but an earlier attempt at this output had all of
    its base model and its rows: that outage will pass."""
    try:
        yield
    except NoHub as error:
        if _stored_data(store) is None:
            raise
        raise Unavailable(
            f"{error.missing}, and the hub, where an earlier attempt found it, cannot be reached now; run again once it can"
        ) from error


def _stored_data(store: Store) -> Identity | None:
    try:
        return from_json(store.read(IDENTITY_KEY))
    except Missing:
        return None


def delete_run(store: OwnedStore, keep: Collection[str]) -> None:
    """Delete every file that jobs recorded in the output, except the keys in `keep`, after logging their names. What makes a
    result or a checkpoint goes first, so that nothing looks complete that is not."""
    for line in deletions(store, keep):
        log.info("%s", line)
    keys = [entry.key for entry in _recorded(store, keep)]
    store.delete([RESULT_KEY])
    store.delete([key for key in keys if key.endswith(MANIFEST)])
    store.delete(keys)


def deletions(store: OwnedStore, keep: Collection[str] = (SPEC_KEY,)) -> list[str]:
    """Describe what `delete_run` deletes: one line per folder, with its files by name."""
    entries = _recorded(store, keep)
    folders: dict[str, list[str]] = {}
    for entry in entries:
        folder, _, name = entry.key.rpartition("/")
        folders.setdefault(folder, []).append(name)
    size = bytes_text(sum(entry.size for entry in entries))
    lines = [
        f"restart deletes {len(entries)} files ({size}) of the earlier run in {store.url}, and no other file there"
    ]
    return lines + [f"restart deletes {folder or store.url}: {', '.join(names)}" for folder, names in folders.items()]


def _recorded(store: OwnedStore, keep: Collection[str]) -> list[Entry]:
    recorded = store.read_record() or frozenset()
    return [entry for entry in store.list() if entry.key in recorded and entry.key not in keep]


def _conflict(store: Store, spec: JobSpec) -> str:
    stored = stored_spec(store)
    fields = "; ".join(differences(stored, spec)) if stored is not None else "its spec.yaml is missing"
    return (
        f"output.url: {spec.output.url} holds a run of another spec ({fields}). Choose another output, restore the "
        "fields, or set output.on_conflict to restart, which deletes that run"
    )
