"""Renders a Kubernetes manifest or a batch script from a spec, using the templates of k8s/ and slurm/. Needs no cluster.

The templates of k8s/ are Kustomize's own: `base/job.yaml`, and components that patch it (JSON patches, RFC 6902).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job.config.loader import OVERRIDE, load_spec, read_source
from job.config.schema import JobSpec
from job.errors import SpecError

TEMPLATES = Path(__file__).parent / "templates"
"""The repository's folders `k8s` and `slurm`: links in a checkout, copies in an installed package."""


@dataclass(frozen=True)
class Run:
    """What to start: `source` becomes `JOB_SPEC`, and `overrides` are the `JOB__` variables beside it.

    `rows` is a sweep: the overrides of each task; empty for a single run.
    """

    source: str
    overrides: dict[str, str]
    spec: JobSpec
    rows: tuple[str, ...] = ()


def read_run(environment: Mapping[str, str], source: str, output: str | None, sweep: Path | None) -> Run:
    """Read the spec with the overrides of this environment and validate it as the job will.

    Raises SpecError for a wrong spec or a wrong line in the sweep's table.
    """
    overrides = {name: value for name, value in environment.items() if name.startswith(OVERRIDE)}
    if output is not None:
        overrides["JOB__OUTPUT__URL"] = output
    text = read_source(source)
    rows = tuple(_table(sweep)) if sweep else ()
    outputs = dict[str, int]()
    for number, row in enumerate(rows, 1):
        try:
            url = load_spec(overrides | _settings(row), text).output.url
        except SpecError as error:
            raise SpecError(f"{sweep}, run {number}: {error}") from None
        if url in outputs:
            raise SpecError(
                f"{sweep}: runs {outputs[url]} and {number} both write to {url}; set JOB__OUTPUT__URL in each"
            )
        outputs[url] = number
    spec = load_spec(overrides | (_settings(rows[0]) if rows else {}), text)
    remote = re.fullmatch(r"s3://\S+", source.strip())
    return Run(source.strip() if remote else text, overrides, spec, rows)


def _table(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: cannot be read: {error}") from None
    rows = [line for line in lines if line and not line.startswith("#")]
    for number, row in enumerate(rows, 1):
        for word in row.split():
            if not re.match(rf"{OVERRIDE}[A-Z0-9_]+=", word):
                raise SpecError(f"{file}, run {number}: {word} is not JOB__SECTION__FIELD=value without blanks")
    if not rows:
        raise SpecError(f"{file}: has no runs; write one a line, as in JOB__LORA__R=8 JOB__OUTPUT__URL=s3://bucket/r8")
    return rows


def _settings(row: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in row.split())


def kubernetes(run: Run, image: str, components: tuple[str, ...]) -> str:
    """Render one `batch/v1` Job as YAML, for `kubectl create -f -`, which generates its name.

    Raises SpecError for an image without tag or digest, an unknown component, and paths that no pod will see.
    """
    if not re.search(r"(@sha256:[0-9a-f]{64}|:[\w][\w.-]*)$", image) or image.endswith(":latest"):
        raise SpecError(
            f"--image {image}: give a tag other than latest, or a digest; a resumed run needs the same image"
        )
    wanted = (*components, *(["sweep"] if run.rows and "sweep" not in components else []))
    if _asks_hub(run.spec) and not {"hub", "airgapped"} & set(wanted):
        wanted = (*wanted, "hub")
    job = read_job(wanted)
    name = re.sub(r"[^a-z0-9]+", "-", run.spec.name.lower()).strip("-")[:40].strip("-") or "vision-lora"
    job["metadata"] = {
        "generateName": f"{name}-",
        "labels": {**job["metadata"]["labels"], "app.kubernetes.io/instance": name},
        "annotations": {"vision-lora-job/output": run.spec.output.url},
    }
    template = job["spec"]["template"]
    template["metadata"]["labels"]["app.kubernetes.io/instance"] = name
    container = template["spec"]["containers"][0]
    container["image"] = image
    variables = {"JOB_SPEC": run.source, **run.overrides}
    if "@" in image:
        variables["JOB_IMAGE_DIGEST"] = image.partition("@")[2]
    if run.rows:
        variables["SWEEP"] = "\n".join(run.rows)
        job["spec"]["completions"] = len(run.rows)
    _set(container["env"], variables)
    _check_paths(run.spec, template["spec"])
    return _yaml(job)


def read_job(components: tuple[str, ...]) -> dict[str, Any]:
    """Apply the patches of these components, in order, to the base Job, as Kustomize would."""
    folder = TEMPLATES / "k8s"
    components = tuple(dict.fromkeys(components))
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


def _asks_hub(spec: JobSpec) -> bool:
    """Return whether a model or dataset is named by hub id, or anything is to be pushed to the hub."""
    names = (spec.model.name_or_path, spec.dataset.path)
    pushed = spec.export.hub.adapter_repo or spec.export.hub.merged_repo
    return pushed is not None or any(
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() for name in names
    )


def _check_paths(spec: JobSpec, pod: dict[str, Any]) -> None:
    """Raises SpecError for each path that is not on a volume of the pod: it would be empty there, or lost with the pod."""
    volumes = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] in volumes]
    found = {
        "model.name_or_path": spec.model.name_or_path,
        "lora.init_adapter": spec.lora.init_adapter,
        "dataset.path": spec.dataset.path,
        "dataset.eval_path": spec.dataset.eval_path,
        "output.url": spec.output.url,
    }
    problems = list[str]()
    for field, name in found.items():
        path = (name or "").removeprefix("file://")
        local = path.startswith(("/", ".", "~")) or field in ("output.url", "dataset.eval_path") or Path(path).exists()
        if not path or path.startswith("s3://") or not local:
            continue
        if not any(path.startswith(f"{mount}/") for mount in mounts):
            where = (
                f"below {' or '.join(mounts)}" if mounts else "on s3://, or use --with airgapped, which mounts volumes"
            )
            problems.append(f"  - {field}: pods cannot see {name}; put it {where}")
    if problems:
        raise SpecError("the spec names folders of this machine:\n" + "\n".join(problems))


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


def slurm(run: Run, settings: Mapping[str, str]) -> str:
    """Render `slurm/train.sh` for `sbatch`, with the spec, the overrides and the site's settings inside.

    Sourced files are inlined, so the script needs no checkout. Raises SpecError if this package has no such script.
    """
    exports = {"JOB_SPEC": run.source, **run.overrides, **settings}
    lines = _script("train.sh").splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    lines[last + 1 : last + 1] = ["", *(f"export {name}={shlex.quote(value)}" for name, value in exports.items())]
    return "\n".join(lines) + "\n"


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
