"""The code of docs/own-trainer.md, run as it stands there.

The diffusers part runs with diffusers' own classes at a small size and random weights. ai-toolkit cannot be installed: its
part runs against small classes with the names and tensors that its trainer hands over.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from editloss_core.demo.model import Autoencoder, load_autoencoder
from editloss_core.demo.scenes import edit_region, stool_pairs
from editloss_core.embeddings import EmbeddingSet
from editloss_core.encoders.base import EncoderInfo
from editloss_core.encoders.timm_net import TimmEncoder
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.objective import EditObjective, LossTerm
from editloss_core.training.flow import velocity_loss

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "own-trainer.md").read_text(encoding="utf-8")
FLUX = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 24,
    "pooled_projection_dim": 16, "axes_dims_rope": (8, 12, 12), "guidance_embeds": True,
}  # fmt: skip


def blocks(heading: str) -> list[str]:
    """The Python of one section of the page, whose own subsections are not it."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", PAGE, re.S | re.M)
    found = re.findall(r"```python\n(.*?)```", section, re.S)
    assert found, heading
    return found


def run(code: str, names: dict) -> dict:
    exec(compile(code, "docs/own-trainer.md", "exec"), names)
    return names


@pytest.fixture
def page():
    """The names of the sections that need the core alone."""
    names: dict = {}
    for heading in ("The loss, in ten lines", "Mask and overlays, once per pair"):
        for code in blocks(heading):
            run(code, names)
    return names


@pytest.fixture(scope="module")
def pair():
    """Two drawn pairs, with their masks and their latents by the demo's autoencoder."""
    examples = stool_pairs(2)
    network = Autoencoder()
    network.load_state_dict(load_autoencoder(), strict=False)  # it leaves blocks of zeros out
    network.requires_grad_(False)
    before, after = (torch.stack([getattr(e, name) for e in examples]) for name in ("before", "after"))
    return SimpleNamespace(
        before=before, after=after, mask=torch.stack([edit_region(e) for e in examples]), encode=network.encode,
        z_src=network.encode(before), z_gt=network.encode(after),
    )  # fmt: skip


def test_every_block_of_the_page_is_run_here():
    tested = sum(len(blocks(h)) for h in re.findall(r"^#+ (.*)$", PAGE, re.M) if h in SECTIONS)
    assert tested == PAGE.count("```python") == 10


SECTIONS = (
    "The loss, in ten lines", "Mask and overlays, once per pair", "A whole step",
    "In train_dreambooth_lora_flux_kontext.py", "On rollouts", "In ai-toolkit",
    "With an encoder of pictures, and with a report",
    "What happens to the gradients",
)  # fmt: skip


def test_ten_lines_they_are():
    (code,) = blocks(SECTIONS[0])
    body = code.split("def edit_loss")[1].strip().splitlines()[1:]
    assert len([line for line in body if line.strip()]) <= 10


@pytest.mark.slow
def test_the_ten_lines_are_the_objective_of_the_core(page, pair):
    """They equal the trainer's own objective on VAE latents, with the mask at token resolution that EmbeddingSet makes."""
    z_overlay, weights = page["constants"](pair.before, pair.after, pair.encode, pair.mask)
    assert z_overlay.shape == (2, 4, *pair.z_gt.shape[1:]) and weights.shape == (2, *pair.z_gt.shape[2:])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(pair.z_gt.shape, generator=generator)
    t, v = torch.tensor([0.3, 0.8]), torch.randn(pair.z_gt.shape, generator=generator)
    x_t = torch.lerp(pair.z_gt, noise, t.view(-1, 1, 1, 1))
    ours = page["edit_loss"](x_t, t, v, pair.z_gt, pair.z_src, z_overlay, weights)

    x0 = x_t - t.view(-1, 1, 1, 1) * v
    info = EncoderInfo("vae/grid", "none", "0", "grid")
    embeddings = EmbeddingSet().with_embedding("overlay", info, z_overlay.movedim(-3, -1))
    for role, z in (("pred", x0), ("gt", pair.z_gt), ("src", pair.z_src)):
        embeddings = embeddings.with_embedding(role, info, z.movedim(1, -1))
    objective = EditObjective(
        (
            LossTerm("no_edit_identity", "vae/grid", 1.0, margin="auto"),
            LossTerm("geometry_match", "vae/grid", 0.5, dist="cos"),
            LossTerm("overlay_avoidance", "vae/grid", 0.7, margin="auto"),
        )
    )
    report = objective.evaluate(embeddings.with_mask(pair.mask))
    torch.testing.assert_close(ours, sum(term.weighted_per_sample for term in report.terms))
    assert ours.shape == (2,) and (ours > 0).all()


