"""Write docs/performance.md from the records in docs/results/performance; a cell that was not measured says so.

    .venv/bin/python experiments/performance_tables.py

Which record answers which question stands in it; of several for one cell, the file that comes last by name counts.
Modes that are not listed here get rows of their own, after those that are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leafseg.config import load_settings

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"
MISSING = "not measured"
PRESETS = ("leaf-base", "leaf-tiny")
SIZES, BATCHES = (256, 512), (1, 4, 16)
MODES = (
    "channels_last (predict)",
    "bf16 autocast (predict --precision bf16)",
    "fp32, folded",
    "fp32, folded, prepacked",
    "fp32, folded, Winograd",
    "bf16, folded",
    "bf16, folded, prepacked",
    "bf16, folded, Winograd",
)
Record = Mapping[str, Any]


# How the models of the agreement records came about; leafseg benchmark writes no command of its own.
AGREEMENT_COMMANDS = (
    "- agreement-tiny-wbc: `leafseg train --config configs/wbc-tiny.yaml --data DATA/wbc --preset leaf-tiny --seed",
    "  1337 --set training.minutes=9 --out RUN`, then `leafseg benchmark RUN --images HELD_OUT --repeats 7 --out",
    "  FILE`; HELD_OUT holds the images of the test part (RUN/split.csv).",
    "- agreement-tiny-dsb2018: likewise, after `leafseg train --data DATA/dsb2018 --preset leaf-tiny --modality",
    "  microscopy --minutes 4`.",
    "- agreement-tiny-wbc-compact (128 px): the model and compact parts of [compact](results/compact.md), then",
    "  `leafseg benchmark RUN/compact --images HELD_OUT --compact both --min-agreement 0.995 --repeats 7 --out FILE`.",
    "- The last two with leaf-tiny's network of before (`configs/tiny-stride-4.yaml`).",
    "- agreement-base-random: `leafseg benchmark MODEL --repeats 1 --out FILE` on a model of `write_random_model` in",
    "  `benchmarks/_common.py` (random weights: its masks say nothing, so none are compared).",
)


def read_records(folder: Path) -> list[Record]:
    """All full records; one of a --quick check is no result, and no table of inference mixes two networks."""
    records = [json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob("*.json"))]
    full = [record for record in records if not record.get("quick")]
    return [record for record in full if record.get("question") not in ("inference", "export") or is_present(record)]


def of(records: Iterable[Record], question: str, preset: str | None = None) -> list[Record]:
    return [r for r in records if r.get("question") == question and preset in (None, r.get("preset"))]


def is_present(record: Record) -> bool:
    """Whether a record is of the preset's present network; earlier records of leaf-tiny name no stride."""
    if record.get("preset") != "leaf-tiny":
        return True
    return bool(record.get("latent_stride", 4) == load_settings("leaf-tiny").model.autoencoder.stride)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def conditions(records: Sequence[Record]) -> list[str]:
    """Hardware, versions and command of each record, once."""
    lines = []
    for record in records:
        unit, versions = record["processor"], record["versions"]
        found = (
            f"{unit['model']} ({unit['instructions']}{', bf16' if unit['bf16'] else ''}), {record['threads']} threads, "
        )
        found += ", ".join(f"{name} {number}" for name, number in versions.items())
        before = "" if is_present(record) else "; with leaf-tiny's network of before, latents of stride 4"
        lines.append(f"- `{record.get('command', record['file'])}`: {found}{before}")
    return [*lines, ""] if lines else []


def inference(records: Sequence[Record], presets: Sequence[str] = PRESETS) -> list[str]:
    lines = []
    for preset in presets:
        mine = of(records, "inference", preset)
        cells = {(row["mode"], row["size"], row["batch"]): row for r in mine for row in r["rows"]}
        extra = sorted({mode for mode, _, _ in cells} - set(MODES))
        lines += [
            f"### {preset}",
            "",
            "Milliseconds an image; in brackets how many times faster than the plain model.",
            "",
        ]
        columns = [(size, batch) for size in SIZES for batch in BATCHES]
        rows = []
        plain = {(size, batch): row["plain"] for (_, size, batch), row in cells.items() if "plain" in row}
        rows.append(["plain", *(f"{plain[c]['median_ms'] / c[1]:.1f}" if c in plain else MISSING for c in columns)])
        for mode in (*MODES, *extra):
            rows.append([mode, *(cell(cells.get((mode, *column))) for column in columns)])
        lines += table(["mode", *(f"{size} px, batch {batch}" for size, batch in columns)], rows)
        if preset == "leaf-tiny":
            outside = {
                (row["mode"], row["size"], row["batch"]): row
                for r in of(records, "export", preset)
                for row in r["rows"]
            }
            lines += aim({**cells, **outside})
        lines += parts(cells) + conditions(mine)
    return lines


