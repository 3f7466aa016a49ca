"""The command line: parse, call, turn errors into exit codes. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leafseg.cli_data import data_app
from leafseg.cli_options import (
    DataOption,
    Fold,
    GroupColumn,
    GroupDicom,
    GroupRegex,
    KeepTest,
    ModalityKind,
    ModalityOption,
    NoNames,
    Overrides,
    Part,
    SaltFile,
    SplitFile,
    StratifyColumn,
    StratifyLabels,
    StratifyRegex,
    TableFile,
    TestShare,
)
from leafseg.errors import ConfigError, LeafsegError
from leafseg.runs import is_main_process

if TYPE_CHECKING:
    from leafseg.benchmark import Row
    from leafseg.data.manifest import Manifest
    from leafseg.evaluation.evaluate import Evaluation
    from leafseg.predict import Segmenter
    from leafseg.training.trainer import TrainingResult

app = typer.Typer(
    name="leafseg",
    help="Train, evaluate and run LEAF, a latent-diffusion model for medical image segmentation. Not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app)

_BAD_INPUT = 2


class NoiseKind(StrEnum):
    gaussian = "gaussian"
    zeros = "zeros"


class PrecisionKind(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Timesteps(StrEnum):
    trailing = "trailing"
    released = "released"


class Format(StrEnum):
    auto = "auto"
    png = "png"
    tiff = "tiff"
    nifti = "nifti"
    nrrd = "nrrd"
    mha = "mha"
    dicom_seg = "dicom-seg"


class Contours(StrEnum):
    geojson = "geojson"
    coco = "coco"


class WeightsKind(StrEnum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Model(StrEnum):
    leaf = "leaf"
    unet = "unet"


class ExportBackend(StrEnum):
    onnx = "onnx"
    openvino = "openvino"


class ExportPrecision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


class Resume(StrEnum):
    no = "no"
    auto = "auto"


class PartKind(StrEnum):
    full = "full"
    compact = "compact"


class CompactParts(StrEnum):
    both = "both"
    decoder = "decoder"
    encoder = "encoder"


class FlipsKind(StrEnum):
    horizontal = "horizontal"
    vertical = "vertical"
    both = "both"


StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Reverse steps; default: the model's own (1).")]
TimestepsOption = Annotated[
    Timesteps | None,
    typer.Option(help="Which timesteps several steps visit: from the last one on, or the released code's."),
]
NoiseOption = Annotated[
    NoiseKind | None,
    typer.Option(help="Starting noise: gaussian (keyed per image) or zeros; default: the model's own."),
]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Noise draws an image, averaged.")]
FlipsOption = Annotated[
    FlipsKind | None,
    typer.Option("--flips", help="Average over mirrored copies of each image: 2 calls of the model, with both 4."),
]
KeepUnsureOption = Annotated[
    bool,
    typer.Option("--keep-unsure", help="Draw what the model is nowhere sure of too (docs/presence.md)."),
]
FastOption = Annotated[
    bool, typer.Option("--fast", help="Compute in the arrangement that `leafseg benchmark` stored for this machine.")
]
PrecisionOption = Annotated[PrecisionKind, typer.Option(help="auto: bf16 where the hardware multiplies in it.")]

DecoderOption = Annotated[PartKind, typer.Option(help="compact: the light mask decoder of `leafseg compact`.")]
EncoderOption = Annotated[PartKind, typer.Option(help="compact: the light image encoder of `leafseg compact`.")]


@app.command()
def train(
    data: DataOption,
    out: Annotated[
        Path | None, typer.Option(help="Run folder: checkpoints, logs, the split; not needed for --dry-run.")
    ] = None,
    preset: Annotated[str, typer.Option(help="See `leafseg presets`.")] = "leaf-tiny",
    model: Annotated[
        Model | None, typer.Option(help="leaf, or unet: the baseline (model.baseline), on the same terms.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings on top of the preset.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Budget in optimizer steps.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget in minutes of wall time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    resume: Annotated[Resume, typer.Option(help="auto: continue the run if it has begun.")] = Resume.no,
    init_from: Annotated[str | None, typer.Option(help="Start from this model's weights (fine-tuning).")] = None,
    split_file: SplitFile = None,
    fold: Fold = None,
    modality: ModalityOption = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop after this step; resume later.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, try one batch, print what to expect; write nothing.")
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Skip `leafseg data check`; what cannot be read still stops.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Train LEAF on a folder of images and masks."""
    from leafseg.config import load_settings

    if out is None and not dry_run:
        raise ConfigError("no --out: name the run's folder, or add --dry-run to see what the training would take")
    dotted = _with_training_options(overrides, steps=steps, minutes=minutes, seed=seed, modality=modality, model=model)
    settings = load_settings(preset, file=config, overrides=dotted)
    if dry_run or out is None:
        from leafseg.training.dry_run import describe
        from leafseg.training.dry_run import dry_run as try_training

        lines = describe(try_training(settings, data, split_file=split_file, fold=fold, init_from=init_from))
        if is_main_process():
            print("\n".join(lines))
        return

    from leafseg.training.run import run_training

    result = run_training(
        settings,
        data,
        out,
        split_file=split_file,
        fold=fold,
        check=not no_check,
        resume=resume is Resume.auto,
        init_from=init_from,
        stop_after=stop_after,
    )
    _print_result(result, out)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a pipeline or exported folder, or a hub id.")],
    data: DataOption,
    split: Annotated[Part, typer.Option(help="Which part of the data.")] = Part.test,
    out: Annotated[
        Path | None, typer.Option(help="Where the tables go; default: inside the run, or evaluation/.")
    ] = None,
    split_file: SplitFile = None,
    steps: StepsOption = None,
    timesteps: TimestepsOption = None,
    noise: NoiseOption = None,
    samples: SamplesOption = 1,
    precision: PrecisionOption = PrecisionKind.fp32,
    fast: FastOption = False,
    decoder: DecoderOption = PartKind.full,
    encoder: EncoderOption = PartKind.full,
    flips: FlipsOption = None,
    keep_unsure: KeepUnsureOption = False,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Of the surface Dice: in mm, or in pixels where their size is unknown.")
    ] = 2.0,
    report: Annotated[
        bool | None, typer.Option("--report/--no-report", help="A page to read; default: if matplotlib is installed.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Overlap, distances and calibration at original resolution, with intervals; a table an image, and a report."""
    import shlex
    from dataclasses import asdict
    from importlib.util import find_spec

    from leafseg.evaluation.report import find_examples, require_report_packages, write_report
    from leafseg.predict import out_is_usable
    from leafseg.runs import is_run, run_of

    folder = out or (Path(model) / f"evaluation-{split.value}" if is_run(Path(model)) else Path("evaluation"))
    out_is_usable(folder)
    if report:
        require_report_packages()

    from leafseg.ensemble import FlippedSegmenter, load_model
    from leafseg.training.tracking import read_metrics

    segmenter = load_model(
        model,
        num_inference_steps=steps,
        timesteps=timesteps.value if timesteps else None,
        noise=noise.value if noise else None,
        num_samples=samples,
        precision=precision.value,
        fast=fast,
        decoder=decoder.value,
        encoder=encoder.value,
    )
    if keep_unsure:
        segmenter.presence = ()
    shown = FlippedSegmenter(segmenter, flips.value) if flips else segmenter
    part, result = _evaluated(
        shown, model, data, split, split_file=split_file, overrides=overrides, tolerance=tolerance
    )
    result.summary.update(precision=precision.value, samples=samples)
    result.summary.update(decoder=decoder.value, encoder=encoder.value)
    result.summary["flips"] = flips.value if flips else None
    stored = getattr(segmenter, "precision", None)  # an exported model's own, whatever the option says
    if stored is not None:
        result.summary["precision"] = stored
    pipeline = getattr(segmenter, "pipeline", None)  # an ensemble has several
    if pipeline is not None:
        result.summary["steps"] = steps or int(pipeline.config["num_inference_steps"])
        result.summary["timesteps"] = timesteps.value if timesteps else pipeline.config["timesteps"]
        result.summary["noise"] = noise.value if noise else pipeline.config["noise"]
        result.summary.update(decoder=pipeline.decoder, encoder=pipeline.encoder)  # fast mode may bring its own
    if fast:
        used = [getattr(one, "arrangement", None) for one in getattr(segmenter, "segmenters", (segmenter,))]
        result.summary["fast"] = [asdict(arrangement) if arrangement else None for arrangement in used]
        result.summary["precision"] = ", ".join(
            sorted({arrangement.dtype if arrangement else "fp32" for arrangement in used})
        )
    command = result.summary["command"] = shlex.join(["leafseg", *sys.argv[1:]])
    result.save(folder)
    unit = result.summary["distance_unit"]
    for name, figures in result.summary["classes"].items():
        print(f"{name}: {_figure('Dice', figures['dice'])}, {_figure('IoU', figures['iou'])}", end="")
        print(f" ({figures['images']} images, {figures['empty']} with an empty mask)")
        print(f"  {_figure('precision', figures['precision'])}, {_figure('recall', figures['recall'])}")
        print(f"  {_figure(f'HD95 ({unit})', figures['hd95'])}, {_figure(f'ASSD ({unit})', figures['assd'])}, ", end="")
        print(_figure(f"surface Dice at {tolerance:g} {unit}", figures["nsd"]))
        if figures["missed"]:
            print(f"  missed altogether: {figures['missed']} images, which the distances leave out")
        if figures["false_positive_rate"]:
            print(f"  {_figure('false-positive rate on empty masks', figures['false_positive_rate'])}")
        if "volumes" in figures:
            print(f"  {figures['volumes']} volumes: {_figure('Dice', figures['volume_dice'])}", end="")
            print(f", {_figure('HD95 (mm)', figures['volume_hd95'])}, {_figure('ASSD (mm)', figures['volume_assd'])}")
        failed = result.summary["failures"][name]
        if failed["total"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in failed["reasons"].items())
            print(f"  failures: {failed['total']} ({reasons}); worst: ", end="")
            print(", ".join(entry["name"] for entry in failed["worst"][:3]))
    print(result.summary["interval"])
    print(f"tables: {folder / 'per_image.csv'}, {folder / 'summary.json'}")
    if report or (report is None and find_spec("matplotlib") is not None):
        run = run_of(Path(model))
        write_report(
            folder / "report.html",
            title=f"{(run or Path(model)).resolve().name} on {data.resolve().name}",
            evaluation=result,
            metrics=read_metrics(run) if run is not None else (),
            record=_run_record(run) if run is not None else None,
            examples=find_examples(shown, part, result),
            command=command,
        )
        print(f"report: {folder / 'report.html'}")


def _evaluated(
    segmenter: Segmenter,
    model: str,
    data: Path,
    split: Part,
    *,
    split_file: Path | None,
    overrides: list[str] | None,
    tolerance: float,
) -> tuple[Manifest, Evaluation]:
    """The part that a model is evaluated on, cut into images as the model reads them, and its evaluation."""
    from importlib.metadata import version

    from leafseg.evaluation.evaluate import evaluate as run_evaluation
    from leafseg.predict import presence_of
    from leafseg.runs import model_sha256, selected_on_test
    from leafseg.training.run import hardware, library_versions

    part = _part_of(segmenter, model, data, split, split_file=split_file, overrides=overrides)
    result = run_evaluation(segmenter, part, tolerance=tolerance)
    result.summary.update(
        presence=list(presence_of(segmenter)),
        model=model, model_sha256=model_sha256(model), data=data.resolve().name, part=split.value,
        preprocessing=segmenter.preprocessing.model_dump(mode="json"),
        versions={name: version(name) for name in ("leafseg", "monai", "scipy")} | library_versions(),
        hardware=hardware(),
    )  # fmt: skip
    if split in (Part.test, Part.all) and selected_on_test(Path(model)):
        result.summary["selected_on_test"] = True
        print("warning: the test part chose this checkpoint (training.selection_part): these figures are optimistic")
    return part, result


def _part_of(
    segmenter: Segmenter, model: str, data: Path, split: Part, *, split_file: Path | None, overrides: list[str] | None
) -> Manifest:
    """A part of the data, cut into images as the model reads them."""
    from leafseg.data.manifest import load_manifest

    settings, run_split = _data_of_run(model, overrides)
    settings = settings.model_copy(update={"preprocessing": segmenter.preprocessing})
    manifest = load_manifest(data, settings=settings, split_file=split_file, run_split=run_split)
    return manifest if split is Part.all else manifest.part(split.value)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="An evaluation's folder; with --data, also a model.")],
    second: Annotated[str, typer.Argument(help="What is compared with it: differences are second minus first.")],
    name: Annotated[list[str] | None, typer.Option(help="What to call them; twice, in order.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data that models are evaluated on first.")] = None,
    split: Annotated[Part, typer.Option(help="With --data: which part.")] = Part.test,
    out: Annotated[Path, typer.Option(help="Folder for compare.json, compare.png and new evaluations.")] = Path(
        "comparison"
    ),
    split_file: SplitFile = None,
    overrides: Overrides = None,
) -> None:
    """Two evaluations image by image: paired differences with intervals, and a Wilcoxon test corrected after Holm."""
    from leafseg.evaluation.compare import compare as run_comparison
    from leafseg.evaluation.compare import is_evaluation, read_evaluation, table
    from leafseg.predict import out_is_usable
    from leafseg.runs import is_run

    given = (first, second)
    missing = next((model for model in given if not is_evaluation(Path(model))), None)
    if missing is not None and data is None:
        raise ConfigError(
            f"{missing}: is no evaluation (per_image.csv and summary.json); name the folder of one, or evaluate models "
            "with --data"
        )
    if name:
        names = _model_names(list(given), name)
    else:
        paths = [Path(model).resolve() for model in given]
        names = [(path.parent if is_run(path.parent) else path).name for path in paths]  # RUN/evaluation-test is RUN
        names = names if names[0] != names[1] else ["first", "second"]
    out_is_usable(out)
    folders = []
    for label, model in zip(names, given, strict=True):
        folder = Path(model)
        if data is not None and not is_evaluation(folder):
            from leafseg.ensemble import load_model

            folder = out / label
            _, result = _evaluated(
                load_model(model), model, data, split, split_file=split_file, overrides=overrides, tolerance=2.0
            )
            result.save(folder)
        folders.append(folder)
    result_of = run_comparison(read_evaluation(folders[0]), read_evaluation(folders[1]), names=(names[0], names[1]))
    result_of.save(out)
    print("\n".join(table(result_of)))
    print(f"figures: {out / 'compare.json'}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A run, a pipeline or exported folder, or a hub id.")],
    inputs: Annotated[
        list[Path], typer.Argument(help="Images, volumes, DICOM files or series folders, or folders of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the masks and report.json.")],
    output_format: Annotated[
        Format, typer.Option("--format", help="auto: PNG for flat images, volumes as they came, DICOM-SEG for DICOM.")
    ] = Format.auto,
    steps: StepsOption = None,
    timesteps: TimestepsOption = None,
    noise: NoiseOption = None,
    samples: SamplesOption = 1,
    precision: PrecisionOption = PrecisionKind.fp32,
    fast: FastOption = False,
    decoder: DecoderOption = PartKind.full,
    encoder: EncoderOption = PartKind.full,
    flips: FlipsOption = None,
    keep_unsure: KeepUnsureOption = False,
    probability: Annotated[bool, typer.Option(help="Also write the probability of each label.")] = False,
    overlay: Annotated[bool, typer.Option(help="Also write the image with the labels' outlines.")] = False,
    contours: Annotated[
        Contours | None, typer.Option(help="Also write polygons: a GeoJSON file an input, or one COCO file.")
    ] = None,
    segments: Annotated[
        Path | None, typer.Option(help="JSON file with the coded names of labels for DICOM-SEG, see docs/outputs.md.")
    ] = None,
) -> None:
    """Masks for new images, on their own grid."""
    from leafseg.ensemble import FlippedSegmenter, load_model
    from leafseg.outputs.dicom_seg import read_segment_codes
    from leafseg.predict import foreground_names, predict_files

    segmenter = load_model(
        model,
        num_inference_steps=steps,
        timesteps=timesteps.value if timesteps else None,
        noise=noise.value if noise else None,
        num_samples=samples,
        precision=precision.value,
        fast=fast,
        decoder=decoder.value,
        encoder=encoder.value,
    )
    if keep_unsure:
        segmenter.presence = ()
    report = predict_files(
        FlippedSegmenter(segmenter, flips.value) if flips else segmenter,
        inputs,
        out,
        output_format=output_format.value,
        probability=probability,
        overlay=overlay,
        contours=contours.value if contours else None,
        segment_codes=read_segment_codes(segments, foreground_names(segmenter)) if segments else None,
        model_name=model,
    )
    print(f"{len(report.written)} of {len(report.written) + len(report.failed)} files in {report.seconds:.1f} s: {out}")
    for reason in report.failed.values():
        print(f"error: {reason}", file=sys.stderr)
    if report.failed:
        raise typer.Exit(_BAD_INPUT)


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, with every setting.")] = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels for GFLOPs; default: the preset's own.")
    ] = None,
) -> None:
    """The presets with exact parameter counts and GFLOPs."""
    from leafseg.config import load_settings, preset_names
    from leafseg.model.build import model_figures

    rows = []
    for name in preset_names():
        settings = load_settings(name)
        if size is not None and size % settings.model.stride:
            raise ConfigError(f"--size is {size}; preset {name} takes multiples of {settings.model.stride}")
        figures = model_figures(settings, size=(size, size) if size else None)
        rows.append((name, settings, figures))
    if as_json:
        listed = {
            name: {
                "size": list(figures.size),
                "stride": settings.model.stride,
                "parameters": figures.parameters,
                "gflops": {k: round(v, 3) for k, v in figures.gflops.items()},
                "settings": settings.model_dump(mode="json"),
            }
            for name, settings, figures in rows
        }
        print(json.dumps(listed, indent=2))
        return
    for name, settings, figures in rows:
        print(f"{name}: {figures.size[0]}x{figures.size[1]} input, sides in multiples of {settings.model.stride}")
        print(f"  {'part':<16}{'parameters':>14}{'GFLOPs an image':>18}")
        for part in ("image_encoder", "unet", "autoencoder", "mask_decoder", "inference"):
            count, work = figures.parameters.get(part), figures.gflops.get(part)
            print(
                f"  {part:<16}{count if count is not None else '':>14}{f'{work:.1f}' if work is not None else '':>18}"
            )


