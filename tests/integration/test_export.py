"""Exported models give the pipeline's masks without it, and say in one sentence why they are not made or loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from leafseg import runtime
from leafseg.config import PartChoice, Settings
from leafseg.data.images import read_image, write_png
from leafseg.ensemble import load_model
from leafseg.errors import CheckpointError, MissingExtraError
from leafseg.export.graph import SingleStep, fold_time
from leafseg.export.measure import Recorded, mask_agreement
from leafseg.exported import ExportedSegmenter, stored_data_settings
from leafseg.model.build import build_components
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.pipeline import LeafPipeline
from leafseg.predict import Segmentation, load_segmenter
from leafseg.runtime.backends import open_graph

Cli = Callable[..., Any]  # see conftest
onnx = pytest.importorskip("onnx", reason="onnx is not installed (leafseg[onnx])")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (leafseg[onnx])")

CLOSE = 2e-4  # of a probability: torch and ONNX Runtime round differently through some eighty layers


def saved_model(
    folder: Path,
    settings: Settings,
    *,
    label_names: tuple[str, ...] = ("background", "foreground"),
    mask_code: str = "auto",
    overlapping: bool = False,
    prediction_type: str = "sample",
    noise: str = "gaussian",
    compact: bool = False,
) -> Path:
    """A pipeline folder with random weights, the same in every test."""
    model = settings.model.model_copy(update={"mask_code": mask_code})
    settings = settings.model_copy(update={"model": model})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = build_components(settings, label_names=label_names, overlapping=overlapping)
        light = {}
        if compact:
            light["compact_decoder"] = CompactMaskDecoder.for_autoencoder(parts.autoencoder.config, width=32, blocks=1)
            light["compact_encoder"] = CompactImageEncoder.for_encoder(parts.image_encoder.config, width=32, blocks=1)
    parts.scheduler.register_to_config(prediction_type=prediction_type)
    LeafPipeline(
        unet=parts.unet,
        vae=parts.autoencoder,
        image_encoder=parts.image_encoder,
        scheduler=parts.scheduler,
        preprocessing=settings.data.preprocessing.model_dump(mode="json"),
        mask_code={"name": parts.mask_code.name, "label_names": list(parts.mask_code.label_names)},
        noise=noise,
        **light,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_settings: Settings) -> Path:
    return saved_model(tmp_path_factory.mktemp("model") / "pipeline", tiny_settings)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The model as ONNX in fp32; tests that change the folder copy it."""
    return export(model, tmp_path_factory.mktemp("exported") / "onnx")


def test_an_export_starts_from_what_the_model_starts_from(tmp_path: Path, tiny_settings: Settings) -> None:
    still = saved_model(tmp_path / "model", tiny_settings, noise="zeros")
    loaded = runtime.load(export(still, tmp_path / "onnx"))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    own, zeros, gaussian = (loaded(pixels, noise=kind).probability for kind in (None, "zeros", "gaussian"))
    np.testing.assert_array_equal(own, zeros)
    assert np.abs(own - gaussian).max() > 1e-3
    expected = LeafPipeline.from_pretrained(still)(pixels).probability[0].numpy()
    np.testing.assert_allclose(own, expected, atol=CLOSE)


def export(model: Path, out: Path, *, to: str = "onnx", **options: object) -> Path:
    from leafseg.export.run import export_model

    segmenter = load_segmenter(str(model), device="cpu")
    export_model(segmenter, out, to=to, repeats=3, model_name=str(model), **options)  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of different sizes, one of them in colour."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for number, shape in enumerate([(40, 36), (32, 32), (90, 20), (25, 61, 3)]):
        write_png(folder / f"{number}.png", generator.integers(0, 256, shape).astype(np.uint8))
    return folder


