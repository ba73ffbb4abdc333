"""A tree of DICOM files and a table of reports → one row a report, with its images."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.dicom import TECHNICAL, choose
from job.data.images import BadRow
from job.data.tables import LINE, PATIENT, read_line
from job.errors import DataError
from job.spec import DatasetSpec

if TYPE_CHECKING:
    from datasets import Dataset

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
TAGS = [*KEYS, "InstanceNumber", "SeriesNumber", "NumberOfFrames", "Rows", "ImageLaterality", *TECHNICAL.values()]
TAGS.remove("path")

Header = dict[str, str]
"""What is read of a file: its `TAGS` as text, and its `path`. It stays in memory."""


def index_studies(
    spec: DatasetSpec, folder: Path, files: list[Path], reports: Dataset, field: str
) -> tuple[Iterator[str], str]:
    """A line of JSON for each report, with `image` (values for `job.data.images`), the technical columns and the patient's
    digest; and how they were joined, in words. Raises DataError when no report names a file."""
    headers = [header for header in _headers(folder, files) if header is not None]
    table = [_report(row) for row in reports]
    said = [report for report in table if isinstance(report, dict)]
    if not headers or not said:
        raise DataError(f"{field}: {folder} holds {len(headers)} DICOM images and {len(said)} reports")
    key, column = _join(spec, headers, said, field)
    found: dict[str, list[Header]] = {}
    for header in headers:
        found.setdefault(header[key], []).append(header)

    def lines() -> Iterator[str]:
        for report in table:
            if isinstance(report, str):
                yield report
            else:
                yield json.dumps(_row(report, found.get(str(report.get(column) or ""), []), spec), default=str)

    named = {str(report.get(column) or "") for report in said}
    alone = sum(len(those) for name, those in found.items() if name not in named)
    words = f"{len(headers)} DICOM images joined with {len(table)} reports by {key} (column {column})"
    return lines(), words + (f", {alone} images without a report left out" if alone else "")


def _report(row: dict[str, Any]) -> dict[str, Any] | str:
    """Values by column; a broken line as it is, so that it becomes a bad row."""
    try:
        return read_line(row[LINE]) if LINE in row else row
    except BadRow:
        return str(row[LINE])


def _headers(folder: Path, files: list[Path]) -> Iterator[Header | None]:
    import pydicom

    def header(file: Path) -> Header | None:
        """None for what is no DICOM image (a report, a directory, another file)."""
        try:
            read = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
            tags = {name: str(read.get(name) or "").strip() for name in TAGS}
        except Exception:  # what it raises for other files is its own affair
            return None
        tags |= {
            "path": file.relative_to(folder).as_posix(),
            "Laterality": tags["Laterality"] or tags["ImageLaterality"],
        }
        return tags if tags["Rows"] else None

    with warnings.catch_warnings(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        warnings.simplefilter("ignore")
        yield from pool.map(header, files)


def _join(spec: DatasetSpec, headers: list[Header], reports: list[dict[str, Any]], field: str) -> tuple[str, str]:
    """The key, and the column of the reports that names files by it."""
    columns = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(list(reports[0]))}
    for key, names in KEYS.items():
        column = spec.dicom.report_key or next((columns[name] for name in names if name in columns), None)
        there = {header[key] for header in headers} - {""}
        if column is not None and any(str(report.get(column) or "") in there for report in reports):
            return key, column
    raise DataError(
        f"{field}: no column of the reports names a DICOM file by {', '.join(KEYS)}; the columns are "
        f"{', '.join(reports[0])}. Set dataset.dicom.report_key to the one that does"
    )


def _row(report: dict[str, Any], headers: list[Header], spec: DatasetSpec) -> dict[str, Any]:
    """A report with no file has no image, which makes it a bad row."""
    patients = sorted({header["PatientID"] for header in headers} - {""})
    digest = hashlib.sha256("\0".join(patients).encode()).hexdigest() if patients else None
    commonest = {tag: Counter(header[tag] for header in headers).most_common(1) for tag in TECHNICAL.values()}
    technical = {column: commonest[tag][0][0] if headers else "" for column, tag in TECHNICAL.items()}
    return {**technical, **report, "image": _images(headers, spec) or None, PATIENT: digest}


def _images(headers: list[Header], spec: DatasetSpec) -> list[dict[str, Any]]:
    """Each file, or of a stack the frames that the spec chooses."""
    values: list[dict[str, Any]] = []
    series: dict[str, list[Header]] = {}
    for header in sorted(headers, key=_order):
        stacked = header["Modality"] in STACKED and header["NumberOfFrames"] in ("", "1")
        series.setdefault(header["SeriesInstanceUID"] if stacked else header["path"], []).append(header)
    for stack in series.values():
        try:
            chosen = [{"path": stack[n]["path"]} for n in choose(len(stack), spec.dicom.frames)]
        except BadRow:
            return []
        values += [{"montage": chosen}] if len(chosen) > 1 and spec.dicom.frames == "montage" else chosen
    return values


def _order(header: Header) -> tuple[int, str, int, str]:
    return (
        _number(header["SeriesNumber"]),
        header["SeriesInstanceUID"],
        _number(header["InstanceNumber"]),
        header["path"],
    )


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"-?\d+", text) else 0
