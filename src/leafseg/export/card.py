"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PRECISIONS = {
    "fp32": "fp32",
    "fp16": "fp16 weights (CPUs widen them and compute in fp32)",
    "bf16": "bf16 arithmetic, on processors that have it",
    "int8": "int8 by post-training static quantisation",
}
_STARTS = {
    "gaussian": "starting noise from NumPy's Philox generator, keyed by the image's content",
    "zeros": "starting from zeros",
}
_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}


def model_card(content: Mapping[str, Any]) -> str:
    """``README.md`` as Markdown, from ``export.json``."""
    measured, source, labels = content["measured"], content["source"], content["labels"]
    backend, precision = content["backend"], content["precision"]
    speed = measured["latency"]
    exported, model = _times(speed["exported"]), _times(speed["model"])
    lines = [
        f"# {source['model']}, exported to {backend} in {precision}",
        "",
        "**Research software. Not a medical device: do not use it for diagnosis or treatment.**",
        "",
        "A LEAF segmentation model (arXiv 2507.18214) as one graph: image and noise to probability, one reverse step.",
        "",
        f"- Source model: {source['model']}, SHA-256 of its files {source['sha256'] or 'unknown'}",
        f"- Precision: {_PRECISIONS[precision]}"
        + (f", calibrated on {content['calibration_images']} images" if precision == "int8" else ""),
        f"- Labels: {', '.join(labels['names'])} (mask code {labels['mask_code']}"
        f"{', may overlap' if labels['overlapping'] else ''})",
        *_thresholds(labels.get("presence", [])),
        f"- Prediction: {content['prediction_type']} at timestep {content['timestep']}; "
        f"{_STARTS[content['noise']['kind']]}, so that the same image gives the same mask",
        f"- Made with {', '.join(f'{name} {number}' for name, number in content['versions'].items())}",
        *_light_parts(content.get("parts", {})),
        "",
        "## Measured, against the source model in fp32 in PyTorch",
        "",
        "| | |",
        "|---|---|",
        f"| largest difference of a probability, random images | {measured['probability_difference']:.2g} |",
    ]
    if "agreement" in measured:
        found = measured["agreement"]
        lines += [
            f"| masks compared on | {measured['compared_on']}, {found['images']} images |",
            f"| mean Dice between the masks (bar {measured['min_agreement']:g}) | {found['mean_dice']:.4f} |",
            f"| the same, worst image | {found['worst_dice']:.4f} |",
            f"| image and class pairs; empty in both, left out | {found['pairs']}; {found['both_empty']} |",
            f"| equal pixels | {100 * found['equal_pixels']:.3f} % |",
        ]
    else:
        lines.append("| masks compared on | no images were given |")
    for label, figures in measured.get("truth", {}).items():
        lines.append(f"| {label}, against the truth | {dice_change(figures)} |")
    lines += [
        f"| one image, {speed['threads']} threads, median [p10, p90] of {speed['repeats']} | {exported} |",
        f"| the source model in fp32, alternately | {model} ({speed['times_as_fast']:.2f} times as fast) |",
        f"| hardware | {measured['hardware']} |",
        "",
        "## Use",
        "",
        "```",
        f"pip install --no-deps leafseg && pip install numpy pillow {_PACKAGES[backend]}   # without PyTorch",
        "python -m leafseg.runtime THIS_FOLDER IMAGES --out MASKS",
        "```",
        "",
        "With the whole of leafseg: `leafseg predict THIS_FOLDER IMAGES --out MASKS`, and `leafseg evaluate`.",
    ]
    return "\n".join(lines) + "\n"


def _thresholds(presence: Sequence[float]) -> list[str]:
    if not presence:
        return []
    each = ", ".join(f"{threshold:g}" for threshold in presence)
    return [f"- A label is drawn only in images where its probability reaches a threshold somewhere: {each}"]


def _light_parts(parts: Mapping[str, str]) -> list[str]:
    light = [name for name, kind in parts.items() if kind == "compact"]
    if not light:
        return []
    return [
        f"- With the light {' and '.join(light)} of `leafseg compact`: the probabilities below are compared with "
        "the same light parts, masks and times with the source model's full ones"
    ]


def dice_change(figures: Mapping[str, Any]) -> str:
    """One class's Dice against the truth, before and after, in words."""
    change = figures["change"]
    if change is None:
        return "Dice not measurable, no image has this class"
    bounds = "" if change["low"] is None else f" [{change['low']:+.4f}, {change['high']:+.4f}]"
    return (
        f"Dice {figures['dice_model']:.4f} to {figures['dice_exported']:.4f}, change {change['mean']:+.4f}{bounds}, "
        f"worst image {figures['worst_change']:+.4f}, n = {figures['images']}"
    )


def _times(figures: Mapping[str, float]) -> str:
    return f"{figures['median_ms']:.1f} ms [{figures['p10_ms']:.1f}, {figures['p90_ms']:.1f}]"
