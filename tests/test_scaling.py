"BN-VAE and Scale-VAE: known answers, the bounds they break, and stacked runs."
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from pcvae.data.synthetic import enumerable
from pcvae.gaussian import DiagGaussian
from pcvae.method import Batch, Ctx, Trained, check_methods, infer, make_method, objective, randn_draw
from pcvae.models import build_model
from pcvae.neighbors import NeighborEmbedding
from pcvae.method import Diverged
from pcvae.scaling import BatchNormMean, ScaleUp, scale_p1, scale_p2, scale_p2_prime, undercharge


def gen(seed=0): return torch.Generator().manual_seed(seed)
def ctx(seed=0, **kw): return Ctx(draw=randn_draw(gen(seed), kw.pop("like", None)), training=kw.pop("training", True), **kw)


def case(*methods, n=64, D=3, dtype=torch.float64, seed=0):
    "A small model, data, and methods that are set up."
    torch.manual_seed(seed)
    model, x = build_model("mlp", x_dim=5, latent_dim=D, hidden=(16,)).to(dtype), torch.randn(n, 5, dtype=dtype)
    for m in methods: m.setup(model, x)
    return model, nn.ModuleList(methods).to(dtype), x


def run(model, methods, x, **kw): return infer(Batch(x, model, methods, ctx(like=x, **kw)))
def epoch_end(m, epoch=0): m.on_epoch_end(SimpleNamespace(epoch=epoch))


# ---- BN-VAE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bn_batch_moments_and_kl_floor(dtype):
    model, methods, x = case(BatchNormMean(0.6, shift=0.3), dtype=dtype)
    model.encoder.head.weight.data *= 30            # so that eps is nothing beside the variance
    b = run(model, methods, x)
    assert b.q.mean.dtype == dtype and b.q is b.charged
    torch.testing.assert_close(b.q.mean.mean(0), torch.full((3,), 0.3, dtype=dtype), atol=1e-5, rtol=0)
    torch.testing.assert_close(b.q.mean.std(0, correction=0), torch.full((3,), 0.6, dtype=dtype), atol=1e-4, rtol=0)
    torch.testing.assert_close(b.q.logvar, model.encode(x).logvar)
    assert b.charged.kl(model.prior).sum(-1).mean() >= 3 * (0.6**2 + 0.3**2) / 2 - 1e-4


def test_bn_equals_torch_batchnorm_but_for_the_start():
    model, methods, x = case(BatchNormMean(0.7))
    ref = nn.BatchNorm1d(3, dtype=x.dtype)
    ref.weight.data.fill_(0.7)
    for step in range(4):
        xs = x[step * 16:step * 16 + 16] + step
        torch.testing.assert_close(run(model, methods, xs, record=True).q.mean, ref(model.encode(xs).mean), rtol=1e-6, atol=1e-7)
    m, kept = methods[0], 0.9**4                    # torch's averages still hold .9^4 of their start, (0, 1)
    mean, var = m.moments()
    torch.testing.assert_close(mean * (1 - kept), ref.running_mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(var * (1 - kept) + kept, ref.running_var, rtol=1e-6, atol=1e-9)


def test_bn_records_only_when_told_and_evaluation_does_not_touch_it():
    model, methods, x = case(BatchNormMean())
    before = copy.deepcopy(methods.state_dict())
    run(model, methods, x, record=False); run(model, methods, x, training=False, record=False)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), methods.state_dict().values()))
    run(model, methods, x, record=True)
    mean, var = methods[0].moments()                # bias-corrected: after one batch exactly that batch
    mu = model.encode(x).mean
    torch.testing.assert_close(mean, mu.mean(0)); torch.testing.assert_close(var, mu.var(0))


def test_bn_learned_shift_gets_a_gradient_and_fixed_does_not():
    for shift, n in ((None, 1), (0.7, 0)):
        model, methods, x = case(BatchNormMean(0.6, shift))
        assert len(list(methods.parameters())) == n
        loss, _ = objective(model, methods, x, ctx(like=x))
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in methods.parameters())


def test_bn_control_with_constant_means():
    model, methods, x = case(BatchNormMean(0., shift=0.7))
    for training in (True, False):
        q = run(model, methods, x, training=training).q
        assert (q.mean == q.mean[0]).all()
        kl_mean_part = 0.5 * q.mean**2
        torch.testing.assert_close(kl_mean_part, torch.full_like(kl_mean_part, 0.245), rtol=1e-6, atol=0)


