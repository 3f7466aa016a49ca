"""Recognising an unpacked data set by its folders, and pairing its images with their masks.

Names of folders and files are compared without regard to case, since mirrors differ. No file is opened here.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leafseg.data.catalog.sets import CVC_SEQUENCES, KNOWN_SETS, KnownSet
from leafseg.data.images import IMAGE_SUFFIXES, image_stem, image_suffix
from leafseg.errors import DataError

CATALOG_FILE = "catalog.json"

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")
_SHOWN = 6  # names listed of what was found


@dataclass(frozen=True)
class Pair:
    """One image with its masks.

    Attributes:
        name: unique in the set; names the files that are written.
        masks: the foreground is their union; none means an empty mask (only where the set says so).
        group: what must stay in one part; None if unknown.
        folder: the set's own part (``train``, ``validation``, ``test``); ``""`` where the set has none.
    """

    name: str
    image: Path
    masks: tuple[Path, ...]
    group: str | None = None
    folder: str = ""


@dataclass(frozen=True)
class Found:
    """A recognised set.

    Attributes:
        root: the folder that holds the set's own folders.
        layout: which folders were read, for the record.
        pairs: sorted by folder and name, numbers by value.
        lonely_images: image files without a mask, left out.
        lonely_masks: mask files without an image, left out.
    """

    known: KnownSet
    root: Path
    layout: str
    pairs: tuple[Pair, ...]
    lonely_images: tuple[str, ...] = ()
    lonely_masks: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Pairs by the set's own folder."""
        return dict(Counter(pair.folder for pair in self.pairs))


class _Incomplete(Exception):  # noqa: N818 - never leaves this module
    """A set's folder whose counterpart is missing; the text says what is there and what is not."""


@dataclass
class _Draft:
    """What a reader of a layout gathers."""

    layout: str
    pairs: list[Pair]
    lonely_images: list[str]
    lonely_masks: list[str]


def recognise(source: Path, *, name: str | None = None) -> Found:
    """Find a known set at ``source``, up to two folders below it, or one above it.

    Args:
        name: look for this set alone.

    Raises:
        DataError: if nothing, only a part of a set, or several sets are found.
    """
    source = Path(source)
    if not source.is_dir():
        if source.is_file() and source.suffix.lower() in _ARCHIVES:
            raise DataError(f"{source}: is an archive; unpack it and give the folder that it was unpacked into")
        raise DataError(f"{source}: no such folder; give the folder that the data set was unpacked into")
    if catalog_record(source) is not None:
        raise DataError(f"{source}: was written by `leafseg data prepare`; train on it as it is")
    wanted = [known for known in KNOWN_SETS if name in (None, known.name)]
    incomplete: list[str] = []
    below = _folders(source)
    for level in ([source], below, [inner for folder in below for inner in _folders(folder)]):
        found = _read_all(level, wanted, incomplete)
        if found:
            return _only(source, found)
    above = source.resolve().parent
    if catalog_record(above) is None:
        # What lies beside the folder counts only together with what is in it.
        inside = source.resolve()
        found = [one for one in _read_all([above], wanted, []) if _reaches_into(one, inside)]
        if found:
            return _only(source, found)
    if incomplete:
        raise DataError(incomplete[0])
    shown = ", ".join(_visible(source)[:_SHOWN]) or "nothing"
    packed = any(Path(entry).suffix.lower() in _ARCHIVES for entry in _visible(source))
    unpack = " (archives must be unpacked)" if packed else ""
    if name is not None:
        known = wanted[0]
        raise DataError(
            f"{source}: {known.title} is not here; expected is {known.expects}, found are {shown}{unpack}; download "
            f"{known.archives}"
        )
    raise DataError(
        f"{source}: no known data set is here, found are {shown}{unpack}; known are "
        f"{', '.join(known.name for known in wanted)}, and --dataset NAME says what is expected for one of them"
    )


