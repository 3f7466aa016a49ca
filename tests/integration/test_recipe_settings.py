"""Settings of the recipe: what is drawn at which step, and what the saved model starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from leafseg.config import Settings, override_settings
from leafseg.data.manifest import load_manifest
from leafseg.data.transforms import augment_grid, flips_alone, unpack_augmentation
from leafseg.errors import ConfigError
from leafseg.model.autoencoder import encode_pictures
from leafseg.pipeline import LeafPipeline
from leafseg.predict import load_segmenter
from leafseg.training.leaf_task import LeafTask, alignment_weight_at
from leafseg.training.tracking import read_metrics
from leafseg.training.trainer import TrainingResult

Train = Callable[..., TrainingResult]


def drawn(task: LeafTask, step: int, count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = task.settings.training.batch_size
    return task._draw({"position": torch.arange(step * size, step * size + count)}, torch.Size((4, 2, 2)), 3)


@pytest.fixture
def make_task(tiny_settings: Settings, data: Path) -> Callable[..., LeafTask]:
    def make(*overrides: str) -> LeafTask:
        settings = override_settings(tiny_settings, overrides)
        return LeafTask(settings, load_manifest(data, settings=settings.data))

    return make


def test_terminal_samples_from_zeros_leave_the_noise_of_the_others(make_task: Callable[..., LeafTask]) -> None:
    half = ("objective.terminal_fraction=0.5",)
    noise, timesteps, terminal = drawn(make_task(*half), 0)
    still, same_timesteps, same_terminal = drawn(make_task(*half, "objective.terminal_noise=zeros"), 0)
    assert 0 < terminal.sum() < len(terminal)
    assert torch.equal(terminal, same_terminal)
    assert torch.equal(timesteps, same_timesteps)
    assert not still[terminal].any()
    assert torch.equal(still[~terminal], noise[~terminal])


def test_the_first_steps_may_be_uniform(make_task: Callable[..., LeafTask]) -> None:
    task = make_task("objective.terminal_fraction=1", "objective.uniform_steps=3")
    assert not drawn(task, 2)[2].any()
    assert drawn(task, 3)[2].all()


def test_a_power_above_one_prefers_late_timesteps(make_task: Callable[..., LeafTask]) -> None:
    # u ** (1 / 3) has the mean 3 / 4, u the mean 1 / 2; the standard error of 4,000 draws is below 0.005 of T.
    for power, mean in ((1, 0.5), (3, 0.75)):
        timesteps = drawn(make_task(f"objective.timestep_power={power}"), 0, count=4000)[1]
        assert timesteps.float().mean().item() / 1000 == pytest.approx(mean, abs=0.02)
        assert 0 <= timesteps.min() <= timesteps.max() <= 999


def test_a_model_starts_from_what_it_was_trained_to_start_from(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    train_tiny(data, tmp_path, "training.steps=1", "objective.terminal_fraction=1", "objective.terminal_noise=zeros")
    pipeline = LeafPipeline.from_pretrained(tmp_path)
    image = torch.rand(1, 3, 40, 36, generator=torch.Generator().manual_seed(0))
    own = pipeline(image).probability
    assert torch.equal(own, pipeline(image, noise="zeros").probability)
    assert torch.equal(own, pipeline(image, generator=torch.Generator().manual_seed(5)).probability)
    assert not torch.equal(own, pipeline(image, noise="gaussian").probability)
    with pytest.raises(ConfigError, match=r"--samples is 3.*starts from zeros.*--noise gaussian"):
        load_segmenter(str(tmp_path), num_samples=3)
    assert load_segmenter(str(tmp_path), num_samples=3, noise="gaussian")


def test_the_alignment_fades_as_a_cosine_and_then_costs_nothing(
    make_task: Callable[..., LeafTask], train_tiny: Train, data: Path, teacher: Path, tmp_path: Path
) -> None:
    goal = make_task("objective.alignment_weight=2", "objective.alignment_steps=4").settings.objective
    assert [alignment_weight_at(goal, step) for step in (0, 2, 4, 9)] == pytest.approx([2, 1, 0, 0])
    assert alignment_weight_at(goal.model_copy(update={"alignment_steps": None}), 9) == 2
    assert alignment_weight_at(goal.model_copy(update={"alignment_steps": 0}), 0) == 0
    train_tiny(
        data,
        tmp_path,
        f"teacher.name={teacher}",
        "objective.alignment_weight=2",
        "objective.alignment_steps=1",
        "objective.alignment_similarity=relational",
        "training.validate_every=1",  # a line in the log for each step
    )
    logged = ["train/alignment" in line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert logged == [True, False, False, False]


def test_a_random_image_encoder_is_not_the_autoencoders(make_task: Callable[..., LeafTask]) -> None:
    def same(task: LeafTask) -> bool:
        mine, theirs = task.parts.image_encoder.encoder, task.parts.autoencoder.encoder
        return torch.equal(mine.conv_in.weight, theirs.conv_in.weight)

    assert same(make_task())
    assert not same(make_task("model.image_encoder_start=random"))


def test_with_zero_terminal_snr_nothing_of_the_mask_is_left_at_the_end(make_task: Callable[..., LeafTask]) -> None:
    assert make_task().parts.scheduler.alphas_cumprod[-1] > 1e-4
    assert make_task("scheduler.zero_terminal_snr=true").parts.scheduler.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.latent_weight=0"], "nothing would be learned"),
        (["objective.boundary_weight=1"], r"raise objective\.pixel_weight"),
        (["objective.terminal_noise=zeros"], "training never saw"),
        (["objective.prediction_type=epsilon", "scheduler.zero_terminal_snr=true"], "says nothing of the mask"),
        (["model.kind=unet", "training.gradient_checkpointing=true"], "which the U-Net baseline cannot"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tiny_settings: Settings, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        override_settings(tiny_settings, overrides)


def test_a_trained_mask_decoder_moves_alone_and_is_saved_and_resumed(
    train_tiny: Train, data: Path, tmp_path: Path
) -> None:
    trained = ("model.mask_decoder=trained", "objective.pixel_weight=1", "training.learning_rate=1e-3")
    train_tiny(data, tmp_path / "frozen", "training.steps=3", "objective.pixel_weight=1")
    train_tiny(data, tmp_path / "whole", "training.steps=3", *trained)
    # It stops right after a validation and a save, which must not freeze what they looked at.
    first = train_tiny(data, tmp_path / "cut", "training.steps=3", *trained, stop_after=2)
    assert first.status == "stopped"
    train_tiny(data, tmp_path / "cut", "training.steps=3", *trained, resume=True)
    frozen, whole, cut = (
        LeafPipeline.from_pretrained(tmp_path / name).vae.state_dict() for name in ("frozen", "whole", "cut")
    )
    for name, weight in frozen.items():
        in_decoder = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(weight, whole[name]) != in_decoder, name
        assert torch.equal(cut[name], whole[name]), name


def test_looking_at_a_model_freezes_nothing_of_it(make_task: Callable[..., LeafTask], tmp_path: Path) -> None:
    task = make_task("model.mask_decoder=trained", "objective.pixel_weight=1")
    learning = [name for name, weight in task.module.named_parameters() if weight.requires_grad]
    task.prepare(torch.device("cpu"), nullcontext, tmp_path)
    task.segmenter()
    task.save_inference(tmp_path / "model")
    assert any(name.startswith("mask_decoder.") for name in learning)
    assert [name for name, weight in task.module.named_parameters() if weight.requires_grad] == learning
    loaded = LeafPipeline.from_pretrained(tmp_path / "model")
    assert not any(weight.requires_grad for weight in loaded.vae.parameters())


@pytest.mark.parametrize("code", ["planes", "bits"])
def test_soft_labels_of_two_classes_go_with_a_code_of_classes(
    code: str, make_task: Callable[..., LeafTask], tmp_path: Path
) -> None:
    losses = {}
    for soft in ("true", "false"):
        task = make_task(f"data.soft_labels={soft}", f"model.mask_code={code}", "objective.pixel_weight=1")
        task.prepare(torch.device("cpu"), nullcontext, tmp_path)
        samples = [task.dataset[i, i] for i in range(2)]
        batch = {name: torch.as_tensor(np.array([s[name] for s in samples])) for name in samples[0]}
        losses[soft] = task.loss(task.module, batch, 0)["pixel"].item()
    assert losses["true"] == pytest.approx(losses["false"], rel=0.2)  # the same masks, with softer outlines


def test_a_decoder_that_nothing_teaches_is_refused(tiny_settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"model\.mask_decoder is trained and objective\.pixel_weight 0"):
        override_settings(tiny_settings, ["model.mask_decoder=trained", "objective.pixel_weight=0"])


def test_masks_that_only_flip_are_encoded_once_and_nothing_else_changes(
    make_task: Callable[..., LeafTask], train_tiny: Train, data: Path, tmp_path: Path
) -> None:
    flips = ("training.steps=4", "data.augmentation.horizontal_flip=true", "data.augmentation.vertical_flip=true")
    train_tiny(data, tmp_path / "kept", *flips)
    train_tiny(data, tmp_path / "anew", *flips, "training.latent_cache_mb=0")
    train_tiny(data, tmp_path / "cut", *flips, stop_after=3)
    train_tiny(data, tmp_path / "cut", *flips, resume=True)
    kept, anew, cut = (LeafPipeline.from_pretrained(tmp_path / n).unet.state_dict() for n in ("kept", "anew", "cut"))
    assert all(torch.equal(kept[name], anew[name]) and torch.equal(kept[name], cut[name]) for name in kept)

    task = make_task("data.augmentation.vertical_flip=true")
    for changed, kept in (("", 4), ("rotation_degrees=10", 0), ("mix=0.5", 4)):
        if changed:
            task = make_task(f"data.augmentation.{changed}")
        task.prepare(torch.device("cpu"), nullcontext, tmp_path)
        for position in (0, 100):
            samples = [task.dataset[position + i, i % 2] for i in range(8)]
            batch = {name: torch.as_tensor(np.array([s[name] for s in samples])) for name in samples[0]}
            task.loss(task.module, batch, 0)
        assert 2 * (kept > 0) <= len(task._latents) <= 2 * kept  # two samples, up to four flips each


@pytest.mark.parametrize("chosen", [("probability=0.4", "rotation_degrees=20"), ("mix=0.5",)])
def test_moved_masks_among_kept_ones_aim_at_their_own_latents(
    chosen: tuple[str, ...], make_task: Callable[..., LeafTask], tmp_path: Path
) -> None:
    task = make_task("data.augmentation.vertical_flip=true", *(f"data.augmentation.{setting}" for setting in chosen))
    task.prepare(torch.device("cpu"), nullcontext, tmp_path)
    for position in (0, 100, 0):  # the last time with latents kept
        samples = [task.dataset[position + i, i % 2] for i in range(8)]
        batch = {name: torch.as_tensor(np.array([s[name] for s in samples])) for name in samples[0]}
        with torch.no_grad():
            anew = encode_pictures(task.parts.autoencoder, task.parts.mask_code.encode(batch["labels"]))
        torch.testing.assert_close(task._mask_latent(batch["labels"], batch), anew)
    moves = [flips_alone(unpack_augmentation(vector)) is None for vector in batch["augmentation"]]
    pastes = [any(box) for box in batch.get("mix_box", torch.zeros(8, 4)).tolist()]
    assert 0 < sum(moves) + sum(pastes) < 8
    assert 0 < len(task._latents) <= 8


def test_a_smaller_training_set_is_part_of_a_larger_one_and_validation_stays(
    make_task: Callable[..., LeafTask], train_tiny: Train, data: Path, tmp_path: Path
) -> None:
    sets = [
        {sample.sha256 for sample in make_task(f"data.train_samples={count}").dataset.manifest.samples}
        for count in (1, 2, 3, 1000)
    ]
    whole = {sample.sha256 for sample in make_task().dataset.manifest.samples}
    assert [len(chosen) for chosen in sets] == [1, 2, 3, len(whole)]
    assert sets[0] < sets[1] < sets[2] <= sets[3] == whole
    train_tiny(data, tmp_path, "training.steps=1", "data.train_samples=2")
    record = json.loads((tmp_path / "run.json").read_text())["record"]
    assert record["samples"]["train"] == 2
    assert record["samples"]["validation"] > 0


@pytest.mark.parametrize("kind", ["leaf", "unet"])
def test_soft_labels_train_and_change_what_is_learned(
    kind: str, train_tiny: Train, data: Path, tmp_path: Path, make_task: Callable[..., LeafTask]
) -> None:
    chosen = ("training.steps=2", f"model.kind={kind}", "objective.pixel_weight=1")
    hard = train_tiny(data, tmp_path / "hard", *chosen)
    soft = train_tiny(data, tmp_path / "soft", *chosen, "data.soft_labels=true")
    assert hard.status == soft.status == "finished"
    losses = [read_metrics(tmp_path / name)[0]["train/loss"] for name in ("hard", "soft")]
    assert losses[0] != losses[1]


def test_cached_features_of_a_mixed_sample_are_those_of_both_images(
    make_task: Callable[..., LeafTask], teacher: Path, tmp_path: Path
) -> None:
    task = make_task(
        f"teacher.name={teacher}", "objective.alignment_weight=0.5", "teacher.features=cached",
        "data.augmentation.mix=0.7", "data.augmentation.vertical_flip=true",
    )  # fmt: skip
    task.prepare(torch.device("cpu"), nullcontext, tmp_path)
    samples = [task.dataset[i, i % 2] for i in range(8)]
    batch = {name: torch.as_tensor(np.array([s[name] for s in samples])) for name in samples[0]}
    tokens = task._teacher_tokens(batch)
    gh, gw = task._grid
    height, width = task.settings.data.preprocessing.size
    seen = set()
    for row, sample in zip(tokens, samples, strict=True):
        own, lent = (
            augment_grid(
                task._cache.get(task._feature_key(index)).T.reshape(-1, gh, gw), unpack_augmentation(change)
            ).flatten(1).T
            for index, change in (
                (sample["index"], sample["augmentation"]), (sample["mix_index"], sample["mix_augmentation"])
            )
        )  # fmt: skip
        top, left, bottom, right = sample["mix_box"].tolist()
        for cell in range(gh * gw):
            y, x = (cell // gw + 0.5) * height / gh, (cell % gw + 0.5) * width / gw
            pasted = top <= y < bottom and left <= x < right
            seen.add(pasted)
            assert torch.equal(row[cell], (lent if pasted else own)[cell])
    assert seen == {True, False}
