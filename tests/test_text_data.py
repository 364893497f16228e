"""Text data: rows, plans and counts; every bad input gives one clear error; the exact likelihood; the corpora in small, and as they are where their files are at hand."""
import gzip
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from pcvae import data
from pcvae.data import core, text
from pcvae.data.core import DataFileCorrupt, DataFileMissing
from pcvae.data.text import PLANS, SentenceGenerator, TextData, Vocabulary, cut_sizes, exact_log_prob, sample_sentences, text_data


def at_hand(*files):
    return all(any((folder / f.name).is_file() for folder in core.places().values()) for f in files)


def sentences(n=300, seed=0, mean=6):
    r = np.random.RandomState(seed)
    return [" ".join(f"w{i}" for i in r.randint(40, size=1 + r.poisson(mean))) for _ in range(n)]


def corpus(**change):
    return dict(dict(train=sentences(), valid=sentences(30, 1), test=sentences(30, 2)), **change)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def said(f):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        out = f()
    return out, [str(x.message) for x in w]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty user cache, no $PCVAE_DATA, and no network."
    def offline(url, path):
        raise ConnectionError("no network")
    monkeypatch.setattr(core, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.delenv("PCVAE_DATA", raising=False)
    monkeypatch.setattr(core, "_download", offline)
    return tmp_path


# --- vocabulary

def test_vocabulary_keeps_ids_through_pickle_and_file(tmp_path):
    v = Vocabulary.build(["b a a", "c _UNK <unk> </s>"])
    assert v.words == ["a", "b", "c"] and len(v) == 7
    (tmp_path / "v.txt").write_text("\n".join(["<pad>", "<s>", "</s>", "<unk>", *v.words]) + "\n")
    for other in (pickle.loads(pickle.dumps(v)), Vocabulary.read(tmp_path / "v.txt")):
        assert other.encode("c d a") == v.encode("c d a") == [6, 3, 4]
    assert v.decode(torch.tensor([1, 4, 6, 2, 5])) == "a c"


def test_own_unknown_word_is_one_id_or_a_word():
    lines = ["a _UNK b", "a c"]
    mapped, kept = Vocabulary.build(lines), Vocabulary.build(lines, keep_unk=True)
    assert mapped.encode("_UNK zebra <unk>") == [3, 3, 3]
    assert kept.encode("_UNK zebra <unk>") == [kept.ids["_UNK"], 3, 3] and len(kept) == len(mapped) + 1
    assert "id 3" in mapped.unk and mapped.unk != kept.unk


def test_word_outside_the_vocabulary_is_named_or_counted():
    d = text_data("t", dict(train=["a b c"], valid=["a zebra <unk>"], test=["c"]))
    assert d.info["unknown"]["valid"] == dict(own=1, outside=1) and d.valid[0].tolist() == [1, 4, 3, 3, 2]
    with pytest.raises(ValueError, match="'zebra' is not in the vocabulary of 3 words"):
        d.vocab.encode("a zebra", strict=True)


def test_vocabulary_of_given_size_counts_what_it_loses():
    d = text_data("t", corpus(), vocab_size=10)
    assert len(d.vocab) == 14
    lost = sum(w not in d.vocab.ids for line in corpus()["train"] for w in line.split())
    assert d.info["unknown"]["train"] == dict(own=0, outside=lost) and (d.train == 3).sum() == lost > 0


# --- bad files

@pytest.mark.parametrize("raw, line", [("ein Satz\nzwölf Wörter\n".encode("latin-1"), 2), ("a line\n".encode("utf-16"), 1), ("a line\n".encode("utf-16-be"), 1), (b"a\nb\n\xff", 3)])
@pytest.mark.parametrize("pack", [False, True])
def test_wrong_encoding(tmp_path, raw, line, pack):
    path = tmp_path / ("x.txt.gz" if pack else "x.txt")
    path.write_bytes(gzip.compress(raw) if pack else raw)
    with pytest.raises(DataFileCorrupt, match=rf"x\.txt.*: not UTF-8: byte 0x.. in line {line}; save it as UTF-8"):
        text.read_lines(path)


def test_lines_are_lines(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffone\u2028still one\r\ntwo\x0b\n\nfour".encode())
    assert text.read_lines(path) == ["one\u2028still one", "two\x0b", "", "four"]


def test_cut_gzip(tmp_path):
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(" ".join(sentences(500)).encode())[:-20])
    with pytest.raises(DataFileCorrupt, match="x.txt.gz: cannot be read"):
        text.read_lines(path)


@pytest.mark.parametrize("content, message", [("1\ta\nb c\n", "line 2 is not a whole number, a tab and a text"), ("good\ta\n", "line 1 is not")])
def test_labelled_lines(tmp_path, content, message):
    path = tmp_path / "x.txt"
    path.write_text(content)
    with pytest.raises(DataFileCorrupt, match=message):
        text.read_labelled(path)


# --- bad documents

@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_empty_documents(part):
    lines = corpus()
    lines[part] = lines[part][:4] + ["", "  "] + lines[part][4:]
    with pytest.raises(ValueError, match=rf"{part}: 2 of \d+ documents are empty, first line 5; .* empty='drop'"):
        text_data("t", lines)
    y = list(range(len(lines[part])))
    d = text_data("t", lines, labels={part: y}, empty="drop")
    assert d.info["empty_dropped"][part] == 2 and len(getattr(d, part)) == len(y) - 2
    assert d.labels[part].tolist() == y[:4] + y[6:]                       # labels go with their lines


def test_too_long_is_told_counted_and_never_cut_unasked():
    lines = corpus(train=["a b c d e f g", "a b"])
    with pytest.raises(ValueError, match=r"train: 1 of 2 documents have more than max_len=5 words, first line 1 with 7; raise max_len or pass long='cut' or long='drop'"):
        text_data("t", lines, max_len=5)
    d, told = said(lambda: text_data("t", dict(train=lines["train"], valid=["a"], test=["b"]), max_len=5, long="cut"))
    assert told == ["data set 't', train: 1 of 2 documents have more than max_len=5 words and are cut"]
    assert d.info["long_cut"] == dict(train=1, valid=0, test=0) and d.vocab.decode(d.train[0]) == "a b c d e" and d.train[0, 6] == 2
    d, told = said(lambda: text_data("t", dict(train=lines["train"], valid=["a"], test=["b"]), max_len=5, long="drop"))
    assert len(told) == 1 and len(d.train) == 1 and d.info["long_dropped"]["train"] == 1


@pytest.mark.parametrize("n", [299, 301, 0])
def test_labels_that_do_not_match(n):
    with pytest.raises(ValueError, match=f"data set 't', train: {n} labels for 300 lines; they must match one to one"):
        text_data("t", corpus(), labels=dict(train=[0] * n))


@pytest.mark.parametrize("options, message", [
    (dict(plan="lenght"), "unknown batch plan 'lenght'. Did you mean 'length'"), (dict(rest="leaveout"), "Did you mean 'leave_out'"),
    (dict(long="cutt"), "unknown treatment of long documents 'cutt'. Did you mean 'cut'"), (dict(empty="skip"), "unknown treatment of empty documents 'skip'"),
    (dict(max_len=0), "max_len must be a whole number of at least 1, got 0"), (dict(plan="component"), r"needs component\['train'\] with one label per sentence \(300\), got 0")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        text_data("t", corpus(), **options)


def test_missing_split():
    with pytest.raises(ValueError, match="lines need the splits train, valid and test, got train"):
        text_data("t", dict(train=["a"]))


@pytest.mark.parametrize("row, message", [
    ([1, 4, 9, 2, 0], "row 1 holds an id outside 0 to 6, the vocabulary"), ([1, 4, -1, 2, 0], "holds an id outside"), ([4, 4, 5, 2, 0], "row 1 does not begin with <s>"),
    ([1, 4, 0, 5, 2], "has padding before its last word"), ([1, 4, 5, 6, 0], "does not end with </s>"), ([1, 2, 0, 0, 0], r"row 1 is an empty document \(1 such rows\)"),
    ([1, 4, 2, 5, 2], "has <s> or </s> in the middle"), ([0, 0, 0, 0, 0], "row 1 does not begin")])
def test_rows_are_checked(row, message):
    good = torch.tensor([[1, 4, 5, 2, 0]])
    with pytest.raises(ValueError, match=f"data set 't', valid: .*{message}"):
        TextData("t", good, torch.cat([good, torch.tensor([row])]), good, vocab=Vocabulary("abc"))


def test_vocabulary_and_type_are_checked():
    good = torch.tensor([[1, 4, 5, 2, 0]])
    with pytest.raises(TypeError, match="vocab must be a Vocabulary, got NoneType"):
        TextData("t", good, good, good)
    with pytest.raises(TypeError, match="expected rows of tokens, int64"):
        TextData("t", good.float(), good.float(), good.float(), vocab=Vocabulary("abc"))


# --- plans

def planned(kind, **change):
    d = text_data("t", corpus())
    return TextData("t", d.train, d.valid, d.test, vocab=d.vocab, plan_kind=kind, component=dict(train=torch.arange(300) % 7), **change)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("batch, at_least", [(32, 1), (32, 2), (16, 16), (7, 3), (300, 2), (500, 1)])
def test_every_sentence_once_and_as_many_batches_in_every_epoch(kind, batch, at_least):
    d, gen = planned(kind), seeded()
    for _ in range(3):
        epoch = d.plan(batch, gen, at_least)
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(300))
        assert len(epoch) == d.n_batches(batch, at_least) and min(map(len, epoch)) >= at_least and max(map(len, epoch)) < batch + 2 * at_least
    assert d.info["plan"]["left_out"] == 0


@pytest.mark.parametrize("kind", PLANS)
def test_plan_is_seeded_shuffled_and_fixed_where_it_says_so(kind):
    d, gen = planned(kind), seeded(3)
    members = lambda epoch: {frozenset(p.tolist()) for p in epoch}
    first, second = d.plan(8, gen), d.plan(8, gen)
    assert [p.tolist() for p in first] == [p.tolist() for p in d.plan(8, seeded(3))] != [p.tolist() for p in second]
    assert (members(first) == members(second)) == kind.endswith("_fixed")
    if kind.endswith("_fixed"):
        assert members(first) == members(d.plan(8, seeded(99))) != members(planned(kind, plan_seed=1).plan(8, seeded(3)))


def test_constant_length_and_component():
    d = planned("length")
    assert all(len(d.lengths()[i].unique()) == 1 and not (d.batch(i) == 0).any() for i in d.plan(16, seeded()))
    d = planned("component")
    assert all(len(d.component["train"][i].unique()) == 1 for i in d.plan(16, seeded()))


def test_batches_are_trimmed_and_equal_the_rows():
    d = planned("padded")
    for i in d.plan(16, seeded()):
        x = d.batch(i)
        assert x.shape[1] == d.lengths()[i].max() and torch.equal(x, d.train[i][:, :x.shape[1]]) and not d.train[i][:, x.shape[1]:].any()
    assert d.batch([3, 5]).shape[0] == 2


def test_leaving_out_is_counted_and_told():
    d = planned("length", rest="leave_out")
    n, told = said(lambda: d.n_batches(32, 16))
    epoch, again = said(lambda: d.plan(32, seeded(), 16))
    lost, never = d.info["plan"]["left_out"], d.info["plan"]["always_left_out"]
    counts = d.lengths().unique(return_counts=True)[1]
    assert never == counts[counts < 16].sum() > 0 and lost == sum(int(c % 32) for c in counts if 0 < c % 32 < 16) >= never
    assert told == again == [f"data set 't': plan 'length' leaves out {lost} of 300 training sentences in each epoch (batches below 16), {never} of them in every epoch; rest='join' leaves out none"]
    assert len(epoch) == n and sum(map(len, epoch)) == 300 - lost and min(map(len, epoch)) >= 16
    with pytest.raises(ValueError, match="plan 'length' has no batch of at least 200 sentences"):
        d.plan(250, seeded(), 200)
    joined = planned("length")
    assert said(lambda: joined.n_batches(32, 16))[1] == [] and joined.info["plan"]["mixed"] == never


def test_cut_sizes():
    assert cut_sizes([], 32) == [] and cut_sizes([5], 32, 8) == [5]
    assert cut_sizes([3, 3, 3, 40], 32, 8) == [9, 32, 8] and cut_sizes([3, 3, 40], 32, 8) == [38, 8]
    for at_least in (1, 2, 9, 16):
        r = np.random.RandomState(at_least)
        counts = r.randint(1, 90, size=50).tolist()
        assert sum(cut_sizes(counts, 32, at_least)) == sum(counts) and min(cut_sizes(counts, 32, at_least)) >= at_least


def test_moving_keeps_tokens_and_plan():
    d = planned("component_fixed", rest="leave_out", plan_seed=4)
    e = d.to("cpu", torch.float64)
    assert e.train.dtype == torch.long and (e.plan_kind, e.rest, e.plan_seed, e.vocab) == (d.plan_kind, d.rest, 4, d.vocab)
    assert [p.tolist() for p in e.plan(8, seeded())] == [p.tolist() for p in d.plan(8, seeded())]
    assert [p.tolist() for p in pickle.loads(pickle.dumps(d)).plan(8, seeded())] == [p.tolist() for p in d.plan(8, seeded())]


# --- the generator

def test_synthetic_text_is_the_same_everywhere():
    d = data.load("synthetic_text", n=100)
    assert [len(getattr(d, k)) for k in ("train", "valid", "test")] == [80, 10, 10] and d.shape == (12,) and len(d.vocab) == 1004
    assert d.train[0].tolist() == FIRST and int(d.train.sum()) == TOTAL
    assert "20,000 sentences, by 100" in d.stand_in and torch.equal(d.labels["train"], d.component["train"])
    other = data.load("synthetic_text", n=100, seed=1)
    assert not torch.equal(other.train, d.train)


FIRST, TOTAL = [1, 524, 312, 495, 756, 997, 761, 575, 260, 585, 529, 2], 413_598


def test_generator_statistics():
    net = SentenceGenerator.make(words=8, hidden=5, seed=2)
    w, comp, z = sample_sentences(net, 4000, length=2, seed=0)
    assert abs(comp.bincount().double() / 4000 - 0.25).max() < 0.03 and (torch.stack([z[comp == c].mean(0) for c in range(4)]) - text.CENTRES).abs().max() < 0.15
    expected = torch.stack([net.log_prob(torch.stack([w[:, 0], torch.full((4000,), v)], 1), z) for v in range(8)], 1).exp().mean(0) * 8
    assert (w[:, 1].bincount(minlength=8) / 4000 - expected).abs().max() < 0.035


def test_exact_log_prob_by_brute_force():
    net = SentenceGenerator.make(words=4, hidden=3, seed=5)
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    rows = torch.nn.functional.pad(torch.nn.functional.pad(every + 4, (1, 0), value=1), (0, 1), value=2)
    exact = exact_log_prob(rows, net, dtype=torch.float64)
    assert abs(exact.exp().sum().item() - 1) < 1e-4
    axis = (torch.arange(240, dtype=torch.float64) + 0.5) / 240 * 14 - 7              # a plain fine grid
    z = torch.cartesian_prod(axis, axis)
    prior = torch.stack([torch.exp(-0.5 * ((z - c) ** 2).sum(1)) for c in text.CENTRES]).mean(0) / (2 * math.pi)
    brute = torch.stack([(net.log_prob(x, z).exp() * prior).sum() for x in every[::32]]) * (14 / 240) ** 2
    torch.testing.assert_close(exact[::32], brute.log(), atol=2e-3, rtol=0)


def test_exact_log_prob_is_a_likelihood_of_the_generator():
    d = data.load("synthetic_text", n=200)
    net, x = d.info["generator"], d.test[:3]
    truth = exact_log_prob(x, net)
    assert torch.equal(truth, exact_log_prob(x, net)) and truth.dtype == torch.float64
    padded = torch.nn.functional.pad(x, (0, 3))
    torch.testing.assert_close(truth, exact_log_prob(padded, net))
    shuffled = torch.cat([x[:, :1], d.test[6:9, 1:6], x[:, 6:]], 1)                   # halves of different sentences
    assert exact_log_prob(shuffled, net).mean() < truth.mean() - 5
    for bad in (torch.tensor([[1, 4, 3, 2]]), torch.tensor([[1, 4, 5, 2], [1, 4, 2, 0]])):
        with pytest.raises(ValueError, match="exact_log_prob needs sentences of one length with words of the generator"):
            exact_log_prob(bad, net)


@pytest.mark.parametrize("params, message", [(dict(n=5), "n must be a whole number of at least 10"), (dict(n=20, plan="components"), "Did you mean 'component'"), (dict(sead=1), "Did you mean 'seed'")])
def test_synthetic_text_bad_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        data.load("synthetic_text", **params)


# --- corpora in small: made-up files under the real names

def put(folder, name, lines):
    folder.mkdir(exist_ok=True)
    raw = ("\n".join(map(str, lines)) + "\n").encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


@pytest.fixture
def unchecked(cache, monkeypatch):
    "A data folder; made-up files pass as the real ones."
    monkeypatch.setattr(core, "verify", lambda *a: None)
    monkeypatch.setenv("PCVAE_DATA", str(cache / "data"))
    return cache / "data"


def test_yahoo_small_and_papers(unchecked):
    put(unchecked, "yahoo.valid.txt.gz", [f"v{i} _UNK b" for i in range(40)])
    put(unchecked, "yahoo.test.txt.gz", [f"t{i} a" for i in range(40)])
    put(unchecked, "yahoo.vocab.txt.gz", ["_UNK", "a", "b"])
    d = data.load("yahoo", download=False)
    assert (len(d.train), len(d.valid), len(d.test)) == (40, 20, 20) and "by its validation file" in d.stand_in and len(d.vocab) == 6
    assert d.labels["train"].tolist() == [i // 4 for i in range(40)] and d.labels["valid"].tolist() == d.labels["test"].tolist() == [i // 2 for i in range(20)]
    assert d.info["unknown"]["train"] == dict(own=40, outside=40)
    full = data.load("yahoo", download=False, vocab_size=1000, n_train=10)
    texts = {full.vocab.decode(x) for x in full.train}
    assert len(texts) == 10 and "10 of 40 training lines" in full.stand_in and "vocabulary of 1,000 words" in full.stand_in and full.info["vocabulary_from"] == "training lines"
    assert len(data.load("yahoo", download=False, keep_unk=True).vocab) == 7
    with pytest.raises(DataFileMissing, match="needs yahoo.train.txt"):
        data.load("yahoo", download=False, split="papers")
    for part, n in (("train", 100), ("valid", 20), ("test", 20)):
        put(unchecked, f"yahoo.{part}.txt", [f"{part} a b"] * n)
    put(unchecked, "yahoo.vocab.txt", ["train", "a", "b"])
    d = data.load("yahoo", download=False)
    assert (len(d.train), d.stand_in) == (100, "") and d.labels["train"].bincount().tolist() == [10] * 10
    assert data.load("yahoo", download=False, split="small").stand_in


def test_yelp_small_and_papers(unchecked):
    put(unchecked, "yelp_review.test.txt.gz", ["a b c", "d <unk>", "a"])
    put(unchecked, "yelp_review.test.labels.gz", [0, 4, 2])
    put(unchecked, "yelp_review.valid.txt.gz", ["a", "b", "c", "d", "e"])
    put(unchecked, "yelp_review.valid.labels.gz", [0, 1, 2, 3, 4])
    d = data.load("yelp", download=False)
    assert [len(x) for x in (d.train, d.valid, d.test)] == [3, 2, 3] and d.labels["test"].tolist() == [2, 3, 4] and "Xu & Durrett" in d.stand_in
    put(unchecked, "yelp_review.valid.labels.gz", [0, 1, 2, 3])
    with pytest.raises(ValueError, match="data set 'yelp', test: 2 labels for 3 lines"):
        data.load("yelp", download=False)
    for part in ("train", "valid", "test"):
        put(unchecked, f"yelp.{part}.txt", ["3\ta good place", "0\ta bad place"])
    d = data.load("yelp", download=False)
    assert d.stand_in == "" and d.labels["train"].tolist() == [3, 0] and d.vocab.decode(d.train[0]) == "a good place"


def test_short_yelp_and_its_labelled_part(unchecked):
    for part in ("pool", "valid", "test"):
        put(unchecked, f"yelp_short.{part}.txt.gz", ["good food", "bad food", f"{part} <unk>"])
        put(unchecked, f"yelp_short.{part}.labels.gz", [1, 0, 1])
    put(unchecked, "yelp_short.vocab.txt.gz", ["<pad>", "<s>", "</s>", "<unk>", "food", "good", "bad"])
    d = data.load("yelp_short", download=False)
    assert len(d.vocab) == 7 and d.vocab.words[0] == "food" and d.info["unknown"]["train"] == dict(own=1, outside=1) and d.labels["train"].tolist() == [1, 0, 1]
    put(unchecked, "short_yelp.train.10000.txt", ["1\tgood", "0\tbad service", "1\tfood"])
    x, y = text.yelp_short_labelled(d.vocab, 2, download=False)
    assert x.tolist() == [[1, 5, 2, 0], [1, 6, 3, 2]] and y.tolist() == [1, 0]
    with pytest.raises(ValueError, match="n must be a whole number from 1 to 3, got 4"):
        text.yelp_short_labelled(d.vocab, 4, download=False)


def test_ptb_plain_and_packed_are_the_same(unchecked):
    lines = ["no it was n't <unk> N", "a b"]
    for part in ("train", "valid", "test"):
        put(unchecked, f"ptb.{part}.txt.gz", lines)
    packed = data.load("ptb", download=False)
    for part in ("train", "valid", "test"):
        put(unchecked, f"ptb.{part}.txt", [f" {line} " for line in lines])
    plain = data.load("ptb", download=False)
    assert packed.info["source"] != plain.info["source"] and torch.equal(packed.train, plain.train) and not plain.stand_in and not plain.labels


def test_limits_of_a_corpus(unchecked):
    for part in ("train", "valid", "test"):
        put(unchecked, f"ptb.{part}.txt", ["a b c", "a"])
    with pytest.raises(ValueError, match="data set 'ptb', train: 1 of 2 documents have more than max_len=2 words"):
        data.load("ptb", max_len=2)
    d, told = said(lambda: data.load("ptb", max_len=2, long="cut"))
    assert len(told) == 3 and d.stand_in == "documents of more than 2 words cut" and d.info["long_cut"]["train"] == 1
    with pytest.raises(ValueError, match="n_train must be a whole number from 1 to 2, got 3"):
        data.load("ptb", n_train=3)


def test_another_file_under_the_name_is_refused(cache, monkeypatch):
    monkeypatch.setenv("PCVAE_DATA", str(cache / "data"))
    for part in ("train", "valid", "test"):
        put(cache / "data", f"ptb.{part}.txt", ["a b c"])
    with pytest.raises(DataFileCorrupt, match="ptb.train.txt: damaged or another version: expected git 04d78dc9"):
        data.load("ptb", download=False)


@pytest.mark.parametrize("name", ["ptb", "yahoo", "yelp", "yelp_short"])
def test_nothing_at_hand(cache, name):
    with pytest.raises(DataFileMissing, match=rf"data set '{name}' needs .*; looked in .*download=False.*public copies: https://"):
        data.load(name, download=False)
    with pytest.raises(DataFileMissing, match="no network"):
        data.load(name)


# --- the real files, where they are

@pytest.mark.skipif(not at_hand(*text.YAHOO_GZ), reason="the small files of Yahoo are not at hand")
def test_yahoo_as_it_is():
    d = data.load("yahoo", download=False, split="small")
    assert [len(x) for x in (d.train, d.valid, d.test)] == [10_000, 5_000, 5_000] and len(d.vocab) == 20_000 and d.shape == (202,)
    assert d.info["words"]["train"] == 800_680 and d.info["unknown"]["train"] == dict(own=33_582, outside=0)
    assert all(y.bincount().tolist() == [len(y) // 10] * 10 for y in d.labels.values())
    assert d.lengths().min() == 22


@pytest.mark.skipif(not at_hand(*text.SHORT_GZ), reason="the small files of short Yelp are not at hand")
def test_short_yelp_as_it_is():
    d = data.load("yelp_short", download=False, split="small", n_train=5000, vocab_size=4000)
    assert len(d.vocab) <= 4004 and d.shape == (17,) and 0.55 < d.labels["train"].float().mean() < 0.65
    if at_hand(*text.SHORT_LABELLED_GZ):
        x, y = text.yelp_short_labelled(d.vocab, 100, download=False)
        assert len(x) == len(y) == 100 and 0 < y.sum() < 100


@pytest.mark.skipif(not at_hand(*text.PTB_GZ), reason="the files of the Penn Treebank are not at hand")
def test_ptb_as_it_is():
    d = data.load("ptb", download=False)
    assert (len(d.train), len(d.vocab), d.info["words"]) == (42_068, 10_002, dict(train=929_589, valid=73_760, test=82_430))
    assert len(torch.cat(d.plan(32, seeded(), 2)).unique()) == 42_068
