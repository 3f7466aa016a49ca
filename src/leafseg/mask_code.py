"""How labels become pictures that an autoencoder can carry, and how decoded pictures become probabilities.

A code draws the labels of one image as ``num_pictures`` RGB pictures in -1..1. The autoencoder encodes each picture by
itself, and their latents are stacked along the channels: a code with two pictures and four latent channels makes an
eight-channel mask latent. Everything else (U-Net channels, pipeline, evaluation) follows from the code's attributes, so
that a new code needs no change elsewhere: subclass, ``register_mask_code``, name it in ``model.mask_code``.

All codes here draw black-and-white pictures, of soft labels with grey outlines: the shipped autoencoder was trained on
such masks, and carries classes that are drawn as colours badly or not at all (docs/results/mask_codes.md).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from leafseg.data.manifest import IGNORE
from leafseg.errors import ConfigError

AUTO = "auto"
PICTURE_CHANNELS = 3
# Steepness of the softmax and sigmoid over decoded pictures: what was decoded exactly (+-1) has a probability of 0.98,
# whatever the number of classes.
_SURE = 4.0


class MaskCode(ABC):
    """One way to write labels as pictures.

    Attributes:
        name: the registered name, stored in models.
        n_channels: channels of the coded labels, ``3 * num_pictures``.
        num_pictures: RGB pictures a mask takes.
        n_outputs: C of logits and probabilities; 1 for binary (the foreground), else classes with the background, or
            the number of overlapping labels.
        exclusive: True if a pixel has exactly one label; False for overlapping labels.
        grey: whether only the mean of each picture's three channels is read, so that a compact decoder, which draws in
            grey, can stand in for the autoencoder's.
    """

    name: ClassVar[str]
    num_pictures: int = 1
    exclusive: bool = True
    grey: ClassVar[bool] = False

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
        """Pictures ``[B, n_channels, H, W]`` in -1..1.

        Args:
            labels: ids ``[B, H, W]``; overlapping: bool ``[B, C, H, W]``; or of any code the share of each pixel that
                an output covers, float ``[B, n_outputs, H, W]`` in 0..1, whose pictures are grey at outlines.
        """

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


def make_mask_code(name: str, label_names: tuple[str, ...], *, overlapping: bool | None = None) -> MaskCode:
    """The registered code ``name`` for these labels.

    Args:
        name: of a registered code; ``auto`` takes ``overlapping`` for overlapping labels, ``binary`` for two classes
            and ``planes`` for more. The code's own ``name`` is the resolved one.
        label_names: one a class, background first; for overlapping labels one a label.
        overlapping: whether a pixel may have several labels; None trusts the name, which then must not be ``auto``.

    Raises:
        ConfigError: for an unknown name, or labels that the code cannot write.
    """
    if name == AUTO and overlapping is not None:
        name = "overlapping" if overlapping else "binary" if len(label_names) == 2 else "planes"
    if name not in _CODES:
        raise ConfigError(f"model.mask_code is {name!r}; known are {', '.join(sorted(_CODES))}")
    code = _CODES[name](label_names)
    if overlapping is not None and overlapping == code.exclusive:
        kinds = ("exclude each other", "overlap")
        raise ConfigError(
            f"model.mask_code is {name!r}, which is for labels that {kinds[not code.exclusive]}, and those of the data "
            f"{kinds[overlapping]}; leave it at {AUTO!r}"
        )
    return code


def foreground(labels: Tensor) -> Tensor:
    """Binary labels ``[B, H, W]`` int64: where ``[B, H, W]``, or overlapping ``[B, C, H, W]``, holds any label."""
    return (labels.any(1) if labels.ndim == 4 else (labels > 0) & (labels != IGNORE)).long()


def _grey_pictures(planes: Tensor) -> Tensor:
    """One grey picture a plane: 0..1 in ``[B, P, H, W]`` to -1..1 in ``[B, 3 P, H, W]``."""
    return (planes.float() * 2 - 1).repeat_interleave(PICTURE_CHANNELS, 1)


def _grey_values(decoded: Tensor) -> Tensor:
    """The mean of each picture's three channels, ``[B, P, H, W]``."""
    return decoded.unflatten(1, (-1, PICTURE_CHANNELS)).mean(2)


class _IndependentCode(MaskCode):
    """A black-and-white picture an output, each present or not whatever the others are."""

    grey = True

    def logits(self, decoded: Tensor) -> Tensor:
        return _SURE * _grey_values(decoded)

    def probability(self, decoded: Tensor) -> Tensor:
        return _grey_values((decoded.clamp(-1, 1) + 1) / 2)

    def mask(self, probability: Tensor) -> Tensor:
        return probability > 0.5


