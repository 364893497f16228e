"""`diagnose` against closed forms, every state of the verdict, models of other kinds, and every refusal. Expected values are computed here in another way than in the package."""
import json
import math
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import pcvae
from pcvae.data.synthetic import enumerable
from pcvae.diagnosis import ADVICE, NAMES, SECOND, TAU, Diagnosis, as_vae, classify, diagnose, find_modules, item_information, posteriors, read_output, to_logvar
from pcvae.gaussian import DiagGaussian
from pcvae.method import Method, Trained
from pcvae.metrics.information import MutualInformation, surgery
from pcvae.metrics.likelihood import LinearGaussian
from pcvae.models import build_model
from pcvae.schedules import DeltaVAE


def gen(seed=0): return torch.Generator().manual_seed(seed)


def linear(lengths=(3., 1., 0.3, 0.), f=8, var=0.5, shift=0., seed=4, dtype=torch.float32):
    W = torch.linalg.qr(torch.randn(f, len(lengths), generator=gen(seed), dtype=dtype))[0] * torch.tensor(lengths, dtype=dtype)
    return LinearGaussian(W, torch.linspace(-1, 1, f, dtype=dtype), var, shift=shift)


def codes(q): return as_vae(lambda i: (q.mean[i], q.logvar[i]))      # items are the numbers of rows


def look(q, **kw): return diagnose(codes(q), torch.arange(len(q)), likelihood=False, **kw)


def channel(r, n=4000, d=3, seed=0): return DiagGaussian(math.sqrt(1 - r) * torch.randn(n, d, generator=gen(seed)), torch.full((n, d), math.log(r)))


oracle = linear()
x = oracle.sample(3000, gen(5))


# --- the numbers ------------------------------------------------------------------------------------------------------
def test_oracle_in_closed_form():
    d = diagnose(oracle, x, n_samples=50, n_nll=1000)
    r = (1 / (1 + torch.tensor([9., 1., 0.09, 0.]) / 0.5)).double()
    for got, want in ((d.activity, 1 - r), (d.mean_var, r), (d.kl, -0.5 * r.log()), (d.info, -0.5 * r.log()), (d.offset, 0 * r)):
        torch.testing.assert_close(got, want, atol=0.05, rtol=0)
    assert d.classes == ["active", "active", "mixed", "passive"] and (d.active, d.mixed, d.passive) == ([0, 1], [2], [3])
    info = float(-0.5 * r.log().sum())
    assert d.mi.value - 0.05 < info < d.mi.upper + 0.05 and d.mi.ceiling == pytest.approx(math.log(3000)) and not d.mi.saturated
    side = d.likelihood
    truth, se = float(oracle.nll(x).mean()), float(oracle.nll(x).std() / math.sqrt(1000))
    assert abs(side["nll"] - truth) < 4 * se and side["nll_se"] == pytest.approx(se, rel=0.15)
    assert side["neg_elbo"] == pytest.approx(side["rate"] + side["distortion"], abs=1e-4)
    assert side["gap"] == pytest.approx(gap_of_oracle(), abs=5 * side["gap_se"])
    assert d.status == "partly collapsed" and d.n == 3000 and d.dims == 4


def gap_of_oracle():
    "E log p(x|z) - E log p(x|z') for independent z': the cross term w'x z / s^2 has mean |w|^2 / s^2 for the right code."
    return float((oracle.W.pow(2).sum(0) / oracle.var).sum())


def test_item_information_is_the_kl_from_the_pools_moments():
    q = DiagGaussian(torch.randn(50, 3, generator=gen(1)).double() + 2, torch.randn(50, 3, generator=gen(2)).double())
    c, m = item_information(q)
    v = q.mean.numpy().var(0) + np.exp(q.logvar.numpy()).mean(0)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(q.mean, q.std), normal(q.mean.mean(0), torch.as_tensor(v).sqrt()))
    torch.testing.assert_close(c, want)
    torch.testing.assert_close(c.mean(0), 0.5 * (torch.as_tensor(v).log() - q.logvar.mean(0)))
    for p in (DiagGaussian.standard(3, like=q.mean), DiagGaussian(q.mean[0], q.logvar[1])):
        torch.testing.assert_close(c.mean(0) + m.kl(p), q.kl(p).mean(0))        # the split is exact under any Gaussian prior


