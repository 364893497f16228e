"""GECO, InfoVAE, IWAE, VampPrior, latent reconstruction, the learned variance and the inverse-Lipschitz decoder: against closed forms and brute force,
in training, in lists with other methods, over an interruption."""
import math, warnings

import pytest
import torch

import pcvae.studies                         # registers every method
from pcvae.data import Dataset
from pcvae.gaussian import DiagGaussian
from pcvae.method import Batch, Ctx, Method, Trained, check_methods, infer, make_method, objective, randn_draw
from pcvae.metrics.evaluate import evaluate, generated
from pcvae.metrics.likelihood import nll_iw, nll_iw_all
from pcvae.models import build_model
from pcvae.models.lipschitz import Monotone
from pcvae.objectives import GECO, IWAE, InfoVAE, KERNELS, SCALES, iwae_loss, mmd2
from pcvae.priors import Mixture, VampPrior
from pcvae.theory.linear import linear_vae
from pcvae.training import Recipe, Trainer

CASES = {"GECO": {"threshold": 4., "rate": .01}, "InfoVAE": {"weight": 3.}, "IWAE": {"samples": 3}, "LatentReconstruction": {"weight": 2.}, "VampPrior": {"components": 6}}
VARIANTS = [*CASES.items(), ("IWAE", {"samples": 3, "dreg": True}), ("InfoVAE", {"kernel": "rbf", "alpha": 1.}), ("VampPrior", {"components": 6, "learned": False})]

def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)

X = normal(192, 4).float() * torch.tensor([2., 1., .5, .2])
DATA = Dataset("small", X[:128], X[128:160], X[160:])
DEEP = dict(x_dim=4, latent_dim=2, hidden=(8,), variance=.3)

def network(name="mlp", seed=0, **params):
    torch.manual_seed(seed)
    return build_model(name, **DEEP | params)

def trainer(methods, model=None, epochs=4, **recipe):
    return Trainer(model or network(), methods, DATA, Recipe(epochs=epochs, batch=32, lr=1e-2, **recipe), seed=3)


# ---- all of them
def test_they_are_registered_with_the_studies():
    assert set(CASES) <= set(Method.registry) and pcvae.studies.objectives and pcvae.studies.priors

@pytest.mark.parametrize("name, config", VARIANTS, ids=str)
def test_resume_is_exact(name, config, tmp_path):
    "Four epochs in one go, and two, a new trainer built from another network, and two."
    whole = trainer([make_method(name, **config)])
    whole.fit()
    first = trainer([make_method(name, **config)])
    assert not first.fit(tmp_path/"c.pt", deadline=0., tag="run")
    again = trainer([make_method(name, **config)], network(seed=9))
    assert again.fit(tmp_path/"c.pt", tag="run")
    for a, b in ((whole.model, again.model), (whole.methods, again.methods)):
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    strip = lambda t: [{k: v for k, v in h.items() if k != "seconds"} for h in t.history]
    assert strip(whole) == strip(again)

@pytest.mark.parametrize("name, config", VARIANTS, ids=str)
def test_trains_in_float64_and_evaluates(name, config):
    t = trainer([make_method(name, **config)], dtype="float64")
    t.fit()
    row = evaluate(t.view(), t.data, n_samples=5)
    assert all(math.isfinite(row[k]) for k in ("nll", "mi", "neg_elbo", "objective")) and ("nll_vamp" in row) == (name == "VampPrior")

@pytest.mark.parametrize("name, config", [(n, c) for n, c in VARIANTS if n != "VampPrior"], ids=str)
def test_evaluation_is_that_of_the_plain_vae(name, config):
    "Posterior, bound and priors do not know of these methods."
    model = network()
    plain, view = Trained(model), Trained(model, [make_method(name, **config)])
    for a, b in zip(plain.posteriors(X), view.posteriors(X)): assert torch.equal(a.mean, b.mean) and torch.equal(a.logvar, b.logvar)
    assert torch.equal(nll_iw(plain, X[:9], 5, generator=gen()), nll_iw(view, X[:9], 5, generator=gen())) and list(view.priors()) == ["standard"]

