"""Which number format `auto` means on a processor: bf16 only where the processor itself multiplies in it."""

from __future__ import annotations

import pytest
import torch

from leafseg import hardware
from leafseg.predict import autocast_of
from leafseg.training.precision import resolve_precision


def _processor(monkeypatch: pytest.MonkeyPatch, machine: str, *, onednn: bool, **instructions: bool) -> None:
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: instructions.get(name, False), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("machine", "onednn", "instructions", "expected"),
    [
        ("x86_64", False, {}, False),
        ("x86_64", True, {}, False),  # AVX-512 without bf16: oneDNN would emulate it
        ("AMD64", True, {}, False),
        ("x86_64", True, {"_is_avx512_bf16_supported": True}, True),
        ("x86_64", True, {"_is_amx_tile_supported": True}, True),
        ("aarch64", True, {}, True),
        ("aarch64", False, {}, False),
    ],
)
def test_auto_is_bf16_only_where_the_processor_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, machine: str, onednn: bool, instructions: dict[str, bool], expected: bool
) -> None:
    _processor(monkeypatch, machine, onednn=onednn, **instructions)
    assert hardware.multiplies_in_bf16() is expected
    assert resolve_precision("auto") == ("bf16" if expected else "no")
    assert (autocast_of("auto", torch.device("cpu")) is not None) is expected


def test_a_torch_that_cannot_tell_the_instructions_means_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch, "x86_64", onednn=True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not hardware.multiplies_in_bf16()


@pytest.mark.parametrize(("native", "training", "inference"), [(True, "bf16", True), (False, "fp16", False)])
def test_a_gpu_that_only_emulates_bf16_trains_in_fp16(
    monkeypatch: pytest.MonkeyPatch, native: bool, training: str, inference: bool
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto") == training
    assert (autocast_of("auto", torch.device("cuda")) is not None) is inference


def test_inference_on_the_cpu_beside_a_gpu_asks_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch, "x86_64", onednn=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert autocast_of("auto", torch.device("cpu")) is None
