"""A model's large parts distilled into light ones, which stand beside them in a new model folder if they agree."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from leafseg.config import CompactSettings, DataSettings, PartChoice
from leafseg.data.manifest import Manifest, load_manifest
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.evaluation.agreement import Agreement, measure_agreement
from leafseg.files import new_folder, read_json, write_json_atomic
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.model_folder import add_compact_parts
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter, out_is_usable
from leafseg.runs import (
    PIPELINE_FOLDER,
    is_ensemble,
    is_main_process,
    is_run,
    model_sha256,
)
from leafseg.training.compact_tasks import (
    DecoderDistillationTask,
    DecoderTuningTask,
    EncoderDistillationTask,
    require_parts,
)
from leafseg.training.run import library_versions
from leafseg.training.teacher_pairs import PAIRS_FILE
from leafseg.training.trainer import TrainingResult
from leafseg.training.trainer import train as run_loop

log = logging.getLogger(__name__)

Part = Literal["decoder", "encoder"]
PARTS: tuple[Part, ...] = ("decoder", "encoder")
AGREEMENT_FILE = "agreement.json"
DEFAULT_BAR = 0.995


@dataclass(frozen=True)
class CompactResult:
    """What a distillation came to.

    Attributes:
        model: the folder with full and compact parts; None if the work was interrupted.
        agreement: with the full model, by which parts were compact: ``decoder``, ``encoder``, ``decoder+encoder``.
        trained: how each part's training ended; empty if it was finished before.
    """

    model: Path | None
    agreement: dict[str, dict[str, Any]]
    trained: dict[str, TrainingResult]


def budget_shares(parts: Sequence[Part], *, tuned: bool) -> dict[str, float]:
    """What share of a budget in minutes each training of ``parts`` gets: the decoder's two halve what the part gets."""
    shares: dict[str, float] = {}
    for part in parts:
        trainings = ("decoder", "tuning") if part == "decoder" and tuned else (part,)
        shares |= {training: 1 / len(parts) / len(trainings) for training in trainings}
    return shares


