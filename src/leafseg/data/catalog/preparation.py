"""From an unpacked data set to a manifest: masks made binary where they are not, and the parts decided."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.data.catalog.layouts import CATALOG_FILE, Found, Pair, catalog_record, recognise
from leafseg.data.catalog.protocols import Assignment, Item, check_paper, clean_parts, paper_parts, part_counts
from leafseg.data.catalog.sets import KnownSet, known_set
from leafseg.data.images import read_image, read_mask, write_png
from leafseg.errors import DataError
from leafseg.files import write_json_atomic, write_text_atomic
from leafseg.progress import progress_bar

MANIFEST_FILE = "manifest.csv"

# REFUGE2's crop: the square over disc and cup, with half of its side on each side again. The disc then fills half of
# the crop's width: enough of the rim and the vessels' bends to judge the cup's edge by, room for a disc detector's
# error, and a cup of a quarter of the width and more at the network's input size.
DISC_MARGIN = 0.5

_FORMAT_VERSION = 1
_THREADS = 4
_SHOWN = 5  # names listed of each kind of problem
_JPEG = (".jpg", ".jpeg")
_JPEG_NOISE = 16  # JPEG keeps values apart only roughly
_SEED = 1337


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` wrote.

    Attributes:
        counts: images of each part, ``unused`` included.
        warnings: what is wrong or missing; whole sentences without a full stop.
        notes: what follows from the protocol for training and for the reader of its numbers.
    """

    known: KnownSet
    protocol: str
    source: Path
    manifest: Path
    counts: dict[str, int]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def prepare(
    source: Path,
    out: Path,
    *,
    name: str | None = None,
    protocol: str = "clean",
    target: str | None = None,
    seed: int = _SEED,
    validation_share: float = 0.0,
) -> Prepared:
    """Write ``out/manifest.csv`` and ``out/catalog.json`` for a known data set.

    Images and masks that need no change stay where they are (paths are relative to ``out``); others are written as PNG
    below ``out``. The manifest is written last, so that a folder with one is complete; the same call gives the same
    bytes.

    Args:
        source: the unpacked set, or a folder one level above or below it.
        out: a new folder, or one that this function wrote before.
        name: the set; default: recognised by its folders.
        protocol: ``clean`` or ``paper``.
        target: what the mask means, for a set with a choice.
        seed: of the paper protocol's random parts; ``clean`` draws nothing.
        validation_share: ``paper`` only: share of the training images to hold out for choosing a checkpoint.

    Raises:
        DataError: for a set that is missing, incomplete or damaged, or options that it does not have.
    """
    source, out = Path(source), Path(out)
    if name is not None:
        known_set(name)
    found = recognise(source, name=name)
    known = found.known
    _check_options(known, protocol, target, validation_share)
    if protocol == "paper":
        check_paper(known, found.counts, validation_share=validation_share)
    target = (target or known.targets[0]) if known.targets else None
    _check_out(out, source, found.root)
    staged = out / f".tmp-{secrets.token_hex(6)}"
    try:
        _clear_leftovers(out)
        looks, warnings = _look_at_all(found, target, staged)
        items = [
            Item(look.pair.name, look.pair.group, look.pair.folder, look.sha256, look.pixels_sha256) for look in looks
        ]
        if protocol == "clean":
            assigned = clean_parts(items)
        else:
            assigned = paper_parts(items, known, seed=seed, validation_share=validation_share)
        warnings = [*_count_warnings(found, protocol), *warnings, *assigned.warnings]
        text = _manifest_text(looks, assigned, out, staged)
        record = {
            "format_version": _FORMAT_VERSION,
            "name": known.name,
            "title": known.title,
            "protocol": protocol,
            "target": target,
            "seed": seed if protocol == "paper" and known.paper and known.paper.sizes else None,
            "validation_share": validation_share,
            "source": Path(os.path.relpath(_real(found.root), _real(out))).as_posix(),
            "layout": found.layout,
            "images": {"expected": known.total, "found": sum(found.counts.values()), "prepared": len(looks)},
            "parts": part_counts(assigned.parts),
            "groups": len({group for group in assigned.groups if group is not None}),
            "manifest_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "terms": known.terms,
            "remark": known.paper.remark if protocol == "paper" and known.paper else None,
            "warnings": warnings,
        }
        _put_in_place(out, staged, text, record)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    counts = part_counts(assigned.parts)
    return Prepared(
        known, protocol, found.root, out / MANIFEST_FILE, counts, tuple(warnings), _notes(known, protocol, counts)
    )


