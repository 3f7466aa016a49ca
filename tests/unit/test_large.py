"""Regions of TIFF files that are too large to be read whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leafseg.data.large import open_large, tiff_pages, tiff_size
from leafseg.errors import DataError
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter, predict_files

SIZE = (90, 70)


def pixels_of(*channels: int, kind: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (*SIZE, *channels)).astype(kind)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Files of every layout that is read, each with the pixels that a whole read gives."""
    folder = tmp_path_factory.mktemp("large")
    rgb, grey, deep = pixels_of(3), pixels_of(), pixels_of(kind=np.uint16)
    made = {
        "tiles": (rgb, {"tile": (32, 16), "compression": "zlib", "photometric": "rgb"}),
        "strips": (rgb, {"rowsperstrip": 7, "photometric": "rgb"}),
        "planes": (rgb, {"tile": (32, 32), "photometric": "rgb", "planarconfig": "separate"}),
        "grey": (grey, {"tile": (16, 16)}),
        "sixteen bits": (deep, {"tile": (16, 16), "compression": "zlib"}),
        "big endian": (deep, {"tile": (16, 16), "byteorder": ">"}),
        "alpha": (pixels_of(4), {"tile": (16, 16), "photometric": "rgb", "extrasamples": ["unassalpha"]}),
        "real numbers": (grey.astype(np.float32) / 256, {"tile": (16, 16)}),
        "big": (grey, {"tile": (16, 16), "bigtiff": True}),
        "ome": (rgb, {"tile": (16, 16), "photometric": "rgb", "metadata": {"axes": "YXS"}}),
    }
    found = {}
    for name, (pixels, options) in made.items():
        path = folder / f"{name}{'.ome' if name == 'ome' else ''}.tif"
        options = dict(options)
        byteorder, big = options.pop("byteorder", None), options.pop("bigtiff", False)
        stored = np.moveaxis(pixels, -1, 0) if name == "planes" else pixels
        with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=big, ome=name == "ome") as tiff:
            tiff.write(stored, **options)
        found[name] = (path, pixels[..., :3] if pixels.ndim == 3 else pixels)
    pyramid = folder / "pyramid.ome.tif"
    with tifffile.TiffWriter(pyramid) as tiff:
        tiff.write(rgb, tile=(16, 16), photometric="rgb", subifds=1, metadata={"axes": "YXS"})
        tiff.write(rgb[::2, ::2], tile=(16, 16), photometric="rgb", subfiletype=1)
    found["pyramid"] = (pyramid, rgb)
    paged = folder / "pyramid of pages.tif"
    with tifffile.TiffWriter(paged) as tiff:
        for step in (1, 2, 4):  # smaller copies are pages of their own, marked as such
            copy = rgb[::step, ::step]
            tiff.write(copy, tile=(16, 16), photometric="rgb", subfiletype=int(step > 1), metadata=None)
    found["pyramid of pages"] = (paged, rgb)
    return found


