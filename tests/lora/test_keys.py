"""One LoRA in ComfyUI's keys and in diffusers': the same update of every layer, both ways, and in diffusers' own loader.

That ComfyUI's own loader gives the same output as diffusers' is tested in tests/comfyui/test_dialects.py.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editloss_core.lora.keys import (
    COMFYUI,
    DIFFUSERS,
    Update,
    from_tensors,
    fuse,
    save_both,
    split,
    to_tensors,
)
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.kontext import KONTEXT
from editloss_core.training import convert_lora

WIDTH, NAMES = 6, KONTEXT.names
# ComfyUI's layer → (outputs, inputs) in a FLUX of this width.
SIZES = {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH), "double_blocks.0.img_attn.proj": (WIDTH, WIDTH),
    "double_blocks.0.img_mlp.0": (4 * WIDTH, WIDTH), "double_blocks.0.img_mlp.2": (WIDTH, 4 * WIDTH),
    "double_blocks.0.img_mod.lin": (6 * WIDTH, WIDTH), "double_blocks.0.txt_attn.qkv": (3 * WIDTH, WIDTH),
    "double_blocks.0.txt_attn.proj": (WIDTH, WIDTH), "double_blocks.0.txt_mlp.0": (4 * WIDTH, WIDTH),
    "double_blocks.0.txt_mlp.2": (WIDTH, 4 * WIDTH), "double_blocks.0.txt_mod.lin": (6 * WIDTH, WIDTH),
    "single_blocks.12.linear1": (7 * WIDTH, WIDTH), "single_blocks.12.linear2": (WIDTH, 5 * WIDTH),
    "single_blocks.12.modulation.lin": (3 * WIDTH, WIDTH), "img_in": (WIDTH, 8), "txt_in": (WIDTH, 9),
    "time_in.in_layer": (WIDTH, 7), "time_in.out_layer": (WIDTH, WIDTH), "vector_in.in_layer": (WIDTH, 5),
    "vector_in.out_layer": (WIDTH, WIDTH), "guidance_in.in_layer": (WIDTH, 7), "guidance_in.out_layer": (WIDTH, WIDTH),
    "final_layer.linear": (8, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}  # fmt: skip


def update(outputs, inputs, rank=3, alpha=5.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Update(torch.randn(rank, inputs, generator=g), torch.randn(outputs, rank, generator=g), alpha)


def delta(u):
    return u.scale * (u.up.double() @ u.down.double())


def parts_of(layer):
    """diffusers' layers of one of ComfyUI's, with their rows."""
    names, (outputs, _) = NAMES.diffusers(layer), SIZES[layer]
    rows = [outputs] if len(names) == 1 else [WIDTH] * 3 + ([outputs - 3 * WIDTH] if len(names) > 3 else [])
    return dict(zip(names, rows))


def test_every_layer_of_flux_has_a_name_in_both():
    layers = {layer for _, _, inside in NAMES.blocks for layer in inside} | set(NAMES.outside)
    assert len(layers) == len(SIZES)
    for layer in SIZES:
        for i, name in enumerate(NAMES.diffusers(layer)):
            assert NAMES.comfyui(name) == (layer, i)


@pytest.mark.parametrize("layer", SIZES)
def test_split_is_exact(layer):
    whole = update(*SIZES[layer])
    found = split({layer: whole}, NAMES)
    assert list(found) == list(NAMES.diffusers(layer))
    rows = torch.cat([u.up for u in found.values()])
    if layer in NAMES.swapped:
        rows = torch.cat([rows[WIDTH:], rows[:WIDTH]])
    assert torch.equal(rows, whole.up)
    assert all(torch.equal(u.down, whole.down) and u.alpha == whole.alpha for u in found.values())
    again = fuse(found, NAMES)[layer]  # the shared A is seen: the rank does not grow
    assert torch.equal(again.down, whole.down) and torch.equal(again.up, whole.up) and again.alpha == whole.alpha


@pytest.mark.parametrize("layer", SIZES)
def test_fuse_is_exact(layer):
    parts = {n: update(rows, SIZES[layer][1], seed=i) for i, (n, rows) in enumerate(parts_of(layer).items())}
    (found,) = fuse(parts, NAMES).values()
    expected = torch.cat([delta(u) for u in parts.values()])
    if layer in NAMES.swapped:
        expected = torch.cat([expected[WIDTH:], expected[:WIDTH]])
    assert torch.equal(delta(found), expected)
    assert found.rank == 3 * len(parts) and found.scale == 5 / 3
    again = split({layer: found}, NAMES)  # and the zeros beside the diagonal are seen: the ranks are what they were
    assert list(again) == list(parts)
    for name, u in parts.items():
        assert (
            torch.equal(again[name].down, u.down) and torch.equal(again[name].up, u.up) and again[name].alpha == u.alpha
        )


@pytest.mark.parametrize("missing", range(4))
def test_parts_may_be_missing_and_have_other_ranks_and_alphas(missing):
    names = parts_of("single_blocks.12.linear1")
    parts = {
        n: update(rows, WIDTH, rank=2 + i, alpha=1.0 + i, seed=i)
        for i, (n, rows) in enumerate(names.items())
        if i != missing
    }
    (found,) = fuse(parts, NAMES).values()
    expected = torch.cat([delta(parts[n]) if n in parts else torch.zeros(rows, WIDTH) for n, rows in names.items()])
    assert torch.allclose(delta(found), expected, atol=1e-5) and found.up.shape[0] == 7 * WIDTH
    again = split({"single_blocks.12.linear1": found}, NAMES)
    assert list(again) == list(parts)
    assert all(
        torch.allclose(delta(again[n]), delta(u), atol=1e-5) and again[n].rank == u.rank for n, u in parts.items()
    )


def test_one_that_learnt_nothing_stays_whole():
    whole = update(3 * WIDTH, WIDTH)._replace(up=torch.zeros(3 * WIDTH, 3))
    found = split({"double_blocks.3.txt_attn.qkv": whole}, NAMES)
    assert len(found) == 3 and all(torch.equal(u.down, whole.down) and not u.up.any() for u in found.values())


@pytest.mark.parametrize(
    ("function", "updates", "expected"),
    [
        (
            split,
            {"double_blocks.0.img_attn.norm": update(6, 6)},
            "no layer 'double_blocks.0.img_attn.norm' in ComfyUI's",
        ),
        (
            split,
            {"transformer_blocks.0.attn.to_q": update(6, 6)},
            "no layer 'transformer_blocks.0.attn.to_q' in ComfyUI's",
        ),
        (split, {"double_blocks.0.img_attn.qkv": update(7, 6)}, "7 outputs for 6 inputs"),
        (split, {"single_blocks.0.linear1": update(18, 6)}, "18 outputs for 6 inputs"),
        (
            fuse,
            {"transformer_blocks.0.attn.to_w": update(6, 6)},
            "no layer 'transformer_blocks.0.attn.to_w' in diffusers'",
        ),
        (fuse, {"transformer_blocks.0.attn.to_q": update(7, 6)}, "expected 6×6 for queries, keys and values, got 7×6"),
    ],
)
def test_what_is_not_of_flux_is_refused(function, updates, expected):
    with pytest.raises(ValueError, match=expected):
        function(updates, NAMES)


# ---------------------------------------------------------------------------- files


def write(path, dialect, alpha=True, dtype=torch.float32, metadata=None):
    layers = SIZES if dialect == COMFYUI else {n: (r, SIZES[w][1]) for w in SIZES for n, r in parts_of(w).items()}
    updates = {name: update(*size, seed=i) for i, (name, size) in enumerate(layers.items())}
    state = to_tensors(updates, dialect, dtype)
    save_file(state if alpha else {k: v for k, v in state.items() if "alpha" not in k}, path, metadata=metadata)
    return updates


@pytest.mark.parametrize("dialect", [COMFYUI, DIFFUSERS])
def test_the_command_there_and_back_gives_the_same_file(dialect, tmp_path, capsys):
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    write(a, dialect, dtype=torch.bfloat16, metadata={"editloss_objective": "[]", "note": "kept"})
    assert convert_lora.main([str(a), str(b)]) == 0
    other = DIFFUSERS if dialect == COMFYUI else COMFYUI
    count = 30 if other == DIFFUSERS else len(SIZES)
    assert f"{count} layers written to {b} in the keys of {other}" in capsys.readouterr().out
    assert from_tensors(load_file(b))[0] == other
    assert convert_lora.main([str(b), str(c)]) == 0
    first, last = load_file(a), load_file(c)
    assert first.keys() == last.keys() and all(
        torch.equal(first[k], last[k]) and first[k].dtype == last[k].dtype for k in first
    )
    with safe_open(c, "pt") as file:
        assert file.metadata() == {"editloss_objective": "[]", "note": "kept"}
    assert convert_lora.main([str(a), str(b)]) == 2 and "exists already" in capsys.readouterr().err
    assert convert_lora.main([str(a), str(b), "--overwrite"]) == 0


def test_the_command_refuses_what_is_no_lora_of_flux(tmp_path, capsys):
    for name, content, expected in (
        ("kohya", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 2)}, "expected names that begin with"),
        ("dora", {"transformer.x_embedder.dora_scale": torch.zeros(2)}, "neither of its matrices nor its alpha"),
        ("half", {"transformer.x_embedder.lora_A.weight": torch.zeros(2, 2)}, "expected two matrices for x_embedder, got down"),
        ("ranks", {"transformer.x_embedder.lora_A.weight": torch.zeros(2, 2), "transformer.x_embedder.lora_B.weight": torch.zeros(2, 3)}, "have ranks 2 and 3"),
        ("both", {"transformer.x_embedder.alpha": torch.ones(()), "diffusion_model.img_in.alpha": torch.ones(())}, "all with the same"),
    ):  # fmt: skip
        save_file(content, tmp_path / f"{name}.safetensors")
        assert convert_lora.main([str(tmp_path / f"{name}.safetensors"), str(tmp_path / "out.safetensors")]) == 2
        assert expected in capsys.readouterr().err
    assert convert_lora.main([str(tmp_path / "none.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 40)
    assert convert_lora.main([str(tmp_path / "broken.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    assert not (tmp_path / "out.safetensors").exists()


def test_alpha_comes_from_the_layer_else_from_diffusers_header_else_from_the_rank():
    state = {
        "transformer.x_embedder.lora_A.weight": torch.zeros(4, 2),
        "transformer.x_embedder.lora_B.weight": torch.zeros(3, 4),
    }

    def alpha(header=None, **more):
        metadata = {} if header is None else {"lora_adapter_metadata": json.dumps(header)}
        return from_tensors({**state, **more}, metadata)[1]["x_embedder"].alpha

    header = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {}}
    assert alpha() == 4.0 and alpha(header) == 8.0
    assert alpha({**header, "transformer.alpha_pattern": {"x_embedder": 2}}) == 2.0
    assert alpha(header, **{"transformer.x_embedder.alpha": torch.tensor(6.0)}) == 6.0
    with pytest.raises(ValueError, match="use_rslora"):
        alpha({**header, "transformer.use_rslora": True})


# ---------------------------------------------------------------------------- in diffusers' own loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    from small_kontext import write_kontext

    return write_kontext(tmp_path_factory.mktemp("kontext"))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["attention", "attention + MLP", "all"])
def test_the_pipeline_loads_it_at_the_right_strength(folder, tmp_path, layers):
    """alpha is not the rank, so that a loader which overlooks it is found out."""
    from diffusers import FluxKontextPipeline
    from small_kontext import transformer

    from editloss_core.models.denoiser import DiffusersDenoiser
    from editloss_core.models.kontext import Caption

    net = transformer(4)
    lora = LoRA(net, LoRASettings(rank=3, alpha=5.0, layers=layers))
    with torch.no_grad():
        for i, layer in enumerate(lora.layers):
            layer.up.copy_(0.1 * torch.randn(layer.up.shape, generator=torch.Generator().manual_seed(i)))
    g = torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 1, 4, 4, 6, generator=g)
    caption = Caption(torch.randn(7, 24, generator=g), torch.randn(20, generator=g))

    def velocity(module):
        with torch.no_grad():
            return DiffusersDenoiser(KONTEXT, module, checkpointing=False)(
                x, torch.tensor([0.7]), [reference], [caption]
            )

    base = velocity(net)
    with lora.attach().disabled():
        assert torch.equal(velocity(net), base)
    ours = velocity(net)
    lora.detach()
    assert (ours - base).abs().max() > 1e-2
    comfyui, diffusers = save_both(lora, tmp_path / "edit.safetensors", {"note": "x"})
    files = [diffusers]
    convert_lora.convert_lora(comfyui, tmp_path / "back.safetensors")
    files.append(tmp_path / "back.safetensors")
    for file in files:
        pipeline = FluxKontextPipeline.from_pretrained(folder, local_files_only=True)
        pipeline.load_lora_weights(file.parent, weight_name=file.name)  # offline, older versions want both
        assert torch.allclose(velocity(pipeline.transformer), ours, atol=1e-5)
        pipeline.unload_lora_weights()
        assert torch.equal(velocity(pipeline.transformer), base)
    with safe_open(comfyui, "pt") as file:
        assert file.metadata()["note"] == "x" and json.loads(file.metadata()["lora"])["rank"] == 3
        assert all(name.startswith("diffusion_model.") for name in file.keys())
