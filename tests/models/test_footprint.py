"""The arithmetic of a run against what is really allocated, on the tiny Kontext; and FLUX.1's well-known numbers."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch
from small_kontext import TRANSFORMER, transformer

from editloss_core.lora.lora import LoRA, LoRASettings, adapted_sizes
from editloss_core.models.denoiser import DiffusersDenoiser
from editloss_core.models.folder import empty_network
from editloss_core.models.footprint import Footprint
from editloss_core.models.kontext import KONTEXT, Caption
from editloss_core.training.settings import TrainingSettings


def footprint(net, settings):
    return Footprint.of(KONTEXT, net, adapted_sizes(net, settings.layers, KONTEXT), settings.rank)


@pytest.mark.parametrize("layers", ["attention", "attention + MLP", "all"])
def test_counts_are_those_of_the_network_and_its_lora(layers):
    net, settings = transformer(), LoRASettings(3, 3.0, layers=layers)
    lora = LoRA(net, settings)
    found = footprint(empty_network(KONTEXT, TRANSFORMER), settings)
    assert found == footprint(net, settings)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.trainable == sum(p.numel() for p in lora.parameters()) and found.layers == len(lora.layers)
    assert found.weight_bytes("fp32") == sum(p.nbytes for p in net.parameters())
    assert found.weight_bytes("bf16") * 2 == found.weight_bytes("fp32") and found.weight_bytes(
        "bf16", shards=4
    ) * 4 == found.weight_bytes("bf16")


def test_the_optimizer_takes_what_is_said():
    lora = LoRA(transformer(), LoRASettings(4, 4.0))
    optimizer = TrainingSettings().make_optimizer(lora.parameters())
    for p in lora.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    said = footprint(transformer(), LoRASettings(4, 4.0)).lora_bytes("adamw", ema=True)
    own = sum(p.nbytes for p in lora.parameters())
    assert said == {"LoRA": own, "gradients": own, "optimizer": state, "moving average": own}


def test_checkpointing_keeps_less_by_about_what_is_said():
    """What autograd really keeps of a forward pass, with more blocks than the tiny one has."""
    net = transformer(num_single_layers=8)
    lora = LoRA(net, LoRASettings(2, 2.0)).attach()
    g = torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 1, 4, 32, 32, generator=g)
    caption = Caption(torch.randn(64, 24, generator=g), torch.randn(20, generator=g))
    kept = []
    for checkpointing in (False, True):
        denoiser = DiffusersDenoiser(KONTEXT, net, checkpointing=checkpointing)
        if not checkpointing:
            net.disable_gradient_checkpointing()
        own, saved = {p.data_ptr() for p in net.parameters()}, {}

        def pack(t, own=own, saved=saved):
            if t.data_ptr() not in own:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            v = denoiser(x, torch.tensor([0.5]), [reference], [caption])
        kept.append(sum(saved.values()))
        del v, saved
    lora.detach()
    found, tokens = footprint(net, LoRASettings(2, 2.0)), 64 + 2 * 16 * 16
    said = found.activation_bytes(tokens, 1, "fp32", checkpointing=False)
    assert 0.6 < kept[0] / said < 1.7
    # Of the checkpointed blocks only the inputs are kept; the one that is computed again comes with the backward pass.
    inputs = found.activation_bytes(tokens, 1, "fp32") - 17 * tokens * found.width * 4
    assert 0.9 < kept[1] / inputs < 2.0 and kept[1] < kept[0] / 5


def test_flux_has_the_numbers_that_everyone_knows():
    shape = {"guidance_embeds": True}  # diffusers' defaults are FLUX.1's
    found = footprint(empty_network(KONTEXT, shape), LoRASettings(16, 16.0))
    assert found.parameters == 11_901_408_320 and found.blocks == 57 and found.width == 3072
    assert 23.7e9 < found.weight_bytes() < 23.9e9 and 6.6e9 < found.weight_bytes(quantization="nf4") < 6.8e9
    assert KONTEXT.sample_tokens(1024, 1024) == 512 + 2 * 4096
    assert found.exchanged_bytes(1) == {"gradients of the LoRA": 0}
    eight = found.exchanged_bytes(8, sharded=True)
    assert eight["gradients of the LoRA"] == int(2 * 7 / 8 * 4 * found.trainable)
    assert eight["weights"] == int(2 * 7 / 8 * found.weight_bytes())
    assert found.step_flops(8704, 2) == 2 * found.step_flops(8704, 1) > 1.3 * 2 * found.step_flops(8704, 1, False)
