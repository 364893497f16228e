"Importance sampling to a standard error, against the exact likelihood of linear Gaussian models; models without a code."
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from pcvae.gaussian import DiagGaussian
from pcvae.metrics.evaluate import evaluate
from pcvae.metrics.likelihood import LinearGaussian, aggregate_moments, log_mean_se, nll_iw, nll_iw_adaptive, nll_iw_adaptive_all, weight_sums
from pcvae.models.lstm import lstm, lstm_lm


def gen(seed=0): return torch.Generator().manual_seed(seed)


W = torch.linalg.qr(torch.randn(16, 4, generator=gen(1)))[0] * torch.tensor([3., 2., 1., 0.3])
def model(widen=1., shift=0.): return LinearGaussian(W, torch.ones(16), 0.5, widen, shift)
X = model().sample(1000, gen(2))
EXACT = model().nll(X)


def test_sums_and_error_are_those_of_the_weights():
    m, x = model(1.3, 0.1), X[:5]
    q = m.encode(x)
    sums = weight_sums(m, x, q, {"p": m.prior}, 50, gen(3))["p"]
    z = q.rsample(torch.randn(50, *q.shape, generator=gen(3)))
    w = (m.log_prob(x, z) + m.prior.log_prob(z) - q.log_prob(z)).double().exp()
    assert torch.allclose(sums, torch.stack([w.sum(0).log(), (w * w).sum(0).log()]), atol=1e-4)
    assert torch.allclose(log_mean_se(sums, 50), w.std(0) / w.mean(0) / math.sqrt(50), rtol=1e-3)
    assert torch.allclose(weight_sums(m, x, q, {"p": m.prior}, 4000, gen(4), chunk=200)["p"][0], math.log(4000) - m.nll(x).double(), atol=0.1)


@pytest.mark.parametrize("widen, shift, target", [(1.4, 0.2, 0.1), (1.2, 0., 0.05), (2., 0.5, 0.2), (1.3, 0.1, 0.1)])
def test_error_is_what_was_asked_for(widen, shift, target):
    a = nll_iw_adaptive(model(widen, shift), X, target, generator=gen(5))
    error = (a.nll - EXACT).double()
    assert a.capped == 0 and float(error.square().mean().sqrt()) < 1.15 * target and float(a.se.double().square().mean().sqrt()) < 1.15 * target
    assert ((error.abs() < 2 * a.se).double().mean() > 0.9) and abs(float(error.mean())) < 4 * target / math.sqrt(1000) + target ** 2
    assert (a.samples >= 32).all() and (a.pilot >= 32).all()
    assert torch.allclose(a.ess, 1 / (a.se.double() ** 2 * (a.samples - 1) / a.samples + 1 / a.samples))


def test_the_exact_posterior_needs_the_least():
    a = nll_iw_adaptive(model(), X, generator=gen(6), first=8)
    assert torch.allclose(a.nll, EXACT, atol=1e-3) and a.se.max() < 1e-3
    assert (a.samples == 8).all() and (a.pilot == 8).all() and a.capped == 0


def test_a_worse_posterior_and_a_smaller_target_need_more():
    need = lambda m, target: float(nll_iw_adaptive(m, X[:200], target, generator=gen(7)).samples.double().mean())
    assert need(model(), 0.1) < need(model(1.4), 0.1) < need(model(1.8), 0.1) and need(model(1.4), 0.2) < need(model(1.4), 0.1) < need(model(1.4), 0.05)
    assert need(model(0.7), 0.1) > need(model(), 0.1)


def test_the_most_is_the_most():
    a = nll_iw_adaptive(model(2., 0.5), X[:100], 0.01, max_samples=100, first=10, generator=gen(8))
    assert (a.samples == 100).all() and a.capped == 1. and (a.pilot == 25).all() and a.se.min() > 0.01


def test_narrow_posteriors_are_nearly_as_little_biased_as_with_a_fixed_k():
    "Sampling until all looks well is biased by 0.05 nat here."
    m, x = model(0.8), model().sample(3000, gen(9))
    a = nll_iw_adaptive(m, x, 0.1, generator=gen(10))
    k = int((a.samples + a.pilot).double().mean())
    bias = [float((nll - m.nll(x)).mean()) for nll in (a.nll, nll_iw(m, x, k, generator=gen(11)))]
    assert abs(bias[0] - bias[1]) < 0.012 and bias[0] < 0.02


