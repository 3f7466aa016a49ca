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
