"""Checks of the self-check inside a real ComfyUI process; test_self_check.py starts it and reads the result.

    cd ComfyUI && python …/driver_self_check.py PACK_FOLDER SCRATCH_FOLDER [NAME]

Every kind of base that training supports is let through, and every silent error that ComfyUI has led to is put back, one at
a time, into the code that mends it, and is stopped by name.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import driver_denoiser as bases
import torch
from driver_denoiser import PRESETS, adapted, prompt
from driver_model_encoders import flux_config, import_pack, randomised, run_checks, small_flux, small_vae
from torch import Tensor

CHECKS: dict[str, Callable[[], None]] = {}
SEEDS = range(3)


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


class Pairs:
    """What the check asks of prepared pairs."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(100 + seed)
        self._after, self._before = torch.randn(2, 1, 16, 8, 12, generator=generator)

    def after(self, indices: list[int]) -> Tensor:
        return self._after

    def before(self, indices: list[int]) -> Tensor:
        return self._before


def checked(
    model: Any, layers: str = "all", seed: int = 0, checkpointing: bool = True, item: Any = None, batch: int = 2
) -> Any:
    """The check of a network, as a run makes it, and the sizes of the calls of the model."""
    denoiser, lora = adapted(model, layers, rank=8, alpha=8.0, trained=False, checkpointing=checkpointing)
    calls: list[list[int]] = []
    hook = denoiser.module.register_forward_pre_hook(lambda module, args: calls.append(list(args[0].shape)))
    before = [p.detach().clone() for p in lora.parameters()]
    found = PACK.check.check_network(denoiser, lora, Pairs(seed), [item or prompt(seed)], 0, batch, seed)
    hook.remove()
    assert all(torch.equal(p, value) for p, value in zip(lora.parameters(), before)), "the LoRA is not what it was"
    assert not any("forward" in m.__dict__ for m in denoiser.module.modules()), "the model was changed"
    return PACK.check.SelfCheck(denoiser.program, tuple(found)), calls


# ---------------------------------------------------------------------------- nothing that is right is stopped


def _let_through(make: Callable[[], Any]) -> None:
    for seed in SEEDS:
        found, calls = checked(make(), PRESETS[seed], seed, checkpointing=seed != 1)
        assert not found.wrong, found.line()
        assert [part.part for part in found.parts] == ["LoRA", "velocity", "reference"]
        assert found.parts[0].error is not None, f"nothing could be told: {found.line()}"
        assert calls == [[2, 16, 8, 12]] * 4, calls


def add_bases() -> None:
    bases.add_older_bases()
    bases.add_quantised_bases()
    CHECKS["lets_fp32_through"] = lambda: _let_through(small_flux)
    for name, (make, _) in bases.BASES.items():
        if name not in bases.NOT_ON_A_CPU:
            CHECKS[f"lets_{name}_through"] = lambda make=make: _let_through(make)


# ---------------------------------------------------------------------------- every silent error is stopped


@contextlib.contextmanager
def put_back(owner: Any, name: str, old: str, new: str) -> Iterator[None]:
    """Inside, ``owner.name`` is the function with ``old`` in its code replaced by ``new``."""
    function = inspect.getattr_static(owner, name)
    plain = inspect.unwrap(getattr(function, "__func__", function))
    code = textwrap.dedent(inspect.getsource(plain))
    assert code.count(old) == 1, f"{old!r} stands {code.count(old)} times in {name}"
    made: dict[str, Any] = {}
    exec(compile(code.replace(old, new), f"<{name}, put back>", "exec"), plain.__globals__, made)
    setattr(owner, name, made[name])
    try:
        yield
    finally:
        setattr(owner, name, function)


def stopped(found: Any, part: str, *words: str) -> None:
    assert [wrong.part for wrong in found.wrong] == [part], found.line()
    try:
        found.raise_if_wrong()
    except PACK.check.SelfCheckFailed as error:
        for word in (f"- {part}: ", PACK.offers.program(), "ComfyUI", "Nothing was trained", *words):
            assert word in str(error), f"{word!r} is not in: {error}"


@check
def check_an_output_that_is_made_in_place() -> None:
    """A1: the decoder's output has changed before its gradient is taken."""
    for seed in SEEDS:
        vae = small_vae(16)
        vae.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)  # as 0.33 has it
        decoder = PACK.decoder.VAEDecoder(vae, small_flux().model.process_latent_out)
        objective = SimpleNamespace(differentiated=lambda i, d=decoder, s=seed: [("decoder", d, Pairs(s).after([i]))])
        right = PACK.check.SelfCheck("", tuple(PACK.check.check_objective_parts(objective, 0, seed)))
        assert not right.wrong, right.line()
        with put_back(PACK.decoder.VAEDecoder, "__call__", "decoded.clone()", "decoded"):
            wrong = PACK.check.check_objective_parts(objective, 0, seed)
        stopped(PACK.check.SelfCheck(PACK.offers.program(), tuple(wrong)), "decoder", "finite differences")


