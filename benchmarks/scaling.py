"""How does the cost grow with image size, batch, classes, steps and the number of images?

    .venv/bin/python benchmarks/scaling.py --out docs/results/performance/scaling.json \\
        --plot docs/results/performance/scaling.png

leaf-tiny with random weights in the arrangement that predict uses without options. The points of one question are timed
in turn, so that a disturbance meets all of them. The exponent is the slope of a straight line through the logarithms: 1
is linear; below, a fixed cost is shared; above, something grows faster. Size is counted in pixels.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
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

MODE = "channels_last (predict)"


def exponent(points: Sequence[Mapping[str, float]]) -> float | None:
    """Least-squares slope of log(median) over log(x); None for fewer than two points."""
    pairs = [(math.log(point["x"]), math.log(point["median_ms"])) for point in points]
    if len(pairs) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x, _ in pairs)
    return round(slope, 3)


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--preset", default="leaf-tiny")
    options.add_argument("--base-size", type=int, default=128, help="where size is not the question")
    options.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 384, 512])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options.add_argument("--classes", type=int, nargs="+", default=[2, 4, 8, 16])
    options.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    options.add_argument("--counts", type=int, nargs="+", default=[4, 16, 64], help="images in a folder")
    options.add_argument("--only", nargs="+", choices=("size", "batch", "classes", "steps", "images"))
    options.add_argument("--plot", type=Path, help="PNG file")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.base_size, arguments.sizes = 1, QUICK_SIZE, [QUICK_SIZE, 2 * QUICK_SIZE]
        arguments.batches, arguments.classes, arguments.steps, arguments.counts = [1, 2], [2, 3], [1, 2], [1, 2]
    about = conditions(arguments)

    import numpy as np

    from leafseg.benchmark import alternately, synthetic_images
    from leafseg.data.images import write_png
    from leafseg.predict import PipelineSegmenter, predict_files

    rows: dict[str, dict[str, Any]] = {}
    wanted = arguments.only or ("size", "batch", "classes", "steps", "images")
    base = arguments.base_size

    with tempfile.TemporaryDirectory(prefix="leafseg-benchmark-") as work:

        def pipeline(size: int = base, classes: int = 2) -> Any:
            folder = Path(work) / f"{classes}-classes"
            if not folder.is_dir():
                names = ["background", *(f"class {k}" for k in range(1, classes))]
                settings = model_settings(arguments.preset, size, quick=arguments.quick)
                write_random_model(folder, settings, label_names=names)
            set_input_size(folder, size)
            return plain_and_default(folder)[MODE]()[0]

        def measure(question: str, unit: str, calls: Mapping[float, Callable[[], Any]]) -> None:
            seconds = alternately({str(x): call for x, call in calls.items()}, repeats=arguments.repeats)
            points = [{"x": x, **spread(seconds[str(x)])} for x in calls]
            rows[question] = {"unit": unit, "points": points, "exponent": exponent(points)}
            print(f"{question} ({unit}): exponent {rows[question]['exponent']}")
            for point in points:
                print(f"  {point['x']:>10g} {shown(point)}", flush=True)

        if "size" in wanted:
            sized = {size: (pipeline(size), synthetic_images((size, size), 1)) for size in arguments.sizes}
            measure("size", "pixels of an image", {n * n: (lambda p=p, x=x: p(x)) for n, (p, x) in sized.items()})
            del sized
        ready = pipeline()
        if "batch" in wanted:
            inputs = {batch: synthetic_images((base, base), batch) for batch in arguments.batches}
            measure("batch", "images a call", {n: (lambda x=x: ready(x)) for n, x in inputs.items()})
        one = synthetic_images((base, base), 1)
        if "classes" in wanted:
            models = {classes: pipeline(classes=classes) for classes in arguments.classes}
            measure("classes", "labels, background included", {n: (lambda p=p: p(one)) for n, p in models.items()})
        if "steps" in wanted:
            measure(
                "steps", "reverse steps",
                {n: (lambda n=n: ready(one, num_inference_steps=n)) for n in arguments.steps},
            )  # fmt: skip
        if "images" in wanted:
            files = []
            for index, image in enumerate(synthetic_images((base, base), max(arguments.counts))):
                files.append(Path(work) / "images" / f"{index:04d}.png")
                write_png(files[-1], (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
            segmenter = PipelineSegmenter(ready)

            def predict(count: int) -> None:
                predict_files(segmenter, files[:count], Path(work) / f"out-{count}")

            question = "files in a folder, from file to file"
            measure("images", question, {n: (lambda n=n: predict(n)) for n in arguments.counts})
    record = {"question": "scaling", **about, "preset": arguments.preset, "base_size": base, "mode": MODE}
    write_record(arguments.out, record | {"rows": rows})
    if arguments.plot:
        draw(rows, arguments.plot)


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One panel a question, both axes logarithmic, with the fitted line and a linear one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(rows), 3), layout="constrained")  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    for number, (question, row) in enumerate(rows.items(), start=1):
        axes = figure.add_subplot(1, len(rows), number)
        x = [point["x"] for point in row["points"]]
        y = [point["median_ms"] for point in row["points"]]
        below = [point["median_ms"] - point["fastest_ms"] for point in row["points"]]
        above = [point["slowest_ms"] - point["median_ms"] for point in row["points"]]
        axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=2, label=f"exponent {row['exponent']}")
        axes.plot(x, [y[0] * value / x[0] for value in x], "--", color="grey", linewidth=1, label="linear")
        axes.set(xscale="log", yscale="log", title=question, xlabel=row["unit"], ylabel="ms" if number == 1 else "")
        # The measured points as marks: the marks of a logarithmic axis fall on each other where it spans little.
        axes.set_xticks(x, [f"{value:,}" for value in x], fontsize=8, rotation=30 if x[-1] > 9999 else 0)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        decades = [10**power for power in range(7)]
        marks = [value for decade in decades for value in (decade, 2 * decade, 5 * decade) if low < value < high]
        axes.set_yticks(marks, [f"{value:,}" for value in marks], fontsize=8)
        axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
