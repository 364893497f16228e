"Critics on a text encoder, what they refuse, and the study of Table 3."
import math

import pytest
import torch
from torch import nn

from pcvae.critics import HybridCritic, NeuralCritic, SelfCritic
from pcvae.data import load
from pcvae.method import Batch, Ctx, objective, randn_draw
from pcvae.metrics.information import mutual_information
from pcvae.models import build_model
from pcvae.papers import critics as paper
from pcvae.reports import printed
from pcvae.studies import get_study, read_row, row_path, run_study
from pcvae.training import Recipe, Trainer, parameter_groups

V, E, H, D = 30, 6, 10, 4
SIZES = dict(dim=8, hidden_x=12, hidden_z=6)
CRITICS = {"self": lambda **kw: SelfCritic(**kw), "neural": lambda **kw: NeuralCritic(**SIZES, **kw), "hybrid": lambda **kw: HybridCritic(shared=1, **SIZES, **kw)}
PART = {"self": "self_critic", "neural": "neural_critic", "hybrid": "hybrid_critic"}


def gen(seed=0): return torch.Generator().manual_seed(seed)
def ctx(like, seed=0): return Ctx(training=True, draw=randn_draw(gen(seed), like))


def text_vae(n=7, longest=9, dtype=torch.float64, kind="critics"):
    "A model without dropout and sentences of many lengths, all different."
    torch.manual_seed(0)
    model = build_model("lstm", vocab_size=V, latent_dim=D, embedding=E, hidden=H, dropout=0., kind=kind).to(dtype)
    x = torch.zeros(n, longest + 2, dtype=torch.long)
    for i in range(n):
        words = 2 + i % (longest - 1)
        x[i, :words + 2] = torch.cat([torch.tensor([1]), torch.randint(4, V, (words,), generator=gen(i)), torch.tensor([2])])
    return model, x


def ready(critic, model, x):
    torch.manual_seed(1)
    critic.setup(model, x)
    return critic.to(model.prior_mean.dtype)


def ce(critic, model, x): return objective(model, [critic], x, ctx(model.prior_mean))[1]


# ---- a model without a code
@pytest.mark.parametrize("name", CRITICS)
def test_a_model_without_a_code_is_refused(name):
    lm, data = build_model("lstm_lm", vocab_size=1004, embedding=4, hidden=4), load("synthetic_text", n=50)
    critic = CRITICS[name]()
    with pytest.raises(ValueError, match=rf"^{type(critic).__name__} matches codes .* latent_dim=0: give it a model with a code .*'lstm'.*without a critic$") as e:
        Trainer(lm, [critic], data, Recipe(epochs=1, batch=8))
    assert "\n" not in str(e.value)
    assert Trainer(lm, [], data, Recipe(epochs=1, batch=8)).model.latent_dim == 0


# ---- gradients
@pytest.mark.parametrize("kind", ["critics", "concat"])
@pytest.mark.parametrize("name", CRITICS)
def test_gradient_flow(name, kind):
    model, x = text_vae(kind=kind)
    critic = ready(CRITICS[name](weight=40.), model, x)
    loss = ce(critic, model, x)[PART[name]]
    assert loss.dtype == torch.float64 and loss.isfinite()
    loss.backward()
    assert all(p.grad is None for p in model.decoder.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())

@pytest.mark.parametrize("name", CRITICS)
def test_gradient_by_differences(name):
    model, x = text_vae()
    critic = ready(CRITICS[name](), model, x)
    params = [*model.encoder.parameters(), *critic.parameters()]
    grads = torch.autograd.grad(ce(critic, model, x)[PART[name]], params)
    way = [torch.randn(p.shape, generator=gen(i), dtype=p.dtype) for i, p in enumerate(params)]
    def at(h):
        with torch.no_grad():
            for p, w in zip(params, way): p.add_(w, alpha=h)
            value = ce(critic, model, x)[PART[name]].item()
            for p, w in zip(params, way): p.sub_(w, alpha=h)
        return value
    h = 1e-5
    assert sum((g * w).sum() for g, w in zip(grads, way)).item() == pytest.approx((at(h) - at(-h)) / (2 * h), rel=1e-5)

