"""How long does one image take, on two threads? Runs leaf-tiny (256 px) and prints medians; JSON with --out.

    .venv/bin/python benchmarks/inference.py --out docs/results/inference.json

Random weights: they change no timing. fp32 contiguous is the baseline; the ratios are against it, measured in one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from leafseg.config import load_settings
from leafseg.model.build import build_components
from leafseg.pipeline import LeafPipeline


def hardware() -> str:
    """The processor's features that matter, without the machine's name."""
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return f"{platform.machine()}, {capability}, bf16 {'yes' if bf16 else 'no'}, {torch.get_num_threads()} threads"


def median_and_spread(call, repeats: int) -> tuple[float, float, float]:
    """Median, and 10th and 90th percentile, in milliseconds."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1000)
    cuts = statistics.quantiles(times, n=10)
    return statistics.median(times), cuts[0], cuts[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    size = arguments.size
    settings = load_settings("leaf-tiny", overrides=[f"data.preprocessing.size=[{size},{size}]"])
    parts = build_components(settings)
    pipe = LeafPipeline(
        unet=parts.unet.eval(),
        vae=parts.autoencoder,
        image_encoder=parts.image_encoder.eval(),
        scheduler=parts.scheduler,
        preprocessing=settings.data.preprocessing.model_dump(mode="json"),
    )
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    rows = {}
    print(f"leaf-tiny, one image {size}x{size}, batch 1; {hardware()}")
    for name, last, bf16 in (
        ("fp32", False, False),
        ("fp32, channels_last", True, False),
        ("bf16 autocast, channels_last", True, True),
    ):
        for module in (pipe.unet, pipe.vae, pipe.image_encoder):
            module.to(memory_format=torch.channels_last if last else torch.contiguous_format)

        def call(half: bool = bf16) -> None:
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                pipe(image)

        median, low, high = median_and_spread(call, arguments.repeats)
        rows[name] = {"median_ms": round(median, 1), "p10_ms": round(low, 1), "p90_ms": round(high, 1)}
        ratio = rows["fp32"]["median_ms"] / median
        rows[name]["times_faster_than_fp32"] = round(ratio, 2)
        print(f"  {name:<30} {median:7.1f} ms  [{low:.1f}, {high:.1f}]  {ratio:.2f}x")
    if arguments.out:
        result = {"model": "leaf-tiny", "size": size, "hardware": hardware(), "torch": torch.__version__, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
