"""OmniGen2 beside ComfyUI: its guidance, its noise levels and its files. Its network is asked in tests/comfyui/test_models.py."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from editloss_core.models.base import Preview
from editloss_core.models.omnigen2 import OMNIGEN2
from editloss_core.training.convert_lora import convert_lora


class Three:
    """v = 3·x for the caption, 2·x for the negative, x for the negative without a picture."""

    def told(self, guidance):
        return self

    def __call__(self, x, t, references, conditioning):
        return {"caption": 3 * x, "negative": 2 * x if references else x}[conditioning[0]]


def test_it_is_guided_away_from_the_negative_and_from_no_picture():
    noise = torch.ones(1, 4, 4, 4)
    made = OMNIGEN2.sample(Three(), noise, [noise], ["caption"], 1, Preview(None, 5.0, ["negative"]))
    v = 1 + 2.0 * (2 - 1) + 5.0 * (3 - 2)
    assert torch.equal(made, noise - v * noise)


def test_noise_levels_are_those_of_a_constant_shift():
    times = OMNIGEN2.times(4096, 4)
    even = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    assert torch.allclose(times, 2.6 * even / (1 + 1.6 * even)) and torch.equal(times, OMNIGEN2.times(256, 4))


def test_its_lora_stays_in_comfyui(tmp_path):
    layer = "diffusion_model.layers.0.attn.to_q"
    state = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    save_file(state, tmp_path / "comfyui.safetensors")
    with pytest.raises(ValueError, match="diffusers has no loader of LoRA files for OmniGen2"):
        convert_lora(tmp_path / "comfyui.safetensors", tmp_path / "diffusers.safetensors")
    assert not (tmp_path / "diffusers.safetensors").exists()
    # Files of its authors' trainer, with peft's names, become ComfyUI's.
    layer = "transformer.layers.0.attn.to_q"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    save_file(state, tmp_path / "peft.safetensors")
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "for_comfyui.safetensors")
    made = load_file(tmp_path / "for_comfyui.safetensors")
    assert set(made) == {
        f"diffusion_model.layers.0.attn.to_q.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
