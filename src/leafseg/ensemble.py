"""Several models as one: the mean of their probabilities, and the labels that follow from it.

An ensemble is a folder with ``ensemble.json``: ``{"models": ["fold-0", ...]}``, paths relative to it or hub ids.
``leafseg crossval`` writes one; any other is written by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from leafseg.baseline import BaselineSegmenter, load_baseline
from leafseg.config import PreprocessingSettings
from leafseg.data.manifest import read_csv
from leafseg.errors import CheckpointError
from leafseg.exported import ExportedSegmenter, load_exported
from leafseg.predict import PipelineSegmenter, Segmentation, Segmenter, labelled, load_segmenter, presence_of
from leafseg.runs import SPLIT_FILE, ensemble_models, is_baseline, is_ensemble, is_export, run_of

log = logging.getLogger(__name__)


class EnsembleSegmenter:
    """Segmenters of equal labels and preprocessing as one.

    Args:
        segmenters: at least one; all stay in memory.
        names: of the models, for the error.

    Attributes:
        presence: the mean of the models' thresholds, for the mean of their probabilities; one without any counts as 0.

    Raises:
        CheckpointError: if they differ in labels or preprocessing.
    """

    def __init__(self, segmenters: Sequence[Segmenter], *, names: Sequence[str] | None = None) -> None:
        if not segmenters:
            raise CheckpointError("an ensemble needs at least one model; name one")
        self.segmenters = tuple(segmenters)
        names = names or [f"model {number}" for number in range(len(segmenters))]
        first = segmenters[0]
        for name, other in zip(names, segmenters, strict=True):
            if (other.label_names, other.overlapping) != (first.label_names, first.overlapping):
                raise CheckpointError(
                    f"{name}: its labels are {', '.join(other.label_names)}, those of {names[0]} are "
                    f"{', '.join(first.label_names)}; the models of an ensemble share them, leave one out"
                )
            if changed := _differences(first.preprocessing, other.preprocessing):
                raise CheckpointError(
                    f"{name}: its preprocessing is another than that of {names[0]} ({'; '.join(changed)}); the models "
                    "of an ensemble share it, leave one out"
                )
        thresholds = [found for segmenter in segmenters if (found := presence_of(segmenter))]
        count = len(self.segmenters)
        self.presence: tuple[float, ...] = tuple(sum(each) / count for each in zip(*thresholds, strict=True))

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.segmenters[0].label_names

    @property
    def overlapping(self) -> bool:
        return self.segmenters[0].overlapping

    @property
    def preprocessing(self) -> PreprocessingSettings:
        return self.segmenters[0].preprocessing

    def read(self, path: Path, frame: int | None = None) -> NDArray[Any] | Tensor:
        return self.segmenters[0].read(path, frame)

    def segment(self, images: Sequence[NDArray[Any] | Tensor]) -> list[Segmentation]:
        sums: list[NDArray[np.float32]] = []
        for segmenter in self.segmenters:
            found = [result.probability for result in segmenter.segment(images)]
            if sums and len(found[0]) != len(sums[0]):  # would broadcast: one plane for two classes, or two
                raise CheckpointError(
                    f"the models of the ensemble write {len(sums[0])} and {len(found[0])} probabilities for the same "
                    "labels (their mask codes differ); leave one out"
                )
            sums = [total + one for total, one in zip(sums, found, strict=True)] if sums else found
        count = np.float32(len(self.segmenters))
        return [labelled(total / count, overlapping=self.overlapping, presence=self.presence) for total in sums]


class FlippedSegmenter:
    """A segmenter averaged over mirrored copies of each image: the same model, called once more for each copy.

    Args:
        segmenter: any.
        flips: ``horizontal``: the image and its left-right mirror image; ``vertical``: and the upside-down one;
            ``both``: all four.

    Sensible where a mirrored image is one that the model could meet (skin, microscopy), and not where left and right
    mean something.
    """

    def __init__(self, segmenter: Segmenter, flips: Flips) -> None:
        self.segmenter, self._mirrors = segmenter, _MIRRORS[flips]
        self.presence = presence_of(segmenter)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.segmenter.label_names

    @property
    def overlapping(self) -> bool:
        return self.segmenter.overlapping

    @property
    def preprocessing(self) -> PreprocessingSettings:
        return self.segmenter.preprocessing

    def read(self, path: Path, frame: int | None = None) -> NDArray[Any] | Tensor:
        return self.segmenter.read(path, frame)

    def segment(self, images: Sequence[NDArray[Any] | Tensor]) -> list[Segmentation]:
        sums: list[NDArray[np.float32]] = []
        for axes in self._mirrors:
            found = [
                np.flip(result.probability, tuple(1 + axis for axis in axes))
                for result in self.segmenter.segment([_mirrored(image, axes) for image in images])
            ]
            sums = [total + one for total, one in zip(sums, found, strict=True)] if sums else found
        count = np.float32(len(self._mirrors))
        return [
            labelled(np.ascontiguousarray(total / count), overlapping=self.overlapping, presence=self.presence)
            for total in sums
        ]


Flips = Literal["horizontal", "vertical", "both"]
# Axes of (height, width) that are mirrored, copy by copy.
_MIRRORS: dict[Flips, tuple[tuple[int, ...], ...]] = {
    "horizontal": ((), (1,)),
    "vertical": ((), (0,)),
    "both": ((), (1,), (0,), (0, 1)),
}


def _mirrored(image: NDArray[Any] | Tensor, axes: tuple[int, ...]) -> NDArray[Any] | Tensor:
    """An image ``[H, W]`` or ``[H, W, 3]``, or a tensor ``[3, H, W]``, mirrored along axes of (height, width)."""
    if not axes:
        return image
    if isinstance(image, Tensor):
        return image.flip([1 + axis for axis in axes])
    return np.ascontiguousarray(np.flip(image, axes))


def _differences(one: PreprocessingSettings, other: PreprocessingSettings) -> list[str]:
    mine, theirs = one.model_dump(), other.model_dump()
    return [f"{name} is {theirs[name]} and {mine[name]}" for name in mine if mine[name] != theirs[name]]


def load_ensemble(folder: Path, **options: Any) -> EnsembleSegmenter:
    """All models of an ensemble, exported ones too; ``options`` are :func:`leafseg.predict.load_segmenter`'s.

    Raises:
        CheckpointError: if a model cannot be loaded, or they do not go together.
    """
    models = ensemble_models(folder)
    return EnsembleSegmenter([load_single(model, **options) for model in models], names=models)


def split_of_ensemble(folder: Path) -> Path | None:
    """The split that an ensemble's test part follows from: its own (``leafseg crossval``), else the first model's.

    Warns if the models' test parts differ: then one of them may have been trained on what is tested.
    """
    if (folder / SPLIT_FILE).is_file():
        return folder / SPLIT_FILE
    runs = [run for model in ensemble_models(folder) if (run := run_of(Path(model))) is not None]
    splits = [run / SPLIT_FILE for run in runs if (run / SPLIT_FILE).is_file()]
    tested = {frozenset(row.get("sha256") for row in read_csv(path) if row.get("part") == "test") for path in splits}
    if len(tested) > 1:
        log.warning("%s: its models have different test parts; figures on them are optimistic", folder)
    return splits[0] if splits else None


def load_single(model: str, **options: Any) -> PipelineSegmenter | BaselineSegmenter | ExportedSegmenter:
    """A baseline, an exported folder, or whatever :func:`leafseg.predict.load_segmenter` takes.

    Args:
        model: its name.
        **options: as :func:`leafseg.predict.load_segmenter` takes them.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    exported, baseline = is_export(Path(model)), is_baseline(model)
    if not exported and not baseline:
        return load_segmenter(model, **options)
    what = "an exported model" if exported else "a baseline"
    if "compact" in (options.pop("decoder", None), options.pop("encoder", None)):
        raise CheckpointError(f"{model}: {what} has no compact parts; leave --decoder and --encoder out")
    if options.pop("fast", False):
        raise CheckpointError(f"{model}: {what} has no fast mode, which is of LEAF models in PyTorch; leave --fast out")
    if exported:
        return load_exported(Path(model), **options)
    known = ("num_inference_steps", "precision", "device")  # it starts from no noise
    return load_baseline(model, **{name: value for name, value in options.items() if name in known})


def load_model(
    model: str, **options: Any
) -> PipelineSegmenter | BaselineSegmenter | ExportedSegmenter | EnsembleSegmenter:
    """An ensemble's folder, or whatever :func:`load_single` takes."""
    return load_ensemble(Path(model), **options) if is_ensemble(Path(model)) else load_single(model, **options)
