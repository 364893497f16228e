"Small errors that the larger tests let pass: defaults, edges of conditions, what is drawn in which order, and the standing identities of two studies."
import inspect
import math
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pcvae.metrics.likelihood as likelihood
from pcvae import gaussian
from pcvae.critics import contrastive_loss, self_critic_loss
from pcvae.gaussian import DiagGaussian
from pcvae.metrics.likelihood import AdaptiveNLL, LinearGaussian, anneal, blocks, log_mean_se, pilot
from pcvae.models import build_model

act, as_published, ev, information, latent, probes, samples, text = (import_module(f"pcvae.metrics.{n}") for n in     # the package gives the names of some to functions
    ("activity", "as_published", "evaluate", "information", "latent", "probes", "samples", "text"))


def gen(seed=0): return torch.Generator().manual_seed(seed)


def linear(lengths=(2., 1.), f=4, **kw):
    W = torch.linalg.qr(torch.randn(f, len(lengths), generator=gen(1), dtype=torch.float64))[0] * torch.tensor(lengths, dtype=torch.float64)
    return LinearGaussian(W, torch.linspace(-1, 1, f, dtype=torch.float64), 0.5, **kw)


# --- what a caller gets who says nothing -------------------------------------------------------------------------------
DEFAULTS = [
    (gaussian.logsumexp_safe, dict(dim=-1, inplace=False)), (act.active_units, dict(threshold=0.01)), (act.reencoding_error, dict(how="mean")),
    (as_published.ap_nll, dict(n_samples=50, squared_error=False)), (as_published.ap_mi, dict(weighted=True)), (as_published.ap_mi_ceiling, dict(weighted=True)),
    (as_published.ap_active_units, dict(threshold=0.1)), (as_published.ap_density_coverage, dict(k=5)),
    (ev.published_row, dict(batch=1024, n_samples=50, squared_error=False, weighted=True, k=5, samples=True, nll=True)),
    (ev.evaluate, dict(n_samples=100, nll_target=None, n_nll=None, n_pool=None, n_fit=20_000, n_sample=500, features=None, k=5, seed=0, as_published=None)),
    (information.mutual_information, dict(codes=1)), (information.mutual_posterior_divergence, dict(off_diagonal=False)),
    (latent.decode_walk, dict(common=True)), (latent.traverse, dict(low=-10., high=10., n=100, common=True)), (latent.walk, dict(distance=10., n=100, fixed=(), common=True)),
    (latent.picture_sheet, dict(columns=20, line=0.5)), (latent.starting_codes, dict(start="prior", starts=5)),
    (latent.latent_search, dict(start="prior", starts=5, lr=1e-3, every=100, thresholds=(1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 0.), max_iterations=50_000, context="data")),
    (LinearGaussian, dict(var=1., widen=1., shift=0.)), (likelihood.nll_iw_all, dict(n_samples=500)), (likelihood.nll_iw, dict(n_samples=500, bound="standard")),
    (likelihood.nll_iw_adaptive_all, dict(target=0.05, first=32, max_samples=4096)), (likelihood.nll_iw_adaptive, dict(target=0.05, bound="standard")),
    (likelihood.anneal, dict(tune=False)), (likelihood.nll_ais, dict(steps=200, chains=16, leaps=5, start="prior", bound="standard")),
    (probes.label_draws, dict(even=False)), (probes.linear_probe, dict(penalties=(1e-4, 1e-3, 1e-2, 0.1, 1., 10., 100.))),
    (probes.as_published_probe, dict(lr=1., batch=16, clip=5., patience=2, max_decays=5, epochs=100, seed=0)),
    (probes.few_label_accuracy, dict(sizes=(100, 500, 1000, 2000, 10000), draws=5, seed=0, feature="mean", even=False)),
    (samples.expected_coverage, dict(k=5)), (samples.ball_counts, dict(k=5)), (samples.density_coverage, dict(k=5)), (samples.prdc, dict(k=5)), (samples.precision_recall, dict(k=5)),
    (samples.real_ceiling, dict(k=5)), (samples.PCAFeatures, dict(n=32)), (text.text_samples, dict(prior="standard", seed=0)), (text.text_figures, dict(ks=(2, 3, 4))),
    (text.generation_row, dict(n=10_000, seed=0, ks=(2, 3, 4)))]


