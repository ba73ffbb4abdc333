"""`job render slurm`: slurm/train.sh with all that it needs inside."""

import re
import subprocess

import yaml

from job.render import read_runs, slurm
from tests.conftest import ROOT

SPEC = {
    "model": {"name_or_path": "m"},
    "dataset": {"path": "d", "instruction": 'It\'s $HOME, "$(date)" and `date`\n\\n'},
    "output": {"url": "o"},
}


def test_the_script_stands_alone_and_is_train_sh():
    script = slurm(read_runs({}, yaml.safe_dump(SPEC), None, None), {})
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "$JOB_HOME/slurm/" not in re.sub(r"\$JOB_HOME/slurm/site.env", "", script)
    ours = set(script.splitlines())
    for path in (ROOT / "slurm" / "train.sh", *sorted((ROOT / "slurm").glob("start.sh"))):
        for line in path.read_text().splitlines():
            assert line in ours or "$JOB_HOME/slurm/" in line or line.startswith("# shellcheck source"), line


def test_slurm_still_finds_its_directives_and_bash_the_very_spec():
    text = yaml.safe_dump(SPEC)
    given = {"JOB__LORA__R": "8", "JOB_BUNDLE": "/lustre/a b", "JOB_SCRATCH": "/of/this/machine"}
    script = slurm(read_runs(given, text, "s3://b/o", None), {"JOB_IMAGE": "it's.sif"})
    head, _, _ = script.partition("\nJOB_HOME=")
    assert script.startswith("#!/bin/bash\n")
    before = head.partition("\nexport ")[0]
    assert before.count("#SBATCH") == script.count("#SBATCH") > 5
    asked = head + '\nprintf \'%s|\' "$JOB_SPEC" "$JOB__LORA__R" "$JOB__OUTPUT__URL" "$JOB_IMAGE" "$JOB_BUNDLE"'
    said = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout
    assert said == f"{text}|8|s3://b/o|it's.sif|/lustre/a b|"
    assert "JOB_SCRATCH=" not in head
