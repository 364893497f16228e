"The trainer on a PixelCNN: mixed precision, compilation, plans of the data, and batches that no interruption repeats or skips."
import time
from dataclasses import dataclass, replace

import pytest
import torch

from pcvae.data import load
from pcvae.data.core import Dataset
from pcvae.method import Method
from pcvae.models import build_model
from pcvae.neighbors import NeighborEmbedding
from pcvae.schedules import LinearWarmup
from pcvae.metrics.evaluate import evaluate
from pcvae import training
from pcvae.training import Diverged, Recipe, Trainer, compiled, step_flops, throughput

TINY = dict(latent_dim=4, image_size=8, kind="plain", kernels=(5, 3), z_kernel=3, encoder_channels=(8, 8), encoder_width=16, head_bias=-1.)

def pixelcnn(seed=0):
    torch.manual_seed(seed)
    return build_model("pixelcnn", **TINY)

def curve(dtype: str, seed: int = 0) -> torch.Tensor:
    "Looks at the validation ELBO along 200 steps."
    t = Trainer(pixelcnn(seed), [LinearWarmup(2., start=0.1), NeighborEmbedding("se")], load("digits"),
                Recipe(epochs=10, batch=55, lr=3e-3, clip=5., dtype=dtype, watch=20), seed)
    assert t.steps_per_epoch == 20
    t.fit()
    return torch.tensor([w["neg_elbo"] for w in t.watched])

def test_bfloat16_gives_the_same_curve_as_far_as_seeds_do():
    exact, rough, other = curve("float32"), curve("bfloat16"), curve("float32", 1)
    between_seeds = (exact - other).abs()[2:]       # the first look is before any training
    difference = (exact - rough).abs()[2:]
    assert 0 < difference.mean() < between_seeds.mean()
    assert difference.max() < 0.02 * exact[2:].max()

def test_compiled_networks_take_the_same_steps():
    def run(wrap):
        t = Trainer(pixelcnn(), [NeighborEmbedding("se")], load("digits"), Recipe(epochs=1, batch=200, lr=1e-3))
        if wrap:
            with compiled(t.model, backend="aot_eager"): t._run_epoch()
        else: t._run_epoch()
        return t.model.state_dict()
    for (name, a), b in zip(run(False).items(), run(True).values()): assert torch.allclose(a.float(), b.float(), atol=1e-5), name

def test_the_share_of_a_peak_follows_from_operations_and_speed():
    t = Trainer(pixelcnn(), [], load("digits"), Recipe(epochs=1, batch=200))
    assert throughput(t) == {}                          # nothing trained, nothing claimed
    t.step, t.seconds = 50, 2.
    seen = throughput(t, "NVIDIA H200")
    assert seen["steps_per_second"] == 25. and seen["peak_share"] == pytest.approx(25 * step_flops(t) / 67e12)
    assert "peak_share" not in throughput(t, "a card nobody knows")

class Recorder(Method):
    "Keeps the first pixel of every item that a recorded pass sees."
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))
    def penalty(self, b):
        if b.ctx.record: self.seen = torch.cat([self.seen, b.x[:, 0].float()])
        return {}
    def _load_from_state_dict(self, state, prefix, *args):
        self.seen = state[prefix + "seen"].clone()      # its length changes
        super()._load_from_state_dict(state, prefix, *args)

def numbered(n=103) -> Dataset:
    x = torch.stack([torch.arange(n).float(), torch.randn(n)], 1)
    return Dataset("numbered", x, x[:10].clone(), x[:10].clone())

def test_a_run_cut_within_epochs_sees_each_item_once_an_epoch(tmp_path):
    data, recipe = numbered(), Recipe(epochs=3, batch=10, lr=1e-4)
    torch.manual_seed(0)
    model = build_model("mlp", x_dim=2, latent_dim=2, hidden=(8,))
    whole = Trainer(model, [Recorder()], data, recipe); whole.fit()
    cuts = 0
    while True:
        t = Trainer(model, [Recorder()], data, recipe)
        if t.fit(tmp_path/"state.pt", deadline=time.monotonic() - 1): break     # the deadline has passed: one batch at a time
        cuts += 1
    assert cuts >= 30
    seen = t.methods[0].seen
    assert torch.equal(seen, whole.methods[0].seen)
    for epoch in seen.view(3, -1): assert torch.equal(epoch.sort().values, torch.arange(103.))

