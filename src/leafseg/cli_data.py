"""`leafseg data`: what is done to data before any model sees it. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(name="data", help="Known data sets: list them, prepare a downloaded one.", no_args_is_help=True)


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