class SlicesInPlace(torch.nn.Module):
    """A layer that changes slices of its answer, as newer Flux blocks modulate a reference's tokens."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        gate = torch.sigmoid(y)
        y[:, 2:9] *= 3 * gate[:, 2:9]
        return torch.sin(y)


@check
def check_slices_in_place_under_checkpointing() -> None:
    """A2: what a product needs of a slice is changed before the block is computed again."""
    for seed in SEEDS:
        model = small_flux()
        for block in model.model.diffusion_model.double_blocks:
            block.img_mlp = SlicesInPlace(block.img_mlp)
        assert not checked(model, seed=seed)[0].wrong
        mode = PACK.out_of_place.OutOfPlace
        with put_back(mode, "__torch_function__", "x.clone() if x._is_view() else x", "x"):
            stopped(checked(model, seed=seed)[0], "LoRA", "finite differences")


@check
def check_slices_in_place_in_comfyuis_own_blocks() -> None:
    """The same where this ComfyUI has it: a Flux of FLUX.2's kind whose references are modulated as at time 0."""
    import comfy.supported_models
    from comfy.ldm.flux import model

    if "index_timestep_zero" not in inspect.getsource(model):
        return

    def make() -> Any:
        config = comfy.supported_models.Flux(flux_config(global_modulation=True, guidance_embed=False, vec_in_dim=None))
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, device=bases.CPU)
        randomised(base.diffusion_model)
        return comfy.model_patcher.ModelPatcher(base, load_device=bases.CPU, offload_device=bases.CPU)

    for seed in SEEDS:
        item = prompt(seed, reference_latents_method="index_timestep_zero")
        found, _ = checked(make(), seed=seed, item=item)
        assert not found.wrong, found.line()
        with put_back(PACK.out_of_place.OutOfPlace, "__torch_function__", "x.clone() if x._is_view() else x", "x"):
            stopped(checked(make(), seed=seed, item=item)[0], "LoRA")


def without_references(model: Any) -> Any:
    """The network is given the reference and does not look at it."""
    net = model.model.diffusion_model
    forward = net._forward
    place = list(inspect.signature(forward).parameters).index("ref_latents")
    net._forward = lambda *args, **more: forward(*args[:place], None, *args[place + 1 :], **more)
    return model


@check
def check_references_that_are_dropped() -> None:
    """A3: neither in training nor in ComfyUI's own sampler does the reference have an effect."""
    for seed in SEEDS:
        found, _ = checked(without_references(small_flux()), seed=seed)
        stopped(found, "reference", "does not change what the model predicts")
        assert found.wrong[0].found == 0 and math.isinf(found.wrong[0].error)


@check
def check_a_scale_that_is_left_out_of_a_backward_pass() -> None:
    """A4: layers that multiply their input by a scale, or their weight."""
    product = PACK.gradients._FrozenProduct
    if "nvfp4_with_pre_quant_scales" in bases.BASES:
        make = bases.BASES["nvfp4_with_pre_quant_scales"][0]
        fault = ("result if smoothing is None else result * smoothing.to(result)", "result")
    else:
        make = bases.BASES["scaled_fp8"][0]
        fault = ("plain if scale is None else plain * scale.to(plain)", "plain")
    for seed in SEEDS:
        assert not checked(make(), seed=seed)[0].wrong
        with put_back(product, "backward", *fault):
            stopped(checked(make(), seed=seed)[0], "LoRA", "finite differences")


def _identity(x: Tensor) -> Tensor:
    return x.clone()


@check
def check_a_kernel_without_a_derivative() -> None:
    """A kernel that stops at the backward pass, and one through which no gradient comes."""
    if not hasattr(torch.ops.editloss_test, "identity"):
        torch.library.custom_op("editloss_test::identity", _identity, mutates_args=(), schema="(Tensor x) -> Tensor")
    for seed in SEEDS:
        model = small_flux()
        for layer in (block.img_attn.proj for block in model.model.diffusion_model.double_blocks):
            layer.register_forward_pre_hook(lambda m, args: (torch.ops.editloss_test.identity(args[0]),))
        stopped(checked(model, seed=seed)[0], "LoRA", "cannot be computed", "autograd")

        def detached(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Tensor:
            return function(q.detach(), k.detach(), v, *args, **more)

        model = small_flux()
        model.model_options["transformer_options"]["optimized_attention_override"] = detached
        found, _ = checked(model, "attention", seed)
        stopped(found, "LoRA", "finite differences")


@check
def check_fused_kernels_that_are_not_answered() -> None:
    """Where this ComfyUI has fused kernels, and neither its flag nor the pack's answers are there."""
    if not PACK.offers.fused_kernels():
        return
    offers = PACK.gradients
    kept = offers.plain_kernels, offers.in_training
    offers.plain_kernels, offers.in_training = dict, contextlib.nullcontext
    try:
        found, _ = checked(small_flux())
    finally:
        offers.plain_kernels, offers.in_training = kept
    stopped(found, "LoRA", "cannot be computed")


@check
def check_another_velocity_than_the_samplers() -> None:
    for seed in SEEDS:
        with put_back(
            PACK.denoiser.ComfyDenoiser,
            "_velocity",
            'options["sigmas"] = [0], t',
            'options["sigmas"] = [0], t; t = 0.9 * t',
        ):
            found, _ = checked(small_flux(), seed=seed)
        stopped(found, "velocity", "sampling")


def main() -> None:
    global PACK
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    pack = Path(sys.argv[1])
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    name = import_pack(pack).__name__.removesuffix(".nodes.comfy.encoders")
    modules = {
        "denoiser": "nodes.comfy.denoiser", "gradients": "nodes.comfy.gradients", "offers": "nodes.comfy.offers",
        "check": "editloss_core.training.self_check", "lora": "editloss_core.lora.lora", "encoders": "nodes.comfy.encoders", "decoder": "nodes.comfy.decoder",
        "out_of_place": "editloss_core.training.out_of_place",
    }  # fmt: skip
    PACK = SimpleNamespace(**{key: importlib.import_module(f"{name}.{path}") for key, path in modules.items()})
    bases.PACK = PACK
    add_bases()
    run_checks(CHECKS, only)


if __name__ == "__main__":
    main()
