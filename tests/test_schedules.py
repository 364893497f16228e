"Schedules and free bits: every step by brute force, gradients, stacked runs."
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from pcvae.method import Ctx, Method, check_methods, make_method, objective, randn_draw
from pcvae.models import build_model
from pcvae.schedules import Beta, Cyclical, FreeBits, LinearWarmup


def at(method, step, steps=10, n_epochs=8, w=1.): return float(method.kl_weight(w, Ctx(step // steps, step, steps, n_epochs)))


# ---- warm-up
@pytest.mark.parametrize("epochs, start", [(4, 0.), (2.5, 0.1), (0.3, 0.), (100, 0.5), (3, 1.)])
def test_warmup_by_hand(epochs, start):
    for step in range(81): assert at(LinearWarmup(epochs, start), step) == pytest.approx(start + (1 - start) * min(1, step / 10 / epochs), abs=1e-6)

def test_warmup_of_no_epochs_is_over_at_once():
    assert [at(LinearWarmup(0, 0.3), s) for s in (0, 1, 50)] == [1, 1, 1]

def test_warmup_counts_fractions_of_epochs_not_whole_ones():
    assert 0 < at(LinearWarmup(1.), 1) < at(LinearWarmup(1.), 9) < 1

def test_warmup_defaults(): assert LinearWarmup().config == {"epochs": 10., "start": 0., "end": 1.}


# ---- cyclical
@pytest.mark.parametrize("cycles, ramp, steps, n_epochs", [(4, 0.5, 10, 8), (3, 1., 7, 5), (1, 0.25, 10, 2), (5, 0.1, 3, 10)])
def test_cyclical_by_hand(cycles, ramp, steps, n_epochs):
    "Walks through the cycles with exact integers."
    total = steps * n_epochs
    for step in range(total):
        k = max(k for k in range(cycles) if step * cycles >= k * total)         # the cycle this step is in
        part = (step * cycles - k * total) / total
        assert at(Cyclical(cycles, ramp), step, steps, n_epochs) == pytest.approx(min(1, part / ramp), abs=1e-6)

def test_cyclical_ends_at_full_weight_and_restarts_at_zero():
    c = Cyclical(3)
    zeros = [s for s in range(0, 151) if at(c, s, 10, 15) == 0]
    assert zeros == [0, 50, 100] and at(c, 150, 10, 15) == 1

def test_cyclical_depends_on_the_whole_training_not_on_the_epoch():
    assert at(Cyclical(4, 0.5), 5, 10, 8) != at(Cyclical(4, 0.5), 5, 10, 16)

@pytest.mark.parametrize("ctx", [Ctx(step=11, steps_per_epoch=10), Ctx(n_epochs=0), Ctx(n_epochs=None), Ctx(step=81, steps_per_epoch=10, n_epochs=8)])
def test_cyclical_needs_to_know_the_length(ctx):
    with pytest.raises(ValueError, match="give the context the number of epochs"): Cyclical().kl_weight(1., ctx)

def test_cyclical_defaults(): assert Cyclical().config == {"cycles": 4, "ramp": 0.5}


# ---- weights multiply
def test_schedules_multiply_in_any_order():
    for order in itertools.permutations([LinearWarmup(4.), Cyclical(2, 0.5), Beta(0.3)]):
        for step in (0, 7, 33, 44, 80):
            w = 1.
            for m in order: w = m.kl_weight(w, Ctx(0, step, 10, 8))
            assert float(w) == pytest.approx(at(order[0], step) * at(order[1], step) * at(order[2], step), abs=1e-6)
    assert at(Beta(0.4), 3, w=0.5) == pytest.approx(0.2)

def test_weight_reaches_the_loss_and_leaves_the_part():
    torch.manual_seed(0)
    model, x = build_model("mlp", x_dim=6, latent_dim=2), torch.randn(10, 6)
    go = lambda *methods: objective(model, methods, x, Ctx(step=2, steps_per_epoch=10, n_epochs=8, draw=randn_draw(torch.Generator().manual_seed(0))))
    (plain, parts), (half, half_parts) = go(), go(LinearWarmup(0.4), Beta(0.5))
    kl = parts["kl"].sum(-1).mean()
    torch.testing.assert_close(plain - half, 0.75 * kl)
    torch.testing.assert_close(half_parts["kl"], parts["kl"])


# ---- free bits
KL = torch.tensor([[0.1, 2.0, 0.0], [0.3, 0.0, 0.05], [0.0, 0.4, 0.05], [0.2, 0.1, 0.0]])

@pytest.mark.parametrize("bits", [0., 0.15, 0.3, 5.])
def test_free_bits_by_loops(bits):
    dim = [[max(bits, k) for k in row] for row in KL.tolist()]
    torch.testing.assert_close(FreeBits(bits).kl(KL, None), torch.tensor(dim))
    example = [max(bits, sum(row)) for row in KL.tolist()]
    torch.testing.assert_close(FreeBits(bits, "example").kl(KL, None).sum(-1), torch.tensor(example))
    batch = sum(max(bits, sum(col) / 4) for col in zip(*KL.tolist()))
    out = FreeBits(bits, "batch").kl(KL, None)
    assert out.shape == KL.shape
    torch.testing.assert_close(out.sum(-1), torch.full((4,), batch))

@pytest.mark.parametrize("per, mask", [
    ("dim", lambda k: k > 0.3), ("example", lambda k: (k.sum(-1, keepdim=True) > 0.3).expand_as(k)), ("batch", lambda k: (k.mean(0) > 0.3).expand_as(k))])
def test_free_bits_gradient_is_that_of_the_published_mask(per, mask):
    k = KL.clone().requires_grad_()
    FreeBits(0.3, per).kl(k, None).sum(-1).mean().backward()
    torch.testing.assert_close(k.grad, mask(KL).float() / 4)

@pytest.mark.parametrize("per", ["dim", "example", "batch"])
def test_free_bits_of_zero_is_the_plain_vae(per):
    torch.testing.assert_close(FreeBits(0., per).kl(KL, None).sum(-1).mean(), KL.sum(-1).mean())

def test_free_bits_keeps_float64():
    for per in ("dim", "example", "batch"):
        assert FreeBits(0.1, per).kl(KL.double(), None).dtype == torch.float64

def test_free_bits_raises_the_kl_of_a_trained_model():
    "Minimise the KL alone: without a floor it goes to 0, with one it stays where the floor lets go."
    for per, bits, floor in (("dim", 0.2, 0.2), ("example", 0.6, 0.2), ("batch", 0.2, 0.2)):
        mean = torch.full((5, 3), 1.5, requires_grad=True)
        optimizer, m = torch.optim.SGD([mean], lr=0.5), FreeBits(bits, per)
        for _ in range(300):
            optimizer.zero_grad(); m.kl(0.5 * mean ** 2, None).sum().backward(); optimizer.step()
        kl = 0.5 * mean.detach() ** 2
        assert 0.02 < kl.mean() <= floor + 1e-6


# ---- errors
@pytest.mark.parametrize("build, message", [
    (lambda: LinearWarmup(-1), "epochs=-1 should be at least 0"), (lambda: LinearWarmup(float("nan")), "epochs=nan"),
    (lambda: LinearWarmup(1., 1.1), "start=1.1"), (lambda: LinearWarmup(1., -0.1), "start=-0.1"),
    (lambda: Cyclical(0), "cycles=0"), (lambda: Cyclical(ramp=0.), "ramp=0.0"), (lambda: Cyclical(ramp=1.01), "ramp=1.01"),
    (lambda: Beta(-1.), "beta=-1.0"), (lambda: Beta(float("nan")), "beta=nan"), (lambda: FreeBits(-0.1), "bits=-0.1"),
    (lambda: FreeBits(per="batches"), "Did you mean 'batch'"), (lambda: check_methods([FreeBits(), FreeBits()]), "stands twice")])
def test_bad_values_name_themselves(build, message):
    with pytest.raises(ValueError, match=message): build()

def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="cycles=2.5 should be int"): Cyclical(2.5)
    with pytest.raises(TypeError, match="beta='1' should be float"): Beta("1")

def test_by_name():
    for name in ("LinearWarmup", "Cyclical", "Beta", "FreeBits"):
        m = make_method(name)
        assert isinstance(m, Method) and not list(m.parameters())


# ---- stacked
class Run(nn.Module):
    def __init__(self, model, methods): super().__init__(); self.model, self.methods = model, nn.ModuleList(methods)
    def forward(self, x, eps): return objective(self.model, self.methods, x, Ctx(0, 3, 4, 10, True, True, lambda shape: eps))[0]

LISTS = {"schedules": lambda k: [LinearWarmup(k, 0.1 * k), Cyclical(2, 0.3 + 0.1 * k), Beta(0.3 + k)], **{per: lambda k, per=per: [FreeBits(0.1 * (k + 1), per)] for per in ("dim", "example", "batch")}}

@pytest.mark.parametrize("name", LISTS)
def test_stacked_runs_equal_separate_ones(name):
    "Scalars differ between the runs, so they must be buffers, not Python numbers."
    runs = []
    for k in range(3):
        torch.manual_seed(k)
        runs.append(Run(build_model("mlp", x_dim=6, latent_dim=2), LISTS[name](k)).double())
    x, eps = torch.randn(8, 6, dtype=torch.float64), torch.randn(3, 8, 2, dtype=torch.float64)
    base, (params, buffers) = copy.deepcopy(runs[0]), stack_module_state(runs)
    out = vmap(lambda p, b, e: functional_call(base, (p, b), (x, e)))(params, buffers, eps)
    torch.testing.assert_close(out, torch.stack([r(x, e) for r, e in zip(runs, eps)]), rtol=1e-6, atol=1e-6)
    assert len(set(out.tolist())) == 3