NAMES = [
    "tiles", "strips", "planes", "grey", "sixteen bits", "big endian", "alpha", "real numbers", "big", "ome", "pyramid",
    "pyramid of pages",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_pieces_is_the_file_as_a_whole(files: dict[str, tuple[Path, np.ndarray]], name: str) -> None:
    path, whole = files[name]
    assert tiff_size(path) == SIZE
    assert tiff_pages(path) is None
    with open_large(path) as image:
        assert image.size == SIZE
        assert np.array_equal(image.region(0, 0, *SIZE), whole)
        bands = [image.region(top, 0, min(13, 90 - top), 70) for top in range(0, 90, 13)]
        assert np.array_equal(np.concatenate(bands), whole)
        assert image.region(3, 5, 2, 4).shape == (2, 4, *whole.shape[2:])


@given(st.integers(0, 89), st.integers(0, 69), st.integers(1, 90), st.integers(1, 70))
@settings(deadline=None, max_examples=30)
def test_any_region_is_that_part_of_the_whole(
    files: dict[str, tuple[Path, np.ndarray]], top: int, left: int, height: int, width: int
) -> None:
    path, whole = files["tiles"]
    height, width = min(height, 90 - top), min(width, 70 - left)
    with open_large(path) as image:
        assert np.array_equal(image.region(top, left, height, width), whole[top : top + height, left : left + width])


def test_a_small_image_is_its_own_sample_and_a_large_one_is_sampled_on_a_regular_grid(
    files: dict[str, tuple[Path, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = files["tiles"]
    with open_large(path) as image:
        assert np.array_equal(image.sample(), whole)
    # 90 x 70 pixels for a limit of 300: every 5th (21 would be over 4.58 squared) in both directions; bands of 10 rows.
    monkeypatch.setattr("leafseg.data.large._SAMPLE_PIXELS", 300)
    monkeypatch.setattr("leafseg.data.large._SAMPLE_ROWS", 12)
    with open_large(path) as image:
        assert np.array_equal(image.sample(), whole[::5, ::5])


def test_a_page_is_chosen_by_its_number(tmp_path: Path) -> None:
    pages = np.stack([pixels_of(seed=seed) for seed in range(4)])
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as tiff:
        for page in pages:
            tiff.write(page, tile=(16, 16), metadata=None)
    with open_large(path, 2) as image:
        assert np.array_equal(image.region(0, 0, *SIZE), pages[2])
    with pytest.raises(DataError, match=r"pages\.tif: the file holds 4 frames and none was chosen"), open_large(path):
        pass


def test_what_is_no_tiff_has_no_size_here(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"II*\0 broken")
    (tmp_path / "b.png").write_bytes(b"")
    for name in ("a.tif", "b.png", "missing.tif"):
        assert tiff_size(tmp_path / name) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"II*\0 broken"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: None, "no such file"),
        (lambda path: tifffile.imwrite(path, pixels_of(5), planarconfig=1, photometric=1), "5 channels"),
        (lambda path: tifffile.imwrite(path, pixels_of(4), photometric="separated"), "interpretation 5"),
        (lambda path: tifffile.imwrite(path, pixels_of(), photometric="miniswhite"), "interpretation 0"),
        (lambda path: tifffile.imwrite(path, pixels_of(), extratags=[(274, 3, 1, 6, True)]), "orientation 6"),
        (lambda path: tifffile.imwrite(path, pixels_of().astype(np.complex64)), "complex64"),
        (lambda path: tifffile.imwrite(path, pixels_of(3), photometric="ycbcr", compression="zlib"), "YCbCr colours"),
    ],
    ids=["broken", "empty", "missing", "channels", "cmyk", "inverted", "turned", "complex", "ycbcr"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "image.tif"
    make(path)
    with pytest.raises(DataError, match=message) as caught, open_large(path):
        pass
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_one_huge_strip_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "image.tif", pixels_of(), rowsperstrip=90)
    monkeypatch.setattr("leafseg.data.large._MAX_PIECE", 6299)  # 90 * 70 = 6300
    with (
        pytest.raises(DataError, match=r"pieces of 6,300 values.*save it as a tiled TIFF"),
        open_large(tmp_path / "image.tif"),
    ):
        pass


def test_a_file_cut_off_inside_its_pixels_says_so_when_they_are_reached(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pixels_of(), tile=(16, 16), compression="zlib", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        begin = page.dataoffsets[-1]
    content = bytearray(path.read_bytes())
    content[begin : begin + 8] = b"\xff" * 8  # the last tile is no deflate stream any more
    path.write_bytes(content)
    with open_large(path) as image:
        assert image.region(0, 0, 16, 16).shape == (16, 16)
        with pytest.raises(DataError, match=r"image\.tif: cannot be read"):
            image.region(80, 64, 10, 6)


# --- prediction of files ----------------------------------------------------------------------------------------------


def tiled_segmenter(pipeline: LeafPipeline, **changes: object) -> PipelineSegmenter:
    return PipelineSegmenter(
        LeafPipeline(
            unet=pipeline.unet,
            vae=pipeline.vae,
            image_encoder=pipeline.image_encoder,
            scheduler=pipeline.scheduler,
            preprocessing={**pipeline.config["preprocessing"], "fit": "tile", **changes},
        )
    )


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leafseg.data.large.LARGE_PIXELS", 2000)


@pytest.mark.usefixtures("everything_is_large")
def test_a_large_tiff_gives_the_label_map_that_a_whole_read_gives(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    image = tmp_path / "in" / "image.ome.tif"
    image.parent.mkdir()
    tifffile.imwrite(image, pixels_of(3), tile=(32, 32), photometric="rgb", metadata={"axes": "YXS"})
    segmenter = tiled_segmenter(tiny_pipeline)
    expected = segmenter.segment([pixels_of(3)])[0]
    report = predict_files(segmenter, [image], tmp_path / "out", probability=True)
    assert report.failed == {}
    assert report.written[str(image)] == ["image.ome.tif", "image.ome_probability.tif"]
    with tifffile.TiffFile(tmp_path / "out" / "image.ome.tif") as tiff:
        page = tiff.pages[0]
        assert tiff.is_bigtiff
        assert page.is_tiled
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        labels = page.asarray()
    probability = tifffile.imread(tmp_path / "out" / "image.ome_probability.tif")
    np.testing.assert_allclose(probability, expected.probability[0], atol=1e-5)
    sure = abs(expected.probability[0] - 0.5) > 1e-4
    assert sure.mean() > 0.9
    assert np.array_equal(labels[sure], (expected.labels * 255)[sure])
    figures = report.figures[str(image)]
    assert figures["shape"] == [90, 70]
    assert figures["pixels"] == {"foreground": int((labels == 255).sum())}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "image.ome.tif",
        "image.ome_probability.tif",
        "report.json",
    }


@pytest.mark.usefixtures("everything_is_large")
def test_each_page_of_a_large_tiff_gives_a_file(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    pages = np.stack([pixels_of(seed=seed) for seed in range(2)])
    image = tmp_path / "pages.tif"
    with tifffile.TiffWriter(image) as tiff:
        for page in pages:
            tiff.write(page, tile=(16, 16), metadata=None)
    segmenter = tiled_segmenter(tiny_pipeline)
    report = predict_files(segmenter, [image], tmp_path / "out")
    assert report.written[str(image)] == ["pages_0000.tif", "pages_0001.tif"]
    assert report.figures[str(image)]["shape"] == [2, 90, 70]
    maps = [tifffile.imread(tmp_path / "out" / name) for name in report.written[str(image)]]
    assert report.figures[str(image)]["pixels"] == {"foreground": sum(int((m == 255).sum()) for m in maps)}


@pytest.mark.usefixtures("everything_is_large")
def test_a_tiff_that_only_a_whole_read_understands_is_read_whole(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    image = tmp_path / "lzw.tif"
    Image.fromarray(pixels_of(3)).save(image, compression="tiff_lzw")
    report = predict_files(tiled_segmenter(tiny_pipeline), [image], tmp_path / "out")
    assert report.failed == {}
    assert report.written[str(image)] == ["lzw.png"]


@pytest.mark.usefixtures("everything_is_large")
def test_what_a_large_image_cannot_give_is_said_in_one_sentence(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    image = tmp_path / "image.tif"
    tifffile.imwrite(image, pixels_of(), tile=(16, 16))
    for options in ({"overlay": True}, {"output_format": "png"}, {"contours": "geojson"}):
        report = predict_files(tiled_segmenter(tiny_pipeline), [image], tmp_path / "out", **options)
        assert "choose --format tiff" in report.failed[str(image)]


def test_a_model_without_tiles_says_what_a_huge_image_needs(
    tiny_pipeline: LeafPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image.tif"
    tifffile.imwrite(image, pixels_of(), tile=(16, 16))
    monkeypatch.setattr("leafseg.predict.MAX_PIXELS", 6000)
    report = predict_files(PipelineSegmenter(tiny_pipeline), [image], tmp_path / "out")
    assert "70x90; more than 6,000 pixels" in report.failed[str(image)]
    assert "data.preprocessing.fit=tile" in report.failed[str(image)]


@pytest.mark.usefixtures("everything_is_large")
def test_a_large_image_that_is_cut_off_fails_alone(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.tif", tmp_path / "bad.tif"
    tifffile.imwrite(good, pixels_of(), tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(good) as tiff:
        begin = tiff.pages[0].dataoffsets[-1]
    content = bytearray(good.read_bytes())
    content[begin : begin + 8] = b"\xff" * 8
    bad.write_bytes(content)
    report = predict_files(tiled_segmenter(tiny_pipeline), [bad, good], tmp_path / "out")
    assert list(report.written) == [str(good)]
    assert "bad.tif: cannot be read" in report.failed[str(bad)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good.tif", "report.json"}
