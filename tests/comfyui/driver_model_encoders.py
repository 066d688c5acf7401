"""Checks of nodes/comfy/encoders.py inside a real ComfyUI process; test_model_encoders.py starts it and reads the result.

    cd ComfyUI && python …/driver_model_encoders.py PACK_FOLDER SCRATCH_FOLDER

Every ``check_…`` below is one test. The networks are ComfyUI's own classes, small and with random weights. ``loaded``
builds them twice: plainly, and inside ``torch.inference_mode()``, where ComfyUI's executor runs every node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

CHECKS: dict[str, Callable[..., None]] = {}
SCRATCH = Path()


def check(function: Callable[..., None]) -> Callable[..., None]:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def run_checks(checks: dict[str, Callable[[], None]], only: str = "") -> None:
    """Run those whose name contains ``only``, and print a line of JSON for each."""
    for name, function in checks.items():
        if only not in name:
            continue
        torch.manual_seed(0)
        began = time.monotonic()
        try:
            function()
            error = ""
        except SkipTest as reason:
            error = f"skipped: {reason}"
        except Exception:  # noqa: BLE001 the test shows it
            error = traceback.format_exc()
        print(json.dumps({"name": name, "error": error, "seconds": round(time.monotonic() - began, 2)}), flush=True)


# ---------------------------------------------------------------------------- ComfyUI and the pack in this process


def import_pack(folder: Path) -> Any:
    """nodes/comfy/encoders.py, with the pack under a path-like name, as ComfyUI loads custom nodes."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return importlib.import_module(f"{name}.nodes.comfy.encoders")


def randomised(module: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """ComfyUI's layers start as uninitialised memory; norms get weights near 1, all else small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = scale * torch.randn(p.shape, generator=generator)
            norm = p.ndim == 1 and ("norm" in name or name.endswith("scale")) and not name.endswith("bias")
            p.copy_(noise + 1.0 if norm else noise)
    return module


@contextlib.contextmanager
def loaded(inference: bool) -> Iterator[None]:
    with torch.inference_mode(inference), torch.no_grad():
        yield


def pictures(height: int, width: int, batch: int = 2, seed: int = 3) -> Tensor:
    """Values k/255 in 0.2…0.8: ComfyUI's rounding of pixels changes nothing, and no clamp bites."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.2 + 0.6 * torch.rand(batch, height, width, 3, generator=generator)
    return (x * 255).round() / 255


def small_vae(channels: int = 16, kind: str = "taesd") -> Any:
    import comfy.sd
    import comfy.taesd.taesd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    if kind == "taesd":
        state = randomised(comfy.taesd.taesd.TAESD(latent_channels=channels), scale=0.04).state_dict()
        state["vae_scale"], state["vae_shift"] = torch.tensor(0.3611), torch.tensor(0.1159)
        return comfy.sd.VAE(sd=state)
    if kind == "wan":  # Qwen-Image's, of films
        return comfy.sd.VAE(sd=wan_vae_state())
    ddconfig = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": ddconfig, "embed_dim": channels}
    state = randomised(AutoencoderKL(**params), scale=0.05).state_dict()
    return comfy.sd.VAE(sd=state, config={"params": params})


def wan_vae_state(dim: int = 8) -> dict[str, Tensor]:
    import comfy.ldm.wan.vae

    net = comfy.ldm.wan.vae.WanVAE(dim=dim, z_dim=16, temperal_downsample=[False, True, True])
    return randomised(net, scale=0.05).state_dict()


def stock_encode(vae: Any, x: Tensor) -> Tensor:
    """``[B, C, h, w]`` by ComfyUI; picture by picture where it would make a film of several."""
    if vae.latent_dim == 2:
        return vae.encode(x)
    return torch.cat([vae.encode(x[i : i + 1]).squeeze(2) for i in range(len(x))])


CLIPS = {
    "clip": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "hidden_act": "quick_gelu",
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 56,
        "projection_dim": 32,
    },
    "siglip": {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 56,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
        "image_size": 518,
        "patch_size": 14,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}


def small_clip(kind: str) -> Any:
    import comfy.clip_vision

    path = SCRATCH / f"{kind}.json"
    path.write_text(json.dumps(CLIPS[kind]), encoding="utf-8")
    clip = comfy.clip_vision.ClipVisionModel(str(path))
    state = {k: v.clone() for k, v in randomised(clip.model).state_dict().items()}
    missing, unexpected = clip.load_sd(state)
    assert not missing and not unexpected
    return clip


FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 20,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
TEXT = 5  # tokens


def flux_config(**changed: Any) -> dict[str, Any]:
    """The small Flux as this ComfyUI's class takes it."""
    from comfy.ldm.flux.model import FluxParams

    known = {field.name for field in dataclasses.fields(FluxParams)}
    return {"image_model": "flux", **{name: value for name, value in {**FLUX, **changed}.items() if name in known}}


def small_flux() -> Any:
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Flux(flux_config())
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device=torch.device("cpu"))
    randomised(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def conditioning(references: int = 0, **without: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(11)
    extra = {"pooled_output": torch.randn(1, FLUX["vec_in_dim"], generator=generator), "guidance": 2.5}
    if references:
        extra["reference_latents"] = [torch.randn(1, 16, 6 + 2 * i, 4, generator=generator) for i in range(references)]
    context = torch.randn(1, TEXT, FLUX["context_in_dim"], generator=generator)
    return [[context, {k: v for k, v in extra.items() if k not in without}]]


# ---------------------------------------------------------------------------- what is asserted again and again


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4, what: str = "features") -> None:
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)} instead of {list(theirs.shape)}"
    assert ours.isfinite().all() and theirs.std() > 1e-4, f"{what}: constant or not finite"
    worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert worst <= tolerance, f"{what} differ by {worst:.2e} of the largest value, more than {tolerance:g}"


