"""How long does an image take, by mode, batch and size, and how near is that to what the machine can do?

    .venv/bin/python benchmarks/inference.py --preset leaf-tiny --out docs/results/performance/inference-tiny.json
    .venv/bin/python benchmarks/inference.py --preset leaf-base --sizes 256 --batches 1 --repeats 3 --out FILE
    .venv/bin/python benchmarks/inference.py --preset leaf-base --compact --modes compact --out FILE

Random weights: they change no timing. Each mode is timed alternately with the plain model (fp32, default memory
format); `ratio` is how many times faster it is. Peaks are of 2048x2048 matrix products, measured before and after. The
parts of an image's time are measured inside the same calls.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
    places = (
        (pipeline.compact_encoder if pipeline.encoder == "compact" else pipeline.image_encoder, "forward"),
        (pipeline.unet, "denoise"),
        (pipeline.compact_decoder, "decode_pictures") if pipeline.decoder == "compact" else (pipeline.vae, "decode"),
    )
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


def measure(
    name: str, load: Callable[[], Any], plain: Any, images: Any, *, gflop: float, repeats: int
) -> dict[str, Any]:
    """One mode against the plain pipeline on a batch of images; ``gflop`` is the plain model's for one of them."""
    from leafseg.benchmark import alternately
    from leafseg.errors import CheckpointError

    parts: dict[str, list[float]] = {}
    plain_parts: dict[str, list[float]] = {}
    try:
        other, context = load()

        def call() -> None:
            with context():
                other(images)

        with timed_parts(other, parts), timed_parts(plain, plain_parts):
            seconds = alternately({"plain": lambda: plain(images), name: call}, repeats=repeats)
    except (CheckpointError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        print(f"  {name:<42} does not work here: {reason}")
        return {"mode": name, "error": reason}
    mine, theirs = spread(seconds[name]), spread(seconds["plain"])
    ratio = theirs["median_ms"] / mine["median_ms"]
    print(f"  {name:<42} {shown(mine)}  plain {shown(theirs)}  {ratio:.2f}x", flush=True)
    batch, turns = len(images), slice(-repeats, None)
    return {
        "mode": name,
        **mine,
        "plain": theirs,
        "ratio": round(ratio, 3),
        "ms_an_image": round(mine["median_ms"] / batch, 3),
        # The plain model's operations: folding leaves some out, which counts as speed.
        "gflops": round(1000 * batch * gflop / mine["median_ms"], 1),
        "plain_gflops": round(1000 * batch * gflop / theirs["median_ms"], 1),
        "parts_ms": {part: spread(times[turns])["median_ms"] for part, times in parts.items()},
        "plain_parts_ms": {part: spread(times[turns])["median_ms"] for part, times in plain_parts.items()},
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--preset", default="leaf-tiny")
    options.add_argument("--sizes", type=int, nargs="+", default=[256])
    options.add_argument("--batches", type=int, nargs="+", default=[1])
    options.add_argument("--modes", nargs="+", help="only those whose name contains one of these")
    options.add_argument("--compact", action="store_true", help="also the light parts of leafseg compact")
    options.add_argument("--compile", action="store_true", help="also torch.compile: minutes")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.batches, arguments.repeats = [QUICK_SIZE], [1], 1
    about = conditions(arguments)

    from leafseg.benchmark import candidates, synthetic_images
    from leafseg.fast_mode import load_folded
    from leafseg.model.build import model_figures

    side = 256 if arguments.quick else 2048
    peaks = matmul_peaks(side=side)
    print(f"matmul peak: fp32 {peaks['fp32']} GFLOP/s, bf16 {peaks['bf16']} GFLOP/s", flush=True)
    record = {"question": "inference", **about, "preset": arguments.preset, "gflop": {}, "rows": []}
    with random_model(arguments.preset, arguments.sizes[0], quick=arguments.quick, compact=arguments.compact) as folder:
        modes: dict[str, Any] = plain_and_default(folder)
        load_plain = modes.pop("plain")
        for name, arrangement in candidates(
            compiled=arguments.compile, compact="both" if arguments.compact else "none"
        ).items():
            modes[name] = lambda a=arrangement: (load_folded(str(folder), a), nullcontext)
        wanted = arguments.modes or [""]
        modes = {name: load for name, load in modes.items() if any(word in name for word in wanted)}
        for size, batch in itertools.product(arguments.sizes, arguments.batches):
            set_input_size(folder, size)
            settings = model_settings(arguments.preset, size, quick=arguments.quick)
            figures = record["gflop"][str(size)] = model_figures(settings).gflops
            gflop = figures["inference"]
            plain, _ = load_plain()
            images = synthetic_images((size, size), batch)
            print(f"{arguments.preset}, {size}x{size}, batch {batch}, {gflop:.1f} GFLOP an image")
            for name, load in modes.items():
                row = measure(name, load, plain, images, gflop=gflop, repeats=arguments.repeats)
                record["rows"].append({"size": size, "batch": batch, **row})
                gc.collect()
                record["matmul_gflops"] = peaks
                write_record(arguments.out, record)  # what was measured stays, whatever happens next
            del plain
    again = matmul_peaks(side=side)  # the better of before and after: what else ran then cost one of them
    record["matmul_gflops"] = {kind: max(peaks[kind], again[kind]) for kind in peaks}
    write_record(arguments.out, record)


if __name__ == "__main__":
    main()
