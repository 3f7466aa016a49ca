"""From published checkpoints to models that open, and back; every source here is tiny and written by the test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from leafseg.config import load_settings
from leafseg.convert import convert
from leafseg.convert.ldm import AutoencoderLayout, Entry, UNetLayout, autoencoder_entries, unet_entries
from leafseg.convert.leaf_release import released_autoencoder_config, released_unet_config
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.model.autoencoder import MaskDecoder, load_autoencoder
from leafseg.model.build import build_scheduler
from leafseg.pipeline import LeafPipeline

UNET = UNetLayout(8, 4, 32, (1, 2), 1, (True, False), num_heads=8, dropout=0.1, image_size=8)
VAE = AutoencoderLayout(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, dropout=0.1, resolution=16)
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.002,
    "beta_end": 0.016,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}


class Ended(Protocol):
    code: int
    stdout: str
    error: str


Cli = Callable[..., Ended]


def draw(table: list[Entry], shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random weights under LDM's names."""
    generator = torch.Generator().manual_seed(seed)
    return {e.ldm: 0.1 * torch.randn(e.ldm_shape(shapes[e.diffusers[0]]), generator=generator) for e in table}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def unet_weights(layout: UNetLayout = UNET, seed: int = 0) -> dict[str, Tensor]:
    module = layout.build()
    return draw(unet_entries(layout, module), shapes_of(module), seed)


def vae_weights(layout: AutoencoderLayout = VAE, seed: int = 1) -> dict[str, Tensor]:
    module = layout.build()
    return draw(autoencoder_entries(layout, module, decoder=True), shapes_of(module), seed)


def encoder_weights(layout: AutoencoderLayout = VAE, seed: int = 2) -> dict[str, Tensor]:
    module = layout.build_encoder()
    return draw(autoencoder_entries(layout, module, decoder=False), shapes_of(module), seed)


def write_component(folder: Path, config: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / WEIGHTS)


def in_dtype(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write_released(folder: Path, *, dtype: torch.dtype = torch.float32, scheduler: dict[str, Any] = SCHEDULER) -> Path:
    write_component(folder / "unet", released_unet_config(UNET), in_dtype(unet_weights(), dtype))
    vae_config = released_autoencoder_config(VAE, class_name="AutoencoderKL")
    write_component(folder / "vae", vae_config, in_dtype(vae_weights(), dtype))
    encoder_config = released_autoencoder_config(VAE, class_name="LatentEncoder")
    write_component(folder / "latent_encoder", encoder_config, in_dtype(encoder_weights(), dtype))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def write_kl_f8(path: Path) -> dict[str, Tensor]:
    state = vae_weights()
    losses = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2)}
    torch.save({"state_dict": {**state, **losses}, "epoch": 7}, path)
    return state