def assert_same_results(pipeline: LeafPipeline, exported: runtime.Runtime, folder: Path, **options: int) -> None:
    for path in sorted(folder.glob("*.png")):
        pixels = read_image(path)
        expected, found = pipeline(pixels, **options), exported(pixels, **options)
        np.testing.assert_allclose(found.probability, expected.probability[0].numpy(), atol=CLOSE)
        # Labels may differ only where the two largest probabilities, or one and 0.5, are as close as the rounding.
        sure = _margin(expected.probability[0].numpy(), overlapping=exported.overlapping) > 2 * CLOSE
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(found.mask[:, sure], expected.mask[0].numpy()[:, sure])
        if expected.labels is None:
            assert found.labels is None
        else:
            np.testing.assert_array_equal(found.labels[sure], expected.labels[0].numpy()[sure])
        if expected.spread is not None:
            np.testing.assert_allclose(found.spread, expected.spread[0].numpy(), atol=2 * CLOSE)


def _margin(probability: np.ndarray, *, overlapping: bool) -> np.ndarray:
    if overlapping or len(probability) == 1:
        return np.abs(probability - 0.5).min(0)
    ordered = np.sort(probability, 0)
    return ordered[-1] - ordered[-2]


# --- the same masks ---------------------------------------------------------------------------------------------------


def test_the_runtime_gives_the_pipeline_s_results_on_images_of_any_size(
    model: Path, exported: Path, images: Path
) -> None:
    assert_same_results(LeafPipeline.from_pretrained(model), runtime.load(exported), images)


def test_several_noise_draws_have_the_pipeline_s_mean_and_spread(model: Path, exported: Path, images: Path) -> None:
    assert_same_results(LeafPipeline.from_pretrained(model), runtime.load(exported), images, num_samples=3)


