"""How long does an image take, by mode, batch and size, and how near is that to what the machine can do?

    .venv/bin/python benchmarks/inference.py --preset leaf-tiny --out docs/results/performance/inference-tiny.json
    .venv/bin/python benchmarks/inference.py --preset leaf-base --sizes 256 --batches 1 --repeats 3 --out FILE

Random weights: they change no timing. Each mode is timed alternately with the plain model (fp32, default memory
format); `ratio` is how many times faster it is. Peaks are of 2048x2048 matrix products, measured before and after. The
parts of an image's time are measured inside the same calls.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from _common import (
    QUICK_SIZE,
    conditions,
    matmul_peaks,
    model_settings,
    parser,
    plain_and_default,
    random_model,
    set_input_size,
    shown,
    spread,
    write_record,
)


@contextmanager
def timed_parts(pipeline: Any, parts: dict[str, list[float]]) -> Iterator[None]:
    """Seconds of the three networks, appended at every call."""
    places = ((pipeline.image_encoder, "forward"), (pipeline.unet, "denoise"), (pipeline.vae, "decode"))
    for name, (owner, method) in zip(("image encoder", "U-Net", "mask decoder"), places, strict=True):
        original = getattr(owner, method)

        def measured(*given: Any, original: Any = original, name: str = name, **named: Any) -> Any:
            begun = time.perf_counter()
            result = original(*given, **named)
            parts.setdefault(name, []).append(time.perf_counter() - begun)
            return result

        setattr(owner, method, measured)
    try:
        yield
    finally:
        for owner, method in places:
            owner.__dict__.pop(method, None)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--preset", default="leaf-tiny")
    options.add_argument("--sizes", type=int, nargs="+", default=[256])
    options.add_argument("--batches", type=int, nargs="+", default=[1])
    options.add_argument("--modes", nargs="+", help="only those whose name contains one of these")
    options.add_argument("--compile", action="store_true", help="also torch.compile: minutes")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.batches, arguments.repeats = [QUICK_SIZE], [1], 1
    about = conditions(arguments)

    from leafseg.benchmark import alternately, candidates, synthetic_images
    from leafseg.errors import CheckpointError
    from leafseg.fast_mode import load_folded
    from leafseg.model.build import model_figures

    peaks = [matmul_peaks(side=256 if arguments.quick else 2048)]
    print(f"matmul peak: fp32 {peaks[0]['fp32']} GFLOP/s, bf16 {peaks[0]['bf16']} GFLOP/s", flush=True)
    rows = []
    with random_model(arguments.preset, arguments.sizes[0], quick=arguments.quick) as folder:
        modes: dict[str, Any] = plain_and_default(folder)
        load_plain = modes.pop("plain")
        for name, arrangement in candidates(compiled=arguments.compile).items():
            modes[name] = lambda a=arrangement: (load_folded(str(folder), a), nullcontext)
        wanted = arguments.modes or [""]
        modes = {name: load for name, load in modes.items() if any(word in name for word in wanted)}
        for size in arguments.sizes:
            set_input_size(folder, size)
            settings = model_settings(arguments.preset, size, quick=arguments.quick)
            gflop = model_figures(settings).gflops
            plain, _ = load_plain()
            for batch in arguments.batches:
                images = synthetic_images((size, size), batch)
                print(f"{arguments.preset}, {size}x{size}, batch {batch}, {gflop['inference']:.1f} GFLOP an image")
                for name, load in modes.items():
                    row: dict[str, Any] = {"mode": name, "size": size, "batch": batch}
                    try:
                        other, context = load()

                        def call(other: Any = other, context: Any = context, images: Any = images) -> None:
                            with context():
                                other(images)

                        parts: dict[str, list[float]] = {}
                        plain_parts: dict[str, list[float]] = {}
                        with timed_parts(other, parts), timed_parts(plain, plain_parts):
                            calls = {"plain": partial(plain, images), name: call}
                            seconds = alternately(calls, repeats=arguments.repeats)
                    except (CheckpointError, RuntimeError) as error:
                        row["error"] = str(error).splitlines()[0]
                        print(f"  {name:<42} does not work here: {row['error']}")
                        rows.append(row)
                        continue
                    mine, theirs = spread(seconds[name]), spread(seconds["plain"])
                    row |= {"plain": theirs, **mine, "ratio": round(theirs["median_ms"] / mine["median_ms"], 3)}
                    row["ms_an_image"] = round(mine["median_ms"] / batch, 3)
                    # The plain model's operations: folding leaves some out, which counts as speed.
                    row["gflops"] = round(1000 * batch * gflop["inference"] / mine["median_ms"], 1)
                    row["plain_gflops"] = round(1000 * batch * gflop["inference"] / theirs["median_ms"], 1)
                    turns = slice(-arguments.repeats, None)
                    row["parts_ms"] = {part: spread(s[turns])["median_ms"] for part, s in parts.items()}
                    row["plain_parts_ms"] = {part: spread(s[turns])["median_ms"] for part, s in plain_parts.items()}
                    rows.append(row)
                    print(f"  {name:<42} {shown(mine)}  plain {shown(theirs)}  {row['ratio']:.2f}x", flush=True)
                    del other, calls, call
                    gc.collect()
            del plain
            gc.collect()
    peaks.append(matmul_peaks(side=256 if arguments.quick else 2048))
    best = {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]}
    write_record(
        arguments.out,
        {
            "question": "inference",
            **about,
            "preset": arguments.preset,
            "matmul_gflops": best,
            "gflop": gflop,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
