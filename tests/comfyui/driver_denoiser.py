"""Checks of nodes/comfy/denoiser.py inside a real ComfyUI process; test_denoiser.py starts it and reads the result.

    cd ComfyUI && python …/driver_denoiser.py PACK_FOLDER SCRATCH_FOLDER

Every ``check_…`` below is one test. The networks are ComfyUI's own classes, small and with random weights; samplers, LoRA
loaders and nodes that they are compared with are the stock ones.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from driver_model_encoders import (
    FLUX,
    TEXT,
    assert_close,
    flux_config,
    import_pack,
    loaded,
    refused,
    run_checks,
    small_clip,
    small_flux,
    small_vae,
)
from torch import Tensor

CHECKS: dict[str, Callable[[], None]] = {}
SCRATCH = Path()
CPU = torch.device("cpu")
PRESETS = ("attention", "attention + MLP", "all")


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


# ---------------------------------------------------------------------------- what is trained, and on what


def flux(dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, operations: Any = None, **config: Any):
    """A ModelPatcher of the small Flux in other dtypes; its weights are those of ``small_flux``, rounded."""
    import comfy.model_patcher
    import comfy.supported_models

    settings = comfy.supported_models.Flux(flux_config())
    settings.set_inference_dtype(dtype, compute)
    settings.custom_operations = operations
    for key, value in config.items():
        setattr(settings, key, value)
    base = settings.get_model({}, device=CPU)
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def weights() -> dict[str, Tensor]:
    return {k: v.clone() for k, v in small_flux().model.diffusion_model.state_dict().items()}


def prompt(seed: int = 11, text: int = TEXT, **more: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, FLUX["vec_in_dim"], generator=generator)
    return [[torch.randn(1, text, FLUX["context_in_dim"], generator=generator), {"pooled_output": pooled, **more}]]


def batch(size: int = 2, height: int = 8, width: int = 12) -> SimpleNamespace:
    """One training batch: x_t, t, references, conditioning and a velocity to aim at."""
    generator = torch.Generator().manual_seed(7)

    def draw(h, w):
        return torch.randn(size, 16, h, w, generator=generator)

    return SimpleNamespace(
        x=draw(height, width),
        t=torch.linspace(0.3, 0.9, size),
        references=[draw(height, width)],
        conditioning=[prompt(20 + i) for i in range(size)],
        target=draw(height, width),
    )


def adapted(model: Any, layers: str = "all", rank: int = 3, alpha: float = 5.0, trained: bool = True, **options: Any):
    """(denoiser, LoRA attached to it), as after some training: every bypass has an effect."""
    denoiser = PACK.denoiser.ComfyDenoiser(model, **options)
    lora = PACK.lora.LoRA(denoiser.module, PACK.lora.LoRASettings(rank, alpha, layers=layers))
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in lora.layers:
                layer.up.copy_(0.05 * torch.randn(layer.up.shape, generator=generator))
    return denoiser, lora.attach()


def loss_of(denoiser: Any, b: SimpleNamespace, x: Tensor | None = None) -> Tensor:
    v = denoiser(b.x if x is None else x, b.t, b.references, b.conditioning)
    return (v - b.target).square().mean()


def gradients(denoiser: Any, lora: Any, b: SimpleNamespace) -> tuple[Tensor, list[Tensor]]:
    with torch.inference_mode(False), torch.enable_grad():
        x = b.x.clone().requires_grad_()
        loss = loss_of(denoiser, b, x)
        grads = torch.autograd.grad(loss, [x, *lora.parameters()])
    assert all(g.isfinite().all() for g in grads) and all(g.abs().max() > 0 for g in grads), "a gradient is 0 or NaN"
    return loss.detach(), list(grads)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """‖a − b‖ / ‖b‖."""
    return ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


# ---------------------------------------------------------------------------- velocity


def stock_velocity(model: Any, b: SimpleNamespace, index: int, **options: Any) -> Tensor:
    """(x − denoised) / σ through ComfyUI's own sampling path, one sample, with its own ReferenceLatent node."""
    import comfy.samplers
    import comfy_extras.nodes_edit_model as edit

    cond = [[b.conditioning[index][0][0], {**b.conditioning[index][0][1], **options}]]
    for reference in b.references:
        latent = {"samples": model.model.process_latent_out(reference[index : index + 1])}
        cond = edit.ReferenceLatent.execute(cond, latent)[0]
    x, t = b.x[index : index + 1], b.t[index : index + 1]
    model.pre_run()
    conds = comfy.sampler_helpers.convert_cond(cond)
    conds = comfy.samplers.encode_model_conds(model.model.extra_conds, conds, x, CPU, "positive")
    (denoised,) = comfy.samplers.calc_cond_batch(model.model, [conds], x, t, model.model_options)
    return (x - denoised) / t


@check
def check_velocity_is_that_of_the_stock_sampler() -> None:
    model, b = small_flux(), batch(3)
    with torch.no_grad():
        ours = PACK.denoiser.ComfyDenoiser(model, guidance=2.0)(b.x, b.t, b.references, b.conditioning)
        theirs = torch.cat([stock_velocity(model, b, i, guidance=2.0) for i in range(3)])
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, 1e-5, "velocity")
        # None: each prompt's own guidance, or ComfyUI's 3.5
        b.conditioning[1] = prompt(21, guidance=7.0)
        own = PACK.denoiser.ComfyDenoiser(model, guidance=None)(b.x, b.t, b.references, b.conditioning)
        theirs = torch.cat([stock_velocity(model, b, i) for i in range(3)])
        assert_close(own, theirs, 1e-5, "velocity with guidances of their own")
        assert (own - ours).abs().max() > 1e-3, "guidance has no effect"


@check
def check_velocity_at_the_ends() -> None:
    b = batch(2)
    b.t = torch.tensor([0.0, 1.0])
    denoiser = PACK.denoiser.ComfyDenoiser(small_flux())
    with torch.no_grad():
        v = denoiser(b.x, b.t, b.references, b.conditioning)
        b.t = torch.tensor([1e-5, 1 - 1e-5])
        assert_close(v, denoiser(b.x, b.t, b.references, b.conditioning), 1e-2, "velocity beside the ends")


@check
def check_references_matter_and_replace_those_of_the_conditioning() -> None:
    b = batch(2)
    denoiser = PACK.denoiser.ComfyDenoiser(small_flux())
    with torch.no_grad():
        v = denoiser(b.x, b.t, b.references, b.conditioning)
        other = denoiser(b.x, b.t, [b.references[0] + 0.5], b.conditioning)
        none = denoiser(b.x, b.t, [], b.conditioning)
        two = denoiser(b.x, b.t, [*b.references, b.references[0][..., :4, :6]], b.conditioning)
        assert min((v - w).abs().max() for w in (other, none, two)) > 1e-3
        b.conditioning = [prompt(20 + i, reference_latents=[torch.ones(1, 16, 4, 4)]) for i in range(2)]
        assert torch.equal(denoiser(b.x, b.t, b.references, b.conditioning), v)
        assert torch.equal(denoiser(b.x, b.t, [], b.conditioning), none)
        b.conditioning = [prompt(20 + i, reference_latents_method="uxo") for i in range(2)]
        placed = denoiser(b.x, b.t, b.references, b.conditioning)
        assert (placed - v).abs().max() > 1e-3
        assert_close(placed[:1], stock_velocity(denoiser.model, b, 0, guidance=1.0), 1e-5, "references placed apart")