# ---- Scale-VAE
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_own_factor(ddof, dtype):
    model, methods, x = case(ScaleUp(0.9, ddof=ddof), dtype=dtype)
    b = run(model, methods, x)
    torch.testing.assert_close(b.q.mean.std(0, correction=ddof), torch.full((3,), 0.9, dtype=dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(b.charged.mean, model.encode(x).mean)
    torch.testing.assert_close(b.q.logvar, b.charged.logvar)


@pytest.mark.parametrize("average", ["harmonic", "arithmetic", "median"])
def test_scale_epochs(average):
    model, methods, x = case(ScaleUp(1.1, f_epochs=1, average=average, min_batch_record=8))
    m, des = methods[0], 1.1
    stds = []
    for step, part in enumerate(x.split(20)):       # 20, 20, 20, 4: the last is too small to count
        b = run(model, methods, part, record=True, step=step)
        if len(part) > 8: stds.append(part_std := model.encode(part).mean.std(0))
        want = des / part_std if len(part) > 8 else torch.ones(3, dtype=x.dtype)
        torch.testing.assert_close(b.q.mean, want * b.charged.mean)
        run(model, methods, part, record=False, step=step)
    stds = torch.stack(stds)
    want = {"harmonic": des / stds.mean(0), "arithmetic": (des / stds).mean(0), "median": des / stds.median(0).values}[average]
    torch.testing.assert_close(m.factor(), want, rtol=1e-6, atol=0)     # validation runs before the end of the epoch
    epoch_end(m)
    torch.testing.assert_close(m.f, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(m.factor(), m.f)
    b = run(model, methods, x[:20] * 3, epoch=1, record=True, step=4)
    torch.testing.assert_close(b.q.mean, want * b.charged.mean, rtol=1e-6, atol=1e-9)    # the average, not its own
    assert not torch.allclose(m.factor(), m.f)                                            # but its own is recorded
    epoch_end(m, 1)
    torch.testing.assert_close(m.f, des / model.encode(x[:20] * 3).mean.std(0), rtol=1e-6, atol=0)


def test_scale_evaluation_touches_nothing_and_checkpoint_keeps_f():
    model, methods, x = case(ScaleUp())
    run(model, methods, x, record=True); epoch_end(methods[0])
    before = copy.deepcopy(methods.state_dict())
    view = Trained(model, methods)
    torch.testing.assert_close(view.encode(x).mean, methods[0].f * view.charged(x).mean)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), methods.state_dict().values()))
    model2, methods2, _ = case(ScaleUp())
    methods2.load_state_dict(before)
    assert torch.equal(methods2[0].factor(), methods[0].f) and not (methods[0].f == 1).any()


