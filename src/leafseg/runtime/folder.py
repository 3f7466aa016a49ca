"""What an exported folder holds, and whether it is whole.

::

    export.json         format version, back end, precision, latent, noise, labels, hashes of the other files
    preprocessing.json  the fields of leafseg.config.PreprocessingSettings
    model.onnx          or model.xml and model.bin
    split.csv           which images the model was trained on, by content hash alone; if it was trained here
    README.md           the model card with the measured figures
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from leafseg.errors import CheckpointError, DataError
from leafseg.files import read_json
from leafseg.presence import checked
from leafseg.runs import EXPORT_FILE

EXPORT_FORMAT_VERSION = 2  # the newest that is read; without presence thresholds a folder is written as 1
PREPROCESSING_FILE = "preprocessing.json"
GRAPH_FILES: Mapping[str, tuple[str, ...]] = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin")}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

_CHOICES = {
    "fit": ("stretch", "pad"),
    "interpolation": ("bilinear", "bicubic"),
    "intensity": ("auto", "range", "percentile", "window", "zscore"),
    "orientation": ("LPS", "stored"),
    "slice_axis": ("z", "y", "x"),
}


@dataclass(frozen=True)
class StoredPreprocessing:
    """``leafseg.config.PreprocessingSettings`` as a runtime without pydantic reads them: the same fields."""

    size: tuple[int, int]
    fit: Literal["stretch", "pad", "tile"]
    tile_overlap: float
    interpolation: Literal["bilinear", "bicubic"]
    intensity: Literal["auto", "range", "percentile", "window", "zscore"]
    percentiles: tuple[float, float]
    window: tuple[float, float] | None
    dicom_window: bool
    orientation: Literal["LPS", "stored"]
    slice_axis: Literal["z", "y", "x"]
    neighbouring_slices: bool
    stride: int

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> StoredPreprocessing:
        """The settings of a JSON object.

        Raises:
            ValueError: if a field is missing, unknown or has another kind of value.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"fields {', '.join(sorted(set(values) ^ names))} are missing or unknown")
        if values["fit"] == "tile":
            raise ValueError("fit is 'tile', and an exported model takes whole images")
        for name, choices in _CHOICES.items():
            if values[name] not in choices:
                raise ValueError(f"{name} is {values[name]!r}; known are {', '.join(choices)}")
        height, width = _pair(values, "size", int)
        stride = values["stride"]
        if not _is_number(stride, int) or min(stride, height, width) < 1 or height % stride or width % stride:
            raise ValueError(f"size is {[height, width]}; it must be positive multiples of stride, which is {stride!r}")
        low, high = _pair(values, "percentiles", float)
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles are {[low, high]}; they must ascend within 0..100")
        window = None if values["window"] is None else _pair(values, "window", float)
        if (window is None) == (values["intensity"] == "window") or (window is not None and not window[1] > 0):
            raise ValueError("intensity 'window' and a window of positive width belong together")
        if not all(isinstance(values[name], bool) for name in ("dicom_window", "neighbouring_slices")):
            raise ValueError("dicom_window and neighbouring_slices must be true or false")
        if not _is_number(values["tile_overlap"], float) or not 0 <= values["tile_overlap"] < 1:
            raise ValueError(f"tile_overlap is {values['tile_overlap']!r}; it must be in 0..1")
        pairs = {"size": (height, width), "percentiles": (low, high), "window": window}
        return cls(**{**values, **pairs})


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def _pair(values: Mapping[str, Any], name: str, kind: type) -> tuple[Any, Any]:
    pair = values[name]
    if not isinstance(pair, list) or len(pair) != 2 or not all(_is_number(value, kind) for value in pair):
        raise ValueError(f"{name} is {pair!r}; it must be two numbers")
    return pair[0], pair[1]


@dataclass(frozen=True)
class ExportedFolder:
    """A checked folder.

    Attributes:
        backend: ``onnx`` or ``openvino``.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        label_names: of the classes, background first; of overlapping labels one a channel.
        overlapping: whether a pixel may have several labels.
        channels: C of the probability.
        presence: for each foreground label the least highest probability of an image in which it is drawn; or empty.
        latent_channels, latent_stride: shape of the noise, ``[latent_channels, h / latent_stride, w / latent_stride]``.
        noise: what it starts from by default, ``gaussian`` or ``zeros``.
        noise_seed: of the keyed draws.
        content: all of ``export.json``.
    """

    path: Path
    backend: str
    precision: str
    preprocessing: StoredPreprocessing
    label_names: tuple[str, ...]
    overlapping: bool
    channels: int
    presence: tuple[float, ...]
    latent_channels: int
    latent_stride: int
    noise: str
    noise_seed: int
    content: Mapping[str, Any]

    @property
    def graph(self) -> Path:
        return self.path / GRAPH_FILES[self.backend][0]


def read_folder(path: Path) -> ExportedFolder:
    """Read and check an exported folder; every file's hash is compared.

    Raises:
        CheckpointError: if it is missing, damaged, incomplete, or of a newer format.
    """
    if not (path / EXPORT_FILE).is_file():
        raise CheckpointError(f"{path}: no {EXPORT_FILE}; give a folder that `leafseg export` wrote")
    try:
        content = read_json(path / EXPORT_FILE)
        version: Any = content["format_version"]
        if not _is_number(version, int) or version < 1:
            raise ValueError(f"format_version is {version!r}")
        if version > EXPORT_FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: exported in format {version}; this leafseg reads up to {EXPORT_FORMAT_VERSION}: upgrade it"
            )
        folder = _parsed(path, content)
    except (DataError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: the exported folder is damaged ({reason}); copy or export it again") from error
    return folder


def _parsed(path: Path, content: Mapping[str, Any]) -> ExportedFolder:
    backend, precision = content["backend"], content["precision"]
    if backend not in GRAPH_FILES or precision not in PRECISIONS:
        raise ValueError(f"back end is {backend!r}, precision {precision!r}")
    hashes = content["sha256"]
    for name in (*GRAPH_FILES[backend], PREPROCESSING_FILE):
        _check_hash(path / name, hashes[name])
    labels, latent = content["labels"], content["latent"]
    names, channels = labels["names"], labels["channels"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"label names are {names!r}")
    overlapping = labels["overlapping"]
    allowed = {len(names), 1} if overlapping is False and len(names) == 2 else {len(names)}
    if not isinstance(overlapping, bool) or channels not in allowed:
        raise ValueError(f"{len(names)} labels and {channels!r} channels do not go together")
    counts = (latent["channels"], latent["stride"], content["noise"]["seed"])
    if not all(_is_number(count, int) for count in counts) or latent["channels"] < 1 or latent["stride"] < 1:
        raise ValueError(f"latent channels, stride and noise seed are {counts}")
    noise = content["noise"]["kind"]
    if noise not in ("gaussian", "zeros"):
        raise ValueError(f"starting noise is {noise!r}")
    return ExportedFolder(
        path=path,
        backend=backend,
        precision=precision,
        preprocessing=StoredPreprocessing.parse(read_json(path / PREPROCESSING_FILE)),
        label_names=tuple(names),
        overlapping=overlapping,
        channels=channels,
        presence=checked(labels.get("presence", ()), len(names) - (not overlapping)),
        latent_channels=latent["channels"],
        latent_stride=latent["stride"],
        noise=noise,
        noise_seed=content["noise"]["seed"],
        content=content,
    )


def _check_hash(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if file_sha256(path) != expected:
        raise ValueError(f"{path.name} is not the file that was exported")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
