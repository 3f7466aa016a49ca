"""The package as a whole: what importing it costs, what it offers, and which module may import which."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import leafseg

REPOSITORY = Path(__file__).parents[2]
HEAVY_PACKAGES = {"accelerate", "diffusers", "monai", "scipy", "torch", "transformers"}


def run_python(code: str) -> str:
    """Standard output of ``code`` in a fresh interpreter; fails with its standard error."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def loaded_packages(code: str) -> set[str]:
    """Top-level packages that are loaded after ``code`` has run in a fresh interpreter."""
    output = run_python(f"{code}\nimport sys\nprint('LOADED', *{{name.partition('.')[0] for name in sys.modules}})")
    return set(output.rpartition("LOADED")[2].split())


def test_importing_leafseg_loads_no_heavy_package() -> None:
    loaded = loaded_packages("import leafseg")
    assert "leafseg" in loaded
    assert not loaded & (HEAVY_PACKAGES | {"numpy", "pydantic"})


def test_importing_leafseg_takes_a_small_fraction_of_a_second() -> None:
    code = "import time; start = time.perf_counter(); import leafseg; print(time.perf_counter() - start)"
    # A few milliseconds in fact; the best of three, since another process may hold the core.
    assert min(float(run_python(code)) for _ in range(3)) < 0.1


@pytest.mark.parametrize("module", ["leafseg.config", "leafseg.rng", "leafseg.errors"])
def test_the_lowest_layer_loads_no_heavy_package(module: str) -> None:
    assert not loaded_packages(f"import {module}") & HEAVY_PACKAGES


def test_no_module_of_the_data_package_loads_diffusers() -> None:
    loaded = loaded_packages(
        "import importlib, pkgutil, leafseg.data\n"
        "for module in pkgutil.walk_packages(leafseg.data.__path__, 'leafseg.data.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    assert "diffusers" not in loaded


def test_the_metrics_do_not_load_diffusers() -> None:
    assert "diffusers" not in loaded_packages("import leafseg.evaluation.metrics")


def test_inference_does_not_load_what_only_training_needs() -> None:
    code = "import sys, leafseg.pipeline; print(*(name for name in sys.modules if name.startswith('leafseg.')))"
    loaded = set(run_python(code).split())
    assert not loaded & {"leafseg.training", "leafseg.model.teachers", "leafseg.model.projector"}


@pytest.mark.parametrize("name", leafseg.__all__)
def test_each_public_name_can_be_looked_up(name: str) -> None:
    assert getattr(leafseg, name) is not None
    assert name in dir(leafseg)


def test_the_public_names_are_those_with_a_home_and_the_version() -> None:
    for_diffusers_only = {"ModelMixin"}
    assert set(leafseg.__all__) == {*leafseg._HOMES, "__version__"} - for_diffusers_only


def test_an_unknown_name_raises_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'leafseg' has no attribute 'LeafPipelin'"):
        _ = leafseg.LeafPipelin  # type: ignore[attr-defined]


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    assert Path(leafseg.__file__).with_name("py.typed").is_file()


def test_help_needs_no_heavy_package() -> None:
    loaded = loaded_packages(
        "import sys\n"
        "from leafseg.cli import main\n"
        "sys.argv = ['leafseg', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
    )
    assert "leafseg" in loaded
    assert not loaded & HEAVY_PACKAGES


def test_help_answers_quickly() -> None:
    code = (
        "import time; start = time.perf_counter()\n"
        "import sys; sys.argv = ['leafseg', '--help']\n"
        "from leafseg.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    print('SECONDS', time.perf_counter() - start)\n"
    )
    # Well under a second in fact; the best of three, since another process may hold the core.
    assert min(float(run_python(code).rpartition("SECONDS")[2]) for _ in range(3)) < 2


def test_imports_point_down_only() -> None:
    lint_imports = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if lint_imports is None:
        pytest.skip("import-linter is not installed")
    result = subprocess.run(
        [lint_imports, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
