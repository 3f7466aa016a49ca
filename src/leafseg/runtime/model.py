"""An exported model: pixels in, probability and labels out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafseg.data.pixels import PixelPreprocessor, draw_noise, noise_position
from leafseg.presence import without_absent
from leafseg.runtime.backends import Graph, open_graph
from leafseg.runtime.folder import ExportedFolder, StoredPreprocessing, read_folder

Noise = Literal["gaussian", "zeros"]


class Result(NamedTuple):
    """One image's result on its own grid.

    Attributes:
        probability: float32 ``[C, H, W]`` in 0..1; C = 1 (foreground) for binary models.
        labels: uint8 ``[H, W]``, class ids; None for overlapping labels.
        mask: bool ``[C, H, W]``, where each channel is present. A label that is nowhere as sure as its threshold is
            not drawn, see :mod:`leafseg.presence`.
        spread: float32 ``[C, H, W]``, the standard deviation over noise draws; None for one draw.
    """

    probability: NDArray[np.float32]
    labels: NDArray[np.uint8] | None
    mask: NDArray[np.bool_]
    spread: NDArray[np.float32] | None


class Runtime:
    """An exported folder, loaded; see :func:`load`.

    The result is that of :class:`leafseg.LeafPipeline`: preprocessing is the same code, noise is keyed by the same
    content, and the graph computes what the modules compute, up to rounding.

    Attributes:
        presence: thresholds of the foreground labels; an empty tuple draws them by the usual rule.
    """

    def __init__(self, folder: ExportedFolder, graph: Graph) -> None:
        self.folder = folder
        self.preprocessor = PixelPreprocessor(folder.preprocessing)
        self.presence = folder.presence
        self._graph = graph

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.folder.label_names

    @property
    def overlapping(self) -> bool:
        return self.folder.overlapping

    @property
    def preprocessing(self) -> StoredPreprocessing:
        return self.folder.preprocessing

    def read(self, path: Path, frame: int | None = None) -> NDArray[np.float32]:
        """An image file as float32 ``[3, H, W]`` in 0..1, see :meth:`PixelPreprocessor.read`; ``segment`` takes it.

        Raises:
            DataError: if it cannot be read.
        """
        return self.preprocessor.read(path, frame)

    def __call__(self, pixels: NDArray[Any], *, noise: Noise | None = None, num_samples: int = 1) -> Result:
        """Segment one image.

        Args:
            pixels: ``[H, W]`` or ``[H, W, 3]`` in the image's own integer or float type.
            noise: ``"gaussian"``, keyed by the image's content, or ``"zeros"``; default: the model's own.
            num_samples: noise draws; their probabilities are averaged.

        Raises:
            DataError: for another shape or type of pixels.
            ValueError: for an argument out of range.
        """
        return self.segment(self.preprocessor.intensity_to_unit(pixels), noise=noise, num_samples=num_samples)

    def segment(
        self,
        unit: NDArray[np.float32],
        *,
        noise: Noise | None = None,
        num_samples: int = 1,
    ) -> Result:
        """``__call__`` for an image ``[3, H, W]`` in 0..1, as ``read`` gives it."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        if noise not in (None, "gaussian", "zeros"):
            raise ValueError(f"noise is {noise!r}; known are gaussian, zeros")
        placed, placement = self.preprocessor.place(unit)
        latent = self.draw_noise(placed, noise=noise, num_samples=num_samples)
        draws = np.stack(
            [
                np.clip(self.preprocessor.restore(self.run(placed[None], one[None])[0], placement), 0, 1)
                for one in latent
            ]
        )  # [S, C, H, W]
        probability = draws.mean(0)
        spread = draws.std(0) if num_samples > 1 else None
        return self._labelled(probability, spread)

    def draw_noise(
        self, placed: NDArray[np.float32], *, noise: Noise | None = None, num_samples: int = 1
    ) -> NDArray[np.float32]:
        """Starting noise ``[S, z, h/s, w/s]`` (latent stride s) of a network input ``[3, h, w]``."""
        stride = self.folder.latent_stride
        shape = (self.folder.latent_channels, placed.shape[1] // stride, placed.shape[2] // stride)
        if (noise or self.folder.noise) == "zeros":
            return np.zeros((num_samples, *shape), np.float32)
        return draw_noise(noise_position(placed), shape, seed=self.folder.noise_seed, num_samples=num_samples)

    def run(self, images: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """The graph itself.

        Args:
            images: float32 ``[B, 3, h, w]`` in 0..1; any batch, and any h and w that are multiples of the stride.
            noise: float32 ``[B, z, h/s, w/s]`` with the latent stride s.

        Returns:
            Probability, float32 ``[B, C, h, w]``.
        """
        return self._graph(images, noise)

    def _labelled(self, probability: NDArray[np.float32], spread: NDArray[np.float32] | None) -> Result:
        """The rules of the mask codes (:mod:`leafseg.mask_code`)."""
        drawn = without_absent(probability, self.presence)
        if self.overlapping or len(probability) == 1:
            mask = drawn > 0.5
            return Result(probability, None if self.overlapping else mask[0].astype(np.uint8), mask, spread)
        labels = drawn.argmax(0).astype(np.uint8)
        return Result(probability, labels, labels[None] == np.arange(len(probability))[:, None, None], spread)


def load(folder: str | Path, *, threads: int | None = None) -> Runtime:
    """An exported folder, ready to segment.

    Args:
        folder: what ``leafseg export`` wrote.
        threads: that the back end may use; default: all cores.

    Raises:
        CheckpointError: if it is no exported folder, or damaged.
        MissingExtraError: if its back end is not installed.
    """
    read = read_folder(Path(folder))
    return Runtime(read, open_graph(read.backend, read.graph, precision=read.precision, threads=threads))