@dataclass(repr=False)
class Planned(Dataset):
    "Batches of equal sign."
    def plan(self, batch, generator=None, at_least=1):
        parts = [(self.train[:, 1] > 0).nonzero()[:, 0], (self.train[:, 1] <= 0).nonzero()[:, 0]]
        return [p[torch.randperm(len(p), generator=generator)] for p in parts]
    def n_batches(self, batch, at_least=1): return 2

def test_a_plan_of_the_data_is_followed():
    d = numbered()
    t = Trainer(build_model("mlp", x_dim=2, latent_dim=2, hidden=(8,)), [Recorder()], Planned(d.name, d.train, d.valid, d.test), Recipe(epochs=2, batch=10))
    t.fit()
    n = int((d.train[:, 1] > 0).sum())
    seen = t.methods[0].seen.view(2, -1).long()
    for epoch in seen: assert (d.train[epoch[:n], 1] > 0).all() and (d.train[epoch[n:], 1] <= 0).all()
    assert not torch.equal(seen[0], seen[1])

def test_a_checkpoint_of_a_recipe_with_fewer_fields_can_be_read(tmp_path):
    t = Trainer(build_model("mlp", x_dim=2, latent_dim=2, hidden=(8,)), [], numbered(), Recipe(epochs=1, batch=10))
    t.fit(tmp_path/"s.pt")
    state = torch.load(tmp_path/"s.pt", weights_only=True)
    for key in ("watch", "plateau"): del state["recipe"][key]
    for key in ("watched", "lr_scale", "flat", "seconds", "origin"): del state[key]
    torch.save(state, tmp_path/"s.pt")
    again = Trainer(t.model, [], numbered(), Recipe(epochs=1, batch=10))
    again.load(tmp_path/"s.pt")
    assert again.epoch == 1 and again.lr_scale == 1.
    with pytest.raises(ValueError, match="belongs to another run"):
        Trainer(t.model, [], numbered(), replace(t.recipe, watch=3)).load(tmp_path/"s.pt")

def words(n=64):
    "Rows of `<s> w w w </s>` with words of 20."
    w = torch.randint(4, 24, (n, 3))
    return torch.cat([torch.full((n, 1), 1), w, torch.full((n, 1), 2)], 1)

def test_a_text_model_worse_than_guessing_has_diverged():
    torch.manual_seed(0)
    data = Dataset("words", words(), words(16), words(16))
    model = build_model("lstm", vocab_size=24, latent_dim=2, embedding=8, hidden=8, max_len=3)
    assert torch.allclose(model.guess_nll(data.valid), torch.full((16,), 4 * torch.tensor(24.).log()))
    with pytest.raises(Diverged, match=r"more than guessing them uniformly \(12\.7"):
        Trainer(model, [], data, Recipe(epochs=4, batch=8, optimizer="sgd", lr=30., clip=5.)).fit()

def test_a_long_epoch_worse_than_guessing_is_not_run_to_its_end(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(training, "HOPELESS", 3.)
    data = Dataset("words", words(640), words(16), words(16))
    model = build_model("lstm", vocab_size=24, latent_dim=2, embedding=8, hidden=8, max_len=3)
    t = Trainer(model, [], data, Recipe(epochs=4, batch=8, optimizer="sgd", lr=30., clip=5.))
    with pytest.raises(Diverged, match=r"up to batch \d+ of epoch 1 words cost more than guessing.*\d\.\d+ times as much") as e: t.fit()
    assert e.value.epoch == 1 and 3 < e.value.batch < t.steps_per_epoch
    good = Trainer(model, [], data, Recipe(epochs=1, batch=8, optimizer="sgd", lr=0.1))
    assert good.fit() and good.hopeless < 1

@pytest.mark.parametrize("name", ["lstm", "lstm_lm"])
def test_text_models_train_and_are_measured(name):
    torch.manual_seed(0)
    data = Dataset("words", words(), words(16), words(16))
    size = dict(vocab_size=24, embedding=8, hidden=8) | ({"latent_dim": 2, "max_len": 3} if name == "lstm" else {})
    t = Trainer(build_model(name, **size), [], data, Recipe(epochs=2, batch=16, optimizer="sgd", lr=1.))
    assert t.fit()
    row = evaluate(t.view(), data, n_samples=3, n_nll=8, as_published={"batch": 8, "samples": False, "nll": False})
    assert row["neg_elbo"] < 14 and (name == "lstm" or row["kl"] == row["mi"] == row["au"] == 0 and abs(row["nll_whole"] - row["neg_elbo"]) < 1e-4)