def test_scale_gradient_through_f():
    grads = {}
    for through in (False, True):
        model, methods, x = case(ScaleUp(grad_through_f=through))
        mu = model.encode(x).mean.detach().requires_grad_()
        fed = methods[0].feed(DiagGaussian(mu, torch.zeros_like(mu)), SimpleNamespace(ctx=Ctx(training=True)))
        (fed.mean**3).sum().backward()
        grads[through] = (mu * mu.grad).sum(0)
    assert (grads[False].abs() > 0.1).all()
    # with the gradient, the fed mean does not change when mu is scaled, so the gradient along mu vanishes
    torch.testing.assert_close(grads[True], torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_scale_second_pass_is_not_recorded():
    model, methods, x = case(ScaleUp(), BatchNormMean(), NeighborEmbedding("se"))
    objective(model, methods, x, ctx(like=x, record=True))
    assert (methods[0].stds[:, 0] >= 0).sum() == 1
    torch.testing.assert_close(methods[1].seen, torch.tensor(0.1, dtype=x.dtype))


def test_scale_is_a_plain_vae_in_u():
    "Decoder p(x|f u), posterior N(mu, (sigma/f)^2): same reconstruction; its KL is the one to the prior N(0, f^2)."
    model, methods, x = case(ScaleUp())
    run(model, methods, x, record=True); epoch_end(methods[0])
    view, f, eps = Trained(model, methods), methods[0].f, torch.randn(4, 64, 3, generator=gen(), dtype=torch.float64)
    q = view.charged(x)
    u = DiagGaussian(q.mean, q.logvar - 2 * f.log())
    torch.testing.assert_close(view.log_prob(x, view.encode(x).rsample(eps)), view.log_prob(x, f * u.rsample(eps)))
    kl_a = view.encode(x).kl(view.priors()["scale"]).sum(-1)
    torch.testing.assert_close(u.kl(view.prior).sum(-1), kl_a)
    kl = q.kl(view.prior).sum(-1)
    unpaid = undercharge(q, f)
    torch.testing.assert_close(kl_a - kl, unpaid["A"])
    torch.testing.assert_close(view.encode(x).kl(view.prior).sum(-1) - kl, unpaid["B"])


def test_scale_at_one_is_the_vae():
    model, methods, x = case(ScaleUp())             # f = 1 before training
    view, plain, eps = Trained(model, methods), Trained(model), torch.randn(7, 64, 3, generator=gen(), dtype=torch.float64)
    torch.testing.assert_close(view.encode(x).mean, plain.encode(x).mean)
    published = view.published()
    assert list(published) == ["scale_p1", "scale_p2", "scale_p2_prime"]
    elbo = -(plain.log_prob(x, plain.encode(x).rsample(eps)).mean(0) - plain.encode(x).kl(plain.prior).sum(-1))
    torch.testing.assert_close(published["scale_p1"](view, x, eps), elbo)
    torch.testing.assert_close(published["scale_p2"](view, x, eps), published["scale_p2_prime"](view, x, eps))
    assert (published["scale_p2"](view, x, eps).mean() < elbo.mean())
    assert all(v(view, x, eps).shape == (64,) for v in published.values())
    assert all((u == 0).all() for u in undercharge(view.charged(x), methods[0].f).values())


@pytest.mark.parametrize("std, sigma, paper, total", [(1., 1., 7.83, .595), (.3, 1., 4.19, 21.6), (.3, .7, 3.47, 43.), (.01, .7, 3.09, 71.7)])
def test_paper_objective_is_no_bound(std, sigma, paper, total):
    "1,024 equiprobable symbols: no model can have a negative log-likelihood below ln 1024 = 6.93 on average."
    world = enumerable(std=std, sigma=sigma, fed_std=1.1)
    eps = torch.randn(100, 1024, 8, generator=gen(), dtype=torch.float64)
    p1 = torch.cat([scale_p1(world, s, e) for s, e in zip(world.symbols.split(128), eps.split(128, 1))])
    assert abs(p1.mean() - paper) < 0.25
    assert abs(world.total(-p1) / total - 1) < 0.35
    # the same decoder and posterior with every prior that does not look at x
    rec = p1 - world.charged(world.symbols).kl(world.prior).sum(-1)
    f = 1.1 / std
    for prior in (*world.priors().values(), DiagGaussian(world.prior.mean, world.prior.logvar + 2 * math.log(f))):
        bound = -(rec + world.encode(world.symbols).kl(prior).sum(-1))
        assert world.total(bound) < 1.02 and -bound.mean() > math.log(1024)


def test_importance_weights_of_the_paper_are_no_bound_either():
    world = enumerable(symbols=256, std=.3, sigma=1., fed_std=1.1)
    eps = torch.randn(200, 256, 8, generator=gen(), dtype=torch.float64)
    for fn in (scale_p2, scale_p2_prime): assert world.total(-fn(world, world.symbols, eps)) > 3


# ---- together, wrong input, stacking
def test_order_does_not_matter():
    out = []
    for order in (0, 1):
        methods = [BatchNormMean(0.6), ScaleUp(1.1)]
        model, methods, x = case(*(methods if order == 0 else methods[::-1]))
        model.encoder.head.weight.data *= 30
        b = run(model, methods, x)
        out.append((b.charged.mean, b.q.mean))
        torch.testing.assert_close(b.charged.mean.std(0, correction=0), torch.full((3,), .6, dtype=x.dtype), rtol=1e-3, atol=0)
        torch.testing.assert_close(b.q.mean.std(0), torch.full((3,), 1.1, dtype=x.dtype), rtol=1e-6, atol=0)
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][1], out[1][1])


def test_bad_input():
    for make, what in ((lambda: BatchNormMean(-1.), "gamma"), (lambda: BatchNormMean(momentum=0.), "momentum"), (lambda: ScaleUp(0.), "des_std"),
                       (lambda: ScaleUp(f_epochs=0), "f_epochs"), (lambda: ScaleUp(average="harmonc"), "Did you mean 'harmonic'"),
                       (lambda: ScaleUp(ddof=2), "ddof"), (lambda: ScaleUp(min_batch_record=1), "min_batch_record"),
                       (lambda: make_method("ScaleUp", desstd=1.), "Did you mean 'des_std'")):
        with pytest.raises(ValueError, match=what): make()
    for pair in ([ScaleUp(), BatchNormMean(0.)], [BatchNormMean(0.), ScaleUp()]):
        with pytest.raises(ValueError, match="no spread to scale"): check_methods(pair)
    check_methods([ScaleUp(), BatchNormMean(0.6)])
    for cls in (ScaleUp, BatchNormMean):
        with pytest.raises(ValueError, match="stands twice"): check_methods([cls(), cls()])
        model, methods, x = case(cls())
        with pytest.raises(ValueError, match=f"{cls.__name__}.*batch of 1"): run(model, methods, x[:1])
        run(model, methods, x[:1], training=False)


