"""Plain segmentation networks (MONAI's) as models: what LEAF is compared with, on the same images and grid.

A baseline's folder holds ``baseline.json`` (network, preprocessing, labels) and its weights as safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leafseg.config import BaselineSettings, PreprocessingSettings, WeightsDtype
from leafseg.data.transforms import Preprocessor
from leafseg.errors import CheckpointError, ConfigError
from leafseg.files import read_json, write_json_atomic
from leafseg.model_folder import converted_weights
from leafseg.predict import Precision, Segmentation, autocast_of, execution_device, labelled
from leafseg.presence import checked
from leafseg.runs import BASELINE_FILE, resolve_model

FORMAT_VERSION = 2  # the newest that is read; without presence thresholds a folder is written as 1
WEIGHTS_FILE = "model.safetensors"


def build_network(settings: BaselineSettings, *, out_channels: int) -> nn.Module:
    """A MONAI network for images ``[B, 3, H, W]`` in -1..1 to logits ``[B, out_channels, H, W]``.

    Raises:
        ConfigError: if MONAI refuses the layout.
    """
    from monai.networks.nets import BasicUNet, DynUNet, SegResNet

    common: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "out_channels": out_channels}
    channels = settings.channels
    try:
        if settings.network == "basic_unet":
            network = BasicUNet(**common, features=channels, dropout=settings.dropout)
        elif settings.network == "dyn_unet":
            strides = [1] + [2] * (len(channels) - 1)
            network = DynUNet(
                **common,
                kernel_size=[3] * len(channels),
                strides=strides,
                upsample_kernel_size=strides[1:],
                filters=channels,
                norm_name="instance",
                dropout=settings.dropout or None,
            )
        else:
            network = SegResNet(**common, init_filters=channels[0], dropout_prob=settings.dropout or None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.baseline cannot be built ({str(error).splitlines()[0]}); change it") from error
    module: nn.Module = network
    return module


class BaselineSegmenter:
    """A baseline as a segmenter.

    Args:
        network: images ``[B, 3, h, w]`` in -1..1 to logits ``[B, C, h, w]``, on its device.
        preprocessing: how images become its input.
        label_names: of the classes, background first; of overlapping labels, no background.
        overlapping: whether a pixel may have several labels.
        presence: thresholds of the foreground labels, see :mod:`leafseg.presence`.
        autocast: context of a forward pass.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        preprocessing: PreprocessingSettings,
        label_names: Sequence[str],
        overlapping: bool,
        presence: Sequence[float] = (),
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.network = network
        self.preprocessor = Preprocessor(preprocessing)
        self._label_names, self._overlapping = tuple(label_names), overlapping
        self.presence = tuple(presence)
        self._autocast = autocast or nullcontext

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._label_names

    @property
    def overlapping(self) -> bool:
        return self._overlapping

    @property
    def preprocessing(self) -> PreprocessingSettings:
        return self.preprocessor.settings

    def read(self, path: Path, frame: int | None = None) -> Tensor:
        return self.preprocessor.read(path, frame)

    @torch.no_grad()
    def segment(self, images: Sequence[NDArray[Any] | Tensor]) -> list[Segmentation]:
        prepared = [self.preprocessor.apply(image) for image in images]
        results = []
        if self.preprocessing.fit == "tile":
            inputs = [unit[None] for unit, _ in prepared]  # of any size: one by one
        else:
            inputs = list(torch.stack([unit for unit, _ in prepared]).split(8))
        maps = [one for batch in inputs for one in self._probability(batch)]
        for probability, (_, placement) in zip(maps, prepared, strict=True):
            restored = self.preprocessor.restore(probability, placement).clamp(0, 1).numpy()
            results.append(labelled(restored, overlapping=self._overlapping, presence=self.presence))
        return results

    def _probability(self, images: Tensor) -> Tensor:
        """Float32 ``[B, C, h, w]`` on the CPU of images in 0..1; C = 1 is a binary foreground."""
        place = next(self.network.parameters()).device
        images = (images * 2 - 1).to(place).to(memory_format=torch.channels_last)
        exclusive = not self._overlapping and len(self._label_names) > 2

        def predict(tiles: Tensor) -> Tensor:
            with self._autocast():
                logits = self.network(tiles).float()
            return logits.softmax(1) if exclusive else logits.sigmoid()

        if self.preprocessing.fit != "tile":
            return predict(images).cpu()
        from monai.inferers import sliding_window_inference

        size, overlap = self.preprocessing.size, self.preprocessing.tile_overlap
        blended: Tensor = sliding_window_inference(images, size, 4, predict, overlap=overlap, mode="gaussian")
        return blended.cpu()


