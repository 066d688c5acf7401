"""A training run from its config, with diffusers' model: pairs, captions, encoders, the trainer, and what it leaves."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, TypeVar, Union

import torch
from torch import nn

from ..encoders.base import Encoder
from ..encoders.vae import VAEEncoder
from ..files import check_writable
from ..hashing import hash_module
from ..lora.keys import save_both
from ..lora.lora import LoRA, adapted_sizes
from ..models.autoencoder import VAEDecoder, vae_decoder_encoder, vae_encoder
from ..models.base import Preview
from ..models.captions import Captions, caption_sets, check_references, encode_captions, same_words
from ..models.denoiser import DiffusersDenoiser
from ..models.folder import DTYPES, ModelFolder, empty_network, free_memory
from ..models.footprint import Footprint
from ..pair_audit.flawed import handle
from ..pairs import PairSet, find_pairs, with_variants
from ..processes import check_accelerator, check_batch, launched, place
from ..progress import ConsoleBar, Progress
from .config import PairsSection, RunSection, TrainingConfig, VAEDecoderSection, VAESection, ValidationSection
from .config_reader import ConfigError, checkpoint_of, model_folder, read_config, sections_of
from .host import ConsoleHost
from .prepare import Prepared, describe_variants, prepare
from .resume import resumable
from .trainer import Trainer, TrainingResult, metadata

LORA_FILE = "lora.safetensors"  # in ComfyUI's keys; beside it lora_diffusers.safetensors
GIB = 1 << 30
Say = Callable[[str], None]
_T = TypeVar("_T")


# ---------------------------------------------------------------------------------------------------------------------
# Before any work
# ---------------------------------------------------------------------------------------------------------------------


class RunStopped(RuntimeError):
    """Something around a run stopped it after it had learnt: a full disk, a file that went away; what was learnt is kept."""


@dataclass(frozen=True)
class Plan:
    """What a config comes to: everything that can be known without loading a weight.

    Attributes:
        config: of the run.
        base: folder of its relative paths.
        files: the model's.
        pairs, held_out: checked; held_out is None if nothing is watched.
        footprint: of the model and its LoRA.
        checkpoint: to go on from, or None.
    """

    config: TrainingConfig
    base: Path
    files: ModelFolder
    pairs: PairSet
    held_out: Optional[PairSet]
    footprint: Footprint
    checkpoint: Optional[Path]

    @property
    def folder(self) -> Path:
        """Of the run."""
        return run_folder(self.config.run, self.base)

    @property
    def cache(self) -> Path:
        return cache_folder(self.config.run, self.base)

    @property
    def preview_cfg(self) -> float:
        """Scale of classifier-free guidance in the pictures of held-out pairs."""
        return self.config.validation.preview_cfg or self.files.edit_model.preview_cfg

    def describe(self, processes: int = 1) -> str:
        """The plan in a few lines. Memory is arithmetic, of one process that has the whole model."""
        config, footprint, model = self.config, self.footprint, self.config.model
        settings, largest = config.training, max(self.pairs.buckets, key=lambda size: size[0] * size[1])
        parts = {"weights": footprint.weight_bytes(model.dtype, model.quantization)}
        parts |= footprint.lora_bytes(settings.optimizer, bool(settings.ema))
        share = -(-settings.batch_size // processes)
        further = max(len(pair.references) for pair in self.pairs)
        tokens = self.files.edit_model.sample_tokens(*largest, 1 + further)
        parts["activations"] = footprint.activation_bytes(tokens, share, model.dtype, model.gradient_checkpointing)
        kept = model.dtype if model.quantization == "none" else model.quantization
        buckets = ", ".join(f"{w}×{h}: {len(members)}" for (h, w), members in self.pairs.buckets.items())
        held = f"{len(self.held_out)} held out" if self.held_out is not None else "none held out"
        terms = [f"{t.weight:g} × {t.name} ({t.encoder})" for t in config.objective.terms]
        passes = f", {settings.accumulation} passes each" if settings.accumulation > 1 else ""
        start = f"go on from {self.checkpoint.name}" if self.checkpoint else "begin anew"
        lines = [
            f"model       {self.files.transformer or self.files.folder}",
            f"            {footprint.parameters:,} parameters in {kept}, {footprint.blocks} blocks",
            f"LoRA        {config.lora.layers}, rank {config.lora.rank}: {footprint.layers} layers, "
            f"{footprint.trainable:,} parameters",
            f"pairs       {len(self.pairs)} to train on ({buckets}), {held}",
            f"objective   {'; '.join(terms) or 'flow matching alone'}",
            f"training    {settings.steps} steps of {settings.batch_size} pairs{passes}, {settings.optimizer}, {start}",
            f"run         {self.folder}",
            f"memory      about {sum(parts.values()) / GIB:.1f} GiB with all weights at {tokens} tokens a sample, by arithmetic: "
            + ", ".join(f"{name} {size / GIB:.2g}" for name, size in parts.items()),
        ]
        if config.variants.count > 1:
            lines.insert(4, f"variants    {describe_variants(self.pairs)}")
        if config.encoders:
            lines.append("            and what the encoders of the objective take")
        notes = dict.fromkeys((*self.pairs.notes, *(self.held_out.notes if self.held_out is not None else ())))
        return "\n".join([*lines, *(f"note        {note}" for note in notes)])


def plan(config: TrainingConfig, base: Path, progress: Optional[Progress] = None) -> Plan:
    """Look at the pairs, the shape of the model, and whether the run's folders can be written to.

    Raises:
        PairProblems: everything that is wrong with the pairs.
        NotWritten: a folder that cannot be written to.
        ValueError: what does not fit together: layers that the model does not have, too few pairs, another run's checkpoint.
            Of several of these, one with the texts of all.
    """

    def of_model() -> tuple[ModelFolder, Footprint, Optional[Path]]:
        files = model_folder(config.model, base)
        edit_model = files.edit_model
        network = empty_network(edit_model, files.config("transformer"))
        adapted = adapted_sizes(network, config.lora.layers, edit_model)
        checkpoint = checkpoint_of(config.run, base)
        if checkpoint is not None:
            resumable(checkpoint, LoRA(network, config.lora, model=edit_model), config.training)
        return files, Footprint.of(edit_model, network, adapted, config.lora.rank), checkpoint

    together = Together()
    made = together.attempt(of_model)
    for folder in (run_folder(config.run, base), cache_folder(config.run, base)):
        together.attempt(functools.partial(check_writable, folder))
    sets = together.attempt(lambda: load_pairs(config, base, progress))
    together.raise_if_any()
    assert made is not None and sets is not None
    check_references(made[0].edit_model, [some for some in sets if some is not None])
    return Plan(config, base, made[0], *sets, *made[1:])


def run_folder(section: RunSection, base: Path) -> Path:
    return base / section.folder


def cache_folder(section: RunSection, base: Path) -> Path:
    return base / section.cache if section.cache else run_folder(section, base).parent / "cache"


class Together:
    """Several things that can be wrong, to be told at once."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def attempt(self, work: Callable[[], _T]) -> Optional[_T]:
        """``work``'s answer; None if it raises ValueError or OSError, which is kept."""
        try:
            return work()
        except (ValueError, OSError) as error:
            if str(error) not in map(str, self._errors):
                self._errors.append(error)
            return None

    def raise_if_any(self) -> None:
        """What was kept: itself if it is one, else a ValueError with the texts of all."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise ValueError("\n".join(map(str, self._errors)))


def plan_of(path: Path, progress: Optional[Progress] = None) -> Plan:
    """:func:`plan` of the config in a file. Where something is wrong with the config, its pairs are looked at all the same.

    Raises:
        ConfigError, and as :func:`plan`.
    """
    together = Together()
    config = together.attempt(lambda: read_config(path))
    if config is not None:
        return plan(config, path.parent, progress)
    try:
        sections = sections_of(path)
    except ConfigError:  # no TOML: it has been told
        sections = {}
    of_pairs = sections.get("pairs", PairsSection(""))
    for section in (of_pairs, sections.get("validation", ValidationSection())):
        if section.folder and (path.parent / section.folder).is_dir():
            together.attempt(functools.partial(found_pairs, of_pairs, section, path.parent, progress))
    if "run" in sections:
        for folder in (run_folder(sections["run"], path.parent), cache_folder(sections["run"], path.parent)):
            together.attempt(functools.partial(check_writable, folder))
    together.raise_if_any()
    raise AssertionError("a config that cannot be read has been told")


def found_pairs(
    section: PairsSection,
    where: Union[PairsSection, ValidationSection],
    base: Path,
    progress: Optional[Progress] = None,
) -> PairSet:
    """The pairs of a section's folders, as ``[pairs]`` wants them.

    Raises:
        PairProblems, FileNotFoundError, ValueError: see :func:`~editloss_core.pairs.find_pairs`.
    """
    return find_pairs(
        base / where.folder, base / where.control_folder if where.control_folder else "", resolution=section.resolution,
        default_caption=section.default_caption, upscale=section.upscale, progress=progress,
    )  # fmt: skip


def load_pairs(
    config: TrainingConfig, base: Path, progress: Optional[Progress] = None
) -> tuple[PairSet, Optional[PairSet]]:
    """(to train on, with their variants; to watch, without any)."""

    together, watched = Together(), None
    training = together.attempt(lambda: found_pairs(config.pairs, config.pairs, base, progress))
    if config.validation.folder:
        watched = together.attempt(lambda: found_pairs(config.pairs, config.validation, base, progress))
    together.raise_if_any()
    assert training is not None
    handled = handle(training, config.pairs.flawed, progress)
    pairs = replace(handled.pairs, notes=(*handled.pairs.notes, *handled.untold))
    if watched is None and config.validation.hold_out:
        pairs, watched = pairs.split(config.validation.hold_out, config.training.seed)
    return with_variants(pairs, config.variants), watched


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def accelerator_for(plan: Plan) -> Any:
    """accelerate's ``Accelerator``, which takes processes, devices and sharding from what launched this one.

    Raises:
        ValueError: a configuration of accelerate in which the processes do not see one another.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(plan.config.run.trackers) or None, project_dir=str(plan.folder))
    count = launched()
    if count != accelerator.num_processes:  # each would train for itself, and write over the others
        raise ValueError(
            f"processes: {count} were launched, and accelerate sees {accelerator.num_processes}; its configuration does not "
            "fit these devices (FSDP needs GPUs; several processes on CPUs are MULTI_CPU)"
        )
    check_batch(plan.config.training.batch_size, count)
    return accelerator


