"""An edit model from a folder in diffusers' layout: looked at before any work, loaded part by part when it is its turn.

    FOLDER/model_index.json, transformer/, vae/, and the text encoders and tokenizers of the model

Nothing is ever downloaded. diffusers, transformers and what quantises are imported where they are used.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional

import torch
from torch import nn

from . import registry
from .base import EditModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTIZATIONS = {  # → packages
    "none": (),
    "nf4": ("bitsandbytes",),
    "int8": ("bitsandbytes",),
    "torchao_int8": ("torchao",),
}
SINGLE_FILE_PREFIXES = ("", "model.diffusion_model.")  # under which programs keep a transformer in the original layout


@dataclass(frozen=True)
class ModelFolder:
    """Where the parts of a model are, and how they are to be loaded.

    Attributes:
        folder: in diffusers' layout.
        transformer: a single .safetensors file of the transformer in the original layout, in place of the weights in the
            folder's ``transformer/``, whose config.json is still read; None without one.
        decoder: folder of a small autoencoder that decodes estimates and previews (TAEF1), or None.
        dtype: a key of :data:`DTYPES`: of the transformer and the text encoders. The autoencoder is float32.
        quantization: a key of :data:`QUANTIZATIONS`: of the transformer's weights.
    """

    folder: Path
    transformer: Optional[Path] = None
    decoder: Optional[Path] = None
    dtype: str = "bf16"
    quantization: str = "none"

    @cached_property  # read once: every part that is loaded asks for it
    def edit_model(self) -> EditModel:
        """By model_index.json, and the transformer's config.json where models share a pipeline.

        Raises:
            ValueError: it is of no known model, or not there.
        """
        index = _json(self.folder / "model_index.json")
        if isinstance(index, str):
            raise ValueError(
                f"path: expected an edit model in diffusers' layout ({registry.titles()}) in {self.folder}; {index}"
            )
        config = _json(self.folder / "transformer" / "config.json")
        try:
            return registry.of_pipeline(index, {} if isinstance(config, str) else config)
        except ValueError as error:
            raise ValueError(f"path: {error} ({self.folder})") from None

    def faults(self) -> list[str]:
        """Everything that would stop :meth:`load_transformer` and the others, found without loading a weight."""
        faults = []
        for name, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("quantization", self.quantization, QUANTIZATIONS),
        ):
            if value not in known:
                faults.append(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        for package in QUANTIZATIONS.get(self.quantization, ()):
            if importlib.util.find_spec(package) is None:
                faults.append(f"quantization: {self.quantization} needs a package; pip install {package}")
        if not self.folder.is_dir():
            return [*faults, f"path: {self._no_folder()}"]
        try:
            model = self.edit_model
        except ValueError as error:
            return [*faults, str(error)]
        faults += self._faults_of_parts(model)
        if self.transformer is not None:
            faults += _faults_of_single_file(self.transformer, model)
        if self.decoder is not None:
            faults += self._faults_of_decoder(self.decoder, model)
        return faults

    def _no_folder(self) -> str:
        if self.folder.is_file():
            single = self.folder.suffix.lower() == ".safetensors"
            other = "; a single file of the transformer goes into transformer, beside the folder" if single else ""
            return f"expected a folder in diffusers' layout, {self.folder} is a file{other}"
        missing = f"there is no folder {self.folder}"
        if self.folder.parent.is_dir() or not self.folder.parent.parent.is_dir():
            return missing
        name = f"{self.folder.parent.name}/{self.folder.name}"
        return f"{missing}; if {name} is a name of a hub: nothing is downloaded, give the folder that it was saved to"

    def faults_on(self, device: torch.device) -> list[str]:
        """What would stop loading on this device only: a check may be made on another machine than the training."""
        if "bitsandbytes" in QUANTIZATIONS.get(self.quantization, ()) and device.type == "cpu":
            return [
                f"quantization: diffusers quantises by bitsandbytes ({self.quantization}) on a GPU only, this is {device}"
            ]
        return []

    def config(self, part: str) -> Mapping[str, Any]:
        """The config.json of a part."""
        return json.loads((self.folder / part / "config.json").read_text(encoding="utf-8"))

    @property
    def text_fingerprint(self) -> str:
        """Of all that makes a caption's embedding."""
        parts = self.edit_model.parts
        return hash_folders([self.folder / part for part in (*parts.texts, *parts.tokenizers)], self.dtype)

    def _faults_of_parts(self, model: EditModel) -> list[str]:
        faults: list[str] = []
        configs = {}
        wanted = {"transformer": model.parts.transformer, "vae": model.parts.autoencoder, **model.parts.texts}
        for part, kind in wanted.items():
            config = _json(self.folder / part / "config.json")
            if isinstance(config, str):
                faults.append(f"path: {part}: {config}")
                continue
            found = config.get("_class_name") or (config.get("architectures") or [None])[0]
            if found != kind:
                faults.append(f"path: {part}: expected a {kind}, got a {found}")
                continue
            configs[part] = config
            single = part == "transformer" and self.transformer is not None
            if not single and not any((self.folder / part).glob("*.safetensors")):
                faults.append(f"path: {part}: there are no weights (.safetensors) in {self.folder / part}")
        for part in model.parts.tokenizers:
            if not any((self.folder / part / n).is_file() for n in ("tokenizer.json", "vocab.json", "spiece.model")):
                faults.append(f"path: {part}: there is no tokenizer in {self.folder / part}")
        for part in model.parts.processors:
            if not any(
                (self.folder / part / n).is_file() for n in ("preprocessor_config.json", "processor_config.json")
            ):
                where = self.folder / part
                faults.append(
                    f"path: {part}: there is no preprocessor_config.json, for pictures with captions, in {where}"
                )
        return faults + _misfits(configs, model)

    def _faults_of_decoder(self, decoder: Path, model: EditModel) -> list[str]:
        if decoder.is_file():
            return [f"decoder: expected a folder, {decoder} is a file"]
        config = _json(decoder / "config.json")
        if isinstance(config, str):
            return [f"decoder: {config}"]
        kind = config.get("_class_name")
        if kind not in model.parts.decoders:
            return [f"decoder: expected a folder of a {' or a '.join(model.parts.decoders)}, got a {kind}"]
        own = _json(self.folder / "vae" / "config.json")
        wanted = latent_channels(own) if isinstance(own, dict) else None
        found = latent_channels(config)
        if wanted is not None and found != wanted:
            return [f"decoder: expected one for latents of {wanted} channels, got {found}"]
        return []

    # -- loading ----------------------------------------------------------------------------------------------------

    def load_text(self, device: torch.device) -> Any:
        """The model's pipeline with text encoders and tokenizers alone."""
        import diffusers

        kind = getattr(diffusers, self.edit_model.parts.pipeline)
        with warnings.catch_warnings():  # the name that older versions know is deprecated in newer ones
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = kind.from_pretrained(
                str(self.folder), transformer=None, vae=None, torch_dtype=DTYPES[self.dtype], local_files_only=True
            )
        return pipeline.to(device)

    def load_vae(self, device: torch.device) -> nn.Module:
        """The autoencoder, frozen, in float32: it is small, and half precision overflows in it."""
        import diffusers

        kind = getattr(diffusers, self.edit_model.parts.autoencoder)
        return _frozen(kind.from_pretrained(str(self.folder), subfolder="vae", local_files_only=True), device)

    def load_decoder(self, device: torch.device) -> Optional[nn.Module]:
        """The small autoencoder, frozen; None without one."""
        if self.decoder is None:
            return None
        import diffusers

        config = json.loads((self.decoder / "config.json").read_text(encoding="utf-8"))
        kind = getattr(diffusers, config["_class_name"])
        return _frozen(kind.from_pretrained(str(self.decoder), local_files_only=True), device)

    def load_transformer(self, device: torch.device) -> nn.Module:
        """The transformer, frozen, quantised if so chosen."""
        import diffusers

        kind = getattr(diffusers, self.edit_model.parts.transformer)
        options: dict[str, Any] = {"torch_dtype": DTYPES[self.dtype], "local_files_only": True}
        if self.quantization != "none":  # quantised on the device: bitsandbytes' weights cannot be moved afterwards
            options |= {"quantization_config": self._quantization_config(), "device_map": {"": device}}
        if self.transformer is None:
            made = kind.from_pretrained(str(self.folder), subfolder="transformer", **options)
        else:
            made = kind.from_single_file(
                str(self.transformer), config=str(self.folder), subfolder="transformer", **options
            )
        made.requires_grad_(False).eval()
        return made if self.quantization != "none" else made.to(device)

    def _quantization_config(self) -> Any:
        import diffusers

        dtype = DTYPES[self.dtype]
        if self.quantization == "nf4":
            return diffusers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype
            )
        if self.quantization == "int8":
            return diffusers.BitsAndBytesConfig(load_in_8bit=True)
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig())


