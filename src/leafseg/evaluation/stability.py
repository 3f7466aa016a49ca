"""How much a model's mask depends on the starting noise, for any models side by side.

Every model and every number of steps segments the same images from the same starting noise, so that what differs
between two models is theirs. All figures are per image, at its original resolution.

Rules for empty masks: two empty masks agree (Dice 1), an empty and a filled one do not (Dice 0). Where the truth is
empty no overlap with it can be measured: Dice is None, and the share of draws with any predicted pixel stands beside
it.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leafseg import rng
from leafseg.data.images import read_image
from leafseg.data.manifest import Manifest, Sample, load_manifest, read_labels
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.evaluation.calibration import Reliability, pooled, reliability
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.files import write_json_atomic, write_text_atomic
from leafseg.predict import load_segmenter
from leafseg.progress import progress_bar

if TYPE_CHECKING:
    from leafseg.config import DataSettings
    from leafseg.pipeline import LeafPipeline

log = logging.getLogger(__name__)

# What is reported, by field name, in words.
METRICS: Mapping[str, str] = {
    "dice_mean": "Dice, mean over seeds",
    "dice_std": "Dice, standard deviation over seeds",
    "dice_spread": "Dice, largest minus smallest over seeds",
    "disagreement": "mask disagreement, 1 − mean pairwise Dice",
    "vote_entropy": "vote entropy, bits a pixel",
    "probability_std": "standard deviation of the probability over seeds",
    "ece_draw": "ECE of a single draw",
    "ece_mean": "ECE of the mean over seeds",
}
_PAIRED = ("dice_mean", "dice_std", "dice_spread", "disagreement", "ece_draw", "ece_mean")

_MAX_INPUT_PIXELS = 8 * 256 * 256  # decoded at once: about a gigabyte in the full-size decoder
_MAX_OUTPUT_PIXELS = 2**25  # at original resolution at once
_RUN = 2**22  # pixels of each mask compared at once


@dataclass(frozen=True)
class DrawStatistics:
    """One image's draws against each other and the truth; the fields of :data:`METRICS`, and what they were made of.

    Attributes:
        predicted_share: share of draws with any predicted pixel.
        votes: share of draws that say foreground, float32 ``[H, W]``.
        draws, mean: calibration of all draws' pixels, and of the mean over draws.
    """

    dice_mean: float | None
    dice_std: float | None
    dice_spread: float | None
    disagreement: float
    vote_entropy: float
    probability_std: float
    ece_draw: float
    ece_mean: float
    predicted_share: float
    votes: NDArray[np.float32]
    draws: Reliability
    mean: Reliability


@dataclass(frozen=True)
class StabilityRow:
    """One image, model and number of steps. The Dice figures are None where the truth is empty."""

    model: str
    steps: int
    name: str
    sha256: str
    empty: bool
    truth_pixels: int
    dice_mean: float | None
    dice_std: float | None
    dice_spread: float | None
    disagreement: float
    vote_entropy: float
    probability_std: float
    ece_draw: float
    ece_mean: float
    predicted_share: float


@dataclass(frozen=True)
class ComparedModel:
    """A model that is compared.

    Attributes:
        source: run, pipeline folder or hub id.
        prediction_type: what its U-Net predicts: the clean latent (``sample``), the noise, or the velocity.
        timesteps: which ones several steps visit, see :func:`leafseg.sampler.inference_timesteps`.
        input_size: height and width in pixels.
    """

    name: str
    source: str
    prediction_type: str
    timesteps: str
    input_size: tuple[int, int]


@dataclass(frozen=True)
class Stability:
    """Rows of all models, steps and images, the calibration pooled over images, and the figures that follow.

    Attributes:
        calibration: by (model, steps): of all draws, and of their means; all pixels of all images weigh the same.
    """

    models: tuple[ComparedModel, ...]
    steps: tuple[int, ...]
    noise_seeds: tuple[int, ...]
    rows: tuple[StabilityRow, ...]
    calibration: Mapping[tuple[str, int], tuple[Reliability, Reliability]]
    summary: dict[str, Any]

    def figure(self, model: str, steps: int, metric: str) -> dict[str, Any] | None:
        """Mean over images with its interval, as ``Interval`` has it; None if there was nothing to measure."""
        found: dict[str, Any] | None = self.summary["figures"][model][str(steps)][metric]
        return found

    def save(self, folder: Path) -> None:
        """Write ``per_image.csv`` and ``stability.json``.

        Raises:
            DataError: if the folder cannot be written.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, list(StabilityRow.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in asdict(row).items()})
        write_text_atomic(folder / "per_image.csv", text.getvalue())
        write_json_atomic(folder / "stability.json", self.summary)


