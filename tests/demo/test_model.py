"""The weights in the repository: what they load as, and what the autoencoder keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from editloss_core.demo.judge import judge
from editloss_core.demo.model import AUTOENCODER, DIFFUSION, FLUX, Autoencoder, load_autoencoder, load_diffusion
from editloss_core.demo.scenes import HELD_OUT, TASKS, draw, stool_pairs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "demo_model"))
import train_small_kontext as train
from train_autoencoder import principal_components, set_encoder


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    """Without the blocks of zeros, which change nothing but the time."""
    model = Autoencoder()
    model.load_state_dict({name: value.float() for name, value in load_file(AUTOENCODER).items()})
    return model.eval().requires_grad_(False)


def pictures(examples) -> torch.Tensor:
    return torch.stack([example.after for example in examples])


def test_files_are_small_and_half_precision():
    assert AUTOENCODER.stat().st_size + DIFFUSION.stat().st_size < 10_000_000
    for path in (AUTOENCODER, DIFFUSION):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}


def test_the_diffusion_model_has_the_configured_sizes():
    state = load_diffusion()
    assert all(value.isfinite().all() for value in state.values())
    assert state["img_in.weight"].shape == (FLUX["hidden_size"], FLUX["in_channels"] * FLUX["patch_size"] ** 2)
    assert state["txt_in.weight"].shape[1] == FLUX["context_in_dim"]
    assert state["vector_in.in_layer.weight"].shape[1] == FLUX["vec_in_dim"]
    blocks = {name.split(".")[1] for name in state if name.startswith("single_blocks.")}
    assert len(blocks) == FLUX["depth_single_blocks"]


def test_blocks_that_are_not_in_the_file_are_relus(autoencoder):
    stored = load_file(AUTOENCODER)
    whole = Autoencoder(whole=True).requires_grad_(False)
    whole.load_state_dict(load_autoencoder())
    assert set(stored) == set(autoencoder.state_dict()) < set(whole.state_dict())
    x = pictures([draw(HELD_OUT)])
    z = whole.encode(x)
    torch.testing.assert_close(autoencoder.encode(x), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(autoencoder.decode(z), whole.decode(z), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_latents_have_about_unit_variance_and_pass_the_decoders_clamp(autoencoder):
    z = autoencoder.encode(pictures([draw(HELD_OUT + i) for i in range(24)]))
    assert z.shape == (24, 16, 16, 16)
    assert 0.8 < z.std() < 1.25
    assert (z * autoencoder.vae_scale / 0.3611).abs().quantile(0.99) < 1.5  # 3 · tanh(z / 3) loses 8 % there


@pytest.mark.slow
def test_round_trip_keeps_the_picture(autoencoder):
    x = pictures([draw(HELD_OUT + i) for i in range(24)])
    error = (autoencoder.decode(autoencoder.encode(x)) - x).square().mean((1, 2, 3))
    assert (-10 * error.log10()).mean() > 28  # dB


@pytest.mark.slow
@pytest.mark.parametrize("task", [*TASKS, "stool"])
def test_round_trip_of_the_target_is_good(autoencoder, task):
    """The stool too, which the autoencoder's training never saw."""
    examples = stool_pairs(20, seed=1) if task == "stool" else [draw(HELD_OUT + i, task) for i in range(20)]
    verdicts = judge(autoencoder.decode(autoencoder.encode(pictures(examples))), examples)
    assert sum(v.verdict == "good" for v in verdicts) >= 19


def test_encoder_is_the_linear_map_that_it_was_given():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 32, 24, 3, generator=generator)
    matrix, bias = torch.randn(192, 16, generator=generator), torch.randn(16, generator=generator)
    model = Autoencoder()
    set_encoder(model, matrix, bias)
    patch = x[1, 8:16, 16:24].reshape(192)  # rows 8…15, columns 16…23: cell (1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x)[1, :, 1, 2], patch @ matrix + bias, rtol=1e-4, atol=1e-4)


def test_principal_components_are_uncorrelated_and_scaled_halfway():
    x = pictures([draw(i) for i in range(20)])
    matrix, bias = principal_components(x)
    patches = x.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3).reshape(-1, 192)
    z = patches @ matrix + bias
    assert z.mean(0).abs().max() < 1e-3
    covariance = torch.from_numpy(np.cov(z.T.numpy()))
    variance = covariance.diagonal()
    off = covariance - variance.diag()
    assert off.abs().max() < 1e-2 * variance.max()
    assert variance.mean().item() == pytest.approx(1, rel=0.02)
    assert (variance[:-1] >= variance[1:] * 0.999).all()


def test_the_base_was_taught_no_stool():
    prompts = set()
    for seed in range(200):
        pictures_of = train.group(seed)
        assert all(name != "stool" for name, _ in pictures_of)
        prompts |= {
            train.prompt(task, pictures_of[i], pictures_of[j]) for task in train.PAIRS for i, j in train.PAIRS[task]
        }
    assert len(prompts) > 50
    assert not any("stool" in prompt for prompt in prompts)


def test_pairs_of_a_group_are_the_edits_that_their_prompts_say():
    for seed in range(50):
        kinds = train.group(seed)
        for i, j in train.PAIRS["replace"]:
            assert kinds[i][0] != kinds[j][0] and kinds[i][1] == kinds[j][1]
        for i, j in train.PAIRS["recolour"]:
            assert kinds[i][0] == kinds[j][0] and kinds[i][1] != kinds[j][1]
        assert all(kinds[j][0] is None and kinds[i][0] for i, j in train.PAIRS["remove"])
        assert all(i == j for i, j in train.PAIRS["keep"])


def test_training_scenes_are_not_the_held_out_ones():
    assert train.GROUPS <= HELD_OUT
