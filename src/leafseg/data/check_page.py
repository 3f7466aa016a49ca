"""The outcome of a data check as one self-contained HTML page with thumbnails.

Pictures, styles and charts are inside the file: it can be archived. It shows images of the data, and says so.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.data.images import read_image
from leafseg.data.manifest import IGNORE, PARTS, LabelMap, Sample, read_labels
from leafseg.data.validate import SEVERITIES, DataCheck, Finding, Item
from leafseg.errors import LeafsegError
from leafseg.files import write_text_atomic

_SIDE = 168  # of a thumbnail, in pixels
_CASES = 6  # of a finding that are shown with pictures
_PICTURES = 4  # of one case
_LISTED = 200  # cases of a finding that are listed by name
_EXAMPLES = 12  # images without a finding
_BINS = 24
_COLOURS = np.array([[255, 64, 64], [64, 200, 255], [255, 210, 60], [120, 255, 120], [220, 120, 255]], np.uint8)


@dataclass(frozen=True)
class _Picture:
    """A thumbnail as base64, or the reason why there is none."""

    name: str
    jpeg: str
    problem: str = ""


def write_check_page(path: Path, check: DataCheck) -> None:
    """Write the page; the files that findings name are read again for their thumbnails.

    Raises:
        DataError: if the file cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    pictures = _Pictures(check)
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("leafseg.data").joinpath("check_page.html").read_text(encoding="utf-8"))
    page = template.render(
        name=check.data.resolve().name,
        check=check,
        summary=check.summary(),
        counts={name: check.count(name) for name in SEVERITIES},
        findings=[pictures.of_finding(finding) for finding in check.findings],
        parts=[(part, check.parts[part], check.groups[part]) for part in PARTS],
        grouped=any(sample.group is not None for sample in check.samples),
        part_names=PARTS,
        classes=[
            {"name": figures.name, "images": figures.images, "share": f"{figures.pixel_share:.2%}"}
            for figures in check.classes
        ],
        kinds=list(check.fingerprint.kinds.items()),
        spacings=[(" × ".join(f"{side:g}" for side in mm), n) for mm, n in check.fingerprint.spacings_mm.items()][:8],
        charts=_charts(check),
        examples=pictures.examples(),
    )
    write_text_atomic(path, page)


