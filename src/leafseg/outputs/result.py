"""The labels of one input on its own grid, in the form that every writer takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Labelled:
    """Labels of one image, of the pages of one file, or of one volume as it is stored.

    Attributes:
        names: of the labels, without the background; label ``i`` has the number ``i + 1``.
        overlapping: whether a pixel may have several labels.
        planes: one array a frame. Exclusive labels: uint8 ``[1, H, W]`` of label numbers, 0 is the background.
            Overlapping ones: uint8 ``[L, H, W]`` of 0 and 1. A volume's frames have one size, a TIFF's pages need not.
        probability: float32 ``[L, H, W]`` in 0..1 a frame, without the background; None if it was not kept.
        numbered: whether the file holds frames that have to be told apart: a volume or several pages.
    """

    names: tuple[str, ...]
    overlapping: bool
    planes: list[NDArray[np.uint8]]
    probability: list[NDArray[np.float32]] | None = None
    numbered: bool = False

    def mask(self, frame: int, label: int) -> NDArray[np.bool_]:
        """Bool ``[H, W]``: where label ``label`` (from 0) is in a frame."""
        planes = self.planes[frame]
        return planes[label] == 1 if self.overlapping else planes[0] == label + 1

    def pixel_counts(self) -> dict[str, int]:
        """How many pixels (voxels) each label has."""
        return {
            name: sum(int(np.count_nonzero(self.mask(frame, index))) for frame in range(len(self.planes)))
            for index, name in enumerate(self.names)
        }

    def maps(self) -> dict[str, list[NDArray[np.uint8]]]:
        """What becomes one file each: the name's ending and ``[H, W]`` a frame.

        Exclusive labels make one map of label numbers; overlapping ones a map of 0 and 1 each.
        """
        endings = [f"_{label}" for label in file_labels(self.names)] if self.overlapping else [""]
        return {ending: [planes[index] for planes in self.planes] for index, ending in enumerate(endings)}

    def probability_maps(self) -> dict[str, list[NDArray[np.float32]]]:
        """The name's ending and the probability ``[H, W]`` a frame, for each label; empty if none was kept."""
        if self.probability is None:
            return {}
        one = len(self.names) == 1 and not self.overlapping
        endings = ["_probability"] if one else [f"_probability_{label}" for label in file_labels(self.names)]
        return {ending: [maps[index] for maps in self.probability] for index, ending in enumerate(endings)}


def file_labels(names: Sequence[str]) -> list[str]:
    """Labels' names as parts of file names: what is no letter, digit, dot, underscore or minus becomes a minus.

    If two become one, or differ in capitals alone, which some disks do not tell apart, all are numbered from 1.
    """
    labels = [re.sub(r"[^\w.-]+", "-", name) for name in names]
    if len({label.casefold() for label in labels}) < len(labels):
        labels = [f"{number}-{label}" for number, label in enumerate(labels, start=1)]
    return labels
