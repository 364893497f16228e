"Aggressive training: who moves when, the bounds of the inner loop, and the switch."
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pcvae.data import load
from pcvae.inference import Aggressive, _mutual_information, inner_loop
from pcvae.gaussian import DiagGaussian
from pcvae.method import Ctx, check_methods
from pcvae.metrics.information import mutual_information
from pcvae.models import build_model
from pcvae.scaling import BatchNormMean, ScaleUp
from pcvae.schedules import LinearWarmup
from pcvae.training import Recipe, Trainer


@pytest.fixture(scope="module")
def data(): return load("linear_gaussian", D=6, d=2, n=256)


def trainer(data, *methods, epochs=3, **kw):
    torch.manual_seed(0)
    return Trainer(build_model("mlp", x_dim=6, latent_dim=2), list(methods), data, Recipe(epochs=epochs, batch=64, clip=5., **kw))


def params(module): return [p.detach().clone() for p in module.parameters()]
def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a, b))


class Spy:
    "Records what each update changed, and the ctx it was made with."
    def __init__(self, t):
        self.t, self.calls, self.ctxs = t, [], []
        update, ctx = t.update, t.ctx
        def spy_update(total, only=None):
            before = params(t.model.encoder), params(t.model.decoder), params(t.methods)
            update(total, only)
            after = params(t.model.encoder), params(t.model.decoder), params(t.methods)
            self.calls.append((only, tuple(not equal(a, b) for a, b in zip(before, after))))
        def spy_ctx(record=True): self.ctxs.append(ctx(record)); return self.ctxs[-1]
        t.update, t.ctx = spy_update, spy_ctx


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_who_moves_when(data, dtype):
    m = Aggressive(max_inner=7, check_every=3)
    t = trainer(data, m, BatchNormMean(), dtype=dtype)
    spy = Spy(t)
    t.methods[0].train_step(t, t.random_batch())
    *inner, outer = spy.calls
    assert 6 <= len(inner) <= 7
    assert all(only == ("encoder", "methods") and moved == (True, False, True) for only, moved in inner)      # BN's shift goes with the encoder
    assert outer == (("decoder",), (False, True, False))
    assert [c.record for c in spy.ctxs] == [False] * len(inner) + [True]
    t.methods[0].on.zero_()
    spy.calls.clear()
    t.methods[0].train_step(t, t.random_batch())
    assert spy.calls == [(None, (True, True, True))]


def fake(losses):
    "A trainer whose losses are given."
    it, steps = iter(losses), []
    class Stub:
        model = methods = None
        def ctx(self, record=True): return Ctx(record=record)
        def update(self, total, only=None): steps.append(only)
        def random_batch(self): return "random"
    return Stub(), it, steps


@pytest.mark.parametrize("losses, steps", [
    ([5.] * 200, 99),                                   # never rises: the bound
    ([-i / 100 for i in range(200)], 99),
    ([1.] * 10 + [2.] * 190, 20),                       # rises at the first comparison: never fewer than 20
    ([3.] * 10 + [2.] * 10 + [1.] * 10 + [1.5] * 170, 40),
    ([9.] * 9 + [1.] + [2.] * 190, 99),                 # means over ten steps are compared, not single losses
])
def test_inner_steps(monkeypatch, losses, steps):
    stub, it, taken = fake(losses)
    seen = []
    def objective(model, methods, x, ctx): seen.append(x); return torch.tensor(next(it)), {}
    monkeypatch.setattr("pcvae.inference.objective", objective)
    assert inner_loop(stub, "outer", 99, 10) == steps == len(taken)
    assert seen == ["outer"] + ["random"] * (steps - 1)


def ends(m, values, first_epoch=0):
    "Epochs after which `m` is on, for given values of the mutual information."
    out = []
    for epoch, mi in enumerate(values, first_epoch):
        m._now = mi
        m.on_epoch_end(SimpleNamespace(epoch=epoch, view=lambda: None, data=SimpleNamespace(valid=None)))
        out.append(bool(m.on))
    return out


def test_switch(monkeypatch):
    monkeypatch.setattr("pcvae.inference._mutual_information", lambda *a: current._now)
    current = m = Aggressive(patience=2)
    assert ends(m, [.5, 1., .9, 1.1, 1.2, 1.0, 3.]) == [True] * 5 + [False, False]      # the counter is never set back
    assert m.worse == 2 and abs(m.best - 1.2) < 1e-6
    current = m = Aggressive(patience=1)
    assert ends(m, [.5, .5, .4]) == [True, True, False]
    current = m = Aggressive()
    assert ends(m, [1.] + [.5] * 5) == [True] * 5 + [False]     # earliest end: the sixth epoch


def test_phase_that_does_not_end_is_bounded_and_reported(monkeypatch):
    monkeypatch.setattr("pcvae.inference._mutual_information", lambda *a: current._now)
    current = m = Aggressive(max_epochs=3)
    with pytest.warns(UserWarning, match=r"still on after max_epochs=3 looks at the information \(now 3 nats, best 3, 0 of 5"):
        assert ends(m, [1., 2., 3.]) == [True, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ends(m, [4.], 3) == [False]


def test_kl_weight_moves_once_per_outer_batch(data):
    t = trainer(data, Aggressive(max_inner=4, check_every=2), LinearWarmup(2.), epochs=2)
    spy = Spy(t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.fit()
    outer = [c.step for c in spy.ctxs if c.record]
    assert outer == list(range(2 * t.steps_per_epoch))
    assert {c.step for c in spy.ctxs if not c.record} <= set(outer)
    m = t.methods[0]
    assert m.outer_steps == len(outer) and len(spy.calls) == len(outer) + m.inner_steps
    assert 2 * m.outer_steps <= m.inner_steps <= 4 * m.outer_steps


def test_statistics_count_the_outer_pass_only(data):
    t = trainer(data, Aggressive(max_inner=5, check_every=2), ScaleUp())
    x = t.random_batch()
    t.methods[0].train_step(t, x)
    assert (t.methods[1].stds[:, 0] >= 0).sum() == 1


def test_state_survives_a_checkpoint(data, tmp_path):
    def make(): return trainer(data, Aggressive(max_inner=4, check_every=2, patience=1), epochs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = make(); whole.fit()
        while not (part := make()).fit(tmp_path / "s.pt", deadline=0., tag="a"): pass
    for a, b in zip((*whole.model.state_dict().values(), *whole.methods.state_dict().values()),
                    (*part.model.state_dict().values(), *part.methods.state_dict().values())): assert torch.equal(a, b)


def test_information_agrees_with_the_metric():
    class View:
        prior = DiagGaussian.standard(3)
        def encode(self, x): return DiagGaussian(x, torch.zeros_like(x))
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    view = View()
    want = float(mutual_information(view.encode(x), generator=torch.Generator().manual_seed(0)))
    assert abs(_mutual_information(view, x) - want) < 1e-4
    assert _mutual_information(view, x) == _mutual_information(view, x)                 # the same noise at every call
    small = _mutual_information(view, x, 20)
    assert small < want and small <= 3                                                   # pools of 20 stop at ln 20 = 3.0
    assert abs(_mutual_information(SimpleNamespace(encode=lambda x: DiagGaussian(0 * x, 0 * x), prior=view.prior), x)) < 1e-5


def test_wrong_input():
    for name in ("max_inner", "check_every", "patience", "max_epochs"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"): Aggressive(**{name: 0})
    with pytest.raises(ValueError, match="at least two items"): Aggressive(mi_batch=1)
    with pytest.raises(ValueError, match="both replace the training step"): check_methods([Aggressive(), Aggressive()])
