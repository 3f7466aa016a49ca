"""The only source of randomness: draws keyed by (seed, stream, position) from a counter-based generator.

A draw depends on nothing but its key, so that neither the order of execution, the batch it falls into, the number of
workers or processes, nor a restart can change it. NumPy's Philox is used because runtimes without torch (ONNX Runtime,
OpenVINO) must be able to draw the same numbers.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MASK_64 = (1 << 64) - 1


@lru_cache(maxsize=256)
def _stream_id(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")


def generator(seed: int, stream: str, position: int = 0) -> np.random.Generator:
    """A generator for one key.

    Args:
        seed: the run's seed; any integer, taken modulo 2**64.
        stream: what the draw is for, e.g. ``"noise"``; streams never overlap.
        position: global sample position, epoch or step: whatever indexes the draw; taken modulo 2**64.
    """
    # The low counter words advance as numbers are drawn; the position sits in a high word, so keys cannot collide.
    counter = np.array([0, 0, position & _MASK_64, 0], dtype=np.uint64)
    key = np.array([seed & _MASK_64, _stream_id(stream)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, stream: str, position: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal float32 draws of ``shape`` for one key."""
    return generator(seed, stream, position).standard_normal(shape, dtype=np.float32)


def permutation(seed: int, stream: str, position: int, n: int) -> NDArray[np.int64]:
    """A permutation of ``range(n)`` for one key (the shuffle of one epoch)."""
    return generator(seed, stream, position).permutation(n)


def torch_seed(seed: int, stream: str, position: int) -> int:
    """A 63-bit seed for code that only knows torch's own generator (dropout)."""
    return int(generator(seed, stream, position).integers(0, 2**63 - 1))


def content_position(key: str) -> int:
    """A position derived from a content key (hex SHA-256), for draws that belong to an image rather than to a step."""
    return int(key[:16], 16)
