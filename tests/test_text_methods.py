"delta-VAE, DU-VAE, MAE and SA-VAE: guarantees, gradients, and each together with other methods."
import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from pcvae.data import load
from pcvae.diversity import MAE, mean_pairwise_kl, pairwise_kl, pairwise_spread
from pcvae.gaussian import DiagGaussian
from pcvae.inference import SAVAE, Aggressive, refine
from pcvae.method import Batch, Ctx, Method, Trained, check_methods, infer, make_method, objective, randn_draw
from pcvae.metrics.information import mutual_information
from pcvae.models import build_model
from pcvae.scaling import DUVAE, BatchNormMean, ScaleUp
from pcvae.schedules import Beta, Cyclical, DeltaVAE, FreeBits, LinearWarmup, floor_variances
from pcvae.training import Recipe, Trainer


@pytest.fixture(scope="module")
def data(): return load("linear_gaussian", D=6, d=2, n=256)


def gen(seed=0): return torch.Generator().manual_seed(seed)

def draws(*shape, seed=0, scale=1.): return scale * torch.randn(*shape, generator=gen(seed), dtype=torch.float64)

def trainer(data, *methods, epochs=2, batch=64, **kw):
    torch.manual_seed(0)
    return Trainer(build_model("mlp", x_dim=6, latent_dim=3, hidden=(8,)), methods, data, Recipe(epochs=epochs, batch=batch, **kw))


# ---- all four
NEW = {"DeltaVAE": {"delta": 0.1}, "DUVAE": {"gamma": 0.5, "keep": 0.8, "alpha": 1.}, "MAE": {"diversity": 1., "smoothness": 0.2, "free_bits": 0.},
       "SAVAE": {"steps": 20, "lr": 1., "momentum": 0.5, "clip": 5.}}

@pytest.mark.parametrize("name", NEW)
def test_registered_with_these_defaults(name):
    assert make_method(name).config == NEW[name]
    assert name in Method.registry

LISTS = [[LinearWarmup(1.), DeltaVAE()], [LinearWarmup(1.), DUVAE()], [LinearWarmup(1.), MAE()], [LinearWarmup(1.), SAVAE(3)],
         [SAVAE(3), BatchNormMean(0.6)], [BatchNormMean(0.6), SAVAE(3)], [SAVAE(3), DUVAE()], [DUVAE(), SAVAE(3)], [SAVAE(3), DeltaVAE()], [SAVAE(3), MAE(), FreeBits(0.2)],
         [DUVAE(), MAE(), DeltaVAE()], [DUVAE(), ScaleUp()], [SAVAE(3), ScaleUp()], [Cyclical(2), DeltaVAE(), MAE(), ScaleUp()], [Beta(0.4), DUVAE()],
         [SAVAE(3), Aggressive(max_inner=3, check_every=1)]]

@pytest.mark.parametrize("methods", LISTS, ids=lambda ms: "+".join(type(m).__name__ for m in ms))
def test_composes_and_resumes(data, methods, tmp_path):
    "Each list trains, gives a finite valid posterior, and goes on bit by bit from a checkpoint."
    whole = trainer(data, *methods)
    whole.fit()
    q = whole.view().encode(data.valid)
    assert torch.isfinite(q.mean).all() and torch.isfinite(q.logvar).all() and not q.mean.requires_grad
    assert math.isfinite(whole.valid["neg_elbo"])
    first = trainer(data, *methods)
    first.fit(deadline=-math.inf); first.save(tmp_path / "c.pt")
    second = trainer(data, *methods)
    second.load(tmp_path / "c.pt"); second.fit()
    for a, b in zip(whole.model.parameters(), second.model.parameters()): assert torch.equal(a, b)

