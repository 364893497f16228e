"Walks and searches in the latent space against closed forms, and the explorer without a browser."
import json
import sys
from types import SimpleNamespace

import IPython
import pytest
import torch
from matplotlib.figure import Figure

from pcvae.explore import Explorer, explore, explore_static, has_kernel
from pcvae.method import Trained
from pcvae.metrics.latent import adam_step, decode_walk, frozen, latent_search, picture_sheet, starting_codes, traverse, walk
from pcvae.metrics.likelihood import LinearGaussian
from pcvae.models import build_model

PIXELCNN = dict(latent_dim=3, image_size=8, kind="plain", channels=6, kernels=(5, 3), maps=2, z_kernel=3, encoder_channels=(4, 4), encoder_width=8)


def gen(seed=0): return torch.Generator().manual_seed(seed)


def linear(lengths=(2., 1., 0.), features=6):
    W = torch.linalg.qr(torch.randn(features, len(lengths), generator=gen(1), dtype=torch.double))[0] * torch.tensor(lengths, dtype=torch.double)
    return LinearGaussian(W, torch.ones(features, dtype=torch.double), 0.5)


def pixelcnn():
    "A PixelCNN whose norms have seen data, and some pictures."
    torch.manual_seed(0)
    vae, x = build_model("pixelcnn", **PIXELCNN), (torch.rand(16, 1, 8, 8, generator=gen()) < 0.4).float()
    for _ in range(10): vae.decode(vae.encode(x).mean + torch.randn(16, 3), x)
    return Trained(vae), x


# ---- walks

@pytest.mark.parametrize("common", [True, False])
def test_a_traverse_of_a_pixelcnn_is_generate_at_its_codes(common):
    model, _ = pixelcnn()
    z = torch.zeros(7, 3); z[:, 1] = torch.linspace(-4, 4, 7)
    eps = torch.randn((1, 8, 8) if common else (7, 1, 8, 8), generator=gen(3))
    expected = model.generate(z, lambda shape: eps.expand(shape))
    assert torch.equal(traverse(model, 1, -4., 4., 7, gen(3), common), expected)
    assert ((expected == 0) | (expected == 1)).all()


def test_common_noise_leaves_only_the_code_to_make_a_difference():
    model, _ = pixelcnn()
    with torch.no_grad(): model.model.decoder.z_map.weight[:, 2] = 0
    x = traverse(model, 2, n=30, generator=gen(1))
    assert (x == x[:1]).all()
    assert (traverse(model, 2, n=30, generator=gen(1), common=False) != x).any()
    assert (traverse(model, 0, n=30, generator=gen(1)) != x).any()


def test_a_walk_has_its_norm_and_loses_what_is_fixed():
    model = linear()
    codes, items = walk(model, 10., 50, gen(2))
    held, _ = walk(model, 10., 50, gen(2), fixed=[1])
    assert items.shape == (50, 6) and codes.shape == (50, 3) and codes.dtype == torch.double
    assert torch.allclose(codes.norm(dim=1), torch.linspace(0, 10, 50).double(), atol=1e-6)
    assert torch.equal(held[:, [0, 2]], codes[:, [0, 2]]) and not held[:, 1].any()
    assert held[-1].norm() < 10


def test_directions_of_walks_are_uniform():
    ends = torch.stack([walk(linear(), 1., 2, gen(s))[0][-1] for s in range(400)])
    assert ends.mean(0).abs().max() < 0.1
    assert torch.allclose((ends ** 2).mean(0), torch.full((3,), 1 / 3, dtype=torch.double), atol=0.05)


