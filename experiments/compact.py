"""Does a compact mask decoder draw what a full-size one draws, and a compact leaf-tiny segment as the full one does?

    .venv/bin/python experiments/compact.py autoencoder --data DATA/isic2018 --data DATA/busi --data DATA/dsb2018 \\
        --out runs/kl-f8-shape --minutes 60
    .venv/bin/python experiments/compact.py decoder --data DATA/isic2018 --data DATA/busi --data DATA/dsb2018 \\
        --out runs/kl-f8-shape --minutes 60
    .venv/bin/python experiments/compact.py end-to-end --data DATA/wbc --model RUN --out RUN/compact --minutes 40
    .venv/bin/python experiments/compact.py page

Each is a unit that can be stopped and continued with the same command; the last three append a record to
docs/results/runs.jsonl when they are done, and write docs/results/compact.md from all records. The weights of kl-f8
are not at hand: an autoencoder of its shape is trained on crops of 64 px, with random weights to begin with, and its
decoder is then the one to be imitated. Whoever has the real weights runs `leafseg compact` on a model that holds them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leafseg.compact import AGREEMENT_FILE
from leafseg.config import (
    AutoencoderSettings,
    DataSettings,
    PreprocessingSettings,
    load_compact_settings,
    load_settings,
)
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.manifest import load_manifest
from leafseg.data.transforms import Preprocessor
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.evaluation.metrics import symmetric_dice
from leafseg.files import append_line, read_json, write_text_atomic
from leafseg.hardware import multiplies_in_bf16
from leafseg.mask_code import BinaryMaskCode, foreground
from leafseg.model.autoencoder import decode_pictures, encode_pictures, load_autoencoder
from leafseg.model.build import build_components, count_parameters
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.progress import progress_bar
from leafseg.rng import generator
from leafseg.runs import PIPELINE_FOLDER, best_checkpoint, checkpoint_steps
from leafseg.training.compact_tasks import DecoderDistillationTask
from leafseg.training.run import library_versions
from leafseg.training.trainer import train as run_loop

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
RECORDS, PAGE = RESULTS / "runs.jsonl", RESULTS / "compact.md"
EXPERIMENT = "compact"
CROP = 64
SIZE = 256  # what a full-size model works on, and masks are compared at
NOISE = (0.0, 0.15, 0.3)  # on latents whose values have a standard deviation of about 1
TARGET = 0.995
MASKS = 40
KL_F8 = (128, 256, 512, 512)
# kl-f8's shape. A batch of two crops is a step of some seconds on two cores.
AUTOENCODER = [
    f"model.block_out_channels={list(KL_F8)}",
    "model.layers_per_block=2",
    "model.latent_channels=4",
    "model.norm_num_groups=32",
    "model.mid_block_attention=true",
    f"crop={CROP}",
    "image_share=0.15",
    "training.batch_size=2",
    "training.learning_rate=2e-4",
    "training.ema_decay=0.995",
    "training.validations=1",  # at 256 px one sample costs as much as a step or more
    "training.validation_samples=6",
    "training.save_every=200",
    "statistics_samples=6",
]
# Whole pictures cost the full decoder what as many crops cost, and norms see what they will see at inference.
DECODER = [
    f"decoder.crop={SIZE}",
    "decoder.training.batch_size=2",
    "decoder.training.ema_decay=0.995",
    "decoder.training.validations=2",
    "decoder.training.validation_samples=6",
]


def leafseg(*arguments: object) -> None:
    """Run the command line as a user would; ends this script if it fails."""
    ended = subprocess.run([sys.executable, "-m", "leafseg", *map(str, arguments)])
    if ended.returncode:
        sys.exit(ended.returncode)


def train_autoencoder(data: list[Path], out: Path, minutes: float) -> None:
    folders = [part for folder in data for part in ("--data", folder)]
    settings = [part for setting in AUTOENCODER for part in ("--set", setting)]
    leafseg(
        "train-autoencoder", *folders, "--out", out / "autoencoder", "--minutes", minutes, "--resume", "auto", *settings
    )


def distil_decoder(data: list[Path], out: Path, minutes: float, masks: int) -> None:
    """Distil on synthetic masks alone, and compare the two decoders on real masks of the sets' test parts."""
    run = out / "autoencoder"
    if not checkpoint_steps(run):
        sys.exit(f"{run}: no trained autoencoder; run the unit `autoencoder` first")
    autoencoder = load_autoencoder(best_checkpoint(run) / "autoencoder").eval()
    if tuple(autoencoder.config["block_out_channels"]) != KL_F8:
        sys.exit(f"{run}: the autoencoder has not kl-f8's shape, and the page would say it has")
    preprocessor = Preprocessor(PreprocessingSettings(size=(SIZE, SIZE)))
    settings = load_compact_settings(overrides=[*DECODER, f"decoder.training.minutes={minutes}"]).decoder
    task = DecoderDistillationTask(autoencoder, preprocessor, settings)
    record = {"settings": settings.model_dump(mode="json"), "versions": library_versions()}
    result = run_loop(task, settings.training, out / "decoder", record=record, resume=True)
    if result.status != "finished":
        sys.exit(f"{result.status} at step {result.step} of {result.total_steps}: continue with the same command")
    compact = CompactMaskDecoder.from_pretrained(result.checkpoint / task.pipeline_folder).eval()

    trained = json.loads((run / "run.json").read_text())["record"]
    sets, took = {}, []
    for folder in data:
        manifest = load_manifest(folder, settings=DataSettings())
        part = SegmentationDataset(manifest.part("test"), preprocessor, augmentation=None, seed=0, cache_mb=0)
        rows: dict[str, list[tuple[str, float]]] = {f"{noise:g}": [] for noise in NOISE}
        round_trip, empty = [], 0
        count = min(masks, len(part))
        with progress_bar(f"decoders on {folder.name}", total=count) as bar:
            for index in [i * len(part) // count for i in range(count)]:
                labels = foreground(part[0, index]["labels"][None])
                bar.advance()
                if not labels.any():
                    empty += 1
                    continue
                name = manifest.part("test").samples[index].name
                with torch.no_grad():
                    latent = encode_pictures(autoencoder, BinaryMaskCode().encode(labels))
                    draws = generator(0, "compact-decoders", index).standard_normal(latent.shape, dtype=np.float32)
                    for noise in NOISE:
                        disturbed = latent + noise * torch.from_numpy(draws)
                        begin = time.perf_counter()
                        full = decode_pictures(autoencoder, disturbed).mean(1, keepdim=True) > 0
                        middle = time.perf_counter()
                        light = compact(disturbed) > 0
                        took.append((middle - begin) / (time.perf_counter() - middle))
                        dice = float(symmetric_dice(light, full))
                        if not np.isnan(dice):
                            rows[f"{noise:g}"].append((name, dice))
                        if noise == 0:
                            own = float(symmetric_dice(full, labels[:, None] > 0))
                            round_trip.append(0.0 if np.isnan(own) else own)
        sets[folder.name] = {
            "masks": count - empty,
            "empty": empty,
            "split_sha256": manifest.split_sha256,
            "round_trip": asdict(bootstrap_mean(round_trip)),
            "agreement": {
                noise: {
                    **asdict(bootstrap_mean([dice for _, dice in found])),
                    "worst": min(found, key=lambda row: row[1]),
                }
                for noise, found in rows.items()
                if found
            },
        }
    store(
        {
            "unit": "decoder",
            "commands": [
                command("autoencoder", data, trained["calibration"]["minutes"]),
                command("decoder", data, minutes) + ("" if masks == MASKS else f" --masks {masks}"),
            ],
            "autoencoder": trained,
            "autoencoder_steps": checkpoint_steps(run)[-1],
            "settings": record["settings"],
            "seed": settings.training.seed,
            "steps": result.total_steps,
            "training": training_figures(out / "decoder"),
            "sets": sets,
            "full_over_compact_seconds": round(float(np.median(took)), 1),
            "size": SIZE,
            "crop": CROP,
            "decoder_crop": settings.crop,
        }
    )


def end_to_end(data: Path, model: Path, out: Path, minutes: float, note: str) -> None:
    """`leafseg compact` on a trained model, then Dice against the truth with the full and with the compact parts."""
    arguments = ["compact", model, "--images", data, "--data", data, "--out", out, "--minutes", minutes]
    ended = subprocess.run([sys.executable, "-m", "leafseg", *map(str, arguments), "--resume", "auto"])
    if not (out / AGREEMENT_FILE).is_file():
        sys.exit(ended.returncode or "not finished: continue with the same command")
    stored = read_json(out / AGREEMENT_FILE)
    scores = {}
    if (out / PIPELINE_FOLDER).is_dir():
        for kind in ("full", "compact"):
            figures = out / f"evaluation-{kind}"
            leafseg(
                *("evaluate", out / PIPELINE_FOLDER, "--data", data, "--split", "test", "--out", figures),
                *("--no-report", "--decoder", kind, "--encoder", kind),
            )
            classes = read_json(figures / "summary.json")["classes"]
            scores[kind] = {name: row["dice"] for name, row in classes.items()}
    store(
        {
            "unit": "end-to-end",
            "command": f"leafseg compact RUN --images DATA/{data.name} --data DATA/{data.name} --out RUN/compact "
            f"--minutes {minutes:g}",
            "data": data.name,
            "model_settings": json.loads((model / "run.json").read_text())["record"]["settings"],
            "model_sha256": stored["model_sha256"],
            "images_sha256": stored["images_sha256"],
            "bar": stored["bar"],
            "written": (out / PIPELINE_FOLDER).is_dir(),
            "agreement": stored["agreement"],
            "dice": scores,
            "training": {
                part: training_figures(out / part)
                for part in ("decoder", "tuning", "encoder")
                if (out / part / "run.json").is_file()
            },
            "note": note,
            "seed": load_compact_settings().decoder.training.seed,
        }
    )


def training_figures(run: Path) -> dict[str, Any]:
    """Steps, calibration and validation scores of a finished training, and the seconds that its steps took."""
    stored = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": stored["total_steps"],
        "calibration": stored["record"].get("calibration"),
        "settings": stored["record"]["settings"],
        "validation": {line["step"]: line["validation/score"] for line in lines if "validation/score" in line},
    }


