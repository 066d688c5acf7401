"""What every edit model has to do inside a real ComfyUI process; test_models.py starts it and reads the result.

    cd ComfyUI && python …/driver_models.py PACK_FOLDER SCRATCH_FOLDER [NAME]

The models are those of the folder ``tiny``: ComfyUI's own classes, small and with random weights. Samplers, LoRA loaders and
nodes that they are compared with are the stock ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import SkipTest

import torch
from driver_model_encoders import assert_close, import_pack, pictures, refused, run_checks
from torch import Tensor

PRESETS = ("attention", "attention + MLP", "all")
CAPTION = "Replace the chair with my stool, and keep the rest as it is."
PACK = SimpleNamespace()
SCRATCH = Path()
CPU = torch.device("cpu")
LEVELS = (0.3, 0.9)

IDS = sorted(path.stem for path in Path(__file__).with_name("tiny").glob("[!_]*.py"))


class Case:
    """A tiny model, loaded, with a batch of two pairs at two noise levels."""

    def __init__(self, identity: str, tiny: ModuleType, build: Callable[[], Any]):
        import comfy.model_base
        import comfyui_version

        (self.known,) = [model for model in PACK.registry.MODELS if model.id == identity]
        if not hasattr(comfy.model_base, self.known.comfyui_model):
            raise SkipTest(
                f"ComfyUI {comfyui_version.__version__} has no {self.known.comfyui_model}, which came with {tiny.SINCE}"
            )
        self.tiny, self.model = tiny, build()
        self.denoiser = self.with_checkpointing(False)
        self.x, self.reference, self.target = (
            torch.cat([tiny.latents(10 * i + j, 8, 12) for j in range(2)]) for i in range(3)
        )
        self.t = torch.tensor(LEVELS)
        self.prompts = [tiny.prompt(20 + j) for j in range(2)]

    def with_checkpointing(self, checkpointing: bool) -> Any:
        return PACK.denoiser.ComfyDenoiser(self.model, guidance=self.known.guidance, checkpointing=checkpointing)

    def velocity(self, denoiser: Any = None) -> Tensor:
        return (denoiser or self.denoiser)(self.x, self.t, [self.reference], self.prompts)

    def adapted(self, layers: str, denoiser: Any = None) -> Any:
        """A LoRA attached to the model, as after some training: every bypass has an effect."""
        settings = PACK.lora.LoRASettings(3, 5.0, layers=layers)
        lora = PACK.lora.LoRA((denoiser or self.denoiser).module, settings, model=self.known)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in lora.layers:
                layer.up.copy_(0.05 * torch.randn(layer.up.shape, generator=generator))
        return lora.attach()

    def conditioning(self, prompt: list[Any], *references: Tensor, guidance: float | None) -> list[Any]:
        """By the stock nodes: Reference Latent, one for each, their method, Flux Guidance."""
        import comfy_extras.nodes_edit_model as edit
        import comfy_extras.nodes_flux as flux

        made = prompt
        for reference in references:
            latent = {"samples": self.model.model.process_latent_out(self.framed(reference))}
            made = edit.ReferenceLatent.execute(made, latent)[0]
        if self.known.reference_method is not None:
            method = flux.FluxKontextMultiReferenceLatentMethod
            made = method.execute(made, self.known.reference_method)[0]
        return made if guidance is None else flux.FluxGuidance.execute(made, guidance)[0]

    def framed(self, latents: Tensor) -> Tensor:
        """As the network takes them: with a time axis of one frame where it has one."""
        return latents.unsqueeze(2) if self.model.model.latent_format.latent_dimensions == 3 else latents


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten().double() for x in tensors])


# ---------------------------------------------------------------------------- what is asked of each


def it_is_the_one(case: Case) -> None:
    assert case.denoiser.edit_model is case.known, f"{case.denoiser.edit_model.id} instead of {case.known.id}"
    assert PACK.registry.of_network(type(case.denoiser.module).__name__) is not None
    for prompt in case.prompts:
        case.denoiser.check(prompt)


def velocity_is_that_of_the_stock_sampler(case: Case) -> None:
    is_the_stock_velocity(case, case.reference)


def several_references_are_seen_as_by_the_stock_sampler(case: Case) -> None:
    """The second of another size; no other than both, in this order, gives the same. More than the model takes are refused."""
    count = case.known.references
    one = pictures(64, 96, batch=1)
    pairs = PACK.pairs.PairSet.from_images(one, 1 - one, None, CAPTION, [one[:, :, :64]] * count, resolution=64)
    refused(lambda: PACK.captions.check_references(case.known, [pairs]), case.known.title, f"has {count + 1}")
    PACK.captions.check_references(case.known, [PACK.pairs.PairSet.from_images(one, 1 - one, None, CAPTION)])
    if count == 1:
        return
    other = torch.cat([case.tiny.latents(40 + j, 6, 8) for j in range(2)])
    both = is_the_stock_velocity(case, case.reference, other)
    with torch.no_grad():
        for references in ([case.reference], [other, case.reference], [case.reference, other.flip(-1)]):
            found = case.denoiser(case.x, case.t, references, case.prompts)
            assert (found - both).abs().max() > 1e-3 * both.abs().max(), (
                f"{[list(r.shape) for r in references]}: the same"
            )


def is_the_stock_velocity(case: Case, *references: Tensor) -> Tensor:
    import comfy.sampler_helpers
    import comfy.samplers

    with torch.no_grad():
        ours = case.denoiser(case.x, case.t, references, case.prompts)
        assert ours.dtype == torch.float32 and ours.shape == case.x.shape
        for i, prompt in enumerate(case.prompts):
            x, t = case.framed(case.x[i : i + 1]), case.t[i : i + 1]
            cond = case.conditioning(prompt, *(r[i : i + 1] for r in references), guidance=case.known.guidance)
            case.model.pre_run()
            conds = comfy.sampler_helpers.convert_cond(cond)
            conds = comfy.samplers.encode_model_conds(case.model.model.extra_conds, conds, x, CPU, "positive")
            (denoised,) = comfy.samplers.calc_cond_batch(case.model.model, [conds], x, t, case.model.model_options)
            theirs = ((x - denoised) / t).view(1, *ours.shape[1:])
            assert_close(ours[i : i + 1], theirs, 1e-4, f"velocity at t = {LEVELS[i]}")
    return ours


def previews_are_what_the_stock_sampler_makes(case: Case) -> None:
    """Four steps of Euler on the model's schedule, with the guidance that previews have."""
    import comfy.samplers

    known, noise, reference = case.known, case.tiny.latents(5, 8, 12), case.reference[:1]
    negative = case.tiny.prompt(30)
    preview = PACK.base.Preview(known.preview_guidance, known.preview_cfg, [negative])
    with torch.no_grad():
        ours = known.sample(case.denoiser, noise, [reference], case.prompts[:1], 4, preview)
        conds = [case.conditioning(p, reference, guidance=known.preview_guidance) for p in (case.prompts[0], negative)]
        model = getattr(case.tiny, "sampled", lambda model: model)(case.model)
        guider = getattr(case.tiny, "guider", guider_of)(model, *conds, negative, known.preview_cfg)
        theirs = guider.sample(
            case.framed(noise), torch.zeros_like(case.framed(noise)), comfy.samplers.sampler_object("euler"),
            known.times(known.tokens(noise), 4), disable_pbar=True,
        )  # fmt: skip
        theirs = case.model.model.process_latent_in(theirs).view_as(ours)
        assert_close(ours, theirs, 1e-3, "picture")


