"""A tree of DICOM files and a table of reports → one row a report, with its images."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.dicom import TECHNICAL, choose
from job.data.images import BadRow
from job.data.tables import PATIENT
from job.errors import DataError
from job.spec import DatasetSpec

STACKED = ("CT", "MR", "PT", "NM")
"""Modalities whose series are stacks of slices; each file of the others is a picture by itself."""
KEYS = {
    "SOPInstanceUID": ("sopinstanceuid", "sopuid", "imageuid", "instanceuid", "dicomid"),
    "SeriesInstanceUID": ("seriesinstanceuid", "seriesuid"),
    "StudyInstanceUID": ("studyinstanceuid", "studyuid", "studyid", "study"),
    "AccessionNumber": ("accessionnumber", "accession"),
    "PatientID": ("patientid", "patient", "subjectid", "subject"),
    "path": ("filename", "file", "path", "filepath", "image"),
}
"""What a report may name its images by → names of the column, in small letters and digits; the narrowest that fits is taken."""
TAGS = (
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "SOPInstanceUID",
    "AccessionNumber",
    "PatientID",
    "InstanceNumber",
    "Rows",
)
ALL_TAGS = [*TAGS, "SeriesNumber", "NumberOfFrames", *TECHNICAL.values(), "ImageLaterality"]


@dataclass(frozen=True)
class Header:
    """What is read of a file; `tags` stay in memory."""

    path: str
    tags: dict[str, str]
    frames: int
    technical: dict[str, str]


def index_studies(
    spec: DatasetSpec, folder: Path, files: list[Path], reports: Iterable[dict[str, Any]], field: str
) -> tuple[list[dict[str, Any]], str]:
    """The rows: each report with `image` (values for `job.data.images`), the technical columns and the patient's digest; and
    how they were joined, in words. Raises DataError when no report names a file."""
    headers = [header for header in _headers(folder, files) if header is not None]
    table = list(reports)
    if not headers or not table:
        raise DataError(f"{field}: {folder} holds {len(headers)} DICOM images and {len(table)} reports")
    key, column, found = _join(spec, headers, table, field)
    rows = [_row(report, found.get(str(report.get(column) or ""), []), spec) for report in table]
    named = {str(report.get(column) or "") for report in table}
    alone = sum(len(those) for name, those in found.items() if name not in named)
    words = f"{len(headers)} DICOM images joined with {len(table)} reports by {key} (column {column})"
    return rows, words + (f", {alone} images without a report left out" if alone else "")


def _headers(folder: Path, files: list[Path]) -> Iterator[Header | None]:
    with warnings.catch_warnings(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        warnings.simplefilter("ignore")
        yield from pool.map(lambda file: _header(folder, file), files)


def _header(folder: Path, file: Path) -> Header | None:
    """None for what is no DICOM image (a report, a directory, another file)."""
    try:
        import pydicom
    except ImportError as error:
        raise DataError("dataset: DICOM files need the dicom extra (pip install 'vision-lora-job[dicom]')") from error
    try:
        read = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=ALL_TAGS)
        if read.get("Rows") is None:
            return None
        frames = int(read.get("NumberOfFrames") or 1)
    except Exception:  # what it raises for other files is its own affair
        return None
    tags = {name: str(read.get(name, "") or "").strip() for name in (*TAGS, "SeriesNumber")}
    technical = {column: str(read.get(tag, "") or "") for column, tag in TECHNICAL.items()}
    technical["laterality"] = technical["laterality"] or str(read.get("ImageLaterality", "") or "")
    relative = file.relative_to(folder).as_posix()
    return Header(relative, tags | {"path": relative}, frames, technical)


def _join(
    spec: DatasetSpec, headers: list[Header], table: list[dict[str, Any]], field: str
) -> tuple[str, str, dict[str, list[Header]]]:
    columns = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(list(table[0]))}
    for key, names in KEYS.items():
        column = spec.dicom.report_key or next((columns[name] for name in names if name in columns), None)
        found: dict[str, list[Header]] = {}
        for header in headers:
            found.setdefault(header.tags[key], []).append(header)
        if column is not None and any(str(report.get(column) or "") in found for report in table if report.get(column)):
            return key, column, found
    raise DataError(
        f"{field}: no column of the reports names a DICOM file by {', '.join(KEYS)}; the columns are {', '.join(table[0])}. "
        "Set dataset.dicom.report_key"
    )


def _row(report: dict[str, Any], headers: list[Header], spec: DatasetSpec) -> dict[str, Any]:
    """A report with no file has no image, which makes it a bad row."""
    patients = {header.tags["PatientID"] for header in headers} - {""}
    technical = {
        column: Counter(header.technical[column] for header in headers).most_common(1)[0][0] if headers else ""
        for column in TECHNICAL
    }
    digest = hashlib.sha256("\0".join(sorted(patients)).encode()).hexdigest() if patients else None
    return {**technical, **report, "image": _images(headers, spec) or None, PATIENT: digest}


def _images(headers: list[Header], spec: DatasetSpec) -> list[dict[str, Any]]:
    """Each file, or of a stack the frames that the spec chooses."""
    values: list[dict[str, Any]] = []
    series: dict[str, list[Header]] = {}
    for header in sorted(headers, key=_order):
        stacked = header.technical["modality"] in STACKED and header.frames == 1
        series.setdefault(header.tags["SeriesInstanceUID"] if stacked else header.path, []).append(header)
    for stack in series.values():
        if len(stack) == 1:
            values.append({"file": stack[0].path})
            continue
        try:
            chosen: list[dict[str, Any]] = [{"file": stack[n].path} for n in choose(len(stack), spec.dicom.frames)]
        except BadRow:
            return []
        values += [{"montage": chosen}] if spec.dicom.frames == "montage" else chosen
    return values


def _order(header: Header) -> tuple[int, str, int, str]:
    tags = header.tags
    return _number(tags["SeriesNumber"]), tags["SeriesInstanceUID"], _number(tags["InstanceNumber"]), header.path


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"-?\d+", text) else 0
