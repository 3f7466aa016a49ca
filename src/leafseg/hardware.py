"""What a measurement was made on: processor, threads, and versions of what decides its speed. No name of a machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> dict[str, str | int | bool]:
    """Model, cores that this process may use, the instructions that torch uses, and whether it multiplies in bf16."""
    import torch

    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return {
        "machine": platform.machine(),
        "model": _model_name(),
        "cores": len(affinity(0)) if affinity is not None else os.cpu_count() or 1,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": multiplies_in_bf16(),
    }


def multiplies_in_bf16() -> bool:
    """Whether the processor has instructions for bf16 that oneDNN uses.

    oneDNN itself says yes to every x86 processor with AVX-512. Where those have no instructions for bf16 (Intel's
    before Cooper Lake, and Ice Lake), it computes in fp32 and converts all the time, which is slower than fp32 by far.
    """
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # on ARM, oneDNN asks for the instructions
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in instructions)  # bool() is False: a torch without the name


def gpu_multiplies_in_bf16() -> bool:
    """Whether there is a CUDA GPU that multiplies in bf16, and does not emulate it as those before Ampere do."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def library_versions() -> dict[str, str]:
    """Versions of what decides an inference's speed and last bits."""
    found = {}
    for name in ("torch", "diffusers", "numpy", "leafseg"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # leafseg, from a source tree that was never installed
            found[name] = "unknown"
    return found


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