def guider_of(model: Any, positive: list[Any], negative: list[Any], bare: list[Any], cfg: float) -> Any:
    """What stands behind KSampler and CFGGuider."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def noise_levels_are_those_of_the_stock_scheduler(case: Case) -> None:
    """Where the stock workflow has one by name, at 20 steps."""
    import comfy.samplers

    sampling = case.model.get_model_object("model_sampling")
    theirs = comfy.samplers.calculate_sigmas(sampling, case.tiny.SCHEDULER, 20)
    assert_close(case.known.times(case.known.tokens(case.x), 20), theirs, 1e-5, "noise levels")


def the_reference_changes_the_output(case: Case) -> None:
    with torch.no_grad():
        v = case.velocity()
        others = {"another": case.reference.flip(-1), "another size": case.reference[..., :6, :8]}
        for what, reference in others.items():
            changed = case.denoiser(case.x, case.t, [reference], case.prompts)
            assert (changed - v).abs().max() > 1e-3 * v.abs().max(), f"{what}: no effect"


def presets_grow(case: Case) -> None:
    chosen = [set(PACK.lora.select_layers(case.denoiser.module, p, case.known)) for p in PRESETS]
    assert chosen[0] < chosen[1] < chosen[2], [len(some) for some in chosen]


def gradients_are_right(case: Case, layers: str, checkpointing: bool) -> None:
    """Of x_t and of the LoRA, against central differences along a direction that shares some of the gradient's."""
    denoiser = case.with_checkpointing(checkpointing)
    lora = case.adapted(layers, denoiser)
    before = {name: value.clone() for name, value in case.model.model.state_dict().items()}
    parameters = list(lora.parameters())

    def loss(x: Tensor) -> Tensor:
        v = denoiser(x, case.t, [case.reference], case.prompts)
        return (v - case.target).square().mean()

    with torch.enable_grad():
        x = case.x.clone().requires_grad_()
        grads = torch.autograd.grad(loss(x), [x, *parameters], materialize_grads=True)
    still = {name for name, g in zip(["x_t", *case_names(lora)], grads) if not g.isfinite().all() or not g.any()}
    unused = {f"{name}.{half}" for name in getattr(case.tiny, "UNUSED", ()) for half in ("down", "up")}
    assert still == unused & set(case_names(lora)), f"a gradient is 0 or not finite: {sorted(still ^ unused)}"
    values = [x.detach().clone(), *(p.detach().clone() for p in parameters)]

    def loss_at(moved: list[Tensor]) -> float:
        with torch.no_grad():
            for p, value in zip(parameters, moved[1:]):
                p.copy_(value)
            return loss(moved[0]).double().item()

    for group, members in {"x_t": {0}, "LoRA": set(range(1, len(grads)))}.items():
        along = []
        for i, g in enumerate(grads):
            noise = torch.rand(g.shape, generator=torch.Generator().manual_seed(i))
            along.append(g.sign() * noise * g.square().mean().sqrt() if i in members else torch.zeros_like(g))
        step = 0.02 / flat(along).norm().item()
        ends = [loss_at([v + s * step * d for v, d in zip(values, along)]) for s in (1, -1)]
        numeric, analytic = (ends[0] - ends[1]) / (2 * step), (flat(list(grads)) * flat(along)).sum().item()
        error = abs(numeric - analytic) / abs(analytic)
        assert error < 3e-3, f"{group}: {analytic:.6g} along a direction, finite differences say {numeric:.6g}"
    lora.detach()
    assert all(torch.equal(v, before[k]) for k, v in case.model.model.state_dict().items()), "the base was changed"


