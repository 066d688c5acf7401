"""A LoRA of FLUX.1 in ComfyUI's keys and in diffusers', and the way between them.

ComfyUI keeps queries, keys and values of a block in one layer (in single blocks with the MLP's input), diffusers each in a
layer of its own. A LoRA B·A of the whole layer is one for each part, with the same A and the part's rows of B. A LoRA for
each part is one for the whole layer with all of their A below one another and their B as blocks on the diagonal; its rank
is the sum of theirs. Both ways are exact, and back again gives the ranks that there were.

The last layer's modulation has shift and scale in the opposite order.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Union

import torch
from torch import Tensor

from ..files import write_safetensors
from .lora import PREFIX, LoRA

COMFYUI, DIFFUSERS = "ComfyUI", "diffusers"
PREFIXES = {COMFYUI: PREFIX, DIFFUSERS: "transformer."}
SUFFIXES = {COMFYUI: ("lora_down.weight", "lora_up.weight"), DIFFUSERS: ("lora_A.weight", "lora_B.weight")}
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers writes rank and alpha

# ComfyUI's layer → diffusers', inside a block. Several are the rows of the one, from above.
DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
BLOCKS = (
    ("double_blocks", "transformer_blocks", DOUBLE_BLOCK),
    ("single_blocks", "single_transformer_blocks", SINGLE_BLOCK),
)
SWAPPED = "final_layer.adaLN_modulation.1"  # its halves
MLP_RATIO = 4  # rows of proj_mlp for each of to_q's, in every FLUX


class Update(NamedTuple):
    """(alpha / rank) · up · down of one layer: down ``[rank, in]``, up ``[out, rank]``."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


Updates = Mapping[str, Update]  # layer, without prefix → its update


def comfyui_name(layer: str) -> tuple[str, int]:
    """diffusers' layer → (ComfyUI's, which of its parts).

    >>> comfyui_name("single_transformer_blocks.3.proj_mlp")
    ('single_blocks.3.linear1', 3)
    """
    for ours, theirs, inside in BLOCKS:
        head, _, rest = layer.partition(".")
        number, _, name = rest.partition(".")
        if head == theirs:
            return next(
                ((f"{ours}.{number}.{whole}", parts.index(name)) for whole, parts in inside.items() if name in parts),
                ("", 0),
            )
    return next(((whole, 0) for whole, (part,) in OUTSIDE.items() if part == layer), ("", 0))


def diffusers_names(layer: str) -> tuple[str, ...]:
    """ComfyUI's layer → diffusers'; none for a layer that FLUX does not have.

    >>> diffusers_names("double_blocks.0.txt_attn.proj")
    ('transformer_blocks.0.attn.to_add_out',)
    """
    for ours, theirs, inside in BLOCKS:
        head, _, rest = layer.partition(".")
        number, _, name = rest.partition(".")
        if head == ours:
            return tuple(f"{theirs}.{number}.{part}" for part in inside.get(name, ()))
    return OUTSIDE.get(layer, ())


def split(updates: Updates) -> dict[str, Update]:
    """ComfyUI's updates as diffusers': the same A, the part's rows of B, without what is zero in them.

    Raises:
        ValueError: for a layer that FLUX does not have, or of a size that it cannot have.
    """
    found: dict[str, Update] = {}
    for layer, update in updates.items():
        names = diffusers_names(layer)
        if not names:
            raise ValueError(f"lora: FLUX has no layer {layer!r} in ComfyUI's names")
        if layer == SWAPPED:
            update = update._replace(up=torch.cat(update.up.chunk(2)[::-1]))
        if len(names) == 1:
            found[names[0]] = update
            continue
        width = update.down.shape[1]
        sizes = [width] * 3 + [len(update.up) - 3 * width] * (len(names) - 3)
        if sum(sizes) != len(update.up) or min(sizes) < 1:
            raise ValueError(f"lora: {layer} has {len(update.up)} outputs for {width} inputs, which FLUX's do not")
        parts = dict(zip(names, (_without_zeros(update, up) for up in update.up.split(sizes))))
        teaching = {name: part for name, part in parts.items() if part.rank}
        found |= teaching or {name: update._replace(up=up) for name, up in zip(names, update.up.split(sizes))}
    return found


def _without_zeros(update: Update, up: Tensor) -> Update:
    """The update of some rows, with the ranks that do something there."""
    used = up.ne(0).any(0)
    if bool(used.all()):
        return update._replace(up=up.contiguous())
    down = update.down[used]
    return Update(down, up[:, used].contiguous(), update.alpha * len(down) / update.rank)


def fuse(updates: Updates) -> dict[str, Update]:
    """diffusers' updates as ComfyUI's: parts that share their A keep its rank, others stand beside one another.

    A part that has no update gets rows of zeros.

    Raises:
        ValueError: for a layer that FLUX does not have, or parts that do not fit together.
    """
    groups: dict[str, dict[int, Update]] = {}
    for layer, update in updates.items():
        whole, part = comfyui_name(layer)
        if not whole:
            raise ValueError(f"lora: FLUX has no layer {layer!r} in diffusers' names")
        groups.setdefault(whole, {})[part] = update
    found = {}
    for whole, parts in groups.items():
        count = len(diffusers_names(whole))
        found[whole] = parts[0] if count == 1 else _fused(whole, parts, count)
        if whole == SWAPPED:
            found[whole] = found[whole]._replace(up=torch.cat(found[whole].up.chunk(2)[::-1]))
    return found