@check
def check_prompts_of_different_lengths_in_one_batch() -> None:
    b = batch(4)
    b.conditioning = [prompt(30, 5), prompt(31, 9), prompt(32, 5), prompt(33, 7)]
    calls = []
    denoiser, lora = adapted(small_flux(), "attention")
    hook = denoiser.module.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    loss, grads = gradients(denoiser, lora, b)
    hook.remove()
    assert calls == [2, 1, 1], calls
    with torch.no_grad():
        v = denoiser(b.x, b.t, b.references, b.conditioning)
        alone = [
            denoiser(b.x[i : i + 1], b.t[i : i + 1], [b.references[0][i : i + 1]], [b.conditioning[i]])
            for i in range(4)
        ]
    assert_close(v, torch.cat(alone), 1e-5, "velocity")
    assert all((g.abs().amax((1, 2, 3)) > 0).all() for g in grads[:1])


# ---------------------------------------------------------------------------- gradients


def _finite_differences(layers: str, checkpointing: bool, inference: bool) -> None:
    with loaded(inference):
        model, b = small_flux(), batch(2)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    denoiser, lora = adapted(model, layers, checkpointing=checkpointing)
    _, grads = gradients(denoiser, lora, b)
    values = [b.x.clone(), *(p.detach().clone() for p in lora.parameters())]

    def loss_at(moved: list[Tensor]) -> float:
        with torch.no_grad():
            for p, value in zip(lora.parameters(), moved[1:]):
                p.copy_(value)
            return loss_of(denoiser, b, moved[0]).double().item()

    # x_t, every A, every B, and all together; along the gradient, and along another direction that shares some of it.
    groups = {"x_t": {0}, "down": set(range(1, len(grads), 2)), "up": set(range(2, len(grads), 2))}
    groups["all"] = set(range(len(grads)))
    for group, members in groups.items():
        along = [g if i in members else torch.zeros_like(g) for i, g in enumerate(grads)]
        noise = [
            a.sign() * torch.rand(a.shape, generator=torch.Generator().manual_seed(i)) for i, a in enumerate(along)
        ]
        for direction in (along, noise):
            norm = flat(direction).norm().item()
            step = 0.02 / norm
            ends = [loss_at([v + s * step * d for v, d in zip(values, direction)]) for s in (1, -1)]
            numeric, analytic = (ends[0] - ends[1]) / (2 * step), (flat(grads) * flat(direction)).sum().item()
            error = abs(numeric - analytic) / abs(analytic)
            assert error < 3e-3, f"{group}: {analytic:.6g} along a direction, finite differences say {numeric:.6g}"
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items()), "the base was changed"


for _layers in PRESETS:
    for _checkpointing in (False, True):
        for _inference in (False, True):
            _name = f"gradients_of_{_layers.replace(' + ', '_and_')}"
            _name += ("_checkpointed" if _checkpointing else "") + ("_loaded_in_inference_mode" if _inference else "")
            CHECKS[_name] = lambda a=_layers, c=_checkpointing, i=_inference: _finite_differences(a, c, i)


@check
def check_a_step_inside_a_node() -> None:
    """ComfyUI's executor runs nodes in inference mode: everything that comes in is made in it."""
    expected = gradients(*adapted(small_flux()), batch(2))[1]
    with torch.inference_mode():
        model, b = small_flux(), batch(2)
        denoiser, lora = adapted(model)
        with torch.no_grad():
            before = denoiser(b.x, b.t, b.references, b.conditioning)
        found = gradients(denoiser, lora, b)[1]
        with torch.inference_mode(False), torch.enable_grad():
            optimizer = torch.optim.AdamW(lora.parameters(), 1e-2)
            loss_of(denoiser, b).backward()
            optimizer.step()
        after = denoiser(b.x, b.t, b.references, b.conditioning)
    assert apart(found, expected) < 1e-6 and (after - before).abs().max() > 1e-3


@check
def check_checkpointing_changes_no_gradient() -> None:
    b = batch(2)
    plain, kept = gradients(*adapted(small_flux(), checkpointing=False), b)
    again, recomputed = gradients(*adapted(small_flux(), checkpointing=True), b)
    assert torch.equal(plain, again) and apart(recomputed, kept) < 1e-6
    # Dropout is drawn again as it was.
    found = []
    for checkpointing in (False, True):
        denoiser = PACK.denoiser.ComfyDenoiser(small_flux(), checkpointing=checkpointing)
        lora = PACK.lora.LoRA(denoiser.module, PACK.lora.LoRASettings(3, 5.0, dropout=0.3, layers="all")).attach()
        with torch.no_grad():
            for layer in lora.layers:
                layer.up.fill_(0.02)
        torch.manual_seed(5)
        found.append(gradients(denoiser, lora, b)[1])
    assert apart(found[1], found[0]) < 1e-6 and apart(found[0], kept) > 0.01