def case_names(lora: Any) -> list[str]:
    return [f"{name}.{half}" for name in lora.targets for half in ("down", "up")]


def the_file_does_what_the_lora_did(case: Case, layers: str) -> None:
    import comfy.sd
    import comfy.utils

    lora = case.adapted(layers)
    file = SCRATCH / f"{case.known.id}.safetensors"
    lora.save(file, {"note": "a test"})
    with torch.no_grad():
        ours = case.velocity()
        with lora.disabled():
            base = case.velocity()
        lora.detach()
        assert (ours - base).abs().max() > 1e-3 * base.abs().max(), "the LoRA does nothing"
        merged, _ = comfy.sd.load_lora_for_models(case.model, None, comfy.utils.load_torch_file(str(file)), 1.0, 0.0)
        assert {f"diffusion_model.{name}.weight" for name in lora.targets} == set(merged.patches), "not all was loaded"
        theirs = PACK.denoiser.ComfyDenoiser(merged, guidance=case.known.guidance)
        theirs.load()
        assert_close(case.velocity(theirs), ours, 1e-4, "output with the file in the stock loader")


def latents_go_to_a_vae_and_back(case: Case) -> None:
    z = case.denoiser.from_model(case.reference)
    assert z.shape[0] == 2 and z.shape[-2:] == case.reference.shape[-2:]
    assert_close(case.denoiser.to_model(z), case.reference, 1e-5, "latents")
    theirs = case.model.model.process_latent_out(case.framed(case.reference))
    assert_close(z, theirs.reshape(z.shape), 1e-6, "a VAE's latents")


