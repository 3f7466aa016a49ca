"""The command line: parse, call, turn errors into exit codes. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leafseg.errors import ConfigError, LeafsegError
from leafseg.runs import is_main_process

if TYPE_CHECKING:
    from leafseg.training.trainer import TrainingResult

app = typer.Typer(
    name="leafseg",
    help="Train, evaluate and run LEAF, a latent-diffusion model for medical image segmentation. Not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_BAD_INPUT = 2


class Part(StrEnum):
    train = "train"
    validation = "validation"
    test = "test"
    all = "all"


class NoiseKind(StrEnum):
    gaussian = "gaussian"
    zeros = "zeros"


class PrecisionKind(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Resume(StrEnum):
    no = "no"
    auto = "auto"


Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="A setting by its dotted name, e.g. training.seed=3; repeatable.")
]
DataOption = Annotated[Path, typer.Option(help="Folder with images/ and masks/, or a CSV manifest.")]
SplitFile = Annotated[
    Path | None, typer.Option("--split-file", help="A stored split (CSV) instead of the default one.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Reverse steps; default: the model's own (1).")]
NoiseOption = Annotated[NoiseKind, typer.Option(help="Starting noise: gaussian (keyed per image) or zeros.")]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Noise draws an image, averaged.")]
PrecisionOption = Annotated[PrecisionKind, typer.Option(help="auto: bf16 where the hardware multiplies in it.")]


@app.command()
def train(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, logs, the split.")],
    preset: Annotated[str, typer.Option(help="See `leafseg presets`.")] = "leaf-tiny",
    config: Annotated[Path | None, typer.Option(help="YAML file of settings on top of the preset.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Budget in optimizer steps.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget in minutes of wall time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    resume: Annotated[Resume, typer.Option(help="auto: continue the run if it has begun.")] = Resume.no,
    init_from: Annotated[str | None, typer.Option(help="Start from this model's weights (fine-tuning).")] = None,
    split_file: SplitFile = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop after this step; resume later.")] = None,
    overrides: Overrides = None,
) -> None:
    """Train LEAF on a folder of images and masks."""
    from leafseg.config import load_settings

    dotted = _with_training_options(overrides, steps=steps, minutes=minutes, seed=seed)
    settings = load_settings(preset, file=config, overrides=dotted)

    from leafseg.training.run import run_training

    result = run_training(
        settings,
        data,
        out,
        split_file=split_file,
        resume=resume is Resume.auto,
        init_from=init_from,
        stop_after=stop_after,
    )
    _print_result(result, out)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a pipeline folder, or a hub id.")],
    data: DataOption,
    split: Annotated[Part, typer.Option(help="Which part of the data.")] = Part.test,
    out: Annotated[
        Path | None, typer.Option(help="Where the tables go; default: inside the run, or evaluation/.")
    ] = None,
    split_file: SplitFile = None,
    steps: StepsOption = None,
    noise: NoiseOption = NoiseKind.gaussian,
    samples: SamplesOption = 1,
    precision: PrecisionOption = PrecisionKind.fp32,
    overrides: Overrides = None,
) -> None:
    """Dice and IoU at original resolution, with intervals."""
    from leafseg.config import load_settings
    from leafseg.data.manifest import load_manifest
    from leafseg.predict import out_is_usable
    from leafseg.runs import SPLIT_FILE, is_run

    folder = out or (Path(model) / f"evaluation-{split.value}" if is_run(Path(model)) else Path("evaluation"))
    out_is_usable(folder)
    stored = Path(model) / SPLIT_FILE
    settings = (
        _data_settings(model, overrides) if is_run(Path(model)) else load_settings(overrides=overrides or ()).data
    )
    run_split = stored if is_run(Path(model)) and stored.is_file() else None
    manifest = load_manifest(data, settings=settings, split_file=split_file, run_split=run_split)
    part = manifest if split is Part.all else manifest.part(split.value)

    from leafseg.evaluation.evaluate import evaluate as run_evaluation
    from leafseg.predict import load_segmenter

    segmenter = load_segmenter(
        model, num_inference_steps=steps, noise=noise.value, num_samples=samples, precision=precision.value
    )
    result = run_evaluation(segmenter, part)
    result.summary.update(model=model, part=split.value, precision=precision.value, noise=noise.value, samples=samples)
    result.summary["steps"] = steps or int(segmenter.pipeline.config["num_inference_steps"])
    result.save(folder)
    for name, figures in result.summary["classes"].items():
        print(f"{name}: {_figure('Dice', figures['dice'])}, {_figure('IoU', figures['iou'])}", end="")
        print(f" ({figures['images']} images, {figures['empty']} with an empty mask)")
        if figures["false_positive_rate"]:
            print(f"  {_figure('false-positive rate on empty masks', figures['false_positive_rate'])}")
    print(f"tables: {folder / 'per_image.csv'}, {folder / 'summary.json'}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A run, a pipeline folder, or a hub id.")],
    inputs: Annotated[list[Path], typer.Argument(help="Images, volumes, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks and report.json.")],
    steps: StepsOption = None,
    noise: NoiseOption = NoiseKind.gaussian,
    samples: SamplesOption = 1,
    precision: PrecisionOption = PrecisionKind.fp32,
    probability: Annotated[bool, typer.Option(help="Also write the probability as 16-bit PNG.")] = False,
    overlay: Annotated[bool, typer.Option(help="Also write the image with the mask's outline.")] = False,
) -> None:
    """Masks for new images, at their own size."""
    from leafseg.predict import load_segmenter, predict_files

    segmenter = load_segmenter(
        model, num_inference_steps=steps, noise=noise.value, num_samples=samples, precision=precision.value
    )
    report = predict_files(segmenter, inputs, out, probability=probability, overlay=overlay, model_name=model)
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
    ] = "packaged:compact-f8",
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
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, the masks and report.html.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0.05, help="Training time.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 1337,
) -> None:
    """Train leaf-tiny on a real MRI for a few minutes, evaluate it, and write a page to look at."""
    from leafseg.demo import run_demo

    page = run_demo(out, minutes=minutes, seed=seed)
    print(f"open {page}")


def _with_training_options(
    overrides: list[str] | None, *, steps: int | None, minutes: float | None, seed: int | None = None
) -> list[str]:
    """The overrides, and the budget and seed that were given as options of their own."""
    if steps is not None and minutes is not None:
        raise ConfigError("--steps and --minutes are both given; give one of them")
    given = {"steps": steps, "minutes": minutes, "seed": seed}
    return [*(overrides or []), *(f"training.{name}={value}" for name, value in given.items() if value is not None)]


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


def main() -> None:
    """Entry point: exit code 0, or 2 with one sentence on standard error for anything the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("leafseg").setLevel(logging.INFO if is_main_process() else logging.WARNING)
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
