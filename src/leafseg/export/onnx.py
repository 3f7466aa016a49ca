"""The graph as ONNX: written by torch, checked by onnx, quantised by ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from leafseg.errors import CheckpointError, MissingExtraError, last_line
from leafseg.export.graph import SingleStep
from leafseg.runtime.backends import INPUTS, OUTPUT

OPSET = 17
_FREE = {0: "batch", 2: "height", 3: "width"}
_FREE_LATENT = {0: "batch", 2: "latent_height", 3: "latent_width"}


def require_onnx_packages() -> None:
    """
    Raises:
        MissingExtraError: if onnx or onnxruntime is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('export needs onnx and onnxruntime; run: pip install "leafseg[onnx]"') from error


def write_onnx(step: SingleStep, path: Path, *, size: tuple[int, int], latent: tuple[int, int, int]) -> None:
    """Write and check the graph; batch, height and width are free.

    Torch's TorchScript exporter is used: its newer one, through torch.export, needs another package, took sixteen times
    as long for the same operators, and warns less of what is fixed by a trace. What is fixed here (the branches of
    diffusers' resampling by batch and size) is the same arithmetic either way.

    Args:
        step: in evaluation mode.
        path: of the file.
        size: (height, width) of the example.
        latent: shape of its noise.

    Raises:
        CheckpointError: if torch cannot write the graph, or it is no valid ONNX.
    """
    import onnx

    example = (torch.zeros(2, 3, *size), torch.zeros(2, *latent))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's age, and the fixed branches above
            torch.onnx.export(
                step,
                example,
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_axes={INPUTS[0]: _FREE, INPUTS[1]: _FREE_LATENT, OUTPUT: _FREE},
            )
        onnx.checker.check_model(str(path), full_check=True)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckpointError(
            f"the model cannot be written as ONNX ({last_line(error)}); predict with it itself"
        ) from error


def quantise_onnx(source: Path, target: Path, *, inputs: Iterable[Mapping[str, NDArray[np.float32]]]) -> None:
    """Post-training static quantisation of convolutions and matrix products, weights a channel each, to 8 bits.

    Args:
        source: float32 graph; ``source`` is left as it is, its folder takes a working file.
        target: the new graph.
        inputs: calibration batches by input name; the range of every value in between is taken from them.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(inputs)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self._batches, None)
            return None if batch is None else dict(batch)

    prepared = source.with_name(".prepared.onnx")
    options: dict[str, Any] = {"CalibMovingAverage": False}
    level = logging.getLogger().level
    try:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)  # folds constants and fuses
        logging.getLogger().setLevel(logging.ERROR)  # it warns through the root logger
        quantize_static(
            str(prepared),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options=options,
        )
    finally:
        logging.getLogger().setLevel(level)
        prepared.unlink(missing_ok=True)