def run_compact(
    model: str,
    images: Path,
    out: Path,
    *,
    settings: CompactSettings,
    data: Path | None = None,
    parts: Sequence[Part] = PARTS,
    bar: float = DEFAULT_BAR,
    resume: bool = False,
    stop_after: int | None = None,
    data_settings: DataSettings | None = None,
    run_split: Path | None = None,
) -> CompactResult:
    """Distil, measure on held-out images, and write ``OUT/pipeline`` if the agreement reaches the bar.

    Images keep the parts that the model's run stored, or get their default ones: the compact parts learn from the
    train part, the validation part chooses their checkpoints, and agreement is measured on the test part alone. The
    model itself is only read.

    Args:
        model: a run, a pipeline folder, or a hub id.
        images: a folder of images (``images/`` below a data folder), or a CSV manifest; masks are not looked at.
        out: ``decoder/``, ``tuning/`` and ``encoder/`` hold the trainings, ``pipeline/`` the new model,
            ``agreement.json`` how far it agrees.
        settings: how.
        data: labelled data whose train part's masks the decoder learns from, besides synthetic ones.
        parts: what is distilled, in this order whatever the given one.
        bar: mean Dice with the full model's masks that is asked for, in 0..1.
        resume: continue what has begun.
        stop_after: save and stop each training after this step.
        data_settings: what the values of the masks in ``data`` mean; default: what they say themselves.
        run_split: the split that the model's run stored.

    Raises:
        CheckpointError: if the model cannot be loaded or lacks a part that is needed, or the agreement is below the
            bar; then no model is written.
        ConfigError: for settings that do not fit, or a folder that holds another distillation.
        DataError: for images or masks that cannot be read, or too few of them.
    """
    if not 0 < bar <= 1:
        raise ConfigError(f"--bar is {bar}; the Dice that is asked for lies above 0, up to 1")
    done = out / PIPELINE_FOLDER
    if not resume and (done.exists() or any(is_run(out / part) for part in PARTS)):
        raise ConfigError(
            f"{out}: already holds a distillation; continue it with --resume auto or choose another --out"
        )
    if is_ensemble(Path(model)):
        raise CheckpointError(f"{model}: is an ensemble; distil its models one by one")
    if is_run(out):
        raise ConfigError(f"{out}: is a training's folder; choose another --out, for example {out / 'compact'}")
    if is_main_process():
        out_is_usable(out)
    pipeline = LeafPipeline.from_pretrained(model)
    source = Path(pipeline.config["_name_or_path"])
    fingerprint = model_sha256(str(source))
    if done.is_dir():
        stored = read_json(out / AGREEMENT_FILE)
        if stored.get("model_sha256") != fingerprint:
            raise ConfigError(f"{out}: was distilled from another model than {model}; choose another --out")
        lowest = min(figures["dice"]["mean"] for figures in stored["agreement"].values())
        if lowest < bar:
            raise CheckpointError(
                f"{done}: was written with --bar {stored['bar']:g} and agrees to a mean Dice of {lowest:.4f}, below "
                f"--bar {bar:g}; distil longer into another --out"
            )
        _forget_pairs(out)  # a kill may have come between
        return CompactResult(done, dict(stored["agreement"]), {})
    reading = (data_settings or DataSettings()).model_copy(update={"preprocessing": pipeline.preprocessor.settings})
    # Masks that may lie beside the images are nobody's business here; a manifest is, for the groups that it names.
    plain = (images / "images").is_dir() and not (images / "manifest.csv").is_file()
    folder = images / "images" if plain else images
    if "decoder" in parts and not pipeline.mask_code.grey:
        raise ConfigError(
            f"{model}: its mask code {pipeline.mask_code.name!r} reads colours, and a compact decoder draws in grey; "
            "distil the image encoder alone with --parts encoder"
        )
    listed = load_manifest(folder, settings=reading, run_split=run_split, require_masks=False)
    held_out = listed.part("test")
    if not len(held_out):
        raise DataError(
            f"{images}: no image falls into the test part ({len(listed)} in all), and agreement is measured on images "
            "that nothing was trained on; give more images"
        )
    # Of an epsilon, the mask latent at the last timestep would be noise: nothing to tune with.
    tuned = "decoder" in parts and settings.tuning.enabled and pipeline.scheduler.config["prediction_type"] != "epsilon"
    if tuned or "encoder" in parts:
        require_parts(listed)  # before the decoder is trained, not after
    trained: dict[str, TrainingResult] = {}

    def finished(name: str, task: Any, given: Any, **more: Any) -> bool:
        """Train, or go on; whether it came to its end. The trained part is then the pipeline's."""
        record = {"model_sha256": fingerprint, "versions": library_versions(), **more}
        record["settings"] = given.model_dump(mode="json")
        trained[name] = run_loop(task, given.training, out / name, record=record, resume=resume, stop_after=stop_after)
        if trained[name].status != "finished":
            return False
        kind = CompactImageEncoder if name == "encoder" else CompactMaskDecoder
        part = _frozen(kind, trained[name].checkpoint / task.pipeline_folder)
        pipeline.register_modules(**{task.pipeline_folder: part})
        return True

    if "decoder" in parts:
        # --- the decoder, from masks
        masks = None if data is None else load_manifest(data, settings=reading, run_split=run_split)
        decoding = DecoderDistillationTask(pipeline.vae, pipeline.preprocessor, settings.decoder, masks=masks)
        of_masks = masks.split_sha256 if masks is not None else None
        if not finished("decoder", decoding, settings.decoder, masks_sha256=of_masks):
            return CompactResult(None, {}, trained)
        del decoding  # and up to a gigabyte of what it learned from
    if tuned:
        # --- the decoder again, from what the model predicts on images
        tuning = DecoderTuningTask(pipeline, listed, settings.tuning)
        of_images = {"images_sha256": listed.split_sha256, "decoder": trained["decoder"].checkpoint.name}
        if not finished("tuning", tuning, settings.tuning, **of_images):
            return CompactResult(None, {}, trained)
        del tuning
    if "encoder" in parts:
        # --- the encoder, from images
        encoding = EncoderDistillationTask(pipeline, listed, settings.encoder)
        drawn_by = "compact" if pipeline.compact_decoder is not None else "full"
        of_images = {"images_sha256": listed.split_sha256, "decoder": drawn_by}
        if not finished("encoder", encoding, settings.encoder, **of_images):
            return CompactResult(None, {}, trained)

    # --- what was distilled against what it stands in for
    agreement = _measure(pipeline, held_out, settings.held_out)
    measured = {name: figures.as_dict() for name, figures in agreement.items()}
    if not is_main_process():
        return CompactResult(done, measured, trained)
    write_json_atomic(
        out / AGREEMENT_FILE,
        {
            "model_sha256": fingerprint,
            "bar": bar,
            "images_sha256": listed.split_sha256,
            "part": "test",
            "agreement": measured,
        },
    )
    _require(agreement, bar, model, out)
    with new_folder(done) as partial:
        add_compact_parts(source, pipeline, partial)
        shutil.copyfile(out / AGREEMENT_FILE, partial / AGREEMENT_FILE)
    _forget_pairs(out)
    return CompactResult(done, measured, trained)