def test_classes_follow_the_closed_form_share():
    for r in (0.999, 0.992, 0.98, 0.9, 0.8, 0.7, 0.1):
        t = math.sqrt(max(0., (2 * TAU + 1 - r + math.log(r)) / (1 - r)))
        want = math.erfc(t / math.sqrt(2))
        q = channel(r, 40_000, 1)
        kind, share = classify(item_information(q)[0], q, DiagGaussian.standard(3))
        assert share.tolist() == pytest.approx([want] * 3, abs=0.01)
        assert kind == ["passive" if want <= 0.05 else "active" if want >= 0.95 else "mixed"] * 3


@pytest.mark.parametrize("k, shift", [(1e-3, 0.), (1e3, 0.), (1., 40.), (1e-2, -7.)])
def test_classes_do_not_depend_on_scale_or_origin(k, shift):
    q = DiagGaussian(torch.cat([channel(0.2).mean, torch.zeros(4000, 1)], 1), torch.cat([channel(0.2).logvar, torch.zeros(4000, 1)], 1))
    moved = DiagGaussian(k * q.mean.double() + shift, q.logvar.double() + 2 * math.log(k))
    assert look(moved, second="logvar").classes == look(q).classes == ["active"] * 3 + ["passive"]
    torch.testing.assert_close(look(moved, second="logvar").info, look(q).info, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", [0.1, 0.33, 0.6, 0.9])
@pytest.mark.parametrize("spread", [0.3, 1., 3.])
def test_a_dimension_that_some_items_use_is_mixed(part, spread):
    some = torch.rand(3000, 1, generator=gen(1)) < part
    d = look(DiagGaussian(torch.where(some, spread * torch.randn(3000, 1, generator=gen()), 0.), torch.where(some, -2., 0.)))
    assert d.classes == ["mixed"] and float(d.share) == pytest.approx(float(some.double().mean()), abs=0.01)


@pytest.mark.parametrize("spread", [0.1, 1., 2., 30.])
def test_a_dimension_that_all_items_use_alike_is_not_mixed_where_its_variance_is_the_priors(spread):
    d = look(DiagGaussian(spread * torch.randn(3000, 1, generator=gen()), 0.05 * torch.randn(3000, 1, generator=gen(1))))
    assert d.classes == (["passive"] if spread == 0.1 else ["active"])


def test_surgery_uses_independent_draws_and_sums_up():
    q = DiagGaussian(channel(0.3, d=4).mean + 1, channel(0.3, d=4).logvar)
    d = look(q)
    want = surgery(q, DiagGaussian.standard(4), generator=gen(9))
    assert d.kl_total == pytest.approx(want["kl"], rel=1e-5) and d.mi.value == pytest.approx(want["mi"], abs=0.1)
    assert d.marginal_kl == pytest.approx(want["marginal_kl"], abs=0.15) and abs(d.remainder) < 0.15
    assert d.remainder == pytest.approx(d.kl_total - d.mi.value - d.marginal_kl)
    remainders = [look(q[:300], seed=s).remainder for s in range(20)]
    own = [(lambda t: t["kl"] - t["mi"] - t["marginal_kl"])(surgery(q[:300], DiagGaussian.standard(4), generator=gen(s))) for s in range(20)]
    assert abs(np.mean(remainders)) < 4 * np.std(remainders) / math.sqrt(20) and np.std(remainders) > 0 and len(own) == 20


def test_a_world_that_can_be_summed_over():
    world = enumerable(64, 3, std=1., sigma=0.5)
    d = diagnose(world, world.symbols, n_nll=64, n_samples=200)
    assert d.mi.ceiling == pytest.approx(math.log(64)) and d.mi.value <= math.log(64) + 1e-9
    assert d.likelihood["nll"] >= world.entropy - 1e-6     # mean over all symbols of -log p(x) is at least the entropy
    torch.testing.assert_close(d.activity, torch.full((3,), 64 / 63, dtype=torch.float64))      # unit variance by N, reported by N - 1
    torch.testing.assert_close(d.mean_var, torch.full((3,), 0.25, dtype=torch.float64))


# --- the verdict ------------------------------------------------------------------------------------------------------
def deaf(x, z): return oracle.log_prob(x, 0 * z)


STATES = {
    "nothing": (as_vae(lambda x: (0 * x, 0 * x)), "collapsed", "tell 0.00 nats about the items; of 8 dimensions all passive; try FreeBits"),
    "moved": (as_vae(lambda x: (0 * x + 0.7, 0 * x)), "collapsed", "a KL of 1.96 nats is paid, nearly all for an offset"),
    "narrow": (as_vae(lambda x: (0 * x, 0 * x - 1.2)), "collapsed", "which ask for information"),
    "faint": (linear((0.5, 0.4)), "nearly collapsed", "nats about the items, less than one bit; of 2 dimensions 1 active (0), 1 mixed (1)"),
    "partly": (oracle, "partly collapsed", "of 4 dimensions 2 active (0, 1), 1 mixed (2), 1 passive (3)"),
    "deaf": (as_vae(oracle.encode, deaf), "ignored", "the right code is worth only 0.00 nats to the decoder"),
    "loss": (as_vae(oracle.encode, lambda x, z: -oracle.log_prob(x, z)), "partly collapsed", "log_prob seems to return a loss"),
    "shifted": (linear(shift=3.), "partly collapsed", "nats from the prior, so draw new items from a prior fitted to the codes"),
    "saturated": (as_vae(lambda x: (x, 0 * x - 12)), "healthy", "so read the 7.31 nats of information as at least that"),
    "healthy": (linear((3., 2.)), "healthy", "none of 2 dimensions is passive: all active"),
}


@pytest.mark.parametrize("name", STATES)
def test_each_state_has_its_words(name):
    model, status, words = STATES[name]
    d = diagnose(model, x[:1500], n_nll=300, n_samples=5)
    assert d.status == status and words in d.verdict, d.verdict
    assert d.verdict.count(".\n") == 0 and d.verdict.endswith(".") and "\n" not in d.verdict and d.verdict[0].isupper()


@pytest.mark.parametrize("name", STATES)
def test_only_the_state_at_hand_is_mentioned(name):
    said = diagnose(STATES[name][0], x[:1500], n_nll=300, n_samples=5).verdict
    marks = {"is paid": ("moved", "narrow"), "seems to return a loss": ("loss",), "from the prior, so draw": ("shifted", "saturated"), "as at least that": ("saturated",), "worth only": ("deaf",)}
    assert not [m for m, names in marks.items() if m in said and name not in names], said


def test_advice_names_methods_that_exist():
    import pcvae.critics, pcvae.inference, pcvae.neighbors, pcvae.scaling, pcvae.schedules     # noqa: E401, F401 (fills the registry)
    states = [SimpleNamespace(kl_total=v) for v in (0., 10.)]
    words = {w for advice in ADVICE.values() for s in states for w in advice(s).replace(",", " ").replace(".", " ").split() if w[0].isupper()} - {"KL"}
    assert words and words <= set(Method.registry)


def made(mi, kl=5., gap=None, classes=("active", "active"), marginal=0.):
    "A diagnosis with chosen numbers."
    v = torch.full((2,), kl / 2, dtype=torch.float64)
    side = gap and {"gap": gap[0], "gap_se": gap[1]}
    return Diagnosis(100, v, v, 0 * v, v, v, v, list(classes), mi, marginal, side)


def info(value=3., upper=4., saturated=False): return MutualInformation(value, 4.6, upper, saturated)


def test_where_the_states_divide():
    assert made(info(0.099)).status == "collapsed" and made(info(0.101)).status == "nearly collapsed"
    assert made(info(0.693)).status == "nearly collapsed" and made(info(0.694)).status == "healthy" and made(info(0.2), classes=("passive", "mixed")).status == "nearly collapsed"
    assert made(info(0.2), gap=(0.01, 0.001)).status == "ignored" and made(info(0.6, saturated=True)).status == "healthy"     # two items show no more
    assert made(info(), classes=("passive",) * 2).status == "collapsed" and made(info(), classes=("passive", "mixed")).status == "partly collapsed"
    assert made(info(), gap=(0.2, 0.04)).status == "ignored" and made(info(), gap=(0.2, 0.06)).status == "healthy"      # below a tenth of 3 nats, by two errors
    assert made(info(), gap=(-0.2, 0.04)).loss_like and not made(info(), gap=(-0.2, 0.06)).loss_like and not made(info(), gap=(-0.09, 0.001)).loss_like
    far = lambda d: "from the prior, so draw" in d.verdict
    assert far(made(info(), marginal=1.3)) and not far(made(info(), marginal=1.2)) and not far(made(info(), kl=2., marginal=0.9)) and far(made(info(), kl=2., marginal=1.1))
    assert made(info(saturated=True, upper=4.), marginal=3.).distance == 1. and made(info(saturated=True, upper=9.), marginal=3.).distance == 0.


def test_long_lists_of_dimensions_are_cut():
    q = DiagGaussian(torch.cat([channel(0.2, d=20).mean, torch.zeros(4000, 20)], 1), torch.cat([channel(0.2, d=20).logvar, torch.zeros(4000, 20)], 1))
    d = look(q)
    assert "20 active (0, 1, 2, 3, 4, 5, 6, 7, ... to 19), 20 passive (20, " in d.verdict and "and 28 dimensions with less KL" in repr(d)


# --- what comes out ---------------------------------------------------------------------------------------------------
def test_frame_dict_text_page_and_figure():
    d = diagnose(oracle, x[:500], n_nll=100, n_samples=5)
    frame = d.to_frame()
    assert list(frame.columns) == ["kl", "info", "offset", "activity", "mean_var", "share", "class"] and frame.index.name == "dim" and len(frame) == 4
    assert np.allclose(frame["info"] + frame["offset"], frame["kl"])
    row = json.loads(json.dumps(d.to_dict(), allow_nan=False))
    assert row["kl"] == pytest.approx(frame["kl"].sum()) and row["class_dims"] == d.classes and row["verdict"] == d.verdict and row["n_nll"] == 100
    assert (row["n_active"], row["n_mixed"], row["n_passive"], row["au"]) == (2, 1, 1, 3)
    assert repr(d).startswith(d.verdict) and "marginal KL" in repr(d) and "5 importance samples" in repr(d)
    page = d._repr_html_()
    assert "data:image/png;base64," in page and "<table" in page and d.status in page.lower()
    assert "importance" not in repr(diagnose(oracle, x[:500], likelihood=False))
    bars, points = d.plot().axes
    assert bars.get_ylabel() == "KL, nats" and [t.get_text() for t in bars.get_xticklabels()] == ["0", "1", "2", "3"] and points.get_xscale() == "log"
    hatches = {c.get_label(): c.patches[0].get_hatch() for c in bars.containers}
    assert len({hatches[k] for k in ("active", "mixed", "passive")}) == 3 and len({line.get_marker() for line in points.lines}) == 3
    heights = sum(np.array([p.get_height() for p in c.patches]).sum() for c in bars.containers)
    assert heights == pytest.approx(d.kl_total)


def test_figure_of_many_dimensions_and_of_constant_codes():
    look(channel(0.3, 500, 100)).plot()
    look(DiagGaussian(torch.zeros(50, 2), torch.zeros(50, 2))).plot()


def test_same_seed_same_numbers_and_no_trace_on_the_global_generator():
    torch.manual_seed(3); before = torch.get_rng_state()
    a, b, c = (diagnose(oracle, x[:300], n_nll=50, n_samples=3, seed=s).to_dict() for s in (0, 0, 1))
    assert a == b and a["mi"] != c["mi"] and torch.equal(before, torch.get_rng_state())
    assert diagnose(oracle, x[:300], likelihood=False).mi.value == a["mi"]


def test_more_items_than_asked_for_are_drawn_from():
    d = diagnose(oracle, x, n_items=200, likelihood=False)
    assert d.n == 200 and d.mi.ceiling == pytest.approx(math.log(200))
    assert diagnose(oracle, x[:100], n_nll=1000, n_samples=2).likelihood["n_nll"] == 100


def test_batches_do_not_matter():
    a, b = (diagnose(oracle, x[:101], likelihood=False, batch=k).to_dict() for k in (7, 1024))
    assert a["mi"] == pytest.approx(b["mi"], abs=1e-5) and a["kl"] == pytest.approx(b["kl"], rel=1e-5)


# --- models of any kind -----------------------------------------------------------------------------------------------
class Net(nn.Module):
    "A module by hand; `kind` is what the second output is."
    def __init__(self, kind="logvar"):
        super().__init__()
        self.kind, self.enc, self.dec = kind, nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)), nn.Linear(3, 8)
        self.seen = []
    def encode(self, x):
        self.seen.append((x.dtype, self.training))
        mu, s = self.enc(x).chunk(2, -1)
        return mu, {"logvar": s, "std": (0.5 * s).exp(), "var": s.exp(), "logstd": 0.5 * s}[self.kind]


