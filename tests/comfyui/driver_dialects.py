"""Small models in ComfyUI's class and in diffusers', with the same weights; test_dialects.py starts it and reads the result.

    cd ComfyUI && python …/driver_dialects.py PACK_FOLDER SCRATCH_FOLDER

The weights go from one to the other by the programs' own tables of names (ComfyUI's ``flux_to_diffusers``, diffusers' reader of
single files), not by the pack's; LoRA files are loaded by ComfyUI's loader and by that of diffusers' pipeline.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import SkipTest

import torch
from driver_model_encoders import FLUX, TEXT, assert_close, flux_config, import_pack, randomised, refused, run_checks
from tiny import _qwen as qwen
from tiny import longcat_image_edit as longcat
from tiny._flux2 import FLUX2
from tiny._flux2 import build as flux2
from torch import Tensor

CPU = torch.device("cpu")
SCRATCH = Path()
MLP_RATIO = 4.0  # diffusers knows no other
LAYERS = ("attention", "attention + MLP", "all")


class Flux1:
    """FLUX.1 Kontext."""

    id = "flux_kontext"
    channels, size = 16, (6, 10)
    width = FLUX["context_in_dim"]

    def networks(self) -> SimpleNamespace:
        """The same network twice: ``comfyui``, a ModelPatcher, and ``diffusers``, a transformer of diffusers'."""
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
                state[theirs] = (
                    weights[name].narrow(*rows) if rows else change(weights[name]) if change else weights[name]
                )
        net.load_state_dict({k: v.clone() for k, v in state.items()})
        patcher = comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)
        return SimpleNamespace(comfyui=patcher, diffusers=net)

    def captions(self, context: Tensor, g: torch.Generator) -> tuple[list[Any], list[Any]]:
        """(conditioning for ComfyUI, captions for diffusers)."""
        pooled = torch.randn(len(context), FLUX["vec_in_dim"], generator=g)
        conditioning = [[[c[None], {"pooled_output": p[None]}]] for c, p in zip(context, pooled)]
        return conditioning, [PACK.kontext.Caption(c, p) for c, p in zip(context, pooled)]

    def pipeline(self, net: Any) -> Any:
        from diffusers import FluxKontextPipeline

        return FluxKontextPipeline(None, None, None, None, None, None, net)


class Flux2(Flux1):
    """FLUX.2 dev, or klein without guidance. The weights go by diffusers' own reader of the original layout."""

    channels, width = FLUX2["in_channels"], FLUX2["context_in_dim"]

    def __init__(self, identity: str):
        self.id = identity

    def networks(self) -> SimpleNamespace:
        from diffusers import Flux2Transformer2DModel
        from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

        guidance = self.id == "flux2_dev"
        patcher = flux2(guidance)
        randomised(patcher.model.diffusion_model, scale=0.2)
        net = Flux2Transformer2DModel(
            in_channels=self.channels, num_layers=FLUX2["depth"], num_single_layers=FLUX2["depth_single_blocks"],
            attention_head_dim=sum(FLUX2["axes_dim"]), num_attention_heads=FLUX2["num_heads"],
            joint_attention_dim=self.width, axes_dims_rope=FLUX2["axes_dim"], guidance_embeds=guidance,
        )  # fmt: skip
        weights = {name: value.clone() for name, value in patcher.model.diffusion_model.state_dict().items()}
        net.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(weights))
        return SimpleNamespace(comfyui=patcher, diffusers=net)

    def captions(self, context: Tensor, g: torch.Generator) -> tuple[list[Any], list[Any]]:
        padded = torch.nn.functional.pad(context, (0, 0, 512 - context.shape[1], 0))  # as ComfyUI does it
        return [[[c[None], {"pooled_output": None}]] for c in context], [PACK.flux2.Caption(c) for c in padded]

    def pipeline(self, net: Any) -> Any:
        import diffusers

        known = PACK.registry.of_id(self.id)
        return getattr(diffusers, known.parts.pipeline)(None, None, None, None, net)


