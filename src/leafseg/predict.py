"""Files in, mask files out: segmenters, and the folder loop around them.

A Segmenter is anything that turns pixels into labels on the same grid: a pipeline here; baselines, ensembles and
exported runtimes elsewhere. Evaluation and prediction take any of them.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leafseg.config import Noise, PartChoice, PreprocessingSettings, TimestepSpacing
from leafseg.data.dicom import DicomSeries, find_series, holds_image, holds_slices, is_dicom, separate_slices
from leafseg.data.images import (
    DICOM_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    VOLUME_SUFFIXES,
    OrientedVolume,
    Reading,
    count_frames,
    image_stem,
    image_suffix,
    is_volume,
    pixel_spacing,
    read_oriented,
    write_png,
    write_volume,
)
from leafseg.data.large import LARGE_PIXELS, tiff_pages, tiff_size, wants_pieces
from leafseg.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from leafseg.fast_mode import Arrangement, load_folded, read_fast_mode
from leafseg.files import read_json, write_json_atomic
from leafseg.hardware import gpu_multiplies_in_bf16, multiplies_in_bf16
from leafseg.outputs.contours import CocoFile, write_geojson
from leafseg.outputs.dicom_seg import SegmentCodes, require_dicom_packages, write_dicom_seg
from leafseg.outputs.label_maps import write_pages, write_probability_png, write_tiled_tiff
from leafseg.outputs.result import Labelled, file_labels
from leafseg.pipeline import LeafPipeline
from leafseg.presence import without_absent
from leafseg.progress import progress_bar

Precision = Literal["auto", "fp32", "bf16", "fp16"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segmentation:
    """One image's result on its own grid.

    Attributes:
        probability: float32 ``[C, H, W]`` in 0..1; C = 1 (foreground) for binary models.
        labels: uint8 ``[H, W]``, class ids; None for overlapping labels.
        spread: float32 ``[C, H, W]`` over noise draws, or None.
        mask: bool ``[C, H, W]``, where each channel of ``probability`` is present. If it is not given, it follows from
            the labels; for overlapping labels, from a probability above 0.5.
    """

    probability: NDArray[np.float32]
    labels: NDArray[np.uint8] | None
    spread: NDArray[np.float32] | None = None
    mask: NDArray[np.bool_] = field(default=None)  # type: ignore[arg-type]  # never None once made

    def __post_init__(self) -> None:
        given: Any = self.mask
        if given is None:
            channels = len(self.probability)
            if self.labels is None:
                mask = self.probability > 0.5
            elif channels == 1:
                mask = self.labels[None] == 1
            else:
                mask = self.labels[None] == np.arange(channels, dtype=np.uint8)[:, None, None]
            object.__setattr__(self, "mask", mask)


def labelled(probability: NDArray[np.float32], *, overlapping: bool, presence: Sequence[float] = ()) -> Segmentation:
    """The rules of the mask codes (:mod:`leafseg.mask_code`) for a probability ``[C, H, W]`` of a whole image."""
    drawn = without_absent(probability, presence)
    if overlapping:
        return Segmentation(probability, None, mask=drawn > 0.5)
    labels = drawn[0] > 0.5 if len(drawn) == 1 else drawn.argmax(0)
    return Segmentation(probability, labels.astype(np.uint8))


class Segmenter(Protocol):
    """Anything that segments.

    Reading belongs to it, because the intensities, the orientation and the slices of a volume are part of what a model
    was trained with. One that has thresholds of presence (:mod:`leafseg.presence`) tells them as ``presence``, a tuple
    that may be set to nothing.
    """

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, background first; of overlapping labels, one a channel and no background."""

    @property
    def overlapping(self) -> bool:
        """Whether a pixel may have several labels."""

    @property
    def preprocessing(self) -> PreprocessingSettings:
        """How images become the network's input; its reading settings say how volumes are cut into frames."""

    def read(self, path: Path, frame: int | None = None) -> NDArray[Any] | Tensor:
        """An image file, or a frame of it, as ``segment`` takes it."""

    def segment(self, images: Sequence[NDArray[Any] | Tensor]) -> list[Segmentation]:
        """Results in the order of the images.

        Args:
            images: arrays ``[H, W]`` or ``[H, W, 3]`` of any type, or float tensors ``[3, H, W]`` in 0..1 as ``read``
                gives them; of any sizes.
        """


