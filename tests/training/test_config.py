"""The TOML file of a run: what is written is read again, and everything that is wrong is said at once, with its line."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch

from editloss_core.encoders.decoder_features import VAEDecoderEncoder
from editloss_core.encoders.vae import VAEEncoder
from editloss_core.lora.lora import LoRASettings
from editloss_core.negatives import OverlaySettings
from editloss_core.objective import TERMS, EditObjective, LossTerm, recommended
from editloss_core.pairs import VariantSettings
from editloss_core.training.config import (
    NO_VARIANTS,
    SECTIONS,
    EstimateSection,
    ModelSection,
    OpenCLIPSection,
    PairsSection,
    RunSection,
    TimmSection,
    TrainingConfig,
    VAEDecoderSection,
    VAESection,
    ValidationSection,
    encoder_section,
    to_toml,
)
from editloss_core.training.config_reader import (
    CALLED_ELSEWHERE,
    ConfigError,
    checkpoint_of,
    parse_config,
    read_config,
)
from editloss_core.training.flow import Timesteps
from editloss_core.training.settings import TrainingSettings

MINIMAL = '[model]\npath = "kontext"\n[pairs]\nfolder = "pairs"\n[run]\nfolder = "runs/a"\n'


def parsed(text):
    return parse_config(text, files=False)


def problems(text):
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    return list(caught.value.problems)


def all_terms(encoder):
    objective = EditObjective()
    for kind in TERMS:
        objective = objective.with_term(LossTerm(kind, encoder, weight=0.3))
    return objective.with_term(
        LossTerm("triplet", encoder, name="Näher „dran“ \\ \x7f\t", margin="auto:0.25", t_max=0.8)
    )


FULL = TrainingConfig(
    model=ModelSection("kontext", "one.safetensors", "taef1", "fp32", "nf4", "cpu", 3.5, False),
    pairs=PairsSection("after", "before", 768, "Make it “red”.", True),
    run=RunSection("runs/b", "120", "cache", 7, 2, "fp32", ("tensorboard",)),
    encoders={
        "vae": VAESection(256),
        "decoder": VAEDecoderSection((1, 3), 128),
        "dino": TimmSection("vit_small_patch14_dinov2", "w.safetensors", "tokens", -2, 392, True),
        "clip": OpenCLIPSection("ViT-B-32", "c.safetensors", "grid", True),
    },
    objective=EditObjective(tuple(t for t in all_terms("dino").terms if t.negative != "hard_negative")),
    training=TrainingSettings(
        steps=33, batch_size=4, learning_rate=3e-6, warmup=3, schedule="cosine", ema=0.99, checkpoint_every=7, keep=2,
        timesteps=Timesteps("uniform", minimum=0.1), validate_every=5, previews=1, preview_steps=3,
    ),
    lora=LoRASettings(4, 2.5, 0.1, "all, -*mod*"),
    estimate=EstimateSection(256),
    overlay=OverlaySettings(kinds=("blend",), opacity=(0.4, 0.9)),
    variants=VariantSettings(4, False, 0.1, 1.5, 5.0, 0.2, 3),
    validation=ValidationSection(0, "held_out", "held_out_before", 5, 1, 3, 1.5),
)  # fmt: skip


def test_what_is_written_is_read_again():
    assert parsed(to_toml(FULL, "a heading\n\nof three lines")) == FULL
    assert to_toml(FULL, "one\n\ntwo").startswith("# one\n#\n# two\n\n[model]\n")


def test_every_kind_of_term_comes_back():
    terms = all_terms("vae")
    config = replace(FULL, objective=EditObjective(tuple(t for t in terms.terms if t.negative != "hard_negative")))
    assert {t.kind for t in config.objective.terms} == set(TERMS) - {"multi_negative"}
    assert parsed(to_toml(config)).objective == config.objective


def test_a_minimal_file_has_the_defaults_of_the_settings():
    config = parsed(MINIMAL)
    assert config == TrainingConfig(ModelSection("kontext"), PairsSection("pairs"), RunSection("runs/a"))
    assert config.training == TrainingSettings() and config.lora == LoRASettings()
    assert config.overlay == OverlaySettings() and config.objective == EditObjective()


def test_without_its_section_there_are_no_variants_and_with_it_eight():
    assert parsed(MINIMAL).variants == NO_VARIANTS == VariantSettings(count=1)
    assert parsed(MINIMAL + "[variants]\n").variants == VariantSettings(count=8)
    assert parsed(MINIMAL + "[variants]\nflip = false\ncount = 3\n").variants == VariantSettings(3, flip=False)


def test_every_setting_of_a_run_has_a_key_and_one_only():
    spread = [key for name in ("training", "validation", "run") for key in SECTIONS[name]]
    for f in fields(TrainingSettings):
        assert spread.count(f.name) == (f.name != "timesteps")
        if f.name in SECTIONS["validation"] or f.name in SECTIONS["run"]:
            section = "validation" if f.name in SECTIONS["validation"] else "run"
            assert SECTIONS[section][f.name].default == getattr(TrainingSettings(), f.name)


def test_the_terms_may_use_the_encoders_only_and_names_are_numbered():
    term = '[[objective]]\nkind = "geometry_match"\nencoder = "vae"\n'
    config = parsed(MINIMAL + '[[encoders]]\nname = "vae"\nkind = "vae"\n' + term + term)
    assert [t.name for t in config.objective.terms] == ["geometry match", "geometry match #2"]
    assert problems(MINIMAL + term) == ["line 9: objective[1].encoder: no encoder is called 'vae'; there are none"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[trainin]\n", "line 7: trainin: there is no such section; did you mean training?"),
        ("[training]\nlearningrate = 1e-4\n", "line 8: training.learningrate: unknown; did you mean learning_rate?"),
        ("[training]\nlr = 1e-4\n", "line 8: training.lr: unknown; did you mean learning_rate?"),
        ("[lora]\nlr = 1e-4\n", "line 8: lora.lr: unknown; did you mean learning_rate in [training]?"),
        ("[training]\nmax_train_steps = 5\n", "line 8: training.max_train_steps: unknown; did you mean steps?"),
        ("[lora]\nnetwork_dim = 5\n", "line 8: lora.network_dim: unknown; did you mean rank?"),
        ("[lora]\nlearning_rat = 5\n", "line 8: lora.learning_rat: unknown; did you mean learning_rate in [training]?"),
        ("[training]\nzzz = 1\n", "line 8: training.zzz: unknown; there are steps, batch_size, "),
        ("[training]\nhold_out = 1\n", "line 8: training.hold_out: unknown; it belongs in [validation]"),
        ("[variants]\nzoom = 3.0\n", "line 8: variants.zoom: expected a number >= 1 and <= 2, got 3.0"),
        ("[training]\nsteps = 1.5\n", "line 8: training.steps: expected a whole number, got 1.5"),
        ("[training]\nsteps = true\n", "line 8: training.steps: expected a whole number, got true"),
        ("[training]\nsteps = 0\n", "line 8: training.steps: expected a whole number >= 1, got 0"),
        ("[training]\noptimizer = 'adam'\n", "line 8: training.optimizer: expected one of 'adamw', 'adamw8bit', 'prodigy', got 'adam'"),
        ("[training]\nsteps = 5\nwarmup = 6\n", "line 9: training.warmup: expected at most the 5 steps of the run, got 6"),
        ("training = 3\n", "line 7: run.training: unknown"),
        ("[lora]\nlayers = ''\n", "line 8: lora.layers: expected 'attention'"),
        ("[estimate]\ncrop = 100\n", "line 8: estimate.crop: expected a multiple of 16 pixels"),
        ("[overlay]\nkinds = 'blend'\n", "line 8: overlay.kinds: expected a list of texts, got 'blend'"),
        ("[overlay]\nopacity = [0.5]\n", "line 8: overlay.opacity: expected a list of 2 numbers, got [0.5]"),
        ("[overlay]\nopacity = [0.1, 0.5]\n", "line 8: overlay.opacity: "),
        ("[timesteps]\nkind = 'cosine'\n", "line 7: timesteps: timesteps: expected one of"),
        ("[validation]\nvalidate_every = -1\n", "line 8: validation.validate_every: expected a whole number >= 0, got -1"),
        ("keep = 0\n", "line 7: run.keep: expected a whole number >= 1, got 0"),
        ("[validation]\nhold_out = -1\n", "line 8: validation.hold_out: expected a whole number >= 0, got -1"),
        ("resume = 'newest'\n", "line 7: run.resume: expected '', 'last' or the step of a checkpoint, got 'newest'"),
        ("lora_dtype = 'int8'\n", "line 7: run.lora_dtype: expected one of 'bf16', 'fp16', 'fp32', got 'int8'"),
        ("[[encoders]]\nname = 'a'\n", "line 7: encoders[1].kind: expected one of vae, vae_decoder, timm, openclip, got nothing"),
        ("[[encoders]]\nkind = 'vae'\n", "line 7: encoders[1].name: expected the name that terms call it by, got nothing"),
        ("[[encoders]]\nname = 'a'\nkind = 'timm'\nweights = 'w'\n", "line 7: encoders[1]: model_name is missing"),
        ("[[encoders]]\nname = 'a'\nkind = 'vae_decoder'\ndepths = [2, 1]\n", "line 10: encoders[1].depths: expected ascending whole"),
        ("[encoders]\nname = 'a'\n", "line 7: encoders: expected tables [[encoders]], each with name, kind"),
        ("[[objective]]\nkind = 'triple'\nencoder = 'a'\n", "line 8: objective[1].kind: there is no loss 'triple'; did you mean triplet?"),
        ("[training]\nvelocity_weight = 0\n", "line 8: objective: velocity_weight: 0 without an objective"),
    ],
)  # fmt: skip
def test_each_fault_has_its_line_and_what_was_expected(text, expected):
    (said,) = problems(MINIMAL + text)
    expected = expected.replace("line 8: objective: velocity", "objective: velocity")
    assert said.startswith(expected)


def test_all_that_is_wrong_is_said_together_in_the_order_of_the_file():
    text = """[model]
