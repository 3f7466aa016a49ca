"""The modules: exact sizes, the heads of the attention, the tap, latents, and loading without a change."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from leafseg.config import AutoencoderSettings, Settings, load_settings, override_settings
from leafseg.errors import CheckpointError, ConfigError
from leafseg.mask_code import BinaryMaskCode
from leafseg.model.autoencoder import (
    build_autoencoder,
    decode_pictures,
    encode_pictures,
    load_autoencoder,
    scale_latent,
    unscale_latent,
)
from leafseg.model.build import (
    Components,
    build_components,
    build_projector,
    build_scheduler,
    build_unet,
    count_parameters,
    model_figures,
    tap_grid,
)
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.projector import Projector
from leafseg.model.unet import MaskUNet


@contextmanager
def silence_required() -> Iterator[None]:
    """Fails if anything warns, through warnings or through the log of diffusers or this package."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("", "diffusers", "leafseg")]  # diffusers' does not propagate
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- sizes of the paper's model ---------------------------------------------------------------------------------------


def test_leaf_base_has_exactly_the_parameters_of_the_paper() -> None:
    parameters = model_figures(load_settings("leaf-base")).parameters
    assert parameters["unet"] == 294_973_828
    assert parameters["image_encoder"] == 34_163_664
    assert parameters["autoencoder"] == 83_653_863
    # The autoencoder is encoder + quant_conv (the image encoder's twin) and the decoder's half, which inference needs.
    assert parameters["inference"] == 294_973_828 + 83_653_863
    assert round(parameters["inference"] / 1e6, 1) == 378.6


def test_leaf_base_does_exactly_the_work_of_the_paper() -> None:
    gflops = model_figures(load_settings("leaf-base")).gflops
    assert gflops["image_encoder"] == pytest.approx(272.7, rel=1e-3)
    assert gflops["unet"] == pytest.approx(41.9, rel=1e-3)
    assert gflops["mask_decoder"] == pytest.approx(622.2, rel=1e-3)
    assert gflops["inference"] == pytest.approx(937, rel=1e-3)


def test_the_projector_of_leaf_base_has_the_paper_s_size() -> None:
    projector = build_projector(load_settings("leaf-base"), teacher_dim=768)
    widths = (192, 2048, 2048, 768)
    assert count_parameters(projector) == sum((a + 1) * b for a, b in pairwise(widths))
    assert round(count_parameters(projector) / 1e6, 2) == 6.17


def test_work_grows_with_the_area_where_there_is_no_attention(tiny_settings: Settings) -> None:
    small, large = model_figures(tiny_settings, size=(32, 32)), model_figures(tiny_settings, size=(64, 32))
    assert large.gflops["mask_decoder"] == pytest.approx(2 * small.gflops["mask_decoder"], rel=1e-6)
    assert large.parameters == small.parameters


def test_the_tap_of_leaf_base_is_192_channels_on_the_teacher_s_grid() -> None:
    settings = load_settings("leaf-base")
    with torch.device("meta"):
        unet = build_unet(settings, latent_channels=4, num_pictures=1)
        prediction, tap = unet.denoise_with_tap(torch.empty(1, 8, 32, 32), torch.zeros(1), tap_block=0)
    assert tap.shape == (1, 192, 16, 16)
    assert prediction.shape == (1, 4, 32, 32)
    assert tap_grid(settings) == (16, 16)
    assert unet.tap_channels(0) == 192


# --- attention --------------------------------------------------------------------------------------------------------


