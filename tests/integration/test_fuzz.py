"""Thousands of damaged files: one sentence each, no traceback, no crash, no hang, bounded memory.

The damage is drawn from a keyed generator, so that every run meets the same files. They are written in families; each
is opened by ``data check`` and by prediction in a process of its own (this file, run as a script), with limited memory.
"""

from __future__ import annotations

import faulthandler
import gzip
import io
import json
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GENERIC = 75  # random damages of every base file
LENGTH, LISTING = 400, 1000  # characters of a sentence about one file, and of one that lists cases; the folder left out
ADDRESS_SPACE = 1.5 * 2**30  # bytes beyond what the process has when its imports are done
RESIDENT = 1.2 * 2**30
SECONDS_A_FILE = 20.0
SECONDS_A_FAMILY = 420.0

Files = dict[str, bytes]  # file name to content; a name with a slash lies in a folder of its own


# --- sound files of every kind ---


def picture(height: int = 20, width: int = 24) -> np.ndarray:
    """A bright disc on a ramp, uint8 ``[H, W]``."""
    y, x = np.mgrid[:height, :width]
    return np.where((y - 10) ** 2 + (x - 12) ** 2 < 30, 220, 3 * y + 2 * x).astype(np.uint8)


def encoded(kind: str, array: np.ndarray, **options: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def flat_bases() -> Files:
    from PIL import Image

    grey = picture()
    colour = np.stack((grey, grey[::-1], 255 - grey), axis=-1)
    palette = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    stream = io.BytesIO()
    palette.save(stream, "PNG")
    return {
        "grey.png": encoded("PNG", grey),
        "colour.png": encoded("PNG", colour),
        "deep.png": encoded("PNG", grey.astype(np.uint16) * 257),
        "palette.png": stream.getvalue(),
        "grey.jpg": encoded("JPEG", grey),
        "progressive.jpg": encoded("JPEG", colour, progressive=True),
        "grey.bmp": encoded("BMP", grey),
        "colour.bmp": encoded("BMP", colour),
    }


def tiff_bases() -> Files:
    import tifffile

    grey = picture()

    def tiff(array: np.ndarray, **options: Any) -> bytes:
        stream = io.BytesIO()
        tifffile.imwrite(stream, array, **options)
        return stream.getvalue()

    return {
        "deep.tif": tiff(grey.astype(np.uint16) * 200),
        "pages.tif": tiff(np.stack((grey, grey[::-1], grey[:, ::-1])), photometric="minisblack"),
        "deflated.tif": tiff(np.stack((grey,) * 3, -1), compression="zlib", photometric="rgb"),
        "big.tif": tiff(grey.astype(np.float32) / 255, bigtiff=True),
        "tiles.ome.tif": tiff(np.tile(grey, (4, 4)), tile=(16, 16), ome=True, metadata={"axes": "YX"}),
        "lzw.tiff": encoded("TIFF", grey, compression="tiff_lzw"),
    }


def volume_bases(suffixes: Sequence[str], folder: Path) -> Files:
    import SimpleITK

    voxels = np.stack([np.roll(picture(), shift, 1) for shift in range(4)])
    image = SimpleITK.GetImageFromArray(voxels.astype(np.int16) - 50)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-10.0, 4.0, 33.0))
    files = {}
    for suffix in suffixes:
        path = folder / f"base{suffix}"
        SimpleITK.WriteImage(image, str(path), useCompression=suffix in (".nrrd",))
        files[f"volume{suffix}"] = path.read_bytes()
        path.unlink()
    return files