pth = "x"
[lora]
rank = 0
alpha = -1
[[objective]]
kind = "no_edit_identity"
encoder = "vae"
margin = "much"
weight = -1
[training]
steps = "many"
"""
    said = problems(text)
    assert [re.match(r"line (\d+)", line)[1] if line.startswith("line") else "" for line in said] == [
        "", "", "1", "2", "4", "5", "8", "9", "10", "12",
    ]  # fmt: skip
    assert said[0].startswith("pairs: the section is missing") and said[1].startswith("run: the section is missing")
    error = ConfigError("a.toml", said)
    assert str(error).startswith("a.toml: 10 problems; nothing was started\n- pairs: ")


def test_what_is_no_toml_and_no_file(tmp_path):
    (said,) = problems("[model\n")
    assert said.startswith("not TOML: ") and "line 1" in said
    with pytest.raises(ConfigError, match="none.toml: 1 problem; nothing was started"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "a.toml")


def test_files_that_are_not_there_are_all_named(tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "here.safetensors").touch()
    text = (
        MINIMAL
        + """resume = "last"
[validation]
folder = "watched"
[[encoders]]
name = "a"
kind = "timm"
model_name = "x"
weights = "there.safetensors"
[[encoders]]
name = "b"
kind = "openclip"
architecture = "x"
weights = "here.safetensors"
[[encoders]]
name = "c"
kind = "openclip"
architecture = "x"
weights = "here.pth"
"""
    )
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "c.toml")
    said = caught.value.problems
    assert len(said) == 5
    for line, expected in zip(
        said,
        (
            "line 2: model.path: there is no folder",
            "line 7: run.resume: expected a checkpoint in",
            "line 9: validation.folder: there is no folder",
            "line 14: encoders[1].weights: there is no file",
            "line 24: encoders[3].weights: expected a .safetensors file, got here.pth",
        ),
    ):
        assert line.startswith(expected)


def test_which_checkpoint_a_run_goes_on_from(tmp_path):
    folder = tmp_path / "runs" / "a" / "checkpoints"
    folder.mkdir(parents=True)
    assert checkpoint_of(RunSection("runs/a"), tmp_path) is None
    for step in (2, 10):
        (folder / f"step_{step:06d}.safetensors").touch()
    with pytest.raises(ValueError, match="folder: .* holds checkpoints of another run; resume it"):
        checkpoint_of(RunSection("runs/a"), tmp_path)
    assert checkpoint_of(RunSection("runs/a", "last"), tmp_path).name == "step_000010.safetensors"
    assert checkpoint_of(RunSection("runs/a", "2"), tmp_path).name == "step_000002.safetensors"
    with pytest.raises(ValueError, match="resume: expected a checkpoint of step 3 in .*, there is one of step 2, 10"):
        checkpoint_of(RunSection("runs/a", "3"), tmp_path)


def test_the_recommended_mix_in_a_file():
    encoders = {"vae": VAESection(), "dino": FULL.encoders["dino"]}
    config = replace(FULL, objective=recommended("dino", "vae"), encoders=encoders)
    assert parsed(to_toml(config)) == config


def test_the_section_of_an_encoder(tmp_path):
    """What Export Training Config writes of the encoders that are wired to a graph's losses."""
    from small import Patches, parts

    vae = parts()[1]
    assert encoder_section(vae) == VAESection(0)
    small = VAEEncoder(vae.encode, "vae", "weights", 8, image_size=64)
    assert encoder_section(small) == VAESection(64)
    features = VAEDecoderEncoder(
        small, torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU(), torch.nn.ReLU()), abs, "d", "f"
    )
    assert encoder_section(features) == VAEDecoderSection((1,), 64)
    arguments = vars(FULL.encoders["dino"])
    patches = Patches()
    with pytest.raises(ValueError, match="'patches/grid' cannot be made outside this program; use VAE Latents"):
        encoder_section(patches)
    patches.arguments = arguments
    assert encoder_section(patches) == FULL.encoders["dino"]
    patches.arguments = vars(FULL.encoders["clip"])
    assert encoder_section(patches) == FULL.encoders["clip"]
    patches.arguments = {**arguments, "image_size": (64, 96)}
    with pytest.raises(ValueError, match="cannot be made outside"):
        encoder_section(patches)


