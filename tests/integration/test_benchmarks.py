"""Every benchmark runs, and its record becomes a page; how fast anything is, no test says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
IN_PROCESS = ("inference", "data_loading", "export", "networks", "scaling")
WITH_CHILDREN = ("memory", "start_up", "training")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _record(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    out = tmp_path / f"{name}.json"
    script = ROOT / "benchmarks" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", *more, "--out", str(out)])
    _module(script).main()
    record: dict[str, Any] = json.loads(out.read_text())
    assert record["quick"]
    assert record["command"] == " ".join([f"benchmarks/{name}.py --quick", *more])
    assert {"torch", "leafseg"} <= record["versions"].keys()
    assert record["processor"]["cores"] >= 1
    assert record["rows"]
    return record


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_benchmark_runs_and_its_record_fills_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _record(name, tmp_path, monkeypatch)
    tables = _module(ROOT / "experiments" / "performance_tables.py")
    assert tables.read_records(tmp_path) == []  # a quick check is no result
    empty = tables.page([])
    assert "not measured" in empty
    filled = tables.page([record | {"quick": False, "file": f"{name}.json"}])
    assert f"`benchmarks/{name}.py --quick`" in filled
    assert filled.count("not measured") <= empty.count("not measured")


def test_light_parts_are_timed_and_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _record("inference", tmp_path, monkeypatch, "--compact", "--modes", "folded")
    modes = {row["mode"]: row for row in record["rows"]}
    assert set(modes["fp32, folded, compact"]["parts_ms"]) == {"image encoder", "U-Net", "mask decoder"}
    for row in record["rows"]:
        row["size"] = 256
    tables = _module(ROOT / "experiments" / "performance_tables.py")
    full, light = (tables.best_row([record], "leaf-tiny", compact=compact) for compact in (False, True))
    assert not tables.is_compact(full["mode"])
    assert tables.is_compact(light["mode"])
    assert f"{light['ratio']:.2f} times the plain model, " in tables.page([record | {"quick": False, "file": "x.json"}])


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CHILDREN)
def test_a_benchmark_of_whole_processes_runs_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _record(name, tmp_path, monkeypatch)
    tables = _module(ROOT / "experiments" / "performance_tables.py")
    assert f"`benchmarks/{name}.py --quick`" in tables.page([record | {"quick": False, "file": "x.json"}])


def test_what_was_measured_without_bf16_stands_apart() -> None:
    tables = _module(ROOT / "experiments" / "performance_tables.py")
    measured = [record for record in tables.read_records(tables.RECORDS) if record["processor"]["bf16"]]
    slow = [
        {**record, "processor": {**record["processor"], "bf16": False, "model": "Some older one"}}
        for record in measured
        if record.get("question") in ("inference", "export", "training") and record["preset"] == "leaf-tiny"
    ]
    before, apart = tables.page([*measured, *slow]).split("## A processor without bf16")
    apart = apart.split("## Scaling")[0]
    assert before == tables.page(measured).split("## A processor without bf16")[0]
    for heading in ("Inference: leaf-tiny", "Export: leaf-tiny", "Training: leaf-tiny"):
        assert f"### {heading}" in apart
    assert "leaf-base" not in apart
    assert apart.count("Some older one") == len(slow)


def test_the_exponent_of_a_power_is_the_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scaling = _module(ROOT / "benchmarks" / "scaling.py")
    points = [{"x": x, "median_ms": 3 * x**1.5} for x in (1, 2, 8, 32)]
    assert scaling.exponent(points) == 1.5
    assert scaling.exponent(points[:1]) is None


def test_every_benchmark_has_a_test() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    # These have no --quick: they are about full size, large images, and what pip installs.
    without = {"full_size_training", "large_images", "runtime_size"}
    assert scripts == {*IN_PROCESS, *WITH_CHILDREN, *without}
