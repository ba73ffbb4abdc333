"""What a user would otherwise write: Unsloth's vision notebook, unchanged but for its data, and a clock.

    python benchmarks/notebook.py MODEL DATA OUT --vision true --epochs 3 [--micro 2 --accumulation 4]
                                               [--precision 4bit|16bit] [--checkpoints offloaded|kept]

Run by throughput.py. Rows come in the job's own order and through its collator, which takes the loss over answers only (the
notebook's takes it over the prompt too), so that losses can be compared step by step; the fresh adapter is saved to
OUT/start for the job to begin with. Writes OUT/steps.jsonl: seconds since the process began and loss of each step;
OUT/facts.json: the rest.
"""

from __future__ import annotations

import time

BEGAN = time.time()

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import unsloth  # noqa: F401 - first, as the notebook has it

import torch  # isort: skip
from PIL import Image
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from unsloth import FastVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from job.config.schema import RADIOGRAPHER
from job.data.conversations import conversation
from job.model.collator import Collator
from job.train.sampler import EpochOrder


class InOrder(SFTTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class Clock(TrainerCallback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            with self.file.open("a") as stream:
                line = {"step": state.global_step, "seconds": time.time() - BEGAN, "loss": logs["loss"]}
                stream.write(json.dumps(line) + "\n")


def without_experts(config: Any) -> dict[str, Any]:
    """Leave the fused experts of a mixture alone, as the job does by default."""
    text = config.get_text_config()
    return {"target_parameters": []} if getattr(text, "num_experts", None) else {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vision", choices=("true", "false"), required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--precision", choices=("4bit", "16bit"), default="4bit")
    parser.add_argument(
        "--checkpoints", choices=("offloaded", "kept"), default="offloaded", help="inputs of the layers"
    )
    parser.add_argument("--generate", type=int, default=0, help="captions to generate one by one afterwards")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    imported = time.time() - BEGAN
    checkpointing = {"offloaded": "unsloth", "kept": True}[given.checkpoints]
    model, processor = FastVisionModel.from_pretrained(
        str(given.model), load_in_4bit=given.precision == "4bit", use_gradient_checkpointing=checkpointing
    )
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=given.vision == "true",
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        random_state=3407,
        use_gradient_checkpointing=checkpointing,
        **without_experts(model.config),
    )
    model.save_pretrained(given.out / "start")
    lines = [json.loads(line) for line in (given.data / "metadata.jsonl").read_text().splitlines()]
    rows: list[Any] = [
        {
            "messages": conversation(RADIOGRAPHER, line["caption"], None),
            "images": [Image.open(given.data / line["file_name"]).convert("RGB")],
            "id": f"row-{number}",
        }
        for number, line in enumerate(lines)
    ]
    order, chosen = EpochOrder(len(rows), 3407), []
    for epoch in range(given.epochs):
        order.set_epoch(epoch)
        chosen += [rows[index] for index in order]
    torch.cuda.reset_peak_memory_stats()
    if given.epochs:
        FastVisionModel.for_training(model)
        trainer = InOrder(
            model=model,
            processing_class=processor,
            data_collator=Collator(processor, 2048),
            train_dataset=chosen,
            callbacks=[Clock(given.out / "steps.jsonl")],
            args=SFTConfig(
                per_device_train_batch_size=given.micro,
                gradient_accumulation_steps=given.accumulation,
                num_train_epochs=1,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                warmup_steps=0,
                logging_steps=1,
                optim="adamw_8bit",
                weight_decay=0.01,
                seed=3407,
                output_dir=str(given.out / "trainer"),
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                dataset_text_field="",
                dataset_kwargs={"skip_prepare_dataset": True},
                max_length=2048,
            ),
        )
        trainer.train()
    facts = {
        "imported": imported,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_gb": torch.cuda.max_memory_reserved() / 1e9,
    }
    if given.generate:
        FastVisionModel.for_inference(model)
        began = time.time()
        for row in rows[: given.generate]:
            text = processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)
            inputs = processor(row["images"], text, add_special_tokens=False, return_tensors="pt").to("cuda")
            model.generate(**inputs, max_new_tokens=64, use_cache=True, do_sample=False)
        facts["generation"] = time.time() - began
    (given.out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
