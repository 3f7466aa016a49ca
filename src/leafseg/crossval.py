"""Cross-validation: one model a fold, figures of images that their model never saw, and the folds' ensemble.

Nothing is chosen on a held-out fold: of each run the last checkpoint counts, not the one with the best validation
score, and held-out images are drawn without thresholds of presence, which a run's validation chose on just these; so
that the out-of-fold figures are no better than the models are. The test part, if there is one, is seen by no
fold; the ensemble of all folds is measured on it.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from leafseg.config import DataSettings, Settings, override_settings, parse_settings
from leafseg.data.manifest import Manifest, Sample, load_manifest, save_split
from leafseg.data.splitting import split_hash, write_split
from leafseg.ensemble import load_ensemble, load_single
from leafseg.errors import ConfigError, DataError
from leafseg.evaluation.evaluate import EvaluationRow, VolumeRow, evaluate, summarise
from leafseg.files import read_json, write_json_atomic, write_text_atomic
from leafseg.predict import Segmenter, out_is_usable
from leafseg.runs import ENSEMBLE_FILE, RUN_FILE, SPLIT_FILE, checkpoint_folder, checkpoint_steps, model_sha256

log = logging.getLogger(__name__)

REPORT_FILE = "crossval.json"
_OPTIONS_FILE = "split.json"
_ROWS_FILE = "rows.json"
# Settings that change no number of a finished training.
_FREE: dict[str, Any] = {
    "training": {"steps", "minutes", "save_every", "micro_batch_size", "gradient_checkpointing", "latent_cache_mb"},
    "data": {"workers", "cache_mb"},
    "teacher": {"cache_dir", "cache_mb"},
    "inference": {"presence"},
}


@dataclass(frozen=True)
class Fold:
    """One fold's training, and what its model says of the images that it never saw."""

    number: int
    steps: int
    checkpoint: Path
    images: int
    summary: dict[str, Any]
    rows: tuple[EvaluationRow, ...]
    volumes: tuple[VolumeRow, ...]


@dataclass(frozen=True)
class CrossvalResult:
    """What came out; the summaries are those of :func:`leafseg.evaluation.evaluate.summarise`.

    Attributes:
        folds: those that are done.
        total: how many there are.
        out_of_fold: of all images that a fold held out, each by the model that never saw it; None if interrupted.
        test: of the ensemble on the test part; None if interrupted, or without a test part.
    """

    folds: tuple[Fold, ...]
    total: int
    out_of_fold: dict[str, Any] | None = None
    test: dict[str, Any] | None = None


def store_new_split(data: Path, out: Path, *, settings: DataSettings, **options: Any) -> list[str]:
    """Make the split of a cross-validation, or find that it was made before with the same options.

    Args:
        data, settings: as ``load_manifest`` takes them.
        out: the cross-validation's folder.
        options: of :func:`leafseg.data.splitting.write_split`.

    Returns:
        Lines for the user.

    Raises:
        ConfigError: if ``out`` holds a split of other options.
        DataError: as ``write_split``.
    """
    stored, record = out / SPLIT_FILE, out / _OPTIONS_FILE
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    if not stored.is_file():
        write_json_atomic(record, plain)  # first: a split without its options could not be continued
        return write_split(load_manifest(data, settings=settings), stored, **options)
    if not record.is_file():
        raise ConfigError(f"{stored}: the cross-validation began with --split-file; give it again")
    before = read_json(record)
    changed = [
        f"{name}: {before.get(name)} then, {plain[name]} now" for name in plain if before.get(name) != plain[name]
    ]
    if changed:
        raise ConfigError(
            f"{stored}: made with other options ({', '.join(changed)}); give the same, or choose another --out"
        )
    return [f"split: {stored}"]