@app.command()
def slim(
    model: Annotated[str, typer.Argument(help="A run, a pipeline folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="New folder for the smaller model.")],
    dtype: Annotated[WeightsKind, typer.Option(help="Number format of the weights.")] = WeightsKind.fp16,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Leave out the autoencoder's encoder: it can then not be trained on.")
    ] = False,
) -> None:
    """A smaller copy of a model, for inference alone."""
    from leafseg.model_folder import folder_bytes, slim_model

    slim_model(model, out, dtype=dtype.value, decoder_only=decoder_only)
    print(f"{out}: {folder_bytes(out) / 1e6:.1f} MB in {dtype.value}" + (", decoder only" if decoder_only else ""))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run, a pipeline folder, or a hub id.")],
    to: Annotated[ExportBackend, typer.Option(help="What shall run it, on a CPU and without torch.")],
    out: Annotated[Path, typer.Option(help="New folder for the graph, its settings and the model card.")],
    precision: Annotated[ExportPrecision, typer.Option(help="int8 needs --calibration.")] = ExportPrecision.fp32,
    calibration: Annotated[
        Path | None, typer.Option(help="For int8: folder of images like those to come, none of the test part.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with images/ and masks/, or a CSV, to measure the change of Dice on.")
    ] = None,
    split: Annotated[Part, typer.Option(help="With --data: which part.")] = Part.test,
    split_file: SplitFile = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Mean Dice with the fp32 model's masks, below which nothing is written.")
    ] = 0.99,
    repeats: Annotated[int, typer.Option(min=3, help="Of the latency measurement.")] = 20,
    decoder: DecoderOption = PartKind.full,
    encoder: EncoderOption = PartKind.full,
    overrides: Overrides = None,
) -> None:
    """A model as one ONNX or OpenVINO graph, measured against the model itself."""
    from leafseg.export.run import check_request, export_model

    check_request(out, to=to.value, precision=precision.value, calibration=calibration)

    from leafseg.ensemble import load_model
    from leafseg.predict import PipelineSegmenter

    segmenter = load_model(model, device="cpu")
    if not isinstance(segmenter, PipelineSegmenter):
        raise ConfigError(f"{model}: is an ensemble, a baseline or exported already; only a LEAF model is exported")
    settings, run_split = _data_of_run(model, overrides)
    part = None
    if data is not None:
        part = _part_of(segmenter, model, data, split, split_file=split_file, overrides=overrides)
    report = export_model(
        segmenter,
        out,
        to=to.value,
        precision=precision.value,
        calibration=calibration,
        part=part,
        compared_on=f"{data.resolve().name}, part {split.value}" if data is not None else "",
        min_agreement=min_agreement,
        repeats=repeats,
        model_name=model,
        decoder=decoder.value,
        encoder=encoder.value,
        data_settings=settings,
        run_split=run_split,
    )
    print("\n".join(report.lines()))


