"""A spec from text, path or URL; every problem at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from job.config.loader import load_spec, validate
from job.config.parsing import parse
from job.config.rules import differences
from job.config.schema import flatten
from job.errors import SpecError

MINIMAL = "model: {name_or_path: m}\ndataset: {path: d}\noutput: {url: o}\n"


def problems(text: str, **environment: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec({"JOB_SPEC": text, **environment})
    return str(caught.value)


def test_defaults_are_those_of_a_good_practitioner():
    spec = load_spec({"JOB_SPEC": MINIMAL})
    assert (spec.lora.r, spec.training.learning_rate, spec.training.effective_batch_size) == (16, 2e-4, 8)
    assert spec.training.train_on_responses_only


def test_inline_yaml_json_path_and_url_give_the_same_spec(tmp_path: Path):
    file = tmp_path / "spec.yaml"
    file.write_text(MINIMAL)
    as_json = json.dumps(yaml.safe_load(MINIMAL))
    specs = [load_spec({"JOB_SPEC": source}) for source in (MINIMAL, as_json, str(file), f"file://{file}")]
    assert all(spec == specs[0] for spec in specs)


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_spec_says_what_to_give(empty: str):
    assert "JOB_SPEC is empty" in problems(empty)


def test_a_missing_file_is_named():
    assert "cannot read /no/such/spec.yaml: No such file" in problems("/no/such/spec.yaml")


def test_a_missing_url_is_named(tmp_path: Path):
    assert f"cannot read file://{tmp_path}/none.yaml: There is no none.yaml" in problems(f"file://{tmp_path}/none.yaml")


def test_all_problems_are_reported_at_once_with_place_found_and_cure():
    text = problems(
        "model: {nam_or_path: m}\n"
        "lora: {r: many, finetune_vision_layers: false, finetune_language_layers: false}\n"
        "dataset: {path: d}\n"
        "training: {learning_rate: -1, learning_rat: 1}\n"
        "output: {}\n"
    )
    assert "the spec has 7 problems" in text
    assert "model.nam_or_path: no such field; did you mean model.name_or_path?" in text
    assert "model.name_or_path: missing; A hub id" in text
    assert 'lora.r: found "many" (text)' in text
    assert "training.learning_rate: found -1 (a number); must be greater than 0" in text
    assert "training.learning_rat: no such field; did you mean training.learning_rate?" in text
    assert "output.url: missing" in text
    assert "finetune_vision_layers and finetune_language_layers are both false" in text


def test_a_field_in_the_wrong_section_is_pointed_to_the_right_one():
    assert "did you mean training.learning_rate?" in problems(MINIMAL + "learning_rate: 1e-4\n")


@pytest.mark.parametrize(
    ("evaluation", "sentence"),
    [
        (
            "require: {rougeL: {min: 0.9}}",
            "require.rougeL.min: no such field; did you mean evaluation.require.rougeL.min_change or "
            "evaluation.require.rougeL.min_value?",
        ),
        ("require: {rogueL: {min_value: 0.9}}", "require.rogueL: no such metric; did you mean rougeL?"),
        ("require: {nothing: {min_value: 0.9}}", "no such metric; the metrics are bleu, chrf"),
        ("primary_metric: rougel", "no metric rougel; did you mean rougeL?"),
        ("labels: {finding: {colum: f}}", "no such field; did you mean evaluation.labels.finding.column?"),
        ("labels: {finding: {separator: f}}", "labels.finding.column: missing; Column with the true value"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(evaluation: str, sentence: str):
    assert sentence in problems(f"{MINIMAL}\nevaluation: {{{evaluation}}}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a,b\n1,'x: y\n", "is not YAML or JSON: line 2"), ("words", "must be a mapping with the sections model")],
)
def test_a_file_that_is_no_spec_is_called_by_its_name(tmp_path: Path, text: str, sentence: str):
    (tmp_path / "rows.csv").write_text(text)
    assert f"{tmp_path}/rows.csv {sentence}" in problems(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("addition", "sentence"),
    [
        ("training: {effective_batch_size: 8, per_device_train_batch_size: 3}", "not a multiple of"),
        ("model: {name_or_path: m, trust_remote_code: true}", "full commit"),
        ("model: {name_or_path: m, backend: unsloth, precision: 32bit}", "not 32bit"),
        ("dataset: {path: d, eval_path: e, eval_split: s}", "keep one"),
        ("dataset: {path: d, eval_path: e, eval_fraction: 0.5}", "remove one"),
        ("dataset: {path: d, eval_split: Train}", "every held-out row would be trained on"),
        ("lora: {finetune_attention_modules: false, finetune_mlp_modules: false}", "nothing would be trained"),
        (
            "lora: {finetune_expert_modules: true}",
            "experts are fused tensors, and merge and gate know adapters",
        ),
        ("lora: {target_modules: [fc1], finetune_connector: true}", "and name the connector's layers"),
        ("lora: {target_modules: '('}", "not a regular expression"),
        ("evaluation: {labels: {f: {column: c, values: [a], pattern: (b)}}}", "not both"),
        ("evaluation: {labels: {f: {column: c, pattern: b}}}", "has no group"),
        ("output: {url: o, sse: AES256}", "an s3:// store"),
    ],
)
def test_contradictory_fields_are_refused(addition: str, sentence: str):
    tree = yaml.safe_load(MINIMAL) | yaml.safe_load(addition)
    assert sentence in problems(yaml.safe_dump(tree))


def test_an_empty_path_is_no_folder():
    """It would be the folder where the job was started."""
    said = problems(MINIMAL.replace("path: d", "path: '', dicom: {frames: []}").replace("url: o", "url: ''"))
    assert 'dataset.path: found "" (text); String should have at least 1 character' in said
    assert "output.url" in said
    assert "found [] (a list); List should have at least 1 item" in said


def test_overrides_come_from_the_environment():
    spec = load_spec({"JOB_SPEC": MINIMAL, "JOB__TRAINING__LEARNING_RATE": "1e-4", "JOB__LORA__R": "8"})
    assert (spec.training.learning_rate, spec.lora.r) == (1e-4, 8)


def test_an_override_can_be_a_list():
    spec = load_spec({"JOB_SPEC": MINIMAL, "JOB__EVALUATION__GROUPS": "[sex, site]"})
    assert spec.evaluation.groups == ["sex", "site"]


def test_an_unknown_override_is_refused():
    assert "training.learnin_rate: no such field" in problems(MINIMAL, JOB__TRAINING__LEARNIN_RATE="1")


def test_an_override_below_a_value_is_refused():
    assert "JOB__MODEL__NAME_OR_PATH__X: does not name a field" in problems(MINIMAL, JOB__MODEL__NAME_OR_PATH__X="1")


def test_a_secret_in_the_spec_is_refused_and_not_repeated():
    text = problems(MINIMAL.replace("url: o", "url: o, aws_secret_access_key: hunter2"))
    assert "credentials come from the platform" in text
    assert "hunter2" not in text


def test_the_value_of_an_unknown_field_is_not_repeated():
    assert "hunter2" not in problems(MINIMAL + "whatever: hunter2\n")


def test_a_key_given_twice_is_refused_with_its_line():
    assert "line 5, column 1: the key 'name' is given twice" in problems(MINIMAL + "name: a\nname: b\n")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("&a [*a]", "line 4, column 11: an alias points to a value that contains it"),
        (
            "[&a [1,1,1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], "
            "&d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]]",
            "more than 10,000 values",
        ),
        ("[" * 40 + "]" * 40, "nested deeper than 30"),
        ("[" * 1_000_000, "nested deeper than 30"),
        (f"[{'a,' * 200_000}a]", "more than 10,000 values"),
        ("[" * 9000, "not YAML or JSON: "),
        ("!!int x", "does not match its tag tag:yaml.org,2002:int"),
        ("!!binary AAAA", "the tag tag:yaml.org,2002:binary is not allowed in a spec"),
        ("!!map x", "the tag tag:yaml.org,2002:map is not allowed"),
        ("9" * 5000, "a number of 5000 digits"),
        ('"\\U00110000"', "an escape in quotes stands for no character"),
    ],
)
def test_what_no_spec_needs_of_yaml_is_refused_with_its_place(value: str, sentence: str):
    text = problems(MINIMAL + f"lora: {{r: {value}}}\n")
    assert "JOB_SPEC is not YAML or JSON: " in text
    assert sentence in text


def test_a_date_is_text():
    assert parse("a: 2024-13-45\nb: 2024-01-01") == {"a": "2024-13-45", "b": "2024-01-01"}


@pytest.mark.parametrize(
    ("addition", "sentence"),
    [
        ('name: "a\\0b"', "name: contains the character U+0000"),
        ('dataset: {path: d, split: "\\uD800"}', "dataset.split: contains the character U+D800"),
        ('evaluation: {labels: {"\\uD800": {column: c}}}', "evaluation.labels: a key: contains the character U+D800"),
        ("output: {url: 'file:///a%00b'}", "output.url: 'file:///a%00b' contains the character NUL"),
        ("output: {url: 's3://[x'}", "output.url: 's3://[x' is not a URL"),
        ("lora: {r: 100000000}", "lora.r: found 100000000 (a number); must be less than or equal to 16384"),
        ("training: {max_steps: 3000000000}", "must be less than or equal to 2147483647"),
        ("training: {weight_decay: .inf}", "must be a finite number"),
        ("evaluation: {require: {loss: {max_value: .nan}}}", "must be a finite number"),
    ],
)
def test_a_value_that_nothing_can_hold_is_refused_by_its_field(addition: str, sentence: str):
    assert sentence in problems(_with(addition))


def _with(addition: str) -> str:
    section = addition.partition(":")[0]
    return "".join(f"{line}\n" for line in MINIMAL.splitlines() if not line.startswith(section)) + addition


def test_a_labels_pattern_is_read_by_what_will_run_it():
    """regex knows what re does not, and the other way round."""
    right = load_spec({"JOB_SPEC": MINIMAL + "evaluation: {labels: {f: {column: c, pattern: '(?<=a+)(\\p{L})'}}}"})
    assert right.evaluation.labels["f"].pattern == "(?<=a+)(\\p{L})"
    for wrong in ("(?P<n>", "(?(x)a)"):
        assert "pattern: not a regular expression" in problems(
            MINIMAL + f"evaluation: {{labels: {{f: {{column: c, pattern: '{wrong}'}}}}}}"
        )


def test_what_is_far_larger_than_a_spec_is_not_read_whole(tmp_path: Path):
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(2**40)
    for source in (str(tmp_path / "weights"), f"file://{tmp_path}/weights"):
        assert "is larger than 1 MB, so it is not a spec" in problems(source)


def test_broken_yaml_is_refused_with_its_place():
    assert "not YAML or JSON: line" in problems("model: [1,\n")


def test_a_list_is_not_a_spec():
    assert "must be a mapping" in problems("- a\n- b: c\n")


def test_numbers_with_exponents_are_numbers():
    assert parse("a: 1e-4") == {"a": 1e-4}


def test_harmless_fields_do_not_change_the_digest():
    spec = load_spec({"JOB_SPEC": MINIMAL})
    same = load_spec({"JOB_SPEC": MINIMAL, "JOB__CHECKPOINT__KEEP": "7", "JOB__TRAINING__LOGGING_STEPS": "1"})
    other = load_spec({"JOB_SPEC": MINIMAL, "JOB__LORA__R": "8"})
    assert spec.digest == same.digest != other.digest
    assert differences(spec, same) == []
    assert differences(spec, other) == ["lora.r: 16 → 8"]


MEASURED = {
    "EVALUATION__LABELS": "{f: {column: c, pattern: (b)}}",
    "EVALUATION__GROUPS": "[sex]",
    "EVALUATION__MAX_ROWS": "9",
    "EVALUATION__MAX_NEW_TOKENS": "9",
    "EVALUATION__CONFIDENCE": "0.9",
    "EVALUATION__EXPLAINED_ROWS": "1",
    "EVALUATION__REQUIRE": "{rougeL: {min_change: 0}}",
    "EVALUATION__EXTRA_METRICS": "{bertscore: /e}",
    "EXPORT__MERGED_FP8": "true",
    "EXPORT__GATE__ROWS": "2",
    "PRIVACY__REPORT_IMAGES": "false",
    "DATASET__PATH": "/moved",
}
NEITHER = {"OUTPUT__ON_CONFLICT": "restart", "CHECKPOINT__KEEP": "5", "NAME": "x", "EVALUATION__EVAL_STEPS": "5"}


@pytest.mark.parametrize("field", [*MEASURED, *NEITHER])
def test_what_only_measuring_and_publishing_read_asks_for_no_new_training(field: str):
    first = load_spec({"JOB_SPEC": MINIMAL})
    other = load_spec({"JOB_SPEC": MINIMAL, f"JOB__{field}": (MEASURED | NEITHER)[field]})
    assert differences(first, other) == []
    assert first.digest == other.digest
    assert (first.result_digest != other.result_digest) is (field in MEASURED)


@pytest.mark.parametrize("field", ["EVAL_LOSS_ROWS", "EVAL_STEPS"])
@pytest.mark.parametrize("chosen", [{"JOB__EVALUATION__TAKE": "best"}, {"JOB__EVALUATION__PATIENCE": "3"}])
def test_rows_that_choose_the_step_decide_the_training(field: str, chosen: dict[str, str]):
    common = {"JOB_SPEC": MINIMAL, "JOB__EVALUATION__EVAL_STEPS": "50", **chosen}
    first, other = load_spec(common), load_spec(common | {f"JOB__EVALUATION__{field}": "9"})
    assert len(differences(first, other)) == 1
    assert first.digest != other.digest


def test_a_resolved_spec_reads_back_as_itself():
    spec = load_spec({"JOB_SPEC": MINIMAL})
    assert validate(yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json")))).digest == spec.digest


LEAVES = sorted(flatten(load_spec({"JOB_SPEC": MINIMAL}).model_dump(mode="json")))


@given(
    field=st.sampled_from(LEAVES),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers(), max_size=2)
    ),
)
def test_any_value_anywhere_gives_a_spec_or_a_sentence_that_names_the_field(field: str, value: object):
    tree: dict[str, Any] = yaml.safe_load(MINIMAL)
    *sections, leaf = field.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = value
    try:
        validate(tree)
    except SpecError as error:
        assert sections[0] in str(error) if sections else leaf in str(error)


@pytest.mark.parametrize("pattern", ["(((a{99}){99}){99})", f"({'a' * 10_001})"])
def test_a_pattern_that_would_take_gigabytes_is_refused(pattern: str):
    said = problems(MINIMAL + f"evaluation: {{labels: {{f: {{column: c, pattern: '{pattern}'}}}}}}")
    assert "evaluation.labels.f.pattern: longer than 10,000 characters with its repetitions expanded" in said
