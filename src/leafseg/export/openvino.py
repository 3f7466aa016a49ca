"""The graph as OpenVINO's intermediate representation, from ONNX; quantised by NNCF."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.errors import ConfigError, MissingExtraError

_EXTRA = 'run: pip install "leafseg[openvino]"'


def require_openvino(precision: str) -> None:
    """
    Raises:
        MissingExtraError: if openvino, or for int8 nncf, is not installed.
        ConfigError: if this processor does not compute in bf16, and that is asked for: it could not be measured.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(f"export to OpenVINO needs openvino; {_EXTRA}") from error
    if precision == "int8":
        try:
            import nncf  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(f"int8 for OpenVINO needs nncf; {_EXTRA}") from error
    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ConfigError("this processor does not compute in bf16, so that it cannot be measured; take fp32 or int8")


def write_openvino(source: Path, target: Path, *, half: bool) -> None:
    """An ONNX file as ``target`` (``.xml``, with ``.bin`` beside it); ``half`` stores weights in fp16."""
    import openvino

    openvino.save_model(openvino.Core().read_model(source), target, compress_to_fp16=half)


def quantise_openvino(source: Path, target: Path, *, inputs: Iterable[Mapping[str, NDArray[np.float32]]]) -> None:
    """Post-training static quantisation by NNCF of an ONNX file; see ``quantise_onnx``."""
    import nncf
    import openvino

    batches: list[Any] = [dict(batch) for batch in inputs]
    level = nncf.common.logging.logger.nncf_logger.level
    nncf.set_log_level(logging.ERROR)
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()  # its progress bars go to standard output otherwise
    try:
        with redirect_stdout(shown):
            model = nncf.quantize(
                openvino.Core().read_model(source),
                nncf.Dataset(batches),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(batches),
            )
    finally:
        nncf.set_log_level(level)
    openvino.save_model(model, target, compress_to_fp16=False)
