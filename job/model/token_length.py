"""Counts the tokens of a conversation from its text and image sizes, so no image is processed twice."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image

from job.errors import DataError
from job.model.collator import Messages, answer_spans, expand, finished, render, replacement, special_tokens
from job.model.collator import tokens as tokens_of

Size = tuple[int, int]


class Length(NamedTuple):
    """Tokens of a conversation, of what precedes its last answer, and of its images."""

    whole: int
    prompt: int
    images: int


class TokenCounter:
    """Measures conversations for one processor. Call with messages and the sizes (width, height) of their images.

    Raises DataError when the text contains a special token of the model, when the chat template refuses the conversation or
    has no place for its images, or, with `responses_only`, when the collator could not locate the answers.
    """

    def __init__(self, processor: Any, responses_only: bool = True) -> None:
        self.processor = processor
        self.responses_only = responses_only
        self.special = {*special_tokens(processor), processor.image_token}
        self.expansion = lru_cache(4096)(lambda size, images=1: replacement(processor, Image.new("RGB", size), images))
        self.tells = "batch_num_images" in processor.image_processor.model_input_names
        """Whether an image takes fewer tokens beside others (LLaVA-OneVision)."""
        self.size = lru_cache(4096)(lambda text: len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]))
        known = processor.tokenizer.added_tokens_decoder.values()
        ends = tuple(each.content for each in known if each.special and not (each.lstrip or each.rstrip))
        alone = processor.image_token in ends
        self.parted = lru_cache(4096)(lambda text: alone and text.startswith(ends) and text.endswith(ends))
        """Whether special tokens separate an image's expansion from the text beside it, so that token counts add up."""

    def __call__(self, messages: Messages, sizes: list[Size]) -> Length:
        text = "\0".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")
        if any(token in text for token in self.special):
            raise DataError("text contains a special token of the model")
        try:
            among = min(len(sizes), 2) if self.tells else 1
            expansions = [self.expansion(size, among) for size in sizes]
        except ValueError as error:
            raise DataError("the model's processor refuses an image of this size") from error
        text = finished(self.processor, messages)
        _refuse_unless_parts(self.processor, messages, text, len(sizes))
        ids = tokens_of(self.processor, text)
        bare = len(ids)
        if all(map(self.parted, expansions)):
            whole = bare + sum(self.size(each) - 1 for each in expansions)
        else:
            whole = len(tokens_of(self.processor, expand(self.processor, text, expansions)))
        if self.responses_only:
            prompt, _ = answer_spans(self.processor, messages, text, expansions, whole, ids)[-1]
        else:  # all images precede the last answer
            prompt = whole - bare + len(tokens_of(self.processor, render(self.processor, messages[:-1], prompt=True)))
        return Length(whole, prompt, whole - bare + len(sizes))

    def room(self, tokens: int) -> dict[str, Any]:
        """Return what this processor keeps of an image, in pixels: the total `area` or the `short` side; and, if token counts
        depend on size, the total area of a row's images (`row`) that takes `tokens` tokens. Qwen's sides are
        multiples of `grid`. `resample` is its filter."""
        pictures = self.processor.image_processor
        resample = getattr(pictures, "resample", None)
        own = {"resample": int(resample)} if resample else {}
        if shapes := getattr(
            pictures, "image_grid_pinpoints", None
        ):  # LLaVA-NeXT uses as many tokens for a small image
            return {"area": max(high * wide for high, wide in shapes), "short": None, "row": None} | own
        size = dict(getattr(pictures, "size", None) or {})
        tiles = getattr(pictures, "max_image_tiles", getattr(pictures, "max_patches", 0))
        high, wide = size.get("height") or 0, size.get("width") or 0
        area = tiles * high * wide or None
        short = None if area else max(high, wide) or size.get("shortest_edge")
        if size.get("longest_edge") and hasattr(pictures, "merge_size"):
            area, short = size["longest_edge"], None  # Qwen's edges are areas
        side = int(min(area or 1024**2, 1024**2) ** 0.5)
        few, many = (len(tokens_of(self.processor, self.expansion((each, each)))) for each in (side // 2, side))
        row = tokens * (side**2 - (side // 2) ** 2) / (many - few) if many > few else None
        room: dict[str, Any] = {"area": area, "short": short, "row": row} | own
        qwen = area is not None and type(pictures).__name__.startswith("Qwen2VL")
        return room | ({"grid": pictures.patch_size * pictures.merge_size} if qwen else {})


def _refuse_unless_parts(processor: Any, messages: Messages, text: str, images: int) -> None:
    """Raises DataError for a text-only template, which prints parts as Python literals or leaves images out."""
    if any(str(message["content"]) in text for message in messages):
        raise DataError(
            "the model's chat template takes only text, no images; name a base model whose template takes both"
        )
    if (places := text.count(processor.image_token)) != images:
        raise DataError(
            f"the model's chat template has {places} places for {images} images; name a base model whose template shows each"
        )
