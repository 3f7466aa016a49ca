"""Which mask code does the shipped autoencoder carry? Draws labels, encodes, decodes and reads them; writes a table.

    .venv/bin/python experiments/mask_codes.py DATA/wbc

Writes docs/results/mask_codes.json and docs/results/mask_codes.md. No training; two minutes on one core. The codes that
are not part of the package are defined here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leafseg.config import DataSettings, PreprocessingSettings, load_settings
from leafseg.data.manifest import Manifest, load_manifest, read_labels
from leafseg.data.transforms import Preprocessor
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.evaluation.round_trip import label_dice
from leafseg.files import write_json_atomic, write_text_atomic
from leafseg.mask_code import MaskCode, make_mask_code
from leafseg.model.autoencoder import decode_pictures, encode_pictures, load_autoencoder, packaged_autoencoder
from leafseg.model.build import model_figures
from leafseg.progress import progress_bar
from leafseg.rng import generator

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
AUTOENCODER = "packaged:compact-f8"
STRIDE_8 = RESULTS.parents[1] / "configs" / "tiny-stride-8.yaml"  # leaf-tiny with that autoencoder
SIZE = 128
NOISE = 0.3  # of a latent whose values have a standard deviation of about 1
WANTED = 0.98


class TriedCode(MaskCode):
    """An exclusive code that was tried: a code word of -1..1 a class, and a way to read decoded values.

    Args:
        words: ``[C, K]``.
        colours: three values an RGB picture, instead of a grey picture each.
        read: probabilities ``[B, C, H, W]`` of values ``[B, K, H, W]`` and the words.
    """

    def __init__(
        self, names: tuple[str, ...], words: Tensor, read: Callable[[Tensor, Tensor], Tensor], *, colours: bool
    ):
        super().__init__(names)
        self.words, self.read, self.colours = words, read, colours
        self.num_pictures = -(-words.shape[1] // 3) if colours else words.shape[1]

    @property
    def n_outputs(self) -> int:
        return len(self.words)

    def encode(self, labels: Tensor) -> Tensor:
        values = self.words[labels].movedim(-1, 1)
        if not self.colours:
            return values.repeat_interleave(3, 1)
        return F.pad(values, (0, 0, 0, 0, 0, self.n_channels - values.shape[1]), value=-1.0)

    def logits(self, decoded: Tensor) -> Tensor:
        return self.probability(decoded).log()

    def probability(self, decoded: Tensor) -> Tensor:
        values = decoded[:, : self.words.shape[1]] if self.colours else decoded.unflatten(1, (-1, 3)).mean(2)
        return self.read(values, self.words)

    def labels(self, probability: Tensor) -> Tensor:
        return probability.argmax(1)

    def mask(self, probability: Tensor) -> Tensor:
        return self.labels(probability)[:, None] == torch.arange(self.n_outputs)[:, None, None]


class ColouredOverlap(MaskCode):
    """Overlapping labels, three an RGB picture."""

    exclusive = False

    def __init__(self, names: tuple[str, ...]):
        super().__init__(names)
        self.num_pictures = -(-len(names) // 3)

    @property
    def n_outputs(self) -> int:
        return len(self.label_names)

    def encode(self, labels: Tensor) -> Tensor:
        return F.pad(labels.float() * 2 - 1, (0, 0, 0, 0, 0, self.n_channels - labels.shape[1]), value=-1.0)

    def logits(self, decoded: Tensor) -> Tensor:
        return 4 * decoded[:, : self.n_outputs]

    def probability(self, decoded: Tensor) -> Tensor:
        return self.logits(decoded).sigmoid()

    def labels(self, probability: Tensor) -> None:
        return None

    def mask(self, probability: Tensor) -> Tensor:
        return probability > 0.5


def leftover(values: Tensor, words: Tensor) -> Tensor:
    """One plane a class, the background is what they leave over: as the package's planes."""
    share = (values + 1) / 2
    return (6 * torch.cat([1 - share.sum(1, keepdim=True), share], 1)).softmax(1)


def nearest(values: Tensor, words: Tensor) -> Tensor:
    """A softmax over the distances to the code words."""
    return (-((values[:, None] - words[None, :, :, None, None]) ** 2).sum(2)).softmax(1)


def nested(values: Tensor, words: Tensor) -> Tensor:
    """Plane k holds the classes from k on: a class is what its plane has and the next one has not."""
    share = ((values + 1) / 2).clamp(0, 1)
    share = torch.cat([torch.ones_like(share[:, :1]), share, torch.zeros_like(share[:, :1])], 1).cummin(1).values
    return share[:, :-1] - share[:, 1:]


@dataclass(frozen=True)
class Entry:
    """A code, what it is, and whether the package has it."""

    title: str
    make: Callable[[tuple[str, ...]], MaskCode]
    shipped: bool = False