LISTS = [["LinearWarmup", "InfoVAE"], ["LinearWarmup", "IWAE"], ["LinearWarmup", "VampPrior"], ["GECO", "SelfCritic"], ["GECO", "VampPrior"], ["GECO", "IWAE"], ["BatchNormMean", "IWAE", "LatentReconstruction"],
         ["Aggressive", "IWAE"], ["Aggressive", "VampPrior"], ["Aggressive", "GECO"], ["VampPrior", "InfoVAE"], ["VampPrior", "LatentReconstruction", "NeighborEmbedding"], ["FreeBits", "InfoVAE"], ["MAE", "LatentReconstruction"],
         ["SAVAE", "IWAE"], ["SAVAE", "GECO"], ["ScaleUp", "InfoVAE", "LatentReconstruction"], ["DUVAE", "GECO"], ["NeuralCritic", "VampPrior"], ["DeltaVAE", "InfoVAE"]]

@pytest.mark.parametrize("names", LISTS, ids="+".join)
def test_goes_together(names):
    small = CASES | {"SAVAE": {"steps": 2}, "Aggressive": {"max_inner": 3, "check_every": 1}, "NeuralCritic": {"dim": 4}}
    t = trainer([make_method(n, **small.get(n, {})) for n in names], epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert t.fit() and math.isfinite(t.history[-1]["valid_neg_elbo"])

@pytest.mark.parametrize("a, b, why", [("GECO", "Beta", "learns the KL weight"), ("GECO", "LinearWarmup", "learns the KL weight"), ("GECO", "InfoVAE", "learns the KL weight"),
    ("IWAE", "FreeBits", "IWAE has none"), ("IWAE", "MAE", "IWAE has none"), ("IWAE", "ScaleUp", "another code"), ("IWAE", "VampPrior", "prior of its own"),
    ("VampPrior", "ScaleUp", "drop one"), ("VampPrior", "BatchNormMean", "encoder alone"), ("VampPrior", "DUVAE", "encoder alone"), ("VampPrior", "DeltaVAE", "encoder alone"),
    ("VampPrior", "SAVAE", "encoder alone"), ("VampPrior", "FreeBits", "only a part of the KL")])
def test_does_not_go_together(a, b, why):
    for names in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=why): check_methods([make_method(n, **CASES.get(n, {})) for n in names])

@pytest.mark.parametrize("name", ["GECO", "InfoVAE", "IWAE", "VampPrior"])
def test_only_once(name):
    with pytest.raises(ValueError): check_methods([make_method(name, **CASES[name])] * 2)


# ---- GECO
def test_geco_finds_the_constrained_optimum_of_the_linear_vae():
    "At rest the reconstruction costs kappa; with one active dimension the weight that does so is known in closed form."
    lam, s2, F = 4., 1., 3
    x = normal(4096, F).float() * torch.tensor([lam ** .5, .01, .01])
    x = (x - x.mean(0)) / x.std(0, correction=0) * torch.tensor([lam ** .5, .01, .01])
    # optimum at weight w (nbs/theory/linear): decoder^2 = lam - w s2, encoder = decoder / lam, posterior variance w s2 / lam
    def rec(w):
        W2 = lam - w * s2
        v, d = W2 ** .5 / lam, w * s2 / lam
        return F / 2 * math.log(2 * math.pi * s2) + ((1 - W2 ** .5 * v) ** 2 * lam + d * W2 + 2e-4) / (2 * s2)
    kappa = rec(1.5)
    torch.manual_seed(0)
    t = Trainer(linear_vae(F, 1, s2), [GECO(kappa, rate=.02, momentum=.8)], Dataset("line", x, x[:256], x[:256]), Recipe(epochs=60, batch=512, lr=1e-2), seed=0)
    t.fit()
    assert t.history[-1]["train_rec"] == pytest.approx(kappa, abs=.05)
    assert float(t.methods[0].kl_weight(1., Ctx())) == pytest.approx(1.5, rel=.15)

@pytest.mark.parametrize("threshold, word", [(-1e3, "lower than this model reaches"), (1e3, "without a code")])
def test_geco_says_when_its_threshold_means_nothing(threshold, word):
    with pytest.warns(UserWarning, match=word): trainer([GECO(threshold, rate=.1)], epochs=1).fit()

def test_geco_learns_once_per_step():
    "Aggressive training passes the loss many times for one step; only the pass that records counts."
    m = GECO(0., rate=.1, momentum=0.)
    b = Batch(X[:8], network(), [m], Ctx(training=True, record=False, draw=randn_draw(gen())))
    objective(b.model, [m], b.x, b.ctx)
    assert not m.seen
    total, parts = objective(b.model, [m], b.x, Ctx(training=True, record=True, draw=randn_draw(gen())))
    assert m.average == pytest.approx(float(-parts["log_px"].detach().mean())) and float(total.detach()) == pytest.approx(float((parts["kl"].sum(-1) - parts["log_px"]).detach().mean()))