@pytest.mark.slow
def test_a_perfect_velocity_pays_nothing_and_a_copy_pays(page, pair):
    z_overlay, weights = page["constants"](pair.before, pair.after, pair.encode)  # with an estimated mask
    noise, t = torch.randn(pair.z_gt.shape), torch.full((2,), 0.5)
    x_t = torch.lerp(pair.z_gt, noise, t.view(-1, 1, 1, 1))
    constant = (pair.z_gt, pair.z_src, z_overlay, weights)
    assert page["edit_loss"](x_t, t, noise - pair.z_gt, *constant).max() < 1e-4
    assert page["edit_loss"](x_t, t, (x_t - pair.z_src) / 0.5, *constant).min() > 0.1


def test_what_the_page_says_of_gradients(page):
    (code,) = blocks("What happens to the gradients")
    names = run(code, page)
    at_t = names["gradient"](names["wrong"])
    # −t times what reaches the estimate:
    x0 = (names["x_t"] - 0.4 * names["wrong"]).requires_grad_()
    zero = torch.zeros(1)
    names["edit_loss"](
        x0, zero, torch.zeros_like(x0), *(names[n] for n in ("z_gt", "z_src", "z_overlay", "weights"))
    ).sum().backward()
    torch.testing.assert_close(at_t, -0.4 * x0.grad)
    bf16 = names["wrong"].bfloat16()
    assert names["gradient"](bf16).dtype == torch.bfloat16 and names["gradient"](bf16).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# diffusers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flux():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(**FLUX).requires_grad_(False)
    lora = LoRA(transformer, LoRASettings(rank=4, alpha=4.0)).attach()
    return SimpleNamespace(transformer=transformer, lora=lora, words=torch.randn(2, 5, 24), pooled=torch.randn(2, 16))


@pytest.fixture
def autoencoder():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=16, layers_per_block=1, sample_size=128,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).requires_grad_(False)  # fmt: skip


@pytest.mark.slow
def test_the_whole_step_trains_a_lora_on_flux(page, pair, flux):
    (code,) = blocks("A whole step")
    names = run(code, page)
    constant = names["constants"](pair.before, pair.after, pair.encode, pair.mask)
    seen, edit_loss = [], names["edit_loss"]

    def watched(*args):
        seen.append((args, edit_loss(*args)))
        return seen[-1][1]

    names["edit_loss"] = watched
    optimizer = torch.optim.AdamW(flux.lora.parameters(), lr=5e-3)
    totals = []
    for number in range(12):
        torch.manual_seed(number % 2)  # the same two draws of noise and t again and again
        optimizer.zero_grad()
        loss = names["step_loss"](flux.transformer, pair.z_gt, pair.z_src, *constant, flux.words, flux.pooled)
        loss.backward()
        totals.append(loss.item())
        optimizer.step()
    assert totals[-1] < totals[1] and totals[-2] < totals[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flux.lora.parameters())
    assert all(layer.down.grad.abs().sum() > 0 for layer in flux.lora.layers)

    (x_t, t, v, z_gt, *_), extra = seen[-1]
    noise = (x_t - (1 - t).view(-1, 1, 1, 1) * z_gt) / t.view(-1, 1, 1, 1)
    expected = velocity_loss(v, noise - z_gt).mean() + (extra * (t <= 0.5)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert v.shape == z_gt.shape and (t <= 0.5).any()


@pytest.mark.slow
def test_the_edit_terms_alone_reach_the_lora(page, pair, flux):
    (code,) = blocks("A whole step")
    names = run(code.replace("return loss + (", "return ("), page)
    constant = names["constants"](pair.before, pair.after, pair.encode, pair.mask)
    torch.manual_seed(0)
    names["step_loss"](flux.transformer, pair.z_gt, pair.z_src, *constant, flux.words, flux.pooled).backward()
    assert sum(layer.up.grad.abs().sum() for layer in flux.lora.layers) > 0


def test_a_rollout(page, pair, flux):
    (code,) = blocks("On rollouts")
    z_overlay, weights = page["constants"](pair.before, pair.after, pair.encode, pair.mask)
    asked = []

    class Field(torch.nn.Module):
        """The straight path to the after picture, but for a factor that is learnt."""

        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.9))

        def forward(self, x, t):
            asked.append((float(t), torch.is_grad_enabled()))
            return self.factor * (x - pair.z_gt) / t

    field, times = Field(), torch.linspace(1, 0, 5)
    for seed in range(8):
        asked.clear()
        torch.manual_seed(seed)
        field.zero_grad()
        loss = run(code, page)["rollout_loss"](field, times, pair.z_gt, pair.z_src, z_overlay, weights)
        loss.backward()
        assert [t for t, _ in asked] == pytest.approx(times[: len(asked)].tolist())
        assert [graded for _, graded in asked] == [False] * (len(asked) - 1) + [True]
        assert loss > 0 and field.factor.grad < 0  # towards 1, where the path ends at the after picture