AIM_MS = 40


def aim(cells: Mapping[tuple[str, int, int], Record]) -> list[str]:
    """Whether the best mode takes one image of 256 px as fast as was aimed at."""
    here = [row for (_, size, batch), row in cells.items() if (size, batch) == (256, 1) and "median_ms" in row]
    if not here:
        return [f"An image of 256 px in {AIM_MS} ms was the aim: {MISSING}.", ""]
    best = min(here, key=lambda row: row["median_ms"])
    verdict = "reached" if best["median_ms"] <= AIM_MS else "missed"
    alone = f"; its U-Net alone {best['parts_ms']['U-Net']:.0f} ms" if "parts_ms" in best else ""
    masks = "What masks light parts draw: [compact](results/compact.md), [export](export.md)."
    return [
        f"An image of 256 px in {AIM_MS} ms was the aim: {verdict} ({best['median_ms']:.1f} ms with {best['mode']}, "
        f"its fastest call {best['fastest_ms']:.1f} ms{alone}).",
        *([masks] if is_compact(best["mode"]) else []),
        "",
    ]


def exported(records: Sequence[Record], presets: Sequence[str] = PRESETS) -> list[str]:
    """Times of exported folders; what they do to masks is measured with trained weights, elsewhere."""
    lines = []
    for preset in presets:
        mine = of(records, "export", preset)
        rows = [
            [row["mode"], f"{row['size']} px", *([row["error"], "", ""] if "error" in row else [
                f"{row['median_ms']:.1f} [{row['fastest_ms']:.1f}, {row['slowest_ms']:.1f}]", f"{row['ratio']:.2f}",
                f"{row['megabytes']:.0f}",
            ])]
            for record in mine
            for row in record["rows"]
        ]  # fmt: skip
        head = ["export", "", "ms an image", "times faster than plain", "MB"]
        lines += [f"### {preset}", "", *(table(head, rows) if rows else [MISSING, ""]), *conditions(mine)]
    return lines


def cell(row: Record | None) -> str:
    if row is None:
        return MISSING
    if "error" in row:
        return "does not work here"
    return f"{row['ms_an_image']:.1f} ({row['ratio']:.2f})"


def parts(cells: Mapping[tuple[str, int, int], Record]) -> list[str]:
    """Where the time of one image of 256 px goes, for the plain model and the fastest mode."""
    found = {mode: row for (mode, size, batch), row in cells.items() if (size, batch) == (256, 1) and "parts_ms" in row}
    if not found:
        return ["Where the time of one 256 px image goes: " + MISSING + ".", ""]
    kinds = [[mode for mode in found if is_compact(mode) == compact] for compact in (False, True)]
    fastest = [min(modes, key=lambda mode: found[mode]["median_ms"]) for modes in kinds if modes]
    best = fastest[0]
    rows = []
    for name, whole, split in (
        ("plain", found[best]["plain"]["median_ms"], found[best]["plain_parts_ms"]),
        *((mode, found[mode]["median_ms"], found[mode]["parts_ms"]) for mode in fastest),
    ):
        rows.append(
            [name, *(f"{ms:.1f}" for ms in split.values()), f"{whole - sum(split.values()):.1f}", f"{whole:.1f}"]
        )
    head = ["", *found[best]["parts_ms"], "all around them", "whole"]
    return ["Where the time of one 256 px image goes, in ms:", "", *table(head, rows)]


def roofline(records: Sequence[Record]) -> list[str]:
    rows = []
    for preset in PRESETS:
        for record in of(records, "inference", preset):
            peaks = record["matmul_gflops"]
            seen: set[int] = set()
            for row in record["rows"]:
                if row["batch"] != 1 or "gflops" not in row:
                    continue
                if row["size"] not in seen:
                    seen.add(row["size"])
                    share = f"{100 * row['plain_gflops'] / peaks['fp32']:.0f} %"
                    peak = f"{peaks['fp32']:.0f} (fp32)"
                    rows.append([preset, f"{row['size']} px", "plain", f"{row['plain_gflops']:.0f}", peak, share])
                kind = "bf16" if "bf16" in row["mode"] else "fp32"
                rows.append([
                    preset, f"{row['size']} px", row["mode"], f"{row['gflops']:.0f}", f"{peaks[kind]:.0f} ({kind})",
                    f"{100 * row['gflops'] / peaks[kind]:.0f} %",
                ])  # fmt: skip
    return [
        "The plain model's floating-point operations (2 a multiply-add), divided by the time, against the fastest",
        "2048x2048 matrix product of the same run. Folded modes leave operations out (upsampling with its convolution",
        "takes 4/9), Winograd's more: what they skip counts as done, so a share may exceed 100 %.",
        "",
        *(table(["model", "size", "mode", "GFLOP/s", "matrix product", "share"], rows) if rows else [MISSING, ""]),
    ]


