"The audit on both sides of each of its limits, and the search in the latent space step by step."
import json
import math

import pandas as pd
import pytest
import torch

from pcvae.metrics.audit import _decimals, _leaves, audit, check_copies, from_frame, from_row, guess_size
from pcvae.metrics.latent import Search, adam_step, check_dims, check_search, latent_search, picture_sheet, rounded, squared_error, starting_codes, traverse, walk
from pcvae.metrics.likelihood import LinearGaussian


def gen(seed=0): return torch.Generator().manual_seed(seed)


# --- the audit ---------------------------------------------------------------------------------------------------------
def own(seed=0, latent_dim=8, methods=(), **metrics):
    good = dict(nll=40. + seed / 7, nll_se=0.1, neg_elbo=41., rec=27., kl=14., kl_fed=14., mi=3.5, mi_ceiling=12., mi_upper=13.8, au=5.)
    run = {"data": {"name": "simplex"}, "model": {"name": "mlp", "latent_dim": latent_dim}, "methods": list(methods), "seed": seed}
    return {"id": f"id{seed}", "run": run, "status": "done", "metrics": good | metrics}


def found(**metrics): return [(r.check, r.verdict) for r in audit([own(**metrics)]).frame.itertuples()]


@pytest.mark.parametrize("inside, outside, check, verdict", [
    (dict(mi=-0.09, au=0.), dict(mi=-0.11, au=0.), "MI >= 0", "impossible"),
    (dict(mi=11.49), dict(mi=11.51), "MI < ln N", "saturated"),
    (dict(mi=6.15, mi_upper=6.06), dict(mi=6.15, mi_upper=6.04), "MI <= upper bound", "impossible"),
    (dict(mi=5.01, kl=5., kl_fed=5., rec=36.), dict(mi=5.04, kl=5., kl_fed=5., rec=36.), "MI <= KL", "impossible"),
    (dict(nll=41.39), dict(nll=41.41), "NLL <= -ELBO", "impossible"),
    (dict(nll=41.01, nll_se=0.), dict(nll=41.03, nll_se=0.), "NLL <= -ELBO", "impossible"),
    (dict(rec=27.019), dict(rec=27.021), "rec + KL = -ELBO", "impossible"),
    (dict(rec=985.99, neg_elbo=1000.08), dict(rec=985.99, neg_elbo=1000.1), "rec + KL = -ELBO", "impossible"),
    (dict(rec=-1014.01, neg_elbo=-1000.08), dict(rec=-1014.01, neg_elbo=-1000.12, nll=-1001.), "rec + KL = -ELBO", "impossible"),
    (dict(kl=-0.019, kl_fed=-0.019, mi=-0.01, au=0., rec=41.019), dict(kl=-0.021, kl_fed=-0.021, mi=-0.01, au=0., rec=41.021), "KL >= 0", "impossible"),
    (dict(au=8.), dict(au=9.), "0 <= AU <= d", "impossible"), (dict(au=0.), dict(au=-1.), "0 <= AU <= d", "impossible"),
    (dict(mi=0.025), dict(mi=0.0248), "AU against MI", "suspicious"),       # five units: 2.5 ln 1.01 = 0.02488
    (dict(density=0., coverage=0.5), dict(density=-0.1, coverage=0.5), "density >= 0", "impossible"),
    (dict(coverage=1.), dict(coverage=1.01), "0 <= coverage <= 1", "impossible"), (dict(coverage=0.), dict(coverage=-0.01), "0 <= coverage <= 1", "impossible"),
    (dict(precision=1.), dict(precision=1.01), "0 <= precision <= 1", "impossible"), (dict(recall=0.), dict(recall=-0.01), "0 <= recall <= 1", "impossible")])
def test_both_sides_of_each_limit(inside, outside, check, verdict):
    inside, outside = ({"nll": -1001.} | v if v.get("neg_elbo", 0) < 0 else v for v in (inside, outside))
    assert found(**inside) == [] and found(**outside) == [(check, verdict)]


