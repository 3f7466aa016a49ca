"""Bootstrap confidence intervals: over images, or over the groups (patients, volumes) that images come in."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg import rng

_RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    The bounds are None where fewer than two values, or groups, leave nothing to resample. ``groups`` is None where
    images were resampled.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    groups: int | None = None


def bootstrap_mean(
    values: Sequence[float], *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Interval | None:
    """Percentile bootstrap of the mean (9,999 resamples, 95 %); None for no values.

    Args:
        values: one an image.
        groups: the group of each value. Whole groups are then drawn anew, each with all its images (a cluster
            bootstrap), since images of one patient resemble each other; the mean stays one over images. With groups of
            one image each, this is the bootstrap over images.
        seed: of the resampling.

    Raises:
        ValueError: if there are not as many groups as values.
    """
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=np.float64)
    if groups is not None and len(groups) != len(data):
        raise ValueError(f"{len(groups)} groups are given for {len(data)} values; each value needs one")
    if not len(data):
        return None
    mean = float(data.mean())
    if groups is None:
        sums: NDArray[Any] = data
        counts: NDArray[Any] = np.ones(len(data))
    else:
        numbers = {group: index for index, group in enumerate(dict.fromkeys(groups))}
        members = [numbers[group] for group in groups]
        sums = np.bincount(members, weights=data)
        counts = np.bincount(members)
    known = None if groups is None else len(sums)
    if len(sums) < 2:
        return Interval(mean, None, None, len(data), known)
    result = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,  # a group's images come along with it
        vectorized=True,
        confidence_level=0.95,
        n_resamples=_RESAMPLES,
        method="percentile",
        batch=1000,
        rng=rng.generator(seed, "bootstrap"),
    ).confidence_interval
    return Interval(mean, float(result.low), float(result.high), len(data), known)


def bootstrap_seeds_and_images(values: NDArray[np.float64], *, seed: int = 0) -> Interval | None:
    """Percentile bootstrap of the mean of ``values`` ``[seeds, images]``: seeds and images are both drawn anew.

    With few seeds the interval knows little of the training's own spread: two seeds give three different means at
    most. ``n`` is the number of images.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 2:
        raise ValueError(f"values are {list(data.shape)}; they must be [seeds, images]")
    seeds, images = data.shape
    if not data.size:
        return None
    mean = float(data.mean())
    if images < 2:
        return Interval(mean, None, None, images)
    draws = rng.generator(seed, "bootstrap-seeds-and-images")
    means = np.empty(_RESAMPLES)
    for start in range(0, _RESAMPLES, 1000):
        count = min(1000, _RESAMPLES - start)
        drawn_images = draws.multinomial(images, np.full(images, 1 / images), size=count)  # [R, images]
        drawn_seeds = draws.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)  # [R, seeds]
        means[start : start + count] = ((drawn_images @ data.T) * drawn_seeds).sum(1) / (images * seeds)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(mean, float(low), float(high), images)
