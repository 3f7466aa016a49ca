"""How far is a converted checkpoint from what the released code computed? Writes docs/results/parity.{json,md}.

    .venv/bin/python experiments/parity.py [--golden FOLDER]

FOLDER (default: golden/ inside LEAFSEG_SHARED, or in a folder named shared beside the repository) holds
released_layout.py, which writes a full-size checkpoint with reproducible weights, and released_outputs.npz, which holds
the released code's outputs for it in float32. Differences are the largest absolute ones, over the largest absolute
value of the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from leafseg.convert import convert
from leafseg.pipeline import LeafPipeline

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results"
COMMAND = ".venv/bin/python experiments/parity.py"
BAR = 2e-5
JUDGED = ("image_latent", "unet", "decoded")


def golden_folder() -> Path:
    shared = os.environ.get("LEAFSEG_SHARED")
    return (Path(shared) if shared else REPOSITORY.parent / "shared") / "golden"


@torch.no_grad()
def outputs_of(pipe: LeafPipeline, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What the pipeline computes for ``image`` in one step from ``noise``, by stage, under the reference's names."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, scale: float = 1.0, *, given: bool = False) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if given else output[0] if isinstance(output, tuple) else output
            seen[name] = value * scale

        return hook

    scale = float(pipe.vae.config["scaling_factor"])
    hooks = [
        pipe.image_encoder.register_forward_hook(keep("image_latent", scale)),
        pipe.unet.register_forward_hook(keep("unet")),
        pipe.vae.post_quant_conv.register_forward_hook(keep("x0", scale, given=True)),
        pipe.vae.decoder.register_forward_hook(keep("decoded")),
    ]
    try:
        seen["probability"] = pipe(image, latents=noise).probability
    finally:
        for hook in hooks:
            hook.remove()
    seen["vae_mode"] = pipe.vae.encode(image * 2 - 1).latent_dist.mode()
    return seen


def differences(pipe: LeafPipeline, reference: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    inputs = {name: torch.from_numpy(reference[name]) for name in ("image", "noise")}
    figures = {}
    for name, value in outputs_of(pipe, inputs["image"], inputs["noise"]).items():
        wanted = reference[name].astype(np.float64)
        largest = float(np.abs(value.numpy().astype(np.float64) - wanted).max())
        magnitude = float(np.abs(wanted).max())
        figures[name] = {"max_difference": largest, "magnitude": magnitude, "relative": largest / magnitude}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=golden_folder())
    parser.add_argument("--checkpoint", type=Path, help="what released_layout.py wrote; default: it is run")
    arguments = parser.parse_args()
    with np.load(arguments.golden / "released_outputs.npz") as stored:
        reference = {name: stored[name] for name in stored.files}
    with tempfile.TemporaryDirectory() as work:
        released, out = arguments.checkpoint or Path(work) / "released", Path(work) / "converted"
        if arguments.checkpoint is None:
            subprocess.run([sys.executable, str(arguments.golden / "released_layout.py"), str(released)], check=True)
        begin = time.perf_counter()
        report = convert(released, out)
        seconds = time.perf_counter() - begin
        pipe = LeafPipeline.from_pretrained(out)
        figures = differences(pipe, reference)
    print(f"{'output':<14}{'max difference':>16}{'magnitude':>12}{'relative':>12}")
    for name, row in figures.items():
        print(f"{name:<14}{row['max_difference']:>16.2e}{row['magnitude']:>12.3g}{row['relative']:>12.2e}")
    record = {
        "command": COMMAND,
        "bar": BAR,
        "outputs": figures,
        "tensors": {name: [part.source_tensors, part.tensors] for name, part in report.parts.items()},
        "seconds_to_convert": round(seconds, 1),
        "hardware": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "parity.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "parity.md").write_text(page(record))
    if any(figures[name]["relative"] > BAR for name in JUDGED):
        sys.exit(f"beyond the bar of {BAR:g}")


def page(record: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {row['max_difference']:.2e} | {row['magnitude']:.3g} | {row['relative']:.2e} |"
        for name, row in record["outputs"].items()
    ]
    tensors = ", ".join(f"{name} {read} to {written}" for name, (read, written) in record["tensors"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join(
        [
            "# A converted checkpoint computes what the released code computes",
            "",
            "Written by `experiments/parity.py`; do not edit by hand. Research software, not a medical device.",
            "",
            "A full-size checkpoint in the released layout, with reproducible weights, was converted with",
            "`leafseg convert` and run through `LeafPipeline`: one image of 256x256, one step, float32. The reference",
            "is what the released code computed with the same weights, image and noise. Relative: the largest",
            "difference over the largest value of the reference.",
            f"The bar is {record['bar']:g} for image latent, U-Net and decoded image.",
            "",
            "| output | largest difference | largest value | relative |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "`x0` is the clean mask latent after the released clip to ±1; `vae_mode` is the autoencoder's own latent",
            "of the image, unscaled.",
            "",
            f"Tensors read and written: {tensors}",
            "(a fused query-key-value projection becomes three).",
            f"The conversion took {record['seconds_to_convert']} s with {record['threads']} threads on",
            f"{record['hardware']}; {versions}.",
            "",
            "```",
            record["command"],
            "```",
            "",
        ]
    )


if __name__ == "__main__":
    main()
