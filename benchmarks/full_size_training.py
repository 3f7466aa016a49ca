"""Fine-tuning LEAF at its full size: seconds, peak memory and sizes on disk, against the plain design in the same run.

    .venv/bin/python benchmarks/full_size_training.py --out docs/results/full_size.json

Each arrangement trains leaf-base (256 px, batch 1, DINOv2 ViT-B/14 with registers as the teacher) for three steps in a
process of its own; those of leafseg stop after the second step, resume, validate on one image, and predict it. Weights
are random and images are synthetic: they change no timing. `plain` is a loop without any economy, written out below:
fp32, default memory format, gradients and optimizer state in fp32, the teacher live, everything saved in one file.
Seconds of a step are the mean of the first two (the first of a process is slower), in all arrangements. Needs about
16 GB of memory, 25 GB of disk and 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE, STEPS = 256, 3
# What is added to preset leaf-base; the preset itself has bf16 where the hardware multiplies in it.
ARRANGEMENTS: dict[str, list[str]] = {
    "leaf-base": [],
    "leaf-base, cached teacher": ["teacher.features=cached"],
    "leaf-base, cached teacher, gradient checkpointing": [
        "teacher.features=cached",
        "training.gradient_checkpointing=true",
    ],
    "leaf-base, cached teacher, gradient checkpointing, 8-bit optimizer": [
        "teacher.features=cached",
        "training.gradient_checkpointing=true",
        "training.optimizer=adamw_8bit",
    ],
}


def write_data(folder: Path) -> None:
    """Eight images with an ellipse each; a split with one validation image."""
    import csv

    import numpy as np

    from leafseg.data.images import write_png

    draws = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    for index in range(8):
        inside = ((y - 100 - 5 * index) / 60) ** 2 + ((x - 128) / 40) ** 2 <= 1
        pixels = draws.integers(0, 90, (SIZE, SIZE, 3)) + 120 * inside[..., None]
        write_png(folder / "images" / f"{index}.png", pixels.astype(np.uint8))
        write_png(folder / "masks" / f"{index}.png", inside.astype(np.uint8) * 255)
    with (folder / "manifest.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "mask", "part"])
        for index in range(8):
            part = {0: "validation", 1: "test"}.get(index, "train")
            rows.writerow([f"images/{index}.png", f"masks/{index}.png", part])


def write_teacher(folder: Path) -> None:
    """The released teacher's architecture with random weights, as transformers saves it."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=518, patch_size=14)).save_pretrained(folder)


def run(command: list[str], log: Path) -> dict[str, float]:
    """Seconds and peak memory of a process; its output goes to ``log``.

    Raises:
        SystemExit: if it fails.
    """
    began = time.monotonic()
    with log.open("a") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed; see {log}:\n{log.read_text()[-2000:]}")
    return {"seconds": round(time.monotonic() - began, 1), "peak_gb": round(usage.ru_maxrss / 1024**2, 2)}


def size_gb(path: Path) -> float:
    """Size on disk; a file with several names counts once."""
    files = {f.stat().st_ino: f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()}
    return round(sum(files.values()) / 1e9, 3)