@pytest.mark.parametrize(
    ("names", "code", "overlapping", "prediction_type"),
    [
        (("background", "a", "b"), "planes", False, "v_prediction"),
        (("background", "a", "b", "c", "d"), "bits", False, "sample"),
        (("a", "b"), "overlapping", True, "epsilon"),
    ],
)
def test_every_mask_code_and_prediction_type_is_exported(
    tmp_path: Path,
    tiny_settings: Settings,
    images: Path,
    names: tuple[str, ...],
    code: str,
    overlapping: bool,
    prediction_type: str,
) -> None:
    folder = saved_model(
        tmp_path / "model", tiny_settings, label_names=names, mask_code=code, overlapping=overlapping,
        prediction_type=prediction_type,
    )  # fmt: skip
    loaded = runtime.load(export(folder, tmp_path / "out"))
    assert loaded.label_names == names
    assert loaded.overlapping is overlapping
    assert_same_results(LeafPipeline.from_pretrained(folder), loaded, images)


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_takes_any_batch_and_size(model: Path, exported: Path, size: tuple[int, int], batch: int) -> None:
    step = SingleStep(LeafPipeline.from_pretrained(model)).eval()
    generator = np.random.default_rng(2)
    image = generator.random((batch, 3, *size), dtype=np.float32)
    noise = generator.standard_normal((batch, 4, size[0] // 8, size[1] // 8), dtype=np.float32)
    with torch.no_grad():
        expected = step(torch.from_numpy(image), torch.from_numpy(noise)).numpy()
    np.testing.assert_allclose(runtime.load(exported).run(image, noise), expected, atol=CLOSE)


def test_the_folded_u_net_is_the_u_net_at_its_timestep_and_has_no_time_layers(tiny_pipeline: LeafPipeline) -> None:
    sample = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    folded = fold_time(tiny_pipeline.unet, 999)
    with torch.no_grad():
        expected, other = (tiny_pipeline.unet.denoise(sample, timestep) for timestep in (999, 10))
        torch.testing.assert_close(folded.denoise(sample, 999), expected, atol=1e-6, rtol=1e-5)
        assert (expected - other).abs().max() > 1e-3
        assert torch.equal(folded.denoise(sample, 10), folded.denoise(sample, 999))
    left = dict(folded.named_parameters())
    assert len(left) < len(dict(tiny_pipeline.unet.named_parameters()))
    assert not [name for name in left if "time" in name]


def test_the_stored_graph_computes_nothing_of_time(exported: Path) -> None:
    kinds = {node.op_type for node in onnx.load(exported / "model.onnx").graph.node}
    assert "Conv" in kinds
    assert not kinds & {"Sin", "Cos"}


@pytest.mark.parametrize(("decoder", "encoder"), [("compact", "full"), ("full", "compact"), ("compact", "compact")])
def test_light_parts_are_exported_in_place_of_the_full_ones(
    tiny_settings: Settings, tmp_path: Path, cli: Cli, decoder: PartChoice, encoder: PartChoice
) -> None:
    folder = saved_model(tmp_path / "model", tiny_settings, compact=True)
    asked = ("--decoder", decoder, "--encoder", encoder)
    report = cli("export", folder, "--to", "onnx", *asked, "--repeats", "3", "--out", tmp_path / "out").stdout
    loaded, pipeline = runtime.load(tmp_path / "out"), LeafPipeline.from_pretrained(folder)
    generator = np.random.default_rng(2)
    image = generator.random((3, 3, 32, 32), dtype=np.float32)
    noise = generator.standard_normal((3, 4, 4, 4), dtype=np.float32)
    given, latents = torch.from_numpy(image), torch.from_numpy(noise)
    found = loaded.run(image, noise)
    expected = pipeline(given, latents=latents, decoder=decoder, encoder=encoder).probability
    np.testing.assert_allclose(found, expected.numpy(), atol=CLOSE)
    assert np.abs(found - pipeline(given, latents=latents).probability.numpy()).max() > 10 * CLOSE
    assert loaded.run(np.zeros((1, 3, 48, 64), np.float32), np.zeros((1, 4, 6, 8), np.float32)).shape == (1, 1, 48, 64)
    light = [name for name, kind in (("mask decoder", decoder), ("image encoder", encoder)) if kind == "compact"]
    assert f"With the light {' and '.join(light)} of" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path / "out") in report


def test_a_light_part_that_the_model_lacks_is_refused(model: Path, tmp_path: Path, cli: Cli) -> None:
    given = ("export", model, "--to", "onnx", "--decoder", "compact", "--out", tmp_path / "out")
    assert "the model has no compact decoder; run leafseg compact" in cli(*given).error
    assert not (tmp_path / "out").exists()


# --- the folder -------------------------------------------------------------------------------------------------------


def test_an_exported_folder_predicts_and_evaluates_like_its_model(
    model: Path,
    exported: Path,
    images: Path,
    tiny_data: Callable[..., Path],
    tmp_path: Path,
    cli: Cli,
) -> None:
    first, second = load_model(str(model)), load_model(str(exported))
    assert isinstance(second, ExportedSegmenter)
    assert second.preprocessing == first.preprocessing
    data = tiny_data(8)
    for name, source in (("model", model), ("exported", exported)):
        assert (
            cli("evaluate", source, "--data", data, "--split", "all", "--out", tmp_path / name, "--no-report").code == 0
        )
        assert cli("predict", source, images, "--out", tmp_path / f"{name}-masks").code == 0
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("model", "exported"))
    dice = [summary["classes"]["foreground"]["dice"]["mean"] for summary in (one, other)]
    assert dice[0] == pytest.approx(dice[1], abs=0.02)
    assert other["model_sha256"]
    for path in images.glob("*.png"):
        masks = [read_image(tmp_path / f"{name}-masks" / path.name) for name in ("model", "exported")]
        assert (masks[0] == masks[1]).mean() > 0.99
    refused = cli("predict", exported, images, "--out", tmp_path / "five", "--steps", 5)
    assert "one reverse step" in refused.error
    refused = cli("evaluate", exported, "--data", data, "--precision", "bf16", "--out", tmp_path / "bf16")
    assert "exported in fp32" in refused.error


def test_the_module_writes_png_masks_with_torch_blocked_and_replaces_none(
    model: Path, exported: Path, images: Path, tmp_path: Path
) -> None:
    block = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'monai', 'pydantic'): sys.modules[name] = None\n"
        "from leafseg.runtime.__main__ import main\n"
        f"sys.exit(main([{str(exported)!r}, {str(images)!r}, '--out', {str(tmp_path)!r}]))"
    )
    ran = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "4 of 4 files" in ran.stdout
    segmenter = load_segmenter(str(model))
    for path in sorted(images.glob("*.png")):
        (expected,) = segmenter.segment([segmenter.read(path)])
        mask = read_image(tmp_path / path.name)
        assert set(np.unique(mask)) <= {0, 255}
        assert ((mask == 255) == expected.mask[0]).mean() > 0.99
    again = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr


