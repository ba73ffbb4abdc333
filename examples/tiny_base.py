"""Makes the demo's base model: the tiny model, trained from nothing to describe the drawn radiographs.

It learns to say what it sees in the house style only. Of the radiologist style it learns the words, from text without
images, as any real base model would have met them: fine-tuning then has to link them to what is seen. The result is an
ordinary checkpoint folder, read by `AutoModelForImageTextToText` and `AutoProcessor` with no network.

Two things make this quick enough for two CPU cores. The vision half learns first, alone, by telling the facts to a
throw-away linear head; a language half that has to read an untrained eye learns its words long before it looks. Then
the eye is frozen, what it sees is kept, and the language half learns to put that into words.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from radiographs import (
    FINDINGS,
    MODALITIES,
    PLACES,
    SIDES,
    Case,
    draw_cases,
    draw_images,
    house_caption,
    radiologist_caption,
)
from tiny_model import (
    END_OF_TURN,
    GRID,
    IMAGE_TOKENS,
    INSTRUCTION,
    MERGE,
    PATCH,
    build_model,
    build_processor,
    report_request,
)
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)

BATCH = 32
CORES = 2
PEAK_LEARNING_RATE = 4e-3
FACTS = {"finding": FINDINGS, "side": SIDES, "place": PLACES, "modality": MODALITIES}


@dataclass(frozen=True)
class Pool:
    """Drawn images to learn from: patches is float32, (images, GRID * GRID, PATCH * PATCH), in the processor's order."""

    cases: list[Case]
    patches: Tensor