def _notes(known: KnownSet, protocol: str, counts: dict[str, int]) -> tuple[str, ...]:
    notes = []
    if protocol == "paper" and known.paper is not None:
        notes.append(known.paper.remark)
        notes.append(
            "the paper's code chose its checkpoint on the test part, which makes its figures optimistic (the setting "
            "training.selection_part=test does the same)"
        )
        if not counts["validation"]:
            notes.append(
                "there is no validation part: train with --set training.validations=0, which keeps the last "
                "checkpoint, or prepare again with --validation-share 0.1"
            )
    if known.targets:
        notes.append(
            "test images too are cropped by their true disc: on new photographs a disc detector has to come first"
        )
    return tuple(notes)


def _check_options(known: KnownSet, protocol: str, target: str | None, validation_share: float) -> None:
    if protocol not in ("clean", "paper"):
        raise DataError(f"protocol is {protocol!r}; protocols are clean and paper")
    if target is not None and target not in known.targets:
        choice = f"targets are {', '.join(known.targets)}" if known.targets else "the set has one target only"
        raise DataError(f"{known.name}: target is {target!r}; {choice}, leave --target out for the default")
    if validation_share and protocol == "clean":
        raise DataError(
            "validation share is given with protocol clean, which always holds out validation images; leave it out"
        )
    if not 0 <= validation_share < 1:
        raise DataError(f"validation share is {validation_share}; it is at least 0 and below 1")


