"""One fixture set that builds every real component at tiny width, for unit and integration tests alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from leafseg.config import Settings, parse_settings
from leafseg.data.images import write_png
from leafseg.data.manifest import PARTS, default_part
from leafseg.model.build import Components, build_components
from leafseg.pipeline import LeafPipeline

# Every part of leaf-base in small: random autoencoder (8 pixels a latent), attention in the U-Net, dropout in both
# trained parts (so that a test notices a wrong mode), no teacher. Inputs are multiples of 16.
TINY_SETTINGS = {
    "preset": "tests",
    "data": {"preprocessing": {"size": [32, 32]}, "augmentation": {"horizontal_flip": True}, "cache_mb": 16},
    "model": {
        "autoencoder": {
            "weights": None,
            "block_out_channels": [8, 8, 16, 16],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "mid_block_attention": False,
            "scaling_factor": 0.5,
        },
        "unet": {
            "block_out_channels": [32, 64],
            "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
            "layers_per_block": 1,
            "num_attention_heads": 2,
            "norm_num_groups": 8,
            "dropout": 0.1,
        },
        "image_encoder_dropout": 0.1,
    },
    "teacher": {"name": "none", "projector_width": 16},
    "objective": {"alignment_weight": 0.0},
    "training": {
        "seed": 3,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "ema_decay": 0.9,
        "precision": "fp32",
        "steps": 4,
        "validations": 2,
        "validation_samples": 2,
    },
}


@pytest.fixture(scope="session")
def tiny_settings() -> Settings:
    """Settings of a model that trains for four steps in a second; frozen, so that all tests share them."""
    return parse_settings(TINY_SETTINGS, source="tests")


@pytest.fixture
def tiny_components(tiny_settings: Settings) -> Components:
    """Modules with random weights, the same in every test, in evaluation mode; the test owns them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = build_components(tiny_settings)
    for module in (parts.unet, parts.autoencoder, parts.image_encoder):
        module.eval()
    return parts


@pytest.fixture
def tiny_pipeline(tiny_settings: Settings, tiny_components: Components) -> LeafPipeline:
    """An inference pipeline over ``tiny_components``; the test owns it."""
    parts = tiny_components
    return LeafPipeline(
        unet=parts.unet,
        vae=parts.autoencoder,
        image_encoder=parts.image_encoder,
        scheduler=parts.scheduler,
        preprocessing=tiny_settings.data.preprocessing.model_dump(mode="json"),
        mask_code={"name": parts.mask_code.name, "label_names": list(parts.mask_code.label_names)},
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_data(count=40, size=(40, 36), seed=0)``: a new folder with ``images/`` and ``masks/``.

    Each image shows one bright ellipse on noise. At least ``count`` are made, and more until train, validation and test
    hold two each by default.
    """

    def make(count: int = 40, *, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
        root = tmp_path_factory.mktemp("data")
        generator = np.random.default_rng(seed)
        parts = dict.fromkeys(PARTS, 0)
        index = 0
        while index < count or min(parts.values()) < 2:
            pixels, mask = _ellipse_on_noise(generator, size)
            image = root / "images" / f"{index:03d}.png"
            write_png(image, pixels)
            write_png(root / "masks" / f"{index:03d}.png", mask)
            parts[default_part(None, hashlib.sha256(image.read_bytes()).hexdigest())] += 1
            index += 1
        return root

    return make


def _ellipse_on_noise(generator: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image ``[H, W]`` uint8 and its mask ``[H, W]`` of 0 and 255; the ellipse lies inside the image."""
    height, width = size
    radius_y, radius_x = generator.uniform(0.12, 0.3, 2) * size
    centre_y = generator.uniform(radius_y, height - radius_y)
    centre_x = generator.uniform(radius_x, width - radius_x)
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 <= 1
    noise = generator.uniform(0, 80, size)
    return (noise + 150 * inside).astype(np.uint8), inside.astype(np.uint8) * 255
