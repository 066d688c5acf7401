"""Embeddings of large sets of pairs: a folder of shards, made by any number of processes, and its index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from ..ahead import ahead
from ..checks import check_whole
from ..encoders.base import Encoder, EncoderInfo, Region
from ..files import replacing
from ..pairs import PairSet
from ..processes import Processes
from ..progress import Progress
from .sets import FORMAT, EmbeddingSet, StaleEmbeddings

INDEX = "embeddings.safetensors.index.json"
INDEX_FORMAT = "editloss-embeddings-shards-1"
SHARD_PAIRS = 256
OF_PAIRS = ("gt", "src")  # the roles: after and before picture


class _Batch(NamedTuple):
    """Pairs of one size that go through the encoders together."""

    shard: int
    indices: list[int]


@dataclass(frozen=True)
class Encoded:
    """What a call of :func:`encode_pairs` did in this process.

    Attributes:
        index: the file that says where everything is.
        pictures: that were encoded now.
        shards: of the whole set.
        kept: shards that were there already.
    """

    index: Path
    pictures: int
    shards: int
    kept: int


Layouts = Mapping[str, tuple[Optional[tuple[int, int]], Region]]  # name of an encoder → grid and region of its tokens


def encode_pairs(
    pairs: PairSet,
    encoders: Sequence[Encoder],
    folder: Union[str, Path],
    *,
    masks: bool = False,
    batch_size: int = 8,
    shard_pairs: int = SHARD_PAIRS,
    processes: Optional[Processes] = None,
    progress: Optional[Progress] = None,
) -> Encoded:
    """Encode the before (role ``src``) and after (``gt``) picture of every pair into ``folder``.

    Shard k holds the pairs from k · ``shard_pairs`` on, in their order, as a file of :meth:`EmbeddingSet.save`. Each process
    makes every ``processes.count``-th of the shards that are not there. What goes through an encoder together depends on
    the arguments alone, so that the set is the same, bit for bit, whatever the number of processes is and however often
    the work was interrupted, as long as each process computes with the same number of threads; the files differ only in
    the order of their headers. Pictures are read while others are encoded.

    ``embeddings.safetensors.index.json`` has, as the indices of large models do, ``weight_map``: ``"ROLE/ENCODER"`` → its
    files, to be joined along the first dimension; and ``metadata``: ``total_size`` in bytes, the encoders with their
    fingerprints, and the names and fingerprints of the pairs. The sizes stand in it when all is done.

    Args:
        pairs: that are encoded, at the sizes which they are trained at.
        encoders: each of another name.
        folder: is made if it is not there.
        masks: whether to keep the pairs' edit masks; all must have one, and be of one size.
        batch_size: pictures per forward pass.
        shard_pairs: pairs per file.
        processes: that encode together, with the same arguments and the same folder.
        progress: called after each batch.

    Raises:
        ValueError: before any picture is encoded: no encoders, pairs whose embeddings do not fit into one tensor, masks that
            are not there; a folder that holds another set. Later: embeddings that are not finite, naming the pair.
    """
    processes, folder = processes or Processes(), Path(folder)
    _check(pairs, encoders, masks, batch_size, shard_pairs)
    layouts = {encoder.info.name: _layout(encoder, pairs) for encoder in encoders}
    index = _index(pairs, encoders, layouts, masks, shard_pairs)
    files = index["weight_map"][f"{OF_PAIRS[0]}/{encoders[0].info.name}"]

    def begin() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        found = _read_index(folder) if (folder / INDEX).is_file() else None
        if found is not None:
            _refuse_other(found, index, folder)
        else:
            _write_index(folder, index)
        return [k for k, name in enumerate(files) if not _is_shard(folder / name)]

    missing = processes.once(begin, (ValueError, OSError))
    mine = processes.own(missing)
    batches = [batch for k in mine for batch in _batches(pairs, k, shard_pairs, batch_size)]
    total, done = 2 * sum(len(batch.indices) for batch in batches), 0

    def read(batch: _Batch) -> tuple[Tensor, Optional[Tensor]]:
        loaded = [pairs.load_checked(i) for i in batch.indices]
        pictures = torch.stack([p.after for p in loaded] + [p.before for p in loaded])
        return pictures, torch.stack([p.mask for p in loaded if p.mask is not None]) if masks else None

    parts: list[tuple[_Batch, dict[str, Tensor], Optional[Tensor]]] = []
    with ahead(read, batches) as pictures_of:
        for batch, (pictures, mask) in zip(batches, pictures_of):
            embedded = {encoder.info.name: _finite(encoder, pictures, batch, pairs) for encoder in encoders}
            parts.append((batch, embedded, mask))
            done += len(pictures)
            if progress is not None:
                progress(done, total)
            if sum(len(b.indices) for b, _, _ in parts) == len(_members(pairs, batch.shard, shard_pairs)):
                _assemble(parts, encoders, layouts).save(folder / files[batch.shard])
                parts = []
    processes.wait()

    def end() -> None:
        sizes = {name: (folder / name).stat().st_size for name in files}
        _write_index(
            folder, {**index, "metadata": {**index["metadata"], "total_size": sum(sizes.values()), "sizes": sizes}}
        )

    processes.once(end, (OSError,))
    return Encoded(folder / INDEX, done, len(files), len(files) - len(missing))


def load_shards(
    folder: Union[str, Path], encoders: Sequence[Union[Encoder, EncoderInfo]] = (), pairs: Optional[PairSet] = None
) -> EmbeddingSet:
    """Read what :func:`encode_pairs` wrote, as one set in the order of the pairs.

    Args:
        folder: with the index.
        encoders: that the embeddings must come from; a different fingerprint is refused.
        pairs: that they must have been made from.

    Raises:
        FileNotFoundError: no index.
        StaleEmbeddings: a set that is not finished, damaged, or of other encoders or pairs; the message says which.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"embeddings: there is no {INDEX} in {folder.name}")
    index = _read_index(folder)
    files = next(iter(index["weight_map"].values()))
    if "total_size" not in index["metadata"]:
        there = sum((folder / name).is_file() for name in files)
        raise StaleEmbeddings(
            f"{folder.name}: not finished, {there} of {len(files)} shards are there; run the same command again"
        )
    if pairs is not None and _identity(pairs) != {k: index["metadata"][k] for k in ("names", "fingerprints")}:
        raise StaleEmbeddings(f"{folder.name}: was made from other pairs, or at another resolution; encode again")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise StaleEmbeddings(f"{folder.name}: {missing[0]} is missing; run the same command again")
    shards = [EmbeddingSet.load(folder / name, encoders) for name in files]
    first = shards[0]
    joined = {key: torch.cat([shard.tensors[key] for shard in shards]) for key in first.tensors}
    if any(len(t) != len(index["metadata"]["names"]) for t in joined.values()):
        raise StaleEmbeddings(f"{folder.name}: its shards do not have the pairs of the index; encode again")
    masks = [shard.mask for shard in shards if shard.mask is not None]
    if masks and len(masks) < len(shards):
        raise StaleEmbeddings(f"{folder.name}: {len(shards) - len(masks)} of its shards have no mask; encode again")
    return replace(first, tensors=joined, mask=torch.cat(masks) if masks else None)