class Qwen(Flux1):
    """Qwen-Image-Edit 2509, whose network the first has too, or 2511, whose reference is at t = 0."""

    width = qwen.WIDTH
    size = (8, 12)  # of an odd number of tokens, diffusers has the middle one token further from the words than ComfyUI

    def __init__(self, identity: str):
        self.id = identity

    def networks(self) -> SimpleNamespace:
        from diffusers import QwenImageTransformer2DModel

        tiny = importlib.import_module(f"tiny.{self.id}")
        patcher = tiny.build()
        sizes = {key: value for key, value in qwen.NETWORK.items() if key != "image_model"}
        net = QwenImageTransformer2DModel(**sizes, zero_cond_t=self.id == "qwen_image_edit_2511")
        weights = randomised(patcher.model.diffusion_model, scale=0.2).state_dict()
        net.load_state_dict({k: v.clone() for k, v in weights.items() if not k.startswith("__")})
        return SimpleNamespace(comfyui=patcher, diffusers=net)

    def captions(self, context: Tensor, g: torch.Generator) -> tuple[list[Any], list[Any]]:
        lengths = (TEXT, TEXT - 2)  # pictures of two sizes make captions of two lengths
        mine = [c[:n] for c, n in zip(context, lengths)]
        return [[[c[None], {"pooled_output": None}]] for c in mine], [PACK.qwen.Caption(c) for c in mine]

    def pipeline(self, net: Any) -> Any:
        import diffusers

        known = PACK.registry.of_id(self.id)
        return getattr(diffusers, known.parts.pipeline)(None, None, None, None, None, net)


class LongCat(Qwen):
    """LongCat-Image-Edit: FLUX.1's names but for those of its time."""

    def __init__(self) -> None:
        super().__init__("longcat_image_edit")

    def networks(self) -> SimpleNamespace:
        import comfy.model_base
        import comfy.utils
        from diffusers import LongCatImageTransformer2DModel

        if not hasattr(comfy.model_base, "LongCatImage"):
            raise SkipTest(f"this ComfyUI has no LongCatImage, which came with {longcat.SINCE}")
        patcher = longcat.build(mlp_ratio=MLP_RATIO)
        config = patcher.model.model_config.unet_config
        weights = randomised(patcher.model.diffusion_model, scale=0.2).state_dict()
        net = LongCatImageTransformer2DModel(
            in_channels=4 * config["in_channels"], num_layers=config["depth"],
            num_single_layers=config["depth_single_blocks"], attention_head_dim=sum(config["axes_dim"]),
            num_attention_heads=config["num_heads"], joint_attention_dim=config["context_in_dim"],
            axes_dims_rope=config["axes_dim"],
        )  # fmt: skip
        state, there = {}, net.state_dict()
        for theirs, ours in comfy.utils.flux_to_diffusers(config).items():
            theirs = theirs.replace("time_text_embed.", "time_embed.")
            name, rows, change = (*ours, None)[:3] if isinstance(ours, tuple) else (ours, None, None)
            if name in weights and theirs in there:
                state[theirs] = (
                    weights[name].narrow(*rows) if rows else change(weights[name]) if change else weights[name]
                )
        net.load_state_dict({k: v.clone() for k, v in state.items()})
        return SimpleNamespace(comfyui=patcher, diffusers=net)


MODELS = (
    Flux1(), Flux2("flux2_dev"), Flux2("flux2_klein_base"), Qwen("qwen_image_edit_plus"), Qwen("qwen_image_edit_2511"),
    LongCat(),
)  # fmt: skip


def inputs(model: Flux1) -> tuple[list[Any], list[Any]]:
    """(for ComfyUI's denoiser, for diffusers'): two samples with captions of their own."""
    g = torch.Generator().manual_seed(7)
    x, reference = torch.randn(2, 2, model.channels, *model.size, generator=g)
    conditioning, captions = model.captions(torch.randn(2, TEXT, model.width, generator=g), g)
    shared = [x, torch.tensor([0.3, 0.9]), [reference]]
    return [*shared, conditioning], [*shared, captions]


@torch.no_grad()
def in_comfyui(model: Flux1, patcher: Any) -> Tensor:
    denoiser = PACK.denoiser.ComfyDenoiser(patcher, guidance=2.5)
    denoiser.load()
    return denoiser(*inputs(model)[0])


