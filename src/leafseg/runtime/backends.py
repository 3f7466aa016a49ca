"""One graph in ONNX Runtime or OpenVINO: image and noise in, probability out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.errors import CheckpointError, MissingExtraError, last_line

# Images [B, 3, h, w] in 0..1 and noise [B, z, h/s, w/s] (latent stride s) to probabilities [B, C, h, w], all float32.
Graph = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
INPUTS, OUTPUT = ("image", "noise"), "probability"
_FIXED_SHAPES = 2  # that OpenVINO compiles for; further ones share a graph of free shapes


def open_graph(backend: str, path: Path, *, precision: str, threads: int | None = None) -> Graph:
    """The graph, ready to run on the CPU.

    Args:
        backend: ``onnx`` or ``openvino``.
        path: of the graph.
        precision: of the export.
        threads: that the back end may use; default: its own choice, all cores.

    Raises:
        MissingExtraError: if the back end is not installed.
        CheckpointError: if the graph cannot be loaded, or has other inputs and outputs.
    """
    opened = _onnx(path, threads) if backend == "onnx" else _openvino(path, precision, threads)

    def run(image: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        return opened(np.ascontiguousarray(image), np.ascontiguousarray(noise))

    return run


def _onnx(path: Path, threads: int | None) -> Graph:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            'this exported model needs ONNX Runtime: pip install "leafseg[onnx]", or without torch: pip install '
            "onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but RuntimeError and Exception
        raise CheckpointError(
            f"{path}: ONNX Runtime cannot load the graph ({last_line(error)}); export the model again"
        ) from error
    _check_names(path, {item.name for item in session.get_inputs()}, {item.name for item in session.get_outputs()})
    return lambda image, noise: session.run([OUTPUT], dict(zip(INPUTS, (image, noise), strict=True)))[0]


def _openvino(path: Path, precision: str, threads: int | None) -> Graph:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            'this exported model needs OpenVINO: pip install "leafseg[openvino]", or without torch: pip install '
            "openvino"
        ) from error
    with _one_sentence(path):
        core = openvino.Core()
        # Asked for bf16, OpenVINO emulates it on AVX-512 without such instructions, slower than fp32.
        multiplies = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        free = core.read_model(path)
        inputs = {name for port in free.inputs for name in port.names}
        outputs = {name for port in free.outputs for name in port.names}
    _check_names(path, inputs, outputs)
    # Said aloud, since OpenVINO's default is bf16 wherever the processor has it, whatever the model is stored in.
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" and multiplies else "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads

    # Kernels and memory that are planned for fixed shapes are faster (docs/export.md); an input size of its own for
    # every image would compile for ever. A compiled graph serves one call at a time.
    compiled: dict[tuple[tuple[int, ...], ...] | None, Any] = {}
    lock = Lock()

    def graph_for(shapes: tuple[tuple[int, ...], ...] | None) -> Any:
        if shapes not in compiled and len(compiled.keys() - {None}) >= _FIXED_SHAPES:
            shapes = None
        if shapes not in compiled:
            with _one_sentence(path):
                model = free
                if shapes is not None:
                    model = free.clone()
                    model.reshape(dict(zip(INPUTS, shapes, strict=True)))
                compiled[shapes] = core.compile_model(model, "CPU", options)
        return compiled[shapes]

    def run(image: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        with lock:
            graph = graph_for((image.shape, noise.shape))
            found: NDArray[np.float32] = graph(dict(zip(INPUTS, (image, noise), strict=True)))[OUTPUT].copy()
        return found

    return run


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{path}: OpenVINO cannot load the graph, or not for this size ({last_line(error)}); export it again"
        ) from error


def _check_names(path: Path, inputs: set[str], outputs: set[str]) -> None:
    if not (set(INPUTS) <= inputs and OUTPUT in outputs):
        raise CheckpointError(
            f"{path}: the graph takes {', '.join(sorted(inputs))} and gives {', '.join(sorted(outputs))}, not image, "
            "noise and probability; export the model again"
        )