def net(kind="logvar"):
    torch.manual_seed(0)
    return Net(kind)


class ModelOutput(OrderedDict):
    "As pythae's: an ordered dict whose entries are also attributes."
    def __setitem__(self, k, v): super().__setitem__(k, v); super().__setattr__(k, v)


def test_every_form_of_output_gives_the_same_diagnosis():
    q = oracle.encode(x[:200]); m, v = q.mean, q.logvar
    normal = torch.distributions.Normal(m, q.std)
    named = {name: SimpleNamespace(mu=m, **{name: {"logvar": v, "std": q.std, "var": q.var, "logstd": v / 2}[kind]}) for name, kind in NAMES.items()}
    forms = [(m, v), [m, v], q, normal, torch.distributions.Independent(normal, 1), {"mean": m, "logvar": v}, ModelOutput(embedding=m, log_covariance=v),
             SimpleNamespace(mean=m, logvar=v[:1]), *named.values()]
    want = diagnose(oracle, x[:200], likelihood=False)
    for f in forms:
        got = diagnose(as_vae(lambda i, f=f: f), x[:200], likelihood=False)     # one batch holds all
        torch.testing.assert_close(got.kl, want.kl, atol=1e-5, rtol=1e-4); assert got.classes == want.classes


@pytest.mark.parametrize("second", SECOND)
def test_second_output_of_each_kind(second):
    model = net(second)
    d = diagnose(model, x[:200], second=second)
    torch.testing.assert_close(d.kl, diagnose(net(), x[:200], second="logvar").kl, atol=1e-5, rtol=1e-4)
    assert d.likelihood is None


