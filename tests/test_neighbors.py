"NE-VAE: the two distances, the cap, the gradient, and the one-dimensional model case."
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from scipy.integrate import quad
from torch import nn

from pcvae.gaussian import LOG_2PI, DiagGaussian
from pcvae.method import Batch, Ctx, infer, make_method, objective, randn_draw
from pcvae.models import build_model
from pcvae.models.vae import Bernoulli
from pcvae.neighbors import REENCODE, NeighborEmbedding, capped_nll, model_case, reconstruction, squared_distance


def gen(seed=0): return torch.Generator().manual_seed(seed)


def case(method, likelihood="bernoulli", dtype=torch.float64, n=32):
    torch.manual_seed(0)
    model = build_model("mlp", x_dim=6, latent_dim=3, hidden=(16,), likelihood=likelihood).to(dtype)
    x = torch.rand(n, 6, generator=gen(), dtype=dtype).round()
    method.setup(model, x)
    return model, nn.ModuleList([method]).to(dtype), x


def ctx(seed=0, like=None, **kw): return Ctx(draw=randn_draw(gen(seed), like), training=True, **kw)


def batch(model, methods, x, **kw):
    b = infer(Batch(x, model, methods, ctx(like=x, **kw)))
    b.z = b.q.rsample(b.ctx.draw(b.q.shape)); b.px = model.decode(b.z, x)
    return b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kw", [dict(loss="se"), dict(loss="se", reduce="sum"), dict(loss="lp"), dict(loss="lp", reduce="mean", lp_const=True, cap=.3),
                                dict(loss="se", reencode="straight_through"), dict(loss="se", reencode="sample"), dict(loss="lp", reencode="sample"),
                                dict(loss="lp", cap=-math.inf), dict(loss="lp", detach_z=True)])
def test_value_by_hand(kw, dtype):
    m = NeighborEmbedding(weight=2., **kw)
    model, methods, x = case(m, dtype=dtype)
    _, parts = objective(model, methods, x, ctx(3, like=x))
    draw = randn_draw(gen(3), x)
    q = model.encode(x)
    z = q.mean + q.std * draw(q.shape)
    p = model.decode(z).mean
    if m.reencode != "tf_mean": p = model.decode(z).sample(draw)
    q2 = model.encode(p)
    if m.loss == "se": d = (z - (q2.mean + q2.std * draw(q.shape)))**2
    else:
        d = 0.5 * (z - q2.mean)**2 / q2.var + 0.5 * q2.logvar + (0.5 * math.log(2 * math.pi) if m.lp_const else 0.)
        d = d.clamp(min=float(m.cap))
    want = 2 * (d.mean() if m.reduce == "mean" else d.sum(-1).mean())
    assert parts[f"ne_{m.loss}"].dtype == dtype
    torch.testing.assert_close(parts[f"ne_{m.loss}"], want, rtol=1e-5, atol=1e-6)


def test_reductions_by_default():
    assert NeighborEmbedding("se").reduce == "mean" and NeighborEmbedding("lp").reduce == "sum"
    assert NeighborEmbedding("lp", reduce="mean").reduce == "mean"


def test_cap_limits():
    q, z = DiagGaussian(*torch.randn(2, 50, 4, generator=gen(), dtype=torch.float64)), torch.randn(50, 4, generator=gen(1), dtype=torch.float64)
    nll = -q.log_prob_dims(z)
    torch.testing.assert_close(capped_nll(z, q, -math.inf, const=True), nll)
    torch.testing.assert_close(capped_nll(z, q, -math.inf), nll - 0.5 * LOG_2PI)
    assert (capped_nll(z, q, 1e4) == 1e4).all()
    # without the constant, c means c + 0.919 with it, up to the constant itself
    torch.testing.assert_close(capped_nll(z, q, 0.2), capped_nll(z, q, 0.2 + 0.5 * LOG_2PI, const=True) - 0.5 * LOG_2PI)


def test_cap_is_per_dimension_and_per_sample():
    "One term far away among terms that are near: the others hold at the cap, and the far one counts in full, whatever their sum is."
    q, z = DiagGaussian(torch.zeros(3, 4), torch.zeros(3, 4)), torch.zeros(3, 4)
    z[1, 2] = 4.
    out, want = capped_nll(z, q, 1.), torch.ones(3, 4)
    want[1, 2] = 8.                                     # z^2 / 2
    assert torch.equal(out, want)
    m = NeighborEmbedding("lp", cap=1.)
    model, methods, x = case(m)
    b = batch(model, methods, x)
    d = m.distance(b.z, b.again(reconstruction(b.px)), b)
    assert d.shape == (32, 3) and (d >= 1).all()
    assert any(0 < n < 3 for n in (d == 1).sum(1)) and any(0 < n < 32 for n in (d == 1).sum(0))     # within one item and within one dimension both occur


