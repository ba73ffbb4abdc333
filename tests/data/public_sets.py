"""Small data sets in the layouts of public ones: folders, tables, columns and names as their authors give them, with drawn
pictures and invented texts. Nothing of the sets themselves is in here."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Row = dict[str, Any]


class Published(NamedTuple):
    """`make` writes the set into a folder; `dataset` is all that a spec says of it besides its `path`, relative to the folder.
    `rows` are the training rows and held-out rows, `images` how many each row has, `first` the first question and answer."""

    make: Callable[[Path], None]
    path: str
    dataset: Row
    rows: tuple[int, int]
    images: tuple[int, ...]
    first: tuple[str, str]
    read: str


def pictures(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        patches = np.random.default_rng(list(f"{folder.name}/{name}".encode())).integers(0, 256, (5, 6), np.uint8)
        Image.fromarray(patches).resize((48, 40), Image.Resampling.BICUBIC).save(folder / name)


def table(file: Path, rows: list[Row], separator: str = ",") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "wt", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def as_json(file: Path, value: Any, **how: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, **how))


def vqa_rad(folder: Path) -> None:
    """osf.io/89kps: one JSON for all, its spreadsheet and XML beside it, and a folder of pictures with blanks in its name."""
    names = [f"synpic{n}.jpg" for n in (54610, 29265, 100132)]
    pictures(folder / "VQA_RAD Image Folder", names)
    questions = [
        {
            "qid": str(n),
            "phrase_type": "freeform",
            "qid_linked_id": f"03f451ca-{n}",
            "image_case_url": f"https://medpix.nlm.nih.gov/case?id={n}",
            "image_name": names[n % 3],
            "image_organ": "CHEST",
            "evaluation": "evaluated",
            "question": f"Is there an effusion on side {n}?",
            "question_rephrase": "NULL",
            "question_type": "PRES",
            "answer": "Yes" if n % 2 else n,
            "answer_type": "CLOSED" if n % 2 else "OPEN",
        }
        for n in range(12)
    ]
    as_json(folder / "VQA_RAD Dataset Public.json", questions, indent=2)
    (folder / "VQA_RAD Dataset Public.xml").write_text("<questions/>")
    (folder / "VQA_RAD Dataset Public.xlsx").write_bytes(b"PK")
    (folder / "Readme.docx").write_bytes(b"PK")


def slake(folder: Path) -> None:
    """med-vqa.com/slake: three JSON lists, one folder a picture with its mask and its own questions, a knowledge graph as CSV."""
    for n in range(4):
        pictures(folder / "imgs" / f"xmlab{n}", ["source.jpg", "mask.png"])
        as_json(folder / "imgs" / f"xmlab{n}" / "question.json", [{"qid": n, "question": "?", "answer": "?"}])
        as_json(folder / "imgs" / f"xmlab{n}" / "detection.json", [{"Lung": [1.0, 2.0, 3.0, 4.0]}])
    table(folder / "KG" / "en_disease.csv", [{"disease": "Pneumonia", "attribute": "symptom", "value": "fever"}])
    for part, count in (("train", 8), ("validate", 2), ("test", 2)):
        as_json(
            folder / f"{part}.json",
            [
                {
                    "img_id": n % 4,
                    "img_name": f"xmlab{n % 4}/source.jpg",
                    "question": f"Which organ, {part} {n}?",
                    "answer": "Lung",
                    "q_lang": "en",
                    "answer_type": "OPEN",
                    "qid": n,
                }
                for n in range(count)
            ],
        )


def pmc_vqa(folder: Path) -> None:
    """hub: xmcmic/PMC-VQA, unpacked: two versions of each table, choices in columns with blanks, figures in a folder."""
    names = [f"PMC825379{n}_Fig4_11.jpg" for n in range(4)]
    pictures(folder / "images", names)
    for name, count in (("train", 4), ("train_2", 4), ("test", 2), ("test_2", 2)):
        rows = [
            {"Figure_path": names[n % 4], "Question": f" What is in figure {n}, {name}?"}
            | {f"Choice {letter}": f" {letter}:Thing {letter}" for letter in "ABCD"}
            | {"Answer": f" {letter}:Thing {letter}" if name == "train" else letter}
            for n, letter in zip(range(count), "ABCD", strict=False)
        ]
        more = {"index": 7, "Caption": 'A "quoted" caption,\nover two lines', "split": name.partition("_")[0]}
        table(folder / f"{name}.csv", [more | row for row in rows] if name.endswith("_2") else rows)


def roco(folder: Path) -> None:
    """github.com/razorx89/roco-dataset: a table a split with the names as published, and pictures named by the row's id."""
    for start, (part, name) in enumerate((("train", "traindata"), ("validation", "valdata"), ("test", "testdata"))):
        ids = [f"ROCO_{4 * start + n:05}" for n in range(4)]
        pictures(folder / "data" / part / "radiology" / "images", [f"{each}.jpg" for each in ids])
        rows = [{"id": each, "name": f"PMC4{each}.jpg", "caption": f" CT of {each}, {part}.\n"} for each in ids]
        table(folder / "data" / part / "radiology" / f"{name}.csv", rows)
        (folder / "data" / part / "radiology" / "captions.txt").write_text("".join(f"{each}\tCT\n" for each in ids))