class PipelineSegmenter:
    """A pipeline as a segmenter; images of one size share a batch."""

    def __init__(
        self,
        pipeline: LeafPipeline,
        *,
        num_inference_steps: int | None = None,
        timesteps: TimestepSpacing | None = None,
        noise: Noise | None = None,
        num_samples: int = 1,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
        arrangement: Arrangement | None = None,
        decoder: PartChoice | None = None,
        encoder: PartChoice | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.arrangement = arrangement  # of fast mode, for reports
        self._arguments: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "noise": noise,
            "num_samples": num_samples,
            "decoder": decoder,
            "encoder": encoder,
        }
        self._autocast = autocast or nullcontext

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.pipeline.label_names

    @property
    def overlapping(self) -> bool:
        return not self.pipeline.mask_code.exclusive

    @property
    def presence(self) -> tuple[float, ...]:
        return self.pipeline.presence

    @presence.setter
    def presence(self, thresholds: tuple[float, ...]) -> None:
        self.pipeline.presence = thresholds

    @property
    def preprocessing(self) -> PreprocessingSettings:
        return self.pipeline.preprocessor.settings

    def read(self, path: Path, frame: int | None = None) -> Tensor:
        """The image as float32 ``[3, H, W]`` in 0..1, see :meth:`leafseg.data.transforms.Preprocessor.read`."""
        return self.pipeline.preprocessor.read(path, frame)

    def segment(self, images: Sequence[NDArray[Any] | Tensor]) -> list[Segmentation]:
        results: list[Segmentation | None] = [None] * len(images)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, image in enumerate(images):
            size = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
            alike.setdefault((isinstance(image, Tensor), *size), []).append(index)
        tiled = self.preprocessing.fit == "tile"  # its batches are of tiles, and its images may be large: one by one
        batches = [[i] for i in range(len(images))] if tiled else list(alike.values())
        for indices in batches:
            tensors = isinstance(images[indices[0]], Tensor)
            batch: Any = [images[index] for index in indices]
            with self._autocast():
                output = self.pipeline(torch.stack(batch) if tensors else batch, **self._arguments)
            for row, index in enumerate(indices):
                results[index] = Segmentation(
                    probability=output.probability[row].numpy(),
                    labels=output.labels[row].to(torch.uint8).numpy() if output.labels is not None else None,
                    spread=output.spread[row].numpy() if output.spread is not None else None,
                    mask=output.mask[row].numpy(),
                )
        return [result for result in results if result is not None]

    @contextmanager
    def segment_large(
        self, path: Path, frame: int | None = None, *, folder: Path
    ) -> Iterator[tuple[tuple[int, int], Callable[[slice, slice], Segmentation]]]:
        """A TIFF beyond memory, see :meth:`leafseg.pipeline.LeafPipeline.segment_large`.

        Thresholds of presence are left out: whether a label is anywhere is known after the last piece.

        Yields:
            (height, width), and a reader: (rows, columns) as slices to that part of the result.
        """
        code = self.pipeline.mask_code
        with (
            self._autocast(),
            self.pipeline.segment_large(path, frame=frame, folder=folder, **self._arguments) as (size, read),
        ):

            def part(y: slice, x: slice) -> Segmentation:
                probability = read(y, x)[None]
                labels = code.labels(probability)
                return Segmentation(
                    probability=probability[0].numpy(),
                    labels=None if labels is None else labels[0].to(torch.uint8).numpy(),
                    mask=code.mask(probability)[0].numpy(),
                )

            yield size, part


def load_segmenter(
    model: str,
    *,
    num_inference_steps: int | None = None,
    timesteps: TimestepSpacing | None = None,
    noise: Noise | None = None,
    num_samples: int = 1,
    precision: Precision = "fp32",
    fast: bool = False,
    device: str | None = None,
    decoder: PartChoice = "full",
    encoder: PartChoice = "full",
) -> PipelineSegmenter:
    """A run, pipeline folder or hub id, ready to segment.

    Args:
        model: see :func:`leafseg.runs.resolve_model`.
        num_inference_steps, timesteps, noise: default: the model's recommendation.
        noise, num_samples: see :class:`leafseg.pipeline.LeafPipeline`.
        precision: fp32, or autocast to bf16 / fp16; auto takes bf16 where the hardware multiplies in it.
        fast: compute in the arrangement that `leafseg benchmark` stored, on the CPU; see :mod:`leafseg.fast_mode`. One
            that was measured with something else than what is here is ignored with a warning.
        device: ``cpu`` or ``cuda``; default: cuda if there is one.
        decoder, encoder: ``compact`` uses the model's compact part (``leafseg compact``).

    Raises:
        CheckpointError: if the model cannot be loaded, has no such number of steps, no stored fast mode, or lacks a
            compact part that is asked for.
        ConfigError: if ``fast`` meets a precision, device or compact part of one's own, or if several draws are asked
            of a start from zeros.
    """
    if fast:
        if precision != "fp32" or device not in (None, "cpu"):
            raise ConfigError("fast mode has its own precision, on the CPU; leave out --precision and the device")
        if "compact" in (decoder, encoder):
            raise ConfigError(
                "fast mode takes the parts that it was measured with (`leafseg benchmark --compact` measures the light "
                "ones); leave out --fast, or --decoder and --encoder compact"
            )
        arrangement = read_fast_mode(model)
        if arrangement is not None:
            steps: dict[str, Any] = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
            folded = load_folded(model, arrangement, **steps)
            refuse_equal_draws(model, num_samples, noise or folded.config["noise"])
            return PipelineSegmenter(folded, noise=noise, num_samples=num_samples, arrangement=arrangement, **steps)
    pipeline = LeafPipeline.from_pretrained(model, decoder=decoder, encoder=encoder)
    limit = int(pipeline.scheduler.config["num_train_timesteps"])
    if num_inference_steps is not None and not 1 <= num_inference_steps <= limit:
        raise CheckpointError(f"{model}: --steps is {num_inference_steps}; the model's schedule has 1..{limit}")
    refuse_equal_draws(model, num_samples, noise or pipeline.config["noise"])
    place = execution_device(device)
    pipeline.to(place)
    parts = (pipeline.unet, pipeline.vae, pipeline.image_encoder, pipeline.compact_decoder, pipeline.compact_encoder)
    for part in parts:
        if part is not None:
            part.to(memory_format=torch.channels_last)  # about twice as fast for convolutions on a CPU
    return PipelineSegmenter(
        pipeline,
        num_inference_steps=num_inference_steps,
        timesteps=timesteps,
        noise=noise,
        num_samples=num_samples,
        autocast=autocast_of(precision, place),
    )