@pytest.mark.parametrize("name, params", [("mlp", dict(latent_dim=2, x_dim=5)), ("conv", dict(latent_dim=2, width=2))])
def test_walks_and_searches_of_plain_decoders(name, params):
    torch.manual_seed(0)
    model = Trained(build_model(name, **params))
    x = model.decode(torch.randn(3, 2, generator=gen())).mean.detach()
    assert traverse(model, 0, n=4, generator=gen()).shape == (4, *x.shape[1:])
    found = {c: latent_search(model, x, starts=2, lr=1e-2, max_iterations=100, generator=gen(1), context=c) for c in ("data", "empty")}
    assert torch.equal(found["data"].codes, found["empty"].codes)       # such a decoder does not look at x
    assert (found["data"].losses[:, -1] < found["data"].first).all()


def test_a_sheet_puts_each_picture_in_its_place():
    x = torch.rand(7, 1, 3, 4)
    sheet = picture_sheet(x, columns=3, line=-1.)
    assert sheet.shape == (3 * 4 - 1, 3 * 5 - 1)
    for i in range(7):
        r, c = divmod(i, 3)
        assert torch.equal(sheet[4 * r:4 * r + 3, 5 * c:5 * c + 4], x[i, 0])
    assert (sheet[3] == -1).all() and (sheet[8:, 5:] == -1).all()


# ---- searches

def test_every_start_finds_the_pseudo_inverse_solution():
    torch.manual_seed(0)
    W = torch.randn(8, 3, generator=gen(5), dtype=torch.double)
    W = torch.linalg.qr(W)[0] * torch.tensor([3., 1., 0.5], dtype=torch.double)
    model = LinearGaussian(W, torch.zeros(8, dtype=torch.double), 1.)
    x = torch.randn(5, 8, generator=gen(6), dtype=torch.double)
    found = latent_search(model, x, starts=4, lr=5e-3, generator=gen(7))
    goal = x @ torch.linalg.pinv(W).T
    assert found.reached.all()
    assert torch.allclose(found.codes[:, -1], goal.expand(4, 5, 3), atol=1e-5)
    best = ((x - goal @ W.T) ** 2).sum(1).mean()
    assert torch.allclose(found.losses[:, -1], best.expand(4), atol=1e-8)
    assert found.distance()[-1] < 1e-8 and found.gap()[-1] < 1e-8


def test_a_dead_dimension_keeps_its_start_and_two_of_distance():
    model = linear((2., 1., 0., 0.), 6)
    x = model.sample(500, gen(1))
    found = latent_search(model, x, starts=6, lr=2e-2, thresholds=(1e-3, 0.), generator=gen(2))
    start = starting_codes(model, x, starts=6, generator=gen(2))
    assert torch.equal(found.codes[:, -1, :, 2:], start[..., 2:])
    assert float(found.distance()[-1]) == pytest.approx(2 * 2., abs=0.32)      # four standard errors
    assert found.gap()[-1] < 1e-6


def test_thresholds_are_crossed_in_order_and_as_defined():
    model = linear((2., 1., 0.3))
    found = latent_search(model, model.sample(20, gen(1)), starts=3, lr=1e-2, generator=gen(2))
    assert (found.iterations.diff() >= 0).all() and (found.iterations % 100 == 0).all() and (found.iterations >= 100).all()
    for s, curve in enumerate(found.curve):
        assert len(curve) == found.iterations[s, -1] // 100 + 1
        for k, tau in enumerate(found.thresholds):
            at = int(found.iterations[s, k]) // 100
            fell = [a - b for a, b in zip(curve, curve[1:])]
            crossed = [f < tau or f <= 0 for f in fell]
            assert crossed.index(True) + 1 == at
            assert float(found.losses[s, k]) == pytest.approx(curve[at])


def test_one_run_gives_what_a_run_for_each_threshold_gives():
    model = linear((2., 1., 0.3))
    x = model.sample(10, gen(1))
    found = latent_search(model, x, starts=2, lr=1e-2, generator=gen(2))
    for k, tau in list(enumerate(found.thresholds))[::2]:
        one = latent_search(model, x, starts=2, lr=1e-2, thresholds=(tau,), generator=gen(2))
        assert torch.equal(one.iterations[:, 0], found.iterations[:, k])
        assert torch.allclose(one.codes[:, 0], found.codes[:, k], atol=1e-12)


