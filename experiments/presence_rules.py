"""Which rule should choose a threshold of presence? Tried on halves of the validation part of one training.

    .venv/bin/python experiments/presence_rules.py RUN --data DATA

A rule sees a random half of the validation part and is judged on the other, many times over; the test part is not
touched. The training needs images with and without a finding (busi of the sample data).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from leafseg.config import load_settings
from leafseg.data.manifest import load_manifest
from leafseg.ensemble import load_single
from leafseg.evaluation.evaluate import evaluate_samples

THRESHOLDS = (0.0, *(round(0.55 + 0.05 * step, 2) for step in range(9)))
ROUNDING = 1e-6
RULES = {"none": None, "the best": 0.0, "half an image short": 0.5, "less than one image short": 1.0 - ROUNDING}
SPLITS = 2000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path)
    options.add_argument("--data", type=Path, required=True)
    arguments = options.parse_args()
    segmenter = load_single(str(arguments.run))
    segmenter.presence = ()
    listed = load_manifest(
        arguments.data, settings=load_settings("leaf-tiny").data, run_split=arguments.run / "split.csv"
    )
    part = listed.part("validation")
    rows = list(evaluate_samples(segmenter, part.samples, part.label_map))
    empty = np.array([row.empty for row in rows])
    # [thresholds, images]: the Dice, or for an empty image whether nothing is drawn
    scores = np.array(
        [
            [
                float(row.empty) if (row.peak or 0.0) < threshold
                else float(row.predicted_pixels == 0) if row.empty else float(row.dice or 0.0)
                for row in rows
            ]
            for threshold in THRESHOLDS
        ]
    )  # fmt: skip
    draws = np.random.default_rng(0)
    figures: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in RULES}
    for _ in range(SPLITS):
        order = draws.permutation(len(rows))
        seen, held_out = np.split(order, [len(rows) // 2])
        sums = scores[:, seen].sum(1)
        for name, slack in RULES.items():
            chosen = 0 if slack is None else int(np.argmax(sums >= sums.max() - slack))
            reached, nothing = scores[chosen, held_out], empty[held_out]
            figures[name].append(
                (reached.mean(), reached[~nothing].mean(), 1 - reached[nothing].mean(), THRESHOLDS[chosen])
            )
    print(f"{len(rows)} validation images, {int(empty.sum())} of them empty; means over {SPLITS} halves")
    print(
        "| rule | score | Dice where something is | found in empty | mean threshold |\n| --- | --- | --- | --- | --- |"
    )
    for name, values in figures.items():
        score, dice, found, threshold = np.nanmean(values, 0)
        print(f"| {name} | {score:.3f} | {dice:.4f} | {100 * found:.0f} % | {threshold:.2f} |")


if __name__ == "__main__":
    main()
