"""A teacher's patch tokens on disk, so that a frozen encoder runs once an image instead of once an epoch."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leafseg.errors import ConfigError, DataError
from leafseg.files import atomic_path
from leafseg.model.teachers import Teacher

logger = logging.getLogger(__name__)

_MAX_HALF = 65504.0


class FeatureCache:
    """Tokens of one teacher and one grid, half precision, one ``.npy`` file an image, in a folder with a size limit.

    A full cache removes files of other teachers or grids, oldest first, then stops storing. It does not drop its own
    least recently used entry: training walks through all images in turn, so that such a cache would drop each image
    shortly before it comes again, and a cache slightly too small would never be hit.

    Processes may share the folder: files appear whole or not at all. Each counts what lay there when it opened the
    cache and what it wrote itself, so that N processes may exceed the limit by what the others wrote.

    Args:
        directory: where the files lie; made if missing; the limit holds for all of it.
        teacher_fingerprint: ``Teacher.fingerprint``.
        grid: rows and columns of tokens.
        embed_dim: width D of a token.
        max_mb: size limit in MiB.
    Raises:
        ConfigError: if the folder cannot be made.
    """

    def __init__(
        self, directory: Path, *, teacher_fingerprint: str, grid: tuple[int, int], embed_dim: int, max_mb: int
    ) -> None:
        self.teacher_fingerprint = teacher_fingerprint
        self.grid = grid
        self.embed_dim = embed_dim
        self.max_bytes = max_mb * 2**20
        self._shape = (grid[0] * grid[1], embed_dim)
        self._folder = directory / f"{teacher_fingerprint[:16]}-{grid[0]}x{grid[1]}x{embed_dim}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{directory}: teacher.cache_dir cannot be written ({error.strerror}); name a folder that can"
            ) from error
        self._used = 0
        others = []
        for path in directory.rglob("[!.]*.npy"):  # not the hidden files that another process is still writing
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            self._used += stat.st_size
            if not path.is_relative_to(self._folder):
                others.append((stat.st_mtime, path, stat.st_size))
        self._others = [(path, size) for _, path, size in sorted(others, reverse=True)]  # the oldest is last
        self._storing = True

    def get(self, key: str) -> Tensor | None:
        """Stored tokens ``[N, D]`` float32; None if there are none, or the file is damaged.

        Args:
            key: the image's content SHA-256 and its transform state, in any text form that tells them apart.
        """
        path = self._path(key)
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if tokens.shape != self._shape or tokens.dtype != np.float16 or not np.isfinite(tokens).all():
            return None
        return torch.from_numpy(tokens).float()

    def put(self, key: str, tokens: Tensor) -> bool:
        """Stores tokens ``[N, D]``, rounded to half precision; answers whether they were stored.

        They are not if the cache is full, the disk refuses, or a value is beyond half precision's range.

        Raises:
            ValueError: if the shape is not the cache's.
        """
        if tuple(tokens.shape) != self._shape:
            raise ValueError(f"tokens are {list(tokens.shape)}; this cache holds {list(self._shape)}")
        values = tokens.detach().cpu()
        if not self._storing or not bool((values.abs() <= _MAX_HALF).all()):
            return False
        buffer = io.BytesIO()
        np.save(buffer, values.half().numpy(), allow_pickle=False)
        data = buffer.getbuffer()
        path = self._path(key)
        try:
            before = path.stat().st_size if path.is_file() else 0
            self._make_room(len(data) - before)
            if self._used + len(data) - before > self.max_bytes:
                logger.info("%s: feature cache is full; further images are encoded each time", self._folder)
                self._storing = False
                return False
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        except (OSError, DataError) as error:  # a cache only saves time: training goes on without
            logger.warning("features are no longer cached: %s", error)
            self._storing = False
            return False
        self._used += len(data) - before
        return True

    def _make_room(self, size: int) -> None:
        while self._others and self._used + size > self.max_bytes:
            path, other_size = self._others.pop()
            path.unlink(missing_ok=True)
            self._used -= other_size

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.npy"


def cached_tokens(
    teacher: Teacher, cache: FeatureCache, keys: Sequence[str], images: Tensor, grid: tuple[int, int]
) -> Tensor:
    """A teacher's tokens of a batch, computed only for images that are not in the cache.

    Fresh tokens are rounded to half precision like stored ones: a value does not depend on whether it was cached.

    Args:
        teacher: the frozen encoder.
        cache: made for this teacher and grid.
        keys: one an image, see ``FeatureCache.get``.
        images: ``[B, 3, H, W]``, 0..1.
        grid: rows and columns of tokens.
    Returns:
        ``[B, gh*gw, D]`` float32 on the images' device, without gradient.
    Raises:
        ValueError: if the cache is for another teacher or grid, or keys and images differ in number.
    """
    if (cache.teacher_fingerprint, cache.grid) != (teacher.fingerprint, grid):
        raise ValueError(f"the cache holds another teacher's features or another grid than {grid}")
    if len(keys) != len(images):
        raise ValueError(f"{len(keys)} keys for {len(images)} images")
    found = [cache.get(key) for key in keys]
    missing = [index for index, tokens in enumerate(found) if tokens is None]
    if missing:
        fresh = teacher.tokens(images[missing], grid).cpu().clamp(-_MAX_HALF, _MAX_HALF)
        for index, tokens in zip(missing, fresh.half().float(), strict=True):
            cache.put(keys[index], tokens)
            found[index] = tokens
    return torch.stack([tokens for tokens in found if tokens is not None]).to(images.device)