@app.command()
def benchmark(
    model: Annotated[str, typer.Argument(help="A run, or a pipeline folder.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of images on which masks are compared; default: synthetic images.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many of them, evenly spaced.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each arrangement.")] = 5,
    steps: StepsOption = None,
    timesteps: TimestepsOption = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Also try torch.compile: minutes.")] = False,
    compact: Annotated[
        CompactParts | None,
        typer.Option("--compact", help="Also try the light parts of `leafseg compact`; they need --images."),
    ] = None,
    max_error: Annotated[float, typer.Option(min=0, help="Bar: relative error of the mask latent.")] = 0.03,
    min_agreement: Annotated[float, typer.Option(min=0, max=1, help="Bar: mean Dice with the plain masks.")] = 0.999,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures, besides fast_mode.json.")] = None,
) -> None:
    """The fastest arrangement for a model on this machine, stored beside it for `--fast`, with its error."""
    from leafseg.benchmark import images_of, run_benchmark
    from leafseg.errors import CheckpointError
    from leafseg.fast_mode import fast_mode_file, write_fast_mode
    from leafseg.files import write_json_atomic

    fast_mode_file(model)  # a model that cannot take one is refused before minutes of work
    print(
        f"{'':<26}{'ms':>9}{'fastest':>9}{'slowest':>9}{'plain':>9}{'ratio':>7}{'latent':>10}{'largest':>9}{'Dice':>9}"
    )
    result = run_benchmark(
        model,
        images=images_of(images, limit=limit) if images else (),
        batch=batch,
        repeats=repeats,
        num_inference_steps=steps,
        timesteps=timesteps.value if timesteps else None,
        compiled=compiled,
        compact=compact.value if compact else "none",
        max_error=max_error,
        min_agreement=min_agreement,
        report=lambda row: print(_benchmark_line(row), flush=True),
    )
    if out is not None:
        write_json_atomic(out, result.to_json())
    if images and not result.compared_images:
        print("the plain model's masks of these images are all empty: no agreement could be measured")
    if result.best is None:
        raise CheckpointError(
            f"{model}: no arrangement is faster than the plain model within the bars (latent error {max_error:g}, "
            f"agreement {min_agreement:g}); nothing is stored, raise a bar or stay with the plain model"
        )
    path = write_fast_mode(model, result.best.arrangement, result.to_json())
    print(f"best: {result.best.name}, {result.best.ratio:.2f} times the plain model; {path}; use it with --fast")


