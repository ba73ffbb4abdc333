"""The keys of an output: where a job writes each file. docs/output.md says what each file holds."""

RESULT_KEY, SPEC_KEY, REPORT_KEY, STATUS_KEY = "RESULT.json", "spec.yaml", "report.html", "status.json"
ATTEMPTS_KEY, LEASE_KEY, WRITTEN_KEY = "attempts.json", "lease.json", "written.json"

CHECKPOINTS, MANIFEST = "checkpoints", "MANIFEST.json"

ADAPTER = "adapter"
MERGED, SMALLER = "merged", ("merged_4bit", "merged_fp8", "merged_int4", "gguf")
"""Folders, and the fields of `export` that ask for those in fewer bits, which are made of merged weights on scratch."""
MADE_OF_MERGED = tuple(f"{folder}/" for folder in (MERGED, *SMALLER))

METRICS_KEY, SAMPLES_KEY = "evaluation/metrics.json", "evaluation/samples.jsonl"
EXTRA_KEY, OCCLUSION_KEY = "evaluation/extra.json", "evaluation/occlusion.json"
FACTS_KEY, IMAGES = "evaluation/report.json", "evaluation/images/"
EVALUATION = "evaluation/"
ANSWER_KEYS = (f"{EVALUATION}before.", f"{EVALUATION}after.")

NUMBERS_KEY, FAILURE_KEY, LOCK_KEY = "logs/metrics.jsonl", "logs/failure.txt", "logs/packages.txt"
MERGING_KEY, TENSORBOARD = "logs/merging.json", "logs/tensorboard"

IDENTITY_KEY, QUARANTINE_KEY = "data/identity.json", "data/quarantine.jsonl"
EXAMPLE_KEY, NEAR_KEY = "data/example.txt", "data/near_duplicates.jsonl"

WORK = (f"{CHECKPOINTS}/", EVALUATION, f"{ADAPTER}/", *MADE_OF_MERGED)
"""Keys of actual work: more than what each start writes anew."""


def answers_key(when: str) -> str:
    """Key of the answers `before` or `after` training."""
    return f"{EVALUATION}{when}.jsonl"


def partial_key(when: str) -> str:
    """Key of the answers from an attempt that stopped midway."""
    return f"{EVALUATION}{when}.partial.jsonl"