@pytest.mark.parametrize("name", CRITICS)
def test_padding_changes_nothing(name):
    model, x = text_vae()
    critic = ready(CRITICS[name](), model, x)
    wide = torch.cat([x, x.new_zeros(len(x), 5)], 1)
    torch.testing.assert_close(ce(critic, model, wide)[PART[name]], ce(critic, model, x)[PART[name]], rtol=1e-12, atol=0)

@pytest.mark.parametrize("name", ["neural", "hybrid"])
def test_each_sentence_is_read_by_itself(name):
    model, x = text_vae()
    critic = ready(CRITICS[name](), model, x)
    z = torch.randn(len(x), D, generator=gen(), dtype=torch.float64)
    whole = critic.logits(Batch(x, model, [critic], ctx(z), z=z))
    for rows in ([0, 3], [6, 1, 2]):
        torch.testing.assert_close(critic.logits(Batch(x[rows], model, [critic], ctx(z), z=z[rows])), whole[rows][:, rows], rtol=1e-10, atol=1e-12)


# ---- what is shared
def test_neural_critic_has_a_reader_of_its_own():
    model, x = text_vae()
    critic = ready(NeuralCritic(**SIZES), model, x)
    reader = critic.x_net[0]
    assert [type(m).__name__ for m in reader] == ["Words", "SentenceLSTM"]
    for own, old in zip(reader.parameters(), model.encoder.trunk.parameters()): assert own.shape == old.shape and not torch.equal(own, old)
    heads = H * 12 + 12 + 12 * 8 + 8 + D * 6 + 6 + 6 * 8 + 8 + 1
    assert sum(p.numel() for p in critic.parameters()) == V * E + 4 * H * (E + H) + 8 * H + heads

def test_hybrid_critic_shares_the_words_only():
    model, x = text_vae()
    critic = ready(HybridCritic(shared=1, **SIZES), model, x)
    words, own_lstm = model.encoder.trunk
    assert [type(m).__name__ for m in critic.x_net[0]] == ["SentenceLSTM"] and not {id(p) for p in critic.parameters()} & {id(p) for p in model.parameters()}
    z = torch.randn(len(x), D, generator=gen(), dtype=torch.float64)
    logits = lambda: critic.logits(Batch(x, model, [critic], ctx(z), z=z)).detach()
    before = logits()
    for layer, shared in ((words, True), (own_lstm, False)):
        with torch.no_grad():
            for p in layer.parameters(): p.neg_()
        assert torch.equal(logits(), before) != shared
        with torch.no_grad():
            for p in layer.parameters(): p.neg_()
    listed = [id(p) for g in parameter_groups(model, nn.ModuleList([critic]), 0.01) for p in g["params"]]
    assert len(listed) == len(set(listed))
    with pytest.raises(ValueError, match="too shallow.*shared=2.*has 2"): HybridCritic(shared=2, **SIZES).setup(model, x)

def test_words_of_the_hybrid_feel_both_paths():
    model, x = text_vae()
    critic, table, noise = ready(HybridCritic(shared=1, **SIZES), model, x), model.encoder.trunk[0].weight, randn_draw(gen(), model.prior_mean)((7, D))
    def pull(codes: bool, reader: bool):
        q = model.encode(x)
        z = q.rsample(noise) if codes else q.rsample(noise).detach()
        b = Batch(x, model, [critic], ctx(z), z=z)
        if not reader: critic.read = lambda b: type(e := HybridCritic.read(critic, b))(e.values.detach(), e.length)
        try: return torch.autograd.grad(critic.penalty(b)["hybrid_critic"], table)[0]
        finally: critic.__dict__.pop("read", None)
    torch.testing.assert_close(pull(True, True), pull(True, False) + pull(False, True))
    assert pull(True, False).abs().sum() > 0 and pull(False, True).abs().sum() > 0


# ---- information
def test_self_critic_is_the_batch_estimate_of_information():
    model, x = text_vae()
    q = model.encode(x)
    z = q.rsample(ctx(model.prior_mean).draw(q.shape))
    loss = ce(SelfCritic(weight=1.), model, x)["self_critic"]
    assert mutual_information(q.detach(), z=z.detach()).value == pytest.approx(math.log(len(x)) - loss.item(), abs=1e-9)

