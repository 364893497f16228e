"PixelCNN: causality pixel by pixel, the cached sampler against full passes, and every method and the trainer on top of it."
import copy
import functools
from dataclasses import replace

import pytest
import torch

import pcvae.critics, pcvae.inference, pcvae.neighbors, pcvae.scaling, pcvae.schedules  # noqa: F401  registers the methods
from pcvae.data import load
from pcvae.data.core import Dataset
from pcvae.method import Ctx, Trained, make_method, objective, randn_draw
from pcvae.metrics.likelihood import nll_iw_all
from pcvae.models import build_model
from pcvae.models.pixelcnn import SAMPLERS, CausalConv2d, PixelVAE, dense_form, generate_naive
from pcvae.training import Recipe, Trainer

ENCODER = dict(image_size=8, encoder_channels=(4, 4), encoder_width=8)
KINDS = {
    "resid13": dict(kind="resid13", channels=8, kernels=(5, 5, 3, 3, 3), maps=2, z_kernel=3),
    "resid13_bias": dict(kind="resid13", channels=6, kernels=(7, 3, 3), maps=1, z_kernel=1, head_bias=-0.5),
    "plain": dict(kind="plain", channels=6, kernels=(11, 7, 5, 3), maps=3, z_kernel=5, head_bias=-1.),
    "gated12": dict(kind="gated12", channels=6, kernels=(9, 5, 3, 3), maps=2),
}


def gen(seed=0): return torch.Generator().manual_seed(seed)
def noise(seed=0): return randn_draw(gen(seed))