def test_noise_of_the_information_widens_its_limits():
    "Four standard deviations of the mean of |eps|^2 / 2: 4 sqrt(d / 2N). At d = 32, N = 1000: 0.506."
    at = lambda mi: found(mi=mi, mi_ceiling=math.log(1000), mi_upper=99., latent_dim=32, kl=5., kl_fed=5., rec=36.)
    assert at(5.5) == [] and at(5.51) == [("MI <= KL", "impossible")]
    over = lambda mi: found(mi=mi, mi_ceiling=math.log(1000), mi_upper=99., latent_dim=32)
    assert over(6.907 + 0.5) == [("MI < ln N", "saturated")] and over(6.908 + 0.51) == [("MI <= ln N", "impossible")]


@pytest.mark.parametrize("metrics, value, bound", [
    (dict(rec=20.), 34., 41.), (dict(coverage=1.5), 1.5, 1.), (dict(precision=-1.), -1., 1.), (dict(density=-1., coverage=0.5), -1., 0.), (dict(mi=-1., au=0.), -1., 0.), (dict(mi=11.8), 11.8, 12.),
    (dict(mi=9., mi_upper=8.), 9., 8.), (dict(mi=13., mi_ceiling=20., kl=11., kl_fed=11., rec=30.), 13., 11.), (dict(nll=45.), 45., 41.), (dict(au=9.), 9., 8.), (dict(mi=0.01), 5., 0.01)])
def test_findings_show_both_numbers(metrics, value, bound):
    found, = audit([own(**metrics)]).frame.itertuples()
    assert (found.value, found.bound) == (pytest.approx(value), pytest.approx(bound))


def test_the_ceiling_is_allowed_a_tenth_of_a_nat():
    assert found(mi=12.09, mi_upper=99.) == [("MI < ln N", "saturated")] and found(mi=12.11, mi_upper=99.) == [("MI <= ln N", "impossible")]


def table(**columns): return pd.DataFrame({"model": [f"m{i}" for i in range(len(next(iter(columns.values()))))], **columns})
def checks(t, **kw): return [(r.row, r.check, r.verdict) for r in audit(t, **kw).frame.itertuples()]


def test_limits_of_printed_tables():
    assert checks(table(MI=["-0.01", "0.02"])) == [("m0", "MI >= 0", "suspicious")] and checks(table(MI=["-0.0", "0.2"])) == []
    assert checks(table(MI=["0.15", "2.00"], AU=["32", "32"])) == [("m0", "AU against MI", "suspicious")] and checks(table(MI=["0.16", "2.00"], AU=["32", "32"])) == []
    long = lambda std: pd.DataFrame([("a", "MI", "0.15", std), ("a", "AU", "32", "0"), ("b", "MI", "2.00", "0")], columns=["model", "metric", "mean", "std"])
    assert checks(long("0.001"))[:1] == [("a", "AU against MI", "suspicious")] and not checks(long("0.02"))
    scores = lambda density, coverage, mi: bool(checks(table(density=[density], coverage=[coverage], MI=[mi])))
    assert scores("1.00", "0.97", "0.03") and scores("1.04", "0.983", "0.09") and scores("0.96", "0.955", "-0.00")
    assert not scores("1.06", "0.97", "0.03") and not scores("0.94", "0.97", "0.03") and not scores("1.00", "0.985", "0.03") and not scores("1.00", "0.953", "0.03") and not scores("1.00", "0.97", "0.11")


def test_zero_spread_counts_from_three_digits_on():
    spread = lambda mean, metric="NLL": checks(pd.DataFrame([("a", metric, mean, "0.0")], columns=["model", "metric", "mean", "std"]))
    assert spread("100.0") == [("a", "std of nll > 0", "suspicious")] and spread("99.9") == [] and spread("-100.0") == [("a", "std of nll > 0", "suspicious")]
    assert spread("3200.0", "AU") == []


@pytest.mark.parametrize("top, n", [(3.42, 32), (3.51, 32), (3.52, None), (3.72, 50), (3.961, 50), (3.963, 64), (4.2, 64), (6.74, 1024), (6.72, None), (9.2, 10_000), (9.0, None), (9.27, None), (3.26, None), (3.28, 32)])
def test_guess_of_the_size_of_a_pool(top, n): assert guess_size([0., top]) == n and guess_size([]) is None


