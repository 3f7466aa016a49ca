"""What ``leafseg presets`` tells."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from leafseg.cli import app
from leafseg.config import parse_settings, preset_names
from leafseg.errors import ConfigError


def test_presets_as_json_hold_the_exact_integers_and_every_setting() -> None:
    result = CliRunner().invoke(app, ["presets", "--json"])
    assert result.exit_code == 0, result.output
    listed = json.loads(result.stdout)
    assert list(listed) == preset_names()
    base = listed["leaf-base"]
    assert base["size"] == [256, 256]
    assert base["stride"] == 128
    assert base["parameters"]["unet"] == 294_973_828
    assert base["parameters"]["image_encoder"] == 34_163_664
    assert base["parameters"]["autoencoder"] == 83_653_863
    assert base["parameters"]["inference"] == 378_627_691
    assert base["gflops"]["inference"] == pytest.approx(937, rel=1e-3)
    for name, values in listed.items():
        assert parse_settings(values["settings"], source=name).preset == name


def test_presets_as_text_hold_the_same_integers() -> None:
    result = CliRunner().invoke(app, ["presets"])
    assert result.exit_code == 0, result.output
    for figure in ("294973828", "34163664", "83653863", "272.7", "41.9", "622.2"):
        assert figure in result.stdout


def test_a_size_between_the_strides_is_refused() -> None:
    with pytest.raises(ConfigError, match="preset leaf-base takes multiples of 128"):
        CliRunner().invoke(app, ["presets", "--size", "192"], catch_exceptions=False)
