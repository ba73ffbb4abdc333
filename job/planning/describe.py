"""Formats a plan for people, with the needs of all stages as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from job.config.schema import JobSpec
from job.data.facts import DataFacts
from job.evaluate.metric_info import choosing
from job.model.families import TRANSFORMERS, family_of
from job.model.memory_model import weight_bytes
from job.planning.compile import can_compile, compiling_text
from job.planning.device_memory import offload_seconds
from job.planning.facts import Facts
from job.planning.needs import Need, Range
from job.planning.plan import Plan
from job.planning.sharding import sharding_text
from job.runtime.limits import Limits
from job.runtime.status import bytes_text

COLUMNS = ("GPU memory", "host memory", "scratch", "output")
KEPT_TEXT = {
    "all": "all activations (nothing is recomputed)",
    "inputs": "the layers' inputs (the rest is recomputed)",
    "nothing": "nothing (the layers' inputs are offloaded to host memory, the rest is recomputed)",
}


def describe(spec: JobSpec, plan: Plan, facts: Facts, *, example: bool = False) -> str:
    """Formats the plan for people; with `example`, including what a row says, for a viewer who may see that."""
    lines = [f"plan for {spec.name} → {spec.output.url}"]
    lines += [f"  {stage.name:<16} {stage.action:<7} {stage.detail}" for stage in plan.stages]
    if facts.data is not None:
        lines += _describe_data(facts.data)
    batch = spec.training.effective_batch_size
    devices = f" × {plan.world} devices" if plan.world > 1 else ""
    lines.append(f"batch: {batch} = micro-batch {plan.micro_batch} × {plan.accumulation} accumulated{devices}")
    lines.append(f"answers: batches of {plan.answer_batch} rows")
    if facts.base is not None:
        base = facts.base
        lines.append(f"base model: {base.architecture}, {base.parameters:,} parameters, held in {plan.precision}")
        lines.append(f"merged weights are served by: {_servers(base.model_type)}")
        if plan.shards > 1:
            lines.append(sharding_text(base, plan.precision, plan.shards, plan.accumulation))
    if plan.groups:
        trained = sum(plan.groups.values())
        share = f" ({100 * trained / facts.base.parameters:.2f} % of the base)" if facts.base else ""
        lines.append(f"LoRA: {trained:,} trainable parameters{share}")
        lines += [f"  {group:<20} {count:>12,}" for group, count in plan.groups.items()]
    if facts.base is not None and plan.left_alone:
        shares = (f"{kind} {100 * size / facts.base.parameters:.2g} %" for kind, size in plan.left_alone.items())
        lines.append(f"  without adapters: {', '.join(shares)} of the base")
    if facts.base is not None and facts.device is not None and facts.device.kind == "cuda":
        lines.append(f"kept on the GPU for the backward pass: {KEPT_TEXT[plan.kept]}")
    if plan.gate_room is not None and facts.base is not None:
        weights = weight_bytes(facts.base, "16bit")
        lines.append(
            f"gate: the GPU holds {bytes_text(plan.gate_room)} of {bytes_text(weights)} of 16-bit weights; reading the others "
            f"from host memory takes about {offload_seconds(spec, weights, plan.gate_room):.0f} s in all"
        )
    if can_compile(spec, facts):
        lines.append(compiling_text(spec, facts, plan.total_steps))
    lines += [f"estimate: {name} {bytes_text(size)}" for name, size in plan.estimates.items()]
    lines += describe_needs(plan.foreseen.needs, facts.limits, plan.device_memory)
    if spec.export.merged and not plan.foreseen.scratch_copy:
        lines.append("merged weights go straight to the output")
    if facts.device is not None:
        lines.append(f"device: {facts.device.name}, {bytes_text(facts.device.memory)}")
    if facts.example is not None and (example or not spec.privacy.report_images):
        lines += ["example (the loss is taken over ⟦…⟧ only):", *(f"  {line}" for line in facts.example.splitlines())]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def _describe_data(data: DataFacts) -> list[str]:
    lines = [
        f"data: {data.rows} rows ({data.source}): {data.train} to train on, "
        f"{data.evaluation} held out, {data.quarantined} set aside"
    ]
    if data.looked_at is not None:
        lines[0] += f"; estimated from {data.looked_at} rows (check --data validates all)"
    lines += [f"  held out: {data.held_out_source}"] if data.held_out_source is not None else []
    if data.validation is not None:
        lines.append(f"  {choosing(data.validation, data.validation_groups or 0)}")
    lines += [f"  set aside: {count} × {reason}" for reason, count in data.reasons.items()]
    if data.burned_in_masked:
        lines.append(f"  text painted over in the images of {data.burned_in_masked} rows")
    if (images := data.images) is not None:
        sizes = {"smallest": images.smallest, "median": images.median, "largest": images.largest}
        named = ", ".join(f"{name} {width}×{height}" for name, (width, height) in sizes.items())
        lines.append(f"  images: {images.count}, {named}")
    if (shrunk := data.shrunk) is not None:
        change = " to ".join(f"{width}×{height}" for width, height in (shrunk.whole, shrunk.shrunk))
        lines.append(f"  shrunk before the model's processor: {shrunk.count}, the median one from {change}")
        if shrunk.tokens is not None:
            lines[-1] += f", which takes its row from {shrunk.whole_tokens} to {shrunk.tokens} tokens"
    if data.tokens is not None:
        lines.append(f"  tokens per row: median {data.tokens.median}, longest {data.tokens.longest}")
    return lines


def _servers(model_type: str) -> str:
    """Names the servers that load this family, and those that do not, with the reason."""
    known = family_of(model_type).servers or (TRANSFORMERS,)
    able = [f"{server.name} {server.versions}" for server in known if server.versions]
    unable = [f"{server.name} does not ({server.note})" for server in known if not server.versions]
    return "; ".join([", ".join(able), *unable])


def describe_needs(needs: Sequence[Need], limits: Limits | None, device: Mapping[str, int]) -> list[str]:
    """Returns one line per stage with its estimated needs, margins included, and a last line with what is free here. `device`
    holds the GPU memory of stages that use a GPU. Empty if no need is known."""
    if not needs:
        return []
    rows = [
        (need.stage, size_text(device.get(need.stage)), *(bytes_text(each.most) for each in sizes_of(need)))
        for need in needs
    ]
    if limits is not None:
        disks = [bytes_text(each.room) if each else "unknown" for each in (limits.scratch, limits.output)]
        rows.append(("free here", "", bytes_text(limits.memory.free), *disks))
    head = ("needs", *COLUMNS)
    return [f"{head[0]:<18}" + "".join(f"{name:>13}" for name in head[1:])] + [
        f"  {row[0]:<16}" + "".join(f"{size:>13}" for size in row[1:]) for row in rows
    ]


def foreseen_bytes(needs: Sequence[Need], device: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Returns the same as numbers: by stage, bytes of `host`, `scratch` and `output`, and of `device` if there is a GPU."""
    found = {
        need.stage: dict(zip(("host", "scratch", "output"), (each.most for each in sizes_of(need)), strict=True))
        for need in needs
    }
    for stage, size in device.items():
        found.setdefault(stage, {})["device"] = size
    return found


def sizes_of(need: Need) -> tuple[Range, Range, Range]:
    return need.memory, need.scratch, need.output


def size_text(size: int | None) -> str:
    return bytes_text(size) if size else ""
