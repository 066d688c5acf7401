"""What a run takes, by arithmetic: parameters, memory by part, bytes between processes. Nothing is loaded for it.

These are sums over shapes, not measurements: a framework's own buffers, fragmentation, kernels' workspaces and the
objective's encoders come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from torch import nn

from .base import EditModel
from .folder import DTYPES

# Bytes a weight of a linear layer takes; the rest of the network keeps its dtype. nf4: half a byte, and a float32 scale for
# each 64 weights; int8: a byte (the scale of a row is nothing beside it).
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "torchao_int8": 1.0}
# Bytes of state a trained parameter takes: two float32 moments; two of a byte; Prodigy's two and two more vectors.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.0, "prodigy": 16.0}
MASTER_BYTES = 4  # LoRA parameters and their gradients are float32


@dataclass(frozen=True)
class Footprint:
    """Numbers of one configuration; bytes are of one process.

    Attributes:
        parameters: of the transformer, all frozen.
        linear: those of them that are weights of linear layers, which quantisation packs.
        width, blocks: of the transformer.
        block_values: numbers per token and width that a block keeps for its backward pass, beside its input.
        layers: that get a LoRA.
        trainable: parameters of the LoRA.
    """

    parameters: int
    linear: int
    width: int
    blocks: int
    layers: int
    trainable: int
    block_values: int

    @classmethod
    def of(cls, model: EditModel, network: nn.Module, adapted: Sequence[tuple[int, int]], rank: int) -> Footprint:
        """Of a network, with or without weights.

        Args:
            model: that it is of.
            network: diffusers' class.
            adapted: (in, out) of each layer that gets a LoRA.
            rank: of the LoRA.
        """
        return cls(
            parameters=sum(p.numel() for p in network.parameters()),
            linear=sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear)),
            width=getattr(network, model.width_attribute),
            blocks=sum(len(getattr(network, name)) for name in model.block_attributes),
            layers=len(adapted),
            trainable=sum(rank * sum(sizes) for sizes in adapted),
            block_values=model.block_values,
        )

    def weight_bytes(self, dtype: str = "bf16", quantization: str = "none", shards: int = 1) -> int:
        """Of the frozen weights; ``shards``: processes that share them (FSDP)."""
        size = DTYPES[dtype].itemsize
        packed = QUANTIZED_BYTES.get(quantization, size)
        return int(((self.parameters - self.linear) * size + self.linear * packed) / shards)

    def lora_bytes(self, optimizer: str = "adamw", ema: bool = False) -> dict[str, int]:
        """Part → bytes: the LoRA's parameters, gradients, optimiser state and moving average."""
        each = {"LoRA": MASTER_BYTES, "gradients": MASTER_BYTES, "optimizer": OPTIMIZER_BYTES[optimizer]}
        if ema:
            each["moving average"] = MASTER_BYTES
        return {name: int(self.trainable * size) for name, size in each.items()}

    def activation_bytes(self, tokens: int, batch: int, dtype: str = "bf16", checkpointing: bool = True) -> int:
        """Of the transformer's forward pass: every block's input, and what one block keeps (or all of them).

        Args:
            tokens: of one sample, see :meth:`.EditModel.sample_tokens`.
            batch: samples of a pass in this process.
        """
        kept = self.blocks + self.block_values if checkpointing else self.blocks * (1 + self.block_values)
        return batch * tokens * self.width * kept * DTYPES[dtype].itemsize

    def exchanged_bytes(self, processes: int, dtype: str = "bf16", sharded: bool = False) -> dict[str, int]:
        """What each process receives in an optimiser step of one pass, by what it is for.

        Gradients of the LoRA are summed over the processes (a ring sends 2·(n − 1)/n of them). Sharded weights are gathered
        for the forward and once more for the backward pass, whose recomputation uses the same ones; they are frozen, so
        that nothing is reduced.
        """
        share = (processes - 1) / processes
        found = {"gradients of the LoRA": int(2 * share * self.trainable * MASTER_BYTES)}
        if sharded:
            found["weights"] = int(2 * share * self.weight_bytes(dtype))
        return found

    def step_flops(self, tokens: int, batch: int, checkpointing: bool = True) -> int:
        """Products and sums of a forward and a backward pass, counted apart: 2 for each weight that a token meets, 12·d² in a
        block of either kind, and attention's 4·d for each pair of tokens.

        The backward pass of a frozen layer is that to its input alone, as much as its forward pass; that of attention two and
        a half times its own. Checkpointing computes the forward pass again.
        """
        linear = 2 * 12 * self.width**2 * tokens
        attention = 4 * self.width * tokens**2
        again = int(checkpointing)
        return int(batch * self.blocks * (linear * (2 + again) + attention * (3.5 + again)))
