"Text models: known answers word by word, the chunked cross-entropy, generation, and every method and metric on top of them."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pcvae.critics, pcvae.inference, pcvae.scaling, pcvae.schedules  # noqa: F401  registers the methods
from pcvae.data.core import Dataset
from pcvae.method import Ctx, Trained, make_method, objective, randn_draw
from pcvae.metrics.evaluate import evaluate
from pcvae.metrics.likelihood import nll_iw_all
from pcvae.models import lstm as M
from pcvae.models.vae import build_model
from pcvae.training import Recipe, Trainer

KINDS = ("concat", "skip", "critics", "lm")


def gen(seed=0): return torch.Generator().manual_seed(seed)
def noise(seed=0, like=None): return randn_draw(gen(seed), like)


def tokens(n, seed=0, longest=9, shortest=3, vocab=20):
    "n sentences of random lengths, padded."
    g = gen(seed)
    x, n_ids, at = torch.randint(4, vocab, (n, longest), generator=g), torch.randint(shortest, longest + 1, (n, 1), generator=g), torch.arange(longest)
    x[:, 0] = M.BOS
    return x.masked_fill(at == n_ids - 1, M.EOS).masked_fill(at >= n_ids, M.PAD)


def network(kind="concat", dtype=torch.float64, **kw):
    torch.manual_seed(1)
    sizes = dict(vocab_size=20, embedding=5, hidden=7, init="default", dropout=0., max_len=12) | kw
    model = build_model("lstm_lm", **sizes) if kind == "lm" else build_model("lstm", latent_dim=3, kind=kind, **sizes)
    return model.to(dtype)


def codes(model, *shape, seed=0): return torch.randn(*shape, model.latent_dim, generator=gen(seed), dtype=model.prior_mean.dtype)


def plain_log_prob(model, x, z):
    "Equation (1) by LSTM cells, with all logits, one sentence at a time."
    dec = model.decoder
    cell = torch.nn.LSTMCell(dec.lstm.input_size, dec.lstm.hidden_size).to(z.dtype)
    params = {k[:-3]: p for k, p in dec.lstm.named_parameters()}
    out = []
    for s, zi in zip(x, z):
        s = s[s != 0]
        wide = zi[None] @ dec.widen.weight.T if dec.kind == "critics" else zi[None]
        c = torch.zeros(1, dec.lstm.hidden_size, dtype=z.dtype) if model.latent_dim == 0 else wide @ dec.start.weight.T
        h, hs = c.tanh(), []
        for w in s[:-1]:
            h, c = torch.func.functional_call(cell, params, (torch.cat([dec.words.weight[w][None], wide], 1), (h, c)))
            hs.append(torch.cat([h, zi[None]], 1) if dec.kind == "skip" else h)
        out.append(-F.cross_entropy(torch.cat(hs) @ dec.out.weight.T, s[1:], reduction="sum"))
    return torch.stack(out)


# ---- known answers

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shortest", [3, 9])    # lengths that differ, and one length
def test_values_and_gradients_equal_an_unrolled_loop(kind, dtype, eps, shortest):
    model, x = network(kind, dtype), tokens(6, shortest=shortest)
    z = codes(model, 6).requires_grad_(kind != "lm")
    inputs = [*model.decoder.parameters()] + ([z] if kind != "lm" else [])
    results = []
    for f in (plain_log_prob, lambda m, x, z: m.log_prob(x, z), lambda m, x, z: m.log_prob(F.pad(x, (0, 5)), z)):
        value = f(model, x, z)
        results.append([value, *torch.autograd.grad(value.mean(), inputs)])
    for other in results[1:]:
        for a, b in zip(results[0], other): torch.testing.assert_close(b, a, atol=eps, rtol=eps)
    with torch.no_grad(): torch.testing.assert_close(model.log_prob(x, z), results[0][0], atol=eps, rtol=eps)


