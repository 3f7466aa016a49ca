"""What the benchmarks share: options, records, random models, child processes with their peak memory, matmul peaks."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a child's peak memory counts what its parent held when it was started: nothing heavy up here
    from leafseg.config import Settings
    from leafseg.pipeline import LeafPipeline


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="a check of seconds: a tiny model, one call of each")
    made.add_argument("--repeats", type=int, default=5, help="timed calls of each, after one that does not count")
    made.add_argument("--threads", type=int, help="default: torch's own")
    made.add_argument("--out", type=Path, help="JSON file for the record")
    return made


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, threads, repeats and the command: what a record needs to be understood."""
    import torch

    from leafseg.hardware import library_versions, processor

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found = {
        "command": shlex.join(["benchmarks/" + Path(sys.argv[0]).name, *_without_out(sys.argv[1:])]),
        "quick": arguments.quick,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "repeats": arguments.repeats,
    }
    unit = found["processor"]
    print(f"{unit['model']} ({unit['machine']}, {unit['instructions']}), {unit['cores']} cores, ", end="")
    print(f"{found['threads']} threads, bf16 {'yes' if unit['bf16'] else 'no'}; ", end="")
    print(", ".join(f"{name} {number}" for name, number in found["versions"].items()), flush=True)
    return found


def _without_out(words: Sequence[str]) -> list[str]:
    return [word for index, word in enumerate(words) if word != "--out" and (index == 0 or words[index - 1] != "--out")]


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """To a JSON file; a record of leaf-tiny says of which of its networks, told apart by the latents' stride."""
    if path is not None:
        if record.get("preset") == "leaf-tiny":
            from leafseg.config import load_settings

            record["latent_stride"] = load_settings("leaf-tiny").model.autoencoder.stride
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, fastest and slowest, in milliseconds."""
    ordered = sorted(1000 * value for value in seconds)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"median_ms": round(median, 3), "fastest_ms": round(ordered[0], 3), "slowest_ms": round(ordered[-1], 3)}


def shown(figures: dict[str, float]) -> str:
    return f"{figures['median_ms']:9.1f} ms  [{figures['fastest_ms']:.1f}, {figures['slowest_ms']:.1f}]"


QUICK_SIZE = 64  # a multiple of what leaf-tiny's layout below takes
# leaf-tiny's architecture at a width that builds and runs in a blink.
_QUICK = (
    "model.autoencoder.weights=null",
    "model.autoencoder.block_out_channels=[8,8,16,16]",
    "model.autoencoder.norm_num_groups=4",
    "model.unet.block_out_channels=[32,64]",
    "model.unet.down_block_types=[AttnDownBlock2D,DownBlock2D]",
    "model.unet.up_block_types=[ResnetUpsampleBlock2D,AttnUpBlock2D]",
    "model.unet.norm_num_groups=8",
    "model.unet.layers_per_block=1",
    "objective.alignment_tap=0",
)


def model_settings(preset: str, size: int, *, quick: bool = False, overrides: Sequence[str] = ()) -> Settings:
    from leafseg.config import load_settings

    small = _QUICK if quick else ()
    given = [f"data.preprocessing.size=[{size},{size}]", "teacher.name=none", *small, *overrides]
    return load_settings("leaf-tiny" if quick else preset, overrides=given)


def write_images(folder: Path, count: int, side: int) -> None:
    import numpy as np

    from leafseg.benchmark import synthetic_images
    from leafseg.data.images import write_png

    y, x = np.mgrid[:side, :side]
    for index, image in enumerate(synthetic_images((side, side), count)):
        inside = (y - side / 2) ** 2 + (x - side / 3 - index) ** 2 < (side / 4) ** 2
        write_png(folder / "images" / f"{index:03d}.png", (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
        write_png(folder / "masks" / f"{index:03d}.png", inside.astype(np.uint8) * 255)


def write_random_model(
    folder: Path,
    settings: Settings,
    *,
    label_names: Sequence[str] = ("background", "foreground"),
    compact: bool = False,
) -> None:
    """A pipeline folder with random weights: they change no timing. ``compact`` adds the parts of `leafseg compact`."""
    import torch

    from leafseg.model.build import build_components
    from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
    from leafseg.model_folder import save_model_folder
    from leafseg.pipeline import LeafPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = build_components(settings, label_names=tuple(label_names), with_weights=False)
        light: dict[str, Any] = {}
        if compact:
            light["compact_decoder"] = CompactMaskDecoder.for_autoencoder(parts.autoencoder.config)
            light["compact_encoder"] = CompactImageEncoder.for_encoder(parts.image_encoder.config)
    pipeline = LeafPipeline(
        unet=parts.unet,
        vae=parts.autoencoder,
        image_encoder=parts.image_encoder,
        scheduler=parts.scheduler,
        preprocessing=settings.data.preprocessing.model_dump(mode="json"),
        mask_code={"name": parts.mask_code.name, "label_names": list(label_names)},
        noise=settings.objective.terminal_noise,  # as training stores it: drawing noise takes milliseconds
        **light,
    )
    save_model_folder(pipeline, folder)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM (of `timeout`, say) ends the block as Ctrl-C does, so that gigabytes of weights do not stay behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def random_model(preset: str, size: int, *, quick: bool = False, compact: bool = False) -> Iterator[Path]:
    """A pipeline folder with random weights, made by a child so that this process stays small; removed at the end."""
    with tempfile.TemporaryDirectory(prefix="leafseg-benchmark-") as folder, ended_by_sigterm():
        if quick:
            write_random_model(Path(folder), model_settings(preset, size, quick=True), compact=compact)
        else:
            job = {"folder": folder, "preset": preset, "size": size, "compact": compact}
            run_child([sys.executable, __file__, json.dumps(job)])
        yield Path(folder)


def set_input_size(folder: Path, size: int) -> None:
    """The same weights for another input size."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["preprocessing"]["size"] = [size, size]
    path.write_text(json.dumps(index))