class _Pictures:
    """Thumbnails of the check's files, each made once."""

    def __init__(self, check: DataCheck) -> None:
        self._check = check
        self._samples: dict[str, Sample] = {}
        for sample in check.samples:
            self._samples.setdefault(self._name(sample), sample)
        self._made: dict[str, _Picture] = {}

    def _name(self, sample: Sample) -> str:
        root = self._check.root
        return str(sample.image.relative_to(root) if sample.image.is_relative_to(root) else sample.image)

    def of_finding(self, finding: Finding) -> dict[str, Any]:
        cases = [self._of_case(item) for item in finding.items[:_CASES]]
        with_pictures = [case for case in cases if case["pictures"]]
        listed = finding.items[len(with_pictures) :] if len(with_pictures) == len(cases) else finding.items
        return {
            "severity": finding.severity,
            "id": finding.id,
            "message": finding.message,
            "cases": with_pictures,
            "listed": [_line(item) for item in listed[:_LISTED]],
            "left_out": max(0, len(listed) - _LISTED),
        }

    def _of_case(self, item: Item) -> dict[str, Any]:
        named = [self._samples[name] for name in item.files if name in self._samples]
        return {"text": item.text, "pictures": [self._of_sample(sample) for sample in named[:_PICTURES]]}

    def examples(self) -> list[_Picture]:
        """Some images that no finding names, evenly spread over the sorted samples."""
        named = {name for finding in self._check.findings for item in finding.items for name in item.files}
        good = [sample for name, sample in self._samples.items() if name not in named] or [*self._samples.values()]
        step = max(1, len(good) // _EXAMPLES)
        return [self._of_sample(sample) for sample in good[step // 2 :: step][:_EXAMPLES]]

    def _of_sample(self, sample: Sample) -> _Picture:
        name = self._name(sample)
        if name not in self._made:
            try:
                self._made[name] = _Picture(name, _thumbnail(self._middle(sample), self._check))
            except LeafsegError as error:  # it could be read a moment ago
                self._made[name] = _Picture(name, "", str(error))
        return self._made[name]

    def _middle(self, sample: Sample) -> Sample:
        """Of a volume, the slice in the middle: the first one is mostly air."""
        if sample.frame is None:
            return sample
        frames = [other for other in self._check.samples if other.image == sample.image]
        return frames[len(frames) // 2]


def _thumbnail(sample: Sample, check: DataCheck) -> str:
    """An image with its mask's outline, as a base64 JPEG."""
    from PIL import Image

    pixels = _display(read_image(sample.image, sample.frame, reading=check.reading))
    height, width = pixels.shape[:2]
    scale = _SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = np.asarray(Image.fromarray(pixels).convert("RGB").resize(size, Image.Resampling.BILINEAR)).copy()
    if check.label_map is not None and sample.has_labels:
        labels = read_labels(sample, check.label_map, reading=check.reading)
        for place, inside in _regions(labels, check.label_map):
            small = Image.fromarray(inside).resize(size, Image.Resampling.NEAREST)
            picture[_outline(np.asarray(small))] = _COLOURS[place % len(_COLOURS)]
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=82)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _regions(labels: NDArray[Any], label_map: LabelMap) -> list[tuple[int, NDArray[np.bool_]]]:
    """(place of the colour, bool [H, W]) of every class but the background."""
    if label_map.overlapping:
        return list(enumerate(labels))
    return [(int(value) - 1, labels == value) for value in np.unique(labels) if value not in (0, IGNORE)]


def _outline(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask that touch a pixel outside it; the picture's border does not count as outside."""
    core = inside.copy()
    core[1:] &= inside[:-1]
    core[:-1] &= inside[1:]
    core[:, 1:] &= inside[:, :-1]
    core[:, :-1] &= inside[:, 1:]
    return inside & ~core


def _display(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels of any type as 8 bits; other than 8-bit ones are stretched."""
    if pixels.dtype == np.uint8:
        return pixels
    values = np.nan_to_num(pixels.astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = np.percentile(values, (0.5, 99.5))
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _line(item: Item) -> str:
    return " = ".join(item.files) + (f": {item.text}" if item.text else "")


def _charts(check: DataCheck) -> list[dict[str, Any]]:
    """Histograms as bars of heights 0..1, with what stands at both ends of the axis."""
    fingerprint = check.fingerprint
    charts = []
    if fingerprint.pixel_counts:
        charts.append(_chart("Pixel values", fingerprint.pixel_counts, fingerprint.pixel_edges))
    for title, values in (("Mean of each image", fingerprint.mean), ("Spread within each image", fingerprint.spread)):
        if len(values) > 1:
            counts, edges = np.histogram(values, bins=_BINS)
            charts.append(_chart(title, counts.tolist(), edges.tolist()))
    if len(fingerprint.sizes) > 1:
        for title, axis in (("Width in pixels", 0), ("Height in pixels", 1)):
            sides = [size[axis] for size, n in fingerprint.sizes.items() for _ in range(n)]
            counts, edges = np.histogram(sides, bins=_BINS)
            charts.append(_chart(title, counts.tolist(), edges.tolist()))
    return charts


def _chart(title: str, counts: Sequence[int], edges: Sequence[float]) -> dict[str, Any]:
    top = max(counts) or 1
    return {
        "title": title,
        "bars": [round(100 * count / top, 2) for count in counts],
        "low": f"{edges[0]:.4g}",
        "high": f"{edges[-1]:.4g}",
        "top": top,
    }