def roco_v2(folder: Path) -> None:
    """zenodo.org/records/10821435: captions and concepts of a split in tables of their own, pictures in its folder."""
    for part in ("train", "valid", "test"):
        ids = [f"ROCOv2_2023_{part}_{n:06}" for n in range(1, 5)]
        pictures(folder / part, [f"{each}.jpg" for each in ids])
        table(folder / f"{part}_captions.csv", [{"ID": each, "Caption": f"MR of {each}."} for each in ids])
        table(folder / f"{part}_concepts.csv", [{"ID": each, "CUIs": "C0040405;C0817096"} for each in ids])
    table(folder / "cui_mapping.csv", [{"CUI": "C0040405", "Canonical name": "CT"}])


def iu_xray(folder: Path) -> None:
    """kaggle.com/datasets/raddar/chest-xrays-indiana-university: reports, and films of them, by uid."""
    films = [
        (uid, f"{uid}_IM-{uid:04}-{view}001.dcm.png") for uid in range(1, 7) for view in ((3, 4) if uid % 2 else (3,))
    ]
    pictures(folder / "images" / "images_normalized", [name for _, name in films])
    projections = [{"uid": uid, "filename": name, "projection": "Frontal"} for uid, name in films]
    table(folder / "indiana_projections.csv", projections)
    reports = [
        {
            "uid": uid,
            "MeSH": "normal",
            "Problems": "normal",
            "image": "Xray Chest PA and Lateral",
            "indication": "Positive TB test",
            "comparison": "None.",
            "findings": f"Clear lungs, {uid}.",
            "impression": f"Normal, {uid}.",
        }
        for uid in range(1, 7)
    ]
    table(folder / "indiana_reports.csv", reports)


def r2gen(folder: Path) -> None:
    """github.com/zhjohnchan/R2Gen: one object with a list for each split, two films each."""
    made: dict[str, list[Row]] = {}
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        for n in range(count):
            films = [f"CXR{n}{part}_IM-0942/{view}.png" for view in (0, 1)]
            pictures(folder / "images", films)
            row = {"id": f"CXR{n}", "report": f"Clear, {part} {n}.", "image_path": films, "split": part}
            made.setdefault(part, []).append(row)
    as_json(folder / "annotation.json", made)


