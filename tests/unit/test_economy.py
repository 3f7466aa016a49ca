"""What saves memory and disk: recomputed activations, 8-bit optimizer, number formats, links, the decoder alone."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import leafseg
from leafseg.config import TrainingSettings, load_autoencoder_settings, load_settings, override_settings
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.model.autoencoder import MaskDecoder, load_autoencoder, new_autoencoder
from leafseg.model.build import Components, build_components, count_parameters
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.recompute import recompute_activations
from leafseg.model.unet import MaskUNet
from leafseg.model_folder import WEIGHTS_FILE, folder_bytes, round_weights, save_model_folder, slim_model
from leafseg.pipeline import LeafPipeline
from leafseg.training.optimizers import make_optimizer, optimizer_bytes, parameter_groups
from leafseg.training.trainer import in_train_mode, saving_steps, validation_steps


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(block_out_channels=(16, 16, 32, 32), norm_num_groups=8, dropout=0.2)


def small_unet() -> MaskUNet:
    """The full size's block types: attention at several levels, residual down- and upsampling."""
    torch.manual_seed(0)
    return MaskUNet(
        block_out_channels=(16, 32, 32),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
        norm_num_groups=8,
        attn_norm_num_groups=8,
        num_attention_heads=2,
    )


# --- activations that are computed again ---


def both_losses(encoder: ImageEncoder, unet: MaskUNet) -> Tensor:
    """A loss of prediction and tap, as the objective's."""
    latent = encoder(gaussian(2, 3, 32, 32))
    sample = torch.cat([latent, gaussian(2, 4, 4, 4, seed=1)], 1)
    prediction, tap = unet.denoise_with_tap(sample, torch.tensor([3, 999]), tap_block=0)
    return prediction.abs().mean() + tap.square().mean()


def gradients(encoder: ImageEncoder, unet: MaskUNet) -> list[Tensor | None]:
    torch.manual_seed(5)  # dropout
    both_losses(encoder, unet).backward()
    found = [p.grad for module in (encoder, unet) for p in module.parameters()]
    encoder.zero_grad()
    unet.zero_grad()
    return [*found, torch.rand(3)]  # and what the generator gives next


