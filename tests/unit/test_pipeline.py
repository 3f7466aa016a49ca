"""The pipeline: what it takes, what it gives, what it computes, and what it loads."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from leafseg.errors import CheckpointError, DataError
from leafseg.pipeline import LeafOutput, LeafPipeline

TYPES = ("sample", "epsilon", "v_prediction")


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (40, 36, 3), dtype=np.uint8)


def with_preprocessing(pipeline: LeafPipeline, **changes: object) -> LeafPipeline:
    config = {**pipeline.config["preprocessing"], **changes}
    return LeafPipeline(
        unet=pipeline.unet,
        vae=pipeline.vae,
        image_encoder=pipeline.image_encoder,
        scheduler=pipeline.scheduler,
        preprocessing=config,
    )


def with_prediction_type(pipeline: LeafPipeline, prediction_type: str) -> LeafPipeline:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    return pipeline


def close(first: LeafOutput, second: LeafOutput, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first.probability, second.probability, rtol=0, atol=tolerance)


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_the_same_pixels_give_the_same_result_in_every_form(tiny_pipeline: LeafPipeline) -> None:
    pixels = picture(40, 36, 3)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    reference = tiny_pipeline(pixels)
    for form in (Image.fromarray(pixels), [pixels], (Image.fromarray(pixels),), tensor, tensor.double()):
        close(tiny_pipeline(form), reference)


def test_a_grey_image_is_an_rgb_image_with_three_equal_channels(tiny_pipeline: LeafPipeline) -> None:
    grey = picture(33, 20)
    reference = tiny_pipeline(np.stack([grey] * 3, -1))
    close(tiny_pipeline(grey), reference)
    close(tiny_pipeline(Image.fromarray(grey)), reference)


def test_alpha_and_palettes_of_pillow_images_are_resolved(tiny_pipeline: LeafPipeline) -> None:
    rgb = Image.fromarray(picture(20, 20, 3))
    rgba = rgb.copy()
    rgba.putalpha(200)
    close(tiny_pipeline(rgba), tiny_pipeline(rgb))
    palette = rgb.quantize(16)
    close(tiny_pipeline(palette), tiny_pipeline(palette.convert("RGB")))
    two = rgb.convert("1")
    close(tiny_pipeline(two), tiny_pipeline(two.convert("L")))


def test_sixteen_bit_images_do_not_depend_on_brightness_or_contrast(tiny_pipeline: LeafPipeline) -> None:
    # Percentiles map any linear change of the values onto the same input.
    values = np.random.default_rng(0).integers(0, 1000, (30, 30))
    reference = tiny_pipeline(values.astype(np.uint16))
    close(tiny_pipeline((values * 60 + 500).astype(np.uint16)), reference)
    close(tiny_pipeline((values - 400).astype(np.int16)), reference)
    close(tiny_pipeline((values * 0.5).astype(np.float32)), reference)
    close(tiny_pipeline(Image.fromarray(values.astype(np.uint16))), reference)


def test_sixteen_bit_images_in_their_full_range_are_read_by_range_if_asked(tiny_pipeline: LeafPipeline) -> None:
    pipeline = with_preprocessing(tiny_pipeline, intensity="range")
    pixels = picture(30, 30)
    close(pipeline(pixels.astype(np.uint16) * 257), pipeline(pixels))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 3, 8, 8), 255.0), "values run from 255 to 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "0..1"),
        (-torch.ones(1, 3, 8, 8), "values run from -1 to -1"),
        (torch.zeros(3, 8, 8), r"\[3, 8, 8\]; give floating point \[B, 3, H, W\]"),
        (torch.zeros(1, 1, 8, 8), r"\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        (torch.zeros(1, 3, 0, 8), "at least one"),
        ([], "the list of images is empty"),
        ([picture(8, 8), picture(8, 9)], "images of one size"),
        (picture(8, 8, 4), r"accepted are \[H, W\] and \[H, W, 3\]"),
        (np.zeros((8, 8), complex), "complex"),
        (np.full((8, 8), np.nan), "no finite pixel"),
        ("image.png", "the image is a str"),
        ([torch.zeros(3, 8, 8)], "the image is a Tensor"),
        (None, "the image is a NoneType"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(tiny_pipeline: LeafPipeline, image: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        tiny_pipeline(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be 1..1000"),
        ({"num_inference_steps": 1001}, "1..1000"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"noise": "ones"}, "noise is 'ones'; known are gaussian, zeros"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents are \[1, 4, 8, 8\]; they must be \[1, 4, 4, 4\]"),
        ({"latents": torch.zeros(1, 4, 4, 4), "num_samples": 2}, r"must be \[2, 4, 4, 4\]"),
    ],
)
def test_an_argument_out_of_range_is_refused(tiny_pipeline: LeafPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(picture(8, 8), **arguments)


# --- what it gives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(37, 51), (129, 7), (1, 1), (32, 32)])
def test_the_result_lies_on_the_image_s_own_grid(tiny_pipeline: LeafPipeline, fit: str, size: tuple[int, int]) -> None:
    output = with_preprocessing(tiny_pipeline, fit=fit)([picture(*size), picture(*size, seed=1)])
    assert output.probability.shape == output.mask.shape == (2, 1, *size)
    assert output.probability.dtype == torch.float32
    assert output.probability.min() >= 0
    assert output.probability.max() <= 1
    assert torch.equal(output.mask, output.probability > 0.5)
    assert output.labels is not None
    assert output.labels.dtype == torch.int64
    assert torch.equal(output.labels, output.mask[:, 0].long())
    assert output.spread is None


def test_padding_keeps_the_aspect_ratio_where_stretching_does_not(tiny_pipeline: LeafPipeline) -> None:
    # An image that was padded by hand to a square is the same input for both.
    flat = picture(16, 32)
    square = np.zeros((32, 32), np.uint8)
    square[8:24] = flat
    zeros = {"noise": "zeros"}
    padded = with_preprocessing(tiny_pipeline, fit="pad")(flat, **zeros)
    torch.testing.assert_close(padded.probability, tiny_pipeline(square, **zeros).probability[:, :, 8:24])
    stretched = tiny_pipeline(flat, **zeros)
    assert not torch.allclose(stretched.probability, padded.probability, atol=1e-3)


def test_without_a_generator_the_result_depends_on_the_image_alone(tiny_pipeline: LeafPipeline) -> None:
    first = tiny_pipeline(picture())
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(tiny_pipeline(picture()).probability, first.probability)
    assert torch.equal(torch.get_rng_state(), state)  # and nothing is drawn from torch's own generator


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_mask_does_not_depend_on_the_batch_it_is_computed_in(tiny_pipeline: LeafPipeline, num_samples: int) -> None:
    images = [picture(40, 36, 3, seed=seed) for seed in range(4)]
    together = tiny_pipeline(images, num_samples=num_samples).probability
    for index, image in enumerate(images):
        alone = tiny_pipeline(image, num_samples=num_samples).probability
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-5)


def test_different_images_get_different_noise_and_equal_images_the_same(tiny_pipeline: LeafPipeline) -> None:
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.zeros(3, 32, 32)])
    noise = tiny_pipeline._draw_noise(images, (4, 4, 4), "gaussian", 2, None)
    assert noise.shape == (6, 4, 4, 4)
    assert torch.equal(noise[:2], noise[4:])
    assert not torch.allclose(noise[0], noise[1])  # two draws of one image
    assert not torch.allclose(noise[0], noise[2])  # two images


def test_the_noise_is_standard_normal(tiny_pipeline: LeafPipeline) -> None:
    noise = tiny_pipeline._draw_noise(torch.zeros(1, 3, 32, 32), (4, 64, 64), "gaussian", 4, None)
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5


def test_zero_latents_are_the_zero_noise(tiny_pipeline: LeafPipeline) -> None:
    zeros = tiny_pipeline(picture(), noise="zeros")
    assert torch.equal(tiny_pipeline(picture(), latents=torch.zeros(1, 4, 4, 4)).probability, zeros.probability)
    assert not torch.equal(tiny_pipeline(picture()).probability, zeros.probability)


def test_given_latents_belong_to_the_images_in_order(tiny_pipeline: LeafPipeline) -> None:
    images = [picture(seed=1), picture(seed=2)]
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    together = tiny_pipeline(images, latents=latents, num_samples=2)
    for index in range(2):
        pair = [tiny_pipeline(images[index], latents=latents[2 * index + k : 2 * index + k + 1]) for k in range(2)]
        mean = (pair[0].probability + pair[1].probability) / 2
        torch.testing.assert_close(together.probability[index : index + 1], mean, rtol=0, atol=1e-5)


def test_a_generator_changes_the_result_and_a_seed_repeats_it(tiny_pipeline: LeafPipeline) -> None:
    def run(seed: int) -> Tensor:
        return tiny_pipeline(picture(), generator=torch.Generator().manual_seed(seed)).probability

    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))
    assert not torch.equal(run(5), tiny_pipeline(picture()).probability)


def test_several_samples_give_their_mean_and_their_spread(tiny_pipeline: LeafPipeline) -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = tiny_pipeline(images, num_samples=3)
    noise = tiny_pipeline._draw_noise(images, (4, 4, 4), "gaussian", 3, None)
    each = torch.cat([tiny_pipeline(images, latents=one[None]).probability for one in noise])
    torch.testing.assert_close(output.probability[0], each.mean(0), rtol=0, atol=1e-5)
    assert output.spread is not None
    torch.testing.assert_close(output.spread[0], each.std(0, correction=0), rtol=0, atol=1e-5)
    assert (output.spread >= 0).all()
    assert output.spread.max() > 0
    same = tiny_pipeline(images, num_samples=3, noise="zeros").spread
    assert same is not None
    assert same.max() < 1e-6


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_steps_runs_for_every_prediction_type(
    tiny_pipeline: LeafPipeline, prediction_type: str, steps: int
) -> None:
    pipeline = with_prediction_type(tiny_pipeline, prediction_type)
    seen: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _module, inputs: seen.append(int(inputs[1])))
    output = pipeline(picture(), num_inference_steps=steps)
    assert output.probability.isfinite().all()
    assert seen == [999 - k * (1000 // steps) for k in range(steps)]


@pytest.mark.parametrize("prediction_type", TYPES)
def test_one_step_computes_the_method_s_own_formula(tiny_pipeline: LeafPipeline, prediction_type: str) -> None:
    """The whole chain by hand, at timestep 999 and without the scheduler."""
    pipeline = with_prediction_type(tiny_pipeline, prediction_type)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).prod().item()
    with torch.no_grad():
        image_latent = pipeline.image_encoder(image * 2 - 1) * 0.5  # the tiny autoencoder's factor
        prediction = pipeline.unet(torch.cat([image_latent, noise], 1), 999).sample
        clean = {
            "sample": prediction,
            "epsilon": (noise - (1 - abar) ** 0.5 * prediction) / abar**0.5,
            "v_prediction": abar**0.5 * noise - (1 - abar) ** 0.5 * prediction,
        }[prediction_type]
        decoded = pipeline.vae.decode(clean / 0.5).sample
        expected = ((decoded.clamp(-1, 1) + 1) / 2).mean(1, keepdim=True)
    tolerance = 1e-3 if prediction_type == "epsilon" else 1e-5  # epsilon divides by sqrt(abar), 39-fold
    output = pipeline(image, latents=noise)
    torch.testing.assert_close(output.probability, expected, rtol=0, atol=tolerance)


def test_two_steps_are_the_deterministic_ddim_rule(tiny_pipeline: LeafPipeline) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    given = latent.clone()
    with torch.no_grad():
        image_latent = tiny_pipeline.image_encoder(image * 2 - 1) * 0.5
        for now, then in ((abar[999], abar[499]), (abar[499], torch.tensor(1.0))):
            timestep = 999 if now < 0.01 else 499
            clean = tiny_pipeline.unet(torch.cat([image_latent, latent], 1), timestep).sample
            noise = (latent - now.sqrt().float() * clean) / (1 - now).sqrt().float()
            latent = then.sqrt().float() * clean + (1 - then).sqrt().float() * noise
        decoded = tiny_pipeline.vae.decode(latent / 0.5).sample
        expected = ((decoded.clamp(-1, 1) + 1) / 2).mean(1, keepdim=True)
    output = tiny_pipeline(image, latents=given, num_inference_steps=2)
    torch.testing.assert_close(output.probability, expected, rtol=0, atol=1e-4)


def test_the_recommended_number_of_steps_is_the_default(tiny_pipeline: LeafPipeline) -> None:
    tiny_pipeline.register_to_config(num_inference_steps=3)
    three = tiny_pipeline(picture(), num_inference_steps=3)
    assert torch.equal(tiny_pipeline(picture()).probability, three.probability)
    assert not torch.equal(tiny_pipeline(picture(), num_inference_steps=1).probability, three.probability)


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")  # newer diffusers say dtype, older do not know it
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_close_to_full_precision(
    tiny_pipeline: LeafPipeline, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    full = tiny_pipeline(picture())
    loaded = LeafPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.image_encoder.dtype == dtype
    half = loaded(picture())
    assert half.probability.dtype == torch.float32
    assert (half.probability - full.probability).abs().max() < tolerance
    assert (half.probability - full.probability).abs().mean() < tolerance / 5
    assert torch.equal(tiny_pipeline.to(dtype)(picture()).probability, half.probability)


# --- saving and loading -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_pipeline: LeafPipeline, tmp_path: Path) -> Path:
    """A saved model."""
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_pipeline_computes_the_same_bits_when_it_is_loaded(
    tiny_pipeline: LeafPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diffusers_log = logging.getLogger("diffusers")  # it does not propagate
    diffusers_log.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            tiny_pipeline.save_pretrained(tmp_path / "model")
            loaded = LeafPipeline.from_pretrained(tmp_path / "model")
            again = LeafPipeline.from_pretrained(str(tmp_path / "model"))
            found = loaded(picture(), num_samples=2)
    finally:
        diffusers_log.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []
    assert not any(module.training for module in (loaded.unet, loaded.vae, loaded.image_encoder))
    expected = tiny_pipeline(picture(), num_samples=2)
    assert torch.equal(found.probability, expected.probability)
    assert torch.equal(again(picture()).probability, tiny_pipeline(picture()).probability)
    assert loaded.preprocessor.settings == tiny_pipeline.preprocessor.settings
    assert loaded.label_names == tiny_pipeline.label_names


def test_a_saved_pipeline_holds_safetensors_and_names_public_classes_only(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae", "image_encoder")}
    configs = {"unet/config.json", "vae/config.json", "image_encoder/config.json", "scheduler/scheduler_config.json"}
    assert files == weights | configs | {"model_index.json"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "LeafPipeline"
    assert index["unet"] == ["leafseg", "MaskUNet"]
    assert index["image_encoder"] == ["leafseg", "ImageEncoder"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["format_version"] == 1
    assert index["preprocessing"]["size"] == [32, 32]
    assert index["mask_code"] == {"name": "binary", "label_names": ["background", "foreground"]}


def test_the_saved_scheduler_states_every_field(folder: Path) -> None:
    stated = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    parameters = set(inspect.signature(DDIMScheduler.__init__).parameters) - {"self"}
    assert parameters <= set(stated)
    assert (stated["timestep_spacing"], stated["clip_sample"], stated["set_alpha_to_one"]) == ("trailing", False, True)


def test_a_saved_pipeline_loads_in_a_fresh_process(folder: Path, tiny_pipeline: LeafPipeline) -> None:
    code = (
        "import numpy, leafseg\n"
        f"pipeline = leafseg.LeafPipeline.from_pretrained({str(folder)!r})\n"
        "image = numpy.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=numpy.uint8)\n"
        "print(repr(float(pipeline(image).probability.double().sum())))\n"
        f"unet = leafseg.MaskUNet.from_pretrained({str(folder / 'unet')!r})\n"
        "print(type(unet) is type(pipeline.unet))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    total, same_class = result.stdout.split()
    assert float(total) == pytest.approx(float(tiny_pipeline(picture()).probability.double().sum()), rel=1e-6)
    assert same_class == "True"


def edit_index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        change(index)
        (folder / "model_index.json").write_text(json.dumps(index))

    return damage


def truncate(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unpicklable(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def lose_a_weight(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["conv_in.weight"]
    save_file(state, path, metadata={"format": "pt"})


def widen_a_weight(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.weight"] = torch.cat([state["conv_in.weight"]] * 2, 1)
    save_file(state, path, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
    "garbage index": (
        lambda folder: (folder / "model_index.json").write_text("{nothing"),
        "not a readable model index",
    ),
    "binary index": (lambda folder: (folder / "model_index.json").write_bytes(b"\xff\xfe"), "not a readable"),
    "list index": (lambda folder: (folder / "model_index.json").write_text("[1]"), "not a readable model index"),
    "another pipeline": (edit_index(lambda i: i.update(_class_name="DDPMPipeline")), "the model is a DDPMPipeline"),
    "foreign class": (edit_index(lambda i: i.update(unet=["diffusers", "UNet2DModel"])), "component unet is diffusers"),
    "foreign code": (edit_index(lambda i: i.update(unet=["os", "system"])), "only leafseg.MaskUNet is loaded"),
    "code beside it": (edit_index(lambda i: i.update(extra=["evil", "Code"])), "unknown components extra"),
    "missing component": (edit_index(lambda i: i.pop("vae")), "component vae is missing"),
    "newer format": (edit_index(lambda i: i.update(format_version=4)), "format version 4; .* upgrade it"),
    "odd format": (edit_index(lambda i: i.update(format_version="x")), "not a readable model index"),
    "unknown mask code": (edit_index(lambda i: i["mask_code"].update(name="x")), "'x'; known are binary"),
    "no mask code": (edit_index(lambda i: i.update(mask_code={})), "cannot be loaded"),
    "bad preprocessing": (edit_index(lambda i: i["preprocessing"].update(size=[33, 32])), "cannot be loaded"),
    "pickled weights": (unpicklable, "no safetensors weights; leafseg never unpickles"),
    "truncated weights": (truncate, "cannot be loaded"),
    "lost weight": (lose_a_weight, r"missing or unknown \(conv_in.weight\)"),
    "wider weight": (widen_a_weight, "cannot be loaded"),
    "garbage config": (lambda folder: (folder / "unet" / "config.json").write_text("{"), "cannot be loaded"),
    "no scheduler": (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_one_sentence(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        LeafPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c"])
def test_a_model_that_does_not_exist_is_refused_without_a_download(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder; give a run, a pipeline folder, or a hub id"):
        LeafPipeline.from_pretrained(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        LeafPipeline.from_pretrained(tmp_path / "model.ckpt")


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"owner/missing: neither a folder here nor a reachable hub id") as caught:
        LeafPipeline.from_pretrained("owner/missing", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
