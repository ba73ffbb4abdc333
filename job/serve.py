"""The commands that serve a published model, for every server that loads its family."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from job.config.environment import Environment
from job.config.schema import JobSpec
from job.errors import DataError, SpecError
from job.export.engines import MODEL, MODULE, Served, llama_cpp, serves, sglang, vllm
from job.layout import ADAPTER, FACTS_KEY, MERGED
from job.model.families import Server, family_of
from job.output.stored import published_folders, read_json, read_published
from job.runtime.scratch import prepare_scratch
from job.runtime.staging import local_path
from job.store import open_store

ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp"}
"""Servers by the name that the command line takes."""
GGUF = "gguf"


class Command(NamedTuple):
    """A command that serves the folder `weights` with the server `engine`, a key of `ENGINES`."""

    engine: str
    weights: str
    server: Server
    words: list[str]


class Published(NamedTuple):
    """What an output says of its model. `unwritten` names what no file of it tells a server; `base` is where the base model of
    the adapter is."""

    spec: JobSpec
    there: list[str]
    model_type: str
    precision: str
    unwritten: list[str]
    base: str


def look_up(output: str, base: str | None) -> Published:
    """Read what the output says of its model. Raises DataError if it holds no published model."""
    store = open_store(output)
    result, spec = read_published(store, output)
    facts = read_json(store, FACTS_KEY)
    if facts is None:
        raise DataError(f"{output} holds no {FACTS_KEY}, which its job wrote; restore it")
    there = published_folders(result, (MERGED, ADAPTER, GGUF))
    precision = (result.get("measured_with") or {}).get("precision", "16bit")
    source = base or spec.model.name_or_path
    return Published(spec, there, facts["base"]["model_type"], precision, facts.get("unwritten") or [], source)


def commands(output: str, base: str | None, environment: Environment) -> tuple[Published, list[Command]]:
    """Return what `look_up` does, and a command for each server that loads a folder of the output. An output in a store is
    fetched to scratch."""
    found = look_up(output, base)
    scratch = prepare_scratch(environment, os.environ)
    made = []
    for weights in found.there:
        folder = local_path(f"{output.rstrip('/')}/{weights}", scratch, "OUTPUT", DataError)
        made += list(_commands(found, weights, folder.absolute(), environment))
    return found, made


def _commands(found: Published, weights: str, folder: Path, environment: Environment) -> Iterator[Command]:
    servers = {server.name: server for server in family_of(found.model_type).servers if server.versions}
    spec, adapter = found.spec, weights == ADAPTER
    length = spec.training.max_length + spec.evaluation.max_new_tokens
    local = Path(found.base)
    base = str(local.absolute()) if local.is_dir() else found.base
    served = Served(folder, found.precision, length, *((base, spec.model.revision) if adapter else ()))
    python = environment.serve_python
    program = (python, *MODULE) if python else ("vllm",)
    for engine, name in ENGINES.items():
        server = servers.get(name)
        if server is None or (adapter and not serves(server, folder)) or (weights == GGUF) != (engine == "llama.cpp"):
            continue
        words = {"vllm": lambda: vllm(served, program), "sglang": lambda: sglang(served)}
        yield Command(engine, weights, server, words.get(engine, lambda: llama_cpp(folder))())


def describe(found: Published, made: list[Command]) -> str:
    """Return the commands as a shell would take them, each after a comment. Raises DataError if there is none."""
    if not made:
        raise DataError(f"no server is known to load {found.model_type}; the code in the model card does")
    lines = []
    for each in made:
        tried = f"tried with {each.server.tried}" if each.server.tried else "not tried"
        lines += [
            f"# {each.weights}/ with {each.server.name}, {each.server.versions} ({each.server.source}); {tried}",
            shlex.join(each.words),
            "",
        ]
    lines.append(f'# In requests: "model": "{MODEL}" and "temperature": 0; a server samples otherwise.')
    lines += [f"# Requests must follow what no published file says: {what}." for what in found.unwritten]
    return "\n".join(lines)


def start(made: list[Command], engine: str | None, weights: str | None) -> NoReturn:
    """Become the server: the first one that was asked for. Raises SpecError if there is none, or if it is not installed."""
    fit = [each for each in made if engine in (None, each.engine) and weights in (None, each.weights)]
    if not fit:
        known = ", ".join(f"--engine {each.engine} --weights {each.weights}" for each in made) or "no server"
        raise SpecError(f"--run: no such command; this output has {known}")
    words = fit[0].words
    try:
        os.execvp(words[0], words)
    except OSError as error:
        raise SpecError(
            f"--run: {words[0]} cannot be started ({error.strerror}); install {fit[0].server.name} in an environment of its own, "
            "and put it in PATH or, for vLLM, name its Python in JOB_SERVE_PYTHON"
        ) from error