def test_leaf_base_has_eight_heads_at_every_level_whatever_their_width() -> None:
    with torch.device("meta"):
        unet = build_unet(load_settings("leaf-base"), latent_channels=4, num_pictures=1)
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    assert {module.inner_dim for module in attentions} == {192, 384, 768}
    for module in attentions:
        assert module.heads == 8
        assert module.scale == pytest.approx((module.inner_dim / 8) ** -0.5)
        assert module.group_norm is not None  # the mid block's too: diffusers leaves it out by default


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_computes_what_an_independent_one_with_that_many_heads_computes(heads: int) -> None:
    torch.manual_seed(0)
    unet = MaskUNet(
        block_out_channels=(32, 64),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        num_attention_heads=heads,
    ).eval()
    attention = unet.mid_block.attentions[0]
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    hidden = gaussian(2, 64, 3, 5)

    tokens = attention.group_norm(hidden.flatten(2)).mT  # [B, N, 64]
    query, key, value = (
        layer(tokens).reshape(2, 15, heads, 64 // heads) for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    weights = torch.einsum("bihd,bjhd->bhij", query, key).div((64 / heads) ** 0.5).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, value).reshape(2, 15, 64)
    expected = hidden + attention.to_out[0](mixed).mT.reshape(hidden.shape)

    torch.testing.assert_close(attention(hidden), expected, rtol=1e-4, atol=1e-5)


def test_the_number_of_heads_changes_the_result_but_no_weight(tiny_components: Components) -> None:
    unet, sample = tiny_components.unet, gaussian(1, 8, 4, 4)
    other = MaskUNet.from_config({**unet.config, "num_attention_heads": 4}).eval()
    other.load_state_dict(unet.state_dict())
    assert not torch.allclose(other.denoise(sample, 5), unet.denoise(sample, 5), atol=1e-4)


def test_a_width_that_the_heads_cannot_share_is_refused(tiny_settings: Settings) -> None:
    settings = override_settings(tiny_settings, ["model.unet.num_attention_heads=5"])
    with pytest.raises(ConfigError, match="multiple of num_attention_heads=5"):
        build_components(settings)


@pytest.mark.parametrize(
    "override",
    [
        "model.unet.norm_num_groups=7",
        "model.unet.down_block_types=[AttnDownBlock2D]",
        "model.unet.up_block_types=[NoSuchBlock,AttnUpBlock2D]",
        "model.autoencoder.norm_num_groups=5",
    ],
)
def test_a_layout_that_cannot_be_built_is_a_config_error_of_one_line(tiny_settings: Settings, override: str) -> None:
    with pytest.raises(ConfigError, match=override.rpartition(".")[0]) as caught:
        build_components(override_settings(tiny_settings, [override]))
    assert "\n" not in str(caught.value)


# --- tap --------------------------------------------------------------------------------------------------------------


def test_the_tap_is_the_down_block_s_own_output_after_its_downsampler(tiny_components: Components) -> None:
    unet, sample = tiny_components.unet, gaussian(2, 8, 4, 6)
    timesteps = torch.tensor([3, 700])
    prediction, tap = unet.denoise_with_tap(sample, timesteps, tap_block=0)

    embedding = unet.time_embedding(unet.time_proj(timesteps))
    expected, _ = unet.down_blocks[0](unet.conv_in(sample), embedding)
    assert tap.shape == (2, 32, 2, 3)
    assert torch.equal(tap, expected)
    assert torch.equal(prediction, unet.denoise(sample, timesteps))
    assert not unet.down_blocks[0]._forward_hooks


def test_the_tap_carries_a_gradient_and_leaves_no_hook_when_the_forward_fails(tiny_components: Components) -> None:
    unet = tiny_components.unet
    _, tap = unet.denoise_with_tap(gaussian(1, 8, 4, 4), 0, tap_block=0)
    tap.sum().backward()
    assert unet.conv_in.weight.grad is not None
    with pytest.raises(RuntimeError):
        unet.denoise_with_tap(gaussian(1, 3, 4, 4), 0, tap_block=0)
    assert not unet.down_blocks[0]._forward_hooks


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_the_tap_lies_on_the_announced_grid_at_every_size(tiny_settings: Settings, size: tuple[int, int]) -> None:
    settings = override_settings(tiny_settings, [f"data.preprocessing.size=[{size[0]},{size[1]}]"])
    unet = build_unet(settings, latent_channels=4, num_pictures=1)
    _, tap = unet.denoise_with_tap(gaussian(1, 8, size[0] // 8, size[1] // 8), 0, tap_block=0)
    assert tap.shape == (1, unet.tap_channels(0), *tap_grid(settings))
    projector = build_projector(settings, teacher_dim=6)
    assert projector(tap).shape == (1, tap.shape[2] * tap.shape[3], 6)


def test_projected_tokens_are_in_row_major_order() -> None:
    torch.manual_seed(0)
    projector, tap = Projector(4, 8, 3), gaussian(1, 4, 2, 3)
    tokens = projector(tap)
    alone = projector(tap[:, :, 1:2, 2:3])
    torch.testing.assert_close(tokens[:, 1 * 3 + 2], alone[:, 0])


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_u_net_is_saved_and_loaded_bit_by_bit_without_a_warning(tiny_components: Components, tmp_path: Path) -> None:
    unet = tiny_components.unet
    with silence_required():
        unet.save_pretrained(tmp_path)
        loaded, report = MaskUNet.from_pretrained(tmp_path, use_safetensors=True, output_loading_info=True)
    assert type(loaded) is MaskUNet
    assert not any(report.values())
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in unet.config.items() if k[0] != "_"
    }
    state = loaded.state_dict()
    assert state.keys() == unet.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in unet.state_dict().items())
    sample = gaussian(1, 8, 4, 4)
    torch.testing.assert_close(loaded.denoise(sample, 9), unet.denoise(sample, 9), rtol=0, atol=1e-5)


def test_an_image_encoder_is_saved_and_loaded_bit_by_bit_without_a_warning(
    tiny_components: Components, tmp_path: Path
) -> None:
    encoder = tiny_components.image_encoder
    with silence_required():
        encoder.save_pretrained(tmp_path)
        loaded = ImageEncoder.from_pretrained(tmp_path, use_safetensors=True)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in encoder.state_dict().items())
    assert loaded.config["dropout"] == 0.1


def test_a_loaded_autoencoder_computes_the_same_bits_as_before_it_was_saved(
    tiny_components: Components, tmp_path: Path
) -> None:
    # safetensors are mapped at odd addresses, where kernels round otherwise.
    autoencoder = tiny_components.autoencoder
    autoencoder.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert all(value.data_ptr() % 64 == 0 for value in loaded.state_dict().values())
    images = gaussian(1, 3, 32, 32)
    assert torch.equal(loaded(images).sample, autoencoder(images).sample)


@pytest.mark.parametrize("damage", ["missing", "no config", "garbage", "truncated", "no weights"])
def test_an_autoencoder_folder_that_is_damaged_is_one_sentence(
    tiny_components: Components, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "vae"
    if damage != "missing":
        tiny_components.autoencoder.save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "garbage":
        (folder / "config.json").write_text("{")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "no weights":
        weights.unlink()
    with pytest.raises(CheckpointError, match=str(folder)) as caught:
        load_autoencoder(folder)
    assert "\n" not in str(caught.value)


def test_an_autoencoder_that_lacks_a_weight_is_refused(tiny_components: Components, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_components.autoencoder.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["decoder.conv_in.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight"):
        load_autoencoder(tmp_path)


def test_an_autoencoder_of_another_shape_than_the_settings_is_refused(
    tiny_components: Components, tiny_settings: Settings, tmp_path: Path
) -> None:
    tiny_components.autoencoder.save_pretrained(tmp_path)
    asked = tiny_settings.model.autoencoder.model_copy(update={"weights": str(tmp_path)})
    state = tiny_components.autoencoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in build_autoencoder(asked).state_dict().items())
    with pytest.raises(ConfigError, match="latent_channels"):
        build_autoencoder(asked.model_copy(update={"latent_channels": 8}))


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STRIDE_8, STRIDE_4 = CONFIGS / "tiny-stride-8.yaml", CONFIGS / "tiny-stride-4.yaml"


@pytest.mark.parametrize(("file", "parameters"), [(STRIDE_8, 20_531_651), (STRIDE_4, 17_863_843)])
def test_the_networks_of_earlier_trainings_can_still_be_built(file: Path, parameters: int) -> None:
    """What these files are for: resuming and fine-tuning models of before."""
    settings = load_settings("leaf-tiny", file=file)
    assert model_figures(settings).parameters["inference"] == parameters
    assert tap_grid(settings) == tap_grid(load_settings("leaf-tiny")) == (8, 8)  # cached features serve both


def test_the_packaged_autoencoder_is_what_leaf_tiny_asks_for_and_carries_statistics_of_masks() -> None:
    autoencoder = build_autoencoder(load_settings("leaf-tiny").model.autoencoder)
    assert len(autoencoder.config["latents_mean"]) == len(autoencoder.config["latents_std"]) == 8
    with pytest.raises(ConfigError, match="the package ships compact-f2, compact-f4, compact-f8"):
        build_autoencoder(AutoencoderSettings(weights="packaged:compact-f9"))


# --- image encoder and latents ----------------------------------------------------------------------------------------


def test_the_image_encoder_starts_as_the_autoencoder_s_encoder(tiny_components: Components) -> None:
    autoencoder = tiny_components.autoencoder
    encoder = ImageEncoder.from_autoencoder(autoencoder).eval()
    images = gaussian(2, 3, 32, 48)
    assert torch.equal(encoder(images), autoencoder.encode(images).latent_dist.mode())
    assert encoder(images).shape == (2, 4, 4, 6)


def test_the_image_encoder_has_weights_of_its_own(tiny_components: Components) -> None:
    encoder = ImageEncoder.from_autoencoder(tiny_components.autoencoder)
    before = tiny_components.autoencoder.encoder.conv_in.weight.clone()
    with torch.no_grad():
        encoder.encoder.conv_in.weight.add_(1)
    assert torch.equal(tiny_components.autoencoder.encoder.conv_in.weight, before)
    assert all(parameter.requires_grad for parameter in tiny_components.image_encoder.parameters())
    assert not any(parameter.requires_grad for parameter in tiny_components.autoencoder.parameters())


def test_dropout_acts_in_training_mode_only(tiny_components: Components) -> None:
    encoder, unet, images = tiny_components.image_encoder, tiny_components.unet, gaussian(1, 3, 32, 32)
    sample = gaussian(1, 8, 4, 4)
    for module, call in ((encoder, lambda: encoder(images)), (unet, lambda: unet.denoise(sample, 0))):
        assert torch.equal(call(), call())
        module.train()
        assert not torch.equal(call(), call())


def with_statistics(autoencoder: AutoencoderKL) -> AutoencoderKL:
    autoencoder.register_to_config(latents_mean=[1.0, -2.0, 0.5, 0.0], latents_std=[2.0, 4.0, 0.5, 1.0])
    return autoencoder


def test_without_statistics_a_latent_is_the_code_times_the_factor(tiny_components: Components) -> None:
    code = gaussian(1, 4, 2, 2)
    assert torch.equal(scale_latent(code, tiny_components.autoencoder.config), code * 0.5)


def test_scaling_subtracts_the_mean_divides_by_the_deviation_and_multiplies_by_the_factor(
    tiny_components: Components,
) -> None:
    config = with_statistics(tiny_components.autoencoder).config
    code = torch.tensor([3.0, 2.0, 1.0, 7.0]).view(1, 4, 1, 1)
    assert scale_latent(code, config).flatten().tolist() == [0.5, 0.5, 0.5, 3.5]


@pytest.mark.parametrize("pictures", [1, 3])
def test_unscaling_is_the_inverse_of_scaling_for_every_picture(tiny_components: Components, pictures: int) -> None:
    config = with_statistics(tiny_components.autoencoder).config
    code = gaussian(2, 4 * pictures, 3, 2)
    torch.testing.assert_close(unscale_latent(scale_latent(code, config), config), code)
    each = [scale_latent(part, config) for part in code.split(4, 1)]
    torch.testing.assert_close(scale_latent(code, config), torch.cat(each, 1))


def test_statistics_survive_saving(tiny_components: Components, tmp_path: Path) -> None:
    with_statistics(tiny_components.autoencoder).save_pretrained(tmp_path)
    code = gaussian(1, 4, 2, 2)
    assert torch.equal(
        scale_latent(code, load_autoencoder(tmp_path).config), scale_latent(code, tiny_components.autoencoder.config)
    )


def test_pictures_are_encoded_and_decoded_one_by_one(tiny_components: Components) -> None:
    autoencoder = with_statistics(tiny_components.autoencoder)
    pictures = gaussian(2, 6, 32, 16)
    latent = encode_pictures(autoencoder, pictures)
    assert latent.shape == (2, 8, 4, 2)
    each = [scale_latent(autoencoder.encode(p).latent_dist.mode(), autoencoder.config) for p in pictures.split(3, 1)]
    torch.testing.assert_close(latent, torch.cat(each, 1), rtol=1e-4, atol=1e-5)
    decoded = decode_pictures(autoencoder, latent)
    assert decoded.shape == pictures.shape
    each = [decode_pictures(autoencoder, part) for part in latent.split(4, 1)]
    torch.testing.assert_close(decoded, torch.cat(each, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("file", "stride"), [(None, 2), (STRIDE_4, 4), (STRIDE_8, 8)])
def test_the_packaged_autoencoders_carry_a_mask_through(file: Path | None, stride: int) -> None:
    from leafseg.evaluation.round_trip import mask_round_trip_dice

    settings = load_settings("leaf-tiny", file=file)
    autoencoder = build_autoencoder(settings.model.autoencoder).eval()
    assert 2 ** (len(autoencoder.config["block_out_channels"]) - 1) == stride
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    labels = (((y - 60) / 40.0) ** 2 + ((x - 70) / 25.0) ** 2 <= 1).long()[None]
    assert mask_round_trip_dice(autoencoder, labels) > 0.97
    latent = encode_pictures(autoencoder, BinaryMaskCode().encode(labels))
    code = BinaryMaskCode()
    found = code.labels(code.probability(decode_pictures(autoencoder, latent)))
    assert (found == labels).float().mean() > 0.99


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_the_schedule_runs_from_the_last_timestep_and_states_every_field(tiny_settings: Settings) -> None:
    scheduler = build_scheduler(tiny_settings)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    named = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert named["timestep_spacing"] == "trailing"
    assert named["clip_sample"] is False
    assert scheduler.config.get("_use_default_values", []) == []
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-7)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(6.7e-4, rel=0.02)


def test_a_convolution_stays_what_it_was_when_its_memory_is_copied(tiny_components: Components) -> None:
    from leafseg.model.autoencoder import own_memory

    module = nn.Conv2d(3, 4, 3)
    x = gaussian(1, 3, 8, 8)
    before, owner = module(x), next(module.parameters())
    own_memory(module)
    assert torch.equal(module(x), before)
    assert next(module.parameters()) is owner  # an optimizer that holds it goes on holding it
    module(x).sum().backward()
    assert owner.grad is not None
