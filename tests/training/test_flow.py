"""Noise levels, one-step estimates, losses and the sampler, against formulas and other people's distributions."""

import math

import pytest
import torch
from scipy import stats

from editloss_core.models.kontext import KONTEXT
from editloss_core.training.flow import (
    Timesteps,
    add_noise,
    estimate,
    estimate_weights,
    generator_for,
    velocity_loss,
)

COUNT = 20_000


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(count=COUNT, tokens=256, seed=0, **options):
    return Timesteps(**options).draw(count, KONTEXT.mu(tokens), torch.Generator().manual_seed(seed))


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_the_true_velocity_gives_the_picture_back_at_every_noise_level(t):
    x0, noise = latents(3, 4, 5, 6), latents(3, 4, 5, 6, seed=1)
    level = torch.full((3,), t)
    x_t = add_noise(x0, noise, level)
    torch.testing.assert_close(x_t, (1 - t) * x0 + t * noise)
    torch.testing.assert_close(estimate(x_t, level, noise - x0), x0, atol=2e-6, rtol=0)


def test_noise_levels_belong_to_their_samples():
    x0, noise, t = latents(3, 4, 5, 6), latents(3, 4, 5, 6, seed=1), torch.tensor([0.0, 0.25, 1.0])
    x_t = add_noise(x0, noise, t)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])


def test_the_error_of_the_estimate_is_t_times_that_of_the_velocity():
    x0, noise, error = latents(3, 4, 5, 6), latents(3, 4, 5, 6, seed=1), latents(3, 4, 5, 6, seed=2)
    t = torch.tensor([0.1, 0.5, 1.0])
    found = estimate(add_noise(x0, noise, t), t, noise - x0 + error)
    torch.testing.assert_close(found - x0, -t[:, None, None, None] * error, atol=2e-6, rtol=1e-4)


# --- distributions ----------------------------------------------------------------------------------------------------


def test_uniform():
    assert stats.kstest(draw(kind="uniform"), stats.uniform().cdf).pvalue > 0.01


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-1.0, 0.5), (0.7, 2.0)])
def test_logit_normal_has_the_logits_of_a_normal(mean, std):
    logits = torch.logit(draw(kind="logit_normal", mean=mean, std=std).double())
    assert stats.kstest(logits, stats.norm(mean, std).cdf).pvalue > 0.01


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (4096, 1.15), (1024, 0.63)])
def test_shifted_raises_the_mean_by_flux_s_straight_line(tokens, mu):
    assert KONTEXT.mu(tokens) == pytest.approx(mu)
    logits = torch.logit(draw(kind="shifted", mean=0.2, tokens=tokens).double())
    assert stats.kstest(logits, stats.norm(0.2 + mu, 1.0).cdf).pvalue > 0.01


def test_only_shifted_looks_at_the_size():
    for kind in ("uniform", "logit_normal"):
        assert torch.equal(draw(50, 256, kind=kind), draw(50, 4096, kind=kind))
    assert (draw(50, 4096, kind="shifted") > draw(50, 256, kind="shifted")).all()


@pytest.mark.parametrize(
    "mean, std, low, high",
    [(0.0, 1.0, 0.3, 0.6), (-1.0, 1.0, 0.9, 1.0), (1.0, 0.5, 0.0, 0.2), (0.0, 0.1, 0.8, 0.9), (-10.0, 1.0, 0.9, 1.0)],
)
def test_a_range_cuts_the_distribution_off_and_does_not_clamp_it(mean, std, low, high):
    """The conditional distribution inside the range, also far out in either tail."""
    t = draw(kind="logit_normal", mean=mean, std=std, minimum=low, maximum=high)
    assert low <= t.min() and t.max() <= high
    a, b = ((float(torch.logit(torch.tensor(v, dtype=torch.float64))) - mean) / std for v in (low, high))
    # scipy is more exact in the left tail: mirror what lies in the right one.
    logits = (torch.logit(t.double()) - mean) / std
    mirrored = (-logits, -b, -a) if a > 0 else (logits, a, b)
    assert stats.kstest(mirrored[0], stats.truncnorm(*mirrored[1:]).cdf).pvalue > 0.01