@pytest.mark.parametrize("f, expected", DEFAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_defaults_are_the_documented_ones(f, expected):
    found = {p.name: p.default for p in inspect.signature(f).parameters.values()}
    assert {k: found[k] for k in expected} == expected


# --- edges -------------------------------------------------------------------------------------------------------------
def one_bad(x, at=-1):
    x = x.clone(); x.view(-1)[at] = float("nan")
    return x


def test_a_single_bad_value_is_enough():
    mean, logvar = torch.randn(6, 2, generator=gen()), torch.zeros(6, 2)
    with pytest.raises(ValueError, match="not finite"): act.activity(one_bad(mean))
    for q in (DiagGaussian(one_bad(mean), logvar), DiagGaussian(mean, one_bad(logvar))):
        with pytest.raises(ValueError, match="not finite"): information.mutual_information(q)
    for pair in ((one_bad(mean), mean), (mean, one_bad(mean))):
        with pytest.raises(ValueError, match="not finite"): samples.density_coverage(*pair, 2)


def test_the_least_that_is_allowed():
    two = torch.tensor([[0., 1.], [2., 1.]])
    assert act.activity(two).tolist() == [2., 0.]
    with pytest.raises(ValueError, match="at least 2"): act.activity(two[:1])
    q = DiagGaussian(two, torch.zeros(2, 2))
    assert information.mutual_information(q, generator=gen()).ceiling == pytest.approx(math.log(2))
    assert math.isfinite(information.mutual_information(q, codes=2, generator=gen()).se)
    with pytest.raises(ValueError, match=r"\[N, D\]; got shape \(2,\)"): information.mutual_information(q[0])
    assert likelihood.derangement(2).tolist() == [1, 0]
    line = torch.tensor([[0.], [1.]])
    assert samples.density_coverage(line, line + 0.25, 1) == (1.5, 1.) and samples.expected_coverage(2, 1) == pytest.approx(1 - 1 / 3)
    assert samples.prdc(line, line + 0.25, 1) == {"precision": 1., "recall": 1., "density": 1.5, "coverage": 1.}
    m = linear(); x = m.sample(3, gen(1))
    for kw in (dict(steps=1, chains=2, leaps=1), dict(steps=2, chains=2, leaps=1)): assert torch.isfinite(likelihood.nll_ais(m, x, generator=gen(), **kw).nll).all()
    assert len(likelihood.nll_iw_adaptive(m, x, first=2, max_samples=2, generator=gen()).nll) == 3
    for bad in (dict(target=math.inf), dict(target=0.), dict(first=1), dict(first=3, max_samples=2)):
        with pytest.raises(ValueError): likelihood.nll_iw_adaptive(m, x, **bad)
    with pytest.raises(ValueError, match="orthogonal"): LinearGaussian(torch.tensor([[1., 0.001], [0., 1.]]), torch.zeros(2))
    LinearGaussian(torch.tensor([[1e3, 0.], [0., 1e-2]]), torch.zeros(2))                        # orthogonal, of very different lengths
    almost = torch.tensor([[1e3, 1e-4], [0., 1e3]])                                              # 1e-7 of the largest: rounding
    LinearGaussian(almost, torch.zeros(2))


def test_threshold_of_active_units_is_not_included():
    mean = torch.tensor([[0., 0.], [2., 2.2]])                      # variances 2 and 2.42
    assert [act.active_units(mean, t) for t in (1.9, 2., 2.5)] == [2, 1, 0]
    z = torch.tensor([[0., 0.], [2., 4.]]) / math.sqrt(2)
    assert as_published.ap_active_units(z, 1.5) == 1


# --- sizes of blocks: one item or one sample too many is memory, one too few is time -----------------------------------
@pytest.mark.parametrize("x_shape, dim, n, chunk, rows, ks", [
    ((5, 8), 3, 500, 80, 1, 10), ((5, 8), 3, 5, 80, 2, 5), ((5, 2, 4), 20, 500, 80, 1, 4), ((5, 8), 3, 500, 1, 1, 1), ((5, 8), 3, 7, 2 ** 18, 4681, 7)])
def test_blocks(x_shape, dim, n, chunk, rows, ks):
    assert blocks(torch.zeros(x_shape), DiagGaussian(torch.zeros(5, dim), torch.zeros(5, dim)), n, chunk) == (rows, ks)


def test_blocks_hold_what_they_promise(monkeypatch):
    "The decoder never sees more numbers at once than `chunk` allows, and each item gets its samples exactly once."
    m, seen = linear(), []
    x = m.sample(7, gen(1))
    real = m.log_prob
    m.log_prob = lambda x, z: (seen.append(z.shape[:2]), real(x, z))[1]
    likelihood.nll_iw(m, x, 10, chunk=24, generator=gen(2))         # 4 numbers an item: 6 samples at once, one item
    assert seen == [(6, 1), (4, 1)] * 7
    seen.clear(); likelihood.nll_iw(m, x, 3, chunk=24, generator=gen(2))
    assert seen == [(3, 2)] * 3 + [(3, 1)]
    seen.clear(); likelihood.weight_sums(m, x, m.encode(x), {"p": m.prior}, 10, gen(2), chunk=24)
    assert seen == [(6, 1), (4, 1)] * 7


# --- adaptive sampling -------------------------------------------------------------------------------------------------
def sums_of(w):
    w = torch.as_tensor(w, dtype=torch.float64)
    return torch.stack([w.sum(0).log(), (w * w).sum(0).log()])


@pytest.mark.parametrize("w", [[1., 3.], [1., 2., 6.], [5., 5., 5., 5.], [1e-9, 1.]])
def test_standard_error_of_a_log_mean(w):
    k = len(w)
    se = np.std(w, ddof=1) / np.mean(w) / math.sqrt(k)
    assert float(log_mean_se(sums_of(w)[:, None], k)) == pytest.approx(se, abs=1e-7)
    ess = sum(w) ** 2 / sum(v * v for v in w)
    found = AdaptiveNLL(torch.zeros(1), torch.tensor([se]), torch.tensor([k]), torch.tensor([k]), 0.)
    assert float(found.ess) == pytest.approx(ess, rel=1e-5)


def scripted(monkeypatch, se):
    "Samples whose standard error is what `se(k drawn so far)` says, for two items, under each prior."
    calls, total = [], [0]
    def sums(model, x, q, priors, k, generator, chunk):
        calls.append((k, len(x))); total[0] += k
        return {name: torch.zeros(2, len(x), dtype=torch.float64) for name in priors}
    monkeypatch.setattr(likelihood, "weight_sums", sums)
    monkeypatch.setattr(likelihood, "log_mean_se", lambda s, k: torch.as_tensor(se(k), dtype=torch.float64)[:s.shape[1]])
    return calls


def test_pilot_grows_by_half_until_the_error_is_twice_the_target(monkeypatch):
    x, q = torch.zeros(2, 3), DiagGaussian(torch.zeros(2, 1), torch.zeros(2, 1))
    run = lambda se, first=4, most=13, target=0.1: (scripted(monkeypatch, se), pilot(None, x, q, {"p": None}, target, first, most))
    calls, (drawn, needed) = run(lambda k: [9., 9.])
    assert [k for k, _ in calls] == [4, 2, 3, 4] and drawn.tolist() == [13, 13] and needed.tolist() == pytest.approx([13 * 8100.] * 2)
    calls, (drawn, needed) = run(lambda k: [0.2, 0.15])            # exactly twice the target is enough
    assert calls == [(4, 2)] and drawn.tolist() == [4, 4] and needed.tolist() == pytest.approx([16., 9.])
    calls, (drawn, needed) = run(lambda k: [0.21, 0.1] if k == 4 else [0.05])
    assert calls == [(4, 2), (2, 1)] and drawn.tolist() == [6, 4] and needed.tolist() == pytest.approx([1.5, 4.])
    calls, _ = run(lambda k: [9., 9.], first=5, most=5)
    assert [k for k, _ in calls] == [5]


def test_pilot_heeds_the_worst_prior(monkeypatch):
    errors = {0.: [0.3], 1.: [0.1]}
    monkeypatch.setattr(likelihood, "weight_sums", lambda model, x, q, priors, k, generator, chunk: {n: torch.full((2, len(x)), float(i), dtype=torch.float64) for i, n in enumerate(priors)})
    monkeypatch.setattr(likelihood, "log_mean_se", lambda s, k: torch.tensor(errors[float(s[0, 0])], dtype=torch.float64) if k == 4 else torch.tensor([0.01], dtype=torch.float64))
    drawn, needed = pilot(None, torch.zeros(1, 3), DiagGaussian(torch.zeros(1, 1), torch.zeros(1, 1)), {"a": None, "b": None}, 0.1, 4, 100)
    assert drawn.tolist() == [6] and needed.tolist() == pytest.approx([6 * 0.01])


def test_samples_climb_in_steps_of_the_square_root_of_two(monkeypatch):
    needed, seen = [0., 32., 33., 64., 100., 4096., 5000.], []
    def fake_pilot(model, x, q, priors, target, first, most, generator, chunk):
        seen.append((first, most)); return torch.full((7,), 40), torch.tensor(needed, dtype=torch.float64)
    monkeypatch.setattr(likelihood, "pilot", fake_pilot)
    m = linear(); x = m.sample(7, gen(1))
    a = likelihood.nll_iw_adaptive(m, x, generator=gen(2))
    assert a.samples.tolist() == [32, 32, 46, 64, 128, 4096, 4096] and a.pilot.tolist() == [40] * 7 and a.capped == pytest.approx(1 / 7)
    assert seen == [(32, 1024)]
    torch.testing.assert_close(a.nll, m.nll(x))
    likelihood.nll_iw_adaptive(m, x, first=50, max_samples=100, generator=gen(2))
    assert seen[-1] == (50, 50)


# --- annealing ---------------------------------------------------------------------------------------------------------
def test_step_sizes_follow_the_share_of_accepted_moves():
    "Tiny steps are all accepted: each size is the one before times exp(0.3 (1 - 0.7)). Absurd ones never: exp(-0.3 x 0.7)."
    m = linear(); x = m.sample(3, gen(1))
    for start, factor, share in ((1e-4, math.exp(0.09), 1.), (1e6, math.exp(-0.21), 0.)):
        sizes = torch.full((6, 3), start, dtype=torch.float64)
        _, accepted = anneal(m, x, m.prior, m.prior, sizes, 4, 2, gen(2), tune=True)
        np.testing.assert_allclose(sizes.numpy(), start * factor ** np.array([0, 0, 1, 2, 3, 4])[:, None] * np.ones((1, 3)), rtol=1e-9)
        assert accepted.tolist() == pytest.approx([share] * 3)
        kept = sizes.clone(); anneal(m, x, m.prior, m.prior, sizes, 4, 2, gen(2)); assert torch.equal(kept, sizes)
    sizes = []
    real = likelihood.anneal
    try:
        likelihood.anneal = lambda *a, **kw: (sizes.append((a[4].clone(), kw)), real(*a, **kw))[1]
        likelihood.nll_ais(m, x, steps=4, chains=2, leaps=1, generator=gen())
    finally: likelihood.anneal = real
    assert [s[0].shape for s in sizes] == [(4, 3)] * 2 and (sizes[0][0] == 0.3).all() and [s[1] for s in sizes] == [{"tune": True}, {}]
    assert not torch.equal(sizes[1][0], sizes[0][0])               # the second run uses what the first has found


def test_weights_of_annealing_by_hand():
    "Two steps and one move, from the prior and from the encoder, with the numbers that the package draws."
    m = linear(widen=1.2); x = m.sample(2, gen(1)); b = likelihood.temperatures(2)
    for base in (m.prior, m.encode(x)):
        w, _ = anneal(m, x, base, m.prior, torch.full((2, 2), 0.4, dtype=torch.float64), 3, 2, gen(5))
        g = gen(5); z = base.rsample(torch.randn(3, 2, 2, generator=g, dtype=torch.float64))
        joint = lambda z: m.prior.log_prob(z) + m.log_prob(x, z)
        moved, _ = likelihood.hmc(z, lambda z: (1 - b[1]) * base.log_prob(z) + b[1] * joint(z), torch.tensor([0.4, 0.4], dtype=torch.float64), 2, g)
        expected = b[1] * (joint(z) - base.log_prob(z)) + (1 - b[1]) * (joint(moved) - base.log_prob(moved))
        torch.testing.assert_close(w, expected)


def test_errors_of_annealing_are_those_of_its_weights(monkeypatch):
    w = torch.tensor([[0.1, 2.], [0.5, 2.], [-1., 2.]], dtype=torch.float64)
    monkeypatch.setattr(likelihood, "anneal", lambda *a, **kw: (w, torch.tensor([0.25, 0.5])))
    a = likelihood.nll_ais(linear(), torch.zeros(2, 4, dtype=torch.float64), chains=3)
    v = w.exp().numpy()
    np.testing.assert_allclose(a.nll.numpy(), -np.log(v.mean(0))); np.testing.assert_allclose(a.se.numpy(), v.std(0, ddof=1) / v.mean(0) / math.sqrt(3), atol=1e-7)
    assert a.accepted.tolist() == [0.25, 0.5]


# --- samples -----------------------------------------------------------------------------------------------------------
def test_real_ceiling_by_hand():
    real = torch.randn(41, 3, generator=gen(1)); order = torch.randperm(41, generator=gen(2))
    assert samples.real_ceiling(real, 2, gen(2)) == samples.density_coverage(real[order[:20]], real[order[20:40]], 2)


# --- rows --------------------------------------------------------------------------------------------------------------
def test_some_items():
    for limit in (None, 5, 9): assert ev.some(5, limit, 0, "a").tolist() == [0, 1, 2, 3, 4]
    assert sorted(ev.some(5, 4, 0, "a").tolist()) != [0, 1, 2, 3, 4] and len(ev.some(5, 4, 0, "a")) == 4


def test_space_of_features():
    x, images, words = torch.zeros(9, 3), torch.randn(60, 1, 8, 8, generator=gen()), torch.zeros(9, 3, dtype=torch.long)
    own = lambda x: x
    assert ev.feature_space(None, x, x) is samples.features and ev.feature_space(own, words, words) is own and ev.feature_space(False, x, x) is None and ev.feature_space(None, words, words) is None
    assert ev.feature_space(None, images, images)(images).shape == (60, 32)
    assert ev.feature_space(None, images[..., :5, :5], images[..., :5, :5])(images[..., :5, :5]).shape == (60, 25)


def test_columns_of_the_likelihood():
    bound, few = torch.tensor([5., 7., 9., 11.]).double(), torch.tensor([1, 3])
    nll = {"standard": torch.tensor([6., 9.]), "matched": torch.tensor([6.5, 9.])}
    out = ev._whole(bound, few, nll)
    assert out == pytest.approx({"nll_whole": 8 - 1.5, "nll_matched_whole": 8 - 1.25, "nll_whole_se": 0.5})


def test_what_a_paper_printed_is_a_mean_over_items():
    m = linear(); x = m.sample(7, gen(1)); seen = []
    m.published = lambda: {"a": lambda model, x, eps: (seen.append(eps.shape), x.sum(1) + 0 * eps.sum((0, 2)))[1]}
    for rows in (500, 3): assert ev._published(m, x, 4, gen(2), rows) == {"a": pytest.approx(float(x.sum(1).mean()))}
    assert [tuple(s) for s in seen] == [(4, 7, 2), (4, 3, 2), (4, 3, 2), (4, 1, 2)] and ev._published(linear(), x, 4, gen(2)) == {}


def test_parts_of_the_bound():
    m = linear(widen=1.2); x = m.sample(9, gen(1)); q = m.encode(x); charged = DiagGaussian(q.mean / 2, q.logvar)
    items, row = ev._elbo(m, x, q, charged, 4, gen(2))
    p = likelihood.neg_elbo_parts(m, x, gen(2), q=q, charged=charged)
    torch.testing.assert_close(items, p["rec"] + p["kl_fed"].sum(1))
    rec, kl, fed = float(p["rec"].mean()), float(p["kl"].sum(1).mean()), float(p["kl_fed"].sum(1).mean())
    assert row == pytest.approx({"rec": rec, "kl": kl, "kl_fed": fed, "neg_elbo": rec + fed, "objective": rec + kl})


def test_columns_of_the_codes():
    mean = torch.tensor([[0., 0., 0., 0.], [2., 0.5, 0.2, 0.1]])    # variances 2, 0.125, 0.02, 0.005
    q = DiagGaussian(mean, torch.zeros(2, 4))
    row = ev._codes(q, DiagGaussian(mean / 4, q.logvar), torch.tensor([0, 1]), gen(1))
    assert (row["au"], row["au_0.1"], row["au_charged"]) == (3., 2., 1.) and row["activity"] == pytest.approx([2., 0.125, 0.02, 0.005]) and row["mi_ceiling"] == pytest.approx(math.log(2))
    assert row["mi_saturated"] == float(row["mi"] > math.log(2) - 0.5) and row["mpd"] == pytest.approx(information.mutual_posterior_divergence(q))
    none = DiagGaussian(torch.zeros(2, 0), torch.zeros(2, 0))
    assert ev._units(none, none) == {"activity": [], "au": 0., "au_0.1": 0., "au_charged": 0.}


def test_columns_of_an_adaptive_run():
    m = linear(widen=1.5); x = m.sample(20, gen(1)); q = m.encode(x)
    nll, row = ev._likelihoods_to(0.1, m, x, q, {"standard": m.prior}, 400, 2 ** 18, gen(2))
    a = likelihood.nll_iw_adaptive(m, x, 0.1, first=32, max_samples=400, generator=gen(2))
    assert torch.equal(nll["standard"], a.nll) and row["nll"] == pytest.approx(float(a.nll.mean())) and row["nll_samples"] == pytest.approx(float(a.samples.double().mean()))
    assert row["nll_item_se"] == pytest.approx(float((a.se ** 2).mean().sqrt())) and row["nll_pilot"] == pytest.approx(float(a.pilot.double().mean())) and row["nll_capped"] == a.capped and row["nll_items"] == 20.
    few, row = ev._likelihoods_to(0.1, m, x, q, {"standard": m.prior}, 10, 2 ** 18, gen(2))
    assert row["nll_samples"] == 10.                                # fewer than the usual least


# --- identities that both studies rest on ------------------------------------------------------------------------------
def test_everything_at_collapse():
    "q(z|x) = N(0, I) for all x: no information by any measure, and the loudest scores by the published ones."
    n, d = 400, 6
    q = DiagGaussian(torch.zeros(n, d), torch.zeros(n, d)); z = q.sample(generator=gen(1))
    assert information.mutual_information(q, z=z).value == pytest.approx(0, abs=1e-6) and float(self_critic_loss(z, q)) == pytest.approx(math.log(n), abs=1e-5)
    assert float(q.kl(DiagGaussian.standard(d)).sum()) == 0 and act.active_units(q.mean) == 0 and as_published.ap_active_units(z) == d
    assert information.mutual_posterior_divergence(q) == pytest.approx(0, abs=1e-9) and information.gaussian_upper(q) == pytest.approx(0, abs=1e-9)
    density, coverage = samples.density_coverage(z, q.sample(generator=gen(2)))
    assert density == pytest.approx(1, abs=0.15) and coverage == pytest.approx(samples.expected_coverage(n), abs=0.03)


@pytest.mark.parametrize("n", [16, 500])
def test_everything_apart(n):
    q = DiagGaussian(1e3 * torch.arange(n).float()[:, None].expand(n, 2), torch.zeros(n, 2)); z = q.sample(generator=gen(1))
    assert float(self_critic_loss(z, q)) == pytest.approx(0, abs=1e-6) and information.mutual_information(q, z=z).value == pytest.approx(math.log(n), abs=1e-6)


def test_a_floor_of_the_kl_buys_no_information():
    "BN-VAE (0, 0.7) collapsed: every mean 0.7, every variance 1. KL = 0.245 a dimension, MI 0, AU 0; all of the KL is marginal."
    q = DiagGaussian(torch.full((300, 32), 0.7), torch.zeros(300, 32))
    s = information.surgery(q, DiagGaussian.standard(32), generator=gen())
    assert s["kl"] == pytest.approx(32 * 0.245, rel=1e-5) and s["mi"] == pytest.approx(0, abs=1e-5) and s["marginal_kl"] == pytest.approx(s["kl"], abs=1.5) and act.active_units(q.mean) == 0


def test_kl_to_the_matched_prior_is_information_and_its_own_marginal_kl():
    "Bound C of the Scale-VAE study: mean KL_C = (sum of ln v - E ln sigma^2) / 2 = MI + KL(q_agg || N(m, v))."
    q = DiagGaussian(3 * torch.randn(200, 2, generator=gen(1)), 0.4 * torch.randn(200, 2, generator=gen(2)))
    mean, var = likelihood.aggregate_moments(q)
    matched = DiagGaussian(mean, var.log())
    assert float(q.to(torch.float64).kl(matched).sum(-1).mean()) == pytest.approx(information.gaussian_upper(q), rel=1e-6)
    many = DiagGaussian(q.mean.repeat(20, 1), q.logvar.repeat(20, 1))
    s = information.surgery(many, matched, generator=gen(3))
    assert s["mi"] + s["marginal_kl"] == pytest.approx(s["kl"], abs=0.1) and s["kl"] == pytest.approx(information.gaussian_upper(q), rel=1e-6)


def test_a_critic_that_says_nothing_and_one_that_does_not_know_its_left_from_its_right():
    n = 12; a = torch.randn(n, n, generator=gen(), dtype=torch.float64)
    for direction in ("both", "z2x", "x2z"): assert float(contrastive_loss(0 * a, direction)) == pytest.approx(math.log(n))
    assert float(contrastive_loss(a, "both")) == pytest.approx(float(contrastive_loss(a.T, "both"))) and float(contrastive_loss(a, "z2x")) == pytest.approx(float(contrastive_loss(a.T, "x2z")))
    simplex = torch.eye(n).double() - 1 / n; simplex = torch.nn.functional.normalize(simplex, dim=1)
    for t in (2.6593, 14.2857): assert float(contrastive_loss(t * simplex @ simplex.T, "both")) == pytest.approx(math.log(1 + (n - 1) * math.exp(-t * n / (n - 1))))


def test_published_networks_have_their_shapes_and_sizes():
    model = build_model("conv", latent_dim=32)
    assert sum(p.numel() for p in model.parameters()) == 2_017_857
    sizes = lambda net, x: [x.shape[-1]] + [x.shape[-1] for layer in net if (x := layer(x)).dim() == 4 and isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    assert sizes(model.encoder.trunk, torch.zeros(2, 1, 28, 28)) == [28, 26, 12, 5, 2, 1]
    assert sizes(model.decoder.net[2:], torch.zeros(2, 512, 1, 1)) == [1, 2, 5, 12, 26, 28]


# --- text and probes ---------------------------------------------------------------------------------------------------
def rows(*sentences): return torch.tensor([[1, *s] for s in sentences])


def test_runs_of_words_at_the_edge():
    cut = rows([5, 6, 7], [8, 2, 0])                                # a sentence that is cut off, and one with its end
    assert text.word_counts(rows([5, 2, 2])).tolist() == [1] and text.ngrams(cut, 3).tolist() == [[5, 6, 7]] and text.ngrams(cut, 1).tolist() == [[5], [6], [7], [8]] and text.ngrams(cut, 2).tolist() == [[5, 6], [6, 7]]
    for k in (4, 5):
        with pytest.raises(ValueError, match=f"no sentence has {k} words"): text.ngrams(cut, k)
    big = torch.randint(0, 2_000_000, (500, 4), generator=gen()); codes = text.gram_codes(torch.cat([big, big]))
    assert torch.equal(codes[:500], codes[500:]) and len(codes.unique()) == len(big.unique(dim=0))
    assert len(text.gram_codes(torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]])).unique()) == 4


