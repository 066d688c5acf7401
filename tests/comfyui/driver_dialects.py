"""One small Flux in ComfyUI's class and in diffusers', with the same weights; test_dialects.py starts it and reads the result.

    cd ComfyUI && python …/driver_dialects.py PACK_FOLDER SCRATCH_FOLDER

The weights go from one to the other by ComfyUI's own table of names (``flux_to_diffusers``), not by the pack's; LoRA files
are loaded by ComfyUI's loader and by ``FluxKontextPipeline``'s.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from driver_model_encoders import FLUX, TEXT, assert_close, flux_config, import_pack, randomised, run_checks
from torch import Tensor

CPU = torch.device("cpu")
SCRATCH = Path()
MLP_RATIO = 4.0  # diffusers knows no other
LAYERS = ("attention", "attention + MLP", "all")


def networks() -> SimpleNamespace:
    """The same network twice: ``comfyui``, a ModelPatcher, and ``diffusers``, a FluxTransformer2DModel."""
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils
    from diffusers import FluxTransformer2DModel

    config = comfy.supported_models.Flux(flux_config(mlp_ratio=MLP_RATIO))
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device=CPU)
    weights = randomised(base.diffusion_model, scale=0.2).state_dict()
    net = FluxTransformer2DModel(
        in_channels=4 * FLUX["in_channels"], num_layers=FLUX["depth"], num_single_layers=FLUX["depth_single_blocks"],
        attention_head_dim=sum(FLUX["axes_dim"]), num_attention_heads=FLUX["num_heads"],
        joint_attention_dim=FLUX["context_in_dim"], pooled_projection_dim=FLUX["vec_in_dim"], guidance_embeds=True,
        axes_dims_rope=FLUX["axes_dim"],
    )  # fmt: skip
    state, there = {}, net.state_dict()
    for theirs, ours in comfy.utils.flux_to_diffusers(FLUX).items():
        name, rows, change = (*ours, None)[:3] if isinstance(ours, tuple) else (ours, None, None)
        if name in weights and theirs in there:  # the table has other models' layers too
            state[theirs] = weights[name].narrow(*rows) if rows else change(weights[name]) if change else weights[name]
    net.load_state_dict({k: v.clone() for k, v in state.items()})
    return SimpleNamespace(
        comfyui=comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU), diffusers=net
    )


def inputs() -> tuple[list[Any], list[Any]]:
    """(for ComfyUI's denoiser, for diffusers'): two samples with captions of their own."""
    g = torch.Generator().manual_seed(7)
    x, reference = torch.randn(2, 2, 16, 6, 10, generator=g)
    context, pooled = torch.randn(2, TEXT, FLUX["context_in_dim"], generator=g), torch.randn(2, 24, generator=g)
    conditioning = [[[context[i : i + 1], {"pooled_output": pooled[i : i + 1]}]] for i in range(2)]
    captions = [PACK.kontext.Caption(context[i], pooled[i]) for i in range(2)]
    shared = [x, torch.tensor([0.3, 0.9]), [reference]]
    return [*shared, conditioning], [*shared, captions]


@torch.no_grad()
def in_comfyui(patcher: Any) -> Tensor:
    denoiser = PACK.denoiser.ComfyDenoiser(patcher, guidance=2.5)
    denoiser.load()
    return denoiser(*inputs()[0])


@torch.no_grad()
def in_diffusers(net: Any) -> Tensor:
    return PACK.diffusers.DiffusersDenoiser(PACK.kontext.KONTEXT, net, guidance=2.5, checkpointing=False)(*inputs()[1])


def pipeline(net: Any) -> Any:
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(None, None, None, None, None, None, net)


def trained(module: torch.nn.Module, layers: str) -> Any:
    """alpha is not the rank, so that a loader which overlooks it is found out."""
    lora = PACK.lora.LoRA(module, PACK.lora.LoRASettings(3, 5.0, layers=layers))
    with torch.no_grad():
        for i, layer in enumerate(lora.layers):
            layer.up.copy_(0.2 * torch.randn(layer.up.shape, generator=torch.Generator().manual_seed(i)))
    return lora


def check_velocity_is_the_same() -> None:
    nets = networks()
    assert_close(in_diffusers(nets.diffusers), in_comfyui(nets.comfyui), 1e-5, "velocity")


def _files(home: str, layers: str) -> None:
    """Trained in one home, both files give its output in both."""
    import comfy.sd
    import comfy.utils

    nets = networks()
    base = in_comfyui(nets.comfyui)
    module = nets.comfyui.model.diffusion_model if home == "comfyui" else nets.diffusers
    lora = trained(module, layers).attach()
    ours = in_comfyui(nets.comfyui) if home == "comfyui" else in_diffusers(nets.diffusers)
    lora.detach()
    assert (ours - base).abs().max() > 0.1 * base.abs().max(), "the LoRA does nothing"
    for_comfyui, for_diffusers = PACK.dialects.save_both(lora, SCRATCH / "edit.safetensors", {}, torch.float32)
    again = SCRATCH / "again.safetensors"
    PACK.convert.convert_lora(for_diffusers, again, overwrite=True)
    for file in (for_comfyui, again):
        state = comfy.utils.load_torch_file(str(file))
        assert all(name.startswith("diffusion_model.") for name in state)
        patched, _ = comfy.sd.load_lora_for_models(nets.comfyui, None, state, 1.0, 0.0)
        assert_close(in_comfyui(patched), ours, 1e-5, "output with the file in ComfyUI")
    whole = pipeline(nets.diffusers)
    whole.load_lora_weights(for_diffusers.parent, weight_name=for_diffusers.name)
    assert_close(in_diffusers(whole.transformer), ours, 1e-5, "output with the file in diffusers")
    whole.unload_lora_weights()


CHECKS: dict[str, Callable[[], None]] = {"velocity_is_the_same": check_velocity_is_the_same}
for _home in ("comfyui", "diffusers"):
    for _layers in LAYERS:
        _name = f"files_of_{_layers.replace(' + ', '_and_')}_trained_in_{_home}"
        CHECKS[_name] = lambda home=_home, layers=_layers: _files(home, layers)


def main() -> None:
    global PACK, SCRATCH
    pack, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    name = import_pack(pack).__name__.removesuffix(".nodes.comfy.encoders")
    core = f"{name}.editloss_core"
    PACK = SimpleNamespace(
        denoiser=importlib.import_module(f"{name}.nodes.comfy.denoiser"),
        lora=importlib.import_module(f"{core}.lora.lora"),
        dialects=importlib.import_module(f"{core}.lora.keys"),
        convert=importlib.import_module(f"{core}.training.convert_lora"),
        kontext=importlib.import_module(f"{core}.models.kontext"),
        diffusers=importlib.import_module(f"{core}.models.denoiser"),
    )
    run_checks(CHECKS)


if __name__ == "__main__":
    main()
