"""How long do a large image and a volume take, and how much memory? JSON with --out.

    .venv/bin/python benchmarks/large_images.py --out docs/results/large_images.json

leaf-tiny with random weights (they change no timing), from file to file as `leafseg predict` works, on two threads. A
case is a process of its own, so that its peak memory is its own; `start` is one tile: what all of them share.
`--side 20000` adds an image that the others' way would not fit into memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Nothing heavier is imported up here: a child's peak memory counts what its parent held when it was started.


def make_image(path: Path, side: int) -> None:
    """Bright discs on noise, RGB, in a tiled TIFF written row of tiles by row of tiles."""
    import numpy as np
    import tifffile

    def tiles():
        generator = np.random.default_rng(0)
        for top in range(0, side, 256):
            for left in range(0, side, 256):
                y, x = np.mgrid[top : top + 256, left : left + 256]
                disc = (y % 640 - 320) ** 2 + (x % 640 - 320) ** 2 < 200**2
                noise = generator.integers(0, 80, (256, 256, 3))
                yield (noise + 120 * disc[..., None]).astype(np.uint8)

    options = {"tile": (256, 256), "compression": "zlib", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(tiles(), shape=(side, side, 3), dtype=np.uint8, **options)


def make_volume(path: Path, size: tuple[int, int, int]) -> None:
    """A bright ball in noise, 16-bit NIfTI, 0.7 x 0.7 x 1.5 mm."""
    import numpy as np
    import SimpleITK

    depth, height, width = size
    generator = np.random.default_rng(0)
    z, y, x = (((np.arange(n) + 0.5) / n - 0.5) ** 2 for n in size)
    voxels = generator.integers(-1000, -800, (depth, height, width)).astype(np.int16)
    voxels[z[:, None, None] + y[:, None] + x < 0.3**2] += 900
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((0.7, 0.7, 1.5))
    SimpleITK.WriteImage(image, str(path))


def segmenter(fit: str, size: int):
    import torch

    from leafseg.config import load_settings
    from leafseg.model.build import build_components
    from leafseg.pipeline import LeafPipeline
    from leafseg.predict import PipelineSegmenter

    changes = {"size": f"[{size},{size}]", "fit": fit}
    overrides = [*(f"data.preprocessing.{k}={v}" for k, v in changes.items()), "teacher.name=none"]
    settings = load_settings("leaf-tiny", overrides=overrides)
    parts = build_components(settings)
    for module in (parts.unet, parts.autoencoder, parts.image_encoder):
        module.eval().to(memory_format=torch.channels_last)  # as load_segmenter does
    pipeline = LeafPipeline(
        unet=parts.unet,
        vae=parts.autoencoder,
        image_encoder=parts.image_encoder,
        scheduler=parts.scheduler,
        preprocessing=settings.data.preprocessing.model_dump(mode="json"),
    )
    return PipelineSegmenter(pipeline)


def run_case(case: str, path: Path, size: int, threads: int) -> dict:
    """In the child: segment one file, and say what it took."""
    import torch

    import leafseg.data.large
    from leafseg.predict import predict_files

    torch.set_num_threads(threads)
    if case == "piece by piece":
        leafseg.data.large.LARGE_PIXELS = 0
    model = segmenter("stretch" if case == "volume" else "tile", size)
    with tempfile.TemporaryDirectory(dir=path.parent) as out:
        begin = time.perf_counter()
        report = predict_files(model, [path], Path(out))
        seconds = time.perf_counter() - begin
    assert not report.failed, report.failed
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def versions_and_hardware(threads: int) -> dict:
    import monai
    import tifffile
    import torch
    import zarr

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "hardware": f"{platform.machine()}, {capability}, {threads} threads",
        "versions": {m.__name__: m.__version__ for m in (torch, monai, zarr, tifffile)},
    }


def child(**arguments) -> dict:
    """Run this script with one hidden job; its last line is its result."""
    command = [sys.executable, __file__, "--job", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def work(job: dict) -> dict:
    path = Path(job.get("path", ""))
    if job["do"] == "about":
        return versions_and_hardware(job["threads"])
    if job["do"] == "image":
        make_image(path, job["side"])
    elif job["do"] == "volume":
        make_volume(path, tuple(job["shape"]))
    else:
        return run_case(job["case"], path, job["size"], job["threads"])
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=int, default=4096, help="side of the image")
    parser.add_argument("--volume", type=int, nargs=3, default=(200, 512, 512), help="slices, rows, columns")
    parser.add_argument("--side", type=int, help="side of another image, segmented piece by piece only")
    parser.add_argument("--size", type=int, default=256, help="network input: of tiles, and of slices")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's temporary folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(work(json.loads(arguments.job))))
        return

    about = child(do="about", threads=arguments.threads)
    print(f"leaf-tiny, network input {arguments.size}x{arguments.size}; {about['hardware']}")
    rows = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        shape = "x".join(map(str, arguments.volume))
        cases = [
            ("start", "start", "image", {"side": arguments.size}),
            (f"image {arguments.image}x{arguments.image}, in memory", "whole", "image", {"side": arguments.image}),
            (f"image {arguments.image}x{arguments.image}, piece by piece", "piece by piece", None, {}),
            (f"volume {shape}, slice by slice", "volume", "volume", {"shape": arguments.volume}),
        ]
        if arguments.side:
            name = f"image {arguments.side}x{arguments.side}, piece by piece"
            cases.append((name, "piece by piece", "image", {"side": arguments.side}))
        path = Path(folder) / "none"
        for name, case, make, options in cases:
            if make is not None:
                path.unlink(missing_ok=True)
                path = Path(folder) / ("image.tif" if make == "image" else "volume.nii")
                child(do=make, path=str(path), **options)
            runs = [
                child(do="case", case=case, path=str(path), size=arguments.size, threads=arguments.threads)
                for _ in range(arguments.repeats)
            ]
            seconds, peaks = [run["seconds"] for run in runs], [run["peak_mb"] for run in runs]
            rows[name] = {
                "seconds": round(statistics.median(seconds), 1),
                "seconds_min": round(min(seconds), 1),
                "seconds_max": round(max(seconds), 1),
                "peak_mb": round(statistics.median(peaks)),
            }
            spread = f"[{min(seconds):.1f}, {max(seconds):.1f}]"
            print(f"  {name:<40} {rows[name]['seconds']:8.1f} s  {spread:<18} {rows[name]['peak_mb']:6d} MB at most")
    if arguments.out:
        result = {"model": "leaf-tiny", "size": arguments.size, "repeats": arguments.repeats, **about, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
