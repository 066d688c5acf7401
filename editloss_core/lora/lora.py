"""LoRA as an additive bypass: y = W x + (alpha / rank) · B A x, by forward hooks on whatever layers the base has.

Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685). The base is called as it is, and the bypass is
added to its answer: there is no copy of W and no merged weight, so that layers which cast, quantise or unpack their
weights by themselves (fp8, ComfyUI's and bitsandbytes' quantised layers) are adapted like plain ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_number, check_whole
from ..files import write_safetensors
from ..models.base import PRESETS, EditModel
from ..models.registry import of_network, titles

PREFIX = "diffusion_model."  # of the names in a file; ComfyUI maps them to any model's layers one to one
MODEL_METADATA = "editloss_edit_model"  # in a file's header: id of the model that it is of
# Names that other trainers write, and whose they are.
_OTHER_FORMATS = {
    "lora_unet_": "kohya's",
    "lora_te": "a text encoder's",
    "transformer.": "diffusers'",
    "lora_transformer_": "OneTrainer's",
    "lycoris_": "LyCORIS'",
    "base_model.model.": "PEFT's",
    "unet.": "PEFT's",
}


@dataclass(frozen=True)
class LoRASettings:
    """Size and place of a LoRA.

    Attributes:
        rank: of the update, ≥ 1.
        alpha: > 0; the update is scaled by alpha / rank, so that rank can change without a new learning rate.
        dropout: chance in 0…1 (1 excluded) with which a value of the bypass' input is dropped in training.
        layers: comma-separated presets (``"attention"``: every attention layer, in single blocks with the MLP that is
            fused into them; ``"attention + MLP"``: also the double blocks' MLPs; ``"all"``: every linear layer,
            modulation, embedders and the last layer included) and patterns over names of layers, where ``*`` stands for
            anything: ``double_blocks.*.img_attn.*``. A leading ``-`` takes layers out: ``all, -*mod*``.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    layers: str = "attention + MLP"

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1)
        check_number("alpha", self.alpha, 0.0, open_low=True)
        check_number("dropout", self.dropout, 0.0, 1.0)
        if self.dropout == 1.0:
            raise ValueError("dropout: expected a number below 1, got 1: nothing would be learnt")
        _patterns(self.layers)


def select_layers(module: nn.Module, layers: str, model: Optional[EditModel] = None) -> dict[str, nn.Module]:
    """The linear layers of ``module`` that ``layers`` (see :class:`LoRASettings`) names, in the network's order.

    Args:
        module: the network.
        layers: presets and patterns.
        model: says what the presets comprise; None takes the known model that the network's class belongs to.

    Raises:
        ValueError: for a preset of a network that no known model has, for a pattern without a match (with a few of the
            names there are), and if nothing is left.

    >>> net = nn.ModuleDict({"double_blocks": nn.ModuleList([nn.ModuleDict({"img_mlp": nn.Sequential(nn.Linear(2, 3))})])})
    >>> list(select_layers(net, "*_mlp.*"))
    ['double_blocks.0.img_mlp.0']
    """
    known = {name: part for name, part in module.named_modules() if layer_features(part) is not None}
    if not known:
        raise ValueError(f"layers: {type(module).__name__} has no linear layers that a LoRA could be added to")
    chosen: set[str] = set()
    taken_out: set[str] = set()
    for item, out in _patterns(layers):
        globs = _preset(item, module, model) if item in PRESETS else (item,)
        found = {name for name in known if any(fnmatchcase(name, glob) for glob in globs)}
        if not found:
            raise ValueError(
                f"layers: no linear layer of {type(module).__name__} matches {item!r}; it has {len(known)}, among them "
                f"{_some(known)}"
            )
        (taken_out if out else chosen).update(found)
    if not chosen - taken_out:
        raise ValueError(f"layers: {layers!r} takes out every layer that it names")
    return {name: part for name, part in known.items() if name in chosen - taken_out}


def _preset(name: str, module: nn.Module, model: Optional[EditModel]) -> tuple[str, ...]:
    kind = type(module).__name__
    model = model or _model_of(module)
    if model is not None:
        return model.layers[name]
    if name == "all":
        return ("*",)
    raise ValueError(
        f"layers: what {name!r} is, is known for {titles()} and not for {kind}; name its layers by patterns, or take 'all'"
    )


def _model_of(module: nn.Module) -> Optional[EditModel]:
    sizes = {name: size for name, part in module.named_modules() if (size := layer_features(part)) is not None}
    return of_network(type(module).__name__, sizes)


def _patterns(layers: str) -> list[tuple[str, bool]]:
    """(preset or pattern, whether it takes layers out) for every item of a ``layers`` text."""
    if not isinstance(layers, str):
        raise ValueError(f"layers: expected a preset or patterns as one text, got {layers!r}")
    items = [item.strip() for item in layers.split(",") if item.strip()]
    parsed = [(item.removeprefix("-").strip(), item.startswith("-")) for item in items]
    if all(out for _, out in parsed):
        raise ValueError(
            f"layers: expected {', '.join(map(repr, PRESETS))} or patterns such as 'double_blocks.*', got "
            f"{layers!r}; to take layers out, begin with what they are taken from, as in 'all, -*mod*'"
        )
    return parsed