def memory(records: Sequence[Record]) -> list[str]:
    lines = []
    for preset in PRESETS:
        mine = of(records, "memory", preset)
        found = {name: row for record in mine for name, row in record["rows"].items()}
        rows = []
        for mode in ("imports", "plain", *MODES, *sorted(set(found) - {"imports", "plain", *MODES})):
            row = found.get(mode)
            figures = ["", ""] if row is None else [f"{row['median_mb']:.0f}", f"{100 * row['of_plain']:.0f} %"]
            rows.append([mode, *(figures if row else [MISSING, MISSING])])
        lines += [f"### {preset}", "", *table(["mode", "peak MB", "of plain"], rows), *conditions(mine)]
    return lines


def start_up(records: Sequence[Record]) -> list[str]:
    mine = of(records, "start-up")
    rows = []
    for record in mine:
        for name, row in record["rows"].items():
            images = "" if name.endswith("help") else f"{record['preset']}, {record['images']} images"
            speed = "" if name.endswith("help") else f"{row['ms_an_image']:.1f}"
            whole = f"{row['wall_seconds']:.2f} [{row['wall_fastest']:.2f}, {row['wall_slowest']:.2f}]"
            start = whole if name.endswith("help") else f"{row['start_up_seconds']:.2f}"
            rows.append(
                [f"`{name}`" if name.startswith("leafseg") else f"`leafseg {name}`", images, whole, start, speed]
            )
    head = ["command", "", "seconds in all", "of which start-up", "ms an image"]
    return (table(head, rows) if rows else [MISSING, ""]) + conditions(mine)


def networks(records: Sequence[Record]) -> list[str]:
    mine = of(records, "networks")
    rows = [
        [row["mode"], f"{row['size']} px, batch {row['batch']}",
         *(f"{row[name]['median_ms']:.1f} [{row[name]['fastest_ms']:.1f}, {row[name]['slowest_ms']:.1f}]"
           for name in ("present", "before")), f"{row['ratio']:.2f}"]
        for record in mine
        for row in record["rows"]
    ]  # fmt: skip
    sizes = [
        f"At {one['size']} px the present network does {one['gflop']:.1f} GFLOP an image with "
        f"{one['parameters']:,} parameters, the one of before {other['gflop']:.1f} with {other['parameters']:,}."
        for record in mine
        for one, other in [(record["networks"]["present"], record["networks"]["before"])]
    ]
    head = ["mode", "", "present, ms", "before, ms", "present / before"]
    return [*sizes, "", *table(head, rows), *conditions(mine)] if rows else [MISSING, ""]


def data_loading(records: Sequence[Record]) -> list[str]:
    mine = of(records, "data loading")
    rows = [
        ["decoded again" if not row["cache_mb"] else "from memory", str(row["workers"]),
         f"{row['samples_a_second']:.0f} [{row['least']:.0f}, {row['most']:.0f}]", f"{row['times_the_step']:.1f}"]
        for record in mine
        for row in record["rows"]
    ]  # fmt: skip
    head = ["samples", "workers", "samples a second", "times what a training step takes"]
    return (table(head, rows) if rows else [MISSING, ""]) + conditions(mine)


def agreement(records: Sequence[Record]) -> list[str]:
    """Records that `leafseg benchmark --out` wrote; the model's name is the file's."""
    rows = []
    for record in records:
        if "best" not in record:
            continue
        for row in record["rows"]:
            if row["error"] is not None:
                continue
            dice = MISSING if row["agreement"] is None else f"{row['agreement']:.5f} ({row['worst_agreement']:.5f})"
            chosen = " (chosen)" if row["name"] == record["best"] else ""
            rows.append([
                record["file"].removesuffix(".json"), row["name"] + chosen, f"{row['ratio']:.2f}",
                f"{row['latent_error']:.1e}", f"{row['probability_error']:.1e}", f"{row['largest_error']:.4f}", dice,
                str(record["compared_images"]) if row["agreement"] is not None else "",
            ])  # fmt: skip
    head = ["model", "mode", "times faster", "latent", "probability", "largest pixel", "Dice (worst image)", "images"]
    return [*table(head, rows), *AGREEMENT_COMMANDS, ""] if rows else [MISSING, ""]