def assert_gradient(encoder: Any, x: Tensor, step: float = 0.02, tolerance: float = 0.02) -> None:
    """Backward agrees with central differences along the gradient and along a random direction."""
    x = x.clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        z = encoder(x)
        weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        (grad,) = torch.autograd.grad((z * weights).sum(), x)
    assert grad.isfinite().all() and grad.abs().max() > 0, "gradient: zero or not finite"
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    for direction in (grad / grad.norm(), (noise + grad / grad.abs().max()) / noise.norm()):
        with torch.no_grad():
            ends = [(encoder(x.detach() + s * step * direction).double() * weights).sum() for s in (1, -1)]
        numeric = ((ends[0] - ends[1]) / (2 * step)).item()
        analytic = (grad.double() * direction).sum().item()
        assert abs(numeric - analytic) <= tolerance * max(abs(numeric), abs(analytic)), (
            f"gradient: {analytic:.6g} along a direction, finite differences say {numeric:.6g}"
        )


def assert_contract(encoder: Any, x: Tensor) -> None:
    """grid() is the shape that comes; embed() in small batches is the same; the caller's picture is untouched."""
    before = x.clone()
    with torch.no_grad():
        z = encoder(x)
    assert torch.equal(x, before), "the pictures were changed"
    rows_columns = encoder.grid(*x.shape[1:3])
    output = encoder.info.output
    assert z.ndim == {"global": 2, "tokens": 3, "grid": 4}[output] and len(z) == len(x)
    if output == "global":
        assert rows_columns is None
    else:
        assert (
            tuple(z.shape[1:3]) == rows_columns if output == "grid" else z.shape[1] == rows_columns[0] * rows_columns[1]
        )
    with torch.inference_mode():
        assert_close(encoder.embed(x, batch_size=1), z.float(), what="embed in batches of 1")


def refused(call: Callable[[], Any], *words: str) -> None:
    try:
        call()
    except ValueError as error:
        assert all(word in str(error) for word in words), f"{words} not all in: {error}"
    else:
        raise AssertionError(f"no ValueError, expected one that says {words}")


# ---------------------------------------------------------------------------- VAE


