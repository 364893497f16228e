"Critics against loops over pairs, closed forms, and each other."
import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from pcvae.critics import T_EXP_MAX, T_START, HybridCritic, NeuralCritic, SelfCritic, contrastive_loss, cosine_ce_min, self_critic_loss, split_after
from pcvae.gaussian import DiagGaussian, log_aggregate, pairwise_log_prob
from pcvae.method import Batch, Ctx, Method, check_methods, make_method, objective, randn_draw
from pcvae.models import build_model
from pcvae.scaling import BatchNormMean, ScaleUp
from pcvae.training import parameter_groups


def gen(seed=0): return torch.Generator().manual_seed(seed)
def ctx(seed=0, training=True): return Ctx(training=training, draw=randn_draw(gen(seed)))


def made_up(n, dim, spread=1., std=0.3, dtype=torch.float64, seed=0):
    g = gen(seed)
    mean, jitter, eps = (torch.randn(n, dim, generator=g, dtype=torch.float64) for _ in range(3))
    return [t.to(dtype) for t in (spread * mean, 2 * math.log(std) + 0.3 * jitter, eps)]


def by_loops(z, q):
    "Equation 4 with the pairs written out, in Python numbers."
    z, mean, var = z.tolist(), q.mean.tolist(), q.var.tolist()
    def log_q(i, j): return sum(-0.5 * ((a - m) ** 2 / v + math.log(2 * math.pi * v)) for a, m, v in zip(z[i], mean[j], var[j]))
    total = 0.
    for i in range(len(z)):
        row = [log_q(i, j) for j in range(len(z))]
        top = max(row)
        total += top + math.log(sum(math.exp(r - top) for r in row)) - row[i]
    return total / len(z)


def broadcast(z, q):
    log_q = q.log_prob(z[:, None])
    return (log_q.logsumexp(1) - log_q.diagonal()).mean()


def with_grad(fn, mean, logvar, eps):
    mean, logvar = mean.clone().requires_grad_(), logvar.clone().requires_grad_()
    q = DiagGaussian(mean, logvar)
    loss = fn(q.rsample(eps), q)
    return loss.detach(), torch.cat(torch.autograd.grad(loss, (mean, logvar)))


# ---- contrastive_loss
@pytest.mark.parametrize("direction", ["z2x", "x2z", "both"])
def test_contrastive_loss_by_loops(direction):
    a = (4 * torch.randn(5, 5, generator=gen(), dtype=torch.float64))
    rows = sum(math.log(sum(math.exp(a[i, j]) for j in range(5))) - a[i, i].item() for i in range(5)) / 5
    columns = sum(math.log(sum(math.exp(a[i, j]) for i in range(5))) - a[j, j].item() for j in range(5)) / 5
    want = {"z2x": rows, "x2z": columns, "both": (rows + columns) / 2}[direction]
    assert abs(rows - columns) > 0.01
    assert contrastive_loss(a, direction).item() == pytest.approx(want, abs=1e-12)

def test_contrastive_loss_with_large_logits():
    a = 300 * torch.randn(9, 9, generator=gen())
    torch.testing.assert_close(contrastive_loss(a, "z2x"), nn.functional.cross_entropy(a, torch.arange(9)))
    torch.testing.assert_close(contrastive_loss(a, "x2z"), nn.functional.cross_entropy(a.T, torch.arange(9)))

def test_contrastive_loss_gradient():
    a = torch.randn(6, 6, generator=gen(), dtype=torch.float64, requires_grad=True)
    for d in ("z2x", "x2z", "both"):
        for scale in (1., 60.):         # the second is too wide for a single exp
            assert torch.autograd.gradcheck(lambda a: contrastive_loss(scale * a, d), a) and torch.autograd.gradgradcheck(lambda a: contrastive_loss(scale * a, d), a)
    for d, want in (("z2x", a.detach().softmax(1)), ("x2z", a.detach().softmax(0)), ("both", (a.detach().softmax(0) + a.detach().softmax(1)) / 2)):
        torch.testing.assert_close(torch.autograd.grad(contrastive_loss(a, d), a)[0], (want - torch.eye(6)) / 6)