def refuse_equal_draws(model: str, num_samples: int, noise: str) -> None:
    """Several draws of a start from zeros would be one answer, several times.

    Raises:
        ConfigError: if that is what is asked for.
    """
    if num_samples > 1 and noise == "zeros":
        raise ConfigError(
            f"--samples is {num_samples}, and {model} starts from zeros, so that every draw is the same; leave "
            "--samples out, or draw with --noise gaussian"
        )


def execution_device(device: str | None) -> torch.device:
    """The device that was named; else the GPU, if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast_of(precision: Precision, place: torch.device) -> Callable[[], AbstractContextManager[Any]] | None:
    """What makes a forward pass compute in this number format; None for fp32."""
    if precision == "auto":
        supported = gpu_multiplies_in_bf16 if place.type == "cuda" else multiplies_in_bf16
        precision = "bf16" if supported() else "fp32"
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return partial(torch.autocast, place.type, kinds[precision]) if precision in kinds else None


OutputFormat = Literal["auto", "png", "tiff", "nifti", "nrrd", "mha", "dicom-seg"]
ContourFormat = Literal["geojson", "coco"]

# The suffixes of a format; the first is the usual one, the others are kept where the source has them.
_VOLUME_FORMATS = {"nifti": (".nii.gz", ".nii"), "nrrd": (".nrrd",), "mha": (".mha",)}


@dataclass(frozen=True)
class PredictionReport:
    """What was written, what failed with its reason, and figures of each input that was written."""

    written: dict[str, list[str]]
    failed: dict[str, str]
    seconds: float
    figures: dict[str, dict[str, Any]]


def predict_files(
    segmenter: Segmenter,
    inputs: Iterable[Path],
    out: Path,
    *,
    output_format: OutputFormat = "auto",
    probability: bool = False,
    overlay: bool = False,
    contours: ContourFormat | None = None,
    segment_codes: Mapping[str, SegmentCodes] | None = None,
    model_name: str = "",
) -> PredictionReport:
    """Segment files and folders into ``out``; one bad input does not stop the others.

    Everything lies on the grid of its source. By default a flat image gives ``STEM.png`` (one label: 0 and 255; more:
    class ids), each page of a multi-page TIFF ``STEM_0000.png``, a volume ``STEM`` with its own suffix and geometry,
    and DICOM a DICOM segmentation ``STEM.dcm`` (a clip in time: a label TIFF). Overlapping labels give ``STEM_LABEL``
    each, except in DICOM.

    Args:
        segmenter: the model.
        inputs: files; folders of DICOM slices; or folders, whose images (``images/`` below a data folder) and DICOM
            series, in folders beneath too, are taken. A folder of several series gives an input a series.
        out: where the results and ``report.json`` go.
        output_format: of the labels. ``nifti``, ``nrrd`` and ``mha`` take volumes and DICOM series, ``dicom-seg`` takes
            DICOM; ``tiff`` holds the frames of one input as pages.
        probability: also write the probability of each label: 16-bit PNG (65535 is 1), float32 TIFF or volumes, or a
            fractional DICOM segmentation.
        overlay: also write the image with the labels' outlines: PNG; of volumes a TIFF with a page a slice.
        contours: also write polygons: a GeoJSON file an input, or one ``annotations.json`` (COCO) for all.
        segment_codes: coded names of labels for DICOM, see :mod:`leafseg.outputs.dicom_seg`.
        model_name: for the report.

    Raises:
        DataError: if nothing is found, two inputs would write one file, ``out`` cannot be written, or holds a file that
            would be replaced and that no earlier prediction wrote.
        MissingExtraError: if ``dicom-seg`` is asked for and highdicom is not installed.
    """
    if output_format == "dicom-seg":
        require_dicom_packages()
    with tempfile.TemporaryDirectory(prefix="leafseg-") as links:
        return _predict_listed(
            segmenter,
            _Inputs(inputs, Path(links)),
            out,
            output_format=output_format,
            probability=probability,
            overlay=overlay,
            contours=contours,
            segment_codes=segment_codes or {},
            model_name=model_name,
        )


def _predict_listed(
    segmenter: Segmenter,
    listed: _Inputs,
    out: Path,
    *,
    output_format: OutputFormat,
    probability: bool,
    overlay: bool,
    contours: ContourFormat | None,
    segment_codes: Mapping[str, SegmentCodes],
    model_name: str,
) -> PredictionReport:
    stems = _output_stems(listed, out)
    earlier = _files_of_earlier_runs(out)
    _check_replaced(
        stems, out, earlier, output_format=output_format, names=foreground_names(segmenter), coco=contours == "coco"
    )
    out_is_usable(out)
    reading = Reading.of(segmenter.preprocessing)
    coco = CocoFile(foreground_names(segmenter)) if contours == "coco" else None
    report = PredictionReport({}, {}, 0.0, {})
    owners: dict[Path, str] = {}  # which input each output belongs to
    started = time.monotonic()
    counts = {path: _frame_count(path, reading) for path in stems}
    namesakes = Counter(path.name for path in stems)  # series are often called alike, in folders of their patients
    try:
        with progress_bar("prediction", total=sum(counts.values())) as bar:
            for path, stem in stems.items():
                begun, left, shown = time.monotonic(), counts[path], listed.shown(path)
                try:
                    if _is_read_in_pieces(segmenter, path):
                        if output_format not in ("auto", "tiff") or overlay or contours is not None:
                            raise DataError(
                                f"{path}: of an image of more than {LARGE_PIXELS:,} pixels, label maps and "
                                "probabilities are written, as TIFF; leave out --overlay and --contours, and choose "
                                "--format tiff"
                            )
                        large: dict[str, Any] = {}
                        writers = _large_writers(segmenter, path, stem, out, large, probability=probability)
                        report.written[shown] = _write_all(writers, shown, out, owners, earlier)
                        report.figures[shown] = {"seconds": round(time.monotonic() - begun, 3), **large}
                        bar.advance(path.name, count=left)
                        continue
                    source = _open_source(path, stem, output_format, reading)
                    results = []
                    for result in _frame_results(
                        segmenter, source, keep_probability=probability or contours is not None, overlay=overlay
                    ):
                        results.append(result)
                        bar.advance(path.name)
                        left -= 1
                    labelled = _labelled(segmenter, source, results)
                    pictures = [result.overlay for result in results if result.overlay is not None]
                    writers = _writers(
                        source,
                        labelled,
                        pictures,
                        probability=probability,
                        geojson_too=contours == "geojson",
                        codes=segment_codes,
                    )
                    names = _write_all(writers, shown, out, owners, earlier)
                    if coco is not None:
                        coco.add(path.name if namesakes[path.name] == 1 else Path(shown).as_posix(), labelled)
                    report.written[shown] = names
                    report.figures[shown] = _figures(source, labelled, round(time.monotonic() - begun, 3))
                except (DataError, MissingExtraError) as error:
                    report.failed[shown] = listed.in_words(path, str(error))
                bar.advance(path.name, count=left)
        if coco is not None:
            coco.write(out / "annotations.json")
            owners[out / "annotations.json"] = ""
    finally:  # an interrupted run may be repeated: its own files stand in the report
        report = replace(report, seconds=round(time.monotonic() - started, 3))
        write_json_atomic(
            out / "report.json",
            {
                "model": model_name,
                "label_names": list(segmenter.label_names),
                "presence": list(presence_of(segmenter)),
                "written": report.written,
                "failed": report.failed,
                "figures": report.figures,
                "files": sorted(earlier | {target.name for target in owners}),
                "seconds": report.seconds,
                "notice": "Research software, not a medical device.",
            },
        )
    return report


def presence_of(segmenter: Segmenter) -> tuple[float, ...]:
    """Its thresholds of presence, none if it knows of none."""
    return tuple(getattr(segmenter, "presence", ()))


def foreground_names(segmenter: Segmenter) -> tuple[str, ...]:
    """The labels that can be present in a result: all but the background."""
    return segmenter.label_names if segmenter.overlapping else segmenter.label_names[1:]


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


class _Inputs:
    """Every file and DICOM series once, with the name that its results shall have.

    Readers take a folder for one series. Of a folder that holds more, each series is read through a folder of links to
    its files; ``shown`` and ``in_words`` put the user's own folder in the place of that one.

    Args:
        inputs: files and folders.
        links: an empty folder.

    Raises:
        DataError: if nothing is found.
    """

    def __init__(self, inputs: Iterable[Path], links: Path) -> None:
        self.stems: dict[Path, str] = {}
        self._links = links
        self._folder_of: dict[Path, Path] = {}
        beneath = 0
        for given in inputs:
            if not given.exists():
                raise DataError(f"{given}: no such file or folder; check the path")
            if not given.is_dir():
                self.stems[given] = image_stem(given)
                continue
            folder = given / "images" if (given / "images").is_dir() else given
            inside: dict[Path, str] = {}
            for name, folders, files in os.walk(folder):
                folders[:] = sorted(sub for sub in folders if not sub.startswith("."))
                parent, names = Path(name), sorted(file for file in files if not file.startswith("."))
                inside.update(self._of_folder(parent, names, above=parent.relative_to(folder).parts))
                if parent != folder:
                    beneath += sum(image_suffix(parent / file) not in (None, *DICOM_SUFFIXES) for file in names)
            if not inside:
                kinds = ", ".join(s.removeprefix(".") for s in (*IMAGE_SUFFIXES, *VOLUME_SUFFIXES))
                raise DataError(f"{folder}: no images in this folder; readable are {kinds} and DICOM")
            self.stems.update(inside)
        if beneath:
            logger.warning(
                "%d images that are no DICOM lie in folders beneath the given ones and are left out; give their "
                "folders or files", beneath,
            )  # fmt: skip

    def folder(self, path: Path) -> Path:
        """Where an input lies."""
        return self._folder_of.get(path, path.parent)

    def shown(self, path: Path) -> str:
        """An input's name in the report: its path as it was given."""
        return str(self._folder_of[path].parent / path.name) if path in self._folder_of else str(path)

    def in_words(self, path: Path, text: str) -> str:
        return text.replace(str(path), str(self._folder_of[path])) if path in self._folder_of else text

    def _of_folder(self, parent: Path, files: Sequence[str], *, above: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
        """A folder's own images if it is the given one; its DICOM images, which are often stored deep, in any case."""
        base = "_".join(above) or parent.resolve().name
        singles = {parent / file for file in files if is_dicom(parent / file)}
        try:
            series = [whole for found in find_series(parent, recursive=False) if (whole := separate_slices(found))]
        except DataError:  # one file is damaged: the folder, or the file, is then named as what fails
            if holds_slices(parent):
                yield parent, base
                singles.clear()
            series = []
        singles.difference_update(*(one.files for one in series))
        if len(series) == 1 and not any(holds_image(path) for path in singles):
            yield parent, base
        else:
            for number, one in _numbered(series):
                yield self._linked(one, f"{parent.resolve().name} (series {number})"), f"{base}_series{number}"
        for path in (parent / file for file in files):
            dicom = is_dicom(path)
            wanted = path in singles and holds_image(path) if dicom else not above
            if wanted and image_suffix(path) is not None:
                yield path, "_".join((*above, image_stem(path)))

    def _linked(self, series: DicomSeries, name: str) -> Path:
        path = self._links / str(len(self._folder_of)) / name
        try:
            path.mkdir(parents=True)
            for file in series.files:
                (path / file.name).symlink_to(file.resolve())
        except OSError as error:
            raise DataError(
                f"{series.folder}: holds several DICOM series, and links to tell them apart cannot be made "
                f"({error.strerror or error}); move each series to a folder of its own"
            ) from error
        self._folder_of[path] = series.folder
        return path


def _numbered(series: Sequence[DicomSeries]) -> list[tuple[int, DicomSeries]]:
    """Series with their own numbers (SeriesNumber) where these tell them apart, else counted from 1 by file name."""
    if len({one.number for one in series}) == len(series) and all(one.number is not None for one in series):
        return [(one.number or 0, one) for one in series]
    return list(enumerate(sorted(series, key=lambda one: min(one.files)), start=1))


def _output_stems(listed: _Inputs, out: Path) -> dict[Path, str]:
    """Name of each output without suffix; files of one stem keep their suffix in it."""
    found = listed.stems
    counts = Counter(found.values())
    stems = {path: stem if counts[stem] == 1 else path.name for path, stem in found.items()}
    double = [stem for stem, count in Counter(stems.values()).items() if count > 1]
    if double:
        raise DataError(f"{out}: two inputs are named {double[0]!r}; predict them into different folders")
    for path in stems:
        if out.resolve() in (path.resolve(), listed.folder(path).resolve()):
            raise DataError(f"{path}: lies in the output folder, where its mask could replace it; choose another --out")
    return stems


def _files_of_earlier_runs(out: Path) -> set[str]:
    """Names of what earlier predictions wrote into a folder, by their report.

    Raises:
        DataError: if a file called report.json is no such report.
    """
    path = out / "report.json"
    if not path.exists():
        return set()
    report = read_json(path)
    written, files = report.get("written"), report.get("files", [])
    if not isinstance(written, dict) or not isinstance(files, list):
        raise DataError(f"{path}: is no report of leafseg predict and would be replaced; choose another --out")
    return {str(name) for names in written.values() for name in names} | {str(name) for name in files}


def _check_replaced(
    stems: Mapping[Path, str],
    out: Path,
    earlier: set[str],
    *,
    output_format: OutputFormat,
    names: Sequence[str],
    coco: bool,
) -> None:
    """Before hours of work: no file that others made, such as a true mask, may have the name of a result.

    Which of a result's names are used is known only once it is there, so all that it might use are reserved.

    Raises:
        DataError: naming the files.
    """
    if not out.is_dir():
        return
    others = [entry.name for entry in os.scandir(out) if entry.name not in {*earlier, "report.json"}]
    if not others:
        return
    labels = "|".join(re.escape(label) for label in file_labels(names))
    ending = re.compile(rf"(_\d{{4,}})?(_overlay|(_probability)?(_({labels}))?)?")
    reserved: dict[str, list[str]] = {}  # suffix: stems
    for path, stem in stems.items():
        for suffix in _possible_suffixes(path, output_format):
            reserved.setdefault(suffix, []).append(stem.removesuffix(suffix))
    taken = ["annotations.json"] if coco and "annotations.json" in others else []
    for name in others:
        for suffix, starts in reserved.items():
            rest = name.removesuffix(suffix)
            if rest != name and any(rest.startswith(s) and ending.fullmatch(rest[len(s) :]) for s in starts):
                taken.append(name)
                break
    if taken:
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise DataError(
            f"{out}: holds {', '.join(sorted(taken)[:3])}{more}, which a result could replace and which no earlier "
            "prediction wrote (they may be true masks); choose another --out"
        )


def _possible_suffixes(path: Path, output_format: OutputFormat) -> set[str]:
    own = image_suffix(path)
    pictures = {".png", ".tif"} if output_format in ("auto", "png", "tiff") else {".tif"}
    if output_format in _VOLUME_FORMATS:
        return {*_VOLUME_FORMATS[output_format], *pictures, ".geojson"}
    if output_format == "dicom-seg" or (output_format == "auto" and own in DICOM_SUFFIXES):
        return {".dcm", ".png", ".tif", ".geojson"}
    if output_format == "auto" and own in VOLUME_SUFFIXES:
        return {own or "", ".tif", ".geojson"}
    return {*pictures, ".geojson"}


def _frame_count(path: Path, reading: Reading) -> int:
    try:
        return count_frames(path, reading=reading) or 1
    except (DataError, MissingExtraError):
        return 1  # segmenting it will say why


@dataclass(frozen=True)
class _Source:
    """An input, opened: the format of its results, and its volume if it is one."""

    path: Path
    stem: str
    output_format: str
    volume: OrientedVolume | None
    pages: int | None

    @property
    def frames(self) -> Sequence[int | None]:
        count = self.volume.slices if self.volume is not None else self.pages
        return range(count) if count is not None else (None,)


def _open_source(path: Path, stem: str, output_format: OutputFormat, reading: Reading) -> _Source:
    dicom = path.is_dir() or is_dicom(path)
    volume = read_oriented(path, reading) if is_volume(path) else None
    chosen: str = output_format
    clip = volume is not None and not volume.in_space
    if chosen == "auto" and dicom:
        chosen = "tiff" if clip else "dicom-seg"
    elif chosen == "auto":
        suffix = image_suffix(path)
        chosen = next((name for name, suffixes in _VOLUME_FORMATS.items() if suffix in suffixes), "png")
    if chosen == "dicom-seg" and not dicom:
        raise DataError(
            f"{path}: is not DICOM, and a DICOM segmentation must name the DICOM images that it belongs to; choose "
            "another --format"
        )
    if chosen in _VOLUME_FORMATS and volume is None:
        raise DataError(f"{path}: is a flat image, and --format {chosen} takes volumes; choose png or tiff")
    if clip and chosen not in ("png", "tiff"):
        raise DataError(f"{path}: its frames follow each other in time, not in space; choose --format tiff or png")
    return _Source(path, stem, chosen, volume, None if volume is not None else count_frames(path, reading=reading))


@dataclass(frozen=True)
class _FrameResult:
    """What is kept of one frame: label planes and probabilities as in ``Labelled``, and the drawn picture."""

    planes: NDArray[np.uint8]
    probability: NDArray[np.float32] | None
    overlay: NDArray[np.uint8] | None


def _frame_results(
    segmenter: Segmenter, source: _Source, *, keep_probability: bool, overlay: bool
) -> Iterator[_FrameResult]:
    for frame in source.frames:
        pixels = segmenter.read(source.path, frame)
        try:
            result = segmenter.segment([pixels])[0]
        except DataError as error:
            raise DataError(f"{source.path}: {error}") from error
        planes, foreground = _planes_and_foreground(result)
        picture = None
        if overlay:
            if source.volume is not None and segmenter.preprocessing.neighbouring_slices:
                pixels = pixels[1][None].repeat(3, 1, 1) if isinstance(pixels, Tensor) else pixels[..., 1]
            picture = draw_overlay(display_pixels(pixels), result.mask if result.labels is None else result.labels)
        # A copy, for a view would keep the background's map alive.
        yield _FrameResult(planes, foreground.copy() if keep_probability else None, picture)


def _planes_and_foreground(result: Segmentation) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Label planes and the probabilities of all but the background, as in ``Labelled``."""
    if result.labels is None:
        return result.mask.astype(np.uint8), result.probability
    return result.labels[None], result.probability[1:] if len(result.probability) > 1 else result.probability


class _LargeMaps:
    """Maps of a page that is segmented piece by piece: (rows, columns) as slices to ``[h, w]``.

    Pixels of each label are counted as its map is read.
    """

    def __init__(self, segmenter: PipelineSegmenter, part: Callable[[slice, slice], Segmentation]) -> None:
        self.names, self.part = foreground_names(segmenter), part
        self.pixels = dict.fromkeys(self.names, 0)

    def labels(self, y: slice, x: slice) -> NDArray[np.uint8]:
        """Of exclusive labels: their numbers; 0 and 255 if there is one."""
        labels = self.part(y, x).labels
        if labels is None:
            raise RuntimeError("overlapping labels have a map each")
        for index, name in enumerate(self.names):
            self.pixels[name] += int(np.count_nonzero(labels == index + 1))
        return labels * np.uint8(255 if len(self.names) == 1 else 1)

    def label(self, y: slice, x: slice, *, index: int) -> NDArray[np.uint8]:
        """Of overlapping labels: 0 and 255 where label ``index`` is."""
        mask = self.part(y, x).mask[index]
        self.pixels[self.names[index]] += int(np.count_nonzero(mask))
        return mask.astype(np.uint8) * np.uint8(255)

    def probability(self, y: slice, x: slice, *, index: int) -> NDArray[np.float32]:
        return _planes_and_foreground(self.part(y, x))[1][index]


def _large_writers(
    segmenter: PipelineSegmenter, path: Path, stem: str, out: Path, figures: dict[str, Any], *, probability: bool
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """As ``_writers``, of a TIFF that is segmented piece by piece; ``figures`` for the report are filled on the way."""
    names = foreground_names(segmenter)
    one = len(names) == 1 and not segmenter.overlapping
    labels = file_labels(names)
    if (spacing := pixel_spacing(path)) is not None:
        figures["spacing_mm"] = list(spacing)
    pages = tiff_pages(path)
    for frame in range(pages) if pages is not None else (None,):
        number = "" if frame is None else f"_{frame:04d}"
        with _disk_errors(out), segmenter.segment_large(path, frame, folder=out) as (size, part):
            maps = _LargeMaps(segmenter, part)
            files: dict[str, tuple[Any, type[np.generic]]] = {}
            if segmenter.overlapping:
                for index, label in enumerate(labels):
                    files[f"_{label}"] = (partial(maps.label, index=index), np.uint8)
            else:
                files[""] = (maps.labels, np.uint8)
            for index, label in enumerate(labels if probability else ()):
                ending = "_probability" if one else f"_probability_{label}"
                files[ending] = (partial(maps.probability, index=index), np.float32)
            for ending, (read, dtype) in files.items():
                yield f"{stem}{number}{ending}.tif", partial(write_tiled_tiff, size=size, dtype=dtype, read=read)
            figures["shape"] = [*([pages] if pages is not None else []), *size]
            earlier = figures.get("pixels", {})
            figures["pixels"] = {name: count + earlier.get(name, 0) for name, count in maps.pixels.items()}


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn what the system refuses while working files are written into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{out}: working files cannot be written ({error.strerror or error}); free some space or choose another "
            "--out"
        ) from error


def _is_read_in_pieces(segmenter: Segmenter, path: Path) -> TypeGuard[PipelineSegmenter]:
    """Whether the input is a TIFF beyond memory, and the model can take it.

    Raises:
        DataError: if it is one, and the model cannot.
    """
    if isinstance(segmenter, PipelineSegmenter) and segmenter.preprocessing.fit == "tile":
        return wants_pieces(path)
    height, width = tiff_size(path) or (0, 0)
    if height * width > MAX_PIXELS:
        raise DataError(
            f"{path}: the image is {width}x{height}; more than {MAX_PIXELS:,} pixels are segmented in tiles, which "
            "needs a single model trained with --set data.preprocessing.fit=tile, without --flips; or shrink the image"
        )
    return False


def _write_all(
    writers: Iterator[tuple[str, Callable[[Path], None]]],
    path: str,
    out: Path,
    owners: dict[Path, str],
    earlier: set[str],
) -> list[str]:
    """Write an input's files, none in the place of another input's or of a stranger's; returns their names."""
    names = []
    for name, write in writers:
        target = out / name
        if target in owners:
            raise DataError(
                f"{path}: its result {name} would replace that of {owners[target]}; predict them into different folders"
            )
        if name not in earlier and os.path.lexists(target):
            raise DataError(
                f"{path}: its result {name} would replace a file that no earlier prediction wrote; choose another --out"
            )
        write(target)
        owners[target] = path
        names.append(name)
    return names


def _labelled(segmenter: Segmenter, source: _Source, results: Sequence[_FrameResult]) -> Labelled:
    planes = [result.planes for result in results]
    probability = [result.probability for result in results if result.probability is not None]
    if source.volume is not None:
        planes = _as_stored(source.volume, planes)
        probability = _as_stored(source.volume, probability) if probability else []
    return Labelled(
        foreground_names(segmenter),
        segmenter.overlapping,
        planes,
        probability or None,
        numbered=source.frames[0] is not None,
    )


def _as_stored(volume: OrientedVolume, frames: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Maps ``[C, h, w]`` of each slice as the model saw it, to ``[C, Y, X]`` of each slice as the file holds it."""
    maps = [volume.labels_to_stored(np.stack([frame[index] for frame in frames])) for index in range(len(frames[0]))]
    return [np.stack(slices) for slices in zip(*maps, strict=True)]


def _writers(
    source: _Source,
    labelled: Labelled,
    pictures: Sequence[NDArray[np.uint8]],
    *,
    probability: bool,
    geojson_too: bool,
    codes: Mapping[str, SegmentCodes],
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The files that one input gives: each one's name, and what writes it to a path."""
    frames = [f"_{index:04d}" if labelled.numbered else "" for index in range(len(labelled.planes))]
    maps: dict[str, list[NDArray[Any]]] = {**labelled.maps()}
    shown = maps
    if labelled.overlapping or len(labelled.names) == 1:  # nothing but 0 and 1: viewers shall show it
        shown = {ending: [plane * np.uint8(255) for plane in planes] for ending, planes in maps.items()}
    scores: dict[str, list[NDArray[Any]]] = {**labelled.probability_maps()} if probability else {}
    stem = source.stem
    if source.output_format == "png":
        for ending, planes in shown.items():
            for number, plane in zip(frames, planes, strict=True):
                yield f"{stem}{number}{ending}.png", partial(write_png, array=plane)
        for ending, planes in scores.items():
            for number, plane in zip(frames, planes, strict=True):
                yield f"{stem}{number}{ending}.png", partial(write_probability_png, probability=plane)
    elif source.output_format == "tiff":
        for ending, planes in {**shown, **scores}.items():
            yield f"{stem}{ending}.tif", partial(write_pages, pages=planes)
    elif source.output_format == "dicom-seg":
        write = partial(write_dicom_seg, source=source.path, labelled=labelled, codes=codes)
        yield f"{stem}.dcm", write
        if probability:
            yield f"{stem}_probability.dcm", partial(write, probability=True)
    elif source.volume is not None:
        own = image_suffix(source.path)
        suffixes = _VOLUME_FORMATS[source.output_format]
        suffix = own if own in suffixes else suffixes[0]
        for ending, planes in {**maps, **scores}.items():
            write = partial(
                write_volume,
                array=np.stack(planes),
                geometry=source.volume.geometry,
                like=source.path if own in _VOLUME_FORMATS["nifti"] else None,
            )
            yield f"{stem.removesuffix(suffix)}{ending}{suffix}", write
    if pictures and (source.volume is not None or source.output_format == "tiff"):
        yield f"{stem}_overlay.tif", partial(write_pages, pages=pictures)
    else:
        for number, picture in zip(frames, pictures, strict=False):
            yield f"{stem}{number}_overlay.png", partial(write_png, array=picture)
    if geojson_too:
        yield f"{stem}.geojson", partial(write_geojson, labelled=labelled)


def _figures(source: _Source, labelled: Labelled, seconds: float) -> dict[str, Any]:
    """Of one input, for the report: shape as written, spacing and volumes where known, pixels of each label."""
    sizes = {planes.shape[1:] for planes in labelled.planes}
    figures: dict[str, Any] = {"seconds": seconds, "pixels": labelled.pixel_counts()}
    if len(sizes) == 1:
        figures["shape"] = [*([len(labelled.planes)] if labelled.numbered else []), *sizes.pop()]
    spacing: tuple[float, ...] | None
    if source.volume is None:
        spacing = pixel_spacing(source.path)
    else:
        known = source.volume.spacing_known and source.volume.depth_known
        solid = known and source.volume.in_space and len(source.volume.geometry.size) == 3
        spacing = source.volume.geometry.spacing_mm[::-1] if solid else source.volume.spacing_mm
    if spacing is not None:
        figures["spacing_mm"] = list(spacing)
        if len(spacing) == 3:
            voxel_ml = math.prod(spacing) / 1000
            figures["volume_ml"] = {name: round(n * voxel_ml, 6) for name, n in figures["pixels"].items()}
    return figures


def display_pixels(pixels: NDArray[Any] | Tensor) -> NDArray[np.uint8]:
    """An image as 8-bit RGB ``[H, W, 3]`` for looking at.

    Arrays of other types than 8-bit are stretched; tensors ``[3, H, W]`` in 0..1 are taken as they are.
    """
    if isinstance(pixels, Tensor):
        shown: NDArray[np.uint8] = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return shown
    picture: NDArray[np.uint8] = pixels
    if pixels.dtype != np.uint8:
        values = np.nan_to_num(pixels.astype(np.float32))
        low, high = np.percentile(values, (0.5, 99.5))
        picture = (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2)


LABEL_COLOURS = np.array([[255, 64, 64], [64, 200, 255], [255, 210, 60], [120, 255, 120], [220, 120, 255]], np.uint8)


def draw_overlay(picture: NDArray[np.uint8], labels: NDArray[np.uint8] | NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The picture ``[H, W, 3]`` with the outline of every label and a light tint inside.

    Args:
        picture: what is drawn on; it stays as it is.
        labels: class ids ``[H, W]``, 0 is the background; or bool ``[L, H, W]``, one mask a label.
    """
    from scipy.ndimage import binary_dilation, binary_erosion

    if labels.ndim == 3:
        masks = list(enumerate(labels.astype(bool)))
    else:
        masks = [(int(value) - 1, labels == value) for value in np.unique(labels[labels > 0])]
    result = picture.copy()
    for index, inside in masks:
        colour = LABEL_COLOURS[index % len(LABEL_COLOURS)]
        result[inside] = (0.8 * result[inside] + 0.2 * colour).astype(np.uint8)
        result[binary_dilation(inside) & ~binary_erosion(inside)] = colour
    return result