@pytest.mark.parametrize("context", ["data", "empty"])
def test_a_start_alone_ends_where_it_ends_in_a_batch(context):
    model, x = pixelcnn()
    model.model.double()
    x = x[:4].double()
    start = starting_codes(model, x, starts=3, generator=gen(1))
    kw = dict(lr=2e-2, every=10, thresholds=(0.05, 0.01), max_iterations=200, context=context)
    together, small = latent_search(model, x, start, **kw), latent_search(model, x, start, batch=5, **kw)
    for s in range(3):
        alone = latent_search(model, x, start[s:s + 1], **kw)
        for other in (together, small):
            assert torch.equal(alone.iterations[0], other.iterations[s]) and torch.equal(alone.reached[0], other.reached[s])
            assert torch.allclose(alone.codes[0], other.codes[s], atol=1e-8)
    assert len({int(i) for i in together.iterations[:, -1]}) > 1        # a start has left the batch before the others


def test_the_search_is_adam_of_pytorch_on_the_mean_squared_error():
    model, x = pixelcnn()
    x, start = x[:4], torch.randn(1, 4, 3, generator=gen(1))
    z = start[0].clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=1e-2)
    for _ in range(50):
        adam.zero_grad()
        ((model.decode(z, x).mean - x) ** 2).flatten(1).sum(1).mean().backward()
        adam.step()
    found = latent_search(model, x, start, lr=1e-2, every=50, max_iterations=50, thresholds=(0.,))
    assert torch.allclose(found.codes[0, 0], z, atol=1e-4)
    assert found.iterations.tolist() == [[50]] and not found.reached.any()


def test_an_empty_context_is_a_picture_without_ink():
    model, x = pixelcnn()
    start = torch.randn(1, 16, 3, generator=gen(1))
    first = latent_search(model, x, start, max_iterations=100, context="empty").first
    mean = model.decode(start[0], torch.zeros_like(x)).mean
    assert float(first[0]) == pytest.approx(float(((mean - x) ** 2).flatten(1).sum(1).mean().detach()), rel=1e-5)


def test_the_model_is_left_as_it_was():
    model, x = pixelcnn()
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    model.model.decoder.train()
    latent_search(model, x[:2], starts=2, max_iterations=100, generator=gen())
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())      # running statistics too
    assert all(p.requires_grad and p.grad is None for p in model.model.parameters())
    assert model.model.decoder.training
    with pytest.raises(KeyError), frozen(model): raise KeyError
    assert all(p.requires_grad for p in model.model.parameters())


def test_a_search_as_json():
    model = linear()
    x = model.sample(4, gen(1))
    row = json.loads(json.dumps(latent_search(model, x, starts=2, max_iterations=300, generator=gen()).to_dict(), allow_nan=False))
    assert row["iterations"] == [[300] * 6] * 2 and not any(map(any, row["reached"])) and "codes" not in row
    assert all(len(c) == 4 for c in row["curve"]) and len(row["distance"]) == 6
    assert latent_search(model, x, "encoder", max_iterations=100).to_dict()["distance"] is None


def test_steps_of_adam_do_not_depend_on_the_size_of_the_slope():
    for size in (1e-4, 1., 1e4):
        z, slope = torch.zeros(2, dtype=torch.double), torch.tensor([size, 0.], dtype=torch.double)
        adam_step(z, slope, torch.zeros_like(z), torch.zeros_like(z), 1, 1e-3)
        assert z.tolist() == pytest.approx([-1e-3, 0.], rel=1e-3)


# ---- the explorer, without a browser