@pytest.mark.parametrize("kind", KINDS)
def test_k_codes_are_k_calls_and_padding_and_neighbours_change_nothing(kind):
    model, x = network(kind), tokens(5)
    z = codes(model, 4, 5)
    one_by_one = torch.stack([torch.cat([model.log_prob(x[i:i + 1], z[k, i:i + 1]) for i in range(5)]) for k in range(4)])
    for pad in (0, 6):
        xp = F.pad(x, (0, pad))
        torch.testing.assert_close(model.log_prob(xp, z), one_by_one, atol=1e-12, rtol=0)
        with torch.no_grad():
            model.decoder.block = 11        # many small blocks
            torch.testing.assert_close(model.log_prob(xp, z), one_by_one, atol=1e-12, rtol=0)
            t = model.decode(z, xp).token_log_prob(xp)
            assert t.shape == (4, 5, x.shape[1] + pad - 1) and (t[:, xp[:, 1:] == 0] == 0).all() and (t[:, xp[:, 1:] != 0] < 0).all()


@pytest.mark.parametrize("pooling", M.POOLINGS)
def test_encoder_sees_neither_padding_nor_neighbours(pooling):
    model, x = network(pooling=pooling), tokens(7)
    alone = torch.cat([model.encode(s[s != 0][None]).mean for s in x])
    assert alone.std(0).min() > 1e-4
    for xp in (x, F.pad(x, (0, 3))):
        torch.testing.assert_close(model.encode(xp).mean, alone, atol=1e-12, rtol=0)
        with torch.no_grad():
            model.encoder.block = 5
            torch.testing.assert_close(model.encode(xp).mean, alone, atol=1e-12, rtol=0)
    trunk = model.encoder.trunk     # 'last' is the state after the last token, as an LSTM run on the bare sentence gives it
    if pooling == "last":
        s = x[0][x[0] != 0]
        torch.testing.assert_close(trunk(x)[0], trunk[1].lstm(trunk[0].weight[s][:, None])[1][0][0, 0], atol=1e-12, rtol=0)


def test_language_model_is_the_decoder_without_its_code():
    vae, lm, x = network(), network("lm"), tokens(6)
    with torch.no_grad():
        vae.decoder.start.weight.zero_()
        vae.decoder.lstm.weight_ih_l0[:, 5:] = 0
        lm.decoder.load_state_dict({k: v[:, :5] if k == "lstm.weight_ih_l0" else v for k, v in vae.decoder.state_dict().items() if k != "start.weight"})
    torch.testing.assert_close(lm.log_prob(x, codes(lm, 6)), vae.log_prob(x, codes(vae, 6)), atol=1e-12, rtol=0)
    loss, parts = objective(lm, [], x, Ctx(draw=noise(like=lm.prior_mean)))
    assert lm.latent_dim == 0 and parts["kl"].shape == (6, 0)
    torch.testing.assert_close(loss, -plain_log_prob(lm, x, codes(lm, 6)).mean())
    nll = nll_iw_all(Trained(lm), x, {"standard": lm.prior}, 3)["standard"]
    torch.testing.assert_close(nll, -plain_log_prob(lm, x, codes(lm, 6)).detach())


# ---- chunked cross-entropy

def problem(n=40, v=33, d=6, dtype=torch.float64):
    h, w = (torch.randn(k, d, generator=gen(k), dtype=dtype).requires_grad_() for k in (n, v))
    return h, w, torch.randint(0, v, (n,), generator=gen(3))


def plain(h, w, y): return -F.cross_entropy(h @ w.T, y, reduction="none")