def dicom_dataset(frames: int | None = None) -> Any:
    """A CT slice, or a multi-frame secondary capture, as pydicom's Dataset."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    pixels = picture() if frames is None else np.stack([np.roll(picture(), shift, 1) for shift in range(frames)])
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.3.5", "1.2.3.6"
    dataset.Modality, dataset.PatientID, dataset.PatientName = "CT", "nobody", "No^Body"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelSpacing, dataset.SliceThickness = ["0.8", "0.7"], "2.5"
    dataset.ImageOrientationPatient, dataset.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-10, 4, 33]
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.WindowCenter, dataset.WindowWidth = "40", "400"
    dataset.InstanceNumber = "1"
    if frames is not None:
        dataset.NumberOfFrames = str(frames)
    dataset.PixelData = (pixels.astype(np.uint16) * 4).tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def dicom_bytes(dataset: Any) -> bytes:
    """Written as it is, whatever pydicom thinks of the values."""
    import pydicom

    stream = io.BytesIO()
    with pydicom.config.disable_value_validation():
        pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def dicom_bases() -> Files:
    from pydicom.uid import JPEG2000Lossless, RLELossless

    rle = dicom_dataset()
    rle.compress(RLELossless, generate_instance_uid=False)
    codestream = encoded("JPEG2000", picture().astype(np.uint16) * 4, irreversible=False, no_jp2=True)
    return {
        "slice.dcm": dicom_bytes(dicom_dataset()),
        "frames.dcm": dicom_bytes(dicom_dataset(3)),
        "rle.dcm": dicom_bytes(rle),
        "jpeg2000.dcm": with_frame(codestream, JPEG2000Lossless, bits=16),
    }


def dicom_series(*, spoilt: bytes | None = None, change: Callable[[Any], None] | None = None) -> Files:
    """Four slices of one series; the third one changed, or replaced."""
    files = {}
    for number in range(4):
        dataset = dicom_dataset()
        dataset.ImagePositionPatient, dataset.InstanceNumber = [-10, 4, 33 + 2.5 * number], str(number + 1)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{number}"
        if number == 2 and change is not None:
            change(dataset)
        files[f"{number}.dcm"] = spoilt if number == 2 and spoilt is not None else dicom_bytes(dataset)
    return files


# --- damage that fits any file ---

WORDS = (0, 1, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00010000, 0x10000000)


def damaged(content: bytes, others: Sequence[bytes], generator: np.random.Generator) -> tuple[str, bytes]:
    """One random damage, and what it was."""
    data = bytearray(content)
    at = int(generator.integers(0, max(1, len(data))))
    head = int(generator.integers(0, min(512, len(data))))
    run = int(generator.integers(1, 64))
    kind = int(generator.integers(0, 13))
    if kind == 0:
        return "cut", bytes(data[:at])
    if kind == 1:
        for _ in range(int(generator.integers(1, 9))):
            data[int(generator.integers(0, len(data)))] ^= 1 << int(generator.integers(0, 8))
        return "bits", bytes(data)
    if kind == 2:
        for _ in range(int(generator.integers(1, 4))):
            data[int(generator.integers(0, min(512, len(data))))] ^= 1 << int(generator.integers(0, 8))
        return "head-bits", bytes(data)
    if kind == 3:
        data[at : at + run] = bytes(len(data[at : at + run]))
        return "zeros", bytes(data)
    if kind == 4:
        data[at : at + run] = b"\xff" * len(data[at : at + run])
        return "ones", bytes(data)
    if kind == 5:
        data[head : head + run] = generator.bytes(len(data[head : head + run]))
        return "head-noise", bytes(data)
    if kind == 6:
        return "hole", bytes(data[:at] + data[at + run :])
    if kind == 7:
        return "repeat", bytes(data[: at + run] + data[at:])
    if kind == 8:
        return "insert", bytes(data[:at]) + generator.bytes(run) + bytes(data[at:])
    if kind == 9:
        return "tail", bytes(data) + generator.bytes(run)
    word = WORDS[int(generator.integers(0, len(WORDS)))]
    if kind in (10, 11):
        order = "<I" if kind == 10 else ">I"
        data[head : head + 4] = struct.pack(order, word)
        return "word", bytes(data)
    return "other-format", others[int(generator.integers(0, len(others)))]


# --- damage that only fits one format ---


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, rows: bytes, *extra: bytes, depth: int = 8, colour: int = 0, tail: bool = True
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    end = png_chunk(b"IDAT", zlib.compress(rows)) + (png_chunk(b"IEND", b"") if tail else b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(extra) + end


def crafted_flat() -> Files:
    rows = (b"\0" + bytes(24)) * 20
    bomb = zlib.compress(bytes(80 * 2**20), 9)
    files = {
        "huge-sides.png": png(2**31 - 1, 2**31 - 1, rows),
        "too-many-pixels.png": png(20_000, 20_000, rows),
        "long-row.png": png(80_000_000, 1, rows),
        "zero-sides.png": png(0, 0, rows),
        "short-rows.png": png(24, 2000, rows),
        "many-rows.png": png(4000, 4000, bytes(4001) * 4000),  # sound: 16 million pixels in 16 KB
        "odd-depth.png": png(24, 20, rows, depth=7),
        "odd-colour.png": png(24, 20, rows, colour=5),
        "no-palette.png": png(24, 20, rows, colour=3),
        "no-end.png": png(24, 20, rows, tail=False),
        "bad-filter.png": png(24, 20, (b"\x09" + bytes(24)) * 20),
        "text-bomb.png": png(24, 20, rows, png_chunk(b"zTXt", b"a\0\0" + bomb)),
        "itext-bomb.png": png(24, 20, rows, png_chunk(b"iTXt", b"a\0\x01\0\0\0" + bomb)),
        "profile-bomb.png": png(24, 20, rows, png_chunk(b"iCCP", b"a\0\0" + bomb)),
        "long-text.png": png(24, 20, rows, png_chunk(b"tEXt", b"a\0" + b"x" * 2**21)),
        "many-texts.png": png(24, 20, rows, *[png_chunk(b"tEXt", b"k%d\0v" % n) for n in range(20_000)]),
        "animated.png": png(24, 20, rows, png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
        "bad-exif.png": png(24, 20, rows, png_chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 64)),
        "nothing.png": b"",
        "nothing.jpg": b"",
        "nothing.bmp": b"",
        "text.png": b"this is text\n" * 50,
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "archive.png": b"PK\x03\x04" + bytes(100),
        "zipped.png": gzip.compress(png(24, 20, rows)),
    }
    jpeg = flat_bases()["grey.jpg"]
    start = jpeg.index(b"\xff\xc0") + 5
    for name, sides in {"max": (65535, 65535), "wide": (65535, 1), "zero": (0, 0), "large": (4000, 4000)}.items():
        files[f"{name}-sides.jpg"] = jpeg[:start] + struct.pack(">HH", *sides) + jpeg[start + 4 :]
    progressive = flat_bases()["progressive.jpg"]
    start = progressive.index(b"\xff\xc2") + 5
    scan = progressive[progressive.index(b"\xff\xda") : -2]
    files["many-scans.jpg"] = progressive[:-2] + scan * 3000 + progressive[-2:]
    files["many-large-scans.jpg"] = (
        progressive[:start] + struct.pack(">HH", 4000, 4000) + progressive[start + 4 : -2] + scan * 300 + b"\xff\xd9"
    )
    files["no-tables.jpg"] = jpeg.replace(b"\xff\xdb", b"\xff\xe5").replace(b"\xff\xc4", b"\xff\xe6")
    files["comment-loop.jpg"] = jpeg[:2] + b"\xff\xfe\x00\x02" * 100_000 + jpeg[2:]
    bmp = flat_bases()["grey.bmp"]
    for name, offset, value in (
        ("wide", 18, 2**31 - 1), ("negative-width", 18, -24), ("top-down", 22, -20), ("low", 22, -(2**31)),
        ("depth", 28, 7), ("packed", 30, 1), ("masks", 30, 3), ("offset", 10, 2**31 - 1), ("colours", 46, 2**31 - 1),
        ("header", 14, 2**31 - 1), ("no-header", 14, 0),
    ):  # fmt: skip
        files[f"{name}.bmp"] = bmp[:offset] + struct.pack("<i", value) + bmp[offset + 4 :]
    return files


def tiff_entries(content: bytes) -> list[int]:
    """Offsets of the first directory's entries in a little-endian classic TIFF."""
    (first,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, first)
    return [first + 2 + 12 * number for number in range(count)]