# --- one image --------------------------------------------------------------------------------------------------------


def draw_statistics(draws: Iterable[tuple[Tensor, Tensor]], truth: Tensor) -> DrawStatistics:
    """Compare an image's draws with each other and with the truth.

    Args:
        draws: chunks of (probability float ``[S, H, W]``, mask bool ``[S, H, W]``); at least two draws in all.
        truth: bool ``[H, W]``.

    Standard deviations are those of a sample (divided by one less than the number of draws). Order does not matter.
    """
    masks: list[Tensor] = []
    single: list[Reliability] = []  # one a draw
    first: Tensor | None = None
    shift, square = torch.zeros(2, *truth.shape, dtype=torch.float64)
    for probability, mask in draws:
        masks += list(mask)
        single += [reliability(one, truth) for one in probability]
        if first is None:
            first = probability[0].double()
        # Against the first draw, so that equal draws have a deviation of exactly 0.
        change = probability.double() - first
        shift += change.sum(0)
        square += (change**2).sum(0)
    count = len(masks)
    if count < 2 or first is None:
        raise ValueError(f"there are {count} draws; a spread needs at least two")
    overlaps = overlap_counts([truth, *masks])
    dice = _dice(overlaps)
    with_truth, empty = dice[0, 1:], overlaps[0, 0] == 0
    votes = torch.stack(masks).double().mean(0)
    variance = ((square - shift**2 / count) / (count - 1)).clamp(min=0)
    mean = reliability((first + shift / count).clamp(0, 1), truth)
    return DrawStatistics(
        dice_mean=None if empty else float(with_truth.mean()),
        dice_std=None if empty else _standard_deviation(with_truth),
        dice_spread=None if empty else float(np.ptp(with_truth)),
        disagreement=float(1 - dice[1:, 1:][np.triu_indices(count, 1)].mean()),
        vote_entropy=float((torch.special.entr(votes) + torch.special.entr(1 - votes)).mean() / math.log(2)),
        probability_std=float(variance.sqrt().mean()),
        ece_draw=float(np.mean([one.expected_error for one in single])),
        ece_mean=mean.expected_error,
        predicted_share=float((overlaps.diagonal()[1:] > 0).mean()),
        votes=votes.float().numpy(),
        draws=pooled(single),
        mean=mean,
    )


def overlap_counts(masks: Sequence[Tensor]) -> NDArray[np.int64]:
    """Pixels that each two of N masks, bool ``[H, W]``, have in common, ``[N, N]``; their own sizes on the diagonal."""
    flat = torch.stack([mask.flatten() for mask in masks])
    total = np.zeros((len(masks), len(masks)), np.int64)
    for part in flat.split(_RUN, dim=1):
        values = part.float()  # products of up to 2**22 ones are exact
        total += (values @ values.T).round().to(torch.int64).numpy()
    return total


def _dice(overlaps: NDArray[np.int64]) -> NDArray[np.float64]:
    sizes = overlaps.diagonal()
    both = sizes[:, None] + sizes[None]
    return np.where(both == 0, 1.0, 2 * overlaps / np.maximum(both, 1))


