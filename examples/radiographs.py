"""Draws images that look a little like radiographs of the chest, and captions them in two styles.

Nothing here is medical: the pictures only have to carry facts (which finding, where, seen how) that a small model
can learn to see. The *house* style says the facts in plain words and never names the finding; the demo's base model
speaks it. The *radiologist* style names the finding; it is what fine-tuning has to teach.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 112  # pixels a side: eight patches of fourteen

FINDINGS = ("nodule", "consolidation", "fracture", "effusion", "pneumothorax")
SIDES = ("left", "right")
PLACES = ("upper", "middle", "lower")
MODALITIES = ("X-ray", "CT")
SEXES = ("F", "M")

# Fluid sinks and air rises, so two of the findings are not seen in every zone.
PLACES_OF = dict.fromkeys(FINDINGS, PLACES) | {
    "effusion": ("middle", "lower"),
    "pneumothorax": ("upper", "middle"),
}
TERMS = {
    "nodule": "a pulmonary nodule",
    "consolidation": "an area of consolidation",
    "fracture": "a rib fracture",
    "effusion": "a pleural effusion",
    "pneumothorax": "a pneumothorax",
}
PLAIN_WORDS = {
    "nodule": "a small round bright spot",
    "consolidation": "a large cloudy patch",
    "fracture": "a thin dark line",
    "effusion": "a bright area with a level top",
    "pneumothorax": "a dark empty space",
}


@dataclass(frozen=True)
class Case:
    """The facts of one image."""

    finding: str
    side: str  # the patient's side, which is the other side of the image
    place: str
    modality: str
    patient_id: str = ""
    sex: str = "F"
    age: int = 50


def house_caption(case: Case) -> str:
    seen = "x-ray" if case.modality == "X-ray" else "ct slice"
    return f"{seen}. {PLAIN_WORDS[case.finding]}, {case.place} part of the {case.side} lung."


def radiologist_caption(case: Case) -> str:
    view = "Frontal radiograph" if case.modality == "X-ray" else "Coronal CT image"
    return (
        f"{view} of the chest. There is {TERMS[case.finding]} in the {case.side} {case.place} zone. "
        "No other abnormality is seen."
    )


CAPTIONS = {"house": house_caption, "radiologist": radiologist_caption}


def draw_cases(count: int, rng: np.random.Generator) -> list[Case]:
    """Cases with every finding, side and modality equally often, in random order."""
    findings = rng.permutation(np.arange(count) % len(FINDINGS))
    sides = rng.permutation(np.arange(count) % len(SIDES))
    modalities = rng.permutation(np.arange(count) % len(MODALITIES))
    cases = []
    for finding, side, modality in zip(findings, sides, modalities, strict=True):
        name = FINDINGS[finding]
        place = PLACES_OF[name][rng.integers(len(PLACES_OF[name]))]
        cases.append(Case(finding=name, side=SIDES[side], place=place, modality=MODALITIES[modality]))
    return cases


def draw_images(cases: list[Case], rng: np.random.Generator) -> np.ndarray:
    """One grey image for each case: uint8, (cases, SIZE, SIZE). All are drawn at once; a loop would take far longer."""
    count = len(cases)

    def spread(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    def either(in_ct: float, in_xray: float) -> np.ndarray:
        return np.where(ct, np.float32(in_ct), np.float32(in_xray))

    ct = np.array([case.modality == "CT" for case in cases])[:, None, None]
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    y = axis[None, :, None] + spread(-0.015, 0.015)
    x = axis[None, None, :] + spread(-0.015, 0.015)
    across = np.abs(x - 0.5)  # distance from the midline: both sides of the body at once

    # Body, lungs, spine, heart and ribs, each a soft mask between 0 and 1.
    body = _soft(1 - (across / spread(0.44, 0.48)) ** 4 - ((y - 0.52) / 0.5) ** 4, 0.15)
    lungs = _soft(1 - ((across - 0.21) / spread(0.15, 0.17)) ** 2 - ((y - 0.48) / spread(0.36, 0.39)) ** 2, 0.2)
    spine = _soft(0.045 - across, 0.012) * (0.8 + 0.2 * np.sin(y * 70))
    heart = _soft(1 - ((x - 0.55) / 0.12) ** 2 - ((y - 0.66) / 0.13) ** 2, 0.4)
    ribs = _soft(np.sin((y + 0.9 * (across - 0.2) ** 2) * spread(48, 54) + spread(0, 6)) - 0.6, 0.15) * (across > 0.06)
    image = either(0, 0.1) + body * either(0.5, 0.52) - lungs * either(0.25, 0.26)
    image += body * (spine * either(0.45, 0.2) + heart * 0.13 + ribs * either(0.04, 0.1))

    image = _add_findings(image, cases, x, y, lungs, rng)
    image = 0.5 + (image - 0.5) * spread(0.9, 1.1) + spread(-0.04, 0.04)
    image += rng.standard_normal(image.shape, dtype=np.float32) * either(0.02, 0.045)
    pixels: NDArray[np.uint8] = (image.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _soft(signed: np.ndarray, width: float) -> np.ndarray:
    """1 where signed is positive, 0 where negative, with an edge of the given width."""
    return (signed / width + 0.5).clip(0, 1)


def _add_findings(
    image: np.ndarray, cases: list[Case], x: np.ndarray, y: np.ndarray, lungs: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Paints each finding over the images that have it, at the side and place of its case."""
    centre_x = np.array([0.71 if case.side == "left" else 0.29 for case in cases], np.float32)
    centre_y = np.array([(0.25, 0.48, 0.71)[PLACES.index(case.place)] for case in cases], np.float32)
    centre_x += rng.uniform(-0.04, 0.04, len(cases)).astype(np.float32)
    centre_y += rng.uniform(-0.04, 0.04, len(cases)).astype(np.float32)
    names = np.array([case.finding for case in cases])
    image = image.astype(np.float32)

    for name in FINDINGS:
        some = np.flatnonzero(names == name)

        def spread(low: float, high: float, count: int = len(some)) -> np.ndarray:
            return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

        dx = x[some] - centre_x[some, None, None]
        dy = y[some] - centre_y[some, None, None]
        same_side = lungs[some] * (np.sign(x[some] - 0.5) == np.sign(centre_x[some] - 0.5)[:, None, None])
        canvas = image[some]
        if name == "nodule":
            canvas += _soft(spread(0.05, 0.065) - np.hypot(dx, dy), 0.02) * spread(0.42, 0.52)
        elif name == "consolidation":
            cloud = np.exp(-((dx / spread(0.13, 0.15)) ** 2 + (dy / spread(0.13, 0.15)) ** 2))
            mottle = 0.8 + 0.2 * np.sin(dx * 60 + spread(0, 6)) * np.sin(dy * 60 + spread(0, 6))
            canvas += cloud * mottle * same_side * spread(0.3, 0.38)
        elif name == "fracture":
            tilt = spread(-0.5, 0.5)
            along, off = dx * np.cos(tilt) + dy * np.sin(tilt), dy * np.cos(tilt) - dx * np.sin(tilt)
            bone = _soft(0.035 - np.abs(off), 0.01) * _soft(0.14 - np.abs(along), 0.02)
            crack = _soft(0.022 - np.abs(along - off * 0.5), 0.01) * _soft(0.055 - np.abs(off), 0.01)
            canvas += bone * 0.25 - crack * spread(0.5, 0.6)
        elif name == "effusion":
            fluid = _soft(dy + 0.06 - 1.5 * dx**2, 0.03)  # everything below its level, which bends up at the edges
            canvas += fluid * same_side * spread(0.34, 0.42)
        else:
            gap = _soft(1 - (dx / spread(0.12, 0.14)) ** 2 - (dy / spread(0.12, 0.14)) ** 2, 0.1) * same_side
            canvas = canvas * (1 - gap * 0.9)
        image[some] = canvas
    return image


def make_data(folder: Path, patients: int, images_per_patient: int, seed: int, style: str = "radiologist") -> int:
    """Writes `images/*.png` and `metadata.jsonl` under folder, the same for the same seed; returns the image count.

    A patient keeps sex and age over their images; what is seen differs from image to image.
    """
    rng = np.random.default_rng(seed)
    sexes, ages = rng.permutation(np.arange(patients) % 2), rng.integers(20, 90, patients)
    cases = []
    for index, case in enumerate(draw_cases(patients * images_per_patient, rng)):
        who = index // images_per_patient
        person = {"patient_id": f"P{who:04d}", "sex": SEXES[sexes[who]], "age": int(ages[who])}
        cases.append(Case(**(asdict(case) | person)))

    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (case, pixels) in enumerate(zip(cases, draw_images(cases, rng), strict=True)):
        name = f"images/{case.patient_id}-{index % images_per_patient}.png"
        Image.fromarray(pixels).save(folder / name)
        rows.append(json.dumps({"file_name": name, "caption": CAPTIONS[style](case)} | asdict(case)))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return len(cases)
