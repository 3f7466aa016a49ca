"""``leafseg export``: write the graph, load it as a user will, measure it, and put it in place only if it holds."""

from __future__ import annotations

import copy
import csv
import io
import json
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from leafseg.config import DataSettings, PartChoice
from leafseg.data.images import IMAGE_SUFFIXES, VOLUME_SUFFIXES, Reading, count_frames, image_suffix
from leafseg.data.manifest import Manifest, read_csv
from leafseg.data.pixels import PixelPreprocessor, draw_noise, noise_position
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.evaluation.evaluate import check_classes
from leafseg.export.card import dice_change, model_card
from leafseg.export.graph import SingleStep, check_exportable
from leafseg.export.measure import (
    Agreement,
    Recorded,
    evaluate_both,
    latency,
    mask_agreement,
    probability_difference,
    segment_frames,
)
from leafseg.export.onnx import quantise_onnx, require_onnx_packages, write_onnx
from leafseg.export.openvino import quantise_openvino, require_openvino, write_openvino
from leafseg.exported import load_exported
from leafseg.files import check_new_folder, new_folder, write_text_atomic
from leafseg.model_folder import folder_bytes
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter
from leafseg.runs import EXPORT_FILE, SPLIT_FILE, model_sha256, run_of, selected_on_test
from leafseg.runtime import EXPORT_FORMAT_VERSION
from leafseg.runtime.folder import GRAPH_FILES, PREPROCESSING_FILE, file_sha256

Backend = Literal["onnx", "openvino"]
ExportPrecision = Literal["fp32", "fp16", "bf16", "int8"]

