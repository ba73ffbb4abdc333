"""What `tests.fuzz` puts through the job: specs, bases, adapters, chat templates and rows, made wrong in known ways.

`RAW` are texts of YAML that stand for one value each, by the kind of trouble that they are.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.tiny import job_spec, load_tiny, make_model, picture

LONG = "a" * 5000
RAW: dict[str, tuple[str, ...]] = {
    "date": (
        *("2024-13-45", "2024-02-30", "0000-00-00", "2024-01-01", "2024-01-01T99:99:99", "2001-12-14t21:59:43.1-99:99"),
        *("99:99:99", "1:60", "2024-01-01 10:00:00 +25:00", "9999-12-31T23:59:59-23:00"),
    ),
    "number": (
        *("9" * 4300, "9" * 4301, "-" + "9" * 6000, "0x" + "f" * 5000, "0b" + "1" * 20000, "1" + "0" * 400),
        *("100000000", "2147483648", "9223372036854775808", "18446744073709551616", "0", "-1", "1_000", "0o17", "1e8"),
        *("0777", "08", "1e400", "-0.0", "5e-324", "1e308", "0x", "0b", "_", "1__", "+", "." * 3, "190:20:30.15"),
    ),
    "not finite": (".inf", "-.inf", ".nan", ".NaN", "1e999", "-1e999"),
    "tag": (
        *(
            "!!binary '===='",
            "!!binary AAAA",
            "!!binary é",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!!omap [1]",
            "!!pairs [a]",
        ),
        *(
            "!!timestamp x",
            "!!int x",
            "!!int ''",
            "!!float ''",
            "!!float x",
            "!!bool x",
            "!!bool ''",
            "!!null x",
            "!foo b",
        ),
        *("!!str [a]", "!!map x", "!!seq x", "!!python/object/apply:os.system [ls]", "!!python/name:os.system ''"),
        *(
            "!<tag:yaml.org,2002:int> a",
            "!!int '+'",
            "!!int '0x'",
            "!!int '1:'",
            "!!float '1:'",
            "!!merge x",
            "!!value x",
        ),
    ),
    "alias": (
        *("&a [*a]", "&a {x: *a}", "*nope", "{<<: *nope}", "&a {<<: *a}", "{<<: 5}", "{<<: [1]}", "{<<: [{a: 1}, *b]}"),
        *("&a {? *a : 1}", "&a [[[*a]]]", "{<<: {<<: {a: 1}}}", "{=: 1}", "=", "<<", "&a &b c", "[&a x, *a, *a]"),
    ),
    "bomb": (
        "[&a [x,x,x,x,x,x,x,x,x], "
        + ", ".join(f"&{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "]",
        "{q: &a {x: y, z: w}, "
        + ", ".join(
            f"q{b}: &{b} {{{', '.join(f'k{n}: *{a}' for n in range(9))}}}"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        )
        + "}",
    ),
    "text": (
        *(
            '"\\uD800"',
            '"\\uDFFFx"',
            '"\\0"',
            '"a\\0b"',
            '"\\e[31m"',
            '"\\u202e"',
            '"😀"',
            '"\\ufeff"',
            '"\\U00110000"',
        ),
        *('"\\x7f\\x80"', '"' + LONG * 200 + '"', '"\\q"', '"\n"', "'", '"', "%", "@", "`", "|", ">", "? ", "- ", ": "),
    ),
    "path": (
        *('"~nobody-here/x"', '"~"', '"~root\\0"', f'"/{LONG}"', f'"{"a/" * 3000}"', '"file://"', '"file:///\\0"'),
        *('"file://host/x"', '"s3://"', '"s3://bucket/../x"', '"s3://bucket/\\0"', '"s3:///x"', '"s3://b/x"', '"//"'),
        *(
            '"http://[::1"',
            '"s3://[/x"',
            '"file://[::1]]/x"',
            '".."',
            '"."',
            '" "',
            '"\\n"',
            '"/dev/null"',
            '"/dev/zero"',
        ),
        *(
            '"/proc/self/mem"',
            '"/etc/passwd"',
            '"/proc"',
            '"hf://x"',
            '"file:///%00"',
            '"file:///%ff"',
            '"a/b"',
            '"a b/c"',
        ),
        *('"\\uD800/x"', '"/\\uD800"', '"s3://bucket/\\uD800"', '"s3://bucket-name/x"', '"user:pw@host:/x"', '"a/.."'),
        *(
            '"~nobody-here"',
            '"s3://bucket:99999/x"',
            '"file://~nobody-here/x"',
            '"file://./x"',
            '"-"',
            '"../b"',
            '"a--b/c"',
        ),
    ),
    "pattern": (
        *("'('", "'(a+)+$'", "'['", "'(?P<n>a)(?P<n>b)'", "'(?i)(x)'", "'(a){999999}'", "'\\p{L}(x)'", "'(?<=a+)(b)'"),
        *(
            "'(?>a)(b)'",
            f"'{'(' * 3000}'",
            f"'{'(' * 3000}{')' * 3000}'",
            "'(?R)(x)'",
            "'[[a]&&b](x)'",
            "'x{9999999999}(a)'",
        ),
        *(
            "'(?(1)a)'",
            "'\\N{DASH}(x)'",
            "'(?e)(foo){e<=1}'",
            "'(?L)(x)'",
            "'*'",
            "'(?s-i:x)(a)'",
            "'x(?i)(y)'",
            "'\\8(a)'",
        ),
        *("'(((a{99}){99}){99}){99}'", "'{a'", "'{0.__class__}'", "'{findings}'", "'{{{'", "'(?#'", "'(?V1)[a--b](c)'"),
    ),
    "kind": (
        *(
            "null",
            "true",
            "[]",
            "{}",
            "[[]]",
            "[1]",
            "{a: 1}",
            "x",
            "5",
            "5.5",
            "[null]",
            "{1: 2}",
            "''",
            "[a, a]",
            "[true]",
        ),
        *(
            "{a: {}}",
            "{a: {column: b}}",
            "{loss: {max_value: 1}}",
            "[[1, 2], [3]]",
            "[1, 2]",
            "[-1]",
            "{a: null}",
            "auto",
        ),
    ),
    "key": (
        *(
            "{? [a] : b}",
            "{1: 2}",
            "{null: 1}",
            "{true: x}",
            "{'': x}",
            "{.nan: 1}",
            "{2024-13-45: x}",
            "{? {a: b} : c}",
        ),
        *(
            "{? &a [*a] : 1}",
            '{"\\uD800": 1}',
            '{"\\0": 1}',
            f"{{{LONG}: 1}}",
            "{a: 1, a: 2}",
            "{1: a, true: b}",
            "{.inf: 1}",
        ),
        *(
            "{? !!set {a} : 1}",
            "{? !!binary AAAA : 1}",
            "{2024-01-01: x}",
            '{"a.b": {column: c}}',
            '{"a/b": {column: c}}',
        ),
        *(
            '{"../x": {column: c}}',
            '{"\\uD800": {column: c}}',
            f"{{{LONG}: {{column: c}}}}",
            "{token: x}",
            "{__class__: 1}",
        ),
    ),
    "nesting": (
        *("[" * 500 + "]" * 500, "[" * 20000, "{a: " * 500 + "1" + "}" * 500, "{a: " * 4000 + "1" + "}" * 4000),
        *("[" * 4000 + "]" * 4000, "[" * 90 + "]" * 90, "!a " * 2000 + "x", "{? " * 500 + "a" + "}" * 500),
    ),
}
TEMPLATES = {
    "endless": (
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(99999) %}{{ messages|tojson }}{% endfor %}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ range(99999)|map('string')|map('upper')|list|sort|unique|list|length }}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
    ),
    "gigantic": (
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x' * 10 ** 8 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 2 ** 100000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'a'|center(1000000000) }}",
        "{{ 'a'.rjust(10 ** 9) }}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 'x'|indent(10 ** 9, true) }}",
        "{% for i in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}",
    ),
    "broken": (
        *(
            "{{",
            "{% for %}",
            "{% endif %}",
            "{{ 1 / 0 }}",
            "{{ nope.x.y }}",
            "{{ raise_exception('no') }}",
            "{% include 'x' %}",
        ),
        *(
            "{% extends 'x' %}",
            "{% import 'x' as y %}",
            "{{ messages[99] }}",
            "{{ messages[0].__class__ }}",
            "{{ 'a' + 1 }}",
        ),
        *(
            "{{ [] | first }}",
            "{{ messages|map(attribute='x')|sum }}",
            "{{ x() }}",
            "{{ messages | nope }}",
            "{% nope %}",
        ),
        *(
            "{{ strftime_now(1) }}",
            "{{ strftime_now('%') }}",
            "{{ (" * 300,
            "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        ),
        *(
            "{% break %}",
            "{{ ''.__class__.__mro__ }}",
            "{{ messages.pop() }}",
            "{{ messages.clear() }}",
            "{{ {}|tojson(indent=-1) }}",
        ),
        *(
            "{{ int('9' * 5000) }}",
            "{{ ('9' * 5000)|int }}",
            "{{ caller() }}",
            "{{ self.x() }}",
            "{{ range(10 ** 9)|list }}",
        ),
    ),
    "odd": (
        *(
            "",
            " ",
            "x",
            "\0",
            "\ud800",
            "{{ messages }}",
            "<|im_end|>",
            "<image>",
            "{{ '<|image_pad|>' * 99 }}",
            "{# #}",
        ),
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
        "{{ range(9)|random }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% generation %}{{ messages }}{% endgeneration %}",
    ),
}


@dataclass(frozen=True)
class Case:
    """One call of `job check`."""

    kind: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Ground:
    """A tiny base, an adapter for it and rows, all good; and a folder for one case at a time."""

    base: Path
    adapter: Path
    data: Path
    case: Path

    def clear(self) -> None:
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()

    def spec(self) -> dict[str, Any]:
        return {
            "model": {"name_or_path": str(self.base)},
            "lora": {"r": 4},
            "dataset": {"path": str(self.data), "eval_fraction": 0.25},
            "output": {"url": str(self.case / "output")},
        }

    def check(self, kind: str, tree: Mapping[str, Any]) -> Case:
        file = self.case / "spec.yaml"
        file.write_text(json.dumps(tree))
        return Case(kind, ("check", str(file), "--example"))


def make_ground(folder: Path) -> Ground:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ground = Ground(folder / "base", folder / "adapter", folder / "data", folder / "case")
    make_model("qwen2_5_vl", ground.base)
    load_tiny(ground.base).model.save_pretrained(ground.adapter)
    ground.data.mkdir()
    for number in range(8):
        picture(number).save(ground.data / f"{number}.png")
    lines = [{"file_name": f"{number}.png", "caption": f"No finding {number}."} for number in range(8)]
    (ground.data / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ground


def _paths(node: Any, prefix: str = "") -> list[str]:
    """Sections and leaves of the whole schema, by dotted path."""
    from job.config.schema import flatten

    leaves = list(flatten(node))
    sections = {leaf.rpartition(".")[0] for leaf in leaves} - {""}
    return [*leaves, *sorted(sections)]


PLACES = _paths(job_spec().model_dump(mode="json"))
INNER = (
    "evaluation.labels.a.column",
    "evaluation.labels.a.pattern",
    "evaluation.labels.a.values",
    "evaluation.labels.a",
)
INNER += ("evaluation.require.loss.max_value", "evaluation.require.loss", "evaluation.extra_metrics.bertscore")
INNER += ("nope", "model.nope", "dataset.dicom.nope", "training.api_token")
NATURAL = {
    "path": (
        "model.name_or_path",
        "dataset.path",
        "dataset.eval_path",
        "output.url",
        "lora.init_adapter",
        "evaluation.cache",
        "evaluation.extra_metrics.bertscore",
        "dataset.dicom.reports",
        "dataset.name",
        "model.revision",
        "dataset.split",
    ),
    "pattern": (
        "lora.target_modules",
        "dataset.dicom.series.description",
        "evaluation.labels.a.pattern",
        "dataset.answer",
        "dataset.instruction",
    ),
    "key": ("evaluation.labels", "evaluation.require", "evaluation.extra_metrics", "evaluation.labels.a"),
}
MARK = "@@{}@@"


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    node = tree
    for section in sections:
        inner = node.get(section)
        node[section] = node = inner if isinstance(inner, dict) else {}
    node[leaf] = value


def spec_case(rng: random.Random, ground: Ground) -> Case:
    """A good spec with one to three values of trouble in it; or one whose text is damaged; or one that comes another way."""
    way = rng.random()
    if way < 0.08:
        return _damaged_text(rng, ground)
    if way < 0.16:
        return _odd_source(rng, ground)
    kind = rng.choice([*RAW])
    tree, texts = ground.spec(), list[str]()
    if "labels" in kind or rng.random() < 0.2:
        _put(tree, "evaluation.labels.a.column", "caption")
    for number in range(rng.choice((1, 1, 1, 2, 3))):
        places = NATURAL.get(kind, ()) if rng.random() < 0.7 else ()
        _put(tree, rng.choice(places or (*PLACES, *INNER)), MARK.format(number))
        texts.append(rng.choice(RAW[kind]))
    text = json.dumps(tree)
    for number, raw in enumerate(texts):
        text = text.replace(json.dumps(MARK.format(number)), raw)
    if way < 0.32:
        named = rng.choices((*PLACES, *INNER), k=rng.choice((1, 1, 2, 5)))
        variables = {f"JOB__{each.upper().replace('.', '__')}": rng.choice(RAW[kind]) for each in named}
        file = ground.case / "spec.yaml"
        file.write_text(json.dumps(ground.spec()))
        usable = {name: raw for name, raw in variables.items() if "\0" not in raw and len(raw) < 100_000}
        return Case(f"spec: override, {kind}", ("check", str(file)), usable)
    file = ground.case / "spec.yaml"
    file.write_text(text)
    return Case(f"spec: {kind}", ("check", str(file)))


NONSENSE = (
    *(
        "",
        " ",
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e400",
        "9" * 5000,
        "1,5",
        "1_0",
        "0x10",
        "٣",
        "x",
        "[1]",
        "null",
        "\n",
    ),
    *("~nobody-here/x", "/proc/x", "/dev/null", "/dev/zero", LONG, f"/{LONG}", "a" * 100_000, "s3://", "s3://b/x"),
    *("file://host/x", "file:///%00", "http://[::1", "..", "\udcff", "\u202e", "true", "aws", "99999999999999999999"),
)
VARIABLES = (
    *("JOB_SCRATCH", "JOB_SCRATCH_GB", "JOB_GRACE_SECONDS", "JOB_LEASE_SECONDS", "JOB_GPU_MEMORY_GB", "JOB_BUNDLE"),
    *(
        "JOB_PRICE_PER_HOUR",
        "JOB_METRICS_PORT",
        "JOB_END_TIME",
        "SLURM_JOB_END_TIME",
        "JOB_UNKNOWN",
    ),
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "MASTER_PORT", "TMPDIR"),
    *("HF_ENDPOINT", "HTTPS_PROXY", "SSL_CERT_FILE", "AWS_ENDPOINT_URL", "AWS_REGION", "HF_HOME", "LLAMA_CPP"),
    *("JOB__", "JOB____", "JOB__NAME__X", "JOB__TRAINING", "JOB__EVALUATION__LABELS__A__COLUMN", "JOB__LORA__R__"),
)


def environment_case(rng: random.Random, ground: Ground) -> Case:
    """A good spec, and one to three variables that say nonsense."""
    chosen = rng.sample(VARIABLES, rng.choice((1, 1, 1, 2, 3)))
    file = ground.case / "spec.yaml"
    file.write_text(json.dumps(ground.spec()))
    return Case(f"environment: {chosen[0]}", ("check", str(file)), {name: rng.choice(NONSENSE) for name in chosen})


def _damaged_text(rng: random.Random, ground: Ground) -> Case:
    import yaml

    data = bytearray((yaml.safe_dump if rng.random() < 0.5 else json.dumps)(ground.spec()).encode())
    for _ in range(rng.choice((1, 2, 5))):
        place = rng.randrange(len(data))
        if rng.random() < 0.4:
            data[place] = rng.randrange(256)
        elif rng.random() < 0.5:
            data[place:place] = rng.choice(
                (b"\xff\xfe", b"\0", b"\t", b"&a ", b"*a", b"!!int ", b"\xc3", b"{", b"]", b"- ")
            )
        else:
            del data[place : place + rng.randrange(1, 30)]
    file = ground.case / "spec.yaml"
    file.write_bytes(bytes(data).decode(errors="ignore").encode("utf-16") if rng.random() < 0.05 else bytes(data))
    return Case("spec: damaged text", ("check", str(file)))


def _odd_source(rng: random.Random, ground: Ground) -> Case:
    (ground.case / "large").touch()
    with (ground.case / "large").open("r+b") as stream:
        stream.truncate(2**33)
    (ground.case / "loop").symlink_to("loop")
    sources = (
        *(
            "/dev/zero",
            "file:///dev/zero",
            str(ground.case),
            str(ground.case / "large"),
            f"file://{ground.case}/large",
            "~",
        ),
        *(
            str(ground.case / "loop"),
            "~nobody-here/x",
            LONG,
            f"/{LONG}",
            "s3://",
            "s3://b/x",
            "s3://bucket/x",
            "file://",
            "-",
        ),
        *(
            "file://host/x",
            "http://[::1",
            "file:///%00/x",
            "s3://bucket/%00",
            "\udcff",
            "a\udcffb: c",
            "x: [\n",
            "x",
            "[]",
        ),
        *(
            "file:///x/../../y",
            "s3://bucket/../x",
            "file://[/x",
            "s3://user:pw@bucket/x",
            "/proc/self/mem",
            "{",
            "'",
            "\n",
        ),
    )
    source = rng.choice(sources)
    return (
        Case("spec: source", ("check",), {"JOB_SPEC": source})
        if rng.random() < 0.5
        else Case("spec: source", ("check", source))
    )


JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        1e308,
        2**63,
        10**30,
        "",
        "x",
        "\0",
        "\ud800",
        [],
        {},
        [[]],
        [None],
        {"": None},
        [1, 2],
        0.5,
    ),
    *(float("nan"), float("inf"), "a" * 10_000, {"a": {"b": {}}}, [{}], "../../x", "auto", "<|im_end|>", -(2**63)),
)


def _junked(rng: random.Random, tree: Any) -> Any:
    """A tree of JSON with one of its values replaced, removed or doubled."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.15:
        return rng.choice(JUNK)
    if isinstance(tree, dict):
        key, copy = rng.choice([*tree]), dict(tree)
        if rng.random() < 0.2:
            del copy[key]
        else:
            copy[key] = _junked(rng, tree[key])
        return copy
    place, items = rng.randrange(len(tree)), list(tree)
    items[place] = _junked(rng, items[place])
    return items


