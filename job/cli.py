"""The command line."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from job.config.environment import Environment
from job.config.parsing import did_you_mean
from job.errors import DataError, SpecError, Unavailable
from job.layout import SPEC_KEY
from job.runtime.exit import end, run_and_exit, tell
from job.runtime.preemption import Preemption, end_time

log = logging.getLogger("job")

WATCH_SECONDS = 5.0


def finish(work: Callable[[Environment, Preemption], None]) -> NoReturn:
    """Do the work under our signal handlers and exit with the code for its outcome."""

    def listen() -> None:
        environment = Environment.read(os.environ)
        preemption = Preemption(environment.grace_seconds, end_time(os.environ))
        with preemption.listening(too_late=lambda error: tell(error.exit_code, str(error))):
            run_and_exit(lambda: work(environment, preemption))

    run_and_exit(listen)


def at_once(command: Callable[..., None]) -> Callable[..., NoReturn]:
    """Run a command, whose first argument is the environment, as `finish` does; it leaves as soon as it is asked to stop."""

    @wraps(command)
    def run(**given: Any) -> NoReturn:
        def work(environment: Environment, preemption: Preemption) -> None:
            with preemption.leave_at_once():
                command(environment, **given)

        finish(work)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vision-lora-job")
def main() -> None:
    """Fine-tune a vision-language model with LoRA, measured before and after, resumable at any moment."""


bundle_option = click.option(
    "--bundle",
    expose_value=False,
    callback=lambda _context, _option, folder: os.environ.update({"JOB_BUNDLE": folder} if folder else {}),
    help="A bundle of `job prefetch` to read base model and data from, without any network (default: the variable JOB_BUNDLE).",
)


@main.command()
@click.argument("spec", required=False)
@bundle_option
def run(spec: str | None) -> None:
    """Run the job of SPEC.

    SPEC is a path, a file:// or s3:// URL, or the spec itself; the default is the variable JOB_SPEC.
    """

    def work(environment: Environment, preemption: Preemption) -> None:
        from job.config.loader import load_spec
        from job.run import run as run_job

        run_job(load_spec(os.environ, spec), environment, preemption)

    finish(work)


@main.command()
@click.argument("data")
@click.option("--model", help="The base model: a hub id, a folder or an s3:// prefix.")
@click.option("--answer", help="The column with the text to learn.")
@click.option("--output", help="Where the job will write: a folder or an s3:// prefix.")
@click.option(
    "--to",
    default=SPEC_KEY,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The new spec (default: spec.yaml).",
)
@at_once
def init(environment: Environment, data: str, to: Path, **given: str | None) -> None:
    """Write a spec with comments for DATA, after a look at its rows.

    DATA is a folder or a file on this machine. On a terminal, questions are asked, each with a guess as its default; elsewhere
    the guesses are taken. No file is overwritten.
    """
    from job.init import init as make_spec
    from job.init import nobody
    from job.runtime.scratch import prepare_scratch

    if to.is_symlink() or to.exists():
        raise SpecError(f"--to: {to} exists, and is not overwritten; name another file")
    scratch = prepare_scratch(environment, os.environ)
    text = make_spec(data, given, question if sys.stdin.isatty() else nobody, scratch, environment)
    write_new(to, text)
    show(f"{to}\nnext: job look {to}; job check {to}; job run {to}")


def question(text: str, default: str, known: tuple[str, ...] = ()) -> str:
    """Ask on the terminal until the answer, or each of several with commas between them, is among the `known` ones, if any."""
    while True:
        try:
            answer = str(click.prompt(text, default or None, err=True)).strip()
        except click.Abort:
            raise SpecError("no answer; nothing was written") from None
        wrong = next((each for part in answer.split(",") if (each := part.strip()) not in known), None)
        if not known or wrong is None or answer in known:
            return answer
        cure = did_you_mean(wrong, known) or f"; there are {', '.join(known)}"
        click.echo(f"no {wrong}{cure}", err=True)


def write_new(to: Path, text: str) -> None:
    """Write a file that is not there yet. Raises SpecError."""
    try:
        with to.open("x") as stream:
            stream.write(text)
    except OSError as error:
        raise SpecError(f"--to: {to} cannot be written: {error.strerror}") from error


@main.command()
@click.argument("spec", required=False)
@click.option("--data", is_flag=True, help="Fetch the data and validate every row, not a sample of a large dataset.")
@click.option("--example", is_flag=True, help="Print a row as the model sees it, even if the output is not a terminal.")
@bundle_option
@at_once
def check(environment: Environment, spec: str | None, data: bool, example: bool) -> None:
    """Print the plan that `run` would execute. Changes nothing."""
    from job.config.loader import load_spec
    from job.distributed.launch_env import read_launch_env
    from job.output.overlap import refuse_overlap
    from job.output.ownership import check_data, check_owner, deletions, is_published
    from job.output.stored import open_output
    from job.planning.describe import describe
    from job.planning.plan import make_plan
    from job.planning.survey import survey
    from job.prefetch import use_bundle
    from job.runtime.scratch import prepare_scratch

    loaded = load_spec(os.environ, spec)
    refuse_overlap(loaded, environment)
    store = open_output(loaded)
    if not is_published(store, loaded) and check_owner(store, loaded):
        log.info("%s", "\n".join(deletions(store)))
    scratch = prepare_scratch(environment, os.environ)
    use_bundle(loaded, environment.bundle, scratch, hashed=data)
    world = read_launch_env(os.environ).world
    found = survey(loaded, store, scratch, environment, fetch=False, all_data=data, world=world)
    seen, identity = example or sys.stdout.isatty(), found.data.identity if found.data else None
    if identity is not None and check_data(store, loaded, identity):
        log.info("%s", "\n".join(deletions(store)))
    show(describe(loaded, make_plan(loaded, found.facts), found.facts, example=seen))


@main.command()
@click.argument("spec", required=False)
@click.option("--rows", default=1000, type=click.IntRange(1), help="How many rows to choose from (default: 1000).")
@click.option(
    "--to", default="look.html", type=click.Path(path_type=Path, dir_okay=False), help="The page (default: look.html)."
)
@bundle_option
@at_once
def look(environment: Environment, spec: str | None, rows: int, to: Path) -> None:
    """Write a page of the rows of SPEC as the model will see them, the odd ones first.

    It shows images and texts. It needs no GPU, and of the base model the processor alone is used.
    """
    from job.config.loader import load_spec
    from job.look import look as make_page
    from job.prefetch import use_bundle
    from job.runtime.scratch import prepare_scratch

    loaded, scratch = load_spec(os.environ, spec), prepare_scratch(environment, os.environ)
    use_bundle(loaded, environment.bundle, scratch)
    write_page(to, make_page(loaded, scratch, environment, rows).encode())
    show(str(to))


@main.command()
@click.argument("spec")
@click.argument("folder")
@at_once
def prefetch(environment: Environment, spec: str, folder: str) -> None:
    """Gather base model and data into FOLDER, for machines without a network.

    FOLDER may be an s3:// prefix. `run --bundle FOLDER` then needs nothing else.
    """
    from job.config.loader import load_spec
    from job.prefetch import prefetch as gather
    from job.runtime.scratch import prepare_scratch

    gather(load_spec(os.environ, spec), folder, prepare_scratch(replace(environment, bundle=""), os.environ))


@main.command()
@click.argument("output")
@click.option("--watch", is_flag=True, help="Print what changes until the job has ended, then exit with its code.")
@click.option("--json", "as_json", is_flag=True, help="Print one object on one line.")
@at_once
def status(_environment: Environment, output: str, watch: bool, as_json: bool) -> None:
    """Show the status of the job at OUTPUT."""
    from job.output.describe import describe_status, has_ended, read_status
    from job.store import open_store

    store, shown = open_store(output), list[Any]()
    while True:
        try:
            found = read_status(store)
        except DataError as error:
            if not watch:
                raise
            if not shown:
                log.info("%s; waiting for one", error)
            shown = [error]
            time.sleep(WATCH_SECONDS)
            continue
        place = [found.get(name) for name in ("state", "attempt", "stage", "rows", "step")]
        if place != shown:
            if watch and sys.stdout.isatty() and not as_json:
                click.clear()
            show(json.dumps(found) if as_json else describe_status(store, found))
        shown = place
        if watch and has_ended(found):
            end(int(found.get("exit_code", 0)), None)
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


@main.command(name="list")
@click.argument("prefix")
@at_once
def list_(_environment: Environment, prefix: str) -> None:
    """List the jobs whose outputs are below PREFIX, a folder or an s3:// prefix."""
    from job.output.describe import describe_all
    from job.store import open_store

    for line in describe_all(open_store(prefix)):
        show(line)


