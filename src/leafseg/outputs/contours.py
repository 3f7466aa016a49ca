"""Outlines of masks as polygons, written as GeoJSON or COCO.

Coordinates are pixels: x to the right, y down, (0, 0) is the top left corner of the image, so that the centre of the
pixel in row r and column c lies at (c + 0.5, r + 0.5).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.files import write_text_atomic
from leafseg.outputs.result import Labelled

Ring = NDArray[np.float64]


@dataclass(frozen=True)
class Region:
    """One connected region of a mask (pixels that share a side).

    Attributes:
        rings: closed polygons, float64 ``[N, 2]`` of (x, y) whose last point is the first; the outer one, then its
            holes. The outer one turns counter-clockwise where y is up, its holes the other way, as GeoJSON asks.
        top, left: where ``pixels`` lies in the image.
        pixels: bool ``[h, w]``, the region in its bounding box.
        score: mean probability over its pixels; None where none is known.
    """

    rings: tuple[Ring, ...]
    top: int
    left: int
    pixels: NDArray[np.bool_]
    score: float | None

    @property
    def area(self) -> int:
        """Pixels in the region."""
        return int(np.count_nonzero(self.pixels))


def trace_regions(mask: NDArray[np.bool_], probability: NDArray[np.float32] | None = None) -> Iterator[Region]:
    """The regions of a mask ``[H, W]`` in reading order of their first pixels.

    A polygon runs half-way between the centres of inner and outer pixels, so that the pixel centres inside it are
    exactly the region. It is therefore a little smaller than the pixels' outer edges: a single pixel is a diamond.
    """
    from contourpy import FillType, contour_generator
    from scipy.ndimage import find_objects, label

    numbered, _ = label(mask)
    for number, box in enumerate(find_objects(numbered), start=1):
        pixels = numbered[box] == number
        top, left = box[0].start, box[1].start
        padded = np.pad(pixels, 1).astype(np.float64)  # so that outlines close at the border
        # OuterOffset gives one outer boundary with its holes; the region is one piece, so there is one.
        filled: Any = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
        (points,), (offsets,) = filled
        points = points + np.array([left - 0.5, top - 0.5])  # -1 takes the padding back, +0.5 is a pixel's centre
        rings = tuple(_without_straight_points(points[start:stop]) for start, stop in pairwise(offsets))
        score = None if probability is None else float(probability[box][pixels].mean(dtype=np.float64))
        yield Region(rings, top, left, pixels, score)


def _without_straight_points(ring: Ring) -> Ring:
    """The same polygon without the points on its straight runs; coordinates are halves, so that the test is exact."""
    corners = ring[:-1]
    before, after = corners - np.roll(corners, 1, 0), np.roll(corners, -1, 0) - corners
    kept = corners[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    return np.concatenate([kept, kept[:1]])


def write_geojson(path: Path, labelled: Labelled) -> None:
    """Write all regions of one input as a FeatureCollection.

    Properties of a feature: ``label``, ``area`` in pixels, ``score`` (mean probability, if kept), and ``frame`` (from
    0) where the input has frames.

    Raises:
        DataError: if the system refuses to write.
    """
    features = []
    for frame, name, region in _all_regions(labelled):
        properties: dict[str, Any] = {"label": name, "area": region.area}
        if region.score is not None:
            properties["score"] = round(region.score, 4)
        if labelled.numbered:
            properties["frame"] = frame
        geometry = {"type": "Polygon", "coordinates": [ring.tolist() for ring in region.rings]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    _write_compact(path, {"type": "FeatureCollection", "features": features})


class CocoFile:
    """One COCO file for all inputs of a prediction, collected file by file."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, file_name: str, labelled: Labelled) -> None:
        """Take the regions of one input; each of its frames is an image of its own, with ``frame`` (from 0)."""
        first = len(self._images) + 1
        for frame, planes in enumerate(labelled.planes):
            image = {"id": first + frame, "file_name": file_name, "height": planes.shape[1], "width": planes.shape[2]}
            self._images.append({**image, "frame": frame} if labelled.numbered else image)
        for frame, name, region in _all_regions(labelled):
            height, width = region.pixels.shape
            annotation: dict[str, Any] = {
                "id": len(self._annotations) + 1,
                "image_id": first + frame,
                "category_id": self._names.index(name) + 1,
                "segmentation": _coco_shape(region, labelled.planes[frame].shape[1:]),
                "area": region.area,
                "bbox": [region.left, region.top, width, height],
                "iscrowd": 0,
            }
            if region.score is not None:
                annotation["score"] = round(region.score, 4)
            self._annotations.append(annotation)

    def write(self, path: Path) -> None:
        """Write what was collected.

        Raises:
            DataError: if the system refuses to write.
        """
        categories = [{"id": number, "name": name} for number, name in enumerate(self._names, start=1)]
        _write_compact(path, {"images": self._images, "annotations": self._annotations, "categories": categories})


def _coco_shape(region: Region, size: tuple[int, ...]) -> list[list[float]] | dict[str, Any]:
    """COCO's polygons know no holes: a region with holes is written as run lengths down the columns, from 0."""
    if len(region.rings) == 1:
        return [region.rings[0][:-1].ravel().tolist()]
    whole = np.zeros(size, bool)
    height, width = region.pixels.shape
    whole[region.top : region.top + height, region.left : region.left + width] = region.pixels
    column_wise = whole.ravel(order="F")
    edges = np.flatnonzero(column_wise[1:] != column_wise[:-1]) + 1
    counts = np.diff([0, *edges, column_wise.size]).tolist()
    return {"size": list(size), "counts": [0, *counts] if column_wise[0] else counts}


def _write_compact(path: Path, content: dict[str, Any]) -> None:
    # Indented, every coordinate would take a line.
    write_text_atomic(path, json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")


def _all_regions(labelled: Labelled) -> Iterator[tuple[int, str, Region]]:
    for frame in range(len(labelled.planes)):
        for index, name in enumerate(labelled.names):
            probability = None if labelled.probability is None else labelled.probability[frame][index]
            for region in trace_regions(labelled.mask(frame, index), probability):
                yield frame, name, region