def test_the_card_and_the_folder_say_what_the_model_is(exported: Path, model: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "Not a medical device" in card
    assert "background, foreground" in card
    content = json.loads((exported / "export.json").read_text())
    assert content["format_version"] == 1
    assert content["measured"]["probability_difference"] < CLOSE
    assert str(model.parent) not in json.dumps(content) + card  # no path of this machine
    assert {path.name for path in exported.iterdir()} == {
        "README.md",
        "export.json",
        "model.onnx",
        "preprocessing.json",
    }


def test_what_mask_values_mean_travels_with_the_export(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    content = json.loads((copy / "export.json").read_text())
    content["data"] = {"foreground_labels": [2, 3]}
    (copy / "export.json").write_text(json.dumps(content))
    assert stored_data_settings(copy).foreground_labels == (2, 3)
    assert stored_data_settings(copy, ["data.foreground_labels=[1]"]).foreground_labels == (1,)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"\x08"), "model.onnx is not the file"),
        (lambda folder: (folder / "preprocessing.json").unlink(), "preprocessing.json is missing"),
        (lambda folder: (folder / "export.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "export.json").write_text("{}"), "'format_version' is missing"),
        (lambda folder: _edit(folder, format_version=99), "upgrade it"),
        (lambda folder: _edit(folder, backend="tensorrt"), "tensorrt"),
        (lambda folder: _edit(folder, labels={"names": ["a"], "overlapping": False, "channels": 5}), "5 channels"),
        (lambda folder: (folder / "export.json").unlink(), "no export.json"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(
    exported: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(CheckpointError, match=said) as caught:
        runtime.load(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def _edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**content, **changes}))


def test_without_onnxruntime_the_error_names_the_extra(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"leafseg\[onnx\]"):
        runtime.load(exported)


# --- precision --------------------------------------------------------------------------------------------------------


def test_fp16_halves_the_file_and_changes_probabilities_little(
    model: Path, exported: Path, images: Path, tmp_path: Path
) -> None:
    half = export(model, tmp_path / "half", precision="fp16")
    sizes = [(folder / "model.onnx").stat().st_size for folder in (exported, half)]
    assert sizes[1] < 0.6 * sizes[0]
    pixels = read_image(images / "0.png")
    found = [runtime.load(folder)(pixels).probability for folder in (exported, half)]
    assert 0 < np.abs(found[0] - found[1]).max() < 0.05
    # The model that was exported kept its own weights.
    assert np.abs(found[0] - LeafPipeline.from_pretrained(model)(pixels).probability[0].numpy()).max() < CLOSE


def test_int8_is_measured_and_nothing_is_written_below_the_bar(
    model: Path, tiny_data: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    data = tiny_data(8)
    given = ("export", model, "--to", "onnx", "--precision", "int8", "--calibration", data, "--repeats", 3)
    refused = cli(*given, "--out", tmp_path / "strict", "--min-agreement", 1)
    assert "below --min-agreement 1; nothing was written" in refused.error
    assert not list(tmp_path.iterdir())
    ended = cli(*given, "--data", data, "--split", "all", "--out", tmp_path / "int8", "--min-agreement", 0.2)
    assert ended.code == 0, ended.stderr
    content = json.loads((tmp_path / "int8" / "export.json").read_text())
    measured = content["measured"]
    assert measured["agreement"]["images"] == content["calibration_images"] == len(list((data / "images").iterdir()))
    assert 0.2 <= measured["agreement"]["mean_dice"] < 1
    change = measured["truth"]["foreground"]
    assert change["change"]["mean"] == pytest.approx(change["dice_exported"] - change["dice_model"])
    card = (tmp_path / "int8" / "README.md").read_text()
    for shown in (card, ended.stdout):
        assert f"{measured['agreement']['mean_dice']:.4f}" in shown
        assert f"{change['change']['mean']:+.4f}" in shown
        assert f"{measured['latency']['exported']['median_ms']:.1f} ms" in shown
    graph = onnx.load(tmp_path / "int8" / "model.onnx").graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    assert runtime.load(tmp_path / "int8")(np.zeros((9, 9), np.uint8)).labels.shape == (9, 9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "onnx", "--precision", "bf16"), "do not compute in bf16"),
        (("--to", "onnx", "--precision", "int8"), "give --calibration"),
        (("--to", "onnx", "--calibration", "x"), "--calibration is for int8"),
        (("--to", "onnx", "--precision", "int8", "--calibration", "EMPTY"), "no images in this folder"),
        (("--to", "onnx", "--precision", "int8", "--calibration", "MISSING"), "no such folder"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(
    model: Path, tmp_path: Path, cli: Cli, options: tuple[str, ...], said: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    given = [str(tmp_path / part) if part in ("EMPTY", "MISSING") else part for part in options]
    assert said in cli("export", model, *given, "--out", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_is_not_replaced(exported: Path, model: Path, cli: Cli) -> None:
    before = (exported / "model.onnx").read_bytes()
    assert "exists already" in cli("export", model, "--to", "onnx", "--out", exported).error
    assert (exported / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preprocessing": {"fit": "tile"}}, "fit is 'tile'"),
        ({"num_inference_steps": 5}, "recommends 5 reverse steps"),
    ],
)
def test_models_that_one_graph_cannot_hold_are_refused(
    model: Path, tmp_path: Path, cli: Cli, changes: dict[str, object], said: str
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    index = json.loads((copy / "model_index.json").read_text())
    preprocessing = {**index["preprocessing"], **changes.get("preprocessing", {})}  # type: ignore[dict-item]
    (copy / "model_index.json").write_text(json.dumps({**index, **changes, "preprocessing": preprocessing}))
    assert said in cli("export", copy, "--to", "onnx", "--out", tmp_path / "out").error


# --- agreement --------------------------------------------------------------------------------------------------------


class _Drawn:
    """A segmenter that gives the masks that it is given."""

    overlapping = True
    label_names = ("a", "b")
    presence = ()

    def segment(self, images: list[np.ndarray]) -> list[Segmentation]:
        return [Segmentation(image.astype(np.float32), None, None, image) for image in images]


def test_agreement_is_dice_and_leaves_out_what_is_empty_in_both() -> None:
    one, other = np.zeros((2, 1, 4), bool), np.zeros((2, 1, 4), bool)
    one[0, 0, :2] = other[0, 0, 1:3] = True  # two pixels each, one in common: Dice 2 * 1 / 4
    first, second = Recorded(_Drawn()), Recorded(_Drawn())  # type: ignore[arg-type]
    first.segment([one, one])
    second.segment([other, one])
    found = mask_agreement(first, second, ["x", "y"])
    assert found.mean_dice == pytest.approx((0.5 + 1) / 2)
    assert (found.worst_dice, found.worst_image) == (0.5, "x")
    assert (found.images, found.pairs, found.both_empty) == (2, 2, 2)
    assert found.equal_pixels == pytest.approx(6 / 8)
    first, second = Recorded(_Drawn()), Recorded(_Drawn())  # type: ignore[arg-type]
    for empty in (first, second):
        empty.segment([np.zeros((2, 1, 4), bool)])
    assert mask_agreement(first, second, ["x"]).mean_dice is None


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


def test_openvino_gives_the_pipeline_s_results(model: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed (leafseg[openvino])")
    loaded = runtime.load(export(model, tmp_path / "out", to="openvino"))
    assert_same_results(LeafPipeline.from_pretrained(model), loaded, images)


def test_fixed_shapes_are_compiled_twice_and_threads_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[int, ...] | None] = []

    class Model:
        def __init__(self, shape: tuple[int, ...] | None = None) -> None:
            self.shape = shape
            self.inputs = [SimpleNamespace(names={name}) for name in ("image", "noise")]
            self.outputs = [SimpleNamespace(names={"probability"})]

        def clone(self) -> Model:
            return Model()

        def reshape(self, shapes: dict[str, tuple[int, ...]]) -> None:
            if shapes["image"][-1] == 13:
                raise RuntimeError("shapes do not fit")
            self.shape = shapes["image"]

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32"]

        def read_model(self, path: Path) -> Model:
            return Model()

        def compile_model(self, model: Model, device: str, options: dict[str, Any]) -> Callable[..., Any]:
            compiled.append(model.shape)
            busy: list[int] = []

            def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                assert not busy, "two calls at once"
                assert model.shape in (None, given["image"].shape)
                busy.append(1)
                time.sleep(0.002)
                busy.pop()
                return {"probability": given["image"][:, :1]}

            return run

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    graph = open_graph("openvino", tmp_path / "model.xml", precision="fp32")

    def called(side: int) -> bool:
        image = np.full((1, 3, side, side), side, np.float32)
        return bool(np.array_equal(graph(image, image), image[:, :1]))

    with pytest.raises(CheckpointError, match=r"model\.xml: OpenVINO cannot load the graph, or not for this size"):
        called(13)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(called, [8, 8, 16, 8, 16, 24, 32, 8, 24, 16]))
    assert len(compiled) == 3
    assert compiled.count(None) == 1


@pytest.mark.parametrize(
    ("precision", "capabilities", "hint"),
    [("bf16", ["FP32", "BF16"], "bf16"), ("bf16", ["FP32", "INT8"], "f32"), ("int8", ["FP32", "BF16"], "f32")],
)
def test_bf16_is_asked_for_only_where_the_processor_multiplies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, capabilities: list[str], hint: str
) -> None:
    asked: list[dict[str, Any]] = []
    model = SimpleNamespace(
        inputs=[SimpleNamespace(names={name}) for name in ("image", "noise")],
        outputs=[SimpleNamespace(names={"probability"})],
        reshape=lambda shapes: None,
    )
    model.clone = lambda: model

    def compile_model(model: Any, device: str, options: dict[str, Any]) -> Callable[..., Any]:
        asked.append(options)
        return lambda given: {"probability": given["image"]}

    core = SimpleNamespace(
        get_property=lambda device, name: capabilities, read_model=lambda path: model, compile_model=compile_model
    )
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    image = np.zeros((1, 3, 8, 8), np.float32)
    open_graph("openvino", tmp_path / "model.xml", precision=precision)(image, image)
    assert [options["INFERENCE_PRECISION_HINT"] for options in asked] == [hint]


def test_openvino_is_compiled_for_two_shapes_and_gives_the_same_at_any(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed (leafseg[openvino])")
    folder = export(model, tmp_path / "out", to="openvino")
    compiled = []

    class Core(openvino.Core):  # type: ignore[misc, name-defined]
        def compile_model(self, graph: Any, *rest: Any) -> Any:
            compiled.append(not graph.is_dynamic())
            return super().compile_model(graph, *rest)

    expected = runtime.load(folder)
    monkeypatch.setattr(openvino, "Core", Core)
    many = runtime.load(folder)
    stride = many.folder.latent_stride
    generator = np.random.default_rng(0)
    for batch, height, width in ((1, 32, 32), (2, 32, 48), (1, 48, 64), (1, 32, 32), (3, 64, 32), (2, 32, 48)):
        image = generator.random((batch, 3, height, width), dtype=np.float32)
        noise = generator.standard_normal(
            (batch, many.folder.latent_channels, height // stride, width // stride), dtype=np.float32
        )
        found = many.run(image, noise)
        assert found.shape == (batch, 1, height, width)
        np.testing.assert_allclose(found[:1], expected.run(image[:1], noise[:1]), rtol=0, atol=1e-5)
    assert compiled == [True, True, False]


def test_openvino_quantises_with_nncf(model: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed (leafseg[openvino])")
    pytest.importorskip("nncf", reason="nncf is not installed (leafseg[openvino])")
    out = export(model, tmp_path / "out", to="openvino", precision="int8", calibration=images, min_agreement=0.2)
    content = json.loads((out / "export.json").read_text())
    assert content["calibration_images"] == 4
    assert "FakeQuantize" in (out / "model.xml").read_text()
    assert 0.2 <= content["measured"]["agreement"]["mean_dice"] <= 1


def test_without_openvino_the_error_names_the_extra(
    model: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "leafseg[openvino]" in cli("export", model, "--to", "openvino", "--out", tmp_path / "out").error
