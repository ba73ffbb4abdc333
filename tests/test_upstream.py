"""What we rely on in other people's code: where it has moved or changed, a test fails with a sentence that says what breaks.

What is told by digest is of packages whose version pyproject.toml pins, so it changes with the pin alone. The sources of Unsloth
and bitsandbytes are read as text: those that `make test` brings, or those that are installed. NCCL's variable is looked for in
torch's header.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import io
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.upstream import OVERRIDDEN, PRIVATE, SET, TEXTS, digest, known, private_names

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402 - behind importorskip


@pytest.mark.parametrize("address", known())
def test_code_that_we_rely_on_is_as_it_was_read(address: str) -> None:
    before, why = known()[address]
    package = address.partition(".")[0]
    try:
        found = digest(resolve_name(address))
    except (ImportError, AttributeError):
        pytest.fail(f"{address} is gone in {package} {version(package)}; {why}")
    assert found == before, f"{address} changed in {package} {version(package)}; {why}. Read it, then note {found}"


FAMILIES = {
    "gemma3.modeling_gemma3:Gemma3Model": "self.get_image_features(",
    "llava.modeling_llava:LlavaModel": "self.get_image_features(",
    "qwen2_vl.modeling_qwen2_vl:Qwen2VLModel": "self.get_image_features(",
    "qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLModel": "self.get_image_features(",
    "qwen3_vl.modeling_qwen3_vl:Qwen3VLModel": "deepstack_features",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_ask_for_the_features_of_pictures_by_the_name_that_is_replaced(family: str) -> None:
    forward = inspect.getsource(resolve_name(f"transformers.models.{family}.forward"))
    for text in ("self.get_image_features(", ".pooler_output", FAMILIES[family]):
        assert text in forward, f"{family}.forward has no {text}: patches/image_features.py replaces what is not called"


def test_llamas_vision_layers_are_still_left_out_of_gradient_checkpointing() -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.models.mllama.modeling_mllama import MllamaVisionEncoderLayer

    needless = "transformers does it itself: remove patches/mllama_checkpointing.py"
    assert not issubclass(MllamaVisionEncoderLayer, GradientCheckpointingLayer), needless


def test_lora_trainer_overrides_and_sets_nothing_else_of_upstreams() -> None:
    trainer = pytest.importorskip("job.train.trainer")
    from torch.utils.data import dataloader as torch_loader

    upstream = trainer.SFTTrainer.__mro__
    own = {name for name in vars(trainer.LoraTrainer) if not name.startswith("__")}
    overridden = {name for name in own if any(name in vars(each) for each in upstream)}
    assert overridden <= OVERRIDDEN, f"LoraTrainer overrides {overridden - OVERRIDDEN}: list it, or choose another name"
    assert overridden >= OVERRIDDEN, (
        f"upstream has no {OVERRIDDEN - overridden} any more: LoraTrainer's is never called"
    )
    assigned = re.compile(r"self\.(\w+)(?:, self\.\w+)*(?:: [^=\n]+)? [+]?= ")
    theirs = {name for each in upstream[:-1] for name in re.findall(r"self\.(\w+)", inspect.getsource(each))}
    ours = set(assigned.findall(inspect.getsource(trainer.LoraTrainer)))
    assert ours & theirs == SET, f"LoraTrainer and its base use {(ours & theirs) ^ SET} for two things, or one no more"
    sources = "".join(inspect.getsource(each) for each in (*upstream[:-1], torch_loader))
    for name in SET | PRIVATE["train"]:
        assert f"self.{name}" in sources, (
            f"upstream's trainers or torch's loader know no {name} any more; see job/train"
        )


def test_an_attention_by_name_reaches_the_towers() -> None:
    """patches/mllama_attention.py and patches/unsloth_flex_attention.py set `_attn_implementation`."""
    config = pytest.importorskip("transformers").MllamaConfig()
    config._attn_implementation = "sdpa"
    names = {
        config._attn_implementation,
        config.vision_config._attn_implementation,
        config.text_config._attn_implementation,
    }
    assert names == {"sdpa"}, "a configuration does not hand `_attn_implementation` on to its towers any more"


def test_steps_of_a_buffer_can_be_taken_back() -> None:
    """`Steps._undo` of job/model/decoding.py, whose graphs hold the addresses of these tensors."""
    decoding = pytest.importorskip("job.model.decoding")
    buffer, made = decoding.Buffer(4), torch.arange(6.0).view(1, 1, 3, 2)
    buffer.update(made, made)
    held = [buffer.keys.data_ptr(), buffer.values.data_ptr(), buffer.cumulative_length.data_ptr()]
    buffer.update(made[:, :, :1] - 9, made[:, :, :1])
    buffer.cumulative_length.sub_(1)
    keys, _ = buffer.update(made[:, :, :1] + 9, made[:, :, :1])
    assert int(buffer.cumulative_length) == 4, "StaticLayer does not count by `cumulative_length` any more"
    assert keys[0, 0, 3].tolist() == [9, 10], "StaticLayer does not write where `cumulative_length` says any more"
    now = [buffer.keys.data_ptr(), buffer.values.data_ptr(), buffer.cumulative_length.data_ptr()]
    assert now == held, "StaticLayer makes its tensors anew: a graph would write to those of before"
    assert decoding.Pictures().is_compileable, (
        "a cache layer says otherwise than by `is_compileable` that it fits a graph"
    )


def test_inputs_of_generation_are_prepared_by_the_method_that_is_wrapped() -> None:
    """patches/compile_stance.py sets torch's stance there."""
    generation = inspect.getsource(resolve_name("transformers.generation.utils:GenerationMixin._sample"))
    assert "self.prepare_inputs_for_generation(" in generation, "generate prepares its inputs in another way"


