"""Embedding-only losses and diagnostics for edit-model LoRAs."""

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
