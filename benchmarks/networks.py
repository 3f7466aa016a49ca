"""Is leaf-tiny as fast as its network of before, with latents of stride 4?

    .venv/bin/python benchmarks/networks.py --out docs/results/performance/networks.json

Both networks with random weights, timed in turn in the same process, image by image and in a batch: as `predict` runs
without options, and folded in bf16. `ratio` is the time of the present network against the one of before.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import (
    QUICK_SIZE,
    conditions,
    model_settings,
    parser,
    plain_and_default,
    set_input_size,
    shown,
    spread,
    write_random_model,
    write_record,
)

BEFORE = Path(__file__).resolve().parents[1] / "configs" / "tiny-stride-4.yaml"
PREDICT = "channels_last (predict)"
FOLDED = ("bf16, folded", "fp32, folded")  # the first that the processor multiplies in


def main() -> None:
    """Measure; the record goes to --out."""
    options = parser(__doc__)
    options.set_defaults(repeats=9)
    options.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    arguments = options.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.batches, arguments.repeats = [QUICK_SIZE], [1], 1
    about = conditions(arguments)

    from leafseg.benchmark import alternately, candidates, synthetic_images
    from leafseg.config import load_settings
    from leafseg.fast_mode import load_folded
    from leafseg.model.build import model_figures

    size = arguments.sizes[0]
    settings = {"present": model_settings("leaf-tiny", size, quick=arguments.quick)}
    settings["before"] = (
        settings["present"]
        if arguments.quick
        else load_settings(
            "leaf-tiny", file=BEFORE, overrides=[f"data.preprocessing.size=[{size},{size}]", "teacher.name=none"]
        )
    )
    networks = {}
    record: dict[str, Any] = {"question": "networks", **about, "preset": "leaf-tiny", "rows": []}
    for name, chosen in settings.items():
        figures = model_figures(chosen, size=(size, size))
        networks[name] = {
            "parameters": figures.parameters["inference"],
            "gflop": round(figures.gflops["inference"], 3),
            "size": size,
        }
    record["networks"] = networks
    with tempfile.TemporaryDirectory(prefix="leafseg-benchmark-") as folder:
        for name, chosen in settings.items():
            write_random_model(Path(folder) / name, chosen)
        folded = next(mode for mode in FOLDED if mode in candidates())
        for mode, side, batch in itertools.product((PREDICT, folded), arguments.sizes, arguments.batches):
            images = synthetic_images((side, side), batch)
            calls: dict[str, Callable[[], Any]] = {}
            for name in settings:
                set_input_size(Path(folder) / name, side)
                if mode == PREDICT:
                    pipeline, _ = plain_and_default(Path(folder) / name)[PREDICT]()
                else:
                    pipeline = load_folded(str(Path(folder) / name), candidates()[mode])
                calls[name] = lambda p=pipeline, x=images: p(x)
            seconds = alternately(calls, repeats=arguments.repeats)
            found = {name: spread(seconds[name]) for name in calls}
            ratio = found["present"]["median_ms"] / found["before"]["median_ms"]
            record["rows"].append({"mode": mode, "size": side, "batch": batch, **found, "ratio": round(ratio, 3)})
            print(f"{mode}, {side} px, batch {batch}: {shown(found['present'])}, before {shown(found['before'])}")
            write_record(arguments.out, record)


if __name__ == "__main__":
    main()
