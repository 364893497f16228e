"Probes against closed forms and plain PyTorch, the schedule of the published one, and bad input."
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from pcvae.data.core import Dataset
from pcvae.data.text import text_data
from pcvae.method import Trained
from pcvae.metrics import probes
from pcvae.metrics.likelihood import LinearGaussian
from pcvae.metrics.probes import as_published_probe, few_label_accuracy, label_draws, linear_probe, probe_features, sgd_epoch
from pcvae.models import build_model
from pcvae.models.lstm import lstm
from pcvae.scaling import BatchNormMean, ScaleUp


def gaussians(n, seed, d=2., dims=6, classes=2):
    "Unit Gaussians; with two classes their means are d apart, with more they stand on the axes."
    r = np.random.RandomState(seed)
    y, x = r.randint(classes, size=n), r.randn(n, dims)
    x[np.arange(n), y] += d / math.sqrt(2)
    return torch.tensor(x), torch.tensor(y)


def three(n=200, d=2., classes=2): return [v for i, m in enumerate((n, 800, 4000)) for v in gaussians(m, i, d, classes=classes)]


# ---- draws
def test_draws_are_without_replacement_nested_and_even():
    y = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    for even in (False, True):
        draws = [label_draws(y, n, 5, even) for n in (3, 9, 30)]
        assert all(len(i.unique()) == n for i, n in zip(draws, (3, 9, 30)))
        assert set(draws[0].tolist()) < set(draws[1].tolist()) < set(draws[2].tolist())
    assert y[draws[2]].bincount().tolist() == [10, 10, 10]
    assert len(label_draws(y, 100, 0)) == 100


def test_every_item_is_drawn_equally_often():
    counts = torch.zeros(20)
    for seed in range(2000): counts[label_draws(torch.zeros(20, dtype=torch.long), 5, seed)] += 1
    assert (counts - 500).abs().max() < 5 * math.sqrt(500 * 0.75)


@pytest.mark.parametrize("n, even, text", [(101, False, "101 labels asked for, but only 100"), (0, False, "whole number"), (2.5, False, "whole number"),
                                           (33, True, "class 2 has 10"), (10, True, "multiple of the 3 classes")])
def test_bad_draws(n, even, text):
    with pytest.raises(ValueError, match=text): label_draws(torch.tensor([0] * 70 + [1] * 20 + [2] * 10), n, 0, even)


# ---- the strict probe
@pytest.mark.parametrize("d", [0., 1., 3.])
def test_strict_probe_reaches_the_best_accuracy(d):
    parts = [v for s, n in enumerate((6000, 1000, 20000)) for v in gaussians(n, s, d)]
    assert linear_probe(*parts) == pytest.approx(norm.cdf(d / 2), abs=0.012)


def test_strict_probe_of_three_classes_matches_the_nearest_mean():
    parts = [v for s, n in enumerate((6000, 1000, 20000)) for v in gaussians(n, s, 3., classes=3)]
    best = (parts[4][:, :3].argmax(1) == parts[5]).double().mean()
    assert linear_probe(*parts) == pytest.approx(float(best), abs=0.008)


@pytest.mark.parametrize("scale, shift", [(1000., 0.), (1e-6, 0.), (torch.logspace(-4, 4, 6, dtype=torch.double), 0.), (1., 50.)])
def test_strict_probe_does_not_see_units(scale, shift):
    parts = three()
    other = [v * scale + shift if i % 2 == 0 else v for i, v in enumerate(parts)]
    assert linear_probe(*other) == pytest.approx(linear_probe(*parts), abs=1e-3)


def test_published_probe_does():
    parts = three(64)
    acc = [as_published_probe(*[v * s if i % 2 == 0 else v for i, v in enumerate(parts)]) for s in (1e-3, 1., 1000.)]
    assert acc[1] > acc[0] + 0.05 and len(set(acc)) == 3


@pytest.mark.parametrize("seed", range(4))
def test_penalty_is_chosen_on_validation_and_the_smaller_at_a_tie(seed):
    parts = [v for s, n in ((seed, 30), (seed + 50, 40), (seed + 90, 4000)) for v in gaussians(n, s, dims=20)]
    each = {c: (linear_probe(*parts[:4], *parts[2:4], penalties=(c,)), linear_probe(*parts, penalties=(c,))) for c in probes.PENALTIES}
    top = max(v for v, _ in each.values())
    assert linear_probe(*parts) == each[min(c for c, (v, _) in each.items() if v == top)][1]