def _vae(kind: str, channels: int, inference: bool) -> None:
    with loaded(inference):
        vae = small_vae(channels, kind)
        encoder = MODEL.vae_encoder(vae)
        x = pictures(40, 64)
        theirs = stock_encode(vae, x).clone().movedim(1, -1)
    with torch.no_grad():
        assert_close(encoder(x), theirs, 1e-6)
    assert encoder.grid(40, 64) == (5, 8) and encoder.info.output == "grid"
    assert_contract(encoder, x)
    assert_gradient(encoder, x)
    with loaded(inference):
        resized = stock_encode(vae, encoder_resize(x, 48)).movedim(1, -1).clone()
        assert_close(MODEL.vae_encoder(vae, 48)(x), resized, 1e-5)
        again, other = MODEL.vae_encoder(small_vae(channels, kind)), MODEL.vae_encoder(vae, 48)
        assert again.info == encoder.info and other.info.fingerprint != encoder.info.fingerprint
        again = stock_encode(vae, x).movedim(1, -1)
        assert_close(again, theirs, 1e-6, "ComfyUI's own encode after a backward pass")


def encoder_resize(x: Tensor, side: int) -> Tensor:
    scaled = torch.nn.functional.interpolate(x.movedim(-1, 1), (side, side), mode="bicubic", antialias=True)
    return scaled.clamp(0, 1).movedim(1, -1)


for _kind, _channels in (("taesd", 16), ("taesd", 4), ("kl", 4), ("wan", 16)):
    for _inference in (False, True):
        _name = f"vae_{_kind}{_channels}{'_loaded_in_inference_mode' if _inference else ''}"
        CHECKS[_name] = lambda k=_kind, c=_channels, i=_inference: _vae(k, c, i)


@check
def check_vae_refusals() -> None:
    import comfy.sd

    vae = small_vae(4)
    refused(lambda: MODEL.vae_encoder(vae, 50), "image_size", "multiples of 8", "50")
    refused(lambda: MODEL.vae_encoder(vae)(pictures(7, 64)), "at least 8×8", "7×64")
    refused(lambda: MODEL.vae_encoder(comfy.sd.VAE(sd={})), "vae", "no weights")
    vae.latent_dim = 3
    refused(lambda: MODEL.vae_encoder(vae), "vae", "3 latent dimensions")
    films = small_vae(16, "wan")
    films.output_channels = 4  # Qwen-Image-Layered's
    refused(lambda: MODEL.vae_encoder(films), "vae", "3 colours", "4 channels")


# ---------------------------------------------------------------------------- the decoder of a VAE


def _vae_decoder(kind: str, channels: int, inference: bool) -> None:
    """Against hooks on ComfyUI's own decode; nothing behind the deepest features runs."""
    with loaded(inference):
        vae = small_vae(channels, kind)
        encoder = MODEL.ManagedVAEDecoder(vae, (1, 2))
        x = pictures(40, 64)
    net = vae.first_stage_model
    if kind == "taesd":
        ends, after = (net.taesd_decoder[7], net.taesd_decoder[12]), net.taesd_decoder[13]
    else:
        ends, after = (net.decoder.up[3].upsample, net.decoder.up[2].upsample), net.decoder.up[1].block[0]
    seen, ran = [], []
    hooks = [module.register_forward_hook(lambda _m, _a, out: seen.append(out.clone())) for module in ends]
    with loaded(inference):
        z = vae.encode(x)
        vae.decode(z)
        wanted, z = [v.clone() for v in seen], z.clone()
    for hook in hooks:
        hook.remove()
    after.register_forward_hook(lambda _m, _a, _out: ran.append(1))
    with torch.no_grad():
        for ours, theirs in zip(encoder.features(z), wanted, strict=True):
            assert_close(ours, theirs, 1e-5)
        assert_close(encoder.from_latents(z), encoder(x).clone(), 1e-3, "features of latents and of their pictures")
    assert encoder.grid(40, 64) == (10, 16) and encoder.reads_latents(MODEL.vae_encoder(vae).latent_space, 40, 64)
    assert_contract(encoder, x)
    assert_gradient(encoder, x)
    assert_gradient(encoder.from_latents, z)
    assert not ran, "the decoder went on to pixels"
    assert encoder.patchers == (vae.patcher,)
    again, other = MODEL.ManagedVAEDecoder(small_vae(channels, kind), (1, 2)), MODEL.ManagedVAEDecoder(vae, (2,))
    assert again.info == encoder.info and other.info.fingerprint != encoder.info.fingerprint
    assert other.grid(40, 64) == (20, 32) and encoder.info.name.endswith("ch/1+2/grid"), encoder.info.name
    refused(lambda: MODEL.ManagedVAEDecoder(vae, (1, 5)), "depths", "1 to 4", "5")