@pytest.mark.parametrize("make", [lambda v: DeltaVAE(v), lambda v: MAE(diversity=10 * v, smoothness=v), lambda v: MAE(free_bits=v)])
def test_stacked_runs_are_the_separate_ones(make):
    values, x = (0.05, 0.2, 3.), torch.randn(16, 6, generator=gen())
    runs = []
    for i, v in enumerate(values):
        torch.manual_seed(i)
        runs.append((build_model("mlp", x_dim=6, latent_dim=3, hidden=(8,)), nn.ModuleList([make(v)])))
    tape = torch.randn(3, 16, 3, generator=gen(1))
    alone = torch.stack([objective(m, ms, x, Ctx(training=True, draw=lambda s, t=t: t))[0] for (m, ms), t in zip(runs, tape)])

    class Loss(nn.Module):
        def __init__(self, model, methods): super().__init__(); self.model, self.methods = model, methods
        def forward(self, t): return objective(self.model, self.methods, x, Ctx(training=True, draw=lambda s: t))[0]
    loss = [Loss(*r) for r in runs]
    params, buffers = stack_module_state(loss)
    base = copy.deepcopy(loss[0])
    together = vmap(lambda p, b, t: functional_call(base, (p, b), (t,)))(params, buffers, tape)
    assert torch.allclose(alone, together, rtol=1e-5)


# ---- delta-VAE
@pytest.mark.parametrize("delta", [1e-4, 0.01, 0.1, 0.15, 0.5, 2., 30.])
def test_floor_variances_solve_their_equation(delta):
    low, high = floor_variances(delta)
    assert 0 < low < 1 < high
    for v in (low, high): assert 0.5 * (v - math.log(v) - 1) == pytest.approx(delta, rel=1e-9)

def test_published_roots():
    assert floor_variances(0.1) == pytest.approx((0.493239, 1.772250), abs=1e-6)
    assert floor_variances(0.15) == pytest.approx((0.411113, 1.986247), abs=1e-6)

@pytest.mark.parametrize("delta", [0.01, 0.1, 1., 10., 30.])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kl_is_the_floor_plus_half_the_relu(delta, dtype):
    raw = DiagGaussian(draws(500, 4, scale=3.).to(dtype), draws(500, 4, seed=1, scale=30.).to(dtype))
    q = DeltaVAE(delta).to(dtype).posterior(raw, None)
    kl = q.kl(DiagGaussian.standard(4, raw.mean))
    assert torch.allclose(kl, delta + 0.5 * raw.mean.relu() + 5e-7, atol=2e-6 * (1 + delta) if dtype is torch.float32 else 1e-6 * (1 + delta))

def test_delta_gradients_are_finite_at_the_ends_of_the_contour():
    raw = DiagGaussian(torch.full((3, 2), -1., requires_grad=True), torch.tensor([[-200., 200.], [0., 0.], [-15., 15.]], requires_grad=True))
    q = DeltaVAE(0.1).posterior(raw, None)
    (q.mean.sum() + q.logvar.sum()).backward()
    assert torch.isfinite(raw.logvar.grad).all() and (raw.mean.grad == 0).all()

def test_delta_keeps_its_promise_through_training(data):
    t = trainer(data, BatchNormMean(0.6), DeltaVAE(0.3), epochs=3, lr=1e-2)
    t.fit()
    assert t.view().charged(data.valid).kl(t.model.prior).min() > 0.2999

@pytest.mark.parametrize("later", [BatchNormMean(), DUVAE(), SAVAE()])
def test_delta_refuses_methods_that_would_break_it(later):
    with pytest.raises(ValueError, match=f"{type(later).__name__} would change the posterior after it"): check_methods([DeltaVAE(), later])
    check_methods([later, DeltaVAE()])
    check_methods([DeltaVAE(), ScaleUp(), FreeBits(), MAE()])


# ---- MAE
def pairs(q): return torch.stack([q[i].kl(q[j]) for i in range(len(q)) for j in range(len(q)) if i != j])