def test_modes_are_put_back_and_evaluation_mode_is_used():
    model = net(); model.enc[2].eval()
    adapters = (model, as_vae(model.encode), as_vae(lambda x: model.encode(x)), as_vae(lambda x: Net.encode(model, x)))
    for m in adapters:
        d = diagnose(m, x[:100])
        assert model.training and model.enc[1].training and not model.enc[2].training and model.enc[1].num_batches_tracked == 0
    assert not any(training for _, training in model.seen) and d.n == 100
    assert all(p.grad is None for p in model.parameters())


def test_modes_are_put_back_after_an_error():
    model = net()
    with pytest.raises(ValueError): diagnose(model, x[:100, :5])
    assert model.training


def test_modules_are_found():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert find_modules(lambda x: a(b(x))) == [a, b] or set(find_modules(lambda x: a(b(x)))) == {a, b}
    assert find_modules(a.forward) == [a] and find_modules(SimpleNamespace(net=a, n=3)) == [a] and find_modules(lambda x: torch.tanh(x)) == []
    view = Trained(build_model("mlp", x_dim=8, latent_dim=2), [DeltaVAE()])
    assert set(find_modules(view)) == {view.model, view.methods} and find_modules(lambda x: view.encode(x))[0] is view.model


def test_x_takes_the_models_dtype_and_device():
    model = net().double()
    diagnose(model, x[:50])
    assert model.seen[-1][0] == torch.float64
    half = net().to(torch.bfloat16)
    d = diagnose(as_vae(half.encode, lambda x, z: -((half.dec(z) - x) ** 2).sum(-1)), x[:50], n_samples=3, second="logvar")
    assert half.seen[-1][0] == torch.bfloat16 and math.isfinite(d.likelihood["nll"])
    meta = as_vae(lambda x: (torch.zeros(len(x), 2), torch.zeros(len(x), 2)), net=nn.Linear(2, 2, device="meta"))
    assert meta.fit(x).device.type == "meta" and meta.fit(torch.arange(3)).dtype == torch.int64


