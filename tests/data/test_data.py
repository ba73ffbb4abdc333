"""Rows as users have them: read, looked at, set aside, split, handed on."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.config.loader import validate
from job.data import Data
from job.data.conversations import conversation
from job.data.facts import ImageFacts, QuarantinedRow
from job.data.prepare import prepare
from job.errors import DataError, SpecError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def png(colour: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, colour).save(stream, "PNG")
    return stream.getvalue()


def folder_of(rows: list[dict[str, Any]], folder: Path, images: dict[str, bytes] | None = None) -> Path:
    """An image folder with one small image a row unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        if "file_name" in row:
            (folder / row["file_name"]).write_bytes((images or {}).get(row["file_name"], png(number % 256)))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"file_name": f"{n}.png", "caption": f"caption {n}", **more} for n in range(count)]


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(**dataset: Any) -> Data:
        tree["dataset"] |= dataset
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def test_an_image_folder_becomes_conversations(tmp_path: Path, prepared):
    folder_of(rows_of(20), tmp_path / "data")
    data = prepared(instruction="Look.", system_prompt="Be brief.")
    row = data.train[0]
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == [{"type": "image"}, {"type": "text", "text": "Look."}]
    assert row["messages"][2]["content"][0]["text"] == row["reference"]
    assert row["images"][0].mode == "RGB"


def test_jsonl_parquet_and_image_folder_give_the_same_rows(tmp_path: Path, tree: dict[str, Any]):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    rows = rows_of(12)
    folder_of(rows, tmp_path / "folder")
    (tmp_path / "folder" / "rows.jsonl").write_text(
        "".join(json.dumps({"image": row["file_name"], "caption": row["caption"]}) + "\n" for row in rows)
    )
    more = {"image_id": "ROCOv2_1", "cui": ["C0040405", "C1306645"]}  # as unsloth/Radiology_mini has them
    embedded = [
        {"image": {"bytes": png(n), "path": None}, "caption": row["caption"]} | more for n, row in enumerate(rows)
    ]
    features = Features({"image": ImageFeature(), "image_id": Value("string"), "caption": Value("string")})
    features["cui"] = List(Value("string"))
    Dataset.from_list(embedded, features=features).to_parquet(tmp_path / "rows.parquet")
    seen = []
    for path in ("folder", "folder/rows.jsonl", "rows.parquet"):
        tree["dataset"] = {"path": str(tmp_path / path)}
        data = prepare(validate(tree), tmp_path / "scratch")
        seen.append([(row["reference"], row["images"][0].getpixel((0, 0))) for row in data.train])
    assert seen[0] == seen[1] == seen[2]


def test_a_missing_dataset_is_named(prepared):
    with pytest.raises(SpecError, match=r"dataset.path: /no/such/place does not exist"):
        prepared(path="/no/such/place")


def test_an_empty_dataset_is_refused(tmp_path: Path, prepared):
    folder_of([], tmp_path / "data")
    with pytest.raises(DataError, match="dataset.path"):
        prepared()


def test_a_folder_without_tables_is_refused(tmp_path: Path, prepared):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.docx").touch()
    with pytest.raises(DataError, match=r"holds 1 × \.docx; expected metadata\.jsonl or \.csv"):
        prepared()


def test_a_missing_column_is_named_with_those_there(tmp_path: Path, prepared):
    folder_of(rows_of(4), tmp_path / "data")
    with pytest.raises(DataError, match=r"answer_column is findings: no such column; dataset.path has .*caption"):
        prepared(answer_column="findings")


def test_a_broken_line_spoils_one_row(tmp_path: Path, prepared):
    folder_of(rows_of(4), tmp_path / "data")
    with (tmp_path / "data" / "metadata.jsonl").open("ab") as file:
        file.write(b'{"file_name": \n["a", "b"]\n{"file_name": "0.png", "caption": "\xff"}\n')
    data = prepared(max_bad_fraction=0.5)
    assert [row.row for row in data.quarantined] == [4, 5, 6]
    for row, reason in zip(data.quarantined, ("not JSON", "not a JSON object", "not UTF-8; save"), strict=True):
        assert reason in row.reason