@pytest.mark.parametrize("probe", [linear_probe, as_published_probe])
def test_features_that_do_not_vary_leave_the_largest_class(probe):
    parts = three(101)
    constant = [torch.full_like(v, 0.7) if i % 2 == 0 else v for i, v in enumerate(parts)]
    assert probe(*constant) == pytest.approx(float((parts[5] == parts[1].bincount().argmax()).double().mean()), abs=1e-9) or probe is as_published_probe
    assert 0.45 < probe(*constant) < 0.55


@pytest.mark.parametrize("probe", [linear_probe, as_published_probe])
def test_classes_that_had_no_label_count_as_errors(probe):
    parts = three(classes=3)
    seen = parts[1] < 2
    acc = probe(parts[0][seen], parts[1][seen], *parts[2:])
    assert acc <= float((parts[5] < 2).double().mean())


@pytest.mark.parametrize("probe", [linear_probe, as_published_probe])
@pytest.mark.parametrize("change, error, text", [
    ({1: lambda v: v * 0}, ValueError, "all 200 labelled items have class 0"), ({1: lambda v: v[:7]}, ValueError, r"training part: features \(200, 6\) and labels \(7,\)"),
    ({3: lambda v: v[:7]}, ValueError, "validation part"), ({5: lambda v: v[:7]}, ValueError, "test part"),
    ({1: lambda v: v.float()}, TypeError, "labels must be int64"), ({1: lambda v: v.tolist()}, TypeError, "got list"),
    ({1: lambda v: v - 1}, ValueError, "from 0, got -1"), ({0: lambda v: v[:, :2]}, ValueError, r"\[2, 6\] features"),
    ({4: lambda v: v / 0}, ValueError, "4000 items have features that are not finite"),
    ({0: lambda v: v[:0], 1: lambda v: v[:0]}, ValueError, "training part: no items")])
def test_bad_parts(probe, change, error, text):
    parts = three()
    for i, f in change.items(): parts[i] = f(parts[i])
    with pytest.raises(error, match=text): probe(*parts)


# ---- the published probe
@pytest.mark.parametrize("scale", [1., 100.])          # at 100 the clip acts
def test_an_epoch_is_that_of_pytorch(scale):
    x, y = gaussians(83, 0, classes=3)
    x, order, layer = (x * scale).float(), np.random.RandomState(1).permutation(83), torch.nn.Linear(6, 3)
    w = torch.cat([layer.weight.T, layer.bias[None]]).detach().numpy()
    opt = torch.optim.SGD(layer.parameters(), lr=0.5)
    for i in torch.from_numpy(order).split(16):
        opt.zero_grad(); cross_entropy(layer(x[i]), y[i]).backward(); clip_grad_norm_(layer.parameters(), 5.); opt.step()
    found = sgd_epoch(w, np.concatenate([x.numpy(), np.ones((83, 1), np.float32)], 1), y.numpy(), order, 0.5, 16, 5.)
    assert np.allclose(found, torch.cat([layer.weight.T, layer.bias[None]]).detach().numpy(), rtol=1e-3, atol=1e-4) and found.dtype == np.float32


def test_a_batch_of_one_is_left_out():
    x, y, w = np.ones((17, 2), np.float32), np.arange(17) % 2, np.zeros((2, 2), np.float32)
    order = np.arange(17)
    assert np.array_equal(sgd_epoch(w, x, y, order, 1., 16, 5.), sgd_epoch(w, x, y, order[:16], 1., 16, 5.))


def follow(monkeypatch, losses, **options):
    "Learning rates of the epochs and what each began from, where epoch i ends with weights of validation loss `losses[i]`."
    rates, began, left = [], [], iter(losses)
    def epoch(w, x, y, order, lr, batch, clip):
        rates.append(lr); began.append(float(w[-1, 0]))
        b = math.log(math.expm1(next(left)))            # bias for which the loss of class 1 is that: softplus(b)
        return np.array([[0., 0.]] * 6 + [[b, 0.]], np.float32)
    monkeypatch.setattr(probes, "sgd_epoch", epoch)
    parts = three(20)
    parts[3] = torch.ones_like(parts[3])
    as_published_probe(*parts, **options)
    return rates, [math.log1p(math.exp(b)) for b in began]