def crafted_tiff() -> Files:
    bases = tiff_bases()
    deep = bases["deep.tif"]
    files = {"nothing.tif": b"", "only-magic.tif": b"II*\0", "both.tif": b"II*\0" + bytes(4)}
    entries = tiff_entries(deep)
    for number, offset in enumerate(entries):
        tag, kind, count = struct.unpack_from("<HHI", deep, offset)
        for name, new in {
            "zero": struct.pack("<HHII", tag, kind, count, 0),
            "max": struct.pack("<HHII", tag, kind, count, 2**32 - 1),
            "large": struct.pack("<HHII", tag, 4, 1, 60_000),
            "count": struct.pack("<HHII", tag, kind, 2**31 - 1, 8),
            "none": struct.pack("<HHII", tag, kind, 0, 0),
            "type": struct.pack("<HHII", tag, 99, count, 8),
            "gone": struct.pack("<HHII", 65000 + number, kind, count, 0),
        }.items():
            files[f"tag{tag}-{name}.tif"] = deep[:offset] + new + deep[offset + 12 :]
    after = entries[-1] + 12  # where the next directory's place stands
    (first,) = struct.unpack_from("<I", deep, 4)
    for name, place in {"loop": first, "beyond": 2**31, "one": 1, "end": len(deep) - 2}.items():
        files[f"next-{name}.tif"] = deep[:after] + struct.pack("<I", place) + deep[after + 4 :]
    files["entries.tif"] = deep[:first] + b"\xff\xff" + deep[first + 2 :]
    chain, start = (
        bytearray(b"II*\0" + struct.pack("<I", 8)),
        8,
    )  # ten thousand pages that share one directory's content
    for number in range(10_000):
        following = start + 6 if number < 9_999 else 8
        chain += struct.pack("<HI", 0, following)
        start = following
    files["page-chain.tif"] = bytes(chain)
    bomb = zlib.compress(bytes(400 * 2**20), 9)
    files["strip-bomb.tif"] = one_strip_tiff(24, 20, bomb, compression=8)
    files["large-strip.tif"] = one_strip_tiff(4000, 4000, zlib.compress(bytes(16_000_000), 9), compression=8)
    files["short-strip.tif"] = one_strip_tiff(4000, 4000, zlib.compress(bytes(100)), compression=8)
    files["raw-large.tif"] = one_strip_tiff(4000, 4000, bytes(100), compression=1)
    files["many-samples.tif"] = one_strip_tiff(24, 20, bytes(480), compression=1, samples=65535)
    files["codec.tif"] = one_strip_tiff(24, 20, bytes(480), compression=34712)
    files["unknown-codec.tif"] = one_strip_tiff(24, 20, bytes(480), compression=4242)
    ome = bases["tiles.ome.tif"]
    for name, old, new in (
        ("not-xml", b"<OME", b"<<<<"), ("entities", b"<Image", b"&a;&b;"), ("planes", b'SizeZ="1"', b'SizeZ="9"'),
    ):  # fmt: skip
        files[f"{name}.ome.tif"] = ome.replace(old, new)
    return files


def one_strip_tiff(width: int, height: int, strip: bytes, *, compression: int, samples: int = 1) -> bytes:
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1),
        (273, 4, 1, 8), (277, 3, 1, samples), (278, 4, 1, height), (279, 4, 1, len(strip)),
    ]  # fmt: skip
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    directory = struct.pack("<H", len(entries)) + packed + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


NAN, INFINITY = float("nan"), float("inf")