def empty_network(model: EditModel, config: Mapping[str, Any]) -> nn.Module:
    """diffusers' network of a config without its weights (on torch's meta device)."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, model.parts.transformer).from_config(dict(config))


def free_memory() -> None:
    """Give back what was let go: text encoders before the transformer comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    return module.requires_grad_(False).eval().to(device)


def _json(path: Path) -> dict[str, Any] | str:
    """The file's content, or what is wrong with it."""
    if not path.is_file():
        return f"there is no {path.name} in {path.parent}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{path} is not JSON ({error})"
    return found if isinstance(found, dict) else f"{path} is not a JSON object"


def latent_channels(vae: Mapping[str, Any]) -> Optional[int]:
    """Of an autoencoder's config; None where it does not say."""
    return vae.get("latent_channels", vae.get("z_dim"))


def _misfits(configs: Mapping[str, Mapping[str, Any]], model: EditModel) -> list[str]:
    """Parts that do not belong together, by their sizes."""
    faults = []
    network, vae, patch = configs.get("transformer", {}), configs.get("vae", {}), model.patch
    inputs, channels = network.get("in_channels"), latent_channels(vae)
    patch *= (vae.get("patch_size") or [1])[0]  # by which some pack their latents themselves
    if inputs and channels and inputs != patch**2 * channels:
        faults.append(
            f"path: transformer: expected in_channels {patch**2 * channels} ({patch}×{patch} latents of {channels} channels), "
            f"got {inputs}: that is not {model.parts.others or model.title}"
        )
    # Some count what comes out by latents, others by tokens.
    outputs, side = network.get("out_channels"), network.get("patch_size", 1)
    if inputs and outputs and outputs * side**2 != inputs:
        faults.append(f"path: transformer: expected out_channels {inputs // side**2}, got {outputs}")
    for part, theirs, mine in model.parts.text_widths:
        wanted, found = network.get(mine), _nested(configs.get(part, {}), theirs)
        count = model.parts.text_layers
        if wanted and found and wanted != count * found:
            taken = f", which the transformer takes{f' {count} times' if count > 1 else ''}"
            faults.append(f"path: {part}: expected {theirs} {wanted // count}{taken}, got {found}")
    return faults


