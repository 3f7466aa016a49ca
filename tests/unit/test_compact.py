"""Compact parts: their shapes, how pipelines choose and store them, and what is measured and drawn to distil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from leafseg.compact import PARTS, budget_shares
from leafseg.config import (
    AutoencoderSettings,
    DataSettings,
    PreprocessingSettings,
    Settings,
    load_compact_settings,
    load_settings,
)
from leafseg.data.dataset import PositionSampler, SegmentationDataset
from leafseg.data.manifest import Sample, load_manifest
from leafseg.data.transforms import Preprocessor
from leafseg.errors import CheckpointError, ConfigError
from leafseg.evaluation.agreement import measure_agreement
from leafseg.evaluation.metrics import symmetric_dice
from leafseg.mask_code import PlanesMaskCode, make_mask_code
from leafseg.model.autoencoder import build_autoencoder, new_autoencoder
from leafseg.model.build import build_components, model_figures
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.pipeline import LeafPipeline
from leafseg.predict import Segmentation
from leafseg.training.compact_tasks import (
    DecoderDistillationTask,
    DecoderTuningTask,
    EncoderDistillationTask,
    MaskPictures,
)
from leafseg.training.task import TrainingTask
from leafseg.training.trainer import train


def with_compact_parts(pipeline: LeafPipeline) -> LeafPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipeline.register_modules(
            compact_decoder=CompactMaskDecoder.for_autoencoder(pipeline.vae.config, width=16, blocks=1).eval(),
            compact_encoder=CompactImageEncoder.for_encoder(pipeline.image_encoder.config, width=32, blocks=1).eval(),
        )
    return pipeline


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)


# --- the modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["leaf-base", "leaf-tiny"])
def test_compact_parts_have_the_shapes_of_the_full_ones_and_a_fraction_of_their_work(preset: str) -> None:
    settings = load_settings(preset)
    with torch.device("meta"):
        parts = build_components(settings, with_weights=False)
        decoder = CompactMaskDecoder.for_autoencoder(parts.autoencoder.config)
        height, width = settings.data.preprocessing.size
        z = settings.model.autoencoder.latent_channels
        stride = 2 ** (len(settings.model.autoencoder.block_out_channels) - 1)
        latent = torch.empty(2, z, height // stride, width // stride)
    encoder = CompactImageEncoder.for_encoder(parts.image_encoder.config)
    work = 0.0
    for call, shape in (
        (lambda: decoder(latent), (2, 1, height, width)),
        (lambda: encoder(torch.zeros(2, 3, height, width)), (2, z, height // stride, width // stride)),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert call().shape == shape
        work += counter.get_total_flops() / 2e9
    full = model_figures(settings).gflops
    share = 0.2 if preset == "leaf-base" else 0.3
    assert work < share * (full["image_encoder"] + full["mask_decoder"])
    if preset == "leaf-base":  # ten times less than the whole model, U-Net included
        assert full["inference"] > 10 * (work + full["unet"])


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_compact_parts_follow_any_stride(levels: int) -> None:
    settings = AutoencoderSettings(
        block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=4, mid_block_attention=True
    )
    config = new_autoencoder(settings).config
    stride = 2 ** (levels - 1)
    latent = CompactImageEncoder.for_encoder(config, width=32)(torch.zeros(1, 3, 2 * stride, 3 * stride))
    assert latent.shape == (1, 4, 2, 3)
    decoder = CompactMaskDecoder.for_autoencoder(config, width=32)
    assert decoder(latent).shape == (1, 1, 2 * stride, 3 * stride)
    assert len(decoder.body) == decoder.config["blocks"] == (2 if levels == 2 else 4)
    assert len(CompactImageEncoder.for_encoder(config, width=32, blocks=3).body) == 3


def test_a_mask_of_several_pictures_is_decoded_picture_by_picture() -> None:
    torch.manual_seed(0)
    decoder = CompactMaskDecoder(latent_channels=4, width=16, blocks=1)
    latent = torch.randn(2, 12, 4, 4)
    with torch.no_grad():
        pictures = decoder.decode_pictures(latent)
        assert pictures.shape == (2, 9, 32, 32)
        for index in range(3):
            grey = decoder(latent[:, 4 * index : 4 * index + 4])
            torch.testing.assert_close(pictures[:, 3 * index : 3 * index + 3], grey.expand(-1, 3, -1, -1))


def test_the_encoder_s_latents_have_the_statistics_it_was_given_times_what_it_computes() -> None:
    torch.manual_seed(0)
    plain = CompactImageEncoder(latent_channels=2, width=32, latent_mean=(0.0, 0.0), latent_std=(1.0, 1.0))
    moved = CompactImageEncoder(latent_channels=2, width=32, latent_mean=(5.0, -1.0), latent_std=(2.0, 0.5))
    moved.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = plain(image) * torch.tensor([2.0, 0.5])[:, None, None] + torch.tensor([5.0, -1.0])[:, None, None]
        torch.testing.assert_close(moved(image), expected)


def test_every_shipped_mask_code_reads_grey_pictures_alone() -> None:
    names = ("background", "a", "b", "c")
    for name in ("binary", "planes", "bits", "overlapping"):
        code = make_mask_code(name, names[:2] if name == "binary" else names)
        assert code.grey
        decoded = torch.rand(1, code.n_channels, 4, 4) * 2 - 1
        grey = decoded.unflatten(1, (-1, 3)).mean(2, keepdim=True).expand(-1, -1, 3, -1, -1).flatten(1, 2)
        torch.testing.assert_close(code.logits(decoded), code.logits(grey))


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_the_chosen_parts_are_used_and_nothing_else(tiny_pipeline: LeafPipeline) -> None:
    pipeline = with_compact_parts(tiny_pipeline)
    image = torch.rand(1, 3, 32, 32)
    noise = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        latent = pipeline.compact_encoder(image * 2 - 1)
        predicted = pipeline.unet.denoise(torch.cat([latent, noise], 1), 999)
        decoded = pipeline.compact_decoder(predicted)
    expected = (decoded.clamp(-1, 1) + 1) / 2
    found = pipeline(image, latents=noise, decoder="compact", encoder="compact").probability
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_tiles_take_the_chosen_parts_too(tiny_pipeline: LeafPipeline) -> None:
    pipeline = with_compact_parts(tiny_pipeline)
    tiled = LeafPipeline(
        **pipeline.components, preprocessing={**pipeline.config["preprocessing"], "fit": "tile", "tile_overlap": 0.0}
    )
    image = picture()[:32, :32]
    expected = pipeline(image, latents=torch.zeros(1, 4, 4, 4), decoder="compact", encoder="compact")
    found = tiled(image, noise="zeros", decoder="compact", encoder="compact")
    torch.testing.assert_close(found.probability, expected.probability, rtol=0, atol=1e-5)


def test_several_classes_go_through_the_compact_decoder(tiny_settings: Settings) -> None:
    names = ("background", "a", "b", "c")
    parts = build_components(tiny_settings, label_names=names)
    pipeline = with_compact_parts(
        LeafPipeline(
            unet=parts.unet.eval(),
            vae=parts.autoencoder,
            image_encoder=parts.image_encoder.eval(),
            scheduler=parts.scheduler,
            preprocessing=tiny_settings.data.preprocessing.model_dump(mode="json"),
            mask_code={"name": "planes", "label_names": list(names)},
        )
    )
    probability = pipeline(picture(), decoder="compact").probability
    assert probability.shape == (1, 4, 40, 36)
    torch.testing.assert_close(probability.sum(1), torch.ones(1, 40, 36))


def test_a_part_that_is_absent_or_unknown_is_refused(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    for part in ("decoder", "encoder"):
        with pytest.raises(CheckpointError, match=f"no compact {part}; run leafseg compact"):
            tiny_pipeline(picture(), **{part: "compact"})
    with pytest.raises(ValueError, match="encoder is 'small'; known are full, compact"):
        tiny_pipeline(picture(), encoder="small")
    tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no compact decoder; run leafseg compact"):
        LeafPipeline.from_pretrained(tmp_path, decoder="compact")


def test_a_model_without_compact_parts_is_written_as_format_1_and_says_nothing_of_them(
    tiny_pipeline: LeafPipeline, tmp_path: Path
) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["format_version"] == 1
    assert not {"compact_decoder", "compact_encoder"} & index.keys()
    again = LeafPipeline.from_pretrained(tmp_path)
    assert again.compact_decoder is None
    assert torch.equal(again(picture()).probability, tiny_pipeline(picture()).probability)


def test_compact_parts_are_saved_loaded_and_saved_again(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    pipeline = with_compact_parts(tiny_pipeline)
    pipeline.save_pretrained(tmp_path / "one")
    again = LeafPipeline.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    for folder in ("one", "two"):
        loaded = LeafPipeline.from_pretrained(tmp_path / folder, decoder="compact", encoder="compact")
        expected = pipeline(picture(), decoder="compact", encoder="compact").probability
        assert torch.equal(loaded(picture()).probability, expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f, i: i.update(compact_decoder=["os", "system"]),
            r"compact_decoder is os\.system; only leafseg",
        ),
        (lambda f, i: next((f / "compact_encoder").glob("*.safetensors")).unlink(), "no safetensors weights"),
        (lambda f, i: i.update(compact_third=["leafseg", "CompactMaskDecoder"]), "unknown components compact_third"),
        (lambda f, i: i.update(format_version=4), "format version 4"),
    ],
)
def test_a_damaged_compact_part_is_refused(
    tiny_pipeline: LeafPipeline, tmp_path: Path, damage: Callable, message: str
) -> None:
    with_compact_parts(tiny_pipeline).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    damage(tmp_path, index)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message) as caught:
        LeafPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


# --- what is learned from ---------------------------------------------------------------------------------------------


def test_mask_pictures_are_keyed_by_position_in_range_and_sometimes_uncertain() -> None:
    def pictures(stream: str = "x", seed: int = 0) -> list[torch.Tensor]:
        pictures = MaskPictures(None, size=32, crop=32, synthetic_share=0.3, seed=seed, stream=stream)
        return [pictures[position, 0]["picture"] for position in range(40)]

    one = pictures()
    assert all(torch.equal(a, b) for a, b in zip(one, pictures(), strict=True))
    for other in (pictures("y"), pictures(seed=1)):
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(p.shape == (3, 32, 32) and p.min() >= -1 and p.max() <= 1 for p in one)
    certain = sum(bool((p.abs() == 1).all()) for p in one)
    assert 5 < certain < 30


def test_crops_are_cut_out_of_masks_of_the_model_s_size() -> None:
    def uniform(size: int) -> int:
        pictures = MaskPictures(None, size=size, crop=16, synthetic_share=1.0, seed=0, stream="x")
        drawn = [pictures[position, 0]["picture"] for position in range(40)]
        assert all(picture.shape == (3, 16, 16) for picture in drawn)
        return sum(bool((picture == picture[0, 0, 0]).all()) for picture in drawn)

    assert uniform(16) == 0
    assert uniform(128) > 5  # inside or outside of something, as most of a large picture is


def test_the_masks_that_are_given_are_drawn(tiny_data: Callable[..., Path]) -> None:
    manifest = load_manifest(tiny_data(), settings=DataSettings()).part("train")
    masks = SegmentationDataset(
        manifest, Preprocessor(PreprocessingSettings(size=(32, 32))), augmentation=None, seed=0, cache_mb=1
    )
    pictures = MaskPictures(masks, size=32, crop=32, synthetic_share=0.0, seed=0, stream="x")
    known = {masks[0, index]["labels"].numpy().tobytes() for index in range(len(masks))}
    drawn = [(pictures[i, i]["picture"][0] > 0).long() for i in range(len(masks))]
    certain = [p for i, p in enumerate(drawn) if (pictures[i, i]["picture"].abs() == 1).all()]
    assert certain
    assert all(p.numpy().tobytes() in known for p in certain)


@pytest.mark.slow
def test_the_decoder_learns_to_draw_what_the_full_one_draws(tmp_path: Path) -> None:
    settings = load_compact_settings(
        overrides=["decoder.crop=32", "decoder.training.steps=150", "decoder.training.batch_size=16",
                   "decoder.training.validations=2", "decoder.training.precision=fp32"]
    ).decoder  # fmt: skip
    parts = build_components(load_settings("leaf-tiny"))
    task = DecoderDistillationTask(parts.autoencoder, Preprocessor(PreprocessingSettings(size=(128, 128))), settings)
    result = train(task, settings.training, tmp_path / "run", record={})
    assert result.best_score is not None
    assert result.best_score > 0.8


def test_the_tasks_learn_and_leave_the_full_parts_alone(
    tiny_pipeline: LeafPipeline, tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    before = {
        f"{name}.{key}": value.clone()
        for name in ("unet", "vae", "image_encoder")
        for key, value in getattr(tiny_pipeline, name).state_dict().items()
    }
    images = load_manifest(tiny_data(), settings=DataSettings())
    settings = load_compact_settings(
        overrides=[
            *("encoder.width=32", "encoder.blocks=1", "decoder.width=16", "decoder.blocks=1"),
            *(f"{part}.training.{name}" for part in ("encoder", "tuning", "decoder") for name in
              ("steps=60", "batch_size=4", "validations=0", "warmup_steps=1", "precision=fp32")),
            *("decoder.pairs=32", "tuning.pairs=32"),
            "decoder.crop=16",
            "encoder.mask_weight=0",  # random weights draw masks that nobody can learn
            "tuning.shape_weight=0",
        ]
    )  # fmt: skip
    shipped = build_autoencoder(load_settings("leaf-tiny").model.autoencoder)  # a random one draws no masks
    drawn = shipped.state_dict()["decoder.conv_in.weight"].clone()
    tasks: dict[str, tuple[TrainingTask, object]] = {
        "decoder": (
            DecoderDistillationTask(shipped, tiny_pipeline.preprocessor, settings.decoder),
            settings.decoder.training,
        ),
        "encoder": (EncoderDistillationTask(tiny_pipeline, images, settings.encoder), settings.encoder.training),
    }
    config = tiny_pipeline.vae.config
    tiny_pipeline.register_modules(compact_decoder=CompactMaskDecoder.for_autoencoder(config, width=16, blocks=1))
    tasks["tuning"] = (DecoderTuningTask(tiny_pipeline, images, settings.tuning), settings.tuning.training)
    for name, (task, training) in tasks.items():
        task.prepare(torch.device("cpu"), nullcontext, tmp_path)
        batch = default_collate([task.dataset[index, index] for index in range(4)])
        losses = [float(task.loss(task.module, batch, 0)["loss"].detach())]
        train(task, training, tmp_path / name, record={})
        losses.append(float(task.loss(task.module, batch, 0)["loss"].detach()))
        assert losses[1] < 0.9 * losses[0], (name, losses)
    assert torch.equal(shipped.state_dict()["decoder.conv_in.weight"], drawn)
    for name, value in before.items():
        part, key = name.split(".", 1)
        assert torch.equal(getattr(tiny_pipeline, part).state_dict()[key], value), name


def test_pairs_that_are_kept_give_the_loss_of_those_drawn_anew(
    tiny_pipeline: LeafPipeline, tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    images = load_manifest(tiny_data(), settings=DataSettings())
    config = tiny_pipeline.vae.config
    tiny_pipeline.register_modules(compact_decoder=CompactMaskDecoder.for_autoencoder(config, width=16, blocks=1))
    losses: dict[str, list[float]] = {"decoder": [], "tuning": []}
    for pairs in (3, 0):
        settings = load_compact_settings(
            overrides=["decoder.crop=16", "decoder.width=16", "decoder.blocks=1", f"decoder.pairs={pairs}",
                       f"tuning.pairs={pairs}"]
        )  # fmt: skip
        tasks = {
            "decoder": DecoderDistillationTask(tiny_pipeline.vae, tiny_pipeline.preprocessor, settings.decoder),
            "tuning": DecoderTuningTask(tiny_pipeline, images, settings.tuning),
        }
        for name, task in tasks.items():
            seed = getattr(settings, name).training.seed
            sampler = PositionSampler(n=len(task.dataset), seed=seed, batch_size_global=3, num_steps=1)
            keys = next(iter(sampler))
            task.prepare(torch.device("cpu"), nullcontext, tmp_path / name)
            batch = default_collate([task.dataset[(0, i) if pairs else key] for i, key in enumerate(keys)])
            assert ("latent" in batch) == bool(pairs)
            losses[name].append(float(task.loss(task.module, batch, seed)["loss"].detach()))
    for name, (kept, anew) in losses.items():
        assert kept == pytest.approx(anew, rel=2e-3), name


def test_each_part_learns_from_the_train_part_alone(
    tiny_pipeline: LeafPipeline, tiny_data: Callable[..., Path]
) -> None:
    manifest = load_manifest(tiny_data(), settings=DataSettings())
    settings = load_compact_settings()
    encoding = EncoderDistillationTask(tiny_pipeline, manifest, settings.encoder)
    decoding = DecoderDistillationTask(tiny_pipeline.vae, tiny_pipeline.preprocessor, settings.decoder, masks=manifest)
    assert isinstance(decoding.dataset, MaskPictures)
    assert decoding.dataset.masks is not None
    tiny_pipeline.register_modules(compact_decoder=decoding.decoder)
    tuning = DecoderTuningTask(tiny_pipeline, manifest, settings.tuning)
    for seen in (encoding.dataset, decoding.dataset.masks, tuning.dataset):
        assert {sample.part for sample in seen.manifest.samples} == {"train"}
        assert len(seen) == len(manifest.part("train"))


def test_settings_that_mean_nothing_here_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.ema_parts means nothing for a compact decoder"):
        load_compact_settings(overrides=["decoder.training.ema_parts=unet"])
    with pytest.raises(ConfigError, match=r"encoder\.width"):
        load_compact_settings(overrides=["encoder.width=40"])
    for name in ("encoder", "tuning"):
        changed = load_compact_settings(overrides=[f"{name}.training.steps=5"])
        assert getattr(changed, name).training.minutes is None


# --- agreement --------------------------------------------------------------------------------------------------------


def test_symmetric_dice_by_hand() -> None:
    first = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool().reshape(1, 4, 2, 2)
    second = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]).bool().reshape(1, 4, 2, 2)
    expected = torch.tensor([[0.5, float("nan"), 0.0, 0.0]])
    torch.testing.assert_close(symmetric_dice(first, second), expected, equal_nan=True)
    torch.testing.assert_close(symmetric_dice(second, first), expected, equal_nan=True)


class Fixed:
    """A segmenter that gives stored labels for images that say which."""

    overlapping = False
    label_names = ("background", "a", "b")
    preprocessing = PreprocessingSettings()

    def __init__(self, labels: list[list[int]]) -> None:
        self.labels = [np.array(values, np.uint8).reshape(2, 2) for values in labels]

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        return np.array(int(path.stem))

    def segment(self, images: list[np.ndarray]) -> list[Segmentation]:
        eye = np.eye(3, dtype=np.float32)
        return [Segmentation(eye[self.labels[int(i)]].transpose(2, 0, 1), self.labels[int(i)]) for i in images]


def test_agreement_is_a_mean_over_labels_then_images_and_counts_the_empty_ones_apart() -> None:
    samples = [Sample(f"i{i}", Path(f"{i}.png"), None, None, None, None, f"{i:064x}", "test") for i in range(4)]
    reference = Fixed([[1, 1, 2, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    other = Fixed([[1, 2, 2, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 2, 0]])
    found = measure_agreement(reference, {"same": reference, "other": other}, samples)
    assert found["same"].dice is not None
    assert found["same"].dice["mean"] == 1
    assert (found["same"].images, found["same"].both_empty) == (4, 2)
    # Image 0: a has 2*1/(2+1), b 2*1/(1+2); image 2: 1; image 3: b is found in one alone, 0.
    figures = found["other"]
    assert figures.dice is not None
    assert figures.dice["mean"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert figures.worst == ("i3", 0.0)
    assert figures.classes == {"a": pytest.approx((2 / 3 + 1) / 2), "b": pytest.approx((2 / 3 + 0) / 2)}
    assert figures.both_empty == 1
    assert PlanesMaskCode(Fixed.label_names).n_outputs == 3


def test_agreement_of_empty_masks_alone_is_no_figure() -> None:
    empty = Fixed([[0, 0, 0, 0]])
    sample = Sample("i", Path("0.png"), None, None, None, None, "0" * 64, "test")
    found = measure_agreement(empty, {"x": empty}, [sample])["x"]
    assert (found.dice, found.worst, found.both_empty) == (None, None, 1)


def test_minutes_are_shared_out_among_the_trainings_that_run() -> None:
    assert budget_shares(PARTS, tuned=True) == {"decoder": 0.25, "tuning": 0.25, "encoder": 0.5}
    assert budget_shares(PARTS, tuned=False) == {"decoder": 0.5, "encoder": 0.5}
    assert budget_shares(["decoder"], tuned=True) == {"decoder": 0.5, "tuning": 0.5}
    assert budget_shares(["encoder"], tuned=True) == {"encoder": 1.0}
