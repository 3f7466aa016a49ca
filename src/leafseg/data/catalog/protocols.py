"""Which part each image belongs to: the ``clean`` protocol that a result can be trusted with, and the paper's own.

Both are functions of the data (and a seed) alone, so that everybody who prepares a set gets the same parts.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from leafseg import rng
from leafseg.data.catalog.sets import KnownSet, PaperSplit
from leafseg.data.manifest import PARTS, UNUSED, default_part
from leafseg.errors import DataError

# Each of validation and test: a tenth, as default_part gives.
HELD_OUT_SHARE = 0.1

# With fewer groups than this, hashing each for itself leaves the parts far from 80/10/10 (of 29 sequences 2.9 +- 1.6
# would be test), so they are filled one after the other.
FEW_GROUPS = 100

_KEPT_FIRST = ("test", "validation", "train")  # where copies would lie in two parts, the test part keeps its own


@dataclass(frozen=True)
class Item:
    """What the parts depend on, of one image.

    Attributes:
        group: as the set's layout tells it; None if unknown.
        folder: the set's own part; ``""`` where the set has none.
        sha256: of the bytes of the image file that the manifest names.
        pixels_sha256: of the decoded pixels: a copy in another file format is found too.
    """

    name: str
    group: str | None
    folder: str
    sha256: str
    pixels_sha256: str


@dataclass(frozen=True)
class Assignment:
    """Group and part of each item, in the order of the items; ``warnings`` are whole sentences without a full stop."""

    groups: tuple[str | None, ...]
    parts: tuple[str, ...]
    warnings: tuple[str, ...]


def clean_parts(items: Sequence[Item]) -> Assignment:
    """Grouped parts: the set's own test and validation folders where it has them, else about a tenth each.

    Whatever shares a group or shows the same pixels is one group. A group that reaches into a folder of the set's own
    test (or validation) images keeps those; its other images are left out of training.
    """
    groups = _joined_groups(items)
    members: dict[str, list[int]] = defaultdict(list)
    for index, (item, group) in enumerate(zip(items, groups, strict=True)):
        members[group or f"image {item.sha256} {item.name}"].append(index)
    parts: list[str] = [""] * len(items)
    pool: dict[str, list[int]] = {}
    left_out = 0
    for unit, indices in members.items():
        official = [folder for folder in ("test", "validation") if any(items[i].folder == folder for i in indices)]
        if not official:
            pool[unit] = indices
            continue
        for index in indices:
            parts[index] = official[0] if items[index].folder == official[0] else UNUSED
            left_out += parts[index] == UNUSED
    missing = [part for part in ("test", "validation") if part not in {item.folder for item in items}]
    if len(pool) < FEW_GROUPS:
        chosen = _filled(pool, dict.fromkeys(missing, HELD_OUT_SHARE))
    else:
        chosen = {}
        for unit, indices in pool.items():
            part = default_part(groups[indices[0]], items[indices[0]].sha256)
            chosen[unit] = part if part in missing else "train"
    for unit, indices in pool.items():
        for index in indices:
            parts[index] = chosen[unit]
    warnings = []
    if left_out:
        warnings.append(
            "images left out because their group (or an equal picture) lies in the set's own test or validation folder "
            f"too: {left_out}"
        )
    return Assignment(tuple(groups), tuple(parts), tuple(warnings))


def check_paper(known: KnownSet, folders: Collection[str], *, validation_share: float) -> PaperSplit:
    """The paper's split of a set of which ``folders`` hold images.

    Raises:
        DataError: if the paper did not use the set, a folder that it used has no images, or a validation share is asked
            for where the paper has a validation part.
    """
    split = known.paper
    if split is None:
        raise DataError(
            f"{known.name}: the paper did not use this set and no split of it is generally agreed on; use --protocol "
            "clean"
        )
    missing = sorted(set(split.folders) - set(folders))
    if missing:
        raise DataError(
            f"{known.name}: the paper's split uses the set's own folders {', '.join(split.folders)}, and without "
            f"images are {', '.join(missing)}; download {known.archives}"
        )
    if validation_share and ("validation" in split.folders or (split.sizes or {}).get("validation")):
        raise DataError(f"{known.name}: the paper's split has a validation part; leave --validation-share out")
    return split


def paper_parts(items: Sequence[Item], known: KnownSet, *, seed: int, validation_share: float) -> Assignment:
    """The paper's parts, which tear groups apart: no group is stored.

    Args:
        seed: of the shuffle, where the paper drew its parts at random.
        validation_share: share of the training images to hold out for choosing a checkpoint, by group; 0 for none.

    Raises:
        DataError: as :func:`check_paper`.
    """
    split = check_paper(known, {item.folder for item in items}, validation_share=validation_share)
    used = [index for index, item in enumerate(items) if item.folder in split.folders]
    parts = [UNUSED] * len(items)
    warnings = []
    if split.sizes is None:
        for index in used:
            parts[index] = items[index].folder
    else:
        sizes = _sized(split.sizes, len(used))
        if sizes != split.sizes:
            warnings.append(
                f"the paper's parts are {_slashed(split.sizes)} of {sum(split.sizes.values())} images, {len(used)} are "
                f"here: the parts are {_slashed(sizes)}"
            )
        order = [used[i] for i in rng.permutation(seed, f"paper-split {known.name}", 0, len(used))]
        for part in PARTS:
            for index in order[: sizes[part]]:
                parts[index] = part
            order = order[sizes[part] :]
    if validation_share:
        units: dict[str, list[int]] = defaultdict(list)
        for index, group in enumerate(_joined_groups(items)):
            if parts[index] == "train":
                units[group or f"image {items[index].sha256} {items[index].name}"].append(index)
        for unit, part in _filled(units, {"validation": validation_share}).items():
            for index in units[unit]:
                parts[index] = part
    warnings += _torn_groups(items, parts)
    copies = _copies(items, parts)
    if copies:
        warnings.append(f"images left out because the same file lies in the validation or test part: {len(copies)}")
        for index in copies:
            parts[index] = UNUSED
    return Assignment((None,) * len(items), tuple(parts), tuple(warnings))


def _torn_groups(items: Sequence[Item], parts: Sequence[str]) -> list[str]:
    spread: dict[str, set[str]] = defaultdict(set)
    for item, part in zip(items, parts, strict=True):
        if item.group is not None and part != UNUSED:
            spread[item.group].add(part)
    torn = sum(len(found) > 1 for found in spread.values())
    if not torn:
        return []
    return [
        f"images of {torn} of {len(spread)} groups lie in several parts: the test part shows what was trained on, "
        "and its scores are too high; --protocol clean keeps groups together"
    ]


def _copies(items: Sequence[Item], parts: Sequence[str]) -> list[int]:
    """Images whose very file lies in a part that is held out further; training refuses such a manifest."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        if parts[index] != UNUSED:
            members[item.sha256].append(index)
    copies = []
    for indices in members.values():
        kept = min((parts[index] for index in indices), key=_KEPT_FIRST.index)
        copies += [index for index in indices if parts[index] != kept]
    return copies


