"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Part(StrEnum):
    train = "train"
    validation = "validation"
    test = "test"
    all = "all"


Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="A setting by its dotted name, e.g. training.seed=3; repeatable.")
]
DataOption = Annotated[Path, typer.Option(help="Folder with images/ and masks/, or a CSV manifest.")]
SplitFile = Annotated[
    Path | None, typer.Option("--split-file", help="A stored split (CSV) instead of the default one.")
]
Fold = Annotated[
    int | None, typer.Option(min=0, help="Of a split file with folds: the one that validates; the others train.")
]


class ModalityKind(StrEnum):
    generic = "generic"
    xray = "xray"
    ct = "ct"
    mri = "mri"
    ultrasound = "ultrasound"
    dermoscopy = "dermoscopy"
    fundus = "fundus"
    endoscopy = "endoscopy"
    microscopy = "microscopy"


ModalityOption = Annotated[
    ModalityKind | None, typer.Option(help="What the images are: chooses the augmentation; default: the preset's.")
]


class DicomGroup(StrEnum):
    patient = "patient"
    study = "study"
    series = "series"


# What a new split is made of: `data split` and `crossval` take the same.
GroupRegex = Annotated[
    str | None,
    typer.Option(help="Group of an image: what this finds in its path below images/, e.g. '^([^_]+)_'."),
]
GroupColumn = Annotated[str | None, typer.Option(help="Group of an image: this column of --table.")]
GroupDicom = Annotated[DicomGroup | None, typer.Option(help="Group of an image: this id in its DICOM header.")]
TableFile = Annotated[
    Path | None, typer.Option("--table", help="CSV whose rows have a sha256, name or image, and columns of yours.")
]
StratifyLabels = Annotated[
    bool, typer.Option("--stratify-labels", help="Spread evenly: the classes in the mask, and empty masks.")
]
StratifyRegex = Annotated[str | None, typer.Option(help="Spread evenly: what this finds in the image's path.")]
StratifyColumn = Annotated[str | None, typer.Option(help="Spread evenly: this column of --table.")]
TestShare = Annotated[float, typer.Option("--test", min=0, max=0.9, help="Share of images in the test part.")]
KeepTest = Annotated[
    bool, typer.Option("--keep-test", help="The test part stays what it is by default, or in the CSV.")
]
SaltFile = Annotated[
    Path | None, typer.Option(help="Secret behind the group ids, made if missing; default: beside the split.")
]
NoNames = Annotated[bool, typer.Option("--no-names", help="Leave file names out of the split file.")]
