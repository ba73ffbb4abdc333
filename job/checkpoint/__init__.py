"""Checkpoints in a store: explicitly committed, checksummed, self-contained, and off the training thread."""

from job.checkpoint.commit import Restored, commit, prune, restore
from job.checkpoint.manifest import File, Manifest, read_manifest, steps
from job.checkpoint.pickles import load_weights, refuse_pickles
from job.checkpoint.uploader import Uploader

__all__ = [
    "File",
    "Manifest",
    "Restored",
    "Uploader",
    "commit",
    "load_weights",
    "prune",
    "read_manifest",
    "refuse_pickles",
    "restore",
    "steps",
]