def run_child(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """Wall seconds, CPU seconds and peak memory of a process, and what it printed.

    Raises:
        SystemExit: if it fails.
    """
    source = str(Path(__file__).resolve().parents[1] / "src")
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths, **environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    peak_mb = usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak_mb, "output": text}


def matmul_peaks(*, side: int = 2048, repeats: int = 5) -> dict[str, float]:
    """GFLOP/s of the fastest square matrix product, in fp32 and bf16: what this machine can do."""
    import torch

    peaks = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        one = torch.ones(side, side, dtype=dtype)
        seconds = []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            one @ one
            seconds.append(time.perf_counter() - begun)
        peaks[name] = round(2e-9 * side**3 / min(seconds), 1)
    return peaks


def plain_and_default(folder: Path) -> dict[str, Callable[[], tuple[LeafPipeline, Callable[[], Any]]]]:
    """What `predict` computes without --fast: loaders of (pipeline, context of each call)."""
    from contextlib import nullcontext

    import torch

    from leafseg.pipeline import LeafPipeline

    def load(layout: torch.memory_format) -> LeafPipeline:
        pipeline = LeafPipeline.from_pretrained(folder)
        for part in (pipeline.unet, pipeline.vae, pipeline.image_encoder):
            part.to(memory_format=layout)
        return pipeline

    return {
        "plain": lambda: (load(torch.contiguous_format), nullcontext),
        "channels_last (predict)": lambda: (load(torch.channels_last), nullcontext),
        "bf16 autocast (predict --precision bf16)": lambda: (
            load(torch.channels_last),
            lambda: torch.autocast("cpu", torch.bfloat16),
        ),
    }


if __name__ == "__main__":  # the child of random_model
    wanted = json.loads(sys.argv[1])
    settings = model_settings(wanted["preset"], wanted["size"])
    write_random_model(Path(wanted["folder"]), settings, compact=wanted["compact"])
