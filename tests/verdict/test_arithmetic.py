"""The arithmetic below the judge, beside torch's own and beside float64."""

import pytest
import torch
from torch.nn import functional as F

from editloss_core.masks import box_mean, mean_pool, oklab
from editloss_core.verdict.alignment import _normal
from editloss_core.verdict.measures import _colour_balance
from editloss_core.verdict.regions import AT_A_TIME, _nearest


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 3, 64, 48), (2, 1, 31, 50), (1, 3, 5, 4)])
@pytest.mark.parametrize(("side", "stride"), [(2, 2), (3, 1), (3, 3), (4, 4)])
def test_pools_are_torchs_to_the_last_bit(size, side, stride):
    x = noise(*size)
    kept = x.clone()
    assert torch.equal(mean_pool(x, side, stride), F.avg_pool2d(x, side, stride))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("size", [(1, 3, 40, 56), (1, 1, 17, 31)])
@pytest.mark.parametrize("step", [2, 3])
def test_a_box_mean_with_a_step_is_some_of_all(size, step):
    x = noise(*size)
    assert torch.equal(box_mean(x, 9, step), box_mean(x, 9)[..., ::step, ::step])


def test_oklab_is_ottossons_to_six_digits():
    codes = torch.arange(256).double() / 255
    picture = torch.stack(torch.meshgrid(codes[::5], codes[::5], codes[::5], indexing="ij")).view(1, 3, 52, -1)
    assert (oklab(picture.float()).double() - oklab(picture)).abs().max() < 2e-6
    white, red = (oklab(torch.tensor(c).view(1, 3, 1, 1)).flatten() for c in ([1.0, 1.0, 1.0], [1.0, 0.0, 0.0]))
    assert torch.allclose(white, torch.tensor([1.0, 0.0, 0.0]), atol=2e-4)
    # Ottosson 2020 gives (0.628, 0.225, 0.126)
    assert torch.allclose(red, torch.tensor([0.628, 0.225, 0.126]), atol=1e-3)


@pytest.mark.parametrize("affine", [False, True])
def test_normal_equations_are_those_of_the_jacobian(affine):
    n = 200
    u, v, r = (noise(n, seed=k).double() - 0.5 for k in range(3))
    slopes, residual = noise(2, 3, n, seed=3).double() - 0.5, noise(3, n, seed=4).double() - 0.5
    zero, one = torch.zeros(n).double(), torch.ones(n).double()
    along_x = [one, zero, u, v, zero, zero] if affine else [one, zero, u, -v]
    along_y = [zero, one, zero, zero, u, v] if affine else [zero, one, v, u]
    jacobian = slopes[0][None] * torch.stack(along_x)[:, None] + slopes[1][None] * torch.stack(along_y)[:, None]
    gram = torch.einsum("pcn,qcn,n->pq", jacobian, jacobian, r)
    towards = torch.einsum("pcn,cn,n->p", jacobian, residual, r)
    moments = torch.stack([one, u, v, u * u, u * v, v * v], 1)
    x, y = slopes
    products = torch.stack([p.sum(0) for p in (x * x, x * y, y * y, x * residual, y * residual)])
    found = _normal((products * r @ moments).float(), affine)
    assert torch.allclose(found[0].double(), gram, atol=1e-4)
    assert torch.allclose(found[1].double(), towards, atol=1e-4)


def test_the_nearest_patch_does_not_depend_on_how_many_are_asked_at_a_time():
    patches, known = noise(3 * AT_A_TIME + 5, 77), noise(300, 77, seed=1)
    wanted = torch.cdist(patches.double(), known.double()).square().amin(1)
    assert torch.allclose(_nearest(patches, known).double(), wanted, atol=1e-4)


def test_a_camera_s_gain_and_offset_are_found_beside_an_edit():
    s = noise(1, 3, 64, 64)
    x = (s - torch.tensor([0.02, -0.03, 0.0]).view(1, 3, 1, 1)) / torch.tensor([1.1, 0.9, 1.0]).view(1, 3, 1, 1)
    outside = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    outside[..., 20:40, 20:40] = False
    x[..., 20:40, 20:40] = 0.5
    gain, offset, left = _colour_balance(x, s, outside)
    assert torch.allclose(gain.flatten(), torch.tensor([1.1, 0.9, 1.0]), atol=2e-3)
    assert torch.allclose(offset.flatten(), torch.tensor([0.02, -0.03, 0.0]), atol=2e-3)
    assert left < 1e-3