@main.command()
@click.argument("output")
@at_once
def verify(_environment: Environment, output: str) -> None:
    """Compare every byte of the published files at OUTPUT with RESULT.json.

    Names each file that differs, is missing or was added, and exits with 65 if there is any; with 0 if there is none.
    """
    from job.output.verify import verify as compare
    from job.runtime.status import bytes_text
    from job.store import open_store

    found = compare(open_store(output), told=lambda key: log.info("%s is as published", key))
    show(f"{found.files} files ({bytes_text(found.size)}) are as published\nRESULT.json has the SHA-256 {found.result}")


@main.command()
@click.argument("output")
@click.option(
    "--to", type=click.Path(path_type=Path, dir_okay=False), help="A local file instead of OUTPUT/report.html."
)
@at_once
def report(_environment: Environment, output: str, to: Path | None) -> None:
    """Rebuild the report of the job at OUTPUT.

    It is built from the stored files and needs no GPU and no model.
    """
    from job.layout import REPORT_KEY
    from job.report.rebuild import rebuild
    from job.store import OwnedStore, open_store

    store = OwnedStore(open_store(output))
    page = rebuild(store.inner).encode()
    if to is None:
        if REPORT_KEY not in (store.read_record() or ()):
            raise SpecError(f"{output}: no job wrote {REPORT_KEY} there; name a file with --to FILE")
        store.write(REPORT_KEY, page)
    else:
        write_page(to, page)
    show(str(to or f"{store.url.rstrip('/')}/{REPORT_KEY}"))


