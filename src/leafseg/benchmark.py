"""`leafseg benchmark`: which arrangement is the fastest for a model on this machine, and how far its results move.

Every arrangement is timed alternately with the plain model (fp32, torch's default memory format) in one process, so
that whatever else the machine does meets both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from leafseg import rng
from leafseg.config import TimestepSpacing
from leafseg.data.images import count_frames, image_suffix
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.evaluation.metrics import dice_and_iou
from leafseg.fast_mode import Arrangement, load_folded
from leafseg.hardware import library_versions, multiplies_in_bf16, processor
from leafseg.model.folded import prepacking_is_available, winograd_is_available
from leafseg.pipeline import LeafPipeline

PLAIN = "plain"
CompactChoice = Literal["none", "decoder", "encoder", "both"]
# Channels from which Winograd's kernels are tried.
_WINOGRAD_CHANNELS = {"fp32": 64, "bf16": 256}


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls: median, fastest, slowest."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class Row:
    """One arrangement against the plain model.

    Attributes:
        name: what it is.
        arrangement: how it computes.
        timing, plain: of a batch; of this arrangement, and of the plain model between its calls.
        latent_error, probability_error: relative error (Euclidean norm) of mask latent and probability.
        largest_error: of any pixel's probability.
        agreement: mean Dice with the plain model's masks over given images, their non-empty classes; else None.
        worst_agreement: of the worst image.
        error: why it does not work here; the rest is then None.
    """

    name: str
    arrangement: Arrangement
    timing: Timing | None = None
    plain: Timing | None = None
    latent_error: float | None = None
    probability_error: float | None = None
    largest_error: float | None = None
    agreement: float | None = None
    worst_agreement: float | None = None
    error: str | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the plain model."""
        return self.plain.median / self.timing.median if self.plain and self.timing else None


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and on what.

    Attributes:
        rows: in the order of measuring.
        best: the fastest arrangement within the bars, with the number of threads that suits it; None if none of them is
            faster than the plain model.
        compared_images: given images whose plain mask is not empty: those that an agreement is of.
        conditions: size, batch, repeats, steps, threads, bars, processor, versions.
    """

    rows: tuple[Row, ...]
    best: Row | None
    compared_images: int
    conditions: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) | {"ratio": row.ratio} for row in self.rows]
        best = self.best.name if self.best else None
        return {**self.conditions, "compared_images": self.compared_images, "best": best, "rows": rows}


def candidates(*, compiled: bool = False, compact: CompactChoice = "none") -> dict[str, Arrangement]:
    """The arrangements that this machine can compute in, by name; with ``compact``, those with light parts too."""
    found: dict[str, Arrangement] = {}
    packing, winograd = prepacking_is_available(), winograd_is_available()
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16") if multiplies_in_bf16() else ("fp32",)
    for dtype in dtypes:
        folded = Arrangement(dtype=dtype)
        found[f"{dtype}, folded"] = folded
        if packing:
            folded = found[f"{dtype}, folded, prepacked"] = replace(folded, prepacked=True)
        if winograd:
            channels = _WINOGRAD_CHANNELS[dtype]
            # NNPACK computes in the default memory format; in fp32 the whole model then keeps it.
            found[f"{dtype}, folded, Winograd"] = replace(
                folded, winograd_channels=channels, channels_last=dtype != "fp32"
            )
        if compiled:
            found[f"{dtype}, folded, compiled"] = Arrangement(dtype=dtype, compiled=True)
    if compact != "none":
        which = "compact" if compact == "both" else f"compact {compact}"
        found |= {f"{name}, {which}": replace(made, compact=compact) for name, made in found.items()}
    return found


def run_benchmark(
    model: str,
    *,
    images: Sequence[Path] = (),
    batch: int = 1,
    repeats: int = 5,
    num_inference_steps: int | None = None,
    timesteps: TimestepSpacing | None = None,
    compiled: bool = False,
    compact: CompactChoice = "none",
    max_error: float = 0.03,
    min_agreement: float = 0.999,
    arrangements: Mapping[str, Arrangement] | None = None,
    report: Callable[[Row], None] = lambda _: None,
) -> Benchmark:
    """Measure arrangements of a model, and choose the fastest within the bars.

    Args:
        model: a run or a pipeline folder.
        images: files whose masks are compared, and the first of which are timed; without them, synthetic images are.
        batch: images a call.
        repeats: timed calls of each, after one that is not timed.
        num_inference_steps, timesteps: default: the model's own.
        compiled: also try ``torch.compile``: minutes.
        compact: also try the light parts of ``leafseg compact``. Their latents are others, so that the bar for them is
            the agreement alone, and images are needed.
        max_error: bar on the latent's relative error.
        min_agreement: bar on the mean agreement of masks, where it could be measured.
        arrangements: instead of :func:`candidates`.
        report: called with each row as soon as it is measured.

    Raises:
        CheckpointError: if the model cannot be loaded.
        ConfigError: if a number is out of range, or compact parts are asked for without images.
        DataError: if an image cannot be read.
    """
    if min(batch, repeats) < 1:
        raise ConfigError(f"batch is {batch}, repeats {repeats}; both are at least 1")
    if compact != "none" and not images:
        raise ConfigError(
            "compact parts are judged by their masks, and no images are given; name a folder of them with --images"
        )
    steps: dict[str, Any] = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
    plain = LeafPipeline.from_pretrained(model)
    light = {"decoder": compact in ("decoder", "both"), "encoder": compact in ("encoder", "both")}
    for part, wanted in light.items():
        if wanted and getattr(plain, f"compact_{part}") is None:
            raise CheckpointError(
                f"{model}: has no compact {part}; `leafseg compact {model} --images DIR --out DIR` makes one"
            )
    read = [_read(plain, path) for path in images]
    inputs = _inputs(plain, read, batch)
    reference = _outputs(plain, inputs, steps)
    masks = [plain(image[None], **steps).mask for image in read]
    compared = sum(bool(mask.any()) for mask in masks)
    rows = []

    def measure(name: str, arrangement: Arrangement, other: LeafPipeline) -> Row:
        calls = {PLAIN: lambda: plain(inputs, **steps), name: lambda: other(inputs, **steps)}
        times = alternately(calls, repeats=repeats)
        latent, probability = _outputs(other, inputs, steps)
        agreement = _agreements(masks, [other(image[None], **steps).mask for image in read])
        return Row(
            name,
            arrangement,
            timing=Timing.of(times[name]),
            plain=Timing.of(times[PLAIN]),
            latent_error=_relative_error(latent, reference[0]),
            probability_error=_relative_error(probability, reference[1]),
            largest_error=float((probability - reference[1]).abs().max()),
            agreement=statistics.mean(agreement) if agreement else None,
            worst_agreement=min(agreement) if agreement else None,
        )

    chosen = candidates(compiled=compiled, compact=compact) if arrangements is None else arrangements
    for name, arrangement in chosen.items():
        try:
            folded = load_folded(model, arrangement, **steps)
            row = measure(name, arrangement, folded)
            del folded
        except (CheckpointError, RuntimeError, OSError) as error:
            row = Row(name, arrangement, error=(str(error) or type(error).__name__).splitlines()[0])
        gc.collect()
        rows.append(row)
        report(row)
    usable = [row for row in rows if (row.ratio or 0) > 1 and _within(row, max_error, min_agreement)]
    best = min(usable, key=lambda row: row.timing.median if row.timing else 0.0, default=None)
    if best is not None:
        folded = load_folded(model, best.arrangement, **steps)
        threads = fastest_threads(lambda: folded(inputs, **steps), repeats=repeats)
        if threads != torch.get_num_threads():
            best = replace(best, arrangement=replace(best.arrangement, threads=threads))
    conditions = {
        "size": list(plain.preprocessor.settings.size),
        "batch": batch,
        "repeats": repeats,
        "steps": num_inference_steps or int(plain.config["num_inference_steps"]),
        "threads": torch.get_num_threads(),
        "images": len(read) or "synthetic",
        "max_error": max_error,
        "min_agreement": min_agreement,
        "processor": processor(),
        "versions": library_versions(),
    }
    return Benchmark(tuple(rows), best, compared, conditions)


def alternately(calls: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call: a round of them is made ``repeats`` times, after ``warm_up`` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def fastest_threads(call: Callable[[], Any], *, repeats: int) -> int:
    """Of torch's own number of threads, half of it, and one for each core: which is fastest, if by more than 3 %."""
    usual = torch.get_num_threads()

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        call()

    counts = {usual, max(1, usual // 2), int(processor()["cores"])}
    try:
        seconds = alternately({str(count): partial(with_threads, count) for count in counts}, repeats=repeats)
    finally:
        torch.set_num_threads(usual)
    medians = {count: statistics.median(seconds[str(count)]) for count in counts}
    best = min(counts, key=lambda count: medians[count])
    return best if medians[best] < 0.97 * medians[usual] else usual


def images_of(folder: Path, *, limit: int = 50) -> list[Path]:
    """Evenly spaced image files of a folder (``images/`` below a data folder).

    Raises:
        DataError: if it holds none.
    """
    inside = folder / "images" if (folder / "images").is_dir() else folder
    files = sorted(path for path in inside.iterdir() if image_suffix(path) is not None) if inside.is_dir() else []
    if not files:
        raise DataError(f"{inside}: no images in this folder; name one with images to compare masks on")
    return [files[index * len(files) // limit] for index in range(limit)] if len(files) > limit else files


def synthetic_images(size: tuple[int, int], batch: int) -> Tensor:
    """Bright discs on noise, ``[B, 3, h, w]`` in 0..1."""
    height, width = size
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    images = []
    for index in range(batch):
        noise = torch.from_numpy(rng.normal(0, "benchmark-images", index, (3, height, width)))
        disc = (x - 0.1 * (index % 5)) ** 2 + y**2 < 0.25
        images.append((0.3 + 0.1 * noise + 0.4 * disc).clamp(0, 1))
    return torch.stack(images)


def _read(pipeline: LeafPipeline, path: Path) -> Tensor:
    """An image, or the middle frame of a volume or a file of several."""
    frames = count_frames(path, reading=pipeline.preprocessor.reading)
    return pipeline.preprocessor.read(path, None if frames is None else frames // 2)


def _inputs(pipeline: LeafPipeline, read: Sequence[Tensor], batch: int) -> Tensor:
    """The timed batch, at the network's own size."""
    size = pipeline.preprocessor.settings.size
    if not read:
        return synthetic_images(size, batch)
    given = [F.interpolate(image[None], size, mode="bilinear", antialias=True) for image in read[:batch]]
    return torch.cat([given[index % len(given)] for index in range(batch)]).clamp(0, 1)


@torch.no_grad()
def _outputs(pipeline: LeafPipeline, inputs: Tensor, steps: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mask latent and probability of a batch at the network's size, in fp32; the noise is the same for all."""
    visited = pipeline.visited_timesteps(steps["num_inference_steps"], steps["timesteps"])
    shape = pipeline.latent_shape((inputs.shape[-2], inputs.shape[-1]))
    noise = torch.from_numpy(rng.normal(0, "benchmark-noise", 0, (len(inputs), *shape)))
    if pipeline.config["noise"] == "zeros":
        noise.zero_()
    latent = pipeline.mask_latent(inputs, noise, visited=visited, encoder=pipeline.encoder)
    return latent, pipeline.probability_of(latent, pipeline.decoder)


def _agreements(masks: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """Mean Dice over the classes of each image that the plain model finds in it; images without any are left out."""
    found = (dice_and_iou(other, mask)[0] for mask, other in zip(masks, others, strict=True))
    return [float(dice.nanmean()) for dice in found if not dice.isnan().all()]


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-12))


def _within(row: Row, max_error: float, min_agreement: float) -> bool:
    if row.arrangement.compact != "none":
        return row.agreement is not None and row.agreement >= min_agreement
    if row.latent_error is None or not row.latent_error <= max_error:  # NaN is outside too
        return False
    return row.agreement is None or row.agreement >= min_agreement
