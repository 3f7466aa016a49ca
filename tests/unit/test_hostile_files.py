"""Files made to hang, crash or fill the memory of a reader; each was found by the fuzz in tests/integration."""

from __future__ import annotations

import io
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from leafseg.config import DataSettings
from leafseg.data.images import count_frames, pixel_spacing, read_image, read_mask
from leafseg.data.manifest import load_manifest
from leafseg.errors import DataError


def test_a_circle_of_tiff_pages_ends(tmp_path: Path) -> None:
    path = tmp_path / "circle.tif"
    chain = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number in range(300):  # tifffile itself sees a circle only among the first hundred
        chain += struct.pack("<HI", 0, 14 + 6 * number if number < 299 else 8)
    path.write_bytes(bytes(chain))
    with pytest.raises(DataError, match="chain runs in a circle"):
        count_frames(path)


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    (tmp_path / "sound.jpg").write_bytes(content)
    assert read_image(tmp_path / "sound.jpg").shape == (16, 16)
    size = content.index(b"\xff\xc2") + 5
    scan = content[content.index(b"\xff\xda") : -2]
    large = content[:size] + struct.pack(">HH", 8000, 8000) + content[size + 4 : -2] + scan * 2000 + b"\xff\xd9"
    (tmp_path / "scans.jpg").write_bytes(large)
    started = time.monotonic()
    with pytest.raises(DataError, match="scans, at most 64 are read"):
        read_image(tmp_path / "scans.jpg")
    assert time.monotonic() - started < 2


@pytest.fixture
def nrrd(tmp_path: Path) -> bytes:
    path = tmp_path / "sound.nrrd"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.ones((2, 3, 4), np.uint8)), str(path))
    return path.read_bytes()


def test_a_nrrd_header_of_a_hundred_thousand_lines_is_refused_at_once(tmp_path: Path, nrrd: bytes) -> None:
    head, voxels = nrrd.split(b"\n\n", 1)
    path = tmp_path / "lines.nrrd"
    path.write_bytes(head + b"".join(b"\nk%d:=v" % number for number in range(100_000)) + b"\n\n" + voxels)
    started = time.monotonic()
    with pytest.raises(DataError, match="more than 5,000 lines"):
        count_frames(path)
    assert time.monotonic() - started < 2
    path.write_bytes(head + b"".join(b"\nk%d:=v" % number for number in range(1000)) + b"\n\n" + voxels)
    assert count_frames(path) == 2


def test_damaged_nrrd_files_can_be_opened_by_many_threads(tmp_path: Path, nrrd: bytes) -> None:
    paths = []
    for number in range(200):
        path = tmp_path / f"{number}.nrrd"
        path.write_bytes(nrrd[: 20 + number] if number % 2 else nrrd.replace(b"sizes", b"sizzs"))
        paths.append(path)

    def attempt(path: Path) -> str:
        with pytest.raises(DataError) as refused:
            read_image(path, 0)
        return str(refused.value)

    with ThreadPoolExecutor(8) as pool:  # without a lock, the process dies in about one of four runs
        assert all("\n" not in said for said in pool.map(attempt, paths))


def test_a_volume_without_voxels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.mha"
    path.write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 0 0 0\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    )
    with pytest.raises(DataError, match="holds no voxels"):
        count_frames(path)


def test_mask_values_beyond_whole_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.tif"
    tifffile.imwrite(path, np.full((4, 4), 1e38, np.float32))
    with pytest.raises(DataError, match="broken numbers"):
        read_mask(path)


def test_an_image_whose_metadata_nobody_understands_has_no_known_spacing(tmp_path: Path) -> None:
    path = tmp_path / "png.tif"
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(path, "PNG")
    assert read_image(path).shape == (4, 5)
    assert pixel_spacing(path) is None
    tifffile.imwrite(path, np.zeros((4, 5), np.uint8), description="<OME <<< not xml")
    assert pixel_spacing(path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,mask\n" + "x" * 5000 + ".png,m.png\n", "beyond 1,000 characters"),
        ("image,mask,frame\na.png,m.png," + "9" * 900 + "\n", "frame is no number"),
        ("y" * 5000 + ",b\n1,2\n", "no column 'image'"),
    ],
    ids=["path", "number", "header"],
)
def test_endless_words_in_a_table_end_in_a_short_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as refused:
        load_manifest(path, settings=DataSettings())
    assert len(str(refused.value)) < 400
