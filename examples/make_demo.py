"""Makes everything the demo needs under one folder: `data/`, the images to tune on, and `base/`, the model to tune.

    python examples/make_demo.py FOLDER [--small] [--seed N]

It takes about a minute on two CPU cores, and no time at all when the folder already holds what would be made.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

MAKERS = ("make_demo.py", "radiographs.py", "tiny_model.py", "tiny_base.py")
# patients, images of each, images to pre-train on, steps of learning to see and to say
FULL = {"patients": 160, "images_per_patient": 4, "images": 4096, "see_steps": 300, "say_steps": 400}
SMALL = {"patients": 80, "images_per_patient": 4, "images": 2048, "see_steps": 200, "say_steps": 300}


def recipe(small: bool, seed: int) -> dict[str, object]:
    """What decides the result: the makers' sources and the arguments."""
    here = Path(__file__).parent
    sources = b"".join((here / name).read_bytes() for name in MAKERS)
    return {"sources": hashlib.sha256(sources).hexdigest(), "small": small, "seed": seed}


def read(marker: Path) -> dict[str, object]:
    try:
        return dict(json.loads(marker.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def make_demo(folder: Path, small: bool, seed: int) -> dict[str, object]:
    """Makes the folder's content unless it is there already; returns the facts, which `demo.json` keeps too."""
    marker = folder / "demo.json"
    wanted, found = recipe(small, seed), read(marker)
    if found.get("recipe") == wanted and "base_exact_captions" in found:
        return found
    if not marker.exists() and any((folder / name).exists() for name in ("data", "base")):
        sys.exit(f"{folder} holds data/ or base/ that this program did not make; give it a folder of its own")

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from radiographs import make_data  # not above: the check for a finished folder should not wait for them
    from tiny_base import make_base

    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"recipe": None}))  # says that the folder is ours, and not finished
    shutil.rmtree(folder / "data", ignore_errors=True)
    shutil.rmtree(folder / "base", ignore_errors=True)

    began = time.monotonic()
    size = SMALL if small else FULL
    images = make_data(folder / "data", size["patients"], size["images_per_patient"], seed)
    print(f"data: {images} images of {size['patients']} patients", flush=True)
    # The base must not have met the very images that it is tuned on, hence a seed of its own.
    exact = make_base(folder / "base", size["see_steps"], size["say_steps"], size["images"], seed + 1_000_000)
    facts = {
        "recipe": wanted,
        "images": images,
        "patients": size["patients"],
        "base_exact_captions": exact,
        "seconds": round(time.monotonic() - began, 1),
    }
    marker.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where data/, base/ and demo.json go")
    parser.add_argument("--small", action="store_true", help="half the data and a quicker, weaker base, for tests")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other images and another base")
    arguments = parser.parse_args()
    facts = make_demo(arguments.folder, arguments.small, arguments.seed)
    print(
        f"{arguments.folder}: {facts['images']} images of {facts['patients']} patients; "
        f"base with {facts['base_exact_captions']:.0%} exact captions on fresh images, "
        f"made in {facts['seconds']} s"
    )


if __name__ == "__main__":
    main()
