"""Where the voxels of a volume lie, and how a volume is cut into slices: values and arithmetic, no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from leafseg.errors import DataError

MAX_PIXELS = 89_478_485  # of one frame; Pillow's own limit against decompression bombs: a quarter of a gigabyte as RGB
MAX_VOXELS = 2**30


@dataclass(frozen=True)
class Geometry:
    """The grid of a volume: enough to write another volume onto it. All tuples are in ITK's axis order, x first.

    Attributes:
        size: voxels along x, y (, z).
        spacing_mm: distance between voxel centres along x, y (, z).
        origin: physical position of the first voxel's centre, in mm.
        direction: row-major matrix of axis directions; 9 numbers, 4 for a two-dimensional file.
    """

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @property
    def affine(self) -> NDArray[np.float64]:
        """Homogeneous matrix from voxel index (x, y, z) to physical position in mm (ITK's LPS convention)."""
        n = len(self.size)
        matrix = np.eye(n + 1)
        matrix[:n, :n] = np.reshape(self.direction, (n, n)) @ np.diag(self.spacing_mm)
        matrix[:n, n] = self.origin
        return matrix


@dataclass(frozen=True)
class Grid:
    """What a header says of a volume.

    Attributes:
        geometry: complete; made up where the header states less.
        spacing_known: whether the distance of the pixels in a slice is stated.
        in_space: whether the slices are stated to lie in space; those of a video clip follow each other in time.
        depth_known: False for a single slice that states no thickness: its third spacing is made up.
    """

    geometry: Geometry
    spacing_known: bool = True
    in_space: bool = True
    depth_known: bool = True


@dataclass(frozen=True)
class Volume:
    """Voxels ``[Z, Y, X]``, ``[Z, Y, X, 3]`` in colours, and their grid."""

    voxels: NDArray[Any]
    grid: Grid


class ReadingValues(Protocol):
    """What :class:`Reading` takes out of a model's preprocessing settings."""

    @property
    def orientation(self) -> Literal["LPS", "stored"]: ...
    @property
    def slice_axis(self) -> Literal["z", "y", "x"]: ...
    @property
    def neighbouring_slices(self) -> bool: ...
    @property
    def dicom_window(self) -> bool: ...


@dataclass(frozen=True)
class Reading:
    """How files become images; part of a model's preprocessing.

    Attributes:
        orientation: "LPS": volumes are turned and flipped, never resampled, so that x runs to the patient's left, y to
            the back and z to the head, as nearly as the axes allow; "stored": as they lie in the file.
        slice_axis: volumes are cut across it. Coronal (y) and sagittal (x) slices of "LPS" have the head at the top.
        neighbouring_slices: the slices before, at and after as three channels.
        dicom_window: DICOM images are mapped through the window that they state.
    """

    orientation: Literal["LPS", "stored"] = "LPS"
    slice_axis: Literal["z", "y", "x"] = "z"
    neighbouring_slices: bool = False
    dicom_window: bool = False

    @classmethod
    def of(cls, settings: ReadingValues) -> Reading:
        return cls(settings.orientation, settings.slice_axis, settings.neighbouring_slices, settings.dicom_window)


LPS = Reading()
STORED = Reading(orientation="stored")


@dataclass(frozen=True)
class Slicing:
    """Axis exchanges and flips that turn stored voxels ``[Z, Y, X]`` into ``[slice, row, column]``: exactly reversible.

    Attributes:
        axes: which stored NumPy axis becomes slice, row and column.
        flips: which of slice, row and column are then reversed.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[int, ...] = ()

    def apply(self, stored: NDArray[Any]) -> NDArray[Any]:
        """A view of ``[Z, Y, X, ...]`` as ``[slice, row, column, ...]``."""
        turned = stored.transpose(*self.axes, *range(3, stored.ndim))
        return np.flip(turned, self.flips)

    def undo(self, slices: NDArray[Any]) -> NDArray[Any]:
        """The inverse of ``apply``."""
        return np.flip(slices, self.flips).transpose(*np.argsort(self.axes), *range(3, slices.ndim))

    def affine(self, geometry: Geometry) -> NDArray[np.float64]:
        """Homogeneous matrix from (column, row, slice) to physical position in mm."""
        sizes = geometry.size[::-1]
        to_stored = np.zeros((4, 4))  # (column, row, slice, 1) -> (x, y, z, 1)
        to_stored[3, 3] = 1.0
        for turned, stored in enumerate(self.axes):
            flipped = turned in self.flips
            to_stored[2 - stored, 2 - turned] = -1.0 if flipped else 1.0
            to_stored[2 - stored, 3] = sizes[stored] - 1 if flipped else 0
        return geometry.affine @ to_stored


# Slice, row and column as (axis, sign) of L, P, S; of a volume as stored, of x, y, z, all in their own direction.
_CUTS = {
    "z": ((2, 1), (1, 1), (0, 1)),
    "y": ((1, 1), (2, -1), (0, 1)),
    "x": ((0, 1), (2, -1), (1, 1)),
}


def slicing(geometry: Geometry, reading: Reading) -> Slicing:
    """How a volume with this geometry is cut; a two-dimensional file stays as it is.

    Oblique axes go to the nearest of L, P, S: of all assignments, the one whose cosines have the largest sum.
    """
    if len(geometry.size) == 2:
        return Slicing()
    stored = reading.orientation == "stored"
    direction = np.eye(3) if stored else np.reshape(geometry.direction, (3, 3))
    nearest = max(permutations(range(3)), key=lambda axes: sum(abs(direction[i, axis]) for i, axis in enumerate(axes)))
    axes, flips = [], []
    for turned, (anatomical, sign) in enumerate(_CUTS[reading.slice_axis]):
        axis = nearest[anatomical]
        axes.append(2 - axis)
        if not stored and sign * direction[anatomical, axis] < 0:
            flips.append(turned)
    return Slicing((axes[0], axes[1], axes[2]), tuple(flips))


def check_geometry(path: Path, geometry: Geometry) -> None:
    """Refuse a grid on which nothing can be measured.

    Raises:
        DataError: for a spacing, place or direction that is no number, not positive, or singular.
    """
    for problem in _geometry_problems(geometry):
        raise DataError(f"{path}: {problem}; the header is damaged, export the file again")


def _geometry_problems(geometry: Geometry) -> Iterator[str]:
    n = len(geometry.size)
    if not all(np.isfinite(side) and side > 0 for side in geometry.spacing_mm):
        yield f"spacing is {' x '.join(f'{side:g}' for side in geometry.spacing_mm)} mm and must be positive"
    if not np.isfinite(geometry.origin).all():
        yield "the origin is not a number"
    direction = np.reshape(geometry.direction, (n, n))
    if not (np.isfinite(direction).all() and abs(np.linalg.det(direction)) > 1e-3):
        yield "the axis directions are no proper directions"
