"""A LoRA of Qwen-Image-Edit, whose layers have the same names in both programs, and of LongCat, which diffusers has no loader for.

What the stock loaders make of it is tested in tests/comfyui/test_dialects.py.
"""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from editloss_core.lora.keys import COMFYUI, DIFFUSERS, Update, from_tensors, save_both, to_tensors
from editloss_core.lora.lora import MODEL_METADATA, LoRA, LoRASettings
from editloss_core.models.longcat import LONGCAT
from editloss_core.models.qwen import BLOCK, OUTSIDE, QWEN_EDIT_PLUS
from editloss_core.training import convert_lora

WIDTH = 6
ATTENTION = [f"transformer_blocks.{i}.{name}" for i in (0, 59) for name in BLOCK if name.startswith("attn.")]
ALL = [*ATTENTION, *(f"transformer_blocks.7.{name}" for name in BLOCK), *OUTSIDE]


def updates(names):
    g = torch.Generator().manual_seed(0)
    return {
        n: Update(torch.randn(3, WIDTH, generator=g), torch.randn(WIDTH, 3, generator=g), 5.0)
        for n in dict.fromkeys(names)
    }


def deltas(found):
    return {name: u.scale * (u.up.double() @ u.down.double()) for name, u in found.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[n], expected[n], atol=1e-5) for n in expected)


@pytest.mark.parametrize("names", [ATTENTION, ALL], ids=["attention", "all"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_the_command_there_and_back_and_no_alpha_for_diffusers(names, prefix, tmp_path, capsys):
    """From ComfyUI's keys or kohya's: there they are no other model's, not even attention's alone."""
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    state = to_tensors(updates(names), COMFYUI)
    if prefix == "lora_unet_":
        parts = {key: key.removeprefix("diffusion_model.").rsplit(".", 1 + ("lora" in key)) for key in state}
        state = {".".join([prefix + n.replace(".", "_"), *end]): state[key] for key, (n, *end) in parts.items()}
    save_file(state, a, metadata={"note": "kept"})
    assert convert_lora.main([str(a), str(b)]) == 0 and "in the keys of diffusers" in capsys.readouterr().out
    made = load_file(b)
    assert set(made) == {f"transformer.{n}.lora_{x}.weight" for n in updates(names) for x in "AB"}
    told = [] if names is ALL else ["--model", "qwen_image_edit_plus"]
    assert convert_lora.main([str(b), str(c), *told]) == 0
    dialect, found = from_tensors(load_file(c))
    assert dialect == COMFYUI and same(deltas(found), deltas(updates(names)))
    with safe_open(c, "pt") as file:
        assert file.metadata() == {"note": "kept"}


def test_attention_in_diffusers_names_may_be_flux_s_and_is_not_guessed(tmp_path, capsys):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(to_tensors(updates(ATTENTION), DIFFUSERS), a)
    assert convert_lora.main([str(a), str(b)]) == 2 and not b.exists()
    said = capsys.readouterr().err
    assert "flux_kontext" in said and "qwen_image_edit_plus" in said
    save_file(to_tensors(updates(ATTENTION), DIFFUSERS), a, metadata={MODEL_METADATA: "qwen_image_edit"})
    assert convert_lora.main([str(a), str(b)]) == 0  # as ours say it
    assert set(from_tensors(load_file(b))[1]) == set(ATTENTION)


def network(model, *layers):
    """Nested modules with linear layers of these names."""
    whole = nn.Module()
    for layer in layers:
        *path, last = layer.split(".")
        at = whole
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, nn.Linear(WIDTH, WIDTH))
    return LoRA(whole, LoRASettings(2, 3.0, layers="attention"), model=model)


def test_no_file_has_another_model_s_names(tmp_path):
    """Attention's layers of Qwen are called as FLUX.1's are in diffusers: its own model is asked, not the names."""
    comfyui, diffusers = save_both(network(QWEN_EDIT_PLUS, *ATTENTION), tmp_path / "edit.safetensors")
    for path, dialect in ((comfyui, COMFYUI), (diffusers, DIFFUSERS)):
        found, made = from_tensors(load_file(path))
        assert found == dialect and set(made) == set(ATTENTION)
        with safe_open(path, "pt") as file:
            assert file.metadata()[MODEL_METADATA] == QWEN_EDIT_PLUS.id


def test_longcat_is_written_for_comfyui_alone_and_converted_to_it_alone(tmp_path, capsys):
    theirs = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    (path,) = save_both(network(LONGCAT, *theirs), tmp_path / "edit.safetensors")
    assert list(from_tensors(load_file(path))[1]) == ["double_blocks.0.img_attn.qkv"]
    out = tmp_path / "out.safetensors"
    assert convert_lora.main([str(path), str(out)]) == 2 and not out.exists()
    assert "diffusers has no loader of LoRA files for LongCat-Image-Edit" in capsys.readouterr().err
    save_file(to_tensors(updates(theirs), DIFFUSERS), tmp_path / "peft.safetensors")
    assert convert_lora.main([str(tmp_path / "peft.safetensors"), str(out), "--model", LONGCAT.id]) == 0
    assert list(from_tensors(load_file(out))[1]) == ["double_blocks.0.img_attn.qkv"]