def network(kind, latent_dim=3, **kw):
    "A small network whose norms have seen some data."
    torch.manual_seed(1)
    vae = build_model("pixelcnn", latent_dim=latent_dim, **{**ENCODER, **KINDS[kind], **kw})
    size = vae.decoder.image_size
    for _ in range(15):
        x = (torch.rand(16, 1, size, size) < 0.35).float()
        vae.decode(vae.encode(x).mean + torch.randn(16, latent_dim), x)
    return vae.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_sees_its_own_pixel_or_a_later_one(kind):
    vae = network(kind).double()
    x = (torch.rand(1, 1, 8, 8, generator=gen()) < 0.5).double()
    flipped = x.flatten(1).repeat(64, 1)
    flipped[torch.arange(64), torch.arange(64)] = 1 - flipped[torch.arange(64), torch.arange(64)]
    z = torch.randn(1, 3, generator=gen(), dtype=torch.float64)
    with torch.no_grad():
        base = vae.decode(z, x).logits.flatten(1)
        moved = vae.decode(z.expand(64, 3), flipped.view(64, 1, 8, 8)).logits.flatten(1)
    change = (moved - base).abs()                                   # [s, t]
    assert change.tril().max() < 1e-12                              # t <= s
    after = change.diagonal(1)                                      # t = s + 1, where that is in the same row
    assert (after[torch.arange(63) % 8 != 7] > 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_obey_the_order_and_z_reaches_the_first_pixel_of_all_but_the_gated_net(kind):
    vae = network(kind).double()
    x = (torch.rand(1, 1, 8, 8, generator=gen()) < 0.5).double().requires_grad_()
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    logits = vae.decode(z, x).logits.flatten()
    for t in (0, 9, 35, 63):
        gx, gz = torch.autograd.grad(logits[t], (x, z), retain_graph=True)
        assert (gx.flatten()[t:] == 0).all()
        assert bool((gz != 0).any()) == (t > 0 or kind != "gated12")


@pytest.mark.parametrize("kind", KINDS)
def test_dense_and_cropped_agree_in_value_and_gradient(kind):
    vae = network(kind).train()
    dense = dense_form(vae.decoder).train()
    x, z = (torch.rand(6, 1, 8, 8, generator=gen()) < 0.4).float(), torch.randn(6, 3, generator=gen())
    outs = [net(z, x) for net in (vae.decoder, dense)]
    assert torch.allclose(outs[0].logits, outs[1].logits, atol=1e-5)
    for out in outs: (-out.log_prob(x).mean()).backward()
    for (name, p), (_, q) in zip(vae.decoder.named_parameters(), dense.named_parameters()):
        grad = q.grad[:, :, :p.shape[2]] if p.shape != q.shape else q.grad
        assert torch.allclose(p.grad, grad, atol=1e-4), name
        if p.shape != q.shape: assert (q.grad[:, :, p.shape[2]:] == 0).all()
    assert all(not m.weight.grad[:, :, -1, m.m + m.centre:].any() for m in vae.modules() if isinstance(m, CausalConv2d))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", (True, False))
def test_cached_sampler_gives_the_pixels_of_full_passes(kind, draw):
    vae = network(kind)
    z = 2 * torch.randn(12, 3, generator=gen())
    images = vae.generate(z, noise() if draw else None)
    assert torch.equal(images, generate_naive(vae.decoder, z, noise() if draw else None))
    assert set(images.unique().tolist()) <= {0., 1.}
    assert not draw or 0.05 < images.mean() < 0.95


@pytest.mark.parametrize("kind", ("resid13", "gated12"))
def test_cached_sampler_on_another_side_and_in_double_precision(kind):
    vae = network(kind, image_size=7, encoder_channels=(4,)).double()
    z = torch.randn(4, 3, generator=gen(), dtype=torch.float64)
    draw = lambda: randn_draw(gen(3), z)
    assert torch.equal(vae.generate(z, draw()), generate_naive(vae.decoder, z, draw()))


@pytest.mark.parametrize("kind", ("resid13", "plain", "gated12"))
def test_full_size_dense_cropped_and_step_by_step(kind):
    torch.manual_seed(0)
    decoder = build_model("pixelcnn", kind=kind, latent_dim=4, encoder_channels=(2, 2, 2), encoder_width=4).decoder
    for m in decoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = 1.
    x, z = (torch.rand(2, 1, 28, 28, generator=gen()) < 0.3).float(), torch.randn(2, 4, generator=gen())
    with torch.no_grad():
        decoder(z, x)                                               # statistics of this batch
        logits = decoder.eval()(z, x).logits
        assert logits.std() > 0.01
        if kind != "gated12": assert torch.allclose(logits, dense_form(decoder)(z, x).logits, atol=1e-5)
        state, steps = SAMPLERS[type(decoder.net)](decoder.net, decoder.maps(z)), torch.zeros_like(x)
        for r in range(12):                                         # enough rows to fill and roll every buffer
            state.start_row()
            for c in range(28): steps[:, 0, r, c] = state.logit(); state.put(x[:, 0, r, c])
    assert torch.allclose(steps[:, :, :12], logits[:, :, :12], atol=1e-5)


def test_samples_follow_the_model():
    "Frequencies of the 16 images of 2 x 2 pixels against their probabilities."
    vae = network("plain", image_size=2, encoder_channels=(4,))
    z = torch.randn(1, 3, generator=gen()).expand(20_000, 3)
    counts = (vae.generate(z, noise()).flatten(1) @ torch.tensor([8., 4., 2., 1.])).long().bincount(minlength=16) / 20_000
    grid = torch.cartesian_prod(*[torch.tensor([0., 1.])] * 4).view(16, 1, 2, 2)
    with torch.no_grad(): p = vae.log_prob(grid, z[:16]).exp()
    assert abs(float(p.sum()) - 1) < 1e-5
    assert ((counts - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


def test_interface_of_a_vae():
    vae = network("plain")
    assert isinstance(vae, PixelVAE) and {"encoder", "decoder"} <= dict(vae.named_children()).keys()
    x, z = (torch.rand(5, 1, 8, 8, generator=gen()) < 0.4).float(), torch.randn(2, 5, 3, generator=gen())
    assert vae.log_prob(x, z).shape == (2, 5) and vae.decode(z, x).mean.shape == (2, 5, 1, 8, 8)
    assert vae.generate(z, noise()).shape == (2, 5, 1, 8, 8)
    nll = nll_iw_all(Trained(vae), x, {"standard": vae.prior}, 20, generator=gen())["standard"]
    assert nll.shape == (5,) and torch.isfinite(nll).all()
    for bad, message in ((torch.full((2, 1, 8, 8), 255.), r"x in \[0, 1\]"), (torch.zeros(2, 3, 8, 8), "shape"), (torch.zeros(2, 1, 9, 8), "shape")):
        with pytest.raises(ValueError, match=message): vae.check(bad)


@pytest.mark.parametrize("name, kw", [("pixelcnn", ENCODER), ("pixelcnn", {**ENCODER, **KINDS["gated12"]}), ("mlp", dict(x_dim=16)), ("conv", {})])
@pytest.mark.parametrize("latent_dim", [0, -1])
def test_no_latent_dimension_is_refused(name, kw, latent_dim):
    with pytest.raises(ValueError, match=f"latent_dim must be at least 1, got {latent_dim}"): build_model(name, **kw, latent_dim=latent_dim)


@pytest.mark.parametrize("kw, message", [(dict(image_size=1), "image_size must be at least 2, got 1"), (dict(image_size=4, encoder_channels=(4, 4, 4)), "too small for 3 blocks"),
                                         (dict(channels=0), "channels=0"), (dict(maps=0), "maps=0"), (dict(kernels=(4, 3, 3)), "odd size of 3 or more, got 4")])
def test_sizes_that_no_network_can_have(kw, message):
    with pytest.raises(ValueError, match=message): build_model("pixelcnn", latent_dim=3, **{**ENCODER, **KINDS["plain"], **kw})


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_the_decoder_cannot_take(kind):
    vae, z = network(kind), torch.zeros(2, 3)
    for shape in ((2, 1, 9, 9), (2, 3, 8, 8), (2, 1, 8, 9), (2, 64)):
        x = torch.zeros(shape)
        with pytest.raises(ValueError, match="shape"): vae.check(x)
        with pytest.raises(ValueError, match=r"takes images of shape \(1, 8, 8\)"): vae.decode(z, x)


@pytest.mark.parametrize("name, kw, shape", [("pixelcnn", {**ENCODER, **KINDS["plain"], "latent_dim": 3}, (4, 1, 8, 8)), ("mlp", dict(x_dim=6, latent_dim=2, likelihood="bernoulli"), (4, 6)),
                                             ("conv", dict(width=2, likelihood="bernoulli"), (4, 1, 28, 28))])
def test_pixels_outside_0_and_1_are_refused_before_training(name, kw, shape):
    ok = torch.full(shape, 0.5)
    for bad in (1.01, -0.01, 255., float("nan")):
        x = ok.clone(); x.view(-1)[3] = bad
        model = build_model(name, **kw)
        with pytest.raises(ValueError, match="not finite" if bad != bad else r"x in \[0, 1\]"): model.check(x)
        if bad == bad:
            with pytest.raises(ValueError, match=r"x in \[0, 1\]"): Trainer(model, [], Dataset("d", x, ok, ok), Recipe(epochs=1, batch=2)).fit()
            with pytest.raises(ValueError, match=r"binarise=True needs pixels in \[0, 1\]"): Dataset("d", x, ok.round(), ok.round(), binarise=True)


def test_a_trainer_refuses_images_of_another_size():
    x = torch.zeros(6, 1, 9, 9)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\).*\(1, 9, 9\)"): Trainer(network("plain"), [], Dataset("d", x, x, x), Recipe(epochs=1, batch=3)).fit()


@functools.cache
def digits(n):
    data = load("digits")
    return replace(data, train=data.train[:n], valid=data.valid[:50], labels={})


METHODS = {"FreeBits": {}, "SelfCritic": {}, "NeuralCritic": dict(dim=4, hidden_x=8, hidden_z=8),
           "HybridCritic": dict(shared=2, dim=4, hidden_x=8, hidden_z=8), "NeighborEmbedding": {}, "BatchNormMean": {}, "ScaleUp": {}}


@pytest.mark.parametrize("name", [*METHODS, "straight_through", "lp"])
def test_methods_train_it_unchanged(name):
    config = {"straight_through": dict(reencode="straight_through"), "lp": dict(loss="lp")}.get(name, METHODS.get(name))
    method = make_method(name if name in METHODS else "NeighborEmbedding", **config)
    trainer = Trainer(network("plain").train(), [method], digits(60), Recipe(epochs=2, batch=30, clip=5., lr=3e-3))
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.fit()
    assert all(torch.isfinite(torch.tensor(v)) for row in trainer.history for v in row.values())
    assert any((before[k] != v).any() for k, v in trainer.model.state_dict().items() if k.startswith("decoder.net.blocks"))
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in trainer.model.modules() if isinstance(m, CausalConv2d))


def test_aggressive_training_runs():
    method = make_method("Aggressive", max_inner=4, check_every=2)
    trainer = Trainer(network("plain").train(), [method], digits(60), Recipe(epochs=1, batch=30, clip=5.))
    assert trainer.fit()


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind):
    torch.manual_seed(0)
    vae = build_model("pixelcnn", latent_dim=4, **ENCODER, **KINDS[kind])
    trainer = Trainer(vae, [], digits(120), Recipe(epochs=4, batch=40, lr=1e-2, clip=5.))
    assert trainer.fit() and trainer.history[-1]["train_rec"] < trainer.history[0]["train_rec"] - 1
    view = trainer.view()
    assert view.generate(torch.zeros(3, 4), noise()).shape == (3, 1, 8, 8)


def test_a_run_cut_in_mid_epoch_goes_on_bit_for_bit(tmp_path):
    make = lambda: Trainer(network("resid13").train(), [], digits(60), Recipe(epochs=2, batch=20, clip=5.), seed=3)
    whole, cut, resumed = make(), make(), make()
    whole.fit()
    while not cut.fit(tmp_path / "run.pt", deadline=0.): cut = make()
    resumed.load(tmp_path / "run.pt")
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()): assert torch.equal(a, b)


def test_objective_is_the_bernoulli_elbo():
    vae = network("plain")
    x = (torch.rand(9, 1, 8, 8, generator=gen()) < 0.4).float()
    total, parts = objective(vae, [], x, Ctx(draw=noise()))
    q = vae.encode(x)
    z = q.rsample(noise()(q.shape))
    logits = vae.decode(z, x).logits
    log_px = -torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
    assert torch.allclose(parts["log_px"], log_px, atol=1e-4)
    assert torch.allclose(total, (q.kl(vae.prior).sum(-1) - log_px).mean(), atol=1e-4)