def test_rate_is_halved_after_two_bad_epochs_and_training_ends_at_the_fifth(monkeypatch):
    rates, _ = follow(monkeypatch, [1 + i for i in range(100)])
    assert rates == [1.] * 3 + [0.5] * 2 + [0.25] * 2 + [0.125] * 2 + [0.0625] * 2


def test_after_a_halving_the_best_weights_are_taken_up_and_the_last_loss_is_the_reference(monkeypatch):
    #                                good good bad bad -> halved; 2.5 < 3: good; bad; good (the reference is 2.5); bad bad -> halved
    rates, began = follow(monkeypatch, [2., 1., 2., 3., 2.5, 2.6, 2.4, 2.5, 2.6, 9.], epochs=10)
    assert rates == [1.] * 4 + [0.5] * 5 + [0.25]
    assert began[4] == pytest.approx(1., rel=1e-4) and began[9] == pytest.approx(1., rel=1e-4) and began[5] == pytest.approx(2.5, rel=1e-4)


def test_no_more_epochs_than_asked_for(monkeypatch):
    rates, _ = follow(monkeypatch, [1 / (1 + i) for i in range(100)])
    assert rates == [1.] * 100


def test_the_best_weights_are_tested_not_the_last(monkeypatch):
    left = iter([np.array([[0, 0]] * 6 + [[0, 5.]]), np.array([[0, 0]] * 6 + [[5., 0]])])
    monkeypatch.setattr(probes, "sgd_epoch", lambda *_: next(left).astype(np.float32))
    parts = three(20)
    parts[3] = torch.ones_like(parts[3])
    assert as_published_probe(*parts, epochs=2) == pytest.approx(float((parts[5] == 1).double().mean()))


# ---- a model
def dataset(n=600, dims=6, shift=0):
    parts = [gaussians(m, s + shift, dims=dims) for s, m in enumerate((n, 300, 2000))]
    return Dataset("two", *(x for x, _ in parts), labels={k: y for k, (_, y) in zip(("train", "valid", "test"), parts)})


def oracle(*columns): return LinearGaussian(torch.eye(6, dtype=torch.double)[:, columns], torch.zeros(6, dtype=torch.double))


def test_what_the_encoder_keeps_is_what_the_probe_finds():
    data, sizes = dataset(3000), (30, 300)
    both, one, none = (few_label_accuracy(oracle(*c), data, sizes) for c in ((0, 1), (0, 4), (4, 5)))
    assert both["acc_all"] == pytest.approx(norm.cdf(1), abs=0.02)                  # both class means in view: d = 2
    assert one["acc_all"] == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.02)    # one of them: d = sqrt 2
    assert none["acc_all"] == pytest.approx(0.5, abs=0.03) and none["chance"] == pytest.approx(0.5, abs=0.03)
    assert both["acc_30_std"] > both["acc_300_std"] and all(type(v) is float for v in both.values())


def test_averages_are_over_the_draws_that_they_say():
    data, view = dataset(), oracle(0, 1)
    x, y, *rest = probe_features(view, data)
    each = [linear_probe(x[i], y[i], *rest) for i in (label_draws(y, 40, 7 + s) for s in range(4))]
    row = few_label_accuracy(view, data, (40,), draws=4, seed=7)
    assert row["acc_40"] == pytest.approx(np.mean(each)) and row["acc_40_std"] == pytest.approx(np.std(each, ddof=1))
    assert "acc_40_std" not in few_label_accuracy(view, data, (40,), draws=1)
    even = few_label_accuracy(view, data, (40,), draws=2, even=True)
    assert even["acc_40"] == pytest.approx(np.mean([linear_probe(x[i], y[i], *rest) for i in (label_draws(y, 40, s, True) for s in range(2))]))


def test_published_subsets_are_the_first_items_of_the_labelled_part():
    data, view, (x, y) = dataset(), oracle(0, 1), gaussians(90, 50)
    row = few_label_accuracy(view, data, (30, 90), draws=None, labelled=(x, y), probe=as_published_probe)
    f, _, *rest = probe_features(view, data, labelled=(x, y))
    assert row["acc_30"] == as_published_probe(f[:30], y[:30], *rest) and row["acc_90"] == row["acc_all"]