def exclusive_codes(classes: int) -> list[Entry]:
    """All codes that can write so many classes."""
    eye = torch.eye(classes) * 2 - 1
    one_hot = eye[:, 1:]
    below = torch.tensor([[1.0 if k <= c else -1.0 for k in range(1, classes)] for c in range(classes)])
    bits = torch.tensor(
        [[1.0 if c >> k & 1 else -1.0 for k in range((classes - 1).bit_length())] for c in range(classes)]
    )
    corners = torch.tensor(
        [[-1, -1, -1], [1, 1, -1], [-1, 1, 1], [1, -1, 1], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]
    )
    levels = torch.linspace(-1, 1, classes)[:, None]

    def tried(title: str, words: Tensor, read: Callable[[Tensor, Tensor], Tensor], colours: bool) -> Entry:
        return Entry(title, lambda names: TriedCode(names, words, read, colours=colours))

    return [
        Entry("`planes`: a grey picture a class, background left over", lambda n: make_mask_code("planes", n), True),
        tried("a grey picture a class, and one of the background", eye, nearest, False),
        tried("nested grey pictures: class k and all above it", below, nested, False),
        Entry("`bits`: a grey picture a bit of the class id", lambda n: make_mask_code("bits", n), True),
        tried("one grey picture, a level a class", levels, nearest, False),
        tried("channels: three classes an RGB picture", one_hot, leftover, True),
        tried("three bits an RGB picture (analog bits)", bits, nearest, True),
        tried("nested, three an RGB picture", below, nested, True),
        tried("palette: a corner of the RGB cube a class", corners[:classes].float(), nearest, True),
    ]


OVERLAPPING_CODES = [
    Entry("`overlapping`: a grey picture a label", lambda n: make_mask_code("overlapping", n), True),
    Entry("three labels an RGB picture", ColouredOverlap),
]


def measure(entry: Entry, names: tuple[str, ...], truths: Sequence[np.ndarray], autoencoder: torch.nn.Module) -> dict:
    """Dice of every label on the network's grid, there with noise in the latent, and at original resolution."""
    code, grid = entry.make(names), Preprocessor(PreprocessingSettings(size=(SIZE, SIZE)))
    found: dict[str, dict[str, list[float]]] = {"grid": {}, "noisy": {}, "original": {}}
    for index, truth in enumerate(truths):
        placement = grid.placement(truth.shape[-2:])
        labels = grid.apply_labels(truth, placement)[None]
        with torch.no_grad():
            latent = encode_pictures(autoencoder, code.encode(labels))
            noise = generator(0, "mask-codes", index).standard_normal(latent.shape, dtype=np.float32)
            noisy = latent + NOISE * torch.from_numpy(noise)
            probability, shaken = (code.probability(decode_pictures(autoencoder, z)) for z in (latent, noisy))
        own = torch.from_numpy(truth)[None]
        figures = {
            "grid": label_dice(code, probability, labels),
            "noisy": label_dice(code, shaken, labels),
            "original": label_dice(
                code, grid.restore(probability[0], placement)[None], own if own.ndim == 4 else own.long()
            ),
        }
        for kind, dice in figures.items():
            for name, values in dice.items():
                found[kind].setdefault(name, []).extend(values)
    return {
        "title": entry.title,
        "shipped": entry.shipped,
        "pictures": code.num_pictures,
        **{
            kind: {name: {**asdict(bootstrap_mean(values)), "worst": min(values)} for name, values in labels.items()}
            for kind, labels in found.items()
        },
    }


def read_part(manifest: Manifest, part: str) -> list[np.ndarray]:
    return [read_labels(s, manifest.label_map, reading=manifest.reading) for s in manifest.part(part).samples]


def as_overlapping(labels: np.ndarray) -> np.ndarray:
    """The whole cell and its nucleus, bool ``[2, H, W]``: they overlap."""
    return np.stack([labels > 0, labels == 2])


def mosaics(count: int, classes: int) -> list[np.ndarray]:
    """Patches of random classes that touch each other (Voronoi cells), on grids of 200x180 pixels: many classes."""
    rows, columns = np.mgrid[:200, :180]
    pictures = []
    for index in range(count):
        draws = generator(0, "mosaic", index)
        y, x = draws.uniform(0, 200, (2, 24))
        kinds = draws.permutation(np.arange(24) % classes)
        pictures.append(kinds[((rows[..., None] - y) ** 2 + (columns[..., None] - x) ** 2).argmin(2)].astype(np.uint8))
    return pictures


