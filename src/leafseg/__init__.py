"""LEAF: latent diffusion for medical image segmentation.

The public names are looked up on first use, so that ``import leafseg`` costs milliseconds and the command line answers
``--help`` without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leafseg.config import Settings, load_settings
    from leafseg.data.manifest import load_manifest
    from leafseg.mask_code import MaskCode
    from leafseg.model.autoencoder import MaskDecoder
    from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
    from leafseg.model.image_encoder import ImageEncoder
    from leafseg.model.unet import MaskUNet
    from leafseg.pipeline import LeafOutput, LeafPipeline

    __version__: str

__all__ = [
    "CompactImageEncoder",
    "CompactMaskDecoder",
    "ImageEncoder",
    "LeafOutput",
    "LeafPipeline",
    "MaskCode",
    "MaskDecoder",
    "MaskUNet",
    "Settings",
    "__version__",
    "load_manifest",
    "load_settings",
]

# Saved pipelines name their classes as members of this package: a class may move to another module, but its name here
# stays.
_HOMES = {
    "CompactImageEncoder": "leafseg.model.compact",
    "CompactMaskDecoder": "leafseg.model.compact",
    "ImageEncoder": "leafseg.model.image_encoder",
    "LeafOutput": "leafseg.pipeline",
    "LeafPipeline": "leafseg.pipeline",
    "MaskCode": "leafseg.mask_code",
    "MaskDecoder": "leafseg.model.autoencoder",
    "MaskUNet": "leafseg.model.unet",
    "Settings": "leafseg.config",
    # diffusers finds the loading method of a model's class by looking for its base class beside it.
    "ModelMixin": "diffusers",
    "load_manifest": "leafseg.data.manifest",
    "load_settings": "leafseg.config",
}


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        value = _installed_version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    from importlib import metadata  # 20 ms: reads zip and email modules

    try:
        return metadata.version("leafseg")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