@pytest.mark.parametrize("logits, message", [(torch.zeros(1, 1), "at least 2 of them, got 1"), (torch.zeros(3, 4), r"\(3, 4\)"), (torch.zeros(2, 3, 3), r"\(2, 3, 3\)")])
def test_contrastive_loss_refuses(logits, message):
    with pytest.raises(ValueError, match=message): contrastive_loss(logits)

def test_contrastive_loss_unknown_direction():
    with pytest.raises(ValueError, match="Did you mean 'x2z'"): contrastive_loss(torch.zeros(2, 2), "x2zz")


# ---- self_critic_loss
@pytest.mark.parametrize("n, dim", [(2, 1), (3, 2), (7, 5)])
def test_self_critic_by_loops(n, dim):
    mean, logvar, eps = made_up(n, dim, seed=n)
    q = DiagGaussian(mean, logvar)
    z = q.rsample(eps)
    assert self_critic_loss(z, q).item() == pytest.approx(by_loops(z, q), abs=1e-10)

@pytest.mark.parametrize("spread, std", [(0.05, 1.), (1., 0.3), (1., 0.08), (4., 0.1)])
@pytest.mark.parametrize("dim", [1, 4, 32])
def test_self_critic_equals_autograd_of_the_broadcast_form(spread, std, dim):
    data = made_up(130, dim, spread, std)
    want, want_grad = with_grad(broadcast, *data)
    loss, g = with_grad(self_critic_loss, *data)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)
    assert (g - want_grad).abs().max() <= 1e-9 * want_grad.abs().max() + 1e-12
    loss, g = with_grad(self_critic_loss, *(t.float() for t in data))
    assert loss.dtype == torch.float32 and abs(loss - want) < 1e-4
    if want > 0.01: assert (g - want_grad).abs().max() < 1e-4 * want_grad.abs().max()

def test_self_critic_gradcheck_in_all_three_inputs():
    mean, logvar, eps = made_up(5, 2)
    z = (mean + eps).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, m, v: 3 * self_critic_loss(z, DiagGaussian(m, v)), (z, mean.requires_grad_(), logvar.requires_grad_()))

def test_self_critic_with_codes_at_the_wrong_posterior():
    "Losses far above the clamp of 80 keep their value, and the gradient pulls home."
    mean = torch.arange(4.)[:, None].double()
    q = DiagGaussian(mean, torch.full_like(mean, -8.))
    z = mean.roll(1, 0).clone()
    want = broadcast(z, q)
    assert want > 1000
    torch.testing.assert_close(self_critic_loss(z, q), want)
    z.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(self_critic_loss(z, q), z), torch.autograd.grad(broadcast(z, q), z))

def overlapping(std, n=64, dim=4, offset=0.):
    "Codes, means and log-variances (float32 values) of narrow posteriors, each with a partner two standard deviations away."
    mean, logvar, eps = made_up(n, dim, 1., std)
    mean[1::2] = mean[::2] + 2 * std * eps[::2]
    mean, logvar = (mean + offset).float(), logvar.float()
    return DiagGaussian(mean, logvar).rsample(eps.float()), mean, logvar

def in_all_inputs(fn, z, mean, logvar):
    inputs = [t.clone().requires_grad_() for t in (z, mean, logvar)]
    loss = fn(inputs[0], DiagGaussian(*inputs[1:]))
    return loss.detach(), torch.autograd.grad(loss, inputs)