def test_labels_of_the_training_split_are_not_needed_where_others_are_given():
    data = dataset()
    del data.labels["train"]
    few_label_accuracy(oracle(0), data, (50,), draws=None, labelled=gaussians(50, 3))
    with pytest.raises(ValueError, match="no labels for train;"): few_label_accuracy(oracle(0), data, (50,))


def small_vae(*methods):
    torch.manual_seed(0)
    vae, data = build_model("mlp", x_dim=6, latent_dim=3), dataset().to("cpu", torch.float32)
    for m in methods: m.setup(vae, data.train[:32])
    return Trained(vae, methods), data


def test_both_features_of_scale_vae():
    scale = ScaleUp(1.1)
    view, data = small_vae(scale)
    scale.f.copy_(torch.tensor([20., 5., 100.]))
    fed, charged = (probe_features(view, data, f) for f in ("mean", "charged_mean"))
    assert torch.allclose(fed[0], charged[0] * scale.f) and torch.equal(fed[3], charged[3])
    strict = [few_label_accuracy(view, data, (60,), feature=f)["acc_60"] for f in ("mean", "charged_mean")]
    sgd = [few_label_accuracy(view, data, (60,), feature=f, probe=as_published_probe)["acc_60"] for f in ("mean", "charged_mean")]
    assert strict[0] == pytest.approx(strict[1], abs=1e-3) and abs(sgd[0] - sgd[1]) > 1e-3


def test_probing_moves_nothing_in_the_encoder():
    bn = BatchNormMean(0.6)
    view, data = small_vae(bn)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (view.model, bn)]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    few_label_accuracy(view, data, (60,), draws=2, probe=as_published_probe)
    assert all(torch.equal(v, b[k]) for m, b in zip((view.model, bn), before) for k, v in m.state_dict().items())
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    assert not probe_features(view, data)[0].requires_grad


def test_sentences():
    r = np.random.RandomState(0)
    def lines(n):
        y = r.randint(2, size=n)
        return [" ".join(["good" if c else "bad", *r.choice(["a", "b", "c"], r.randint(1, 5))]) for c in y], y.tolist()
    parts = {k: lines(n) for k, n in (("train", 120), ("valid", 50), ("test", 200))}
    data = text_data("small", {k: v[0] for k, v in parts.items()}, {k: v[1] for k, v in parts.items()})
    torch.manual_seed(0)
    view = Trained(lstm(vocab_size=len(data.vocab), latent_dim=8, embedding=8, hidden=16, init="default"))
    row = few_label_accuracy(view, data, (40,), draws=2)
    assert row["acc_all"] > 0.9 and row["chance"] < 0.65           # a random LSTM still tells the first word


@pytest.mark.parametrize("options, text", [
    (dict(sizes=(601,)), "601 labels asked for, but only 600"), (dict(sizes=(601,), draws=None), "from 1 to 600, got 601"), (dict(sizes=(0,), draws=None), "whole number"), (dict(draws=0), "draws must be"),
    (dict(feature="means"), "Did you mean 'mean'"), (dict(sizes=(21,), even=True), "multiple of the 2 classes"), (dict(sizes=(0,)), "whole number"),
    (dict(sizes=(20,), labelled=(dataset().train, dataset().labels["test"])), r"training part: features \(600, 1\) and labels \(2000,\)")])
def test_bad_requests(options, text):
    with pytest.raises(ValueError, match=text): few_label_accuracy(oracle(0), dataset(), **options)


def test_models_without_a_charged_posterior_and_data_without_labels():
    with pytest.raises(ValueError, match="no charged posterior"): few_label_accuracy(oracle(0), dataset(), (20,), feature="charged_mean")
    data = dataset()
    data.labels.clear()
    with pytest.raises(ValueError, match="no labels for train, valid, test"): few_label_accuracy(oracle(0), data, (20,))