@pytest.mark.parametrize("B, D, offset", [(2, 1, 0.), (2, 5, 1e3), (3, 2, 0.), (16, 8, -50.), (33, 4, 1e4)])
def test_mean_and_spread_over_pairs(B, D, offset):
    q = DiagGaussian(draws(B, D, scale=2.) + offset, draws(B, D, seed=1, scale=1.5))
    assert torch.allclose(mean_pairwise_kl(q), pairs(q).mean(0), rtol=1e-9)
    assert torch.allclose(pairwise_spread(q), pairs(q).sum(-1).std(), rtol=1e-7)
    assert torch.allclose(pairwise_kl(q)[0, 1], q[0].kl(q[1]).sum(), rtol=1e-7)

def test_gradients_of_the_pairs():
    def at(mean, logvar): return DiagGaussian(mean, logvar)
    args = draws(5, 3).requires_grad_(), draws(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: mean_pairwise_kl(at(*a)), args)
    assert torch.autograd.gradcheck(lambda *a: pairwise_spread(at(*a)), args)

def test_near_collapse_in_single_precision():
    q = DiagGaussian(draws(64, 8, scale=1e-3), draws(64, 8, seed=1, scale=1e-3))
    assert torch.allclose(mean_pairwise_kl(q.to(torch.float32)).double(), mean_pairwise_kl(q), rtol=1e-3)
    assert (mean_pairwise_kl(DiagGaussian(torch.full((9, 2), 7.3), torch.full((9, 2), -1.7))).abs() < 1e-10).all()

@pytest.mark.parametrize("seed", range(4))
def test_pairs_bound_the_information(seed):
    q = DiagGaussian(draws(256, 3, seed=seed, scale=10 ** (seed - 2.)), draws(256, 3, seed=seed + 10, scale=0.5))
    mi = sum(mutual_information(q, generator=gen(k)).value for k in range(5)) / 5
    assert mi < mean_pairwise_kl(q).sum() * 255 / 256 + 0.05

def test_published_difference_of_the_weight():
    "The division by the weight inside matters for weights other than 1."
    q = DiagGaussian(draws(8, 2), torch.zeros(8, 2, dtype=torch.float64))
    m, b = mean_pairwise_kl(q), Batch(None, None, [], Ctx(), q=q)
    softplus = nn.functional.softplus
    assert torch.allclose(MAE(1.).double().penalty(b)["diversity"], softplus(-m).sum())
    assert torch.allclose(MAE(2.).double().penalty(b)["diversity"], 2 * softplus(-m / 2).sum())

def test_mae_sees_the_fed_posterior(data):
    model, x = build_model("mlp", x_dim=6, latent_dim=3), data.train[:32]
    methods = [ScaleUp(2.), MAE()]
    for m in methods: m.setup(model, x)
    b = infer(Batch(x, model, methods, Ctx(training=True)))
    assert torch.allclose(methods[1].penalty(b)["smoothness"], 0.2 * pairwise_spread(b.q))
    assert pairwise_spread(b.q) > pairwise_spread(b.charged)

def test_mae_needs_two():
    with pytest.raises(ValueError, match="batch of 1"): mean_pairwise_kl(DiagGaussian(torch.zeros(1, 2), torch.zeros(1, 2)))


# ---- DU-VAE
def du(x, batch=64, **kw):
    torch.manual_seed(0)
    model, m = build_model("mlp", x_dim=6, latent_dim=4), DUVAE(**kw)
    m.setup(model, x[:batch])
    return model, m

def at(model, m, x, training=True, record=True, w=1., seed=0):
    return infer(Batch(x, model, [m], Ctx(training=training, record=record, draw=randn_draw(gen(seed))), kl_weight=w)).charged

FLOOR = 1 / (2 * math.pi * math.e)