def test_tokens_stay_integers():
    emb = nn.Embedding(11, 4)
    model = as_vae(lambda t: emb(t).mean(1).chunk(2, -1), lambda t, z: -(t.float().sum(-1) - z.sum(-1)) ** 2)
    d = diagnose(model, torch.randint(0, 11, (60, 5), generator=gen()), n_samples=3, second="logvar")
    assert d.dims == 2 and d.likelihood["n_nll"] == 60


def test_numpy_items(): assert diagnose(oracle, x[:50].numpy(), likelihood=False).n == 50


def test_models_of_the_library():
    torch.manual_seed(0)
    view = Trained(build_model("mlp", x_dim=8, latent_dim=3), [DeltaVAE(0.2)])
    d = diagnose(view, x[:300], n_nll=50, n_samples=3)
    assert float(d.kl.min()) > 0.19 and d.likelihood is not None
    torch.testing.assert_close(d.kl, view.encode(x[:300]).kl(view.prior).mean(0).double(), atol=1e-5, rtol=1e-4)
    wide = build_model("mlp", x_dim=8, latent_dim=2)
    nn.init.zeros_(wide.encoder.head.weight); wide.encoder.head.bias.data = torch.tensor([0., 0., 0.5, 0.5])
    assert diagnose(wide, x[:100], likelihood=False).status == "collapsed"     # a DiagGaussian of the library is what it says


