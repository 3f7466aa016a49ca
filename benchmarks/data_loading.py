"""How many training samples a second does the data loader give, and how many does a training step take?

    .venv/bin/python benchmarks/data_loading.py --out docs/results/performance/data_loading.json

PNG images of --image-size with masks, resized to the preset's input and augmented, in batches as in training. The first
epoch decodes; later ones find the 8-bit samples in memory (`data.cache_mb`). The consumer is leaf-tiny's training step
as it is shipped, but without a teacher, timed here in the same run: a loader that gives more never starves it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from _common import QUICK_SIZE, conditions, model_settings, parser, write_images, write_record
from training import shipped_steps


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--image-size", type=int, default=512)
    options.add_argument("--images", type=int, default=64)
    options.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = options.parse_args()
    if arguments.quick:
        arguments.image_size, arguments.images, arguments.workers, arguments.repeats = QUICK_SIZE, 12, [0], 1
    about = conditions(arguments)

    from torch.utils.data import DataLoader

    from leafseg.config import override_settings
    from leafseg.data.dataset import PositionSampler, SegmentationDataset
    from leafseg.data.manifest import load_manifest
    from leafseg.data.transforms import Preprocessor

    settings = model_settings("leaf-tiny", QUICK_SIZE if arguments.quick else 128, quick=arguments.quick)
    batch = min(settings.training.batch_size, arguments.images)
    rows = []
    with tempfile.TemporaryDirectory(prefix="leafseg-benchmark-") as work:
        write_images(Path(work), arguments.images, arguments.image_size)
        manifest = load_manifest(Path(work), settings=settings.data)
        for cache_mb in (0, 512):
            for workers in arguments.workers:
                dataset = SegmentationDataset(
                    manifest,
                    Preprocessor(settings.data.preprocessing),
                    augmentation=settings.data.augmentation,
                    seed=0,
                    cache_mb=cache_mb,
                    soft_labels=settings.data.soft_labels,
                )
                steps = max(1, len(manifest) // batch)
                # One endless pass: workers keep their caches. Its first epoch fills them, and does not count.
                sampler = PositionSampler(
                    n=len(manifest), seed=0, batch_size_global=batch, num_steps=steps * (arguments.repeats + 1)
                )
                loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
                times, begun = [], time.perf_counter()
                for number, _ in enumerate(loader, start=1):
                    if number % steps == 0:
                        times.append(time.perf_counter() - begun)
                        begun = time.perf_counter()
                speeds = sorted(steps * batch / value for value in times[1:])
                rows.append({
                    "cache_mb": cache_mb,
                    "workers": workers,
                    "samples_a_second": round(speeds[len(speeds) // 2], 1),
                    "least": round(speeds[0], 1),
                    "most": round(speeds[-1], 1),
                })  # fmt: skip
        stepping = override_settings(settings, [f"training.batch_size={batch}"])
        step = batch / statistics.median(shipped_steps(stepping, Path(work), arguments.repeats)["seconds"])
    for row in rows:
        row["times_the_step"] = round(row["samples_a_second"] / step, 2)
        kind = "decoded again" if not row["cache_mb"] else "from memory"
        print(f"  {kind:<14} {row['workers']} workers: {row['samples_a_second']:8.1f} samples/s ", end="")
        print(f"[{row['least']}, {row['most']}], {row['times_the_step']:.1f} times what a step takes ({step:.1f})")
    record = {"question": "data loading", **about, "images": len(manifest), "image_size": arguments.image_size}
    record |= {"batch": batch, "input": list(settings.data.preprocessing.size), "step_samples_a_second": round(step, 2)}
    write_record(arguments.out, record | {"rows": rows})


if __name__ == "__main__":
    main()
