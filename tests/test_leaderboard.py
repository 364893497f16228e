"The leaderboard: who stands in it, under one protocol; ranks and fronts against brute force; tables of any subset of rows."
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from pcvae import leaderboard as lb
from pcvae.method import Method
from pcvae.studies import get_study, write_row, row_path


def study(arena="simplex", scale="small"): return get_study(lb.BOARD, arena, scale)


def filled(s, share=1., seed=0):
    "The frame of a study as if a random share of its runs were done."
    rng, f = np.random.default_rng(seed), s.frame("nowhere")
    done = rng.random(len(f)) < share
    f.loc[done, "status"] = "done"
    for k, scale in {"nll": 40, "nll_matched": 40, "mi": 3, "mi_ceiling": 7, "kl_fed": 4, "rec": 36, "au": 8, "gap": 5, "cpu_seconds": 2}.items():
        f[k] = np.where(done, scale + (rng.random(len(f)) if k != "mi_ceiling" else 0), np.nan)
    return f.assign(valid=lb.valid_nll(f))


@pytest.mark.parametrize("arena", lb.OWN)
def test_every_registered_method_stands_in_the_own_arenas(arena):
    missing = lb.unlisted(study(arena))
    assert not missing, f"{', '.join(missing)}: registered, but in no entry of the leaderboard's arena {arena}; add an entry to `alone` in nbs/leaderboard.ipynb, and its family to FAMILIES"


def test_a_new_method_is_noticed():
    class Newcomer(Method): pass
    try:
        assert lb.unlisted(study()) == []              # one of a user is not asked for
        Newcomer.__module__ = "pcvae.newcomer"
        assert lb.unlisted(study()) == ["Newcomer"]
    finally: del Method.registry["Newcomer"]


@pytest.mark.parametrize("arena, scale", list(itertools.product(lb.OWN, ("quick", "small", "full"))))
def test_one_protocol(arena, scale):
    s = study(arena, scale)
    one = lambda f: len({json.dumps(f(r), sort_keys=True) for r in s.runs})
    assert one(lambda r: r.data) == one(lambda r: r.recipe) == one(lambda r: r.evaluation) == 1
    assert len({tuple(r.seed for r in runs) for runs in s.rows.values()}) == 1
    others = {k for k, runs in s.rows.items() if runs[0].model != s.rows["VAE"][0].model}
    assert others == set(lb.NETWORKS) & set(s.rows)
    assert len({runs[0].train_id for runs in s.rows.values()}) == len(s.rows), "two entries are the same run"


def test_families_know_every_entry():
    for arena in lb.OWN:
        for runs in study(arena).rows.values(): assert all(n in lb.FAMILIES for n in lb.parts(runs[0])) and lb.family(runs[0]) in lb.KINDS


def test_decisions_are_antisymmetric_and_blind_to_a_common_shift():
    rng = np.random.default_rng(0)
    v = pd.DataFrame(rng.normal(size=(5, 6)) * 0.3 + np.arange(6))
    d = lb.decisions(v)
    assert (d == -d.T).to_numpy().all() and (np.diag(d) == 0).all() and d.to_numpy().any()
    shifted = v.add(rng.normal(size=5) * 50, axis=0)                    # a hard seed is hard for all
    assert lb.decisions(shifted).equals(d)
    scaled = lb.decisions(v * 1e-3)
    assert not scaled.to_numpy().any()                                  # less than the tables show