def medpix(folder: Path) -> None:
    """github.com/CHILab1/MedPix-2.0: nested descriptions, pictures named without their ending."""
    names = [f"MPX10{n:02}_synpic{n}" for n in range(6)]
    pictures(folder / "images", [f"{name}.png" for name in names])
    as_json(
        folder / "Descriptions.json",
        [
            {
                "Type": "CT",
                "U_id": name.partition("_")[0],
                "image": name,
                "Description": {
                    "Age": "72",
                    "Caption": f"Axial CT, {name}.",
                    "Modality": "CT - noncontrast",
                    "Sex": "male",
                },
                "Location": "Head",
            }
            for name in names
        ],
        indent=1,
    )


def padchest(folder: Path) -> None:
    """bimcv.cipf.es/bimcv-projects/padchest: a packed table with an index, lists as Python writes them, numbered folders."""
    names = [f"2168401{n}_hh7t4k.png" for n in range(6)]
    pictures(folder, [f"{n % 2}/{name}" for n, name in enumerate(names)])
    rows = [
        {
            "": n,
            "ImageID": name,
            "ImageDir": n % 2,
            "StudyDate_DICOM": 20140915,
            "StudyID": f"20536686640136348{n}",
            "PatientID": f"8386856756774916{n}",
            "Report": f"sin hallazgos {n} .",
            "Labels": "['normal', 'nodule']",
        }
        for n, name in enumerate(names)
    ]
    table(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", rows)


def nih(folder: Path) -> None:
    """nihcc.app.box.com/v/ChestXray-NIHCC: films of one table in a dozen folders; columns with blanks and brackets."""
    names = [f"0000000{n}_000.png" for n in range(6)]
    pictures(folder, [f"images_00{n % 3 + 1}/images/{name}" for n, name in enumerate(names)])
    rows = [
        {"Image Index": name, "Finding Labels": "Cardiomegaly|Emphysema", "Patient ID": 1, "OriginalImage[Width": 2}
        for name in names
    ]
    table(folder / "Data_Entry_2017_v2020.csv", rows)


def chexpert(folder: Path) -> None:
    """stanfordmlgroup.github.io/competitions/chexpert: paths that begin with the name of the set's own folder."""
    for part, count in (("train", 4), ("valid", 2)):
        names = [f"{part}/patient0000{n}/study1/view1_frontal.jpg" for n in range(count)]
        pictures(folder, names)
        table(
            folder / f"{part}.csv",
            [{"Path": f"CheXpert-v1.0-small/{name}", "Sex": "Male", "AP/PA": "AP"} for name in names],
        )


def coco(folder: Path) -> None:
    """cocodataset.org: annotations in a folder of their own, several captions a picture, pictures in a folder a split."""
    for part, count in (("train2017", 3), ("val2017", 2)):
        names = [f"{n + 7 * len(part):012}.jpg" for n in range(count)]
        pictures(folder / part, names)
        as_json(
            folder / "annotations" / f"captions_{part}.json",
            {
                "info": {"year": 2017},
                "licenses": [{"id": 1, "name": "CC"}],
                "images": [{"id": n, "file_name": name, "height": 40, "width": 48} for n, name in enumerate(names)],
                "annotations": [
                    {"id": 10 * n + k, "image_id": n, "caption": f"{part} {n} {k}"}
                    for n in range(count)
                    for k in (0, 1)
                ],
            },
        )


NORMAL = "Clear lungs, 1.\nNormal, 1."
SETS = {
    "VQA-RAD": Published(
        vqa_rad,
        ".",
        {
            "image_column": "image_name",
            "instruction_column": "question",
            "answer_column": "answer",
            "eval_fraction": 0.3,
        },
        (8, 4),
        (1,),
        ("Is there an effusion on side 0?", "0"),
        "json: VQA_RAD Dataset Public.json (not read: VQA_RAD Dataset Public.xlsx); answers in answer, images in image_name "
        "found in VQA_RAD Image Folder/",
    ),
    "SLAKE": Published(
        slake,
        ".",
        {
            "image_column": "img_name",
            "instruction_column": "question",
            "answer_column": "answer",
            "eval_split": "validation",
        },
        (8, 2),
        (1,),
        ("Which organ, train 0?", "Lung"),
        "images in img_name found in imgs/",
    ),
    "PMC-VQA": Published(
        pmc_vqa,
        ".",
        {
            "image_column": "Figure_path",
            "instruction": "{Question}\n{Choice A}\n{Choice B}\n{Choice C}\n{Choice D}",
            "answer_column": "Answer",
            "eval_split": "test",
        },
        (8, 4),
        (1,),
        ("What is in figure 0, train?\nA:Thing A\nB:Thing B\nC:Thing C\nD:Thing D", "A:Thing A"),
        "csv: train.csv, train_2.csv (not read: test.csv, test_2.csv)",
    ),
    "ROCO": Published(
        roco,
        "data",
        {"image_column": "{id}.jpg", "eval_split": "test"},
        (4, 4),
        (1,),
        ("", "CT of ROCO_00000, train."),
        "csv: train/radiology/traindata.csv (not read: test/radiology/testdata.csv, validation/radiology/valdata.csv)",
    ),
    "ROCOv2": Published(
        roco_v2,
        "train_captions.csv",
        {"image_column": "ID", "answer_column": "Caption", "eval_path": "valid_captions.csv"},
        (4, 4),
        (1,),
        ("", "MR of ROCOv2_2023_train_000001."),
        "csv: train_captions.csv; answers in Caption, images in ID found in train/",
    ),
    "IU X-ray": Published(
        iu_xray,
        ".",
        {"join": "uid", "image_column": "filename", "answer": "{findings}\n{impression}", "eval_fraction": 0.3},
        (4, 2),
        (1, 2),
        ("", NORMAL),
        "joined with indiana_projections.csv by uid; answers by template, images in filename found in images/images_normalized/",
    ),
    "R2Gen": Published(
        r2gen,
        ".",
        {"image_column": "image_path", "answer_column": "report", "eval_split": "val"},
        (6, 2),
        (2,),
        ("", "Clear, train 0."),
        "annotation.json holds train (not read: val, test); answers in report, images in image_path found in images/",
    ),
    "MedPix": Published(
        medpix,
        ".",
        {"answer_column": "Description.Caption", "eval_fraction": 0.3},
        (5, 1),
        (1,),
        ("", "Axial CT, MPX1000_synpic0."),
        "answers in Description.Caption, images in image found in images/",
    ),
    "PadChest": Published(
        padchest,
        ".",
        {"image_column": "ImageID", "answer_column": "Report", "group_column": "PatientID", "eval_fraction": 0.3},
        (5, 1),
        (1,),
        ("", "sin hallazgos 0 ."),
        "csv: PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz; answers in Report, images in ImageID found in ",
    ),
    "NIH ChestX-ray14": Published(
        nih,
        ".",
        {"image_column": "Image Index", "answer_column": "Finding Labels", "eval_fraction": 0.3},
        (3, 3),
        (1,),
        ("", "Cardiomegaly|Emphysema"),
        "images in Image Index found in ",
    ),
    "CheXpert": Published(
        chexpert,
        ".",
        {"image_column": "Path", "answer": "A {Sex} {AP/PA} film.", "eval_split": "valid"},
        (4, 2),
        (1,),
        ("", "A Male AP film."),
        "csv: train.csv (not read: valid.csv); answers by template, images in Path found in train/",
    ),
    "COCO": Published(
        coco,
        ".",
        {"image_column": "file_name", "eval_split": "val"},
        (6, 4),
        (1,),
        ("", "train2017 0 0"),
        "captions_train2017.json holds annotations, each with its image; answers in caption, images in file_name found in ",
    ),
    "COCO, one file": Published(
        coco,
        "annotations/captions_train2017.json",
        {
            "image_column": "file_name",
            "eval_path": "annotations/captions_val2017.json",
        },
        (6, 4),
        (1,),
        ("", "train2017 0 0"),
        "answers in caption, images in file_name found in train2017/",
    ),
}