def _damage_json(rng: random.Random, file: Path) -> str:
    """Make a file of JSON wrong, and say how."""
    text, ways = (
        file.read_text(),
        ("values", "values", "values", "values", "cut", "bytes", "deep", "digits", "gone", "folder"),
    )
    way = rng.choice(ways)
    if way == "values":
        tree = json.loads(text)
        for _ in range(rng.choice((1, 1, 2))):
            tree = _junked(rng, tree)
        file.write_text(json.dumps(tree))
    elif way == "cut":
        file.write_text(text[: rng.randrange(len(text))])
    elif way == "bytes":
        place = rng.randrange(len(text))
        file.write_bytes(text.encode()[:place] + rng.randbytes(3) + text.encode()[place:])
    elif way == "deep":
        file.write_text(rng.choice(("[" * 50_000, '{"a":' * 50_000, "[" * 900 + "]" * 900)))
    elif way == "digits":
        key = rng.choice([*json.loads(text)]) if text.lstrip().startswith("{") else "x"
        file.write_text(
            json.dumps(json.loads(text) | {key: "@"}).replace('"@"', rng.choice(("9" * 5000, "1e999", "-1e400")))
        )
    else:
        file.unlink()
        if way == "folder":
            file.mkdir()
    return way


def _damage_weights(rng: random.Random, file: Path) -> str:
    """Make a safetensors file wrong, and say how."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: data[
            : rng.choice((0, 3, 8, 8 + length // 2, 8 + length, len(data) - 1, rng.randrange(len(data))))
        ],
        "longer": lambda: data + b"\0" * rng.choice((1, 1000)),
        "length": lambda: (
            struct.pack("<Q", rng.choice((0, 1, 2**40, 2**63, 2**63 - 1, 2**64 - 1, length + 1, length - 1))) + data[8:]
        ),
        "bytes": lambda: data[:8] + rng.randbytes(length) + rest,
        "header": lambda: _with_header(_junked(rng, header), rest),
        "tensor": lambda: _with_header(header | {rng.choice([*header]): _junked(rng, _a_tensor(rng, header))}, rest),
        "deep": lambda: _with_header("[" * 50_000, rest),
        "digits": lambda: _with_header(
            json.dumps(header).replace('"shape": [', '"shape": [' + "9" * 5000 + ", ", 1), rest
        ),
        "overlap": lambda: _with_header(header | {rng.choice([*header]): _a_tensor(rng, header)}, rest),
    }
    way = rng.choice([*ways])
    file.write_bytes(ways[way]())
    return way


def _a_tensor(rng: random.Random, header: dict[str, Any]) -> Any:
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def _with_header(header: Any, rest: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def base_case(rng: random.Random, ground: Ground) -> Case:
    """A base one of whose files is damaged, or whose index names what is not there."""
    folder = ground.case / "base"
    shutil.copytree(ground.base, folder)
    way = rng.random()
    if way < 0.3:
        kind = f"base: weights, {_damage_weights(rng, folder / 'model.safetensors')}"
    elif way < 0.45:
        kind = _with_index(rng, folder)
    else:
        file = rng.choice(sorted(folder.glob("*.json")))
        kind = f"base: {file.name}, {_damage_json(rng, file)}"
    return ground.check(kind, ground.spec() | {"model": {"name_or_path": str(folder)}})


def _with_index(rng: random.Random, folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    data = (folder / "model-00001-of-00002.safetensors").read_bytes()
    names = [name for name in json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]) if name != "__metadata__"]
    index: Any = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    if rng.random() < 0.5:
        names = (
            "model-00002-of-00002.safetensors",
            "../x",
            "",
            ".",
            "\0",
            LONG,
            "config.json",
            5,
            None,
            [],
            "\ud800",
            "/dev/zero",
        )
        index["weight_map"][rng.choice([*index["weight_map"]])] = rng.choice(names)
        way = "names"
    else:
        index, way = _junked(rng, index), "values"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"base: index, {way}"


def adapter_case(rng: random.Random, ground: Ground) -> Case:
    folder = ground.case / "adapter"
    shutil.copytree(ground.adapter, folder)
    if rng.random() < 0.5:
        kind = f"adapter: weights, {_damage_weights(rng, folder / 'adapter_model.safetensors')}"
    else:
        kind = f"adapter: config, {_damage_json(rng, folder / 'adapter_config.json')}"
    return ground.check(kind, ground.spec() | {"lora": {"r": 4, "init_adapter": str(folder)}})


def template_case(rng: random.Random, ground: Ground) -> Case:
    """A base with another chat template: one of ours, alone or somewhere in the good one, or the good one damaged."""
    folder = ground.case / "base"
    shutil.copytree(ground.base, folder)
    file = next(folder.glob("*.jinja"))
    good, kind = file.read_text(), rng.choice([*TEMPLATES, "damaged"])
    place = rng.randrange(len(good))
    if kind == "damaged":
        text = good[:place] + rng.choice(("{", "}", "%", "{{", "{% endfor %}", "'")) + good[place + rng.randrange(9) :]
    else:
        bad = rng.choice(TEMPLATES[kind])
        text = rng.choice((bad, bad + good, good + bad, good[:place] + bad + good[place:]))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return ground.check(f"template: {kind}", ground.spec() | {"model": {"name_or_path": str(folder)}})


VALUES = (
    *(
        "null",
        "true",
        "0",
        "-1",
        "1e308",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "9" * 5000,
        "[]",
        "{}",
        '""',
        '" "',
        '"x"',
    ),
    *(
        '"\\u0000"',
        '"\\ud800"',
        '"<image>"',
        '"<|im_end|>"',
        "[" * 900 + "]" * 900,
        "[" * 20_000 + "]" * 20_000,
        '[["x"]]',
    ),
    *(
        '{"a":' * 900 + "1" + "}" * 900,
        f'"{LONG * 400}"',
        '"0.png"',
        '["0.png", "1.png"]',
        "\"['0.png']\"",
        '"' + "[" * 5000 + '"',
    ),
    *(
        '"http://\\u0000/x"',
        '"http://[::1"',
        '"data:image/png;base64,AAAA"',
        '"data:,"',
        '"/dev/zero"',
        '"../../x"',
        '"~nobody/x"',
    ),
    *(
        '{"bytes": "AAAA"}',
        '{"path": "0.png"}',
        '{"path": 5}',
        '{"bytes": null, "path": null}',
        '"s3://bucket/\\u0000"',
        '"."',
    ),
    *('[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]', '[{"from": "human", "value": 5}]'),
    *('[{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": ["a"]}]', '[{"role": {}}]'),
    *(
        '[{"role": "user", "content": [{"type": []}]}]',
        '[{"role": ["user"], "content": "x"}]',
        '[{"from": null}]',
        "[5]",
    ),
    *(
        '[{"role":"user","content":[{"type":"image_url","image_url":{"url":5}}]},{"role":"assistant","content":"a"}]',
        '"file://"',
    ),
    *(
        '[{"role":"user","content":[{"type":"text","text":{}}]},{"role":"assistant","content":[]}]',
        '"' + "(" * 20_000 + '"',
    ),
    *(
        '"[' + "9" * 5000 + ']"',
        '"[' + "-" * 5000 + '1]"',
        '"[0.png"',
        '"http://127.0.0.1:9/x.png"',
        '"http:///x"',
        '"ftp://x/y"',
    ),
)
COLUMNS = ("file_name", "caption", "weight", "messages", "history", "patient", "label", "x")
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    *({"weight_column": "weight"}, {"messages_column": "messages", "image_column": None}, {"group_column": "patient"}),
    *(
        {"stratify_column": "label"},
        {"instruction": "About {history}:"},
        {"answer": "{label}: {x}"},
        {"image_column": "x"},
    ),
    *({"filter": {"label": ["a", True], "x": "1"}}, {"dropna": ["history", "patient"]}),
    *(
        {"image_column": None},
        {"image_column": ["file_name", "x"]},
        {"instruction_column": "history"},
        {"answer_column": "x"},
    ),
)


def rows_case(rng: random.Random, ground: Ground) -> Case:
    """A table with strange values, strange lines or strange bytes."""
    folder, kind = (
        ground.case / "data",
        rng.choice(("values", "values", "values", "lines", "list", "csv", "bytes", "card")),
    )
    shutil.copytree(ground.data, folder)
    settings, lines = {"max_bad_fraction": rng.choice((0.01, 1.0))} | rng.choice(SETTINGS), list[str]()
    for number in range(8):
        row = dict.fromkeys(COLUMNS, '"x"') | {
            "file_name": f'"{number}.png"',
            "caption": f'"Nothing {number}."',
            "weight": "1",
        }
        row["messages"] = VALUES[-21]
        if kind != "card" and rng.random() < 0.4:
            used = [name for name in COLUMNS if name in str(settings)] or [*COLUMNS]
            row[rng.choice(used)] = rng.choice(VALUES)
        lines.append("{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}")
    file, text = folder / "metadata.jsonl", "\n".join(lines)
    if kind == "lines":
        lines[rng.randrange(8)] = rng.choice(
            (*VALUES, "{", "}", "", "{'a': 1}", '{"file_name": 1, "file_name": 2}', '{"": 1}')
        )
        text = "\n".join(lines)
    elif kind == "list":
        file, text = folder / "metadata.json", f"[{', '.join(lines)}]"
    elif kind == "csv":
        file, text = (
            folder / "metadata.csv",
            "file_name,caption,x\n" + "\n".join(rng.choice(VALUES) + ",a" for _ in lines),
        )
    elif kind == "card":
        (folder / "README.md").write_text(
            f"---\n{rng.choice(('configs', 'dataset_info', 'x'))}: {rng.choice(RAW[rng.choice([*RAW])])}\n---\n"
        )
    data = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        place = rng.randrange(len(data))
        data = data[:place] + rng.randbytes(rng.choice((1, 4, 100))) + data[place:]
    (folder / "metadata.jsonl").unlink()
    file.write_bytes(data)
    tree = ground.spec()
    tree["dataset"] |= {"path": str(folder)} | settings
    return ground.check(f"rows: {kind}", tree)
