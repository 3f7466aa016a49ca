"""Settings: presets, files, overrides, and what is said about a wrong one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from leafseg.config import (
    Settings,
    load_autoencoder_settings,
    load_settings,
    override_settings,
    overrides_of,
    parse_settings,
    preset_names,
)
from leafseg.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (REPOSITORY / "configs").rglob("*.y*ml")) if (REPOSITORY / "configs").is_dir() else []


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_and_survives_json(name: str) -> None:
    settings = load_settings(name)
    assert settings.preset == name
    assert parse_settings(json.loads(settings.model_dump_json()), source="test") == settings
    assert (settings.training.steps is None) != (settings.training.minutes is None)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_recipe_parses_and_opens_with_its_command(file: Path) -> None:
    assert file.read_text().startswith("#")
    assert "leafseg " in file.read_text().split("\n\n")[0]
    assert isinstance(load_settings(_preset_of(file), file=file), Settings)


def _preset_of(file: Path) -> str:
    """The preset that the recipe's own command names."""
    words = file.read_text().split()
    return next((words[i + 1] for i, word in enumerate(words) if word == "--preset"), "leaf-tiny")


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"known are leaf-base.*did you mean 'leaf-tiny'"):
        load_settings("leaf-tinny")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("training.sed=3", "training.seed"),
        ("trainin.seed=3", "training"),
        ("modle.unet.dropout=0", "model"),
        ("seed=3", "training.seed"),
        ("unet.dropout=0", "model.unet"),
        ("objective.alignment_wieght=1", "objective.alignment_weight"),
        ("data.preprocessing.sizes=[64,64]", "data.preprocessing.size"),
        ("model.unet.dropuot=0", "model.unet.dropout"),
        ("model.autoencoder.latent_chanels=4", "model.autoencoder.latent_channels"),
    ],
)
def test_an_unknown_setting_suggests_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings("leaf-tiny", overrides=[wrong])
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(f"; did you mean {nearest!r}?")


def test_an_unknown_setting_in_a_file_names_the_file_and_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "model:\n  unet:\n    drop_out: 0.1\ntraining:\n  learning_rat: 1.0e-4\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(file=file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "unknown setting 'model.unet.drop_out'; did you mean 'model.unet.dropout'?" in message
    assert "unknown setting 'training.learning_rat'; did you mean 'training.learning_rate'?" in message
    assert "\n" not in message


def test_a_file_changes_the_preset_and_an_override_changes_both(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "training: {seed: 5, batch_size: 2}\n")
    settings = load_settings("leaf-tiny", file=file, overrides=["training.seed=7"])
    assert (settings.training.seed, settings.training.batch_size) == (7, 2)
    assert settings.training.ema_decay == load_settings("leaf-tiny").training.ema_decay


def test_a_list_replaces_the_presets_list_as_a_whole() -> None:
    settings = load_settings("leaf-tiny", overrides=["data.augmentation.scale=[0.5,2]"])
    assert settings.data.augmentation.scale == (0.5, 2.0)


def test_an_override_keeps_everything_else(tiny_settings: Settings) -> None:
    changed = override_settings(tiny_settings, ["training.seed=99"])
    assert changed.training.seed == 99
    assert changed.model_copy(update={"training": tiny_settings.training}) == tiny_settings


def test_settings_cannot_be_changed_in_place(tiny_settings: Settings) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny_settings.training.seed = 4  # type: ignore[misc]


# --- rules between fields ---------------------------------------------------------------------------------------------


def test_noise_prediction_with_terminal_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match="pure noise holds no mask") as caught:
        load_settings("leaf-tiny", overrides=["objective.prediction_type=epsilon"])
    assert "terminal_fraction" in str(caught.value)
    settings = load_settings(
        "leaf-reference", overrides=["objective.prediction_type=epsilon"]
    )  # has no terminal samples
    assert settings.objective.prediction_type == "epsilon"


def test_all_contradictions_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings("leaf-tiny", overrides=["objective.prediction_type=epsilon", "objective.alignment_tap=4"])
    for name in ("terminal_fraction is 1", "pixel_weight is 1", "alignment_tap is 4"):
        assert f"objective.{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("preset", "stride", "size"), [("leaf-base", 128, 192), ("leaf-tiny", 32, 240)])
def test_a_size_that_the_u_net_cannot_halve_is_refused_with_the_stride(preset: str, stride: int, size: int) -> None:
    # Eight pixels a latent, times two for each but one of the U-Net's levels.
    assert load_settings(preset).model.stride == stride
    with pytest.raises(ConfigError, match=rf"multiples of {stride}\b"):
        load_settings(preset, overrides=[f"data.preprocessing.size=[{size},{stride}]"])
    settings = load_settings(preset, overrides=[f"data.preprocessing.size=[{3 * stride},{stride}]"])
    assert settings.data.preprocessing.size == (3 * stride, stride)
    assert settings.data.preprocessing.stride == stride


@pytest.mark.parametrize("size", ["[0,128]", "[-128,128]", "[128]", "128"])
def test_a_size_that_is_no_pair_of_positive_sides_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.preprocessing"):
        load_settings(overrides=[f"data.preprocessing.size={size}"])