def _check_out(out: Path, *sources: Path) -> None:
    """A folder with data that this module did not write is never touched."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another folder for the prepared set")
    if _real(out) in map(_real, sources):
        raise DataError(f"{out}: is the download itself; choose a folder of its own for the prepared set")
    if catalog_record(out) is not None:
        return
    foreign = [name for name in (MANIFEST_FILE, CATALOG_FILE, "images", "masks") if (out / name).exists()]
    if foreign:
        raise DataError(
            f"{out}: holds {', '.join(foreign)} that `leafseg data prepare` did not write; choose another --out"
        )


def _clear_leftovers(out: Path) -> None:
    for folder in out.glob(".tmp-" + 12 * "[0-9a-f]"):  # the names that `prepare` gives, and no others
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Look:
    """One pair after its files were opened; ``image`` and ``mask`` are where the manifest will find them.

    ``cut`` names the lossless mask files with grey levels that became background, each with their share of the file's
    non-zero pixels.
    """

    pair: Pair
    image: Path
    mask: Path
    sha256: str
    pixels_sha256: str
    cut: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class _Problem:
    """Why a pair cannot be used: ``fatal`` for a damaged file, else the pair is left out with a warning."""

    text: str
    fatal: bool


def _look_at_all(found: Found, target: str | None, staged: Path) -> tuple[list[_Look], list[str]]:
    """Open every pair, in threads (decoders release the interpreter lock), and write what has to be written."""
    looks: list[_Look] = []
    fatal: list[str] = []
    left_out: list[str] = []
    pool = ThreadPoolExecutor(_THREADS)
    try:
        with progress_bar(f"preparing {found.known.name}", total=len(found.pairs)) as bar:
            for result in pool.map(lambda pair: _look_at(pair, target, staged), found.pairs):
                if isinstance(result, _Look):
                    looks.append(result)
                else:
                    (fatal if result.fatal else left_out).append(result.text)
                bar.advance()
    finally:
        pool.shutdown(cancel_futures=True)
    if fatal:
        more = f" and {len(fatal) - 1} more files are unusable" if len(fatal) > 1 else ""
        raise DataError(f"{fatal[0]}{more}")
    if not looks:
        raise DataError(f"{found.root}: no image of {found.known.title} can be used ({left_out[0]})")
    warnings = [f"images left out: {len(left_out)} ({_listed(left_out, '; ')})"] if left_out else []
    cut = [one for look in looks for one in look.cut]
    if cut:
        share = math.ceil(100 * max(share for _, share in cut))
        warnings.append(
            f"masks with several grey levels, whose darker half became background: {len(cut)} (up to {share}% of a "
            f"mask's non-zero pixels; {_listed([name for name, _ in cut])})"
        )
    return looks, warnings


def _look_at(pair: Pair, target: str | None, staged: Path) -> _Look | _Problem:
    try:
        pixels = read_image(pair.image)
        if target is not None:
            return _cropped(pair, pixels, target, staged)
        inside = np.zeros(pixels.shape[:2], bool)
        cut = []
        for path in pair.masks:
            one, share = _foreground(path)
            if one.shape != inside.shape:
                return _size_problem(path, one, pixels)
            if share:
                cut.append((path.name, share))
            inside |= one
        if len(pair.masks) == 1 and _is_final(pair.masks[0], inside):
            mask = pair.masks[0]
        else:
            mask = staged / "masks" / f"{pair.name}.png"
            write_png(mask, inside.astype(np.uint8) * 255)
        return _Look(pair, pair.image, mask, _file_sha256(pair.image), _pixels_sha256(pixels), tuple(cut))
    except DataError as error:
        return _Problem(str(error), fatal=True)


def _cropped(pair: Pair, pixels: NDArray[Any], target: str, staged: Path) -> _Look | _Problem:
    grey = _grey(pair.masks[0])
    if grey.shape != pixels.shape[:2]:
        return _size_problem(pair.masks[0], grey, pixels)
    cup, disc = refuge_regions(grey, source=pair.masks[0])
    if not disc.any():
        return _Problem(f"{pair.masks[0].name} holds no disc to crop around", fatal=False)
    box = disc_box(disc)
    image, mask = (staged / folder / f"{pair.name}.png" for folder in ("images", "masks"))
    write_png(image, pixels[box])
    write_png(mask, (cup if target == "cup" else disc)[box].astype(np.uint8) * 255)
    return _Look(pair, image, mask, _file_sha256(image), _pixels_sha256(pixels))


def _size_problem(path: Path, mask: NDArray[Any], image: NDArray[Any]) -> _Problem:
    (mask_height, mask_width), (height, width) = mask.shape[:2], image.shape[:2]
    return _Problem(f"{path.name} is {mask_width}x{mask_height}, its image {width}x{height}", fatal=False)


def refuge_regions(grey: NDArray[Any], *, source: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Cup and whole disc (cup included), each ``[H, W]``, of a REFUGE mask: 0 is cup, 128 disc rim, 255 background.

    Raises:
        DataError: for a mask whose values mean something else; ``source`` is named.
    """
    corners = grey[[0, 0, -1, -1], [0, -1, 0, -1]]
    if (corners < 192).all():  # a disc never fills all four corners
        values = np.unique(grey)[:_SHOWN].tolist()
        raise DataError(
            f"{source}: the mask's corners are not white (values {', '.join(map(str, values))}); REFUGE masks are 0 in "
            "the cup, 128 in the disc's rim and 255 outside, take the masks as the challenge published them"
        )
    return grey < 64, grey < 192