# ---- InfoVAE
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n, m", [(2, 2), (5, 3), (4, 9)])
def test_mmd_against_all_pairs(kernel, n, m):
    z, y = normal(n, 3), 2 * normal(m, 3, seed=1) + 1
    f = {"imq": lambda d, c: c / (c + d), "rbf": lambda d, c: math.exp(-d / c)}[kernel]
    k = lambda a, b: sum(f(float((a - b).square().sum()), s * 6) for s in SCALES) / len(SCALES)
    own = lambda t: sum(k(t[i], t[j]) for i in range(len(t)) for j in range(len(t)) if i != j) / (len(t) * (len(t) - 1))
    assert float(mmd2(z, y, kernel)) == pytest.approx(own(z) + own(y) - 2 * sum(k(a, b) for a in z for b in y) / (n * m), abs=1e-12)

def test_infovae_loss_is_equation_4():
    model, x = network().double(), X[:16].double()
    m = InfoVAE(.75, 7.)
    total, parts = objective(model, [m], x, Ctx(training=True, draw=randn_draw(gen(), x)))
    draw = randn_draw(gen(), x)
    z, y = model.encode(x).rsample(draw((16, 2))), draw((16, 2))
    assert float(total.detach()) == pytest.approx(float(((.25 * parts["kl"].sum(-1) - parts["log_px"]).mean() + 7 * mmd2(z, y)).detach()), abs=1e-9)
    g = torch.autograd.grad(mmd2(z, z.detach().clone()), z, retain_graph=True)[0]
    assert torch.isfinite(g).all()          # equal points have distance 0

def test_infovae_measures_against_the_prior_of_the_list():
    model, x = network().double(), X[:16].double()
    vamp = VampPrior(3).double(); vamp.setup(model, 5 * x)
    b = infer(Batch(x, model, [vamp, InfoVAE(weight=1.)], Ctx(draw=randn_draw(gen(), x)))); b.z = b.q.mean
    eps = torch.randn(16, 2, generator=gen(), dtype=torch.float64)
    assert float(InfoVAE(weight=1.).penalty(b)["mmd"].detach()) == pytest.approx(float(mmd2(b.z, vamp.priors(model)["vamp"].rsample(eps)).detach()), abs=1e-12)


# ---- IWAE
def test_one_sample_is_the_plain_vae_to_the_bit():
    for dreg in (False, True):
        a, b = trainer([]), trainer([IWAE(1, dreg)])
        a.fit(); b.fit()
        assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())

@pytest.mark.parametrize("w", [1., .25])
@pytest.mark.parametrize("k", [2, 7])
def test_loss_is_the_bound(k, w):
    model, x = network().double(), X[:6].double()
    methods = [make_method("Beta", beta=w), IWAE(k)]
    total, parts = objective(model, methods, x, Ctx(draw=randn_draw(gen(), x)))
    draw, q = randn_draw(gen(), x), model.encode(x)
    draw(q.shape)
    z = q.rsample(draw((k, *q.shape)))
    log_w = model.log_prob(x, z) + w * (model.prior.log_prob(z) - q.log_prob(z))
    assert float(total.detach()) == pytest.approx(float((math.log(k) - log_w.logsumexp(0)).mean().detach()), abs=1e-9)

@pytest.mark.parametrize("w", [1., .5, 0.])
def test_doubly_reparametrised_gradient_against_an_exact_one(w):
    "K = 2 codes on a grid of noise: both estimators integrate to the gradient of the integral, taken by finite differences."
    torch.manual_seed(0)
    model = linear_vae(4, 1, .3).double()       # smooth, so that the grid is exact
    x = X[:1].double()
    t = torch.linspace(-7, 7, 241, dtype=torch.float64)
    eps = torch.cartesian_prod(t, t)
    weight = (-.5 * eps.square().sum(1)).exp(); weight /= weight.sum()
    n = len(eps)
    def batch(mean, logvar): return Batch(x.expand(n, -1), model, [], Ctx(draw=lambda shape: eps.T[..., None]), kl_weight=w, q=DiagGaussian(mean.expand(n, 1), logvar.expand(n, 1)))
    def value(mean, logvar):
        b = batch(mean, logvar)
        z = b.q.rsample(eps.T[..., None])
        log_w = model.log_prob(b.x, z) + w * (model.prior.log_prob(z) - b.q.log_prob(z))
        return float(weight @ (math.log(2) - log_w.logsumexp(0)).detach())
    at = [torch.tensor([[.4]], dtype=torch.float64), torch.tensor([[-.8]], dtype=torch.float64)]
    h = 1e-4
    exact = [(value(at[0] + h, at[1]) - value(at[0] - h, at[1])) / (2 * h), (value(at[0], at[1] + h) - value(at[0], at[1] - h)) / (2 * h)]
    for dreg in (False, True):
        rows = [a.expand(n, 1).clone().requires_grad_() for a in at]
        g = torch.autograd.grad(iwae_loss(batch(*rows), 2, dreg) * n, rows)     # one row for each pair of codes
        assert [float(weight @ v[:, 0]) for v in g] == pytest.approx(exact, abs=1e-6), dreg

