"Stacked training: every run ends as if it had trained alone."
import copy
import math
import time
import warnings

import pytest
import torch

from pcvae import critics, diversity, inference, neighbors, objectives, priors, scaling, schedules  # noqa: F401 (each registers its methods)
from pcvae.data import load
from pcvae.data.core import Dataset
from pcvae.method import Diverged, Method, make_method
from pcvae.models import build_model
from pcvae.stacked import Net, Stack, StackedTrainer, groups, why_not
from pcvae.studies import Recipe, Run, prepare
from pcvae.training import Trainer

LIBRARY = sorted(n for n, c in Method.registry.items() if c.__module__.startswith("pcvae."))
SMALL = dict(dim=4, hidden_x=8, hidden_z=8)
CONFIGS = {     # of runs 0 and 2, and of run 1
    "Beta": (dict(beta=0.2), dict(beta=0.6)), "BatchNormMean": (dict(gamma=0.6), dict(gamma=1.)), "Cyclical": (dict(ramp=0.5), dict(ramp=0.2)),
    "DeltaVAE": (dict(delta=0.1), dict(delta=0.3)), "FreeBits": (dict(bits=0.1), dict(bits=0.5)), "GECO": (dict(threshold=3.), dict(threshold=4.)),
    "HybridCritic": (dict(weight=1., shared=1, **SMALL), dict(weight=5., shared=1, **SMALL)), "InfoVAE": (dict(alpha=0.9), dict(alpha=0.5)),
    "LatentReconstruction": (dict(weight=1.), dict(weight=3.)), "LinearWarmup": (dict(epochs=2.), dict(epochs=0.)), "MAE": (dict(diversity=1.), dict(diversity=2.)),
    "NeighborEmbedding": (dict(loss="lp", cap=-1.), dict(loss="lp", cap=1.)), "NeuralCritic": (dict(weight=1., x_net="mlp", **SMALL), dict(weight=5., x_net="mlp", **SMALL)),
    "ScaleUp": (dict(des_std=1.), dict(des_std=0.7)), "SelfCritic": (dict(weight=1.), dict(weight=5.)), "IWAE": (dict(samples=3),), "VampPrior": (dict(components=5),),
    "SAVAE": (dict(steps=2),), "Aggressive": (dict(max_inner=3),), "DUVAE": (dict(),)}
ALONE = {"Aggressive", "SAVAE"}

def toy(n=200) -> Dataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g) @ torch.randn(6, 6, generator=g)
    return Dataset("toy", x[:-50], x[-50:], x[-50:])

DATA = toy()

def trainer(seed, methods=(), data=DATA, **recipe):
    torch.manual_seed(seed)
    return Trainer(build_model("mlp", x_dim=6, latent_dim=3, hidden=(8, 8)), methods, data,
                   Recipe(**{"epochs": 2, "batch": 40, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.01} | recipe), seed)

def both(make, n=3): return [[make(k) for k in range(n)] for _ in range(2)]

def gap(alone, together) -> float:
    "Largest difference of a tensor."
    return max(float((a - b).abs().max()) for s, t in zip(alone, together) for a, b in zip(Net(s).state_dict().values(), Net(t).state_dict().values()))

def same_histories(alone, together, tolerance=1e-5):
    for s, t in zip(alone, together):
        assert len(s.history) == len(t.history)
        for a, b in zip(s.history, t.history): assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx({k: v for k, v in b.items() if k != "seconds"}, rel=tolerance, abs=tolerance)

def same_states(alone, together, tolerance=1e-5):
    "All that is saved, but for times and the note on the stack."
    def compare(a, b, where):
        if isinstance(a, torch.Tensor): assert a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=tolerance, rtol=tolerance), where
        elif isinstance(a, dict):
            assert list(a) == list(b), where
            for k in a:
                if k not in ("seconds", "cpu_seconds", "origin"): compare(a[k], b[k], f"{where}/{k}")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), where
            for i, (u, v) in enumerate(zip(a, b)): compare(u, v, f"{where}/{i}")
        else: assert a == (pytest.approx(b, rel=tolerance, abs=tolerance) if isinstance(a, float) else b), where
    for s, t in zip(alone, together): compare(s, t, "")

@pytest.mark.parametrize("name", LIBRARY)
def test_every_method_stacked_equals_alone(name):
    configs = CONFIGS[name]
    alone, together = both(lambda k: trainer(k, [make_method(name, **configs[k % len(configs)])], dtype="float64"))
    stack = StackedTrainer(together)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # the methods' own remarks
        for t in alone: assert t.fit()
        assert stack.fit() == [True] * 3
    assert bool(stack.reason) == (name in ALONE), stack.reason
    assert gap(alone, together) < 1e-9
    same_histories(alone, together, 1e-8)