def test_du_rms_after_every_forward_pass(data):
    t = trainer(data, DUVAE(0.7), lr=0.05)
    m, rms = t.methods[0], []
    plain = m.posterior
    def watched(q, b):
        out = plain(q, b)
        if b.ctx.record: rms.append(float(m.weight.detach().square().mean().sqrt()))
        return out
    m.posterior = watched
    t.fit()
    assert len(rms) == 2 * t.steps_per_epoch and max(abs(r - 0.7) for r in rms) < 1e-6
    assert m.weight.detach().std() > 1e-3                               # learned: not all equal any more
    assert float(m.scale().detach().square().mean().sqrt()) == pytest.approx(0.7, abs=1e-6)      # also where the last step has moved it

def test_du_spread_of_the_means(data):
    model, m = du(data.train, gamma=0.7)
    with torch.no_grad(): m.weight.copy_(torch.tensor([1., 2., 3., 4.])); m.shift.fill_(0.5)
    model.encoder.head.weight.data *= 10
    q = at(model, m, data.train)
    w = torch.tensor([1., 2., 3., 4.]) * 0.7 / math.sqrt(30 / 4)
    assert torch.allclose(m.weight, w, atol=1e-6) and torch.allclose(q.mean.std(0, correction=0), w, atol=1e-3)
    assert torch.allclose(q.mean.mean(0), torch.full((4,), 0.5), atol=1e-5)

def test_du_floor_and_dropout(data):
    model, m = du(data.train)
    raw = model.encode(data.train).var.detach()
    q = at(model, m, data.train)
    dropped = (q.var - FLOOR).abs() < 1e-6
    assert abs(dropped.float().mean() - 0.2) < 0.05
    assert torch.allclose(q.var[~dropped], (raw / 0.8 + FLOOR)[~dropped], rtol=1e-4)
    assert q.entropy()[dropped].abs().max() < 1e-5 and q.entropy().min() > -1e-5       # no dimension of negative entropy
    assert abs(float((q.var.detach() - FLOOR).mean() / raw.mean()) - 1) < 0.1                   # the mean is kept
    quiet = at(model, m, data.train, training=False)
    assert torch.allclose(quiet.var, raw + FLOOR, rtol=1e-4)                            # floor on, dropout off
    assert torch.equal(quiet.var, at(model, m, data.train, training=False, seed=5).var)

def test_du_before_the_warm_up_is_over(data):
    model, m = du(data.train)
    raw = model.encode(data.train).var.detach()
    for w in (0., 0.5, 0.999, torch.tensor(0.7)):
        assert torch.allclose(at(model, m, data.train, w=w).var, raw, rtol=1e-5)
        assert torch.allclose(at(model, m, data.train, training=False).var, raw, rtol=1e-5)     # evaluated as it was trained
    at(model, m, data.train, w=torch.tensor(1.))
    assert at(model, m, data.train, training=False).var.min() > FLOOR * 0.9999

def test_du_side_passes_leave_no_trace(data):
    model, m = du(data.train)
    at(model, m, data.train)
    with torch.no_grad(): m.weight.mul_(2.)
    before = copy.deepcopy(m.state_dict())
    at(model, m, data.train[:32], record=False, w=0.); at(model, m, data.train[:32], training=False)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())

@pytest.mark.parametrize("kw, said", [({"gamma": 0.}, "gamma"), ({"keep": 0.}, "keep"), ({"keep": 1.2}, "keep"), ({"alpha": -1.}, "alpha")])
def test_du_settings(kw, said):
    with pytest.raises(ValueError, match=f"DUVAE: {said}"): DUVAE(**kw)

def test_du_and_bn_do_not_stand_together():
    with pytest.raises(ValueError, match="both standardise"): check_methods([BatchNormMean(), DUVAE()])
    with pytest.raises(ValueError, match="both standardise"): check_methods([DUVAE(), BatchNormMean()])

def test_du_batches_of_sixteen(data):
    with pytest.raises(ValueError, match="16"): trainer(data, DUVAE(), batch=8)
    model, m = du(data.train)
    with pytest.raises(ValueError, match="DUVAE .* batch of 1"): at(model, m, data.train[:1])


