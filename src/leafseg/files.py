"""Writing files so that a reader never meets a half-written one: beside the target first, then renamed over it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from leafseg.errors import DataError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path``, with the same suffix, that replaces ``path`` when the block succeeds.

    Missing folders are made. On any failure the temporary file is removed and what stood at ``path`` is untouched.

    Raises:
        DataError: if the system refuses to write (no permission, disk full, a parent that is a file).
    """
    temporary = path.parent / f".tmp-{secrets.token_hex(6)}-{path.name[-40:]}"
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise DataError(
                f"{path}: cannot be written ({reason}); the folder must be writable and have free space, "
                "choose another place or free some"
            ) from error
    finally:
        with suppress(OSError):  # a parent that is a file: nothing was written there
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; it is on disk, whole, before the name points to it.

    Raises:
        DataError: if the system refuses to write.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused, because other readers reject them.

    Raises:
        DataError: if the system refuses to write.
        ValueError: if the value holds NaN or infinity.
        TypeError: if the value is not made of JSON types.
    """
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append one line as UTF-8; it is on disk when this returns. A torn last line is closed first.

    Raises:
        DataError: if the system refuses to write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); the folder must be writable and have free space"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: if the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); restore or remove it") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, not an object; restore or remove it")
    return value


def check_new_folder(out: Path) -> None:
    """Before any work is done: ``out`` must not exist, or be empty.

    Raises:
        DataError: if it is taken, or is the folder that the process works in.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise DataError(f"{out}: exists already and is not an empty folder; choose another --out")
    if out.exists() and out.samefile("."):  # it would be replaced under the feet of whoever stands in it
        raise DataError(f"{out}: is the folder that this command runs in; give --out a folder of its own")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when the block succeeds, and is removed when it fails.

    Its files get the rights that new files have here: safetensors writes ones that only their owner may read.

    Raises:
        DataError: if ``out`` is taken, or the system refuses to write.
    """
    from safetensors import SafetensorError

    check_new_folder(out)
    target = Path(os.path.realpath(out))  # a name such as `a/..` has nothing beside it
    partial = target.parent / f".partial-{secrets.token_hex(6)}-{target.name[-40:]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        probe = partial / ".mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        os.replace(partial, target)  # an empty folder gives way
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(
            f"{out}: cannot be written ({reason}); the folder must be writable and have free space, "
            "choose another place or free some"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