def test_weights_that_wait_elsewhere_are_known_with_other_hooks_behind_accelerates() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    from accelerate import cpu_offload
    from accelerate.utils import align_module_device

    from job.model.transformers_backend import waits

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert not any(map(waits, model))
    cpu_offload(model, torch.device("cpu"))
    for _ in range(2):
        assert all(map(waits, model)), (
            "a weight that accelerate brings for each forward waits on another device than meta"
        )
        hooks.add_hook_to_module(model[0], hooks.ModelHook(), append=True)
    with align_module_device(model[1]):
        assert not waits(model[1])


def test_torchrun_takes_signals_and_its_patience_from_where_they_are_set() -> None:
    """job/torchrun.py."""
    from torch.distributed import run

    arguments = run.parse_args(["script"])  # type: ignore[no-untyped-call]
    assert "SIGTERM" in arguments.signals_to_handle.split(","), "torchrun names its signals in another way"
    for module in ("torch.distributed.launcher.api", "torch.distributed.elastic.multiprocessing.api"):
        assert "_SIGNALS_TO_HANDLE" in inspect.getsource(importlib.import_module(module))
    patience = inspect.getsource(importlib.import_module("torch.distributed.launcher.api"))
    assert '"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"' in patience, "torchrun kills workers after 30 s, whatever the grace"


def test_variables_that_are_set_for_libraries_are_read_by_them() -> None:
    """job/distributed/allreduce.py, and job/train/trainer.py, where other ranks than the first have no KubeflowCallback."""
    nccl = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d" / "ProcessGroupNCCL.hpp"
    assert '"TORCH_NCCL_ASYNC_ERROR_HANDLING"' in nccl.read_text(), "torch would abort a rank whose peer is gone"
    kubeflow = inspect.getsource(resolve_name("transformers.integrations:is_kubeflow_available"))
    assert '"KUBEFLOW_TRAINER_SERVER_URL"' in kubeflow, "a TrainJob would show no progress: docs/kubernetes.md"
    arguments = inspect.getsource(resolve_name("transformers:TrainingArguments"))
    assert "is_kubeflow_available()" in arguments, "upstream no longer adds its KubeflowCallback by itself"


@pytest.mark.parametrize(("file", "text", "why"), TEXTS)
def test_packages_for_a_gpu_say_what_we_read_in_them(file: str, text: str, why: str) -> None:
    folder = ROOT / "build" / "unsloth"
    if not folder.exists():
        found = importlib.util.find_spec(file.partition("/")[0])
        if found is None or found.origin is None:
            pytest.skip("make test brings Unsloth")
        folder = Path(found.origin).parents[1]
    assert text in (folder / file).read_text(), f"{file} has no {text!r} any more: {why}"


def test_a_body_of_s3_is_read_past_botocore_and_urllib3() -> None:
    """job/store/download.py fills its own buffers; through both each byte would be copied twice more."""
    import urllib3
    from botocore.response import StreamingBody

    from job.store.download import _release, _source

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"body")

        def log_message(self, *_: Any) -> None: ...

    with (
        HTTPServer(("127.0.0.1", 0), Answer) as server,
        urllib3.HTTPConnectionPool("127.0.0.1", server.server_port) as pool,
    ):
        threading.Thread(target=server.handle_request, daemon=True).start()
        answer = pool.request("GET", "/", preload_content=False)
        body, view = StreamingBody(answer, 4), bytearray(4)
        source = _source(body)
        assert isinstance(source, HTTPResponse), (
            "`_raw_stream` of botocore or `_fp` of urllib3 has another name: slower reads"
        )
        assert (source.readinto(view), bytes(view)) == (4, b"body")
        _release(body)
        assert answer.connection is None, "connections to the store are not used again any more"


