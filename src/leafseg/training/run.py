"""One LEAF training from settings and data: what ``leafseg train`` and the demo run."""

from __future__ import annotations

import logging
import shlex
from importlib.metadata import version
from pathlib import Path

from leafseg.config import Settings
from leafseg.data.manifest import Manifest, load_manifest, save_split
from leafseg.data.validate import DataCheck, check_data
from leafseg.errors import ConfigError, DataError
from leafseg.files import write_json_atomic
from leafseg.pipeline import LeafPipeline
from leafseg.predict import out_is_usable
from leafseg.progress import progress_bar
from leafseg.runs import SPLIT_FILE, checkpoint_steps, is_main_process, is_run
from leafseg.training.leaf_task import LeafTask
from leafseg.training.segmentation_task import SegmentationTask
from leafseg.training.trainer import TrainingResult
from leafseg.training.trainer import train as run_loop
from leafseg.training.unet_task import UNetTask

log = logging.getLogger(__name__)

CHECK_FILE = "data_check.json"
_SHOWN_ERRORS = 3


def run_training(
    settings: Settings,
    data: Path,
    out: Path,
    *,
    split_file: Path | None = None,
    fold: int | None = None,
    check: bool = False,
    resume: bool = False,
    init_from: str | None = None,
    stop_after: int | None = None,
) -> TrainingResult:
    """Manifest, split, task, loop.

    Args:
        settings: everything that the training is made of.
        data: folder with ``images/`` and ``masks/``, or a CSV manifest.
        out: the run's folder.
        split_file: a stored split; default: the run's own when resuming, else the data's.
        fold: of a split file with folds, the one that validates.
        check: look for more than what makes the data unreadable, and store it as ``data_check.json``; errors stop, and
            warnings are logged. A run that has begun is not checked again.
        resume: continue the run if it has begun.
        init_from: start from this model's weights (fine-tuning).
        stop_after: save and stop after this step.

    Raises:
        LeafsegError: in one sentence, for anything that the user can mend.
    """
    if is_run(out) and not resume:
        raise ConfigError(f"{out}: already holds a training; continue it with --resume auto or choose another --out")
    stored = out / SPLIT_FILE
    run_split = stored if is_run(out) and stored.is_file() else None  # files added since stay out
    if is_main_process():
        out_is_usable(out)
    done = None
    if check and not is_run(out):
        done, manifest = _checked(settings, data, split_file=split_file, fold=fold)
    else:
        with progress_bar("reading data", total=1) as bar:
            manifest = load_manifest(
                data, settings=settings.data, split_file=split_file, fold=fold, run_split=run_split, progress=bar.reach
            )

    source = init_from
    if init_from is not None and checkpoint_steps(out):
        # Already begun: the trained weights come from the checkpoint, and the frozen autoencoder that they were trained
        # against from the pipeline beside them.
        source = str(out)
    task = make_task(settings, manifest, init_from=source)
    if is_main_process():
        save_split(manifest, out / SPLIT_FILE)
        if done is not None:
            write_json_atomic(out / CHECK_FILE, done.as_json())
    record = {
        **task.record(),
        "init_from": init_from,
        "split_sha256": manifest.split_sha256,
        "fold": fold,
        "samples": {
            "train": len(task.dataset),
            **{name: len(manifest.part(name)) for name in ("validation", "test")},
        },
        "versions": library_versions(),
    }
    return run_loop(
        task,
        settings.training,
        out,
        record=record,
        workers=settings.data.workers,
        resume=resume,
        stop_after=stop_after,
    )


def make_task(
    settings: Settings, manifest: Manifest, *, init_from: str | None = None, fill_cache: bool = True
) -> SegmentationTask:
    """The task that ``model.kind`` names.

    Args:
        init_from: a model whose weights are the start.
        fill_cache: see :class:`LeafTask`.

    Raises:
        LeafsegError: if it cannot be built.
    """
    if settings.model.kind == "unet":
        if init_from is not None:
            raise ConfigError("--init-from: the U-Net baseline starts from random weights; leave it out")
        return UNetTask(settings, manifest)
    # The pipeline has no name here: its weights are copied, and would stay in memory for the whole training.
    return LeafTask(
        settings,
        manifest,
        init_from=LeafPipeline.from_pretrained(init_from) if init_from is not None else None,
        fill_cache=fill_cache,
    )


def _checked(
    settings: Settings, data: Path, *, split_file: Path | None, fold: int | None
) -> tuple[DataCheck, Manifest]:
    with progress_bar("checking data", total=1) as bar:
        done = check_data(
            data,
            settings=settings.data,
            split_file=split_file,
            fold=fold,
            needed=settings.training.needed_parts,
            progress=bar.reach,
        )
    if done.manifest is None:
        errors = [finding.message for finding in done.findings if finding.severity == "error"]
        said = "; ".join(errors[:_SHOWN_ERRORS])
        more = f"; and {len(errors) - _SHOWN_ERRORS} more kinds of error" if len(errors) > _SHOWN_ERRORS else ""
        where = "" if said.startswith(str(data)) else f"{data}: "
        # Where there is nothing to look at, there is nothing more to show.
        hint = f" (`leafseg data check {shlex.quote(str(data))} --out DIR` shows every case)" if data.exists() else ""
        raise DataError(f"{where}{said}{more}{hint}")
    for finding in done.findings:
        if finding.severity == "warning":
            log.warning("warning: %s: %s", finding.id, finding.message)
    log.info("%s", done.summary())
    return done, done.manifest


def library_versions() -> dict[str, str]:
    """Versions of what decides a training's numbers."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "numpy")}


def hardware() -> str:
    """What kind of machine this is; not which one."""
    import platform

    import torch

    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads{card}"