def trained(critic, epochs, dtype):
    data = load("synthetic_text", n=300)
    torch.manual_seed(0)
    model = build_model("lstm", vocab_size=len(data.vocab), latent_dim=D, embedding=12, hidden=12, kind="critics", max_len=11)
    trainer = Trainer(model, [critic], data, Recipe(epochs=epochs, batch=32, optimizer="adamw", lr=2e-2, clip=5., dtype=dtype))
    trainer.fit()
    return trainer

@pytest.mark.parametrize("name", CRITICS)
def test_training_makes_the_code_informative(name):
    history = trained(CRITICS[name](weight=40.), 12, "float32").history
    curve = [h[f"train_{PART[name]}"] for h in history]
    assert curve[-1] < 0.97 * curve[0] and history[-1]["valid_mi"] > 0.2

def test_bfloat16():
    trainer = trained(CRITICS["hybrid"](weight=40.), 1, "bfloat16")
    assert trainer.model.mixed and all(p.dtype == torch.float32 for p in (*trainer.model.parameters(), *trainer.methods.parameters()))
    assert math.isfinite(trainer.history[0]["train_hybrid_critic"])


# ---- the study
@pytest.mark.parametrize("scale", ["smoke", "quick", "small", "full"])
def test_table3(scale):
    study = get_study("critics", "table3", scale)
    assert list(study.rows) == list(printed("critics", "table3").model.unique()) and (not study.note) == (scale == "full")
    for run in study.runs:
        assert run.model["kind"] == "critics" and run.model["latent_dim"] == 32 and run.recipe["batch"] == 64 and run.recipe["lr"] == 5e-3 and run.recipe["clip"] == 5.
        assert run.recipe["select"] == "last" and run.evaluation["as_published"]["batch"] == 64 and all(m["weight"] == 40. for m in run.methods)
        assert run.data.get("plan", "length") == ("padded" if run.data["name"] == "yahoo" else "length")

def test_table3_at_full_is_the_published_recipe():
    run = get_study("critics", "table3", "full").rows["Hybrid critic"][0]
    assert run.data == {"name": "yahoo", "split": "papers", "keep_unk": True, "n_valid": 10_000, "plan": "padded"}
    assert [run.model[k] for k in ("embedding", "hidden", "max_len")] == [256, 1024, 99] and run.methods[0]["shared"] == 1
    assert run.recipe["epochs"] == 15 and run.recipe["optimizer"] == "adamw" and run.recipe["weight_decay"] == 0.01 and run.recipe["watch"] == 1563
    assert [r.seed for r in get_study("critics", "table3", "full").rows["VAE"]] == [0, 1, 2] and run.evaluation["as_published"]["n_samples"] == 50

def test_rows_of_table3(tmp_path):
    study = get_study("critics", "table3", "smoke")
    frame = run_study(study, None, tmp_path / "results", tmp_path / "state", "cpu", progress=False)
    assert (frame["status"] == "done").all(), frame["error"].tolist()
    numbers = frame[["ap_nll", "ap_mi", "ap_au", "ap_density", "ap_coverage", "nll_whole", "nll_matched_whole", "mi", "gap", "rec", "kl"]]
    assert numbers.notna().all(axis=None) and (frame["ap_au"] == 32).all() and (frame["au"] < 32).any()
    assert "density" not in frame and "coverage" not in frame          # there is no space of sentences that belongs to no model
    for label, runs in study.rows.items():
        row = read_row(row_path(runs[0], tmp_path / "results", "critics"))
        assert [w["epoch"] for w in row["watched"]] == [0, 1] and all(math.isfinite(w["mi"]) for w in row["watched"])       # untrained, and after the epoch
        assert [k for k in row["history"][0] if k.endswith("_critic")] == ([] if label == "VAE" else [f"train_{label.lower().replace(' ', '_')}"])

@pytest.mark.parametrize("scale", ["smoke", "quick"])
def test_looks_fall_on_the_ends_of_epochs(scale):
    data, n, epochs, *_ = paper.TEXT[scale]
    loaded = load(**data)
    assert len(loaded.train) == n and loaded.n_batches(64, 2) == get_study("critics", "table3", scale).runs[0].recipe["watch"]


def test_a_perceptron_alone_cannot_read_tokens():
    model, x = text_vae()
    with pytest.raises(TypeError, match="x_net='mlp' reads numbers, and these items are tokens; use x_net='encoder'"): ready(NeuralCritic(**SIZES, x_net="mlp"), model, x)
