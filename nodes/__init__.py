"""The nodes. Each file ends in its list; this one joins them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import diagnostics, embeddings, encoders, losses, negatives
from .folders import register_model_folder


class EditLossExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_model_folder()  # not in on_load, which ComfyUI 0.3.75 does not call
        return [*encoders.NODES, *embeddings.NODES, *negatives.NODES, *losses.NODES, *diagnostics.NODES]