def command(unit: str, data: list[Path], minutes: float) -> str:
    folders = " ".join(f"--data DATA/{folder.name}" for folder in data)
    return f".venv/bin/python experiments/compact.py {unit} {folders} --out RUN --minutes {minutes:g}"


def store(record: dict[str, Any]) -> None:
    """Append a record with its circumstances, unless an equal measurement is there already."""
    here = Path(__file__).parent
    full = {
        "experiment": EXPERIMENT,
        **record,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip(),
        "versions": {"leafseg": version("leafseg"), **library_versions()},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, bf16 {'yes' if multiplies_in_bf16() else 'no'}",
    }
    values = ("unit", "data", "sets", "agreement", "dice", "training")
    if any(all(row.get(k) == full.get(k) for k in values) for row in records()):
        print("recorded already")
        return
    append_line(RECORDS, json.dumps(full))


def records() -> list[dict[str, Any]]:
    lines = RECORDS.read_text().splitlines() if RECORDS.is_file() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return [json.loads(json.dumps(row)) for row in rows if row.get("experiment") == EXPERIMENT]


# --- the page ---------------------------------------------------------------------------------------------------------


def interval(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "not measurable"
    if figures["low"] is None:
        return f"{figures['mean']:.4f}"
    return f"{figures['mean']:.4f} [{figures['low']:.4f}, {figures['high']:.4f}]"


def work() -> list[str]:
    """Parameters and GFLOPs of the parts of leaf-base and leaf-tiny, counted without weights or memory."""
    from torch.utils.flop_counter import FlopCounterMode

    rows = [
        "| | size | image encoder | compact | U-Net | mask decoder | compact | all | all compact |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in ("leaf-base", "leaf-tiny"):
        settings = load_settings(preset)
        height, width = settings.data.preprocessing.size
        with torch.device("meta"):
            parts = build_components(settings, with_weights=False)
            z = settings.model.autoencoder.latent_channels
            down = settings.model.autoencoder.stride
            image, code = torch.empty(1, 3, height, width), torch.empty(1, z, height // down, width // down)
            light_decoder = CompactMaskDecoder.for_autoencoder(parts.autoencoder.config)
            light_encoder = CompactImageEncoder.for_encoder(parts.image_encoder.config)
        calls = [
            (parts.image_encoder, (image,)),
            (light_encoder, (image,)),
            (parts.unet, (torch.cat([code, code], 1), torch.zeros(1, device="meta"))),
            (parts.autoencoder.decoder, (code,)),
            (light_decoder, (code,)),
        ]
        counts = []
        for module, inputs in calls:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(*inputs)
            counts.append(counter.get_total_flops() / 1e9)
        full, light = counts[0] + counts[2] + counts[3], counts[1] + counts[2] + counts[4]
        cells = [
            f"{count:.1f} ({count_parameters(module) / 1e6:.1f} M)"
            for count, (module, _) in zip(counts, calls, strict=True)
        ]
        rows.append(
            f"| `{preset}` | {height} px | {' | '.join(cells)} | {full:.1f} | {light:.1f} ({full / light:.1f}x less) |"
        )
    return rows


def decoder_sections(found: list[dict[str, Any]]) -> list[str]:
    """The newest record of each size of masks that a decoder learned from, whole pictures first."""
    text = ["## The decoder, on an autoencoder of kl-f8's shape", ""]
    if not found:
        return [*text, "Not run yet.", ""]
    newest = {record.get("decoder_crop", record["crop"]): record for record in found}
    for side, record in sorted(newest.items(), reverse=True):
        text += [f"### Learned from masks of {side} px", "", *decoder_section(record, side)]
        if side < record["size"]:
            rising = ", ".join(f"{dice:.4f}" for dice in record["training"]["validation"].values())
            text += [
                f"On crops its validation Dice went on rising ({rising}): it learned what holds for crops, probably",
                f"because norms see other statistics at {record['size']} px. That is why `leafseg compact` takes whole",
                "pictures of up to 256 px, and then the model's own latents.",
                "",
            ]
    return text


def decoder_section(record: dict[str, Any], side: int) -> list[str]:
    text = [
        "An AutoencoderKL with kl-f8's layout, from random weights, was trained for",
        f"{record['autoencoder_steps']} steps on crops of {record['crop']} px; a compact decoder was then distilled",
        f"from it in {record['steps']} steps on synthetic masks of {side} px alone. Below: real",
        f"masks of the test parts at {record['size']} px, which neither training saw, through both decoders; empty",
        "masks are left out. Written by:",
        "",
        "```",
        *record["commands"],
        "```",
        "",
        "| masks | n (empty left out) | autoencoder's own Dice | noise | agreement of the decoders | worst mask |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in record["sets"].items():
        for noise, figures in found["agreement"].items():
            first = [name, f"{found['masks']} ({found['empty']})", interval(found["round_trip"])]
            cells = first if noise == "0" else ["", "", ""]
            worst, dice = figures["worst"]
            text.append(f"| {' | '.join([*cells, noise, interval(figures), f'{dice:.4f} ({worst})'])} |")
    lowest = min(found["agreement"]["0"]["mean"] for found in record["sets"].values())
    verdict = "reached" if lowest >= TARGET else "missed"
    return [
        *text,
        "",
        "Agreement: mean Dice of the compact decoder's mask with the full one's, 95 % bootstrap intervals over masks;",
        "the noise is Gaussian, on latents whose values have a standard deviation of about 1. In the same run the",
        f"full decoder took {record['full_over_compact_seconds']} times as long (median, fp32). The target of {TARGET}",
        f"without noise is {verdict} (lowest set {lowest:.4f}). {record['hardware']},",
        f"torch {record['versions']['torch']}, commit {record['commit'][:7]}.",
        "",
    ]


def end_to_end_section(found: list[dict[str, Any]]) -> list[str]:
    text = ["## End to end: leaf-tiny", ""]
    if not found:
        return [*text, "Not run yet.", ""]
    text += [
        "Trained `leaf-tiny` models, distilled with the steps that are named; masks at original resolution on images",
        "that neither the model nor the distillation saw.",
        "",
        "| data | compact | agreement with the full model | worst image | images (both empty) | written |",
        "|---|---|---|---|---|---|",
    ]
    for record in found:
        data = record["data"] if "tuning" in record["training"] else f"{record['data']}, decoder not tuned"
        for name, figures in record["agreement"].items():
            worst, dice = figures["worst"]
            text.append(
                f"| {data} | {name} | {interval(figures['dice'])} | {dice:.4f} ({worst}) | "
                f"{figures['images']} ({figures['both_empty']}) | {'yes' if record['written'] else 'below the bar'} |"
            )
    text.append("")
    for record in found:
        steps = ", ".join(f"{part} {row['steps']} steps" for part, row in record["training"].items())
        text += [f"`{record['command']}` ({steps}; {record['hardware']}, commit {record['commit'][:7]})", ""]
        stride = AutoencoderSettings.model_validate(record["model_settings"]["model"]["autoencoder"]).stride
        if stride != load_settings("leaf-tiny").model.autoencoder.stride:
            text += [f"With `leaf-tiny`'s network of before, whose latents have stride {stride}.", ""]
        if "tuning" not in record["training"]:
            text += ["At that commit there was no tuning, and a third of the minutes was the decoder's.", ""]
        if record.get("note"):
            text += [record["note"], ""]
        for label in record["dice"].get("full", {}):
            full, light = record["dice"]["full"][label], record["dice"]["compact"][label]
            text += [f"- Dice with the truth, {label}: full {interval(full)}, compact {interval(light)}"]
        if record["dice"]:
            text.append("")
    return text


def page() -> None:
    found = records()
    newest = {(row["data"], "tuning" in row["training"]): row for row in found if row["unit"] == "end-to-end"}
    text = [
        "# Compact parts: what they cost, and how far they agree",
        "",
        "`leafseg compact` distils a light mask decoder and a light image encoder ([how to](../compact.md)).",
        "Written by `experiments/compact.py` from the records in `runs.jsonl`; the newest of each kind is shown.",
        "",
        "## Work: GFLOPs an image (parameters)",
        "",
        *work(),
        "",
        "Counted, not measured. Times: [performance](../performance.md), modes that end in `compact`.",
        "",
        *decoder_sections([row for row in found if row["unit"] == "decoder"]),
        *end_to_end_section(list(newest.values())),
        "Research software, not a medical device.",
        "",
    ]
    write_text_atomic(PAGE, "\n".join(text))
    print(PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    units = parser.add_subparsers(dest="unit", required=True)
    for name in ("autoencoder", "decoder", "end-to-end"):
        unit = units.add_parser(name)
        unit.add_argument("--data", type=Path, action="append", required=True, help="repeat for several sets")
        unit.add_argument("--out", type=Path, required=True)
        unit.add_argument("--minutes", type=float, required=True, help="training time")
        if name == "decoder":
            unit.add_argument("--masks", type=int, default=MASKS, help="at most so many test masks a set")
        if name == "end-to-end":
            unit.add_argument("--note", default="", help="what the page shall say about this run")
            unit.add_argument("--model", type=Path, required=True, help="a trained run")
    units.add_parser("page")
    arguments = parser.parse_args()
    if arguments.unit == "autoencoder":
        train_autoencoder(arguments.data, arguments.out, arguments.minutes)
        return
    if arguments.unit == "decoder":
        distil_decoder(arguments.data, arguments.out, arguments.minutes, arguments.masks)
    elif arguments.unit == "end-to-end":
        if len(arguments.data) != 1:
            parser.error("end-to-end takes one --data, that of the model")
        end_to_end(arguments.data[0], arguments.model, arguments.out, arguments.minutes, arguments.note)
    page()


if __name__ == "__main__":
    main()