def check_device(plan: Plan, device: torch.device) -> None:
    """ValueError for what would stop the run on this device only."""
    faults = plan.files.faults_on(device)
    if faults:
        raise ValueError("; ".join(faults))


def run(plan: Plan, accelerator: Any, say: Say = print) -> TrainingResult:
    """Everything from captions to the LoRA files.

    Args:
        plan: of the run.
        accelerator: accelerate's ``Accelerator``: device and processes.
        say: gets lines for a person, in the main process only.

    Raises:
        ValueError: weights that do not fit, and what :func:`~.prepare.prepare` and :class:`~.trainer.Trainer` refuse.
        NotWritten: the cache or the run's folder cannot be written.
        SelfCheckFailed, NonFinite, OutOfMemory: see :meth:`~.trainer.Trainer.run`.
        RunStopped: it was stopped after steps that were learnt from, by a full disk for example.
    """
    config, device, main = plan.config, accelerator.device, accelerator.is_main_process
    check_accelerator(accelerator)
    check_device(plan, device)
    vae = plan.files.load_vae(device)
    made = make_encoders(config, plan.base, vae, device)
    with accelerator.main_process_first():  # which fills the cache; the others read it
        captions = _captions(plan, device, main)
    free_memory()
    latents = vae_encoder(vae)
    train, watched = (_prepared(some, latents, made, plan, accelerator) for some in (plan.pairs, plan.held_out))
    told = plan.files.edit_model.words
    trainer = make_trainer(
        plan, accelerator, VAEDecoder(plan.files.load_decoder(device) or vae), made, train, watched, captions
    )
    trainer.notes += same_words({pair.caption: told(made) for pair, made in zip(train.pairs, captions.own)})
    if plan.checkpoint is not None:
        trainer.resume(plan.checkpoint)
    begun = trainer.step
    try:
        result = trainer.run()
        if main:
            if result.self_check:
                say(result.self_check)
            for note in (*trainer.warnings, *train.notes, *trainer.notes):
                say(f"note: {note}")
            dtype = DTYPES[config.run.lora_dtype]
            for path in save_both(result.lora, plan.folder / LORA_FILE, metadata(trainer), dtype):
                say(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    except (OSError, ValueError) as error:
        if trainer.step == begun:
            raise
        kept = trainer.where_kept()
        raise RunStopped(str(error) if kept in str(error) else f"{error}\n{kept}") from error
    return result


def make_encoders(config: TrainingConfig, base: Path, vae: nn.Module, device: torch.device) -> dict[str, Encoder]:
    """The encoders that the objective reads, by name.

    Raises:
        ValueError: weights that do not fit their network.
    """
    made: dict[str, Encoder] = {}
    for name in config.objective.encoders:
        section = config.encoders[name]
        if isinstance(section, VAESection):
            encoder = vae_encoder(vae, section.image_size, scaled=False)
        elif isinstance(section, VAEDecoderSection):
            encoder = vae_decoder_encoder(vae, section.depths, section.image_size)
        else:
            encoder = section.spec(base).load(device)
        encoder.info = replace(encoder.info, name=name)
        made[name] = encoder
    return made


def make_trainer(
    plan: Plan,
    accelerator: Any,
    decode: VAEDecoder,
    made: Mapping[str, Encoder],
    train: Prepared,
    watched: Optional[Prepared],
    captions: Captions,
) -> Trainer:
    """The trainer of a plan, with what was loaded and encoded for it; the transformer is loaded here."""
    config, model = plan.config, plan.config.model
    # Weights that are shared out never are on one device together.
    shared_out = getattr(accelerator, "is_fsdp2", False)
    transformer = plan.files.load_transformer(torch.device("cpu") if shared_out else accelerator.device)
    edit_model = plan.files.edit_model
    denoiser = DiffusersDenoiser(
        edit_model, transformer, model.guidance, model.gradient_checkpointing, accelerator.device
    )
    lora = LoRA(transformer, config.lora, config.training.seed, edit_model)
    denoiser.module = place(transformer, accelerator)
    host = ConsoleHost(config.training.steps, accelerator.is_main_process)
    return Trainer(
        denoiser, lora, train, captions.own, config.training,
        objective=config.objective, encoders=made, decode=decode, dropped=captions.dropped,
        validation=watched, validation_conditioning=captions.watched,
        preview=Preview(config.validation.preview_guidance or edit_model.preview_guidance, plan.preview_cfg, captions.away),
        folder=plan.folder,
        info={
            "model": f"{edit_model.parts.transformer} in {model.dtype if model.quantization == 'none' else model.quantization}",
            "guidance": model.guidance,
            "decoder": hash_module(decode.vae) if train.reads_pictures else "",
        },
        resolution=config.pairs.resolution, checkpointing=model.gradient_checkpointing, cache=plan.cache, host=host,
        accelerator=accelerator,
    )  # fmt: skip


def _captions(plan: Plan, device: torch.device, shown: bool) -> Captions:
    """What the model is told of all pairs of the run."""
    place, files = torch.device("cpu") if plan.config.model.text_device == "cpu" else device, plan.files
    settings = plan.config.training
    sampled = settings.previews if settings.preview_steps else 0
    sets = caption_sets(plan.pairs, plan.held_out, settings.caption_dropout, sampled, plan.preview_cfg)
    with ConsoleBar("captions", disable=not shown, delay=1.0) as bar:
        made = encode_captions(
            files.edit_model, sets, lambda: files.load_text(place), files.text_fingerprint, plan.cache, bar.update
        )
    return Captions(*made)


def _prepared(
    pairs: Optional[PairSet], vae: VAEEncoder, made: Mapping[str, Encoder], plan: Plan, accelerator: Any
) -> Optional[Prepared]:
    if pairs is None:
        return None
    with ConsoleBar("pictures", disable=not accelerator.is_main_process, delay=1.0) as bar:
        return prepare(
            pairs, vae, made, plan.cache, crop=plan.config.estimate.crop,
            overlay=plan.config.overlay if plan.config.objective.reads("overlay") else None, progress=bar.update,
            estimate_missing_masks=bool(made) or plan.config.training.edit_weight != 1.0, accelerator=accelerator,
        )  # fmt: skip
