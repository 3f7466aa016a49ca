"""Bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
