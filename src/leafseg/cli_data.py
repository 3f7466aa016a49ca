"""`leafseg data`: what is done to data before any model sees it. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leafseg.cli_options import (
    GroupColumn,
    GroupDicom,
    GroupRegex,
    KeepTest,
    NoNames,
    Overrides,
    SaltFile,
    SplitFile,
    StratifyColumn,
    StratifyLabels,
    StratifyRegex,
    TableFile,
    TestShare,
)
from leafseg.errors import ConfigError

if TYPE_CHECKING:
    from leafseg.data.validate import DataCheck

data_app = typer.Typer(
    name="data", help="Data before any model sees them: known sets, new splits.", no_args_is_help=True
)


class Protocol(StrEnum):
    clean = "clean"
    paper = "paper"


class Target(StrEnum):
    cup = "cup"
    disc = "disc"


@data_app.command("catalog")
def data_catalog(
    name: Annotated[str | None, typer.Argument(help="One set; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """The known data sets: what they show, how many images, terms, groups, protocols, and what to download."""
    from dataclasses import asdict

    from leafseg.data.catalog import KNOWN_SETS, known_set

    sets = [known_set(name)] if name is not None else KNOWN_SETS
    if as_json:
        print(json.dumps({known.name: asdict(known) for known in sets}, indent=2))
        return
    for known in sets:
        folders = ", ".join(f"{folder} {count}" for folder, count in known.images.items() if folder)
        print(f"{known.name}: {known.title}")
        print(f"  shows      {known.shows}")
        print(f"  images     {known.total}{f' ({folders})' if folders else ''}")
        print(f"  terms      {known.terms}")
        print(f"  groups     {known.groups}")
        print(f"  protocols  {', '.join(known.protocols)}{f' ({known.paper.remark})' if known.paper else ''}")
        if known.targets:
            print(f"  targets    {', '.join(known.targets)}")
        print(f"  download   {known.archives}")
        print(f"  unpacked   {known.expects}")


@data_app.command("prepare")
def data_prepare(
    source: Annotated[Path, typer.Argument(help="The unpacked data set, or a folder one level above or below it.")],
    out: Annotated[Path, typer.Option(help="New folder for manifest.csv, catalog.json, and masks that change.")],
    dataset: Annotated[
        str | None, typer.Option(help="See `leafseg data catalog`; default: recognised by its folders.")
    ] = None,
    protocol: Annotated[Protocol, typer.Option(help="clean: by group; paper: as published.")] = Protocol.clean,
    target: Annotated[Target | None, typer.Option(help="refuge2: what the mask is; default: cup.")] = None,
    seed: Annotated[int, typer.Option(help="Of the paper protocol's random parts.")] = 1337,
    validation_share: Annotated[
        float, typer.Option(help="With --protocol paper: share of the training images held out for validation.")
    ] = 0.0,
) -> None:
    """Recognise a data set as it is downloaded, pair its files, and write the split."""
    from leafseg.data.catalog import prepare

    done = prepare(
        source,
        out,
        name=dataset,
        protocol=protocol.value,
        target=target.value if target else None,
        seed=seed,
        validation_share=validation_share,
    )
    counts = ", ".join(f"{part} {count}" for part, count in done.counts.items() if count or part != "unused")
    print(f"{done.known.title} in {done.source}, protocol {done.protocol}: {counts}")
    for warning in done.warnings:
        print(f"warning: {warning}")
    for note in done.notes:
        print(f"note: {note}")
    print(f"manifest: {done.manifest}")
    print(f"train with --data {out}")


@data_app.command("check")
def data_check(
    data: Annotated[Path, typer.Argument(help="Folder with images/ and masks/, or a CSV manifest.")],
    split_file: SplitFile = None,
    fold: Annotated[int | None, typer.Option(min=0, help="Of a split file with folds: the one that validates.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for data_check.html and data_check.json.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Where all cases go, as JSON.")] = None,
    no_masks: Annotated[bool, typer.Option("--no-masks", help="The images need no masks: to predict on them.")] = False,
    preset: Annotated[str, typer.Option(help="Whose data settings hold; see `leafseg presets`.")] = "leaf-tiny",
    config: Annotated[Path | None, typer.Option(help="YAML file of settings on top of the preset.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Files opened at a time.")] = 4,
    overrides: Overrides = None,
) -> None:
    """Find what is wrong with a data set, all of it at once; exit code 2 if a training should not start."""
    from leafseg.config import load_settings
    from leafseg.data.validate import check_data
    from leafseg.files import write_json_atomic
    from leafseg.progress import progress_bar

    settings = load_settings(preset, file=config, overrides=overrides or ())
    with progress_bar("checking", total=1) as bar:
        done = check_data(
            data,
            settings=settings.data,
            split_file=split_file,
            fold=fold,
            require_masks=not no_masks,
            needed=() if no_masks else settings.training.needed_parts,
            threads=workers,
            progress=bar.reach,
        )
    _print_check(done)
    for target in (as_json, out / "data_check.json" if out else None):
        if target is not None:
            write_json_atomic(target, done.as_json())
    if out is not None:
        from leafseg.data.check_page import write_check_page

        write_check_page(out / "data_check.html", done)
        print(f"page: {out / 'data_check.html'}")
    if not done.ok:
        raise typer.Exit(2)


def _print_check(check: DataCheck) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False)
    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    if check.findings:
        table = Table("", "finding", "what and what to do", box=None, pad_edge=False)
        for finding in check.findings:
            severity = Text(finding.severity, style=colours[finding.severity])
            table.add_row(severity, finding.id, Text(finding.message, overflow="fold"))
        console.print(table)
    if check.samples:
        table = Table("part", "images", box=None, pad_edge=False)
        for figures in check.foreground_classes:
            table.add_column(f"with {figures.name}")
        for part, count in check.parts.items():
            table.add_row(part, str(count), *(str(figures.images[part]) for figures in check.foreground_classes))
        console.print(table)
    console.print(Text(check.summary()))
    console.print(Text("a training may go on" if check.ok else "a training would stop or learn something wrong"))


@data_app.command("split")
def data_split(
    data: Annotated[Path, typer.Argument(help="Folder with images/ and masks/, or a CSV manifest.")],
    out: Annotated[Path, typer.Option(help="New CSV file, to be given as --split-file.")],
    group_regex: GroupRegex = None,
    group_column: GroupColumn = None,
    group_dicom: GroupDicom = None,
    stratify_labels: StratifyLabels = False,
    stratify_regex: StratifyRegex = None,
    stratify_column: StratifyColumn = None,
    table: TableFile = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Cut what is not test into so many folds, for train --fold and crossval.")
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(min=0, max=0.9, help="Share of images that validate; default: 0.1, none with --folds."),
    ] = None,
    test: TestShare = 0.1,
    keep_test: KeepTest = False,
    seed: Annotated[int, typer.Option(help="Of the shuffling.")] = 1337,
    salt_file: SaltFile = None,
    no_names: NoNames = False,
    overrides: Overrides = None,
) -> None:
    """Write a split: by file or group, stratified, in shares or folds; patient ids are hashed."""
    from leafseg.config import load_settings
    from leafseg.data.manifest import load_manifest
    from leafseg.data.splitting import write_split

    if folds is not None and validation is not None:
        raise ConfigError("--folds and --validation are both given; with folds, each one validates in turn")
    manifest = load_manifest(data, settings=load_settings(overrides=overrides or ()).data, require_masks=False)
    lines = write_split(
        manifest,
        out,
        group_regex=group_regex,
        group_column=group_column,
        group_dicom=group_dicom.value if group_dicom else None,
        stratify_labels=stratify_labels,
        stratify_regex=stratify_regex,
        stratify_column=stratify_column,
        table=table,
        validation=0.1 if validation is None else validation,
        test=test,
        folds=folds,
        keep_test=keep_test,
        seed=seed,
        salt_file=salt_file,
        names=not no_names,
    )
    print("\n".join(lines))
    print(f"train with --split-file {out}" + (" --fold 0, or leafseg crossval" if folds is not None else ""))
