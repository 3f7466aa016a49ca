"""One LEAF training from settings and data: what ``leafseg train`` and the demo run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from leafseg.config import Settings
from leafseg.data.manifest import load_manifest, save_split
from leafseg.errors import ConfigError
from leafseg.pipeline import LeafPipeline
from leafseg.predict import out_is_usable
from leafseg.progress import progress_bar
from leafseg.runs import SPLIT_FILE, checkpoint_steps, is_main_process, is_run
from leafseg.training.leaf_task import LeafTask
from leafseg.training.trainer import TrainingResult
from leafseg.training.trainer import train as run_loop


def run_training(
    settings: Settings,
    data: Path,
    out: Path,
    *,
    split_file: Path | None = None,
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
    with progress_bar("reading data", total=1) as bar:
        manifest = load_manifest(data, settings=settings.data, split_file=split_file, run_split=run_split)
        bar.advance()

    source = init_from
    if init_from is not None and checkpoint_steps(out):
        # Already begun: the trained weights come from the checkpoint, and the frozen autoencoder that they were trained
        # against from the pipeline beside them.
        source = str(out)
    # The pipeline has no name here: its weights are copied, and would stay in memory for the whole training.
    task = LeafTask(settings, manifest, init_from=LeafPipeline.from_pretrained(source) if source is not None else None)
    if is_main_process():
        save_split(manifest, out / SPLIT_FILE)
    record = {
        **task.record(),
        "init_from": init_from,
        "split_sha256": manifest.split_sha256,
        "samples": {name: len(manifest.part(name)) for name in ("train", "validation", "test")},
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


def library_versions() -> dict[str, str]:
    """Versions of what decides a training's numbers."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "numpy")}