for _kind, _channels, _inference in (("taesd", 16, True), ("kl", 4, False)):
    _name = f"vae_decoder_{_kind}{_channels}{'_loaded_in_inference_mode' if _inference else ''}"
    CHECKS[_name] = lambda k=_kind, c=_channels, i=_inference: _vae_decoder(k, c, i)


# ---------------------------------------------------------------------------- CLIP_VISION


def _clip(kind: str, output: str, layer: str, inference: bool) -> None:
    side = CLIPS[kind]["image_size"]
    patches = side // 14
    with loaded(inference):
        clip = small_clip(kind)
        encoder = MODEL.ClipVisionEncoder(clip, output, layer)
        x = pictures(side, side)
        theirs = clip.encode_image(x, crop=False)
        tokens = theirs["last_hidden_state" if layer == "last" else "penultimate_hidden_states"][:, -(patches**2) :]
        pooled = theirs["image_embeds"]  # of SigLIP, ComfyUI gives every patch: its pooling head is not loaded
        wanted = (pooled if pooled.ndim == 2 else pooled.mean(1)) if output == "global" else tokens
        wanted = wanted.unflatten(1, (patches, patches)) if output == "grid" else wanted
        with torch.no_grad():
            assert_close(encoder(x), wanted.clone())
        # Other sizes: ComfyUI rounds to 8 bits after its resize, we do not.
        y = pictures(2 * side, 4 * side, batch=1)
        for crop in (False, True):
            whole = clip.encode_image(y, crop=crop)
            ours = MODEL.ClipVisionEncoder(clip, "tokens", crop=crop)(y)
            assert_close(ours, whole["last_hidden_state"][:, -(patches**2) :].clone(), 0.02, f"tokens with crop={crop}")
    assert encoder.grid(100, 50) == (None if output == "global" else (patches, patches))
    assert_contract(encoder, x[:1] if kind == "dinov2" else x)
    assert_gradient(encoder, x[:1])


for _kind, _output, _layer, _inference in (
    ("clip", "global", "last", True),
    ("clip", "grid", "last", False),
    ("clip", "tokens", "penultimate", True),
    ("siglip", "global", "last", True),
    ("siglip", "grid", "penultimate", False),
    ("siglip", "tokens", "last", True),
    ("dinov2", "global", "last", False),
    ("dinov2", "grid", "last", True),
    ("dinov2", "tokens", "penultimate", False),
):
    _name = f"{_kind}_{_output}_{_layer}{'_loaded_in_inference_mode' if _inference else ''}"
    CHECKS[_name] = lambda k=_kind, o=_output, la=_layer, i=_inference: _clip(k, o, la, i)


@check
def check_clip_vision_refusals() -> None:
    clip = small_clip("clip")
    refused(lambda: MODEL.ClipVisionEncoder(clip, "patches"), "output", "global, tokens, grid", "patches")
    refused(lambda: MODEL.ClipVisionEncoder(clip, "grid", "first"), "layer", "last, penultimate", "first")
    refused(lambda: MODEL.ClipVisionEncoder(clip, "global", "penultimate"), "layer", "'last' only")
    names = {
        MODEL.ClipVisionEncoder(clip, o, la, c).info.fingerprint
        for o, la, c in (
            ("grid", "last", False),
            ("grid", "penultimate", False),
            ("grid", "last", True),
            ("tokens", "last", False),
            ("global", "last", False),
        )
    }
    assert len(names) == 5, "fingerprints do not tell outputs, layers and crops apart"


# ---------------------------------------------------------------------------- MODEL


