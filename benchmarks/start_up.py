"""How long does `leafseg predict` take for a folder of images, and how much of it is start-up?

    .venv/bin/python benchmarks/start_up.py --images 100 --out docs/results/performance/start_up.json

Synthetic images and a model with random weights. Whole processes, in turn: the command's wall time is measured from
outside; the images' own time stands in its report.json; start-up is the rest (Python, imports, loading the model).
`--fast` uses what `leafseg benchmark` stores for the same model here and now.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from _common import QUICK_SIZE, conditions, parser, random_model, run_child, write_record


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--preset", default="leaf-tiny")
    options.add_argument("--size", type=int, default=256, help="of the network's input")
    options.add_argument("--image-size", type=int, default=512)
    options.add_argument("--images", type=int, default=100)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.size, arguments.image_size, arguments.images, arguments.repeats = QUICK_SIZE, QUICK_SIZE, 2, 1
    about = conditions(arguments)

    import numpy as np

    from leafseg.benchmark import synthetic_images
    from leafseg.data.images import write_png

    leafseg = [sys.executable, "-m", "leafseg"]
    threads = {"OMP_NUM_THREADS": str(about["threads"])}
    with (
        tempfile.TemporaryDirectory(prefix="leafseg-benchmark-") as work,
        random_model(arguments.preset, arguments.size, quick=arguments.quick) as model,
    ):
        images = Path(work) / "images"
        side = (arguments.image_size, arguments.image_size)
        for index, image in enumerate(synthetic_images(side, arguments.images)):
            write_png(images / f"{index:03d}.png", (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
        # Random weights may put an arrangement outside the usual bars, which are about masks.
        bars = ["--max-error", "1000", "--repeats", "1" if arguments.quick else "3"]
        commands = {"leafseg --help": [*leafseg, "--help"]}
        try:
            run_child([*leafseg, "benchmark", str(model), *bars], **threads)
            fast = True
        except SystemExit as error:
            fast = False
            print(f"--fast is left out: {str(error).strip().splitlines()[-1]}")
        for name, extra in {"predict": [], "predict --fast": ["--fast"]}.items():
            if extra and not fast:
                continue
            commands[name] = [*leafseg, "predict", str(model), str(images), *extra, "--out"]
        walls: dict[str, list[float]] = {name: [] for name in commands}
        inside: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(arguments.repeats):
            for name, command in commands.items():
                out = Path(work) / f"{name.replace(' ', '-')}-{turn}"
                found = run_child([*command, str(out)] if command[-1] == "--out" else command, **threads)
                walls[name].append(found["seconds"])
                report = out / "report.json"
                inside[name].append(json.loads(report.read_text())["seconds"] if report.is_file() else 0.0)
    rows = {}
    for name in commands:
        starts = [wall - images for wall, images in zip(walls[name], inside[name], strict=True)]
        rows[name] = {
            "wall_seconds": round(statistics.median(walls[name]), 3),
            "wall_fastest": round(min(walls[name]), 3),
            "wall_slowest": round(max(walls[name]), 3),
            "start_up_seconds": round(statistics.median(starts), 3),
            "ms_an_image": round(1000 * statistics.median(inside[name]) / arguments.images, 2),
        }
        row = rows[name]
        whole = f"{row['wall_seconds']:7.2f} s [{row['wall_fastest']:.2f}, {row['wall_slowest']:.2f}]"
        print(f"  {name:<16} {whole}, of which {row['start_up_seconds']:.2f} s start-up; ", end="")
        print(f"{row['ms_an_image']:.1f} ms an image")
    record = {"question": "start-up", **about, "preset": arguments.preset, "size": arguments.size}
    record |= {"images": arguments.images, "image_size": arguments.image_size, "rows": rows}
    write_record(arguments.out, record)


if __name__ == "__main__":
    main()
