"""Does a mask lie where its image says? Made-up volumes with marked voxels, segmented, written, and read by others.

    .venv/bin/python experiments/geometry.py

Writes docs/results/geometry.json and docs/results/geometry.md; under a minute. Where the marks have to be follows from
the numbers below; what was written is read by SimpleITK, and DICOM segmentations frame by frame through pydicom.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydicom
import SimpleITK
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from leafseg.config import PreprocessingSettings
from leafseg.data.images import Reading, read_image
from leafseg.files import write_json_atomic, write_text_atomic
from leafseg.predict import Segmentation, predict_files
from leafseg.progress import progress_bar

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SHAPE = (7, 11, 13)  # slices, rows, columns: all different, so that no exchange of axes goes unseen
MARKS = 60
VALUE = 1000


def rotation(degrees: Sequence[float]) -> NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        first, second = [i for i in range(3) if i != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


# Columns are the directions of a voxel's column, row and slice index in L, P, S.
GRIDS = {
    "anisotropic": (np.eye(3), (0.7, 0.9, 5.0)),
    "x and y reversed (RAS, as NIfTI files usually are)": (np.diag([-1.0, -1.0, 1.0]), (0.7, 0.9, 5.0)),
    "sagittal, head first": (np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]]), (0.8, 0.8, 3.3)),
    "oblique by 17, 31 and -8 degrees": (rotation((17, 31, -8)), (0.6, 1.1, 2.5)),
    "mirrored (left-handed)": (np.diag([1.0, 1.0, -1.0]) @ rotation((5, -12, 40)), (0.6, 1.1, 2.5)),
}
ORIGIN = np.array([-123.4, 56.7, 890.1])
ROUTES = [
    *(("." + suffix, "auto") for suffix in ("nii", "nii.gz", "nrrd", "mha")),
    *(("DICOM series", target) for target in ("dicom-seg", "nifti", "nrrd", "mha")),
]


class Marked:
    """Finds the marks: a segmenter whose answer is known."""

    label_names = ("background", "mark")
    overlapping = False

    def __init__(self, preprocessing: PreprocessingSettings) -> None:
        self.preprocessing = preprocessing

    def read(self, path: Path, frame: int | None = None) -> NDArray[Any]:
        return read_image(path, frame, reading=Reading.of(self.preprocessing))

    def segment(self, images: Sequence[NDArray[Any]]) -> list[Segmentation]:
        return [
            Segmentation((image == VALUE)[None].astype(np.float32), (image == VALUE).astype(np.uint8))
            for image in images
        ]


def centres(index: NDArray[Any], direction: NDArray[np.float64], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Places in mm of voxels ``[N, 3]`` given as (column, row, slice)."""
    return np.asarray(index * np.asarray(spacing) @ direction.T + ORIGIN)


def write_volume(path: Path, voxels: NDArray[Any], direction: NDArray[np.float64], spacing: Sequence[float]) -> None:
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing([float(side) for side in spacing])
    image.SetOrigin(ORIGIN.tolist())
    image.SetDirection(direction.ravel().tolist())
    SimpleITK.WriteImage(image, str(path))


def write_series(folder: Path, voxels: NDArray[Any], direction: NDArray[np.float64], spacing: Sequence[float]) -> None:
    folder.mkdir()
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for k, plane in enumerate(voxels):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made = Dataset()
        made.file_meta = meta
        made.SOPClassUID = meta.MediaStorageSOPClassUID = CTImageStorage
        made.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
        made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = study, series, frame
        made.Modality, made.PatientName, made.PatientID, made.InstanceNumber = "CT", "", "", len(voxels) - k
        made.ImagePositionPatient = [
            format_number_as_ds(float(v)) for v in centres(np.array([0, 0, k]), direction, spacing)
        ]
        made.ImageOrientationPatient = [format_number_as_ds(float(v)) for v in direction[:, :2].T.ravel()]
        made.PixelSpacing = [spacing[1], spacing[0]]
        made.SliceThickness = spacing[2]
        made.Rows, made.Columns = plane.shape
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
        made.PixelData = plane.astype(np.int16).tobytes()
        made.save_as(folder / f"{(k * 5) % len(voxels)}.dcm", enforce_file_format=True)