def test_a_request_to_s3_holds_its_body_and_headers_where_they_are_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_plain_body` of job/store/s3.py."""
    from botocore.awsrequest import AWSResponse

    from job.store.connection import connect

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    client, sent = connect(), list[Any]()

    def answer(request: Any, **_: Any) -> AWSResponse:
        sent.append(request)
        return AWSResponse(request.url, 200, {}, SimpleNamespace(stream=lambda: iter([b""]), read=lambda: b""))

    client.meta.events.register("before-send.s3", answer)
    client.put_object(Bucket="bucket", Key="key", Body=b"bytes")
    client.close()
    assert sent[0].body == b"bytes", "botocore makes a file of bytes elsewhere than `before-call` sees: slower writes"
    assert "Expect" not in sent[0].headers, "botocore waits for leave to send; `before-call` does not see the header"


def test_pillow_has_no_bound_of_its_own() -> None:
    """job/data/images.py sets `Image.MAX_IMAGE_PIXELS`; a warning is an error here."""
    images = pytest.importorskip("job.data.images")
    assert images.Image.MAX_IMAGE_PIXELS is None, "another import sets a bound again"
    data = b"P5 20000 20000 255\n"
    assert images.Image.open(io.BytesIO(data)).size == (20000, 20000)


def test_tarfile_forgets_headers_and_goes_on() -> None:
    """job/data/webdataset.py empties `members`, or a shard's headers would fill memory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in "abc":
            archive.addfile(tarfile.TarInfo(name))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        names = list[str]()
        for member in archive:
            names.append(member.name)
            assert archive.members == [member], (  # type: ignore[attr-defined]
                "tarfile keeps its headers elsewhere than in `members`"
            )
            archive.members = []  # type: ignore[attr-defined]
    assert names == ["a", "b", "c"], "tarfile passes files over where `members` was emptied"


def test_private_names_of_others_are_used_where_they_are_listed_alone() -> None:
    rooms: dict[str, set[str]] = {}
    for file in (ROOT / "job").rglob("*.py"):
        if names := private_names(file):
            rooms.setdefault(file.relative_to(ROOT / "job").parts[0], set()).update(names)
    assert rooms == PRIVATE, "use a public name instead, or list the private one and have a test fail when it changes"


def test_contributing_lists_each_patch() -> None:
    files = {file.name for file in (ROOT / "job" / "model" / "patches").glob("*.py")} - {"__init__.py"}
    listed = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(files)
    for name in files:
        text = ast.get_docstring(ast.parse((ROOT / "job" / "model" / "patches" / name).read_text())) or ""
        assert all(f"\n{word}" in text for word in ("Why: ", "Upstream: ", "May go: ")), (
            f"{name} does not say why, or until when"
        )


Layer = Callable[..., Any]


@pytest.fixture
def ran() -> list[int]:
    """Grows by one with each run of compiled code."""
    return []


@pytest.fixture
def layer(ran: list[int]) -> Iterator[Layer]:
    """A function that torch.compile wraps."""

    def backend(graph: Any, _inputs: Any) -> Layer:
        def run(*arguments: Any) -> Any:
            ran.append(1)
            return graph.forward(*arguments)

        return run

    torch._dynamo.reset()
    torch.compiler.set_stance("default")  # a model that another test loaded in this process has set its own
    yield torch.compile(lambda x: torch.sin(x) * x, backend=backend, dynamic=True, fullgraph=True)
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def gradient(layer: Layer, recomputing: bool) -> Any:
    x = torch.linspace(0, 1, 12, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False) if recomputing else layer(x)
    y.sum().backward()
    return x.grad


def test_force_eager_runs_what_torch_compile_wraps_as_it_is_written(layer: Layer, ran: list[int]) -> None:
    """`job.model.patches.compile_stance` leaves it to torch's stance whether Unsloth's functions compile, full graphs and
    layers that are recomputed in the backward too."""
    for recomputing in (False, True):
        with torch.compiler.set_stance("force_eager"):
            eager = gradient(layer, recomputing)
        assert ran == [], "force_eager compiles: job.model.patches.compile_stance must find another way"
        assert torch.allclose(gradient(layer, recomputing), eager)
        assert len(ran) == 1 + recomputing, (
            "the stance before it does not come back, or no layer is recomputed compiled"
        )
        ran.clear()


def test_the_stance_is_that_of_all_threads(layer: Layer, ran: list[int]) -> None:
    """On a GPU the backward, and so what is recomputed, runs in threads of torch's own."""

    def in_a_thread() -> None:
        thread = threading.Thread(target=layer, args=(torch.ones(3),))
        thread.start()
        thread.join()

    with torch.compiler.set_stance("force_eager"):
        in_a_thread()
    assert ran == [], "a thread has a stance of its own: recomputed layers would compile"
    in_a_thread()
    assert ran == [1]