def captions_are_encoded_as_by_the_stock_node(case: Case) -> None:
    import nodes

    clip, seen = case.tiny.clip(), [pictures(64, 96, batch=1)]
    stock = getattr(case.tiny, "stock", lambda clip, caption, *_: nodes.CLIPTextEncode().encode(clip, caption)[0])
    if case.known.reads_picture and case.known.references > 1:
        seen.append(pictures(96, 48, batch=1, seed=4))
    with torch.no_grad():
        tokens = case.known.tokenize(clip, CAPTION, *(p[0] if case.known.reads_picture else None for p in seen))
        ours, theirs = clip.encode_from_tokens_scheduled(tokens), stock(clip, CAPTION, *seen)
        assert len(ours) == len(theirs) == 1
        assert_close(ours[0][0], theirs[0][0], 1e-6, "text features")
        tensors = [{k: v for k, v in e[0][1].items() if isinstance(v, Tensor)} for e in (ours, theirs)]
        assert tensors[0].keys() == tensors[1].keys() - {"reference_latents"}
        assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
        case.denoiser.check(ours)
        case.denoiser(case.x[:1], case.t[:1], [case.reference[:1]], [ours])


def the_node_trains_it_and_goes_on(case: Case) -> None:
    """Losses on the estimate, held-out pictures, a checkpoint, a run that goes on from it, and a file of its own names."""
    from safetensors import safe_open

    clip, vae = case.tiny.clip(), case.tiny.vae()
    before, after = pictures(64, 96, 3, 1), pictures(64, 96, 3, 2)
    masks = torch.zeros(3, 64, 96)
    masks[:, 16:48, 32:64] = 1
    further = [pictures(80, 64, 3, 5)] if case.known.references > 1 else []
    pairs = PACK.pairs.PairSet.from_images(before, after, masks, CAPTION, further, resolution=80)
    seen: list[list[Any]] = []
    hook = case.denoiser.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append([r.shape[-2:] for r in kwargs.get("ref_latents") or []]),
        with_kwargs=True,
    )
    term = PACK.objective.LossTerm("feature_match", "vae", dist="l2", anchor="pred", positive="gt")
    encoder = PACK.encoders.vae_encoder(vae)
    encoder.info = dataclasses.replace(encoder.info, name="vae")
    wired = PACK.sockets.WiredObjective().with_term(term, encoder)
    options = PACK.sockets.TrainingOptions(
        training={"preview_steps": 2, "previews": 1, "validate_every": 2, "gradients_every": 1, "checkpoint_every": 1,
                  "caption_dropout": 0.5}
    )  # fmt: skip

    def train(steps: int, resume: Any = None) -> Any:
        with torch.inference_mode():
            return PACK.training.Train.execute(
                model=case.model, clip=clip, vae=vae, pairs=pairs, name=case.known.id, steps=steps, learning_rate=1e-2,
                batch_size=2, rank=2, alpha=4.0, layers="attention", seed=0, hold_out=1, objective=wired, options=options,
                resume=resume,
            ).args[4]  # fmt: skip

    run = train(2)
    hook.remove()
    asked = {len(shapes) for shapes in seen}
    assert 1 + len(further) in asked and asked <= {0, 1, 1 + len(further)}, "the self-check sees one, all else all"
    assert len({shape for shapes in seen for shape in shapes}) == 1 + len(further), "a reference has another's size"
    samples = [s.terms["feature match"] for step in run.result.log.steps for s in step.samples]
    assert len(samples) == 4 and all(s.gradient > 0 for s in samples), "the term has no gradient"
    assert any(layer.up.abs().max() > 0 for layer in run.result.lora.layers), "nothing was learnt"
    (row,) = run.result.pictures
    assert row.base.shape == row.lora.shape == row.after.shape and not torch.equal(row.base, row.lora)
    checkpoint = run.folder / "checkpoints" / "step_000001.safetensors"
    again = train(2, PACK.sockets.ResumePoint(run.name, checkpoint)).result.lora.tensors()
    assert all(torch.equal(value, again[name]) for name, value in run.result.lora.tensors().items()), (
        "it went on otherwise"
    )
    file = SCRATCH / f"{case.known.id}_run.safetensors"
    run.result.lora.save(file, run.metadata)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["editloss_edit_model"] == case.known.id


