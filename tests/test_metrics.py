"""Known answers and brute force for every metric. Each expected value is computed here, in another way than in the package."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import pcvae.metrics.samples as samples
from pcvae.metrics.samples import prdc as all_four
from pcvae.gaussian import DiagGaussian
from pcvae.metrics import (LinearGaussian, MutualInformation, PCAFeatures, active_units, activity, aggregate_kl, ap_active_units, ap_density_coverage, ap_mi,
                           ap_mi_ceiling, ap_nll, ball_counts, decoder_use_gap, density_coverage, evaluate, expected_coverage, features, fit_prior,
                           gaussian_upper, mutual_information, mutual_posterior_divergence, neg_elbo_parts, nll_ais, nll_iw, nll_iw_all, pairwise_bounds, precision_recall, real_ceiling,
                           reencoding_error, standard_error, surgery)
from pcvae.metrics.evaluate import metric_generator, some
from pcvae.metrics.information import log_others
from pcvae.metrics.likelihood import anneal, derangement, encode_all, evaluating, hmc, temperatures
from pcvae.models.vae import Bernoulli, Normal
from pcvae.priors import Mixture


def gen(seed=0): return torch.Generator().manual_seed(seed)


def linear(seed=1, widen=1., shift=0., lengths=(3., 2., 1., 0.3), f=8, dtype=torch.float64):
    W = torch.linalg.qr(torch.randn(f, len(lengths), generator=gen(seed), dtype=dtype))[0] * torch.tensor(lengths, dtype=dtype)
    return LinearGaussian(W, torch.linspace(-1, 1, f, dtype=dtype), 0.5, widen, shift)


def pool(n=40, d=3, sd=0.5, seed=2, dtype=torch.float64, spread=0.3):
    g = gen(seed)
    return DiagGaussian(torch.randn(n, d, generator=g, dtype=dtype), 2 * math.log(sd) + spread * torch.randn(n, d, generator=g, dtype=dtype))


def log_q(z, q):
    "log q_j(z_i) by the definition, [i, j], numpy."
    z, m, v = z.double().numpy(), q.mean.double().numpy(), q.logvar.double().exp().numpy()
    d = z[:, None] - m[None]
    return (-0.5 * (d * d / v + np.log(2 * np.pi * v))).sum(-1)


def np_lse(a, axis):
    m = a.max(axis, keepdims=True)
    return np.log(np.exp(a - m).sum(axis)) + m.squeeze(axis)


# ---------------------------------------------------------------- likelihood

def test_linear_gaussian_is_consistent():
    "Bayes' rule at arbitrary codes, and the exact density by numpy."
    m = linear(); x = m.sample(20, gen(1)); q = m.encode(x); z = 3 * torch.randn(20, 4, generator=gen(2), dtype=torch.float64)
    torch.testing.assert_close(m.log_prob(x, z) + m.prior.log_prob(z) - q.log_prob(z), -m.nll(x))
    cov = (m.W @ m.W.T + 0.5 * torch.eye(8)).numpy(); d = (x - m.c).numpy()
    expected = 0.5 * ((d @ np.linalg.inv(cov)) * d).sum(1) + 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]
    np.testing.assert_allclose(m.nll(x).numpy(), expected)
    poor = linear(widen=1.4, shift=0.2).encode(x)
    torch.testing.assert_close(poor.std, 1.4 * q.std); torch.testing.assert_close(poor.mean, q.mean + 0.2)


@pytest.mark.parametrize("k,chunk", [(1, 2 ** 18), (1, 1), (7, 20), (50, 100), (33, 8 * 33 * 3)])
def test_nll_exact_with_the_exact_posterior(k, chunk):
    m = linear(); x = m.sample(13, gen(1))
    torch.testing.assert_close(nll_iw(m, x, k, generator=gen(), chunk=chunk), m.nll(x), rtol=1e-9, atol=1e-9)


def test_nll_by_hand():
    "Same noise, the formula written out."
    m = linear(widen=1.3, shift=0.1); x = m.sample(5, gen(1)); q = m.encode(x)
    z = (q.mean + q.std * torch.randn(6, 5, 4, generator=gen(3), dtype=torch.float64)).numpy()
    sd, mu, W = q.std.numpy(), q.mean.numpy(), m.W.numpy()
    err = x.numpy() - z @ W.T - m.c.numpy()
    logw = (-0.5 * err ** 2 / 0.5 - 0.5 * np.log(2 * np.pi * 0.5)).sum(-1) + (-0.5 * z ** 2 - 0.5 * np.log(2 * np.pi)).sum(-1) \
        - (-0.5 * ((z - mu) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)).sum(-1)
    np.testing.assert_allclose(nll_iw(m, x, 6, generator=gen(3)).numpy(), -(np_lse(logw, 0) - np.log(6)))


def test_nll_streaming_over_samples():
    "Blocks of 16 of 64 samples see the same noise as one block, and must give the same sum."
    m = linear(widen=1.5); x = m.sample(1, gen(1))
    torch.testing.assert_close(nll_iw(m, x, 64, generator=gen(3), chunk=16 * 8), nll_iw(m, x, 64, generator=gen(3)))


def test_one_sample_is_the_elbo_and_more_samples_close_the_gap():
    m = linear(widen=1.4, shift=0.2); x = m.sample(20, gen(1)); q = m.encode(x)
    # closed form of E log p(x|z): the mean's error plus the spread of z through W
    rec = -m.log_prob(x, q.mean) + 0.5 * (q.var * (m.W ** 2).sum(0)).sum(-1) / 0.5
    neg_elbo = (rec + q.kl(m.prior).sum(-1)).mean()
    one = torch.stack([nll_iw(m, x, 1, generator=gen(s)).mean() for s in range(400)])
    assert abs(one.mean() - neg_elbo) < 4 * standard_error(one)
    by_k = [torch.stack([nll_iw(m, x, k, generator=gen(s)).mean() for s in range(20)]).mean() for k in (1, 10, 100, 1000)]
    assert by_k[0] > by_k[1] > by_k[2] > by_k[3] > m.nll(x).mean() - 0.01
    assert by_k[3] < m.nll(x).mean() + 0.05


def test_bounds_differ_in_the_prior_alone():
    m = linear(widen=1.4); x = m.sample(30, gen(1))
    m.priors = lambda: {"A": DiagGaussian(torch.full((4,), 0.5).double(), torch.full((4,), -0.3).double())}
    together = nll_iw_all(m, x, {"standard": m.prior, "A": m.priors()["A"]}, 20, generator=gen(2))
    for name in ("standard", "A"): torch.testing.assert_close(nll_iw(m, x, 20, bound=name, generator=gen(2)), together[name])
    torch.testing.assert_close(nll_iw(m, x, 20, bound=m.priors()["A"], generator=gen(2)), together["A"])
    # under prior A x is Gaussian too
    cov = m.W @ torch.diag(torch.full((4,), math.exp(-0.3)).double()) @ m.W.T + 0.5 * torch.eye(8)
    exact = -torch.distributions.MultivariateNormal(m.c + m.W @ torch.full((4,), 0.5).double(), cov).log_prob(x)
    torch.testing.assert_close(nll_iw(m, x, 5000, bound="A", generator=gen(4)), exact, rtol=0, atol=0.1)


def test_bad_bounds_and_data():
    m = linear(); x = m.sample(4, gen(1))
    with pytest.raises(ValueError, match="standard"): nll_iw(m, x, 2, bound="standrad")
    with pytest.raises(ValueError, match="fit_prior"): nll_iw(m, x, 2, bound="matched")
    with pytest.raises(ValueError, match="at least 1, got 0"): nll_iw(m, x, 0)
    x[2, 1] = float("inf")
    with pytest.raises(ValueError, match="1 of 4 items.*item 2"): nll_iw(m, x, 2)


def test_fit_prior_moments():
    m = linear(widen=1.7, shift=0.4); x = m.sample(101, gen(1)); q = m.encode(x)
    p = fit_prior(m, x, batch=17)
    np.testing.assert_allclose(p.mean.numpy(), q.mean.numpy().mean(0))
    np.testing.assert_allclose(p.var.numpy(), q.mean.numpy().var(0) + q.var.numpy().mean(0))
    better = q.kl(p).sum(-1).mean()
    for other in (m.prior, DiagGaussian(p.mean + 0.05, p.logvar), DiagGaussian(p.mean, p.logvar + 0.05), DiagGaussian(p.mean, p.logvar - 0.05)):
        assert q.kl(other).sum(-1).mean() > better           # the best diagonal Gaussian
    assert gaussian_upper(q) == pytest.approx(float(better))  # and its mean KL is the upper bound on the information


# ---------------------------------------------------------------- annealed importance sampling

def test_annealing_in_one_step_is_plain_importance_sampling():
    "From the prior, and from the encoder, with the noise that both see."
    m = linear(widen=1.3, shift=0.1); x = m.sample(6, gen(1)); q = m.encode(x)
    eps = torch.randn(7, 6, 4, generator=gen(3), dtype=torch.float64)
    for start, base in (("prior", m.prior), ("encoder", q)):
        z = base.rsample(eps)
        logw = (m.log_prob(x, z) + m.prior.log_prob(z) - base.log_prob(z)).numpy()
        a = nll_ais(m, x, steps=1, chains=7, start=start, generator=gen(3))
        np.testing.assert_allclose(a.nll.numpy(), np.log(7) - np_lse(logw, 0))
        w = np.exp(logw - logw.max(0))
        np.testing.assert_allclose(a.se.numpy(), w.std(0, ddof=1) / w.mean(0) / math.sqrt(7))
        assert (a.accepted == 0).all()


def test_annealing_finds_the_exact_likelihood():
    m = linear(); x = m.sample(20, gen(1)); exact = m.nll(x)
    a = nll_ais(m, x, steps=60, leaps=4, generator=gen(2))
    assert ((a.nll - exact).abs() < 4 * a.se + 0.05).all() and (a.nll - exact).square().mean().sqrt() < 0.5
    assert 0.55 < a.accepted.mean() < 0.9                                       # the pilot aims at 0.7
    from_posterior = nll_ais(m, x, steps=3, chains=2, start="encoder", generator=gen(3))
    torch.testing.assert_close(from_posterior.nll, exact, rtol=0, atol=1e-9)    # every weight is p(x)
    assert from_posterior.se.max() < 1e-6
    wrong = linear(widen=0.5, shift=0.5)
    assert torch.equal(nll_ais(wrong, x, steps=60, leaps=4, generator=gen(2)).nll, a.nll)       # the encoder is never asked
    assert torch.allclose(nll_ais(m, x[:7], steps=20, batch=3, generator=gen(4)).nll, exact[:7], atol=1.5)


def test_annealing_under_another_prior():
    m = linear(); x = m.sample(10, gen(1)); p = DiagGaussian(torch.full((4,), 0.5).double(), torch.full((4,), -0.3).double())
    cov = m.W @ torch.diag(p.var) @ m.W.T + 0.5 * torch.eye(8)
    exact = -torch.distributions.MultivariateNormal(m.c + m.W @ p.mean, cov).log_prob(x)
    for bound in (p, Mixture(DiagGaussian(p.mean.expand(3, 4), p.logvar.expand(3, 4)))):
        a = nll_ais(m, x, steps=40, chains=32, leaps=4, bound=bound, generator=gen(2))
        assert ((a.nll - exact).abs() < 4 * a.se + 0.05).all()


def test_estimates_of_annealing_are_unbiased():
    "E[w] = p(x) even with few steps and badly tuned moves: the mean of 400 estimates of p(x), each of two chains."
    m = linear(lengths=(1.5, 0.5), f=3); x = m.sample(4, gen(1))
    many = DiagGaussian.standard(2, like=m.W)
    for size in (0.05, 0.6, 3.):
        w, _ = anneal(m, x, many, many, torch.full((5, 4), size, dtype=torch.float64), 4000, 2, gen(5))
        ratio = (w + m.nll(x)).exp()
        assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(4000)).all()


def test_temperatures():
    b = temperatures(10)
    s = lambda v: 1 / (1 + math.exp(-v))
    assert b[0] == 0 and b[-1] == 1 and len(b) == 11 and b == sorted(b)
    assert b == pytest.approx([(s(-4 + 0.8 * t) - s(-4)) / (s(4) - s(-4)) for t in range(11)])
    assert temperatures(1) == [0, 1]


def test_a_hamiltonian_move_leaves_its_density_as_it_is():
    "Moments of a correlated Gaussian stay; the leapfrog is of second order, so tiny steps are nearly all accepted; impossible ones are not."
    cov = torch.tensor([[1., 0.8], [0.8, 2.]]).double(); target = torch.distributions.MultivariateNormal(torch.tensor([1., -1.]).double(), cov)
    z = (target.mean + torch.randn(20_000, 1, 2, generator=gen(1), dtype=torch.float64) @ torch.linalg.cholesky(cov).T)
    size = lambda s: torch.full((1,), s, dtype=torch.float64)
    g = gen(2); moved = z
    for _ in range(4): moved, ok = hmc(moved, target.log_prob, size(0.6), 3, g)
    assert 0.5 < ok.double().mean() < 0.99 and (moved != z).any(-1).double().mean() > 0.9
    torch.testing.assert_close(moved[:, 0].mean(0), target.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(moved[:, 0].T.cov(), cov, rtol=0, atol=0.08)
    rejected = [1 - float(hmc(z, target.log_prob, size(s), 3, gen(3))[1].double().mean()) for s in (0.1, 0.2, 0.4)]
    assert 0 < rejected[0] < 0.002 and rejected[1] < 0.01 and 5 < rejected[1] / rejected[0] < 16 and 5 < rejected[2] / rejected[1] < 16      # ~ step^3
    stay, ok = hmc(z, target.log_prob, size(1e6), 3, gen(4))
    assert not ok.any() and torch.equal(stay, z)
    # a move by hand
    g = gen(7); r = torch.randn(3, 1, 2, generator=g, dtype=torch.float64); u = torch.randn(3, 1, generator=g, dtype=torch.float64)
    grad = lambda z: -(z - target.mean) @ torch.linalg.inv(cov)
    half = r + 0.5 * 0.3 * grad(z[:3]); new = z[:3] + 0.3 * half; r_new = half + 0.5 * 0.3 * grad(new)
    gain = target.log_prob(new) - target.log_prob(z[:3]) + 0.5 * (r ** 2).sum(-1) - 0.5 * (r_new ** 2).sum(-1)
    out, ok = hmc(z[:3], target.log_prob, size(0.3), 1, gen(7))
    assert torch.equal(ok, torch.special.ndtr(u).log() < gain)
    torch.testing.assert_close(out, torch.where(ok[..., None], new, z[:3]))


def test_bad_annealing():
    m = linear(); x = m.sample(3, gen(1))
    with pytest.raises(ValueError, match="Did you mean 'prior'"): nll_ais(m, x, start="priors")
    for kw in (dict(steps=0), dict(leaps=0), dict(chains=1)):
        with pytest.raises(ValueError, match="at least 1 and 2 chains"): nll_ais(m, x, **kw)
    x[1, 0] = float("nan")
    with pytest.raises(ValueError, match="first: item 1"): nll_ais(m, x, steps=2, generator=gen())


class Bits(nn.Module):
    "All 64 pictures of 6 pixels, with an arbitrary network: the sum over x of exp(bound) is at most 1."
    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(6, 4), nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 6))
        for p in self.parameters(): nn.init.normal_(p, std=1.2, generator=gen(3))
    prior = DiagGaussian.standard(2)
    def encode(self, x): return DiagGaussian(*self.enc(x).chunk(2, -1))
    def decode(self, z, x=None): return Bernoulli(self.dec(z))
    def log_prob(self, x, z): return self.decode(z).log_prob(x)


def all_bits(): return ((torch.arange(64)[:, None] >> torch.arange(6)) & 1).float()


def test_no_bound_promises_more_than_one():
    m, x = Bits(), all_bits()
    for prior in (m.prior, fit_prior(m, x), DiagGaussian(torch.ones(2), torch.tensor([0.5, 2.]))):
        total = float((-nll_iw(m, x, 4000, bound=prior, generator=gen(1))).exp().sum())
        assert 0.8 < total < 1.03     # an unbiased estimate of a sum of probabilities over all x, which is 1


def test_evaluation_mode_is_used_and_put_back():
    m, x = Bits(), all_bits()
    m.train(); m.enc.eval()
    a = nll_iw(m, x, 5, generator=gen(1)); b = nll_iw(m, x, 5, generator=gen(1))
    assert torch.equal(a, b) and not a.requires_grad                    # no dropout
    assert m.training and m.dec.training and not m.enc.training         # each module as it was
    assert neg_elbo_parts(m, x, gen(1))["rec"].equal(neg_elbo_parts(m, x, gen(1))["rec"]) and m.training
    with pytest.raises(RuntimeError):
        with evaluating(m): raise RuntimeError
    assert m.training


def test_parts_of_the_elbo():
    m = linear(widen=1.2); x = m.sample(50, gen(1)); q = m.encode(x)
    m.charged = lambda x: DiagGaussian(m.encode(x).mean / 2, m.encode(x).logvar)
    parts = neg_elbo_parts(m, x, gen(4), batch=7)
    z = q.mean + q.std * torch.randn(50, 4, generator=gen(4), dtype=torch.float64)
    torch.testing.assert_close(parts["rec"], ((x - z @ m.W.T - m.c) ** 2).sum(1) + 4 * math.log(math.pi))
    torch.testing.assert_close(parts["kl_fed"], 0.5 * (q.mean ** 2 + q.var - q.logvar - 1))
    torch.testing.assert_close(parts["kl"], 0.5 * (q.mean ** 2 / 4 + q.var - q.logvar - 1))


def test_decoder_use_gap():
    for n in (2, 3, 50):
        p = derangement(n, gen(n))
        assert sorted(p.tolist()) == list(range(n)) and (p != torch.arange(n)).all()
    with pytest.raises(ValueError, match="at least 2"): derangement(1)
    m = linear(); x = m.sample(400, gen(1)); g = gen(2)
    z = m.encode(x).rsample(torch.randn(400, 4, generator=g, dtype=torch.float64)); p = derangement(400, g)
    assert decoder_use_gap(m, x, gen(2), batch=90) == pytest.approx(float((m.log_prob(x, z) - m.log_prob(x, z[p])).mean()))
    # closed form: another item's code adds E|W(z - z')|^2 / 2s^2 with independent z, z' of unit variance
    assert decoder_use_gap(m, x, gen(2)) == pytest.approx(2 * float((m.W ** 2).sum()), rel=0.15)
    m.decode = lambda z, x=None: Normal(torch.zeros(*z.shape[:-1], 8).double(), torch.tensor(0.5).double())
    assert decoder_use_gap(m, x, gen(2)) == 0


def test_standard_error():
    v = torch.tensor([1., 2., 3., 6.])
    assert standard_error(v) == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)


# ---------------------------------------------------------------- information

@pytest.mark.parametrize("n,d,sd", [(2, 1, 1.), (7, 3, 0.2), (60, 5, 0.7), (33, 2, 3.)])
def test_mutual_information_by_brute_force(n, d, sd):
    q = pool(n, d, sd); z = q.sample(generator=gen(5)); l = log_q(z, q); own = l.diagonal()
    value = (own - np_lse(l, 1) + np.log(n)).mean()
    off = l.copy(); np.fill_diagonal(off, -np.inf)
    loo = (own - np_lse(off, 1) + np.log(n - 1)).mean()
    v = q.mean.numpy().var(0) + q.var.numpy().mean(0)
    u = 0.5 * (np.log(v) - q.logvar.numpy().mean(0)).sum()
    r = mutual_information(q, z=z)
    assert r.value == pytest.approx(value, abs=1e-9) and r.ceiling == pytest.approx(np.log(n)) and r.upper == pytest.approx(min(loo, u), abs=1e-9)
    assert gaussian_upper(q) == pytest.approx(u)
    assert r.value <= loo + 1e-12 and r.saturated == (value > np.log(n) - 0.5)
    np.testing.assert_allclose(log_others(z, q, block=50).numpy(), np_lse(off, 1))


def test_upper_bound_of_two_clumps():
    "Two clumps far apart: ln 2 nats. Leave-one-out says so, the Gaussian bound cannot."
    q = DiagGaussian(10. * (torch.arange(40.).double() % 2)[:, None], torch.zeros(40, 1).double()); z = q.sample(generator=gen(1))
    off = log_q(z, q); own = off.diagonal().copy(); np.fill_diagonal(off, -np.inf)
    assert gaussian_upper(q) == pytest.approx(0.5 * math.log(26))
    assert mutual_information(q, z=z).upper == pytest.approx((own - np_lse(off, 1)).mean() + math.log(39))
    assert mutual_information(q, z=z).value == pytest.approx(math.log(2), abs=0.01)


def test_own_noise_is_used_once():
    q = pool(); z = q.mean + q.std * torch.randn(40, 3, generator=gen(7), dtype=torch.float64)
    assert mutual_information(q, generator=gen(7)).value == pytest.approx(mutual_information(q, z=z).value)


def test_identity_with_the_self_critic():
    "Paired MI of a batch = ln B - contrastive loss, same codes."
    q = pool(50, 4); z = q.sample(generator=gen(1)); l = log_q(z, q)
    ce = -(l.diagonal() - np_lse(l, 1)).mean()
    assert mutual_information(q, z=z).value == pytest.approx(math.log(50) - ce)


def test_ends_of_the_range():
    collapsed = DiagGaussian(torch.zeros(300, 6), torch.zeros(300, 6))
    r = mutual_information(collapsed, generator=gen())
    assert abs(r.value) < 1e-6 and abs(r.upper) < 1e-6 and not r.saturated
    far = DiagGaussian(100 * torch.randn(300, 6, generator=gen()), torch.zeros(300, 6))
    assert mutual_information(far, generator=gen()).value == pytest.approx(math.log(300), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_never_above_the_ceiling_even_in_single_precision(seed):
    q = DiagGaussian(torch.randn(200, 16, generator=gen(seed)) + 20, torch.full((200, 16), -9.))
    r = mutual_information(q, generator=gen(seed))
    assert r.value <= r.ceiling and r.saturated


def test_saturation_mark_is_half_a_nat():
    "Items far apart, a share of them in identical pairs: value = ln N - share * ln 2."
    def pairs(share, n=50):
        m = 1e3 * torch.arange(n).double()
        for i in range(0, int(share * n), 2): m[i + 1] = m[i]
        return mutual_information(DiagGaussian(m[:, None], torch.zeros(n, 1).double()), generator=gen())
    a, b = pairs(0.68), pairs(0.76)       # 0.471 and 0.527 nats below
    assert a.value == pytest.approx(math.log(50) - 0.68 * math.log(2)) and b.value == pytest.approx(math.log(50) - 0.76 * math.log(2))
    assert a.saturated and not b.saturated


@pytest.mark.parametrize("sd", [0.08, 0.45, 0.7, 2.])
def test_single_precision_equals_double(sd):
    "From saturated, through the slow range of exp, to overlapping posteriors; data far from the origin."
    q = pool(2000, 32, sd, dtype=torch.float32, spread=0.1); q = DiagGaussian(q.mean + 5, q.logvar)
    z = q.sample(generator=gen(3))
    single, double = mutual_information(q, z=z), mutual_information(q.to(torch.float64), z=z.double())
    assert single.value == pytest.approx(double.value, abs=1e-5)
    assert single.upper == pytest.approx(double.upper, rel=1e-5, abs=1e-4)


def test_gaussian_channel_is_bracketed():
    "Known information of a channel: value below, upper above, both near while there is room."
    for s in (0.3, 0.5, 1.0):
        q = DiagGaussian(s * torch.randn(3000, 8, generator=gen(1)), torch.zeros(3000, 8)); truth = 4 * math.log(1 + s * s)
        r = mutual_information(q, generator=gen(2))
        assert r.value - 0.1 < truth < r.upper + 0.1 and r.upper - r.value < 0.3


def quadrature(q, prior):
    "Exact MI and marginal KL of a one-dimensional pool by summing over a grid."
    z = torch.linspace(-12, 12, 48_001, dtype=torch.float64)[:, None]; dz = 24 / 48_000
    l = torch.as_tensor(log_q(z, q)); agg = torch.logsumexp(l, 1) - math.log(len(q))
    mi = float((l.exp() * (l - agg[:, None])).sum(0).mean() * dz)
    return mi, float((agg.exp() * (agg - prior.log_prob(z))).sum() * dz)


def test_surgery_against_quadrature():
    q = pool(30, 1, 0.6); prior = DiagGaussian(torch.tensor([0.2]).double(), torch.tensor([0.3]).double())
    mi, marginal = quadrature(q, prior)
    kl = float(q.kl(prior).sum(-1).mean())
    assert mi + marginal == pytest.approx(kl, abs=1e-6)
    many = DiagGaussian(q.mean.repeat(300, 1), q.logvar.repeat(300, 1))      # 300 codes for each item: same mixture
    s = surgery(many, prior, generator=gen(1))
    assert s["kl"] == pytest.approx(kl) and s["mi"] == pytest.approx(mi, abs=0.03) and s["marginal_kl"] == pytest.approx(marginal, abs=0.03)
    z = q.sample(generator=gen(2)); l = log_q(z, q)
    expected = (np_lse(l, 1) - np.log(30) - prior.log_prob(z).numpy()).mean()
    assert aggregate_kl(q, prior, z=z) == pytest.approx(expected)
    same = surgery(DiagGaussian(torch.zeros(9, 2), torch.zeros(9, 2)), DiagGaussian.standard(2), generator=gen())
    assert all(abs(v) < 1e-6 for v in same.values())


def test_marginal_kl_of_a_mixture_prior_against_quadrature():
    "A prior of three components in one dimension, and the aggregate itself."
    q = pool(30, 1, 0.6); prior = Mixture(DiagGaussian(torch.tensor([[-1.], [0.3], [2.]]), torch.tensor([[-0.5], [0.2], [-1.]])))
    grid = quadrature(q, SimpleNamespace(log_prob=lambda z: torch.as_tensor(np_lse(log_q(z, prior.parts), 1) - np.log(3))))
    many = DiagGaussian(q.mean.repeat(300, 1), q.logvar.repeat(300, 1))
    s = surgery(many, prior, generator=gen(1))
    assert s["marginal_kl"] == pytest.approx(grid[1], abs=0.03) and s["mi"] == pytest.approx(grid[0], abs=0.03)
    assert s["kl"] == pytest.approx(s["mi"] + s["marginal_kl"], abs=1e-9)                # the same codes in all three
    z = q.sample(generator=gen(2))
    expected = (np_lse(log_q(z, q), 1) - np.log(30) - (np_lse(log_q(z, prior.parts), 1) - np.log(3))).mean()
    for dtype in (torch.float32, torch.float64): assert aggregate_kl(q.to(dtype), prior, z=z.to(dtype)) == pytest.approx(expected, abs=1e-5)
    assert aggregate_kl(q, Mixture(q), z=z) == pytest.approx(0, abs=1e-9)                # VampPrior with every item as a pseudo-input
    assert aggregate_kl(q, Mixture(q[:1]), z=z) == pytest.approx(aggregate_kl(q, q[0], z=z), abs=1e-6)


def test_several_codes_for_each_item():
    "The mean of the single estimates; a standard error that sees the codes and not the pool."
    q = pool(40, 3, 0.5); z = q.sample(6, generator=gen(5))
    single, together = [mutual_information(q, z=v) for v in z], mutual_information(q, z=z)
    assert together.value == pytest.approx(np.mean([r.value for r in single])) and math.isnan(single[0].se)
    l = np.stack([log_q(v, q) for v in z])
    terms = np.stack([a.diagonal() - np_lse(a, 1) for a in l])
    assert together.se == pytest.approx(math.sqrt(terms.var(0, ddof=1).mean() / (40 * 6)))
    off = l.copy(); off[:, np.arange(40), np.arange(40)] = -np.inf
    loo = np.mean([(a.diagonal() - np_lse(b, 1)).mean() for a, b in zip(l, off)]) + np.log(39)
    assert together.upper == pytest.approx(min(loo, gaussian_upper(q)))
    assert mutual_information(q, codes=2, generator=gen(6)).value != mutual_information(q, generator=gen(6)).value
    runs = torch.tensor([mutual_information(q, codes=4, generator=gen(100 + s)).value for s in range(300)])
    assert float(runs.std()) == pytest.approx(mutual_information(q, codes=50, generator=gen(9)).se * math.sqrt(50 / 4), rel=0.15)
    exact = quadrature(pool(25, 1, 0.6), DiagGaussian.standard(1))[0]
    many = mutual_information(pool(25, 1, 0.6), codes=400, generator=gen(1))
    assert many.value == pytest.approx(exact, abs=4 * many.se) and many.se < 0.01
    with pytest.raises(ValueError, match="at least 1 for each item, got 0"): mutual_information(q, codes=0)


@pytest.mark.parametrize("n,d,sd", [(2, 1, 1.), (7, 3, 0.2), (60, 5, 0.7), (33, 2, 3.)])
def test_pairwise_bounds_by_brute_force(n, d, sd):
    q = pool(n, d, sd); m, v = q.mean.numpy(), q.var.numpy()
    square = (m[:, None] - m[None]) ** 2
    kl = 0.5 * (square / v[None] + v[:, None] / v[None] - np.log(v[:, None] / v[None]) - 1).sum(-1)
    b = (square / (v[:, None] + v[None]) / 4 + 0.5 * np.log((v[:, None] + v[None]) / 2 / np.sqrt(v[:, None] * v[None]))).sum(-1)
    off = np.where(np.eye(n, dtype=bool), np.inf, kl)
    expected = {"lower": np.log(n) - np_lse(-b, 1).mean(), "upper": np.log(n) - np_lse(-kl, 1).mean(), "upper_loo": np.log(n - 1) - np_lse(-off, 1).mean()}
    for block in (320_000, 50, 1): assert pairwise_bounds(q, block) == pytest.approx(expected, abs=1e-9)
    assert pairwise_bounds(q.to(torch.float32)) == pytest.approx(expected, abs=1e-4)
    many = mutual_information(q, codes=200, generator=gen(1))
    assert expected["lower"] <= many.value + 4 * many.se and many.value <= expected["upper"] + 4 * many.se


def test_pairwise_bounds_around_the_exact_information():
    for sd in (0.2, 0.6, 2.):
        q = pool(30, 1, sd); exact = quadrature(q, DiagGaussian.standard(1))[0]
        b = pairwise_bounds(q)
        assert b["lower"] <= exact <= b["upper"] <= b["upper_loo"] + 1e-9 and b["lower"] > 0.3 * exact
    clumps = DiagGaussian(100. * (torch.arange(30.) % 3)[:, None], torch.zeros(30, 1))
    assert list(pairwise_bounds(clumps).values())[:2] == pytest.approx([math.log(3)] * 2)      # both are exact
    assert pairwise_bounds(clumps)["upper_loo"] == pytest.approx(math.log(29 / 9))
    assert list(pairwise_bounds(DiagGaussian(torch.zeros(9, 2), torch.zeros(9, 2))).values()) == pytest.approx([0, 0, 0], abs=1e-9)
    with pytest.raises(ValueError, match="at least 2"): pairwise_bounds(clumps[:1])


def test_order_of_all_bounds_over_many_pools():
    "E[I_N] (InfoNCE with the best critic) <= I <= E[leave-one-out] <= E[pairwise leave-one-out], I of a Gaussian channel."
    truth, found = 0.5 * 3 * math.log(1 + 0.8 ** 2), []
    for s in range(200):
        q = DiagGaussian(0.8 * torch.randn(20, 3, generator=gen(s), dtype=torch.float64), torch.zeros(20, 3, dtype=torch.float64))
        z = q.sample(generator=gen(1000 + s)); own, others = q.log_prob(z), log_others(z, q)
        found.append([pairwise_bounds(q)["lower"], mutual_information(q, z=z).value, float((own - others).mean()) + math.log(19), pairwise_bounds(q)["upper_loo"]])
    lower, value, loo, pairwise = np.mean(found, 0)
    se = np.std(found, 0, ddof=1) / math.sqrt(200)
    assert lower < value + 3 * se[1] and value < truth + 3 * se[1] and truth < loo + 3 * se[2] and loo < pairwise
    assert truth - value < 0.25 and loo - truth < 0.25


def test_mutual_posterior_divergence_by_brute_force():
    q = pool(25, 3); q = DiagGaussian(q.mean + 3, q.logvar)
    m, v = q.mean.numpy(), q.var.numpy()
    kl = 0.5 * ((m[:, None] - m[None]) ** 2 / v[None] + v[:, None] / v[None] - np.log(v[:, None] / v[None]) - 1).sum(-1)
    assert mutual_posterior_divergence(q) == pytest.approx(((kl + kl.T) / 2).mean())
    assert mutual_posterior_divergence(q, off_diagonal=True) == pytest.approx(kl.sum() / (25 * 24))
    assert mutual_posterior_divergence(q) >= mutual_information(q, generator=gen()).value
    assert mutual_posterior_divergence(q.to(torch.float32)) == pytest.approx(kl.mean(), rel=1e-5)


def test_bad_pools_and_repr():
    q = pool()
    with pytest.raises(ValueError, match="at least 2"): mutual_information(q[:1])
    with pytest.raises(ValueError, match=r"\(3,\)"): mutual_information(q[0])
    with pytest.raises(ValueError, match="not finite"): mutual_information(DiagGaussian(q.mean, q.logvar / 0))
    with pytest.raises(ValueError, match="one code"): mutual_information(q, z=q.mean[:, :2])
    assert repr(MutualInformation(6.084, 9.903, 6.3, False)) == "6.08 nats (ceiling 9.90)"
    assert repr(MutualInformation(9.5, 9.903, 12., True)) == "9.50 nats (ceiling 9.90, saturated: the truth may be up to 12.00)"
    assert float(MutualInformation(6.084, 9.903, 6.3, False)) == 6.084


# ---------------------------------------------------------------- activity

def test_activity():
    m = torch.randn(31, 5, generator=gen()) * torch.tensor([1., 0.3, 0.11, 0.05, 0.])
    np.testing.assert_allclose(activity(m).numpy(), m.numpy().var(0, ddof=1), rtol=1e-5)
    assert active_units(m) == int((m.numpy().var(0, ddof=1) > 0.01).sum()) == 3
    two = torch.tensor([[0., 0.], [2., 0.]])                      # variance exactly 2
    assert active_units(two, threshold=2.) == 0 and active_units(two, threshold=1.99) == 1
    with pytest.raises(TypeError, match="q.mean"): active_units(DiagGaussian(m, m))
    with pytest.raises(ValueError, match="at least 2"): activity(m[0])


@pytest.mark.parametrize("how", ["mean", "sample"])
def test_reencoding_error_closed_form(how):
    m = linear(lengths=(3., 1., 0.3, 0.)); x = m.sample(20_000, gen(1))
    rho = torch.tensor([3., 1., 0.3, 0.]).double() ** 2; rho = rho / (rho + 0.5)
    expected = (1 - rho) ** 2 + (1 - rho) + (rho * (1 - rho) if how == "sample" else 0)
    assert reencoding_error(m, x, gen(2), how, batch=3000) == pytest.approx(float(expected.mean()), abs=0.02)
    deaf = linear(lengths=(0., 0.))
    assert reencoding_error(deaf, x, gen(2), how) == pytest.approx(2, abs=0.06)
    with pytest.raises(ValueError, match="'median'"): reencoding_error(m, x, gen(), "median")


def test_reencoding_error_by_hand():
    m = linear(); x = m.sample(7, gen(1)); q = m.encode(x); g = gen(3)
    z = q.rsample(torch.randn(7, 4, generator=g, dtype=torch.float64))
    again = m.encode(z @ m.W.T + m.c).rsample(torch.randn(7, 4, generator=g, dtype=torch.float64))
    assert reencoding_error(m, x, gen(3)) == pytest.approx(float(((z - again) ** 2).sum()) / 28)


def test_reencoding_of_a_sample_goes_through_generate():
    m = linear(); x = m.sample(50, gen(1)); seen = []
    m.generate = lambda z, draw=None: (seen.append(draw), m.decode(z).sample(draw))[1]
    reencoding_error(m, x, gen(), "mean"); assert not seen
    reencoding_error(m, x, gen(), "sample"); assert seen and callable(seen[0])


# ---------------------------------------------------------------- density and coverage

def prdc(real, fake, k):
    "The definition, all distances at once."
    real, fake = np.asarray(real, float), np.asarray(fake, float)
    rr = np.sqrt(((real[:, None] - real[None]) ** 2).sum(-1)); rf = np.sqrt(((real[:, None] - fake[None]) ** 2).sum(-1))
    radius = np.partition(rr, k, axis=1)[:, :k + 1].max(1)
    inside = rf < radius[:, None]
    return inside.sum(1), inside.sum() / (k * len(fake)), (rf.min(1) < radius).mean()


def prdc_all(real, fake, k):
    "Precision, recall, density, coverage by the definition."
    d = lambda a, b: np.sqrt(((np.asarray(a, float)[:, None] - np.asarray(b, float)[None]) ** 2).sum(-1))
    rr, ff, rf = d(real, real), d(fake, fake), d(real, fake)
    r, s = np.sort(rr, 1)[:, k], np.sort(ff, 1)[:, k]
    return (rf < r[:, None]).any(0).mean(), (rf < s[None]).any(1).mean(), *prdc(real, fake, k)[1:]


@pytest.mark.parametrize("f", [1, 7, 20])
@pytest.mark.parametrize("n,m,k", [(150, 90, 5), (6, 40, 5), (211, 305, 1), (101, 99, 10)])
def test_precision_and_recall(f, n, m, k):
    real, fake = torch.randn(n, f, generator=gen(1)), 0.8 * torch.randn(m, f, generator=gen(2)) + 0.3
    expected = prdc_all(real, fake, k)
    assert list(all_four(real, fake, k)) == ["precision", "recall", "density", "coverage"]
    for block in (640_000, 77): assert tuple(all_four(real, fake, k, block).values()) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(real, fake, k) == pytest.approx(expected[:2], abs=1e-12)
    assert precision_recall(fake, real, k) == pytest.approx(prdc_all(fake, real, k)[:2], abs=1e-12) if n > k < m else True


def test_precision_and_recall_by_hand():
    "Points on a line in 8 dimensions, k=1. What lies at the radius exactly is outside."
    line = lambda *v: torch.nn.functional.pad(torch.tensor(v)[:, None], (0, 7))
    real, fake = line(0., 1., 2., 3.), line(-1., 0., 2.5, 4., 9.)
    assert precision_recall(real, fake, 1)[0] == 2 / 5      # all balls have radius 1: they hold 0 and 2.5
    assert precision_recall(real, fake, 1)[1] == 3 / 4      # radii 1, 1, 1.5, 1.5, 5 of the generated: 1 is in none
    assert precision_recall(real, real, 1) == (1., 1.) and precision_recall(real, real + 100, 1) == (0., 0.)
    for a, b in [(real, fake), (fake, real)]: assert precision_recall(a.double(), b.double(), 1) == pytest.approx(prdc_all(a.double(), b.double(), 1)[:2])


def test_precision_and_recall_with_ties_and_copies():
    grid = torch.randint(0, 3, (250, 5), generator=gen(1)).float()
    assert tuple(all_four(grid, grid[:100] + 0., 4).values()) == pytest.approx(prdc_all(grid, grid[:100], 4))
    same = torch.ones(9, 7)
    with pytest.warns(UserWarning) as caught: assert all_four(torch.randn(20, 7, generator=gen()), same)["recall"] == 0
    assert [str(w.message)[:59] for w in caught] == ["9 of 9 generated items coincide with at least 5 others: the"] and "lowers recall." in str(caught[0].message)
    with pytest.raises(ValueError, match="generated items: k=5, 5 items"): all_four(grid, grid[:5])


@pytest.mark.parametrize("f", [1, 2, 6, 7, 20, 100])
@pytest.mark.parametrize("n,m,k", [(150, 90, 5), (6, 40, 5), (211, 305, 1), (120, 1, 3), (101, 99, 10)])
def test_density_coverage_is_prdc(f, n, m, k):
    real, fake = torch.randn(n, f, generator=gen(1)), 0.8 * torch.randn(m, f, generator=gen(2)) + 0.1
    counts, density, coverage = prdc(real, fake, k)
    assert ball_counts(real, fake, k).tolist() == counts.tolist()
    assert density_coverage(real, fake, k) == pytest.approx((density, coverage), abs=1e-12)
    assert ball_counts(real, fake, k, block=77).tolist() == counts.tolist()
    assert ball_counts(real.double(), fake.double(), k).tolist() == counts.tolist()


@pytest.mark.parametrize("tree", [0, 6])
def test_counts_survive_ties_offsets_and_copies(tree, monkeypatch):
    monkeypatch.setattr(samples, "TREE_DIMS", tree)
    grid = torch.randint(0, 3, (250, 5), generator=gen(1)).float()
    far = torch.randn(250, 5, generator=gen(2)) + 1e4            # float32 keeps three decimals here
    near = torch.randn(250, 5, generator=gen(3)) * 1e-3
    for real, fake in [(grid, grid), (grid, grid[:100] + 0.), (far, far), (far, far.flip(0)[:70]), (near, near.roll(1, 0)), (far, far + 0.01)]:
        with pytest.warns() if prdc_radius_zero(real) else nullcontext():
            assert ball_counts(real, fake, 4).tolist() == prdc(real, fake, 4)[0].tolist()


def prdc_radius_zero(real, k=4):
    return ((((real[:, None].double() - real.double()) ** 2).sum(-1).sort(1).values[:, k]) == 0).any()


class nullcontext:
    def __enter__(self): pass
    def __exit__(self, *a): pass


def test_pairs_at_the_radius_are_decided_in_double_precision():
    "Generated points on the unit circle, rounded to float32: inside or outside a ball of radius 1 by less than 1e-7."
    angle = 2 * math.pi * torch.rand(5000, generator=gen(1))
    fake = torch.nn.functional.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, 5))
    real = torch.zeros(4, 7); real[1, 0], real[2:, 1] = 1., 50.
    inside = int(((fake.double().numpy() ** 2).sum(1) < 1).sum())
    assert 1000 < inside < 4000
    with pytest.warns(UserWarning, match="2 of 4"): assert ball_counts(real, fake, 1)[0] == inside


def test_equal_points_hold_nothing():
    same = torch.ones(9, 2)
    with pytest.warns(UserWarning, match="9 of 9"): assert density_coverage(same, same) == (0, 0)


def test_tree_and_blocks_agree_on_larger_sets(monkeypatch):
    real, fake = torch.randn(3000, 4, generator=gen(1)), torch.randn(2500, 4, generator=gen(2)) * 1.2
    tree = ball_counts(real, fake)
    monkeypatch.setattr(samples, "TREE_DIMS", 0)
    assert torch.equal(ball_counts(real, fake), tree)


def test_outliers_do_not_disturb():
    real, fake = torch.randn(300, 10, generator=gen(1)), torch.randn(200, 10, generator=gen(2))
    fake[0] *= 1e6
    assert ball_counts(real, fake).tolist() == prdc(real, fake, 5)[0].tolist()


def test_expected_coverage():
    assert expected_coverage(3, 1) == pytest.approx(1 - 2 / 5) and expected_coverage(4, 2) == pytest.approx(1 - 3 / 7 * 2 / 6)
    assert expected_coverage(10 ** 7, 5) == pytest.approx(1 - 2 ** -5, abs=1e-6)
    g = gen(0)
    runs = [density_coverage(torch.randn(60, 3, generator=g), torch.randn(60, 3, generator=g), 2) for _ in range(500)]
    density, coverage = np.mean(runs, 0)
    assert coverage == pytest.approx(expected_coverage(60, 2), abs=0.01) and density == pytest.approx(1, abs=0.02)
    d, c = real_ceiling(torch.randn(2001, 5, generator=gen(1)), generator=gen(2))
    assert c == pytest.approx(expected_coverage(1000), abs=0.03) and d == pytest.approx(1, abs=0.1)
    real_ceiling(torch.randn(12, 3, generator=gen(1)))              # halves of 6 have five neighbours


def test_bad_features():
    a, b = torch.randn(20, 3), torch.randn(20, 4)
    with pytest.raises(ValueError, match="3 features, fake 4"): density_coverage(a, b)
    with pytest.raises(ValueError, match="k=5, 5 items"): density_coverage(a[:5], a)
    with pytest.raises(ValueError, match="k=0"): density_coverage(a, a, 0)
    with pytest.raises(ValueError, match="fake has values"): density_coverage(a, a / 0)
    with pytest.raises(TypeError, match="int64"): density_coverage(a, a.long())
    with pytest.raises(ValueError, match="features()"): density_coverage(a.view(20, 3, 1), a)
    with pytest.warns(UserWarning, match="7 of 13 real items coincide with at least 5 others"):
        density_coverage(torch.cat([a[:1].expand(7, 3), a[1:7]]), a)
    with pytest.raises(ValueError, match="n=5, k=5"): expected_coverage(5)
    with pytest.raises(TypeError, match="tokens"): features(torch.ones(3, 4, dtype=torch.long))


def test_pca_features():
    x = torch.randn(200, 1, 3, 4, generator=gen(1)) @ torch.diag(torch.tensor([5., 2., 1., 0.5]))
    f = PCAFeatures(x, 12)(x)
    torch.testing.assert_close(torch.pdist(f), torch.pdist(x.flatten(1)), rtol=1e-3, atol=1e-3)
    v = f.var(0)
    expected = np.linalg.eigvalsh(np.cov(x.flatten(1).numpy().T))[::-1]
    np.testing.assert_allclose(v.numpy(), expected, rtol=1e-3)
    torch.testing.assert_close(f.mean(0), torch.zeros(12), rtol=0, atol=1e-4)
    p = PCAFeatures(x + 7, 2)
    torch.testing.assert_close(p(x + 7).abs(), f[:, :2].abs(), rtol=1e-2, atol=1e-3)
    p = PCAFeatures(x, 2)
    torch.testing.assert_close(p(x).var(0), v[:2], rtol=1e-3, atol=1e-3)
    assert p.explained == pytest.approx(expected[:2].sum() / expected.sum(), rel=1e-4)
    torch.testing.assert_close(p(x[:3] + 1) - p(x[:3]), (torch.ones(12) @ p.components).expand(3, 2))
    with pytest.raises(ValueError, match="13 components of 12"): PCAFeatures(x, 13)


# ---------------------------------------------------------------- as published

def test_ap_nll_by_hand_and_its_identities():
    m = linear(widen=1.2); x = m.sample(11, gen(1)); q = m.encode(x); g = gen(3)
    kl, total = q.kl(m.prior).sum(-1).numpy(), 0.
    for i in (0, 4, 8):
        xi, qi, e = x[i:i + 4], q[i:i + 4], []
        for _ in range(6):
            z = qi.mean + qi.std * torch.randn(qi.shape, generator=g, dtype=torch.float64)
            e.append(float(m.log_prob(xi, z).sum()) - kl[i:i + 4].sum())
        total += np_lse(np.array(e), 0) - np.log(6)
    assert ap_nll(m, x, 4, 6, generator=gen(3)) == pytest.approx(-total / 11)
    one = neg_elbo_parts(m, x, gen(5))
    assert ap_nll(m, x, 11, 1, generator=gen(5)) == pytest.approx(float((one["rec"] + one["kl"].sum(-1)).mean()))       # K = 1
    g = gen(6); singles = [ap_nll(m, x, 11, 1, generator=g) for _ in range(8)]
    assert min(singles) < ap_nll(m, x, 11, 8, generator=gen(6)) < np.mean(singles)
    assert ap_nll(m, x, 4, 6, generator=gen(3)) - ap_nll(m, x, 4, 6, generator=gen(3), squared_error=True) == pytest.approx(4 * math.log(math.pi))
    batch_one = ap_nll(m, x, 1, 2000, generator=gen(7))
    z = q.sample(2000, gen(8))
    analytic = -(torch.logsumexp(m.log_prob(x, z), 0) - math.log(2000)) + q.kl(m.prior).sum(-1)                          # batch of 1: KL still analytic
    assert batch_one == pytest.approx(float(analytic.mean()), abs=0.05)
    assert batch_one < float(m.nll(x).mean())                                                                          # "better" than the truth


def test_ap_nll_charges_what_was_charged():
    m = linear(); x = m.sample(6, gen(1)); before = ap_nll(m, x, 3, 2, generator=gen())
    m.charged = lambda x: DiagGaussian(m.encode(x).mean, m.encode(x).logvar + 1)
    delta = m.charged(x).kl(m.prior).sum(-1).mean() - m.encode(x).kl(m.prior).sum(-1).mean()
    assert ap_nll(m, x, 3, 2, generator=gen()) - before == pytest.approx(float(delta))


def test_ap_mi_by_hand_and_its_identities():
    q = pool(23, 3, 0.4); eps = torch.randn(23, 3, generator=gen(4), dtype=torch.float64); z = q.rsample(eps)
    parts = []
    for i in (0, 10, 20):
        qi, zi = q[i:i + 10], z[i:i + 10]
        h = 0.5 * (1 + np.log(2 * np.pi) + qi.logvar.numpy()).sum(-1).mean()
        parts.append(-h - (np_lse(log_q(zi, qi), 1) - np.log(len(zi))).mean())
    assert ap_mi(q, 10, z=z) == pytest.approx((10 * parts[0] + 10 * parts[1] + 3 * parts[2]) / 23)
    assert ap_mi(q, 10, z=z, weighted=False) == pytest.approx(np.mean(parts))
    noise = float((0.5 * eps ** 2 - 0.5).sum(-1).mean())
    assert ap_mi(q, 23, z=z) - mutual_information(q, z=z).value == pytest.approx(noise)          # item 3: exactly the noise
    collapsed = DiagGaussian(torch.zeros(64, 8), torch.zeros(64, 8))
    assert abs(ap_mi(collapsed, 64, generator=gen(1))) > 1e-3                                     # where the paired estimate is 0
    for n, b, w, cap in ((19_999, 1024, True, 6.914), (8_070, 50, True, 3.910), (10_000, 64, True, 4.157), (10_000, 64, False, 4.150), (100, 50, True, math.log(50))):
        assert ap_mi_ceiling(n, b, w) == pytest.approx(cap, abs=6e-4)


def test_ap_active_units():
    z = torch.tensor([[0., 0., 0.], [0.1415, 0.1413, 1.]])          # std with divisor N - 1: 0.10006, 0.09991
    assert ap_active_units(z) == 2
    collapsed = DiagGaussian(torch.zeros(400, 7), torch.zeros(400, 7))
    assert ap_active_units(collapsed.sample(generator=gen())) == 7 and active_units(collapsed.mean) == 0


def test_ap_density_coverage_rewards_collapse():
    x = linear().sample(800, gen(1)); deaf = linear(lengths=(0., 0., 0., 0.))
    d, c = ap_density_coverage(deaf, x, generator=gen(2))
    assert d == pytest.approx(1, abs=0.1) and c == pytest.approx(expected_coverage(800), abs=0.03)
    far = linear(shift=30.)                                         # codes of the data away from the prior
    real = far.encode(x).rsample(torch.randn(800, 4, generator=gen(3), dtype=torch.float64))
    far.decode = lambda z, x=None: SimpleNamespace(mean=z @ far.W.T + far.c)
    assert ap_density_coverage(far, x, generator=gen(3))[1] > 0.5   # both sides are encoded, so the shift is in both
    g = gen(3); z0 = torch.randn(800, 4, generator=g, dtype=torch.float64)
    z = torch.randn(800, 4, generator=g, dtype=torch.float64)
    again = far.encode(z @ far.W.T + far.c); fake = again.rsample(torch.randn(800, 4, generator=g, dtype=torch.float64))
    assert ap_density_coverage(far, x, k=3, generator=gen(3)) == pytest.approx(prdc(real, fake, 3)[1:])


# ---------------------------------------------------------------- the row

SPACE = {"precision", "recall", "density", "coverage"}
COLUMNS = {"nll", "nll_se", "nll_matched", "nll_samples", "nll_items", "neg_elbo", "rec", "kl", "kl_fed", "objective", "mi", "mi_ceiling", "mi_upper",
           "mi_saturated", "au", "au_0.1", "au_charged", *SPACE, "mpd", "reencode", "reencode_sample", "gap", "activity", "kl_dims"}
LISTS = {"activity", "kl_dims"}
PUBLISHED = {"ap_nll", "ap_mi", "ap_au", "ap_density", "ap_coverage"}


def world(m, n=400): return SimpleNamespace(train=m.sample(900, gen(11)).float(), test=m.sample(n, gen(12)).float())


def test_row():
    m = linear(); data = world(m)
    torch.manual_seed(3); state = torch.get_rng_state()
    row = evaluate(m, data, as_published={"batch": 100})
    assert torch.equal(torch.get_rng_state(), state)
    assert set(row) == COLUMNS | PUBLISHED and all(type(v) is float and math.isfinite(v) for k, v in row.items() if k not in LISTS)
    assert all(len(row[k]) == 4 and all(math.isfinite(v) for v in row[k]) for k in LISTS)
    assert row == evaluate(m, data, as_published={"batch": 100}) and row != evaluate(m, data, seed=1, as_published={"batch": 100})
    plain = evaluate(m, data)
    assert set(plain) == COLUMNS and all(plain[k] == row[k] for k in COLUMNS)          # adding metrics moves none
    x = data.test.double(); q = m.encode(x)
    assert row["nll"] == pytest.approx(float(m.nll(x).mean())) and row["nll_se"] == pytest.approx(float(m.nll(x).std()) / 20)
    assert row["neg_elbo"] == pytest.approx(row["rec"] + row["kl_fed"]) and row["objective"] == pytest.approx(row["rec"] + row["kl"])
    assert row["kl"] == row["kl_fed"] == pytest.approx(float(q.kl(m.prior).sum(-1).mean()))
    assert row["activity"] == pytest.approx(q.mean.var(0).tolist()) and row["au_0.1"] == active_units(q.mean, 0.1)
    assert sum(row["kl_dims"]) == pytest.approx(row["kl_fed"])
    assert row["au"] == active_units(q.mean) and row["mpd"] == pytest.approx(mutual_posterior_divergence(q)) and row["mi_ceiling"] == pytest.approx(math.log(400))
    assert row["gap"] == pytest.approx(2 * float((m.W ** 2).sum()), rel=0.15) and row["mi"] <= row["kl_fed"] + 0.3 and row["nll_matched"] == pytest.approx(row["nll"], abs=0.1)
    assert row["coverage"] == pytest.approx(expected_coverage(400), abs=0.04) and row["density"] == pytest.approx(1, abs=0.15)
    fake = m.sample(400, gen(13)).float()
    assert (row["precision"], row["recall"]) == pytest.approx(prdc_all(data.test, fake, 5)[:2], abs=0.08)


class Scaled(LinearGaussian):
    "A method with its own prior: the decoder expects twice the code that is charged."
    calls = 0
    def posteriors(self, x):
        type(self).calls += len(x)
        q = super().encode(x)
        return q, DiagGaussian(2 * q.mean, q.logvar + math.log(4))
    def encode(self, x): return self.posteriors(x)[1]
    def charged(self, x): return self.posteriors(x)[0]
    def decode(self, z, x=None): return super().decode(z / 2)
    def priors(self): return {"standard": self.prior, "A": DiagGaussian(torch.zeros(4).double(), torch.full((4,), math.log(4)).double())}


def test_row_of_a_method_with_its_own_prior():
    base = linear(); m = Scaled(base.W, base.c, 0.5); data = world(base)
    Scaled.calls = 0
    row = evaluate(m, data, n_fit=None, features=False)
    assert Scaled.calls == 400 + 900 + 400 + 400                    # test once, training once, re-encoding through the mean and through a sample
    exact = float(base.nll(data.test.double()).mean())
    assert row["nll_A"] == pytest.approx(exact, abs=1e-6) and row["nll_matched"] == pytest.approx(exact, abs=0.1) and row["nll"] > exact + 0.5
    assert row["kl_fed"] > row["kl"] and row["objective"] < row["neg_elbo"] and not {"nll_standard", *SPACE} & set(row)
    row = evaluate(m, data)
    assert row["coverage"] > 0.9                                    # generates from A: with the standard prior codes would be half as wide
    assert set(row) == COLUMNS | {"nll_A"}


def test_row_reads_the_right_posterior():
    "Charged means are a twentieth of the fed ones: information, activity and divergence are those of the fed posterior."
    m = linear(); data = world(m); q = m.encode(data.test.double())
    m.charged = lambda x: DiagGaussian(m.encode(x).mean / 20, m.encode(x).logvar)
    row = evaluate(m, data, features=False, as_published={"batch": 400, "n_samples": 2, "samples": False})
    assert row["au"] == active_units(q.mean) > row["au_charged"] == active_units(q.mean / 20)
    assert row["mpd"] == pytest.approx(mutual_posterior_divergence(q)) and row["mi"] > 2 < row["ap_mi"]
    assert row["kl"] == pytest.approx(float(m.charged(data.test.double()).kl(m.prior).sum(-1).mean())) and row["kl_fed"] > row["kl"] + 0.5
    assert row["ap_nll"] == pytest.approx(row["objective"], abs=0.3) and set(row) == COLUMNS - SPACE | {"ap_nll", "ap_mi", "ap_au"}


def test_metrics_draw_independently():
    draw = lambda seed, name: torch.randn(3, generator=metric_generator(seed, name)).tolist()
    assert draw(0, "a") == draw(0, "a") and len({tuple(draw(*v)) for v in ((0, "a"), (0, "b"), (1, "a"), (10, "a"), (1, "0/a"))}) == 5


def test_row_on_part_of_the_data():
    m = linear(); data = world(m); row = evaluate(m, data, n_samples=3, n_nll=50, n_pool=60, n_fit=100, k=2)
    few = some(400, 50, 0, "nll items")
    assert row["nll"] == pytest.approx(float(m.nll(data.test[few].double()).mean())) and len(few.unique()) == 50 and few.max() > 60
    assert row["nll_items"] == 50 and row["nll_samples"] == 3 and row["mi_ceiling"] == pytest.approx(math.log(60))
    with pytest.raises(ValueError, match="Did you mean 'batch'"): evaluate(m, world(m), as_published={"bacth": 3})


class Tokens(nn.Module):
    "A model of token sequences: no feature space, no mean."
    prior = DiagGaussian.standard(2)
    def encode(self, x): return DiagGaussian(x.float()[:, :2] / 10, torch.zeros(len(x), 2))
    def decode(self, z, x=None):
        class P:
            def log_prob(self, x): return -(x.float() / 10 - z.mean(-1, keepdim=True)).abs().sum(-1)
            @property
            def mean(self): raise NotImplementedError
        return P()
    def log_prob(self, x, z): return self.decode(z, x).log_prob(x)


def test_columns_that_make_no_sense_are_missing():
    data = SimpleNamespace(train=torch.randint(0, 20, (90, 7), generator=gen(1)), test=torch.randint(0, 20, (80, 7), generator=gen(2)))
    row = evaluate(Tokens(), data, n_samples=5)
    assert COLUMNS - set(row) == SPACE | {"reencode", "reencode_sample"}


def test_binarised_training_data_are_drawn_through_the_data_set():
    m, x = Bits(), all_bits(); seen = []
    def batch(idx, generator):
        seen.append(len(idx)); return torch.bernoulli(torch.full((len(idx), 6), 0.5), generator=generator)
    data = SimpleNamespace(train=torch.full((200, 6), 0.5), test=x, binarise=True, batch=batch)
    torch.manual_seed(0); state = torch.get_rng_state()
    row = evaluate(m, data, n_samples=5, n_fit=150)
    assert seen == [150] and torch.equal(torch.get_rng_state(), state) and row == evaluate(m, data, n_samples=5, n_fit=150)


def test_images_are_compared_by_principal_components():
    m = linear(f=12); data = world(m)
    class Images:
        prior = m.prior
        encode = lambda self, x: m.encode(x.flatten(1))
        decode = lambda self, z, x=None: Normal(m.decode(z).mean.unflatten(-1, (1, 3, 4)), torch.tensor(0.5).double(), 3)
        log_prob = lambda self, x, z: self.decode(z).log_prob(x)
    images = SimpleNamespace(train=data.train.view(-1, 1, 3, 4), test=data.test.view(-1, 1, 3, 4))
    a, b = evaluate(m, data), evaluate(Images(), images)            # 12 of 12 components: a rotation
    assert b["coverage"] == pytest.approx(a["coverage"], abs=1e-9) and b["nll"] == pytest.approx(a["nll"])


def test_encode_all_in_batches():
    m = linear(); x = m.sample(25, gen(1)); a, b = encode_all(m, x, 4), m.encode(x)
    torch.testing.assert_close(a.mean, b.mean); torch.testing.assert_close(a.logvar, b.logvar)


def test_posteriors_narrower_than_float32_can_tell():
    "A std far below the spacing of float32 numbers near the mean: codes drawn in float32 would lie thousands of stds off."
    generator = torch.Generator().manual_seed(0)
    q = DiagGaussian(20 + torch.randn(200, 3, generator=generator), torch.full((200, 3), 2 * math.log(1e-8)))
    mi = mutual_information(q, generator=torch.Generator().manual_seed(1))
    assert abs(mi.value - math.log(200)) < 1e-6 and mi.saturated
    assert abs(ap_mi(q, 50, generator=torch.Generator().manual_seed(1)) - math.log(50)) < 0.5      # its first term is analytic, hence the noise

    class Constant:                                                 # p(x|z) = 1 for every z: the bound is E log q/p, known in closed form
        prior = DiagGaussian.standard(3)
        def encode(self, x): return q[:len(x)]
        def log_prob(self, x, z): return torch.zeros(z.shape[:-1])
    nll = nll_iw(Constant(), torch.zeros(200, 1), 50, generator=torch.Generator().manual_seed(2))
    exact = 0.5 * (q.mean.double() ** 2 - 2 * math.log(1e-8) - 1).sum(-1)
    assert ((nll - exact).abs() < 6).all()


def test_one_needle_does_not_spoil_the_pool():
    "A few posteriors 1e6 times narrower than the rest: their densities at other codes must not be the rounding error of a difference of large numbers."
    generator = torch.Generator().manual_seed(0)
    mean, logvar = 3 * torch.randn(300, 4, generator=generator), torch.full((300, 4), -1.)
    logvar[::50] = 2 * math.log(1e-6)
    q, z = DiagGaussian(mean, logvar), None
    single = mutual_information(q, generator=torch.Generator().manual_seed(1))
    double = mutual_information(q.to(torch.float64), z=q.to(torch.float64).rsample(torch.randn(300, 4, generator=torch.Generator().manual_seed(1)).double()))
    assert abs(single.value - double.value) < 1e-4 and 0 < single.value <= single.ceiling + 1e-9


def test_nll_of_a_part_is_carried_over_to_the_whole():
    "By the difference to -ELBO: near the value of the whole set, with a smaller error than the part alone has."
    m = linear(); data = world(m)
    whole, part = evaluate(m, data, features=False), evaluate(m, data, n_nll=60, features=False)
    assert "nll_whole" not in whole
    assert abs(part["nll_whole"] - whole["nll"]) < 4 * part["nll_whole_se"] and part["nll_whole_se"] < part["nll_se"]
    assert part["nll_matched_whole"] == pytest.approx(part["nll_whole"] + part["nll_matched"] - part["nll"])
