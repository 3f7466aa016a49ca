"""The projector of the alignment: exists only while training."""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Sequential):
    """MLP that maps U-Net features to the teacher's width, patch by patch.

    Three linear layers with SiLU between, as in the paper (192 -> 2048 -> 2048 -> 768 at full size).
    """

    def __init__(self, in_features: int, width: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, out_features),
        )

    def forward(self, tap: Tensor) -> Tensor:
        """Tokens ``[B, h*w, out_features]``, row-major, of a tap ``[B, in_features, h, w]``."""
        return super().forward(tap.flatten(2).mT)  # [B, h*w, C]
