"""The contract with schedulers."""

import job.errors as errors
from job.errors import EXIT_CODES, JobError


def test_every_error_has_a_row_in_the_table():
    classes = JobError.__subclasses__()
    named = {kind.exit_code for kind in classes if kind.__module__ == "job.errors"}
    assert named | {0, errors.BUG} == {row.code for row in EXIT_CODES}


def test_codes_are_given_once():
    assert len({row.code for row in EXIT_CODES}) == len(EXIT_CODES)


def test_what_can_succeed_on_another_try_is_never_failed_for_good():
    for row in EXIT_CODES:
        if row.slurm == "requeue":
            assert row.kubernetes in ("Ignore", "Count")


def test_the_docstring_draws_every_class_with_its_code():
    for kind in JobError.__subclasses__():
        if kind.__module__ == "job.errors":
            line = next(line for line in errors.__doc__.splitlines() if f" {kind.__name__} " in line)
            assert f" {kind.exit_code} " in line
