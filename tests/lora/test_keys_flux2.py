"""A LoRA of FLUX.2 in both programs' keys: exact both ways, alpha multiplied in for diffusers, never FLUX.1's names.

What the stock loaders make of it is tested in tests/comfyui/test_dialects.py.
"""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editloss_core.lora.keys import COMFYUI, DIFFUSERS, Update, from_tensors, fuse, split, to_tensors
from editloss_core.models.flux2 import FLUX2_DEV
from editloss_core.training import convert_lora

WIDTH, NAMES = 6, FLUX2_DEV.names
# ComfyUI's layer → (outputs, inputs) in a FLUX.2 of this width.
SIZES = {
    **{f"double_blocks.3.{s}_attn.qkv": (3 * WIDTH, WIDTH) for s in ("img", "txt")},
    **{f"double_blocks.3.{s}_attn.proj": (WIDTH, WIDTH) for s in ("img", "txt")},
    **{f"double_blocks.3.{s}_mlp.0": (6 * WIDTH, WIDTH) for s in ("img", "txt")},
    **{f"double_blocks.3.{s}_mlp.2": (WIDTH, 3 * WIDTH) for s in ("img", "txt")},
    "single_blocks.12.linear1": (9 * WIDTH, WIDTH), "single_blocks.12.linear2": (WIDTH, 4 * WIDTH),
    "img_in": (WIDTH, 8), "txt_in": (WIDTH, 9), "time_in.in_layer": (WIDTH, 7), "time_in.out_layer": (WIDTH, WIDTH),
    "guidance_in.in_layer": (WIDTH, 7), "guidance_in.out_layer": (WIDTH, WIDTH),
    "double_stream_modulation_img.lin": (6 * WIDTH, WIDTH), "double_stream_modulation_txt.lin": (6 * WIDTH, WIDTH),
    "single_stream_modulation.lin": (3 * WIDTH, WIDTH), "final_layer.linear": (8, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}  # fmt: skip
PRESETS = {
    "attention": [name for name in SIZES if "attn" in name or "linear" in name and "blocks" in name],
    "attention + MLP": [name for name in SIZES if "blocks" in name],
    "all": list(SIZES),
}


def update(outputs, inputs, rank=3, alpha=5.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Update(torch.randn(rank, inputs, generator=g), torch.randn(outputs, rank, generator=g), alpha)


def updates(preset="all"):
    return {name: update(*SIZES[name], seed=i) for i, name in enumerate(PRESETS[preset])}


def deltas(found):
    return {name: u.scale * (u.up.double() @ u.down.double()) for name, u in found.items()}


def test_every_layer_has_a_name_in_both_and_goes_both_ways():
    inside = {f"{ours}.{n}.{layer}" for (ours, _, layers), n in zip(NAMES.blocks, (3, 12)) for layer in layers}
    assert inside | set(NAMES.outside) == set(SIZES)
    found = split(updates(), NAMES)
    assert len(found) == len(SIZES) + 4  # queries, keys and values of two streams
    first, again = updates(), fuse(found, NAMES)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n].up, again[n].up) and torch.equal(first[n].down, again[n].down) for n in first)
    swapped = "final_layer.adaLN_modulation.1"
    assert torch.equal(found["norm_out.linear"].up, first[swapped].up.roll(WIDTH, 0))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_there_and_back_and_no_alpha_for_diffusers(preset, tmp_path, capsys):
    """With attention alone, single blocks' sizes tell FLUX.2 from FLUX.1."""
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    save_file(to_tensors(updates(preset), COMFYUI), a, metadata={"note": "kept"})
    assert convert_lora.main([str(a), str(b)]) == 0 and "in the keys of diffusers" in capsys.readouterr().out
    state = load_file(b)
    assert all(key.startswith("transformer.") and "lora" in key for key in state), "its loader takes nothing else"
    assert not any("proj_mlp.lora" in key or "proj_out" in key and "blocks" in key for key in state), (
        "a name of FLUX.1's"
    )
    assert convert_lora.main([str(b), str(c)]) == 0
    expected, found = deltas(updates(preset)), deltas(from_tensors(load_file(c))[1])
    assert expected.keys() == found.keys() and all(torch.allclose(found[n], expected[n], atol=1e-5) for n in expected)
    with safe_open(c, "pt") as file:
        assert file.metadata() == {"note": "kept"}