def test_uncapped_has_no_minimum():
    "c = -inf: the sum of the terms, all of them with gradient; in the model case the cost falls all the way to variance 0, where a cap stops it."
    m = NeighborEmbedding("lp", cap=-math.inf)
    model, methods, x = case(m)
    b = batch(model, methods, x, record=True)
    q2 = b.again(reconstruction(b.px))
    d = m.distance(b.z, q2, b)
    torch.testing.assert_close(d, -q2.log_prob_dims(b.z) - 0.5 * LOG_2PI)
    assert float(m.above) == 1
    s2 = torch.logspace(-12, 0.5, 200, dtype=torch.float64)
    for const in (False, True):
        torch.testing.assert_close(model_case(s2, -math.inf, const), 0.5 * s2 + (0.5 * LOG_2PI if const else 0.))
        assert model_case(s2, -math.inf, const).argmin() == 0 and 0 < model_case(s2, -1., const).argmin() < 199


def test_no_gradient_below_the_cap():
    mean, logvar, z = torch.randn(3, 50, 4, generator=gen(), dtype=torch.float64).requires_grad_()
    z, mean, logvar = (t.detach().requires_grad_() for t in (z, mean, logvar))
    out = capped_nll(z, DiagGaussian(mean, logvar), 0.5)
    out.sum().backward()
    below = out == 0.5
    assert 0.1 < below.double().mean() < 0.9
    for t in (z, mean, logvar): assert (t.grad[below] == 0).all() and (t.grad[~below] != 0).all()


def test_gradient_path():
    "Through z, the decoder, and the second encoder pass; with detach_z only the direct path is cut."
    grads = {}
    for detach in (False, True):
        model, methods, x = case(NeighborEmbedding("lp", cap=-9., detach_z=detach))
        b = batch(model, methods, x)
        methods[0].penalty(b)["ne_lp"].backward()
        grads[detach] = {n: p.grad.clone() for n, p in model.named_parameters()}
        assert all(g.abs().sum() > 0 for g in grads[detach].values())       # the decoder too
    assert any(not torch.allclose(grads[False][n], grads[True][n]) for n in grads[False])


def test_straight_through_is_binary_and_has_the_gradient_of_the_mean():
    m = NeighborEmbedding("se", reencode="straight_through")
    model, methods, x = case(m)
    b = batch(model, methods, x)
    x2 = reconstruction(b.px, "straight_through", b.ctx.draw)
    assert ((x2 - x2.round()).abs() < 1e-12).all() and 0 < x2.mean() < 1
    (g,) = torch.autograd.grad(x2.sum(), b.px.logits, retain_graph=True)
    torch.testing.assert_close(g, b.px.mean * (1 - b.px.mean))


def test_sample_is_binary_and_teaches_the_encoder_only():
    m = NeighborEmbedding("lp", cap=-9., reencode="sample")
    model, methods, x = case(m)
    b = batch(model, methods, x)
    x2 = reconstruction(b.px, "sample", b.ctx.draw)
    assert ((x2 == 0) | (x2 == 1)).all() and 0 < x2.mean() < 1 and not x2.requires_grad
    m.penalty(b)["ne_lp"].backward()
    assert all(p.grad is None for p in model.decoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())


def test_all_three_agree_where_the_decoder_is_certain():
    px = Bernoulli(torch.tensor([[-200., 200., 200., -200.]]))
    for kind in REENCODE: assert torch.equal(reconstruction(px, kind, randn_draw(gen())), torch.tensor([[0., 1., 1., 0.]]))