# -- the plan ---------------------------------------------------------------------------------------------------------


def _check(pairs: PairSet, encoders: Sequence[Encoder], masks: bool, batch_size: int, shard_pairs: int) -> None:
    for name, value in (("batch_size", batch_size), ("shard_pairs", shard_pairs)):
        check_whole(name, value, 1)
    names = [encoder.info.name for encoder in encoders]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"encoders: expected at least one, each of another name, got {names or 'none'}")
    if masks:
        without = [pair.name for pair in pairs if pair.mask is None]
        if without:
            raise ValueError(
                f"masks: {len(without)} of {len(pairs)} pairs have none, e.g. {without[0]!r}; leave masks out"
            )
        if len(pairs.buckets) > 1:
            raise ValueError(f"masks: expected pairs of one size, got {_sizes(pairs)}; leave masks out")


def _layout(encoder: Encoder, pairs: PairSet) -> tuple[Optional[tuple[int, int]], Region]:
    """Grid and region of an encoder's tokens, the same for all pairs."""
    found = {(encoder.grid(*size), encoder.region(*size)): size for size in pairs.buckets}
    if len(found) > 1 and encoder.info.output != "global":
        raise ValueError(
            f"encoders: {encoder.info.name!r} gives {len(found)} grids or regions for pairs of {_sizes(pairs)}, which do not "
            "fit into one tensor; set its image_size and no crop, or its output to global"
        )
    return next(iter(found))


def _sizes(pairs: PairSet) -> str:
    sizes = [f"{width}×{height}" for height, width in pairs.buckets]
    return ", ".join(sizes[:4]) + (f" and {len(sizes) - 4} other sizes" if len(sizes) > 4 else "")