def test_log_prob_sees_flat_codes_unless_it_is_the_librarys():
    shapes = []
    def log_prob(x, z): shapes.append((tuple(x.shape), tuple(z.shape))); return oracle.log_prob(x, z)
    d = diagnose(as_vae(oracle.encode, log_prob), x[:40], n_samples=6)
    assert ((240, 8), (240, 4)) in shapes and all(len(z) == 2 and xs[0] == z[0] for xs, z in shapes)
    assert d.likelihood["nll"] == pytest.approx(float(oracle.nll(x[:40]).mean()), abs=1e-3)     # exact posterior: no noise in the weights


@pytest.mark.parametrize("prior", [DiagGaussian(torch.ones(4), torch.full((4,), math.log(4.))), (torch.ones(4), torch.full((4,), math.log(4.))),
                                   torch.distributions.Normal(torch.ones(4), 2 * torch.ones(4)), torch.distributions.Normal(torch.tensor(1.), torch.tensor(2.))])
def test_other_priors(prior):
    d = diagnose(as_vae(oracle.encode, oracle.log_prob, prior), x[:200], n_samples=3)
    q = oracle.encode(x[:200])
    want = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(1., 2.)).mean(0)
    torch.testing.assert_close(d.kl, want.double(), atol=1e-5, rtol=1e-4)
    assert d.likelihood["rate"] == pytest.approx(float(want.sum()), rel=1e-4)


