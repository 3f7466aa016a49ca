"""What Dice masks can reach at a preset's input size: shrunk and enlarged again, as labels or shares, coded or not.

    .venv/bin/python experiments/label_ceiling.py DATA --sets dsb2018 isic2018 busi

DATA holds data sets of one foreground. At most 60 validation masks of each, against the masks at their original size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from leafseg.config import load_settings
from leafseg.data.manifest import load_manifest, read_labels
from leafseg.data.transforms import Preprocessor
from leafseg.evaluation.round_trip import code_round_trip
from leafseg.model.build import build_components


def dice(mask: torch.Tensor, truth: torch.Tensor) -> float:
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", required=True)
    arguments = parser.parse_args()
    settings = load_settings("leaf-tiny")
    preprocessor = Preprocessor(settings.data.preprocessing)
    for name in arguments.sets:
        part = load_manifest(arguments.data / name, settings=settings.data).part("validation")
        models = build_components(settings, label_names=part.label_map.names)
        found: dict[str, list[float]] = {key: [] for key in ("labels", "shares", "labels coded", "shares coded")}
        for sample in part.samples[:60]:
            labels = read_labels(sample, part.label_map, reading=preprocessor.reading)
            if not labels.any():
                continue
            truth = torch.from_numpy(labels > 0)
            placement = preprocessor.placement(labels.shape)
            small = {
                "labels": preprocessor.apply_labels(labels, placement)[None].float(),
                "shares": preprocessor.apply_label_shares(labels, placement, classes=2),
            }
            for key, plane in small.items():
                coded = code_round_trip(models.autoencoder, models.mask_code, plane[None])[0]
                for case, values in ((key, plane), (f"{key} coded", coded)):
                    large = F.interpolate(values[None], labels.shape, mode="bilinear", antialias=True)[0, 0]
                    found[case].append(dice(large > 0.5, truth))
        print(json.dumps({"data": name, **{key: round(float(np.mean(values)), 4) for key, values in found.items()}}))


if __name__ == "__main__":
    main()