def test_saturation_without_a_given_ceiling():
    t = table(MI=["3.87", "3.42", "3.41"])
    assert checks(t) == [("m0", "MI < ln N", "saturated"), ("m1", "MI < ln N", "saturated")]


def test_gain_on_a_language_model():
    t = lambda nll: pd.DataFrame({"model": ["LSTM-LM", "VAE"], "NLL": ["328.0", nll], "KL": ["", "6.7"], "MI": ["", "1.0"]})
    assert checks(t("321.2")) == [] and checks(t("321.1")) == [("VAE", "gain on a language model <= KL", "suspicious")]
    other = t("321.1").assign(dataset=["Yahoo", "Yelp"])
    assert checks(other) == []                                      # not the same data


def test_copies_need_three_numbers():
    assert checks(table(NLL=["1.0", "1.0"], KL=["2.0", "2.0"])) == [] and checks(table(NLL=["1.0", "1.0"], KL=["2.0", "2.0"], AU=["3", "3"])) == [("m1", "rows differ", "suspicious")]
    three = [own(0), {**own(0), "id": "a", "run": own(0)["run"] | {"recipe": {"lr": 1}}}, {**own(0), "id": "b", "run": own(0)["run"] | {"recipe": {"lr": 2}}}]
    assert [r.check for r in audit(three).frame.itertuples()] == ["rows differ"] * 2


def test_seeds_need_to_differ():
    assert [r.check for r in audit([own(0), {**own(1), "metrics": own(1)["metrics"] | {"nll": 40., "mi": 3.1}}]).frame.itertuples()] == ["std of nll > 0"]
    assert not audit([own(0), own(1)])


@pytest.mark.parametrize("text, n", [("1.230", 3), ("5", 0), ("1e3", 0), ("-0.5", 1), ("nan", 0), ("1e-12", 9), (0.25, 2)])
def test_digits_of_a_printed_number(text, n): assert _decimals(text) == n


def test_forms():
    r, = from_frame(pd.DataFrame({"model": ["a"], "params": ["0.7;1"], "annealed": ["na"], "KL": ["1.50"], "AU": ["32"]}), "t")
    assert (r.source, r.row, r.values, r.units, r.stds) == ("t", "a, params 0.7;1", {"kl": 1.5, "au": 32.}, {"kl": 0.01, "au": 1.}, {})
    two = from_frame(pd.DataFrame({"model": ["a", "b"], "KL": ["1.5", "2.25"]}), "t")
    assert [v.units for v in two] == [{"kl": 0.01}] * 2             # trailing zeros may have been lost
    own_record, = from_row(own(3, ap_mi=9., note="text"), "critics/full")
    assert own_record.row == "VAE on simplex, seed 3, id3" and "ap_mi" not in own_record.values and "note" not in own_record.values and set(own_record.units.values()) == {1e-9}
    assert own_record.about["latent_dim"] == 8 and own_record.about["seed"] == 3
    assert _leaves({"a": {"b": [1, {"c": 2}]}, "d": None}) == {"a.b.0": 1, "a.b.1.c": 2, "d": None}


def test_result_counts_and_prints():
    empty, full = audit([own(0)]), audit([own(0, mi=11.8), {**own(1), "status": "diverged"}])
    assert (len(empty), bool(empty), empty.checked) == (0, False, 1) and (len(full), bool(full), full.checked) == (1, True, 1)
    assert repr(full).splitlines()[1].startswith("saturated   rows: VAE on simplex, seed 0, id0: MI < ln N (11.8 against 12): within half a nat")
    assert "<td" in full._repr_html_() and "table" not in empty._repr_html_()


