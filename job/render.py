"""Renders a Kubernetes manifest or a batch script from a spec, using the templates of k8s/ and slurm/. Needs no cluster.

The templates of k8s/ are Kustomize's own: `base/job.yaml`, and components that patch it (JSON patches, RFC 6902).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job.config.environment import Environment
from job.config.loader import OVERRIDE, load_spec, read_source
from job.config.schema import JobSpec
from job.config.sweep import read_sweep
from job.errors import SpecError

TEMPLATES = Path(__file__).parent / "templates"
"""The repository's folders `k8s` and `slurm`: links in a checkout, copies in an installed package."""


@dataclass(frozen=True)
class Run:
    """What to start: `source` becomes `JOB_SPEC`, and `variables` are set beside it: `JOB__` overrides and `JOB_BUNDLE`.

    `sweep` is the name of the sweep that the run is a row of; None for a single run.
    """

    source: str
    variables: dict[str, str]
    spec: JobSpec
    bundle: str = ""
    sweep: str | None = None


def read_runs(environment: Mapping[str, str], source: str, output: str | None, sweep: Path | None) -> list[Run]:
    """Read the spec with the overrides of this environment, or one run for each row of the table `sweep`, and validate each as
    the job will.

    Raises SpecError for a wrong spec or a wrong row.
    """
    variables = {name: value for name, value in environment.items() if name.startswith(OVERRIDE)}
    bundle = Environment.read(environment).bundle
    variables |= {"JOB_BUNDLE": bundle} if bundle else {}
    if output is not None:
        variables["JOB__OUTPUT__URL"] = output
    text = read_source(source)
    spec = load_spec(variables, text)
    source = source.strip() if re.fullmatch(r"s3://\S+", source.strip()) else text
    if sweep is None:
        return [Run(source, variables, spec, bundle)]
    found = [variables | row for row in read_sweep(sweep, text, variables).values()]
    return [Run(source, each, load_spec(each, text), bundle, spec.name) for each in found]


def kubernetes(runs: Sequence[Run], image: str, components: tuple[str, ...]) -> str:
    """Render a `batch/v1` Job for each run as YAML, for `kubectl create -f -`, which generates their names.

    Raises SpecError for an image without tag or digest, an unknown component, and paths that no pod will see.
    """
    if not re.search(r"(@sha256:[0-9a-f]{64}|:[\w][\w.-]*)$", image) or image.endswith(":latest"):
        raise SpecError(
            f"--image {image}: give a tag other than latest, or a digest; a resumed run needs the same image"
        )
    return "---\n".join(_yaml(_job(run, image, components)) for run in runs)


def _job(run: Run, image: str, components: tuple[str, ...]) -> dict[str, Any]:
    asks_hub = _pushes(run.spec) or (not run.bundle and _named_on_hub(run.spec))
    job = read_job((*components, *(["hub"] if asks_hub and not {"hub", "airgapped"} & set(components) else [])))
    labels = {"app.kubernetes.io/instance": _label(run.spec.name)}
    labels |= {"app.kubernetes.io/part-of": _label(run.sweep)} if run.sweep is not None else {}
    job["metadata"] = {
        "generateName": f"{labels['app.kubernetes.io/instance']}-",
        "labels": job["metadata"]["labels"] | labels,
        "annotations": {"vision-lora-job/output": run.spec.output.url},
    }
    template = job["spec"]["template"]
    template["metadata"]["labels"] |= labels
    container = template["spec"]["containers"][0]
    container["image"] = image
    variables = {"JOB_SPEC": run.source, **run.variables}
    if "@" in image:
        variables["JOB_IMAGE_DIGEST"] = image.partition("@")[2]
    _set(container["env"], variables)
    _check_paths(run.spec, run.bundle, template["spec"])
    return job


def _label(name: str) -> str:
    """A run's name as a label, and as the start of a Job's name: both its ends are kept, the last of which tells rows apart."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (label if len(label) <= 40 else f"{label[:19].strip('-')}-{label[-20:].strip('-')}") or "vision-lora"


LATER = ("spot", "multi-gpu", "multi-node", "cpu", "airgapped", "scratch-volume")
"""Components that patch what others replace, after all others and in this order."""


def read_job(components: tuple[str, ...]) -> dict[str, Any]:
    """Apply the patches of these components to the base Job, as Kustomize would, in the order that they need."""
    folder = TEMPLATES / "k8s"
    later = {name: place for place, name in enumerate(LATER, 1)}
    components = tuple(sorted({*components}, key=lambda name: (later.get(name, 0), name)))
    job: dict[str, Any] = yaml.safe_load((folder / "base" / "job.yaml").read_text())
    known = sorted(path.name for path in (folder / "components").iterdir())
    for component in components:
        if component not in known:
            raise SpecError(f"--with {component}: no such component; there are {', '.join(known)}")
        place = folder / "components" / component
        for patch in yaml.safe_load((place / "kustomization.yaml").read_text())["patches"]:
            for operation in yaml.safe_load((place / patch["path"]).read_text()):
                try:
                    _apply(job, **operation)
                except (KeyError, IndexError, TypeError, ValueError):
                    before = ", ".join(components[: components.index(component)]) or "nothing"
                    raise SpecError(f"--with {component}: cannot be combined with {before}") from None
    return job


def _apply(tree: Any, op: str, path: str, value: Any = None) -> None:
    """Apply one RFC 6902 operation, of the four that the templates use. Raises if the path does not exist."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    for part in parents:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    if isinstance(tree, list) and op == "add":
        tree.insert(len(tree) if last == "-" else int(last), value)
        return
    key: Any = int(last) if isinstance(tree, list) else last
    match op:
        case "add":
            tree[key] = value
        case "replace" if tree[key] is not None:
            tree[key] = value
        case "remove":
            del tree[key]
        case "test" if tree[key] == value:
            pass
        case _:
            raise ValueError(op)


