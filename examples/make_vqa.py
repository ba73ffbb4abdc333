"""Makes the data of the second example, `examples/vqa.yaml`: questions about studies of two DICOM images with several findings.

    python examples/make_vqa.py FOLDER [--patients N] [--seed N]

Each study has a radiograph and a CT image, as drawn by radiographs.py, with one finding in each; in a third of the studies it
is the same one in both. Two questions are asked about each: what is seen, and whether one finding is there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
from radiographs import FINDINGS, PLACES_OF, SEXES, SIDES, TERMS, Case, draw_images

SEEN = "Which findings are seen?"


def write_dicom(file: Path, pixels: NDArray[np.uint8], case: Case) -> None:
    kind = CTImageStorage if case.modality == "CT" else DigitalXRayImageStorageForPresentation
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = kind, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[file.name])
    image = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    image.PatientID, image.PatientSex, image.Modality = (
        case.patient_id,
        case.sex,
        "CT" if case.modality == "CT" else "DX",
    )
    image.BurnedInAnnotation, image.PhotometricInterpretation = "NO", "MONOCHROME2"
    image.Rows, image.Columns = pixels.shape
    image.SamplesPerPixel, image.PixelRepresentation = 1, 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    image.PixelData = pixels.tobytes()
    image.save_as(file, enforce_file_format=True)


def questions(findings: list[str], rng: np.random.Generator) -> list[dict[str, object]]:
    """The two questions about a study. A truth that a question does not ask for is null."""
    stated = " and ".join(TERMS[name] for name in findings)
    asked = rng.choice(findings) if rng.random() < 0.5 else rng.choice([*set(FINDINGS) - {*findings}])
    there = asked in findings
    reply = f"Yes, there is {TERMS[asked]}." if there else f"No, there is not {TERMS[asked]}."
    return [
        {"question": SEEN, "answer": f"There is {stated}.", "findings": findings, "reply": None},
        {"question": f"Is there {TERMS[asked]}?", "answer": reply, "findings": None, "reply": "Yes" if there else "No"},
    ]


def make_data(folder: Path, patients: int, seed: int) -> int:
    """Writes `images/*.dcm` and `metadata.jsonl`, the same for the same seed; returns the number of rows."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    cases, rows = list[Case](), list[dict[str, object]]()
    for number in range(patients):
        who = {"patient_id": f"P{number:04d}", "sex": SEXES[rng.integers(2)], "age": int(rng.integers(20, 90))}
        found = [FINDINGS[index] for index in rng.integers(len(FINDINGS), size=2)]
        found = found if rng.random() > 1 / 3 else found[:1] * 2
        for name, modality in zip(found, ("X-ray", "CT"), strict=True):
            cases.append(Case(name, SIDES[rng.integers(2)], str(rng.choice(PLACES_OF[name])), modality, **who))
        images = [f"images/{who['patient_id']}-{modality}.dcm" for modality in ("dx", "ct")]
        rows += [{"images": images} | each | who for each in questions([*dict.fromkeys(found)], rng)]
    files = [folder / str(name) for row in rows[::2] for name in row["images"]]  # type: ignore[attr-defined]
    for file, pixels, case in zip(files, draw_images(cases, rng), cases, strict=True):
        write_dicom(file, pixels, case)
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(
        f"{given.folder}: {make_data(given.folder, given.patients, given.seed)} questions about {given.patients} studies"
    )


if __name__ == "__main__":
    main()