# ---- SA-VAE
def tiny(seed=0):
    torch.manual_seed(seed)
    return build_model("mlp", x_dim=5, latent_dim=2, hidden=(6,)).double(), draws(4, 5)

def total(model, methods, x, seed=3, w=None):
    extra = [] if w is None else [Beta(w).double()]
    return objective(model, [*extra, *methods], x, Ctx(training=True, draw=randn_draw(gen(seed), x)))[0]

@pytest.mark.parametrize("kw", [dict(clip=1e9), dict(clip=0.3), dict(clip=1e9, momentum=0.), dict(clip=1e9, w=0.3)])
def test_sa_gradient_against_finite_differences(kw):
    w = kw.pop("w", None)
    model, x = tiny()
    sa = SAVAE(steps=6, lr=0.5, **kw).double()
    params = list(model.parameters())
    grads = torch.autograd.grad(total(model, [sa], x, w=w), params)
    for p, g in zip(params, grads):
        for i in range(0, p.numel(), max(1, p.numel() // 3)):
            with torch.no_grad():
                flat, h = p.view(-1), 1e-6
                flat[i] += h; up = float(total(model, [sa], x, w=w))
                flat[i] -= 2 * h; down = float(total(model, [sa], x, w=w))
                flat[i] += h
            assert (up - down) / (2 * h) == pytest.approx(float(g.view(-1)[i]), abs=2e-7, rel=1e-5)

def test_encoder_gets_the_slope_in_the_start():
    "dL/d phi = (dL/d lambda_0)(d lambda_0/d phi), with no other path."
    model, x = tiny()
    sa, draw = SAVAE(steps=4, lr=0.5).double(), lambda: randn_draw(gen(3), x)
    whole = torch.autograd.grad(total(model, [sa], x), list(model.encoder.parameters()))
    start = model.encode(x)
    leaf = DiagGaussian(start.mean.detach().requires_grad_(), start.logvar.detach().requires_grad_())
    b = Batch(x, model, [sa], Ctx(training=True, draw=draw()))
    q = sa.posterior(leaf, b)
    loss = (q.kl(model.prior).sum(-1) - model.log_prob(x, q.rsample(b.ctx.draw(q.shape)))).mean()
    slopes = torch.autograd.grad(loss, (leaf.mean, leaf.logvar))
    for a, b in zip(whole, torch.autograd.grad((start.mean, start.logvar), list(model.encoder.parameters()), slopes)): assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)

def reverse_pass(model, x, steps, lr, momentum, r=1e-5):
    "The published way: Hessian times vector by differences of two gradients. Gradients in start and decoder weights, without clips."
    theta, draw, B = list(model.decoder.parameters()), randn_draw(gen(3), x), len(x)
    noise = [draw((B, 2)) for _ in range(steps + 1)]
    def slope(at, eps):
        at = [t.detach().requires_grad_() for t in at]
        q = DiagGaussian(*at)
        grads = torch.autograd.grad((q.kl(model.prior).sum(-1) - model.log_prob(x, q.rsample(eps))).mean(), [*at, *theta])
        return grads[:2], grads[2:]
    start = model.encode(x)
    at, v, seen = [start.mean.detach(), start.logvar.detach()], [0., 0.], []
    for k in range(steps):
        seen.append(at)
        v = [momentum * a - g for a, g in zip(v, slope(at, noise[k])[0])]
        at = [t + lr * a for t, a in zip(at, v)]
    a, g_theta = slope(at, noise[steps])
    p, g_theta = [0., 0.], list(g_theta)
    for k in reversed(range(steps)):
        p = [x_ + lr * y for x_, y in zip(p, a)]
        far, near = slope([t + r * d for t, d in zip(seen[k], p)], noise[k]), slope(seen[k], noise[k])
        a = [x_ - (f - n) / r for x_, f, n in zip(a, far[0], near[0])]
        g_theta = [g - (f - n) / r for g, f, n in zip(g_theta, far[1], near[1])]
        p = [momentum * x_ for x_ in p]
    return a, g_theta, start

def test_double_backward_is_the_published_reverse_pass_without_its_clips():
    model, x = tiny(1)
    sa = SAVAE(steps=5, lr=0.5, momentum=0.5, clip=1e9).double()
    loss = total(model, [sa], x)
    encoder, decoder = list(model.encoder.parameters()), list(model.decoder.parameters())
    ours = torch.autograd.grad(loss, encoder + decoder)
    a, g_theta, start = reverse_pass(model, x, 5, 0.5, 0.5)
    theirs = [*torch.autograd.grad((start.mean, start.logvar), encoder, a), *g_theta]
    for o, t in zip(ours, theirs): assert torch.allclose(o, t, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize("momentum", [0., 0.5, 0.9])
def test_refine_on_a_quadratic(momentum):
    a, start = draws(4).abs().requires_grad_(), draws(4, seed=1).requires_grad_()
    q = refine(lambda q: 0.5 * (a * q.mean**2).sum() + q.logvar.sum() * 0, DiagGaussian(start[None], torch.zeros(1, 4, dtype=torch.float64)), 12, 0.2, momentum, torch.tensor(1e9), True)
    A = torch.stack([torch.stack([1 - 0.2 * a, 0.2 * momentum * torch.ones_like(a)], -1), torch.stack([-a, momentum * torch.ones_like(a)], -1)], -2)
    end = torch.linalg.matrix_power(A, 12)[:, 0, 0] * start
    assert torch.allclose(q.mean[0], end)
    for ours, exact in zip(torch.autograd.grad((a * q.mean**2).sum(), (a, start)), torch.autograd.grad((a * end**2).sum(), (a, start))): assert torch.allclose(ours, exact)

def test_clip_shortens_means_and_logvars_each_by_itself():
    start = DiagGaussian(torch.zeros(2, 1), torch.zeros(2, 1))
    q = refine(lambda q: 30 * q.mean.sum() + 0.1 * q.logvar.sum(), start, 1, 1., 0., torch.tensor(5.))
    assert float(q.mean.norm()) == pytest.approx(5., rel=1e-5)
    assert torch.allclose(q.logvar, torch.full((2, 1), -0.1))

def test_nothing_breaks_at_a_gradient_of_zero():
    "A decoder that is deaf and a posterior at the prior: every inner gradient is exactly 0."
    model = build_model("mlp", x_dim=5, latent_dim=2, hidden=(6,))
    for p in model.decoder.parameters(): p.data.zero_()
    for p in model.encoder.head.parameters(): p.data.zero_()
    objective(model, [SAVAE(3)], torch.randn(4, 5, generator=gen()), Ctx(training=True))[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

def test_refinement_lowers_the_loss_and_counts_in_evaluation(data):
    t = trainer(data, SAVAE(steps=20, lr=20.), epochs=3)
    t.fit()
    plain, refined = Trained(t.model, []), t.view()
    def neg_elbo(view):
        q = view.encode(data.valid)
        with torch.no_grad(): return float((q.kl(view.prior).sum(-1) - view.log_prob(data.valid, q.rsample(torch.randn(50, *q.shape, generator=gen(9)))).mean(0)).mean())
    assert neg_elbo(refined) < neg_elbo(plain) - 0.01
    with torch.no_grad(): inside = refined.encode(data.valid)               # also where the caller wants no gradients
    assert torch.equal(inside.mean, refined.encode(data.valid).mean)

def test_evaluation_does_not_depend_on_the_size_of_batches(data):
    t = trainer(data, SAVAE(steps=5, lr=4.), batch=16)
    assert float(t.methods[0].size) == 16
    zeros = lambda shape: torch.zeros(shape)
    def mean(x): return infer(Batch(x, t.model.eval(), t.methods, Ctx(draw=zeros))).q.mean
    x = data.train[:200]                                                    # more than 8 training batches
    assert torch.allclose(mean(x), torch.cat([mean(p) for p in x.split(7)]), atol=1e-5)

def test_evaluation_keeps_no_graph_and_leaves_no_gradients(data):
    t = trainer(data, SAVAE(steps=3))
    q = t.view().charged(data.valid)
    assert not q.mean.requires_grad and all(p.grad is None for p in t.model.parameters())

def test_dropout_in_the_decoder(data):
    "A new mask at each inner step in training, whose derivative uses the same mask; none in evaluation."
    model, x = tiny()
    model.decoder.net = nn.Sequential(nn.Dropout(0.5), model.decoder.net)
    sa = SAVAE(steps=4, lr=0.5, clip=1e9).double()
    def value():
        torch.manual_seed(5)
        return total(model.train(), [sa], x)
    p = model.encoder.head.bias
    g = torch.autograd.grad(value(), p)[0]
    with torch.no_grad():
        p[0] += 1e-6; up = float(value())
        p[0] -= 2e-6; down = float(value())
    assert (up - down) / 2e-6 == pytest.approx(float(g[0]), abs=1e-6)
    view = Trained(model, [sa])
    assert torch.equal(view.encode(x).mean, view.encode(x).mean)

def test_later_methods_are_part_of_the_inner_loss():
    "With a constant mean after it, the means have nothing to gain; without, they have."
    model, x = tiny()
    class Constant(Method):
        def posterior(self, q, b): return DiagGaussian(0 * q.mean + 0.7, q.logvar)
    try:
        sa, start = SAVAE(steps=3, lr=2.).double(), model.encode(x)
        b = Batch(x, model, [sa, Constant()], Ctx(training=True, draw=randn_draw(gen(), x)))
        assert torch.equal(sa.posterior(start, b).mean, start.mean)
        assert not torch.equal(sa.posterior(start, Batch(x, model, [sa], b.ctx)).mean, start.mean)
    finally: Method.registry.pop("Constant")

def test_text_model_refines_and_differentiates():
    "An LSTM decoder: the gradient of the whole loss against a finite difference."
    torch.manual_seed(0)
    model = build_model("lstm", vocab_size=12, latent_dim=2, embedding=4, hidden=6, dropout=0., init="default").double()
    x = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0], [1, 4, 11, 2, 0]])
    sa = SAVAE(steps=3, lr=2.).double()
    def value(): return objective(model, [sa], x, Ctx(training=True, draw=randn_draw(gen(3), model.prior_mean)))[0]
    for p in (model.encoder.head.weight, model.decoder.lstm.weight_hh_l0, model.decoder.out.weight):
        g = torch.autograd.grad(value(), p)[0]
        with torch.no_grad():
            flat = p.view(-1)
            flat[0] += 1e-6; up = float(value())
            flat[0] -= 2e-6; down = float(value())
            flat[0] += 1e-6
        assert (up - down) / 2e-6 == pytest.approx(float(g.view(-1)[0]), abs=1e-7, rel=1e-5)
    q = infer(Batch(x, model.eval(), [sa.eval()], Ctx(draw=randn_draw(gen(), model.prior_mean)))).q
    assert q.mean.shape == (3, 2) and not torch.allclose(q.mean, model.encode(x).mean)

def test_compiled_decoders_run_plain_in_the_inner_steps():
    "A compiled network has no second derivative; the inner steps go around it."
    model, x = tiny()
    sa = SAVAE(steps=2, lr=0.5).double()
    plain = torch.autograd.grad(total(model, [sa], x), list(model.decoder.parameters()))
    model.decoder.net.forward = torch.compile(model.decoder.net.forward, backend="aot_eager")
    try: compiled = torch.autograd.grad(total(model, [sa], x), list(model.decoder.parameters()))
    finally: del model.decoder.net.forward
    for a, b in zip(plain, compiled): assert torch.allclose(a, b, rtol=1e-9)
