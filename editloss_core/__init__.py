"""Embedding-only losses and diagnostics for edit-model LoRAs."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .losses import (
        contrastive_pair_loss,
        feature_match_loss,
        info_nce_loss,
        loss_geometry_match,
        loss_no_edit_identity,
        loss_overlay_avoidance,
        margin_ranking_on_distances,
        multi_negative_ranking_loss,
        pair_distance,
        triplet_margin_loss,
    )

__version__ = "0.1.0"

__all__ = [
    "contrastive_pair_loss",
    "feature_match_loss",
    "info_nce_loss",
    "loss_geometry_match",
    "loss_no_edit_identity",
    "loss_overlay_avoidance",
    "margin_ranking_on_distances",
    "multi_negative_ranking_loss",
    "pair_distance",
    "triplet_margin_loss",
]


def __getattr__(name: str) -> Any:
    """Imported on first use: a command line that prints its help does not wait for torch."""
    if name in __all__ or name == "losses":
        from .losses import __name__ as module

        losses = sys.modules[module]
        return losses if name == "losses" else getattr(losses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "losses"})
