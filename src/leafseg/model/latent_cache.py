"""Latents of masks that come again: the frozen encoder need not see the same drawing twice."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class LatentCache:
    """Mask latents in memory, by key; never evicts, so that an epoch that does not fit still hits what is kept.

    Each latent is computed by itself: it is then the same to the bit whatever batch it is asked for in, and a resumed
    training, whose cache is empty, continues exactly.

    Args:
        max_mb: memory that it may use; 0 keeps nothing.
    """

    def __init__(self, max_mb: int) -> None:
        self._room = max_mb * 2**20
        self._kept: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def latents(self, keys: Sequence[Hashable], compute: Callable[[int], Tensor]) -> Tensor:
        """``[B, z, h, w]`` for B keys; ``compute(i)`` gives ``[1, z, h, w]`` of the i-th where it is not kept."""
        rows = []
        for position, key in enumerate(keys):
            latent = self._kept.get(key)
            if latent is None:
                latent = compute(position)
                n_bytes = latent.numel() * latent.element_size()
                if n_bytes <= self._room:
                    self._room -= n_bytes
                    self._kept[key] = latent
            rows.append(latent)
        return torch.cat(rows)