def _benchmark_line(row: Row) -> str:
    if row.timing is None or row.plain is None or row.ratio is None:
        return f"{row.name:<26}does not work here: {row.error}"
    times = (row.timing.median, row.timing.fastest, row.timing.slowest, row.plain.median)
    dice = "" if row.agreement is None else f"{row.agreement:.5f}"
    figures = "".join(f"{1000 * seconds:>9.1f}" for seconds in times)
    return f"{row.name:<26}{figures}{row.ratio:>7.2f}{row.latent_error:>10.1e}{row.largest_error:>9.4f}{dice:>9}"


@app.command()
def compact(
    model: Annotated[str, typer.Argument(help="A run, a pipeline folder, or a hub id; it is only read.")],
    images: Annotated[Path, typer.Option(help="Folder of images without masks, like those to be segmented.")],
    out: Annotated[Path, typer.Option(help="Folder for the trainings, and for the model with compact parts.")],
    data: Annotated[
        Path | None, typer.Option(help="Labelled data whose masks the decoder learns from, besides synthetic ones.")
    ] = None,
    parts: Annotated[CompactParts, typer.Option(help="What is distilled.")] = CompactParts.both,
    bar: Annotated[
        float, typer.Option(help="Mean Dice with the full model's masks below which none is written.")
    ] = 0.995,
    steps: Annotated[int | None, typer.Option(min=1, help="Budget of each training in optimizer steps.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Budget in minutes; of both parts, half is the encoder's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    resume: Annotated[Resume, typer.Option(help="auto: continue what has begun.")] = Resume.no,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop after this step; resume later.")] = None,
    overrides: Overrides = None,
) -> None:
    """A light mask decoder and a light image encoder, beside the full ones in a new model, if their masks agree."""
    from leafseg.compact import PARTS, budget_shares, run_compact
    from leafseg.config import load_compact_settings

    if steps is not None and minutes is not None:
        raise ConfigError("--steps and --minutes are both given; give one of them")
    chosen = [part for part in PARTS if parts in (CompactParts.both, part)]
    dotted = list(overrides or [])
    shares = budget_shares(chosen, tuned=load_compact_settings(overrides=dotted).tuning.enabled)
    for training, share in shares.items():
        given = {"steps": steps, "seed": seed, "minutes": None if minutes is None else round(minutes * share, 3)}
        dotted += [f"{training}.training.{name}={value}" for name, value in given.items() if value is not None]
    data_settings, run_split = _data_of_run(model, None)
    result = run_compact(
        model,
        images,
        out,
        settings=load_compact_settings(overrides=dotted),
        data=data,
        parts=chosen,
        bar=bar,
        resume=resume is Resume.auto,
        stop_after=stop_after,
        data_settings=data_settings,
        run_split=run_split,
    )
    if not is_main_process():
        return
    for name, trained in result.trained.items():
        print(f"{name}: {trained.status} at step {trained.step} of {trained.total_steps}", end="")
        print(f" in {trained.seconds / 60:.1f} minutes")
    if result.model is None:
        print(f"continue with --resume auto --out {out}")
        return
    for name, figures in result.agreement.items():
        print(f"compact {name}: {_figure('mask Dice with the full model', figures['dice'])}, worst ", end="")
        print(f"{figures['worst'][1]:.4f} ({figures['worst'][0]}); {figures['images']} held-out images, ", end="")
        print(f"{figures['both_empty']} of them empty in both")
    print(f"model: {result.model}; use it with --decoder compact --encoder compact")