def _standard_deviation(values: NDArray[np.float64]) -> float:
    return float(np.std(values - values[0], ddof=1))  # equal values have exactly 0


# --- models and images ------------------------------------------------------------------------------------------------


def measure_stability(
    models: Mapping[str, str],
    manifest: Manifest,
    *,
    steps: Sequence[int] = (1, 2, 5, 10, 20),
    noise_seeds: Sequence[int] = tuple(range(10)),
    seed: int = 0,
) -> Stability:
    """Segment every sample with every model, number of steps and noise seed, and compare.

    Args:
        models: name to run, pipeline folder or hub id.
        manifest: normally a part, thinned by :func:`evenly_spaced`.
        steps: numbers of reverse steps.
        noise_seeds: at least two different ones.
        seed: of the bootstrap.

    Raises:
        DataError: for no samples, or images and masks that cannot be read.
        CheckpointError: if a model cannot be loaded or compared with the others; found before anything is measured.
        ConfigError: for steps or seeds that make no sense.
    """
    steps, noise_seeds = tuple(sorted(set(steps))), tuple(noise_seeds)
    _check_request(models, manifest, steps, noise_seeds)
    compared = _compared_models(models, manifest, steps)
    rows: list[StabilityRow] = []
    binned: dict[tuple[str, int], list[tuple[Reliability, Reliability]]] = {}
    with progress_bar("stability", total=len(models) * len(manifest)) as bar:
        for model in compared:
            pipeline = load_segmenter(model.source).pipeline
            for sample in manifest.samples:
                _, truth = _read(sample, manifest)
                for count in steps:
                    found = _segment_and_compare(pipeline, sample, truth, count, noise_seeds)
                    rows.append(_row(model.name, count, sample, truth, found))
                    binned.setdefault((model.name, count), []).append((found.draws, found.mean))
                bar.advance(model.name)
            del pipeline  # else the name holds it while the next one is loaded
    calibration = {
        key: (pooled(draws for draws, _ in parts), pooled(mean for _, mean in parts)) for key, parts in binned.items()
    }
    result = Stability(compared, steps, noise_seeds, tuple(rows), calibration, {})
    summary = {
        "models": [asdict(model) for model in compared],
        "images": len(manifest),
        "empty": sum(row.empty for row in rows) // (len(models) * len(steps)),
        "noise_seeds": list(noise_seeds),
        "steps": list(steps),
        "split_sha256": manifest.split_sha256,
        **_summarise(result, seed=seed),
    }
    return replace(result, summary=summary)


