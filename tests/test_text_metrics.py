"Text metrics against Python sets and counters, closed forms, and bad input."
import math
import random
from collections import Counter

import pytest
import torch

from pcvae.data.text import text_data
from pcvae.gaussian import DiagGaussian
from pcvae.method import Trained
from pcvae.metrics.likelihood import fit_prior, nll_iw
from pcvae.metrics.text import (corpus_perplexity, distinct, first_words, generation_row, gram_codes, length_r2, ngram_overlap, ngrams,
                                perplexity, text_prior, text_samples, token_entropy, word_counts, word_rates)
from pcvae.models.lstm import lstm, lstm_lm
from pcvae.scaling import ScaleUp


def gen(seed=0): return torch.Generator().manual_seed(seed)


def sentences(n, seed, words=6, longest=8, first=3):
    "Random lists of ids; some are empty."
    r = random.Random(seed)
    return [[r.randrange(first, first + words) for _ in range(r.randrange(0, longest + 1))] for _ in range(n)]


def rows(lists, ended=None, pad=2):
    width = max(map(len, lists)) + 2 + pad
    rows = [[1, *s, *([2] if ended is None or ended[i] else [])] for i, s in enumerate(lists)]
    return torch.tensor([r + [0] * (width - len(r)) for r in rows])


def grams(lists, k): return [tuple(s[i:i + k]) for s in lists for i in range(len(s) - k + 1)]


# ---- counting
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_counts_are_those_of_sets_and_counters(k, seed):
    a, b = sentences(60, seed), sentences(80, seed + 10)
    ended = [random.Random(i).random() < 0.5 for i in range(60)]
    x, y, own, real = rows(a, ended), rows(b), grams(a, k), set(grams(b, k))
    assert [tuple(g) for g in ngrams(x, k).tolist()] == own
    assert ngram_overlap(x, y, k) == pytest.approx(sum(g in real for g in own) / len(own))
    assert distinct(x, k) == pytest.approx(len(set(own)) / len(own))
    assert word_counts(x).tolist() == [len(s) for s in a]


def test_entropy_is_that_of_a_counter():
    a = sentences(50, 3)
    n = Counter(w for s in a for w in s)
    total = sum(n.values())
    assert token_entropy(rows(a)) == pytest.approx(-sum(v / total * math.log(v / total) for v in n.values()))


def test_rates():
    x = rows([[4, 3, 5], [3], []], ended=[True, False, True])
    assert word_rates(x) == {"words": pytest.approx(4 / 3), "ended": pytest.approx(2 / 3), "unk": 0.5}
    assert word_rates(rows([[]])) == {"words": 0., "ended": 1., "unk": 0.}


@pytest.mark.parametrize("n", [1, 2, 7, 30, 111])
def test_first_words_are_the_first_words(n):
    a = sentences(60, 5)
    out = first_words(rows(a), n)
    flat = [w for s in a for w in s]
    assert out[out > 2].tolist() == flat[:n] and int(word_counts(out).sum()) == n
    whole = (word_counts(out) == word_counts(rows(a))[:len(out)])
    assert ((out == 2).any(1) == whole).all()           # a sentence keeps its end unless it was cut
    assert word_counts(out)[-1] > 0


def test_first_words_does_not_write_into_its_argument():
    x = rows([[4, 5, 6]]); y = x.clone()
    first_words(x, 1)
    assert torch.equal(x, y)


@pytest.mark.parametrize("base", [2 ** 20, 2 ** 40, 2 ** 50])
def test_codes_never_collide_however_large_the_vocabulary(base):
    g = torch.randint(base - 2, base, (200, 5), generator=gen())
    codes = gram_codes(g)
    assert (codes >= 0).all() and len(codes.unique()) == len({tuple(r) for r in g.tolist()})
    pairs = {}
    for c, r in zip(codes.tolist(), g.tolist()): assert pairs.setdefault(c, tuple(r)) == tuple(r)