_CALIBRATION_IMAGES = 128  # evenly spaced, if there are more
# Largest difference of a probability on random images that rounding explains; one that computes something else is far
# beyond it. int8 is judged by its masks.
_ROUNDING = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.2}
# Data settings that say what mask values mean; the rest follows from the preprocessing or concerns training.
_DATA_SETTINGS = ("foreground_labels", "mask_threshold", "label_names", "ignore_label")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: the exported folder.
        megabytes: of all its files.
        content: of its ``export.json``; the figures are under ``measured``.
        agreement: with the fp32 model; None if no images were given.
    """

    folder: Path
    megabytes: float
    content: Mapping[str, Any]
    agreement: Agreement | None

    def lines(self) -> list[str]:
        """The figures in words."""
        measured = self.content["measured"]
        lines = [f"largest difference of a probability on random images: {measured['probability_difference']:.2g}"]
        if self.agreement is not None:
            found = self.agreement
            lines.append(
                f"mask agreement with the fp32 model ({measured['compared_on']}, {found.images} images): mean Dice "
                f"{_number(found.mean_dice)}, worst image {_number(found.worst_dice)} ({found.worst_image}), "
                f"{found.both_empty} empty masks left out"
            )
        for label, figures in measured.get("truth", {}).items():
            lines.append(f"{label}: {dice_change(figures)}")
        speed = measured["latency"]
        lines.append(
            f"one image: {speed['exported']['median_ms']:.1f} ms, the fp32 model {speed['model']['median_ms']:.1f} ms "
            f"({speed['times_as_fast']:.2f} times as fast, {speed['threads']} threads)"
        )
        lines.append(f"{self.folder}: {self.megabytes:.1f} MB")
        return lines


def _number(value: float | None) -> str:
    return "not measurable" if value is None else f"{value:.4f}"


def check_request(out: Path, *, to: Backend, precision: ExportPrecision, calibration: Path | None) -> None:
    """Everything that can be said before a model is loaded.

    Raises:
        ConfigError: if the back end has no such precision, or int8 has no calibration images.
        DataError: if ``out`` is taken.
        MissingExtraError: if a package is missing.
    """
    if to == "onnx" and precision == "bf16":
        raise ConfigError(
            "ONNX Runtime's CPU kernels do not compute in bf16; take --to openvino for it, or --precision fp16 for a "
            "file of half the size"
        )
    if precision == "int8" and calibration is None:
        raise ConfigError(
            "int8 needs images to calibrate on; give --calibration FOLDER with a hundred images like those to come"
        )
    if precision != "int8" and calibration is not None:
        raise ConfigError(f"--calibration is for int8, and --precision is {precision}; leave it out, or take int8")
    check_new_folder(out)
    require_onnx_packages() if to == "onnx" else require_openvino(precision)


def export_model(
    segmenter: PipelineSegmenter,
    out: Path,
    *,
    to: Backend,
    precision: ExportPrecision = "fp32",
    calibration: Path | None = None,
    part: Manifest | None = None,
    compared_on: str = "",
    min_agreement: float = 0.99,
    repeats: int = 20,
    model_name: str = "",
    decoder: PartChoice = "full",
    encoder: PartChoice = "full",
    data_settings: DataSettings | None = None,
    run_split: Path | None = None,
) -> ExportReport:
    """Export a model, and measure the export against the model in fp32.

    Args:
        segmenter: the model, in fp32 on the CPU.
        out: the new folder; must not exist, or be empty.
        to: the back end.
        precision: ``fp16`` stores weights in fp16, which CPUs widen again; ``bf16`` computes in it; ``int8`` is
            quantised after training with the calibration images.
        calibration: folder of images; evenly spaced 128 of them are used.
        part: images with masks, to measure the change of Dice on; without them masks are compared on the calibration
            images.
        compared_on: what ``part`` is, for the card.
        min_agreement: mean Dice of the masks with the fp32 model's, over images and classes that are not empty in both,
            below which nothing is written.
        repeats: of the latency measurement.
        model_name: the name that the model was loaded by.
        decoder, encoder: ``compact`` exports that part of ``leafseg compact`` in place of the full one. Masks are
            compared with those of the full model all the same.
        data_settings: what mask values mean, kept for evaluations of the export.
        run_split: the split of the model's run; kept as content hashes and parts, without names.

    Raises:
        ConfigError, DataError, MissingExtraError: as :func:`check_request` and :func:`check_exportable`; also for
            calibration images that are missing, or masks of other classes.
        CheckpointError: if the export computes something else than the model, or agrees too little, or the model lacks
            a compact part that is asked for.
    """
    check_request(out, to=to, precision=precision, calibration=calibration)
    pipeline = segmenter.pipeline
    check_exportable(pipeline, decoder=decoder, encoder=encoder)
    if part is not None:
        check_classes(segmenter, part)
        if not len(part):
            raise DataError(f"{part.root}: the part has no samples; choose another --split or add images")
    frames = _evenly_spaced(_frames(calibration, segmenter)) if calibration is not None else []
    with new_folder(out) as folder:
        step = SingleStep(pipeline, decoder=decoder, encoder=encoder).eval()
        _write_graph(step, pipeline, folder, to=to, precision=precision, frames=frames)
        del step  # a second U-Net
        content = _content(pipeline, folder, to=to, precision=precision, calibrated_on=len(frames))
        content["source"] = _source(model_name)
        content["parts"] = {"mask decoder": decoder, "image encoder": encoder}
        content["selected_on_test"] = selected_on_test(Path(model_name))
        if data_settings is not None:
            content["data"] = data_settings.model_dump(mode="json", include=set(_DATA_SETTINGS))
        if run_split is not None:
            write_text_atomic(folder / SPLIT_FILE, _anonymous_split(run_split))
        _write_json(folder / EXPORT_FILE, content)

        exported = load_exported(folder, threads=torch.get_num_threads())
        measured: dict[str, Any] = content["measured"]
        difference = probability_difference(pipeline, exported.runtime, decoder=decoder, encoder=encoder)
        measured["probability_difference"] = difference
        if difference > _ROUNDING.get(precision, 1.0):
            raise CheckpointError(
                f"{out}: on random images the {precision} graph differs from the model by {difference:.2g} in a "
                f"probability, more than rounding explains ({_ROUNDING[precision]:g}); nothing was written, take "
                f"{'fp32' if precision != 'fp32' else 'the other back end'}"
            )
        agreement = None
        if part is not None or frames:
            before, after = Recorded(segmenter), Recorded(exported)
            if part is not None:
                names, measured["truth"] = evaluate_both(before, after, part)
            else:
                names = segment_frames((before, after), frames)
            agreement = mask_agreement(before, after, names)
            measured["compared_on"] = compared_on if part is not None else "calibration images"
            measured["agreement"] = agreement.without_names()
            measured["min_agreement"] = min_agreement
            _check_agreement(agreement, out, precision=precision, bar=min_agreement)
        measured["latency"] = latency(pipeline, exported.runtime, repeats=repeats)
        _write_json(folder / EXPORT_FILE, content)
        write_text_atomic(folder / "README.md", model_card(content))
        megabytes = folder_bytes(folder) / 1e6
    return ExportReport(out, megabytes, content, agreement)


def _check_agreement(agreement: Agreement, out: Path, *, precision: str, bar: float) -> None:
    if agreement.mean_dice is None:
        raise CheckpointError(
            f"{out}: every mask of the {agreement.images} images is empty, before and after, so that the {precision} "
            "export cannot be judged; nothing was written, give images with something to find"
        )
    if agreement.mean_dice < bar:
        raise CheckpointError(
            f"{out}: the masks of the {precision} export and the fp32 model have a mean Dice of "
            f"{agreement.mean_dice:.4f} over {agreement.images} images (worst {agreement.worst_dice:.4f}), below "
            f"--min-agreement {bar:g}; nothing was written, calibrate on more typical images or take fp32"
        )


def _write_graph(
    step: SingleStep,
    pipeline: LeafPipeline,
    folder: Path,
    *,
    to: Backend,
    precision: ExportPrecision,
    frames: Sequence[tuple[Path, int | None]],
) -> None:
    settings = pipeline.preprocessor.settings
    if to == "onnx" and precision == "fp16":
        step = copy.deepcopy(step).half()  # its modules are the pipeline's own
    target = folder / GRAPH_FILES[to][0]
    latent = pipeline.latent_shape(settings.size)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-graph-") as working:
        final = to == "onnx" and precision != "int8"
        source = target if final else Path(working) / "graph.onnx"
        write_onnx(step, source, size=settings.size, latent=latent)
        if precision == "int8":
            quantise = quantise_onnx if to == "onnx" else quantise_openvino
            quantise(source, target, inputs=_calibration_inputs(pipeline, frames))
        elif to == "openvino":
            write_openvino(source, target, half=precision == "fp16")


def _calibration_inputs(
    pipeline: LeafPipeline, frames: Sequence[tuple[Path, int | None]]
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Images and noise as inference feeds them, one by one."""
    pixels: PixelPreprocessor = pipeline.preprocessor.pixels
    shape, still = pipeline.latent_shape(pixels.settings.size), pipeline.config["noise"] == "zeros"
    for path, frame in frames:
        placed, _ = pixels.place(pixels.read(path, frame))
        drawn = draw_noise(noise_position(placed), shape, seed=0, num_samples=1)
        yield {"image": placed[None], "noise": np.zeros_like(drawn) if still else drawn}