def write_lsun(path: Path, **others: Tensor) -> dict[str, Tensor]:
    state = unet_weights(UNetLayout(4, 4, 32, (1, 2), 1, (True, False)))
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    extra = {"betas": torch.zeros(3), "model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    torch.save({"state_dict": {**named, **extra, **others}, "optimizer_states": []}, path)
    return state


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released layout; not to be changed."""
    return write_released(tmp_path_factory.mktemp("released") / "leaf")


@pytest.fixture(scope="module")
def converted(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a pipeline; not to be changed."""
    out = tmp_path_factory.mktemp("converted") / "pipeline"
    convert(released, out)
    return out


# --- CompVis checkpoints ----------------------------------------------------------------------------------------------


def test_kl_f8_alone_becomes_an_autoencoder_that_settings_can_name(tmp_path: Path) -> None:
    state = write_kl_f8(tmp_path / "model.ckpt")
    report = convert(tmp_path / "model.ckpt", tmp_path / "out")
    assert report.kind == "autoencoder"
    assert report.unused == {"loss": ["loss.logvar", "loss.discriminator.main.0.weight"], "epoch": ["epoch"]}
    vae = load_autoencoder(tmp_path / "out")
    assert vae.config["scaling_factor"] == 0.18215
    assert torch.equal(vae.decoder.conv_out.weight, state["decoder.conv_out.weight"])
    stored = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert stored["unused"] == report.unused
    assert stored["parts"]["autoencoder"]["tensors"] == len(state) == len(vae.state_dict())


def test_both_checkpoints_in_a_folder_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    source = tmp_path / "downloads"
    (source / "one").mkdir(parents=True)
    unet = write_lsun(source / "a.ckpt")
    vae = write_kl_f8(source / "one" / "b.pt")
    report = convert(source, tmp_path / "out")
    assert report.kind == "starting point"
    assert set(report.unused) == {"betas", "model_ema", "optimizer_states", "loss", "epoch"}

    pipe = LeafPipeline.from_pretrained(tmp_path / "out")
    kernel = pipe.unet.conv_in.weight
    assert kernel.shape[1] == 8
    assert torch.equal(kernel[:, :4], unet["input_blocks.0.0.weight"] * 0.5)
    assert torch.equal(kernel[:, 4:], kernel[:, :4])
    for name, tensor in pipe.image_encoder.state_dict().items():
        assert torch.equal(tensor, pipe.vae.state_dict()[name]), name
    assert torch.equal(pipe.vae.quant_conv.weight, vae["quant_conv.weight"])
    expected = build_scheduler(load_settings("leaf-base")).config
    assert {name: pipe.scheduler.config[name] for name in expected} == dict(expected)
    assert pipe.config["preprocessing"]["size"] == [256, 256]
    assert pipe.config["preprocessing"]["stride"] == 4  # two levels in the autoencoder, two in the U-Net
    assert pipe.unet.config["num_attention_heads"] == 8


@torch.no_grad()
def test_a_starting_point_answers_to_one_latent_given_twice_as_the_original_answers_to_it_once(tmp_path: Path) -> None:
    unet = write_lsun(tmp_path / "lsun.ckpt")
    write_kl_f8(tmp_path / "kl.ckpt")
    convert(tmp_path / "lsun.ckpt", tmp_path / "out", vae=tmp_path / "kl.ckpt")
    wide = LeafPipeline.from_pretrained(tmp_path / "out").unet
    narrow = {**wide.state_dict(), "conv_in.weight": unet["input_blocks.0.0.weight"]}
    original = UNetLayout(4, 4, 32, (1, 2), 1, (True, False)).build()
    original.load_state_dict(narrow, assign=True)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        wide.denoise(torch.cat([latent] * 2, 1), 700), original.eval().denoise(latent, 700), atol=1e-5
    )