WEIGHTS = {"equal": torch.full((40,), -1 / 7), "unequal": torch.randn(40, generator=gen(9)), "some zero": (torch.arange(40) % 3).double(), "zero": torch.zeros(40)}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunked_cross_entropy(weights, chunk, dtype, eps):
    h, w, y = problem(dtype=dtype)
    g = WEIGHTS[weights].to(dtype)
    value = M.token_log_prob(h, w, y, chunk)
    torch.testing.assert_close(value, plain(h, w, y), atol=eps, rtol=eps)
    expected = torch.autograd.grad(plain(h, w, y), (h, w), g)
    for turn in range(3):       # a second and third pass through the same graph
        for a, b in zip(torch.autograd.grad(value, (h, w), g, retain_graph=True), expected): torch.testing.assert_close(a, b, atol=eps, rtol=eps)
    for wanted in (h, w):       # one of them without a gradient
        a, b, c = (t if t is wanted else t.detach() for t in (h, w)), None, y
        value = M.token_log_prob(*a, c, chunk)
        torch.testing.assert_close(torch.autograd.grad(value, wanted, g)[0], expected[0 if wanted is h else 1], atol=eps, rtol=eps)
    with torch.no_grad(): torch.testing.assert_close(M.token_log_prob(h, w, y, chunk), plain(h, w, y), atol=eps, rtol=eps)


def test_chunked_cross_entropy_again_differentiated():
    h, w, y = problem(6, 8, 3)
    assert torch.autograd.gradgradcheck(lambda h, w: M.token_log_prob(h, w, y, 4), (h, w))
    with M.second_order(): assert torch.autograd.gradgradcheck(lambda h, w: M.token_log_prob(h, w, y, 4), (h, w))
    assert not M._SECOND_ORDER


def test_extreme_logits_and_no_tokens():
    h, w, y = problem(dtype=torch.float32)
    with torch.no_grad(): h.mul_(1e3)
    value = M.token_log_prob(h, w, y)
    torch.testing.assert_close(value, plain(h, w, y), rtol=1e-5, atol=1e-3)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value.sum(), (h, w)))
    assert M.token_log_prob(h[:0], w, y[:0]).shape == (0,)


def test_bfloat16_features_give_float32_values():
    h, w, y = problem(dtype=torch.float32)
    value = M.token_log_prob(h.bfloat16(), w, y, 16)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, plain(h, w, y), atol=0.1, rtol=0.05)
    for weights in ("equal", "unequal"):
        for a, b in zip(torch.autograd.grad(value, (h, w), WEIGHTS[weights].float(), retain_graph=True), torch.autograd.grad(plain(h, w, y), (h, w), WEIGHTS[weights].float())):
            assert a.dtype == torch.float32 and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


class Largest(TorchDispatchMode):
    "Numbers in the largest tensor that any operation returns."
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor): self.n = max(self.n, t.numel())
        return out


def test_all_logits_never_exist_at_once():
    model, x = network(vocab_size=8000, dtype=torch.float32), tokens(64, longest=40, shortest=40, vocab=8000)
    n = 64 * 39
    with Largest() as big: plain(torch.randn(n, 7, requires_grad=True), model.decoder.out.weight, x[:, 1:].flatten())
    assert big.n == n * 8000
    with Largest() as big: model.log_prob(x, codes(model, 64)).mean().backward()
    assert big.n <= 512 * 8000
    with torch.no_grad(), Largest() as big: model.log_prob(x, codes(model, 8, 64))
    assert big.n <= 512 * 8000


# ---- second derivatives, as semi-amortized inference needs them

@pytest.mark.parametrize("kind", ["concat", "skip"])
def test_gradient_of_a_gradient_step(kind):
    x = tokens(4)

    def after_step(dtype, ordinary, log_prob=lambda m, x, z: m.log_prob(x, z)):
        model = network(kind, dtype)
        z = codes(model, 4).requires_grad_()
        if ordinary: g, = torch.autograd.grad(log_prob(model, x, z).mean(), z, create_graph=True)
        else:
            with M.second_order(): g, = torch.autograd.grad(log_prob(model, x, z).mean(), z, create_graph=True)
        return torch.autograd.grad(log_prob(model, x, z + 0.5 * g).mean(), [z, *model.decoder.parameters()])
    exact = after_step(torch.float64, True, plain_log_prob)
    for ordinary in (True, False):
        for dtype, eps in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            for a, b in zip(after_step(dtype, ordinary), exact): torch.testing.assert_close(a.double(), b, atol=eps, rtol=eps)