def test_tables_with_columns_of_no_metric():
    t = table(NLL=["1.0", "2.0"]).assign(remark=["text", "more"], accuracy=["0.5", "0.6"])
    assert [set(r.values) & {"nll", "remark"} for r in from_frame(t, "t")] == [{"nll"}] * 2
    assert [r.values["nll"] for r in from_frame(table(NLL=["1.0", "2.0"]).assign(n_labeled=["100", "500"]), "t")] == [1., 2.]
    long = pd.DataFrame([("a", "MI", "1.0", "0.1"), ("a", "surprise", "3.0", "0.2")], columns=["model", "metric", "mean", "std"])
    r, = from_frame(long, "t")
    assert (r.values, r.stds) == ({"mi": 1., "surprise": 3.}, {"mi": 0.1, "surprise": 0.2})


def test_one_active_unit_is_held_against_the_information(): assert found(au=1., mi=0.0, mi_upper=13.) == [("AU against MI", "suspicious")] and found(au=0., mi=0., mi_upper=13.) == []


def test_order_of_settings_does_not_tell_runs_apart():
    turned = lambda row: {**row, "run": {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in reversed(row["run"].items())}}
    other = turned(own(1)) | {"metrics": own(1)["metrics"] | {"nll": 40., "mi": 3.1}}
    same, = audit([own(0), other]).frame.itertuples()
    assert (same.check, same.value, same.row) == ("std of nll > 0", 0., "VAE on simplex, seed 0, id0")
    again = turned(own(0)) | {"id": "evaluated twice"}
    assert not audit([own(0), again])


def test_a_copy_of_a_table_in_our_rows():
    ours, = from_row(own(0), "s")
    theirs, = from_frame(pd.DataFrame({"model": ["a"], **{k: [str(v)] for k, v in own(0)["metrics"].items()}}), "s")
    theirs.values = dict(ours.values)
    assert [why for *_, why in check_copies([ours, theirs])] == [f"all 10 numbers equal those of {ours.row}: copied, or not two different models"]


def test_a_negative_divergence_is_shown_against_zero():
    found, = [r for r in audit([own(kl=-1., kl_fed=-1., mi=0., au=0., rec=42.)]).frame.itertuples() if r.check == "KL >= 0"]
    assert (found.value, found.bound) == (-1., 0.)


# --- the search --------------------------------------------------------------------------------------------------------
def linear(dtype=torch.double):
    W = torch.linalg.qr(torch.randn(5, 2, generator=gen(1), dtype=dtype))[0] * torch.tensor([2., 1.], dtype=dtype)
    return LinearGaussian(W, torch.ones(5, dtype=dtype), 0.5)


def test_adam_is_adam():
    z = torch.randn(2, 3, 2, generator=gen(1), dtype=torch.double); ours, first, second = z.clone(), torch.zeros_like(z), torch.zeros_like(z)
    theirs = z.clone().requires_grad_(); optimiser = torch.optim.Adam([theirs], lr=0.03)
    for t in range(1, 6):
        slope = torch.randn(z.shape, generator=gen(t), dtype=torch.double)
        theirs.grad = slope.clone(); optimiser.step()
        adam_step(ours, slope, first, second, t, 0.03)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-9)


def test_squared_error_and_its_slope():
    m = linear(); z = torch.randn(3, 4, 2, generator=gen(2), dtype=torch.double); x = m.sample(4, gen(3))
    for batch in (512, 5, 1):
        e, slope = squared_error(m, z, x, x, batch)
        r = z @ m.W.T + m.c - x
        torch.testing.assert_close(e, (r ** 2).sum(-1)); torch.testing.assert_close(slope, 2 * r @ m.W)


