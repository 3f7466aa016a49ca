"""Seconds and peak memory of a training step, each economy taken away in turn, against a plain loop in the same run.

    .venv/bin/python benchmarks/training.py --out docs/results/performance/training.json
    .venv/bin/python benchmarks/training.py --preset leaf-base --batch 4 --steps 2 --rounds 1 \
        --modes shipped "shipped, gradient checkpointing" "shipped, gradient checkpointing, 8-bit optimizer" \
        --out docs/results/performance/training-base.json

`plain` is a loop without economies over the same modules and objective: fp32, PyTorch's memory order, the teacher sees
every augmented image, images are read from disk each time, gradients of every norm by PyTorch, averages weight by
weight. `shipped` is what `leafseg train` does with the preset. Every arrangement runs in processes of its own, in turns
(--rounds); one step warms up, and the wait for data counts. Images and masks are synthetic PNG files, weights random:
neither changes a timing. The teacher is the preset's with random weights of its architecture.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from _common import (
    QUICK_SIZE,
    conditions,
    ended_by_sigterm,
    model_settings,
    parser,
    run_child,
    spread,
    write_images,
    write_record,
)

# Settings that take an economy away, or add one that the preset does not have.
MODES: dict[str, list[str]] = {
    "plain": [],
    "shipped": [],
    "shipped, fp32": ["training.precision=fp32"],
    "shipped, bf16": ["training.precision=bf16"],
    "shipped, live teacher": ["teacher.features=live"],
    "shipped, no alignment": ["objective.alignment_weight=0"],
    "shipped, every sample moved": ["data.augmentation.probability=1"],
    "shipped, images decoded each time": ["data.cache_mb=0"],
    "shipped, one loading process": ["data.workers=1"],
    "shipped, PyTorch's own norm gradient": [],
    "shipped, diffusers' own residual blocks": [],
    "shipped, freed memory returned": [],
    "shipped, gradient checkpointing": ["training.gradient_checkpointing=true"],
    "shipped, 8-bit optimizer": ["training.optimizer=adamw_8bit"],
    "shipped, gradient checkpointing, 8-bit optimizer": [
        "training.gradient_checkpointing=true",
        "training.optimizer=adamw_8bit",
    ],
    "shipped, flips alone": [
        "data.augmentation.rotation_degrees=0",
        "data.augmentation.scale=[1,1]",
        "data.augmentation.translation=0",
    ],
}
# Of the teachers that presets name: width, layers, heads, register tokens.
TEACHERS = {"leaf-tiny": (384, 12, 6, 0), "leaf-base": (768, 12, 12, 4)}


def write_teacher(folder: Path, preset: str, quick: bool) -> None:
    """A DINOv2 of the preset's teacher's architecture with random weights, as transformers saves it."""
    import torch
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    width, layers, heads, registers = (32, 1, 2, 1) if quick else TEACHERS[preset]
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_register_tokens=registers,
        image_size=518,
        patch_size=14,
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)


@contextmanager
def without_economies(mode: str) -> Iterator[None]:
    """What no setting turns off."""
    from leafseg.training import leaf_task, session

    own = {
        "shipped, PyTorch's own norm gradient": "use_quick_group_norm",
        "shipped, diffusers' own residual blocks": "use_quick_residual_blocks",
    }
    with ExitStack() as stack:
        if mode in own:
            for module in (session, leaf_task):
                stack.enter_context(mock.patch.object(module, own[mode], lambda part: part))
        if mode == "shipped, freed memory returned":
            stack.enter_context(mock.patch.object(session, "keep_freed_memory", return_value=False))
        yield


def shipped_steps(settings: Any, data: Path, steps: int) -> dict[str, Any]:
    """Seconds of each optimizer step after the first, and of the wait for its batch, as the trainer takes them."""
    from leafseg.config import override_settings
    from leafseg.data.manifest import load_manifest
    from leafseg.training.leaf_task import LeafTask
    from leafseg.training.session import Session

    settings = override_settings(settings, ["training.validations=0"])  # few images may all fall into the train part
    with tempfile.TemporaryDirectory() as run:
        task = LeafTask(settings, load_manifest(data, settings=settings.data))
        session = Session(task, settings.training, Path(run), workers=settings.data.workers)
        batches = session.batches(0, steps + 1)
        seconds, waits = [], []
        for step in range(steps + 1):
            began = time.perf_counter()
            parts = next(batches)
            waits.append(time.perf_counter() - began)
            session.backward(parts, step)
            session.update(settings.training.learning_rate)
            seconds.append(time.perf_counter() - began)
        for _ in batches:
            raise RuntimeError("more batches than steps")
    return {"seconds": seconds[1:], "waits": waits[1:]}


def plain_steps(settings: Any, data: Path, steps: int) -> dict[str, Any]:
    """The same objective on the same samples, without any economy."""
    import torch
    from diffusers.training_utils import EMAModel

    from leafseg.data.dataset import PositionSampler, SegmentationDataset
    from leafseg.data.manifest import load_manifest
    from leafseg.data.transforms import Preprocessor
    from leafseg.model.autoencoder import decode_pictures, encode_pictures, scale_latent
    from leafseg.model.build import build_components, build_projector, tap_grid
    from leafseg.model.teachers import load_teacher
    from leafseg.objective import add_noise, alignment_loss, latent_loss, pixel_loss

    manifest = load_manifest(data, settings=settings.data)
    goal, batch_size = settings.objective, settings.training.batch_size
    parts = build_components(settings)
    teacher = load_teacher(settings.teacher.name, precision="fp32")
    projector = build_projector(settings, teacher_dim=teacher.embed_dim)
    modules = [parts.unet.train(), parts.image_encoder.train(), projector]
    if settings.model.mask_decoder == "trained":
        modules.append(parts.autoencoder.decoder.requires_grad_(True))
    trained = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=settings.training.learning_rate)
    ema = EMAModel(trained, decay=settings.training.ema_decay)
    grid, vae = tap_grid(settings), parts.autoencoder
    part = manifest.part("train")
    samples = SegmentationDataset(
        part, Preprocessor(settings.data.preprocessing), augmentation=settings.data.augmentation, seed=0, cache_mb=0
    )
    sampler = PositionSampler(n=len(part), seed=0, batch_size_global=batch_size, num_steps=steps + 1)
    seconds = []
    for keys in sampler:
        began = time.perf_counter()
        rows = [samples[key] for key in keys]
        images, labels = (torch.stack([row[name] for row in rows]) for name in ("image", "labels"))
        with torch.no_grad():
            mask_latent = encode_pictures(vae, parts.mask_code.encode(labels))
            tokens = teacher.tokens(images, grid)
        timesteps = torch.full((batch_size,), settings.scheduler.num_train_timesteps - 1)
        noisy = add_noise(mask_latent, torch.randn_like(mask_latent), parts.scheduler.alphas_cumprod[timesteps])
        sample = torch.cat([scale_latent(parts.image_encoder(images * 2 - 1), vae.config), noisy], 1)
        prediction, tap = parts.unet.denoise_with_tap(sample, timesteps, tap_block=goal.alignment_tap)
        loss = goal.latent_weight * latent_loss(prediction, mask_latent)
        loss = loss + goal.alignment_weight * alignment_loss(projector(tap), tokens)
        if goal.pixel_weight > 0:
            logits = parts.mask_code.logits(decode_pictures(vae, prediction))
            loss = loss + goal.pixel_weight * pixel_loss(logits, labels, exclusive=parts.mask_code.exclusive)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.training.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained)
        float(loss.detach())
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "waits": []}


def child(job: dict[str, Any]) -> None:
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    overrides = [
        f"teacher.name={job['teacher']}",
        f"training.batch_size={job['batch']}",
        # An alignment of some weight is part of the step whatever the preset's weight is.
        *(["objective.alignment_weight=0.25"] if job["align"] else []),
        *MODES[job["mode"]],
    ]
    settings = model_settings(job["preset"], job["size"], quick=job["quick"], overrides=overrides)
    if job["mode"] == "plain":
        figures = plain_steps(settings, Path(job["data"]), job["steps"])
    else:
        with without_economies(job["mode"]):
            figures = shipped_steps(settings, Path(job["data"]), job["steps"])
    print("FIGURES " + json.dumps(figures))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--preset", choices=("leaf-tiny", "leaf-base"), default="leaf-tiny")
    options.add_argument("--size", type=int, help="input side in pixels; default: the preset's")
    options.add_argument("--batch", type=int, help="default: the preset's")
    options.add_argument("--steps", type=int, default=8, help="timed steps a process")
    options.add_argument("--rounds", type=int, default=2, help="processes of each arrangement, in turns")
    options.add_argument("--modes", nargs="+", choices=MODES, help="default: all but the 8-bit optimizer's")
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        child(json.loads(sys.argv[2]))
        return
    arguments = options.parse_args()
    record = {"question": "training", **conditions(arguments)}
    from leafseg.config import load_settings

    preset = load_settings(arguments.preset)
    size = arguments.size or (QUICK_SIZE if arguments.quick else preset.data.preprocessing.size[0])
    batch = arguments.batch or (2 if arguments.quick else preset.training.batch_size)
    steps, rounds = (1, 1) if arguments.quick else (arguments.steps, arguments.rounds)
    chosen = arguments.modes or [mode for mode in MODES if "8-bit" not in mode]
    modes = ["plain", *(mode for mode in chosen if mode != "plain")]
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    waits: dict[str, list[float]] = {mode: [] for mode in modes}
    peaks: dict[str, list[float]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory(prefix="leafseg-training-") as work, ended_by_sigterm():
        data, teacher = Path(work) / "data", Path(work) / "teacher"
        # Every sample comes once: a cache of teacher features is filled before, the 8-bit images while training.
        write_images(data, 24 if arguments.quick else max(4 * batch, 40), 2 * size)
        write_teacher(teacher, arguments.preset, arguments.quick)
        for number in range(rounds):
            for mode in modes if number % 2 == 0 else modes[::-1]:
                job = {
                    "preset": arguments.preset, "size": size, "batch": batch, "mode": mode, "steps": steps,
                    "data": str(data), "teacher": str(teacher), "threads": arguments.threads,
                    "quick": arguments.quick, "align": preset.objective.alignment_weight == 0,
                }  # fmt: skip
                ran = run_child([sys.executable, __file__, "--child", json.dumps(job)])
                figures = json.loads(ran["output"].rsplit("FIGURES ", 1)[1])
                seconds[mode] += figures["seconds"]
                waits[mode] += figures["waits"]
                peaks[mode].append(ran["peak_mb"])
                print(f"round {number + 1}, {mode}: {statistics.median(figures['seconds']):.3f} s", flush=True)
    plain_seconds, plain_peak = statistics.median(seconds["plain"]), statistics.median(peaks["plain"])
    rows = {}
    for mode in modes:
        figures = {
            **spread(seconds[mode]),
            "faster_than_plain": round(plain_seconds / statistics.median(seconds[mode]), 2),
            "peak_mb": round(statistics.median(peaks[mode])),
            "memory_of_plain": round(statistics.median(peaks[mode]) / plain_peak, 3),
            "wait_for_data_share": round(sum(waits[mode]) / sum(seconds[mode]), 4) if waits[mode] else None,
        }
        rows[mode] = figures
        waiting = f", waits {100 * (figures['wait_for_data_share'] or 0):.1f} % for data" if waits[mode] else ""
        print(f"{mode:52} {figures['median_ms']:8.0f} ms, {figures['faster_than_plain']:.2f} x plain, ", end="")
        print(f"{figures['peak_mb']} MB ({figures['memory_of_plain']:.2f}){waiting}")
    record |= {"preset": arguments.preset, "size": size, "batch": batch, "steps": steps, "rounds": rounds, "rows": rows}
    write_record(arguments.out, record)


if __name__ == "__main__":
    main()