# ---- generation

def test_greedy_is_the_chain_of_most_probable_words():
    model = network(vocab_size=9)
    with torch.no_grad(): model.decoder.out.weight.mul_(5)
    z = codes(model, 40)
    s = model.generate(z)
    assert s.shape == (40, 13) and (s[:, 0] == M.BOS).all() and not ((s[:, 1:] == M.BOS).any())
    words = torch.arange(2, 9)
    for t in range(1, 13):
        live = s[:, t] != 0
        if not live.any(): break
        tries = s[live, :t + 1].repeat_interleave(len(words), 0)
        tries[:, t] = words.repeat(int(live.sum()))
        with torch.no_grad(): last = model.decode(z[live].repeat_interleave(len(words), 0), tries).token_log_prob(tries)[:, -1].view(-1, len(words))
        assert torch.equal(words[last.argmax(1)], s[live, t])
    assert torch.equal(model.beam(z, 1), s)


def test_shapes_and_blocks_of_generation():
    model = network().train()
    z = codes(model, 3, 4)
    s, noise_of = model.generate(z, noise(5)), noise(5)
    assert s.shape == (3, 4, 13) and s.dtype == torch.long
    assert torch.equal(model.decoder.generate(z, noise(5), rows=2), s) and torch.equal(model.decode(z).sample(noise_of), s)
    assert model.generate(z, noise(5), max_len=4).shape == (3, 4, 5) and model.beam(z, 3, max_len=4).shape == (3, 4, 5)
    assert torch.equal(model.decoder.beam(z, 3, rows=3), model.beam(z, 3))
    ended = M.lengths(s.flatten(0, 1)) >= 3
    model.check(s.flatten(0, 1)[ended])
    assert model.encode(s.flatten(0, 1)).shape == (12, 3)
    dropped = network(dropout=0.5).train()
    assert torch.equal(dropped.generate(z), dropped.eval().generate(z))


def sentences(words, n):
    "Every sentence of at most n of the ids that can be written, cut where it does not end."
    out, open_ = [], [[M.BOS]]
    for t in range(n):
        longer = [s + [w] for s in open_ for w in words]
        out += [s for s in longer if s[-1] == M.EOS or t == n - 1]
        open_ = [s for s in longer if s[-1] != M.EOS]
    return torch.tensor([s + [0] * (n + 1 - len(s)) for s in out])


@pytest.mark.parametrize("kind", ["concat", "skip"])
def test_wide_beam_finds_the_best_sentence_and_scores_grow_with_width(kind):
    model = network(kind, vocab_size=6, max_len=4)
    with torch.no_grad(): model.decoder.out.weight.mul_(8)
    every, z = sentences((2, 3, 4, 5), 4), codes(model, 60)
    with torch.no_grad(): lp = model.log_prob(every, z[:, None].expand(-1, len(every), -1))
    assert torch.equal(model.beam(z, 64), every[lp.argmax(1)])
    with torch.no_grad(): score = [float(model.log_prob(model.beam(z, w), z).mean()) for w in (1, 4, 64)]
    assert score[0] < score[2] and score[1] <= score[2]


@pytest.mark.parametrize("kind", KINDS)
def test_ancestral_samples_follow_the_model(kind):
    model, n = network(kind, vocab_size=6, max_len=3), 30_000
    with torch.no_grad(): model.decoder.out.weight.mul_(2)
    every, z = sentences((2, 3, 4, 5), 3), codes(model, 1)
    with torch.no_grad():
        z_all = z.expand(len(every), -1)
        p = model.decode(z_all, every).token_log_prob(every).exp()
        wide, state = model.decoder.begin(z_all)
        keep = torch.ones(len(every), 3, dtype=p.dtype)         # share of the words that can be written, after each beginning
        for t in range(3):
            logits, norm, state = model.decoder.step(every[:, t], z_all, wide, state)
            keep[:, t] = torch.where(every[:, t + 1] != 0, (logits.logsumexp(1) - norm[:, 0]).exp(), 1.)
        p = torch.where(every[:, 1:] != 0, p / keep, 1.).prod(1)
    assert math.isclose(float(p.sum()), 1, abs_tol=1e-9)
    s = model.generate(z.expand(n, -1), noise(1))
    key = lambda s: (s * 6 ** torch.arange(4)).sum(1)
    seen = (key(s)[:, None] == key(every)).double().sum(0)
    assert seen.sum() == n
    big = n * p > 5
    chi2, dof = float(((seen - n * p) ** 2 / (n * p))[big].sum()), int(big.sum()) - 1
    assert abs(chi2 - dof) < 4 * (2 * dof) ** 0.5