def test_distinct_of_even_words_has_its_expectation():
    V, T = 50, 400
    x = torch.cat([torch.ones(4000, 1, dtype=torch.long), torch.randint(4, 4 + V, (4000, 20), generator=gen(1))], 1)
    found = torch.tensor([distinct(x[i:i + T // 20], 1) for i in range(0, 4000, T // 20)])
    assert float(found.mean()) == pytest.approx(V / T * (1 - (1 - 1 / V) ** T), abs=1e-3)


def test_distinct_at_least_halves():
    a = [s for s in sentences(400, 7, words=4) if len(s) > 4]
    d = [distinct(rows(a), k) for k in range(1, 6)]
    assert all(y >= x / 2 for x, y in zip(d, d[1:]))


def test_words_of_other_rows_and_marks_do_not_matter():
    a = sentences(30, 8)
    x, more = rows(a), rows(a, pad=9)
    assert [distinct(x, k) for k in (1, 2, 3)] == [distinct(more, k) for k in (1, 2, 3)]
    assert ngram_overlap(x, more, 3) == 1 and token_entropy(x) == token_entropy(more)


@pytest.mark.parametrize("call, error, text", [
    (lambda x: ngrams(x.double(), 1), TypeError, "int64"),
    (lambda x: ngrams(x[0], 1), TypeError, r"\[N, L\]"),
    (lambda x: ngrams([[1, 4, 2]], 1), TypeError, "got list"),
    (lambda x: ngrams(x, 0), ValueError, "k must be"),
    (lambda x: ngrams(x, 2.0), ValueError, "k must be"),
    (lambda x: ngrams(x, 4), ValueError, "samples: no sentence has 4 words"),
    (lambda x: ngrams(x, 400), ValueError, "samples: no sentence has 400 words"),
    (lambda x: ngrams(x[:, 1:], 1), ValueError, "row 0 does not begin"),
    (lambda x: ngrams(x[:0], 1), ValueError, "no sentences"),
    (lambda x: ngrams(torch.tensor([[1, 4, 2, 0, 0], [1, 4, 0, 5, 2]]), 1), ValueError, "row 1 has words after its end"),
    (lambda x: ngram_overlap(x, x[:, :2], 3), ValueError, "reference: no sentence has 3 words"),
    (lambda x: distinct(rows([[], []]), 1), ValueError, "no sentence has 1 words"),
    (lambda x: token_entropy(rows([[]])), ValueError, "no sentence has 1 words"),
    (lambda x: first_words(x, 7), ValueError, "from 1 to 6, got 7"),
    (lambda x: first_words(x, 0), ValueError, "from 1 to 6, got 0"),
])
def test_bad_sentences(call, error, text):
    with pytest.raises(error, match=text): call(rows([[4, 5, 6], [7, 8, 9]]))


# ---- perplexity
DATA = text_data("small", {k: [" ".join(f"w{i % 7}" for i in range(s, s + 3 + s % 4)) for s in range(n)] for k, n in (("train", 40), ("valid", 8), ("test", 12))})


def small(build, methods=(), **params):
    torch.manual_seed(0)
    model = build(vocab_size=len(DATA.vocab), embedding=6, hidden=8, max_len=9, init="default", **params)
    for m in methods: m.setup(model, DATA.train)
    return Trained(model, methods)


def test_perplexity_is_that_of_the_words_one_by_one():
    lm, x = small(lstm_lm), DATA.test
    with torch.no_grad(): each = lm.decode(torch.zeros(len(x), 0), x).token_log_prob(x)
    found = perplexity(lm, x)
    assert found == pytest.approx(math.exp(-float(each.sum()) / int((x[:, 1:] != 0).sum())), rel=1e-5)
    assert perplexity(lm, x, batch=5) == pytest.approx(found, rel=1e-5)
    assert perplexity(lm.model.train(), x) == pytest.approx(found, rel=1e-5) and lm.model.training      # dropout off, mode put back
    lm.model.eval()
    assert corpus_perplexity(nll_iw(lm, x, 1), DATA.lengths("test")) == pytest.approx(found, rel=1e-5)


def test_perplexity_of_a_language_model_that_knows_nothing_is_its_vocabulary():
    lm = small(lstm_lm)
    torch.nn.init.zeros_(lm.model.decoder.out.weight)
    assert perplexity(lm, DATA.test) == pytest.approx(len(DATA.vocab), rel=1e-5)
    assert perplexity(lm, rows([[], [4]])) == pytest.approx(len(DATA.vocab), rel=1e-5)      # an empty sentence: one prediction
    assert perplexity(lm, rows([[4, 5]], ended=[False])) == pytest.approx(len(DATA.vocab), rel=1e-5)


def test_corpus_perplexity_weighs_words_not_sentences():
    nll, n = torch.tensor([2., 30.]), torch.tensor([3, 11])
    assert corpus_perplexity(nll, n) == pytest.approx(math.exp(32 / 12))
    assert corpus_perplexity(nll.double() * 1e5, n) == math.inf


@pytest.mark.parametrize("call, text", [
    (lambda lm, vae: perplexity(vae, DATA.test), "a code of 2 dimensions"),
    (lambda lm, vae: perplexity(lm, rows([[4, 99]])), "built for 0 to"),
    (lambda lm, vae: corpus_perplexity(torch.ones(2), torch.ones(3)), r"\(2,\) log-likelihoods for \(3,\) lengths"),
    (lambda lm, vae: corpus_perplexity(torch.tensor([1., math.nan]), torch.tensor([3, 3])), "1 of 2 sentences have no finite"),
    (lambda lm, vae: corpus_perplexity(torch.ones(2), torch.ones(2, dtype=torch.long)), "lone <s>"),
])
def test_bad_perplexity(call, text):
    with pytest.raises(ValueError, match=text): call(small(lstm_lm), small(lstm, latent_dim=2))


# ---- sentences from a model
def test_samples_are_seeded_and_from_the_prior_they_say():
    vae = small(lstm, [ScaleUp(1.1)], latent_dim=2)
    vae.methods[0].f.mul_(3)
    x = text_samples(vae, 20, "scale", seed=4)
    assert x.shape == (20, 10) and torch.equal(x, text_samples(vae, 20, vae.priors()["scale"], seed=4))
    assert not torch.equal(x, text_samples(vae, 20, seed=4)) and not torch.equal(x, text_samples(vae, 20, "scale", seed=5))
    assert torch.equal(text_samples(vae, 16, seed=1, batch=16), text_samples(vae, 17, seed=1, batch=16)[:16])
    state = torch.get_rng_state()
    text_samples(vae, 3)
    assert torch.equal(state, torch.get_rng_state())


def test_codes_follow_the_prior():
    seen = []
    class Echo:
        prior = DiagGaussian.standard(2)
        def generate(self, z, draw):
            seen.append((z, draw((len(z), 3))))
            return torch.full((len(z), 3), 1)
    text_samples(Echo(), 5000, DiagGaussian(torch.tensor([3., -1.]), torch.tensor([4., 0.25]).log()), batch=999)
    z, noise = (torch.cat(v) for v in zip(*seen))
    assert len(z) == 5000 and [len(v[0]) for v in seen] == [999] * 5 + [5]
    assert torch.allclose(z.mean(0), torch.tensor([3., -1.]), atol=0.1) and torch.allclose(z.std(0), torch.tensor([2., 0.5]), rtol=0.05)
    assert abs(float((z[:, 0] - 3) @ noise[:, 0]) / 5000) < 0.1                 # the words' noise is not the code's


@pytest.mark.parametrize("call, text", [
    (lambda v: text_prior(v, "matched"), "prior=fit_prior"), (lambda v: text_prior(v, "standart"), "Did you mean 'standard'"),
    (lambda v: text_samples(v, 0), "n must be"), (lambda v: text_samples(v, 2.5), "n must be"),
    (lambda v: generation_row(v, small(lstm_lm), DATA, 5, priors={"data": v.prior}), "another name")])
def test_bad_samples(call, text):
    with pytest.raises(ValueError, match=text): call(small(lstm, latent_dim=2))


def test_row_has_every_figure_of_every_source():
    vae, lm = small(lstm, [ScaleUp(1.1)], latent_dim=2), small(lstm_lm)
    row = generation_row(vae, lm, DATA, 30, seed=2)
    sources, keys = ("standard", "scale", "matched", "data"), {k.removesuffix("_data") for k in row if k.endswith("_data")}
    assert keys == {"ppl", "gram2", "gram3", "gram4", "entropy", "entropy_eq", "words", "ended", "unk"} | {f"dist{k}{e}" for k in (1, 2, 3) for e in ("", "_eq")}
    assert set(row) == {"n", "words_eq"} | {f"{k}_{s}" for k in keys for s in sources}
    assert all(type(v) is float and math.isfinite(v) for v in row.values())
    x = text_samples(vae, 30, fit_prior(vae, DATA.train), seed=2)
    assert row["gram3_matched"] == ngram_overlap(x, DATA.train, 3) and row["entropy_matched"] == token_entropy(x)
    assert row["ppl_data"] == perplexity(lm, DATA.test) and row["words_eq"] <= int(word_counts(DATA.test).sum())
    assert row == generation_row(vae, lm, DATA, 30, seed=2)


def test_row_of_real_text_takes_no_more_sentences_than_the_others():
    lm = small(lstm_lm)
    row = generation_row(lm, lm, DATA, 4, ks=(1, 2))
    assert {k.removesuffix("_standard") for k in row if k.endswith("_standard")} >= {"gram1", "gram2"} and "gram3_data" not in row
    assert row["words_data"] * 4 == pytest.approx(round(row["words_data"] * 4)) and not any("matched" in k for k in row)


# ---- length
def test_length_r2_is_that_of_least_squares():
    mean = torch.randn(200, 5, generator=gen(), dtype=torch.double)
    length = (3 * mean[:, 0] + 2 * mean[:, 3] + 4 * torch.randn(200, generator=gen(1)) + 30).round().long()
    a = torch.cat([torch.ones(200, 1, dtype=torch.double), mean], 1)
    rest = length.double() - a @ torch.linalg.lstsq(a, length.double()[:, None]).solution[:, 0]
    expected = 1 - float(rest @ rest) / float((length.double() - length.double().mean()).square().sum())
    assert length_r2(mean, length) == pytest.approx(expected, abs=1e-12)
    assert length_r2(mean.float(), length) == pytest.approx(expected, abs=1e-5)
    assert length_r2(mean * torch.tensor([1e-7, 1., 1e5, 1e-3, 1.]) + 2, length) == pytest.approx(expected, abs=1e-6)


def test_length_r2_where_there_is_nothing_to_explain_or_nothing_that_explains():
    mean, length = torch.randn(50, 3, generator=gen()), torch.randint(4, 9, (50,), generator=gen(1))
    assert length_r2(mean, torch.full((50,), 7)) == 0 and length_r2(mean * 0 + 0.7, length) == pytest.approx(0, abs=1e-12)
    assert length_r2(mean[:, :0], length) == 0 and length_r2(length[:, None].float(), length) == pytest.approx(1)


@pytest.mark.parametrize("mean, length, text", [
    (torch.ones(4, 3), torch.ones(4), "4 sentences for 3"), (torch.ones(9, 3), torch.ones(8), "do not match"),
    (torch.ones(9), torch.ones(9), "do not match"), (torch.full((9, 2), math.nan), torch.arange(9), "not finite")])
def test_bad_lengths(mean, length, text):
    with pytest.raises(ValueError, match=text): length_r2(mean, length)