def _block_output(model: Any, cond: list[Any], block: str, x_t: Tensor, t: float) -> Any:
    """What ComfyUI's own sampling code sees: a plain call of the model, with a hook that only looks."""
    import comfy.samplers

    module = model.model.diffusion_model.get_submodule(block)
    seen: list[Any] = []
    hook = module.register_forward_hook(
        lambda _m, _a, out: seen.append(tuple(v.clone() for v in out) if isinstance(out, tuple) else out.clone())
    )
    model.pre_run()
    try:
        converted = comfy.sampler_helpers.convert_cond(cond)
        conds = {"positive": [dict(c) for c in converted]}
        conds = comfy.samplers.process_conds(model.model, x_t, conds, x_t.device)
        comfy.samplers.calc_cond_batch(
            model.model, [conds["positive"]], x_t, torch.full((len(x_t),), t), {"transformer_options": {}}
        )
    finally:
        hook.remove()
    assert len(seen) == 1, f"the block ran {len(seen)} times"
    return seen[0]


def _flux(block: str, references: int, inference: bool, output: str = "grid") -> None:
    t = 0.4
    with loaded(inference):
        model, vae, cond = small_flux(), small_vae(16), conditioning(references)
        encoder = MODEL.diffusion_encoder(model, vae, cond, block, t, seed=7, output=output)
        x = pictures(40, 72)
        latents = model.model.process_latent_in(vae.encode(x))
        noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(7))
        answer = _block_output(model, cond, block, (1 - t) * latents + t * noise, t)
        picture = answer[0] if isinstance(answer, tuple) else answer[:, TEXT:]
        rows, columns = 3, 5  # 40 × 72 pixels are 5 × 9 latents, padded to 3 × 5 patches of 2
        picture = picture[:, : rows * columns].clone()
        assert len(picture) == 2 and (not references or len(picture[0]) == rows * columns)
    wanted = picture.unflatten(1, (rows, columns)) if output == "grid" else picture
    with torch.no_grad():
        assert_close(encoder(x), wanted, 1e-5)
    assert encoder.grid(40, 72) == (rows, columns)
    assert_contract(encoder, x)
    assert_gradient(encoder, x[:1], tolerance=0.03)
    with torch.no_grad():
        assert_close(encoder(x), wanted, 1e-5, "features after a backward pass")
    if references:
        other = MODEL.diffusion_encoder(model, vae, conditioning(0), block, t, seed=7, output=output)
        assert other.info.fingerprint != encoder.info.fingerprint
        with torch.no_grad():
            assert (other(x) - wanted).abs().max() > 1e-3, "the reference latents are not seen"


for _block, _references, _inference in (
    ("double_blocks.0", 0, False),
    ("double_blocks.1", 1, True),
    ("single_blocks.0", 2, False),
    ("single_blocks.1", 0, True),
    ("double_blocks.1", 0, True),
    ("single_blocks.2", 1, True),
):
    _name = (
        f"flux_{_block.replace('.', '_')}_{_references}_references{'_loaded_in_inference_mode' if _inference else ''}"
    )
    CHECKS[_name] = lambda b=_block, r=_references, i=_inference: _flux(b, r, i, "tokens" if r else "grid")


