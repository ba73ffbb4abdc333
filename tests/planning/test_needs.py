"""Needs from a spec and facts, and what is said where they do not fit. Numbers are those of Llama 3.2 11B Vision's shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.data.facts import DataFacts
from job.errors import SpecError
from job.layout import MERGING_KEY
from job.model.base_model import BaseFacts
from job.model.lora_targets import Linear
from job.planning.describe import describe
from job.planning.facts import Device, Facts
from job.planning.needs import DECODER_BYTES, MARGIN, PIECE, PIECES, SENT_AT_ONCE, SMALL
from job.planning.plan import Plan, apply_plan, make_plan
from job.planning.shortage import refuse
from job.runtime.limits import Disk, HostMemory, Limits

GB = 10**9
LAYERS = {f"model.language_model.layers.{n}.mlp.up_proj": Linear(14336, 4096) for n in range(40)}
BASE = BaseFacts("mllama", "Mllama", 10_670_000_000, 21_340_000_000, LAYERS, {}, largest=5 * GB, rest=20_000_000)
DATA = DataFacts(source="s", rows=110, train=100, evaluation=30, grouped=True)
CARD = Device("cuda", "RTX A6000", 48 * GB)
CPU = Device("cpu", "CPU", 256 * GB)
LORA = 40 * 16 * (14336 + 4096)
Spec = dict[str, Any]


def limits(
    memory: float = 64, scratch: float | None = 150, output: float | None = 100, devices: tuple[int, int] = (1, 2)
):
    there = [
        None if free is None else Disk(Path(name), int(free * GB), device)
        for name, free, device in (("/scratch", scratch, devices[0]), ("/output", output, devices[1]))
    ]
    return Limits(HostMemory(int(memory * GB), int(memory * GB), "memory.max of cgroup pod"), *there)


FACTS = Facts(data=DATA, base=BASE, device=CARD, limits=limits())


def plan(tree: Spec, facts: Facts = FACTS, **sections: Any) -> Plan:
    return make_plan(validate(tree | {"lora": {"target_modules": ["up_proj"]}} | sections), facts)


def need(found: Plan, stage: str) -> Any:
    return next(each for each in found.foreseen.needs if each.stage == stage)


def refused(found: Plan) -> str:
    with pytest.raises(SpecError) as raised:
        refuse(found.foreseen.shortages)
    return str(raised.value)


def test_constants_are_those_of_what_they_stand_for():
    from job.export import merge

    assert (PIECES, PIECE, SENT_AT_ONCE) == (merge.AHEAD + 1, merge.PIECE, merge.FILES)


def test_a_roomy_machine_is_told_nothing_and_shown_a_table(tree: Spec):
    found = plan(tree)
    assert found.foreseen.shortages == ()
    lines = describe(validate(tree), found, FACTS).splitlines()
    head = ["needs", "GPU", "memory", "host", "memory", "scratch", "output"]
    start = next(number for number, line in enumerate(lines) if line.split() == head)
    assert [line.split()[0] for line in lines[start + 1 : start + 8]][:2] == ["stage", "load"]
    assert lines[start + 8].split() == ["free", "here", "64.0", "GB", "150.0", "GB", "100.0", "GB"]


def test_processes_that_decode_dicom_are_counted_for_each_loader(tree: Spec):
    there = replace(FACTS, data=replace(DATA, decoders=2))
    for given, count in (("auto", 4), (0, 1)):
        more, less = (
            need(plan(tree, facts, training={"dataloader_num_workers": given}), "train") for facts in (there, FACTS)
        )
        assert more.memory.most - less.memory.most == pytest.approx(1.1 * count * DECODER_BYTES, rel=0.01)


def test_what_is_published_lies_in_scratch_and_then_in_the_output(tree: Spec):
    found = plan(tree)
    merged, adapter = BASE.bytes + BASE.rest, 4 * LORA + BASE.rest
    assert need(found, "export").scratch.least == pytest.approx(merged + adapter, abs=2 * BASE.rest)
    checkpoints = 1 * 12 * LORA + BASE.rest  # 39 steps are saved once, at the end
    assert need(found, "publish").output.least == merged + adapter + checkpoints
    assert need(found, "publish").output.most == int(MARGIN * (merged + adapter + checkpoints)) + SMALL


def test_smaller_formats_add_their_sizes(tree: Spec):
    language = 40 * 14336 * 4096
    rest = 2 * (BASE.parameters - language)
    sizes = {"merged_4bit": 0.516, "merged_fp8": 1.0, "merged_int4": 0.515625}
    plain = need(plan(tree), "publish").output.least
    for name, each in sizes.items():
        more = need(plan(tree, export={name: True}), "publish").output.least - plain
        assert more == pytest.approx(each * language + rest, rel=0.01)


@pytest.mark.parametrize(
    ("checkpoint", "during", "after"),
    [
        ({"save_steps": 100}, 1, 1),
        ({"save_steps": 5, "keep": 2}, 3, 2),
        ({"save_steps": 1, "keep": 1}, 2, 1),
    ],
)
def test_one_checkpoint_more_than_is_kept_lies_in_the_output_for_a_while(
    tree: Spec, checkpoint: Spec, during: int, after: int
):
    found = plan(tree, checkpoint=checkpoint, export={"merged": False})
    assert need(found, "train").output.least == during * 12 * LORA + BASE.rest
    assert need(found, "publish").output.least == after * 12 * LORA + 2 * BASE.rest + 4 * LORA


def test_what_is_sure_to_be_short_is_refused_and_what_may_be_is_a_warning(tree: Spec):
    least = need(plan(tree), "publish").output.least / GB
    at = {
        free: plan(tree, replace(FACTS, limits=limits(output=free)))
        for free in (0.99 * least, 1.05 * least, 1.2 * least)
    }
    short, tight, roomy = at.values()
    assert "output.url /output: publish needs at least 21." in refused(short)
    assert short.warnings[-1].startswith("run refuses this here: output.url /output")
    refuse(tight.foreseen.shortages)
    assert "output.url /output: publish needs up to 23." in tight.warnings[-1]
    assert roomy.foreseen.shortages == ()


def test_nothing_is_known_of_a_store(tree: Spec):
    assert plan(tree, replace(FACTS, limits=limits(output=None))).foreseen.shortages == ()


def test_scratch_and_output_on_one_disk_take_each_other_s_room(tree: Spec):
    apart = plan(tree, replace(FACTS, limits=limits(scratch=40, output=40)), export={"scratch_copy": True})
    assert apart.foreseen.shortages == ()
    one = replace(FACTS, limits=limits(scratch=40, output=40, devices=(1, 1)))
    assert refused(plan(tree, one, export={"scratch_copy": True})).startswith(
        "the disk of both scratch and output.url /output"
    )
    straight = plan(tree, one)  # which is large enough for merged weights once
    assert (straight.foreseen.scratch_copy, straight.foreseen.shortages) == (False, ())
    assert apply_plan(validate(tree), straight).export.scratch_copy is False
    assert apply_plan(validate(tree), straight).digest == validate(tree).digest


def test_weights_that_smaller_formats_are_made_from_stay_on_scratch(tree: Spec):
    small = replace(FACTS, limits=limits(scratch=20))
    assert plan(tree, small).foreseen.scratch_copy is False
    found = plan(tree, small, export={"merged_4bit": True})
    assert found.foreseen.scratch_copy is True
    assert "leave out export.merged_4bit, point JOB_SCRATCH at a larger disk" in refused(found)
    asked = plan(tree, small, export={"serve": {"engine": "vllm"}})
    assert "leave out export.serve.engine, point JOB_SCRATCH at a larger disk" in refused(asked)
    assert need(asked, "export").memory.most - need(plan(tree, small), "export").memory.most > 2e9


def test_what_an_earlier_attempt_wrote_is_not_needed_again(tree: Spec):
    """The disk holds two thirds of the merged weights, and has room for the last third."""
    there = {"merged": 2 * BASE.bytes // 3, "checkpoints": 12 * LORA + BASE.rest}
    small = replace(FACTS, limits=limits(output=8))
    assert "output.url" in refused(plan(tree, small))
    again = replace(small, written=there, checkpoints=(39,), keys=frozenset({MERGING_KEY}))
    assert not any(each.sure for each in plan(tree, again).foreseen.shortages)
    left = {"export/merged": BASE.bytes, "export/adapter": 4 * LORA}
    scratch = replace(FACTS, limits=limits(scratch=1), left=left, checkpoints=(39,))
    assert plan(tree, scratch, export={"scratch_copy": True}).foreseen.shortages == ()


def test_weights_pass_a_gpu_s_host_memory_as_cache_and_fill_that_of_a_cpu(tree: Spec):
    pod = limits(memory=8)
    assert plan(tree, replace(FACTS, limits=pod)).foreseen.shortages == ()
    found = plan(tree, replace(FACTS, device=CPU, limits=pod))
    said = refused(found)
    assert said.startswith("host memory (memory.max of cgroup pod: 8.0 GB): train needs at least 43.")
    assert "; set model.precision to 16bit, give the job more memory" in said


def test_one_model_at_a_time_is_in_memory_during_the_export(tree: Spec):
    found = plan(tree, replace(FACTS, device=CPU))
    assert need(found, "export").memory.least == need(found, "load").memory.least
    assert need(found, "export").memory.most < 1.1 * need(found, "load").memory.most


def test_rows_that_calibrate_int4_are_foreseen(tree: Spec):
    config = {"text_config": {"hidden_size": 4096}}
    facts = replace(FACTS, device=CPU, base=replace(BASE, config=config))
    plain, small = (
        need(plan(tree, facts, export={"merged_int4": asked}), "export").memory.most for asked in (False, True)
    )
    assert 0.5 * GB < small - plain < 20 * GB


def test_every_rank_of_a_node_holds_the_model(tree: Spec):
    one = need(plan(tree, replace(FACTS, device=CPU)), "load").memory.least
    two = need(plan(tree, replace(FACTS, device=CPU, world=2, on_this_node=2)), "load").memory.least
    assert two == 2 * one


def test_features_leave_the_export_its_room(tree: Spec):
    export = need(plan(tree), "export").scratch.most
    assert plan(tree).features == 75 * GB
    assert plan(tree, replace(FACTS, limits=limits(scratch=30))).features == 30 * GB - export
    given = {"vision_cache_gb": 10}
    assert plan(tree, training=given).features == 10 * GB
    assert plan(tree, replace(FACTS, limits=limits(scratch=30)), training=given).features == 30 * GB - export


def test_a_base_that_is_not_here_yet_is_fetched_to_scratch(tree: Spec):
    found = plan(tree, replace(FACTS, to_fetch=BASE.bytes))
    assert need(found, "stage in").scratch.least == BASE.bytes
    assert need(found, "export").scratch.least > 2 * BASE.bytes


def test_a_published_job_needs_nothing(tree: Spec):
    found = plan(tree, replace(FACTS, keys=frozenset({"RESULT.json"}), limits=limits(0.1, 0.1, 0.1)))
    assert (found.foreseen.needs, found.foreseen.shortages) == ((), ())


def test_a_cure_is_never_what_the_spec_has_already_or_forbids(tree: Spec):
    small = replace(FACTS, limits=limits(scratch=20, output=1))
    hub = {"scratch_copy": "auto", "hub": {"merged_repo": "clinic/chest"}}
    told = refused(plan(tree, small, export=hub))
    assert "leave out export.hub.merged_repo" in told
    assert "scratch_copy" not in told
    checkpoints = replace(FACTS, limits=limits(output=0.1))
    told = refused(plan(tree, checkpoints, export={"merged": False}))
    assert "output.url /output: train needs" in told or "publish needs" in told
    assert "export.merged" not in told