# ---- the published probe as a whole
def plain_published(x, y, xv, yv, xt, yt, lr=1., batch=16, clip=5., patience=2, max_decays=5, epochs=100, seed=0):
    "The same in PyTorch, in float64: a linear layer, its loss, SGD; order and first weights from the same random numbers."
    r, n = np.random.RandomState(seed), x.shape[1]
    first = r.uniform(-1 / math.sqrt(n), 1 / math.sqrt(n), (n + 1, int(max(y.max(), yv.max(), yt.max())) + 1)).astype(np.float32)
    layer = torch.nn.Linear(n, first.shape[1]).double()
    layer.weight.data, layer.bias.data = torch.from_numpy(first[:-1].T.copy()).double(), torch.from_numpy(first[-1].copy()).double()
    best, least, reference, bad, decays = {k: v.clone() for k, v in layer.state_dict().items()}, math.inf, 1e4, 0, 0
    for _ in range(epochs):
        order = torch.from_numpy(r.permutation(len(y)))
        for i in order.split(batch):
            if len(i) == 1: continue
            layer.zero_grad()
            cross_entropy(layer(x[i].double()), y[i]).backward()
            clip_grad_norm_(layer.parameters(), clip)
            for p in layer.parameters(): p.data -= lr * p.grad
        loss = float(cross_entropy(layer(xv.double()), yv).detach())
        if loss < least: best, least = {k: v.clone() for k, v in layer.state_dict().items()}, loss
        if loss > reference: bad += 1
        else: bad, reference = 0, loss
        if bad == patience:
            layer.load_state_dict(best)
            lr, reference, bad, decays = lr / 2, loss, 0, decays + 1
            if decays == max_decays: break
    layer.load_state_dict(best)
    return float((layer(xt.double()).argmax(1) == yt).double().mean())


@pytest.mark.parametrize("n, scale, seed, options", [
    (2, 1., 0, dict(epochs=1)), (18, 1., 1, dict(epochs=1)), (35, 0.3, 2, dict(epochs=2, lr=0.05)), (60, 1., 3, dict(epochs=6)), (60, 3., 4, dict(patience=1, max_decays=2)), (90, 0.1, 5, dict(epochs=4, lr=0.3)),
    (40, 1., 6, dict(lr=1e-9, epochs=1)), (40, 1e6, 7, dict(lr=1e-3, patience=1, max_decays=1, epochs=3))])
def test_the_published_probe_is_that_of_pytorch(n, scale, seed, options):
    parts = [v for i, m in enumerate((n, 200, 5000)) for v in gaussians(m, seed + 10 * i, dims=5, classes=3)]
    if n == 2: parts[1] = torch.tensor([0, 1])
    parts = [v * scale if i % 2 == 0 else v for i, v in enumerate(parts)]
    assert as_published_probe(*parts, seed=seed, **options) == pytest.approx(plain_published(*parts, seed=seed, **options), abs=2.5e-4)      # one sentence in 5,000


def test_clipping_has_the_small_number_of_pytorch():
    "Where the gradient is as small as the number that keeps the division finite, 1e-6, the step tells whether it is there."
    x, y = gaussians(16, 0, classes=2)
    x, order, layer = (1e-6 * x).float(), np.arange(16), torch.nn.Linear(6, 2, bias=False)
    with torch.no_grad(): layer.weight.zero_()
    cross_entropy(layer(x), y).backward()
    size, before = float(layer.weight.grad.norm()), layer.weight.grad.clone()
    clip = size / 3
    found = sgd_epoch(np.zeros((6, 2), np.float32), x.numpy(), y.numpy(), order, 1., 16, clip)
    assert np.allclose(found, -(clip / (size + 1e-6) * before).numpy().T, rtol=1e-3, atol=0) and size < 3e-6


# ---- constant columns
def test_constant_columns_are_left_out_and_nothing_else():
    parts = three()
    with_one = lambda v: torch.cat([v, v[:, :1] * 0, v[:, :1] * 0 + 7.], 1)
    assert linear_probe(*(with_one(v) if i % 2 == 0 else v for i, v in enumerate(parts))) == linear_probe(*parts)
    y = torch.arange(40) % 2
    hardly = (1 + 3e-6 * y.double())[:, None]                       # std 1.5e-6 of the mean: more than rounding
    assert linear_probe(hardly, y, hardly, y, hardly, y) == 1.
    assert linear_probe(*(1 + 0.5 * (v - 1) for v in (hardly,)), y, hardly, y, hardly, y) == pytest.approx(0.5)        # std 0.75e-6: rounding


def test_one_item_that_is_not_finite_is_enough():
    parts = three()
    parts[0] = parts[0].clone()
    parts[0][3, 1] = math.nan
    with pytest.raises(ValueError, match="1 items have features that are not finite"): linear_probe(*parts)
