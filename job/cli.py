"""The command line, and the only place that turns an error into an exit code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click

from job.errors import BUG, JobError, SpecError
from job.preemption import NOTICES, Preemption, end_time, grace_seconds

TERMINATION_LOG = Path("/dev/termination-log")

log = logging.getLogger("job")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vision-lora-job")
def main() -> None:
    """Fine-tune a vision-language model with LoRA, measured before and after, resumable at any moment."""


bundle_option = click.option(
    "--bundle",
    help="Take base and data from what `prefetch` gathered, and nothing from a network (default: the variable JOB_BUNDLE).",
)


@main.command()
@click.argument("spec", required=False)
@bundle_option
def run(spec: str | None, bundle: str | None) -> None:
    """Run the job of SPEC.

    SPEC is a path, a file:// or s3:// URL, or the text itself; without it, the variable JOB_SPEC is.
    """

    def work(preemption: Preemption) -> None:
        from job.run import run as run_job
        from job.specfile import load_spec

        os.environ.update({"JOB_BUNDLE": bundle} if bundle else {})
        run_job(load_spec(os.environ, spec), os.environ, preemption)

    finish(work)


@main.command()
@click.argument("spec", required=False)
@click.option("--data", is_flag=True, help="Fetch the data and look at every row, not at a sample of a large dataset.")
@bundle_option
def check(spec: str | None, data: bool, bundle: str | None) -> None:
    """Print the plan that `run` would execute. Changes nothing."""

    def work(preemption: Preemption) -> None:
        with preemption.leave_at_once():
            from job.bundle import use_bundle
            from job.output import check_owner, open_output
            from job.place import place
            from job.plan import describe, make_plan
            from job.scratch import prepare_scratch
            from job.specfile import load_spec
            from job.survey import survey

            os.environ.update({"JOB_BUNDLE": bundle} if bundle else {})
            loaded = load_spec(os.environ, spec)
            store = open_output(loaded)
            check_owner(store, loaded)
            scratch = prepare_scratch(os.environ)
            use_bundle(loaded, os.environ, scratch)
            world = place(os.environ).world
            found = survey(loaded, store, scratch, fetch=False, all_data=data, world=world)
            click.echo(describe(loaded, make_plan(loaded, found.facts), found.facts))

    finish(work)


@main.command()
@click.argument("spec")
@click.argument("folder")
def prefetch(spec: str, folder: str) -> None:
    """Gather base and data into FOLDER, for where there is no network.

    FOLDER may be an s3:// prefix. `run --bundle FOLDER` then needs nothing else.
    """

    def work(preemption: Preemption) -> None:
        with preemption.leave_at_once():
            from job.bundle import prefetch as gather
            from job.scratch import prepare_scratch
            from job.specfile import load_spec

            gather(load_spec(os.environ, spec), folder, prepare_scratch(os.environ))

    finish(work)


@main.command()
@click.argument("output")
def status(output: str) -> None:
    """Show how the job at OUTPUT stands."""

    def work(_preemption: Preemption) -> None:
        from job.status import describe_status
        from job.store import open_store

        click.echo(describe_status(open_store(output)))

    finish(work)


@main.command()
@click.argument("output")
@click.option(
    "--to", type=click.Path(path_type=Path, dir_okay=False), help="A file here, instead of OUTPUT/report.html."
)
def report(output: str, to: Path | None) -> None:
    """Make the report of the job at OUTPUT again.

    It is made from the stored files: no GPU and no model are needed.
    """

    def work(preemption: Preemption) -> None:
        with preemption.leave_at_once():
            from job.output import REPORT_KEY
            from job.report import rebuild
            from job.store import open_store

            store = open_store(output)
            page = rebuild(store).encode()
            if to is None:
                store.write(REPORT_KEY, page)
            else:
                to.write_bytes(page)
            click.echo(str(to or f"{store.url.rstrip('/')}/{REPORT_KEY}"))

    finish(work)


@main.command()
def schema() -> None:
    """Print the spec's JSON schema, for editors."""
    from job.spec import JobSpec

    click.echo(json.dumps(JobSpec.model_json_schema(), indent=2))


@main.group()
def render() -> None:
    """Print a Kubernetes Job or a Slurm script for a spec."""


@render.command()
@click.argument("spec")
@click.option("--image", required=True, help="The job's image, with a tag or, better, a digest.")
@click.option("--output", help="Where everything goes; overrides output.url.")
@click.option(
    "--with", "components", multiple=True, metavar="NAME", help="A folder of k8s/components; may be repeated."
)
@click.option("--sweep", type=click.Path(path_type=Path), help="A table of overrides, a run per line.")
def kubernetes(spec: str, image: str, output: str | None, components: tuple[str, ...], sweep: Path | None) -> None:
    """Print a Kubernetes Job for SPEC, for `kubectl create -f -`. Overrides (JOB__…) set here go with it."""

    def work(preemption: Preemption) -> None:
        with preemption.leave_at_once():
            from job import render

            click.echo(render.kubernetes(render.read_run(os.environ, spec, output, sweep), image, components), nl=False)

    finish(work)


@render.command()
@click.argument("spec")
@click.option("--image", help="What the site's runtime starts, as JOB_IMAGE of slurm/site.env.")
@click.option("--output", help="Where everything goes; overrides output.url.")
def slurm(spec: str, image: str | None, output: str | None) -> None:
    """Print a batch script for SPEC, for `sbatch`. Overrides (JOB__…) set here go with it."""

    def work(preemption: Preemption) -> None:
        with preemption.leave_at_once():
            from job import render

            settings = {} if image is None else {"JOB_IMAGE": image}
            click.echo(render.slurm(render.read_run(os.environ, spec, output, None), settings), nl=False)

    finish(work)


def finish(work: Callable[[Preemption], None]) -> NoReturn:
    """Do the work under our signal handlers and end the process with the code for how it went."""
    from job.record import one_line, start_logging

    start_logging()
    try:
        preemption = Preemption(grace_seconds(os.environ), end_time(os.environ))
    except SpecError as error:
        _end(error.exit_code, str(error))
    with preemption.listening(too_late=lambda error: _tell(error.exit_code, str(error))):
        try:
            work(preemption)
            _end(0, None)
        except JobError as error:
            if len(str(error).splitlines()) > 1:
                log.error("%s", error)
            _end(error.exit_code, one_line(error))
        except BrokenPipeError:
            os._exit(0)  # whoever read our output has seen enough
        except Exception as error:
            traceback.print_exc()
            _end(BUG, f"a bug: {type(error).__name__}: {one_line(error)}")


def _end(code: int, reason: str | None) -> NoReturn:
    """Go now. The interpreter's own way out takes a second with torch loaded, and dies of any signal on the way."""
    for number in NOTICES:
        signal.signal(number, signal.SIG_IGN)
    if reason is not None:
        _tell(code, reason)
    logging.shutdown()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(code: int, reason: str) -> None:
    """The reason as the last line on stderr and for the kubelet."""
    line = f"exit {code}: {reason}"
    with contextlib.suppress(OSError):
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_text(line[:4000])
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