def _set(env: list[dict[str, Any]], variables: Mapping[str, str]) -> None:
    """Set variables to fixed values. `$` is doubled because the kubelet would expand `$(NAME)`."""
    for name, text in variables.items():
        entry = {"name": name, "value": text.replace("$", "$$")}
        place = next((index for index, old in enumerate(env) if old["name"] == name), len(env))
        env[place : place + 1] = [entry]


def _pushes(spec: JobSpec) -> bool:
    return (spec.export.hub.adapter_repo or spec.export.hub.merged_repo) is not None


def _named_on_hub(spec: JobSpec) -> bool:
    """Return whether a model or dataset is named by hub id."""
    names = (spec.model.name_or_path, spec.dataset.path)
    return any(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() for name in names)


def _check_paths(spec: JobSpec, bundle: str, pod: dict[str, Any]) -> None:
    """Raises SpecError for each path that is not on a volume of the pod: it would be empty there, or lost with the pod. With a
    bundle, nothing else is read.
    """
    volumes = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] in volumes]
    read = {
        "model.name_or_path": spec.model.name_or_path,
        "lora.init_adapter": spec.lora.init_adapter,
        "dataset.path": spec.dataset.path,
        "dataset.eval_path": spec.dataset.eval_path,
    }
    found = ({"JOB_BUNDLE": bundle} if bundle else read) | {"output.url": spec.output.url}
    problems = list[str]()
    for field, name in found.items():
        path = (name or "").removeprefix("file://")
        always = ("JOB_BUNDLE", "output.url", "dataset.eval_path")
        local = path.startswith(("/", ".", "~")) or field in always or Path(path).exists()
        if not path or path.startswith("s3://") or not local:
            continue
        if not any(path.startswith(f"{mount}/") for mount in mounts):
            where = (
                f"below {' or '.join(mounts)}" if mounts else "on s3://, or use --with airgapped, which mounts volumes"
            )
            problems.append(f"  - {field}: pods cannot see {name}; put it {where}")
    if problems:
        raise SpecError("these are folders of this machine:\n" + "\n".join(problems))


NO_TEXT = re.compile(r"[-+.\d].*|[yYnN]")
"""What kubectl's YAML parser reads as a number or boolean and ours does not, such as 1e-4 and y."""


class _Dumper(yaml.SafeDumper):
    """Writes multi-line text as blocks, quotes what might not be read as text, and uses no anchors."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else '"' if NO_TEXT.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def slurm(runs: Sequence[Run], settings: Mapping[str, str]) -> str:
    """Render `slurm/train.sh` for `sbatch`, with the spec, the variables and the site's settings inside; several runs are the
    tasks of an array, from 1.

    Sourced files are inlined, so the script needs no checkout. Raises SpecError if this package has no such script.
    """
    first = runs[0]
    shared = {"JOB_SPEC": first.source, **settings}
    shared |= {
        name: value for name, value in first.variables.items() if all(run.variables.get(name) == value for run in runs)
    }
    lines = _script("train.sh").splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    head = ["", *_exports(shared)]
    if first.sweep is not None:
        lines[1 : last + 1] = [line.replace("%x-%j.log", "%x-%A-%a.log") for line in lines[1 : last + 1]]
        head = [f"#SBATCH --array=1-{len(runs)}", *head, 'case "${SLURM_ARRAY_TASK_ID:-}" in']
        for number, run in enumerate(runs, 1):
            own = {name: value for name, value in run.variables.items() if name not in shared}
            head += [f"    {number})", *(f"        {line}" for line in _exports(own)), "        ;;"]
        head += [f'    *) echo "slurm: this sweep is an array of tasks 1 to {len(runs)}" >&2; exit 78 ;;', "esac"]
    lines[last + 1 : last + 1] = head
    return "\n".join(lines) + "\n"


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _script(name: str) -> str:
    """Read a script of slurm/, inlining the files that it sources and dropping the lines that look for them."""
    try:
        text = (TEMPLATES / "slurm" / name).read_text()
    except OSError as error:
        raise SpecError(f"slurm/{name} is not in this package: {error.strerror}") from None
    text = re.sub(r'^(# shellcheck source=|\[ -f "\$JOB_HOME/slurm/).*\n', "", text, flags=re.MULTILINE)
    return re.sub(
        r'^\. "\$JOB_HOME/slurm/([\w.]+)"$', lambda found: _script(found[1]).rstrip(), text, flags=re.MULTILINE
    )
