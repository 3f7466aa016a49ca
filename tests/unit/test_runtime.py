"""The runtime of exported models: what it may import, what it accepts, and preprocessing that is the pipeline's own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leafseg import rng
from leafseg.config import PreprocessingSettings
from leafseg.data.images import write_png
from leafseg.data.pixels import PixelPreprocessor, draw_noise, noise_position
from leafseg.data.transforms import Preprocessor
from leafseg.pipeline import LeafPipeline
from leafseg.runtime import StoredPreprocessing

SIDES = st.integers(1, 70)
# What `pip install --no-deps leafseg` and numpy, pillow and a back end leave out.
ABSENT = ("torch", "diffusers", "transformers", "monai", "pydantic", "scipy", "safetensors", "omegaconf", "accelerate")


def stored(**changes: object) -> StoredPreprocessing:
    values = PreprocessingSettings(**{"size": (32, 48), **changes}).model_dump(mode="json")
    return StoredPreprocessing.parse(json.loads(json.dumps(values)))


def test_the_runtime_imports_and_preprocesses_with_torch_and_pydantic_blocked(tmp_path: Path) -> None:
    write_png(tmp_path / "image.png", np.arange(600, dtype=np.uint8).reshape(20, 30))
    values = PreprocessingSettings(size=(32, 48)).model_dump(mode="json")
    code = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
from pathlib import Path
import leafseg.runtime, leafseg.runtime.__main__
from leafseg.data.pixels import PixelPreprocessor, noise_position
pixels = PixelPreprocessor(leafseg.runtime.StoredPreprocessing.parse({values!r}))
placed, placement = pixels.place(pixels.read(Path({str(tmp_path / "image.png")!r})))
assert not set({ABSENT!r}) & set(sys.modules)
print(placed.shape, noise_position(placed))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    there = Preprocessor(PreprocessingSettings(size=(32, 48)))
    placed, _ = there.apply(there.read(tmp_path / "image.png"))
    assert result.stdout.split(")")[1].strip() == str(noise_position(placed.numpy()))


def test_the_stored_settings_have_the_fields_of_the_settings() -> None:
    assert [field.name for field in fields(StoredPreprocessing)] == list(PreprocessingSettings.model_fields)
    for changes in ({}, {"intensity": "window", "window": (40.0, 80.0)}, {"fit": "pad", "interpolation": "bicubic"}):
        parsed = stored(**changes)
        assert PreprocessingSettings.model_validate(vars(parsed)) == PreprocessingSettings(size=(32, 48), **changes)
        hash(parsed)  # volumes' statistics are cached by it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": [32]}, "size is"),
        ({"size": [33, 48]}, "multiples of stride"),
        ({"stride": 0}, "multiples of stride"),
        ({"fit": "tile"}, "whole images"),
        ({"interpolation": "lanczos"}, "known are bilinear"),
        ({"percentiles": [50, 2]}, "ascend"),
        ({"intensity": "window"}, "belong together"),
        ({"dicom_window": 1}, "true or false"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_settings_that_are_damaged_are_refused(changes: dict[str, object], said: str) -> None:
    values = {**PreprocessingSettings(size=(32, 48)).model_dump(mode="json"), **changes}
    with pytest.raises(ValueError, match=said):
        StoredPreprocessing.parse(values)


@given(
    SIDES,
    SIDES,
    st.sampled_from(["stretch", "pad"]),
    st.sampled_from(["bilinear", "bicubic"]),
    st.sampled_from(["range", "percentile", "zscore"]),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_the_runtime_s_input_and_noise_are_the_pipeline_s_bit_for_bit(
    height: int, width: int, fit: str, interpolation: str, intensity: str, seed: int
) -> None:
    changes = {"fit": fit, "interpolation": interpolation, "intensity": intensity}
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    placed, placement = PixelPreprocessor(stored(**changes)).place(
        PixelPreprocessor(stored(**changes)).intensity_to_unit(image)
    )
    there = Preprocessor(PreprocessingSettings(size=(32, 48), **changes))
    one, same_placement = there.apply(image)
    (batched,), _ = there.resize_tensor(there.intensity_to_unit(image)[None])
    assert placement == same_placement
    np.testing.assert_array_equal(placed, one.numpy())
    np.testing.assert_array_equal(placed, batched.numpy())
    np.testing.assert_array_equal(
        draw_noise(noise_position(placed), (2, 3, 3), seed=0, num_samples=2)[1],
        rng.normal(0, "inference-noise-1", noise_position(one.numpy()), (2, 3, 3)),
    )


def test_the_pipeline_draws_that_noise(tiny_pipeline: LeafPipeline) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shape = tiny_pipeline.latent_shape((32, 32))
    drawn = [draw_noise(noise_position(image.numpy()), shape, seed=0, num_samples=2) for image in images]
    expected = tiny_pipeline(images, num_samples=2, latents=torch.from_numpy(np.concatenate(drawn)))
    assert torch.equal(tiny_pipeline(images, num_samples=2).probability, expected.probability)


@given(SIDES, SIDES, st.sampled_from(["stretch", "pad"]))
@settings(deadline=None, max_examples=40)
def test_maps_come_back_to_the_source_grid_as_torch_brings_them_back(height: int, width: int, fit: str) -> None:
    pixels, there = PixelPreprocessor(stored(fit=fit)), Preprocessor(PreprocessingSettings(size=(32, 48), fit=fit))
    maps = np.random.default_rng(height).random((2, 32, 48), dtype=np.float32)
    placement = pixels.placement((height, width))
    restored = pixels.restore(maps, placement)
    assert restored.shape == (2, height, width)
    # torch is up to 2.6e-6 from its own result in float64, Pillow 6e-8
    np.testing.assert_allclose(restored, there.restore(torch.from_numpy(maps), placement).numpy(), atol=5e-6)


@pytest.mark.parametrize("size", [(64, 64), (100, 90), (257, 33)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resizing_is_torch_s_to_the_last_bits(size: tuple[int, int], mode: str) -> None:
    """Two implementations of one antialiasing filter: a wrong filter or half a pixel of shift would show."""
    image = np.random.default_rng(0).random((3, *size), dtype=np.float32)
    placed, _ = PixelPreprocessor(stored(interpolation=mode)).place(image)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None], (32, 48), mode=mode, antialias=True)
    np.testing.assert_allclose(placed, expected[0].clamp(0, 1).numpy(), atol=5e-6)