def _members(pairs: PairSet, shard: int, shard_pairs: int) -> range:
    return range(shard * shard_pairs, min((shard + 1) * shard_pairs, len(pairs)))


def _batches(pairs: PairSet, shard: int, shard_pairs: int, batch_size: int) -> Iterator[_Batch]:
    by_size: dict[tuple[int, int], list[int]] = {}
    for i in _members(pairs, shard, shard_pairs):
        by_size.setdefault(pairs.targets[i], []).append(i)
    step = max(1, batch_size // 2)
    for members in by_size.values():
        yield from (_Batch(shard, members[k : k + step]) for k in range(0, len(members), step))


def _identity(pairs: PairSet) -> dict[str, list[str]]:
    return {"names": [pair.name for pair in pairs], "fingerprints": [pairs.fingerprint(i) for i in range(len(pairs))]}


def _index(
    pairs: PairSet, encoders: Sequence[Encoder], layouts: Layouts, masks: bool, shard_pairs: int
) -> dict[str, Any]:
    count = -(-len(pairs) // shard_pairs)
    files = [f"embeddings-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    metadata = {
        "format": INDEX_FORMAT,
        "encoders": {encoder.info.name: asdict(encoder.info) for encoder in encoders},
        "grids": {name: grid for name, (grid, _) in layouts.items()},
        "shard_pairs": shard_pairs,
        "masks": masks,
        **_identity(pairs),
    }
    keys = [f"{role}/{encoder.info.name}" for encoder in encoders for role in OF_PAIRS] + (["mask"] if masks else [])
    return json.loads(json.dumps({"metadata": metadata, "weight_map": {key: files for key in keys}}))


def _refuse_other(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    finished = ("total_size", "sizes")
    theirs = {k: v for k, v in found["metadata"].items() if k not in finished}
    differ = sorted(k for k in theirs.keys() | wanted["metadata"].keys() if theirs.get(k) != wanted["metadata"].get(k))
    if differ:
        raise ValueError(
            f"{folder.name}: holds embeddings with other {', '.join(differ)}; give the folder that they were begun in the same "
            "arguments, or choose another folder"
        )


# -- files ------------------------------------------------------------------------------------------------------------


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_bytes())
        if index["metadata"]["format"] != INDEX_FORMAT:
            raise StaleEmbeddings(f"{INDEX}: expected the format {INDEX_FORMAT}, got {index['metadata']['format']}")
        if not index["weight_map"] or not all(
            isinstance(index["metadata"][k], list) for k in ("names", "fingerprints")
        ):
            raise KeyError("names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StaleEmbeddings):
            raise
        raise StaleEmbeddings(f"{INDEX}: cannot be read ({error!r}); remove it and encode again") from error
    return index


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    with replacing(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")


def _is_shard(path: Path) -> bool:
    """Whether a whole embedding file is there. Which set it is of, the index says; what is in it, its reader checks."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _finite(encoder: Encoder, pictures: Tensor, batch: _Batch, pairs: PairSet) -> Tensor:
    z = encoder.embed(pictures, len(pictures))
    for i, fine in enumerate(z.isfinite().flatten(1).all(1).tolist()):
        if not fine:
            name = pairs[batch.indices[i % len(batch.indices)]].name
            raise ValueError(
                f"{encoder.info.name}: expected finite embeddings, got NaN or infinity for the pair {name!r}"
            )
    return z


def _assemble(
    parts: Sequence[tuple[_Batch, Mapping[str, Tensor], Optional[Tensor]]],
    encoders: Sequence[Encoder],
    layouts: Layouts,
) -> EmbeddingSet:
    """The embeddings of one shard, in the order of its pairs."""
    order = torch.tensor([i for batch, _, _ in parts for i in batch.indices]).argsort()

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))[order]

    tensors = {}
    for encoder in encoders:
        halves = [embedded[encoder.info.name].chunk(2) for _, embedded, _ in parts]
        for k, role in enumerate(OF_PAIRS):
            tensors[role, encoder.info.name] = joined([half[k] for half in halves])
    made = EmbeddingSet(
        tensors,
        {encoder.info.name: encoder.info for encoder in encoders},
        {name: grid for name, (grid, _) in layouts.items() if grid is not None},
        {name: region for name, (grid, region) in layouts.items() if grid is not None},
    )
    masks = [mask for _, _, mask in parts if mask is not None]
    return made.with_mask(joined(masks)) if masks else made
