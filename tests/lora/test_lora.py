"""LoRA as a bypass: what it computes, on which layers, what stays as it was, and what its files hold and refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from editloss_core.files import read_safetensors, write_safetensors
from editloss_core.lora.lora import LoRA, LoRASettings, select_layers
from editloss_core.models.base import PRESETS
from editloss_core.models.kontext import KONTEXT
from editloss_core.models.registry import titles

ROOT = Path(__file__).resolve().parents[2]


class Part(nn.Module):
    """Named parts without a forward."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def mlp(width=8, hidden=12):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def flux_names():
    """The names of ComfyUI's Flux."""

    def attn():
        return Part(qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), norm=Part(query_norm=nn.RMSNorm(8)))

    def double():
        streams = {f"{s}_attn": attn() for s in ("img", "txt")} | {f"{s}_mlp": mlp() for s in ("img", "txt")}
        return Part(**streams, img_mod=Part(lin=nn.Linear(8, 48)), txt_mod=Part(lin=nn.Linear(8, 48)))

    def single():
        return Part(linear1=nn.Linear(8, 36), linear2=nn.Linear(20, 8), modulation=Part(lin=nn.Linear(8, 24)))

    return type("Flux", (Part,), {})(
        img_in=nn.Linear(8, 8),
        txt_in=nn.Linear(8, 8),
        time_in=Part(in_layer=nn.Linear(8, 8), out_layer=nn.Linear(8, 8)),
        table=nn.Embedding(4, 8),
        double_blocks=nn.ModuleList(double() for _ in range(2)),
        single_blocks=nn.ModuleList(single() for _ in range(2)),
        final_layer=Part(linear=nn.Linear(8, 8), adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(8, 16))),
    )


DIFFUSERS = """
    x_embedder context_embedder time_text_embed.timestep_embedder.linear_1 time_text_embed.text_embedder.linear_1
    transformer_blocks.0.norm1.linear transformer_blocks.0.norm1_context.linear
    transformer_blocks.0.attn.to_q transformer_blocks.0.attn.to_k transformer_blocks.0.attn.to_v
    transformer_blocks.0.attn.to_out.0 transformer_blocks.0.attn.add_q_proj transformer_blocks.0.attn.add_k_proj
    transformer_blocks.0.attn.add_v_proj transformer_blocks.0.attn.to_add_out
    transformer_blocks.0.ff.net.0.proj transformer_blocks.0.ff.net.2
    transformer_blocks.0.ff_context.net.0.proj transformer_blocks.0.ff_context.net.2
    single_transformer_blocks.0.norm.linear single_transformer_blocks.0.proj_mlp single_transformer_blocks.0.proj_out
    single_transformer_blocks.0.attn.to_q single_transformer_blocks.0.attn.to_k single_transformer_blocks.0.attn.to_v
    norm_out.linear proj_out
""".split()


def diffusers_names():
    """Linear layers by the names of diffusers' FluxTransformer2DModel (0.42)."""
    root = type("FluxTransformer2DModel", (Part,), {})()
    for name in DIFFUSERS:
        *path, last = name.split(".")
        place = root
        for step in path:
            if step not in place._modules:
                place.add_module(step, Part())
            place = place._modules[step]
        place.add_module(last, nn.Linear(8, 8))
    return root


class Net(nn.Module):
    """Something that runs: two blocks with an activation, called with positional and keyword arguments."""

    def __init__(self, dtype=torch.float32, width=6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width)) for _ in range(2)
        )
        self.out = nn.Linear(width, 4, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
        self.requires_grad_(False).to(dtype)

    def forward(self, x, recompute=False):
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if recompute else block(x))
        return self.out(input=x)


def trained(module, seed=0, **settings):
    """A LoRA whose bypasses all do something."""
    lora = LoRA(module, LoRASettings(**{"rank": 3, "alpha": 5.0, "layers": "all", **settings}), seed)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in lora.layers:
            layer.up.copy_(torch.randn(layer.up.shape, generator=generator) / 4)
    return lora


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (2, 5, 6)), generator=torch.Generator().manual_seed(3)).to(dtype)