def disc_box(disc: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns of the square around the disc with ``DISC_MARGIN`` of its side on each side.

    Near the border the square is moved inside, which keeps it square; where the image is smaller, it is cut.
    """
    box = []
    extent = [np.flatnonzero(disc.any(axis=axis)) for axis in (1, 0)]
    side = round(max(int(lines[-1] - lines[0]) + 1 for lines in extent) * (1 + 2 * DISC_MARGIN))
    for lines, size in zip(extent, disc.shape, strict=True):
        length = min(side, size)
        start = (int(lines[0]) + int(lines[-1]) + 1 - length) // 2
        start = min(max(start, 0), size - length)
        box.append(slice(start, start + length))
    return box[0], box[1]


def _foreground(path: Path) -> tuple[NDArray[np.bool_], float]:
    """Where a mask is set ``[H, W]``, whether it is stored as 0/1, 0/255, a palette, with alpha, 16 bits, or as JPEG.

    Returns:
        The mask, and the share of a lossless file's non-zero pixels that are not in it: soft edges, or darker levels.

    Raises:
        DataError: for a file that cannot be read, or whose values leave it open what is foreground.
    """
    grey = _grey(path)
    top = int(grey.max(initial=0))
    if path.suffix.lower() in _JPEG:
        if 0 < top <= _JPEG_NOISE:
            raise DataError(
                f"{path}: the mask's highest value is {top}, which in a JPEG can be noise as well as foreground; take "
                "the file as it was published"
            )
        return np.asarray(grey > top // 2), 0.0  # what JPEG adds around edges is no level
    if top > 127:
        # 16 bits say nothing of the scale: 0/255, 0/1000 and 0/65535 all occur.
        inside = np.asarray(grey > (127 if grey.dtype == np.uint8 else top // 2))
        return inside, 1 - np.count_nonzero(inside) / np.count_nonzero(grey)
    if top > 1:
        raise DataError(
            f"{path}: the mask's highest value is {top}; masks of this set hold 0 and 1 or 0 and 255, take the file as "
            "it was published"
        )
    return np.asarray(grey > 0), 0.0


def _grey(path: Path) -> NDArray[Any]:
    """The mask as the eye sees it ``[H, W]``: palettes are looked up, alpha is dropped."""
    pixels = read_image(path)
    if pixels.ndim == 2:
        return pixels
    tolerance = _JPEG_NOISE if path.suffix.lower() in _JPEG else 0
    if int((pixels.max(axis=2).astype(np.int64) - pixels.min(axis=2)).max(initial=0)) > tolerance:
        raise DataError(
            f"{path}: the mask is in colours; masks of this set are grey, take the file as it was published"
        )
    return pixels[..., 0]


def _is_final(path: Path, inside: NDArray[np.bool_]) -> bool:
    """Whether training reads from the file itself what is wanted: 0 outside, 255 inside."""
    try:
        return bool((read_mask(path) == inside.astype(np.int64) * 255).all())
    except DataError:
        return False


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pixels_sha256(pixels: NDArray[Any]) -> str:
    """Of shape, type and values; three equal channels count as one, so that a grey copy of a picture is a copy."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    head = f"{pixels.shape} {pixels.dtype.str} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _count_warnings(found: Found, protocol: str) -> list[str]:
    known, counts = found.known, found.counts
    warnings = []
    wanted = known.images
    if protocol == "paper" and known.paper is not None:
        wanted = {folder: count for folder, count in wanted.items() if folder in known.paper.folders}
    for folder, expected in wanted.items():
        have = counts.get(folder, 0)
        if have != expected:
            warnings.append(f"{folder or 'images'}: {have} pairs were found, the published set has {expected}")
    for what, lonely in (
        ("images without a mask", found.lonely_images),
        ("masks without an image", found.lonely_masks),
    ):
        if lonely:
            warnings.append(f"{what}, left out: {len(lonely)} ({_listed(lonely)})")
    return warnings


def _manifest_text(looks: Sequence[_Look], assigned: Assignment, out: Path, staged: Path) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "mask", "group", "part"))
    folders: dict[Path, str] = {}  # a large set has thousands of files in a few folders

    def place(path: Path) -> str:
        folder = path.parent
        if folder not in folders:
            folders[folder] = folder.name if folder.parent == staged else os.path.relpath(_real(folder), _real(out))
        return (Path(folders[folder]) / path.name).as_posix()

    for look, group, part in zip(looks, assigned.groups, assigned.parts, strict=True):
        writer.writerow((place(look.image), place(look.mask), group or "", part))
    return text.getvalue()


def _real(path: Path) -> Path:
    """The folder past symbolic links, since ``..`` in a relative path follows them too."""
    return Path(os.path.realpath(path))


def _put_in_place(out: Path, staged: Path, manifest: str, record: dict[str, Any]) -> None:
    """The old manifest goes first and the new one comes last: a folder with a manifest is whole at every moment."""
    with suppress(FileNotFoundError):
        (out / MANIFEST_FILE).unlink()
    write_json_atomic(out / CATALOG_FILE, record)
    for name in ("images", "masks"):
        shutil.rmtree(out / name, ignore_errors=True)
        if (staged / name).is_dir():
            os.replace(staged / name, out / name)
    write_text_atomic(out / MANIFEST_FILE, manifest)


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` was written by :func:`prepare`.

    Raises:
        DataError: if it was begun and not finished.
    """
    if catalog_record(folder) is None:
        return False
    if not (folder / MANIFEST_FILE).is_file():
        raise DataError(
            f"{folder}: `leafseg data prepare` was interrupted here ({MANIFEST_FILE} is missing); run it again"
        )
    return True


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    rest = len(names) - _SHOWN
    return separator.join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