def _nested(config: Mapping[str, Any], key: str) -> Any:
    """The value of ``part.name`` in a config with parts; None without one."""
    head, _, rest = key.partition(".")
    value = config.get(head)
    return _nested(value or {}, rest) if rest else value


def _faults_of_single_file(path: Path, model: EditModel) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        return [
            f"transformer: expected a .safetensors file, {path} is a folder; in diffusers' layout it goes into path"
        ]
    if path.suffix.lower() != ".safetensors":
        return [f"transformer: expected a .safetensors file, got {path.name}"]
    if not path.is_file():
        return [f"transformer: there is no file {path}"]
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        return [f"transformer: {path.name} is not a whole safetensors file ({error})"]
    if not any(prefix + model.parts.original_key in names for prefix in SINGLE_FILE_PREFIXES):
        return [
            f"transformer: expected {model.title}'s transformer in the original layout, {path.name} has no "
            f"{model.parts.original_key} among its {len(names)} tensors; a file from diffusers belongs in the folder's transformer/"
        ]
    return []


def hash_folders(folders: Iterable[Path], *texts: str) -> str:
    """sha256 over the files of folders: small ones by content, weights by name, size and time of change.

    T5's weights are 9 GB: what reads them only to find that they are known has lost what the cache saves.
    """
    digest = hashlib.sha256("\0".join(texts).encode())
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            status = path.stat()
            digest.update(f"\0{folder.name}/{path.relative_to(folder).as_posix()} {status.st_size}\0".encode())
            large = status.st_size > 16_000_000
            digest.update(str(status.st_mtime_ns).encode() if large else path.read_bytes())
    return digest.hexdigest()