def test_the_stride_follows_from_the_model_whatever_is_said_about_it() -> None:
    settings = load_settings("leaf-tiny", overrides=["data.preprocessing.stride=1"])
    assert settings.data.preprocessing.stride == 32


def test_one_budget_replaces_the_presets_other() -> None:
    steps = load_settings("leaf-tiny", overrides=["training.steps=7"]).training
    assert (steps.steps, steps.minutes) == (7, None)
    minutes = load_settings("leaf-base", overrides=["training.minutes=0.5"]).training
    assert (minutes.steps, minutes.minutes) == (None, 0.5)
    again = override_settings(load_settings("leaf-tiny"), ["training.steps=9"]).training
    assert (again.steps, again.minutes) == (9, None)


def test_a_files_budget_is_replaced_by_an_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "training: {minutes: 3}\n")
    training = load_settings("leaf-tiny", file=file, overrides=["training.steps=4"]).training
    assert (training.steps, training.minutes) == (4, None)


@pytest.mark.parametrize("preset", preset_names())
def test_both_budgets_together_are_refused(preset: str) -> None:
    with pytest.raises(ConfigError, match="steps and minutes are both set"):
        load_settings(preset, overrides=["training.steps=7", "training.minutes=1"])


@pytest.mark.parametrize(
    "override",
    ["training.learning_rate=0", "training.steps=0", "model.unet.dropout=1", "objective.prediction_type=x0",
     "training.seed=abc", "objective.terminal_fraction=1.5", "model.mask_code=[1]"],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]) as caught:
        load_settings("leaf-base", overrides=[override])
    assert "\n" not in str(caught.value)


# --- files and overrides that cannot be read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: [unclosed", "not a readable YAML file"),
        ("- a\n- b\n", "settings are a mapping"),
        ("a: ${missing}\n", "not a readable YAML file"),
        ("training: 3\n", "training"),
        ("data: 3\n", "data"),
        ("data:\n", "data"),
        ("model: 3\n", "model"),
        ("model:\n  unet: 7\n", "model.unet"),
        ("data:\n  preprocessing: 7\n", "data.preprocessing"),
        ("training:\n", "training"),
    ],
)
def test_a_file_that_holds_no_settings_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings("leaf-tiny", file=file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings("leaf-tiny", file=write(tmp_path / "e.yaml", "# nothing\n")) == load_settings("leaf-tiny")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such settings file"):
        load_settings(file=tmp_path / "none.yaml")


def test_a_file_written_for_another_preset_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.yaml", "preset: leaf-tiny\n")
    assert load_settings("leaf-tiny", file=file) == load_settings("leaf-tiny")
    with pytest.raises(ConfigError, match="preset"):
        load_settings("leaf-base", file=file)


@pytest.mark.parametrize("override", ["training.seed", "=3", "training.seed=[1"])
def test_an_override_that_cannot_be_read_is_one_sentence(override: str) -> None:
    with pytest.raises(ConfigError, match="override") as caught:
        load_settings(overrides=[override])
    assert "\n" not in str(caught.value)


def test_the_autoencoders_settings_take_overrides_and_refuse_unknown_names() -> None:
    assert load_autoencoder_settings(overrides=["training.steps=3", "crop=64"]).crop == 64
    assert load_autoencoder_settings(overrides=["training.minutes=3"]).training.steps is None
    with pytest.raises(ConfigError, match="did you mean 'kl_weight'"):
        load_autoencoder_settings(overrides=["kl_wieght=1"])


def test_every_difference_of_the_reference_preset_is_a_documented_setting() -> None:
    def flat(values: dict, prefix: str = "") -> dict:
        if not isinstance(values, dict):
            return {prefix.removesuffix("."): values}
        return {k: v for name, value in values.items() for k, v in flat(value, f"{prefix}{name}.").items()}

    base, reference = (flat(load_settings(name).model_dump(mode="json")) for name in ("leaf-base", "leaf-reference"))
    differing = {name for name in base if base[name] != reference[name]} - {"preset"}
    page = (REPOSITORY / "docs" / "reference-preset.md").read_text()
    named = set(re.findall(r"^\| ([^|]+) \|", page, flags=re.MULTILINE))
    documented = {name for cell in named for name in re.findall(r"`([a-z_.]+)`", cell)}
    assert documented == differing
    released = {
        "scheduler.beta_start": 0.0015,
        "scheduler.beta_end": 0.0155,
        "scheduler.beta_schedule": "linear",
        "scheduler.clip_sample": True,
        "objective.alignment_weight": 0.75,
        "objective.alignment_reduction": "mean_over_batch",
        "training.selection_part": "test",
        "training.ema_parts": "unet",
    }
    assert {name: reference[name] for name in released} == released


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.minutes=3", "data.modality=xray", "data.augmentation.horizontal_flip=true"],
        ["training.steps=7", 'data.label_names={1: "on", 2: left lung}', "teacher.name=none"],
        [
            "data.preprocessing.window=[40,400]",
            "data.preprocessing.intensity=window",
            "data.preprocessing.size=[128,256]",
        ],
    ],
)
def test_settings_follow_from_their_preset_and_what_they_change(preset: str, overrides: list[str]) -> None:
    settings = load_settings(preset, overrides=overrides)
    told = overrides_of(settings)
    assert load_settings(preset, overrides=told) == settings
    assert len(told) <= 4  # no more than was changed; minutes give way to steps