def test_decoder_gradient_is_the_same_for_both():
    model, x = network().double(), X[:6].double()
    decoder = list(model.decoder.parameters())
    a, b = (torch.autograd.grad(objective(model, [IWAE(5, dreg)], x, Ctx(draw=randn_draw(gen(), x)))[0], decoder) for dreg in (False, True))
    for u, v in zip(a, b): assert torch.allclose(u, v, atol=1e-12)

def test_bound_at_an_exact_posterior_has_no_gradient_for_the_encoder():
    "All weights are equal there, whatever the noise: DReG is 0 for every draw, the plain gradient only in the mean."
    model = linear_vae(3, 1, .5).double()
    w = torch.tensor([1., .5, -.5], dtype=torch.float64)
    with torch.no_grad():
        model.decoder.net.weight.copy_(w[:, None]); model.decoder.net.bias.zero_()
        precision = 1 + w @ w / .5
        model.encoder.head.weight.copy_(torch.stack([w / .5 / precision, 0 * w])); model.encoder.head.bias.copy_(torch.tensor([0., -float(precision.log())]))
    x = normal(5, 3)
    encoder = lambda dreg: torch.cat([g.flatten() for g in torch.autograd.grad(objective(model, [IWAE(4, dreg)], x, Ctx(draw=randn_draw(gen(), x)))[0], list(model.encoder.parameters()))])
    assert encoder(True).norm() < 1e-7 < 1e-3 < encoder(False).norm()


# ---- VampPrior
def test_mixture_is_a_density_and_its_samples_follow_it():
    parts = DiagGaussian(2 * normal(4, 1), normal(4, 1, seed=1))
    mix, t = Mixture(parts), torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    p = mix.log_prob(t[:, None]).exp() / 1000
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    assert float((p * t).sum()) == pytest.approx(float(mix.mean), abs=1e-6) and float((p * t * t).sum() - mix.mean ** 2) == pytest.approx(float(mix.var), abs=1e-6)
    s = mix.sample(100_000, gen(2))[:, 0].sort().values
    below = torch.special.ndtr((s[:, None] - parts.mean[:, 0]) / parts.std[:, 0]).mean(1)
    assert float((below - torch.arange(1e5) / 1e5).abs().max()) < 1.95 / 1e5 ** .5           # Kolmogorov and Smirnov, 0.1 %

def test_first_noise_chooses_the_component_and_stays_noise():
    parts = DiagGaussian(torch.tensor([[0., 0.], [100., 0.], [200., 0.]]).double(), torch.zeros(3, 2).double())
    s = Mixture(parts).sample(60_000, gen())
    k = (s[:, 0] / 100).round()
    rest = torch.stack([s[:, 0] - 100 * k, s[:, 1]])
    assert ((torch.bincount(k.long()) / 20_000 - 1).abs() < .03).all()
    for c in range(3): assert torch.allclose(torch.cov(rest[:, k == c]), torch.eye(2).double(), atol=.04) and rest[:, k == c].mean(1).abs().max() < .03
    assert torch.isfinite(Mixture(parts).rsample(torch.tensor([[-9., 0.], [9., 0.], [0., 0.]]))).all()

def test_one_component_has_the_closed_form():
    model, x = network().double(), X[:4].double()
    vamp = VampPrior(1).double(); vamp.setup(model, x)
    p = model.encode(x[:1]).detach()
    b = infer(Batch(x, model, [vamp], Ctx())); b.z = b.q.sample(200_000, gen())
    estimate = model.encode(x).kl(model.prior).sum(-1).mean() + vamp.penalty(b)["vamp"]
    assert float(estimate) == pytest.approx(float(model.encode(x).kl(p[0]).sum(-1).mean()), rel=.01)

