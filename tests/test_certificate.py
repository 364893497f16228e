"""The standing certificate: whatever the library calls a bound sums, as exp(bound), to at most 1 over a world whose items can all be counted.

A new method needs an entry in `METHODS`; without one `test_every_method_is_certified` fails and says so.
"""
import copy, functools, importlib, itertools, json, math, pkgutil, warnings

import pytest
import torch
import torch.nn.functional as F

import pcvae
from pcvae.data import Dataset
from pcvae.data.synthetic import EnumerableWorld, enumerable
from pcvae.gaussian import DiagGaussian
from pcvae.method import Ctx, Method, Trained, make_method
from pcvae.metrics import ap_nll
from pcvae.models import build_model
from pcvae.theory.certificate import (FiniteWorld, bit_vectors, certificate, exact_figures, gaussian_rule, mean_log_average, sampled_figure,
                                      sentences, verdict)
from pcvae.training import Recipe, Trainer

for module in pkgutil.walk_packages(pcvae.__path__, "pcvae."):      # so that every method is registered, wherever it stands
    if not module.name.endswith("__main__"): importlib.import_module(module.name)
REGISTERED = sorted(name for name, cls in Method.registry.items() if cls.__module__.startswith("pcvae."))

# name of a method -> lists of (method, arguments) that are certified for it; penalties and networks small, everything else strong
METHODS = {
    "LinearWarmup": [[("LinearWarmup", {"epochs": 2.})]],
    "Cyclical": [[("Cyclical", {})]],
    "Beta": [[("Beta", {"beta": .2})]],
    "FreeBits": [[("FreeBits", {"bits": .5})], [("FreeBits", {"bits": .5, "per": "batch"})]],
    "DeltaVAE": [[("DeltaVAE", {"delta": .3})], [("ScaleUp", {"des_std": 3.}), ("DeltaVAE", {"delta": .3})]],
    "BatchNormMean": [[("BatchNormMean", {"gamma": 1.})], [("BatchNormMean", {"gamma": 0., "shift": .7})]],
    "DUVAE": [[("DUVAE", {"gamma": 1.})]],
    "ScaleUp": [[("ScaleUp", {"des_std": 3.})], [("BatchNormMean", {"gamma": .6}), ("ScaleUp", {"des_std": 3.})]],
    "SelfCritic": [[("SelfCritic", {"weight": 1.})]],
    "NeuralCritic": [[("NeuralCritic", {"weight": 5., "dim": 4, "hidden_x": 8, "hidden_z": 8})]],
    "HybridCritic": [[("HybridCritic", {"weight": 5., "shared": 1, "dim": 4, "hidden_x": 8, "hidden_z": 8})]],
    "NeighborEmbedding": [[("NeighborEmbedding", {"loss": "lp", "cap": -1.})]],
    "MAE": [[("MAE", {"diversity": 4., "free_bits": .5})]],
    "SAVAE": [[("SAVAE", {"steps": 2})]],
    "Aggressive": [[("Aggressive", {"max_inner": 4, "check_every": 2, "max_epochs": 2})]],
    "GECO": [[("GECO", {"threshold": 1., "rate": .05})]],
    "InfoVAE": [[("InfoVAE", {"alpha": .9, "weight": 5.})]],
    "IWAE": [[("IWAE", {"samples": 4})], [("BatchNormMean", {"gamma": 1.}), ("IWAE", {"samples": 4, "dreg": True})]],
    "LatentReconstruction": [[("LatentReconstruction", {"weight": 10.})]],
    "VampPrior": [[("VampPrior", {"components": 3})]],
}
ENTRY = "has no certificate: add a line for it to METHODS in tests/test_certificate.py, with arguments under which it does something"

BITS = bit_vectors(3).double()
EVEN = bit_vectors(3)[BITS.sum(1) % 2 == 0]             # three bits, any two of them independent
DATA = Dataset("even", EVEN.repeat(32, 1), EVEN, EVEN)