def bomb() -> bytes:
    """A PNG that says it is 30000 × 30000."""
    size = struct.pack(">4sIIBBBBB", b"IHDR", 30000, 30000, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    return b"\x89PNG\r\n\x1a\n" + header + png()[33:]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"not an image", "of an unknown format"),
        (png(size=(64, 64))[:60], "broken"),
        (b"", "of an unknown format"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_bad_image_stops_the_job_with_its_row_and_reason(tmp_path: Path, prepared, image: bytes | None, reason: str):
    folder_of(rows_of(10), tmp_path / "data")
    file = tmp_path / "data" / "3.png"
    file.unlink() if image is None else file.write_bytes(image)
    with pytest.raises(DataError, match=rf"1 of 10 rows are bad.*{reason}.*\(first: row 3\)"):
        prepared()


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, prepared):
    folder_of(rows_of(10), tmp_path / "data", {"3.png": bomb()})
    with pytest.raises(DataError, match="image too large: 30000×30000 is over 50000000 pixels"):
        prepared()


@pytest.mark.parametrize("caption", ["", "   ", None])
def test_a_row_without_a_caption_is_bad(tmp_path: Path, prepared, caption: str | None):
    rows = rows_of(10)
    rows[4]["caption"] = caption
    folder_of(rows, tmp_path / "data")
    with pytest.raises(DataError, match=r"no caption \(first: row 4\)"):
        prepared()


def test_bad_rows_up_to_the_limit_are_set_aside_without_their_content(tmp_path: Path, prepared):
    folder_of(rows_of(100), tmp_path / "data")
    (tmp_path / "data" / "7.png").write_bytes(b"SECRET")
    data = prepared()
    assert data.quarantined == [QuarantinedRow(7, "image of an unknown format")]
    ids = {row["id"] for part in (data.train, data.evaluation) for row in part}
    assert len(ids) == 99
    assert "row-7" not in ids


def test_an_image_path_that_leads_out_of_the_folder_is_bad(tmp_path: Path, prepared):
    (tmp_path / "private.png").write_bytes(png())
    rows = rows_of(3)
    folder_of(rows, tmp_path / "data")
    rows[0]["file_name"] = "../private.png"
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="leaves the dataset's folder"):
        prepared()