def draw_pool(count: int, rng: np.random.Generator) -> Pool:
    cases = draw_cases(count, rng)
    images = np.concatenate([draw_images(cases[at : at + 64], rng) for at in range(0, count, 64)])
    pixels = torch.from_numpy(images).float().div_(127.5).sub_(1)
    blocks = pixels.view(count, GRID // MERGE, MERGE, PATCH, GRID // MERGE, MERGE, PATCH).permute(0, 1, 4, 2, 5, 3, 6)
    return Pool(cases, blocks.reshape(count, GRID * GRID, PATCH * PATCH))


def see(eye: Qwen2_5_VisionTransformerPretrainedModel, patches: Tensor) -> Tensor:
    """The vision half's own forward for equal grey images: float32, (images, IMAGE_TOKENS, width).

    The model's forward attends to one image after the other; this one does all at once, in half the time, and it adds
    up the weights of the three equal channels and two equal frames instead of multiplying six times.
    """
    rows = torch.arange(GRID).view(GRID, 1).expand(GRID, GRID)
    rows, columns = (
        axis.reshape(GRID // MERGE, MERGE, GRID // MERGE, MERGE).transpose(1, 2).flatten() for axis in (rows, rows.T)
    )
    cos, sin = eye.rotary_pos_emb(patches, torch.stack([rows, columns], dim=1))
    count = len(patches)
    hidden = functional.linear(patches, eye.patch_embed.proj.weight.sum((1, 2)).flatten(1))
    for block in eye.blocks:
        heads = block.attn.qkv(block.norm1(hidden)).view(count, GRID * GRID, 3, block.attn.num_heads, -1)
        query, key, value = heads.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
        hidden = hidden + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return eye.merger(hidden).view(count, IMAGE_TOKENS, -1)


def encode(processor: Qwen2_5_VLProcessor, turns: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels of (prompt, answer) pairs, padded on the right: int64, (pairs, longest).

    Labels are -100 except on the answer and its end of turn.
    """
    prompts = processor.tokenizer([prompt for prompt, _ in turns]).input_ids
    answers = processor.tokenizer([answer + END_OF_TURN for _, answer in turns]).input_ids
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(turns), longest), processor.tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def chat(processor: Qwen2_5_VLProcessor, *content: dict[str, str]) -> str:
    """One user turn with these parts, as text that ends where the answer begins."""
    text = processor.apply_chat_template([{"role": "user", "content": list(content)}], add_generation_prompt=True)
    return text.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)


def paced(steps: int, title: str, losses: list[float]) -> Iterator[int]:
    """Counts steps: a bar when a terminal watches, otherwise a line about every ten seconds."""
    if sys.stdout.isatty():
        for step in (bar := tqdm(range(steps), desc=title, file=sys.stdout)):
            yield step
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
        return
    began = said = time.monotonic()
    for step in range(steps):
        yield step
        if (now := time.monotonic()) - said > 10 or step == steps - 1:
            said = now
            print(f"{title}: step {step + 1} of {steps}, loss {losses[-1]:.3f}, {now - began:.0f} s", flush=True)


def minimise(
    loss_of: Callable[[int, Tensor], Tensor],
    parameters: list[nn.Parameter],
    count: int,
    steps: int,
    title: str,
    rng: np.random.Generator,
) -> None:
    """AdamW on loss_of(step, some of the numbers under count), with a short warm-up and a cosine down to a fiftieth.

    Each core takes half of the batch. Splitting every small multiplication over the cores instead, as torch would, is
    slower, and many times slower when another program wants them too.
    """
    adam = torch.optim.AdamW(parameters, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    shape = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1, (step + 1) / 20) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    with ThreadPoolExecutor(CORES) as pool:
        for step in paced(steps, title, losses):

            def learn(some: Tensor, step: int = step) -> tuple[float, tuple[Tensor, ...]]:
                loss = loss_of(step, some)
                return loss.item(), torch.autograd.grad(loss, parameters)

            batch = torch.from_numpy(rng.integers(count, size=BATCH))
            shares, gradients = zip(*pool.map(learn, batch.chunk(CORES)), strict=True)
            losses.append(sum(shares) / CORES)
            for weight, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
                weight.grad = torch.stack(parts).mean(0)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            shape.step()


def learn_to_see(model: Qwen2_5_VLForConditionalGeneration, pool: Pool, steps: int, rng: np.random.Generator) -> None:
    """Trains the vision half to tell the facts of an image to a linear head, which is then forgotten."""
    eye, sizes = model.model.visual, [len(values) for values in FACTS.values()]
    head = nn.Linear(IMAGE_TOKENS * model.config.text_config.hidden_size, sum(sizes))
    truth = torch.tensor([[values.index(getattr(case, fact)) for fact, values in FACTS.items()] for case in pool.cases])

    def loss_of(_: int, some: Tensor) -> Tensor:
        guesses = head(see(eye, pool.patches[some]).flatten(1)).split(sizes, dim=1)
        return torch.stack([functional.cross_entropy(*pair) for pair in zip(guesses, truth[some].T, strict=True)]).sum()

    minimise(loss_of, [*eye.parameters(), *head.parameters()], len(pool.cases), steps, "learning to see", rng)


def learn_to_say(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    pool: Pool,
    steps: int,
    rng: np.random.Generator,
) -> None:
    """Trains the language half to caption what the frozen vision half sees, and on reports as mere text."""
    image, text = {"type": "image"}, {"type": "text", "text": INSTRUCTION}
    shown = []
    for prompt in (chat(processor, image, text), chat(processor, text, image)):  # people write it either way
        ids, labels = encode(processor, [(prompt, house_caption(case)) for case in pool.cases])
        kinds = (ids[:1] == model.config.image_token_id).int()
        grid = torch.tensor([[1, GRID, GRID]])
        positions, _ = model.model.get_rope_index(ids[:1], mm_token_type_ids=kinds, image_grid_thw=grid)
        shown.append((ids, labels, positions))
    requests = [chat(processor, {"type": "text", "text": report_request(case)}) for case in pool.cases]
    ids, labels = encode(processor, list(zip(requests, map(radiologist_caption, pool.cases), strict=True)))
    told = (ids, labels, torch.arange(ids.shape[1]).expand(3, 1, -1))
    with torch.no_grad():
        seen = torch.cat([see(model.model.visual, patches) for patches in pool.patches.split(256)])

    def loss_of(step: int, some: Tensor) -> Tensor:
        ids, labels, positions = told if step % 4 == 3 else shown[step % 2]
        blanks = (ids[some] == model.config.image_token_id)[..., None]
        embedded = model.get_input_embeddings()(ids[some])
        if blanks.any():
            embedded = embedded.masked_scatter(blanks, seen[some])
        hidden = model.model.language_model(
            inputs_embeds=embedded, position_ids=positions.expand(3, len(some), -1), use_cache=False
        ).last_hidden_state
        wanted = labels[some, 1:]
        return functional.cross_entropy(model.lm_head(hidden[:, :-1][wanted >= 0]), wanted[wanted >= 0])

    language = [weight for name, weight in model.named_parameters() if ".visual." not in name]
    minimise(loss_of, language, len(pool.cases), steps, "learning to say", rng)


def captions(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, images: list[Image.Image]
) -> list[str]:
    """What the model says of each image, by the ordinary road: processor, greedy generate, decode."""
    content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    said = []
    for at in range(0, len(images), 50):
        batch = images[at : at + 50]
        inputs = processor(text=[prompt] * len(batch), images=batch, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=48)
        said += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def make_base(folder: Path, see_steps: int, say_steps: int, images: int, seed: int) -> float:
    """Trains a base model, saves it with its processor under folder, and returns its share of exact captions.

    The share is measured on 200 fresh images, from the saved folder.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of each of the threads that minimise() starts
    try:
        rng = np.random.default_rng(seed)
        processor = build_processor()
        model = build_model(processor, seed)
        pool = draw_pool(images, rng)
        learn_to_see(model, pool, see_steps, rng)
        learn_to_say(model, processor, pool, say_steps, rng)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

        saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        cases = draw_cases(200, rng)
        said = captions(saved, processor, [Image.fromarray(pixels) for pixels in draw_images(cases, rng)])
    finally:
        torch.set_num_threads(threads)
    return sum(text == house_caption(case) for text, case in zip(said, cases, strict=True)) / len(cases)