@app.command("train-autoencoder")
def train_autoencoder(
    data: Annotated[list[Path], typer.Option(help="Folder with images/ and masks/; repeat for several sets.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Budget in optimizer steps.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget in minutes of wall time.")] = None,
    resume: Annotated[Resume, typer.Option(help="auto: continue the run if it has begun.")] = Resume.no,
    overrides: Overrides = None,
) -> None:
    """Train the compact autoencoder that leaf-tiny stands on."""
    from leafseg.config import DataSettings, load_autoencoder_settings
    from leafseg.data.manifest import load_manifest
    from leafseg.predict import out_is_usable

    settings = load_autoencoder_settings(overrides=_with_training_options(overrides, steps=steps, minutes=minutes))
    out_is_usable(out)
    manifests = [load_manifest(folder, settings=DataSettings()) for folder in data]

    from leafseg.training.autoencoder_task import AutoencoderTask
    from leafseg.training.run import library_versions
    from leafseg.training.trainer import train as run_loop

    task = AutoencoderTask(manifests, settings.model, settings)
    record = {
        "settings": settings.model_dump(mode="json"),
        "splits": {m.root.name: m.split_sha256 for m in manifests},
        "versions": library_versions(),
    }
    result = run_loop(task, settings.training, out, record=record, resume=resume is Resume.auto)
    _print_result(result, out)