def page(record: dict) -> str:
    figure = record["decoder_gflops"]
    text = [
        "# Mask codes: what the shipped autoencoder carries",
        "",
        "A mask code draws labels as pictures, and the frozen autoencoder compresses each picture. Which drawings",
        f"come back? Labels are resized to {SIZE} px (one label a pixel), drawn, encoded, decoded and read; Dice is",
        f"that of the labels with themselves. Shipped codes must reach {WANTED} for every class of `wbc`. Written by:",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"Autoencoder `{record['autoencoder']}`, never changed for this; {record['hardware']}, torch",
        f"{record['torch']}, commit {record['commit'][:7]}. Intervals: 95 % bootstrap over images. The choice was made",
        "on the training and validation parts.",
        "",
    ]
    for section in record["sections"]:
        labels = list(section["rows"][0]["grid"])
        shown = labels if len(labels) <= 2 else ["lowest class"]
        text += [f"## {section['title']}", "", section["note"], ""]
        head = ["code", "pictures", "latent channels"]
        for label in shown:
            head += [f"{label}, {SIZE} px", f"{label}, original size"]
        head += [f"mean at {SIZE} px with noise"]
        text += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in section["rows"]:
            cells = [row["title"], str(row["pictures"]), str(8 * row["pictures"])]
            for label in shown:
                for kind in ("grid", "original"):
                    values = row[kind].get(label) or min(row[kind].values(), key=lambda v: v["mean"])
                    cells.append(f"{values['mean']:.4f} ({values['low']:.4f} to {values['high']:.4f})")
            cells.append(f"{np.mean([v['mean'] for v in row['noisy'].values()]):.4f}")
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    text += [
        "## What follows",
        "",
        "- Colours fail. The autoencoder was trained on grey masks and on photographs, and takes many colours for a",
        "  grey: a class may vanish altogether. Another autoencoder, trained on coloured masks, could do better; this",
        "  one is not retrained.",
        "- Grey pictures work for all: `planes` is the default for more than two classes, `overlapping` for labels",
        "  that may share a pixel. A picture of the background gains about 0.001 for one picture more; nested pictures",
        "  need classes in an order, are a little better at one size and a little worse at the other. Neither is",
        "  shipped.",
        "- `bits` takes the logarithm of the number of classes in pictures (3 instead of 7 for eight classes), for a",
        "  little less accuracy: `--set model.mask_code=bits`.",
        f"- Each picture costs one pass of the decoder ({figure:.2f} GFLOPs at {SIZE} px) and 8 channels of the",
        "  U-Net's output.",
        f"- The last column adds Gaussian noise of {NOISE} to latents whose values have a standard deviation of about",
        "  1: what a U-Net predicts is never exact.",
        "",
        "Research software, not a medical device.",
        "",
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of wbc")
    parser.add_argument("--part", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--limit", type=int, default=None, help="at most so many images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    autoencoder = load_autoencoder(packaged_autoencoder(AUTOENCODER)).eval()
    names = {1: "cytoplasm", 2: "nucleus"}
    manifest = load_manifest(arguments.data, settings=DataSettings(label_names=names))
    cells = read_part(manifest, arguments.part)[: arguments.limit]
    patches = mosaics(min(10, len(cells)), 8)
    where = f"{arguments.data.name}, {arguments.part} part, n = {len(cells)}, split {manifest.split_sha256[:12]}."
    plan = [
        ("Classes that exclude each other: `wbc`", where, manifest.label_map.names, cells, exclusive_codes(3)),
        (
            "Eight classes",
            f"Made-up mosaics of touching patches, n = {len(patches)}; the class that comes back worst is shown.",
            ("background", *(f"class {index}" for index in range(1, 8))),
            patches,
            exclusive_codes(8),
        ),
        (
            "Overlapping labels: whole cell and nucleus of `wbc`",
            where,
            ("cell", "nucleus"),
            [as_overlapping(labels) for labels in cells],
            OVERLAPPING_CODES,
        ),
    ]
    sections = []
    with progress_bar("mask codes", total=sum(len(codes) for *_, codes in plan)) as bar:
        for title, note, labels, truths, codes in plan:
            rows = []
            for entry in codes:
                rows.append(measure(entry, labels, truths, autoencoder))
                bar.advance()
            sections.append({"title": title, "note": note, "rows": rows})
    figures = model_figures(load_settings("leaf-tiny", file=STRIDE_8), size=(SIZE, SIZE))
    record = {
        "command": f".venv/bin/python experiments/mask_codes.py DATA/{arguments.data.name}"
        + (f" --part {arguments.part}" if arguments.part != "test" else ""),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "autoencoder": AUTOENCODER,
        "size": SIZE,
        "noise": NOISE,
        "part": arguments.part,
        "split_sha256": manifest.split_sha256,
        "decoder_gflops": figures.gflops["mask_decoder"],
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": version("torch"),
        "sections": sections,
    }
    write_json_atomic(arguments.out / "mask_codes.json", record)
    write_text_atomic(arguments.out / "mask_codes.md", page(record))
    print(
        json.dumps(
            {
                row["title"]: {k: round(v["mean"], 4) for k, v in row["grid"].items()}
                for s in sections
                for row in s["rows"]
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
