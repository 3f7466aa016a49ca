"""Preprocessing and augmentation: expected values by symmetry, arithmetic, NumPy and SciPy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from leafseg import rng
from leafseg.config import AugmentationSettings, PreprocessingSettings
from leafseg.data.transforms import (
    AUGMENTATION_KINDS,
    Augmentation,
    Preprocessor,
    augment,
    augment_grid,
    draw_augmentation,
    draw_mix,
    pack_augmentation,
    paste_grid,
    unpack_augmentation,
)
from leafseg.errors import DataError

SIDES = st.integers(1, 70)
ANY_CHANGE = AugmentationSettings(
    horizontal_flip=True,
    vertical_flip=True,
    rotation_degrees=30,
    scale=(0.8, 1.25),
    translation=0.2,
    brightness=0.2,
    contrast=0.3,
    gamma=0.3,
)


def preprocessor(**options: object) -> Preprocessor:
    return Preprocessor(PreprocessingSettings(**{"size": (32, 48), **options}))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))


@given(SIDES, SIDES, st.integers(0, 255), st.sampled_from(["stretch", "pad"]), st.sampled_from(["bilinear", "bicubic"]))
@settings(deadline=None, max_examples=60)
def test_a_constant_image_comes_back_constant_on_its_own_grid(
    height: int, width: int, value: int, fit: str, interpolation: str
) -> None:
    there = preprocessor(fit=fit, interpolation=interpolation)
    image, placement = there.apply(np.full((height, width, 3), value, np.uint8))
    assert image.shape == (3, 32, 48)
    assert placement.source_size == (height, width)
    back = there.restore(image, placement)
    assert back.shape == (3, height, width)
    torch.testing.assert_close(back, torch.full((3, height, width), value / 255), atol=1e-5, rtol=0)


@given(SIDES, SIDES)
@settings(deadline=None, max_examples=40)
def test_padding_centres_the_image_and_keeps_its_aspect_ratio(height: int, width: int) -> None:
    image, placement = preprocessor(fit="pad").apply(np.full((height, width), 255, np.uint8))
    rows, columns = (torch.nonzero(image[0].amax(dim)).flatten() for dim in (1, 0))
    content = (len(rows), len(columns))
    assert content == placement.content_size
    assert content[0] == 32 or content[1] == 48
    zoom = min(32 / height, 48 / width)
    assert abs(content[0] - height * zoom) <= 0.5 or content[0] == 1
    assert abs(content[1] - width * zoom) <= 0.5 or content[1] == 1
    for first, length, side in ((rows[0], content[0], 32), (columns[0], content[1], 48)):
        assert abs(2 * int(first) + length - side) <= 1
    assert image.min().item() == pytest.approx(1 if content == (32, 48) else 0, abs=1e-6)


def test_an_image_of_the_input_size_is_not_resampled() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    image, _ = preprocessor().apply(pixels)
    np.testing.assert_array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), pixels)


def test_shrinking_is_the_antialiased_resize_of_pillow() -> None:
    # A smooth field, because Pillow rounds to 8 bits in between.
    y, x = np.mgrid[0:100, 0:130]
    pixels = (127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 7)).astype(np.uint8)
    image, _ = preprocessor().apply(pixels)
    expected = np.asarray(Image.fromarray(pixels).resize((48, 32), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(image[0].numpy(), expected, atol=1.5 / 255)


def test_apply_and_resize_tensor_are_one_path() -> None:
    for fit in ("stretch", "pad"):
        there = preprocessor(fit=fit)
        pixels = np.random.default_rng(1).integers(0, 256, (50, 40, 3)).astype(np.uint8)
        image, placement = there.apply(pixels)
        batch, same_placement = there.resize_tensor(there.intensity_to_unit(pixels)[None].repeat(3, 1, 1, 1))
        assert placement == same_placement
        assert all(torch.equal(image, other) for other in batch)


def test_bicubic_stays_within_0_and_1() -> None:
    edge = np.zeros((20, 20), np.uint8)
    edge[:, 10:] = 255
    image, _ = preprocessor(interpolation="bicubic").apply(edge)
    assert image.min() == 0
    assert image.max() == 1


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_labels_enlarged_by_a_whole_factor_are_repeated(height: int, width: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, (height, width)).astype(np.uint8)
    there = Preprocessor(PreprocessingSettings(size=(height * 8, width * 8)))
    expected = labels.repeat(8, axis=0).repeat(8, axis=1)
    out = there.apply_labels(labels, there.placement((height, width)))
    assert out.dtype == torch.int64
    np.testing.assert_array_equal(out.numpy(), expected)


def test_padded_labels_are_background() -> None:
    there = preprocessor(fit="pad")
    labels = there.apply_labels(np.ones((32, 32), np.uint8), there.placement((32, 32)))
    assert labels.sum() == 32 * 32
    assert labels[:, 8:40].all()


def test_labels_of_another_grid_are_refused() -> None:
    there = preprocessor()
    with pytest.raises(DataError, match="mask is 5x4, image is 6x4"):
        there.apply_labels(np.zeros((4, 5), np.uint8), there.placement((4, 6)))


def test_8_bit_images_are_divided_by_255_and_grey_becomes_three_channels() -> None:
    unit = preprocessor().intensity_to_unit(np.array([[0, 51, 255]], np.uint8))
    torch.testing.assert_close(unit, torch.tensor([[[0.0, 0.2, 1.0]]]).repeat(3, 1, 1))


def test_range_divides_by_the_types_maximum_and_drops_negatives() -> None:
    there = preprocessor(intensity="range")
    deep = there.intensity_to_unit(np.array([[0, 13107, 65535]], np.uint16))
    torch.testing.assert_close(deep[0, 0], torch.tensor([0.0, 0.2, 1.0]))
    signed = there.intensity_to_unit(np.array([[-1000, 0, 32767]], np.int16))
    torch.testing.assert_close(signed[0, 0], torch.tensor([0.0, 0.0, 1.0]))
    real = there.intensity_to_unit(np.array([[0.0, 0.25, 1.0]], np.float64))
    torch.testing.assert_close(real[0, 0], torch.tensor([0.0, 0.25, 1.0]))
    with pytest.raises(DataError, match="holds values from 0 to 300"):
        there.intensity_to_unit(np.array([[0.0, 300.0]], np.float32))


@given(st.floats(0.01, 1000), st.floats(-1e5, 1e5))
@settings(deadline=None, max_examples=30)
def test_percentiles_do_not_depend_on_scale_and_offset(scale: float, offset: float) -> None:
    pixels = np.random.default_rng(0).random((20, 30))
    there = preprocessor()
    expected = there.intensity_to_unit(pixels)
    assert expected.min() == 0
    assert expected.max() == 1
    torch.testing.assert_close(there.intensity_to_unit(pixels * scale + offset), expected, atol=1e-4, rtol=0)


def test_percentiles_cut_off_the_outermost_half_percents() -> None:
    # 0..1000: the 0.5th percentile is 5, the 99.5th is 995.
    unit = preprocessor().intensity_to_unit(np.arange(1001, dtype=np.uint16)[None])[0, 0]
    assert unit[:6].max() == 0
    assert unit[995:].min() == 1
    torch.testing.assert_close(unit[500], torch.tensor((500 - 5) / 990))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_a_constant_image_has_no_contrast_and_becomes_zeros(dtype: type) -> None:
    assert not preprocessor().intensity_to_unit(np.full((4, 4), 7, dtype)).any()


def test_pixels_that_are_not_finite_do_not_spoil_the_others() -> None:
    pixels = np.linspace(0, 1, 1001, dtype=np.float32)[None]
    broken = np.concatenate([pixels, [[np.nan, -np.inf, np.inf]]], axis=1)
    there = preprocessor()
    unit = there.intensity_to_unit(broken)
    torch.testing.assert_close(unit[..., :1001], there.intensity_to_unit(pixels))
    assert unit[0, 0, 1001:].tolist() == [0, 0, 1]
    for intensity in ("range", "percentile"):
        with pytest.raises(DataError, match="no finite pixel"):
            preprocessor(intensity=intensity).intensity_to_unit(np.full((3, 3), np.nan))


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (4, 4, 4), (0, 4), (2, 4, 4, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="accepted are"):
        preprocessor().apply(np.zeros(shape, np.uint8))


def test_complex_pixels_are_refused() -> None:
    with pytest.raises(DataError, match="complex64"):
        preprocessor().apply(np.zeros((4, 4), np.complex64))


@pytest.mark.parametrize("change", [Augmentation(flip_horizontal=True), Augmentation(flip_vertical=True)])
def test_flipping_twice_changes_nothing(change: Augmentation) -> None:
    image, labels = noise(3, 8, 6), torch.arange(48).reshape(8, 6)
    once = augment(image, labels, change)
    assert not torch.equal(once[0], image)
    again = augment(*once, change)
    assert torch.equal(again[0], image)
    assert torch.equal(again[1], labels)


@given(st.booleans(), st.booleans(), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_a_flip_of_the_grid_is_the_flip_of_the_features(across: bool, down: bool, gh: int, gw: int) -> None:
    features = noise(5, gh, gw)
    out = augment_grid(features, Augmentation(flip_horizontal=across, flip_vertical=down))
    expected = features.numpy()
    expected = np.flip(expected, 2) if across else expected
    expected = np.flip(expected, 1) if down else expected
    np.testing.assert_array_equal(out.numpy(), expected)


def test_no_change_is_exactly_no_change() -> None:
    image, labels = noise(3, 9, 7), torch.arange(63).reshape(9, 7)
    assert torch.equal(augment(image, labels, Augmentation())[0], image)
    assert torch.equal(augment(image, labels, Augmentation())[1], labels)
    assert torch.equal(augment_grid(image, Augmentation()), image)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_quarter_turn_is_counter_clockwise_and_exact(turns: int) -> None:
    image, labels = noise(3, 16, 16), torch.arange(256).reshape(16, 16)
    out, turned = augment(image, labels, Augmentation(angle=90.0 * turns))
    torch.testing.assert_close(out, torch.rot90(image, turns, (1, 2)), atol=1e-5, rtol=0)
    assert torch.equal(turned, torch.rot90(labels, turns, (0, 1)))


@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_a_shift_moves_content_down_and_right_by_its_share(size: tuple[int, int]) -> None:
    image, labels = noise(3, *size), torch.ones(size, dtype=torch.int64)
    out, moved = augment(image, labels, Augmentation(shift_y=0.25, shift_x=0.125))
    down, right = size[0] // 4, size[1] // 8
    torch.testing.assert_close(out[:, down:, right:], image[:, :-down, :-right], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, down:, 0], image[:, :-down, 0], atol=1e-5, rtol=0)  # the edge repeats
    expected = torch.zeros(size, dtype=torch.int64)
    expected[down:, right:] = 1
    assert torch.equal(moved, expected)


def test_a_zoom_of_two_doubles_a_centred_square() -> None:
    labels = torch.zeros(16, 16, dtype=torch.int64)
    labels[6:10, 6:10] = 1
    _, out = augment(labels.float().expand(3, -1, -1), labels, Augmentation(zoom=2.0))
    expected = torch.zeros(16, 16, dtype=torch.int64)
    expected[4:12, 4:12] = 1
    assert torch.equal(out, expected)


@given(st.floats(-180, 180), st.floats(0.7, 1.4), st.floats(-0.2, 0.2), st.floats(-0.2, 0.2))
@settings(deadline=None, max_examples=25)
def test_the_affine_move_is_that_of_scipy_also_where_height_and_width_differ(
    angle: float, zoom: float, shift_y: float, shift_x: float
) -> None:
    height, width = 20, 33
    image = noise(3, height, width)
    change = Augmentation(angle=angle, zoom=zoom, shift_y=shift_y, shift_x=shift_x)
    out, _ = augment(image, torch.zeros(height, width, dtype=torch.int64), change)
    # In (row, column) with rows downwards, a counter-clockwise turn by a is [[cos, -sin], [sin, cos]].
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    inverse = np.linalg.inv(zoom * np.array([[cos, -sin], [sin, cos]]))
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    offset = centre - inverse @ (centre + np.array([shift_y * height, shift_x * width]))
    for channel in range(3):
        expected = ndimage.affine_transform(image[channel].numpy(), inverse, offset, order=1, mode="nearest")
        np.testing.assert_allclose(out[channel].numpy(), expected, atol=1e-3)


def test_the_grid_moves_as_the_image_does() -> None:
    # A smooth image and its means over patches of 8x8: moving before or after averaging agrees away from the border.
    y, x = torch.meshgrid(torch.linspace(0, 3, 128), torch.linspace(0, 3, 128), indexing="ij")
    image = torch.stack([torch.sin(x), torch.cos(y), torch.sin(x + y)]) * 0.4 + 0.5
    change = Augmentation(flip_horizontal=True, angle=20.0, zoom=1.2, shift_y=0.05, shift_x=-0.05)
    moved, _ = augment(image, torch.zeros(128, 128, dtype=torch.int64), change)
    first = torch.nn.functional.avg_pool2d(moved, 8)
    second = augment_grid(torch.nn.functional.avg_pool2d(image, 8), change)
    torch.testing.assert_close(first[:, 3:-3, 3:-3], second[:, 3:-3, 3:-3], atol=5e-3, rtol=0)


def test_a_square_grid_over_a_wide_image_moves_as_the_image_does() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 3, 64), torch.linspace(0, 3, 128), indexing="ij")
    image = torch.stack([torch.sin(x), torch.cos(y), torch.sin(x + y)]) * 0.4 + 0.5
    change = Augmentation(angle=20.0, zoom=1.3)
    moved, _ = augment(image, torch.zeros(64, 128, dtype=torch.int64), change)
    first = torch.nn.functional.avg_pool2d(moved, (4, 8))
    second = augment_grid(torch.nn.functional.avg_pool2d(image, (4, 8)), change, image_size=(64, 128))
    torch.testing.assert_close(first[:, 5:-5, 5:-5], second[:, 5:-5, 5:-5], atol=5e-3, rtol=0)


def test_colours_do_not_reach_the_grid_nor_the_labels() -> None:
    change = Augmentation(brightness=0.1, contrast=1.2, gamma=0.8)
    features, labels = noise(4, 5, 5), torch.arange(25).reshape(5, 5)
    assert torch.equal(augment_grid(features, change), features)
    assert torch.equal(augment(noise(3, 5, 5), labels, change)[1], labels)


def test_colours_change_by_the_documented_arithmetic() -> None:
    image = torch.tensor([0.2, 0.4, 0.6]).reshape(1, 1, 3).repeat(3, 1, 1)
    labels = torch.zeros(1, 3, dtype=torch.int64)
    brighter = augment(image, labels, Augmentation(brightness=0.5))[0][0, 0]
    torch.testing.assert_close(brighter, torch.tensor([0.7, 0.9, 1.0]))  # clamped
    harder = augment(image, labels, Augmentation(contrast=1.5))[0][0, 0]
    torch.testing.assert_close(harder, torch.tensor([0.1, 0.4, 0.7]))  # about the mean 0.4
    darker = augment(image, labels, Augmentation(gamma=2.0))[0][0, 0]
    torch.testing.assert_close(darker, torch.tensor([0.04, 0.16, 0.36]))


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_any_drawn_change_stays_in_range_and_survives_packing(seed: int) -> None:
    change = draw_augmentation(ANY_CHANGE, np.random.default_rng(seed))
    assert unpack_augmentation(pack_augmentation(change)) == change
    assert abs(change.angle) <= 30
    assert 0.8 <= change.zoom <= 1.25
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (16, 24)))
    image, moved = augment(noise(3, 16, 24, seed=seed), labels, change)
    assert image.shape == (3, 16, 24)
    assert image.min() >= 0
    assert image.max() <= 1
    assert moved.dtype == torch.int64
    assert set(moved.unique().tolist()) <= {0, 1, 2}


def test_settings_that_ask_for_nothing_draw_nothing_and_use_up_as_many_numbers() -> None:
    still = AugmentationSettings(horizontal_flip=False)
    first, second = np.random.default_rng(5), np.random.default_rng(5)
    assert draw_augmentation(still, first) == Augmentation()
    draw_augmentation(ANY_CHANGE, second)
    assert first.random() == second.random()


def test_flips_are_drawn_half_of_the_time() -> None:
    generator = np.random.default_rng(3)
    drawn = [draw_augmentation(ANY_CHANGE, generator) for _ in range(2000)]
    for name in ("flip_horizontal", "flip_vertical"):
        assert abs(sum(getattr(change, name) for change in drawn) - 1000) < 4 * 22.4  # sqrt(2000) / 2


def test_every_field_declares_its_kind() -> None:
    assert set(AUGMENTATION_KINDS) == {field.name for field in dataclasses.fields(Augmentation)}


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="vector has 3 values"):
        unpack_augmentation(torch.zeros(3))


def test_maps_come_back_row_by_row_to_an_image_of_one_column() -> None:
    there = preprocessor()
    maps = torch.linspace(0, 1, 32)[None, :, None].expand(1, 32, 48)  # brighter downwards
    back = there.restore(maps, there.placement((16, 1)))[0, :, 0]
    assert back.shape == (16,)
    assert (back.diff() > 0.03).all()  # two of 31 steps a row


def bent(**changes: float) -> Augmentation:
    return Augmentation(elastic=0.03, elastic_seed=7.0, **changes)


def test_a_bend_moves_image_labels_and_grid_alike() -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    image = torch.stack([rows, columns, rows * columns])
    labels = (image[0] > 0.5).long()
    seen, seen_labels = augment(image, labels, bent(angle=20.0))
    plain, _ = augment(image, labels, Augmentation(angle=20.0))
    assert (seen - plain).abs().max() > 0.02
    inside = (seen[1] > 0.05) & (seen[1] < 0.95) & (seen[0] > 0.05) & (seen[0] < 0.95)
    assert ((seen_labels == (seen[0] > 0.5)) | ~inside).float().mean() > 0.99
    small = augment_grid(torch.nn.functional.avg_pool2d(image, 8), bent(angle=20.0), image_size=(64, 96))
    assert (small - torch.nn.functional.avg_pool2d(seen, 8)).abs()[:, 2:-2, 2:-2].max() < 0.03


def test_a_bend_is_as_large_as_asked_and_another_for_another_seed() -> None:
    rows = torch.linspace(-1, 1, 64)[:, None].expand(64, 64)
    found = []
    for seed in range(60):
        moved, _ = augment(rows.expand(3, 64, 64), rows.long(), Augmentation(elastic=0.02, elastic_seed=float(seed)))
        found.append((moved[0] - rows)[16:48, 16:48] / 2)  # the side is 2 long
    shifts = torch.stack(found)
    assert 0.5 < shifts.std().item() / 0.02 < 1.1  # between control points the surface is flatter than at them
    assert (shifts[0] - shifts[1]).abs().max() > 0.005


def test_a_bend_is_drawn_only_where_it_is_asked_for_and_leaves_the_other_draws() -> None:
    one = draw_augmentation(AugmentationSettings(rotation_degrees=9), rng.generator(3, "augmentation", 5))
    other = draw_augmentation(
        AugmentationSettings(rotation_degrees=9, elastic=0.05), rng.generator(3, "augmentation", 5)
    )
    assert (one.elastic, one.elastic_seed) == (0.0, 0.0)
    assert other.elastic_seed == int(other.elastic_seed) > 0
    assert dataclasses.replace(other, elastic=0.0, elastic_seed=0.0) == one
    assert unpack_augmentation(pack_augmentation(other)) == other


@given(
    n=st.integers(1, 9), seed=st.integers(0, 2**32), share=st.floats(0, 1), height=st.integers(1, 70), data=st.data()
)
def test_a_rectangle_is_lent_by_another_sample_and_lies_inside(
    n: int, seed: int, share: float, height: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, n - 1))
    lender, (top, left, bottom, right) = draw_mix(share, n, index, (height, 33), np.random.default_rng(seed))
    assert 0 <= lender < n
    assert n == 1 or lender != index
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= 33


def test_rectangles_come_as_often_as_asked_and_of_all_sizes_from_all_others() -> None:
    generator = np.random.default_rng(0)
    drawn = [draw_mix(0.25, 4, 2, (100, 50), generator) for _ in range(4000)]
    areas = np.array([(b[2] - b[0]) * (b[3] - b[1]) / 5000 for _, b in drawn if any(b)])
    assert 0.23 < len(areas) / 4000 < 0.27
    assert areas.min() < 0.02
    assert areas.max() > 0.85
    lenders = [other for other, _ in drawn]
    assert all(0.3 < lenders.count(other) / 4000 < 0.37 for other in (0, 1, 3))
    # An uncut rectangle has the image's aspect.
    uncut = [b for _, b in drawn if b[0] > 0 and b[1] > 0 and b[2] < 100 and b[3] < 50]
    assert len(uncut) > 100
    assert all(abs((b[2] - b[0]) - 2 * (b[3] - b[1])) <= 3 for b in uncut)


def test_the_same_numbers_are_used_up_whether_anything_is_pasted_or_not() -> None:
    first, second = np.random.default_rng(5), np.random.default_rng(5)
    assert draw_mix(0.0, 3, 0, (8, 8), first)[1] == (0, 0, 0, 0)
    draw_mix(1.0, 3, 0, (8, 8), second)
    assert first.random() == second.random()


def test_a_patch_is_pasted_if_its_centre_is() -> None:
    under, over = torch.zeros(2, 4, 4), torch.ones(2, 4, 4)
    whole = paste_grid(under, over, (0, 0, 64, 32), image_size=(64, 32))
    assert torch.equal(whole, over)
    assert torch.equal(paste_grid(under, over, (0, 0, 0, 0), image_size=(64, 32)), under)
    # Patches are 16 rows and 8 columns; their centres lie at rows 8, 24, 40, 56 and columns 4, 12, 20, 28.
    some = paste_grid(under, over, (9, 4, 40, 21), image_size=(64, 32))
    expected = torch.zeros(2, 4, 4)
    expected[:, 1:2, 0:3] = 1
    assert torch.equal(some, expected)
    assert under.sum() == 0, "what lies under must stay as it is"