def output_channels(label_names: Sequence[str], *, overlapping: bool) -> int:
    """C of a baseline's logits: 1 for a binary mask, else a channel a class or label."""
    return 1 if not overlapping and len(label_names) == 2 else len(label_names)


def save_baseline(
    network: nn.Module,
    folder: Path,
    *,
    settings: BaselineSettings,
    preprocessing: PreprocessingSettings,
    label_names: Sequence[str],
    overlapping: bool,
    presence: Sequence[float] = (),
    dtype: WeightsDtype = "fp32",
) -> None:
    """Write a baseline's folder.

    Raises:
        CheckpointError: if a weight is too large for ``dtype``.
        OSError, SafetensorError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(converted_weights(network, "network", dtype), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    content = {
        "format_version": 2 if presence else 1,
        "baseline": settings.model_dump(mode="json"),
        "preprocessing": preprocessing.model_dump(mode="json"),
        "label_names": list(label_names),
        "overlapping": overlapping,
        **({"presence": list(presence)} if presence else {}),
        "note": "Research software, not a medical device.",
    }
    write_json_atomic(folder / BASELINE_FILE, content)


def load_baseline(
    model: str, *, num_inference_steps: int | None = None, precision: Precision = "fp32", device: str | None = None
) -> BaselineSegmenter:
    """A run of a baseline, or its folder, ready to segment.

    Args:
        model: see :func:`leafseg.runs.resolve_model`.
        num_inference_steps: None or 1; there are no others.
        precision, device: as of :func:`leafseg.predict.load_segmenter`.

    Raises:
        CheckpointError: if it cannot be loaded, or several steps are asked for.
    """
    if num_inference_steps not in (None, 1):
        raise CheckpointError(
            f"{model}: --steps is {num_inference_steps}; a baseline has no reverse steps, leave it out"
        )
    folder = Path(resolve_model(model))
    content = read_json(folder / BASELINE_FILE)
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / BASELINE_FILE}: format version {version}; this leafseg reads up to {FORMAT_VERSION}: upgrade it"
        )
    try:
        settings = BaselineSettings.model_validate(content["baseline"])
        preprocessing = PreprocessingSettings.model_validate(content["preprocessing"])
        label_names, overlapping = [str(name) for name in content["label_names"]], bool(content["overlapping"])
        presence = checked(content.get("presence", ()), len(label_names) - (not overlapping))
        network = build_network(settings, out_channels=output_channels(label_names, overlapping=overlapping))
        weights = load_file(folder / WEIGHTS_FILE)
        network.load_state_dict({key: value.to(network.state_dict()[key].dtype) for key, value in weights.items()})
    except (KeyError, TypeError, ValueError, ConfigError, OSError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: the baseline cannot be loaded ({reason}); copy or train it again") from error
    if not all(math.isfinite(float(value.detach().abs().sum())) for value in network.parameters()):
        raise CheckpointError(f"{folder}: the baseline's weights are no numbers; copy or train it again")
    place = execution_device(device)
    network.to(place).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # missing in stubs
    return BaselineSegmenter(
        network,
        preprocessing=preprocessing,
        label_names=label_names,
        overlapping=overlapping,
        presence=presence,
        autocast=autocast_of(precision, place),
    )