def _forget_pairs(out: Path) -> None:
    """Once the model is written, nothing is trained in ``out`` any more."""
    for path in out.glob(f"*/{PAIRS_FILE}"):
        with suppress(OSError):
            path.unlink()


def _frozen(kind: type[CompactMaskDecoder] | type[CompactImageEncoder], folder: Path) -> Any:
    return kind.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)


def _measure(pipeline: LeafPipeline, held_out: Manifest, most: int) -> dict[str, Agreement]:
    """Each compact part by itself, and all of them together, as a user would run them."""

    def segmenter(decoder: PartChoice, encoder: PartChoice) -> PipelineSegmenter:
        return PipelineSegmenter(pipeline, decoder=decoder, encoder=encoder)

    others = {}
    if pipeline.compact_decoder is not None:
        others["decoder"] = segmenter("compact", "full")
    if pipeline.compact_encoder is not None:
        others["encoder"] = segmenter("full", "compact")
    if len(others) == 2:
        others["decoder+encoder"] = segmenter("compact", "compact")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")  # each training moved the parts that it needed
    count = min(most, len(held_out))
    chosen = [held_out.samples[i * len(held_out) // count] for i in range(count)]
    return measure_agreement(segmenter("full", "full"), others, chosen)


def _require(agreement: dict[str, Agreement], bar: float, model: str, out: Path) -> None:
    means: dict[str, float] = {}
    for name, figures in agreement.items():
        if figures.dice is None:
            raise CheckpointError(
                f"{model}: no mask of the {figures.images} held-out images holds anything, and empty masks agree with "
                "anything; nothing is stored: give images that show what the model segments"
            )
        means[name] = float(figures.dice["mean"])
    name = min(means, key=means.__getitem__)
    worst = agreement[name].worst
    if means[name] < bar and worst is not None:
        each = ", ".join(f"{part} {mean:.4f}" for part, mean in means.items())
        raise CheckpointError(
            f"{out}: with compact {name}, masks agree with the full model's to a mean Dice of {means[name]:.4f} (worst "
            f"image {worst[0]}: {worst[1]:.4f}; {each}), below --bar {bar:g}; no model is written and {model} is as it "
            "was: distil longer (--resume auto with more --steps), give more images, or accept it with --resume auto "
            f"--bar {math.floor(means[name] * 1000) / 1000:g}"
        )
