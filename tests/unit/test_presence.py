"""Labels that are nowhere sure: when they are left out, how the thresholds are chosen, and who obeys them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leafseg.config import Settings, load_settings, override_settings
from leafseg.ensemble import EnsembleSegmenter, FlippedSegmenter
from leafseg.errors import CheckpointError, ConfigError
from leafseg.evaluation.evaluate import input_grid_pipeline
from leafseg.fast_mode import Arrangement, load_folded
from leafseg.model.build import build_components
from leafseg.model_folder import slim_model
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter, labelled
from leafseg.presence import tuned_presence, without_absent

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)


def row(peak: float, *, empty: bool = False, dice: float = 0.8, label: str = "lesion") -> dict[str, Any]:
    found = {"label": label, "peak": peak, "empty": empty, "predicted_pixels": int(peak > 0.5)}
    return {**found, "dice": None if empty else dice if peak > 0.5 else 0.0}


# --- dropping ---------------------------------------------------------------------------------------------------------


def test_a_label_below_its_threshold_in_the_whole_image_is_dropped_and_others_stay() -> None:
    probability = np.zeros((2, 3, 4, 4), np.float32)
    probability[:, 0] = 0.2  # the background has no threshold
    probability[0, 1, 1, 1], probability[1, 1, 2, 2] = 0.75, 0.25
    probability[:, 2, 0, 0] = 0.75
    before = probability.copy()
    drawn = without_absent(probability, (0.5, 0.75))
    assert np.array_equal(probability, before)
    assert np.array_equal(drawn[0], before[0]), "a highest probability at the threshold is enough"
    assert not drawn[1, 1:, 2, 2].any()
    untouched = np.ones((4, 4), bool)
    untouched[2, 2] = False
    assert np.array_equal(drawn[1][:, untouched], before[1][:, untouched])


@pytest.mark.parametrize("presence", [(), (0.0,), (0.5,)])
def test_where_nothing_is_absent_the_array_itself_comes_back(presence: tuple[float, ...]) -> None:
    probability = np.full((1, 4, 4), 0.6, np.float32)
    assert without_absent(probability, presence) is probability


def test_labels_and_masks_follow_and_the_probability_stays() -> None:
    binary = np.full((1, 2, 2), 0.7, np.float32)
    for presence, drawn in (((), True), ((0.7,), True), ((0.75,), False)):
        result = labelled(binary, overlapping=False, presence=presence)
        assert (result.labels == int(drawn)).all()
        assert (result.mask == drawn).all()
        assert result.probability is binary
    several = np.stack([np.full((2, 2), p, np.float32) for p in (0.1, 0.6, 0.3)])
    several[:, 0, 0] = (0.1, 0.2, 0.7)
    result = labelled(several, overlapping=False, presence=(0.65, 0.2))
    assert result.labels.tolist() == [[2, 0], [0, 0]], "what is left out is background, not the next likely class"
    assert np.array_equal(result.mask[0], result.labels == 0)
    assert labelled(several, overlapping=False, presence=(0.6, 0.75)).labels.tolist() == [[0, 1], [1, 1]]
    several[:, 0, 0] = (0.1, 0.6, 0.3)
    overlapping = labelled(several[1:], overlapping=True, presence=(0.65, 0.0))
    assert overlapping.labels is None
    assert not overlapping.mask.any()
    assert labelled(several[1:], overlapping=True, presence=(0.55, 0.0)).mask[0].all()


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_a_threshold_between_hedged_guesses_and_real_objects_is_found() -> None:
    rows = [row(peak, empty=True) for peak in (0.3, 0.62, 0.62, 0.63, 0.64)] + [row(p) for p in (0.97, 0.99, 0.9)]
    assert tuned_presence(rows) == (0.65,)


def test_it_is_the_least_that_is_less_than_one_image_short_of_the_best() -> None:
    rows = [row(peak, empty=True) for peak in (0.52, 0.57, 0.62, 0.72)] + [row(0.95)] * 3
    assert tuned_presence(rows) == (0.75,)
    assert tuned_presence([*rows, row(0.7, dice=0.1)]) == (0.65,)  # 0.75 would win 0.9 more


def test_objects_below_it_cost_their_dice() -> None:
    rows = [row(0.72, empty=True)] * 4 + [row(0.6, dice=0.9), row(0.99), row(0.98)]
    assert tuned_presence(rows) == (0.75,)
    assert tuned_presence([*rows, row(0.6, dice=0.9), row(0.65, dice=0.9)]) == (0.75,)  # 4 won, 2.7 lost
    assert tuned_presence([*rows, *[row(0.6, dice=0.9)] * 3]) == ()  # 4 won, 3.6 lost: less than one image


def test_with_few_images_of_either_kind_there_is_none() -> None:
    empty, present = [row(0.6, empty=True)] * 9, [row(0.9)] * 9
    for few in range(3):
        assert tuned_presence([*empty[:few], *present]) == ()
        assert tuned_presence([*empty, *present[:few]]) == ()
    assert tuned_presence([*empty[:3], *present[:3]]) == (0.65,)
    assert tuned_presence([*[row(0.3, empty=True)] * 3, *present]) == ()  # nothing was drawn by mistake
    assert tuned_presence([]) == ()


def test_each_label_has_its_own() -> None:
    rows = 3 * [row(0.6, empty=True), row(0.9), row(0.8, label="cyst"), row(0.9, label="cyst")]
    assert tuned_presence(rows) == (0.65, 0.0)


@given(
    st.lists(
        st.tuples(st.floats(0, 1, width=32), st.booleans(), st.floats(0, 1)).map(
            lambda drawn: row(drawn[0], empty=drawn[1], dice=drawn[2])
        ),
        max_size=12,
    )
)
def test_the_score_never_falls(rows: list[dict[str, Any]]) -> None:
    presence = tuned_presence(rows)

    def score(threshold: float) -> float:
        values = []
        for one in rows:
            if np.float32(one["peak"]) < np.float32(threshold):
                values.append(float(one["empty"]))
            else:
                values.append(float(one["predicted_pixels"] == 0) if one["empty"] else one["dice"])
        return float(sum(values))

    assert not presence or score(presence[0]) > score(0.0)


# --- obeying ----------------------------------------------------------------------------------------------------------


def thresholds_around(pipeline: LeafPipeline) -> tuple[float, float]:
    """One just below and one just above the highest probability that the pipeline gives the image."""
    peak = float(pipeline(IMAGE).probability.max())
    assert 0.5 < peak < 0.99
    return peak - 0.005, peak + 0.005


def test_a_model_keeps_its_thresholds_and_every_way_to_use_it_obeys(
    tiny_pipeline: LeafPipeline, tmp_path: Path
) -> None:
    below, above = thresholds_around(tiny_pipeline)
    expected = tiny_pipeline(IMAGE)
    assert expected.mask.any()
    for threshold, kept in ((below, True), (above, False)):
        folder = tmp_path / f"{kept}"
        parts = {name: getattr(tiny_pipeline, name) for name in ("unet", "vae", "image_encoder", "scheduler")}
        settings = {name: tiny_pipeline.config[name] for name in ("preprocessing", "mask_code")}
        LeafPipeline(**parts, **settings, presence=[threshold]).save_pretrained(folder)
        loaded = LeafPipeline.from_pretrained(folder)
        assert loaded.presence == (threshold,)
        for made in (loaded, load_folded(str(folder), Arrangement())):
            output = made(IMAGE)
            assert torch.allclose(output.probability, expected.probability, atol=1e-4)
            assert bool(output.mask.any()) is bool(output.labels.any()) is kept
        segmenter = PipelineSegmenter(loaded)
        for user in (segmenter, FlippedSegmenter(segmenter, "horizontal"), EnsembleSegmenter([segmenter])):
            assert user.presence == (threshold,)
        (single,), (alone,) = segmenter.segment([IMAGE]), EnsembleSegmenter([segmenter]).segment([IMAGE])
        assert bool(single.mask.any()) is bool(alone.mask.any()) is kept
        flipped = FlippedSegmenter(segmenter, "horizontal").segment([IMAGE])[0]
        assert bool(flipped.mask.any()) is bool(flipped.probability.max() >= threshold)
        segmenter.presence = ()
        assert segmenter.segment([IMAGE])[0].mask.any()


def test_the_folder_of_a_model_without_thresholds_is_what_it_was(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "plain")
    index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
    assert index["format_version"] == 1
    assert "presence" not in index
    index.update(presence=[0.75], format_version=3)
    (tmp_path / "plain" / "model_index.json").write_text(json.dumps(index))
    assert LeafPipeline.from_pretrained(tmp_path / "plain").presence == (0.75,)


@pytest.mark.parametrize("presence", [[0.5, 0.5], [1.5], [-0.1]])
def test_thresholds_that_fit_no_label_are_refused(
    tiny_pipeline: LeafPipeline, tmp_path: Path, presence: list[float]
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "presence": presence, "format_version": 3}))
    with pytest.raises(CheckpointError, match=r"1 numbers in 0\.\.1, one a label"):
        LeafPipeline.from_pretrained(tmp_path / "model")


def test_several_classes_have_a_threshold_each_but_the_background(tiny_settings: Settings) -> None:
    parts = build_components(tiny_settings, label_names=("background", "a", "b"))
    modules = {"unet": parts.unet, "vae": parts.autoencoder, "image_encoder": parts.image_encoder}
    for module in modules.values():
        module.eval()
    code = {"name": "planes", "label_names": ["background", "a", "b"]}
    preprocessing = tiny_settings.data.preprocessing.model_dump(mode="json")

    def make(presence: list[float]) -> LeafPipeline:
        return LeafPipeline(
            **modules, scheduler=parts.scheduler, preprocessing=preprocessing, mask_code=code, presence=presence
        )

    plain = make([0.0, 0.0])(IMAGE)
    output = make([0.0, 1.0])(IMAGE)
    assert torch.equal(plain.probability, output.probability)
    assert (plain.labels == 2).any()
    assert torch.equal(output.labels, plain.labels.where(plain.labels != 2, 0))
    with pytest.raises(ConfigError, match="2 numbers"):
        make([0.5])


def test_thresholds_that_are_set_are_checked_and_saved(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 numbers"):
        tiny_pipeline.presence = (0.6, 0.7)
    tiny_pipeline.presence = (0.6,)
    tiny_pipeline.save_pretrained(tmp_path / "set")
    assert LeafPipeline.from_pretrained(tmp_path / "set").presence == (0.6,)
    assert input_grid_pipeline(tiny_pipeline).presence == (0.6,)
    slim_model(str(tmp_path / "set"), tmp_path / "slim")
    assert LeafPipeline.from_pretrained(tmp_path / "slim").presence == (0.6,)
    tiny_pipeline.presence = ()
    tiny_pipeline.save_pretrained(tmp_path / "none")
    assert json.loads((tmp_path / "none" / "model_index.json").read_text())["format_version"] == 1


def test_an_ensemble_means_the_thresholds_of_its_models(tiny_pipeline: LeafPipeline) -> None:
    config = {name: tiny_pipeline.config[name] for name in ("preprocessing", "mask_code")}
    segmenters = [
        PipelineSegmenter(LeafPipeline(**tiny_pipeline.components, **config, presence=presence))
        for presence in ([0.6], None, [0.9])
    ]
    assert EnsembleSegmenter(segmenters).presence == pytest.approx((0.5,))
    assert EnsembleSegmenter(segmenters[1:2]).presence == ()


def test_nothing_is_left_out_unless_it_is_asked_for() -> None:
    assert {load_settings(name).inference.presence for name in ("leaf-tiny", "leaf-base")} == {"none"}
    assert load_settings("leaf-reference").inference.presence == "none"
    assert override_settings(load_settings("leaf-tiny"), ["inference.presence=tuned"]).inference.presence == "tuned"
