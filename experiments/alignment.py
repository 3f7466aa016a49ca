"""When does distillation help? Draw the alignment study, and what the U-Net's features look like with and without it.

    .venv/bin/python experiments/recipe.py DATA --plan alignment --out RUNS     # the trainings, resumable
    .venv/bin/python experiments/alignment.py plot                              # docs/results/alignment.png
    .venv/bin/python experiments/alignment.py pictures --out RUNS               # docs/results/alignment_features.png

`plot` reads docs/results/recipe.jsonl. `pictures` trains twice on the slices of `leafseg demo` (a brain template, in
nilearn's wheel; two trainings of about three minutes on two cores) and shows the first three principal components of
the tapped features and of the teacher's tokens as red, green and blue.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from recipe import PLANS, RECORDS, read_records, record_of, units_of
from recipe_tables import images_of, matrix

PLOT = RECORDS.parent / "alignment.png"
PICTURES = RECORDS.parent / "alignment_features.png"
COUNTS = ("50", "200", "all")


def measured(plan: dict[str, Any], variant: str, data: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan's records of one variant and data set, by seed."""
    units = [unit for unit in units_of(plan) if (unit["variant"], unit["data"]) == (variant, data)]
    return [record for unit in units if (record := record_of(unit, records)) is not None]


def plot() -> None:
    """A panel a data set: test Dice against training images, with and without alignment; every seed is a dot."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    plan = next(p for p in json.loads(PLANS.read_text()) if p["name"] == "alignment")
    records = read_records()
    if all(record_of(unit, records) is None for unit in units_of(plan)):
        sys.exit("no training of plan alignment is recorded yet; experiments/recipe.py runs them")
    figure, panels = pyplot.subplots(1, len(plan["data"]), figsize=(4 * len(plan["data"]), 3.6), squeeze=False)
    for panel, data in zip(panels[0], plan["data"], strict=True):
        for word, colour in (("without", "tab:grey"), ("with", "tab:green")):
            means, places = [], []
            for place, count in enumerate(COUNTS):
                rows = measured(plan, f"{word} alignment, {count}", data, records)
                if rows:
                    seeds = [float(np.mean(list(images_of(row).values()))) for row in rows]
                    shift = 0.04 if word == "with" else -0.04
                    panel.plot([place + shift] * len(seeds), seeds, "o", color=colour, alpha=0.5, markersize=4)
                    means.append(matrix(rows).mean())
                    places.append(place)
            panel.plot(places, means, "-", color=colour, label=f"{word} alignment")
        panel.set_xticks(range(len(COUNTS)), COUNTS)
        panel.set_xlabel("training images")
        panel.set_title(data)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"Dice, {plan['part']} part")
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
    print(PLOT)


def principal_colours(features: np.ndarray) -> np.ndarray:
    """``[B, D, h, w]`` to ``[B, h, w, 3]`` in 0..1: the first three principal components over all positions."""
    count, channels, height, width = features.shape
    rows = features.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
    rows = rows - rows.mean(0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    scores = rows @ axes[:3].T
    low, high = np.percentile(scores, (2, 98), axis=0)
    return ((scores - low) / (high - low)).clip(0, 1).reshape(count, height, width, 3)


def pictures(out: Path, steps: int) -> None:
    import matplotlib

    matplotlib.use("agg")
    import torch
    from matplotlib import pyplot

    from leafseg.config import load_settings
    from leafseg.data.manifest import load_manifest
    from leafseg.demo import template_folder, write_data
    from leafseg.model.autoencoder import scale_latent
    from leafseg.model.build import build_components, tap_grid
    from leafseg.model.teachers import load_teacher
    from leafseg.pipeline import LeafPipeline
    from leafseg.training.run import run_training

    manifest_file = write_data(out / "features-data", template_folder())
    rows: dict[str, Any] = {}
    for name, weight in (("without alignment", 0.0), ("with alignment", 0.5)):
        settings = load_settings(
            "leaf-tiny",
            overrides=[f"objective.alignment_weight={weight}", f"training.steps={steps}", "training.validations=1"],
        )
        run_training(settings, manifest_file, out / f"features-{name.split()[0]}", resume=True)
        pipeline = LeafPipeline.from_pretrained(str(out / f"features-{name.split()[0]}"))
        rows[f"tap, trained {name}"] = (pipeline.unet, pipeline.image_encoder)
    torch.manual_seed(0)
    samples = load_manifest(manifest_file, settings=settings.data).part("test")
    parts = build_components(settings, label_names=samples.label_map.names)
    rows = {"tap, before training": (parts.unet, parts.image_encoder), **rows}
    preprocessor = pipeline.preprocessor
    chosen = [samples.samples[i * (len(samples) - 1) // 3] for i in range(4)]
    images = torch.stack([preprocessor.apply(preprocessor.read(s.image, s.frame))[0] for s in chosen])
    shown: dict[str, np.ndarray] = {"image": images.permute(0, 2, 3, 1).numpy()}
    channels = settings.model.autoencoder.latent_channels * parts.mask_code.num_pictures
    for name, (unet, encoder) in rows.items():
        with torch.no_grad():
            latent = scale_latent(encoder.eval()(images * 2 - 1), parts.autoencoder.config)
            start = torch.zeros(len(images), channels, *latent.shape[2:])
            sample = torch.cat([latent, start], 1)
            _, tap = unet.eval().denoise_with_tap(sample, 999, tap_block=settings.objective.alignment_tap)
        shown[name] = principal_colours(tap.numpy())
    grid = tap_grid(settings)
    tokens = load_teacher(settings.teacher.name, precision="fp32").tokens(images, grid)
    shown["teacher's tokens"] = principal_colours(tokens.permute(0, 2, 1).reshape(len(images), -1, *grid).numpy())
    figure, panels = pyplot.subplots(len(shown), len(images), figsize=(1.9 * len(images), 2.05 * len(shown)))
    for line, (name, values) in zip(panels, shown.items(), strict=True):
        for panel, value in zip(line, values, strict=True):
            panel.imshow(value)
            panel.set_axis_off()
        line[0].set_title(name, loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURES, dpi=110)
    print(PICTURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("plot", "pictures"))
    parser.add_argument("--out", type=Path, help="for pictures: where to train")
    parser.add_argument("--steps", type=int, default=150, help="for pictures: optimizer steps of each training")
    arguments = parser.parse_args()
    if arguments.what == "plot":
        plot()
    elif arguments.out is None:
        parser.error("pictures needs --out")
    else:
        pictures(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