def test_loss_is_the_weighted_kl_from_the_mixture():
    model, x = network().double(), X[:8].double()
    vamp = VampPrior(4).double(); vamp.setup(model, 3 * x)
    total, parts = objective(model, [make_method("Beta", beta=.25), vamp], x, Ctx(training=True, draw=randn_draw(gen(), x)))
    q = model.encode(x)
    z = q.rsample(torch.randn(8, 2, generator=gen(), dtype=torch.float64))
    p = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(4).double()),
                                              torch.distributions.Independent(torch.distributions.Normal(model.encode(3 * x[:4]).mean, model.encode(3 * x[:4]).std), 1))
    kl = q.kl(model.prior).sum(-1) + model.prior.log_prob(z) - p.log_prob(z)
    assert float(total.detach()) == pytest.approx(float((.25 * kl - parts["log_px"]).mean().detach()), abs=1e-9)

def test_bound_and_samples_use_it():
    t = trainer([VampPrior(6)]); t.fit()
    view = t.view()
    vamp = view.priors()["vamp"]
    nll = nll_iw_all(view, DATA.test, view.priors(), 2000, generator=gen())
    grid = torch.cartesian_prod(*[torch.linspace(-8, 8, 161)] * 2)
    with torch.no_grad():
        exact = torch.stack([-(view.log_prob(x.expand(len(grid), -1), grid) + vamp.log_prob(grid) + 2 * math.log(.1)).logsumexp(0) for x in DATA.test])
    assert float(nll["vamp"].mean()) == pytest.approx(float(exact.mean()), abs=.05) and abs(float((nll["vamp"] - nll["standard"]).mean())) > .02
    x = generated(view, 4000, 500, gen())
    own = view.decode(vamp.sample(4000, gen(1))).mean
    assert torch.allclose(x.mean(0), own.mean(0), atol=.15)

def test_weights_are_selected_by_its_own_bound():
    t = trainer([VampPrior(6)], epochs=1); t.fit()
    q, p = t.view().encode(DATA.valid), t.view().priors()["vamp"]
    z = q.sample(generator=t.eye("vamp", 0))
    assert t.valid["neg_elbo"] == pytest.approx(t.history[0]["valid_neg_elbo"] + float((t.model.prior.log_prob(z) - p.log_prob(z)).mean()), abs=1e-5)
    assert t.valid["neg_elbo"] != t.history[0]["valid_neg_elbo"]
    t = trainer([VampPrior(6)], epochs=3, select="best"); t.fit()
    assert any(h["valid_neg_elbo"] != t.best["neg_elbo"] for h in t.history) and t.best["neg_elbo"] not in [h["valid_neg_elbo"] for h in t.history]

def test_fixed_pseudo_inputs_stay():
    t = trainer([VampPrior(6, learned=False)]); before = t.methods[0].inputs.clone(); t.fit()
    assert torch.equal(before, t.methods[0].inputs) and torch.equal(before, X[:6])
    learned = trainer([VampPrior(6)]); learned.fit()
    assert (learned.methods[0].inputs - X[:6]).abs().max() > .01

