"""A LoRA in ComfyUI's keys and in diffusers', and the way between them; which layers are which, the model's file says.

ComfyUI keeps queries, keys and values of a block in one layer (in single blocks with the MLP's input), diffusers each in a
layer of its own. A LoRA B·A of the whole layer is one for each part, with the same A and the part's rows of B. A LoRA for
each part is one for the whole layer with all of their A below one another and their B as blocks on the diagonal; its rank
is the sum of theirs. Both ways are exact, and back again gives the ranks that there were.

Some layers have their halves in the opposite order.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Collection, Mapping, NamedTuple, Optional, Union

import torch
from torch import Tensor

from ..files import write_safetensors
from ..models.base import EditModel, LayerNames
from ..models.registry import dotted, of_layers, titles
from .lora import MODEL_METADATA, PREFIX, LoRA

COMFYUI, DIFFUSERS = "ComfyUI", "diffusers"
PREFIXES = {COMFYUI: PREFIX, DIFFUSERS: "transformer."}
# Whose layers they are where dots became underscores: by kohya's sd-scripts, and by OneTrainer.
UNDERSCORED = {"lora_unet_": COMFYUI, "lora_transformer_": DIFFUSERS}
SUFFIXES = {COMFYUI: ("lora_down.weight", "lora_up.weight"), DIFFUSERS: ("lora_A.weight", "lora_B.weight")}
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers writes rank and alpha


class Update(NamedTuple):
    """(alpha / rank) · up · down of one layer: down ``[rank, in]``, up ``[out, rank]``; alpha None is the rank, left unsaid."""

    down: Tensor
    up: Tensor
    alpha: Optional[float]

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


Updates = Mapping[str, Update]  # layer, without prefix → its update


def split(updates: Updates, layers: LayerNames) -> dict[str, Update]:
    """ComfyUI's updates as diffusers': the same A, the part's rows of B, without what is zero in them.

    Raises:
        ValueError: for a layer that the model does not have, or of a size that it cannot have.
    """
    found: dict[str, Update] = {}
    for layer, update in updates.items():
        names = layers.diffusers(layer)
        if not names:
            raise ValueError(f"lora: {layers.model} has no layer {layer!r} in ComfyUI's names")
        if layer in layers.swapped:
            update = update._replace(up=torch.cat(update.up.chunk(2)[::-1]))
        if len(names) == 1:
            found[names[0]] = update
            continue
        width = update.down.shape[1]
        sizes = [width] * 3 + [len(update.up) - 3 * width] * (len(names) - 3)
        if sum(sizes) != len(update.up) or min(sizes) < 1:
            raise ValueError(
                f"lora: {layer} has {len(update.up)} outputs for {width} inputs, which {layers.model}'s do not"
            )
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
    return Update(down, up[:, used].contiguous(), update.scale * len(down))


def fuse(updates: Updates, layers: LayerNames) -> dict[str, Update]:
    """diffusers' updates as ComfyUI's: parts that share their A keep its rank, others stand beside one another.

    A part that has no update gets rows of zeros.

    Raises:
        ValueError: for a layer that the model does not have, or parts that do not fit together.
    """
    groups: dict[str, dict[int, Update]] = {}
    for layer, update in updates.items():
        whole, part = layers.comfyui(layer)
        if not whole:
            raise ValueError(f"lora: {layers.model} has no layer {layer!r} in diffusers' names")
        groups.setdefault(whole, {})[part] = update
    found = {}
    for whole, parts in groups.items():
        count = len(layers.diffusers(whole))
        found[whole] = parts[0] if count == 1 else _fused(whole, parts, count, layers.mlp_ratio)
        if whole in layers.swapped:
            found[whole] = found[whole]._replace(up=torch.cat(found[whole].up.chunk(2)[::-1]))
    return found


def _fused(whole: str, parts: Mapping[int, Update], count: int, mlp_ratio: int) -> Update:
    width = next(iter(parts.values())).down.shape[1]
    rows = [width] * 3 + [mlp_ratio * width] * (count - 3)
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
    dtype = first.up.dtype
    if dtype.itemsize == 1 and any(update.scale != first.scale for update in parts.values()):
        dtype = torch.bfloat16  # 8 bits do not hold a product
    up = torch.zeros(sum(rows), rank, dtype=dtype)
    for part, update in parts.items():
        top = sum(rows[:part])
        # Where alpha / rank is the same everywhere, as one trainer makes it, no number is changed.
        same = update.scale == first.scale
        scaled = update.up if same else update.up.to(up.dtype) * (update.scale / first.scale)
        up[top : top + rows[part], places[part]] = scaled.to(up.dtype)
    return Update(torch.cat(downs), up, first.scale * rank)


def folded(updates: Updates) -> dict[str, Update]:
    """The same updates with alpha / rank multiplied into B, for a loader that takes no alpha."""
    found = {}
    for layer, update in updates.items():
        up = update.up
        if update.scale != 1.0:
            wider = torch.bfloat16 if up.dtype.itemsize == 1 else up.dtype  # 8 bits do not hold a product
            up = (up.float() * update.scale).to(wider)
        found[layer] = Update(update.down, up, None)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def to_tensors(updates: Updates, dialect: str, dtype: Optional[torch.dtype] = None) -> dict[str, Tensor]:
    """What a file of the dialect holds; alpha is float32 always, and left out where it is None."""
    state = {}
    for layer, update in updates.items():
        for suffix, value in zip(SUFFIXES[dialect], update[:2]):
            # A copy: parts of one layer share their A, which safetensors refuses.
            state[f"{PREFIXES[dialect]}{layer}.{suffix}"] = value.to(dtype or value.dtype, copy=True).contiguous()
        if update.alpha is not None:
            state[f"{PREFIXES[dialect]}{layer}.alpha"] = torch.tensor(float(update.alpha))
    return state


def from_tensors(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] = {},  # noqa: B006
) -> tuple[str, dict[str, Update]]:
    """(dialect, updates) of a file.

    Either dialect may use either one's suffixes, and either one's layers may have kohya's names. Alpha is the layer's
    ``.alpha``, else what diffusers wrote into the header (``alpha_pattern`` by peft's rule), else the rank, as loaders take it.

    Raises:
        ValueError: for a file of another kind, a header that does not fit it, and layers that lack a half or have rank 0.
    """
    if not state:
        raise ValueError("lora: expected the matrices of a LoRA, got a file without tensors")
    known = {**{prefix: dialect for dialect, prefix in PREFIXES.items()}, **UNDERSCORED}
    prefix = next((p for p in known if any(key.startswith(p) for key in state)), "")
    strange = [key for key in state if not prefix or not key.startswith(prefix)]
    if strange:
        raise ValueError(
            f"lora: expected names that begin with {' or '.join(map(repr, known))}, all with the same, got {strange[0]!r}"
        )
    dialect = known[prefix]
    halves: dict[str, dict[str, Tensor]] = {}
    endings = {suffix: half for pair in SUFFIXES.values() for half, suffix in zip(("down", "up"), pair)} | {
        "alpha": "alpha"
    }
    for key, value in state.items():
        name = key[len(prefix) :]
        ending = next((e for e in endings if name.endswith(f".{e}")), None)
        if ending is None:
            raise ValueError(
                f"lora: expected a plain LoRA, got {key!r}, which is neither of its matrices nor its alpha"
            )
        halves.setdefault(name[: -len(ending) - 1], {})[endings[ending]] = value
    updates, header = {}, _header(metadata)
    for layer, found in halves.items():
        if prefix in UNDERSCORED:
            layer = dotted(layer, dialect == COMFYUI)
        down, up = _matrices(layer, found)
        if "alpha" not in found:
            alpha = _alpha(header, layer, len(down))
        elif found["alpha"].numel() == 1:
            alpha = float(found["alpha"])
        else:
            raise ValueError(f"lora: expected one number as alpha of {layer}, got {list(found['alpha'].shape)}")
        if not math.isfinite(alpha):
            raise ValueError(f"lora: expected a finite alpha of {layer}, got {alpha}")
        updates[layer] = Update(down, up, alpha)
    return dialect, updates


def _matrices(layer: str, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(down, up) of a layer."""
    if not {"down", "up"} <= found.keys() or found["down"].ndim != 2 or found["up"].ndim != 2:
        raise ValueError(f"lora: expected two matrices for {layer}, got {', '.join(sorted(found))}")
    down, up = found["down"], found["up"]
    if len(down) != up.shape[1]:
        raise ValueError(f"lora: the matrices of {layer} have ranks {len(down)} and {up.shape[1]}")
    if not len(down):
        raise ValueError(f"lora: the matrices of {layer} have rank 0: there is nothing in them")
    for matrix in (down, up):
        if not matrix.is_floating_point():
            raise ValueError(f"lora: expected floats in the matrices of {layer}, got {matrix.dtype}")
    return down, up


def _header(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What diffusers wrote of rank and alpha."""
    text = metadata.get(ADAPTER_METADATA, "{}")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"lora: {ADAPTER_METADATA} in the file's header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"lora: expected names and values as {ADAPTER_METADATA} in the file's header, got {text[:40]}")
    return header


def _alpha(header: Mapping[str, Any], layer: str, rank: int) -> float:
    """As diffusers wrote it, and peft reads it."""
    if header.get("transformer.use_rslora"):
        raise ValueError("lora: rank-stabilised LoRA (use_rslora) has another scale, which no file of ComfyUI can say")
    told = _of_layer(header, "rank_pattern", "r", layer, rank)
    if told != rank:
        raise ValueError(f"lora: the file's header says rank {told:g} of {layer}, whose matrices have {rank}")
    return _of_layer(header, "alpha_pattern", "lora_alpha", layer, rank)


def _of_layer(header: Mapping[str, Any], patterns: str, otherwise: str, layer: str, default: int) -> float:
    """The value of the first pattern that fits, by peft's rule (``get_pattern_key``), or of all layers."""
    table = header.get(f"transformer.{patterns}")
    if table is not None and not isinstance(table, dict):
        raise ValueError(f"lora: expected patterns and numbers as {patterns} in the file's header, got {table!r}")
    name, value = otherwise, header.get(f"transformer.{otherwise}", default)
    for pattern, own in (table or {}).items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", layer)
        except re.error as error:
            raise ValueError(f"lora: {patterns} in the file's header has {pattern!r}, no pattern ({error})") from error
        if fits:
            name, value = f"{patterns} of {pattern!r}", own
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"lora: expected a number as {name} in the file's header, got {value!r}")
    return float(value)


def model_of(updates: Updates, dialect: str, told: str = "", metadata: Mapping[str, str] = {}) -> EditModel:  # noqa: B006
    """The known model that a LoRA is of.

    Args:
        updates: in the dialect.
        dialect: of their names.
        told: id of the model; empty asks the header, and if that does not say, the layers' names and sizes.
        metadata: the file's header.

    Raises:
        ValueError: see :func:`~editloss_core.models.registry.of_layers`.
    """
    sizes = {layer: (update.down.shape[1], len(update.up)) for layer, update in updates.items()}
    return of_layers(sizes, dialect == COMFYUI, told or metadata.get(MODEL_METADATA, ""))


def converted(updates: Updates, dialect: str, wanted: str, model: EditModel) -> Updates:
    """Updates of one dialect as a file of the other has them, or of the same.

    Raises:
        ValueError: a layer that the model does not have, parts that do not fit together, or a program without a loader.
    """
    if wanted == DIFFUSERS and not model.diffusers_loads_lora:
        raise ValueError(
            f"lora: diffusers has no loader of LoRA files for {model.title}; nothing would read what is written"
        )
    layers = model.names
    made = updates
    if dialect != wanted:
        made = split(updates, layers) if wanted == DIFFUSERS else fuse(updates, layers)
    return folded(made) if wanted == DIFFUSERS and not layers.alpha else made


def own_dialect(layers: Collection[str], model: EditModel) -> str:
    """Whose names the layers of a model's network have, ComfyUI's where both are the same.

    Raises:
        ValueError: neither program's.
    """
    strange = [layer for layer in layers if not model.names.diffusers(layer)]
    if not strange:
        return COMFYUI
    neither = [layer for layer in layers if not model.names.comfyui(layer)[0]]
    if neither:
        raise ValueError(f"lora: {model.title} has no layer {neither[0]!r} in ComfyUI's or diffusers' names")
    return DIFFUSERS


def save_both(
    lora: LoRA, path: Union[str, Path], metadata: Optional[Mapping[str, str]] = None, dtype: torch.dtype = torch.float32
) -> tuple[Path, ...]:
    """A LoRA of a known model for each program that loads it: NAME.safetensors in ComfyUI's keys, NAME_diffusers.safetensors in
    diffusers' where that has a loader for the model.

    Args:
        lora: on a network of either program.
        path: NAME.safetensors.
        metadata: texts by name, see :meth:`.lora.LoRA.described`.
        dtype: of the matrices in the files.

    Raises:
        ValueError: of a network that is of no known model.
    """
    path, model = Path(path), lora.model
    if model is None:
        raise ValueError(f"lora: expected one of a known model ({titles()}), whose names are known in both programs")
    own = own_dialect(lora.targets, model)
    updates = {
        name: Update(layer.down.detach().cpu(), layer.up.detach().cpu(), lora.settings.alpha)
        for name, layer in lora.named_layers()
    }
    texts = lora.described(metadata or {})
    paths = {COMFYUI: path}
    if model.diffusers_loads_lora:
        paths[DIFFUSERS] = path.with_name(f"{path.stem}_diffusers{path.suffix}")
    for dialect, target in paths.items():
        write_safetensors(target, to_tensors(converted(updates, own, dialect, model), dialect, dtype), texts)
    return tuple(paths.values())
