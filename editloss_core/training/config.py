"""A training run as one TOML file: what stands in it, and how it is written. :mod:`.config_reader` reads it."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Iterator, Mapping, Union, get_type_hints

from ..encoders.base import Encoder
from ..encoders.decoder_features import VAEDecoderEncoder, check_depths
from ..encoders.spec import KINDS, EncoderSpec
from ..encoders.vae import VAEEncoder
from ..lora.lora import LoRASettings
from ..negatives import OverlaySettings
from ..objective import EditObjective, LossTerm
from ..pairs import VariantSettings
from .flow import Timesteps
from .settings import TrainingSettings

LORA_DTYPES = ("bf16", "fp16", "fp32")
LAST = "last"  # of run.resume
NO_VARIANTS = VariantSettings(count=1)
RATHER_IN_VALIDATION = ("validate_every", "previews", "preview_steps")
RATHER_IN_RUN = ("checkpoint_every", "keep")


@dataclass(frozen=True)
class ModelSection:
    """``[model]``: see :class:`~editloss_core.models.folder.ModelFolder`.

    Attributes:
        path: folder of the model in diffusers' layout.
        transformer: a single file of the transformer, in place of the folder's.
        decoder: folder of a small autoencoder (TAEF1) that decodes estimates and previews.
        dtype, quantization: how the transformer is kept.
        text_device: where captions are encoded: "auto" is where the model is trained, "cpu" spares its memory.
        guidance: what the model is told in training.
        gradient_checkpointing: compute blocks again in the backward pass.
    """

    path: str
    transformer: str = ""
    decoder: str = ""
    dtype: str = "bf16"
    quantization: str = "none"
    text_device: str = "auto"
    guidance: float = 1.0
    gradient_checkpointing: bool = True


@dataclass(frozen=True)
class PairsSection:
    """``[pairs]``: see :func:`~editloss_core.pairs.find_pairs`; ``flawed``: see :func:`~editloss_core.pair_audit.flawed.handle`."""

    folder: str
    control_folder: str = ""
    resolution: int = 1024
    default_caption: str = ""
    upscale: bool = False
    flawed: str = "leave out"


@dataclass(frozen=True)
class EstimateSection:
    """``[estimate]``: what encoders see of the one-step estimate. ``crop``: side of the window around the edit, in pixels."""

    crop: int = 512


@dataclass(frozen=True)
class ValidationSection:
    """``[validation]``: pairs that are watched, by number (drawn from the others) or in a folder of their own.

    Attributes:
        hold_out: pairs that are taken out of the training set; not if there is a folder.
        folder, control_folder: of held-out pairs.
        validate_every, previews, preview_steps: see :class:`~editloss_core.training.settings.TrainingSettings`.
        preview_guidance: what a guidance-distilled model is told for pictures; 0 is the model's own.
        preview_cfg: scale of classifier-free guidance for pictures; 0 is the model's own, 1 none.
    """

    hold_out: int = 1
    folder: str = ""
    control_folder: str = ""
    validate_every: int = 250
    previews: int = 4
    preview_steps: int = 20
    preview_guidance: float = 0.0
    preview_cfg: float = 0.0


@dataclass(frozen=True)
class RunSection:
    """``[run]``: what a run keeps and where.

    Attributes:
        folder: of checkpoints, log, pictures, report and the LoRA.
        resume: empty begins anew; "last", or the step of a checkpoint in the run's folder.
        cache: folder of latents and embeddings; empty: ``cache`` beside the run's folder.
        checkpoint_every, keep: see :class:`~editloss_core.training.settings.TrainingSettings`.
        lora_dtype: of the LoRA files: "bf16", "fp16" or "fp32".
        trackers: accelerate's names of trackers, for example "tensorboard".
    """

    folder: str
    resume: str = ""
    cache: str = ""
    checkpoint_every: int = 250
    keep: int = 3
    lora_dtype: str = "bf16"
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True)
class VAESection:
    """An encoder of ``kind = "vae"``: the latents of the model's own autoencoder."""

    image_size: int = 0


@dataclass(frozen=True)
class VAEDecoderSection:
    """An encoder of ``kind = "vae_decoder"``: features of the model's own autoencoder's decoder.

    See :class:`~editloss_core.encoders.decoder_features.VAEDecoderEncoder`.
    """

    depths: tuple[int, ...] = (1,)
    image_size: int = 0

    def __post_init__(self) -> None:
        check_depths(self.depths)


@dataclass(frozen=True)
class TimmSection:
    """An encoder of ``kind = "timm"``: see :class:`~editloss_core.encoders.TimmEncoder`."""

    model_name: str
    weights: str
    output: str = "grid"
    layer: int = -1
    image_size: int = 0
    crop: bool = False

    def spec(self, base: Path) -> EncoderSpec:
        """The encoder, not loaded yet; ``base``: folder of the relative path."""
        return _spec("timm", vars(self), base)


@dataclass(frozen=True)
class OpenCLIPSection:
    """An encoder of ``kind = "openclip"``: see :class:`~editloss_core.encoders.OpenCLIPEncoder`."""

    architecture: str
    weights: str
    output: str = "global"
    crop: bool = False

    def spec(self, base: Path) -> EncoderSpec:
        """As in :class:`TimmSection`."""
        return _spec("openclip", vars(self), base)