def test_the_lines_for_the_training_script(page, pair, autoencoder):
    """With the names that the script has where they are inserted, and tensors as it has them there."""
    cache, step = blocks("In train_dreambooth_lora_flux_kontext.py")
    pixels = {"pixel_values": pair.after, "cond_pixel_values": pair.before}
    batch = {name: 2 * p.movedim(-1, 1) - 1 for name, p in pixels.items()}
    names = run(cache, page | {"vae": autoencoder, "batch": batch, "edit_cache": []})

    model_input, cond_model_input = (
        (autoencoder.encode(batch[name]).latent_dist.mode() - 0.1159) * 0.3611 for name in pixels
    )
    torch.testing.assert_close(names["encode"](pair.after), model_input, rtol=1e-4, atol=1e-5)
    sigmas = torch.tensor([0.4, 0.95]).view(-1, 1, 1, 1)
    noisy_model_input = (1 - sigmas) * model_input + sigmas * torch.randn_like(model_input)
    model_pred = torch.randn(model_input.shape, requires_grad=True)
    script = {
        "sigmas": sigmas, "noisy_model_input": noisy_model_input, "model_pred": model_pred, "model_input": model_input,
        "cond_model_input": cond_model_input, "loss": torch.tensor(2.0), "step": 0,
    }  # fmt: skip
    loss = run(step, names | script)["loss"]
    loss.backward()
    assert loss > 2 and model_pred.grad[0].abs().sum() > 0
    assert model_pred.grad[1].abs().sum() == 0  # t = 0.95 is behind the gate


def test_an_encoder_of_pictures(pair, autoencoder):
    (code,) = blocks("With an encoder of pictures, and with a report")
    names = run(code, {})
    encoder = TimmEncoder("test_efficientnet", layer=1, image_size=64, random_seed=0)
    rows = columns = slice(2, 14)
    known = names["embeddings_of"](encoder, pair.before, pair.after, pair.before, pair.mask, rows, columns)
    x0 = torch.randn(pair.z_gt.shape, requires_grad=True)
    loss, report = names["picture_loss"](x0, autoencoder, encoder, known, rows, columns)
    loss.backward()
    assert set(report) == {"no edit identity", "geometry match", "overlay avoidance"} and loss > 0
    assert x0.grad[..., rows, columns].abs().sum() > 0
    assert x0.grad[..., :2, :].abs().sum() == 0 and x0.grad[..., 14:].abs().sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# ai-toolkit
# ---------------------------------------------------------------------------------------------------------------------


class SDTrainer:
    """What of ai-toolkit's trainer the page's code touches: the plain flow-matching loss, and a VAE that takes −1…1."""

    def __init__(self, encode):
        self.sd = SimpleNamespace(encode_images=lambda images: encode((torch.stack(images).movedim(1, -1) + 1) / 2))

    def calculate_loss(self, noise_pred, noise, noisy_latents, timesteps, batch, mask_multiplier=1.0, prior_pred=None):
        return (noise_pred - (noise - batch.latents)).square().mean()


