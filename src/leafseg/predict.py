"""Files in, mask files out: segmenters, and the folder loop around them.

A Segmenter is anything that turns pixels into labels on the same grid: a pipeline here; baselines, ensembles and
exported runtimes elsewhere. Evaluation and prediction take any of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from leafseg.config import Noise, TimestepSpacing
from leafseg.data.images import (
    IMAGE_SUFFIXES,
    VOLUME_SUFFIXES,
    count_frames,
    image_stem,
    image_suffix,
    read_image,
    read_volume,
    write_png,
    write_volume,
)
from leafseg.errors import CheckpointError, DataError, LeafsegError
from leafseg.files import write_json_atomic
from leafseg.pipeline import LeafPipeline
from leafseg.progress import progress_bar

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Segmentation:
    """One image's result on its own grid.

    Attributes:
        probability: float32 ``[C, H, W]`` in 0..1.
        labels: uint8 ``[H, W]``, class ids.
        spread: float32 ``[C, H, W]`` over noise draws, or None.
    """

    probability: NDArray[np.float32]
    labels: NDArray[np.uint8]
    spread: NDArray[np.float32] | None = None


class Segmenter(Protocol):
    """Anything that segments."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, background first."""

    def segment(self, images: Sequence[NDArray[Any]]) -> list[Segmentation]:
        """Results of images ``[H, W]`` or ``[H, W, 3]`` of any sizes and types, in their order."""


class PipelineSegmenter:
    """A pipeline as a segmenter; images of one size share a batch."""

    def __init__(
        self,
        pipeline: LeafPipeline,
        *,
        num_inference_steps: int | None = None,
        timesteps: TimestepSpacing | None = None,
        noise: Noise = "gaussian",
        num_samples: int = 1,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._arguments: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "noise": noise,
            "num_samples": num_samples,
        }
        self._autocast = autocast or nullcontext

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.pipeline.label_names

    def segment(self, images: Sequence[NDArray[Any]]) -> list[Segmentation]:
        results: list[Segmentation | None] = [None] * len(images)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.shape[:2], []).append(index)
        for indices in by_size.values():
            with self._autocast():
                output = self.pipeline([images[i] for i in indices], **self._arguments)
            if output.labels is None:
                raise LeafsegError("the model's labels overlap; label maps can only be written for exclusive classes")
            for row, index in enumerate(indices):
                results[index] = Segmentation(
                    probability=output.probability[row].numpy(),
                    labels=output.labels[row].to(torch.uint8).numpy(),
                    spread=output.spread[row].numpy() if output.spread is not None else None,
                )
        return [result for result in results if result is not None]


def load_segmenter(
    model: str,
    *,
    num_inference_steps: int | None = None,
    timesteps: TimestepSpacing | None = None,
    noise: Noise = "gaussian",
    num_samples: int = 1,
    precision: Precision = "fp32",
    device: str | None = None,
) -> PipelineSegmenter:
    """A run, pipeline folder or hub id, ready to segment.

    Args:
        model: see :func:`leafseg.runs.resolve_model`.
        num_inference_steps, timesteps: default: the model's recommendation.
        noise, num_samples: see :class:`leafseg.pipeline.LeafPipeline`.
        precision: fp32, or autocast to bf16 / fp16; auto takes bf16 where the hardware multiplies in it.
        device: ``cpu`` or ``cuda``; default: cuda if there is one (never tried: no such device was at hand).

    Raises:
        CheckpointError: if the model cannot be loaded, or has no such number of steps.
    """
    pipeline = LeafPipeline.from_pretrained(model)
    limit = int(pipeline.scheduler.config["num_train_timesteps"])
    if num_inference_steps is not None and not 1 <= num_inference_steps <= limit:
        raise CheckpointError(f"{model}: --steps is {num_inference_steps}; the model's schedule has 1..{limit}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline.to(place)
    for part in (pipeline.unet, pipeline.vae, pipeline.image_encoder):
        part.to(memory_format=torch.channels_last)  # about twice as fast for convolutions on a CPU
    if precision == "auto":
        supported = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        precision = "bf16" if supported else "fp32"
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = None
    if precision in kinds:

        def autocast() -> AbstractContextManager[Any]:
            return torch.autocast(place.type, kinds[precision])

    return PipelineSegmenter(
        pipeline,
        num_inference_steps=num_inference_steps,
        timesteps=timesteps,
        noise=noise,
        num_samples=num_samples,
        autocast=autocast,
    )


@dataclass(frozen=True)
class PredictionReport:
    """What was written, and what failed with its reason."""

    written: dict[str, list[str]]
    failed: dict[str, str]
    seconds: float


def predict_files(
    segmenter: Segmenter,
    inputs: Iterable[Path],
    out: Path,
    *,
    probability: bool = False,
    overlay: bool = False,
    model_name: str = "",
) -> PredictionReport:
    """Segment files and folders into ``out``; one bad file does not stop the others.

    A flat image gives ``STEM.png`` on the same grid (binary: 0 and 255; more classes: class ids), each page of a
    multi-page TIFF ``STEM_0000.png``; a volume gives ``STEM`` with its own suffix and geometry, holding class ids.

    Args:
        segmenter: the model.
        inputs: files, or folders whose images are taken (``images/`` below a data folder).
        out: where masks and ``report.json`` go.
        probability: also write the foreground's probability as 16-bit PNG (65535 is 1), for flat images.
        overlay: also write the image with the mask's outline, for flat images.
        model_name: for the report.

    Raises:
        DataError: if nothing is found, two inputs would write one file, or ``out`` cannot be written.
    """
    files = list(dict.fromkeys(_listed(inputs)))
    stems = _output_stems(files, out)
    written: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    owners: dict[Path, Path] = {}  # which input each output belongs to
    started = time.monotonic()
    out_is_usable(out)
    with progress_bar("prediction", total=len(files)) as bar:
        for path in files:
            try:
                names = []
                for target, write in _outputs(
                    segmenter, path, out, stems[path], probability=probability, overlay=overlay
                ):
                    owner = owners.setdefault(target, path)
                    if owner != path:
                        raise DataError(
                            f"{path}: its result {target.name} would replace that of {owner}; predict them into "
                            "different folders"
                        )
                    write()
                    names.append(target.name)
                written[str(path)] = names
            except DataError as error:
                failed[str(path)] = str(error)
            bar.advance()
    report = PredictionReport(written, failed, round(time.monotonic() - started, 3))
    write_json_atomic(
        out / "report.json",
        {
            "model": model_name,
            "label_names": list(segmenter.label_names),
            "written": report.written,
            "failed": report.failed,
            "seconds": report.seconds,
            "notice": "Research software, not a medical device.",
        },
    )
    return report


def out_is_usable(out: Path) -> None:
    """Make the output folder now, so that a wrong one is found before hours of work.

    Raises:
        DataError: if it cannot be made or written.
    """
    probe = out / ".leafseg-write-test"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); choose another --out or change its rights"
        ) from error


