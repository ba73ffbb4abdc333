"""Joins a tree of DICOM files and a table of reports into one row per report, with its images."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any

import numpy as np

from job.config.schema import DatasetSpec, SeriesSpec
from job.data.conversations import AFTER, BEFORE, SLICE
from job.data.dicom import SCREENS, SECONDARY, TECHNICAL, read_header
from job.data.joined import key_of
from job.data.pixels import BadRow
from job.data.stacks import MEDGEMMA, Plane, by_position, choose, plane
from job.data.tables import LINE, PATIENT, WHY, read_line
from job.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

STACKED = ("CT", "MR", "PT", "NM")
"""Modalities whose series are stacks of slices; each file of the others is a separate image."""
KEYS = {
    "SOPInstanceUID": ("sopinstanceuid", "sopuid", "imageuid", "instanceuid", "dicomid"),
    "SeriesInstanceUID": ("seriesinstanceuid", "seriesuid"),
    "StudyInstanceUID": ("studyinstanceuid", "studyuid", "studyid", "study"),
    "AccessionNumber": ("accessionnumber", "accession"),
    "PatientID": ("patientid", "patient", "subjectid", "subject"),
    "path": ("filename", "file", "path", "filepath", "image"),
}
"""What a report may identify its images by → column names, in lower-case letters and digits; the narrowest match wins."""
WIDE = ("StudyInstanceUID", "AccessionNumber", "PatientID")
"""Keys that match more images than the report's author looked at: scouts, dose pages, screens."""
TAGS = [*KEYS, "InstanceNumber", "SeriesNumber", "NumberOfFrames", "Rows", "ImageLaterality", *TECHNICAL.values()]
TAGS += ["SOPClassUID", "ImageType", "SeriesDescription", "ImagePositionPatient", "ImageOrientationPatient"]
TAGS += ["StudyDate", "StudyTime"]
TAGS.remove("path")

Header = dict[str, str]
"""What is read from a file: its `TAGS` as text, and its `path`. It stays in memory."""


def index_studies(
    spec: DatasetSpec, folder: Path, files: list[Path], reports: Dataset, field: str
) -> tuple[Iterator[str], str]:
    """Returns one line of JSON per report, with `image` (values for `job.data.images`), the technical columns and the patient's
    digest; and a description of the join. Raises DataError if no report names a file."""
    damaged = list[Path]()
    headers = [header for header in _headers(folder, files, damaged) if header is not None]
    table = [_report(row) for row in reports]
    said = [report for report in table if isinstance(report, dict)]
    if not headers or not said:
        raise DataError(f"{field}: {folder} holds {len(headers)} DICOM images and {len(said)} reports")
    key, column = _join(spec, headers, said, field)
    chosen = spec.dicom.series if key in WIDE else NAMED
    found = {value: those for value, those in _by(headers, key).items() if value}
    priors = _priors(headers, spec.dicom.series) if spec.dicom.prior else {}

    def lines() -> Iterator[str]:
        for report in table:
            if isinstance(report, str):
                yield report
            else:
                headers = found.get(key_of(report.get(column)), [])
                yield json.dumps(_row(report, headers, take(headers, chosen), priors, spec), default=str)

    named = {key_of(report.get(column)) for report in said}
    studies = {header["StudyInstanceUID"] for name in named for header in found.get(name, [])}
    before = {header["path"] for study in studies for header in priors.get(study, [])}
    alone = sum(header[key] not in named and header["path"] not in before for header in headers)
    words = f"{len(headers)} DICOM images joined with {len(table)} reports by {key} (column {column})"
    words += f", {len(studies & {*priors})} of {len(studies)} studies beside the one before" if spec.dicom.prior else ""
    words += f", {alone} images without a report left out" if alone else ""
    words += f", {len(damaged)} damaged files left out ({damaged[0].name} among them)" if damaged else ""
    return lines(), words + _left_out([header for name in named for header in found.get(name, [])], chosen)


def _report(row: dict[str, Any]) -> dict[str, Any] | str:
    """Returns values by column; a broken line as it is, so that it becomes a bad row."""
    try:
        return read_line(row[LINE]) if LINE in row else row
    except BadRow:
        return str(row[LINE])


