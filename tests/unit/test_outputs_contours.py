"""Polygons of masks: filled by pixel centres they are the mask again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from leafseg.outputs.contours import CocoFile, trace_regions, write_geojson
from leafseg.outputs.result import Labelled, file_labels


def crossings(ring: np.ndarray, x: float, y: float) -> int:
    """How many edges a ray from the point to the right crosses."""
    count = 0
    for (x0, y0), (x1, y1) in pairwise(ring):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            count += 1
    return count


def filled(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Even-odd filling at the pixels' centres."""
    result = np.zeros(shape, bool)
    for row in range(shape[0]):
        for column in range(shape[1]):
            result[row, column] = sum(crossings(ring, column + 0.5, row + 0.5) for ring in rings) % 2
    return result


def signed_area(ring: np.ndarray) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2


def one_label(mask: np.ndarray, probability: np.ndarray | None = None) -> Labelled:
    maps = None if probability is None else [probability[None].astype(np.float32)]
    return Labelled(("nodule",), False, [mask.astype(np.uint8)[None]], maps)


# A ring that touches the border, with an island in its hole; two pixels that touch at a corner; a single pixel.
DRAWN = np.array(
    [
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1, 0, 0, 1],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 1],
    ],
    bool,
)


def test_polygons_filled_by_pixel_centres_are_the_mask_with_holes_and_at_the_border() -> None:
    regions = list(trace_regions(DRAWN))
    assert np.array_equal(filled([ring for region in regions for ring in region.rings], DRAWN.shape), DRAWN)
    assert [len(region.rings) for region in regions] == [2, 1, 1, 1, 1]
    assert [region.area for region in regions] == [16, 1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_any_mask_comes_back_from_its_polygons(mask: np.ndarray) -> None:
    regions = list(trace_regions(mask))
    assert np.array_equal(filled([ring for region in regions for ring in region.rings], mask.shape), mask)
    assert sum(region.area for region in regions) == mask.sum()
    for region in regions:
        outer, *holes = region.rings
        assert signed_area(outer) > 0
        assert all(signed_area(hole) < 0 for hole in holes)
        assert all((ring[0] == ring[-1]).all() for ring in region.rings)
        bottom, right = region.top + region.pixels.shape[0], region.left + region.pixels.shape[1]
        assert np.array_equal(
            filled(list(region.rings), mask.shape)[region.top : bottom, region.left : right], region.pixels
        )


def test_a_single_pixel_is_a_diamond_about_its_centre() -> None:
    mask = np.zeros((5, 6), bool)
    mask[2, 3] = True
    (region,) = trace_regions(mask)
    corners = {(3.5, 2.0), (4.0, 2.5), (3.5, 3.0), (3.0, 2.5)}
    assert {tuple(point) for point in region.rings[0].tolist()} == corners
    assert len(region.rings[0]) == 5


def test_straight_runs_have_no_points_inside() -> None:
    mask = np.zeros((20, 40), bool)
    mask[4:12, 5:35] = True
    (region,) = trace_regions(mask)
    assert len(region.rings[0]) == 9  # eight: each corner is cut; and the first again


def test_a_geojson_file_holds_a_feature_a_region_with_its_label_and_score(tmp_path: Path) -> None:
    probability = np.where(DRAWN, 0.75, 0.25)
    write_geojson(tmp_path / "a.geojson", one_label(DRAWN, probability))
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    assert [f["properties"] for f in content["features"]] == [
        {"label": "nodule", "area": area, "score": 0.75} for area in (16, 1, 1, 1, 1)
    ]
    geometry = content["features"][0]["geometry"]
    assert geometry["type"] == "Polygon"
    rings = [np.array(ring) for feature in content["features"] for ring in feature["geometry"]["coordinates"]]
    assert np.array_equal(filled(rings, DRAWN.shape), DRAWN)


def test_frames_are_told_apart_only_where_there_are_some(tmp_path: Path) -> None:
    planes = [np.zeros((1, 3, 3), np.uint8), np.array([[[0, 0, 0], [0, 2, 0], [0, 0, 0]]], np.uint8)]
    write_geojson(tmp_path / "v.geojson", Labelled(("a", "b"), False, planes, numbered=True))
    (feature,) = json.loads((tmp_path / "v.geojson").read_text())["features"]
    assert feature["properties"] == {"label": "b", "area": 1, "frame": 1}


def test_a_coco_file_holds_polygons_and_run_lengths_for_holes(tmp_path: Path) -> None:
    ring = np.zeros((4, 4), np.uint8)
    ring[:3, :3] = 1
    ring[1, 1] = 0
    bar = np.zeros((4, 5), np.uint8)
    bar[1, 2:4] = 2
    coco = CocoFile(("a", "b"))
    coco.add("ring.png", Labelled(("a", "b"), False, [ring[None]], [np.full((2, 4, 4), 0.5, np.float32)]))
    coco.add("bar.tif", Labelled(("a", "b"), False, [np.zeros((1, 4, 5), np.uint8), bar[None]], numbered=True))
    coco.write(tmp_path / "annotations.json")
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    assert content["images"] == [
        {"id": 1, "file_name": "ring.png", "height": 4, "width": 4},
        {"id": 2, "file_name": "bar.tif", "height": 4, "width": 5, "frame": 0},
        {"id": 3, "file_name": "bar.tif", "height": 4, "width": 5, "frame": 1},
    ]
    first, second = content["annotations"]
    # Down the columns: 1110 1010 1110 0000, as runs that begin with zeros.
    assert first["segmentation"] == {"size": [4, 4], "counts": [0, 3, 1, 1, 1, 1, 1, 3, 5]}
    assert (first["image_id"], first["category_id"], first["area"], first["score"]) == (1, 1, 8, 0.5)
    assert first["bbox"] == [0, 0, 3, 3]
    assert (second["image_id"], second["category_id"], second["area"]) == (3, 2, 2)
    assert second["bbox"] == [2, 1, 2, 1]
    (flat,) = second["segmentation"]
    points = np.array(flat).reshape(-1, 2)
    assert np.array_equal(filled([np.concatenate([points, points[:1]])], (4, 5)), bar == 2)
    assert "score" not in second


def test_overlapping_labels_have_regions_each(tmp_path: Path) -> None:
    planes = np.zeros((2, 3, 4), np.uint8)
    planes[0, :, :2] = 1
    planes[1, 1, 1:] = 1
    labelled = Labelled(("organ", "lesion"), True, [planes])
    assert labelled.pixel_counts() == {"organ": 6, "lesion": 3}
    write_geojson(tmp_path / "o.geojson", labelled)
    features = json.loads((tmp_path / "o.geojson").read_text())["features"]
    assert [f["properties"]["label"] for f in features] == ["organ", "lesion"]
    for plane, feature in zip(planes, features, strict=True):
        rings = [np.array(ring) for ring in feature["geometry"]["coordinates"]]
        assert np.array_equal(filled(rings, (3, 4)), plane == 1)


@pytest.mark.parametrize(
    ("name", "expected"), [("white matter", "white-matter"), ("a/../b", "a-..-b"), ("Leber_1", "Leber_1")]
)
def test_a_label_s_name_becomes_a_part_of_a_file_name(name: str, expected: str) -> None:
    assert file_labels(["other", name]) == ["other", expected]


def test_labels_that_would_share_a_file_are_numbered() -> None:
    assert file_labels(["a b", "a-b", "c"]) == ["1-a-b", "2-a-b", "3-c"]
    assert file_labels(["Disc", "disc"]) == ["1-Disc", "2-disc"]
