"""Write docs/results/tiny.md from the records beside it; a figure that was not measured says so.

.venv/bin/python experiments/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
MISSING = "not run"
EXPECTED = {"isic2018": 0.87, "cxr_lungs": 0.93, "busi": 0.60}
EXPECTED_ROUND_TRIP = {"isic2018": 0.99, "cxr_lungs": 0.99, "busi": 0.99, "dsb2018": 0.97}


def read_json(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else {}


def read_lines(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def interval(figure: dict[str, Any] | None) -> str:
    if not figure:
        return MISSING
    bounds = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{figure['mean']:.3f}{bounds}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def accuracy() -> list[str]:
    runs = [r for r in read_lines("runs.jsonl") if r["experiment"] == "tiny_accuracy"]
    rows = []
    for name, wanted in EXPECTED.items():
        mine = [r for r in runs if r["data"] == name]
        if not mine:
            rows.append([name, *[MISSING] * 5, f"{wanted:.2f}"])
        for run in mine:
            figures = run["test"]["foreground"]
            non_empty = figures["images"] - figures["empty"]
            rows.append(
                [
                    name,
                    str(run["seed"]),
                    f"{non_empty} + {figures['empty']} empty",
                    interval(figures["dice"]),
                    interval(figures["iou"]),
                    interval(figures["false_positive_rate"]) if figures["empty"] else "no empty masks",
                    f"{wanted:.2f}",
                ]
            )
    text = table(["data", "seed", "test images", "Dice", "IoU", "false-positive rate", "expected Dice"], rows)
    rows = [
        [
            run["data"],
            str(run["seed"]),
            label,
            f"{figures['images'] - figures['empty']} + {figures['empty']} without it",
            *[interval(figures.get(metric)) for metric in ("dice", "iou", "precision", "recall", "hd95")],
            run.get("distance_unit", "not recorded"),
        ]
        for run in runs
        if run["data"] not in EXPECTED
        for label, figures in run["test"].items()
    ]
    head = ["data", "seed", "class", "test images", "Dice", "IoU", "precision", "recall", "HD95", "unit of HD95"]
    text += table(head, rows or [["wbc", *[MISSING] * 9]])
    rows = [
        [
            run["data"],
            str(run["steps"]),
            str(run["best_step"]),
            f"{run['wall_seconds'] / 60:.1f}",
            *[part.strip() for part in run["printed"][0].split(",")[1:]],
            run["split_sha256"][:12],
        ]
        for run in runs
    ]
    text += table(["data", "steps", "best step", "minutes in all", "speed", "memory", "split SHA-256"], rows)
    for run in runs:
        text += [
            f"{run['data']}: {run['note']}" if run["note"] else "",
            "",
            "```",
            run["command"],
            run["evaluate"],
            "```",
            "",
        ]
    return text


def empty_masks() -> list[str]:
    """How images without the finding count, by the records of the runs that have some."""
    checks = read_json("data_check.json").get("sets", {})
    rows = []
    for run in read_lines("runs.jsonl"):
        figures = run.get("test", {}).get("foreground", {})
        if run["experiment"] != "tiny_accuracy" or not figures.get("empty"):
            continue
        rate, dice, empty = figures["false_positive_rate"], figures["dice"], figures["empty"]
        marked = round(rate["mean"] * empty)
        together = (dice["mean"] * dice["n"] + empty - marked) / (dice["n"] + empty)
        found = [f["cases"] for f in checks.get(run["data"], {}).get("findings", []) if f["id"] == "empty-mask"]
        rows.append(
            [
                run["data"],
                f"{found[0]} of {checks[run['data']]['images']}" if found else MISSING,
                f"{empty} of {figures['images']}",
                f"{marked} of {empty}: {interval(rate)}",
                f"{interval(dice)}, n = {dice['n']}",
                f"{together:.3f}, n = {dice['n'] + empty}",
            ]
        )
    head = [
        "data",
        "empty masks in the set",
        "in the test part",
        "of these, something was marked (false-positive rate)",
        "Dice, non-empty masks",
        "if an empty image counted 1 or 0",
    ]
    return table(head, rows or [["busi", *[MISSING] * 5]])


def round_trip() -> list[str]:
    figures = read_json("round_trip.json").get("sets", {})
    rows = [
        [name, str(figures[name]["n"]), interval(figures[name]), f"{figures[name]['worst']:.3f}", f"{wanted:.2f}"]
        if name in figures
        else [name, MISSING, MISSING, MISSING, f"{wanted:.2f}"]
        for name, wanted in EXPECTED_ROUND_TRIP.items()
    ]
    return table(["data (test part, non-empty masks)", "n", "mean Dice", "worst", "expected"], rows)


def inference() -> list[str]:
    result = read_json("performance/inference-tiny.json")
    cells = [row for row in result.get("rows", []) if (row["size"], row["batch"]) == (256, 1) and "ratio" in row]
    if not cells:
        return [MISSING, ""]
    plain = cells[0]["plain"]
    rows = [["plain: fp32, torch's default memory format", *_milliseconds(plain), "1"]]
    rows += [[row["mode"], *_milliseconds(row), f"{row['ratio']:.2f}"] for row in cells]
    head = ["one image, batch 1, 256x256", "median ms", "fastest to slowest", "times faster than plain"]
    unit = result["processor"]
    hardware = (
        f"{unit['model']} ({unit['instructions']}), {result['threads']} threads, torch {result['versions']['torch']}"
    )
    command = ["```", f".venv/bin/python {result['command']}", "```", ""]
    return [*command, f"{hardware}. More in [performance](../performance.md).", "", *table(head, rows)]


def _milliseconds(row: dict[str, Any]) -> list[str]:
    return [f"{row['median_ms']:.1f}", f"{row['fastest_ms']:.1f} to {row['slowest_ms']:.1f}"]


def wall_times() -> list[str]:
    times = read_json("wall_times.json")
    rows = [[f"`{name}`", f"{times[name]['seconds'] / 60:.1f} min", times[name]["note"]] for name in times]
    return table(["command, fresh clone, new environment", "wall time", "note"], rows) if rows else [MISSING, ""]


def full_size() -> list[str]:
    result = read_json("full_size.json")
    if not result:
        return [MISSING, ""]
    rows = result["rows"]
    head = ["arrangement", "s a step", "of plain", "peak GB", "of plain", "trainer state GB", "of plain"]
    training = [
        [
            name,
            f"{row['step_seconds']:.1f}",
            f"{row.get('step_seconds_of_plain', 1):.2f}",
            f"{row['peak_gb']:.2f}",
            f"{row.get('peak_gb_of_plain', 1):.2f}",
            f"{row['trainer_gb']:.2f}",
            f"{row.get('trainer_gb_of_plain', 1):.2f}",
        ]
        for name, row in rows.items()
    ]
    whole = [
        [
            name,
            f"{row['train_2_steps_seconds']:.0f}",
            f"{row['resume_1_step_seconds']:.0f}",
            f"{row['predict_seconds']:.0f}",
            f"{row['predict_peak_gb']:.2f}",
            f"{row['inference_gb']:.3f}",
            f"{row['decoder_only_gb']:.3f}",
            f"{row['run_gb']:.2f}",
        ]
        for name, row in rows.items()
        if name != "plain"
    ]
    return [
        f"{result['hardware']}, torch {result['torch']}; {result['size']} px, batch {result['batch']}.",
        "",
        *table(head, training),
        "`trainer state` is what a training continues from; the plain loop's is its one file, which also holds the",
        "frozen autoencoder, and averages of the U-Net alone.",
        "",
        *table(
            [
                "arrangement",
                "2 steps and a save, s",
                "resume, 1 step, validation and a save, s",
                "predict one image, s",
                "its peak GB",
                "model GB",
                "decoder only GB",
                "whole run GB",
            ],
            whole,
        ),
        "Times are those of whole commands, start included. Bars: a model of at most 0.83 GB, 0.76 GB with the",
        "autoencoder's decoder only.",
        "",
    ]


def large_images() -> list[str]:
    found = read_json("large_images.json")
    if not found:
        return [MISSING, ""]
    rows = [[name, f"{figures['seconds']:.1f}", f"{figures['peak_mb']:,}"] for name, figures in found["rows"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        f"{found['model']}, network input {found['size']}x{found['size']}; {found['hardware']}; {versions}; "
        f"{found['repeats']} run{'s' if found['repeats'] > 1 else ''} a case.",
        "",
        *table(["case", "seconds", "peak memory, MB"], rows),
    ]


def main() -> None:
    large = [
        "# Large images and volumes: time and memory",
        "",
        "Written by `experiments/tables.py` from `large_images.json`; do not edit by hand. Research software, not a",
        "medical device.",
        "",
        "```",
        ".venv/bin/python benchmarks/large_images.py --out docs/results/large_images.json",
        "```",
        "",
        *large_images(),
        "From file to file as `leafseg predict` works, each case in a process of its own; `start` is one tile: what",
        "all of them share. Random weights: they change no timing. Measured with leaf-tiny's network of stride 8",
        "(`configs/tiny-stride-8.yaml`), which does 4.9 GFLOP an image of 128 px, the present one 3.8.",
    ]
    (RESULTS / "large_images.md").write_text("\n".join(large) + "\n")
    full = [
        "# Full-size training: measured",
        "",
        "Written by `experiments/tables.py` from `full_size.json`; do not edit by hand. Research software, not a",
        "medical device.",
        "",
        "```",
        "python benchmarks/full_size_training.py --out docs/results/full_size.json",
        "```",
        "",
        "leaf-base with random weights on synthetic images, DINOv2 ViT-B/14 with registers as the teacher: three",
        "steps, stopped after the second and resumed, one validation image, one predicted image. `plain` is a loop",
        "without any economy, written out in the script.",
        "",
        *full_size(),
        "What the figures say: bf16 and channels_last save the time, and the cached teacher a little more. At batch 1",
        "the memory is weights, gradients, averages and the optimizer's state, which only 8-bit states make smaller;",
        "gradient checkpointing pays at larger batches. On a CPU the 8-bit update costs more time than it saves.",
    ]
    (RESULTS / "full_size.md").write_text("\n".join(full) + "\n")
    page = [
        "# leaf-tiny: measured",
        "",
        "Written by `experiments/tables.py` from the records in this folder; do not edit by hand.",
        "Research software, not a medical device.",
        "",
        "## Accuracy after 20 minutes on two cores",
        "",
        "Measured with the preset as it was before its present recipe and network (0.75 of the samples at the last",
        "timestep, noise at the start, a frozen mask decoder, one label a pixel, learning rate 0.0005; latents of",
        "stride 8, `configs/tiny-stride-8.yaml`). The present one against a U-Net: [recipe.md](recipe.md).",
        "",
        "128 px inputs, evaluated at the original size. Dice and IoU are means over images with a non-empty mask, with",
        "95 % percentile bootstrap intervals over test images: they tell the uncertainty of the test set, not of the",
        "training, which ran once. Checkpoints were chosen on the validation part. `experiments/tiny_accuracy.py` runs",
        "both commands and appends to `runs.jsonl`, which holds all settings.",
        "",
        *accuracy(),
        "## Empty masks",
        "",
        "Where nothing is to be found, overlap says nothing: such an image has no Dice, and enters no mean of it. What",
        "counts is whether anything was marked there, in a rate of its own with its own interval and n",
        "([the rules](../evaluation.md#empty-masks)). Dice alone would hide it, and a mean over all images would mix",
        "finding with outlining: the last column shows what it would say if an image without the finding counted 1",
        "when nothing was marked and 0 otherwise.",
        "",
        *empty_masks(),
        "## Mask round trip of the compact autoencoder at 256 px",
        "",
        "```",
        "leafseg evaluate-autoencoder --data DATA/isic2018 --data DATA/cxr_lungs --data DATA/busi \\",
        "    --data DATA/dsb2018 --split test --out docs/results/round_trip.json",
        "```",
        "",
        "No image or mask of cxr_lungs was used in training it.",
        "",
        *round_trip(),
        "## Inference",
        "",
        *inference(),
        "## Wall time",
        "",
        *wall_times(),
    ]
    (RESULTS / "tiny.md").write_text("\n".join(page).rstrip() + "\n")


if __name__ == "__main__":
    main()
