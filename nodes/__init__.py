"""The nodes. Each file ends in its list; this one joins them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    demo,
    demo_pictures,
    diagnose_outputs,
    embeddings,
    encoder_audit,
    encoders,
    evaluate_objective,
    losses,
    negatives,
    pair_audit,
    pair_variants,
    pairs,
    run_report,
    self_check,
    training,
    training_export,
    training_options,
)
from .folders import register_model_folders
from .search_words import findable


class EditLossExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_model_folders()  # not in on_load, which ComfyUI 0.3.75 does not call
        rooms = (
            encoders, embeddings, negatives, losses, evaluate_objective, diagnose_outputs, encoder_audit, pair_audit, pairs, pair_variants, training,
            training_export, training_options, self_check, run_report, demo, demo_pictures,
        )  # fmt: skip
        return [findable(node) for room in rooms for node in room.NODES]
