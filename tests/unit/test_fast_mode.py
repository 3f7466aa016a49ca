"""Fast mode: stored beside a model, used on request, and ignored where it does not belong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from leafseg.benchmark import Benchmark, Row, alternately, candidates, images_of, run_benchmark, synthetic_images
from leafseg.data.images import write_png
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.fast_mode import (
    Arrangement,
    fast_mode_file,
    load_folded,
    read_fast_mode,
    stored_tensors,
    write_fast_mode,
)
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.model.folded import FoldedConv
from leafseg.model_folder import save_model_folder
from leafseg.pipeline import LeafPipeline
from leafseg.predict import load_segmenter
from leafseg.runs import model_sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_pipeline: LeafPipeline, tmp_path: Path) -> Path:
    """A pipeline folder whose U-Net says something: its last layer is zero at first, and with it every prediction."""
    generator = torch.Generator().manual_seed(4)
    for parameter in tiny_pipeline.unet.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path / "model"
    save_model_folder(tiny_pipeline, folder)
    return folder


def _picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 40, 36, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_folded_pipeline_gives_the_plain_ones_probabilities(model: Path, steps: int) -> None:
    plain = LeafPipeline.from_pretrained(model)(_picture(), num_inference_steps=steps)
    folded = load_folded(str(model), Arrangement(), num_inference_steps=steps)
    fast = folded(_picture(), num_inference_steps=steps)
    torch.testing.assert_close(fast.probability, plain.probability, rtol=0, atol=1e-5)
    assert plain.probability.std() > 0.01  # something to agree on


def test_the_folded_pipeline_starts_from_what_the_model_starts_from(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "noise": "zeros"}))
    plain = LeafPipeline.from_pretrained(model)
    folded = load_folded(str(model), Arrangement())
    assert folded.config["noise"] == plain.config["noise"] == "zeros"
    torch.testing.assert_close(folded(_picture()).probability, plain(_picture()).probability, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_model_stored_in_half_precision_folds_as_it_loads(
    tiny_pipeline: LeafPipeline, tmp_path: Path, dtype: str
) -> None:
    save_model_folder(tiny_pipeline, tmp_path / "half", dtype=dtype)  # type: ignore[arg-type]
    plain = LeafPipeline.from_pretrained(tmp_path / "half")(_picture())
    fast = load_folded(str(tmp_path / "half"), Arrangement())(_picture())
    torch.testing.assert_close(fast.probability, plain.probability, rtol=0, atol=1e-5)


def test_stored_tensors_are_what_the_library_reads(model: Path) -> None:
    expected = load_file(model / "vae" / WEIGHTS)
    found = {name: tensor.clone() for name, tensor in stored_tensors(model / "vae")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {name for name, _ in stored_tensors(model / "vae", only=lambda name: name.startswith("decoder."))} == {
        name for name in expected if name.startswith("decoder.")
    }


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "missing", "shape"])
def test_a_damaged_model_is_one_sentence(model: Path, damage: str) -> None:
    path = model / "image_encoder" / WEIGHTS
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-8])
    elif damage == "header":
        path.write_bytes(b"\xff" * 8 + content[8:])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        weights = load_file(path)
        weights.pop("quant_conv.bias")
        if damage == "shape":
            weights["quant_conv.bias"] = torch.zeros(3)
        save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"image_encoder.*(damaged|missing|another shape)") as caught:
        load_folded(str(model), Arrangement())
    assert "\n" not in str(caught.value)


def test_a_stored_arrangement_is_read_back_and_used(model: Path) -> None:
    chosen = Arrangement(prepacked=False, channels_last=False)
    path = write_fast_mode(str(model), chosen, {"best": "mine"})
    assert path == model / "fast_mode.json"
    assert read_fast_mode(str(model)) == chosen
    segmenter = load_segmenter(str(model), fast=True)
    assert segmenter.arrangement == chosen
    image = _picture()[0]
    plain = load_segmenter(str(model), device="cpu")
    assert plain.arrangement is None
    assert abs(segmenter.segment([image])[0].probability - plain.segment([image])[0].probability).max() < 1e-5


def test_it_is_no_part_of_the_model(model: Path) -> None:
    before = model_sha256(str(model))
    write_fast_mode(str(model), Arrangement(), {})
    assert model_sha256(str(model)) == before


@pytest.mark.parametrize("changed", ["processor", "versions", "model"])
def test_what_was_measured_with_something_else_is_ignored_with_a_warning(
    model: Path, changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_fast_mode(str(model), Arrangement(), {})
    if changed == "model":
        save_file({**load_file(model / "unet" / WEIGHTS), "more": torch.zeros(2)}, model / "unet" / WEIGHTS)
    else:
        content = json.loads(path.read_text())
        content[changed] = {**content[changed], next(iter(content[changed])): "another"}
        path.write_text(json.dumps(content))
    assert read_fast_mode(str(model)) is None
    assert f"was measured with another {changed} and is ignored; `leafseg benchmark" in caplog.text


def test_without_a_stored_arrangement_fast_says_what_to_run(model: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no fast_mode.json yet; `leafseg benchmark .*` measures and writes it"
    ):
        load_segmenter(str(model), fast=True)
    with pytest.raises(ConfigError, match="leave out --precision"):
        load_segmenter(str(model), fast=True, precision="bf16")
    with pytest.raises(CheckpointError, match="no such folder; fast mode is stored beside a model"):
        fast_mode_file("owner/name")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"arrangement": {"speed": 3}}',
        '{"arrangement": {"dtype": "int3"}}',
        '{"arrangement": {"threads": "two"}}',
        "{}",
    ],
)
def test_a_damaged_file_is_one_sentence(model: Path, content: str) -> None:
    (model / "fast_mode.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"fast_mode.json: is no stored fast mode .*measures again"):
        read_fast_mode(str(model))


def test_the_benchmark_measures_each_candidate_and_chooses_within_the_bars(model: Path, tmp_path: Path) -> None:
    for index, image in enumerate(synthetic_images((40, 36), 2)):
        write_png(tmp_path / "data" / "images" / f"{index}.png", (image * 255).byte().permute(1, 2, 0).numpy())
    seen: list[Row] = []
    chosen = {"exact": Arrangement(), "half": Arrangement(dtype="bf16")}
    result = run_benchmark(
        str(model), images=images_of(tmp_path / "data"), repeats=2, arrangements=chosen, report=seen.append,
        max_error=1e-4,
    )  # fmt: skip
    assert [row.name for row in seen] == ["exact", "half"] == [row.name for row in result.rows]
    exact, half = result.rows
    assert exact.latent_error < 1e-5 < half.latent_error
    assert exact.largest_error <= half.largest_error
    assert exact.timing.fastest <= exact.timing.median <= exact.timing.slowest
    assert exact.agreement is None or exact.agreement > 0.99
    assert result.best is None or result.best.name == "exact"  # bf16 is outside the bar, however fast
    assert json.loads(json.dumps(result.to_json()))["rows"][0]["ratio"] == exact.ratio


def test_an_arrangement_that_does_not_work_here_is_a_row_with_its_reason(model: Path) -> None:
    result = run_benchmark(str(model), repeats=1, arrangements={"odd": Arrangement(winograd_channels=0, threads=-1)})
    assert result.best is None
    assert result.rows[0].error
    assert result.rows[0].ratio is None


def test_agreement_is_of_images_in_which_the_plain_model_finds_something(model: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "black.png", torch.zeros(40, 36, dtype=torch.uint8).numpy())
    plain = LeafPipeline.from_pretrained(model)
    found = int(plain(plain.preprocessor.read(tmp_path / "black.png")[None]).mask.any())
    result = run_benchmark(str(model), images=[tmp_path / "black.png"], repeats=1, arrangements={"a": Arrangement()})
    assert result.compared_images == found
    assert (result.rows[0].agreement is None) is (found == 0)


def test_calls_alternate_after_a_round_that_does_not_count() -> None:
    calls: list[str] = []
    seconds = alternately({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert "".join(calls) == "ababab"
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_candidates_differ_and_can_be_stored(model: Path) -> None:
    found = candidates(compiled=True)
    assert len(set(found.values())) == len(found) > 1
    for arrangement in found.values():
        write_fast_mode(str(model), arrangement, {})
        assert read_fast_mode(str(model)) == arrangement
    assert read_fast_mode(str(model)) != replace(arrangement, threads=3)


def test_images_are_evenly_spaced_and_an_empty_folder_is_refused(tmp_path: Path) -> None:
    for index in range(7):
        write_png(tmp_path / f"{index}.png", torch.zeros(4, 4, dtype=torch.uint8).numpy())
    assert [path.stem for path in images_of(tmp_path, limit=3)] == ["0", "2", "4"]
    assert len(images_of(tmp_path)) == 7
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in this folder"):
        images_of(tmp_path / "empty")


def test_a_benchmark_without_calls_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="repeats 0"):
        run_benchmark(str(model), repeats=0)
    assert Benchmark((), None, 0, {}).to_json()["best"] is None


@pytest.fixture
def with_compact_parts(model: Path) -> Path:
    """A model whose full parts were made light ones with random weights."""
    pipeline = LeafPipeline.from_pretrained(model)
    torch.manual_seed(3)
    decoder = CompactMaskDecoder.for_autoencoder(pipeline.vae.config, width=16, blocks=1)
    encoder = CompactImageEncoder.for_encoder(pipeline.image_encoder.config, width=32, blocks=1)
    pipeline.register_modules(compact_decoder=decoder.eval(), compact_encoder=encoder.eval())
    save_model_folder(pipeline, model)
    return model


@pytest.mark.parametrize("compact", ["decoder", "encoder", "both"])
def test_compact_parts_fold_and_the_full_ones_are_not_read(
    with_compact_parts: Path, compact: Literal["decoder", "encoder", "both"]
) -> None:
    chosen = {name: "compact" if compact in (name, "both") else "full" for name in ("decoder", "encoder")}
    plain = LeafPipeline.from_pretrained(with_compact_parts, **chosen)(_picture()).probability
    for name, part in (("vae", "decoder"), ("image_encoder", "encoder")):
        if chosen[part] == "compact":
            (with_compact_parts / name / WEIGHTS).write_bytes(b"nobody reads it")
    folded = load_folded(str(with_compact_parts), Arrangement(compact=compact))
    torch.testing.assert_close(folded(_picture()).probability, plain, rtol=0, atol=1e-5)
    assert plain.std() > 0.01
    half = load_folded(str(with_compact_parts), Arrangement(dtype="bf16", compact=compact))
    seen = []
    for part in (half.compact_decoder, half.compact_encoder):
        if part is not None:
            convolution = next(module for module in part.modules() if isinstance(module, FoldedConv))
            convolution.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert (half(_picture()).probability - plain).abs().max() < 0.1
    assert seen
    assert all(sample.dtype == torch.bfloat16 for sample in seen)
    assert all(sample.is_contiguous(memory_format=torch.channels_last) for sample in seen)


def test_a_benchmark_of_compact_parts_is_judged_by_masks_alone(with_compact_parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images are given"):
        run_benchmark(str(with_compact_parts), compact="both")
    write_png(tmp_path / "a.png", (_picture()[0].permute(1, 2, 0).numpy() * 255).astype("uint8"))
    seen = []
    found = run_benchmark(
        str(with_compact_parts),
        images=[tmp_path / "a.png"],
        repeats=1,
        compact="both",
        min_agreement=0.0,
        report=seen.append,
    )
    light = [row for row in found.rows if row.arrangement.compact == "both"]
    assert light
    assert len(light) == len(found.rows) - len(light)
    assert all(row.error is None for row in light)
    assert [row.name for row in seen] == [row.name for row in found.rows]


def test_compact_parts_that_are_not_there_are_named(model: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", (_picture()[0].permute(1, 2, 0).numpy() * 255).astype("uint8"))
    with pytest.raises(CheckpointError, match=r"has no compact decoder; `leafseg compact"):
        run_benchmark(str(model), images=[tmp_path / "a.png"], compact="decoder")