def read(folder, data):
    for name in ("pairs", "model"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "c.toml").write_bytes(data)
    try:
        return read_config(folder / "c.toml", files=False).pairs.folder
    except ConfigError as error:
        (problem,) = error.problems
        return problem


TEXT = '[model]\npath = "model"\n[pairs]\nfolder = "pairs"\n[run]\nfolder = "run"\n'
BACKSLASH = "in double quotes a backslash begins a code: write the path with / or in single quotes"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (TEXT.encode("utf-8-sig"), "pairs"),
        (TEXT.encode("utf-16"), "pairs"),
        (TEXT.replace("\n", "\r\n").encode("utf-8-sig"), "pairs"),
        (TEXT.replace('"pairs"', "'C:\\Users\\me'").encode(), "C:\\Users\\me"),
        (TEXT.replace('"pairs"', '"C:\\Users\\me"').encode(), BACKSLASH),
        (TEXT.replace('"pairs"', '"D:\\data"').encode(), BACKSLASH),
        (TEXT.replace('"pairs"', "\u201cpairs\u201d").encode(), "write straight quotes"),
        (TEXT.replace("path =", "path\u00a0=").encode(), "the line has a no-break space"),
        (TEXT.replace('pairs"', 'caf\u00e9"').encode("cp1252"), "line 4: expected text in UTF-8, got the byte 0xe9"),
    ],
)
def test_files_as_windows_editors_and_people_leave_them(tmp_path, data, expected):
    assert expected in read(tmp_path, data)


def test_paths_that_are_not_there_say_what_was_meant(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")

    def said(**paths):
        text = f'[model]\npath = {paths.get("model", "1")!r}\n[pairs]\nfolder = {paths.get("pairs", "2")!r}\n[run]\nfolder = "run"\n'
        (tmp_path / "c.toml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as raised:
            read_config(tmp_path / "c.toml")
        return str(raised.value)

    hub = said(model="black-forest-labs/FLUX.1-Kontext-dev")
    assert "if black-forest-labs/FLUX.1-Kontext-dev is a name of a hub: nothing is downloaded" in hub
    assert "is a file; a single file of the transformer goes into transformer" in said(model="model.safetensors")
    assert "hub" not in said(model="missing")
    assert "~ and variables are not replaced" in said(pairs="~/pairs")
    assert "pairs.folder: expected a folder, got nothing" in said(pairs="")


def test_names_of_other_trainers_lead_to_keys_that_there_are():
    assert all(key in SECTIONS[section] for section, key in CALLED_ELSEWHERE.values())
    assert not CALLED_ELSEWHERE.keys() & {key for keys in SECTIONS.values() for key in keys}
