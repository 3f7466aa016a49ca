"""How much faster is a model with compact parts, image by image? Prints medians and ratios to the plain model.

    .venv/bin/python benchmarks/compact.py --preset leaf-base --repeats 5 --out docs/results/compact_speed.json

Random weights: they change no timing. Every round runs each mode once, one after the other, so that a machine that
slows down slows all of them; ratios are taken within a round. Plain is fp32 in contiguous memory, with the full parts.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from inference import hardware
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from leafseg.config import load_settings
from leafseg.model.build import build_components, count_parameters
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.pipeline import LeafPipeline

# Name, (decoder, encoder), channels_last, bf16.
MODES = [
    ("plain: full parts, fp32", ("full", "full"), False, False),
    ("full parts, bf16, channels_last", ("full", "full"), True, True),
    ("compact decoder, fp32, channels_last", ("compact", "full"), True, False),
    ("compact parts, fp32", ("compact", "compact"), False, False),
    ("compact parts, fp32, channels_last", ("compact", "compact"), True, False),
    ("compact parts, bf16, channels_last", ("compact", "compact"), True, True),
]


def build(preset: str, size: int) -> LeafPipeline:
    """The preset's pipeline with compact parts, as ``leafseg compact`` shapes them."""
    settings = load_settings(preset, overrides=[f"data.preprocessing.size=[{size},{size}]"])
    torch.manual_seed(0)
    parts = build_components(settings, with_weights=False)
    return LeafPipeline(
        unet=parts.unet.eval(),
        vae=parts.autoencoder.eval(),
        image_encoder=parts.image_encoder.eval(),
        scheduler=parts.scheduler,
        preprocessing=settings.data.preprocessing.model_dump(mode="json"),
        compact_decoder=CompactMaskDecoder.for_autoencoder(parts.autoencoder.config).eval(),
        compact_encoder=CompactImageEncoder.for_encoder(parts.image_encoder.config).eval(),
    )


def work(pipe: LeafPipeline, image: torch.Tensor) -> dict[str, dict[str, float]]:
    """Parameters in millions and GFLOPs an image of each part, counted on the meta device: CPU kernels hide some."""
    z, height, width = pipe.latent_shape((image.shape[2], image.shape[3]))
    latent = torch.empty(1, z, height, width, device="meta")
    calls = {
        "image encoder": (pipe.image_encoder, (image.to("meta"),)),
        "compact image encoder": (pipe.compact_encoder, (image.to("meta"),)),
        "U-Net": (pipe.unet, (torch.cat([latent, latent], 1), torch.zeros(1, device="meta"))),
        "mask decoder": (pipe.vae.decoder, (latent,)),
        "compact mask decoder": (pipe.compact_decoder, (latent,)),
    }
    found = {}
    for name, (module, inputs) in calls.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(module).to("meta")(*inputs)
        found[name] = {"parameters_m": count_parameters(module) / 1e6, "gflop": counter.get_total_flops() / 1e9}
    return {name: {k: round(v, 3) for k, v in row.items()} for name, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="leaf-base", choices=["leaf-base", "leaf-tiny"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    size = arguments.size
    pipe = build(arguments.preset, size)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    print(f"{arguments.preset}, one image {size}x{size}, batch 1; {hardware()}")
    counted = work(pipe, image)
    for name, row in counted.items():
        print(f"  {name:<24}{row['parameters_m']:9.1f} M parameters{row['gflop']:9.1f} GFLOP")

    times: dict[str, list[float]] = {name: [] for name, *_ in MODES}
    for round_number in range(arguments.repeats + 1):  # the first one warms up
        for name, (decoder, encoder), last, half in MODES:
            for module in pipe.components.values():
                if isinstance(module, nn.Module):
                    module.to(memory_format=torch.channels_last if last else torch.contiguous_format)
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                pipe(image, decoder=decoder, encoder=encoder)
            if round_number:
                times[name].append(time.perf_counter() - begin)
    plain = times[MODES[0][0]]
    rows = {}
    for name, taken in times.items():
        ratios = [one / other for one, other in zip(plain, taken, strict=True)]
        rows[name] = {
            "median_ms": round(statistics.median(taken) * 1000, 1),
            "min_ms": round(min(taken) * 1000, 1),
            "max_ms": round(max(taken) * 1000, 1),
            "times_faster_than_plain": round(statistics.median(ratios), 2),
            "lowest_ratio": round(min(ratios), 2),
            "highest_ratio": round(max(ratios), 2),
        }
        row = rows[name]
        print(f"  {name:<38}{row['median_ms']:9.1f} ms [{row['min_ms']}, {row['max_ms']}]", end="")
        print(f"{row['times_faster_than_plain']:8.2f}x [{row['lowest_ratio']}, {row['highest_ratio']}]")
    if arguments.out:
        result = {
            "model": arguments.preset,
            "size": size,
            "repeats": arguments.repeats,
            "hardware": hardware(),
            "torch": torch.__version__,
            "work": counted,
            "rows": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