def test_what_a_search_notes():
    "Two starts and two thresholds: a loss that falls by 1, 0.3, 0.05, and one that rises at once."
    s = Search.empty(torch.zeros(2, 3, 1), (0.5, 0.1), 10); both = torch.tensor([0, 1])
    code = lambda v: torch.full((2, 3, 1), float(v))
    assert s.note(both, torch.tensor([9., 4.]), code(0), 0, False).tolist() == [True, True] and not s.reached.any()      # nothing to compare with
    assert s.note(both, torch.tensor([8., 4.5]), code(1), 10, False).tolist() == [True, False]
    assert s.note(both[:1], torch.tensor([7.7]), code(2)[:1], 20, False).tolist() == [True]
    assert s.note(both[:1], torch.tensor([7.65]), code(3)[:1], 30, False).tolist() == [False]
    assert s.reached.all() and s.losses.tolist() == [[pytest.approx(7.7), pytest.approx(7.65)], [4.5, 4.5]] and s.iterations.tolist() == [[20, 30], [10, 10]]
    assert s.codes[:, :, 0, 0].tolist() == [[2., 3.], [1., 1.]] and s.curve == [pytest.approx([9., 8., 7.7, 7.65]), [4., 4.5]] and s.first.tolist() == [9., 4.]
    assert s.gap().tolist() == pytest.approx([3.2, 3.15]) and s.distance().tolist() == [1., 4.]
    exact = Search.empty(torch.zeros(1, 1, 1), (0.5,), 1)
    for loss in (2., 1.5): exact.note(torch.tensor([0]), torch.tensor([loss]), torch.zeros(1, 1, 1), 0, False)
    assert not exact.reached.any()                                  # a fall by the threshold exactly is not below it
    end = Search.empty(torch.zeros(1, 1, 1), (0.5, 0.), 1)
    end.note(torch.tensor([0]), torch.tensor([5.]), torch.ones(1, 1, 1), 0, False)
    assert end.note(torch.tensor([0]), torch.tensor([3.]), torch.ones(1, 1, 1), 7, True).tolist() == [False]
    assert not end.reached.any() and end.losses.tolist() == [[3., 3.]] and end.iterations.tolist() == [[7, 7]] and end.codes.tolist() == [[[[1.]], [[1.]]]]
    d = s.to_dict()
    assert d["thresholds"] == [0.5, 0.1] and d["every"] == 10 and d["iterations"] == [[20, 30], [10, 10]] and d["distance"] == [1., 4.] and d["curve"][1] == [4., 4.5] and json.dumps(d)
    assert end.to_dict()["distance"] is None
    with pytest.raises(ValueError, match="at least 2"): end.distance()