def test_a_missing_seed_is_left_out_of_its_pairs():
    rng = np.random.default_rng(1)
    v = pd.DataFrame(rng.normal(size=(5, 3)) * 0.1 + [0, 1, 2])
    holed = v.copy(); holed.iloc[1, 0] = np.nan
    d = lb.decisions(holed)
    assert d.loc[1, 2] == lb.decisions(v).loc[1, 2]
    assert d.loc[0, 1] == lb.decisions(v.drop(1)).loc[0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_ranks(seed):
    rng = np.random.default_rng(seed)
    v = pd.DataFrame(rng.normal(size=(5, 7)) * 0.5 + rng.normal(size=7) * 2, columns=list("abcdefg"))
    r, d = lb.rank_intervals(v), lb.decisions(v, 1 - 0.05 / 6)
    for i in v:
        better, worse = sum(d.loc[j, i] == -1 for j in v), sum(d.loc[i, j] == -1 for j in v)
        assert (r.low[i], r.high[i]) == (1 + better, 7 - worse)
        assert r.low[i] <= r["rank"][i] <= r.high[i]
        assert r["rank"][i] == 1 + sum(v[j].mean() < v[i].mean() for j in v)
    best = r["mean"].idxmin()
    assert r.tied[best] and all(r.tied[i] == (d.loc[i, best] == 0) for i in v)
    assert lb.rank_intervals(v[list("gfedcba")]).loc[list(v)].equals(r)


def test_more_seeds_never_hurt_on_average():
    rng = np.random.default_rng(2)
    width = {n: np.mean([(r := lb.rank_intervals(pd.DataFrame(rng.normal(0, 0.4, (n, 6)) + np.arange(6))))["high"].mean() - r["low"].mean() for _ in range(20)]) for n in (2, 5, 10)}
    assert width[2] > width[5] > width[10]


@pytest.mark.parametrize("seed", range(5))
def test_front_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    c, g = rng.integers(0, 6, 40), rng.integers(0, 6, 40)               # with ties
    beats = lambda j, i: c[j] <= c[i] and g[j] >= g[i] and (c[j] < c[i] or g[j] > g[i])
    assert lb.pareto_front(c, g).tolist() == [not any(beats(j, i) for j in range(40)) for i in range(40)]


@pytest.mark.parametrize("share", (0., 0.05, 0.5, 1.))
def test_tables_of_any_subset_of_rows(share):
    s = study()
    f = filled(s, share, 3)
    table = lb.standings(s, f)
    assert sorted(table.index) == sorted(s.rows)
    done = f[f.status == "done"].label.unique()
    assert set(table.index[table["rank"] != ""]) == set(done) - {"learned variance"}
    assert (table.loc[[k for k in s.rows if k not in done], "valid NLL"] == "–").all()
    assert len(lb.drawn(s, f)) == len(set(done) - {"learned variance"})
    assert lb.overall({"here": (s, f), "empty": (s, filled(s, 0.))}).empty == (len(set(done) - {"learned variance"}) < 2)


def test_one_seed_gets_no_interval_and_says_so():
    s = study()
    f = filled(s)
    table = lb.standings(s, f[f.seed == 0])
    assert not table["rank"].str.contains(r"\(").any() and lb.ONE in table.attrs["notes"] and lb.INTERVALS not in table.attrs["notes"]
    table = lb.standings(s, f)
    assert table["rank"][table["rank"] != ""].str.contains(r"\(").all() and lb.INTERVALS in table.attrs["notes"]


def test_a_diverged_run_has_no_rank():
    s = study()
    f = filled(s)
    f.loc[f.label == "MAE 1", ["status", "valid", "nll_matched", "mi", "kl_fed"]] = ["diverged", *[np.nan] * 4]
    assert lb.standings(s, f).loc["MAE 1", ["rank", "valid NLL"]].tolist() == ["", "diverged"]


def test_shares_of_ranks():
    s = study()
    f = filled(s)
    for rank, label in enumerate(k for k in s.rows if k != "learned variance"): f.loc[f.label == label, "valid"] = rank + 0.1 * f.seed
    shares = lb.shares(s, f)
    assert shares.share["VAE"] == 0 and shares.share.max() == 1 and shares.what["warm-up 2/3 + aggressive"] == "Aggressive"
    assert np.isnan(shares.verdict["VAE"]) and (shares.verdict.drop("VAE") == 1).all()
    whole = lb.overall({"a": (s, f), "b": (s, f)})
    assert whole.loc["plain VAE", "a"] == f"1 of {len(shares)}" and (whole.arenas == 2).all() and whole["mean share"].between(0, 1).all()
    assert whole.loc["LinearWarmup", "worse"] == 4                      # two entries in two arenas


def test_borrowed_rows_are_those_of_the_papers(tmp_path):
    s = get_study("critics", "table2", "quick")
    run = s.rows["VAE"][0]
    write_row(row_path(run, tmp_path, "critics"), {"format": 1, "id": run.id, "run": run.to_dict(), "status": "done", "metrics": {"nll": 5., "nll_matched": 4., "mi": 1.}, "history": [], "env": {}})
    study, frame = lb.arena_rows("Omniglot, CNN, squared error", "quick", results=tmp_path)
    assert study.paper == "critics" and frame.set_index("label").valid["VAE"] == 4.
    assert frame[frame.status == "missing"].valid.isna().all()
    with pytest.raises(ValueError, match="arena at quick scale"): lb.arena_rows("short Yelp", "quick", results=tmp_path)


@pytest.mark.parametrize("scale", ("quick", "small", "full"))
def test_pooling_encoders_stand_beside_the_borrowed_text_rows(scale, tmp_path):
    for arena, table in lb.ADDED.items():
        if arena not in lb.arenas(scale): continue
        found, frame = lb.arena_rows(arena, scale, results=tmp_path)
        ours = study(table, scale)
        assert set(ours.rows) < set(found.rows) and set(found.rows) == set(frame.label) and set(frame.columns) >= {"seed", "valid", "status"}
        for label, runs in ours.rows.items():
            assert lb.parts(runs[0]) == ("pooling encoder",) and lb.family(runs[0]) == "network" and [r.seed for r in runs] == [r.seed for r in found.rows["VAE"]][:len(runs)]
            assert lb.parts(found.rows["VAE"][0]) == ("LinearWarmup",)
    assert not study("pooling_yelp", "quick").rows


def test_smoke(tmp_path):
    command = [sys.executable, "-m", "pcvae.cli", "reproduce", "leaderboard", "--scale", "smoke", "--device", "cpu", "--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = sorted(tmp_path.rglob("results/leaderboard/**/*.json"))
    assert len(rows) == 14 and all(json.loads(p.read_text())["status"] == "done" for p in rows)
    made = {p.stem for p in tmp_path.rglob("figures/leaderboard/**/*.csv")}
    assert {"simplex", "digits", "overall", "omniglot_cnn"} <= made and {p.stem for p in tmp_path.rglob("figures/**/*.png")} == {"simplex", "digits", "synthetic"}