# ------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bypass_equals_the_merged_weight(dtype):
    net = Net(dtype)
    lora = trained(net).attach()
    x = inputs(dtype=dtype)
    found = net(x)
    lora.detach()
    state = lora.tensors()
    merged = Net(torch.float64)
    with torch.no_grad():
        for name in lora.targets:
            down, up, alpha = (
                state[f"diffusion_model.{name}.{k}"].double() for k in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            weight = merged.get_submodule(name).weight
            weight.copy_(net.get_submodule(name).weight.double() + alpha / len(down) * up @ down)
            if merged.get_submodule(name).bias is not None:
                merged.get_submodule(name).bias.copy_(net.get_submodule(name).bias)
    expected = merged(x.double())
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    assert (found.double() - net(x).double()).abs().max() > 0.1


class Odd(nn.Linear):
    """A linear layer whose answer is of another dtype than its input, or not contiguous."""

    dtype, strided = None, False

    def forward(self, x):
        answer = super().forward(x).to(self.dtype or x.dtype)
        return answer.movedim(0, -1).contiguous().movedim(-1, 0) if self.strided else answer


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 5, 6), (0, 6)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    ("dtype", "answer", "autocast"),
    [(torch.float32, None, False), (torch.bfloat16, None, False), (torch.bfloat16, torch.float32, False),
     (torch.float32, torch.bfloat16, False), (torch.float32, None, True), (torch.float32, torch.float32, True)],
)  # fmt: skip
def test_answers_of_any_shape_and_dtype(shape, strided, dtype, answer, autocast):
    layer = Odd(6, 4).to(dtype).requires_grad_(False)
    layer.dtype, layer.strided = answer, strided
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    net = nn.Sequential(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base = net(x)
        lora = trained(net).attach()
        found = net(x)
    (part,) = lora.layers
    down, up = part.down.double(), part.up.double()
    assert found.shape == base.shape and found.dtype == base.dtype
    tolerance = 5e-2 if autocast or torch.bfloat16 in (dtype, base.dtype) else 1e-5
    expected = base.double() + 5 / 3 * x.double() @ down.T @ up.T
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    found.sum().backward()
    rows = x.detach().double().reshape(-1, 6)
    expected = 5 / 3 * up.T @ torch.ones(len(rows), 4, dtype=torch.float64).T @ rows
    torch.testing.assert_close(part.down.grad.double(), expected.detach(), atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_start_changes_nothing(dtype):
    net = Net(dtype)
    before = net(inputs(dtype=dtype))
    lora = LoRA(net, LoRASettings(layers="all")).attach()
    assert torch.equal(net(inputs(dtype=dtype)), before)
    assert all(layer.down.abs().max() > 0 and not layer.up.any() for layer in lora.layers)


def test_gradients_in_float64():
    net, x = Net(torch.float64), inputs(1, 2, 6, dtype=torch.float64).requires_grad_()
    lora = trained(net, dropout=0.0).double().attach()
    names = [n for n, _ in lora.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(Bound(net, lora), dict(zip([f"lora.{n}" for n in names], values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *lora.parameters()), eps=1e-6, atol=1e-6)


class Bound(nn.Module):
    def __init__(self, net, lora):
        super().__init__()
        self.net, self.lora = net, lora

    def forward(self, x):
        return self.net(x)


def test_only_the_lora_learns():
    net = Net()
    lora = trained(net).attach()
    before = [p.clone() for p in net.parameters()]
    net(inputs()).square().mean().backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad.abs().max() > 0 and p.dtype == torch.float32 for p in lora.parameters())
    assert not set(lora.parameters()) & set(net.parameters())
    assert {n.split(".")[0] for n, _ in lora.named_parameters()} == {"layers"}
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_low_precision_activations_leave_parameters_in_float32():
    net = Net(torch.bfloat16)
    lora = trained(net).attach()
    net(inputs(dtype=torch.bfloat16)).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lora.parameters())


def test_checkpointing_gives_the_same_gradients():
    net = Net()
    lora = trained(net, dropout=0.4).attach()
    grads = []
    for recompute in (False, True):
        torch.manual_seed(4)
        loss = net(inputs(), recompute=recompute).square().mean()
        grads.append(torch.autograd.grad(loss, list(lora.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_base_with_inference_weights():
    with torch.inference_mode():
        net = Net()
        lora = trained(net)
    assert not any(p.is_inference() for p in lora.parameters())
    lora.attach()
    x = inputs().requires_grad_()
    with pytest.raises(RuntimeError, match="[Ii]nference tensors"):  # the base itself needs thawing for a gradient of x
        net(x).sum().backward()
    assert net.blocks[0][0](inputs()).sum().backward() is None
    assert lora.layers[0].up.grad.abs().max() > 0


def test_dropout_drops_inputs_in_training_only():
    net = nn.Sequential(nn.Linear(1000, 1, bias=False))
    nn.init.zeros_(net[0].weight)
    lora = LoRA(net, LoRASettings(rank=1, alpha=1.0, dropout=0.25, layers="all")).attach()
    with torch.no_grad():
        lora.layers[0].down.fill_(1.0)
        lora.layers[0].up.fill_(1.0)
    torch.manual_seed(0)
    x = torch.ones(64, 1000)
    y = net(x)
    assert y.mean().item() == pytest.approx(1000, rel=0.01) and y.std() > 5  # √(1000 · 0.25 / 0.75) = 18
    lora.eval()
    assert torch.equal(net(x), torch.full((64, 1), 1000.0))


class Cast(nn.Linear):
    """A weight stored in fp8 and cast for each product, as ComfyUI does."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Packed(nn.Module):
    """Two int4 numbers to a byte: the weight's shape says nothing about the features."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        packed = torch.randint(0, 256, (outputs * inputs // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        low, high = self.weight.flatten() & 15, self.weight.flatten() >> 4
        return F.linear(x, torch.stack((low, high), 1).reshape(self.out_features, self.in_features).to(x.dtype) / 8 - 1)


class Bare(nn.Module):
    """No features by name: the weight's shape is all there is."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize("kind", [Cast, Packed, Bare])
def test_over_layers_of_any_make(kind):
    net = nn.Sequential(kind(6, 4))
    x = inputs().requires_grad_()
    base = net(x)
    lora = trained(net).attach()
    layer = lora.layers[0]
    torch.testing.assert_close(net(x), base + 5 / 3 * x @ layer.down.T @ layer.up.T)
    net(x).sum().backward()
    assert layer.up.grad.abs().max() > 0 and x.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------ attached or not


def test_attach_and_detach():
    net = Net()
    lora = trained(net)
    plain = net(inputs())
    assert not lora.attached
    assert lora.attach() is lora and lora.attached
    once = net(inputs())
    assert torch.equal(lora.attach() and net(inputs()), once) and not torch.equal(once, plain)
    lora.detach()
    lora.detach()
    assert torch.equal(net(inputs()), plain) and not any(m._forward_hooks for m in net.modules())


def test_disabled_can_be_nested_and_survives_an_exception():
    net = Net()
    lora = trained(net).attach()
    on = net(inputs())
    with lora.disabled():
        with pytest.raises(KeyError), lora.disabled():
            raise KeyError
        off = net(inputs())
    assert torch.equal(net(inputs()), on)
    lora.detach()
    assert torch.equal(net(inputs()), off)


def test_two_loras_add_up():
    net = nn.Sequential(nn.Linear(6, 4))
    x = inputs()
    base = net(x)
    a, b = trained(net, seed=1), trained(net, seed=2)
    deltas = []
    for lora in (a, b):
        lora.attach()
        deltas.append(net(x) - base)
        lora.detach()
    a.attach(), b.attach()
    torch.testing.assert_close(net(x), base + deltas[0] + deltas[1])


# ------------------------------------------------------------------------------------------------ which layers


def test_presets_on_comfyui_names():
    net = flux_names()
    attention = {f"double_blocks.{i}.{s}_attn.{k}" for i in (0, 1) for s in ("img", "txt") for k in ("qkv", "proj")}
    attention |= {f"single_blocks.{i}.linear{k}" for i in (0, 1) for k in (1, 2)}
    both = attention | {f"double_blocks.{i}.{s}_mlp.{k}" for i in (0, 1) for s in ("img", "txt") for k in (0, 2)}
    assert set(select_layers(net, "attention")) == attention
    assert set(select_layers(net, "attention + MLP")) == both == set(LoRA(net).targets)
    everything = select_layers(net, "all")
    assert list(everything) == [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    assert {"img_in", "final_layer.linear", "double_blocks.1.txt_mod.lin"} < set(everything)


def test_presets_on_diffusers_names():
    net = diffusers_names()
    attention = {n for n in DIFFUSERS if ".attn." in n} | {"single_transformer_blocks.0.proj_out"}
    both = attention | {n for n in DIFFUSERS if ".ff" in n} | {"single_transformer_blocks.0.proj_mlp"}
    assert len(attention) == 12 and len(both) == 17
    assert set(select_layers(net, "attention")) == attention
    assert set(select_layers(net, "attention + MLP")) == both
    assert set(select_layers(net, "all")) == set(DIFFUSERS)


def test_patterns():
    net = flux_names()
    assert list(select_layers(net, "double_blocks.*.img_attn.*")) == [
        f"double_blocks.{i}.img_attn.{k}" for i in (0, 1) for k in ("qkv", "proj")
    ]
    assert set(select_layers(net, " img_in , single_blocks.1.linear?")) == {
        "img_in", "single_blocks.1.linear1", "single_blocks.1.linear2"
    }  # fmt: skip
    assert set(select_layers(net, "attention, -double_blocks.*")) == {
        f"single_blocks.{i}.linear{k}" for i in (0, 1) for k in (1, 2)
    }
    assert set(select_layers(net, "-*mod*, all")) == {n for n in select_layers(net, "all") if "mod" not in n}
    assert set(select_layers(net, "all, -attention + MLP")) == set(select_layers(net, "all")) - set(LoRA(net).targets)


def test_layers_that_do_not_fit():
    net = flux_names()
    with pytest.raises(
        ValueError, match=r"layers: no linear layer of Flux matches 'attn'; it has 32, among them img_in, .*final"
    ):
        LoRA(net, LoRASettings(layers="attention, attn"))
    with pytest.raises(ValueError, match="takes out every layer"):
        LoRA(net, LoRASettings(layers="img_in, -img_*"))
    with pytest.raises(ValueError, match="layers: Sequential has no linear layers"):
        LoRA(nn.Sequential(nn.Embedding(4, 4), nn.Conv2d(3, 3, 1)), LoRASettings(layers="all"))
    with pytest.raises(ValueError, match="no linear layer of Net matches 'attention'"):
        LoRA(Net(), LoRASettings(layers="attention"), model=KONTEXT)
    with pytest.raises(ValueError, match=f"layers: what 'attention' is, is known for {titles()} and not for Net"):
        LoRA(Net(), LoRASettings(layers="attention"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank: expected a whole number >= 1, got 0"),
        ({"rank": 4.0}, "rank: expected a whole number >= 1, got 4.0"),
        ({"rank": True}, "rank: .* got True"),
        ({"alpha": 0.0}, "alpha: expected a number > 0, got 0.0"),
        ({"alpha": float("nan")}, "alpha: .* got nan"),
        ({"dropout": -0.1}, "dropout: .* got -0.1"),
        ({"dropout": 1.0}, "dropout: expected a number below 1"),
        ({"layers": ""}, "layers: expected 'attention', .* got ''"),
        ({"layers": "-*mod*"}, "layers: .* got '-\\*mod\\*'; .* 'all, -\\*mod\\*'"),
        ({"layers": None}, "layers: .* got None"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LoRASettings(**settings)


# ------------------------------------------------------------------------------------------------ start


def test_a_seed_gives_the_same_start_whatever_else_is_chosen():
    one, two = (
        LoRA(flux_names(), LoRASettings(layers="all"), 7),
        LoRA(flux_names(), LoRASettings(layers="attention"), 7),
    )
    all_of_them, fewer = one.tensors(), two.tensors()
    assert len(fewer) < len(all_of_them) and all(torch.equal(all_of_them[k], v) for k, v in fewer.items())
    other = LoRA(flux_names(), LoRASettings(layers="attention"), 8).tensors()
    downs = [k for k in fewer if "down" in k]
    assert not any(torch.equal(other[k], fewer[k]) for k in downs)
    same_shape = [fewer[k] for k in downs if fewer[k].shape == (16, 8)]
    assert len({t.sum().item() for t in same_shape}) == len(same_shape), "two layers start alike"


def test_start_is_that_of_a_linear_layer_and_leaves_the_global_random_state():
    net = nn.Sequential(nn.Linear(400, 3))
    state = torch.get_rng_state()
    down = LoRA(net, LoRASettings(rank=64, layers="all")).layers[0].down
    assert torch.equal(torch.get_rng_state(), state)
    assert down.abs().max() <= 1 / 20 and down.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert abs(down.mean()) < 1e-3


# ------------------------------------------------------------------------------------------------ files


def test_tensors_are_copies():
    net = Net()
    lora = trained(net)
    state = lora.tensors(dtype=torch.bfloat16)
    for name, layer in zip(lora.targets, lora.layers):
        down, up, alpha = (
            state.pop(f"diffusion_model.{name}.{k}") for k in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        assert down.dtype == up.dtype == torch.bfloat16 and torch.equal(down, layer.down.bfloat16())
        assert torch.equal(up, layer.up.bfloat16()) and alpha.dtype == torch.float32 and alpha.item() == 5.0
    assert not state
    before = lora.tensors()
    with torch.no_grad():
        for p in lora.parameters():
            p.zero_()
    assert all(v.any() for v in before.values())


def test_round_trip(tmp_path):
    net, file = Net(), tmp_path / "a.safetensors"
    lora = trained(net)
    lora.save(file, {"steps": "12", "objective": 'triplet, "ü"\n'})
    again = LoRA(net, lora.settings, seed=99)
    again.load_tensors(read_safetensors(file))
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), again.parameters()))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["steps"] == "12" and metadata["objective"] == 'triplet, "ü"\n'
    assert LoRASettings(**json.loads(metadata["lora"])) == lora.settings
    lora.save(file, dtype=torch.bfloat16)
    again.load_tensors(load_file(file))
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(lora.parameters(), again.parameters()))
    lora.save(file, prefix="transformer.")
    assert all(name.startswith("transformer.") for name in load_file(file))
    again.load_tensors(load_file(file), prefix="transformer.")
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), again.parameters()))


SAVE = """
import sys, torch
from torch import nn
from editloss_core.lora.lora import LoRA, LoRASettings
net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
LoRA(net, LoRASettings(layers="all"), 3).save(sys.argv[1], {k: k.upper() for k in "abcdefgh"})
"""


@pytest.mark.slow
def test_files_are_the_same_byte_for_byte_in_every_process(tmp_path):
    made = []
    for i in range(3):
        file = tmp_path / f"{i}.safetensors"
        subprocess.run([sys.executable, "-c", SAVE, str(file)], check=True, cwd=ROOT, timeout=120)
        made.append(file.read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    net, file = Net(), tmp_path / "a.safetensors"
    lora = trained(net)
    lora.save(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="metadata: expected texts, got 'steps': 12"):
        lora.save(file, {"steps": 12})
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16, got torch.int8"):
        lora.save(file, dtype=torch.int8)
    with pytest.raises(ValueError, match="path: expected a .safetensors file, got a.pt"):
        lora.save(tmp_path / "a.pt")
    with torch.no_grad():
        lora.layers[1].up[0, 0] = 1e6
    with pytest.raises(
        ValueError, match="a.safetensors: 1 tensors are not finite in this dtype, among them diffusion_model"
    ):
        lora.save(file, dtype=torch.float16)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_write_safetensors_without_metadata(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int64)}, {})
    assert {k: v.tolist() for k, v in load_file(tmp_path / "x.safetensors").items()} == {"a": [0, 0], "b": [1, 1, 1]}


def broken(lora, change):
    state = lora.tensors()
    change(state)
    return state


FIRST = "diffusion_model.blocks.0.0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(f"{FIRST}.lora_up.weight"), "1 missing .*blocks.0.0.lora_up"),
        (lambda s: s.pop(f"{FIRST}.alpha"), "1 missing .*blocks.0.0.alpha"),
        (lambda s: s.update({"diffusion_model.new.alpha": torch.tensor(1.0)}), "1 not known to this LoRA .*new.alpha"),
        (lambda s: s.update({f"{FIRST}.alpha": torch.tensor(4.0)}), "expected alpha 5, got 4.0 in blocks.0.0"),
        (lambda s: s.update({f"{FIRST}.lora_up.weight": torch.zeros(9, 4)}), "expected down .* got .*another network"),
        (lambda s: s[f"{FIRST}.lora_down.weight"].fill_(float("nan")), "blocks.0.0 has values that are not finite"),
    ],
)
def test_tensors_that_are_refused(change, words):
    net = Net()
    lora = trained(net)
    before = lora.tensors()
    with pytest.raises(ValueError, match=f"lora: .*{words}"):
        lora.load_tensors(broken(lora, change))
    assert all(torch.equal(before[k], v) for k, v in lora.tensors().items())


def test_another_rank_is_named():
    net = Net()
    with pytest.raises(ValueError, match="lora: expected rank 3, got 7 in blocks.0.0"):
        trained(net).load_tensors(trained(net, rank=7).tensors())


@pytest.mark.parametrize(
    ("prefix", "whose"),
    [
        ("transformer.", "diffusers'"),
        ("lora_unet_", "kohya's"),
        ("base_model.model.", "PEFT's"),
        ("lycoris_", "LyCORIS'"),
    ],
)
def test_other_formats_are_named(prefix, whose):
    lora = trained(Net())
    with pytest.raises(
        ValueError, match=f"lora: expected names that begin with 'diffusion_model.', got '{prefix}.*{whose} format"
    ):
        lora.load_tensors(lora.tensors(prefix))


def test_presets_are_what_settings_name():
    for name in PRESETS:
        LoRASettings(layers=name)
    assert LoRASettings().layers in PRESETS
