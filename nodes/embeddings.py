"""Encode pictures by role, and keep embeddings in files."""

from __future__ import annotations

from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..editloss_core.embeddings import INDEX, EmbeddingSet, load_shards
from . import folders
from .checks import checked
from .notices import say
from .sockets import EmbeddingsSocket, EncoderSocket

CATEGORY = "EditLoss/embeddings"
EMBEDDINGS_OUTPUT = EmbeddingsSocket.Output(
    display_name="embeddings", tooltip="Roles × encoders. Goes to the next Encode, to Save or to Evaluate Objective."
)


def _picture(name: str, tooltip: str) -> io.Image.Input:
    return io.Image.Input(name, optional=True, tooltip=tooltip)


class Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossEncode",
            display_name="Encode by Role",
            category=CATEGORY,
            description="Encodes pictures with one encoder and files them by role. Chain one Encode per encoder.",
            inputs=[
                EncoderSocket.Input("encoder", tooltip="What turns pictures into embeddings."),
                _picture("pred", "The outputs to judge: one or a batch."),
                _picture("gt", "The after picture: one for all outputs, or one each."),
                _picture("src", "The before picture: one for all outputs, or one each."),
                _picture("overlay", "Overlay negatives from Overlay Negative; several per pair are fine."),
                _picture("hard_negative", "Earlier bad outputs from Draw Hard Negatives; several per pair are fine."),
                io.Mask.Input("mask", optional=True, tooltip="The edit region, white = edited. Losses then look there alone."),
                EmbeddingsSocket.Input("embeddings", optional=True, tooltip="Embeddings so far, of another encoder."),
                io.Int.Input(
                    "batch_size", default=8, min=1, max=256, optional=True,
                    tooltip="Pictures per pass. Lower it when memory is short; the result is the same.",
                ),
            ],
            outputs=[EMBEDDINGS_OUTPUT],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, encoder, pred=None, gt=None, src=None, overlay=None, hard_negative=None, mask=None, embeddings=None,
        batch_size=8,
    ) -> io.NodeOutput:  # fmt: skip
        roles = {"pred": pred, "gt": gt, "src": src, "overlay": overlay, "hard_negative": hard_negative}
        images = {role: batch[..., :3] for role, batch in roles.items() if batch is not None}
        if not images:
            raise ValueError(f"Connect at least one picture: {', '.join(roles)}")
        bar = ProgressBar(sum(len(batch) for batch in images.values()))
        result = (embeddings or EmbeddingSet()).with_images(
            encoder, images, batch_size, lambda done, total: bar.update_absolute(done, total)
        )
        result = result if mask is None else result.with_mask(mask)
        return io.NodeOutput(result, ui=say(cls, result.describe()))


class SaveEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossSaveEmbeddings",
            display_name="Save Embeddings",
            category=CATEGORY,
            description="Writes embeddings to output/editloss/embeddings as safetensors, with what made them.",
            inputs=[
                EmbeddingsSocket.Input("embeddings", tooltip="What to write."),
                io.String.Input(
                    "file_name", default="pairs",
                    tooltip="Without ending; '/' makes subfolders. A file of the same name is replaced.",
                ),
            ],
            outputs=[EMBEDDINGS_OUTPUT],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, embeddings, file_name) -> io.NodeOutput:
        path = embeddings.save(folders.embedding_file_to_write(file_name))
        return io.NodeOutput(embeddings, ui=say(cls, f"{path.name}\n{embeddings.describe()}"))


class LoadEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossLoadEmbeddings",
            display_name="Load Embeddings",
            category=CATEGORY,
            description="Reads embeddings from output or input/editloss/embeddings. Connect what they must come from, and a "
            "stale or foreign file is refused with a reason.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.embedding_files() or [folders.NO_EMBEDDINGS],
                    tooltip="A file written by Save Embeddings, or a folder of shards. Press R to refresh.",
                ),
                EncoderSocket.Input(
                    "encoder", optional=True, tooltip="Refuse the file unless it was made by this encoder."
                ),
                _picture("gt", "Refuse the file unless its after pictures are these."),
                _picture("src", "Refuse the file unless its before pictures are these."),
            ],
            outputs=[EMBEDDINGS_OUTPUT],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool:
        return True  # the list may be older than the folder; execute looks at the folder and names what is there

    @classmethod
    def fingerprint_inputs(cls, file, **_) -> str | float:
        return folders.state_of(folders.embedding_file_to_read, file)

    @classmethod
    @checked("file")
    def execute(cls, file, encoder=None, gt=None, src=None) -> io.NodeOutput:
        path = folders.embedding_file_to_read(file)
        images = {role: batch[..., :3] for role, batch in (("gt", gt), ("src", src)) if batch is not None}
        wanted = [encoder] if encoder is not None else []
        if path.name == INDEX:
            if images:
                raise ValueError(
                    f"{next(iter(images))}: expected nothing, {path.parent.name} is a folder of shards, which knows its pairs by "
                    "their files and not by pictures; leave gt and src unconnected"
                )
            loaded = load_shards(path.parent, wanted)
        else:
            loaded = EmbeddingSet.load(path, wanted, images)
        return io.NodeOutput(loaded, ui=say(cls, loaded.describe()))


NODES = [Encode, SaveEmbeddings, LoadEmbeddings]
