"""Exported models without torch: NumPy, Pillow, and ONNX Runtime or OpenVINO.

    from leafseg import runtime

    model = runtime.load("exported")
    result = model(pixels)  # [H, W] or [H, W, 3]
    result.labels           # uint8 [H, W] on the image's own grid

``python -m leafseg.runtime FOLDER IMAGES --out MASKS`` does so for files. Not a medical device.
"""

from __future__ import annotations

from leafseg.runtime.folder import EXPORT_FORMAT_VERSION, ExportedFolder, StoredPreprocessing, read_folder
from leafseg.runtime.model import Result, Runtime, load

__all__ = [
    "EXPORT_FORMAT_VERSION",
    "ExportedFolder",
    "Result",
    "Runtime",
    "StoredPreprocessing",
    "load",
    "read_folder",
]