def training(records: Sequence[Record]) -> list[str]:
    mine = of(records, "training")
    if not mine:
        return [MISSING, ""]
    lines = []
    for record in mine:
        rows = []
        for mode, row in record["rows"].items():
            wait = row["wait_for_data_share"]
            rows.append([
                mode, f"{row['median_ms']:.0f} [{row['fastest_ms']:.0f}, {row['slowest_ms']:.0f}]",
                f"{row['faster_than_plain']:.2f}", f"{row['peak_mb']:.0f}", f"{100 * row['memory_of_plain']:.0f} %",
                "" if wait is None else f"{100 * wait:.1f} %",
            ])  # fmt: skip
        head = ["arrangement", "ms a step", "times faster", "peak MB", "of plain", "wait for data"]
        title = f"### {record['preset']}, {record['size']} px, batch {record['batch']}"
        lines += [title + (", another run" if title in lines else ""), "", *table(head, rows)]
    return lines + conditions(mine)


def without_bf16(records: Sequence[Record]) -> list[str]:
    """What was measured on processors that do not multiply in bf16."""
    lines = []
    for question, section in (("inference", inference), ("export", exported)):
        measured = [preset for preset in PRESETS if of(records, question, preset)]
        lines += [line.replace("### ", f"### {question.capitalize()}: ") for line in section(records, measured)]
    if of(records, "training"):
        lines += [line.replace("### ", "### Training: ") for line in training(records)]
    return lines or [MISSING, ""]


def scaling(records: Sequence[Record]) -> list[str]:
    mine = of(records, "scaling")
    rows = []
    for record in mine:
        for question, row in record["rows"].items():
            ends = " to ".join(
                f"{point['x']:g} ({point['median_ms']:.0f} ms)" for point in (row["points"][0], row["points"][-1])
            )
            slope = MISSING if row["exponent"] is None else f"{row['exponent']:.2f}"
            rows.append([question, f"{ends} {row['unit']}", slope])
    lines = table(["cost against", "measured", "exponent"], rows) if rows else [MISSING, ""]
    if (RECORDS / "scaling.png").is_file():
        lines += ["![Cost against size, batch, classes, steps and images](results/performance/scaling.png)", ""]
    return lines + conditions(mine)


def is_compact(mode: str) -> bool:
    """Whether a mode has the light parts of `leafseg compact`, whose masks are those of another model."""
    return mode.endswith(", compact")


def best_row(
    records: Sequence[Record], preset: str, size: int = 256, batch: int = 1, *, compact: bool = False
) -> Record | None:
    """The fastest mode of a cell, among those with the light parts or those without."""
    rows = [row for record in of(records, "inference", preset) for row in record["rows"]]
    rows = [row for row in rows if is_compact(row["mode"]) == compact]
    here = [row for row in rows if (row["size"], row["batch"]) == (size, batch) and "ratio" in row]
    return max(here, key=lambda row: row["ratio"], default=None)


