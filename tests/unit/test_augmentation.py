"""What may happen to a training image of each modality, and how colours turn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leafseg import rng
from leafseg.config import (
    AugmentationSettings,
    Modality,
    load_settings,
    override_settings,
    parse_settings,
    preset_names,
)
from leafseg.data.transforms import AUGMENTATION_KINDS, Augmentation, augment, draw_augmentation
from leafseg.errors import ConfigError

MODALITIES = get_args(Modality)
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


@pytest.mark.parametrize("preset", preset_names())
def test_generic_leaves_every_preset_as_it_is(preset: str) -> None:
    assert load_settings(preset, overrides=["data.modality=generic"]) == load_settings(preset)


@pytest.mark.parametrize("modality", MODALITIES)
def test_only_images_without_an_up_are_flipped_upside_down_by_default(modality: str) -> None:
    augmentation = load_settings("leaf-tiny", overrides=[f"data.modality={modality}"]).data.augmentation
    assert augmentation.vertical_flip is (modality in ("dermoscopy", "endoscopy", "microscopy"))
    assert (augmentation.rotation_degrees == 180) is augmentation.vertical_flip
    coloured = modality in ("dermoscopy", "endoscopy", "microscopy", "fundus")
    assert (augmentation.hue > 0) is (augmentation.saturation > 0) is coloured


@pytest.mark.parametrize("modality", [name for name in MODALITIES if name != "generic"])
def test_a_modality_states_the_same_changes_and_the_preset_of_how_many_samples(modality: str) -> None:
    chosen = [f"data.modality={modality}"]
    found = {name: load_settings(name, overrides=chosen).data.augmentation for name in preset_names()}
    assert len({augmentation.model_copy(update={"probability": 1.0}) for augmentation in found.values()}) == 1
    shares = {name: augmentation.probability for name, augmentation in found.items()}
    assert shares == {"leaf-base": 0.3, "leaf-tiny": 0.3, "leaf-reference": 1.0}


def test_explicit_settings_win_over_the_modality(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {modality: xray, augmentation: {horizontal_flip: true, gamma: 0.05}}\n")
    mine = load_settings("leaf-tiny", file=file, overrides=["data.augmentation.gamma=0.5"]).data.augmentation
    plain = load_settings("leaf-tiny", overrides=["data.modality=xray"]).data.augmentation
    assert (plain.horizontal_flip, mine.horizontal_flip) == (False, True)
    assert mine == plain.model_copy(update={"horizontal_flip": True, "gamma": 0.5})
    # The command line's modality replaces the file's.
    both = load_settings("leaf-tiny", file=file, overrides=["data.modality=microscopy"]).data
    assert (both.modality, both.augmentation.vertical_flip, both.augmentation.gamma) == ("microscopy", True, 0.05)


def test_a_modality_changes_settings_that_are_made_and_generic_brings_the_preset_back() -> None:
    tiny = load_settings("leaf-tiny")
    ct = override_settings(tiny, ["data.modality=ct"])
    assert ct.data == load_settings("leaf-tiny", overrides=["data.modality=ct"]).data
    assert override_settings(ct, ["data.modality=generic"]) == tiny
    kept = override_settings(ct, ["data.augmentation.gamma=0.5"])
    assert override_settings(kept, ["training.seed=3", "data.modality=ct"]).data.augmentation.gamma == 0.5


def test_a_stored_record_keeps_the_augmentation_that_it_states() -> None:
    stored = load_settings("leaf-tiny", overrides=["data.modality=ct", "data.augmentation.gamma=0.4"])
    assert parse_settings(stored.model_dump(mode="json"), source="test") == stored


def test_an_unknown_modality_is_one_sentence() -> None:
    for name in ("xrays", "[1]"):
        with pytest.raises(ConfigError, match=r"data\.modality") as caught:
            load_settings("leaf-tiny", overrides=[f"data.modality={name}"])
        assert "\n" not in str(caught.value)
    assert "'ultrasound'" in str(caught.value)


def test_what_was_drawn_before_colours_could_turn_is_still_drawn() -> None:
    chosen = AugmentationSettings(
        vertical_flip=True,
        rotation_degrees=20,
        scale=(0.5, 2),
        translation=0.1,
        brightness=0.2,
        contrast=0.3,
        gamma=0.4,
    )
    u = rng.generator(7, "augmentation", 3).random(9)
    drawn = draw_augmentation(chosen, rng.generator(7, "augmentation", 3))
    assert (drawn.flip_horizontal, drawn.flip_vertical) == (bool(u[0] < 0.5), bool(u[1] < 0.5))
    numbers = (drawn.angle, drawn.zoom, drawn.shift_y, drawn.shift_x, drawn.brightness, drawn.contrast, drawn.gamma)
    wanted = (
        *(20 * (2 * u[2] - 1), 0.5 + 1.5 * u[3], 0.1 * (2 * u[4] - 1), 0.1 * (2 * u[5] - 1)),
        *(0.2 * (2 * u[6] - 1), 1 + 0.3 * (2 * u[7] - 1), math.exp(0.4 * (2 * u[8] - 1))),
    )
    assert numbers == pytest.approx(wanted, rel=1e-6)
    assert (drawn.saturation, drawn.hue) == (1.0, 0.0)
    assert {AUGMENTATION_KINDS[name] for name in ("saturation", "hue")} == {"photometric"}


def changed(image: torch.Tensor, **change: float) -> torch.Tensor:
    result, labels = augment(image, torch.ones(image.shape[1:], dtype=torch.int64), Augmentation(**change))
    assert labels.all()
    return result


@given(st.integers(0, 1000), st.floats(-0.5, 0.5), st.floats(0, 1.2))
@settings(deadline=None, max_examples=30)
def test_turning_colours_keeps_luma_and_grey(seed: int, hue: float, saturation: float) -> None:
    # Colours near grey: nothing is cut off at 0 and 1.
    image = torch.from_numpy(np.random.default_rng(seed).uniform(0.45, 0.55, (3, 4, 5)).astype(np.float32))
    turned = changed(image, hue=hue, saturation=saturation)
    torch.testing.assert_close((turned * LUMA).sum(0), (image * LUMA).sum(0), atol=2e-6, rtol=0)
    grey = image[:1].expand(3, -1, -1).contiguous()
    torch.testing.assert_close(changed(grey, hue=hue, saturation=saturation), grey, atol=2e-6, rtol=0)
    back = changed(changed(image, hue=hue), hue=-hue)
    torch.testing.assert_close(back, image, atol=2e-6, rtol=0)


def test_without_saturation_a_picture_is_its_luma() -> None:
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 2, 2).contiguous()
    torch.testing.assert_close(changed(red, saturation=0.0), torch.full((3, 2, 2), 0.299), atol=1e-6, rtol=0)


def test_half_the_circle_turns_a_colour_into_its_complement() -> None:
    # What was above luma lies as far below it.
    reddish = torch.tensor([0.6, 0.5, 0.5])[:, None, None].expand(3, 1, 1).contiguous()
    luma = 0.299 * 0.6 + 0.701 * 0.5
    turned = changed(reddish, hue=0.5)
    torch.testing.assert_close(turned, 2 * luma - reddish, atol=1e-6, rtol=0)


def test_a_chance_leaves_moves_and_colours_out_each_by_itself_and_never_flips() -> None:
    always = AugmentationSettings(rotation_degrees=20, scale=(0.5, 2), elastic=0.02, brightness=0.2, hue=0.1)
    sometimes = always.model_copy(update={"probability": 0.3})
    moved, coloured, flipped = [], [], []
    for position in range(1000):
        full = draw_augmentation(always, rng.generator(7, "augmentation", position))
        drawn = draw_augmentation(sometimes, rng.generator(7, "augmentation", position))
        values = [
            {name: getattr(change, name) for name, own in AUGMENTATION_KINDS.items() if own == kind}
            for kind in ("geometric", "photometric")
            for change in (drawn, full, Augmentation())
        ]
        assert values[0] in values[1:3]
        assert values[3] in values[4:6]
        moved.append(values[0] == values[1])
        coloured.append(values[3] == values[4])
        flipped.append(drawn.flip_horizontal)
        assert drawn.flip_horizontal == full.flip_horizontal
    for happened, chance in ((moved, 0.3), (coloured, 0.3), (flipped, 0.5)):
        assert abs(sum(happened) - 1000 * chance) < 4 * math.sqrt(1000 * chance * (1 - chance))
    both = sum(a and b for a, b in zip(moved, coloured, strict=True))
    assert abs(both - 90) < 4 * math.sqrt(1000 * 0.09 * 0.91)
