"""Calibration of a foreground probability: of the pixels given p, is a share of p foreground?

The bins are MONAI's. They are kept as sums, so that pixels of images of any size can be pooled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BINS = 15  # as in Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017)

# MONAI adds pixels up in float32, which stops counting at 2**24: runs of pixels are binned, their sums kept in float64.
_RUN = 2**16


@dataclass(frozen=True, eq=False)
class Reliability:
    """Sums over pixels, for equally wide bins of the probability in 0..1; float64 ``[bins]`` each.

    Attributes:
        counts: pixels.
        probability: sum of their probabilities.
        foreground: how many of them are foreground in truth.
    """

    counts: NDArray[np.float64]
    probability: NDArray[np.float64]
    foreground: NDArray[np.float64]

    @property
    def gap(self) -> NDArray[np.float64]:
        """Mean probability minus share of foreground, ``[bins]``; NaN in empty bins. Above 0 is overconfidence."""
        return _divide(self.probability - self.foreground, self.counts)

    @property
    def expected_error(self) -> float:
        """ECE in 0..1: the mean size of the gap over pixels; NaN without pixels."""
        pixels = self.counts.sum()
        return float(np.abs(self.probability - self.foreground).sum() / pixels) if pixels else float("nan")

    @property
    def average_error(self) -> float:
        """ACE in 0..1: the mean size of the gap over bins that hold pixels; NaN without pixels."""
        filled = self.counts > 0
        return float(np.abs(self.gap[filled]).mean()) if filled.any() else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """For JSON: errors, and a row for each bin with its count, mean probability and share of foreground."""
        rows = zip(
            self.counts, _divide(self.probability, self.counts), _divide(self.foreground, self.counts), strict=True
        )
        return {
            "ece": self.expected_error,
            "ace": self.average_error,
            "bins": [
                {"count": int(n), "probability": float(p) if n else None, "foreground": float(f) if n else None}
                for n, p, f in rows
            ],
        }


def reliability(probability: Tensor, truth: Tensor, *, bins: int = BINS) -> Reliability:
    """Bin pixels by their probability.

    Args:
        probability: of the foreground, floating point of any shape, in 0..1.
        truth: bool, of the same shape.
        bins: how many equally wide ones.

    Raises:
        ValueError: if the shapes differ.
    """
    from monai.metrics import calibration_binning

    if probability.shape != truth.shape:
        raise ValueError(f"probability is {list(probability.shape)}, truth is {list(truth.shape)}; they must be equal")
    total = np.zeros((3, bins))
    for p, t in zip(probability.flatten().split(_RUN), truth.flatten().split(_RUN), strict=True):
        means_p, means_t, counts = (
            part.numpy().astype(np.float64)[0, 0]
            for part in calibration_binning(p[None, None].float(), t[None, None].float(), num_bins=bins)
        )
        filled = counts > 0
        total[:, filled] += np.stack([counts, means_p * counts, means_t * counts])[:, filled]
    return Reliability(total[0], total[1], total[2])


def pooled(parts: Iterable[Reliability]) -> Reliability:
    """All pixels of several ones together; at least one must be given."""
    stacked = [np.stack([part.counts, part.probability, part.foreground]) for part in parts]
    total = np.sum(stacked, axis=0)
    return Reliability(total[0], total[1], total[2])


def _divide(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