def test_a_bound_that_sums_to_at_most_one_does_so_still():
    "x is one of 16 symbols: the probabilities that the estimates claim sum to 1 in expectation."
    class Coded:
        prior, mu = DiagGaussian.standard(3), 2 * torch.randn(16, 3, generator=gen(12))
        def encode(self, x): return DiagGaussian(0.6 * self.mu[x[:, 0]], torch.full((len(x), 3), -0.5))
        def log_prob(self, x, z): return (-0.5 * ((z[..., None, :] - self.mu) ** 2).sum(-1)).log_softmax(-1).gather(-1, x[:, 0].expand(z.shape[:-1])[..., None])[..., 0]
    x = torch.arange(16)[:, None]
    sums = torch.tensor([float((-nll_iw_adaptive(Coded(), x, 0.1, generator=gen(s), max_samples=2000).nll).exp().sum()) for s in range(20)])
    assert abs(float(sums.mean()) - 1) < 4 * float(sums.std()) / math.sqrt(20) + 1e-3


def test_several_priors_share_the_draws():
    m = model(1.2)
    other = DiagGaussian(torch.full((4,), 0.3), torch.zeros(4))
    found = nll_iw_adaptive_all(m, X[:200], {"standard": m.prior, "other": other}, 0.1, generator=gen(13))
    assert torch.equal(found["standard"].samples, found["other"].samples)
    for name, p in (("standard", m.prior), ("other", other)):
        assert torch.allclose(found[name].nll.mean(), nll_iw(m, X[:200], 3000, bound=p, generator=gen(14)).mean(), atol=0.03)
    again = nll_iw_adaptive_all(m, X[:200], {"standard": m.prior, "other": other}, 0.1, generator=gen(13))
    assert torch.equal(found["other"].nll, again["other"].nll)


@pytest.mark.parametrize("kw, message", [(dict(target=0.), "target=0.0 should be a positive"), (dict(target=-1.), "positive"), (dict(target=float("nan")), "positive"),
    (dict(first=1), "first=1 should be at least 2"), (dict(first=50, max_samples=40), "at most max_samples=40"), (dict(bound="standart"), "Did you mean 'standard'")])
def test_bad_input_is_one_line(kw, message):
    with pytest.raises(ValueError, match=message) as e: nll_iw_adaptive(model(), X[:3], **kw)
    assert "\n" not in str(e.value)


def test_an_item_without_a_likelihood_is_named():
    x = X[:5].clone(); x[3, 0] = float("nan")
    with pytest.raises(ValueError, match="first: item 3"): nll_iw_adaptive(model(), x)


# ---- the row
def sentences(n, seed):
    x = torch.randint(4, 30, (n, 9), generator=gen(seed)); x[:, 0], x[:, -1] = 1, 2
    return x


DATA = SimpleNamespace(train=sentences(60, 0), test=sentences(40, 1))


def build(make, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(30, embedding=8, hidden=8, **kw)


def test_row_with_a_target():
    vae = build(lstm, latent_dim=3, init="default")
    plain, row = (evaluate(vae, DATA, n_samples=400, **kw) for kw in ({}, {"nll_target": 0.05}))
    assert set(row) - set(plain) == {"nll_item_se", "nll_pilot", "nll_capped"}
    assert all(row[k] == plain[k] for k in plain if not k.startswith("nll"))
    assert row["nll"] == pytest.approx(plain["nll"], abs=0.03) and row["nll_samples"] < 400 == plain["nll_samples"]


def test_row_of_a_language_model_without_warnings():
    lm = build(lstm_lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = evaluate(lm, DATA, n_samples=100, nll_target=0.05, as_published={"batch": 16})
    assert row["nll"] == pytest.approx(row["neg_elbo"], abs=1e-4) and row["nll_samples"] == row["nll_pilot"] == 32 and row["nll_item_se"] < 1e-4
    assert row["kl_fed"] == row["au"] == row["ap_au"] == row["gap"] == 0 and row["activity"] == [] and not {"ap_density", "reencode"} & set(row)


def test_moments_of_no_dimensions():
    mean, var = aggregate_moments(DiagGaussian(torch.zeros(5, 0), torch.zeros(5, 0)))
    assert mean.shape == var.shape == (0,)