def test_weight_zero_changes_no_bit():
    grads = []
    for methods in ([], [NeighborEmbedding("lp", weight=0.)]):
        torch.manual_seed(0)
        model, x = build_model("mlp", x_dim=6, latent_dim=3), torch.randn(16, 6, generator=gen())
        objective(model, methods, x, ctx(like=x))[0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("config", [dict(loss="se"), dict(loss="lp"), dict(loss="se", reencode="sample")])
def test_weight_zero_is_the_vae_step_of_a_pixelcnn(config):
    "Parameters after one step of Adam, bit for bit; of the statistics only the encoder's differ, which has seen x' as well."
    states = []
    for methods in ([], [NeighborEmbedding(weight=0., **config)]):
        torch.manual_seed(0)
        model = build_model("pixelcnn", latent_dim=3, image_size=8, kind="plain", kernels=(5, 3), z_kernel=3, encoder_channels=(4, 4), encoder_width=8).train()
        x = torch.bernoulli(torch.full((16, 1, 8, 8), 0.3), generator=gen())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        objective(model, methods, x, ctx(like=x))[0].backward()
        optimizer.step()
        states.append(model.state_dict())
    differ = {k for k in states[0] if not torch.equal(states[0][k], states[1][k])}
    assert differ and all(k.startswith("encoder") and k.endswith(("running_mean", "running_var", "num_batches_tracked")) for k in differ)


def share(cap, epoch=0):
    m = NeighborEmbedding("lp", cap=cap)
    model, methods, x = case(m, "normal")
    for step in range(3):
        objective(model, methods, x, ctx(step, like=x, record=True))
        objective(model, methods, x, ctx(step, like=x, record=False))
    assert m.batches == 3
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        m.on_epoch_end(SimpleNamespace(epoch=epoch))
    assert m.batches == 0 and m.above == 0
    return [str(w.message) for w in seen]


def test_warns_once_when_the_cap_never_acts():
    (text,) = share(50.)
    assert "share of 0 " in text and "cap=50" in text and "plain VAE" in text
    assert share(50., epoch=1) == [] and share(0.) == [] and share(-math.inf) == []


@pytest.mark.parametrize("seen, text", [((2, 4000, 4), "a share of 0.0005 "), ((0, 400, 4), "a share of 0 "), ((1, 400, 4), None)])
def test_the_warning_names_the_measured_share(seen, text):
    "`n` of `terms` terms above the cap, in each of `batches` batches; silent from a share of 0.001 on."
    n, terms, batches = seen
    m = NeighborEmbedding("lp", cap=3.)
    z = torch.zeros(terms // 4, 4)
    z.view(-1)[:n] = 9.                                 # 40 nats, above the cap
    q2 = DiagGaussian(torch.zeros_like(z), torch.zeros_like(z))
    for _ in range(batches): m.distance(z, q2, SimpleNamespace(ctx=Ctx(record=True)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        m.on_epoch_end(SimpleNamespace(epoch=0))
    assert [text in str(w.message) for w in caught] == ([True] if text else [])


def test_wrong_input():
    for make, what in ((lambda: NeighborEmbedding("sq"), "loss of NeighborEmbedding"), (lambda: NeighborEmbedding(reduce="men"), "Did you mean 'mean'"),
                       (lambda: NeighborEmbedding(reencode="tf_men"), "Did you mean 'tf_mean'"), (lambda: NeighborEmbedding(weight=-1.), "at least 0.*-1"),
                       (lambda: NeighborEmbedding(weight=math.nan), "at least 0 and finite, got nan"), (lambda: NeighborEmbedding(weight=math.inf), "finite, got inf"),
                       (lambda: NeighborEmbedding("lp", cap=math.nan), "cap.*got nan"), (lambda: NeighborEmbedding("lp", cap=math.inf), "cap.*or -inf, got inf"),
                       (lambda: reconstruction(Bernoulli(torch.zeros(2, 3)), "ancestral"), "unknown reencode"),
                       (lambda: make_method("NeighborEmbedding", kap=1.), "Did you mean 'cap'")):
        with pytest.raises(ValueError, match=what): make()
    for kind in ("straight_through", "sample"):
        model, methods, x = case(NeighborEmbedding(reencode=kind), "normal")
        with pytest.raises(TypeError, match=f"{kind}.*binary x'.*Normal"): objective(model, methods, x, ctx(like=x))

    class Tokens:
        @property
        def mean(self): raise NotImplementedError
    with pytest.raises(TypeError, match="Tokens has none.*not for tokens"): reconstruction(Tokens())


# ---- the model case: a dimension without information
@pytest.mark.parametrize("const", [True, False])
@pytest.mark.parametrize("cap, s2", [(3., .7), (.1, .3), (-1., .02), (0., 1.)])
def test_model_case_cost(cap, s2, const):
    "Closed form against quadrature."
    offset = 0.5 * LOG_2PI if const else 0.
    def integrand(e): return max(cap, offset + 0.5 * math.log(s2) + e * e / 2) * math.exp(-e * e / 2 - 0.5 * LOG_2PI)
    want = 2 * quad(integrand, 0, 12, limit=400, points=[math.sqrt(max(0., 2 * (cap - offset - 0.5 * math.log(s2))))])[0]
    got = model_case(torch.tensor([s2], dtype=torch.float64), cap, const)
    assert abs(got.item() - want - 0.5 * (s2 - math.log(s2) - 1)) < 1e-7


def test_model_case_minima():
    "The numeric minima, KL surplus of 32 dimensions in nats."
    s2 = torch.logspace(-7, 0.2, 20001, dtype=torch.float64)
    def surplus(cost):
        v = s2[cost.argmin()]
        return float(16 * (v - v.log() - 1))
    with_const = {5: 0.00, 3: 0.01, 1: 1.83, 0.1: 14.05, 0: 16.45, -0.1: 19.06, -1: 45.71, -3: 109.3}
    without = {5: 0.00, 3: 0.00, 1: 0.17, 0.1: 1.77, 0: 2.28, -0.1: 2.92, -1: 18.53, -3: 80.0, -5: 143.9}
    for table, const in ((with_const, True), (without, False)):
        for c, want in table.items(): assert abs(surplus(model_case(s2, c, const)) - want) < 0.02 + 0.003 * want, (c, const)
    # squared error with weight w per dimension: s2 = 1 / (1 + 4 w)
    for w in (1., 1 / 32):
        cost = 2 * w * s2 + 0.5 * (s2 - s2.log() - 1)
        assert abs(s2[cost.argmin()] * (1 + 4 * w) - 1) < 1e-3


def test_squared_distance_of_a_collapsed_dimension():
    z, z2 = torch.randn(2, 200_000, generator=gen(), dtype=torch.float64) * math.sqrt(0.889)
    assert abs(squared_distance(z, z2).mean() - 2 * 0.889) < 0.02