@check
def check_checkpointing_keeps_less() -> None:
    kept = []
    for checkpointing in (False, True):
        denoiser, lora = adapted(small_flux(), checkpointing=checkpointing)
        saved: dict[int, int] = {}  # storage → bytes; what is computed from parameters alone counts on both sides

        def pack(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss_of(denoiser, batch(4, 16, 16))
        kept.append(sum(saved.values()))
    assert kept[1] < 0.4 * kept[0], f"{kept[1]} bytes instead of {kept[0]}"


@check
def check_nothing_of_the_model_stays_changed() -> None:
    import comfy.model_management as management

    model, b = small_flux(), batch(2)
    net = model.model.diffusion_model

    def changed() -> bool:
        return any("forward" in m.__dict__ or m._forward_hooks for m in net.modules())

    denoiser, lora = adapted(model)
    gradients(denoiser, lora, b)
    lora.detach()
    assert not changed() and not any(p.requires_grad or p.grad is not None for p in net.parameters())

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = net.single_blocks[1].linear2.register_forward_hook(fail)
    x = b.x.clone().requires_grad_()
    for _ in range(2):
        try:
            loss_of(denoiser, b, x)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("the interruption got lost")
    hook.remove()
    assert not changed(), "an exception left something behind"
    loss = loss_of(denoiser, b, x)
    hook = net.single_blocks[1].linear2.register_forward_hook(fail)
    try:
        loss.backward()
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the interruption in the backward pass got lost")
    hook.remove()
    assert not changed(), "an exception in the backward pass left something behind"
    # ComfyUI's cancel button, pressed between two blocks.
    hook = net.double_blocks[1].register_forward_hook(lambda *_: management.interrupt_current_processing())
    try:
        loss_of(denoiser, b, x)
    except management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("the cancel button was not obeyed within a step")
    hook.remove()
    assert not changed(), "cancelling left something behind"


@check
def check_patches_and_wrappers_of_the_model_are_respected() -> None:
    import comfy.patcher_extension

    model, b = small_flux(), batch(2)
    plain = PACK.denoiser.ComfyDenoiser(model)
    with torch.no_grad():
        before = plain(b.x, b.t, b.references, b.conditioning)
    other = model.clone()
    seen: list[tuple[str, int]] = []

    def attend(function: Any, *args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
        seen.append((transformer_options["block_type"], transformer_options["block_index"]))
        return 0.9 * function(*args, **kwargs)

    def replace(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.1}

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return 1.5 * executor(*args, **kwargs)

    other.model_options["transformer_options"]["optimized_attention_override"] = attend
    denoiser, lora = adapted(other, "attention")
    _, grads = gradients(denoiser, lora, b)
    order = [("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2)]
    assert seen == order + order[::-1], f"a recomputed block was told another block's number: {seen}"
    lora.detach()
    other.set_model_patch_replace(replace, "dit", "double_block", 1)
    other.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    with torch.no_grad():
        after = denoiser(b.x, b.t, b.references, b.conditioning)
        assert_close(plain(b.x, b.t, b.references, b.conditioning), before, 1e-6, "the model without patches")
        assert (after - before).abs().max() > 1e-2
        # What ComfyUI does before it samples: the model's wrappers become options.
        other.model_options["transformer_options"]["wrappers"] = other.wrappers
        assert_close(after[:1], stock_velocity(other, b, 0, guidance=1.0), 1e-5, "velocity with patches")


# ---------------------------------------------------------------------------- base layers of every make


def _quantised(kind: str, fast: bool, **options: Any) -> Any:
    """A quantised checkpoint as ComfyUI writes it, loaded as ComfyUI loads it: the large layers of the blocks.

    Args:
        kind: a format of ComfyUI's ``QUANT_ALGOS``.
        fast: the layers' products are quantised, as on a GPU that has the format; else each weight is dequantised first.
        options: see :func:`_packed`.
    """
    import comfy.supported_models_base

    state, config = weights(), {}
    for name in [n for n in state if n.endswith(".weight") and "blocks" in n and "mod" not in n]:
        if state[name].ndim == 2:
            layer = name.removesuffix(".weight")
            tensors, config[layer] = _packed(kind, state.pop(name), **options)
            state.update({f"{layer}.{key}": value for key, value in tensors.items()})
    older = hasattr(comfy.supported_models_base.BASE, "layer_quant_config")
    for layer, values in config.items():  # newer ones read it from the file
        if not older:
            state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
    quantised = {"layer_quant_config": config} if older else {"quant_config": {"mixed_ops": True}}
    model = flux(torch.float32, torch.float32, **quantised)
    model.model.load_model_weights(state, "")
    layers = [m for m in model.model.diffusion_model.modules() if getattr(m, "layout_type", None)]
    assert len(layers) == len(config) > 0 and {m.quant_format for m in layers if not older} <= {kind}
    for layer in layers:
        layer._full_precision_mm = not fast
        if fast:
            layer.comfy_cast_weights = False
    return model


def _packed(kind: str, weight: Tensor, input_scale: float = 0, smoothing: bool = False, **options: Any):
    """(tensors of one layer in a checkpoint, what its ``comfy_quant`` says).

    Args:
        input_scale: of the inputs, if not 0; a calibrated checkpoint has one.
        smoothing: with a ``pre_quant_scale``, which the layer multiplies its inputs by.
        options: for the layout's own quantisation, and for ``comfy_quant`` where it knows the name.
    """
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    tensors = {}
    if input_scale:
        tensors["input_scale"] = torch.tensor(input_scale)
    if smoothing:
        scale = torch.linspace(0.5, 2.0, weight.shape[1])
        tensors["pre_quant_scale"], weight = scale, weight / scale
    algorithm = QUANT_ALGOS[kind]
    if kind.startswith("float8"):
        scale = weight.abs().max() / torch.finfo(algorithm["storage_t"]).max
        tensors |= {"weight": (weight / scale).to(algorithm["storage_t"]), "weight_scale": scale}
    else:
        packed = QuantizedTensor.from_float(weight, algorithm["comfy_tensor_layout"], **options)
        tensors |= packed.state_dict("weight")
    known = {name: options[name] for name in ("convrot", "convrot_groupsize", "linear_dtype") if name in options}
    return tensors, {"format": kind, **known}


def _scaled(scale_input: bool = False) -> Any:
    import comfy.ops

    operations = comfy.ops.scaled_fp8_ops(scale_input=scale_input, override_dtype=torch.float8_e4m3fn)
    model = flux(torch.float32, torch.float32, operations=operations)
    net = model.model.diffusion_model
    state = weights()
    with torch.no_grad():
        for name, part in net.named_modules():
            if hasattr(part, "scale_weight"):
                part.scale_weight.copy_(state[f"{name}.weight"].abs().max() / 448)
                part.weight.copy_((state[f"{name}.weight"] / part.scale_weight).to(torch.float8_e4m3fn))
                if part.bias is not None:
                    part.bias.copy_(state[f"{name}.bias"].to(part.bias.dtype))
            for key, p in part.named_parameters(recurse=False):
                if not hasattr(part, "scale_weight"):
                    p.copy_(state[f"{name}.{key}"].to(p.dtype))
    return model


def _cast(dtype: torch.dtype, compute: torch.dtype | None, operations: Any = None) -> Any:
    model = flux(dtype, compute, operations)
    with torch.no_grad():
        for p, value in zip(model.model.diffusion_model.parameters(), weights().values(), strict=True):
            p.copy_(value.to(p.dtype))
    return model


def _fast_fp8() -> Any:
    import comfy.ops

    return _cast(torch.float8_e4m3fn, torch.float32, comfy.ops.fp8_ops)


# The fast products run here as they do on a GPU: torch has a CPU kernel for them. Without the pack's own backward pass,
# ``fp8_fast`` and ``float8_e4m3fn_with_input_scales_fast`` raise.
# The model, and how far its gradients may be from those of the same weights in float32.
BASES: dict[str, tuple[Callable[[], Any], float]] = {
    "bf16": (lambda: _cast(torch.bfloat16, None), 0.02),
    "fp16": (lambda: _cast(torch.float16, None), 0.003),
    "fp8_with_fp32_compute": (lambda: _cast(torch.float8_e4m3fn, torch.float32), 1e-5),
    "fp8_with_bf16_compute": (lambda: _cast(torch.float8_e4m3fn, torch.bfloat16), 0.02),
    "fp8_fast": (_fast_fp8, 0.15),
}


def add_older_bases() -> None:
    """Kinds that newer ComfyUI converts into others when it loads them."""
    import comfy.ops

    if hasattr(comfy.ops, "scaled_fp8_ops"):
        BASES["scaled_fp8"] = (_scaled, 1e-5)


# Format, how a layer is packed, and how far gradients may be from those of the dequantised weights where the products are
# quantised: they round each layer's inputs too, relatively by up to 2^-4 (fp8 e4m3), 2^-3 (e5m2), 2^-2 (fp4), and 1/254
# or 1/14 of a row's or group's largest value (int8, int4). Measured were 0.015, 0.028, 0.05 to 0.06, 0.004 and 0.06. For
# such a forward pass, which is one of steps, finite differences say nothing; ``frozen_products`` is the sharp test.
# A w4a8 checkpoint says int8 for its inputs, but on a CPU they are rounded to int4 all the same.
QUANTISED: dict[str, tuple[str, dict[str, Any], float]] = {
    "float8_e4m3fn": ("float8_e4m3fn", {}, 0.03),
    "float8_e4m3fn_with_input_scales": ("float8_e4m3fn", {"input_scale": 0.05}, 0.03),
    "float8_e5m2": ("float8_e5m2", {}, 0.06),
    "mxfp8": ("mxfp8", {}, 0.06),
    "nvfp4": ("nvfp4", {}, 0.12),
    "nvfp4_with_pre_quant_scales": ("nvfp4", {"smoothing": True}, 0.12),
    "int8_tensorwise": ("int8_tensorwise", {}, 0.01),
    "int8_rows": ("int8_tensorwise", {"per_channel": True}, 0.01),
    "int8_convrot": ("int8_tensorwise", {"per_channel": True, "convrot": True, "convrot_groupsize": 64}, 0.01),
    "convrot_w4a4": ("convrot_w4a4", {"convrot_groupsize": 64}, 0.12),
    "convrot_w4a8": ("convrot_w4a4", {"convrot_groupsize": 64, "linear_dtype": "int8"}, 0.12),
    "asym_w4a8_int8": ("asym_w4a8_int8", {"convrot_groupsize": 64}, 0.01),
}
ONE_OF_A_FAMILY = ("float8_e4m3fn_fast", "nvfp4_with_pre_quant_scales", "int8_convrot_fast", "asym_w4a8_int8_fast")
NOT_ON_A_CPU = {"mxfp8_fast": "CPU does not support swizzle."}


def add_quantised_bases() -> None:
    """Every format that this ComfyUI reads, with quantised products and with dequantised weights if it knows these."""
    from comfy.quant_ops import QUANT_ALGOS

    assert {kind for kind, *_ in QUANTISED.values()} >= set(QUANT_ALGOS), "a format is not tested"
    for name, (kind, options, tolerance) in QUANTISED.items():
        if kind in QUANT_ALGOS:
            if QUANT_ALGOS[kind].get("quantize_input", True):  # else the products are always quantised
                BASES[name] = (lambda k=kind, o=options: _quantised(k, False, **o), 1e-5)
            BASES[f"{name}_fast"] = (lambda k=kind, o=options: _quantised(k, True, **o), tolerance)


def in_float32(model: Any) -> Any:
    """The same values in plain float32 layers."""
    from comfy.quant_ops import QuantizedTensor

    plain = flux()
    parts = dict(model.model.diffusion_model.named_modules())
    with torch.no_grad():
        for name, part in plain.model.diffusion_model.named_modules():
            for key, p in part.named_parameters(recurse=False):
                value = getattr(parts[name], key)
                value = value.dequantize() if isinstance(value, QuantizedTensor) else value.float()
                for scale in ("scale_weight", "pre_quant_scale") if key == "weight" else ():
                    found = getattr(parts[name], scale, None)
                    value = value if found is None else value * found
                p.copy_(value)
    return plain


def _base(name: str, checkpointing: bool, inference: bool = False) -> None:
    make, tolerance = BASES[name]
    b = batch(2)
    with torch.inference_mode(inference):
        model = make()
    plain = in_float32(model)
    expected_loss, expected = gradients(*adapted(plain), b)
    denoiser, lora = adapted(model, checkpointing=checkpointing)
    loss, found = gradients(denoiser, lora, b)
    assert all(g.dtype == torch.float32 for g in found)
    error = apart(found, expected)
    assert error < tolerance, f"gradients differ by {error:.2e} from those of the same weights in float32"
    assert abs(loss - expected_loss) < max(tolerance, 1e-5) * expected_loss
    # Without gradients other kernels may be used, and inputs that do not lie in one piece are not rounded to integers.
    with torch.no_grad():
        assert abs(loss_of(denoiser, b) - loss) < (max(2e-3, tolerance / 10) if tolerance > 1e-3 else 1e-5) * loss, (
            "another loss without gradients"
        )
    assert not any("forward" in m.__dict__ for m in denoiser.module.modules())


def _frozen_products(name: str) -> None:
    """The backward pass of layers by themselves, which rounds nothing, against the weight that their forward pass shows."""
    model = BASES[name][0]()
    layers = [m for m in model.model.diffusion_model.modules() if getattr(m, "layout_type", None)]
    shapes = {tuple(m.weight.shape): m for m in layers}
    assert len(shapes) >= 4
    for (rows, columns), layer in shapes.items():
        with torch.no_grad():  # one number in each row: it is the row's largest, and no format rounds that
            weight = (layer(torch.eye(columns)) - (0 if layer.bias is None else layer.bias)).T
        assert weight.shape == (rows, columns) and weight.std() > 0.01
        x = torch.randn(2, 3, columns).requires_grad_()
        wanted = torch.randn(2, 3, rows)
        with PACK.gradients.differentiable(layer):
            (found,) = torch.autograd.grad((layer(x) * wanted).sum(), x)
        assert_close(found, wanted @ weight, 1e-3, f"gradient of a layer of {rows}×{columns}")


@check
def check_a_patched_or_borrowed_weight_is_not_kept() -> None:
    """Newer ComfyUI brings weights that wait in main memory into one buffer, which the next layer writes over."""
    import comfy.ops

    b, plain = batch(2), small_flux()
    expected = gradients(*adapted(plain), b)[1]
    buffer = torch.empty(1 << 20)

    def borrowed(weight: Tensor) -> Tensor:
        return buffer[: weight.numel()].view(weight.shape).copy_(weight)

    for checkpointing in (False, True):
        model = small_flux()
        layers = [m for m in model.model.diffusion_model.modules() if isinstance(m, comfy.ops.CastWeightBiasOp)]
        for layer in layers:
            layer.weight_function = [borrowed] if layer.weight is not None else []
        assert len([m for m in layers if m.weight_function]) >= 39
        found = gradients(*adapted(model, checkpointing=checkpointing), b)[1]
        assert apart(found, expected) < 1e-5
    operations = comfy.ops.manual_cast
    for layer, x in (
        (operations.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)),
        (operations.GroupNorm(2, 4), torch.randn(2, 4, 8, 8)),
        (operations.LayerNorm(8), torch.randn(2, 8)),
        (operations.ConvTranspose1d(3, 4, 2), torch.randn(2, 3, 8)),
    ):
        for p in layer.parameters():
            torch.nn.init.normal_(p.requires_grad_(False))
        x.requires_grad_()
        (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
        layer.weight_function = [borrowed]
        with PACK.gradients.differentiable(layer):
            y = layer(x)
        buffer.fill_(float("nan"))
        (found,) = torch.autograd.grad(y.square().sum(), x)
        assert_close(found, wanted, 1e-5, type(layer).__name__)


@check
def check_memory_that_was_lent_in_inference_mode_is_let_go_of() -> None:
    import comfy.model_management as management

    if not hasattr(management, "STREAM_CAST_BUFFERS"):
        return
    with torch.inference_mode():
        frozen = torch.empty(8)
    management.STREAM_CAST_BUFFERS.update(first=frozen, second=torch.empty(8))
    try:
        layer = torch.nn.Linear(2, 2)
        with torch.inference_mode(), PACK.gradients.differentiable(layer):
            assert len(management.STREAM_CAST_BUFFERS) == 2
        with torch.no_grad(), PACK.gradients.differentiable(layer):
            assert list(management.STREAM_CAST_BUFFERS) == ["second"]
    finally:
        management.STREAM_CAST_BUFFERS.clear()


def add_bases() -> None:
    for name in BASES:
        if name.removesuffix("_fast") in QUANTISED and name.endswith("_fast"):
            CHECKS[f"exact_products_{name}"] = lambda n=name: _exact(n)
        if name in NOT_ON_A_CPU:
            CHECKS[f"base_{name}"] = lambda n=name: _not_on_a_cpu(n)
            continue
        if name.removesuffix("_fast") in QUANTISED and not (name.endswith("_fast") and "pre_quant" in name):
            CHECKS[f"frozen_products_{name}"] = lambda n=name: _frozen_products(n)
        for checkpointing in (False, True):
            CHECKS[f"base_{name}{'_checkpointed' if checkpointing else ''}"] = lambda n=name, c=checkpointing: _base(
                n, c
            )
        if name.removesuffix("_fast") not in QUANTISED or name in ONE_OF_A_FAMILY:
            CHECKS[f"base_{name}_loaded_in_inference_mode"] = lambda n=name: _base(n, True, True)


def _exact(name: str) -> None:
    """What the self-check asks for: the same layers without rounding their inputs, as those of float32."""
    b, model = batch(2), BASES[name][0]()
    expected_loss, expected = gradients(*adapted(in_float32(model)), b)
    before = [dict(m.__dict__) for m in model.model.diffusion_model.modules()]
    denoiser, lora = adapted(model)
    denoiser.load()  # as before each step: to load a model takes back what was done to its layers
    with denoiser.exact_products():
        loss, found = gradients(denoiser, lora, b)
        with torch.no_grad():
            assert abs(loss_of(denoiser, b) - loss) < 1e-5 * loss
    assert apart(found, expected) < 1e-5 and abs(loss - expected_loss) < 1e-5 * loss
    lora.detach()
    for m, was in zip(model.model.diffusion_model.modules(), before):
        assert getattr(m, "_full_precision_mm", None) == was.get("_full_precision_mm")
        assert not getattr(m, "weight_function", None)


def _not_on_a_cpu(name: str) -> None:
    """If a newer one can run it, it is to be tested."""
    try:
        _base(name, False)
    except ValueError as error:
        assert NOT_ON_A_CPU[name] in str(error), error
    else:
        raise AssertionError(f"{name} runs on a CPU now")


def _low_memory(name: str, tolerance: float, checkpointing: bool) -> None:
    """A model with a LoRA of its own, loaded as for a small GPU: ComfyUI patches each weight when it is used."""
    import comfy.model_management as management
    import comfy.sd

    b, base = batch(2), BASES[name][0]()
    other = PACK.lora.LoRA(base.model.diffusion_model, PACK.lora.LoRASettings(2, 2.0), seed=5)
    for layer in other.layers:
        torch.nn.init.normal_(layer.up, std=0.1)
    merged, _ = comfy.sd.load_lora_for_models(in_float32(base), None, other.tensors(), 1.0, 0.0)
    patched, _ = comfy.sd.load_lora_for_models(base, None, other.tensors(), 1.0, 0.0)
    management.unload_all_models()
    part = management.LoadedModel(patched)
    part.model_load(lowvram_model_memory=1)
    management.current_loaded_models.insert(0, part)
    assert sum(len(getattr(m, "weight_function", [])) for m in base.model.diffusion_model.modules()) >= len(
        other.layers
    )
    unpatched = gradients(*adapted(in_float32(base)), b)[1]
    expected, found = (gradients(*adapted(m, checkpointing=checkpointing), b)[1] for m in (merged, patched))
    error, without = apart(found, expected), apart(unpatched, expected)
    assert error < tolerance < 0.1 < without, f"gradients differ by {error:.2e}, and by {without:.2e} without the patch"


def add_low_memory() -> None:
    import comfy.supported_models_base

    # 0.3.75 rounds a patched weight of a quantised layer to fp8 again, at random; newer ones dequantise it.
    older = hasattr(comfy.supported_models_base.BASE, "layer_quant_config")
    names = (
        "fp8_with_fp32_compute",
        "float8_e4m3fn",
        "nvfp4",
        "int8_convrot_fast",
        "convrot_w4a4_fast",
        "asym_w4a8_int8_fast",
    )
    for name in filter(BASES.__contains__, names):
        tolerance = 0.07 if older and name == "float8_e4m3fn" else 1e-4
        for checkpointing in (False, True) if "fp8" in name or name == "float8_e4m3fn" else (True,):
            CHECKS[f"low_memory_{name}{'_checkpointed' if checkpointing else ''}"] = (
                lambda n=name, t=tolerance, c=checkpointing: _low_memory(n, t, c)
            )


@check
def check_fp8_weights_are_not_kept_in_full_precision() -> None:
    kept = []
    for make in (lambda: _cast(torch.float8_e4m3fn, torch.float32), small_flux):
        denoiser, _ = adapted(make(), "attention", checkpointing=False)
        own = {p.untyped_storage().data_ptr() for p in denoiser.module.parameters()}
        saved: dict[int, int] = {}

        def pack(x: Tensor, saved: dict[int, int] = saved, own: set[int] = own) -> Tensor:
            if x.untyped_storage().data_ptr() not in own and x.ndim == 2 and min(x.shape) >= 64:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss_of(denoiser, batch(1, 4, 4))
        kept.append(sum(saved.values()))
    assert kept[0] <= kept[1], f"{kept[0]} bytes of matrices kept, {kept[1]} over a plain base"


# ---------------------------------------------------------------------------- files, and the stock loaders


def _round_trip(layers: str, dtype: torch.dtype, tolerance: float) -> None:
    import comfy.lora
    import comfy.sd
    import comfy.utils

    b = batch(2)
    denoiser, lora = adapted(small_flux(), layers)
    file = SCRATCH / "round trip.safetensors"
    lora.save(file, {"note": "a test"}, dtype)
    known = comfy.lora.model_lora_keys_unet(denoiser.model.model, {})
    state = comfy.utils.load_torch_file(str(file))
    assert {
        k.removesuffix(end)
        for k in state
        for end in (".lora_up.weight", ".lora_down.weight", ".alpha")
        if k.endswith(end)
    } <= set(known)
    assert len(state) == 3 * len(lora.layers)
    adapters = comfy.lora.load_lora(state, known)
    assert {f"diffusion_model.{name}.weight" for name in lora.targets} == set(adapters), "a layer was not loaded"
    with torch.no_grad():
        ours = denoiser(b.x, b.t, b.references, b.conditioning)
        with lora.disabled():
            base = denoiser(b.x, b.t, b.references, b.conditioning)
        lora.detach()
        merged, _ = comfy.sd.load_lora_for_models(denoiser.model, None, state, 1.0, 0.0)
        theirs = PACK.denoiser.ComfyDenoiser(merged)
        theirs.load()
        found = theirs(b.x, b.t, b.references, b.conditioning)
        assert (ours - base).abs().max() > 10 * tolerance * base.abs().max(), "the LoRA does nothing"
        assert_close(found, ours, tolerance, "output with the file in the stock loader")
        comfy.model_management.load_models_gpu([denoiser.model])
        assert_close(denoiser(b.x, b.t, b.references, b.conditioning), base, 1e-5, "the base after the stock loader")


for _layers in PRESETS:
    for _dtype, _tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        _name = f"round_trip_of_{_layers.replace(' + ', '_and_')}_in_{str(_dtype).removeprefix('torch.')}"
        CHECKS[_name] = lambda a=_layers, d=_dtype, t=_tolerance: _round_trip(a, d, t)


@check
def check_round_trip_of_every_kind_of_layer_alone() -> None:
    names = PACK.lora.select_layers(small_flux().model.diffusion_model, "all")
    kinds = {re.sub(r"\.\d+\.", ".0.", name, count=1) for name in names}
    assert len(kinds) >= 20, kinds
    for kind in sorted(kinds):
        _round_trip(kind, torch.float32, 1e-5)


@check
def check_stock_training_nodes_take_it() -> None:
    """LORA_MODEL → Load LoRA Model and Save LoRA Weights; LOSS_MAP → Plot Loss Graph."""
    import comfy_extras.nodes_train as stock
    import folder_paths
    from safetensors.torch import load_file

    folder_paths.set_output_directory(str(SCRATCH / "output"))
    b = batch(2)
    denoiser, lora = adapted(small_flux(), "attention + MLP")
    with torch.no_grad():
        ours = denoiser(b.x, b.t, b.references, b.conditioning)
    lora.detach()
    with torch.inference_mode():  # as ComfyUI runs nodes
        state = lora.tensors()
        merged = stock.LoraModelLoader.execute(denoiser.model, state, 1.0)[0]
        theirs = PACK.denoiser.ComfyDenoiser(merged)
        theirs.load()
        assert_close(theirs(b.x, b.t, b.references, b.conditioning), ours, 1e-5, "Load LoRA Model")
        stock.SaveLoRA.execute(state, "loras/test", 7)
    (file,) = (SCRATCH / "output" / "loras").glob("test_7_steps_*.safetensors")
    saved = load_file(file)
    assert saved.keys() == state.keys() and all(torch.equal(saved[k], state[k]) for k in state)


# ---------------------------------------------------------------------------- memory


@check
def check_load_brings_everything_and_costs_nothing_twice() -> None:
    import comfy.model_management as management

    model, vae = small_flux(), small_vae(16)
    denoiser = PACK.denoiser.ComfyDenoiser(model)
    decoder = PACK.decoder.VAEDecoder(vae, denoiser.from_model)
    calls: list[list[Any]] = []
    stock = management.load_models_gpu

    def counted(models: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(list(models))
        stock(models, *args, **kwargs)

    management.load_models_gpu = counted
    try:
        with torch.inference_mode():
            denoiser.load([decoder.patcher, model.clone()])
            denoiser.load([decoder.patcher, model.clone()])
        there = management.loaded_models()
        assert model in there and vae.patcher in there
        assert calls == [[vae.patcher], [model, vae.patcher]], "the small ones first, and each only once"
        b = batch(2)
        x = b.x.clone().requires_grad_()
        v = denoiser(x, b.t, b.references, b.conditioning)
        decoder(x - b.t.view(-1, 1, 1, 1) * v).mean().backward()
        assert len(calls) == 2, "a model was loaded in the middle of a graph"
        management.unload_all_models()
        denoiser.load([decoder.patcher])
        assert len(calls) == 4 and model in management.loaded_models()
        denoiser.load([decoder.patcher], reserve=1 << 20)
    finally:
        management.load_models_gpu = stock
    assert x.grad.abs().max() > 0


def dynamic_checks() -> None:
    """Weights under dynamic VRAM, where this ComfyUI has it. On a CPU a model can be made for a GPU, and never be loaded."""
    import comfy.model_patcher

    if hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        for function in (static_model_check, static_vae_check, static_demo_vae_check, static_clip_vision_check):
            CHECKS[f"dynamic_{function.__name__.removesuffix('_check')}"] = function


GPU = torch.device("cuda:0")


@contextlib.contextmanager
def dynamic() -> Iterator[None]:
    """Inside, stock loaders make models as on a GPU with dynamic VRAM: weights are assigned, and layers are built without."""
    import comfy.memory_management as memory
    import comfy.model_patcher as patcher

    before, patcher.CoreModelPatcher, memory.aimdo_enabled = patcher.CoreModelPatcher, patcher.ModelPatcherDynamic, True
    try:
        yield
    finally:
        patcher.CoreModelPatcher, memory.aimdo_enabled = before, False


def _dynamic_flux(disable_dynamic: bool = False) -> Any:
    """A loader as ``cached_patcher_init`` knows it."""
    import comfy.model_patcher

    CALLS.append(disable_dynamic)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.ModelPatcherDynamic
    made = kind(small_flux().model, load_device=GPU, offload_device=CPU)
    made.cached_patcher_init = (_dynamic_flux, ())
    return made


CALLS: list[bool] = []


def static_model_check() -> None:
    """The trainer and an encoder that get one MODEL share one static copy of it, with its LoRAs and wrappers."""
    import comfy.sd

    CALLS.clear()
    with torch.inference_mode():
        model = _dynamic_flux()
        assert model.is_dynamic()
        other = PACK.lora.LoRA(small_flux().model.diffusion_model, PACK.lora.LoRASettings(2, 2.0), seed=5)
        patched, _ = comfy.sd.load_lora_for_models(model, None, other.tensors(), 1.0, 0.0)
        patched.model_options["transformer_options"]["mine"] = 7
        denoiser = PACK.denoiser.ComfyDenoiser(patched)
        encoder = PACK.encoders.diffusion_encoder(patched, small_vae(16), prompt(), "double_blocks.1", 0.3, 0)
    assert CALLS == [False, True], "loaded once more, and only once"
    static = denoiser.model
    assert type(static).__name__ == "ModelPatcher" and not static.is_dynamic() and patched.is_dynamic()
    assert static.model is not patched.model and denoiser.module is static.model.diffusion_model
    assert static.load_device == GPU
    assert static.patches.keys() == patched.patches.keys() and len(static.patches) == len(other.layers)
    assert static.patches_uuid == patched.patches_uuid != model.patches_uuid
    assert static.model_options["transformer_options"]["mine"] == 7
    assert not any(p.is_inference() for p in static.model.parameters())
    (shared, _) = PACK.loading.patchers_of(encoder)
    assert shared.model is static.model and not shared.is_dynamic()
    PACK.loading.check_shared(encoder, static)
    plain = PACK.denoiser.ComfyDenoiser(model)
    assert plain.model.model is static.model and not plain.model.patches and CALLS == [False, True]
    refused(lambda: PACK.loading.check_shared(encoder, plain.model), "objective", "other LoRAs")
    nowhere = _dynamic_flux()
    nowhere.cached_patcher_init = None
    refused(lambda: PACK.denoiser.ComfyDenoiser(nowhere), "model", "Load Diffusion Model", "--disable-dynamic-vram")
    assert PACK.offers.static_model(static) is static


def static_vae_check() -> None:
    import comfy.sd

    state = {k: v.clone() for k, v in small_vae(16).get_sd().items()}
    z = torch.randn(1, 16, 4, 4)
    wanted = small_vae(16).decode(z)
    with torch.inference_mode(), dynamic():
        vae = comfy.sd.VAE(sd=dict(state), device=GPU, dtype=torch.float32)
        assert vae.patcher.is_dynamic() and vae.patcher.cached_patcher_init is None
        decoder = PACK.decoder.VAEDecoder(vae)
        decoder.vae.device = vae.device = CPU  # which the encoder asks for at once
        encoder = PACK.encoders.vae_encoder(vae)
    static = decoder.vae
    assert static is not vae and vae.patcher.is_dynamic() and not static.patcher.is_dynamic()
    assert encoder.patchers == (static.patcher,) and static.patcher.model is static.first_stage_model
    assert static.patcher.load_device == GPU and static.latent_channels == 16
    features = PACK.encoders.ManagedVAEDecoder(vae)
    assert features.patchers == (static.patcher,) and features.comfy_vae is static
    made = static.first_stage_model.state_dict()
    assert made.keys() == state.keys() and all(torch.equal(made[k], state[k]) for k in state)
    assert not any(p.is_inference() for p in static.first_stage_model.parameters())
    with torch.no_grad():
        found = static.process_output(static.first_stage_model.decode(z)).movedim(1, -1)
    assert_close(found, wanted, 1e-6, "the copy's pictures")
    with dynamic():
        odd = comfy.sd.VAE(sd=dict(state), device=GPU, dtype=torch.float32)
    odd.first_stage_model.register_buffer("unknown", torch.zeros(1))
    refused(lambda: PACK.decoder.VAEDecoder(odd), "vae", "TAESD cannot be copied", "--disable-dynamic-vram")


def static_demo_vae_check() -> None:
    """The demo's own loader makes a VAE that can be copied, as every stock one can."""
    import comfy.sd

    stock = comfy.sd.VAE
    with torch.inference_mode(), dynamic():
        comfy.sd.VAE = lambda sd: stock(sd=sd, device=GPU, dtype=torch.float32)
        try:
            vae = PACK.small.small_vae()
        finally:
            comfy.sd.VAE = stock
        assert vae.patcher.is_dynamic()
        decoder = PACK.decoder.VAEDecoder(vae)
    made, own = (v.first_stage_model.state_dict() for v in (decoder.vae, vae))
    assert not decoder.patcher.is_dynamic() and made.keys() == own.keys()


def static_clip_vision_check() -> None:
    import comfy.clip_vision
    import comfy.model_management as management

    still = small_clip("clip")
    state = {k: v.clone() for k, v in still.get_sd().items()}
    stock, management.text_encoder_device = management.text_encoder_device, lambda: GPU
    try:
        with torch.inference_mode(), dynamic():
            clip = comfy.clip_vision.ClipVisionModel(still.config)
            assert clip.patcher.is_dynamic() and clip.load_sd(state) == ([], [])
            encoder = PACK.encoders.ClipVisionEncoder(clip, "tokens")
    finally:
        management.text_encoder_device = stock
    static = encoder.clip
    assert clip.patcher.is_dynamic() and not static.patcher.is_dynamic() and encoder.patchers == (static.patcher,)
    assert static.patcher.model is static.model is not clip.model and static.patcher.load_device == GPU
    made = static.model.state_dict()
    assert made.keys() == state.keys() and all(torch.equal(made[k], state[k].to(clip.dtype)) for k in state)
    assert {p.dtype for p in static.model.parameters()} == {clip.dtype}
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert_close(static.model(pixel_values=x)[0], still.model(pixel_values=x)[0], 1e-2, "tokens of the copy")
    with dynamic():
        assert PACK.encoders.ClipVisionEncoder(clip, "global").clip is static


@contextlib.contextmanager
def refusing_to_run(denoiser: Any) -> Iterator[None]:
    """Inside, the model is neither loaded nor run."""
    import comfy.model_management

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded or run")

    load, comfy.model_management.load_models_gpu = comfy.model_management.load_models_gpu, fail
    hook = denoiser.module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        comfy.model_management.load_models_gpu = load
        hook.remove()


@check
def check_refusals() -> None:
    import comfy.model_sampling

    model, b = small_flux(), batch(2)
    denoiser = PACK.denoiser.ComfyDenoiser(model)

    def call(conditioning: Any = b.conditioning, t: Tensor = b.t, references: Any = b.references) -> Tensor:
        with torch.no_grad():
            return denoiser(b.x, t, references, conditioning)

    refused(lambda: call(t=b.t[:1]), "x_t", "1 t")
    refused(lambda: call(conditioning=b.conditioning[:1]), "x_t", "1 conditionings")
    refused(lambda: call(references=[b.references[0][:1]]), "x_t", "references of [1]")
    refused(lambda: call(conditioning=[prompt() + prompt(), prompt()]), "conditioning", "one entry", "2")
    refused(lambda: call(conditioning=["a chair", "a table"]), "conditioning", "str")
    refused(lambda: call(conditioning=[prompt(control=object())] * 2), "conditioning", "ControlNet")
    refused(lambda: call(conditioning=[prompt(mask=torch.ones(1, 8, 8))] * 2), "conditioning", "a mask")
    foreign = [[torch.randn(1, TEXT, 99), b.conditioning[0][0][1]]]
    refused(lambda: call(conditioning=[foreign, foreign]), "conditioning", "20 numbers", "99")
    unpooled = [[torch.randn(1, TEXT, FLUX["context_in_dim"]), {}]]
    refused(lambda: call(conditioning=[unpooled] * 2), "conditioning", "pooled_output")
    fresh = PACK.denoiser.ComfyDenoiser(small_flux())
    with refusing_to_run(fresh):
        fresh.check(b.conditioning[0])
        refused(lambda: fresh.check("a chair"), "conditioning", "str")
        refused(lambda: fresh.check(prompt(control=object())), "conditioning", "ControlNet")
        refused(lambda: fresh.check(foreign), "conditioning", "20 numbers", "99")
        refused(lambda: fresh.check(unpooled), "conditioning", "pooled_output")
    model.model.model_sampling = comfy.model_sampling.ModelSamplingDiscrete()
    refused(lambda: PACK.denoiser.ComfyDenoiser(model), "model", "flow-matching", "ModelSamplingDiscrete")


@check
def check_model_without_reference_latents_is_refused() -> None:
    import comfy.model_patcher
    import comfy.supported_models

    class Deaf(comfy.supported_models.model_base.Flux):
        def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
            return {k: v for k, v in super().extra_conds(**kwargs).items() if not k.startswith("ref_latents")}

    model, b = small_flux(), batch(2)
    model.model.__class__ = Deaf
    refused(lambda: PACK.denoiser.ComfyDenoiser(model), "model", "that is known (FLUX.1 Kontext, ", "ComfyUI's Deaf")
    Deaf.__name__ = "Flux"
    denoiser = PACK.denoiser.ComfyDenoiser(model)
    with torch.no_grad():
        refused(lambda: denoiser(b.x, b.t, b.references, b.conditioning), "model", "reference latents", "Flux")
        denoiser(b.x, b.t, [], b.conditioning)
    with refusing_to_run(denoiser):
        refused(lambda: denoiser.check(b.conditioning[0]), "model", "reference latents", "Flux")


# ---------------------------------------------------------------------------- decoding


def _decode(kind: str, channels: int, inference: bool) -> None:
    with loaded(inference):
        vae = small_vae(channels, kind)
        z = torch.randn(2, channels, 5, 7, generator=torch.Generator().manual_seed(2))
    model, films = small_flux().model, kind == "wan"
    decoder = PACK.decoder.VAEDecoder(vae, model.process_latent_out)
    assert decoder.checkpointing == (kind != "taesd")
    with loaded(inference):
        latents = model.process_latent_out(z)
        theirs = vae.decode(latents.unsqueeze(2) if films else latents).clone()
        theirs = theirs.squeeze(1) if films else theirs
        assert torch.equal(decoder(z), theirs)
    assert theirs.shape == (2, 40, 56, 3) == (2, 5 * decoder.scale, 7 * decoder.scale, 3)
    with torch.inference_mode(False), torch.enable_grad():
        x = z.clone().requires_grad_()
        pictures = decoder(x)
        assert_close(pictures.detach(), theirs, 1e-5, "pictures with gradients")
        weights = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(5))
        (grad,) = torch.autograd.grad((pictures * weights).sum(), x)
    assert not any("forward" in m.__dict__ for m in vae.first_stage_model.modules())

    def unclamped(x: Tensor) -> Tensor:
        """Without the clamp: what the gradient is of."""
        latents = model.process_latent_out(x)
        made = vae.first_stage_model.decode(latents.unsqueeze(2) if films else latents)
        return ((made.squeeze(2) if films else made).movedim(1, -1) + 1) / 2

    noise = grad.sign() * torch.rand(grad.shape, generator=torch.Generator().manual_seed(6))
    for direction in (grad / grad.norm(), noise / noise.norm()):
        step = 0.02
        with torch.no_grad():
            ends = [(unclamped(z.clone() + s * step * direction).double() * weights).sum() for s in (1, -1)]
        numeric, analytic = ((ends[0] - ends[1]) / (2 * step)).item(), (grad.double() * direction).sum().item()
        assert abs(numeric - analytic) < 0.02 * abs(analytic), f"{analytic:.6g}, finite differences say {numeric:.6g}"


for _kind, _channels in (("taesd", 16), ("taesd", 4), ("kl", 4), ("wan", 16)):
    for _inference in (False, True):
        _name = f"decode_{_kind}{_channels}{'_loaded_in_inference_mode' if _inference else ''}"
        CHECKS[_name] = lambda k=_kind, c=_channels, i=_inference: _decode(k, c, i)


@check
def check_a_latent_format_that_a_node_made_can_be_differentiated() -> None:
    """Formats of some models keep tensors, which are inference tensors where a node loaded the model."""
    import comfy.latent_formats

    z = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        model = small_flux()
        model.model.latent_format = comfy.latent_formats.Wan21()
        theirs = model.model.process_latent_out(z.unsqueeze(2)).squeeze(2).clone()
    x = z.clone().requires_grad_()
    ours = PACK.denoiser.ComfyDenoiser(model).from_model(x)
    assert torch.equal(ours, theirs)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    assert_close(gradient, comfy.latent_formats.Wan21().latents_std[:, :, 0].expand_as(z), 1e-6, "gradient")


@check
def check_decode_lets_gradients_through_the_clamp() -> None:
    vae = small_vae(16)
    with torch.no_grad():
        vae.first_stage_model.taesd_decoder[-1].bias.fill_(3.0)  # far above white everywhere
    z = torch.randn(1, 16, 4, 4).requires_grad_()
    pictures = PACK.decoder.VAEDecoder(vae)(z)
    assert pictures.max() <= 1 and (pictures == 1).float().mean() > 0.9
    pictures.sum().backward()
    assert z.grad.abs().max() > 1e-3


@check
def check_blocks_of_zeros_are_not_computed() -> None:
    """The demo's decoder has three, its encoder none but these; latents, pictures and gradients are what they are with them."""
    vae, count = PACK.small.small_vae(), 0
    net, decoder = vae.first_stage_model, PACK.decoder.VAEDecoder(vae)
    z = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(4))

    def counted(module: Any, given: Any, made: Any) -> None:
        nonlocal count
        count += 1

    for module in net.taesd_decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(counted)
    found = []
    for run, convolutions in ((decoder, 5 + 7 * 3), (lambda z: net.decode(z).movedim(1, -1) / 2 + 0.5, 5 + 10 * 3)):
        x, count = z.clone().requires_grad_(), 0
        pictures = run(x)
        assert count == convolutions, f"{count} convolutions"
        weights = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(5))
        found.append((pictures.detach().clamp(0, 1), torch.autograd.grad((pictures * weights).sum(), x)[0]))
    (ours, gradient), (theirs, wanted) = found
    assert torch.equal(ours, theirs) and gradient.abs().max() > 0.1
    assert_close(gradient, wanted, 1e-5, "gradient")
    count = 0
    for module in net.taesd_encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(counted)
    pixels = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(6))
    ours, first = PACK.encoders.vae_encoder(vae).latents(pixels), count
    theirs = vae.first_stage_model.encode(vae.process_input(pixels.movedim(-1, 1)))
    assert (first, count - first) == (5, 5 + 10 * 3), f"{first} and {count - first} convolutions"
    assert torch.equal(ours, theirs.float()) and ours.std() > 0.1
    assert not PACK.encoders.idle_blocks(small_vae(16).first_stage_model)


@check
def check_decode_refusals() -> None:
    import comfy.sd

    vae = small_vae(16)
    refused(lambda: PACK.decoder.VAEDecoder(vae)(torch.zeros(1, 4, 8, 8)), "latents", "16", "[1, 4, 8, 8]")
    refused(lambda: PACK.decoder.VAEDecoder(comfy.sd.VAE(sd={})), "vae", "no weights")
    PACK.decoder.check_decoder(small_vae(16), vae)
    refused(lambda: PACK.decoder.check_decoder(small_vae(4), vae), "decoder", "16 channels", "got 4 channels")
    refused(lambda: PACK.decoder.check_decoder(comfy.sd.VAE(sd={}), vae), "decoder", "no weights")
    vae.latent_dim = 3
    refused(lambda: PACK.decoder.VAEDecoder(vae), "vae", "3 latent dimensions")


def main() -> None:
    global PACK, SCRATCH
    pack, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    if importlib.util.find_spec("comfy_aimdo"):  # as main.py does, before anything of ComfyUI's is imported
        importlib.import_module("comfy_aimdo.control").init()
    add_older_bases()
    add_quantised_bases()
    add_bases()
    add_low_memory()
    dynamic_checks()
    name = import_pack(pack).__name__.removesuffix(".nodes.comfy.encoders")
    PACK = SimpleNamespace(
        decoder=importlib.import_module(f"{name}.nodes.comfy.decoder"),
        denoiser=importlib.import_module(f"{name}.nodes.comfy.denoiser"),
        loading=importlib.import_module(f"{name}.nodes.comfy.loading"),
        gradients=importlib.import_module(f"{name}.nodes.comfy.gradients"),
        lora=importlib.import_module(f"{name}.editloss_core.lora.lora"),
        encoders=importlib.import_module(f"{name}.nodes.comfy.encoders"),
        offers=importlib.import_module(f"{name}.nodes.comfy.offers"),
        small=importlib.import_module(f"{name}.nodes.comfy.small_model"),
    )
    run_checks(CHECKS, only)


if __name__ == "__main__":
    main()