def test_pixels_stay_pixels_and_words_are_refused():
    images = (X > 0).float()
    t = Trainer(network(likelihood="bernoulli"), [VampPrior(40)], Dataset("bits", images[:128], images[128:160], images[160:]), Recipe(epochs=2, batch=32, lr=.1)); t.fit()
    assert -.11 < t.methods[0].inputs.min() and t.methods[0].inputs.max() < 1.11        # within one step of the border
    with pytest.raises(TypeError, match="learned=False"): VampPrior(2).setup(network(), torch.ones(4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="larger Recipe.batch"): trainer([VampPrior(64, learned=False)])


# ---- latent reconstruction
def test_latent_reconstruction_against_its_closed_form():
    "Linear maps: (|I - V W|^2 + |shift|^2) / D in the mean."
    model = linear_vae(4, 2).double()
    V, W, c = model.encoder.head.weight[:2], model.decoder.net.weight, model.encoder.head.weight[:2] @ model.decoder.net.bias + model.encoder.head.bias[:2]
    m = make_method("LatentReconstruction", weight=5.)
    b = infer(Batch(X[:64].double().repeat(1000, 1), model, [m], Ctx(draw=randn_draw(gen(), W))))
    exact = ((torch.eye(2).double() - V @ W).square().sum() + c.square().sum()) / 2
    assert float(m.penalty(b)["latent_reconstruction"].detach()) == pytest.approx(5 * float(exact.detach()), rel=.02)

@pytest.mark.parametrize("name, params", [("lstm", dict(vocab_size=5, latent_dim=2, embedding=4, hidden=6, max_len=3)),
    ("pixelcnn", dict(latent_dim=1, image_size=2, kind="plain", channels=4, kernels=(3, 3, 3), encoder_channels=(4,), encoder_width=8, maps=2))])
def test_latent_reconstruction_refuses_decoders_that_need_x(name, params):
    model = build_model(name, **params)
    with pytest.raises(TypeError, match="not for sentences or pixel by pixel"): make_method("LatentReconstruction").setup(model, None)
    assert model.training


# ---- models
def test_learned_variance_goes_to_the_squared_error():
    "A linear VAE that may learn it ends at probabilistic PCA's; the same one with the number 1 collapses, since all eigenvalues are below."
    scale = torch.tensor([.9, .6] + [.2] * 6)
    x = normal(2000, 8).float() * scale
    data, out = Dataset("line", x, x[:200], x[:200]), {}
    for variance in (1., "learned"):
        torch.manual_seed(0)
        t = Trainer(linear_vae(8, 3, variance), [], data, Recipe(epochs=40, batch=100, lr=1e-2, decay=.5), seed=0); t.fit()
        out[variance] = t.model.encode(x).kl(t.model.prior).mean(0), t.model.decoder.likelihood
    assert out[1.][0].max() < .05 and sorted(out["learned"][0].tolist())[1] > .5 and sorted(out["learned"][0].tolist())[0] < .1
    rest = torch.linalg.eigvalsh(torch.cov(x.T))[:6].mean()
    assert float(out["learned"][1].log_var.detach().exp()) == pytest.approx(float(rest), rel=.1)

def test_learned_variance_belongs_to_the_decoder_and_a_number_stays_what_it_was():
    t = trainer([], network(variance="learned"))
    assert any(p is t.model.decoder.likelihood.log_var for g in t.optimizer.param_groups if g["name"] == "decoder" for p in g["params"])
    assert "decoder.likelihood.var" in network(variance=.3).state_dict() and "decoder.likelihood.var" not in t.model.state_dict()
    t.fit(); assert t.model.decoder.likelihood.log_var != 0

@pytest.mark.parametrize("L", [.05, 1., 20.])
def test_inverse_lipschitz_before_and_after_training(L):
    model = network("lidvae", hidden=(16, 8), lipschitz=L)
    t = trainer([], model, dtype="float64", clip=1.); t.fit()
    for net in (model.double().decoder.net, t.model.decoder.net):
        a, d = 5 * normal(5000, 2, seed=1), normal(5000, 2, seed=2) * 10 ** torch.linspace(-4, 1, 5000, dtype=torch.float64)[:, None]
        with torch.no_grad(): assert float(((net(a + d) - net(a)).norm(dim=1) / d.norm(dim=1)).min()) >= L * (1 - 1e-6)

def test_inverse_lipschitz_holds_for_the_jacobian():
    torch.manual_seed(0)
    T = Monotone(4, 9, .5).double()
    with torch.no_grad(): T.inner.weight.mul_(4)
    for u in normal(20, 4):
        J = torch.autograd.functional.jacobian(T, u)
        assert torch.allclose(J, J.T) and float(torch.linalg.eigvalsh(J).min()) >= .5 - 1e-9

@pytest.mark.parametrize("name, config, error, match", [
    ("GECO", {"threshold": math.inf}, ValueError, "number of nats"), ("GECO", {"threshold": 1., "rate": -1.}, ValueError, "positive"), ("GECO", {}, TypeError, "threshold"), ("GECO", {"threshold": 1., "momentum": 1.}, ValueError, "in \\[0, 1\\)"),
    ("InfoVAE", {"alpha": 2.}, ValueError, "at most 1"), ("InfoVAE", {"weight": -1.}, ValueError, "at least 0"), ("InfoVAE", {"kernel": "rbff"}, ValueError, "Did you mean 'rbf'"),
    ("IWAE", {"samples": 0}, ValueError, "at least 1"), ("IWAE", {"sample": 3}, ValueError, "Did you mean 'samples'"), ("IWAE", {"samples": 2.5}, TypeError, "should be int"),
    ("LatentReconstruction", {"weight": math.inf}, ValueError, "at least 0"), ("VampPrior", {"components": 0}, ValueError, "at least 1"), ("VampPrior", {"learned": 1}, TypeError, "should be bool")])
def test_bad_arguments(name, config, error, match):
    with pytest.raises(error, match=match): make_method(name, **config)
