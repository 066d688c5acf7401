"""One LoRA in ComfyUI's keys and in diffusers': the same update of every layer, both ways, and in diffusers' own loader.

That ComfyUI's own loader gives the same output as diffusers' is tested in tests/comfyui/test_dialects.py.
"""

import json
import re

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
        ("kohya", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 2)}, "expected two matrices for double_blocks.0.img_attn.qkv"),
        ("sdxl", lora_of("lora_unet_input_blocks_4_1_proj_in"), "has a layer 'input_blocks_4_1_proj_in' in ComfyUI's names with underscores"),
        ("text", lora_of("lora_unet_img_in") | lora_of("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "all with the same, got 'lora_te1_"),
        ("rank 0", lora_of("transformer.x_embedder", rank=0), "x_embedder have rank 0"),
        ("int8", lora_of("transformer.x_embedder", dtype=torch.int8), "expected floats in the matrices of x_embedder, got torch.int8"),
        ("two alphas", lora_of("transformer.x_embedder") | {"transformer.x_embedder.alpha": torch.ones(2)}, "expected one number as alpha of x_embedder, got [2]"),
        ("nan", lora_of("transformer.x_embedder") | {"transformer.x_embedder.alpha": torch.tensor(float("nan"))}, "expected a finite alpha of x_embedder, got nan"),
        ("nothing", {}, "got a file without tensors"),
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
    for source, target, expected in (
        (tmp_path, "out", "source: expected a file"),
        (tmp_path / "nan.safetensors", "gone/out", "target: there is no folder"),
        (tmp_path / "nan.safetensors", "nan", "is the source itself"),
        (tmp_path / "nan.safetensors", "out.pth", "expected a name ending in .safetensors"),
    ):
        target = str(tmp_path / target) + ("" if target.endswith(".pth") else ".safetensors")
        assert convert_lora.main([str(source), target, "--overwrite"]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def lora_of(layer, rank=2, dtype=torch.float32):
    return {
        f"{layer}.lora_down.weight": torch.ones(rank, 2, dtype=dtype),
        f"{layer}.lora_up.weight": torch.ones(3, rank, dtype=dtype),
    }


@pytest.mark.parametrize(("dialect", "prefix"), [(COMFYUI, "lora_unet_"), (DIFFUSERS, "lora_transformer_")])
def test_names_with_underscores_are_those_with_dots(tmp_path, dialect, prefix):
    """As kohya's sd-scripts and OneTrainer write them, with each program's layers."""
    write(tmp_path / "dots.safetensors", dialect)
    under = {}
    for key, value in load_file(tmp_path / "dots.safetensors").items():
        layer, _, end = key.removeprefix({COMFYUI: "diffusion_model.", DIFFUSERS: "transformer."}[dialect]).rpartition(
            ".alpha" if key.endswith(".alpha") else ".lora_"
        )
        end = {"": "alpha", "A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(end, f"lora_{end}")
        under[f"{prefix}{layer.replace('.', '_')}.{end}"] = value
    save_file(under, tmp_path / "under.safetensors")
    made = [
        convert_lora.convert_lora(tmp_path / f"{n}.safetensors", tmp_path / f"{n}_out.safetensors")
        for n in ("dots", "under")
    ]
    assert made[0] == made[1] and made[0][0] != dialect
    dots, found = (load_file(tmp_path / f"{name}_out.safetensors") for name in ("dots", "under"))
    assert dots.keys() == found.keys() and all(torch.equal(dots[key], found[key]) for key in dots)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_stay_and_other_strengths_do_not_round(tmp_path, dtype):
    """A product of two such numbers does not fit into one."""
    names = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    state = {}
    for k, name in enumerate(names):
        u = update(WIDTH, WIDTH, rank=2, seed=k)
        state |= {f"{name}.lora_A.weight": u.down.to(dtype), f"{name}.lora_B.weight": u.up.to(dtype)}
    for alphas, expected in (((2, 2, 2), dtype), ((2, 3, 2), torch.bfloat16)):
        for name, alpha in zip(names, alphas):
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
        save_file(state, tmp_path / "in.safetensors")
        convert_lora.convert_lora(
            tmp_path / "in.safetensors", tmp_path / "out.safetensors", overwrite=True, model="flux_kontext"
        )
        found = load_file(tmp_path / "out.safetensors")
        layer = "diffusion_model.double_blocks.0.img_attn.qkv"
        down, up = found[f"{layer}.lora_down.weight"], found[f"{layer}.lora_up.weight"]
        assert down.dtype == dtype and up.dtype == expected
        whole = found[f"{layer}.alpha"] / len(down) * (up.float() @ down.float())
        right = torch.cat(
            [state[f"{n}.alpha"] / 2 * (state[f"{n}.lora_B.weight"].float() @ state[f"{n}.lora_A.weight"].float()) for n in names]
        )  # fmt: skip
        assert torch.allclose(whole, right, rtol=1e-2, atol=1e-2)


LAYER = "transformer_blocks.0.ff.net.2"


@pytest.mark.parametrize(
    "pattern",
    [
        {LAYER: 16}, {"net.2": 16}, {f"^{LAYER}": 16}, {r"transformer_blocks\.\d+\.ff.*": 16}, {"ff.net.[02]": 16},
        {"et.2": 16}, {"ff": 16}, {f"{LAYER}.x": 16}, {"other": 2, "net.2": 16, LAYER: 3}, {LAYER: 3, "net.2": 16}, {},
    ],
)  # fmt: skip
def test_patterns_are_peft_s(pattern):
    """Its own function and its own configuration say what is right."""
    other = pytest.importorskip("peft.utils.other")
    expected = pattern.get(other.get_pattern_key(pattern.keys(), LAYER), 5)
    state = {f"transformer.{LAYER}.lora_A.weight": torch.zeros(4, 2), f"transformer.{LAYER}.lora_B.weight": torch.zeros(3, 4)}  # fmt: skip

    def read(**header):
        header = {f"transformer.{name}": value for name, value in header.items()}
        return from_tensors(state, {"lora_adapter_metadata": json.dumps(header)})[1][LAYER]

    assert read(lora_alpha=5, r=4, alpha_pattern=pattern).alpha == expected
    ranks = {name: 4 if value == expected else 9 for name, value in pattern.items()}
    if expected == 5:  # no pattern fits
        assert read(lora_alpha=5, r=4, rank_pattern=ranks).scale == 5 / 4
        with pytest.raises(ValueError, match=f"says rank 7 of {LAYER}, whose matrices have 4"):
            read(lora_alpha=5, r=7, rank_pattern=pattern)
    else:
        assert read(lora_alpha=5, r=9, rank_pattern=ranks).scale == 5 / 4
        with pytest.raises(ValueError, match=f"says rank {expected} of {LAYER}, whose matrices have 4"):
            read(lora_alpha=5, r=4, rank_pattern=pattern)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{oops", "in the file's header is no JSON"),
        ("[1]", "expected names and values as lora_adapter_metadata in the file's header, got .1."),
        ("null", "expected names and values"),
        ('{"transformer.lora_alpha": null}', "expected a number as lora_alpha in the file's header, got None"),
        ('{"transformer.lora_alpha": true}', "expected a number as lora_alpha in the file's header, got True"),
        ('{"transformer.alpha_pattern": [1]}', "expected patterns and numbers as alpha_pattern in the file's header"),
        ('{"transformer.alpha_pattern": {"x_embedder": "2"}}', "as alpha_pattern of 'x_embedder' in the file's header, got '2'"),
        ('{"transformer.rank_pattern": {"x_(": 2}}', "rank_pattern in the file's header has 'x_.', no pattern"),
    ],
)  # fmt: skip
def test_odd_headers_end_in_a_sentence(tmp_path, capsys, text, expected):
    save_file(lora_of("transformer.x_embedder"), tmp_path / "in.safetensors", metadata={"lora_adapter_metadata": text})
    assert convert_lora.main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("python -m editloss_core.training.convert_lora: lora: ")
        and re.search(expected, said)
        and not (tmp_path / "out.safetensors").exists()
    )


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
