"""How much memory does segmenting one image take, by mode? A process of its own each; peak resident memory.

    .venv/bin/python benchmarks/memory.py --preset leaf-base --out docs/results/performance/memory-base.json

Random weights. `plain` loads the pipeline in fp32 and segments; `imports` only imports what that needs, which no mode
can save. Loading counts: a peak is a peak whenever it is.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from _common import QUICK_SIZE, conditions, parser, plain_and_default, random_model, run_child, write_record


def segment(job: dict[str, Any]) -> None:
    """In the child."""
    import torch

    from leafseg.benchmark import candidates, synthetic_images
    from leafseg.fast_mode import load_folded

    torch.set_num_threads(job["threads"])
    if job["mode"] == "imports":
        import leafseg.predict  # noqa: F401

        return
    modes = plain_and_default(Path(job["folder"]))
    images = synthetic_images((job["size"],) * 2, job["batch"])
    if job["mode"] in modes:
        pipeline, context = modes[job["mode"]]()
        with context():
            pipeline(images)
    else:
        load_folded(job["folder"], candidates()[job["mode"]])(images)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--preset", default="leaf-tiny")
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--modes", nargs="+", help="only those whose name contains one of these (and plain)")
    options.add_argument("--job", help="for the script itself")
    arguments = options.parse_args()
    if arguments.job:
        segment(json.loads(arguments.job))
        return
    if arguments.quick:
        arguments.size, arguments.repeats, arguments.modes = QUICK_SIZE, 1, arguments.modes or ["nothing else"]
    about = conditions(arguments)

    from leafseg.benchmark import candidates

    rows: dict[str, dict[str, float]] = {}
    with random_model(arguments.preset, arguments.size, quick=arguments.quick) as folder:
        others = [name for name in (*plain_and_default(folder), *candidates()) if name != "plain"]
        wanted = arguments.modes or [""]
        names = ["imports", "plain", *(name for name in others if any(word in name for word in wanted))]
        peaks: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.repeats):
            for name in names:
                job = {"mode": name, "folder": str(folder), "size": arguments.size, "batch": arguments.batch}
                job["threads"] = about["threads"]
                peaks[name].append(run_child([sys.executable, __file__, "--job", json.dumps(job)])["peak_mb"])
    for name, values in peaks.items():
        rows[name] = {
            "median_mb": round(statistics.median(values), 1),
            "least_mb": round(min(values), 1),
            "most_mb": round(max(values), 1),
            "of_plain": round(statistics.median(values) / statistics.median(peaks["plain"]), 3),
        }
        print(f"  {name:<42} {rows[name]['median_mb']:8.0f} MB  [{min(values):.0f}, {max(values):.0f}]", end="")
        print(f"  {100 * rows[name]['of_plain']:.0f} % of plain")
    write_record(
        arguments.out,
        {"question": "memory", **about, "preset": arguments.preset, "size": arguments.size, "batch": arguments.batch,
         "rows": rows},
    )  # fmt: skip


if __name__ == "__main__":
    main()