@functools.cache
def trained(label: str, epochs: int, seed: int):
    methods = json.loads(label)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build_model("mlp", x_dim=3, latent_dim=1, hidden=(16, 16), likelihood="bernoulli")
    trainer = Trainer(model, [make_method(n, **c) for n, c in methods], DATA, Recipe(epochs=epochs, batch=16, lr=2e-2, dtype="float64"), seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit()
    return trainer.view()

@torch.no_grad()
def stressed(view, decoder=1., mean=1., logvar=0., f=1.):
    "A copy with sharper decoder, wider or narrower posteriors, or the means of Scale-VAE divided by f and its factor multiplied."
    view = copy.deepcopy(view)
    head, out = view.model.encoder.head, view.model.decoder.net[-1]
    for p in (out.weight, out.bias): p *= decoder
    for p in (head.weight, head.bias): p[:1] *= mean / f
    head.bias[1:] += logvar
    for m in view.methods:
        if type(m).__name__ == "ScaleUp": m.stds[m.stds > 0] /= f; m.f *= f
    return view

STRESS = {"as trained": {}, "sharp decoder": {"decoder": 3.}, "wide means": {"mean": 3.}, "narrow posteriors": {"logvar": -3.}, "shrunken means": {"f": 10.}}
strict = lambda table: table[table["said to be"].isin(["bound", "exact"])]

def assert_bounds(table):
    bad = strict(table)[strict(table).verdict != "bound"]
    assert not len(bad), f"called a bound, but none:\n{bad}"
    assert strict(table)["error"].max() < 2e-2, strict(table)


# ---- every method of the library
def test_every_method_is_certified():
    missing = [name for name in REGISTERED if name not in METHODS]
    assert not missing, f"{', '.join(missing)} {ENTRY}"
    assert all(any(n == name for n, _ in methods) for name, lists in METHODS.items() for methods in lists)

CASES = [("plain", [])] + [(name, methods) for name in REGISTERED for methods in METHODS.get(name, [None])]

@pytest.mark.parametrize("epochs, seed", [(10, 0), (2, 1)], ids=["trained", "hardly trained"])
@pytest.mark.parametrize("name, methods", CASES, ids=lambda v: v if isinstance(v, str) else "+".join(n for n, _ in v or []))
def test_what_is_called_a_bound_is_one(name, methods, epochs, seed):
    assert methods is not None, f"{name} {ENTRY}"
    view = trained(json.dumps(methods), epochs, seed)
    for how in STRESS.values(): assert_bounds(certificate(stressed(view, **how), BITS, EVEN.double(), n_samples=20, repeats=2))

@pytest.mark.parametrize("method", ["plain", "DeltaVAE", "BatchNormMean", "ScaleUp"])
def test_each_item_stays_below_its_own_likelihood(method):
    "Sharper than the sum, where the prior is known: log p(x) >= IW-20 >= ELBO for each item and prior."
    view = trained(json.dumps(METHODS[method][0] if method != "plain" else []), 10, 0)
    world = FiniteWorld(view, BITS)
    for name, p in world.priors().items():
        own = FiniteWorld(view, BITS); own.prior = p
        figures = exact_figures(own, {name: p}, 20)
        suffix = "" if name == "standard" else f"_{name}"
        nll, elbo, exact = figures["nll" + suffix][1], figures["neg_elbo" + suffix][1], figures["p(x)"][1]
        assert (exact <= nll + 1e-3).all() and (nll <= elbo + 1e-7).all()


def test_each_method_changes_something():
    "A certificate of lists that leave the VAE as it is would be worth nothing: posterior, loss or weights differ from the plain one's."
    plain = certificate(trained("[]", 10, 0), BITS, n_samples=5)["sum"]
    for name, lists in METHODS.items():
        for methods in lists: assert (certificate(trained(json.dumps(methods), 10, 0), BITS, n_samples=5, repeats=2)["sum"][plain.index] - plain).abs().max() > 1e-6, name


# ---- it can tell
@pytest.mark.parametrize("f", [1., 10.])
def test_what_scale_vae_published_is_refuted(f):
    view = stressed(trained(json.dumps(METHODS["ScaleUp"][0]), 10, 0), f=f)
    table = certificate(view, BITS, n_samples=20)
    for name in ("objective", "loss", "scale_p1", "scale_p2"): assert table.loc[name, "sum"] - table.loc[name, "error"] > 1.1 and table.loc[name, "verdict"].startswith("no bound")
    assert table.loc["scale_p1", "sum"] == pytest.approx(table.loc["objective", "sum"], abs=table.loc["scale_p1", "error"] + 1e-3)
    assert_bounds(table)

def test_shrinking_the_means_of_scale_vae_costs_nothing():
    view = trained(json.dumps(METHODS["ScaleUp"][0]), 10, 0)
    sums = [certificate(stressed(view, f=f), BITS, n_samples=20, repeats=2)["sum"] for f in (1., 3., 30.)]
    assert sums[0].objective < sums[1].objective < sums[2].objective
    assert sums[0].nll == pytest.approx(sums[2].nll, abs=1e-9) and sums[0].nll_matched == pytest.approx(sums[2].nll_matched, abs=1e-9)

def test_loss_with_a_small_weight_is_refuted():
    assert certificate(trained(json.dumps(METHODS["Beta"][0]), 10, 0), BITS).loc["loss", "sum"] > 1.2
    warm = trained(json.dumps(METHODS["FreeBits"][0]), 10, 0)
    warm = Trained(warm.model, [make_method("LinearWarmup", epochs=4.)])
    sums = [certificate(warm, BITS, ctx=Ctx(e, e, 1, 10)).loc["loss", "sum"] for e in (0, 2, 4)]
    assert sums[0] > sums[1] > sums[2] and sums[0] > 1 >= sums[2]

@pytest.fixture(scope="module")
def parts():
    "A model whose code carries something, and the parts of its figures."
    world = FiniteWorld(trained(json.dumps(METHODS["FreeBits"][0]), 10, 0), BITS)
    t, weight = gaussian_rule(1)
    q, p = world.fed, world.prior
    z = q.rsample(t[:, None])
    log_px = world.log_prob(world.symbols, z)
    with torch.no_grad(): ones = (BITS * F.logsigmoid(world.view.decode(z).logits)).sum(-1)
    return dict(world=world, weight=weight, q=q, p=p, log_px=log_px, ones=ones, kl=q.kl(p).sum(-1), rec=-(weight @ log_px), log_w=log_px + p.log_prob(z) - q.log_prob(z),
                iw=lambda log_w: -mean_log_average(log_w, weight, 20), log_q=q.log_prob(z))

RIGHT = {"elbo": lambda a: a["rec"] + a["kl"], "importance weighted": lambda a: a["iw"](a["log_w"])}
WRONG = {
    "half the KL": lambda a: a["rec"] + a["kl"] / 2,
    "no KL": lambda a: a["rec"],
    "KL without the mean": lambda a: a["rec"] + DiagGaussian(0 * a["q"].mean, a["q"].logvar).kl(a["p"]).sum(-1),
    "KL of a shrunken mean": lambda a: a["rec"] + DiagGaussian(a["q"].mean / 3, a["q"].logvar).kl(a["p"]).sum(-1),
    "a prior of each item's own": lambda a: a["rec"] + a["q"].kl(a["q"]).sum(-1),
    "posterior mean for a sample": lambda a: -a["world"].log_prob(a["world"].symbols, a["q"].mean) + a["kl"],
    "likelihood of the ones only": lambda a: -(a["weight"] @ a["ones"]) + a["kl"],
    "log of the sum": lambda a: a["iw"](a["log_w"]) - math.log(20),
    "log q without its variance": lambda a: a["iw"](a["log_w"] - .5 * a["q"].logvar.sum(-1)),
    "no prior": lambda a: a["iw"](a["log_px"] - a["log_q"]),
}

@pytest.mark.parametrize("name", [*RIGHT, *WRONG])
def test_mistakes_are_caught(parts, name):
    total = float((-{**RIGHT, **WRONG}[name](parts)).exp().sum())
    assert (verdict(total) == "bound") == (name in RIGHT), total
    assert name in RIGHT or total > 1.05


# ---- other worlds
WORDS = [("lm", [])] + [(kind, methods) for kind in ("concat", "skip", "critics") for methods in ([], *(METHODS[n][0] for n in ("BatchNormMean", "ScaleUp", "DeltaVAE")))]

@pytest.mark.parametrize("kind, methods", WORDS, ids=lambda v: v if isinstance(v, str) else "+".join(n for n, _ in v) or "plain")
def test_sentences(kind, methods):
    torch.manual_seed(0)
    sizes, text = dict(vocab_size=5, embedding=4, hidden=6, dropout=.5, init="default", max_len=4), sentences(5, 3)
    model = (build_model("lstm_lm", **sizes) if kind == "lm" else build_model("lstm", latent_dim=1, kind=kind, **sizes)).double()
    with torch.no_grad():
        for p in model.parameters(): p *= 3.
    methods = [make_method(n, **c).double() for n, c in methods]
    for m in methods: m.setup(model, text)
    table = certificate(Trained(model, methods), text, n_samples=20, repeats=2)
    assert_bounds(table)
    assert (table.loc[["neg_elbo", "nll"], "sum"] <= table.loc["p(x)", "sum"] + 2 * table["error"].max() + 1e-6).all()
    if kind == "lm": assert table["sum"].max() - table["sum"].min() < 1e-9 and table["error"].max() == 0

@pytest.mark.parametrize("kind", ["resid13", "plain", "gated12"])
def test_images_of_four_pixels(kind):
    "An autoregressive decoder has a mass of 1 only if no pixel sees itself or what comes after it."
    torch.manual_seed(0)
    model = build_model("pixelcnn", latent_dim=1, image_size=2, kind=kind, channels=4, kernels=(3, 3, 3), encoder_channels=(4,), encoder_width=8, maps=2).double()
    table = certificate(Trained(model), bit_vectors(4).view(-1, 1, 2, 2).double(), n_samples=5)
    assert_bounds(table)
    assert table.loc["p(x)", "sum"] == pytest.approx(1, abs=1e-9)

def test_single_precision_and_two_dimensions():
    torch.manual_seed(0)
    view = Trained(build_model("mlp", x_dim=2, latent_dim=2, hidden=(8,), likelihood="bernoulli"))
    assert_bounds(certificate(view, bit_vectors(2), n_samples=5))

def test_exact_posteriors_reach_one():
    model = build_model("mlp", x_dim=4, latent_dim=1, likelihood="bernoulli").double()
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    table = certificate(Trained(model), bit_vectors(4).double())
    assert (table["sum"] - 1).abs().max() < 1e-9 and set(table.verdict) == {"bound"}


# ---- the rule, and the rest
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("sigma", [.2, 1.])
def test_importance_weighted_bound_against_all_tuples(k, sigma):
    world = enumerable(symbols=4, latent_dim=1, std=1.5, sigma=sigma)
    t, weight = gaussian_rule(1, every=8)
    z = world.fed.rsample(t[:, None])
    log_w = world.log_prob(world.symbols, z) + world.prior.log_prob(z) - world.fed.log_prob(z)
    i = torch.tensor(list(itertools.product(range(len(t)), repeat=k)))
    direct = weight[i].prod(1) @ (log_w[i].logsumexp(1) - math.log(k))
    assert torch.allclose(mean_log_average(log_w, weight, k), direct, atol=1e-8, rtol=0)

def test_more_samples_never_loosen_a_bound():
    world = enumerable(symbols=8, latent_dim=1, std=2., sigma=.3)
    t, weight = gaussian_rule(1)
    z = world.fed.rsample(t[:, None])
    log_w = world.log_prob(world.symbols, z) + world.prior.log_prob(z) - world.fed.log_prob(z)
    sums = [float(mean_log_average(log_w, weight, k).exp().sum()) for k in (1, 2, 10, 100, 10_000)]
    assert all(a < b + 1e-8 for a, b in zip(sums, sums[1:])) and sums[-1] <= 1

def test_sampled_figure_states_its_error():
    world = FiniteWorld(enumerable(symbols=8, latent_dim=1, std=1., sigma=.5), torch.arange(8))
    elbo = lambda view, x, eps: view.encode(x).kl(view.prior).sum(-1) - view.log_prob(x, view.encode(x).rsample(eps)).mean(0)
    exact = float((-exact_figures(world, world.priors())["neg_elbo"][1]).exp().sum())
    off = []
    for seed in range(40):
        mean, se = sampled_figure(world, elbo, n_samples=4, repeats=32, seed=seed)
        off.append((float((-mean).exp().sum()) - exact) / se)
    assert .7 < torch.tensor(off).std() < 1.4 and abs(torch.tensor(off).mean()) < .6

def test_ap_nll_is_that_of_the_metric_with_one_item_per_batch():
    view = trained(json.dumps(METHODS["FreeBits"][0]), 10, 0)
    exact = exact_figures(FiniteWorld(view, BITS[:1]), view.priors(), n_samples=5)["ap_nll"][1]
    values = torch.tensor([ap_nll(view, BITS[:1], 1, 5, generator=torch.Generator().manual_seed(i)) for i in range(100)], dtype=torch.float64)
    assert abs(float(exact - values.mean())) < 4 * float(values.std()) / 10

def test_verdicts():
    assert verdict(1.) == "bound" and verdict(.3, .5) == "bound" and verdict(22.41) == "no bound: sums to 22.4"
    assert verdict(1.3, .5) == "undecided: 1.3 ± 0.5" and verdict(1.001, .002) == "bound"

def test_bad_worlds_are_refused():
    view = EnumerableWorld(DiagGaussian(torch.zeros(4, 3).double(), torch.zeros(4, 3).double()))
    with pytest.raises(ValueError, match="build the model with latent_dim 1 or 2"): certificate(view, view.symbols)
    with pytest.raises(ValueError, match="stands twice"): FiniteWorld(view, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="words begin with id 3"): sentences(vocab_size=3)