def test_in_single_precision():
    methods = lambda k: [make_method("LinearWarmup", epochs=1.), make_method("ScaleUp"), make_method("SelfCritic", weight=[1., 5., 20.][k])]
    alone, together = both(lambda k: trainer(k, methods(k)))
    for t in alone: t.fit()
    assert StackedTrainer(together).fit() == [True] * 3
    assert gap(alone, together) < 1e-5
    same_histories(alone, together)

@pytest.mark.parametrize("recipe", [dict(clip=0.5), dict(clip=1e3), dict(optimizer="sgd", lr=0.01, clip=1.), dict(optimizer="adam", decay=0.5), dict(select="best", watch=3), dict(plateau=1, lr=0.05)],
                         ids=lambda r: ", ".join(f"{k}={v}" for k, v in r.items()))
def test_every_recipe(recipe):
    alone, together = both(lambda k: trainer(k, [make_method("Beta", beta=[0.1, 1., 30.][k])], epochs=3, **recipe))
    for t in alone: t.fit()
    assert StackedTrainer(together).fit() == [True] * 3
    same_states([t.state() for t in alone], [t.state() for t in together])

def test_each_run_is_clipped_by_its_own_norm():
    make = lambda k: trainer(k, [make_method("Beta", beta=[0.1, 1., 1000.][k])], clip=30., optimizer="sgd", lr=1e-4, epochs=1)
    alone, together = both(make)
    free = [make(k) for k in range(3)]
    for t in free: t.recipe = Recipe(**{**vars(t.recipe), "clip": 0.})
    for t in alone + free: t._run_epoch()
    Stack(together).run_epoch()
    assert gap(alone, together) < 1e-6
    assert gap(alone[:1], free[:1]) < 1e-6 < 1e-3 < gap(alone[2:], free[2:])        # the first was never clipped, the last was

def test_binarised_pictures_are_drawn_by_each_run_for_itself():
    digits = load("digits")
    p = digits.train[:150].flatten(1)
    data = Dataset("grey", p, (p[:50] > 0.5).float(), (p[:50] > 0.5).float(), binarise=True)
    def make(k):
        torch.manual_seed(k)
        return Trainer(build_model("mlp", x_dim=p.shape[1], latent_dim=2, hidden=(8,), likelihood="bernoulli"), [], data, Recipe(epochs=2, batch=64), k)
    alone, together = both(make)
    for t in alone: t.fit()
    stack = StackedTrainer(together)
    assert stack.fit() == [True] * 3 and not stack.reason
    assert gap(alone, together) < 1e-5
    for s, t in zip(alone, together): assert torch.equal(s.generator.get_state(), t.generator.get_state())

def test_interrupted_stacks_go_on_stacked_or_alone(tmp_path):
    make = lambda k: trainer(k, [make_method("ScaleUp"), make_method("NeighborEmbedding", loss="lp")], clip=1.)
    whole = [make(k) for k in range(3)]
    for t in whole: t.fit()
    files = [tmp_path / f"{k}.pt" for k in range(3)]
    for _ in range(3):          # one batch at a time: the deadline has passed
        assert StackedTrainer([make(k) for k in range(3)]).fit(files, deadline=time.monotonic() - 1) == [False] * 3
    one = make(0)
    assert not one.fit(files[0], deadline=time.monotonic() - 1) and one.step == 4       # the first goes a batch ahead, alone
    rest = [make(k) for k in range(3)]
    assert StackedTrainer(rest).fit(files) == [True] * 3
    assert gap(whole, rest) < 1e-5
    same_histories(whole, rest)
    assert rest[1].origin == {"stacked": 3} or rest[1].origin == {"stacked": 2}
    again = make(1)
    assert again.fit(files[1]) and gap([rest[1]], [again]) == 0.        # what lies there is an ordinary state, complete

def test_states_on_disk_are_those_of_runs_alone(tmp_path):
    make = lambda k: trainer(k, [make_method("BatchNormMean")], dtype="float64")
    for name, fit in (("alone", lambda ts, fs: [t.fit(f, save_every=0., tag="x") for t, f in zip(ts, fs)]), ("together", lambda ts, fs: StackedTrainer(ts).fit(fs, save_every=0., tags=["x"] * 3))):
        fit([make(k) for k in range(3)], [tmp_path / f"{name}{k}.pt" for k in range(3)])
    read = lambda name: [torch.load(tmp_path / f"{name}{k}.pt", weights_only=True) for k in range(3)]
    same_states(read("alone"), read("together"), 1e-9)
    assert max((tmp_path / f"together{k}.pt").stat().st_size - (tmp_path / f"alone{k}.pt").stat().st_size for k in range(3)) < 500