def choices(records: Sequence[Record]) -> list[str]:
    """What to choose when, each with the figure that says so."""
    lines = []
    for preset in PRESETS:
        best = best_row(records, preset)
        figure = MISSING if best is None else f"{best['ratio']:.2f} times the plain model ({best['mode']})"
        lines.append(f"- **Many images on one machine**, {preset}: `leafseg benchmark MODEL`, then `--fast`: {figure}.")
        light = best_row(records, preset, compact=True)
        figure = (
            MISSING if light is None else f"{light['ratio']:.2f} times the plain model, {light['ms_an_image']:.0f} ms"
        )
        lines.append(f"- **Faster yet, by other networks**, {preset}: [`leafseg compact`](compact.md): {figure}.")
        done = [row for record in of(records, "export", preset) for row in record["rows"] if row["size"] == 256]
        quickest = min((row for row in done if "error" not in row), key=lambda row: row["median_ms"], default=None)
        figure = MISSING if quickest is None else f"{quickest['median_ms']:.0f} ms ({quickest['mode']})"
        lines.append(f"- **Without PyTorch**, {preset}: [`leafseg export`](export.md): {figure}.")
    for record in records:
        if not (record.get("best") and record.get("compared_images")):
            continue
        ratio = next(row["ratio"] for row in record["rows"] if row["name"] == record["best"])
        lines.append(
            "- **Masks must stay**: `leafseg benchmark` leaves out modes whose masks agree with the plain model's "
            f"by less than a Dice of {record['min_agreement']}. For {record['file'].removesuffix('.json')} it chose "
            f"{record['best']}, {ratio:.2f} times the plain model."
        )
    lines.append("- **Results to the last bit**: no option. The default is fp32 in channels_last.")
    lines.append(
        "- **No bf16 in the processor, or fp32 precision wanted**: the folded fp32 modes differ by rounding alone."
    )
    found = {name: row for r in of(records, "memory", "leaf-base") for name, row in r["rows"].items()}
    least = min((name for name in found if name != "imports"), key=lambda name: found[name]["median_mb"], default=None)
    figure = MISSING if least is None else f"{100 * found[least]['of_plain']:.0f} % of plain ({least})"
    lines.append(f"- **Little memory**, leaf-base: {figure}.")
    for preset in PRESETS:
        one, many = best_row(records, preset), best_row(records, preset, batch=16)
        known = one is not None and many is not None
        figure = f"{one['ms_an_image'] / many['ms_an_image']:.2f} times as fast an image as 1" if known else MISSING
        lines.append(f"- **Batches**, {preset} at 256 px: 16 images a call are {figure}.")
    starts = [row for r in of(records, "start-up") for name, row in r["rows"].items() if name == "predict"]
    figure = f"{starts[-1]['start_up_seconds']:.1f} s of every call of `leafseg predict`" if starts else MISSING
    lines.append(f"- **A few images**: start-up is {figure}; give folders, not one image a call.")
    return [*lines, ""]


def page(records: Sequence[Record]) -> str:
    quick = [record for record in records if record["processor"]["bf16"]]
    others = [record for record in records if quick and record not in quick]
    records = quick or records  # measured without bf16 throughout, the page is of that
    lines = [
        "# Performance",
        "",
        "Written by `experiments/performance_tables.py` from the records in `docs/results/performance`, made by the",
        "commands beneath the tables. Every ratio is against the plain model (fp32, torch's default memory format),",
        "timed alternately in the same run. How to use it: [fast mode](fast-mode.md).",
        "",
        "## What to choose",
        "",
        *choices(records),
        "## Inference",
        "",
        *inference(records),
        "## Exported folders",
        "",
        "One image through `leafseg.runtime`, from pixels to labels, against the plain model in PyTorch. Weights are",
        "random; what an export does to masks stands in [export](export.md), of a trained model. Beside ONNX Runtime",
        "the plain model takes longer than beside OpenVINO, so that those ratios flatter; compare the milliseconds.",
        "",
        *exported(records),
        "## Error of the modes, and agreement of their masks",
        "",
        "Relative errors (Euclidean norm) of mask latent and probability against the plain model, the largest error of",
        "one pixel's probability, and the Dice of the masks with the plain model's, where those are not empty.",
        "",
        *agreement(records),
        "## Roofline",
        "",
        *roofline(records),
        "## Memory",
        "",
        "Peak resident memory of a process that loads the model and segments one image.",
        "",
        *memory(records),
        "## Start-up",
        "",
        *start_up(records),
        "## leaf-tiny against its network of before",
        "",
        "Latents of stride 2 against stride 4 (`configs/tiny-stride-4.yaml`), timed in turn.",
        "",
        *networks(records),
        "## Data loading",
        "",
        *data_loading(records),
        "## Training",
        "",
        "One optimizer step, the teacher and averaged weights included. `plain` is a loop without economies: fp32,",
        "PyTorch's memory order, the teacher on every augmented image, images read from disk each time. The others",
        "take one economy away from what is shipped, or add one. Brackets hold the fastest and the slowest step: where",
        "they overlap, the difference of two arrangements is not resolved.",
        "",
        *training(records),
        "## A processor without bf16",
        "",
        "Many processors have AVX2 or AVX-512 but no instructions for bf16. PyTorch computes in it there too, slower",
        "than in fp32 (`shipped, bf16` below), so that `auto` means fp32, and `leafseg benchmark` leaves bf16 out.",
        "What is left of the gains:",
        "",
        *without_bf16(others),
        "## Scaling",
        "",
        *scaling(records),
        "What can make an exponent larger than 1: the U-Net's attention compares every position with every other, so",
        "that its share grows with the square of the pixels. What makes it smaller: costs that more work shares",
        "(Python, small layers that leave cores idle, the image encoder, which all steps share).",
        "",
        "Research software, not a medical device.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(read_records(RECORDS)))
    print(PAGE)