# ---- models

def test_parameter_counts():
    with torch.device("meta"):
        count = {kind: sum(p.numel() for p in build_model("lstm", vocab_size=20_001, kind=kind).parameters()) for kind in M.KINDS}
        short = sum(p.numel() for p in build_model("lstm", vocab_size=8_411, embedding=128, hidden=512).parameters())
    assert count["critics"] == 46_564_864       # the critics study's own code at this vocabulary
    assert count["skip"] - count["concat"] == 20_001 * 32
    cell = lambda m, h: 4 * h * (m + h) + 8 * h
    assert count["concat"] == 2 * 20_001 * 512 + 20_001 * 1024 + cell(512, 1024) + cell(544, 1024) + 3 * 32 * 1024
    assert short == 2 * 8_411 * 128 + 8_411 * 512 + cell(128, 512) + cell(160, 512) + 3 * 32 * 512


@pytest.mark.parametrize("init", M.INITS)
def test_inits(init):
    model = network(init=init, embedding=40, hidden=50, vocab_size=200)
    enc, dec = model.encoder, model.decoder
    top = lambda p: float(p.detach().abs().max())
    small = lambda *ps: all(0.0095 < top(p) <= 0.01 for p in ps)
    assert small(dec.lstm.weight_ih_l0, dec.lstm.weight_hh_l0, dec.out.weight) == (init != "default") == (0.0995 < top(dec.words.weight) <= 0.1)
    assert small(enc.trunk[1].lstm.weight_hh_l0, enc.trunk[1].lstm.weight_ih_l0) == (init == "published")
    assert (top(enc.trunk[0].weight) <= 0.1) == (init in ("published", "encoder_layers_default"))
    if init in ("encoder_default", "default"): assert abs(float(enc.trunk[0].weight.detach().std()) - 1) < 0.05
    assert enc.head.bias is None and dec.out.bias is None and dec.start.bias is None


def test_copies_and_states():
    model, x = network(), tokens(5)
    other = copy.deepcopy(model)
    again = network()
    with torch.no_grad():
        for p in again.parameters(): p.zero_()
    again.load_state_dict(model.state_dict())
    for m in (other, again): torch.testing.assert_close(m.log_prob(x, codes(m, 5)), model.log_prob(x, codes(model, 5)), atol=0, rtol=0)


def test_one_call_of_log_prob_is_remembered_with_its_dropout():
    model, x = network(dropout=0.5).train(), tokens(5)
    px = model.decode(codes(model, 5), x)
    first = px.log_prob(x)
    assert torch.equal(first, px.log_prob(x)) and torch.equal(first, px.token_log_prob(x.clone()).sum(-1))
    assert not torch.equal(first, model.log_prob(x, codes(model, 5)))


# ---- with the rest of the library

DATA = Dataset("tokens", tokens(96, 0), tokens(40, 1), tokens(50, 2))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_evaluate_runs_on_tokens_and_leaves_out_what_needs_a_mean(kind):
    model = Trained(network(kind, torch.float32))
    row = evaluate(model, DATA, n_samples=20, batch=16, as_published={"batch": 16})
    assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert row["nll"] < row["neg_elbo"] + 0.1 and {"mi", "au", "mpd", "gap", "kl_dims", "ap_nll", "ap_density"} <= set(row)
    assert not {"reencode", "density", "coverage"} & set(row)
    again = evaluate(model, DATA, n_samples=20, batch=50)
    assert abs(again["nll"] - row["nll"]) < 1e-4