def the_self_check_passes(case: Case) -> None:
    case.denoiser = case.with_checkpointing(True)
    lora = PACK.lora.LoRA(case.denoiser.module, PACK.lora.LoRASettings(8, 8.0, layers="all"), model=case.known).attach()
    prepared = SimpleNamespace(before=lambda i: case.reference[i], after=lambda i: case.target[i])
    found = PACK.check.SelfCheck(
        "", tuple(PACK.check.check_network(case.denoiser, lora, prepared, case.prompts, 0, 2, 0))
    )
    assert not found.wrong, found.line()
    assert [part.part for part in found.parts] == ["LoRA", "velocity", "reference"]
    assert all(part.error is not None for part in found.parts), f"nothing could be told: {found.line()}"


KINDS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        it_is_the_one,
        velocity_is_that_of_the_stock_sampler,
        several_references_are_seen_as_by_the_stock_sampler,
        previews_are_what_the_stock_sampler_makes,
        noise_levels_are_those_of_the_stock_scheduler,
        the_reference_changes_the_output,
        presets_grow,
        latents_go_to_a_vae_and_back,
        captions_are_encoded_as_by_the_stock_node,
        the_self_check_passes,
        the_node_trains_it_and_goes_on,
    )
}
NEEDS = {
    captions_are_encoded_as_by_the_stock_node: "clip",
    noise_levels_are_those_of_the_stock_scheduler: "SCHEDULER",
    the_node_trains_it_and_goes_on: "vae",
}
for _layers in PRESETS:
    KINDS[f"the_file_does_what_the_lora_did, {_layers}"] = lambda case, p=_layers: the_file_does_what_the_lora_did(
        case, p
    )
    for _checkpointing in (False, True):
        KINDS[f"gradients_are_right, {_layers}{', checkpointed' if _checkpointing else ''}"] = (
            lambda case, p=_layers, c=_checkpointing: gradients_are_right(case, p, c)
        )


def every_known_model_has_a_tiny_one() -> None:
    assert {model.id for model in PACK.registry.MODELS} == set(IDS)


# Other classes that edit or seem to, in their own sizes; what their configuration has no default for is as ComfyUI finds it.
OTHERS: dict[str, dict[str, Any]] = {
    "Boogu": {},
    "Chroma": {
        "in_channels": 64, "out_channels": 64, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
        "num_heads": 24, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5, "txt_ids_dims": [],
        "vec_in_dim": None,
    },
    "HiDream": {
        "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [4096, 4096],
        "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [0, 1], "num_attention_heads": 20,
        "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 1, "num_single_layers": 1, "out_channels": 16,
        "patch_size": 2, "text_emb_dim": 2048,
    },
    "HiDreamO1": {},
    "JoyImage": {"in_channels": 16, "hidden_size": 4096, "patch_size": [1, 2, 2], "num_layers": 1, "text_dim": 4096},
    "Krea2": {},
    "Lumina2": {
        "dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
        "patch_size": 2, "in_channels": 16, "cap_feat_dim": 2560, "n_layers": 1, "qk_norm": True,
    },
    "MageFlow": {"in_channels": 128, "num_layers": 1},
}  # fmt: skip