@check
def check_sd3_joint_block() -> None:
    """Its blocks answer (text, picture), Flux's (picture, text)."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD3(
        {
            "image_model": None,
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": 24,
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [],
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 20, "out_features": 128},
            },
        }
    )
    config.unet_config.pop("image_model")
    with loaded(True):
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, device=torch.device("cpu"))
        randomised(base.diffusion_model)
        base.diffusion_model.pos_embed.copy_(torch.randn(base.diffusion_model.pos_embed.shape))
        cpu = torch.device("cpu")
        model = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
        vae, cond, x = small_vae(16), conditioning(), pictures(32, 64)
        encoder = MODEL.diffusion_encoder(model, vae, cond, "joint_blocks.0", 0.3, seed=1)
        latents = base.process_latent_in(vae.encode(x))
        noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(1))
        answer = _block_output(model, cond, "joint_blocks.0", 0.7 * latents + 0.3 * noise, 0.3)
        wanted = answer[1].clone().unflatten(1, (2, 4))
    with torch.no_grad():
        assert_close(encoder(x), wanted, 1e-5)
    assert_gradient(encoder, x[:1], tolerance=0.03)


@check
def check_flux_keeps_its_noise_and_its_names_apart() -> None:
    model, vae, cond = small_flux(), small_vae(16), conditioning()

    def build(block: str = "double_blocks.1", t: float = 0.3, seed: int = 0, output: str = "grid") -> Any:
        return MODEL.diffusion_encoder(model, vae, cond, block, t, seed, output)

    first, x = build(), pictures(32, 32)
    with torch.no_grad():
        assert torch.equal(first(x), build()(x)), "the same settings give other features"
        assert_close(first(x)[1:], first(x[1:]), what="one picture alone")
    others = [build("double_blocks.0"), build(t=0.4), build(seed=1), build(output="tokens")]
    assert len({e.info.fingerprint for e in [first, *others]}) == 5 and first.info == build().info
    assert first.info.name == "diffusion/flux/double_blocks.1/t0.3/grid"


@check
def check_flux_refusals() -> None:
    import comfy.model_patcher
    import comfy.model_sampling

    model, vae, cond, x = small_flux(), small_vae(16), conditioning(), pictures(32, 32)
    refused(
        lambda: MODEL.diffusion_encoder(model, vae, cond, "double_blocks.9", 0.3, 0),
        "block",
        "double_blocks.9",
        "double_blocks.0",
        "single_blocks.2",
    )
    refused(lambda: MODEL.diffusion_encoder(model, vae, cond, "", 0.3, 0), "block", "try one of")
    refused(lambda: MODEL.diffusion_encoder(model, vae, [], "double_blocks.0", 0.3, 0), "conditioning", "got none")
    refused(lambda: MODEL.diffusion_encoder(model, vae, cond, "double_blocks.0", 1.0, 0), "above 0 and below 1", "1.0")
    refused(
        lambda: MODEL.diffusion_encoder(model, small_vae(4), cond, "double_blocks.0", 0.3, 0), "vae", "16", "4 channels"
    )
    pooled_missing = MODEL.diffusion_encoder(model, vae, conditioning(pooled_output=True), "double_blocks.0", 0.3, 0)
    refused(lambda: pooled_missing(x), "conditioning", "pooled_output")
    foreign = [[torch.randn(1, TEXT, 99), cond[0][1]]]
    refused(lambda: MODEL.diffusion_encoder(model, vae, foreign, "double_blocks.0", 0.3, 0)(x), "conditioning", "Flux")
    refused(lambda: MODEL.diffusion_encoder(model, vae, cond, "double_blocks.0.img_mlp", 0.3, 0), "block", "try one of")
    # A block that no call runs: its encoder says so, and no hook stays behind.
    model.model.diffusion_model.spare = torch.nn.ModuleList([torch.nn.Identity()])
    refused(lambda: MODEL.diffusion_encoder(model, vae, cond, "spare.0", 0.3, 0)(x), "block", "without running it")
    assert not any(m._forward_hooks for m in model.model.diffusion_model.modules())
    model.model.model_sampling = comfy.model_sampling.ModelSamplingDiscrete()
    refused(
        lambda: MODEL.diffusion_encoder(model, vae, cond, "double_blocks.0", 0.3, 0),
        "model",
        "flow-matching",
        "ModelSamplingDiscrete",
    )


# ---------------------------------------------------------------------------- thaw


@check
def check_thaw_keeps_values_names_and_dtypes() -> None:
    with torch.inference_mode():
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    GRADIENTS.thaw(module)
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert not any(v.is_inference() for v in [*module.parameters(), *module.buffers()])
    assert not any(p.requires_grad for p in module.parameters())
    kept = list(module.parameters())
    GRADIENTS.thaw(module)
    assert all(a is b for a, b in zip(kept, module.parameters())), "ordinary weights were copied"


def main() -> None:
    global GRADIENTS, MODEL, SCRATCH
    pack, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    MODEL = import_pack(pack)
    GRADIENTS = importlib.import_module(MODEL.__name__.replace("comfy.encoders", "comfy.gradients"))
    run_checks(CHECKS)


if __name__ == "__main__":
    main()