def evenly_spaced(manifest: Manifest, count: int) -> Manifest:
    """``count`` samples of a manifest, evenly spaced by name; all of them for 0 or if there are no more."""
    total = len(manifest)
    if count == 0 or count >= total:
        return manifest
    return replace(manifest, samples=tuple(manifest.samples[i * total // count] for i in range(count)))


def load_shared_manifest(
    data: Path,
    sources: Mapping[str, tuple[DataSettings, Path | None]],
    *,
    part: str,
    split_file: Path | None = None,
) -> Manifest:
    """The part of the data that all models are compared on.

    Args:
        data: see :func:`leafseg.data.manifest.load_manifest`.
        sources: for each model, the data settings that it was trained with, and the split that its run stored.
        part: ``train``, ``validation``, ``test`` or ``all``.
        split_file: replaces the stored splits.

    Raises:
        DataError: if the part is empty, or the models' splits or readings of the masks differ: what is a test image for
            one model might have trained another.
    """
    manifests: dict[str, Manifest] = {}
    known: dict[tuple[str, bytes], str] = {}
    for model, (settings, stored) in sources.items():
        reading = settings.model_dump_json(
            include={"foreground_labels", "mask_threshold", "label_names", "ignore_label"}
        )
        split = stored.read_bytes() if stored is not None and split_file is None else b""
        if (reading, split) in known:
            continue
        known[reading, split] = model
        whole = load_manifest(
            data, settings=settings, split_file=split_file, run_split=stored if split_file is None else None
        )
        manifests[model] = whole if part == "all" else whole.part(part)
    (first, manifest), *others = manifests.items()
    for model, other in others:
        if other.label_map != manifest.label_map:
            raise DataError(
                f"{data}: {first} and {model} were trained on different readings of the masks; say which counts, for "
                "example with --set data.foreground_labels=[1]"
            )
        if {s.sha256 for s in other.samples} != {s.sha256 for s in manifest.samples}:
            raise DataError(
                f"{data}: {first} and {model} were trained with different splits, so that their {part} parts differ; "
                "compare models of one split, or give --split-file with a part that none was trained on"
            )
    if not len(manifest):
        raise DataError(f"{data}: the {part} part has no samples; choose another --split or add images")
    return manifest


def starting_noise(sample: Sample, noise_seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Starting noise ``[len(noise_seeds), *shape]``, keyed by (noise seed, content of the image file) alone."""
    position = rng.content_position(sample.sha256)
    return torch.from_numpy(np.stack([rng.normal(seed, "stability-noise", position, shape) for seed in noise_seeds]))


def _check_request(
    models: Mapping[str, str], manifest: Manifest, steps: Sequence[int], noise_seeds: Sequence[int]
) -> None:
    if not models:
        raise ConfigError("no model is given; give at least one run, pipeline folder or hub id")
    if not len(manifest):
        raise DataError(f"{manifest.root}: the part has no samples; choose another --split or add images")
    if not steps or steps[0] < 1:
        raise ConfigError(f"steps are {', '.join(map(str, steps)) or 'none'}; give whole numbers from 1")
    if len(noise_seeds) < 2 or len(set(noise_seeds)) < len(noise_seeds):
        raise ConfigError(
            f"noise seeds are {', '.join(map(str, noise_seeds)) or 'none'}; a spread needs at least two different ones"
        )


def _compared_models(models: Mapping[str, str], manifest: Manifest, steps: Sequence[int]) -> tuple[ComparedModel, ...]:
    """Load each once and let it go: what does not fit is found before hours of work."""
    compared: list[ComparedModel] = []
    first_labels: tuple[str, ...] = ()
    for name, source in models.items():
        pipeline = load_segmenter(source).pipeline
        if pipeline.config["noise"] == "zeros":
            log.warning(
                "%s: the model was trained to start from zeros, and has one answer an image; stability feeds it the "
                "noise that other models start from",
                source,
            )
        labels = pipeline.label_names
        if pipeline.mask_code.n_outputs != 1:
            raise CheckpointError(
                f"{source}: the model knows {len(labels)} labels ({', '.join(labels)}); stability is measured for "
                "binary models"
            )
        if compared and labels != first_labels:
            raise CheckpointError(
                f"{source}: the model's labels are {', '.join(labels)}, those of {compared[0].source} are "
                f"{', '.join(first_labels)}; compare models of the same labels"
            )
        if len(manifest.label_map.names) != len(labels):
            raise DataError(
                f"{manifest.root}: the masks hold {len(manifest.label_map.names)} classes, the model knows "
                f"{len(labels)} ({', '.join(labels)}); choose the foreground with --set data.foreground_labels=[1]"
            )
        limit = int(pipeline.scheduler.config["num_train_timesteps"])
        if steps[-1] > limit:
            raise CheckpointError(f"{source}: {steps[-1]} steps are asked for; the model's schedule has 1..{limit}")
        first_labels = labels
        compared.append(
            ComparedModel(
                name,
                source,
                str(pipeline.scheduler.config["prediction_type"]),
                str(pipeline.config["timesteps"]),
                pipeline.preprocessor.settings.size,
            )
        )
        del pipeline  # one at a time in memory
    return tuple(compared)


def _read(sample: Sample, manifest: Manifest) -> tuple[NDArray[Any], Tensor]:
    """Pixels as read, and the truth, bool ``[H, W]``."""
    if manifest.label_map.overlapping or manifest.label_map.ignore is not None:
        raise DataError(
            f"{manifest.root}: the masks are a file a label, or data.ignore_label is set; stability is measured on one "
            "mask an image that labels every pixel"
        )
    image = read_image(sample.image, sample.frame, reading=manifest.reading)
    truth = read_labels(sample, manifest.label_map, reading=manifest.reading)
    if truth.shape != image.shape[:2]:
        raise DataError(
            f"{sample.mask}: mask is {truth.shape[1]}x{truth.shape[0]}, image is {image.shape[1]}x{image.shape[0]}; "
            "both must share one grid"
        )
    return image, torch.from_numpy(truth > 0)


def _segment_and_compare(
    pipeline: LeafPipeline,
    sample: Sample,
    truth: Tensor,
    steps: int,
    noise_seeds: Sequence[int],
) -> DrawStatistics:
    image = pipeline.preprocessor.read(sample.image, sample.frame)[None]
    height, width = pipeline.preprocessor.settings.size
    shape = pipeline.latent_shape((truth.shape[0], truth.shape[1]))
    at_once = max(1, min(_MAX_INPUT_PIXELS // (height * width), _MAX_OUTPUT_PIXELS // truth.numel()))

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        # Chunks of equal size, as nearly as can be: a last one of its own size would run other kernels.
        for seeds in np.array_split(np.array(noise_seeds), math.ceil(len(noise_seeds) / at_once)):
            noise = starting_noise(sample, [int(seed) for seed in seeds], shape)
            output = pipeline(
                image, num_inference_steps=steps, latents=noise, num_samples=len(seeds), return_samples=True
            )
            if output.samples is None:
                raise ValueError("the pipeline returned no samples")
            probability = output.samples[0]  # [S, 1, H, W]
            yield probability[:, 0], pipeline.mask_code.mask(pipeline.drawn(probability))[:, 0]

    try:
        return draw_statistics(draws(), truth)
    except DataError as error:
        raise DataError(f"{sample.image}: {error}") from error


def _row(model: str, steps: int, sample: Sample, truth: Tensor, found: DrawStatistics) -> StabilityRow:
    pixels = int(truth.sum())
    return StabilityRow(
        model=model,
        steps=steps,
        name=sample.name,
        sha256=sample.sha256,
        empty=pixels == 0,
        truth_pixels=pixels,
        dice_mean=found.dice_mean,
        dice_std=found.dice_std,
        dice_spread=found.dice_spread,
        disagreement=found.disagreement,
        vote_entropy=found.vote_entropy,
        probability_std=found.probability_std,
        ece_draw=found.ece_draw,
        ece_mean=found.ece_mean,
        predicted_share=found.predicted_share,
    )


# --- where they disagree ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disagreement:
    """One image of the page.

    Attributes:
        rank: its place among all images by disagreement.
        disagreement: mean over models and steps.
        image: pixels ``[H, W]`` or ``[H, W, 3]`` of any type.
        truth: bool ``[H, W]``.
        votes: by (model, steps), the share of draws that say foreground, float32 ``[H, W]``.
    """

    rank: str
    name: str
    disagreement: float
    image: NDArray[Any]
    truth: NDArray[np.bool_]
    votes: dict[tuple[str, int], NDArray[np.float32]]


_RANKS = ("largest disagreement", "second largest disagreement", "third largest disagreement")


def rank_by_disagreement(rows: Sequence[StabilityRow]) -> list[tuple[str, str, float]]:
    """The three images with the largest disagreement and the median one, as (rank, name, disagreement).

    The disagreement is the mean over models and steps. Few images give fewer ranks, never one image twice.
    """
    by_name: dict[str, list[float]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row.disagreement)
    order = sorted(((math.fsum(v) / len(v), name) for name, v in by_name.items()), key=lambda one: (-one[0], one[1]))
    ranks = dict(zip(range(len(order)), _RANKS, strict=False))
    if order:
        ranks.setdefault(len(order) // 2, "median disagreement")
    return [(rank, order[place][1], order[place][0]) for place, rank in ranks.items()]


def find_disagreements(result: Stability, manifest: Manifest) -> list[Disagreement]:
    """The images of :func:`rank_by_disagreement`, segmented again with the smallest and the largest number of steps.

    Raises:
        DataError, CheckpointError: if a file or model that was just read cannot be read any more.
    """
    samples = {sample.name: sample for sample in manifest.samples}
    examples = []
    for rank, name, value in rank_by_disagreement(result.rows):
        image, truth = _read(samples[name], manifest)
        examples.append(Disagreement(rank, name, value, image, truth.numpy(), {}))
    shown = sorted({result.steps[0], result.steps[-1]})
    with progress_bar("pictures", total=len(result.models) * len(examples)) as bar:
        for model in result.models:
            pipeline = load_segmenter(model.source).pipeline
            for example in examples:
                sample, truth = samples[example.name], torch.from_numpy(example.truth)
                for steps in shown:
                    found = _segment_and_compare(pipeline, sample, truth, steps, result.noise_seeds)
                    example.votes[model.name, steps] = found.votes
                bar.advance()
            del pipeline  # one at a time in memory
    return examples


# --- figures over images ----------------------------------------------------------------------------------------------


def _summarise(result: Stability, *, seed: int) -> dict[str, Any]:
    """Means over images with intervals, differences of every two models, and the pooled calibration."""
    by_key: dict[tuple[str, int], list[StabilityRow]] = {}
    for row in result.rows:
        by_key.setdefault((row.model, row.steps), []).append(row)
    names = [model.name for model in result.models]
    pairs = list(itertools.combinations(names, 2))
    figures: dict[str, dict[str, Any]] = {name: {} for name in names}
    differences: list[dict[str, Any]] = []
    with progress_bar("intervals", total=len(result.steps) * (len(names) + len(pairs))) as bar:
        for steps in result.steps:
            for name in names:
                rows = by_key[name, steps]
                values: dict[str, Any] = {m: _interval([getattr(row, m) for row in rows], seed) for m in METRICS}
                false = [row.predicted_share for row in rows if row.empty]
                values["false_positive_share"] = _interval(false, seed)
                figures[name][str(steps)] = values
                bar.advance()
            for first, second in pairs:
                both = list(zip(by_key[first, steps], by_key[second, steps], strict=True))
                differences.append(
                    {
                        "steps": steps,
                        "first": first,
                        "second": second,
                        **{metric: _paired(both, metric, seed) for metric in _PAIRED},
                    }
                )
                bar.advance()
    calibration = {
        name: {
            str(steps): {
                kind: part.as_dict()
                for kind, part in zip(("draw", "mean"), result.calibration[name, steps], strict=True)
            }
            for steps in result.steps
        }
        for name in names
    }
    return {
        "figures": figures,
        "differences": differences,
        "difference": "second minus first, paired by image and noise seeds",
        "calibration": calibration,
        "interval": "95 % percentile bootstrap over images, 9999 resamples",
        "bootstrap_seed": seed,
    }


def _interval(values: Sequence[float | None], seed: int) -> dict[str, Any] | None:
    found = bootstrap_mean([value for value in values if value is not None], seed=seed)
    return asdict(found) if found else None


def _paired(rows: Sequence[tuple[StabilityRow, StabilityRow]], metric: str, seed: int) -> dict[str, Any] | None:
    """Mean of second minus first over the images where both are measured."""
    values = [(getattr(one, metric), getattr(two, metric)) for one, two in rows]
    return _interval([two - one for one, two in values if one is not None and two is not None], seed)