def test_where_nothing_tells_the_model_it_has_to_be_told(tmp_path, capsys):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    layer = "double_blocks.3.img_attn.qkv"
    save_file(to_tensors({layer: update(*SIZES[layer])}, COMFYUI), a)
    assert convert_lora.main([str(a), str(b)]) == 2
    said = capsys.readouterr().err
    assert (
        f"{layer!r} and all the others are ComfyUI's names of layers of FLUX.1 Kontext" in said and "flux2_dev" in said
    )
    assert not b.exists()
    counts = {}
    for model in ("flux_kontext", "flux2_klein"):
        assert convert_lora.main([str(a), str(b), "--overwrite", "--model", model]) == 0
        counts[model] = sum(key.endswith(".alpha") for key in load_file(b))
    assert counts == {"flux_kontext": 3, "flux2_klein": 0}
    save_file(load_file(a), tmp_path / "told.safetensors", metadata={"editloss_edit_model": "flux2_dev"})
    assert convert_lora.main([str(tmp_path / "told.safetensors"), str(b), "--overwrite"]) == 0
    assert not any(key.endswith(".alpha") for key in load_file(b))
    assert convert_lora.main([str(a), str(b), "--overwrite", "--model", "sdxl"]) == 2
    assert "got 'sdxl'; the names are flux_kontext" in capsys.readouterr().err


def test_what_cannot_be_carried_over_is_named(tmp_path, capsys):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    odd = {**updates("attention"), "single_blocks.12.modulation.lin": update(3 * WIDTH, WIDTH)}
    for content, expected in (
        (to_tensors({**updates(), **odd}, COMFYUI), "has a layer 'single_blocks.12.modulation.lin' in ComfyUI's"),
        ({"transformer.transformer_blocks.0.attn.to_qkv.lora_A.weight": torch.zeros(2, 6),
          "transformer.transformer_blocks.0.attn.to_qkv.lora_B.weight": torch.zeros(18, 2)}, "has a layer 'transformer_blocks.0.attn.to_qkv' in diffusers'"),
    ):  # fmt: skip
        save_file(content, a)
        assert convert_lora.main([str(a), str(b)]) == 2
        assert expected in capsys.readouterr().err and not b.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_alpha_is_multiplied_in_as_finely_as_the_file_allows(tmp_path, dtype):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    layer = "single_blocks.12.linear2"
    save_file(to_tensors({layer: update(*SIZES[layer])}, COMFYUI, dtype), a)
    convert_lora.convert_lora(a, b)
    (found,) = from_tensors(load_file(b))[1].values()
    before = from_tensors(load_file(a))[1][layer]
    assert found.down.dtype == dtype and found.up.dtype == torch.bfloat16
    assert torch.allclose(found.up.float() * found.scale, before.up.float() * before.scale, rtol=1e-2)


def test_kohyas_names_are_read(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    state = {
        f"lora_unet_{key.removeprefix('diffusion_model.').rsplit('.lora', 1)[0].removesuffix('.alpha').replace('.', '_')}"
        f".{'alpha' if key.endswith('alpha') else 'lora' + key.rsplit('.lora', 1)[1]}": value
        for key, value in to_tensors(updates(), COMFYUI).items()
    }
    save_file(state, a)
    assert convert_lora.convert_lora(a, b) == (DIFFUSERS, len(SIZES) + 4)
    assert "transformer.double_stream_modulation_img.linear.lora_A.weight" in load_file(b)
