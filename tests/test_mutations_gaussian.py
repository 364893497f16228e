"The algebra of posteriors against numpy, scipy and torch.distributions: every number once, each in another way than in the package."
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from pcvae.gaussian import LOG_2PI, DiagGaussian, log_aggregate, logsumexp_safe, pairwise_log_prob


def gen(seed=0): return torch.Generator().manual_seed(seed)
def draw(n=5, d=3, seed=0): return DiagGaussian(torch.randn(n, d, generator=gen(seed), dtype=torch.float64) + 1.5, 0.7 * torch.randn(n, d, generator=gen(seed + 9), dtype=torch.float64))


def test_constants_and_forms():
    assert LOG_2PI == pytest.approx(math.log(6.283185307179586))
    q = draw()
    assert q.shape == (5, 3) and len(q) == 5 and q[1:3].shape == (2, 3) and repr(q) == "DiagGaussian(5, 3)"
    np.testing.assert_allclose(q.var.numpy(), np.exp(q.logvar.numpy())); np.testing.assert_allclose(q.std.numpy(), np.exp(q.logvar.numpy() / 2))
    assert q.to(torch.float32).mean.dtype == torch.float32 and torch.equal(q[2].logvar, q.logvar[2])
    p = DiagGaussian.standard(4, like=q.mean)
    assert p.mean.dtype == torch.float64 and p.shape == (4,) and not p.mean.any() and not p.logvar.any() and DiagGaussian.standard(4).mean.dtype == torch.float32
    live = DiagGaussian(torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True))
    assert not live.detach().mean.requires_grad and not live.detach().logvar.requires_grad and live.rsample(torch.ones(2)).requires_grad
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"): DiagGaussian(q.mean, q.logvar[:, :2])
    assert DiagGaussian(q.mean, q.logvar[0]).shape == (5, 3)            # a common variance


def test_draws():
    q, eps = draw(), torch.randn(5, 3, generator=gen(4), dtype=torch.float64)
    np.testing.assert_allclose(q.rsample(eps).numpy(), q.mean.numpy() + np.sqrt(q.var.numpy()) * eps.numpy())
    assert torch.equal(q.sample(generator=gen(4)), q.rsample(eps))
    many = q.sample(6, gen(5))
    assert many.shape == (6, 5, 3) and torch.equal(many, q.rsample(torch.randn(6, 5, 3, generator=gen(5), dtype=torch.float64)))
    assert not DiagGaussian(torch.zeros(2, requires_grad=True), torch.zeros(2)).sample().requires_grad


def test_densities_divergences_entropy():
    q, p, z = draw(), draw(seed=3), 2 * torch.randn(5, 3, generator=gen(1), dtype=torch.float64)
    m, s = q.mean.numpy(), q.std.numpy()
    np.testing.assert_allclose(q.log_prob_dims(z).numpy(), norm.logpdf(z.numpy(), m, s)); np.testing.assert_allclose(q.log_prob(z).numpy(), norm.logpdf(z.numpy(), m, s).sum(1))
    np.testing.assert_allclose(q.entropy().numpy(), norm.entropy(m, s))
    torch.testing.assert_close(q.kl(p), torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(p.mean, p.std)))
    grid = np.linspace(-12, 15, 40_001); a, b = norm.logpdf(grid, m[0, 0], s[0, 0]), norm.logpdf(grid, float(p.mean[0, 0]), float(p.std[0, 0]))
    assert float(q.kl(p)[0, 0]) == pytest.approx(np.trapezoid(np.exp(a) * (a - b), grid), abs=1e-8)
    tiny = DiagGaussian(torch.zeros(1), torch.tensor([1e-4]))
    assert float(tiny.kl(DiagGaussian.standard(1))) == pytest.approx(0.25e-8, rel=1e-3)         # float32 keeps a KL of 1e-9


@pytest.mark.parametrize("offset", [0., 1e4])
def test_pairs(offset):
    q = draw(7); q = DiagGaussian(q.mean + offset, q.logvar); z = q.sample(generator=gen(2))[:4] + 0.3
    expected = norm.logpdf(z.numpy()[:, None], q.mean.numpy()[None], q.std.numpy()[None]).sum(-1)
    np.testing.assert_allclose(pairwise_log_prob(z, q).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(pairwise_log_prob(z.float(), q.to(torch.float32)).numpy(), expected, atol=2e-2 if offset else 1e-4)
    for block in (320_000, 15, 1): np.testing.assert_allclose(log_aggregate(z, q, block=block).numpy(), logsumexp(expected, 1) - math.log(7))
    assert not log_aggregate(z, DiagGaussian(q.mean.requires_grad_(), q.logvar)).requires_grad
    assert pairwise_log_prob(z, DiagGaussian(q.mean.requires_grad_(), q.logvar)).requires_grad


def test_gradient_of_pairs():
    "The centre is a constant: the gradient is that of the plain formula."
    q, z = draw(6), draw(6, seed=5).mean
    def slope(f):
        mean, logvar = q.mean.clone().requires_grad_(), q.logvar.clone().requires_grad_()
        f(DiagGaussian(mean, logvar)).logsumexp(1).sum().backward()
        return mean.grad, logvar.grad
    plain = lambda q: q.log_prob(z[:, None])
    torch.testing.assert_close(slope(lambda q: pairwise_log_prob(z, q)), slope(plain))


def test_log_of_a_sum():
    a = 30 * torch.randn(4, 5, 6, generator=gen(3), dtype=torch.float64)
    for dim in (-1, 0, 1): np.testing.assert_allclose(logsumexp_safe(a, dim).numpy(), logsumexp(a.numpy(), dim))
    np.testing.assert_allclose(logsumexp_safe(a).numpy(), logsumexp(a.numpy(), -1))
    kept = a.clone(); logsumexp_safe(a); assert torch.equal(a, kept)                            # not overwritten unless asked to be
    np.testing.assert_allclose(logsumexp_safe(a, inplace=True).numpy(), logsumexp(kept.numpy(), -1)); assert not torch.equal(a, kept)
    far = torch.tensor([0., -60., -79.], dtype=torch.float64)                                   # still above the clamp
    assert float(logsumexp_safe(far[[1, 2]])) == pytest.approx(-60 + math.log1p(math.exp(-19)), abs=1e-14)
    wide = torch.full((4,), -1e4); wide[0] = 7.
    assert float(logsumexp_safe(wide)) == 7. and float(logsumexp_safe(torch.full((8,), -1e5))) == pytest.approx(-1e5 + math.log(8))
    wide = torch.tensor([0., -200.], dtype=torch.float64)                                       # the clamp itself: e^-80 in place of e^-200
    assert float(logsumexp_safe(torch.stack([wide, wide - 300])).max()) == 0