def test_a_run_that_diverges_does_not_hurt_others(tmp_path):
    make = lambda k: trainer(k, [make_method("Beta", beta=[1., 1e38, 0.5][k])], optimizer="sgd", lr=1e-3)
    alone, together = both(make)
    said = None
    for k in (0, 2): alone[k].fit()
    with pytest.raises(Diverged) as said: alone[1].fit()
    out = StackedTrainer(together).fit([tmp_path / f"{k}.pt" for k in range(3)])
    assert [out[0], out[2]] == [True, True] and isinstance(out[1], Diverged)
    assert str(out[1]) == str(said.value) and (out[1].epoch, out[1].batch) == (said.value.epoch, said.value.batch)
    assert gap(alone[::2], together[::2]) < 1e-5 and together[1].step == alone[1].step
    assert not (tmp_path / "1.pt").exists()

def test_a_divergence_at_the_end_of_an_epoch():
    class Refuses(Method):
        def __init__(self, at: float = 1.):
            super().__init__()
            self.scalar("at", at)
        def on_epoch_end(self, trainer):
            if trainer.epoch == int(self.at): raise Diverged("no more", trainer.epoch + 1)
    try:
        ts = [trainer(k, [Refuses([0., 9., 9.][k])]) for k in range(3)]
        out = StackedTrainer(ts).fit()
    finally: del Method.registry["Refuses"]
    assert isinstance(out[0], Diverged) and out[1:] == [True, True] and len(ts[1].history) == 2

def test_a_state_of_another_run_is_that_runs_error_alone(tmp_path):
    trainer(7).fit(tmp_path / "0.pt", tag="other")
    out = StackedTrainer([trainer(0), trainer(1)]).fit([tmp_path / "0.pt", tmp_path / "1.pt"], tags=["a", "b"])
    assert isinstance(out[0], ValueError) and "belongs to another run" in str(out[0]) and out[1] is True

def test_trying_leaves_no_trace():
    ts = [trainer(k, [make_method("ScaleUp")]) for k in range(2)]
    before = copy.deepcopy([t.state() for t in ts])
    assert why_not(ts) == ""
    same_states(before, [t.state() for t in ts], 0.)

def test_dropout_trains_alone():
    def make(k):
        t = trainer(k)
        t.model.encoder.trunk.append(torch.nn.Dropout(0.5))
        return t
    assert "randomness" in why_not([make(k) for k in range(2)])

def test_cpu_seconds_are_shares():
    ts = [trainer(k) for k in range(3)]
    started = time.process_time()
    StackedTrainer(ts).fit()
    assert sum(t.cpu_seconds for t in ts) <= time.process_time() - started and len({t.cpu_seconds for t in ts}) == 1

def test_groups_of_a_study():
    run = lambda seed, *methods, **model: Run("gmm", dict(name="mlp", x_dim=16, latent_dim=4) | model, methods, Recipe(epochs=1, batch=1024), {}, seed)
    B, S, F = (lambda name, **c: make_method(name, **c)), "SelfCritic", "FreeBits"
    runs = [run(0), run(1), run(0, B(S, weight=1.)), run(1, B(S, weight=5.)), run(0, variance=0.5), run(0, variance=1.), run(0, B(F)), run(0, B(F, per="batch")), run(0, latent_dim=2)]
    assert [len(g) for g in groups(runs)] == [4, 2, 1, 1, 1]
    assert [len(g) for g in groups(runs, workers=2)] == [2, 2, 1, 1, 1, 1, 1]
    assert [r for g in groups(runs + runs[:1]) for r in g].count(runs[0]) == 2 and [len(g) for g in groups([runs[0], runs[0]])] == [1, 1]
    assert [len(g) for g in groups([run(s) for s in range(20)])] == [9, 9, 2]

def test_what_groups_proposes_can_be_prepared_and_stacked():
    runs = [Run({"name": "gmm", "n_per_component": 40}, dict(name="mlp", x_dim=16, latent_dim=2, variance=v), [make_method("SelfCritic", weight=w)], Recipe(epochs=1, batch=64), {}, s)
            for s, (w, v) in enumerate([(1., 0.5), (5., 0.5), (5., 1.)])]
    assert len(groups(runs)[0]) == 2 or len(groups(runs)[0]) == 3
    assert why_not([prepare(r) for r in groups(runs)[0]]) == ""

def test_not_finite_is_found_at_once():
    ts = [trainer(k, [make_method("Beta", beta=[1., math.inf][k])]) for k in range(2)]
    out = StackedTrainer(ts).fit()
    assert out[0] is True and isinstance(out[1], Diverged) and ts[1].step == 2      # the parts of the loss are summed without their weights, so the first batch looks sound, alone as well
