"""How labels become pictures that an autoencoder can carry, and how decoded pictures become probabilities.

A code draws the labels of one image as ``num_pictures`` RGB pictures in -1..1. The autoencoder encodes each picture by
itself, and their latents are stacked along the channels: a code with two pictures and four latent channels makes an
eight-channel mask latent. Everything else (U-Net channels, pipeline, evaluation) follows from the code's attributes, so
that a new code needs no change elsewhere: subclass, ``register_mask_code``, name it in ``model.mask_code``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from leafseg.errors import ConfigError

PICTURE_CHANNELS = 3


class MaskCode(ABC):
    """One way to write labels as pictures.

    Attributes:
        name: the registered name, stored in models.
        n_channels: channels of the coded labels, ``3 * num_pictures``.
        num_pictures: RGB pictures a mask takes.
        n_outputs: C of logits and probabilities; 1 for binary (the foreground), else classes with the background, or
            the number of overlapping labels.
        exclusive: True if a pixel has exactly one label; False for overlapping labels.
    """

    name: ClassVar[str]
    num_pictures: int = 1
    exclusive: bool = True

    def __init__(self, label_names: tuple[str, ...]) -> None:
        self.label_names = label_names

    @property
    def n_channels(self) -> int:
        return PICTURE_CHANNELS * self.num_pictures

    @property
    @abstractmethod
    def n_outputs(self) -> int:
        """C of logits, probabilities and masks."""

    @abstractmethod
    def encode(self, labels: Tensor) -> Tensor:
        """Pictures ``[B, n_channels, H, W]`` in -1..1 of labels ``[B, H, W]`` (overlapping: bool ``[B, C, H, W]``)."""

    @abstractmethod
    def logits(self, decoded: Tensor) -> Tensor:
        """Scores ``[B, C, H, W]`` of decoded pictures ``[B, n_channels, H, W]``; differentiable everywhere."""

    @abstractmethod
    def probability(self, decoded: Tensor) -> Tensor:
        """Probabilities ``[B, C, H, W]`` in 0..1 of decoded pictures ``[B, n_channels, H, W]``."""

    @abstractmethod
    def labels(self, probability: Tensor) -> Tensor | None:
        """Labels ``[B, H, W]`` int64 of probabilities; None for overlapping labels."""

    @abstractmethod
    def mask(self, probability: Tensor) -> Tensor:
        """Bool ``[B, C, H, W]``: where each output channel is present."""


_CODES: dict[str, type[MaskCode]] = {}
_Code = TypeVar("_Code", bound=type[MaskCode])


def register_mask_code(name: str) -> Callable[[_Code], _Code]:
    """Class decorator that makes a code available under ``name``."""

    def register(code: _Code) -> _Code:
        code.name = name
        _CODES[name] = code
        return code

    return register


def make_mask_code(name: str, label_names: tuple[str, ...]) -> MaskCode:
    """The registered code ``name`` for these labels.

    Raises:
        ConfigError: for an unknown name, or labels that the code cannot write.
    """
    if name not in _CODES:
        raise ConfigError(f"model.mask_code is {name!r}; known are {', '.join(sorted(_CODES))}")
    return _CODES[name](label_names)


@register_mask_code("binary")
class BinaryMaskCode(MaskCode):
    """LEAF's own code: the foreground as a white-on-black picture with three equal channels."""

    # Steepness of the sigmoid that the pixel loss sees: a decoded +-1 means a probability of 0.98.
    _LOGIT_SCALE = 4.0

    def __init__(self, label_names: tuple[str, ...] = ("background", "foreground")) -> None:
        if len(label_names) != 2:
            raise ConfigError(
                f"the masks hold {len(label_names)} classes ({', '.join(label_names)}); the binary mask code writes "
                "two: choose the foreground, for example --set data.foreground_labels=[1]"
            )
        super().__init__(label_names)

    @property
    def n_outputs(self) -> int:
        return 1

    def encode(self, labels: Tensor) -> Tensor:
        picture = (labels > 0).float() * 2 - 1
        return picture[:, None].expand(-1, PICTURE_CHANNELS, -1, -1)

    def logits(self, decoded: Tensor) -> Tensor:
        return self._LOGIT_SCALE * decoded.mean(1, keepdim=True)

    def probability(self, decoded: Tensor) -> Tensor:
        return ((decoded.clamp(-1, 1) + 1) / 2).mean(1, keepdim=True)

    def labels(self, probability: Tensor) -> Tensor:
        return (probability[:, 0] > 0.5).to(torch.int64)

    def mask(self, probability: Tensor) -> Tensor:
        return probability > 0.5