@app.command("evaluate-autoencoder")
def evaluate_autoencoder(
    data: Annotated[list[Path], typer.Option(help="Folder with images/ and masks/; repeat for several sets.")],
    autoencoder: Annotated[
        str, typer.Option(help="'packaged:NAME', a run, or an autoencoder folder.")
    ] = "packaged:compact-f2",
    split: Annotated[Part, typer.Option(help="Which part of the data.")] = Part.test,
    size: Annotated[int, typer.Option(min=8, help="Side in pixels that masks are resized to.")] = 256,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Dice of masks with themselves after encoding and decoding (the best that any model on top can reach)."""
    from leafseg.evaluation.round_trip import evaluate_round_trip

    figures = evaluate_round_trip(data, autoencoder=autoencoder, part=split.value, size=size)
    for name, interval in figures["sets"].items():
        print(f"{name}: {_figure('round-trip Dice', interval)}, n = {interval['n']}")
    if out is not None:
        from leafseg.files import write_json_atomic

        write_json_atomic(out, figures)


@app.command()
def stability(
    models: Annotated[list[str], typer.Argument(help="Runs, pipeline folders, or hub ids to compare.")],
    data: DataOption,
    split: Annotated[Part, typer.Option(help="Which part of the data.")] = Part.test,
    noise_seeds: Annotated[int, typer.Option(help="Noise draws an image, at least 2.")] = 10,
    steps: Annotated[str, typer.Option(help="Numbers of reverse steps, with commas.")] = "1,2,5,10,20",
    images: Annotated[int, typer.Option(min=0, help="Evenly spaced sample of the part; 0: all of it.")] = 50,
    name: Annotated[list[str] | None, typer.Option(help="What to call a model; once for each, in order.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page, its pictures and the tables.")] = Path("stability"),
    split_file: SplitFile = None,
    overrides: Overrides = None,
) -> None:
    """How much masks change with the starting noise and the steps, for several models side by side."""
    import shlex

    from leafseg.evaluation.report import require_report_packages
    from leafseg.predict import out_is_usable
    from leafseg.runs import selected_on_test

    names = _model_names(models, name)
    numbers = [part.strip() for part in steps.split(",") if part.strip()]
    if not numbers or not all(n.isascii() and n.isdigit() and int(n) for n in numbers):
        raise ConfigError(f"--steps is {steps!r}; give whole numbers from 1, for example 1,2,5")
    if noise_seeds < 2:
        raise ConfigError(f"--noise-seeds is {noise_seeds}; a spread needs at least 2")
    require_report_packages()
    out_is_usable(out)
    sources = {model: _data_of_run(model, overrides) for model in models}
    chosen_on_test = [
        found
        for found, model in zip(names, models, strict=True)
        if split in (Part.test, Part.all) and selected_on_test(Path(model))
    ]
    if chosen_on_test:
        print(
            f"warning: the test part chose the checkpoint of {', '.join(chosen_on_test)} (training.selection_part): "
            "figures on it are optimistic",
            file=sys.stderr,
        )

    from leafseg.evaluation.stability import (
        evenly_spaced,
        find_disagreements,
        load_shared_manifest,
        measure_stability,
    )
    from leafseg.evaluation.stability_page import write_page

    manifest = load_shared_manifest(data, sources, part=split.value, split_file=split_file)
    manifest = evenly_spaced(manifest, images)
    result = measure_stability(
        dict(zip(names, models, strict=True)),
        manifest,
        steps=[int(n) for n in numbers],
        noise_seeds=range(noise_seeds),
    )
    result.summary["part"] = split.value
    if chosen_on_test:
        result.summary["selected_on_test"] = chosen_on_test
    result.save(out)
    examples = find_disagreements(result, manifest)
    command = shlex.join(["leafseg", *sys.argv[1:]])
    page = write_page(out, result, examples, part=split.value, command=command)
    width = max(len(found) for found in names)
    print(f"{'model':<{width}}  predicts      steps    Dice  sd over seeds  disagreement  ECE (draw)  ECE (mean)")
    for compared in result.models:
        for count in result.steps:
            cells = [result.figure(compared.name, count, m) for m in ("dice_mean", "dice_std", "disagreement")]
            cells += [result.figure(compared.name, count, m) for m in ("ece_draw", "ece_mean")]
            figures = ["-" if cell is None else f"{cell['mean']:.4f}" for cell in cells]
            line = "".join(f"{figure:>{size}}" for figure, size in zip(figures, (8, 15, 14, 12, 12), strict=True))
            print(f"{compared.name:<{width}}  {compared.prediction_type:<12}{count:>7}{line}")
    print(f"page: {page}; tables: {out / 'per_image.csv'}, {out / 'stability.json'}")


def _model_names(models: list[str], names: list[str] | None) -> list[str]:
    """The names given, else the folders' own."""
    if names and len(names) != len(models):
        raise ConfigError(f"--name is given {len(names)} times for {len(models)} models; give it once for each")
    chosen = names or [Path(model).name or model for model in models]
    double = next((found for found in chosen if chosen.count(found) > 1), None)
    if double is not None:
        raise ConfigError(f"two models are named {double!r}; tell them apart with --name, once for each model")
    return chosen


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, the masks and report.html.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0.05, help="Training time.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 1337,
) -> None:
    """Train leaf-tiny on a real MRI for a few minutes, evaluate it, and write a page to look at."""
    from leafseg.demo import run_demo

    page = run_demo(out, minutes=minutes, seed=seed)
    print(f"open {page}")