def test_a_range_of_the_uniform_distribution():
    t = draw(kind="uniform", minimum=0.3, maximum=0.4)
    assert stats.kstest(t, stats.uniform(0.3, 0.1).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "cosine"}, "timesteps: expected one of 'logit_normal', 'uniform', 'shifted', got 'cosine'"),
        ({"std": 0.0}, "timestep std: expected a number > 0"),
        ({"mean": math.nan}, "timestep mean: expected a number"),
        ({"minimum": -0.1}, "minimum t: expected a number >= 0"),
        ({"minimum": 0.5, "maximum": 0.5}, "minimum < maximum ≤ 1, got minimum 0.5, maximum 0.5"),
        ({"maximum": 1.1}, "maximum ≤ 1, got minimum 0, maximum 1.1"),
        ({"maximum": math.nan}, "maximum"),
        ({"maximum": "1"}, "maximum"),
    ],
)
def test_bad_timesteps(options, message):
    with pytest.raises(ValueError, match=message):
        Timesteps(**options)


def test_tokens_are_patches_of_latents():
    assert KONTEXT.tokens(torch.zeros(1, 16, 128, 128)) == 4096 and KONTEXT.tokens(torch.zeros(1, 16, 5, 3)) == 6


# --- losses -----------------------------------------------------------------------------------------------------------


def looped(predicted, target, mask, edit_weight):
    values = []
    for b in range(len(predicted)):
        total = weight = 0.0
        for y in range(predicted.shape[2]):
            for x in range(predicted.shape[3]):
                w = 1.0 if mask is None else edit_weight * float(mask[b, y, x]) + (1 - float(mask[b, y, x]))
                error = sum(float(predicted[b, c, y, x] - target[b, c, y, x]) ** 2 for c in range(predicted.shape[1]))
                total, weight = total + w * error / predicted.shape[1], weight + w
        values.append(total / weight)
    return torch.tensor(values)


@pytest.mark.parametrize("edit_weight", [1.0, 3.0, 0.25])
@pytest.mark.parametrize("masked", ["none", "soft", "zero in one sample", "full"])
def test_the_velocity_loss_equals_a_loop(edit_weight, masked):
    a, b = latents(3, 2, 4, 5), latents(3, 2, 4, 5, seed=1)
    mask = None if masked == "none" else torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(2))
    if masked == "zero in one sample":
        mask[1] = 0.0
    elif masked == "full":
        mask = torch.ones_like(mask)
    found = velocity_loss(a, b, mask, edit_weight)
    torch.testing.assert_close(found, looped(a, b, mask, edit_weight), rtol=1e-5, atol=1e-6)
    if masked == "full":
        torch.testing.assert_close(found, velocity_loss(a, b))


def test_the_velocity_loss_is_float32_and_differentiable():
    a = latents(2, 2, 4, 4).bfloat16().requires_grad_()
    loss = velocity_loss(a, latents(2, 2, 4, 4, seed=1), torch.ones(2, 4, 4), 2.0)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and a.grad.abs().sum() > 0


def test_weights_of_estimates():
    t = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.5, 1.0])
    assert torch.equal(estimate_weights(t), torch.ones(6))
    torch.testing.assert_close(
        estimate_weights(t, "inverse_square"), torch.tensor([100.0, 100.0, 100.0, 25.0, 4.0, 1.0])
    )
    torch.testing.assert_close(estimate_weights(t, "inverse_square", 9.0), torch.tensor([9.0, 9, 9, 9, 4, 1]))
    with pytest.raises(ValueError, match="weighting: expected one of"):
        estimate_weights(t, "snr")
    with pytest.raises(ValueError, match="cap: expected a number > 0"):
        estimate_weights(t, "inverse_square", 0.0)