def _listed(inputs: Iterable[Path]) -> Iterator[Path]:
    for given in inputs:
        if given.is_dir():
            folder = given / "images" if (given / "images").is_dir() else given
            found = sorted(
                p
                for p in folder.iterdir()
                if p.is_file() and image_suffix(p) is not None and not p.name.startswith(".")
            )
            if not found:
                kinds = ", ".join(s.removeprefix(".") for s in (*IMAGE_SUFFIXES, *VOLUME_SUFFIXES))
                raise DataError(f"{folder}: no images in this folder; readable are {kinds}")
            yield from found
        elif given.exists():
            yield given
        else:
            raise DataError(f"{given}: no such file or folder; check the path")


def _output_stems(files: Sequence[Path], out: Path) -> dict[Path, str]:
    """Name of each output without suffix; files of one stem keep their suffix in it."""
    counts: dict[str, int] = {}
    for path in set(files):
        counts[image_stem(path)] = counts.get(image_stem(path), 0) + 1
    stems = {path: image_stem(path) if counts[image_stem(path)] == 1 else path.name for path in files}
    if len(set(stems.values())) < len(stems):
        double = next(s for s in stems.values() if list(stems.values()).count(s) > 1)
        raise DataError(f"{out}: two inputs are named {double!r}; predict them into different folders")
    for path in files:
        if path.resolve().parent == out.resolve():
            raise DataError(f"{path}: lies in the output folder, where its mask could replace it; choose another --out")
    return stems


def _outputs(
    segmenter: Segmenter, path: Path, out: Path, stem: str, *, probability: bool, overlay: bool
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The files that one input gives, each with what writes it."""
    suffix = image_suffix(path)
    if suffix in VOLUME_SUFFIXES:
        volume, geometry = read_volume(path)
        labels = np.stack([_segment_one(segmenter, path, plane).labels for plane in volume])
        target = out / (stem if stem.endswith(suffix) else stem + suffix)
        yield target, partial(write_volume, target, labels, geometry)
        return
    frames = count_frames(path)
    for frame in range(frames) if frames is not None else (None,):
        name = stem if frame is None else f"{stem}_{frame:04d}"
        pixels = read_image(path, frame)
        result = _segment_one(segmenter, path, pixels)
        pictures = {f"{name}.png": result.labels * 255 if len(segmenter.label_names) == 2 else result.labels}
        if probability:
            # One channel is the foreground; of several classes, it is everything but the background.
            foreground = result.probability[0] if len(result.probability) == 1 else 1 - result.probability[0]
            pictures[f"{name}_probability.png"] = (foreground.clip(0, 1) * 65535).round().astype(np.uint16)
        if overlay:
            pictures[f"{name}_overlay.png"] = draw_overlay(display_pixels(pixels), result.labels)
        for file_name, picture in pictures.items():
            yield out / file_name, partial(write_png, out / file_name, picture)


def _segment_one(segmenter: Segmenter, path: Path, pixels: NDArray[Any]) -> Segmentation:
    try:
        return segmenter.segment([pixels])[0]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def display_pixels(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """An image of any type as 8-bit RGB ``[H, W, 3]`` for looking at; other than 8-bit ones are stretched."""
    if pixels.dtype != np.uint8:
        values = np.nan_to_num(pixels.astype(np.float32))
        low, high = np.percentile(values, (0.5, 99.5))
        pixels = (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)


_COLOURS = np.array([[255, 64, 64], [64, 200, 255], [255, 210, 60], [120, 255, 120], [220, 120, 255]], np.uint8)


def draw_overlay(picture: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture ``[H, W, 3]`` with the outline of every class of ``labels`` ``[H, W]``, and a light tint inside."""
    from scipy.ndimage import binary_dilation, binary_erosion

    result = picture.copy()
    for value in np.unique(labels[labels > 0]):
        inside = labels == value
        colour = _COLOURS[(int(value) - 1) % len(_COLOURS)]
        result[inside] = (0.8 * result[inside] + 0.2 * colour).astype(np.uint8)
        result[binary_dilation(inside) & ~binary_erosion(inside)] = colour
    return result