@pytest.mark.parametrize("through", [False, True])
def test_constant_means_are_refused_by_name(through):
    model, methods, x = case(ScaleUp(grad_through_f=through))
    model.encoder.head.weight.data[1] = 0           # the mean of dimension 1 is its bias
    loss, _ = objective(model, methods, x, ctx(like=x, record=True))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    with pytest.raises(Diverged, match=r"ScaleUp: in epoch 3 the means of dimension 1 were constant.*learning rate"): epoch_end(methods[0], 2)


def test_an_exploding_factor_ends_the_run():
    model, methods, x = case(ScaleUp(max_factor=100.))
    model.encoder.head.weight.data[1] *= 1e-3
    run(model, methods, x, record=True)
    before = methods[0].f.clone()
    with pytest.raises(Diverged, match=r"after epoch 1 the factor of dimension 1 is .*above max_factor=100") as e: epoch_end(methods[0])
    assert e.value.epoch == 1 and torch.equal(methods[0].f, before)
    with pytest.raises(ValueError, match="max_factor must be positive, got 0"): ScaleUp(max_factor=0.)


def stacked_loss(runs, draws, x, **kw):
    "The unchanged objective of several (model, methods) under vmap; buffers are updated in place."
    params, buffers = stack_module_state(runs)
    base = copy.deepcopy(runs[0]).to("meta")
    def one(p, b, noise):
        tape = iter(noise)
        return functional_call(base, (p, b), (x, Ctx(draw=lambda shape: next(tape), training=True, **kw)))
    return torch.vmap(one)(params, buffers, draws), params, buffers


class Both(nn.Module):
    def __init__(self, model, methods): super().__init__(); self.model, self.methods = model, methods
    def forward(self, x, ctx): return objective(self.model, self.methods, x, ctx)[0]


LISTS = {"bn": lambda k: [BatchNormMean(0.5 + 0.1 * k)], "bn fixed": lambda k: [BatchNormMean(0.1 * k, shift=0.7 + k)],
         "scale": lambda k: [ScaleUp(0.7 + 0.2 * k)], "scale median grad": lambda k: [ScaleUp(0.7 + 0.2 * k, average="median", grad_through_f=True)],
         "bn + scale + se": lambda k: [BatchNormMean(0.5 + 0.1 * k), ScaleUp(0.7 + 0.2 * k), NeighborEmbedding("se", 1. + k)],
         "lp": lambda k: [NeighborEmbedding("lp", cap=-1. + k)], "lp through": lambda k: [NeighborEmbedding("lp", cap=-1. + k, lp_const=True, detach_z=True)]}


@pytest.mark.parametrize("name", LISTS)
def test_stacked_equals_separate(name):
    runs = []
    for k in range(3):
        model, methods, x = case(*LISTS[name](k), seed=k)
        runs.append(Both(model, methods))
    x = torch.randn(48, 5, generator=gen(9), dtype=torch.float64)
    for epoch, step in ((0, 0), (0, 1), (1, 2)):
        draws = torch.randn(3, 3, 48, 3, generator=gen(step), dtype=torch.float64)
        kw = dict(epoch=epoch, step=step, record=True)
        together, params, buffers = stacked_loss(runs, draws, x * (1 + step), **kw)
        together.sum().backward()
        for k, r in enumerate(runs):
            tape = iter(draws[k])
            r.zero_grad()
            alone = r(x * (1 + step), Ctx(draw=lambda shape: next(tape), training=True, **kw))
            alone.backward()
            torch.testing.assert_close(together[k], alone, rtol=1e-12, atol=1e-12)
            for n, p in r.named_parameters(): torch.testing.assert_close(params[n].grad[k], p.grad, rtol=1e-9, atol=1e-12)
            for n, b in r.named_buffers(): torch.testing.assert_close(buffers[n][k], b, rtol=1e-12, atol=1e-12)
