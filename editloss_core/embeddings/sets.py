"""Embeddings by role and encoder, and their file on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Mapping, Optional, Sequence

import torch
from torch import Tensor

from ..encoders.base import WHOLE, Encoder, EncoderInfo, Region, check_images
from ..files import make_folder, replacing
from ..hashing import hash_tensors
from ..progress import Progress

ROLES = ("pred", "gt", "src", "overlay", "hard_negative")
NEGATIVE_ROLES = ("overlay", "hard_negative")  # may hold several pictures per pair: [B, K, ..., D]
FORMAT = "editloss-embeddings-1"


class StaleEmbeddings(ValueError):
    """An embedding file that must not be used with these encoders or pictures; the message says why."""


@dataclass(frozen=True, repr=False)
class EmbeddingSet:
    """Roles × encoders → tensors, with what is needed to compare, weigh and draw them.

    Roles: ``pred`` the model's output, ``gt`` the after picture, ``src`` the before picture, ``overlay`` and
    ``hard_negative`` pictures that the output must not look like.

    Attributes:
        tensors: (role, encoder name) → ``[B, ..., D]``; for ``overlay`` and ``hard_negative`` ``[B, K, ..., D]``. A role
            with B = 1 stands for every sample (one pair, many outputs).
        encoders: encoder name → :class:`EncoderInfo`.
        grids: encoder name → (rows, columns) of its tokens; absent for global embeddings.
        regions: encoder name → the part of the pictures that its grid covers; absent for all of it.
        images: role → sha256 of the pictures it was made from.
        mask: None, or the edit region ``[B, H, W]`` in 0…1 at pixel resolution.
        masks: encoder name → its own mask, for an encoder that saw other pictures than the rest, such as crops of them.

    Instances are never changed; :meth:`with_images`, :meth:`with_embedding`, :meth:`with_mask` and :meth:`to` return new
    ones.
    """

    tensors: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    encoders: Mapping[str, EncoderInfo] = field(default_factory=dict)
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    regions: Mapping[str, Region] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    mask: Optional[Tensor] = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Shapes, not numbers."""
        parts = [f"{role} {name} {list(t.shape)} {str(t.dtype)[6:]}" for (role, name), t in self.tensors.items()]
        parts += [] if self.mask is None else [f"mask {list(self.mask.shape)}"]
        parts += [f"mask of {name} {list(mask.shape)}" for name, mask in self.masks.items()]
        return f"EmbeddingSet({', '.join(parts)})"

    # -- building ---------------------------------------------------------------------------------------------------

    def with_images(
        self,
        encoder: Encoder,
        images: Mapping[str, Tensor],
        batch_size: int = 8,
        progress: Optional[Progress] = None,
    ) -> EmbeddingSet:
        """Encode pictures by role, without gradients, and add them.

        Args:
            encoder: any :class:`Encoder`.
            images: role → ``[B, H, W, 3]``. Negatives may hold K pictures per pair, sample-major (index b·K + k), where
                the number of pairs is that of ``gt`` or ``src`` (here or in the set already).
            batch_size, progress: as :meth:`Encoder.embed`; progress counts over all roles.

        Raises:
            ValueError: an unknown role, wrong shapes, numbers of pictures that do not fit, pictures of different sizes,
                or pictures other than those that the set already has under a role.
        """
        if not images:
            raise ValueError("images: expected pictures for at least one role, got none")
        for role, batch in images.items():
            check_role(role)
            check_images(role, batch)
        hashes = {role: hash_images(batch) for role, batch in images.items()}
        for role, digest in hashes.items():
            if self.images.get(role, digest) != digest:
                raise ValueError(
                    f"{role}: these are other pictures than the ones already encoded under this role; "
                    "start a new set or connect the same pictures to every encoder"
                )
        self._refuse_namesake(encoder.info)
        name = encoder.info.name
        counts = {role: t.shape[:2].numel() if role in NEGATIVE_ROLES else len(t) for role, t in self._by(name).items()}
        counts.update({role: len(batch) for role, batch in images.items()})
        pairs = _pair_count(counts)
        tensors, done, total = dict(self.tensors), 0, sum(len(batch) for batch in images.values())
        grids, regions = dict(self.grids), dict(self.regions)
        for role, batch in images.items():
            step = None if progress is None else (lambda n, _, base=done: progress(base + n, total))
            tensors[role, name] = _ordinary(encoder.embed(batch, batch_size, step))
            grid, region = encoder.grid(*batch.shape[1:3]), encoder.region(*batch.shape[1:3])
            if grid is not None and grids.setdefault(name, grid) != grid:
                raise ValueError(
                    f"{role}: expected pictures that give a token grid of {grids[name][0]}×{grids[name][1]} like the "
                    f"other roles, got {grid[0]}×{grid[1]} from {batch.shape[1]}×{batch.shape[2]} pixels"
                )
            if grid is not None and regions.setdefault(name, region) != region:
                raise ValueError(
                    f"{role}: expected pictures of the same proportions as the other roles, since the encoder crops, got "
                    f"{batch.shape[1]}×{batch.shape[2]} pixels"
                )
            done += len(batch)
        for role in NEGATIVE_ROLES:
            if role in images:
                tensors[role, name] = tensors[role, name].unflatten(0, (pairs, -1))
            elif (role, name) in tensors and len(tensors[role, name]) == 1:
                # Encoded before gt and src said how many pairs there are.
                tensors[role, name] = tensors[role, name][0].unflatten(0, (pairs, -1))
        return replace(
            self,
            tensors=tensors,
            encoders={**self.encoders, name: encoder.info},
            grids=grids,
            regions=regions,
            images={**self.images, **hashes},
        )

    def with_embedding(
        self, role: str, info: EncoderInfo, tensor: Tensor, grid: Optional[tuple[int, int]] = None
    ) -> EmbeddingSet:
        """Add a tensor that the caller made, graph and all: how a trainer hands in its predictions.

        Args:
            role: its role; what was there under it is replaced, and so is the knowledge of the pictures it came from.
            info: of the encoder that made it.
            tensor: ``[B, D]`` for global, ``[B, P, D]`` for tokens, ``[B, h, w, D]`` for grid; negatives have K after B.
            grid: rows and columns of tokens, where the set does not know them yet; read off the tensor for grids.

        Raises:
            ValueError: an unknown role, a shape or dtype that is no such embedding, another grid than the set has, or
                another encoder of the same name.
        """
        check_role(role)
        self._refuse_namesake(info)
        several = role in NEGATIVE_ROLES
        dims = {"global": 2, "tokens": 3, "grid": 4}[info.output] + several
        if (
            not isinstance(tensor, Tensor)
            or not tensor.is_floating_point()
            or tensor.ndim != dims
            or not tensor.numel()
        ):
            came = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{role}: expected a floating {info.output} embedding of {dims} dimensions, got {came}")
        grids = dict(self.grids)
        if info.output == "grid":
            grid = (tensor.shape[1 + several], tensor.shape[2 + several])
        if info.output != "global" and grid is not None and grids.setdefault(info.name, grid) != grid:
            raise ValueError(f"{role}: expected a token grid of {grids[info.name]} like the other roles, got {grid}")
        return replace(
            self,
            tensors={**self.tensors, (role, info.name): tensor},
            encoders={**self.encoders, info.name: info},
            grids=grids,
            images={known: digest for known, digest in self.images.items() if known != role},
        )

    def to(self, device: torch.device | str) -> EmbeddingSet:
        """All tensors on a device, so that training does not copy the constant ones at every step."""
        return replace(
            self,
            tensors={key: tensor.to(device) for key, tensor in self.tensors.items()},
            mask=None if self.mask is None else self.mask.to(device),
            masks={name: mask.to(device) for name, mask in self.masks.items()},
        )

    def with_mask(self, mask: Tensor, encoder: str = "") -> EmbeddingSet:
        """Add the edit region ``[B, H, W]`` (or ``[H, W]``) in 0…1; B = 1 stands for every sample.

        Args:
            mask: the region in the pictures that were encoded.
            encoder: name of the one encoder that it is for, if that saw other pictures than the rest; "" for all that
                have none of their own.

        Raises:
            ValueError: wrong shape, values outside 0…1, or a mask without any edit, naming the sample; an encoder that
                is not in the set.
        """
        if encoder and encoder not in self.encoders:
            raise ValueError(f"encoder: expected one of {sorted(self.encoders)}, got {encoder!r}")
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or mask.numel() == 0:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: expected [B, H, W], got {got}")
        mask = _ordinary((mask if mask.ndim == 3 else mask.unsqueeze(0)).detach().float().cpu())
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError(f"mask: expected values in 0…1, got {mask.min().item():g} to {mask.max().item():g}")
        empty = [i for i, m in enumerate(mask) if m.max() == 0]
        if empty:
            raise ValueError(
                f"mask: sample {empty[0]} of {len(mask)} is empty; paint the edit region or leave the mask out"
            )
        return replace(self, masks={**self.masks, encoder: mask}) if encoder else replace(self, mask=mask)

    # -- reading ----------------------------------------------------------------------------------------------------

    def get(self, role: str, encoder: str) -> Tensor:
        """The tensor of a role and an encoder.

        Raises:
            ValueError: naming what is missing and what there is.
        """
        check_role(role)
        if encoder not in self.encoders:
            raise ValueError(
                f"encoder: {encoder!r} is not in the embeddings; they have {sorted(self.encoders) or 'none'}; encode with it "
                "too (chain another Encode by Role)"
            )
        if (role, encoder) not in self.tensors:
            raise ValueError(
                f"{role}: no embedding by {encoder!r}; it has {', '.join(self._by(encoder)) or 'none'}; give Encode by Role "
                f"pictures for {role}, or leave out the terms that read it"
            )
        return self.tensors[role, encoder]

    def describe(self) -> str:
        """What the set holds: a line per encoder with the pictures of each role, grid or tokens, and width."""
        lines = []
        for encoder in self.encoders:
            held = self._by(encoder)
            pictures = {role: t.shape[: 2 if role in NEGATIVE_ROLES else 1] for role, t in held.items()}
            counts = ", ".join(f"{role} {'×'.join(map(str, shape))}" for role, shape in pictures.items())
            role, tensor = next(iter(held.items()))
            *tokens, width = tensor.shape[len(pictures[role]) :]
            of = f"{'×'.join(map(str, self.grids.get(encoder, tokens)))} tokens of " if tokens else ""
            lines.append(f"{encoder}: {counts}; {of}{width} features")
        return "\n".join(lines + ["with a mask"] * (self.mask is not None))

    def token_weights(self, encoder: str) -> Optional[Tensor]:
        """The edit mask at the encoder's token resolution: the share of each token's area inside the mask.

        Returns:
            ``[B, P]`` or ``[B, h, w]`` like the encoder's tokens; None without a mask or for global embeddings.
        """
        mask = self.masks.get(encoder, self.mask)
        if mask is None or encoder not in self.grids:
            return None
        (height, width), (h, w) = mask.shape[1:], self.grids[encoder]
        top, left, bottom, right = self.regions.get(encoder, WHOLE)
        rows, columns = _overlaps(height, h, top, bottom).to(mask), _overlaps(width, w, left, right).to(mask)
        area = height * (bottom - top) / h * (width * (right - left) / w)
        weights = (rows @ mask @ columns.T / area).clamp(0, 1)
        return weights.flatten(1) if self.encoders[encoder].output == "tokens" else weights

    # -- the file ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file atomically; returns its path."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {f"{role}/{name}": t.detach().cpu() for (role, name), t in self.tensors.items()}
        if not tensors:
            raise ValueError("embeddings: nothing to save, the set is empty")
        if self.mask is not None:
            tensors["mask"] = self.mask.cpu()
        tensors.update({f"mask/{name}": mask.cpu() for name, mask in self.masks.items()})
        # safetensors refuses tensors that share memory, as one picture under two roles does.
        tensors = {key: t.clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
        metadata = {
            "format": FORMAT,
            "encoders": json.dumps({name: asdict(info) for name, info in self.encoders.items()}),
            "grids": json.dumps(self.grids),
            "regions": json.dumps(self.regions),
            "images": json.dumps(self.images),
        }
        metadata["content"] = _hash_content(tensors, metadata)
        make_folder(path.parent)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        encoders: Sequence[Encoder | EncoderInfo] = (),
        images: Mapping[str, Tensor] | None = None,
    ) -> EmbeddingSet:
        """Read a file written by :meth:`save`.

        Args:
            path: the file.
            encoders: encoders that the embeddings must come from; a different fingerprint is refused.
            images: role → the pictures that the embeddings must have been made from.

        Raises:
            FileNotFoundError: no such file.
            StaleEmbeddings: not an embedding file, damaged, or made by another encoder, with other preprocessing or
                from other pictures; the message says which.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"embeddings: there is no file {path.name}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:  # before the tensors are read: it may be a checkpoint of many GB
                    came = metadata.get("format", "no format entry")
                    raise StaleEmbeddings(f"{path.name}: expected an embedding file ({FORMAT}), got {came}")
                # Copied: safetensors maps the file, and who overwrites it later would change or crash us.
                with torch.inference_mode(False):
                    tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise StaleEmbeddings(f"{path.name}: not a readable safetensors file ({error})") from error
        if metadata.get("content") != _hash_content(tensors, metadata):
            raise StaleEmbeddings(
                f"{path.name}: damaged, it does not match the content hash written in it; make it again"
            )
        try:
            infos = {name: EncoderInfo(**entry) for name, entry in json.loads(metadata["encoders"]).items()}
            grids = {name: (int(grid[0]), int(grid[1])) for name, grid in json.loads(metadata["grids"]).items()}
            regions = {}
            for name, region in json.loads(metadata["regions"]).items():
                top, left, bottom, right = map(float, region)
                regions[name] = (top, left, bottom, right)
            hashes = dict(json.loads(metadata["images"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StaleEmbeddings(f"{path.name}: its metadata cannot be read ({error!r}); make it again") from error
        wanted = [encoder.info if isinstance(encoder, Encoder) else encoder for encoder in encoders]
        for info in wanted:
            _refuse_other_encoder(path, infos, info)
        mask = tensors.pop("mask", None)
        masks = {name: tensors.pop(f"mask/{name}") for name in infos if f"mask/{name}" in tensors}
        named = {tuple(key.split("/", 1)): t for key, t in tensors.items()}
        for (role, name), t in named.items():
            if (
                role not in ROLES
                or name not in infos
                or not t.is_floating_point()
                or t.ndim < 2 + (role in NEGATIVE_ROLES)
            ):
                raise StaleEmbeddings(
                    f"{path.name}: {role}/{name} {list(t.shape)} is no embedding of its encoders; make it again"
                )
        result = cls(named, infos, grids, regions, hashes, mask, masks)
        for role, batch in (images or {}).items():
            check_role(role)
            makers = [name for name in infos if (role, name) in result.tensors]
            missing = [info.name for info in wanted if info.name not in makers]
            if missing or not makers:
                by = f" by {missing[0]!r}" if missing else ""
                there = ", ".join(dict.fromkeys(r for r, name in result.tensors if not missing or name == missing[0]))
                raise StaleEmbeddings(f"{path.name}: there is no {role}{by} in it, only {there}; encode again")
            if hashes.get(role) != hash_images(batch):
                raise StaleEmbeddings(f"{path.name}: {role} was made from other pictures; encode again")
        return result

    def _refuse_namesake(self, info: EncoderInfo) -> None:
        """Embeddings of two encoders must not meet under one name."""
        known = self.encoders.get(info.name)
        if known is not None and known.fingerprint != info.fingerprint:
            raise ValueError(
                f"encoder: the set already has another encoder named {known.name!r}; give one another name"
            )

    def _by(self, encoder: str) -> dict[str, Tensor]:
        """Role → tensor of one encoder, in the order of ROLES."""
        return {role: self.tensors[role, encoder] for role in ROLES if (role, encoder) in self.tensors}


def check_role(role: str) -> None:
    """ValueError unless ``role`` is one of ROLES."""
    if role not in ROLES:
        raise ValueError(f"role: expected one of {', '.join(ROLES)}, got {role!r}")


def hash_images(images: Tensor) -> str:
    """sha256 of a picture batch at 8 bits, so that a picture and its PNG file have the same hash.

    255·x is cut off, not rounded, as ComfyUI's Save Image does it.
    """
    check_images("images", images)
    return hash_tensors([("images", (images.detach().float().clamp(0, 1) * 255).to(torch.uint8))])


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that a loss may keep for backward; ComfyUI runs nodes in inference mode, whose tensors it may not."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def _overlaps(pixels: int, cells: int, start: float, end: float) -> Tensor:
    """``[cells, pixels]``: how much of each pixel lies in each of ``cells`` equal parts of start…end of the line.

    Unlike adaptive pooling, whose bins overlap where the sizes do not divide, this is exact for any two sizes.
    """
    edges = (
        torch.arange(cells + 1, dtype=torch.float64).mul(pixels * (end - start)).div(cells).unsqueeze(1)
        + pixels * start
    )
    pixel = torch.arange(pixels, dtype=torch.float64)
    return (torch.minimum(edges[1:], pixel + 1) - torch.maximum(edges[:-1], pixel)).clamp_min(0).float()


def _hash_content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over tensors and over the metadata that says what they are."""
    return hash_tensors(
        sorted(tensors.items()), *(metadata.get(key, "") for key in ("encoders", "grids", "regions", "images"))
    )


