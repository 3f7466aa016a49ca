"""How long does an image take in an exported folder, against the plain model in PyTorch?

    .venv/bin/python benchmarks/export.py --compact --out docs/results/performance/export-tiny.json
    .venv/bin/python benchmarks/export.py --preset leaf-base --backends onnx --precisions fp32 --repeats 3 --out FILE

Random weights, and int8 calibrated on synthetic images: that changes no timing, and says nothing about masks, which
`leafseg export` measures with trained weights. Each export is opened and called as a user's program does
(`leafseg.runtime`), alternately with the plain model (fp32, default memory format). `--compact` adds the exports whose
mask decoder and image encoder are the light ones. Exports that this machine cannot make or run say why.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import (
    QUICK_SIZE,
    conditions,
    parser,
    plain_and_default,
    random_model,
    set_input_size,
    shown,
    spread,
    write_images,
    write_record,
)

EXPORTS = (
    ("onnx", "fp32"),
    ("onnx", "fp16"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
PACKAGES = ("onnxruntime", "openvino", "nncf")
_CALIBRATION_IMAGES = 4


def measure(
    model: Path, backend: str, precision: str, parts: str, *, size: int, repeats: int, threads: int
) -> dict[str, Any]:
    """One export against the plain pipeline, on one image of the network's input size."""
    from leafseg.benchmark import alternately, synthetic_images
    from leafseg.errors import LeafsegError
    from leafseg.export.run import export_model
    from leafseg.pipeline import LeafPipeline
    from leafseg.predict import PipelineSegmenter
    from leafseg.runtime import load

    name = f"{backend} {precision}" + (", compact" if parts == "compact" else "")
    try:
        with tempfile.TemporaryDirectory(prefix="leafseg-benchmark-") as work:
            calibration = Path(work) / "calibration"
            if precision == "int8":
                write_images(calibration, _CALIBRATION_IMAGES, size)
            report = export_model(
                PipelineSegmenter(LeafPipeline.from_pretrained(model)),
                Path(work) / "exported",
                to=backend,
                precision=precision,
                calibration=calibration if precision == "int8" else None,
                min_agreement=0.0,  # of random weights' masks
                repeats=1,
                decoder=parts,
                encoder=parts,
            )
            runtime = load(report.folder, threads=threads)
            plain, _ = plain_and_default(model)["plain"]()
            image = synthetic_images((size, size), 1)
            pixels = image[0].numpy()
            calls = {"plain": lambda: plain(image), name: lambda: runtime.segment(pixels)}
            seconds = alternately(calls, repeats=repeats, warm_up=2)
    except LeafsegError as error:
        reason = str(error).splitlines()[0].replace(f"{work}/", "")
        print(f"  {name:<28} does not work here: {reason}", flush=True)
        return {"mode": name, "error": reason}
    mine, theirs = spread(seconds[name]), spread(seconds["plain"])
    ratio = theirs["median_ms"] / mine["median_ms"]
    print(f"  {name:<28} {shown(mine)}  plain {shown(theirs)}  {ratio:.2f}x", flush=True)
    return {
        "mode": name,
        **mine,
        "ms_an_image": mine["median_ms"],
        "plain": theirs,
        "ratio": round(ratio, 3),
        "megabytes": round(report.megabytes, 1),
    }


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=15)
    options.add_argument("--preset", default="leaf-tiny")
    options.add_argument("--sizes", type=int, nargs="+", default=[256])
    options.add_argument("--backends", nargs="+", default=["onnx", "openvino"])
    options.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16", "int8"])
    options.add_argument("--compact", action="store_true", help="also with the light parts of leafseg compact")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.repeats = [QUICK_SIZE], 1
        arguments.backends, arguments.precisions = ["onnx"], ["fp32"]
    about = conditions(arguments)
    about["versions"] |= {name: version(name) for name in PACKAGES if find_spec(name)}
    wanted = [e for e in EXPORTS if e[0] in arguments.backends and e[1] in arguments.precisions]
    kinds = ["full", "compact"] if arguments.compact else ["full"]
    record = {"question": "export", **about, "preset": arguments.preset, "rows": []}
    with random_model(arguments.preset, arguments.sizes[0], quick=arguments.quick, compact=arguments.compact) as folder:
        for size in arguments.sizes:
            set_input_size(folder, size)
            print(f"{arguments.preset}, {size}x{size}, batch 1")
            for parts, (backend, precision) in itertools.product(kinds, wanted):
                row = measure(
                    *(folder, backend, precision, parts),
                    size=size, repeats=arguments.repeats, threads=about["threads"],
                )  # fmt: skip
                record["rows"].append({"size": size, "batch": 1, **row})
                gc.collect()
                write_record(arguments.out, record)  # what was measured stays, whatever happens next


if __name__ == "__main__":
    main()