def plain(data: Path, teacher_folder: Path, out: Path) -> None:
    """Three steps without any economy, then one file with everything, as research code saves it."""
    import statistics

    import numpy as np
    import torch
    from diffusers.training_utils import EMAModel
    from transformers import AutoModel

    from leafseg.config import load_settings
    from leafseg.data.images import read_image, read_mask
    from leafseg.model.autoencoder import encode_pictures, scale_latent
    from leafseg.model.build import build_components, build_projector
    from leafseg.objective import add_noise, alignment_loss, latent_loss

    settings = load_settings("leaf-base")
    parts = build_components(settings)
    teacher = AutoModel.from_pretrained(teacher_folder).eval()
    projector = build_projector(settings, teacher_dim=768)
    unet, encoder = parts.unet.train(), parts.image_encoder.train()
    trained = [p for module in (unet, encoder, projector) for p in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=4e-5)
    ema = EMAModel(list(unet.parameters()))
    times = []
    for step in range(STEPS):
        began = time.monotonic()
        name = f"{step + 2}.png"
        image = torch.from_numpy(read_image(data / "images" / name)).permute(2, 0, 1)[None].float() / 255
        labels = torch.from_numpy(read_mask(data / "masks" / name).astype(np.int64) > 0)[None]
        with torch.no_grad():
            mask_latent = encode_pictures(parts.autoencoder, parts.mask_code.encode(labels))
            small = torch.nn.functional.interpolate(image, (224, 224), mode="bicubic")
            tokens = teacher(small).last_hidden_state[:, 5:]  # after the class token and four registers
        timestep = torch.randint(1000, (1,))
        alpha_bar = parts.scheduler.alphas_cumprod[timestep]
        noisy = add_noise(mask_latent, torch.randn_like(mask_latent), alpha_bar)
        latent = scale_latent(encoder(image * 2 - 1), parts.autoencoder.config)
        prediction, tap = unet.denoise_with_tap(torch.cat([latent, noisy], 1), timestep, tap_block=0)
        loss = latent_loss(prediction, mask_latent) + 0.75 * alignment_loss(projector(tap), tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        times.append(time.monotonic() - began)
    began = time.monotonic()
    everything = {"unet": unet, "vae": parts.autoencoder, "image_encoder": encoder, "projector": projector}
    weights = {name: module.state_dict() for name, module in everything.items()}
    torch.save({**weights, "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}, out / "checkpoint.pt")
    figures = {"step_seconds": statistics.mean(times[:2]), "save_seconds": time.monotonic() - began}
    (out / "figures.json").write_text(json.dumps(figures))


def with_leafseg(overrides: list[str], data: Path, teacher: Path, out: Path) -> dict[str, float]:
    """Two steps, resumed for a third; then one prediction."""
    shared = ["train", "--data", str(data / "manifest.csv"), "--preset", "leaf-base", "--out", str(out / "run")]
    for value in (
        "training.batch_size=1",
        "training.validations=1",
        "training.validation_samples=1",
        f"teacher.name={teacher}",
        *overrides,
    ):
        shared += ["--set", value]
    leafseg = [sys.executable, "-m", "leafseg"]
    log = out / "log.txt"
    first = run([*leafseg, *shared, "--steps", str(STEPS), "--stop-after", "2"], log)
    first_checkpoint = size_gb(out / "run" / "checkpoints")
    resumed = run([*leafseg, *shared, "--steps", str(STEPS), "--resume", "auto"], log)
    image = str(data / "images" / "0.png")
    predicted = run([*leafseg, "predict", str(out / "run"), image, "--out", str(out / "predicted")], log)
    slim = [*leafseg, "slim", str(out / "run"), "--out", str(out / "slim"), "--decoder-only"]
    run(slim, log)
    last = out / "run" / "checkpoints" / f"step-{STEPS:06d}"
    steps = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    speed = [row["train/samples_per_second"] for row in steps if "train/samples_per_second" in row]
    return {
        "step_seconds": round(1 / speed[0], 2),
        "train_2_steps_seconds": first["seconds"],
        "resume_1_step_seconds": resumed["seconds"],
        "predict_seconds": predicted["seconds"],
        "peak_gb": max(first["peak_gb"], resumed["peak_gb"]),
        "predict_peak_gb": predicted["peak_gb"],
        "trainer_gb": size_gb(last / "trainer"),
        "inference_gb": size_gb(last / "pipeline"),
        "decoder_only_gb": size_gb(out / "slim"),
        "run_gb": max(first_checkpoint, size_gb(out / "run" / "checkpoints")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="folder for everything that is written; default: a temporary one")
    parser.add_argument("--only", help="run this arrangement alone (and plain)")
    parser.add_argument("--plain", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        plain(*arguments.plain)
        return
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="leafseg-full-size-", dir=arguments.work))  # removed at the end
    data, teacher = work / "data", work / "teacher"
    write_data(data)
    write_teacher(teacher)

    import torch

    rows: dict[str, dict[str, float]] = {}
    place = work / "plain"
    place.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--plain", str(data), str(teacher), str(place)]
    whole = run(command, place / "log.txt")
    figures = json.loads((place / "figures.json").read_text())
    rows["plain"] = {
        "step_seconds": round(figures["step_seconds"], 2),
        "peak_gb": whole["peak_gb"],
        "trainer_gb": size_gb(place / "checkpoint.pt"),
    }
    print("plain", rows["plain"], flush=True)
    shutil.rmtree(place)
    for name, overrides in ARRANGEMENTS.items():
        if arguments.only not in (None, name):
            continue
        place = work / "run"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        rows[name] = with_leafseg(overrides, data, teacher, place)
        for figure in ("step_seconds", "peak_gb", "trainer_gb"):
            rows[name][f"{figure}_of_plain"] = round(rows[name][figure] / rows["plain"][figure], 3)
        print(name, rows[name], flush=True)
        shutil.rmtree(place)
    hardware = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    result = {"hardware": hardware, "torch": torch.__version__, "size": SIZE, "batch": 1, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