def run_crossval(
    settings: Settings,
    data: Path,
    out: Path,
    *,
    split_file: Path | None = None,
    init_from: str | None = None,
    inference_steps: int | None = None,
    check: bool = True,
) -> CrossvalResult:
    """Train the folds that are missing, evaluate each on what it held out, and their ensemble on the test part.

    Finished folds are recognised and an interrupted one continues, so that the same call goes on where it stopped. A
    budget in minutes is that of the first fold; the steps that it gives hold for all.

    Args:
        settings: everything that each training is made of.
        data: as :func:`leafseg.training.run.run_training` takes it.
        out: folder for the runs ``fold-0`` ..., the split, ``crossval.json``, ``per_image.csv``, ``ensemble.json``.
        split_file: a split with folds; default: ``split.csv`` in ``out``.
        init_from: every fold starts from this model's weights.
        inference_steps: reverse steps to evaluate with; default: the model's own.
        check: look at the data before the first fold, as ``leafseg train`` does.

    Raises:
        ConfigError: if ``out`` holds another cross-validation.
        LeafsegError: in one sentence, for anything else that the user can mend.
    """
    from leafseg.training.run import library_versions, run_training

    out_is_usable(out)
    manifest = _manifest(settings, data, out, split_file)
    numbers = sorted({sample.fold for sample in manifest.samples if sample.fold is not None})
    if settings.teacher.cache_dir is None:  # features do not depend on the fold
        # Not as an override: a folder's name may hold what YAML takes for syntax.
        teacher = settings.teacher.model_copy(update={"cache_dir": str(out / "features")})
        settings = settings.model_copy(update={"teacher": teacher})
    folds: list[Fold] = []
    for number in numbers:
        run, mine = out / f"fold-{number}", _of_fold(manifest, number)
        if not _is_finished(run, settings, mine, init_from):
            log.info("cross-validation: fold %d of %d", len(folds) + 1, len(numbers))
            result = run_training(
                settings,
                data,
                run,
                split_file=out / SPLIT_FILE,
                fold=number,
                check=check and not folds,  # the data are the same in every fold
                resume=True,
                init_from=init_from,
            )
            if result.status != "finished":
                break
        steps = checkpoint_steps(run)[-1]
        checkpoint, held_out = checkpoint_folder(run, steps), mine.part("validation")
        summary, rows, volumes = _measured(
            run / "evaluation-held-out",
            held_out,
            {"models": [model_sha256(str(checkpoint))], "inference_steps": inference_steps, "presence": []},
            partial(_without_thresholds, checkpoint, inference_steps),
        )
        folds.append(Fold(number, steps, checkpoint, len(held_out), summary, rows, volumes))
        if settings.training.steps is None:
            settings = override_settings(settings, [f"training.steps={folds[0].steps}"])
    if len(folds) < len(numbers):
        return CrossvalResult(tuple(folds), len(numbers))

    write_json_atomic(out / ENSEMBLE_FILE, {"models": [str(fold.checkpoint.relative_to(out)) for fold in folds]})
    pooled_rows, pooled_volumes = _pooled(folds)
    out_of_fold = {**summarise(pooled_rows, volumes=pooled_volumes), "split_sha256": manifest.split_sha256}
    test = None
    tested: tuple[EvaluationRow, ...] = ()
    part = manifest.part("test")
    if len(part):
        test, tested, _ = _measured(
            out / "evaluation-test",
            part,
            {
                "models": [model_sha256(str(fold.checkpoint)) for fold in folds],
                "inference_steps": inference_steps,
            },
            partial(load_ensemble, out, num_inference_steps=inference_steps),
        )
    write_text_atomic(out / "per_image.csv", _table([*((str(f.number), f.rows) for f in folds), ("ensemble", tested)]))
    write_json_atomic(
        out / REPORT_FILE,
        {
            "folds": [
                {
                    "fold": fold.number,
                    "checkpoint": str(fold.checkpoint.relative_to(out)),
                    "steps": fold.steps,
                    "images": fold.images,
                    "figures": fold.summary,
                }
                for fold in folds
            ],
            "out_of_fold": out_of_fold,
            "test": test,
            "split_sha256": split_hash(manifest),
            "inference_steps": inference_steps,
            "init_from": init_from,
            "settings": settings.model_dump(mode="json"),
            "versions": library_versions(),
        },
    )
    return CrossvalResult(tuple(folds), len(numbers), out_of_fold, test)


def _without_thresholds(checkpoint: Path, inference_steps: int | None) -> Segmenter:
    segmenter = load_single(str(checkpoint), num_inference_steps=inference_steps)
    segmenter.presence = ()
    return segmenter


