"""How many tokens a conversation takes, its images by their size alone: none is put through the processor twice."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image

from job.errors import DataError
from job.model.collator import Messages, expand, finished, render, replacement, special_tokens
from job.model.collator import tokens as tokens_of

Size = tuple[int, int]


class Length(NamedTuple):
    """Tokens of a conversation; how many of them come before its last answer; and how many its images take."""

    whole: int
    prompt: int
    images: int


class Ruler:
    """Measures conversations for one processor. Call with messages and the sizes (width, height) of their images.

    Raises DataError when the text holds a special token of the model, or when its chat template refuses the conversation.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.special = {*special_tokens(processor), processor.image_token}
        self.expansion = lru_cache(4096)(lambda size: replacement(processor, Image.new("RGB", size)))

    def __call__(self, messages: Messages, sizes: list[Size]) -> Length:
        text = "\0".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")
        if any(token in text for token in self.special):
            raise DataError("text holds a special token of the model")
        try:
            expansions = [self.expansion(size) for size in sizes]
        except ValueError as error:
            raise DataError("the model's processor refuses an image of this size") from error
        text = finished(self.processor, messages)
        bare = len(tokens_of(self.processor, text))
        whole = len(tokens_of(self.processor, expand(self.processor, text, expansions))) if sizes else bare
        before = len(tokens_of(self.processor, render(self.processor, messages[:-1], prompt=True)))
        return Length(whole, whole - bare + before, whole - bare + len(sizes))  # all images come before the last answer

    def room(self, tokens: int) -> dict[str, float | None]:
        """What of a picture this processor keeps, in pixels: `area` of the whole or its `short` side; and the area of all
        pictures of a row (`row`) that together take so many tokens, where tokens depend on the size."""
        pictures = self.processor.image_processor
        size, tiles = dict(pictures.size), getattr(pictures, "max_image_tiles", 0)
        high, wide = size.get("height") or 0, size.get("width") or 0
        area = tiles * high * wide or None
        short = None if area else max(high, wide) or size.get("shortest_edge")
        if size.get("longest_edge") and hasattr(pictures, "merge_size"):
            area, short = size["longest_edge"], None  # Qwen's edges are areas
        side = int(min(area or 1024**2, 1024**2) ** 0.5)
        few, many = (len(tokens_of(self.processor, self.expansion((each, each)))) for each in (side // 2, side))
        row = tokens * (side**2 - (side // 2) ** 2) / (many - few) if many > few else None
        return {"area": area, "short": short, "row": row}