def crafted_nifti(folder: Path) -> Files:
    plain = volume_bases([".nii"], folder)["volume.nii"]
    packed = gzip.compress(plain, mtime=0)
    files = {"nothing.nii": b"", "nothing.nii.gz": b"", "empty-stream.nii.gz": gzip.compress(b"", mtime=0)}

    def put(name: str, offset: int, kind: str, *values: float) -> None:
        changed = plain[:offset] + struct.pack(kind, *values) + plain[offset + struct.calcsize(kind) :]
        files[f"{name}.nii"] = changed
        files[f"{name}.nii.gz"] = gzip.compress(changed, mtime=0)

    for axis in range(8):
        for value in (-1, 0, 32767):
            put(f"dim{axis}-{value}", 40 + 2 * axis, "<h", value)
    put("giant", 40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)
    for axis in range(4):
        for name, number in {"nan": NAN, "inf": INFINITY, "zero": 0.0, "negative": -1.0, "tiny": 1e-38}.items():
            put(f"pixdim{axis}-{name}", 76 + 4 * axis, "<f", number)
    for name, number in {"nan": NAN, "negative": -400.0, "huge": 1e30, "inside": 4.0}.items():
        put(f"offset-{name}", 108, "<f", number)
    for datatype in (0, 1, 3, 128, 256, 1536, 1792, 2048, 2304, 9999):
        put(f"datatype-{datatype}", 70, "<h", datatype)
    put("bits", 72, "<h", 7)
    for name, number in {"nan": NAN, "huge": 1e38, "zero": 0.0}.items():
        put(f"slope-{name}", 112, "<f", number)
        put(f"intercept-{name}", 116, "<f", number)
        put(f"quaternion-{name}", 256, "<3f", number, number, number)
        put(f"origin-{name}", 268, "<3f", number, number, number)
        put(f"matrix-{name}", 280, "<12f", *[number] * 12)
    put("codes", 252, "<2h", 99, -7)
    put("no-codes", 252, "<2h", 0, 0)
    put("magic", 344, "4s", b"none")
    put("pair", 344, "4s", b"ni1\0")
    put("header-size", 0, "<i", 540)
    put("extension", 348, "<4B", 1, 255, 255, 255)
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=9, mtime=0) as out:
        out.write(plain)
        for _ in range(1024):
            out.write(bytes(2**20))
    files["bomb.nii.gz"] = stream.getvalue()
    files["bomb-giant.nii.gz"] = gzip.compress(
        plain[:40] + struct.pack("<8h", 3, 1000, 1000, 1000, 1, 1, 1, 1) + plain[56:], mtime=0
    )
    files["cut-stream.nii.gz"] = packed[: len(packed) // 2]
    files["checksum.nii.gz"] = packed[:-6] + b"\0\0" + packed[-4:]
    files["twice.nii.gz"] = gzip.compress(packed, mtime=0)
    files["not-packed.nii.gz"] = plain
    files["packed.nii"] = packed
    return files


def crafted_text_headers(folder: Path) -> Files:
    bases = volume_bases([".nrrd", ".mha"], folder)
    nrrd, mha = bases["volume.nrrd"], bases["volume.mha"]
    head, voxels = nrrd.split(b"\n\n", 1)
    files = {"nothing.nrrd": b"", "nothing.mha": b"", "no-voxels.nrrd": head + b"\n\n", "no-blank.nrrd": head}

    def nrrd_line(name: str, field_name: bytes, value: bytes | None) -> None:
        lines = [line for line in head.split(b"\n") if not line.startswith(field_name + b":")]
        if value is not None:
            lines.append(field_name + b": " + value)
        files[f"{name}.nrrd"] = b"\n".join(lines) + b"\n\n" + voxels

    for number, value in enumerate(
        (
            b"0 0 0",
            b"-1 20 4",
            b"99999999999999999999 1 1",
            b"2000000 2000000 1",
            b"1000 1000 1000",
            b"24 20",
            b"nan",
            b"",
        )
    ):
        nrrd_line(f"sizes{number}", b"sizes", value)
    for value in (b"0", b"-3", b"17", b"2", b"4", b"x"):
        nrrd_line(f"dimension{value.decode()}", b"dimension", value)
    directions = (
        b"(nan,0,0) (0,1,0) (0,0,1)", b"(0,0,0) (0,0,0) (0,0,0)", b"(1,0,0) (1,0,0) (0,0,1)", b"none none none",
        b"(inf,0,0) (0,1,0) (0,0,1)", b"(1,0) (0,1)", b"((((",
    )  # fmt: skip
    for number, value in enumerate(directions):
        nrrd_line(f"directions{number}", b"space directions", value)
    for number, value in enumerate((b"(nan,nan,nan)", b"(1e400,0,0)", b"(1,2)", b"x")):
        nrrd_line(f"origin{number}", b"space origin", value)
    for value in (b"bzip2", b"ascii", b"hex", b"raw", b"unknown", b""):
        nrrd_line(f"encoding-{value.decode() or 'none'}", b"encoding", value)
    for value in (b"block", b"double", b"int64", b"complex", b"uint8"):
        nrrd_line(f"type-{value.decode()}", b"type", value)
    for number, value in enumerate((b"/etc/passwd", b"../nothing.raw", b"LIST", b"x%d.raw 1 99999999 1", b"/dev/zero")):
        nrrd_line(f"data-file{number}", b"data file", value)
    for name in (b"type", b"sizes", b"dimension", b"encoding", b"space", b"endian"):
        nrrd_line(f"without-{name.decode()}", name, None)
    nrrd_line("skip", b"byte skip", b"999999999999")
    nrrd_line("back", b"line skip", b"-5")
    nrrd_line("kinds", b"kinds", b"vector domain domain")
    nrrd_line("bomb", b"sizes", b"1000 1000 400")
    files["bomb.nrrd"] = files["bomb.nrrd"].split(b"\n\n", 1)[0] + b"\n\n" + gzip.compress(bytes(800 * 10**6), mtime=0)
    files["overfull.nrrd"] = head + b"\n\n" + gzip.compress(bytes(500 * 10**6), mtime=0)
    files["long-line.nrrd"] = head + b"\ncontent: " + b"x" * 2**22 + b"\n\n" + voxels
    files["many-lines.nrrd"] = head + b"".join(b"\nk%d:=v" % n for n in range(100_000)) + b"\n\n" + voxels

    def mha_line(name: str, key: bytes, value: bytes | None) -> None:
        lines = mha.split(b"ElementDataFile = LOCAL\n", 1)
        kept = [line for line in lines[0].split(b"\n") if line and not line.startswith(key + b" =")]
        if value is not None and key != b"ElementDataFile":
            kept.append(key + b" = " + value)
        place = value if key == b"ElementDataFile" and value is not None else b"LOCAL"
        files[f"{name}.mha"] = b"\n".join(kept) + b"\nElementDataFile = " + place + b"\n" + lines[1]

    for number, value in enumerate(
        (b"0 0 0", b"-1 20 4", b"99999999999 1 1", b"2000000 2000000 1", b"1000 1000 1000", b"24")
    ):
        mha_line(f"sizes{number}", b"DimSize", value)
    for number, value in enumerate((b"nan nan nan", b"0 0 0", b"-1 1 1", b"1e400 1 1", b"1")):
        mha_line(f"spacing{number}", b"ElementSpacing", value)
        mha_line(f"place{number}", b"Offset", value)
    for number, value in enumerate((b"0 0 0 0 0 0 0 0 0", b"nan 0 0 0 1 0 0 0 1", b"1 0 0 1 0 0 0 0 1", b"1 0")):
        mha_line(f"matrix{number}", b"TransformMatrix", value)
    for value in (b"0", b"-1", b"2", b"4", b"11", b"x"):
        mha_line(f"axes{value.decode()}", b"NDims", value)
    for value in (b"MET_DOUBLE", b"MET_STRING", b"MET_UCHAR", b"NONE"):
        mha_line(f"type-{value.decode()}", b"ElementType", value)
    for value in (b"0", b"-1", b"9999999"):
        mha_line(f"channels{value.decode()}", b"ElementNumberOfChannels", value)
    for number, value in enumerate((b"/etc/passwd", b"nothing.raw", b"LIST", b"x%d.raw 1 99999 1", b"/dev/zero", b"")):
        mha_line(f"data-file{number}", b"ElementDataFile", value)
    for key in (b"NDims", b"DimSize", b"ElementType", b"ObjectType"):
        mha_line(f"without-{key.decode()}", key, None)
    mha_line("packed", b"CompressedData", b"True")
    mha_line("packed-size", b"CompressedDataSize", b"99999999999")
    mha_line("header-size", b"HeaderSize", b"99999999")
    files["long-line.mha"] = b"Comment = " + b"x" * 2**22 + b"\n" + mha
    return files


DICOM_VALUES: dict[str, tuple[Any, ...]] = {
    "Rows": (0, 1, 65535), "Columns": (0, 1, 65535), "BitsAllocated": (0, 1, 7, 8, 32, 64, 65535),
    "BitsStored": (0, 1, 16, 17, 65535), "HighBit": (0, 15, 65535), "PixelRepresentation": (1, 2, 65535),
    "SamplesPerPixel": (0, 2, 3, 4, 65535), "PlanarConfiguration": (1, 7),
    "PhotometricInterpretation": ("", "MONOCHROME1", "PALETTE COLOR", "RGB", "YBR_FULL_422", "JUNK"),
    "NumberOfFrames": ("0", "-1", "2", "999999999", "x", "1e3"),
    "PixelSpacing": (["nan", "nan"], ["0", "0"], ["-1", "1"], ["1e400", "1"], ["1"], ["x", "y"], ["1", "1", "1"]),
    "ImageOrientationPatient": (["nan"] * 6, ["0"] * 6, ["1", "0", "0", "1", "0", "0"], ["1"], ["x"] * 6),
    "ImagePositionPatient": (["nan"] * 3, ["1e400", "0", "0"], ["1"], ["x"] * 3),
    "RescaleSlope": ("0", "nan", "1e300", "x", ["1", "2"]), "RescaleIntercept": ("nan", "-1e300", "x"),
    "WindowWidth": ("0", "-5", "nan", "x", ["1", "2"]), "WindowCenter": ("nan", "1e300", "x"),
    "SliceThickness": ("nan", "0", "x"), "SpacingBetweenSlices": ("nan", "0", "-1", "x"),
    "SOPClassUID": ("", "1.2.3", "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.481.3", "x"),
    "Modality": ("SEG", "SR", "", "US"), "SeriesInstanceUID": ("", "x" * 80), "SpecificCharacterSet": ("nonsense",),
    "PixelPaddingValue": (0, 65535), "PixelAspectRatio": (["0", "0"],),
    "PixelData": (b"", b"\0", b"\0" * 7, bytes(20 * 24), bytes(20 * 24 * 4)),
}  # fmt: skip


def with_value(keyword: str, value: Any) -> Callable[[Any], None]:
    def change(dataset: Any) -> None:
        import pydicom
        from pydicom.datadict import dictionary_VR, tag_for_keyword
        from pydicom.dataelem import DataElement

        tag = tag_for_keyword(keyword)
        if value is None:
            dataset.pop(tag, None)
            return
        vr = {"OB or OW": "OW", "US or SS": "US"}.get(dictionary_VR(tag), dictionary_VR(tag))
        with pydicom.config.disable_value_validation():
            if vr in ("DS", "IS"):  # what the standard's number types cannot hold is written as the text it would be
                text = "\\".join(value) if isinstance(value, list) else value
                dataset[tag] = DataElement(tag, "LO", text)
            else:
                dataset[tag] = DataElement(tag, vr, value)

    return change


def crafted_dicom() -> Files:
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    files: Files = {"nothing.dcm": b"", "preamble.dcm": bytes(128) + b"DICM", "zeros.dcm": bytes(4096)}
    for frames, label in ((None, "slice"), (3, "frames")):
        for keyword, values in DICOM_VALUES.items():
            for number, value in enumerate((None, *values)):
                dataset = dicom_dataset(frames)
                with_value(keyword, value)(dataset)
                files[f"{label}-{keyword}-{number}.dcm"] = retyped(dicom_bytes(dataset))
    sound = dicom_bytes(dicom_dataset())
    for name, end in {"unknown": b"99", "big": b"2", "jpeg": b"4.50", "mpeg": b"4.103", "deflated": b"1.99"}.items():
        files[f"syntax-{name}.dcm"] = with_syntax(sound, b"1.2.840.10008.1.2." + end)
    # Meta information as it is, then what unpacks to gigabytes.
    meta_end = 132 + 12 + struct.unpack_from("<I", sound, 140)[0]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(sound[meta_end:]) + b"".join(deflate.compress(bytes(2**20)) for _ in range(3000))
    files["deflate-bomb.dcm"] = (
        with_syntax(sound[:meta_end], DeflatedExplicitVRLittleEndian.encode()) + body + deflate.flush()
    )
    # (0008,1140) of undefined length, an item of undefined length in it, and so on.
    opening = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 2**32 - 1) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 2**32 - 1
    )
    for depth in (50, 5000, 200_000):
        files[f"nested{depth}.dcm"] = sound[:meta_end] + opening * depth + sound[meta_end:]
    files["long-element.dcm"] = (
        sound[:meta_end] + struct.pack("<HH2sHI", 0x0008, 0x2112, b"UN", 0, 2**31 - 1) + sound[meta_end:]
    )
    rle = dicom_bases()["rle.dcm"]
    at = rle.index(b"\xfe\xff\x00\xe0", rle.index(b"\xfe\xff\x00\xe0") + 1) + 8  # after the offset table's item
    for name, header in {
        "segments": (2**32 - 1,),
        "offset": (2, 2**32 - 1, 2**32 - 1),
        "none": (0,),
        "loop": (2, 64, 64),
    }.items():
        packed = struct.pack(f"<{len(header)}I", *header)
        files[f"rle-{name}.dcm"] = rle[:at] + packed + rle[at + len(packed) :]
    j2k = dicom_bases()["jpeg2000.dcm"]
    at = j2k.index(b"\xff\x51") + 6
    for name, sides in {
        "giant": (2**31 - 1, 2**31 - 1),
        "zero": (0, 0),
        "large": (60_000, 60_000),
        "other": (48, 40),
    }.items():
        files[f"jpeg2000-{name}.dcm"] = j2k[:at] + struct.pack(">II", *sides) + j2k[at + 8 :]
    jpeg = flat_bases()["grey.jpg"]
    start = jpeg.index(b"\xff\xc0") + 5
    giant = jpeg[:start] + struct.pack(">HH", 65535, 65535) + jpeg[start + 4 :]
    for name, content in {"as-it-is": jpeg, "giant": giant, "text": b"no jpeg at all", "none": b""}.items():
        files[f"jpeg-{name}.dcm"] = with_frame(content)
    return files