def test_numbers_of_sentences_by_hand():
    x = rows([5, 6, 5, 2, 0], [7, 7, 3, 5, 2])                      # 7 words, one of them <unk>
    assert text.distinct(x, 1) == 4 / 7 and text.distinct(x, 2) == 5 / 5 and text.word_rates(x) == {"words": 3.5, "ended": 1., "unk": 1 / 7}
    assert text.token_entropy(rows([5, 6, 2], [5, 6, 2])) == pytest.approx(math.log(2)) and text.token_entropy(rows([5, 5, 5, 6])) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert text.ngram_overlap(rows([5, 6, 7, 2]), rows([5, 6, 2], [6, 7, 2]), 2) == 1. and text.ngram_overlap(rows([5, 6, 5, 2]), rows([5, 6, 2]), 2) == 0.5
    assert text.corpus_perplexity(torch.tensor([math.log(8.), math.log(2.)]), torch.tensor([4, 2])) == pytest.approx(2.)
    with pytest.raises(ValueError, match="no words"): text.corpus_perplexity(torch.tensor([1.]), torch.tensor([1]))
    y = torch.tensor([1., 2., 3., 4.]); m = torch.stack([y, torch.tensor([1., -1., -1., 1.])], 1)
    assert text.length_r2(m, 2 * y + 3) == pytest.approx(1.) and text.length_r2(m[:, 1:], y) == pytest.approx(0., abs=1e-12) and text.length_r2(m, torch.ones(4)) == 0.
    assert text.length_r2(torch.tensor([[0.], [0.], [1.], [1.]]), torch.tensor([0., 1., 1., 2.])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least 4"): text.length_r2(m[:3], y[:3])


def test_first_words():
    x = rows([5, 6, 2, 0], [7, 8, 9, 2], [5, 2, 0, 0])
    for n, expected in ((1, [[1, 5, 0, 0, 0]]), (2, [[1, 5, 6, 2, 0]]), (3, [[1, 5, 6, 2, 0], [1, 7, 0, 0, 0]]), (5, [[1, 5, 6, 2, 0], [1, 7, 8, 9, 2]]), (6, x.tolist())):
        assert text.first_words(x, n).tolist() == expected
    with pytest.raises(ValueError): text.first_words(x, 7)


def test_averages_of_probes():
    view = SimpleNamespace(encode=lambda x: DiagGaussian(x, x))
    part = lambda n: torch.randn(n, 2, generator=gen(n))
    data = SimpleNamespace(name="d", train=part(30), valid=part(6), test=part(5), labels={"train": torch.arange(30) % 3, "valid": torch.arange(6) % 3, "test": torch.tensor([0, 1, 1, 2, 1])})
    for draws, std in ((2, math.sqrt(0.08)), (3, 0.2), (1, None)):
        answers, sizes = [0.2, 0.6, 0.4][:draws] + [0.9], []
        def probe(x, y, *rest): sizes.append(len(y)); return answers[len(sizes) - 1]
        out = probes.few_label_accuracy(view, data, (10,), draws, probe=probe)
        assert out.pop("acc_10_std", None) == (std if std is None else pytest.approx(std))
        assert out == {"acc_10": pytest.approx(sum(answers[:-1]) / draws), "acc_all": 0.9, "chance": pytest.approx(0.6)} and sizes == [10] * draws + [30]
    order = np.random.RandomState(4).permutation(30)
    assert probes.label_draws(data.labels["train"], 7, 4).tolist() == order[:7].tolist() and len(probes.label_draws(data.labels["train"], 30, 4)) == 30


def test_words_whose_numbers_would_wrap_around():
    "Three words of base 2^22 make 66 bits: without renumbering, these two would be equal in 64."
    grams = torch.tensor([[2 ** 20 + 7, 1, 2], [7, 1, 2], [0, 0, 2 ** 22 - 1]])
    assert len(text.gram_codes(grams).unique()) == 3


@pytest.mark.parametrize("half, dtype", [(540., torch.float32), (550., torch.float64)])
def test_digits_are_doubled_where_a_spread_of_means_asks_for_it(half, dtype):
    "Two means that lie `half` from their middle at std 1: above sqrt(3e5) = 547.7 the squares would cancel in single precision."
    q = DiagGaussian(torch.tensor([[10.], [10. + 2 * half]]), torch.zeros(2, 1))
    z, centred = information.enough_digits(q.mean, q)
    assert z.dtype == centred.mean.dtype == dtype and z[:, 0].tolist() == [-half, half] and torch.equal(centred.mean, z)
    wide = DiagGaussian(q.mean, torch.full((2, 1), 2.))             # relative to the std
    assert information.enough_digits(q.mean, wide)[0].dtype == torch.float32


# --- neighbours ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed, dims", [(0, 9), (1, 9), (2, 30), (3, 30), (4, 60), (5, 60), (6, 200), (7, 200)])
def test_balls_of_a_point_in_the_middle_of_ties(seed, dims):
    "Real points in the middle of a sphere, its own points as generated ones: each lies exactly on the edge of the largest ball, and float32 cannot tell on which side."
    r = np.random.RandomState(seed)
    corner = torch.tensor(r.uniform(50, 100, (1, dims)), dtype=torch.float32)
    signs = torch.tensor(r.choice([-1., 1.], (40, dims)), dtype=torch.float32)
    real = torch.cat([torch.zeros(1, dims), corner * torch.cat([signs, -signs])])      # balanced: the centre is the middle
    fake = corner * torch.tensor(r.choice([-1., 1.], (200, dims)), dtype=torch.float32) * torch.tensor(1 + r.choice([-1e-7, 0., 1e-7], (200, 1)), dtype=torch.float32)
    d2 = lambda a, b: ((a[:, None].double() - b[None].double()) ** 2).sum(-1)
    radius2 = d2(real, real).sort(1).values[:, 5]
    assert samples.ball_counts(real, fake, 5).tolist() == (d2(real, fake) < radius2[:, None]).sum(1).tolist()


def test_one_principal_component():
    x = torch.randn(50, 3, generator=gen()) * torch.tensor([5., 1., 0.1]) + 2
    one = samples.PCAFeatures(x, 1)
    assert one(x).shape == (50, 1) and one(x).var() == pytest.approx(float(torch.linalg.eigvalsh(torch.cov(x.T))[-1]), rel=1e-4)
    with pytest.raises(ValueError, match="n=0 components"): samples.PCAFeatures(x, 0)