def test_sliders_show_what_generate_says():
    model, x = pixelcnn()
    e = Explorer(model, [2, 0], x)
    assert [s.description for s in e.sliders] == ["z2", "z0"]
    for value, slider in ((2.5, 0), (-1., 1)):
        e.sliders[slider].value = value
        eps = torch.randn(1, 8, 8, generator=gen(e.seed))
        assert torch.equal(e.shown, model.generate(e.z[None], lambda shape: eps.expand(shape))[0])
    assert e.z.tolist() == [-1., 0., 2.5]
    e.again.click()
    assert torch.equal(e.shown, decode_walk(model, e.z[None], gen(1))[0])
    e.noisy.value = False
    assert torch.equal(e.shown, model.generate(e.z[None])[0])


def test_the_picture_follows_the_code():
    model = linear()
    e = Explorer(model, [0, 2])
    before, shown = bytes(e.picture.value), e.shown
    assert before.startswith(b"\x89PNG")
    e.sliders[1].value = 2.             # a dead dimension
    assert torch.equal(e.shown, shown) and bytes(e.picture.value) == before
    e.sliders[0].value = 2.             # a live one, same noise
    assert torch.allclose(e.shown - shown, 2 * model.W[:, 0]) and bytes(e.picture.value) != before
    e.noisy.value = False
    assert torch.allclose(e.shown, model.c + 2 * model.W[:, 0])


def test_an_item_sets_the_sliders_even_beyond_their_range():
    model = linear((2., 1., 0.3))
    x = 20 * torch.randn(5, 6, generator=gen(3), dtype=torch.double)
    e, drawn = Explorer(model, [0], x, -1., 1.), []
    redraw = e.redraw
    e.redraw = lambda: (drawn.append(1), redraw())
    e.item.value = 3
    mean = model.encode(x[3:4]).mean[0]
    assert abs(mean[0]) > 1 and torch.allclose(e.z, mean) and len(drawn) == 1
    e.item.value = -1
    assert not e.z.any() and (e.sliders[0].min, e.sliders[0].max) == (-1., 1.)


def test_without_a_kernel_or_without_ipywidgets_it_is_a_figure(monkeypatch):
    model, x = pixelcnn()
    assert not has_kernel() and isinstance(explore(model, x=x), Figure)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=None))
    assert not has_kernel()
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    assert has_kernel() and isinstance(explore(model, x=x, n_dims=2), Explorer)
    assert isinstance(explore(model, x=x, n_dims=2, static=True), Figure)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert not has_kernel() and isinstance(explore(model, x=x), Figure)


def test_the_figure_shows_the_walks():
    model, _ = pixelcnn()
    base = torch.tensor([0.5, -0.5, 1.])
    fig = explore_static(model, [1, 2], low=-2., high=2., columns=5, base=base, seed=4)
    assert [ax.get_title() for ax in fig.axes] == ["-2", "-1", "0", "1", "2"] + 5 * [""]
    z = base.repeat(5, 1); z[:, 2] = torch.linspace(-2, 2, 5)
    expected = decode_walk(model, z, gen(4))
    for ax, item in zip(fig.axes[5:], expected): assert torch.equal(torch.as_tensor(ax.images[0].get_array()), item[0])


@pytest.mark.parametrize("kw, message", [
    (dict(), "give x"), (dict(dims=[3]), "numbered 0 to 2"), (dict(dims=[0.5]), "does not exist"), (dict(dims=[]), "dims is empty"),
    (dict(dims=[0], low=1., high=1.), "low must lie below high"), (dict(dims=[0], x=torch.zeros(4, 2)), "decodes to"), (dict(x=torch.zeros(4, 6).double(), n_dims=0), "n_dims")])
@pytest.mark.parametrize("static", [True, False])
def test_bad_input_to_the_explorer(kw, message, static):
    with pytest.raises(ValueError, match=message): explore(linear(), static=static, **kw)


def test_an_item_that_is_no_picture_and_no_vector():
    class Matrix(LinearGaussian):
        def decode(self, z, x=None):
            px = super().decode(z, x); px.mean = px.mean.unflatten(-1, (3, 2))
            return px
    with pytest.raises(ValueError, match="only one-channel pictures"): explore(Matrix(linear().W, torch.ones(6).double()), [0])