def _headers(folder: Path, files: list[Path], damaged: list[Path]) -> Iterator[Header | None]:
    """Yields None if it is not a DICOM image (a report, a directory, another file); adds images without a size to `damaged`."""
    from pydicom.uid import UID

    def header(file: Path) -> Header | None:
        try:
            read = read_header(file, TAGS)
            tags = {name: intern(_text(read.get(name))) for name in TAGS}  # slices of a series share most values
        except Exception:  # pydicom may raise anything on other files
            return None
        kind = UID(str(read.file_meta.get("MediaStorageSOPClassUID") or tags["SOPClassUID"]))
        if not tags["Rows"] and (not kind or "Image Storage" in kind.name):
            damaged.append(file)
        tags["path"] = file.relative_to(folder).as_posix()
        tags["Laterality"] = tags["Laterality"] or tags["ImageLaterality"]
        return tags if tags["Rows"] else None

    with warnings.catch_warnings(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        warnings.simplefilter("ignore")
        yield from pool.map(header, files)


def _join(spec: DatasetSpec, headers: list[Header], reports: list[dict[str, Any]], field: str) -> tuple[str, str]:
    """Returns the key, and the report column that identifies files by it."""
    columns = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(list(reports[0]))}
    for key, names in KEYS.items():
        column = spec.dicom.report_key or next((columns[name] for name in names if name in columns), None)
        there = {header[key] for header in headers} - {""}
        if column is not None and any(key_of(report.get(column)) in there for report in reports):
            return key, column
    raise DataError(
        f"{field}: no column of the reports names a DICOM file by {', '.join(KEYS)}; the columns are "
        f"{', '.join(reports[0])}. Set dataset.dicom.report_key to the one that does"
    )


PRIOR, CURRENT = "Previous study:", "Current study:"
"""What the model reads before the images of each of two studies."""
NAMED = SeriesSpec(every_kind=True)
"""The rule for images that a report names one by one."""
NO_PICTURES = ("SEG", "RTDOSE", "RTIMAGE", "SR", "PR", "KO", "DOC", "REG")
"""Modalities of objects derived from images, or without images."""


def kind_of(header: Mapping[str, str]) -> str:
    """Describes a file that is not an image for a report to be about; empty if it may be one."""
    image_type = header["ImageType"].upper().split("\\")
    if header["Modality"] in NO_PICTURES:
        return f"{header['Modality']} objects"
    if "LOCALIZER" in image_type:
        return "localizers"
    if f"{header['SOPClassUID']}.".startswith(f"{SECONDARY}."):
        return "secondary captures"
    return "screens" if any(value in SCREENS for value in image_type) else ""


def _by(headers: list[Header], tag: str) -> dict[str, list[Header]]:
    found: dict[str, list[Header]] = {}
    for header in headers:
        found.setdefault(header[tag], []).append(header)
    return found


def _priors(headers: list[Header], rule: SeriesSpec) -> dict[str, list[Header]]:
    """Returns for studies, by UID, the images of the latest earlier study of the same patient and modality. Studies without a
    date are neither before nor after another."""
    priors: dict[str, list[Header]] = {}
    for patient, those in _by(headers, "PatientID").items():
        studies = [taken for study in _by(those, "StudyInstanceUID").values() if (taken := take(study, rule))]
        dated = sorted((study for study in studies if patient and _date(study)[0]), key=_date)
        for study in dated:
            earlier = [each for each in dated if _date(each) < _date(study) and _modality(each) == _modality(study)]
            priors |= {study[0]["StudyInstanceUID"]: earlier[-1]} if earlier else {}
    return priors