def _manifest(settings: Settings, data: Path, out: Path, split_file: Path | None) -> Manifest:
    """The data with the folds that the first call stored."""
    stored = out / SPLIT_FILE
    given = None
    if split_file is not None and split_file.resolve() != stored.resolve():
        given = load_manifest(data, settings=settings.data, split_file=split_file)
        if not stored.is_file():
            save_split(given, stored)
    if not stored.is_file():
        raise ConfigError(f"{stored}: no split; name one with --split-file, or make one with --folds")
    manifest = load_manifest(data, settings=settings.data, split_file=stored)
    if given is not None and split_hash(given) != split_hash(manifest):
        raise ConfigError(
            f"{stored}: the cross-validation began with another split than {split_file}; give the same, or "
            "choose another --out"
        )
    if all(sample.fold is None for sample in manifest.samples):
        raise DataError(f"{split_file or stored}: holds no folds; make them with `leafseg data split --folds 5`")
    return manifest


def _of_fold(manifest: Manifest, fold: int) -> Manifest:
    """The parts of one fold's training, as ``load_manifest(..., fold=fold)`` gives them."""

    def part(sample: Sample) -> str:
        return sample.part if sample.fold is None else "validation" if sample.fold == fold else "train"

    return replace(manifest, samples=tuple(replace(sample, part=part(sample)) for sample in manifest.samples))


def _is_finished(run: Path, settings: Settings, manifest: Manifest, init_from: str | None) -> bool:
    """Whether this very training came to its end; of another one, run_training says what differs."""
    steps = checkpoint_steps(run)
    if not steps or not (run / RUN_FILE).is_file():
        return False
    stored = read_json(run / RUN_FILE)
    try:
        wanted = settings.training.steps or int(stored["total_steps"])
        record = stored["record"]
        trained = parse_settings(record["settings"], source=str(run))
        start = (record["split_sha256"], record["init_from"])
    except (KeyError, TypeError, ValueError, ConfigError):
        return False
    same = trained.model_dump(exclude=_FREE) == settings.model_dump(exclude=_FREE)
    return same and start == (manifest.split_sha256, init_from) and steps[-1] == wanted


def _measured(
    folder: Path, part: Manifest, of: dict[str, Any], load: Callable[[], Segmenter]
) -> tuple[dict[str, Any], tuple[EvaluationRow, ...], tuple[VolumeRow, ...]]:
    """Summary and rows of a part, measured now, or before if ``of`` (what decides them) is the same."""
    path = folder / _ROWS_FILE
    of = {**of, "split_sha256": part.split_sha256}
    stored = read_json(path) if path.is_file() else {}
    if stored.get("of") != of:
        evaluation = evaluate(load(), part)
        evaluation.save(folder)
        stored = {
            "of": of,
            "summary": evaluation.summary,
            "rows": [row.as_dict() for row in evaluation.rows],
            "volumes": [asdict(row) for row in evaluation.volumes],
        }
        write_json_atomic(path, stored)
    rows = tuple(EvaluationRow(**row) for row in stored["rows"])
    return stored["summary"], rows, tuple(VolumeRow(**row) for row in stored["volumes"])


def _pooled(folds: Sequence[Fold]) -> tuple[list[EvaluationRow], list[VolumeRow]]:
    """All folds' rows; without distances if those of one fold are in mm and those of another in pixels."""
    rows = [row for fold in folds for row in fold.rows]
    volumes = [row for fold in folds for row in fold.volumes]
    if len({row.unit for row in rows}) > 1:
        log.warning("distances are in mm in some folds and in pixels in others: none are given over all folds")
        rows = [replace(row, hd95=None, assd=None, nsd=None, unit="") for row in rows]
        volumes = [replace(row, hd95=None, assd=None, nsd=None) for row in volumes]
    return rows, volumes


def _table(parts: Sequence[tuple[str, Sequence[EvaluationRow]]]) -> str:
    """Rows of all folds, then of the ensemble on the test part; the first column says which."""
    text = io.StringIO()
    names = [column.name for column in fields(EvaluationRow)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("fold", *names))
    for fold, rows in parts:
        for row in rows:
            cells = (getattr(row, name) for name in names)
            writer.writerow((fold, *("" if v is None else f"{v:.6f}" if isinstance(v, float) else v for v in cells)))
    return text.getvalue()