@pytest.mark.parametrize("n, dim", [(64, 1), (64, 4), (50, 32)])
@pytest.mark.parametrize("std", [1., 0.08, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_self_critic_of_narrow_overlapping_posteriors_in_float32(std, n, dim):
    case = overlapping(std, n, dim)
    want, exact = in_all_inputs(broadcast, *(t.double() for t in case))
    loss, got = in_all_inputs(self_critic_loss, *case)
    bound = 1e-3 if std < 3e-6 else 1e-4                            # float64 has lost 12 of its 16 digits there
    assert loss.dtype == torch.float32 and abs(loss - want) < bound * max(1., want)
    if dim < 32: assert want > 0.1                                  # there is something to get wrong
    for g, e in zip(got, exact):
        assert g.dtype == torch.float32 and torch.isfinite(g).all()
        if want > 1e-6: assert (g - e).abs().max() < 10 * bound * e.abs().max()
        else: assert g.abs().max() < 1e-3 / std

@pytest.mark.parametrize("offset", [5., -300.])
def test_self_critic_of_narrow_posteriors_far_from_the_origin(offset):
    case = overlapping(1e-3, offset=offset)
    want, exact = in_all_inputs(broadcast, *(t.double() for t in case))
    loss, got = in_all_inputs(self_critic_loss, *case)
    assert abs(loss - want) < 1e-4 * max(1., want)
    for g, e in zip(got, exact): assert (g - e).abs().max() < 1e-3 * e.abs().max()

def test_self_critic_of_a_few_narrow_dimensions_among_wide_ones():
    mean, logvar, eps = made_up(80, 6, 1., 0.5)
    logvar[:, :2] -= 24.                                            # std 3e-6
    mean[1::2, :2] = mean[::2, :2] + 1e-6
    mean, logvar = mean.float(), logvar.float()
    case = DiagGaussian(mean, logvar).rsample(eps.float()), mean, logvar
    want, exact = in_all_inputs(broadcast, *(t.double() for t in case))
    loss, got = in_all_inputs(self_critic_loss, *case)
    assert want > 0.02 and abs(loss - want) < 1e-4
    for g, e in zip(got, exact): assert (g - e).abs().max() < 1e-3 * e.abs().max()

def test_self_critic_of_variances_below_float32():
    "exp(-logvar) overflows float32 there; the loss of posteriors that are far apart is 0 all the same, and its gradient finite."
    q = DiagGaussian(torch.arange(8.)[:, None].expand(8, 2), torch.full((8, 2), -95.))
    loss, got = in_all_inputs(self_critic_loss, q.mean.clone(), q.mean, q.logvar)
    assert loss == 0 and all(torch.isfinite(g).all() for g in got)

def test_self_critic_extremes():
    same = DiagGaussian(torch.zeros(50, 3), torch.zeros(50, 3))
    assert self_critic_loss(same.sample(generator=gen()), same).item() == pytest.approx(math.log(50), abs=1e-5)
    apart = DiagGaussian(100 * torch.arange(50.)[:, None].expand(50, 3), torch.zeros(50, 3))
    loss, g = with_grad(self_critic_loss, apart.mean, apart.logvar, torch.zeros(50, 3))
    assert loss == 0 and torch.isfinite(g).all()

def test_batch_information_is_log_batch_minus_cross_entropy():
    mean, logvar, eps = made_up(40, 3)
    q = DiagGaussian(mean, logvar)
    z = q.rsample(eps)
    paired = (q.log_prob(z) - log_aggregate(z, q)).mean()
    torch.testing.assert_close(math.log(40) - self_critic_loss(z, q), paired)
    torch.testing.assert_close(self_critic_loss(z, q), contrastive_loss(pairwise_log_prob(z, q), "z2x"))

def test_self_critic_is_the_best_score():
    "Sharper, flatter, noisier or biased scores certify less."
    mean, logvar, eps = made_up(600, 2, 1., 0.5)
    q = DiagGaussian(mean, logvar)
    a = pairwise_log_prob(q.rsample(eps), q)
    best = contrastive_loss(a, "z2x")
    for worse in (0.7 * a, 1.4 * a, a + 0.5 * torch.randn(600, 600, generator=gen(), dtype=torch.float64), a + 0.5 * torch.randn(600, generator=gen(), dtype=torch.float64)):
        assert contrastive_loss(worse, "z2x") > best + 0.005
    torch.testing.assert_close(contrastive_loss(a + torch.randn(600, 1, generator=gen(), dtype=torch.float64), "z2x"), best)

@pytest.mark.parametrize("batch", [4, 64])
@pytest.mark.parametrize("std", [0.02, 0.5, 3.])
def test_certified_information_is_below_truth_and_ceiling(batch, std):
    g, values = gen(), []
    for _ in range(2048 // batch):
        x = torch.randn(batch, 1, generator=g)
        q = DiagGaussian(x, torch.full_like(x, 2 * math.log(std)))
        values.append(math.log(batch) - self_critic_loss(q.sample(generator=g), q).item())
    assert max(values) <= math.log(batch) + 1e-5
    assert sum(values) / len(values) <= 0.5 * math.log(1 + std ** -2) + 0.03

def test_self_critic_vmap_outside_inside_and_partly():
    data = [torch.stack(t) for t in zip(*(made_up(20, 3, seed=s) for s in range(3)))]
    fn = lambda m, v, e: self_critic_loss(DiagGaussian(m, v).rsample(e), DiagGaussian(m, v))
    alone = [with_grad(self_critic_loss, *(t[k] for t in data)) for k in range(3)]
    for t in data[:2]: t.requires_grad_()
    out = vmap(fn)(*data)
    outside = torch.cat(torch.autograd.grad(out.sum(), data[:2]), 1)
    inside = torch.cat(vmap(grad(fn, (0, 1)))(*data), 1)
    for k, (loss, g) in enumerate(alone):
        for got, want in ((out[k], loss), (outside[k], g), (inside[k], g)): torch.testing.assert_close(got, want)
    partly = vmap(fn, in_dims=(0, None, None))(data[0], data[1][1], data[2][1])
    torch.testing.assert_close(partly[1], alone[1][0])
    codes = vmap(self_critic_loss_of_codes(data), in_dims=1)(data[2].transpose(0, 1))      # only z is stacked, along another dimension
    torch.testing.assert_close(codes[2], self_critic_loss(data[2][2], DiagGaussian(data[0][0], data[1][0])))

def self_critic_loss_of_codes(data): return lambda z: self_critic_loss(z, DiagGaussian(data[0][0], data[1][0]))

def test_self_critic_second_derivative():
    mean, logvar, eps = made_up(4, 2)
    z = (mean + eps).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z, m, v: self_critic_loss(z, DiagGaussian(m, v)), (z, mean.requires_grad_(), logvar.requires_grad_()))

def test_self_critic_gradient_is_the_same_by_both_ways():
    data = made_up(30, 3)
    _, fast = with_grad(self_critic_loss, *data)
    mean, logvar = (t.clone().requires_grad_() for t in data[:2])
    slow = torch.autograd.grad(self_critic_loss(DiagGaussian(mean, logvar).rsample(data[2]), DiagGaussian(mean, logvar)), (mean, logvar), create_graph=True)
    torch.testing.assert_close(torch.cat(slow).detach(), fast)

@pytest.mark.parametrize("second", [False, True])
def test_self_critic_with_very_narrow_posteriors_in_float32(second):
    "The expanded square has no correct digit on the diagonal here."
    data = made_up(40, 8, 1., 1e-6)
    want, want_grad = with_grad(broadcast, *data)
    mean, logvar, eps = (t.float() for t in data)
    mean.requires_grad_(); logvar.requires_grad_()
    q = DiagGaussian(mean, logvar)
    loss = self_critic_loss(q.rsample(eps), q)
    g = torch.cat(torch.autograd.grad(loss, (mean, logvar), create_graph=second))
    assert abs(loss.item() - want) < 1e-5 and (g - want_grad).abs().max() < 1e-4

def test_self_critic_leaves_its_inputs_alone():
    mean, logvar, eps = made_up(6, 2)
    before = [t.clone() for t in (mean, logvar, eps)]
    with_grad(self_critic_loss, mean, logvar, eps)
    for a, b in zip(before, (mean, logvar, eps)): assert torch.equal(a, b)

@pytest.mark.parametrize("z, message", [(torch.zeros(3, 2), r"\(3, 2\) and \(4, 2\)"), (torch.zeros(4, 3), r"\(4, 3\) and \(4, 2\)"), (torch.zeros(5, 4, 2), r"\(5, 4, 2\)")])
def test_self_critic_refuses_shapes(z, message):
    with pytest.raises(ValueError, match=message): self_critic_loss(z, DiagGaussian(torch.zeros(4, 2), torch.zeros(4, 2)))


# ---- cosine_ce_min
@pytest.mark.parametrize("scale, batch, ce", [(2.659, 1024, 4.283), (2.659, 50, 1.447), (2.659, 64, 1.654), (3.67, 1024, 3.295), (3.67, 50, 0.769),
                                              (3.67, 64, 0.922), (14.286, 1024, 0.001), (14.286, 50, 0.), (14.286, 64, 0.)])
def test_cosine_ce_min_table(scale, batch, ce): assert cosine_ce_min(scale, batch) == pytest.approx(ce, abs=6e-4)

def test_cosine_ce_min_is_reached_by_a_simplex_and_beaten_by_none():
    for n in (2, 5, 12):
        simplex = nn.functional.normalize(torch.eye(n, dtype=torch.float64) - 1 / n, dim=-1)
        for direction in ("z2x", "x2z", "both"):
            assert contrastive_loss(4. * simplex @ simplex.T, direction).item() == pytest.approx(cosine_ce_min(4., n), abs=1e-10)
        for seed in range(20):
            a, b = (nn.functional.normalize(torch.randn(n, n, generator=gen(seed + k), dtype=torch.float64), dim=-1) for k in (0, 100))
            assert contrastive_loss(4. * a @ b.T, "z2x") > cosine_ce_min(4., n)
    assert cosine_ce_min(0., 7) == pytest.approx(math.log(7))
    with pytest.raises(ValueError, match="batch=1"): cosine_ce_min(1., 1)


# ---- the methods
def vae(hidden=(8, 8, 8), seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return build_model("mlp", x_dim=16, latent_dim=4, hidden=hidden).to(dtype), torch.randn(32, 16, generator=gen(9)).to(dtype)

def ready(critic, model, x): critic.setup(model, x); return critic

CRITICS = {"self": lambda **kw: SelfCritic(**kw), "neural": lambda **kw: NeuralCritic(dim=8, hidden_x=12, hidden_z=6, **kw),
           "mlp": lambda **kw: NeuralCritic(dim=8, hidden_x=12, hidden_z=6, x_net="mlp", **kw), "exp": lambda **kw: NeuralCritic(dim=8, hidden_x=12, hidden_z=6, temperature="exp", **kw),
           "hybrid": lambda **kw: HybridCritic(shared=2, dim=8, hidden_x=12, hidden_z=6, **kw)}

@pytest.mark.parametrize("name", CRITICS)
def test_penalty_is_linear_in_the_weight_and_added_once(name):
    model, x = vae()
    a, b = ready(CRITICS[name](weight=1.), model, x), ready(CRITICS[name](weight=7.), model, x)
    b.load_state_dict({**a.state_dict(), "weight": torch.tensor(7.)})
    (plain, _), (_, one), (total, seven) = (objective(model, ms, x, ctx()) for ms in ([], [a], [b]))
    part, = set(one) - {"kl", "log_px"}
    assert part == {"self": "self_critic", "hybrid": "hybrid_critic"}.get(name, "neural_critic")
    torch.testing.assert_close(seven[part], 7 * one[part])
    torch.testing.assert_close(total, plain + seven[part])

@pytest.mark.parametrize("name", CRITICS)
def test_gradient_reaches_the_encoder_and_the_critic_but_not_the_decoder(name):
    model, x = vae()
    critic = ready(CRITICS[name](), model, x)
    _, parts = objective(model, [critic], x, ctx())
    next(v for k, v in parts.items() if k.endswith("_critic")).backward()
    assert all(p.grad is None for p in model.decoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert all(p.grad is not None for p in critic.parameters())

@pytest.mark.parametrize("name", CRITICS)
def test_a_batch_of_one_is_refused(name):
    model, x = vae()
    critic = ready(CRITICS[name](), model, x)
    assert critic.min_batch == 2
    with pytest.raises(ValueError, match="at least 2 of them, got 1"): objective(model, [critic], x[:1], ctx())

@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("first", [True, False])
def test_refuses_methods_with_one_mean(name, first):
    one_mean = BatchNormMean(gamma=0., shift=0.7)
    methods = [CRITICS[name](), one_mean] if first else [one_mean, CRITICS[name]()]
    with pytest.raises(ValueError, match="BatchNormMean gives every posterior the same mean"): check_methods(methods)
    check_methods([CRITICS[name](), BatchNormMean(gamma=0.6)])

@pytest.mark.parametrize("name", CRITICS)
def test_float64(name):
    model, x = vae(dtype=torch.float64)
    critic = ready(CRITICS[name](), model, x)
    assert all(p.dtype == torch.float64 for p in critic.parameters())
    total, _ = objective(model, [critic], x, Ctx(training=True, draw=randn_draw(gen(), x)))
    assert total.dtype == torch.float64

class Fed(Method):
    "A method whose fed distribution is not the one that is charged."
    def feed(self, q, b): return DiagGaussian(3 * q.mean + 1, q.logvar)

def test_self_critic_looks_at_the_fed_distribution():
    model, x = vae()
    _, parts = objective(model, [SelfCritic(2.), Fed()], x, ctx())
    q = model.encode(x); q = DiagGaussian(3 * q.mean + 1, q.logvar)
    assert parts["self_critic"].item() == pytest.approx(2 * by_loops(q.rsample(ctx().draw(q.shape)).detach(), q), abs=1e-3)

def test_self_critic_with_scale_vae():
    model, x = vae()
    scale = ready(ScaleUp(1.1), model, x)
    _, with_scale = objective(model, [scale, SelfCritic(1.)], x, ctx())
    _, plain = objective(model, [SelfCritic(1.)], x, ctx())
    assert with_scale["self_critic"] < plain["self_critic"] - 0.1

def test_neural_critic_by_loops():
    model, x = vae()
    critic = ready(NeuralCritic(weight=3., dim=8, hidden_x=12, hidden_z=6, direction="z2x"), model, x)
    _, parts = objective(model, [critic], x[:6], ctx())
    q = model.encode(x[:6])
    gz, gx = critic.z_net(q.rsample(ctx().draw(q.shape))).tolist(), critic.x_net(x[:6]).tolist()
    cos = lambda a, b: sum(i * j for i, j in zip(a, b)) / math.sqrt(sum(i * i for i in a) * sum(j * j for j in b))
    a = [[math.log(1 / 0.07) * cos(z, y) for y in gx] for z in gz]
    ce = sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(a)) / 6
    assert parts["neural_critic"].item() == pytest.approx(3 * ce, abs=1e-4)

@pytest.mark.parametrize("direction", ["z2x", "x2z", "both"])
@pytest.mark.parametrize("kind", [NeuralCritic, HybridCritic])
def test_direction_is_used(kind, direction):
    model, x = vae()
    critic = ready(kind(1., dim=8, direction=direction, **({"shared": 1} if kind is HybridCritic else {})), model, x)
    b = Batch(x, model, [critic], ctx(), q=model.encode(x), z=torch.randn(32, 4, generator=gen()))
    torch.testing.assert_close(*critic.penalty(b).values(), contrastive_loss(critic.logits(b), direction))
    others = {d: contrastive_loss(critic.logits(b), d).item() for d in ("z2x", "x2z", "both")}
    assert len({round(v, 6) for v in others.values()}) == 3

def test_published_sizes():
    model, x = vae(hidden=(8,))
    toy = ready(NeuralCritic(dim=8, hidden_x=12, hidden_z=6, x_net="mlp"), model, x)
    assert sum(p.numel() for p in model.parameters()) == 392 and sum(p.numel() for p in toy.parameters()) == 395
    cnn, images = build_model("conv", latent_dim=32), torch.rand(2, 1, 28, 28)
    heads = 512 * 256 + 256 + 256 * 128 + 128 + 32 * 64 + 64 + 64 * 128 + 128 + 1
    trunk = sum(p.numel() for p in cnn.encoder.trunk.parameters())
    neural, hybrid = ready(NeuralCritic(), cnn, images), ready(HybridCritic(), cnn, images)
    assert sum(p.numel() for p in neural.parameters()) == trunk + heads
    assert sum(p.numel() for p in hybrid.parameters()) == 256 * 512 * 4 + 512 + heads       # only the fifth convolution is its own

def test_neural_copy_is_fresh_and_the_model_untouched():
    model, x = vae()
    before = copy.deepcopy(model.state_dict())
    critic = ready(NeuralCritic(dim=8), model, x)
    for k, v in model.state_dict().items(): assert torch.equal(v, before[k])
    for own, old in zip(critic.x_net[0].parameters(), model.encoder.trunk.parameters()):
        assert own.shape == old.shape and not torch.equal(own, old) and own.data_ptr() != old.data_ptr()

def test_temperatures():
    raw, exp = NeuralCritic(), NeuralCritic(temperature="exp")
    assert raw.scale.item() == pytest.approx(2.6593, abs=1e-4) and exp.scale.item() == pytest.approx(14.2857, abs=1e-3)
    assert raw.no_decay == () and exp.no_decay == ("t",) and T_START == pytest.approx(2.6593, abs=1e-4)
    for critic, bounded in ((raw, False), (exp, True)):
        critic.t.data.fill_(9.)
        assert critic.scale.item() == pytest.approx(100. if bounded else 9., rel=1e-5)

def test_exp_temperature_can_come_down_from_its_border():
    model, x = vae()
    critic = ready(NeuralCritic(1., dim=8, temperature="exp"), model, x)
    critic.t.data.fill_(9.)
    objective(model, [critic], x, ctx(training=False)); assert critic.t == 9.               # evaluation changes nothing
    _, parts = objective(model, [critic], x, ctx())
    assert critic.t.item() == pytest.approx(T_EXP_MAX, abs=1e-5)
    parts["neural_critic"].backward()
    assert critic.t.grad > 0                                # a random critic at T = 100 is far too sure
    raw = ready(NeuralCritic(1., dim=8), model, x)
    raw.t.data.fill_(9.); objective(model, [raw], x, ctx()); assert raw.t == 9.

def test_only_the_exp_temperature_is_free_of_decay():
    model, x = vae()
    for critic, free in ((NeuralCritic(dim=8), []), (NeuralCritic(dim=8, temperature="exp"), [1])):
        groups = parameter_groups(model, nn.ModuleList([ready(critic, model, x)]), 0.01)
        assert [sum(p.numel() for p in g["params"]) for g in groups if g["weight_decay"] == 0] == free

def test_critic_only_sees_directions():
    model, x = vae()
    critic = ready(NeuralCritic(1., dim=8), model, x)
    a = objective(model, [critic], x, ctx())[1]["neural_critic"]
    with torch.no_grad():
        for net, factor in ((critic.z_net[-1], 5.), (critic.x_net[1][-1], 0.1)):
            for p in net.parameters(): p.mul_(factor)
    torch.testing.assert_close(objective(model, [critic], x, ctx())[1]["neural_critic"], a)


# ---- hybrid
def test_split_after_keeps_activations_and_norms_together():
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Dropout(0.), nn.Linear(6, 3), nn.ReLU())
    assert [split_after(trunk, n) for n in (1, 2)] == [4, 7]
    with pytest.raises(ValueError, match="too shallow.*shared=3.*needs 4 layers.*has 3"): split_after(trunk, 3)

@pytest.mark.parametrize("hidden, shared, fits", [((8,), 1, False), ((8, 8), 1, True), ((8, 8), 2, False), ((8, 8, 8), 2, True)])
def test_hybrid_needs_a_layer_of_its_own(hidden, shared, fits):
    model, x = vae(hidden)
    if fits: ready(HybridCritic(shared=shared), model, x)
    else:
        with pytest.raises(ValueError, match="encoder is too shallow"): HybridCritic(shared=shared).setup(model, x)

def test_hybrid_shares_the_first_layers_and_only_those():
    model, x = vae()
    critic = ready(HybridCritic(1., shared=2, dim=8), model, x)
    b = Batch(x, model, [critic], ctx(), z=torch.randn(32, 4, generator=gen()))
    before, linear = critic.logits(b), [m for m in model.encoder.trunk if isinstance(m, nn.Linear)]
    for layer, shared in zip(linear, (True, True, False)):
        kept = layer.weight.detach().clone()
        with torch.no_grad(): layer.weight.mul_(-1.)
        assert torch.equal(critic.logits(b), before) != shared
        with torch.no_grad(): layer.weight.copy_(kept)
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in model.parameters()}

def test_hybrid_gradient_of_shared_layers_is_the_sum_of_both_paths():
    model, x = vae()
    critic = ready(HybridCritic(1., shared=1, dim=8), model, x)
    first, noise = model.encoder.trunk[0].weight, torch.randn(32, 4, generator=gen())
    def pull(z_path, x_path):
        q, trunk = model.encode(x), model.encoder.trunk
        z = q.rsample(noise) if z_path else q.rsample(noise).detach()
        h = trunk[:2](x) if x_path else trunk[:2](x).detach()
        z, h = (nn.functional.normalize(g, dim=-1) for g in (critic.z_net(z), critic.x_net(h)))
        return torch.autograd.grad(contrastive_loss(critic.t * z @ h.T), first)[0]
    q = model.encode(x)
    b = Batch(x, model, [critic], ctx(), q=q, z=q.rsample(noise))
    got, = torch.autograd.grad(critic.penalty(b)["hybrid_critic"], first)
    torch.testing.assert_close(got, pull(True, True))
    torch.testing.assert_close(got, pull(True, False) + pull(False, True))
    assert pull(False, True).abs().sum() > 0

def test_hybrid_follows_a_copied_model():
    model, x = vae()
    critic = ready(HybridCritic(1., shared=2, dim=8), model, x)
    other = copy.deepcopy(model)
    with torch.no_grad(): other.encoder.trunk[0].weight.mul_(-1.)
    z = torch.randn(32, 4, generator=gen())
    a, b = (critic.logits(Batch(x, m, [critic], ctx(), z=z)) for m in (model, other))
    assert not torch.equal(a, b)


# ---- errors and names
@pytest.mark.parametrize("build, message", [
    (lambda: SelfCritic(-1.), "SelfCritic: weight=-1.0"), (lambda: NeuralCritic(-1.), "NeuralCritic: weight=-1.0"), (lambda: HybridCritic(-1.), "HybridCritic: weight"),
    (lambda: SelfCritic(float("nan")), "weight=nan"), (lambda: NeuralCritic(dim=0), "dim=0"), (lambda: NeuralCritic(hidden_x=0), "hidden_x=0"), (lambda: HybridCritic(hidden_z=-1), "hidden_z=-1"),
    (lambda: HybridCritic(shared=0), "shared=0"), (lambda: NeuralCritic(temperature="rwa"), "unknown NeuralCritic temperature 'rwa'"), (lambda: HybridCritic(temperature="expo"), "Did you mean 'exp'"),
    (lambda: NeuralCritic(direction="bth"), "Did you mean 'both'"), (lambda: NeuralCritic(x_net="mpl"), "Did you mean 'mlp'")])
def test_bad_values_name_themselves(build, message):
    with pytest.raises(ValueError, match=message): build()

def test_configs_and_defaults():
    assert SelfCritic().config == {"weight": 20.}
    shared = dict(weight=20., dim=128, hidden_x=256, hidden_z=64, temperature="raw", direction="both")
    assert NeuralCritic().config == {**shared, "x_net": "encoder"} and HybridCritic().config == {**shared, "shared": 4}
    for c in (SelfCritic(5.), NeuralCritic(dim=3), HybridCritic(shared=1)): assert make_method(type(c).__name__, **c.config).config == c.config


# ---- stacked
class Run(nn.Module):
    def __init__(self, model, methods): super().__init__(); self.model, self.methods = model, nn.ModuleList(methods)
    def forward(self, x, eps): return objective(self.model, self.methods, x, Ctx(training=True, draw=lambda shape: eps))[0]

@pytest.mark.parametrize("name", CRITICS)
def test_stacked_runs_equal_separate_ones(name):
    runs = []
    for k in range(3):
        model, x = vae(seed=k, dtype=torch.float64)
        runs.append(Run(model, [ready(CRITICS[name](weight=1. + k), model, x)]))
    if name == "exp":
        for r in runs: r.methods[0].t.data.fill_(9.)
    eps, base, (params, buffers) = torch.randn(3, 32, 4, generator=gen(), dtype=torch.float64), copy.deepcopy(runs[0]), stack_module_state(runs)
    out = vmap(lambda p, b, e: functional_call(base, (p, b), (x, e)))(params, buffers, eps)
    out.sum().backward()
    for k, run in enumerate(runs):
        loss = run(x, eps[k]); loss.backward()
        torch.testing.assert_close(out[k], loss)
        for n, p in run.named_parameters():
            if p.grad is not None: torch.testing.assert_close(params[n].grad[k], p.grad)
        if name == "exp": assert params["methods.0.t"][k].item() == run.methods[0].t.item() == pytest.approx(T_EXP_MAX)