def _date(study: list[Header]) -> tuple[str, str]:
    """Returns date and time so that later ones are larger: old files have 2020.12.31 and 10:30 (PS3.5 6.2). A date that is none
    is empty."""
    date, time = study[0]["StudyDate"].replace(".", ""), study[0]["StudyTime"].replace(":", "")
    return date if re.fullmatch(r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", date) else "", time


def _modality(study: list[Header]) -> str:
    return Counter(header["Modality"] for header in study).most_common(1)[0][0]


def take(headers: list[Header], rule: SeriesSpec) -> list[Header]:
    """Returns the images of the series that the rule selects."""
    series = _by([header for header in in_order(headers) if _fits(header, rule)], "SeriesInstanceUID")
    if rule.take == "all" or not series:
        return [header for those in series.values() for header in those]
    if rule.take == "first":
        return next(iter(series.values()))
    return max(series.values(), key=lambda those: sum(_number(header["NumberOfFrames"]) or 1 for header in those))


def _fits(header: Header, rule: SeriesSpec) -> bool:
    described = rule.description is None or re.search(rule.description, header["SeriesDescription"], re.IGNORECASE)
    of_kind = rule.every_kind or not kind_of(header)
    types = {each.upper() for each in header["ImageType"].split("\\")}
    return (
        bool(described)
        and of_kind
        and (rule.modality is None or header["Modality"] in rule.modality)
        and (rule.body_part is None or header["BodyPartExamined"].upper() in map(str.upper, rule.body_part))
        and (rule.orientation is None or orientation_of(header) in rule.orientation)
        and (rule.image_type is None or types.issuperset(map(str.upper, rule.image_type)))
    )


def _left_out(headers: list[Header], rule: SeriesSpec) -> str:
    """Describes how many images of each kind are left out."""
    if rule.every_kind:
        return ""
    kinds = Counter(kind for header in headers if (kind := kind_of(header)))
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"; left out: {listed} (dataset.dicom.series)" if kinds else ""


def _text(value: Any) -> str:
    """Returns a tag's value; several values are separated by backslashes, as in the file."""
    several = value is not None and not isinstance(value, str) and hasattr(value, "__iter__")
    return ("\\".join(map(str, value)) if several else str(value or "")).strip()


def _row(
    report: dict[str, Any],
    there: list[Header],
    headers: list[Header],
    priors: dict[str, list[Header]],
    spec: DatasetSpec,
) -> dict[str, Any]:
    """Builds a report's row. Without a file it has no image and is a bad row. `headers` are those selected from the files
    `there`, and `priors` those of the studies before, by study."""
    patients = sorted({header["PatientID"] for header in there} - {""})
    digest = hashlib.sha256("\0".join(patients).encode()).hexdigest() if patients else None
    commonest = {tag: Counter(header[tag] for header in headers).most_common(1) for tag in TECHNICAL.values()}
    technical = {column: commonest[tag][0][0] if headers else "" for column, tag in TECHNICAL.items()}
    why = {WHY: "no image in the series that dataset.dicom.series selects"} if there and not headers else {}
    if len(patients) > 1:  # one number is given twice, or a blank one
        headers, why = [], {WHY: "its images are of several patients"}
    images, studies = _images(headers, spec), {header["StudyInstanceUID"] for header in headers}
    before = _images(priors.get(studies.pop(), []), spec) if images and len(studies) == 1 else []
    if before:
        images = [{BEFORE: PRIOR} | before[0], *before[1:], {BEFORE: CURRENT} | images[0], *images[1:]]
    return {**technical, **report, "image": images or None, PATIENT: digest, **why}


def _images(headers: list[Header], spec: DatasetSpec) -> list[dict[str, Any]]:
    """Returns each file or, for a stack, the frames that the spec selects."""
    values: list[dict[str, Any]] = []
    series: dict[str, list[Header]] = {}
    for header in in_order(headers):
        stacked = header["Modality"] in STACKED and header["NumberOfFrames"] in ("", "1")
        series.setdefault(header["SeriesInstanceUID"] if stacked else header["path"], []).append(header)
    for stack in series.values():
        try:
            chosen = [{"path": stack[n]["path"]} for n in choose(len(stack), spec.dicom.frames)]
        except BadRow:
            return []
        if spec.dicom.frames == MEDGEMMA and len(chosen) > 1:
            chosen = [each | {AFTER: SLICE.format(n)} for n, each in enumerate(chosen, 1)]
        values += [{"montage": chosen}] if len(chosen) > 1 and spec.dicom.frames == "montage" else chosen
    return values


def in_order(headers: list[Header]) -> list[Header]:
    """Sorts by series, and within a series by position, or by number if slices do not say where they are."""
    stacks = _by(sorted(headers, key=_order), "SeriesInstanceUID").values()
    return [stack[n] for stack in stacks for n in by_position([_plane(header) for header in stack])]


def orientation_of(header: Header) -> str:
    """Returns the plane of a slice, the nearest if it is oblique; empty if it is not known."""
    placed = _plane(header)
    return ("sagittal", "coronal", "axial")[int(np.abs(placed[0]).argmax())] if placed else ""


def _plane(header: Header) -> Plane | None:
    return plane(header["ImageOrientationPatient"].split("\\"), header["ImagePositionPatient"].split("\\"))


def _order(header: Header) -> tuple[int, str, int, str]:
    series, instance = _number(header["SeriesNumber"]), _number(header["InstanceNumber"])
    return series, header["SeriesInstanceUID"], instance, header["path"]


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"-?\d+", text) else 0
