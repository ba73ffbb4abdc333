"""Starts a real server on the folders to publish, and refuses them unless it answers as was measured.

Weights, tokenizer, template, image processor and generation settings are read by another program here, and the user's own image
files go through its code. Each row of the gate is asked about twice, over the OpenAI-compatible interface:

- with its true answer as the last turn. vLLM returns the prompt's tokens and their log-probabilities (`prompt_logprobs`), so
  that every token of the answer is compared at the same place, however early a greedy answer would have departed.
- without it, at `temperature` 0. The greedy answer must be the one that was measured, and end there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from job.config.environment import Environment
from job.config.schema import JobSpec, ServeSpec
from job.errors import GateRefused, SpecError
from job.export.engines import MODEL, MODULE, Served, serves, vllm
from job.export.gate import Reference, least_agreement
from job.export.questions import Agreement, Asked, ask_all
from job.export.server import running
from job.export.serving import Serving
from job.layout import ADAPTER, MERGED
from job.model.collator import adds_first_token
from job.model.families import family_of
from job.model.loaded import Loaded
from job.model.memory_model import served_precision

KEPT = 0.1
"""How far from 1 the served share of the adapter's effect may be."""
DEPARTED = 0.25
"""Share of greedy answers that may depart. Rounding changes few; a wrong template, stop token or generation setting most."""
FOR_THE_GATE = ("--enforce-eager", "--max-num-seqs", "4")
"""Options for a server that is asked one by one and not for long: without minutes of compilation."""
FREE = 0.9
"""Share of the GPU's free memory that the server may take."""
MakeCommand = Callable[[Served, tuple[str, ...]], list[str]]
VERSION = "from importlib.metadata import version; print(version('vllm'))"


def interpreter(serve: ServeSpec, variables: Mapping[str, str]) -> str:
    """Return the Python that has the server. Raises SpecError if none is named."""
    python = serve.python or Environment.read(variables).serve_python
    if not python:
        raise SpecError(
            f"export.serve.python: name the Python of an environment with {serve.engine}, here or in JOB_SERVE_PYTHON"
        )
    return python


def server_version(serve: ServeSpec, python: str) -> str:
    """Return the version of the server that `python` has. Raises SpecError."""
    try:
        asked = subprocess.run([python, "-c", VERSION], capture_output=True, text=True, check=True, timeout=60, cwd="/")
    except (OSError, subprocess.SubprocessError) as error:
        raise SpecError(
            f"export.serve.python: {python} is no Python with {serve.engine}; name one, or remove export.serve.engine"
        ) from error
    return asked.stdout.strip()


def folders_to_serve(spec: JobSpec, loaded: Loaded, folders: Mapping[str, Path]) -> Iterator[Served]:
    """Yield what a server is to load: merged weights, and the adapter if vLLM is known to serve it whole."""
    precision = served_precision(loaded.precision)
    length = spec.training.max_length + spec.evaluation.max_new_tokens
    yield Served(folders[MERGED], precision, length)
    servers = family_of(loaded.model.config.model_type).servers
    if any(server.name == "vLLM" and serves(server, folders[ADAPTER]) for server in servers):
        yield Served(folders[ADAPTER], precision, length, str(loaded.folder))


def refuse_served(found: Agreement, what: str, spec: JobSpec, reference: Reference) -> None:
    """Raises GateRefused with every bound that the answers from the folder `what` violate."""
    serve, gate = spec.export.serve, spec.export.gate
    rounding = gate.rounding_allowance * reference.moved / reference.scale
    most = max(gate.max_mean_logit_difference, rounding) * reference.scale
    least = least_agreement(serve.min_agreement, gate, reference.agreed, found.tokens)
    reasons = []
    if found.other_prompts:
        reasons.append(f"{found.other_prompts} of {found.rows} conversations are written in other tokens")
    if not found.token_agreement >= least:
        reasons.append(
            f"token agreement {found.token_agreement:.4f} is under {least:.4f}, the least that is allowed "
            f"(export.serve.min_agreement {serve.min_agreement:g}, rounding, and one token)"
        )
    if not found.logprob_difference <= most:
        reasons.append(
            f"log-probabilities differ by {found.logprob_difference:.3f} nats on average, where {most:.3f} are allowed"
        )
    if found.effect_kept is not None and abs(1 - found.effect_kept) > KEPT:
        reasons.append(f"{found.effect_kept:.0%} of the adapter's effect is served")
    if found.greedy_departed > DEPARTED * found.greedy:
        reasons.append(f"{found.greedy_departed} of {found.greedy} greedy answers are others, or end elsewhere")
    if reasons:
        raise GateRefused(
            f"{found.server} does not answer from {what}/ as was measured: {'; '.join(reasons)}; only the adapter is kept"
        )


def ask_server(
    spec: JobSpec,
    loaded: Loaded,
    serving: Serving,
    reference: Reference,
    rows: Sequence[Asked],
    served: Served,
    command: MakeCommand = vllm,
) -> Agreement:
    """Start a server on a folder of the export, ask it about the rows and stop it. Raises GateRefused if it does not start or
    answer."""
    serve, processor = spec.export.serve, loaded.processor
    python = interpreter(serve, os.environ)
    version, what = server_version(serve, python), served.folder.name
    words = [*command(served, (python, *MODULE)), *FOR_THE_GATE, *_memory(loaded)]
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "return_token_ids": True}
    if serving.date is not None:
        options["chat_template_kwargs"] = {"date_string": serving.date}
    if adds_first_token(processor):
        options["add_special_tokens"] = True
    try:
        with running(words, served.folder.parent / "server", serve.seconds, os.environ) as ask:
            return replace(ask_all(ask, rows, options, loaded, spec, reference), server=f"vLLM {version}")
    except GateRefused as error:
        raise GateRefused(f"vLLM {version} on {what}/: {error}; only the adapter is kept") from error


def _memory(loaded: Loaded) -> list[str]:
    """Return the option with the share of the GPU that the server may take, which shares it with this process."""
    if loaded.device.type != "cuda":
        return []
    free, whole = torch.cuda.mem_get_info(loaded.device)
    return ["--gpu-memory-utilization", f"{FREE * free / whole:.2f}"]