def test_both_ways_to_import():
    from pcvae import diagnose as short
    from pcvae.diagnosis import diagnose as long
    assert short is long is pcvae.diagnose and callable(pcvae.diagnose)


# --- what is refused --------------------------------------------------------------------------------------------------
def refused(words, fn, kind=ValueError):
    with pytest.raises(kind) as e: fn()
    message = str(e.value)
    assert all(w in message for w in words), message
    assert "\n" not in message
    return message


def test_sigma_for_log_variance_is_detected():
    for kind in ("std", "var"): refused(["positive for all 200 items in all dimensions", "second='std' or 'var'", "'logvar' if it is right"], lambda: diagnose(net(kind), x[:200]))
    named = as_vae(lambda x: {"mean": x, "logvar": x.sigmoid()})
    refused(["probably sigma or sigma^2"], lambda: diagnose(named, x[:200]))
    assert diagnose(named, x[:200], second="logvar").dims == 8


def test_what_is_not_taken_for_sigma():
    m, tiny = torch.zeros(50, 2), torch.full((50, 2), 0.02)
    assert torch.equal(to_logvar(m, tiny, "logvar", None), tiny)               # collapsed, slightly wide by chance
    one = torch.full((50, 2), 0.5); one[3, 1] = -0.1
    assert torch.equal(to_logvar(channel(0.1, 50, 2).mean, one, "logvar", None), one)      # a single negative value is enough
    refused(["probably sigma"], lambda: to_logvar(channel(0.1, 50, 2).mean, tiny, "logvar", None))
    refused(["probably sigma"], lambda: to_logvar(m, 30 * tiny, "logvar", None))