def _fused(whole: str, parts: Mapping[int, Update], count: int) -> Update:
    width = next(iter(parts.values())).down.shape[1]
    rows = [width] * 3 + [MLP_RATIO * width] * (count - 3)
    for part, update in parts.items():
        if update.down.shape[1] != width or (part < 3 and len(update.up) != width):
            raise ValueError(
                f"lora: the parts of {whole} do not fit together: expected {width}×{width} for queries, keys and values, got "
                f"{len(update.up)}×{update.down.shape[1]}"
            )
        rows[part] = len(update.up)
    first = next(iter(parts.values()))
    downs: list[Tensor] = []  # each once
    places: dict[int, slice] = {}
    for part, update in parts.items():
        start = 0
        for down in downs:
            if down.shape == update.down.shape and torch.equal(down, update.down):
                break
            start += len(down)
        else:
            downs.append(update.down)
        places[part] = slice(start, start + update.rank)
    rank = sum(map(len, downs))
    up = first.up.new_zeros(sum(rows), rank)
    for part, update in parts.items():
        top = sum(rows[:part])
        # Where alpha / rank is the same everywhere, as one trainer makes it, no number is changed.
        same = update.scale == first.scale
        up[top : top + rows[part], places[part]] = update.up if same else update.up * (update.scale / first.scale)
    return Update(torch.cat(downs), up, first.alpha * rank / first.rank)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def to_tensors(updates: Updates, dialect: str, dtype: Optional[torch.dtype] = None) -> dict[str, Tensor]:
    """What a file of the dialect holds; alpha is float32 always."""
    state = {}
    for layer, update in updates.items():
        for suffix, value in zip(SUFFIXES[dialect], update[:2]):
            # A copy: parts of one layer share their A, which safetensors refuses.
            state[f"{PREFIXES[dialect]}{layer}.{suffix}"] = value.to(dtype or value.dtype, copy=True).contiguous()
        state[f"{PREFIXES[dialect]}{layer}.alpha"] = torch.tensor(float(update.alpha))
    return state


def from_tensors(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] = {},  # noqa: B006
) -> tuple[str, dict[str, Update]]:
    """(dialect, updates) of a file.

    Either dialect may use either one's suffixes. Alpha is the layer's ``.alpha``, else what diffusers wrote into the header,
    else the rank, as loaders take it.

    Raises:
        ValueError: for a file of another kind, and for layers that lack a half.
    """
    dialect = next((d for d, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in state)), None)
    strange = [key for key in state if dialect is None or not key.startswith(PREFIXES[dialect])]
    if strange:
        raise ValueError(
            f"lora: expected names that begin with {' or '.join(map(repr, PREFIXES.values()))}, all with the same, got "
            f"{strange[0]!r}"
        )
    halves: dict[str, dict[str, Tensor]] = {}
    endings = {suffix: half for pair in SUFFIXES.values() for half, suffix in zip(("down", "up"), pair)} | {
        "alpha": "alpha"
    }
    for key, value in state.items():
        name = key[len(PREFIXES[dialect]) :]
        ending = next((e for e in endings if name.endswith(f".{e}")), None)
        if ending is None:
            raise ValueError(
                f"lora: expected a plain LoRA, got {key!r}, which is neither of its matrices nor its alpha"
            )
        halves.setdefault(name[: -len(ending) - 1], {})[endings[ending]] = value
    updates, header = {}, json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    for layer, found in halves.items():
        if not {"down", "up"} <= found.keys() or found["down"].ndim != 2 or found["up"].ndim != 2:
            raise ValueError(f"lora: expected two matrices for {layer}, got {', '.join(sorted(found))}")
        if len(found["down"]) != found["up"].shape[1]:
            raise ValueError(
                f"lora: the matrices of {layer} have ranks {len(found['down'])} and {found['up'].shape[1]}"
            )
        alpha = float(found["alpha"]) if "alpha" in found else _alpha(header, layer, len(found["down"]))
        updates[layer] = Update(found["down"], found["up"], alpha)
    return dialect, updates


def _alpha(header: Mapping[str, Any], layer: str, rank: int) -> float:
    """As diffusers wrote it."""
    if header.get("transformer.use_rslora"):
        raise ValueError("lora: rank-stabilised LoRA (use_rslora) has another scale, which no file of ComfyUI can say")
    patterns = header.get("transformer.alpha_pattern") or {}
    own = next((value for name, value in patterns.items() if layer == name or layer.endswith(f".{name}")), None)
    return float(own if own is not None else header.get("transformer.lora_alpha", rank))


def converted(updates: Updates, dialect: str, wanted: str) -> Updates:
    """Updates of one dialect in the other."""
    if dialect == wanted:
        return updates
    return split(updates) if wanted == DIFFUSERS else fuse(updates)


def save_both(
    lora: LoRA, path: Union[str, Path], metadata: Optional[Mapping[str, str]] = None, dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """A LoRA of FLUX in both dialects: NAME.safetensors in ComfyUI's keys, NAME_diffusers.safetensors in diffusers'.

    Args:
        lora: on a network of either program.
        path: NAME.safetensors.
        metadata: texts by name; the settings are added as JSON under ``lora``.
        dtype: of the matrices in the files.
    """
    path = Path(path)
    own = COMFYUI if any(name.startswith("double_blocks.") for name in lora.targets) else DIFFUSERS
    updates = {
        name: Update(layer.down.detach().cpu(), layer.up.detach().cpu(), lora.settings.alpha)
        for name, layer in zip(lora.targets, lora.layers)
    }
    texts = {**(metadata or {}), "lora": json.dumps(asdict(lora.settings))}
    paths = path, path.with_name(f"{path.stem}_diffusers{path.suffix}")
    for target, dialect in zip(paths, (COMFYUI, DIFFUSERS)):
        write_safetensors(target, to_tensors(converted(updates, own, dialect), dialect, dtype), texts)
    return paths