METHODS = {"none": [], "schedule": [("LinearWarmup", {}), ("FreeBits", {})], "bn": [("BatchNormMean", {})], "scale": [("ScaleUp", {})],
           "self": [("SelfCritic", {"weight": 1.})], "neural": [("NeuralCritic", {"weight": 1.})], "hybrid": [("HybridCritic", {"weight": 1., "shared": 1})],
           "aggressive": [("Aggressive", {"max_inner": 3})]}


@pytest.mark.parametrize("methods", METHODS)
def test_methods_and_trainer(methods):
    trainer = Trainer(network(dtype=torch.float32, dropout=0.5), [make_method(n, **kw) for n, kw in METHODS[methods]], DATA,
                      Recipe(epochs=3, batch=16, optimizer="sgd", lr=1., clip=5.))
    trainer.fit()
    assert trainer.valid["rec"] < 15
    if methods == "hybrid":
        assert trainer.methods[0].read.__self__ is trainer.methods[0] and trainer.model.encoder.trunk[0].weight.grad is not None


def test_mixed_precision():
    model, x = network(dtype=torch.float32, hidden=32), tokens(16)
    exact, _ = objective(model, [], x, Ctx(draw=noise()))
    model.mixed = True
    loss, parts = objective(model, [], x, Ctx(draw=noise()))
    loss.backward()
    assert loss.dtype == torch.float32 and abs(float((loss - exact).detach())) < 0.05 * float(exact.detach())
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_language_model_learns():
    lm = network("lm", torch.float32, dropout=0.)
    x, opt = DATA.train, torch.optim.Adam(lm.parameters(), lr=0.03)
    losses = []
    for _ in range(30):
        loss, _ = objective(lm, [], x, Ctx(draw=noise()))
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1


# ---- bad input

@pytest.mark.parametrize("x, message", [
    (tokens(4).float(), "takes ids"), (tokens(4)[0], "takes ids"), (tokens(4) + 10, "vocab_size=len"), (-tokens(4), "0 to 19"), (tokens(4)[:, 1:], "do not begin with <s>"),
    (torch.tensor([[1, 5, 2], [1, 2, 0]]), "first: row 1"), (torch.tensor([[1, 0, 5, 2]]), "before their end"), (torch.zeros(2, 4, dtype=torch.long), "do not begin")])
def test_check_refuses(x, message):
    with pytest.raises(ValueError, match=message): network().check(x)


@pytest.mark.parametrize("kw, message", [
    ({"kind": "concatenated"}, "'concat'"), ({"init": "lag"}, "unknown init"), ({"pooling": "average"}, "unknown pooling"), ({"vocab_size": 4}, "four specials"), ({"embedding": 0}, "embedding"),
    ({"dropout": -0.1}, "dropout"), ({"max_len": 0}, "max_len"), ({"latent_dim": 0}, "latent_dim")])
def test_builder_refuses(kw, message):
    with pytest.raises(ValueError, match=message): build_model("lstm", **{"vocab_size": 20} | kw)
    if set(kw) <= {"vocab_size", "embedding", "dropout", "max_len"}:
        with pytest.raises(ValueError, match=message): build_model("lstm_lm", **{"vocab_size": 20} | kw)


def test_decoder_refuses():
    model, x = network(), tokens(4)
    z = codes(model, 4)
    for call, kind, message in ((lambda: model.decode(z, x).log_prob(x.flip(0)), ValueError, "not the sentences"), (lambda: model.decode(z).log_prob(x), ValueError, "those before it"),
                                (lambda: model.decode(z[:2], x), ValueError, "do not match"), (lambda: model.generate(z, max_len=0), ValueError, "max_len"),
                                (lambda: model.beam(z, 0), ValueError, "width"), (lambda: model.decode(z, x).mean, NotImplementedError, "no mean")):
        with pytest.raises(kind, match=message): call()