def test_distance_is_a_mean_over_pairs_and_items():
    s = Search.empty(torch.zeros(3, 2, 2), (0.,), 1)
    s.codes = torch.randn(3, 1, 2, 2, generator=gen(1))
    c = s.codes[:, 0]
    expected = sum(((c[i] - c[j]) ** 2).sum(-1).mean() for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    assert float(s.distance()[0]) == pytest.approx(float(expected))


def test_codes_to_start_from():
    m = linear(); x = m.sample(4, gen(1))
    torch.testing.assert_close(starting_codes(m, x, generator=gen(2)), torch.randn(5, 4, 2, generator=gen(2), dtype=torch.double))
    torch.testing.assert_close(starting_codes(m, x, "encoder"), m.encode(x).mean[None])
    given = torch.randn(3, 4, 2, generator=gen(3)); got = starting_codes(m, x, given)
    assert got.dtype == torch.double and torch.equal(got, given.double()) and starting_codes(m, x, starts=1, generator=gen()).shape == (1, 4, 2)
    own = given.double(); taken = starting_codes(m, x, own); taken += 1
    assert torch.equal(own, given.double())                         # a copy
    for bad, match in ((given[0], r"\[S, N, D\]"), (given[:0], "got"), (given[:, :2], "N=4"), (given / 0, "not finite"), ("prio", "Did you mean 'prior'")):
        with pytest.raises(ValueError, match=match): starting_codes(m, x, bad)
    with pytest.raises(ValueError, match="at least 1, got 0"): starting_codes(m, x, starts=0)


@pytest.mark.parametrize("kw, match", [(dict(x=[]), "x is empty"), (dict(thresholds=()), "must fall"), (dict(thresholds=(0.1, 0.2)), "must fall"), (dict(thresholds=(0.1, 0.1)), "must fall"), (dict(thresholds=(-1.,)), "must fall"), (dict(thresholds=(0.1, -0.1)), "must fall"),
    (dict(every=0), "multiple of every"), (dict(every=20), "multiple of every"), (dict(every=4), "multiple of every"), (dict(lr=0.), "must be positive"), (dict(lr=float("nan")), "must be positive"), (dict(context="dat"), "Did you mean 'data'")])
def test_searches_that_make_no_sense(kw, match):
    good = dict(x=[1], thresholds=(0.2, 0.), every=1, max_iterations=10, lr=1e-9, context="empty")
    check_search(**good); check_search(**good | dict(every=10)); check_search(**good | dict(every=5, thresholds=(0.,)))
    with pytest.raises(ValueError, match=match): check_search(**good | kw)


def test_a_search_looks_when_it_says():
    m = linear(); x = m.sample(3, gen(1))
    s = latent_search(m, x, starts=2, lr=1e-6, every=5, thresholds=(0.,), max_iterations=10, generator=gen(2))
    assert s.iterations.tolist() == [[10], [10]] and [len(c) for c in s.curve] == [3, 3] and s.every == 5 and not s.reached.any()
    z = torch.randn(2, 3, 2, generator=gen(2), dtype=torch.double)
    assert s.first.tolist() == pytest.approx(squared_error(m, z, x, x)[0].mean(1).tolist())
    expected, first, second = z.clone(), torch.zeros_like(z), torch.zeros_like(z)
    for t in range(1, 11): adam_step(expected, squared_error(m, expected, x, x)[1] / 3, first, second, t, 1e-6)
    torch.testing.assert_close(s.codes[:, 0], expected, rtol=0, atol=1e-12)


def test_walks_by_hand_and_their_limits():
    m = linear(); m.generate = lambda z, draw=None: m.decode(z).mean + 0 * draw(z.shape[:1] + (1,))
    items = traverse(m, 1, -2., 3., 6, gen(1)); z = torch.zeros(6, 2, dtype=torch.double); z[:, 1] = torch.linspace(-2, 3, 6)
    torch.testing.assert_close(items, m.decode(z).mean)
    codes, _ = walk(m, 5., 3, gen(2)); end = torch.randn(2, generator=gen(2), dtype=torch.double)
    torch.testing.assert_close(codes, torch.tensor([0., 0.5, 1.]).double()[:, None] * 5 * end / end.norm())
    assert traverse(m, 0, 0., 1., 2, gen(1)).shape == (2, 5) and walk(m, 1e-9, 2, gen(1))[0].shape == (2, 2)
    for kw, match in ((dict(n=1), "at least 2"), (dict(low=1., high=1.), "below high"), (dict(dim=2), "numbered 0 to 1"), (dict(dim=-1), "does not exist"), (dict(dim=0.5), "does not exist")):
        with pytest.raises(ValueError, match=match): traverse(m, **dict(dim=0) | kw)
    for kw, match in ((dict(n=1), "at least 2"), (dict(distance=0.), "positive"), (dict(distance=math.inf), "positive"), (dict(fixed=[2]), "does not exist")):
        with pytest.raises(ValueError, match=match): walk(m, **kw)
    assert check_dims([0, 1.0], 2) == [0, 1]


def test_sheets():
    x = torch.arange(5.)[:, None, None, None].expand(5, 1, 2, 3) + 1
    sheet = picture_sheet(x, 2, -1.)
    assert sheet.shape == (3 * 3 - 1, 2 * 4 - 1) and sheet[0, 0] == 1 and sheet[0, 4] == 2 and sheet[3, 0] == 3 and sheet[7, 2] == 5 and (sheet[6:, 4:] == -1).all() and (sheet[2] == -1).all() and (sheet[:, 3] == -1).all()
    assert picture_sheet(x, 1).shape == (14, 3) and picture_sheet(x).shape == (2, 79) and float(picture_sheet(x)[0, 3]) == 0.5 and picture_sheet(x[:1]).shape == (2, 79)
    for bad in (x[:0], x[:, 0], x.expand(5, 2, 2, 3)):
        with pytest.raises(ValueError, match=r"\[n, 1, H, W\]"): picture_sheet(bad)
    with pytest.raises(ValueError, match="at least 1"): picture_sheet(x, 0)


def test_six_digits(): assert rounded(torch.tensor([[1.23456789], [2e9 / 3]], dtype=torch.double)) == [[1.23457], [666667000.0]] and rounded(torch.tensor([3])) == [3]