@torch.no_grad()
def in_diffusers(model: Flux1, net: Any) -> Tensor:
    known = PACK.registry.of_id(model.id)
    return PACK.diffusers.DiffusersDenoiser(known, net, guidance=2.5, checkpointing=False)(*inputs(model)[1])


def trained(model: Flux1, module: torch.nn.Module, layers: str) -> Any:
    """alpha is not the rank, so that a loader which overlooks it is found out."""
    lora = PACK.lora.LoRA(module, PACK.lora.LoRASettings(3, 5.0, layers=layers), model=PACK.registry.of_id(model.id))
    with torch.no_grad():
        for i, layer in enumerate(lora.layers):
            layer.up.copy_(0.2 * torch.randn(layer.up.shape, generator=torch.Generator().manual_seed(i)))
    return lora


def _velocity_is_the_same(model: Flux1) -> None:
    nets = model.networks()
    assert_close(in_diffusers(model, nets.diffusers), in_comfyui(model, nets.comfyui), 1e-5, "velocity")


def _files(model: Flux1, home: str, layers: str) -> None:
    """Trained in one home, both files give its output in both."""
    import comfy.sd
    import comfy.utils

    nets = model.networks()
    base = in_comfyui(model, nets.comfyui)
    module = nets.comfyui.model.diffusion_model if home == "comfyui" else nets.diffusers
    lora = trained(model, module, layers).attach()
    ours = in_comfyui(model, nets.comfyui) if home == "comfyui" else in_diffusers(model, nets.diffusers)
    lora.detach()
    assert (ours - base).abs().max() > 0.1 * base.abs().max(), "the LoRA does nothing"
    paths = PACK.dialects.save_both(lora, SCRATCH / "edit.safetensors", {}, torch.float32)
    for_comfyui, again = paths[0], SCRATCH / "again.safetensors"
    known = PACK.registry.of_id(model.id)
    if known.diffusers_loads_lora:
        PACK.convert.convert_lora(paths[1], again, overwrite=True)
    else:
        assert len(paths) == 1
        refused(lambda: PACK.convert.convert_lora(for_comfyui, again, overwrite=True), "no loader", known.title)
    for file in (for_comfyui, again) if known.diffusers_loads_lora else (for_comfyui,):
        state = comfy.utils.load_torch_file(str(file))
        assert all(name.startswith("diffusion_model.") for name in state)
        patched, _ = comfy.sd.load_lora_for_models(nets.comfyui, None, state, 1.0, 0.0)
        assert_close(in_comfyui(model, patched), ours, 1e-5, "output with the file in ComfyUI")
    if not known.diffusers_loads_lora:
        return
    (for_diffusers,) = paths[1:]
    whole = model.pipeline(nets.diffusers)
    whole.load_lora_weights(for_diffusers.parent, weight_name=for_diffusers.name)
    assert_close(in_diffusers(model, whole.transformer), ours, 1e-5, "output with the file in diffusers")
    whole.unload_lora_weights()


CHECKS: dict[str, Callable[[], None]] = {}
for _model in MODELS:
    CHECKS[f"{_model.id}: velocity_is_the_same"] = lambda model=_model: _velocity_is_the_same(model)
    for _home in ("comfyui", "diffusers"):
        for _layers in LAYERS:
            _name = f"{_model.id}: files_of_{_layers.replace(' + ', '_and_')}_trained_in_{_home}"
            CHECKS[_name] = lambda model=_model, home=_home, layers=_layers: _files(model, home, layers)


def main() -> None:
    global PACK, SCRATCH
    pack, SCRATCH, only = Path(sys.argv[1]), Path(sys.argv[2]), "".join(sys.argv[3:4])
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
        flux2=importlib.import_module(f"{core}.models.flux2"),
        qwen=importlib.import_module(f"{core}.models.qwen"),
        registry=importlib.import_module(f"{core}.models.registry"),
        diffusers=importlib.import_module(f"{core}.models.denoiser"),
    )
    run_checks(CHECKS, only)


if __name__ == "__main__":
    main()