def is_refused_by_name(kind: str) -> None:
    """Before any work: its weights are on torch's meta device, where nothing can be computed."""
    import comfy.ldm.chroma.model
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfyui_version

    if not hasattr(comfy.model_base, kind):
        raise SkipTest(f"ComfyUI {comfyui_version.__version__} has no {kind}")
    sizes = OTHERS[kind]
    if kind == "Chroma":
        known = {field.name for field in dataclasses.fields(comfy.ldm.chroma.model.ChromaParams)}
        sizes = {name: value for name, value in sizes.items() if name in known}
    config = getattr(comfy.supported_models, kind)({"image_model": kind.lower(), **sizes})
    config.set_inference_dtype(torch.bfloat16, None)
    with torch.device("meta"):
        base = config.get_model({}, device=torch.device("meta"))
    assert type(base).__name__ == kind
    model = comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)
    why = PACK.registry.REFUSED[kind]
    refused(
        lambda: PACK.denoiser.ComfyDenoiser(model), "model: ", PACK.registry.titles(), f"got ComfyUI's {kind}: {why}"
    )


def another_text_encoder_of_flux2_is_refused_by_name() -> None:
    import tiny._flux2 as tiny

    denoiser = PACK.denoiser.ComfyDenoiser(tiny.build(False, context_in_dim=7680))  # as the real klein 4B has it
    denoiser.check([[torch.zeros(1, 5, 7680), {"pooled_output": None}]])
    for width, name in ((15360, "Mistral Small 3.2"), (12288, "Qwen3 8B")):
        item = [[torch.zeros(1, 5, width), {"pooled_output": None}]]
        refused(lambda item=item: denoiser.check(item), "7680 numbers (Qwen3 4B)", f"got {width} numbers ({name})")


def flux_kv_cache_is_refused() -> None:
    import comfy_extras.nodes_flux as flux
    import comfyui_version
    import tiny.flux2_klein as tiny

    if not hasattr(flux, "FluxKVCache"):
        raise SkipTest(f"ComfyUI {comfyui_version.__version__} has no Flux KV Cache, which came with 0.16")
    cached = flux.FluxKVCache.execute(tiny.build())[0]
    refused(lambda: PACK.denoiser.ComfyDenoiser(cached), "without Flux KV Cache")


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        every_known_model_has_a_tiny_one,
        another_text_encoder_of_flux2_is_refused_by_name,
        flux_kv_cache_is_refused,
    )
}
for _kind in OTHERS:
    CHECKS[f"{_kind} is refused by name"] = lambda k=_kind: is_refused_by_name(k)
for _id in IDS:
    _tiny = importlib.import_module(f"tiny.{_id}")
    for _variant, _build in {"": _tiny.build, **getattr(_tiny, "VARIANTS", {})}.items():
        for _kind, _check in KINDS.items():
            if _check not in NEEDS or hasattr(_tiny, NEEDS[_check]):
                CHECKS[f"{_id}{_variant and f' {_variant}'}: {_kind}"] = lambda c=_check, i=_id, t=_tiny, b=_build: c(
                    Case(i, t, b)
                )


def main() -> None:
    global PACK, SCRATCH
    pack, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
    SCRATCH.mkdir(exist_ok=True)
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths

    folder_paths.set_output_directory(str(SCRATCH / "output"))
    folder_paths.set_temp_directory(str(SCRATCH / "temp"))
    if importlib.util.find_spec("comfy_aimdo"):  # as main.py does, before anything of ComfyUI's is imported
        importlib.import_module("comfy_aimdo.control").init()
    name = import_pack(pack).__name__.removesuffix(".nodes.comfy.encoders")
    PACK = SimpleNamespace(
        denoiser=importlib.import_module(f"{name}.nodes.comfy.denoiser"),
        lora=importlib.import_module(f"{name}.editloss_core.lora.lora"),
        base=importlib.import_module(f"{name}.editloss_core.models.base"),
        registry=importlib.import_module(f"{name}.editloss_core.models.registry"),
        check=importlib.import_module(f"{name}.editloss_core.training.self_check"),
        encoders=importlib.import_module(f"{name}.nodes.comfy.encoders"),
        training=importlib.import_module(f"{name}.nodes.training"),
        sockets=importlib.import_module(f"{name}.nodes.sockets"),
        captions=importlib.import_module(f"{name}.editloss_core.models.captions"),
        pairs=importlib.import_module(f"{name}.editloss_core.pairs"),
        objective=importlib.import_module(f"{name}.editloss_core.objective"),
    )
    run_checks(CHECKS, only)


if __name__ == "__main__":
    main()