def with_syntax(content: bytes, syntax: bytes) -> bytes:
    """Another transfer syntax in the meta information; its length is kept right."""
    at = content.index(struct.pack("<HH2s", 2, 0x0010, b"UI"))
    (length,) = struct.unpack_from("<H", content, at + 6)
    padded = syntax + b"\0" * (len(syntax) % 2)
    (group,) = struct.unpack_from("<I", content, 140)
    meta = content[:140] + struct.pack("<I", group - length + len(padded)) + content[144:]
    return meta[: at + 6] + struct.pack("<H", len(padded)) + padded + meta[at + 8 + length :]


def with_frame(content: bytes, syntax: str = "1.2.840.10008.1.2.4.50", *, bits: int = 8) -> bytes:
    """A DICOM file whose one frame is compressed, or said to be: a baseline JPEG by default."""
    from pydicom.encaps import encapsulate

    dataset = dicom_dataset()
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([content or b"\0\0"])
    dataset["PixelData"].VR = "OB"
    return dicom_bytes(dataset)


def retyped(content: bytes) -> bytes:
    """Texts that stand in for numbers (see ``with_value``) get back the number's type."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    for keyword in DICOM_VALUES:
        tag = tag_for_keyword(keyword)
        assert tag is not None
        vr = dictionary_VR(tag)
        if vr in ("DS", "IS"):
            head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
            content = content.replace(head + b"LO", head + vr.encode())
    return content


def crafted_series() -> dict[str, Files]:
    """Folders of slices, one of which does not fit the others."""
    folders = {"sound": dicom_series()}
    for keyword, values in DICOM_VALUES.items():
        for number, value in enumerate((None, *values)):
            files = dicom_series(change=with_value(keyword, value))
            folders[f"{keyword}-{number}"] = {name: retyped(content) for name, content in files.items()}
    folders["empty-slice"] = dicom_series(spoilt=b"")
    folders["text-slice"] = dicom_series(spoilt=b"this is text")
    folders["same-slice"] = dicom_series(spoilt=dicom_series()["1.dcm"])
    folders["no-slice"] = {name: content for name, content in dicom_series().items() if name != "2.dcm"}
    return folders


def crafted_tables(good: str) -> Files:
    """CSV manifests; ``good`` is the path of a sound image."""
    head = "image,mask\n"
    rows = f"{good},{good}\n"
    files = {
        "empty": b"",
        "head": head.encode(),
        "nul": (head + f"{good}\0,{good}\n").encode(),
        "nul-name": (head + f"a\0b.png,{good}\n").encode(),
        "utf16": (head + rows).encode("utf-16"),
        "latin": (head + "b\xe4d.png,x.png\n").encode("latin-1"),
        "binary": bytes(range(256)) * 40,
        "long-field": (head + "x" * 300_000 + ",y\n").encode(),
        "long-name": (head + "x" * 5000 + ".png,y.png\n").encode(),
        "open-quote": (head + f'"{good},{good}\n').encode(),
        "quotes": (head + f'"{good}"x,{good}\n').encode(),
        "no-column": b"a,b\n1,2\n",
        "twice": (f"image,image\n{rows}").encode(),
        "surplus": (head + f"{good},{good},1,2,3\n").encode(),
        "folder": (head + f"{Path(good).parent},{good}\n").encode(),
        "device": (head + f"/dev/zero,{good}\n/dev/null,{good}\n").encode(),
        "itself": (head + "itself.csv,itself.csv\n").encode(),
        "home": (head + f"~/x.png,{good}\n").encode(),
        "surrogate": (head + "\udcff.png,x.png\n").encode("utf-8", "surrogateescape"),
        "many": (head + "".join(f"{n}.png,{n}.png\n" for n in range(5000))).encode(),
        "returns": (head + rows).replace("\n", "\r").encode(),
        "group": (f"image,mask,group\n{good},{good},{'g' * 100_000}\n").encode(),
    }
    for number, frame in enumerate(("-1", "1", "9" * 5000, "99999999999999999999999", "1.5", "x", "٣", "0x1", " 0 ")):
        files[f"frame{number}"] = f"image,mask,frame\n{good},{good},{frame}\n".encode()
        files[f"mask-frame{number}"] = f"image,mask,mask_frame\n{good},{good},{frame}\n".encode()
    for number, part in enumerate(("Train", "x", "unused", "test")):
        files[f"part{number}"] = f"image,mask,part\n{good},{good},{part}\n".encode()
    return {f"{name}.csv": content for name, content in files.items()}


# --- families of files on disk ---


@dataclass
class Written:
    """A family as the child process finds it: data folders to check, and inputs to predict."""

    folders: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)


def write_family(
    root: Path,
    bases: Files,
    crafted: Files,
    others: Sequence[bytes],
    *,
    key: int,
    partner: tuple[str, bytes] | None = None,
) -> Written:
    """Every file once as an image beside a sound mask, or (every third) as a mask beside a sound image.

    ``partner`` is the sound file and its suffix; default: a flat one.
    """
    content: Files = {}
    for place, (name, base) in enumerate(bases.items()):
        stem, _, suffix = name.partition(".")
        for number in range(GENERIC):
            generator = np.random.Generator(np.random.Philox(key=[key, place * 1000 + number]))
            kind, data = damaged(base, others, generator)
            content[f"{stem}-{number:03d}-{kind}.{suffix}"] = data
        content[f"{stem}-sound.{suffix}"] = base
    content.update({f"made-{name}": data for name, data in crafted.items()})
    written = Written(folders=[str(root)])
    kind, sound = partner or (".png", encoded("PNG", np.where(picture() > 200, 255, 0).astype(np.uint8)))
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, (name, data) in enumerate(content.items()):
        stem = f"{number:04d}-" + name.replace(".", "_")
        suffix = "." + name.partition(".")[2]
        mine, other = ("masks", "images") if number % 3 == 2 else ("images", "masks")
        (root / mine / f"{stem}{suffix}").write_bytes(data)
        between = ".ome" if suffix.startswith(".ome") else ""  # belongs to the stem, which both share
        (root / other / f"{stem}{between}{kind}").write_bytes(sound)
        written.inputs.append(str(root / mine / f"{stem}{suffix}"))
    return written


FAMILIES = ("flat", "tiff", "nifti", "text-headers", "dicom", "series", "tables")


def write(family: str, root: Path) -> Written:
    root.mkdir(parents=True)
    flat = flat_bases()
    others = [
        flat["grey.png"],
        flat["grey.jpg"],
        flat["grey.bmp"],
        tiff_bases()["deep.tif"],
        dicom_bases()["slice.dcm"],
    ]
    volumes = volume_bases([".nii", ".nii.gz", ".nrrd", ".mha"], root)
    others += volumes.values()
    sound = (".nii", volumes["volume.nii"])
    if family == "flat":
        return write_family(root, flat, crafted_flat(), others, key=1)
    if family == "tiff":
        return write_family(root, tiff_bases(), crafted_tiff(), others, key=2)
    if family == "nifti":
        bases = {name: volumes[name] for name in ("volume.nii", "volume.nii.gz")}
        return write_family(root, bases, crafted_nifti(root), others, key=3, partner=sound)
    if family == "text-headers":
        bases = {name: volumes[name] for name in ("volume.nrrd", "volume.mha")}
        return write_family(root, bases, crafted_text_headers(root), others, key=4, partner=sound)
    if family == "dicom":
        return write_family(root, dicom_bases(), crafted_dicom(), others, key=5)
    written = Written()
    if family == "series":
        folders = crafted_series()
        for number in range(GENERIC):
            generator = np.random.Generator(np.random.Philox(key=[6, number]))
            kind, data = damaged(dicom_series()["2.dcm"], others, generator)
            folders[f"{number:03d}-{kind}"] = dicom_series(spoilt=data)
        for name, files in folders.items():
            for file, data in files.items():
                (root / "images" / name).mkdir(parents=True, exist_ok=True)
                (root / "images" / name / file).write_bytes(data)
            (root / "masks").mkdir(exist_ok=True)
            (root / "masks" / f"{name}.nii").write_bytes(sound[1])
            written.inputs.append(str(root / "images" / name))
        written.folders.append(str(root))
        return written
    good = root / "good.png"
    good.write_bytes(flat["grey.png"])
    for name, data in crafted_tables(str(good)).items():
        (root / name).write_bytes(data)
        written.tables.append(str(root / name))
    return written


# --- the process that opens them ---


def memory_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def open_all(job: Path) -> dict[str, Any]:
    """Check every folder and table, predict every input: what was said, how long it took, how much memory it needed."""
    import logging

    import torch

    from leafseg.config import DataSettings, PreprocessingSettings
    from leafseg.data.transforms import Preprocessor
    from leafseg.data.validate import check_data
    from leafseg.predict import Segmentation, predict_files

    class Threshold:
        """Whatever is brighter than the middle."""

        label_names = ("background", "bright")
        overlapping = False
        preprocessing = PreprocessingSettings()

        def read(self, path: Path, frame: int | None = None) -> Any:
            return Preprocessor(self.preprocessing).read(path, frame)

        def segment(self, images: Any) -> list[Any]:
            probabilities = [image.mean(dim=0, keepdim=True) for image in images]
            return [
                Segmentation(probability=p.numpy(), labels=(p[0] > 0.5).to(torch.uint8).numpy()) for p in probabilities
            ]

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    written = Written(**json.loads(job.read_text()))
    limit = int(address_space() + ADDRESS_SPACE)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = memory_mb()
    findings, predictions, seconds = [], {}, {}
    for data in written.folders + written.tables:
        started = time.monotonic()
        job.with_suffix(".now").write_text(f"check {data}")
        done = check_data(Path(data), settings=DataSettings(mask_threshold=127), threads=2)
        findings += [
            {
                "data": data,
                "severity": f.severity,
                "id": f.id,
                "message": f.message,
                "items": [asdict(i) for i in f.items],
            }
            for f in done.findings
        ]
        json.dumps(done.as_json(), allow_nan=False)
        seconds[f"check {data}"] = time.monotonic() - started
    checked = memory_mb()
    out = job.with_suffix(".out")
    for name in written.inputs:
        started = time.monotonic()
        job.with_suffix(".now").write_text(f"predict {name}")
        try:
            report = predict_files(Threshold(), [Path(name)], out)
            predictions[name] = next(iter(report.failed.values()), "")
        except Exception as error:
            from leafseg.errors import LeafsegError

            if not isinstance(error, LeafsegError):
                raise
            predictions[name] = str(error)
        seconds[name] = time.monotonic() - started
        shutil.rmtree(out, ignore_errors=True)
    return {
        "findings": findings,
        "predictions": predictions,
        "seconds": seconds,
        "memory_mb": [before, checked, memory_mb()],
    }


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS_A_FAMILY - 10, exit=True)
    result = open_all(Path(sys.argv[1]))
    Path(sys.argv[1]).with_suffix(".result").write_text(json.dumps(result))
    sys.exit(0)


# --- the tests ---


def sentences(result: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """What was said, and how long it may be."""
    for finding in result["findings"]:
        yield finding["message"], LISTING
        yield from ((item["text"], LENGTH) for item in finding["items"])
    yield from ((said, LENGTH) for said in result["predictions"].values())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory through Linux's own means")
@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_files_end_in_one_sentence_each(family: str, tmp_path: Path) -> None:
    written = write(family, tmp_path / "data")
    job = tmp_path / "job.json"
    job.write_text(json.dumps(asdict(written)))
    ended = subprocess.run(
        [sys.executable, __file__, str(job)], capture_output=True, text=True, timeout=SECONDS_A_FAMILY, check=False
    )
    now = job.with_suffix(".now")
    assert ended.returncode == 0, (ended.returncode, now.read_text() if now.exists() else "", ended.stderr[-3000:])
    result = json.loads(job.with_suffix(".result").read_text())

    root = str(tmp_path / "data")
    for said, longest in sentences(result):
        assert "\n" not in said, said
        assert "Traceback" not in said, said
        assert "report this message" not in said, said  # an error that no reader foresaw
        assert len(said.replace(root, "")) < longest, said
    # What would stop a training is named by the check: no surprise is left for the prediction.
    stopped = {
        str(Path(finding["data"]) / name)
        for finding in result["findings"]
        if finding["severity"] == "error" and "duplicate" not in finding["id"]
        for item in finding["items"]
        for name in item["files"]
    }
    images = {name: said for name, said in result["predictions"].items() if "/images/" in name}
    unwritable = "no DICOM segmentation can be made"  # the image is sound, but its header lacks what the result names
    surprises = {name: said for name, said in images.items() if said and name not in stopped and unwritable not in said}
    assert not surprises
    slow = {name: round(s, 1) for name, s in result["seconds"].items() if s > SECONDS_A_FILE and "check" not in name}
    assert not slow
    before, _, after = result["memory_mb"]
    assert (after - before) * 2**20 < RESIDENT, result["memory_mb"]

    refused = sum(bool(said) for said in result["predictions"].values())
    count = len(result["predictions"]) + len(written.tables)
    kinds = Counter(finding["id"] for finding in result["findings"])
    print(
        f"{family}: {count} files, {refused} refused by prediction, findings {dict(kinds)}, "
        f"{sum(result['seconds'].values()):.0f} s, memory {result['memory_mb']} MB, "
        f"slowest {max(result['seconds'].items(), key=lambda pair: pair[1])}"
    )
    assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert "RuntimeWarning" not in ended.stderr, ended.stderr[-3000:]  # arithmetic of ours on damaged numbers


@pytest.mark.slow
def test_there_are_at_least_two_thousand_damaged_files(tmp_path: Path) -> None:
    count = 0
    for family in FAMILIES:
        written = write(family, tmp_path / family)
        count += len(written.inputs) + len(written.tables)
        shutil.rmtree(tmp_path / family)
    assert count >= 2000
