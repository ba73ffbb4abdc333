"""Answers about pictures with a published model, which sees them as in training."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from job.config.environment import Environment
from job.config.schema import JobSpec
from job.errors import DataError, NoHub, SpecError
from job.layout import ADAPTER, MERGED, RESULT_KEY
from job.model.base_model import ADAPTER_FILES, fetch_base
from job.model.header import read_header
from job.output.stored import published_folders, read_published
from job.prefetch import use_bundle
from job.runtime.scratch import prepare_scratch
from job.runtime.staging import local_path
from job.store import open_store

log = logging.getLogger("job")


class Request(NamedTuple):
    """What the command line asks for; None takes what the output says."""

    weights: str | None = None
    instruction: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Published:
    """What an output says of its model: the `spec`, the folder of `weights` to use, the `instruction`, the limits of pictures
    (fields of `job.data.images.Bounds`) and the precision that was measured in."""

    spec: JobSpec
    weights: str
    instruction: str
    bounds: dict[str, Any]
    precision: str


def predict(output: str, images: Sequence[str], request: Request, environment: Environment) -> Iterator[dict[str, str]]:
    """Yield `{"image", "answer"}` for each image (a file, DICOM included, or a URL) in order, or `{"image", "error"}` if it
    cannot be read.

    Raises DataError at the end if there was any such image, or at once for an output without a published model; SpecError for
    weights, a base or an instruction that are not there.
    """
    published = look_up(output, request)
    scratch = prepare_scratch(environment, os.environ)
    use_bundle(published.spec, "" if request.base else environment.bundle, scratch)
    folder = local_path(f"{output.rstrip('/')}/{published.weights}", scratch, "OUTPUT", DataError)
    from job.evaluate.generate import answer, micro_batches

    loaded = _load(published, folder, scratch, environment)
    most, size = published.spec.evaluation.max_new_tokens, published.spec.evaluation.batch
    micro, bad = micro_batches(loaded, size, "predict"), list[str]()
    for start in range(0, len(images), size):
        found = [(image, _row(image, published, loaded.processor, scratch)) for image in images[start : start + size]]
        rows = [row for _, row in found if not isinstance(row, str)]
        answers = iter(micro.map(rows, lambda part: answer(loaded, list(part), most)))
        for image, row in found:
            if isinstance(row, str):
                bad.append(f"{image}: {row}")
                yield {"image": image, "error": row}
            else:
                yield {"image": image, "answer": next(answers)[0]}
    if bad:
        raise DataError(bad[0] if len(images) == 1 else f"{len(bad)} of {len(images)} images: {'; '.join(bad)}")


def look_up(output: str, request: Request) -> Published:
    """Read what the output says of its model. Raises DataError and SpecError as `predict` does."""
    result, spec = read_published(open_store(output), output)
    said = result.get("measured_with")
    if said is None:
        raise DataError(f"{output}: {RESULT_KEY} does not say how pictures were prepared; publish it with this version")
    there = published_folders(result, (MERGED, ADAPTER))
    weights = request.weights or there[0]
    if weights not in there:
        raise SpecError(f"--weights {weights}: {output} has only {' and '.join(there)}; leave the option out")
    instruction = request.instruction or said["instruction"]
    if instruction is None:
        raise SpecError(f"--instruction is missing: each row of {spec.dataset.path} had its own")
    if request.base:
        base = {"name_or_path": request.base, "revision": None}
        spec = spec.model_copy(update={"model": spec.model.model_copy(update=base)})
    return Published(spec, weights, instruction, said["image_bounds"], said["precision"])


def _load(published: Published, folder: Path, scratch: Path, environment: Environment) -> Any:
    """Load the published `folder`: merged weights, or the adapter on its base. Returns `Loaded`."""
    from transformers import GenerationConfig

    from job.model.load import avoid_cudnn_attention
    from job.model.loaded import Loaded
    from job.model.memory_model import served_precision
    from job.model.transformers_backend import load_processor, load_weights
    from job.planning.survey import find_device, keep_within, torch_device

    spec, merged, device = published.spec.model, published.weights == MERGED, torch_device()
    here = find_device(has_torch=True, granted_gb=environment.gpu_memory_gb)
    if here.kind == "cuda":
        keep_within(here)
    precision = published.precision
    if merged or here.kind != "cuda":
        precision = served_precision(precision)
    try:
        base = folder if merged else fetch_base(spec, scratch)
    except SpecError as error:
        why = f"{error.missing}, and the hub cannot be reached from here" if isinstance(error, NoHub) else str(error)
        raise SpecError(f"{why}; name the base model of this adapter with --base") from error
    log.info("%s%s, %s, on %s", folder, "" if merged else f" on {spec.name_or_path}", precision, here.name)
    avoid_cudnn_attention()
    model = load_weights(spec, base, device, precision)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    if not merged:
        model = _adapted(model, folder, spec.name_or_path)
    return Loaded(model.eval(), load_processor(spec, folder), folder, "transformers", precision, device, {})


def _adapted(model: Any, folder: Path, base: str) -> Any:
    """Put the adapter in `folder` on its base. Raises SpecError if any of its tensors has no place there."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = PeftModel.from_pretrained(model, folder)
            missing = read_header(folder / ADAPTER_FILES[1])[0].keys() - get_peft_model_state_dict(model).keys()
    except (RuntimeError, ValueError):
        missing = {"all"}
    if missing:
        raise SpecError(f"{folder} is no adapter of {base}; name its base model with --base")
    return model


def _row(image: str, published: Published, processor: Any, scratch: Path) -> Any:
    """Return an image as a row with its question, or the reason why it cannot be read."""
    from job.data.conversations import conversation, repeat_images
    from job.data.images import WEB, Bounds, Files, load
    from job.data.pixels import BadRow
    from job.model.token_length import TokenCounter

    spec = published.spec.dataset
    hosts = tuple(host.lower() for host in spec.image_hosts)
    bounds, fetched = Bounds(**published.bounds), scratch / "fetched" / "images"
    files = Files(None, fetched, None, bounds, published.spec.privacy, hosts)
    path = image if image.startswith(WEB) else str(Path(image.removeprefix("file://")).absolute())
    try:
        pictures = load({"path": path}, files, spec)
        messages = repeat_images(
            conversation(published.instruction, ".", spec.system_prompt), [len(pictures)], spec.dicom.frames
        )
        TokenCounter(processor, responses_only=False)(messages, [picture.size for picture in pictures])
    except (BadRow, DataError) as reason:
        return str(reason)
    return {"id": image, "messages": messages, "images": pictures}
