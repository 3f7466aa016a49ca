"""How large is the install that runs an exported model without torch? Makes fresh environments; JSON with --out.

    .venv/bin/python benchmarks/runtime_size.py --out docs/results/runtime_size.json

Each environment gets leafseg without its dependencies, numpy, pillow and one back end, at the versions of
constraints.txt where it names them. Needs a package index.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
BACKENDS = ("onnxruntime", "openvino")


def megabytes(folder: Path) -> float:
    """All files of an environment's packages, in 10^6 bytes; links count nothing."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 1e6


def measure(backend: str) -> dict[str, object]:
    """Install and import the runtime in a fresh environment; its size by package folder and in total."""
    with tempfile.TemporaryDirectory() as working:
        environment = Path(working) / "venv"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        site = next((environment / "lib").glob("python*/site-packages"))
        empty = megabytes(site)  # pip itself
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", REPOSITORY], check=True)
        subprocess.run([*pip, "-c", REPOSITORY / "constraints.txt", "numpy", "pillow", backend], check=True)
        check = (
            "import sys, leafseg.runtime, leafseg.runtime.__main__, " + backend + "\n"
            "assert not {'torch', 'diffusers', 'transformers', 'monai', 'pydantic'} & set(sys.modules)"
        )
        subprocess.run([python, "-c", check], check=True)
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True
        )
        installed = {item["name"]: item["version"] for item in json.loads(listed.stdout)}
        folders = {path.name: round(megabytes(path), 1) for path in site.iterdir() if path.is_dir()}
        largest = dict(sorted(folders.items(), key=lambda item: -item[1])[:6])
        return {"megabytes": round(megabytes(site) - empty, 1), "largest_folders": largest, "packages": installed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    here = Path(next(path for path in sys.path if path.endswith("site-packages")))
    rows = {backend: measure(backend) for backend in BACKENDS}
    whole = megabytes(here)
    print(f"{platform.machine()}, Python {platform.python_version()}")
    for backend, row in rows.items():
        print(f"  numpy, pillow, {backend} and leafseg: {row['megabytes']:.0f} MB")
    print(f"  this environment, with torch: {whole:.0f} MB")
    if arguments.out:
        result = {"machine": platform.machine(), "python": platform.python_version(), "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**result, "this_environment_mb": round(whole, 1)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