def test_the_second_weighting_counts_every_noise_level_as_the_velocity_loss_does():
    """Squared error of x̂0 over max(t, 0.1)² = squared error of the velocity."""
    x0, noise, v = latents(4, 2, 4, 4), latents(4, 2, 4, 4, seed=1), latents(4, 2, 4, 4, seed=2)
    t = torch.tensor([0.1, 0.3, 0.6, 1.0])
    on_estimate = (estimate(add_noise(x0, noise, t), t, v) - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(on_estimate * estimate_weights(t, "inverse_square"), velocity_loss(v, noise - x0))


# --- sampler ----------------------------------------------------------------------------------------------------------


class Field:
    """A velocity field v(x, t) as a denoiser, which remembers its calls."""

    def __init__(self, v):
        self.v, self.times, self.seen = v, [], []

    def __call__(self, x_t, t, references, conditioning):
        assert t.shape == (len(x_t),) and t.dtype == x_t.dtype == torch.float32
        self.times.append(t[0].item())
        self.seen.append((references, conditioning))
        return self.v(x_t, t[:, None, None, None])


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_exact_field_of_one_picture_leads_to_it_in_any_number_of_steps(steps):
    x0, noise = latents(2, 3, 8, 8), latents(2, 3, 8, 8, seed=1)
    found = KONTEXT.sample(Field(lambda x, t: (x - x0) / t), noise, [x0], ["a", "b"], steps)
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)


def test_a_linear_equation_converges_to_its_solution_at_first_order():
    """dx/dt = a·x from t = 1 to 0: x(0) = x(1)·exp(−a)."""
    noise, a = latents(1, 2, 4, 4), 0.8
    errors = []
    for steps in (20, 40, 80):
        found = KONTEXT.sample(Field(lambda x, t: a * x), noise, [], [None], steps)
        errors.append((found - noise * math.exp(-a)).abs().max().item())
    assert errors[2] < 0.02 and errors[0] / errors[1] == pytest.approx(2, rel=0.1) == errors[1] / errors[2]


@pytest.mark.parametrize("side, mu", [(32, 0.5), (128, 1.15)])
def test_the_schedule_is_flux_s(side, mu):
    """t' = exp(μ) / (exp(μ) + 1/t − 1), at 256 and 4096 tokens."""
    field, told = Field(lambda x, t: x), []
    KONTEXT.sample(field, torch.zeros(1, 1, side, side), [1], [2], 4, progress=lambda *at: told.append(at))
    expected = [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in (1.0, 0.75, 0.5, 0.25)]
    assert field.times == pytest.approx(expected, rel=1e-6)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] and field.seen == [([1], [2])] * 4


def test_sampling_leaves_no_graph_and_the_noise_as_it_was():
    noise, weight = latents(1, 2, 4, 4), torch.ones((), requires_grad=True)
    kept = noise.clone()
    assert not KONTEXT.sample(Field(lambda x, t: weight * x), noise, [], [None], 2).requires_grad
    assert torch.equal(noise, kept)


# --- randomness -------------------------------------------------------------------------------------------------------


def test_generators_depend_on_every_part_of_their_key_and_on_nothing_else():
    keys = [(0, "training", 1), (0, "training", 2), (1, "training", 1), (0, "dropout", 1), (0, "training", "1"),
            (0, "training"), (0, "train", "ing", 1)]  # fmt: skip
    first = [torch.rand(4, generator=generator_for(*key)).tolist() for key in keys]
    torch.manual_seed(5)
    assert first == [torch.rand(4, generator=generator_for(*key)).tolist() for key in keys]
    assert len({tuple(values) for values in first}) == len(keys)


def test_generators_of_neighbouring_steps_are_independent():
    draws = torch.stack([torch.rand(200, generator=generator_for(0, "training", i)) for i in range(200)])
    assert stats.kstest(draws[:, 0], stats.uniform().cdf).pvalue > 0.01
    correlation = torch.corrcoef(draws) - torch.eye(200)
    assert correlation.abs().max() < 0.4  # 5.6 standard deviations of 200 draws


def test_global_randomness_is_not_touched():
    state = torch.random.get_rng_state()
    draw(10)
    torch.rand(3, generator=generator_for(1))
    assert torch.equal(state, torch.random.get_rng_state())