def adapted_sizes(module: nn.Module, layers: str, model: Optional[EditModel] = None) -> list[tuple[int, int]]:
    """(in, out) of each layer that :func:`select_layers` chooses."""
    sizes = map(layer_features, select_layers(module, layers, model).values())
    return [size for size in sizes if size is not None]


def layer_features(part: nn.Module) -> Optional[tuple[int, int]]:
    """(in, out) of a linear layer of any make, None for everything else."""
    into, out = getattr(part, "in_features", None), getattr(part, "out_features", None)
    if isinstance(into, int) and isinstance(out, int):  # quantised weights may be packed into another shape
        return into, out
    weight = getattr(part, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(part, nn.Embedding):
        return weight.shape[1], weight.shape[0]
    return None


def _some(names: Iterable[str], most: int = 6) -> str:
    """A few names from all over the list."""
    names = list(names)
    return ", ".join(names if len(names) <= most else [names[i * (len(names) - 1) // (most - 1)] for i in range(most)])


class LoRALayer(nn.Module):
    """The bypass of one layer: x ``[..., in]`` and the base's answer ``[..., out]`` → answer + (alpha / rank) · B A dropout(x).

    Parameters are float32; the products are done in x's dtype on x's device.
    """

    def __init__(self, inputs: int, outputs: int, settings: LoRASettings, generator: torch.Generator):
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # Kaiming's uniform start with a = √5, that of nn.Linear
        down = (2 * torch.rand(settings.rank, inputs, generator=generator) - 1) * bound
        self.down = nn.Parameter(down)  # A
        self.up = nn.Parameter(torch.zeros(outputs, settings.rank))  # B: the bypass starts as exactly 0
        self.scale, self.dropout = settings.alpha / settings.rank, settings.dropout

    def forward(self, x: Tensor, answer: Tensor) -> Tensor:
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        hidden = F.linear(x, self.down.to(x))
        up = self.up.to(x)
        if not hidden.dtype == up.dtype == answer.dtype:
            return answer + F.linear(self.scale * hidden, up).to(answer.dtype)
        # Product, scale and sum in one: no tensor of the answer's size in between, and in bf16 one rounding less.
        rows, hidden = answer.reshape(-1, answer.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        return torch.addmm(rows, hidden, up.t(), alpha=self.scale).view_as(answer)


def _bypass(part: nn.Module, settings: LoRASettings, seed: int, name: str) -> LoRALayer:
    features = layer_features(part)
    assert features is not None  # `select_layers` gives linear layers only
    return LoRALayer(*features, settings, _generator(seed, name))


class LoRA(nn.Module):
    """Bypasses for the chosen layers of one network; its parameters are what is trained.

    It starts detached. While attached, every call of a chosen layer adds the bypass, also when a block is computed again
    under activation checkpointing; a backward pass therefore belongs inside the attachment (and the ``disabled``) that
    its forward pass saw. Dropout is active in ``train()`` mode only and draws from torch's global random state.

    Args:
        module: the network; it is neither changed nor owned.
        settings: size and place.
        seed: of A; every layer draws from a generator of its own, by its name, so that the same seed gives the same
            bytes whatever other layers are chosen.
        model: see :func:`select_layers`.

    Attributes:
        model: that it is of; None for a network of no known model.

    Raises:
        ValueError: if ``settings.layers`` does not fit the network.

    >>> net = nn.Sequential(nn.Linear(4, 3))
    >>> lora = LoRA(net, LoRASettings(rank=2, layers="all"))
    >>> sorted(lora.tensors())
    ['diffusion_model.0.alpha', 'diffusion_model.0.lora_down.weight', 'diffusion_model.0.lora_up.weight']
    """

    def __init__(
        self,
        module: nn.Module,
        settings: LoRASettings = LoRASettings(),
        seed: int = 0,
        model: Optional[EditModel] = None,
    ):
        super().__init__()
        self.settings = settings
        self.model = model or _model_of(module)
        # A dict: its modules are not registered as parts.
        self.targets = select_layers(module, settings.layers, self.model)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._disabled = 0
        with torch.inference_mode(False):  # ComfyUI's nodes run in it, and its tensors cannot be trained
            self.layers = nn.ModuleList(_bypass(part, settings, seed, name) for name, part in self.targets.items())

    def named_layers(self) -> Iterator[tuple[str, LoRALayer]]:
        """(name of the network's layer, its bypass) of each."""
        for name, layer in zip(self.targets, self.layers):
            assert isinstance(layer, LoRALayer)
            yield name, layer

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def attach(self) -> LoRA:
        """Add the bypasses from now on; nothing happens if they are there."""
        if not self._hooks:
            for part, layer in zip(self.targets.values(), self.layers):
                self._hooks.append(part.register_forward_hook(self._hook(layer), with_kwargs=True))
        return self

    def detach(self) -> None:
        """Leave the network as it was; nothing happens if it is."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base's own output; can be nested."""
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    def _hook(self, layer: nn.Module) -> Callable[..., Optional[Tensor]]:
        def add(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Optional[Tensor]:
            if self._disabled:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            return layer(x, output)

        return add

    def tensors(self, prefix: str = PREFIX, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What a file holds, on the CPU: ``X.lora_down.weight`` [rank, in], ``X.lora_up.weight`` [out, rank], ``X.alpha``.

        Alpha is float32 always: loaders scale by alpha / rank where it exists, and by 1 where it does not.
        """
        state = {}
        for name, layer in self.named_layers():
            for key, value in (("lora_down.weight", layer.down), ("lora_up.weight", layer.up)):
                state[f"{prefix}{name}.{key}"] = value.detach().to("cpu", dtype, copy=True)
            state[f"{prefix}{name}.alpha"] = torch.tensor(float(self.settings.alpha))
        return state

    def save(
        self,
        path: Union[str, Path],
        metadata: Optional[Mapping[str, str]] = None,
        dtype: torch.dtype = torch.float32,
        prefix: str = PREFIX,
    ) -> None:
        """Write :meth:`tensors` as a safetensors file, whole or not at all, the same bytes for the same LoRA.

        Args:
            path: ends with ``.safetensors``.
            metadata: texts by name, see :meth:`described`.
            dtype: of the matrices in the file.
            prefix: of their names; a LoRA of diffusers' FluxTransformer2DModel is found by ``"transformer."``.

        Raises:
            ValueError: for another suffix, metadata that is not text, an integer dtype, weights that are not finite.
        """
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        write_safetensors(path, self.tensors(prefix, dtype), self.described(metadata or {}))

    def described(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Texts for the header of a file, with the settings as JSON under ``lora``, and the model."""
        known = {MODEL_METADATA: self.model.id} if self.model else {}
        return {**metadata, "lora": json.dumps(asdict(self.settings)), **known}

    def load_tensors(self, state: Mapping[str, Tensor], prefix: str = PREFIX) -> None:
        """Take weights as :meth:`tensors` gives them, in any floating dtype. Everything has to fit, or nothing is taken.

        Raises:
            ValueError: for another format (with whose it is), missing and surplus layers, another rank or alpha, shapes
                of another network, values that are not finite.
        """
        own = self.tensors(prefix)
        missing, surplus = [k for k in own if k not in state], [k for k in state if k not in own]
        if len(missing) == len(own):
            _refuse_other_formats(surplus, prefix)
        faults = [
            f"{len(names)} {kind} ({_some(names, 4)}{', …' if len(names) > 4 else ''})"
            for kind, names in (("missing", missing), ("not known to this LoRA", surplus))
            if names
        ]
        if faults:
            raise ValueError(f"lora: expected the layers {self.settings.layers!r}, got {'; '.join(faults)}")
        for name, layer in self.named_layers():
            self._check_layer(name, layer, *(state[f"{prefix}{name}.{k}"] for k in _KEYS))
        with torch.no_grad():
            for name, layer in self.named_layers():
                layer.down.copy_(state[f"{prefix}{name}.{_KEYS[0]}"])
                layer.up.copy_(state[f"{prefix}{name}.{_KEYS[1]}"])

    def _check_layer(self, name: str, layer: LoRALayer, down: Tensor, up: Tensor, alpha: Tensor) -> None:
        rank, wanted = self.settings.rank, self.settings.alpha
        if down.ndim == 2 and up.ndim == 2 and down.shape[0] == up.shape[1] != rank:
            raise ValueError(f"lora: expected rank {rank}, got {down.shape[0]} in {name}")
        if down.shape != layer.down.shape or up.shape != layer.up.shape:
            raise ValueError(
                f"lora: expected down {list(layer.down.shape)} and up {list(layer.up.shape)} for {name}, got "
                f"{list(down.shape)} and {list(up.shape)}; it was made for another network"
            )
        if alpha.numel() != 1 or not math.isclose(
            alpha.item(), wanted, rel_tol=1e-2 if alpha.dtype.itemsize < 4 else 1e-6
        ):
            raise ValueError(f"lora: expected alpha {wanted:g}, got {alpha.tolist()} in {name}")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"lora: {name} has values that are not finite")


_KEYS = ("lora_down.weight", "lora_up.weight", "alpha")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _refuse_other_formats(names: list[str], prefix: str) -> None:
    for other, whose in _OTHER_FORMATS.items():
        found = [name for name in names if name.startswith(other)]
        if found and other != prefix:
            raise ValueError(
                f"lora: expected names that begin with {prefix!r}, got {found[0]!r}, {whose} format. Training continues "
                "from files that this trainer saved"
            )