def test_recomputed_activations_give_the_same_gradients_bit_for_bit_with_dropout_and_the_tap() -> None:
    modules = small_encoder().train(), small_unet().train()
    plain = gradients(*modules)
    for module in modules:
        module.enable_gradient_checkpointing()
        assert module.is_gradient_checkpointing
    again = gradients(*modules)
    assert sum(g is not None for g in plain) > 100
    for one, other in zip(plain, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    for module in modules:
        module.disable_gradient_checkpointing()
        assert not module.is_gradient_checkpointing
        assert not any("forward" in part.__dict__ for part in module.modules())


class Kept(TorchDispatchMode):
    """Bytes of everything computed inside that is still alive, parameters and their gradients aside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._of_the_module = {p.untyped_storage()._cdata for p in module.parameters()}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._of_the_module:
                storage = StorageWeakRef(tensor.untyped_storage())
                self._seen[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        return output

    def bytes(self) -> int:
        return sum(size for storage, size in self._seen.values() if not storage.expired())


@pytest.mark.parametrize(
    ("make", "call", "share"),
    [
        (small_encoder, lambda m: m(gaussian(1, 3, 32, 32)), 0.3),
        (small_unet, lambda m: m.denoise(gaussian(1, 8, 8, 8), 5), 0.4),
    ],
    ids=["image encoder", "U-Net"],
)
def test_recomputing_keeps_less_than_half_of_the_activations(
    make: Callable[[], Any], call: Callable[[Any], Tensor], share: float
) -> None:
    module = make().train()
    sizes = []
    for enable in (False, True):
        recompute_activations(module, enable)
        with Kept(module) as kept:
            output = call(module)
        sizes.append(kept.bytes())
        assert output.requires_grad
        del output
    assert sizes[1] < share * sizes[0]


def test_a_copy_of_a_module_that_recomputes_computes_with_its_own_weights() -> None:
    unet = small_unet().eval()
    unet.enable_gradient_checkpointing()
    twin = copy.deepcopy(unet)
    for parameter in unet.parameters():
        parameter.data.zero_()
    assert not unet.denoise(gaussian(1, 8, 8, 8), 5).any()
    assert twin.denoise(gaussian(1, 8, 8, 8), 5).any()


# --- optimizers ---


def tiny_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))


def train_net(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = (net(gaussian(32, 64, seed=step % 2)) - gaussian(32, 64, seed=2)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_weight_decay_is_for_kernels_or_for_all() -> None:
    net = tiny_net()
    kernels = parameter_groups(net, TrainingSettings(weight_decay=0.1))
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in kernels] == [(0.1, {2}), (0.0, {1})]
    (everything,) = parameter_groups(net, TrainingSettings(weight_decay=0.1, weight_decay_on="all"))
    assert everything["weight_decay"] == 0.1
    assert [id(p) for p in everything["params"]] == [id(p) for p in net.parameters()]


def test_without_its_package_the_8_bit_optimizer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "bitsandbytes" or n.startswith("bitsandbytes.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r'pip install "leafseg\[optim8\]"') as caught:
        make_optimizer(tiny_net(), TrainingSettings(optimizer="adamw_8bit"), torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_the_8_bit_optimizer_follows_the_plain_one_with_a_quarter_of_its_state() -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra leafseg[optim8]")
    losses, sizes = [], []
    for kind in ("adamw", "adamw_8bit"):
        net = tiny_net()
        settings = TrainingSettings(optimizer=kind, learning_rate=1e-2, weight_decay=0.0)
        optimizer = make_optimizer(net, settings, torch.device("cpu"))
        losses.append(train_net(net, optimizer, 0, 30))
        sizes.append(optimizer_bytes(optimizer))
    assert losses[1][-1] < 0.5 * losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    # Two moments of 8 bytes a weight against 2 bytes, and a scale of 4 bytes for each block of 256 values.
    assert sizes[1] < 0.35 * sizes[0]


def test_the_8_bit_optimizer_goes_on_from_a_stored_state_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra leafseg[optim8]")
    settings = TrainingSettings(optimizer="adamw_8bit", learning_rate=1e-2)
    net = tiny_net()
    optimizer = make_optimizer(net, settings, torch.device("cpu"))
    train_net(net, optimizer, 0, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = train_net(net, optimizer, 3, 6)

    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    other = tiny_net()
    other.load_state_dict(stored["net"])
    resumed = make_optimizer(other, settings, torch.device("cpu"))
    resumed.load_state_dict(stored["optimizer"])
    assert train_net(other, resumed, 3, 6) == expected
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


# --- when validation is due, and what it does to dropout ---


def test_validations_stand_at_multiples_from_a_first_step_on() -> None:
    settings = TrainingSettings(validate_every=200, validate_from=500, validations=7)
    assert validation_steps(settings, 1300) == {600, 800, 1000, 1200}
    assert validation_steps(TrainingSettings(validate_every=3), 7) == {3, 6}
    assert validation_steps(TrainingSettings(validations=2), 7) == {4, 7}


@pytest.mark.parametrize(("every", "first", "samples", "batch"), [(3, 0, 20, 4), (3, 9, 12, 3), (7, 0, 8, 8)])
def test_dropout_returns_with_the_next_pass_as_in_the_released_loop(
    every: int, first: int, samples: int, batch: int
) -> None:
    settings = TrainingSettings(
        validate_every=every, validate_from=first, batch_size=batch, train_mode_after_validation="next_epoch"
    )
    done, expected = 0, []
    for _epoch in range(8):  # the released loop: train() at the head of an epoch, eval() by a validation
        training = True
        for _batch in range(samples // batch):
            expected.append(training)
            done += 1
            if done % every == 0 and done >= first:
                training = False
    assert [in_train_mode(settings, step, samples) for step in range(done)] == expected
    # Batches as large as a pass: each begins a new one, and dropout always returns at once.
    assert (False in expected) == (batch < samples)
    at_once = TrainingSettings(validate_every=every, validate_from=first, batch_size=batch)
    assert all(in_train_mode(at_once, step, samples) for step in range(done))


def test_dropout_returns_with_the_first_step_that_begins_in_the_next_pass_where_batches_straddle() -> None:
    # Five samples, batches of two: steps 0-2 begin in pass 0, 3-4 in pass 1, 5-7 in pass 2.
    settings = TrainingSettings(validate_every=2, batch_size=2, train_mode_after_validation="next_epoch")
    assert [in_train_mode(settings, step, 5) for step in range(8)] == [
        True, True, False, True, False, True, False, False,
    ]  # fmt: skip


def test_a_mode_that_depends_on_moving_validations_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"next_epoch, which needs validate_every"):
        load_settings("leaf-tiny", overrides=["training.train_mode_after_validation=next_epoch"])


def test_an_autoencoder_has_no_use_for_settings_of_the_segmentation() -> None:
    with pytest.raises(ConfigError, match=r"training\.selection_part means nothing for an autoencoder"):
        load_autoencoder_settings(overrides=["training.selection_part=test"])


# --- number formats, links, slim models ---


def test_a_folder_in_fp32_is_what_diffusers_writes(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    tiny_pipeline.unet.to(memory_format=torch.channels_last)
    tiny_pipeline.save_pretrained(tmp_path / "diffusers", safe_serialization=True)
    save_model_folder(tiny_pipeline, tmp_path / "ours")
    files = sorted(str(p.relative_to(tmp_path / "ours")) for p in (tmp_path / "ours").rglob("*") if p.is_file())
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "diffusers" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_folder_in_half_precision_loads_in_full_with_rounded_weights_and_leaves_the_model_alone(
    tiny_pipeline: LeafPipeline, tmp_path: Path, dtype: Any
) -> None:
    before = {name: value.clone() for name, value in tiny_pipeline.unet.state_dict().items()}
    save_model_folder(tiny_pipeline, tmp_path / "half", dtype=dtype)
    assert all(torch.equal(before[name], value) for name, value in tiny_pipeline.unet.state_dict().items())
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    stored = load_file(tmp_path / "half" / "unet" / WEIGHTS_FILE)
    assert {value.dtype for value in stored.values()} == {kind}

    loaded = LeafPipeline.from_pretrained(tmp_path / "half")
    for name in ("unet", "vae", "image_encoder"):
        assert {p.dtype for p in getattr(loaded, name).parameters()} == {torch.float32}
    for name, value in loaded.unet.state_dict().items():
        assert torch.equal(value, before[name].to(kind).float())
    mask = loaded(np.full((20, 24), 90, np.uint8)).probability
    assert mask.shape == (1, 1, 20, 24)
    assert mask.isfinite().all()


def test_a_weight_that_fp16_cannot_hold_is_refused(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    next(tiny_pipeline.image_encoder.parameters()).data.view(-1)[0] = 1e6
    with pytest.raises(CheckpointError, match=r"image_encoder: weight .* is too large for fp16; use bf16 or fp32"):
        save_model_folder(tiny_pipeline, tmp_path / "half", dtype="fp16")
    save_model_folder(tiny_pipeline, tmp_path / "bf16", dtype="bf16")


def test_rounded_weights_are_those_that_are_read_back(tiny_components: Components) -> None:
    weights = {name: value.clone() for name, value in tiny_components.autoencoder.state_dict().items()}
    round_weights(tiny_components.autoencoder, "fp32")
    assert all(torch.equal(weights[n], v) for n, v in tiny_components.autoencoder.state_dict().items())
    round_weights(tiny_components.autoencoder, "fp16")
    for name, value in tiny_components.autoencoder.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights[name].half().float())


def test_frozen_weights_are_linked_while_they_are_the_same(
    tiny_pipeline: LeafPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inode(folder: str, part: str = "vae") -> int:
        return (tmp_path / folder / part / WEIGHTS_FILE).stat().st_ino

    save_model_folder(tiny_pipeline, tmp_path / "first", dtype="fp16")
    save_model_folder(tiny_pipeline, tmp_path / "second", dtype="fp16", earlier=tmp_path / "first")
    assert inode("second") == inode("first")
    assert inode("second", "unet") != inode("first", "unet")
    save_model_folder(tiny_pipeline, tmp_path / "other format", dtype="bf16", earlier=tmp_path / "first")
    assert inode("other format") != inode("first")
    save_model_folder(tiny_pipeline, tmp_path / "no earlier", dtype="fp16", earlier=tmp_path / "nowhere")
    assert inode("no earlier") != inode("first")

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError("not supported")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_links)
        save_model_folder(tiny_pipeline, tmp_path / "copied", dtype="fp16", earlier=tmp_path / "first")
    assert inode("copied") != inode("first")
    assert (tmp_path / "copied" / "vae" / WEIGHTS_FILE).read_bytes() == (
        tmp_path / "first" / "vae" / WEIGHTS_FILE
    ).read_bytes()

    tiny_pipeline.vae.post_quant_conv.weight.data.add_(1)
    save_model_folder(tiny_pipeline, tmp_path / "changed", dtype="fp16", earlier=tmp_path / "first")
    assert inode("changed") != inode("first")
    stored = load_file(tmp_path / "changed" / "vae" / WEIGHTS_FILE)["post_quant_conv.weight"]
    assert torch.equal(stored, tiny_pipeline.vae.post_quant_conv.weight.half())


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_alone_decodes_as_the_whole_autoencoder(
    dtype: torch.dtype, attention: bool, tmp_path: Path
) -> None:
    settings = load_settings("leaf-tiny").model.autoencoder.model_copy(
        update={"weights": None, "mid_block_attention": attention}
    )
    torch.manual_seed(0)
    autoencoder = new_autoencoder(settings).to(dtype).eval()
    autoencoder.register_to_config(latents_mean=[0.5] * 8, latents_std=[2.0] * 8)
    decoder = MaskDecoder.from_autoencoder(autoencoder)
    code = gaussian(2, 8, 4, 4).to(dtype)
    expected = autoencoder.decode(code, return_dict=False)[0]
    assert torch.equal(decoder.decode(code, return_dict=False)[0], expected)
    for name in ("latent_channels", "scaling_factor", "latents_mean", "latents_std", "block_out_channels"):
        assert list(np.atleast_1d(decoder.config[name])) == list(np.atleast_1d(autoencoder.config[name]))

    decoder.save_pretrained(tmp_path)
    loaded = leafseg.MaskDecoder.from_pretrained(tmp_path, dtype=dtype).eval()
    for tensor in loaded.parameters():
        tensor.data = tensor.data.clone()  # a mapped file has other last bits: see own_memory
    assert torch.equal(loaded.decode(code)[0], expected)


@pytest.fixture
def slimmed(tiny_pipeline: LeafPipeline, tmp_path: Path) -> tuple[Path, Path]:
    """A model's folder, and the same with the decoder only, in the same number format."""
    save_model_folder(tiny_pipeline, tmp_path / "whole")
    return tmp_path / "whole", slim_model(str(tmp_path / "whole"), tmp_path / "slim", dtype="fp32", decoder_only=True)


def test_a_slim_model_gives_the_same_masks_bit_for_bit(slimmed: tuple[Path, Path]) -> None:
    whole, slim = (LeafPipeline.from_pretrained(folder) for folder in slimmed)
    assert isinstance(whole.vae, AutoencoderKL)
    assert isinstance(slim.vae, leafseg.MaskDecoder)
    image = np.arange(40 * 36, dtype=np.uint8).reshape(40, 36)
    assert torch.equal(whole(image, num_samples=2).probability, slim(image, num_samples=2).probability)
    assert folder_bytes(slimmed[1]) < folder_bytes(slimmed[0])
    modes = {path.stat().st_mode for path in slimmed[1].rglob("*") if path.is_file()}
    (slimmed[1] / "plain").write_text("")
    assert modes == {(slimmed[1] / "plain").stat().st_mode}


def test_a_slim_model_can_be_slimmed_again_and_holds_no_path_of_this_machine(
    slimmed: tuple[Path, Path], tmp_path: Path
) -> None:
    slim_model(str(slimmed[1]), tmp_path / "again")
    assert isinstance(LeafPipeline.from_pretrained(tmp_path / "again").vae, MaskDecoder)
    assert folder_bytes(tmp_path / "again") < 0.6 * folder_bytes(slimmed[1])
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_what_needs_the_encoder_refuses_the_decoder_alone(slimmed: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"decoder of its autoencoder only .* use the model it was made from"):
        load_autoencoder(slimmed[1] / "vae")


@pytest.mark.parametrize("taken", ["file", "filled"])
def test_a_slim_model_replaces_nothing(tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(DataError, match=r"exists already and is not an empty folder"):
        slim_model("nowhere", out)
    assert (out if taken == "file" else out / "mine").read_text() == "mine"


def test_a_slim_model_that_cannot_be_written_leaves_nothing(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written"):
        slim_model(str(tmp_path / "model"), tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    slim_model(str(tmp_path / "model"), tmp_path / "empty")  # an empty folder may be filled
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "model"]


def test_a_slim_model_is_not_written_over_the_folder_one_stands_in(
    tiny_pipeline: LeafPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (Path(), tmp_path / "empty"):
        with pytest.raises(DataError, match=r"is the folder that this command runs in; give --out a folder of its own"):
            slim_model("../model", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model"]
    slim_model("../model", Path("new") / ".." / "slim")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == ["slim"]


def test_a_slim_model_leaves_the_folders_beside_it_alone(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "slim.partial").mkdir()
    (tmp_path / "slim.partial" / "mine").write_text("mine")
    slim_model(str(tmp_path / "model"), tmp_path / "slim")
    assert (tmp_path / "slim.partial" / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "slim", "slim.partial"]


def test_the_full_size_is_at_most_830_megabytes_in_half_precision_and_760_with_the_decoder_only() -> None:
    with torch.device("meta"):
        parts = build_components(load_settings("leaf-base"), with_weights=False)
    decoder = MaskDecoder.from_autoencoder(parts.autoencoder)
    trained = count_parameters(parts.unet) + count_parameters(parts.image_encoder)
    assert trained == 294_973_828 + 34_163_664
    assert 2 * (trained + count_parameters(parts.autoencoder)) == 825_582_710
    assert 2 * (trained + count_parameters(decoder)) == 757_255_382


def test_settings_that_say_no_other_keep_the_corrected_behaviour() -> None:
    training = override_settings(load_settings("leaf-tiny"), []).training
    assert (training.ema_parts, training.weight_decay_on) == ("all", "kernels")
    assert (training.selection_part, training.validation_resolution) == ("validation", "original")
    assert (training.train_mode_after_validation, training.validate_every) == ("at_once", None)
    assert (training.optimizer, training.gradient_checkpointing) == ("adamw", False)


def test_a_training_saves_also_where_it_does_not_validate() -> None:
    def steps(total: int, **settings: object) -> list[int]:
        return sorted(saving_steps(TrainingSettings(steps=total, **settings), total))

    assert steps(100, validations=4) == [25, 50, 75, 100]
    assert steps(100_000, validations=0)[:2] == [2000, 4000]
    assert steps(100, validations=0) == [25, 50, 75, 100]
    late = steps(100_000, validate_every=200, validate_from=30_000)
    assert late[0] == 2000
    assert len(late) == 50
    assert steps(100, validations=2, save_every=30) == [30, 50, 60, 90, 100]