@main.command()
@click.argument("outputs", metavar="OUTPUT...", nargs=-1, required=True)
@click.option("--metric", help="What the verdict is about. Default: the primary metric of the first run.")
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), help="Write a page to this local file too.")
@at_once
def compare(_environment: Environment, outputs: tuple[str, ...], metric: str | None, to: Path | None) -> None:
    """Compare runs that answered the same held-out rows, each with the first OUTPUT.

    A single OUTPUT is the folder or s3:// prefix of a sweep, and all runs below it are compared. It is made from the
    stored answers and needs no GPU and no model.
    """
    from job.report.compare_runs import compare_runs, finished_below, page, text
    from job.store import open_store

    stores = [open_store(output) for output in outputs]
    found = compare_runs(stores if len(stores) > 1 else finished_below(*stores), metric)
    if to is not None:
        write_page(to, page(found).encode())
    show(text(found), nl=False)


@main.command()
@click.argument("output")
@click.argument("metrics", metavar="METRIC=FOLDER...", nargs=-1, required=True)
@at_once
def score(environment: Environment, output: str, metrics: tuple[str, ...]) -> None:
    """Score the answers stored at OUTPUT by metrics that need a model.

    METRIC is bertscore, radgraph, chexbert, ratescore, radcliq, srrbert or green; FOLDER holds its model, as in
    evaluation.extra_metrics. Changes nothing.
    """
    from job.report.score import asked_for, text
    from job.report.score import score as scored
    from job.runtime.scratch import prepare_scratch
    from job.store import open_store

    asked = asked_for(metrics)
    show(text(scored(open_store(output), asked, prepare_scratch(environment, os.environ))), nl=False)


def write_page(to: Path, page: bytes) -> None:
    try:
        to.write_bytes(page)
    except OSError as error:
        raise SpecError(f"--to: {to} cannot be written: {error.strerror}") from error


