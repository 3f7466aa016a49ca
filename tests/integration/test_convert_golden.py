"""The full-size model computes what the released code computed, and converts back without a changed bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from leafseg.convert import convert
from leafseg.pipeline import LeafPipeline

GOLDEN = Path(os.environ.get("LEAFSEG_SHARED") or Path(__file__).parents[3] / "shared") / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BAR = 2e-5  # of the largest value of each output

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the reference outputs (LEAFSEG_SHARED/golden)"),
]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full-size") / "released"
    subprocess.run([sys.executable, str(GOLDEN / "released_layout.py"), str(folder)], check=True)
    yield folder
    shutil.rmtree(folder.parent)  # 1.6 GB a model: not to be kept for three sessions


@pytest.fixture(scope="module")
def converted(released: Path) -> Path:
    convert(released, released.parent / "converted")
    return released.parent / "converted"


@torch.no_grad()
def test_every_stage_computes_what_the_released_code_computed(converted: Path) -> None:
    with np.load(GOLDEN / "released_outputs.npz") as stored:
        reference = {name: torch.from_numpy(stored[name]) for name in stored.files}
    pipe = LeafPipeline.from_pretrained(converted)
    seen: dict[str, Tensor] = {}

    def keep(name: str, *, given: bool = False) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            seen[name] = inputs[0] if given else output[0] if isinstance(output, tuple) else output

        return hook

    pipe.image_encoder.register_forward_hook(keep("image_latent"))
    pipe.unet.register_forward_hook(keep("unet"))
    pipe.vae.post_quant_conv.register_forward_hook(keep("x0", given=True))
    pipe.vae.decoder.register_forward_hook(keep("decoded"))
    image = reference["image"]
    seen["probability"] = pipe(image, latents=reference["noise"]).probability
    seen["image_latent"] = seen["image_latent"] * 0.18215
    seen["x0"] = seen["x0"] * 0.18215
    seen["vae_mode"] = pipe.vae.encode(image * 2 - 1).latent_dist.mode()
    differences = {
        name: float((value - reference[name]).abs().max() / reference[name].abs().max()) for name, value in seen.items()
    }
    assert set(differences) == set(reference) - {"image", "noise"}
    assert max(differences.values()) <= BAR, differences


def test_the_full_size_model_goes_back_without_a_changed_bit(released: Path, converted: Path) -> None:
    back = released.parent / "back"
    convert(converted, back, to="released")
    for part in ("unet", "vae", "latent_encoder"):
        with safe_open(released / part / WEIGHTS, "pt") as before, safe_open(back / part / WEIGHTS, "pt") as after:
            assert set(before.keys()) == set(after.keys())
            names = list(before.keys())
            for name in names:
                assert torch.equal(before.get_tensor(name).view(torch.uint8), after.get_tensor(name).view(torch.uint8))