def _frames(folder: Path, segmenter: PipelineSegmenter) -> list[tuple[Path, int | None]]:
    """Every image, page and slice in a folder, or in ``images/`` below it."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --calibration takes a folder of images")
    inside = folder / "images" if (folder / "images").is_dir() else folder
    suffixes = (*IMAGE_SUFFIXES, *VOLUME_SUFFIXES)
    paths = sorted(path for path in inside.iterdir() if path.name[:1] != "." and image_suffix(path) in suffixes)
    if not paths:
        raise DataError(f"{inside}: no images in this folder; calibration needs some like those to come")
    reading = Reading.of(segmenter.preprocessing)
    frames: list[tuple[Path, int | None]] = []
    for path in paths:
        count = count_frames(path, reading=reading)
        frames += [(path, None)] if count is None else [(path, frame) for frame in range(count)]
    return frames


def _evenly_spaced(frames: list[tuple[Path, int | None]]) -> list[tuple[Path, int | None]]:
    count = min(len(frames), _CALIBRATION_IMAGES)
    return [frames[index * len(frames) // count] for index in range(count)]


def _content(
    pipeline: LeafPipeline, folder: Path, *, to: Backend, precision: ExportPrecision, calibrated_on: int
) -> dict[str, Any]:
    """What ``export.json`` says, before anything is measured; writes the preprocessing."""
    settings = pipeline.preprocessor.settings
    _write_json(folder / PREPROCESSING_FILE, settings.model_dump(mode="json"))
    code = pipeline.mask_code
    channels, rows, _ = pipeline.latent_shape(settings.size)
    schedule = pipeline.scheduler.config
    packages = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino", *(("nncf",) if precision == "int8" else ()))}
    return {
        "format_version": EXPORT_FORMAT_VERSION if pipeline.presence else 1,
        "backend": to,
        "precision": precision,
        "labels": {
            "names": list(code.label_names),
            "mask_code": code.name,
            "overlapping": not code.exclusive,
            "channels": code.n_outputs,
            **({"presence": list(pipeline.presence)} if pipeline.presence else {}),
        },
        "latent": {"channels": channels, "stride": settings.size[0] // rows},
        "noise": {
            "kind": pipeline.config["noise"],
            "seed": 0,
            "stream": "inference-noise-0",
            "position": "of the resized image's content",
        },
        "timestep": int(schedule["num_train_timesteps"]) - 1,
        "prediction_type": schedule["prediction_type"],
        "calibration_images": calibrated_on if precision == "int8" else None,
        "sha256": {name: file_sha256(folder / name) for name in (*GRAPH_FILES[to], PREPROCESSING_FILE)},
        "versions": {name: version(name) for name in ("leafseg", "torch", "numpy", *packages[to])},
        "measured": {"hardware": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"},
        "notice": "Research software, not a medical device.",
    }


def _source(model_name: str) -> dict[str, Any]:
    """The model's name without the folders that it lies in, and the hash of its files."""
    path = Path(model_name)
    name = (run_of(path) or path).resolve().name if path.exists() else model_name
    return {"model": name, "sha256": model_sha256(model_name)}


def _anonymous_split(split: Path) -> str:
    """Content hashes and parts of a stored split: an evaluation needs no more, and names may name patients."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "sha256", "group", "part"))
    writer.writerows(("", row["sha256"], "", row["part"]) for row in read_csv(split))
    return text.getvalue()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
