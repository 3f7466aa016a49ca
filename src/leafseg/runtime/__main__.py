"""``python -m leafseg.runtime FOLDER IMAGES --out MASKS``: images in, PNG masks out, without torch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from leafseg.data.images import IMAGE_SUFFIXES, count_frames, image_stem, image_suffix, write_png
from leafseg.errors import DataError, LeafsegError
from leafseg.outputs.result import file_labels
from leafseg.runtime.model import Noise, Runtime, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on standard error for each thing that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m leafseg.runtime", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what `leafseg export` wrote")
    parser.add_argument("images", type=Path, nargs="+", help="PNG, JPEG, TIFF and BMP files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the masks; nothing in it is replaced")
    parser.add_argument("--noise", choices=("gaussian", "zeros"), help="default: the model's own")
    parser.add_argument("--samples", type=int, default=1, help="noise draws an image, averaged")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    given = parser.parse_args(arguments)
    for name in ("samples", "threads"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    begin = time.monotonic()
    failed = 0
    try:
        images = list(_images(given.images))
        model = load(given.folder, threads=given.threads)
        for path, targets in _targets(model, images, given.out).items():
            try:
                _write(model, path, targets, noise=given.noise, samples=given.samples)
            except DataError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
    except LeafsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(images) - failed} of {len(images)} files in {time.monotonic() - begin:.1f} s: {given.out}")
    return 2 if failed else 0


def _images(given: Sequence[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name[:1] != "." and image_suffix(p) in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{path}: no images in this folder; readable are {', '.join(IMAGE_SUFFIXES)}")
            yield from inside
        elif path.is_file() and image_suffix(path) not in IMAGE_SUFFIXES:
            raise DataError(
                f"{path}: the runtime reads {', '.join(IMAGE_SUFFIXES)}; take `leafseg predict` for volumes"
            )
        else:
            yield path


def _targets(model: Runtime, images: Sequence[Path], out: Path) -> dict[Path, list[Path]]:
    """The files of each image: STEM.png, or STEM_LABEL.png for each overlapping label. None exists yet."""
    endings = [f"_{label}" for label in file_labels(model.label_names)] if model.overlapping else [""]
    owners: dict[Path, Path] = {}
    targets: dict[Path, list[Path]] = {}
    for path in images:
        targets[path] = [out / f"{image_stem(path)}{ending}.png" for ending in endings]
        for target in targets[path]:
            if target.exists():
                raise DataError(f"{target}: exists already; choose another --out or remove it")
            if owners.setdefault(target, path) is not path:
                raise DataError(f"{path}: would write {target} as {owners[target]} does; give each its own --out")
    return targets


def _write(model: Runtime, path: Path, targets: Sequence[Path], *, noise: Noise | None, samples: int) -> None:
    """One label is 0 and 255, several are class ids."""
    if (count_frames(path) or 1) > 1:
        raise DataError(f"{path}: the file has several pages; take `leafseg predict`")
    result = model.segment(model.read(path), noise=noise, num_samples=samples)
    one = len(model.label_names) == 2
    masks = [mask * np.uint8(255) for mask in result.mask]
    planes = masks if result.labels is None else [result.labels * np.uint8(255) if one else result.labels]
    for target, plane in zip(targets, planes, strict=True):
        write_png(target, plane)


if __name__ == "__main__":
    sys.exit(main())