def _pair_count(counts: Mapping[str, int]) -> int:
    """How many pairs numbers of pictures by role belong to: that of gt and src where there are any, which must agree."""
    known = {role: counts[role] for role in ("gt", "src") if role in counts}
    if len(set(known.values())) > 1:
        raise ValueError(f"src: expected as many before as after pictures, got {known['src']} and {known['gt']}")
    pairs = next(iter(known.values()), 1)
    if pairs not in (1, counts.get("pred", pairs)):
        raise ValueError(f"pred: expected {pairs} outputs, one for each pair, got {counts['pred']}")
    for role in NEGATIVE_ROLES:
        if counts.get(role, pairs) % pairs:
            raise ValueError(f"{role}: expected a multiple of {pairs} pictures (pairs), got {counts[role]}")
    return pairs


def _refuse_other_encoder(path: Path, infos: Mapping[str, EncoderInfo], wanted: EncoderInfo) -> None:
    have = infos.get(wanted.name)
    if have is None:
        raise StaleEmbeddings(f"{path.name}: expected embeddings by {wanted.name!r}, it has {sorted(infos)}")
    if have.preprocessing != wanted.preprocessing:
        raise StaleEmbeddings(
            f"{path.name}: {wanted.name!r} was run with other preprocessing: {have.preprocessing!r} in the file, "
            f"{wanted.preprocessing!r} now; encode again"
        )
    if have.output != wanted.output:
        raise StaleEmbeddings(
            f"{path.name}: {wanted.name!r} gave {have.output}, now it gives {wanted.output}; encode again"
        )
    if have.fingerprint != wanted.fingerprint:
        raise StaleEmbeddings(
            f"{path.name}: {wanted.name!r} had other weights ({have.fingerprint[:12]}…) than now; encode again"
        )