def test_rows_of_one_patient_stay_on_one_side(tmp_path: Path, prepared):
    rows = [{**row, "patient": n // 5} for n, row in enumerate(rows_of(100))]
    folder_of(rows, tmp_path / "data")
    data = prepared(group_column="patient", eval_fraction=0.3)
    sides = [{int(row["id"][4:]) // 5 for row in part} for part in (data.train, data.evaluation)]
    assert sides[0] | sides[1] == set(range(20))
    assert not sides[0] & sides[1]


def test_blanks_make_no_other_patient_and_nan_is_none(tmp_path: Path, prepared):
    rows = [{**row, "patient": ["a", "a "][n % 2], "age": float("nan")} for n, row in enumerate(rows_of(8))]
    rows[0]["patient"] = float("nan")
    folder_of(rows, tmp_path / "data")
    tree = {"group_column": "patient", "max_bad_fraction": 0.5, "instruction": "Look.\nAge: {age}"}
    data = prepared(**tree)
    assert (len(data.train), len(data.evaluation)) == (7, 0)
    assert data.quarantined == [QuarantinedRow(0, "no patient")]
    assert data.train[0]["messages"][0]["content"][1]["text"] == "Look."


SPELLINGS = (str, str.upper, lambda name: f"{name}\u200b", lambda name: f" {name.replace(' ', '  ')}")


def test_a_patient_in_several_spellings_is_on_one_side(tmp_path: Path, prepared):
    rows = [{**row, "patient": SPELLINGS[n % 4](f"é patient {n // 4}")} for n, row in enumerate(rows_of(80))]
    folder_of(rows, tmp_path / "data")
    data = prepared(group_column="patient", eval_fraction=0.4)
    sides = [{int(row["id"].removeprefix("row-")) // 4 for row in part} for part in (data.train, data.evaluation)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert len({row["unit"] for row in data.train}) == len(sides[0])
    assert data.facts.alike_groups == 0


def test_a_patient_that_no_one_can_read_is_none(tmp_path: Path, prepared):
    folder_of([{**row, "patient": ["\u200b", "a", "b"][n % 3]} for n, row in enumerate(rows_of(9))], tmp_path / "data")
    data = prepared(group_column="patient", max_bad_fraction=0.5)
    assert data.facts.reasons == {"no patient": 3}


def test_a_patient_of_the_users_held_out_rows_is_found_in_any_spelling(tmp_path: Path, prepared):
    folder_of([{**row, "patient": f"P {n}"} for n, row in enumerate(rows_of(6))], tmp_path / "data")
    pictures = {f"{n}.png": png(100 + n) for n in range(4)}
    held = [{**row, "patient": ["p  1", "p 2.0", "p 02", "q"][n]} for n, row in enumerate(rows_of(4))]
    folder_of(held, tmp_path / "held", pictures)
    data = prepared(group_column="patient", eval_path=str(tmp_path / "held"))
    assert (data.facts.same_in_both, data.leaked) == (1, {"row-0"})
    assert (data.facts.alike_groups, data.facts.alike_rows) == (2, (2, 1))


def test_the_same_picture_is_never_on_both_sides(tmp_path: Path, prepared):
    folder_of(rows_of(60), tmp_path / "data", {f"{n}.png": png(n % 10) for n in range(60)})
    data = prepared(eval_fraction=0.4)
    pixels = [{row["images"][0].getpixel((0, 0)) for row in part} for part in (data.train, data.evaluation)]
    assert pixels[0]
    assert pixels[1]
    assert not pixels[0] & pixels[1]


def test_rows_held_out_by_the_user_are_compared_with_the_others(tmp_path: Path, prepared):
    folder_of(rows_of(10), tmp_path / "data")
    folder_of(rows_of(4), tmp_path / "held", {f"{n}.png": png(n) for n in range(4)})
    data = prepared(eval_path=str(tmp_path / "held"))
    assert (data.facts.train, data.facts.evaluation, data.facts.same_in_both) == (10, 4, 4)


def test_what_is_wrong_with_held_out_rows_is_said_of_them(tmp_path: Path, prepared):
    folder_of(rows_of(3, patient="a"), tmp_path / "data")
    own = folder_of(rows_of(2), tmp_path / "own", {"1.png": b""})
    with pytest.raises(DataError, match="dataset.eval_path: 1 of 2 rows are bad"):
        prepared(eval_path=str(own))
    assert prepared(max_bad_fraction=0.5).facts.reasons == {"image of an unknown format": 1}
    with pytest.raises(DataError, match="patient: no such column; dataset.eval_path has caption, file_name"):
        prepared(group_column="patient")


def test_a_large_image_is_shrunk_when_asked(tmp_path: Path, prepared):
    folder_of(rows_of(4), tmp_path / "data", {f"{n}.png": png(n, (400, 100)) for n in range(4)})
    assert prepared(image_max_side=200).train[0]["images"][0].size == (200, 50)


def test_a_system_turn_is_there_only_when_asked_for():
    assert [m["role"] for m in conversation("q", "a", None)] == ["user", "assistant"]


def test_a_quick_look_takes_some_rows_of_all_and_says_so(tree: dict[str, Any], tmp_path: Path):
    folder_of(rows_of(100), tmp_path / "data")
    tree["dataset"]["eval_fraction"] = 0.2
    data = prepare(validate(tree), tmp_path / "scratch", most=20)
    facts = data.facts
    assert (facts.rows, facts.looked_at, facts.train + facts.evaluation) == (100, 20, 100)
    assert {int(row["id"][4:]) for part in (data.train, data.evaluation) for row in part} == set(range(0, 100, 5))


def test_what_was_seen_is_counted(tmp_path: Path, prepared):
    folder_of(rows_of(40), tmp_path / "data", {"7.png": b"x", "9.png": png(9, (30, 20))})
    facts = prepared(max_bad_fraction=0.1).facts
    assert facts.reasons == {"image of an unknown format": 1}
    assert facts.images == ImageFacts(39, (8, 8), (8, 8), (30, 20), most=1)


class Ten:
    """Ten tokens a word of the answer, five before it."""

    def __init__(self, messages: list[dict[str, Any]], sizes: list[Any]) -> None:
        self.prompt = 5
        self.whole = 5 + 10 * len(messages[-1]["content"][0]["text"].split())


@pytest.mark.parametrize("policy", ["drop", "fail", "truncate"])
def test_over_long_rows_go_as_the_policy_says(tree: dict[str, Any], tmp_path: Path, policy: str):
    rows = rows_of(10)
    rows[3]["caption"] = "one two three four"
    folder_of(rows, tmp_path / "data")
    tree["training"] = {"max_length": 40}
    tree["dataset"] |= {"over_length": policy, "max_bad_fraction": 0.1}
    if policy == "fail":
        with pytest.raises(
            DataError, match=r"1 of 10 rows have more than training\.max_length 40 tokens \(the longest 45\)"
        ):
            prepare(validate(tree), tmp_path / "scratch", measure=Ten)
        return
    data = prepare(validate(tree), tmp_path / "scratch", measure=Ten)
    assert data.facts.over_length == (policy == "truncate")
    dropped = [QuarantinedRow(3, "longer than training.max_length 40")]
    assert data.quarantined == (dropped if policy == "drop" else [])


def test_strata_and_counts_of_held_out_rows(tmp_path: Path, prepared):
    folder_of([row | {"kind": "a" if n < 15 else "b"} for n, row in enumerate(rows_of(90))], tmp_path / "data")
    assert len(prepared(eval_rows=12).evaluation) == 12
    held = [int(row["id"][4:]) for row in prepared(eval_rows=18, stratify_column="kind").evaluation]
    assert abs(sum(n < 15 for n in held) - 3) <= 1


def test_weights_go_with_their_rows(tmp_path: Path, prepared):
    folder_of([row | {"w": n / 2} for n, row in enumerate(rows_of(6))], tmp_path / "data")
    assert "weight" not in prepared().train[0]
    assert {row["id"]: row["weight"] for row in prepared(weight_column="w").train}["row-3"] == 1.5


def test_embedded_images_are_not_copied_by_the_split(tmp_path: Path, prepared):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    noise = [np.random.default_rng(n).integers(0, 256, (64, 64), dtype=np.uint8) for n in range(20)]
    rows = []
    for pixels in noise:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "caption": "c"})
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "r.parquet")
    data = prepared(eval_fraction=0.3)
    assert len(data.train) + len(data.evaluation) == 20
    stored = sum(file.stat().st_size for file in (tmp_path / "scratch").rglob("*.arrow"))
    assert stored < 1.1 * sum(len(row["image"]["bytes"]) for row in rows)


def test_a_row_that_went_bad_after_the_look_names_itself(tmp_path: Path, prepared):
    folder_of(rows_of(4), tmp_path / "data")
    data = prepared(eval_fraction=0)
    (tmp_path / "data" / "2.png").unlink()
    with pytest.raises(
        DataError, match="row 2 was valid before and is not now: image cannot be read.*did the data change"
    ):
        list(data.train)


def test_the_digest_of_training_rows_changes_with_their_words_and_pixels_alone(tmp_path: Path, prepared):
    def digest(rows: list[dict[str, Any]], **images: bytes) -> str:
        folder_of(rows, tmp_path / "data", {f"{name}.png": image for name, image in images.items()})
        return prepared(eval_fraction=0).facts.train_sha256

    rows = rows_of(4)
    first = digest(rows)
    assert digest(rows) == first
    assert digest([*rows[:3], rows[3] | {"caption": "Another."}]) != first
    assert digest(rows, **{"3": png(200)}) != first


def test_rows_can_be_handed_to_another_process(tmp_path: Path, prepared):
    folder_of(rows_of(4, score=1.5), tmp_path / "data")
    data = prepared(eval_fraction=0)
    assert pickle.loads(pickle.dumps(copy.deepcopy(data.train)))[2]["reference"] == "caption 2"