def marks_in_volume(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places of the marked voxels, and of the eight corner voxels, as SimpleITK reads them."""
    image = SimpleITK.ReadImage(str(path))
    found = np.argwhere(SimpleITK.GetArrayFromImage(image))[:, ::-1]
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in image.GetSize()]), -1).reshape(-1, 3)
    place = [
        np.array([image.TransformIndexToPhysicalPoint([int(i) for i in index]) for index in indices])
        for indices in (found, corners)
    ]
    return place[0], place[1]


def marks_in_segmentation(path: Path) -> NDArray[np.float64]:
    """Places of the marked pixels of every frame: DICOM PS3.3 C.7.6.2.1.1."""
    stored = pydicom.dcmread(path)
    shared = stored.SharedFunctionalGroupsSequence[0]
    row_mm, column_mm = (float(side) for side in shared.PixelMeasuresSequence[0].PixelSpacing)
    cosines = np.reshape([float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient], (2, 3))
    frames = stored.pixel_array.reshape(-1, stored.Rows, stored.Columns)
    found = []
    for frame, group in zip(frames, stored.PerFrameFunctionalGroupsSequence, strict=True):
        first = np.array([float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient])
        for row, column in np.argwhere(frame):
            found.append(first + column * column_mm * cosines[0] + row * row_mm * cosines[1])
    return np.array(found)


def farthest(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Largest distance in mm from a place to the nearest of the others, both ways; infinite for another number."""
    if len(found) != len(wanted):
        return float("inf")
    distances = np.linalg.norm(found[:, None] - wanted[None], axis=-1)
    return float(max(distances.min(axis=0).max(), distances.min(axis=1).max()))


def measure(folder: Path, source: str, target: str, grid: str) -> float | None:
    """Largest error over the three ways to cut the volume; None where the source cannot hold the grid."""
    direction, spacing = GRIDS[grid]
    if source == "DICOM series" and np.linalg.det(direction) < 0:
        return None
    index = np.stack(
        np.unravel_index(np.random.Generator(np.random.Philox(7)).choice(np.prod(SHAPE), MARKS, False), SHAPE), -1
    )
    voxels = np.zeros(SHAPE, np.int16)
    voxels[tuple(index.T)] = VALUE
    path = folder / ("series" if source == "DICOM series" else f"volume{source}")
    (write_series if source == "DICOM series" else write_volume)(path, voxels, direction, spacing)
    wanted = centres(index[:, ::-1], direction, spacing)
    worst = 0.0
    axes = get_args(PreprocessingSettings.model_fields["slice_axis"].annotation)
    for axis in axes:
        out = folder / f"out-{axis}"
        report = predict_files(Marked(PreprocessingSettings(slice_axis=axis)), [path], out, output_format=target)  # type: ignore[arg-type]
        if report.failed:
            raise SystemExit(str(report.failed))
        (written,) = (file for file in out.iterdir() if file.name != "report.json")
        if target == "dicom-seg":
            worst = max(worst, farthest(marks_in_segmentation(written), wanted))
        else:
            marks, corners = marks_in_volume(written)
            ends = np.stack(np.meshgrid(*[(0, side - 1) for side in SHAPE[::-1]]), -1).reshape(-1, 3)
            errors = farthest(marks, wanted), farthest(corners, centres(ends, direction, spacing))
            worst = max(worst, *errors)
    return worst


def page(record: dict[str, Any]) -> str:
    lines = [
        "# Geometry: where masks lie",
        "",
        f"Volumes of {'x'.join(map(str, SHAPE))} voxels with {MARKS} marked ones are segmented slice by slice, across",
        "each of their three axes, and written by `leafseg.predict.predict_files`. SimpleITK, and pydicom for DICOM",
        "segmentations, read what was written. The table holds the largest distance in mm between where a marked or",
        "corner voxel was read and where it was put, over all voxels and the three axes. Written by:",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"Commit {record['commit'][:7]}; SimpleITK {record['versions']['SimpleITK']}, highdicom "
        f"{record['versions']['highdicom']}, pydicom {record['versions']['pydicom']}; {record['hardware']}.",
        "",
        "| grid | " + " | ".join(f"{a} to {'same' if b == 'auto' else b}" for a, b in ROUTES) + " |",
        "|---|" + "---|" * len(ROUTES),
    ]
    for grid, row in record["errors_mm"].items():
        cells = ["-" if value is None else f"{value:.1e}" for value in row.values()]
        lines.append(f"| {grid} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "NIfTI holds its matrix in 32-bit numbers, which rounds places some hundred mm from the origin to about 2e-5",
        "mm. DICOM holds decimal numbers of at most 16 characters. A DICOM series has no left-handed grid: its slices",
        "are sorted along their normal (-).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    errors: dict[str, dict[str, float | None]] = {}
    with progress_bar("geometry", total=len(GRIDS) * len(ROUTES)) as bar:
        for grid in GRIDS:
            errors[grid] = {}
            for source, target in ROUTES:
                with tempfile.TemporaryDirectory() as folder:
                    errors[grid][f"{source} to {target}"] = measure(Path(folder), source, target, grid)
                bar.advance()
    record = {
        "command": ".venv/bin/python experiments/geometry.py",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "versions": {name: version(name) for name in ("SimpleITK", "highdicom", "pydicom", "numpy")},
        "hardware": platform.machine(),
        "errors_mm": errors,
    }
    write_json_atomic(arguments.out / "geometry.json", record)
    write_text_atomic(arguments.out / "geometry.md", page(record))
    print(page(record))


if __name__ == "__main__":
    main()