@register_mask_code("binary")
class BinaryMaskCode(_IndependentCode):
    """LEAF's own code: the foreground as a white-on-black picture with three equal channels."""

    def __init__(self, label_names: tuple[str, ...] = ("background", "foreground")) -> None:
        if len(label_names) != 2:
            raise ConfigError(
                f"the masks hold {len(label_names)} classes ({', '.join(label_names)}); the binary mask code writes "
                "two: choose the foreground, for example --set data.foreground_labels=[1], or leave model.mask_code at "
                f"{AUTO!r}"
            )
        super().__init__(label_names)

    @property
    def n_outputs(self) -> int:
        return 1

    def encode(self, labels: Tensor) -> Tensor:
        return _grey_pictures(labels if labels.is_floating_point() else (labels > 0)[:, None])

    def labels(self, probability: Tensor) -> Tensor:
        return (probability[:, 0] > 0.5).to(torch.int64)


@register_mask_code("overlapping")
class OverlappingMaskCode(_IndependentCode):
    """Overlapping labels: a picture each, as LEAF draws its one foreground."""

    exclusive = False

    def __init__(self, label_names: tuple[str, ...]) -> None:
        super().__init__(label_names)
        self.num_pictures = len(label_names)

    @property
    def n_outputs(self) -> int:
        return len(self.label_names)

    def encode(self, labels: Tensor) -> Tensor:
        return _grey_pictures(labels)

    def labels(self, probability: Tensor) -> None:
        return None


class _ExclusiveCode(MaskCode):
    """More than two classes of which every pixel has one: probabilities are a softmax."""

    grey = True

    def __init__(self, label_names: tuple[str, ...]) -> None:
        if len(label_names) < 2:
            raise ConfigError(f"the labels are {', '.join(label_names) or 'none'}; a mask has a background and a class")
        super().__init__(label_names)

    @property
    def n_outputs(self) -> int:
        return len(self.label_names)

    def probability(self, decoded: Tensor) -> Tensor:
        return self.logits(decoded).softmax(1)

    def labels(self, probability: Tensor) -> Tensor:
        return probability.max(1).indices  # argmax over a dimension in the middle takes nine times as long

    def mask(self, probability: Tensor) -> Tensor:
        classes = torch.arange(self.n_outputs, device=probability.device)
        return self.labels(probability)[:, None] == classes[:, None, None]


@register_mask_code("planes")
class PlanesMaskCode(_ExclusiveCode):
    """Each class but the background as a black-and-white picture; the background is what they leave over.

    So a blurred border between two classes is split among them, and no line of background lies in between.
    """

    def __init__(self, label_names: tuple[str, ...]) -> None:
        super().__init__(label_names)
        self.num_pictures = len(label_names) - 1

    def encode(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point():
            return _grey_pictures(labels[:, 1:])
        classes = torch.arange(1, self.n_outputs, device=labels.device)
        return _grey_pictures(labels[:, None] == classes[:, None, None])

    def logits(self, decoded: Tensor) -> Tensor:
        share = (_grey_values(decoded) + 1) / 2
        shares = torch.cat([1 - share.sum(1, keepdim=True), share], 1)  # [B, C, H, W], 0 or 1 if decoded exactly
        return shares * (_SURE + math.log(self.n_outputs - 1))


@register_mask_code("bits")
class BitsMaskCode(_ExclusiveCode):
    """The bits of the class id as black-and-white pictures: 3 for 8 classes, 5 for 32.

    Source: Analog Bits (arXiv 2208.04202). Cheaper than ``planes`` from four classes on, and a little less exact:
    between two classes that differ in several bits, a blurred border passes through others.
    """

    def __init__(self, label_names: tuple[str, ...]) -> None:
        super().__init__(label_names)
        self.num_pictures = (len(label_names) - 1).bit_length()

    def _bits(self, labels: Tensor) -> Tensor:
        """Bits of class ids as a new last dimension, least first."""
        return labels[..., None] >> torch.arange(self.num_pictures, device=labels.device) & 1

    def encode(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point():
            bits = self._bits(torch.arange(self.n_outputs, device=labels.device)).to(labels.dtype)  # [C, P]
            return _grey_pictures(torch.einsum("cp,bchw->bphw", bits, labels))
        return _grey_pictures(self._bits(labels).movedim(-1, 1))

    def logits(self, decoded: Tensor) -> Tensor:
        signs = self._bits(torch.arange(self.n_outputs, device=decoded.device)).to(decoded.dtype) * 2 - 1  # [C, P]
        agreement = torch.einsum("cp,bphw->bchw", signs, _grey_values(decoded))
        return agreement * (_SURE + math.log(self.num_pictures)) / 2