def test_log_variance_for_sigma_is_detected():
    refused(["said to be a std", "smallest value is -", "second='logvar'"], lambda: diagnose(net(), x[:100], second="std"))
    refused(["said to be a var"], lambda: diagnose(as_vae(lambda x: {"mean": x, "variance": x}), x[:100]))
    refused(["unknown kind of second output 'sigma'", "logvar, std, var, logstd"], lambda: diagnose(net(), x[:100], second="sigma"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_codes_that_are_not_finite(value):
    y = x[:100].clone(); y[[4, 70], 0] = value
    refused(["codes of 2 of 100 items are not finite (first: item 4)"], lambda: diagnose(as_vae(lambda x: (x, -x)), y, batch=50))
    refused(["codes of 2 of 100 items are not finite"], lambda: diagnose(as_vae(lambda x: (0 * x[:, :0].sum(-1, keepdim=True), x[:, :1])), y))


def test_constant_codes_are_a_verdict_and_no_error():
    d = diagnose(as_vae(lambda x: (torch.full((len(x), 3), 5.), torch.full((len(x), 3), -30.))), x[:100])
    assert d.status == "collapsed" and d.mi.value == pytest.approx(0, abs=1e-6) and float(d.info.abs().max()) < 1e-9


def test_too_few_items_and_items_of_the_wrong_kind():
    refused(["x has shape (1, 8)", "give at least 2"], lambda: diagnose(oracle, x[:1]))
    refused(["x has shape ()"], lambda: diagnose(oracle, torch.tensor(1.)))
    refused(["x must be a tensor", "got list", "torch.cat"], lambda: diagnose(oracle, [x]), TypeError)
    assert diagnose(oracle, x[:2], n_samples=2).n == 2


@pytest.mark.parametrize("out, words, kind", [
    (lambda x: (x, x, x), ["encode returned 3 things", "as_vae(encode="], TypeError),
    (lambda x: x, ["encode returned a tensor (20, 8)", "chunk(2, -1)"], TypeError),
    (lambda x: None, ["encode returned a NoneType"], TypeError),
    (lambda x: torch.distributions.Laplace(x, x.exp()), ["encode returned a Laplace"], TypeError),
    (lambda x: (x[:, :, None], x[:, :, None]), ["means of shape (20, 8, 1) for 20 items", "[20, D]"], ValueError),
    (lambda x: (x[:5], -x[:5]), ["means of shape (5, 8) for 20 items"], ValueError),
    (lambda x: (x[:, :0], x[:, :0]), ["D >= 1"], ValueError),
    (lambda x: (x, -x[:, :3]), ["second output of shape (20, 3)", "expected the same"], ValueError)])
def test_outputs_that_are_no_posterior(out, words, kind): refused(words, lambda: diagnose(as_vae(out), x[:20]), kind)


def test_failures_inside_torch_say_what_was_passed():
    lin = nn.Linear(8, 4).double()
    held = {"net": lin}                                                         # hidden from the search for modules
    refused(["encode failed on x of torch.float32 (20, 8) on cpu", "x.float()"], lambda: diagnose(as_vae(lambda x: held["net"](x).chunk(2, -1)), x[:20]))
    refused(["encode failed on x of torch.float64 (20, 3) on cpu", "x.flatten(1)"], lambda: diagnose(as_vae(lambda x: lin(x).chunk(2, -1)), x[:20, :3]))
    refused(["encode failed on x of torch.uint8"], lambda: diagnose(as_vae(lambda x: lin(x).chunk(2, -1)), (x[:20] > 0).byte()))
    refused(["encode failed", "on cpu", "x.to(device)"], lambda: diagnose(as_vae(lambda x: nn.functional.linear(x, torch.zeros(4, 8, device="meta") + x[:4]).chunk(2, -1)), x[:20]))
    refused(["log_prob failed on x of"], lambda: diagnose(as_vae(oracle.encode, lambda x, z: z @ x), x[:20]))


def test_models_and_functions_of_the_wrong_kind():
    refused(["Linear has no method encode(x)", "as_vae(encode="], lambda: diagnose(nn.Linear(2, 2), x), TypeError)
    refused(["encode must be a function of x, got int"], lambda: as_vae(3), TypeError)
    refused(["log_prob must be a function of x and z, got str"], lambda: as_vae(oracle.encode, "no"), TypeError)
    for fn in (lambda x, z: oracle.log_prob(x, z).mean(), lambda x, z: z, lambda x, z: 0.):
        refused(["log_prob must return log p(x|z), one number for each item, shape (", "got "], lambda: diagnose(as_vae(oracle.encode, fn), x[:20]))
    refused(["items have no finite log-weight"], lambda: diagnose(as_vae(oracle.encode, lambda x, z: z.sum(-1) / 0), x[:20]))


def test_priors_of_the_wrong_kind():
    refused(["prior is a Linear", "diagonal Gaussian"], lambda: diagnose(as_vae(oracle.encode, prior=nn.Linear(1, 1)), x[:20]), TypeError)
    refused(["prior has shape (3,), but the code has 4 dimensions"], lambda: diagnose(as_vae(oracle.encode, prior=DiagGaussian.standard(3)), x[:20]))


@pytest.mark.parametrize("name, value", [("n_items", 1), ("n_nll", 1), ("n_samples", 0), ("batch", 0), ("n_items", 2.5)])
def test_counts_out_of_range(name, value): refused([name, "whole number", str(value)], lambda: diagnose(oracle, x[:20], **{name: value}))