def _joined_groups(items: Sequence[Item]) -> list[str | None]:
    """A group for each item: the known one, joined with those that share a picture; None for an image on its own."""
    parent = list(range(len(items)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, item in enumerate(items):
        for key in (("group", item.group), ("sha256", item.sha256), ("pixels", item.pixels_sha256)):
            if key[1] is not None:
                other = first.setdefault((key[0], key[1]), index)
                parent[root(index)] = root(other)
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(items)):
        members[root(index)].append(index)
    groups: list[str | None] = [None] * len(items)
    for indices in members.values():
        names = sorted({group for i in indices if (group := items[i].group) is not None})
        if not names and len(indices) == 1:
            continue
        name = "+".join(names) or f"copies-{min(items[i].pixels_sha256 for i in indices)[:16]}"
        for index in indices:
            groups[index] = name
    return groups


def _filled(units: dict[str, list[int]], shares: dict[str, float]) -> dict[str, str]:
    """A part for each unit: each part in ``shares`` takes units until one more would lead away from its share.

    The order is that of the SHA-256 of the units' names, so that it follows from nothing else. Every part gets at least
    one unit while there are more units than parts; the rest is train.
    """
    total = sum(map(len, units.values()))
    queue = sorted(units, key=lambda unit: hashlib.sha256(unit.encode()).hexdigest())
    if len(queue) <= len(shares):
        return dict.fromkeys(queue, "train")
    parts = {}
    for waiting, (part, share) in zip(range(len(shares), 0, -1), shares.items(), strict=True):
        held = 0
        for unit in list(queue):
            size = len(units[unit])
            if held and abs(held + size - share * total) >= abs(held - share * total):
                break
            if len(queue) <= waiting:  # the parts still to come, and train, get one each
                break
            parts[unit] = part
            queue.remove(unit)
            held += size
    return parts | dict.fromkeys(queue, "train")


def _sized(sizes: dict[str, int], count: int) -> dict[str, int]:
    """``sizes`` scaled to ``count`` images; what rounding leaves over goes to train."""
    total = sum(sizes.values())
    scaled = {part: round(sizes[part] * count / total) for part in PARTS if part != "train"}
    return {part: count - sum(scaled.values()) if part == "train" else scaled[part] for part in PARTS}


def _slashed(sizes: dict[str, int]) -> str:
    return "/".join(str(sizes[part]) for part in PARTS)


def part_counts(parts: Iterable[str]) -> dict[str, int]:
    """How many images each part holds, ``unused`` included."""
    counts = Counter(parts)
    return {part: counts[part] for part in (*PARTS, UNUSED)}