def test_a_unet_alone_asks_for_its_autoencoder(tmp_path: Path) -> None:
    write_lsun(tmp_path / "lsun.ckpt", **{"first_stage_model.encoder.conv_in.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="a U-Net without an autoencoder; add --vae with the kl-f8 checkpoint"):
        convert(tmp_path / "lsun.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_autoencoder_inside_a_unets_checkpoint_is_used_when_no_other_is_given(tmp_path: Path) -> None:
    inside = {f"first_stage_model.{name}": tensor for name, tensor in vae_weights(seed=5).items()}
    write_lsun(tmp_path / "lsun.ckpt", **inside)
    report = convert(tmp_path / "lsun.ckpt", tmp_path / "used")
    assert "first_stage_model" not in report.unused
    used = load_autoencoder(tmp_path / "used" / "vae")
    assert torch.equal(used.quant_conv.weight, inside["first_stage_model.quant_conv.weight"])

    given = write_kl_f8(tmp_path / "kl.ckpt")
    report = convert(tmp_path / "lsun.ckpt", tmp_path / "given", vae=tmp_path / "kl.ckpt")
    assert len(report.unused["first_stage_model"]) == len(inside)
    other = load_autoencoder(tmp_path / "given" / "vae")
    assert torch.equal(other.quant_conv.weight, given["quant_conv.weight"])


def test_weights_that_nothing_explains_are_an_error(tmp_path: Path) -> None:
    write_lsun(tmp_path / "lsun.ckpt", **{"control_model.input.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 unknown weights \(control_model.input.weight\)"):
        convert(tmp_path / "lsun.ckpt", tmp_path / "out", vae=tmp_path)


# --- the released layout ----------------------------------------------------------------------------------------------


def test_a_released_checkpoint_keeps_its_schedule_and_walks_trailing_timesteps(converted: Path) -> None:
    pipe = LeafPipeline.from_pretrained(converted)
    kept = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "clip_sample", "set_alpha_to_one")
    assert {name: pipe.scheduler.config[name] for name in kept} == {name: SCHEDULER[name] for name in kept}
    assert pipe.scheduler.config["timestep_spacing"] == "trailing"
    assert pipe.config["timesteps"] == "trailing"
    stated = {"size": [16, 16], "fit": "stretch", "interpolation": "bilinear", "intensity": "auto", "stride": 4}
    assert {name: pipe.config["preprocessing"][name] for name in stated} == stated
    assert pipe.label_names == ("background", "foreground")
    assert pipe.unet.config["dropout"] == pipe.image_encoder.config["dropout"] == 0.1
    assert torch.equal(pipe.unet.conv_in.weight, unet_weights()["input_blocks.0.0.weight"])
    assert torch.equal(pipe.image_encoder.quant_conv.bias, encoder_weights()["quant_conv.bias"])
    pipe(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_way_there_and_back_changes_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_released(tmp_path / "released", dtype=dtype)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="released")
    for part in ("unet", "vae", "latent_encoder"):
        before, after = load_file(source / part / WEIGHTS), load_file(tmp_path / "back" / part / WEIGHTS)
        assert before.keys() == after.keys(), part
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype == dtype
            assert tensor.shape == after[name].shape
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
        configs = [json.loads((folder / part / "config.json").read_text()) for folder in (source, tmp_path / "back")]
        assert configs[0] == configs[1], part
    stored = json.loads((tmp_path / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert {name: stored[name] for name in SCHEDULER} == SCHEDULER


def test_weights_are_rounded_only_when_asked(tmp_path: Path, released: Path) -> None:
    half = write_released(tmp_path / "half", dtype=torch.float16)
    report = convert(half, tmp_path / "kept")
    assert {part.dtype for part in report.parts.values()} == {"float16"}
    wanted = {"kept": torch.float16, "rounded": torch.bfloat16}
    convert(released, tmp_path / "rounded", dtype="bf16")
    for name, dtype in wanted.items():
        for part in ("unet", "vae", "image_encoder"):
            tensors = load_file(tmp_path / name / part / WEIGHTS)
            assert {tensor.dtype for tensor in tensors.values()} == {dtype}, (name, part)


def test_weights_that_a_type_cannot_hold_are_not_made_infinite(tmp_path: Path) -> None:
    source = write_released(tmp_path / "released")
    state = load_file(source / "unet" / WEIGHTS)
    state["out.2.bias"] = torch.full_like(state["out.2.bias"], 1e6)
    save_file(state, source / "unet" / WEIGHTS)
    with pytest.raises(ConfigError, match=r"--dtype fp16: too small for 1 weights \(conv_out.bias\)"):
        convert(source, tmp_path / "out", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["released"]


def test_a_ddpm_scheduler_gives_its_values_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    source = write_released(tmp_path / "released")
    path = source / "scheduler" / "scheduler_config.json"
    DDPMScheduler(beta_start=0.003, beta_end=0.01, prediction_type="sample").save_pretrained(path.parent)
    convert(source, tmp_path / "out")
    config = LeafPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert (config["beta_start"], config["beta_end"], config["prediction_type"]) == (0.003, 0.01, "sample")

    path.write_text(json.dumps({**SCHEDULER, "_class_name": "EulerDiscreteScheduler"}))
    with pytest.raises(CheckpointError, match="the scheduler is a EulerDiscreteScheduler; known are DDIMScheduler"):
        convert(source, tmp_path / "euler")


@pytest.fixture(scope="module")
def training_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the released training writes: both U-Nets, the latent encoder, and its optimizer."""
    folder = tmp_path_factory.mktemp("training") / "checkpoint-100"
    config = released_unet_config(UNET)
    write_component(folder / "unet", config, unet_weights(seed=8))
    ema = {"decay": 0.9999, "optimization_step": 100, "use_ema_warmup": False}
    write_component(folder / "unet_ema", {**config, **ema}, unet_weights(seed=9))
    write_component(
        folder / "latent_encoder", released_autoencoder_config(VAE, class_name="LatentEncoder"), encoder_weights()
    )
    (folder / "optimizer.bin").write_bytes(b"never opened")
    return folder


def test_a_training_checkpoint_asks_for_its_autoencoder(tmp_path: Path, training_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="a training checkpoint without an autoencoder; add --vae with the one"):
        convert(training_checkpoint, tmp_path / "out")


def test_a_training_checkpoint_takes_the_averaged_unet_and_the_reference_schedule(
    tmp_path: Path, training_checkpoint: Path, released: Path
) -> None:
    report = convert(training_checkpoint, tmp_path / "out", vae=released / "vae")
    assert report.kind == "released training checkpoint"
    assert report.ignored_fields == {"unet_ema": ["decay", "optimization_step", "use_ema_warmup"]}
    assert report.unused_files == ["optimizer.bin", "unet"]
    pipe = LeafPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(pipe.unet.conv_in.weight, unet_weights(seed=9)["input_blocks.0.0.weight"])
    expected = {
        "beta_start": 0.0015,
        "beta_end": 0.0155,
        "beta_schedule": "linear",
        "clip_sample": True,
        "prediction_type": "sample",
        "num_train_timesteps": 1000,
    }
    assert {name: pipe.scheduler.config[name] for name in expected} == expected


def test_every_form_of_autoencoder_is_taken_for_a_training_checkpoint(
    tmp_path: Path, training_checkpoint: Path, released: Path, converted: Path
) -> None:
    write_kl_f8(tmp_path / "kl.ckpt")
    forms = {"file": tmp_path / "kl.ckpt", "released": released, "diffusers": converted / "vae"}
    states = []
    for name, form in forms.items():
        convert(training_checkpoint, tmp_path / name, vae=form, prediction_type="epsilon")
        pipe = LeafPipeline.from_pretrained(tmp_path / name)
        assert pipe.scheduler.config["prediction_type"] == "epsilon"
        states.append(pipe.vae.state_dict())
    assert all(torch.equal(tensor, other[key]) for other in states for key, tensor in states[0].items())


def test_an_autoencoder_with_another_scale_is_refused(
    tmp_path: Path, training_checkpoint: Path, converted: Path
) -> None:
    vae = tmp_path / "vae"
    shutil.copytree(converted / "vae", vae)
    config = json.loads((vae / "config.json").read_text()) | {"scaling_factor": 0.13025}
    (vae / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"scaled otherwise \(scaling_factor 0.13025\)"):
        convert(training_checkpoint, tmp_path / "out", vae=vae)


def test_a_pickled_component_goes_through_the_safe_loader(tmp_path: Path) -> None:
    source = write_released(tmp_path / "released")
    state = load_file(source / "unet" / WEIGHTS)
    (source / "unet" / WEIGHTS).unlink()
    torch.save(state, source / "unet" / "diffusion_pytorch_model.bin")
    convert(source, tmp_path / "out")
    torch.save({**state, "x": convert}, source / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"refused, because it names leafseg\.convert\.run\.convert"):
        convert(source, tmp_path / "again")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("use_new_attention_order", True, "use_new_attention_order is True; only False is known"),
        ("num_head_channels", 32, "num_head_channels is 32; only -1 is known"),
        ("use_scale_shift_norm", False, "use_scale_shift_norm is False; only True is known"),
        ("num_classes", 3, "num_classes is 3; only None is known"),
        ("channel_mult", [2, 4], "its first factor must be 1"),
        ("num_res_blocks", "two", "not a released U-Net's config"),
        ("num_res_blocks", 2, "the weights do not fit"),
        ("num_heads", 7, "the U-Net cannot be built"),
    ],
)
def test_a_config_that_means_another_network_is_refused(
    tmp_path: Path, released: Path, field: str, value: object, said: str
) -> None:
    source = tmp_path / "released"
    shutil.copytree(released, source)
    path = source / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=said):
        convert(source, tmp_path / "out")


# --- back -------------------------------------------------------------------------------------------------------------


def test_a_run_is_written_in_the_released_layout_from_its_best_checkpoint(tmp_path: Path, converted: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-000005"
    shutil.copytree(converted, checkpoint / "pipeline")
    (checkpoint / "trainer").mkdir()
    (checkpoint / "trainer" / "state.json").write_text('{"best_step": 5}')
    (run / "run.json").write_text("{}")
    convert(run, tmp_path / "out", to="released")
    state = load_file(tmp_path / "out" / "unet" / WEIGHTS)
    assert torch.equal(state["input_blocks.0.0.weight"], unet_weights()["input_blocks.0.0.weight"])
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["latent_encoder"] == ["leaf.autoencoder", "LatentEncoder"]


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        (
            "vae/config.json",
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
            "stores latents_mean and latents_std",
        ),
        (
            "vae/config.json",
            {"scaling_factor": 0.5},
            "scaling_factor is 0.5, and the released code always takes",
        ),
        ("unet/config.json", {"norm_num_groups": 16}, "norm_num_groups is 16, and there it is always 32"),
        ("unet/config.json", {"freq_shift": 1}, "freq_shift is 1, and there it is always 0"),
        ("image_encoder/config.json", {"norm_num_groups": 8}, "norm_num_groups is 8, and there it is always 32"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "do not fit"),
    ],
)
def test_what_the_released_layout_cannot_say_is_refused_by_its_name(
    tmp_path: Path, converted: Path, file: str, fields: dict[str, object], reason: str
) -> None:
    shutil.copytree(converted, tmp_path / "pipeline")
    change_json(tmp_path / "pipeline" / file, **fields)
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path / "pipeline", tmp_path / "out", to="released")
    assert not (tmp_path / "out").exists()


def test_another_mask_code_is_refused_by_its_name(
    tmp_path: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leafseg import mask_code

    class TwoPictures(mask_code.BinaryMaskCode):
        num_pictures = 2

    monkeypatch.setattr(mask_code, "_CODES", dict(mask_code._CODES))
    mask_code.register_mask_code("two-pictures")(TwoPictures)
    shutil.copytree(converted, tmp_path / "pipeline")
    labels = {"name": "two-pictures", "label_names": ["background", "cup"]}
    change_json(tmp_path / "pipeline" / "model_index.json", mask_code=labels)
    with pytest.raises(CheckpointError, match=r"cannot hold mask code two-pictures \(2 pictures for 2 labels\)"):
        convert(tmp_path / "pipeline", tmp_path / "out", to="released")


def test_a_model_with_its_decoder_alone_is_refused(tmp_path: Path, converted: Path) -> None:
    pipe = LeafPipeline.from_pretrained(converted)
    pipe.register_modules(vae=MaskDecoder.from_autoencoder(pipe.vae))
    pipe.save_pretrained(tmp_path / "slim")
    with pytest.raises(CheckpointError, match="vae: holds the decoder of its autoencoder only"):
        convert(tmp_path / "slim", tmp_path / "out", to="released")


def test_the_models_of_the_other_tests_are_refused_in_one_sentence(tmp_path: Path, tiny_pipeline: LeafPipeline) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(CheckpointError, match="the released layout cannot hold the autoencoder"):
        convert(tmp_path / "pipeline", tmp_path / "out", to="released")


# --- arguments and the command line -----------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, released: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="out: exists already and is not an empty folder; choose another --out"):
        convert(released, out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    convert(released, out)
    assert (out / "model_index.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command_prints_what_it_recognised_and_what_it_did_not_use(
    tmp_path: Path, cli: Cli, training_checkpoint: Path
) -> None:
    write_kl_f8(tmp_path / "kl.ckpt")
    ended = cli("convert", training_checkpoint, "--out", tmp_path / "out", "--vae", tmp_path / "kl.ckpt")
    assert ended.code == 0, ended
    assert ended.stdout.startswith(f"released training checkpoint: {training_checkpoint} -> ")
    assert f"unet: {len(unet_weights())} tensors -> " in ended.stdout
    assert "not used: epoch (1), loss (2)" in ended.stdout
    assert "not used in unet_ema: decay, optimization_step, use_ema_warmup" in ended.stdout
    assert "not read: optimizer.bin, unet" in ended.stdout
    assert str(tmp_path) not in (tmp_path / "out" / "conversion.json").read_text()
    ended = cli("convert", tmp_path / "out", "--to", "released", "--out", tmp_path / "back", "--dtype", "fp16")
    assert ended.code == 0, ended
    assert "latent_encoder: " in ended.stdout
    assert "float16" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{pipeline}"], "a leafseg model already; add --to released"),
        (["{released}", "--vae", "{released}"], "has its own vae; leave --vae out"),
        (["{released}", "--to", "released"], "not a leafseg model; --to released takes a run or a pipeline folder"),
        (["{pipeline}", "--to", "released", "--vae", "x"], "--vae has no meaning with --to released"),
        (["{pipeline}/vae"], "an autoencoder in diffusers' form already; use it as model.autoencoder.weights"),
        (["{pipeline}/unet"], "one component (MaskUNet); give the folder with unet, vae, latent_encoder"),
        (["{empty}"], "no weights in a known layout; give lsun_churches, kl-f8, a folder with both"),
        (["nowhere/model.ckpt"], "no such file or folder"),
        (["somebody/nothing-here"], "neither a path here nor a reachable hub id"),
    ],
)
def test_a_wrong_source_is_one_sentence(
    tmp_path: Path, cli: Cli, released: Path, converted: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"pipeline": converted, "released": released, "empty": tmp_path / "empty"}
    ended = cli("convert", *(text.format(**places) for text in arguments), "--out", tmp_path / "out")
    assert said in ended.error
    assert not (tmp_path / "out").exists()
