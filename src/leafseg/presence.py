"""Whether a label is in an image at all: a model that is nowhere sure of it should not draw it.

Above one half somewhere is little evidence: on images with nothing to find, networks hedge, and the mean of "nothing"
and a guessed outline passes one half in places. Of most real objects they are nearly certain, at least at their middle.
So each label may get a threshold for its highest probability in the image, chosen on the validation part from figures
that a validation computes anyway; it hides some objects too (docs/presence.md). NumPy alone, since exported models obey
it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-6  # of a sum of Dice: one image is one image
_LEAST = 3  # images with and without a label, before anything is concluded
_CANDIDATES = tuple(round(0.55 + 0.05 * step, 2) for step in range(9))  # 0.55 to 0.95


def checked(presence: Sequence[Any], labels: int) -> tuple[float, ...]:
    """The thresholds, if they are none, or one in 0..1 for each of so many foreground labels.

    Raises:
        ValueError: if they are not.
    """
    numbers = all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t <= 1 for t in presence)
    if len(presence) not in (0, labels) or not numbers:
        raise ValueError(f"presence is {list(presence)}; it must be {labels} numbers in 0..1, one a label")
    return tuple(float(threshold) for threshold in presence)


def without_absent(probability: NDArray[np.float32], presence: Sequence[float]) -> NDArray[np.float32]:
    """The probabilities that labels are drawn from, without the labels that stay below their threshold in an image.

    Where such a label would have been drawn, there is then none: the background, not the next likely class.

    Args:
        probability: ``[..., C, H, W]`` in 0..1 of whole images.
        presence: a threshold for each of the last channels, the foreground labels; none: nothing changes. A channel
            more is the background of classes that exclude each other.

    Returns:
        The same array if nothing is absent, else a copy.
    """
    if not any(presence):
        return probability
    first = probability.shape[-3] - len(presence)
    absent = probability[..., first:, :, :].max((-2, -1)) < np.asarray(presence, np.float32)
    if not absent.any():
        return probability
    drawn = probability.copy()
    if first == 0:
        drawn[absent] = 0.0
        return drawn
    # Not the absent class alone: what it would have covered belongs to no other.
    nowhere = np.concatenate([np.zeros_like(absent[..., :1]), absent], -1)  # [..., C]
    of_absent = np.take_along_axis(nowhere[..., None, None], probability.argmax(-3)[..., None, :, :], -3)
    drawn[..., 1:, :, :][np.broadcast_to(of_absent, drawn[..., 1:, :, :].shape)] = 0.0
    return drawn


def tuned_presence(rows: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Thresholds, one a label in the order of the rows, that serve the validation part; none if none helps.

    Served is the score that also chooses checkpoints: the sum over images of the Dice, where an empty truth counts 1 if
    nothing is drawn. Of the candidates, no threshold among them, the least is taken that is less than one image short
    of the best: some dozens of images tell no finer differences, and a threshold that is too high hides objects. A
    label with fewer than three images without it, or with it, keeps 0: they say too little of what absence looks like.

    Args:
        rows: ``label``, ``empty``, ``dice``, ``predicted_pixels`` and ``peak`` (the highest probability) of each image
            and label, made without any threshold.
    """
    found = tuple(
        _threshold([row for row in rows if row["label"] == label]) for label in dict.fromkeys(r["label"] for r in rows)
    )
    return found if any(found) else ()


def _threshold(rows: Sequence[Mapping[str, Any]]) -> float:
    empty = np.array([row["empty"] for row in rows], bool)
    if min(empty.sum(), (~empty).sum()) < _LEAST:
        return 0.0
    peaks = np.array([row["peak"] for row in rows], np.float32)
    drawn = np.array([float(row["predicted_pixels"] == 0) if row["empty"] else row["dice"] for row in rows])

    def score(threshold: float) -> float:
        return float(np.where(peaks < np.float32(threshold), empty.astype(float), drawn).sum())

    scores = {threshold: score(threshold) for threshold in (0.0, *_CANDIDATES)}
    return next(threshold for threshold, reached in scores.items() if reached > max(scores.values()) - 1.0 + _ROUNDING)