def _spec(kind: str, values: Mapping[str, Any], base: Path) -> EncoderSpec:
    settings = {**values, "weights": str(base / values["weights"])}
    return EncoderSpec(kind, settings.pop(KINDS[kind].first), settings)


EncoderSection = Union[VAESection, VAEDecoderSection, TimmSection, OpenCLIPSection]


def encoder_section(encoder: Encoder) -> EncoderSection:
    """What makes an equal encoder elsewhere.

    Raises:
        ValueError: for one that only the program which made it has.
    """
    if isinstance(encoder, VAEEncoder):
        size = encoder.preprocess
        if size.height == size.width:
            return VAESection(size.height)
    if isinstance(encoder, VAEDecoderEncoder):
        size = encoder.vae.preprocess
        if size.height == size.width:
            return VAEDecoderSection(encoder.depths, size.height)
    arguments = encoder.arguments or {}
    for section in (TimmSection, OpenCLIPSection):
        wanted = {f.name for f in fields(section)}
        if arguments.keys() == wanted and isinstance(arguments.get("image_size", 0), int):
            return section(**arguments)
    raise ValueError(
        f"objective: the encoder {encoder.info.name!r} cannot be made outside this program; use VAE Latents, VAE Decoder Features, timm "
        "or OpenCLIP"
    )


ENCODER_KINDS: Mapping[str, type[EncoderSection]] = {
    "vae": VAESection,
    "vae_decoder": VAEDecoderSection,
    "timm": TimmSection,
    "openclip": OpenCLIPSection,
}


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that a run needs to know; equal to another one if all of it is.

    Attributes:
        model, pairs, estimate, validation, run: the sections of these names.
        encoders: name → its section.
        objective: ``[[objective]]``, a term each.
        training: ``[training]``, ``[timesteps]``, and what of its fields stands in ``[validation]`` and ``[run]``.
        lora: ``[lora]``.
        overlay: ``[overlay]``.
        variants: ``[variants]``, of the pairs that are trained on; without the section there are none.
    """

    model: ModelSection
    pairs: PairsSection
    run: RunSection
    encoders: Mapping[str, EncoderSection] = field(default_factory=dict)
    objective: EditObjective = EditObjective()
    training: TrainingSettings = TrainingSettings()
    lora: LoRASettings = LoRASettings()
    estimate: EstimateSection = EstimateSection()
    overlay: OverlaySettings = OverlaySettings()
    variants: VariantSettings = NO_VARIANTS
    validation: ValidationSection = ValidationSection()


@dataclass(frozen=True)
class Key:
    """A key of a section: its type as the annotation has it, and its default (``MISSING`` if it has to be there)."""

    type: Any
    default: Any


def keys_of(kind: type, leave_out: tuple[str, ...] = ()) -> dict[str, Key]:
    """The keys of a section that is a dataclass."""
    types = get_type_hints(kind)
    found = {}
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.name not in leave_out:
            found[f.name] = Key(types[f.name], default)
    return found


SECTIONS: dict[str, dict[str, Key]] = {
    "model": keys_of(ModelSection),
    "pairs": keys_of(PairsSection),
    "variants": keys_of(VariantSettings),
    "training": keys_of(TrainingSettings, ("timesteps", *RATHER_IN_VALIDATION, *RATHER_IN_RUN)),
    "timesteps": keys_of(Timesteps),
    "lora": keys_of(LoRASettings),
    "estimate": keys_of(EstimateSection),
    "overlay": keys_of(OverlaySettings),
    "validation": keys_of(ValidationSection),
    "run": keys_of(RunSection),
}
REQUIRED = ("model", "pairs", "run")
TERM_KEYS = keys_of(LossTerm)
ENCODER_KEYS = {kind: keys_of(section) for kind, section in ENCODER_KINDS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def to_toml(config: TrainingConfig, heading: str = "") -> str:
    """The file of a config, every setting written out (of variants, if there are any); reading it gives an equal config.

    Args:
        heading: lines of a comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for name, values in _sections(config):
        lines += ["", name, *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines).strip() + "\n"


def _sections(config: TrainingConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(header line, values) in the order of the file."""
    training = config.training
    sources = {"training": training, "timesteps": training.timesteps}
    for name in ("model", "pairs", *(["variants"] if config.variants != NO_VARIANTS else [])):
        yield f"[{name}]", vars(getattr(config, name))
    for name, section in config.encoders.items():
        kind = next(kind for kind, cls in ENCODER_KINDS.items() if isinstance(section, cls))
        yield "[[encoders]]", {"name": name, "kind": kind, **vars(section)}
    for term in config.objective.terms:
        known = {f.name: getattr(term, f.name) for f in fields(term)}
        yield "[[objective]]", {key: value for key, value in known.items() if value is not None}
    for name in ("training", "timesteps", "lora", "estimate", "overlay", "validation", "run"):
        source = sources.get(name) or getattr(config, name)
        yield f"[{name}]", {key: getattr(source, key) for key in SECTIONS[name]}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; 0x7f has to be written as one in TOML alone.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
