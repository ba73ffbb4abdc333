"""What we rely on in other people's code, each with a sentence that says what breaks where it has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402 - behind importorskip

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
    """`job.model.compiling` leaves it to torch's stance whether Unsloth's functions compile, full graphs and layers that are
    recomputed in the backward too."""
    for recomputing in (False, True):
        with torch.compiler.set_stance("force_eager"):
            eager = gradient(layer, recomputing)
        assert ran == [], "force_eager compiles: job.model.compiling must find another way"
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