@main.command()
@click.argument("output")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option(
    "--weights", type=click.Choice(("merged", "adapter")), help="Default: merged, if published, else adapter."
)
@click.option("--instruction", help="The question. Default: that of the job.")
@click.option("--base", help="Where the adapter's base model is. Default: model.name_or_path of the job.")
@click.option(
    "--json", "as_json", is_flag=True, help='Print {"image", "answer"} (or "error") for each image, one a line.'
)
@at_once
def predict(
    environment: Environment, output: str, images: tuple[str, ...], as_json: bool, **request: str | None
) -> None:
    """Answer about each IMAGE with the model published at OUTPUT.

    An IMAGE is a file, DICOM included, or a URL. The model sees it as it saw those of the job, with the same settings.
    """
    from job.predict import Request
    from job.predict import predict as answers

    for found in answers(output, images, Request(**request), environment):
        if as_json:
            show(json.dumps(found, ensure_ascii=False))
        elif "answer" in found:
            show(found["answer"] if len(images) == 1 else f"{found['image']}: {found['answer']}")


@main.command()
@click.argument("output")
@click.option(
    "--engine", type=click.Choice(("vllm", "sglang", "llama.cpp")), help="With --run. Default: the first printed."
)
@click.option(
    "--weights", type=click.Choice(("merged", "adapter", "gguf")), help="With --run. Default: the first printed."
)
@click.option("--base", help="Where the adapter's base model is. Default: model.name_or_path of the job.")
@click.option("--run", "started", is_flag=True, help="Start the server instead of printing commands.")
@at_once
def serve(
    environment: Environment, output: str, engine: str | None, weights: str | None, base: str | None, started: bool
) -> None:
    """Print the command of each server that loads the model published at OUTPUT.

    vLLM is taken from the Python that JOB_SERVE_PYTHON names, if it is set.
    """
    from job.serve import commands, describe, start

    found, made = commands(output, base, environment)
    if started:
        start(made, engine, weights)
    show(describe(found, made))


@main.command()
def schema() -> None:
    """Print the spec's JSON schema, for editors."""
    from job.config.schema import JobSpec

    show(json.dumps(JobSpec.model_json_schema(), indent=2))


@main.group()
def render() -> None:
    """Print Kubernetes Jobs or a Slurm script for a spec."""


def rendered(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that both forms share."""
    sweep = "A table of fields to change (CSV or YAML): a run for each row, with the output OUTPUT/ROW."
    command = click.option("--sweep", type=click.Path(path_type=Path), help=sweep)(command)
    command = click.option("--output", help="Where the job writes; overrides output.url.")(command)
    return click.argument("spec")(bundle_option(command))


@render.command()
@rendered
@click.option("--image", required=True, help="The job's image, with a tag or, better, a digest.")
@click.option(
    "--with", "components", multiple=True, metavar="NAME", help="A component of k8s/components; may be repeated."
)
@at_once
def kubernetes(
    _environment: Environment,
    spec: str,
    output: str | None,
    sweep: Path | None,
    image: str,
    components: tuple[str, ...],
) -> None:
    """Print a Kubernetes Job for SPEC, for `kubectl create -f -`.

    Includes the overrides (JOB__…) and the JOB_BUNDLE set here.
    """
    from job import render

    show(render.kubernetes(render.read_runs(os.environ, spec, output, sweep), image, components), nl=False)


@render.command()
@rendered
@click.option("--image", help="The image for the site's runtime, like JOB_IMAGE in slurm/site.env.")
@at_once
def slurm(_environment: Environment, spec: str, output: str | None, sweep: Path | None, image: str | None) -> None:
    """Print a batch script for SPEC, for `sbatch`; with --sweep, it is an array job.

    Includes the overrides (JOB__…) and the JOB_BUNDLE set here.
    """
    from job import render

    settings = {} if image is None else {"JOB_IMAGE": image}
    show(render.slurm(render.read_runs(os.environ, spec, output, sweep), settings), nl=False)


def command_line(name: str) -> None:
    """Run the command that the process was started with, under `name`. Raises SpecError for a wrong command line."""
    try:
        main.main(prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        there = error.ctx.command_path if error.ctx is not None else name
        said = "a command is missing" if isinstance(error, NoArgsIsHelpError) else error.format_message()
        raise SpecError(f"command line: {said.rstrip('.')}; see {there} --help") from None


def show(text: str, nl: bool = True) -> None:
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        os._exit(0)  # the reader of our output has closed it
    except OSError as error:
        raise Unavailable(
            f"Cannot write to standard output ({error.strerror}); free some space there, and run again."
        ) from error