@app.command()
def ablate(
    data: Annotated[list[Path], typer.Option(help="Folder with images/ and masks/, or a CSV; repeat for more.")],
    out: Annotated[Path, typer.Option(help="Folder for runs, splits, records and tables.")],
    preset: Annotated[str, typer.Option(help="See `leafseg presets`.")] = "leaf-tiny",
    config: Annotated[Path | None, typer.Option(help="YAML file of settings on top of the preset.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="SETTING=VALUE,VALUE; repeatable. Default: prediction type x alignment on and off."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of every cell, comma-separated.")] = "1337,1338",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of every run.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget of the slowest run.")] = None,
    split: Annotated[Part, typer.Option(help="Which part is evaluated.")] = Part.test,
    inference_steps: Annotated[
        str, typer.Option(help="Reverse steps to evaluate with, comma-separated; the tables show the first.")
    ] = "1",
    records: Annotated[Path | None, typer.Option(help="JSON lines to append to; default: OUT/runs.jsonl.")] = None,
    keep_runs: Annotated[bool, typer.Option(help="Keep the models of finished runs.")] = True,
    overrides: Overrides = None,
) -> None:
    """Train a grid of settings with several seeds on one stored split; tables with paired differences."""
    from leafseg.ablate import calibrated_steps, paper_grid, parse_axis, run_ablation
    from leafseg.config import load_settings, override_settings

    if (steps is None) == (minutes is None):
        raise ConfigError("give one of --steps and --minutes: all runs of an ablation take equal steps")
    dotted = _with_training_options(overrides, steps=steps, minutes=None)
    settings = load_settings(preset, file=config, overrides=dotted)
    if vary:
        axes = [parse_axis(text) for text in vary]
    else:
        settings, axes = paper_grid(settings)
    seed_list = _integers("--seeds", seeds)
    if minutes is not None:
        budget = calibrated_steps(settings, data[0], out, axes=axes, seed=seed_list[0], minutes=minutes)
        settings = override_settings(settings, [f"training.steps={budget}"])
    result = run_ablation(
        settings,
        data,
        out,
        axes=axes,
        seeds=seed_list,
        part=split.value,
        inference_steps=_integers("--inference-steps", inference_steps),
        records=records,
        keep_runs=keep_runs,
    )
    print(f"{result.finished} of {result.total} runs: {result.report}")
    for reason in result.failed.values():
        print(f"error: {reason}", file=sys.stderr)
    if result.interrupted:
        print("continue with the same command")
    if result.failed:
        raise typer.Exit(_BAD_INPUT)


@app.command()
def crossval(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for the split, a run a fold, the figures and the ensemble.")],
    folds: Annotated[int, typer.Option(min=2, help="How many, if the split is made here.")] = 5,
    split_file: SplitFile = None,
    preset: Annotated[str, typer.Option(help="See `leafseg presets`.")] = "leaf-tiny",
    config: Annotated[Path | None, typer.Option(help="YAML file of settings on top of the preset.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Budget of each fold in optimizer steps.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Budget of the first fold; the others take as many steps.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random in training.")] = None,
    modality: ModalityOption = None,
    init_from: Annotated[str | None, typer.Option(help="Start each fold from this model's weights.")] = None,
    inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Reverse steps to evaluate with; default: the model's own.")
    ] = None,
    group_regex: GroupRegex = None,
    group_column: GroupColumn = None,
    group_dicom: GroupDicom = None,
    stratify_labels: StratifyLabels = False,
    stratify_regex: StratifyRegex = None,
    stratify_column: StratifyColumn = None,
    table: TableFile = None,
    test: TestShare = 0.1,
    keep_test: KeepTest = False,
    split_seed: Annotated[int, typer.Option(help="Of the split's shuffling.")] = 1337,
    salt_file: SaltFile = None,
    no_names: NoNames = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Skip `leafseg data check`; what cannot be read still stops.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Train a model a fold, evaluate each on what it never saw, and their ensemble on the test part; resumes."""
    from leafseg.config import load_settings
    from leafseg.crossval import run_crossval, store_new_split
    from leafseg.predict import out_is_usable

    dotted = _with_training_options(overrides, steps=steps, minutes=minutes, seed=seed, modality=modality)
    settings = load_settings(preset, file=config, overrides=dotted)
    out_is_usable(out)
    if split_file is None:
        options = {
            "group_regex": group_regex,
            "group_column": group_column,
            "group_dicom": group_dicom.value if group_dicom else None,
            "stratify_labels": stratify_labels,
            "stratify_regex": stratify_regex,
            "stratify_column": stratify_column,
            "table": table,
            "folds": folds,
            "test": test,
            "keep_test": keep_test,
            "seed": split_seed,
            "salt_file": salt_file,
            "names": not no_names,
        }
        print("\n".join(store_new_split(data, out, settings=settings.data, **options)))
    result = run_crossval(
        settings,
        data,
        out,
        split_file=split_file,
        init_from=init_from,
        inference_steps=inference_steps,
        check=not no_check,
    )
    for fold in result.folds:
        _print_figures(f"fold {fold.number}", fold.summary)
    if result.out_of_fold is None:
        print(f"{len(result.folds)} of {result.total} folds are done: continue with the same command")
        return
    _print_figures("all folds, held out", result.out_of_fold)
    if result.test is not None:
        _print_figures("ensemble, test part", result.test)
    print(f"figures: {out / 'crossval.json'}, {out / 'per_image.csv'}; predict with {out}")


def _print_figures(name: str, summary: dict[str, Any]) -> None:
    for label, figures in summary["classes"].items():
        counts = f"{figures['images']} images, {figures['empty']} with an empty mask"
        print(f"{name}: {label}: {_figure('Dice', figures['dice'])}, {_figure('IoU', figures['iou'])} ({counts})")


def _integers(option: str, text: str) -> list[int]:
    """Positive or zero integers of a comma-separated list, without repeats."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"{option} is {text!r}; write different whole numbers with commas between, such as 1,2")
    return [int(part) for part in parts]