def catalog_record(folder: Path) -> dict[str, Any] | None:
    """What ``leafseg data prepare`` noted in ``folder``; None for a folder that it did not write."""
    try:
        record = json.loads((folder / CATALOG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "manifest_sha256" in record else None


def _read_all(folders: Iterable[Path], wanted: Iterable[KnownSet], incomplete: list[str]) -> list[Found]:
    wanted = list(wanted)
    found = []
    for folder in folders:
        for known in wanted:
            try:
                draft = _READERS[known.name](folder)
            except _Incomplete as error:
                incomplete.append(f"{folder}: {known.title} is incomplete, {error}; download {known.archives}")
                continue
            if draft is not None:
                found.append(_finished(known, folder, draft))
    return found


def _finished(known: KnownSet, root: Path, draft: _Draft) -> Found:
    if not draft.pairs:
        raise DataError(
            f"{root}: {known.title} was recognised ({draft.layout}) but no image has a mask; expected is "
            f"{known.expects}"
        )
    twice = {name for name, count in Counter(pair.name.casefold() for pair in draft.pairs).items() if count > 1}
    pairs = [
        replace(pair, name=f"{pair.folder}__{pair.name}") if pair.name.casefold() in twice else pair
        for pair in draft.pairs
    ]
    pairs.sort(key=lambda pair: (pair.folder, natural_key(pair.name)))
    return Found(
        known,
        root,
        draft.layout,
        tuple(pairs),
        tuple(sorted(draft.lonely_images, key=natural_key)),
        tuple(sorted(draft.lonely_masks, key=natural_key)),
    )


def _only(source: Path, found: list[Found]) -> Found:
    if len(found) > 1:
        listed = ", ".join(f"{one.known.name} in {one.root}" for one in found[:_SHOWN])
        raise DataError(f"{source}: {len(found)} known data sets are here ({listed}); give the folder of one of them")
    return found[0]


def _reaches_into(found: Found, folder: Path) -> bool:
    files = (file for pair in found.pairs for file in (pair.image, *pair.masks))
    return any(file.is_relative_to(folder) for file in files)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts ``9.png`` before ``10.png``."""
    return tuple(
        (0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part)
        for part in re.split(r"([0-9]+)", name.casefold())
        if part
    )


# --- looking into folders


def _visible(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:  # somebody else's folder beside the set
        return []
    return sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")


def _folders(folder: Path) -> list[Path]:
    """Subfolders that can be a source, sorted by name; prepared folders are none."""
    paths = [folder / name for name in _visible(folder)]
    return [path for path in paths if path.is_dir() and catalog_record(path) is None]


def _subfolder(folder: Path | None, *names: str) -> Path | None:
    """The first of ``names`` that is a subfolder, in any case and with ``_`` or ``-`` for a space."""
    if folder is None:
        return None
    present = {_plain(path.name): path for path in _folders(folder)}
    return next((present[_plain(name)] for name in names if _plain(name) in present), None)


def _plain(name: str) -> str:
    return re.sub(r"[ _-]+", " ", name).strip().casefold()


def _unnested(folder: Path | None) -> Path | None:
    """Past folders that hold nothing but one folder: many unpacking programs add one."""
    for _ in range(2):
        if folder is None:
            return None
        inner = _folders(folder)
        if len(inner) != 1 or any(image_suffix(Path(name)) for name in _visible(folder)):
            break
        folder = inner[0]
    return folder


def _images(folder: Path | None, *, depth: int = 0) -> dict[str, Path]:
    """Image files by their stem in small letters; ``depth`` levels of subfolders are searched too.

    Of two files with one stem the PNG is taken: mirrors keep a converted copy beside the original.
    """
    files = sorted(_image_files(folder, depth), key=lambda path: IMAGE_SUFFIXES.index(path.suffix.lower()))
    found: dict[str, Path] = {}
    for path in files:
        found.setdefault(image_stem(path).casefold(), path)
    return dict(sorted(found.items()))


def _image_files(folder: Path | None, depth: int) -> Iterator[Path]:
    if folder is None:
        return
    for name in _visible(folder):
        path = folder / name
        if image_suffix(path) in IMAGE_SUFFIXES and path.is_file():
            yield path
        elif depth and path.is_dir():
            yield from _image_files(path, depth - 1)


def _paired(
    images: dict[str, Path],
    masks: dict[str, Path],
    *,
    layout: str,
    mask_stem: Callable[[str], str] = lambda stem: stem,
    group: Callable[[str], str | None] = lambda stem: None,
    folder: str = "",
) -> _Draft:
    """Pairs of ``images`` with the mask whose stem ``mask_stem`` makes of the image's."""
    draft = _Draft(layout, [], [], [])
    used = set()
    for stem, image in images.items():
        mask = mask_stem(stem)
        if mask in masks:
            used.add(mask)
            draft.pairs.append(Pair(image_stem(image), image, (masks[mask],), group(stem), folder))
        else:
            draft.lonely_images.append(image.name)
    draft.lonely_masks += [path.name for stem, path in masks.items() if stem not in used]
    return draft


def _together(drafts: list[_Draft]) -> _Draft:
    return _Draft(
        ", ".join(draft.layout for draft in drafts),
        [pair for draft in drafts for pair in draft.pairs],
        [name for draft in drafts for name in draft.lonely_images],
        [name for draft in drafts for name in draft.lonely_masks],
    )


def _share(stems: Iterable[str], pattern: str) -> float:
    """The share of stems that are named as the set names them."""
    stems = list(stems)
    return sum(bool(re.fullmatch(pattern, stem)) for stem in stems) / len(stems) if stems else 0.0


def _layout(*folders: Path) -> str:
    return " + ".join(f"{folder.parent.name}/{folder.name}" for folder in folders)


# --- one reader a set: a folder -> its pairs, or None if the folder is not this set


_REFUGE_STEM = "[gnvt][0-9]{4}"
_REFUGE_FOLDERS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
_REFUGE_ARCHIVES = {  # images, masks
    "train": (("REFUGE-Training400", "Training400", "Train400"), ("Annotation-Training400", "Train400-GT")),
    "validation": (
        ("REFUGE-Validation400", "Validation400", "Valid400"),
        ("REFUGE-Validation400-GT", "Validation400-GT", "Valid400-GT"),
    ),
    "test": (("REFUGE-Test400", "Test400"), ("REFUGE-Test-GT", "REFUGE-Test400-GT", "Test400-GT")),
}


def _refuge2(root: Path) -> _Draft | None:
    drafts = []
    missing = []
    for part in ("train", "validation", "test"):
        own = _subfolder(root, *_REFUGE_FOLDERS[part])
        image_names, mask_names = _REFUGE_ARCHIVES[part]
        pair = (_subfolder(own, "images", "image"), _subfolder(own, "mask", "masks"))
        if pair == (None, None):
            pair = (_subfolder(root, *image_names), _subfolder(root, *mask_names))
        images, masks = (_images(folder, depth=3) for folder in pair)
        if _share(images or masks, _REFUGE_STEM) < 0.5:
            continue
        if not images or not masks:
            wanted = (mask_names if images else image_names)[0]
            missing.append(f"the {'masks' if images else 'images'} of {part} are missing ({part}/ or {wanted}/)")
            continue
        drafts.append(_paired(images, masks, layout=_layout(*filter(None, pair)), folder=part))
    if missing:
        raise _Incomplete(" and ".join(missing))
    if not drafts:
        return None
    if drafts[0].pairs and drafts[0].pairs[0].folder != "train":
        raise _Incomplete("the training images are missing (train/ or Training400/)")
    return _together(drafts)


def _cvc_clinicdb(root: Path) -> _Draft | None:
    for folder in (root, _subfolder(root, "PNG"), _subfolder(root, "TIF", "TIFF")):
        original, truth = _subfolder(folder, "Original"), _subfolder(folder, "Ground Truth", "GroundTruth")
        images, masks = _images(_unnested(original)), _images(_unnested(truth))
        named = images or masks
        if _share(named, "[0-9]{1,3}") < 0.9 or max(map(int, filter(str.isdecimal, named))) > CVC_SEQUENCES[-1][1]:
            continue
        if original is None or truth is None or not images or not masks:
            raise _Incomplete("Ground Truth/ is missing" if images else "Original/ is missing")
        return _paired(images, masks, layout=_layout(original, truth), group=_cvc_sequence)
    return None


def _cvc_sequence(stem: str) -> str | None:
    if not stem.isdecimal():
        return None
    frame = int(stem)
    number = next((n for n, (first, last) in enumerate(CVC_SEQUENCES, start=1) if first <= frame <= last), None)
    return None if number is None else f"sequence-{number:02d}"


def _qata_cov19(root: Path) -> _Draft | None:
    parts = {"train": _subfolder(root, "Train Set", "Train"), "test": _subfolder(root, "Test Set", "Test")}
    folders = {
        part: (_subfolder(own, "Images"), _subfolder(own, "Ground-truths", "Ground-truth"))
        for part, own in parts.items()
    }
    if not any(truth for _, truth in folders.values()):
        return None
    drafts = []
    for part, (images, masks) in folders.items():
        if images is None or masks is None:
            raise _Incomplete(f"{part.capitalize()} Set/{'Images' if images is None else 'Ground-truths'}/ is missing")
        found = {stem.removeprefix("mask_"): path for stem, path in _images(masks).items()}
        drafts.append(_paired(_images(images), found, layout=_layout(images, masks), group=_patient, folder=part))
    return _together(drafts)


def _patient(stem: str) -> str | None:
    """The subject in names such as ``sub-S09466_ses-E17059_run-1_bp-chest_vp-pa_dx``."""
    subject = re.match(r"(sub-s[0-9]+)(?:_|$)", stem)
    return subject.group(1) if subject else None


def _isic2018(root: Path) -> _Draft | None:
    drafts = []
    for part, title in (("train", "Training"), ("validation", "Validation"), ("test", "Test")):
        names = f"ISIC2018_Task1-2_{title}_Input", f"ISIC2018_Task1_{title}_GroundTruth"
        images, masks = (_unnested(_subfolder(root, name)) for name in names)
        if images is None and masks is None:
            continue
        if images is None or masks is None:
            if part != "train":
                continue  # inputs of validation and test were published years before their masks
            raise _Incomplete(f"{names[0] if images is None else names[1]}/ is missing")
        draft = _paired(
            {stem: path for stem, path in _images(images).items() if not stem.endswith("_superpixels")},
            _images(masks),
            layout=_layout(images, masks),
            mask_stem=lambda stem: f"{stem}_segmentation",
            folder=part,
        )
        drafts.append(draft)
    if not drafts:
        return None
    if drafts[0].pairs and drafts[0].pairs[0].folder != "train":
        raise _Incomplete("ISIC2018_Task1-2_Training_Input/ is missing")
    return _together(drafts)


_BUSI_CLASSES = ("benign", "malignant", "normal")
_BUSI_FILE = re.compile(r"(?P<image>(benign|malignant|normal) ?\([0-9]+\))(?P<mask>_mask(_[0-9]+)?)?")


def _busi(root: Path) -> _Draft | None:
    folders = {name: _subfolder(root, name) for name in _BUSI_CLASSES}
    draft = _Draft(f"{root.name}/{{{','.join(_BUSI_CLASSES)}}}", [], [], [])
    images: dict[str, Path] = {}
    masks: dict[str, list[Path]] = {}
    for folder in folders.values():
        for stem, path in _images(folder).items():
            if match := _BUSI_FILE.fullmatch(stem):
                if match["mask"]:
                    masks.setdefault(match["image"], []).append(path)
                else:
                    images[match["image"]] = path
    if not images and not masks:
        return None
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        raise _Incomplete(f"{', '.join(f'{name}/' for name in missing)} missing")
    for stem, image in images.items():
        # A normal image shows nothing to outline, whether or not its (empty) mask was kept.
        if stem in masks or stem.startswith("normal"):
            draft.pairs.append(Pair(image_stem(image), image, tuple(sorted(masks.pop(stem, [])))))
        else:
            draft.lonely_images.append(image.name)
    draft.lonely_masks += [path.name for paths in masks.values() for path in paths]
    return draft


def _kvasir_seg(root: Path) -> _Draft | None:
    images, masks = _subfolder(root, "images"), _subfolder(root, "masks")
    if images is None and masks is None:
        return None
    # Any folder may hold images/ and masks/: the boxes' file (the misspelling is the archive's own) or the names tell.
    boxes = {"kavsir_bboxes.json", "kvasir_bboxes.json"} & {name.casefold() for name in _visible(root)}
    found = _images(images)
    if not boxes and _share(found or _images(masks), "c[a-z0-9]{24}") < 0.9:
        return None
    if images is None or masks is None:
        raise _Incomplete(f"{'images' if images is None else 'masks'}/ is missing")
    return _paired(found, _images(masks), layout=_layout(images, masks))


def _dsb2018(root: Path) -> _Draft | None:
    cells = [folder for folder in _folders(root) if re.fullmatch("[0-9a-f]{64}", folder.name.casefold())]
    if not cells:
        return None
    draft = _Draft(f"{root.name}/<id>/images + masks", [], [], [])
    for folder in cells:
        images = _images(_subfolder(folder, "images"))
        masks = tuple(_images(_subfolder(folder, "masks")).values())
        if images and masks:
            image = images.get(folder.name.casefold(), next(iter(images.values())))
            draft.pairs.append(Pair(image_stem(image), image, masks))
        else:
            (draft.lonely_images if images else draft.lonely_masks).append(folder.name)
    if not draft.pairs:
        raise _Incomplete("no <id>/masks/ among the folders (stage1_test has none, stage1_train is needed)")
    return draft


def _ph2(root: Path) -> _Draft | None:
    cases = [folder for folder in _folders(root) if re.fullmatch("imd[0-9]{3}", folder.name.casefold())]
    if not cases:
        return None
    draft = _Draft(f"{root.name}/<case>/<case>_Dermoscopic_Image + <case>_lesion", [], [], [])
    for folder in cases:
        name = folder.name
        image = _images(_subfolder(folder, f"{name}_Dermoscopic_Image")).get(name.casefold())
        mask = _images(_subfolder(folder, f"{name}_lesion")).get(f"{name}_lesion".casefold())
        if image is not None and mask is not None:
            draft.pairs.append(Pair(name, image, (mask,)))
        elif image is not None:
            draft.lonely_images.append(image.name)
        elif mask is not None:
            draft.lonely_masks.append(mask.name)
    return draft


def _montgomery(root: Path) -> _Draft | None:
    images, manual = _subfolder(root, "CXR_png"), _subfolder(root, "ManualMask")
    found = {stem: path for stem, path in _images(images).items() if stem.startswith("mcucxr")}
    if manual is None and root.name.casefold() != "montgomeryset":
        return None
    if not found and manual is None:
        return None
    sides = {side: _images(_subfolder(manual, side)) for side in ("leftMask", "rightMask")}
    missing = ["CXR_png/"] * (not found) + [f"ManualMask/{side}/" for side, masks in sides.items() if not masks]
    if missing:
        raise _Incomplete(f"{' and '.join(missing)} missing")
    draft = _Draft(f"{root.name}/CXR_png + ManualMask/leftMask + ManualMask/rightMask", [], [], [])
    left, right = sides.values()
    for stem, image in found.items():
        if stem in left and stem in right:
            draft.pairs.append(Pair(image_stem(image), image, (left[stem], right[stem]), stem))
        else:  # half a mask would teach that the other lung is background
            draft.lonely_images.append(image.name)
    draft.lonely_masks += [path.name for stem, path in {**left, **right}.items() if stem not in found]
    return draft


def _shenzhen(root: Path) -> _Draft | None:
    holder = root if _subfolder(root, "CXR_png") else _unnested(_subfolder(root, "ChinaSet_AllFiles"))
    images = _subfolder(holder, "CXR_png")
    found = {stem: path for stem, path in _images(images).items() if stem.startswith("chncxr")}
    if images is None or holder is None or not found:
        return None
    # The masks are an archive of their own: unpacked inside the set, or beside it.
    for place in (holder, root, root.resolve().parent):
        folder = _unnested(_subfolder(place, "mask", "masks", "shcxr-lung-mask"))
        masks = {stem: path for stem, path in _images(folder).items() if re.fullmatch("chncxr_.*_mask", stem)}
        if folder is not None and masks:
            layout = f"{_layout(images)} + {folder.name}"
            return _paired(found, masks, layout=layout, mask_stem=lambda stem: f"{stem}_mask", group=lambda stem: stem)
    raise _Incomplete("the lung masks are missing (mask/ with CHNCXR_0001_0_mask.png ...)")


_READERS: dict[str, Callable[[Path], _Draft | None]] = {
    "refuge2": _refuge2,
    "cvc_clinicdb": _cvc_clinicdb,
    "qata_cov19": _qata_cov19,
    "isic2018": _isic2018,
    "busi": _busi,
    "kvasir_seg": _kvasir_seg,
    "dsb2018": _dsb2018,
    "ph2": _ph2,
    "montgomery": _montgomery,
    "shenzhen": _shenzhen,
}
