"""Bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leafseg import rng

_RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; the bounds are None where fewer than two values leave nothing to resample."""

    mean: float
    low: float | None
    high: float | None
    n: int


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Interval | None:
    """Percentile bootstrap of the mean over images (9,999 resamples, 95 %); None for no values."""
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return None
    mean = float(data.mean())
    if len(data) < 2:
        return Interval(mean, None, None, len(data))
    result = bootstrap(
        (data,),
        np.mean,
        confidence_level=0.95,
        n_resamples=_RESAMPLES,
        method="percentile",
        batch=1000,
        rng=rng.generator(seed, "bootstrap"),
    ).confidence_interval
    return Interval(mean, float(result.low), float(result.high), len(data))


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