class WeightType(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class TargetLayout(StrEnum):
    released = "released"


class PredictionKind(StrEnum):
    sample = "sample"
    epsilon = "epsilon"
    v_prediction = "v_prediction"


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="lsun_churches or kl-f8 file, a folder with both, or a released LEAF folder or hub id."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    vae: Annotated[str | None, typer.Option(help="The autoencoder, where SOURCE has none: file or folder.")] = None,
    to: Annotated[
        TargetLayout | None, typer.Option(help="released: SOURCE is a run or pipeline, written for the released code.")
    ] = None,
    dtype: Annotated[WeightType | None, typer.Option(help="Type of the weights; default: the source's own.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Where schedule and preprocessing come from if SOURCE has none.")
    ] = None,
    prediction_type: Annotated[
        PredictionKind | None, typer.Option(help="Instead of the source's own or the preset's.")
    ] = None,
) -> None:
    """Convert published weights into a model, and a model into the released layout."""
    from leafseg.convert import convert as run_conversion

    report = run_conversion(
        source,
        out,
        vae=vae,
        to=to.value if to else None,
        dtype=dtype.value if dtype else None,
        preset=preset,
        prediction_type=prediction_type.value if prediction_type else None,
    )
    print("\n".join(report.lines()))


def _with_training_options(
    overrides: list[str] | None,
    *,
    steps: int | None,
    minutes: float | None,
    seed: int | None = None,
    modality: ModalityKind | None = None,
    model: Model | None = None,
) -> list[str]:
    """The overrides, and what was given as options of their own."""
    if steps is not None and minutes is not None:
        raise ConfigError("--steps and --minutes are both given; give one of them")
    given = {"steps": steps, "minutes": minutes, "seed": seed}
    kind = [f"data.modality={modality.value}"] if modality else []
    kind += [f"model.kind={model.value}"] if model else []
    budget = [f"training.{name}={value}" for name, value in given.items() if value is not None]
    return [*(overrides or []), *kind, *budget]


def _print_result(result: TrainingResult, out: Path) -> None:
    if not is_main_process():
        return
    score = (
        ""
        if result.best_score is None
        else f", best validation score {result.best_score:.4f} at step {result.best_step}"
    )
    print(f"{result.status} at step {result.step} of {result.total_steps}{score}")
    print(f"{result.seconds / 60:.1f} minutes, {result.samples_per_second:.1f} samples/s, peak memory {_peak_mb()} MB")
    print(f"model: {result.checkpoint}")
    if result.status != "finished":
        print(f"continue with --resume auto --out {out}")


def _peak_mb() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024**2))


def _figure(name: str, interval: dict[str, Any] | None) -> str:
    if interval is None:
        return f"{name} not measurable"
    bounds = "" if interval["low"] is None else f" [{interval['low']:.4f}, {interval['high']:.4f}]"
    return f"{name} {interval['mean']:.4f}{bounds}"


def _run_record(run: Path) -> dict[str, Any]:
    from leafseg.errors import CheckpointError
    from leafseg.runs import RUN_FILE

    try:
        record = json.loads((run / RUN_FILE).read_text())["record"]
        return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run / RUN_FILE}: not a readable run record; restore it") from error


def _data_settings(run: str, overrides: list[str] | None) -> Any:
    """The data settings that a run was trained with (its foreground labels, its threshold), with overrides."""
    from leafseg.config import load_settings, override_settings, parse_settings

    stored = _run_record(Path(run)).get("settings")
    if not isinstance(stored, dict) or "objective" not in stored:
        return load_settings(overrides=overrides or ()).data
    return override_settings(parse_settings(stored, source=run), overrides or ()).data


def _data_of_run(model: str, overrides: list[str] | None) -> tuple[Any, Path | None]:
    """The data settings and the stored split of the run that a model belongs to; without a run the defaults, and None.

    A run's checkpoint and pipeline folders count as the run: its test part must not hold what it was trained on.
    """
    from leafseg.config import load_settings
    from leafseg.runs import SPLIT_FILE, is_ensemble, is_export, run_of

    if is_ensemble(Path(model)):
        from leafseg.ensemble import split_of_ensemble
        from leafseg.runs import ensemble_models

        return _data_of_run(ensemble_models(Path(model))[0], overrides)[0], split_of_ensemble(Path(model))
    if is_export(Path(model)):
        from leafseg.exported import stored_data_settings

        split = Path(model) / SPLIT_FILE
        return stored_data_settings(Path(model), overrides or ()), split if split.is_file() else None
    run = run_of(Path(model))
    if run is None:
        return load_settings(overrides=overrides or ()).data, None
    stored = run / SPLIT_FILE
    return _data_settings(str(run), overrides), stored if stored.is_file() else None


def main() -> None:
    """Entry point: exit code 0, or 2 with one sentence on standard error for anything the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("leafseg").setLevel(logging.INFO if is_main_process() else logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns at its import of kernels that nobody asked for
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # lists a damaged file's tags before it raises
    warnings.filterwarnings("ignore", module=r"(PIL|pydicom|tifffile)\b")  # so do Pillow and pydicom
    try:
        app()
    except LeafsegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        # torch's own error is known by its name (importing it here would cost seconds), on a CPU by its text.
        if not (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error)
        ):
            raise
        print("error: out of memory; lower training.micro_batch_size or data.preprocessing.size", file=sys.stderr)
        sys.exit(_BAD_INPUT)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