@pytest.fixture
def toolkit(monkeypatch):
    for name, part in (("toolkit.extension", {"Extension": object}), ("extensions_built_in.sd_trainer.SDTrainer", {"SDTrainer": SDTrainer})):  # fmt: skip
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:k]), ModuleType(".".join(parts[:k])))
        vars(sys.modules[name]).update(part)


@pytest.mark.slow
def test_the_extension_for_ai_toolkit(page, pair, toolkit, capsys):
    trainer_code, extension_code = blocks("In ai-toolkit")
    encoded = []

    def encode(pictures):
        encoded.append(len(pictures))
        return pair.encode(pictures)

    names = run(trainer_code, page)
    trainer = names["EditLossTrainer"](encode)
    items = [SimpleNamespace(path=f"{i}.png", flip_x=False) for i in range(2)]
    batch = SimpleNamespace(
        latents=pair.z_gt,
        tensor=2 * pair.after.movedim(-1, 1) - 1,
        control_tensor=pair.before.movedim(-1, 1),
        file_items=items,
    )
    batch_control, side = batch.control_tensor, pair.before.shape[1]
    timesteps = torch.tensor([400.0, 950.0])
    t = (timesteps / 1000).view(-1, 1, 1, 1)
    noise = torch.randn(pair.z_gt.shape)
    x_t = (1 - t) * pair.z_gt + t * noise
    noise_pred = torch.randn(pair.z_gt.shape, requires_grad=True)
    handed = {
        "noise_pred": noise_pred, "noise": noise, "noisy_latents": torch.cat([x_t, pair.z_src], 1), "timesteps": timesteps,
        "batch": batch, "mask_multiplier": torch.ones(2, 1, 1, 1), "prior_pred": None,
    }  # fmt: skip
    loss = trainer.calculate_loss(**handed)
    plain = SDTrainer.calculate_loss(trainer, **handed)
    constant = [torch.cat(p) for p in zip(*(names["constants"](pair.before[i : i + 1], pair.after[i : i + 1], pair.encode) for i in range(2)))]  # fmt: skip
    expected = names["edit_loss"](x_t, timesteps / 1000, noise_pred, pair.z_gt, pair.z_src, *constant)
    torch.testing.assert_close(loss - plain, expected[0] / 2, rtol=1e-3, atol=1e-5)
    (loss - plain).backward()
    assert noise_pred.grad[0].abs().sum() > 0 and noise_pred.grad[1].abs().sum() == 0

    trainer.calculate_loss(**handed)
    assert encoded == [4, 4]  # the second time nothing is made again
    without = handed | {"noisy_latents": x_t}
    assert torch.equal(trainer.calculate_loss(**without), plain)

    # One pair of two is wrong: it is named, once, and the other teaches what it did.
    for path, control, why in (
        ("unedited.png", pair.after, "show no edit that a mask could be estimated from"),
        ("small.png", pair.before[:, 8:, 8:], f"its control picture has {side - 8}×{side - 8} pixels, the picture itself {side}×{side}"),
        ("missing.png", None, "it has no control picture"),
    ):  # fmt: skip
        items[1].path = path
        controls = [batch_control[0], None if control is None else control[1].movedim(-1, 0)]
        batch.control_tensor = controls
        capsys.readouterr()
        for told in (1, 0):
            loss = trainer.calculate_loss(**handed)
            torch.testing.assert_close(loss - plain, expected[0] / 2, rtol=1e-3, atol=1e-5)
            said = capsys.readouterr().out
            assert said.count(path) == told and (why in said) == bool(told)
    items[0].path, batch.control_tensor = "none.png", None
    assert torch.equal(trainer.calculate_loss(**handed), plain)
    items[0].path, items[1].path, batch.control_tensor = "0.png", "1.png", batch_control
    with pytest.raises(ValueError, match="t: expected 0…1, got up to 950"):
        names["edit_loss"](x_t, timesteps, noise_pred, pair.z_gt, pair.z_src, *constant)
    batch.tensor = None
    with pytest.raises(ValueError, match="load_image_when_caching_latents"):
        trainer.calculate_loss(**handed)

    (extension,) = run(extension_code, {})["AI_TOOLKIT_EXTENSIONS"]
    assert extension.uid == "editloss_trainer" and f"type: '{extension.uid}'" in PAGE
