"""Tables beside the published ones, their files, and figures that can be drawn again from their CSV."""
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("agg")
from pcvae.metrics.audit import published_tables
from pcvae.reports import (KEYS, activities, beside, cell, cells, curves, deviations, pictures, plot_activity, plot_curves, plot_pictures, plot_sheets,
                           plot_tradeoff, printed, provenance, published, published_names, read_data, save_figure, save_table, sheet, sheets, show, summary,
                           to_markdown, watched)
from pcvae.studies import FORMAT, Recipe, Run, Study, pack_pictures, row_path, write_row

COLUMNS = {"NLL": ("ap_nll", "nll"), "MI": ("ap_mi", "mi")}


def line(label, seed, status="done", **metrics): return {"label": label, "seed": seed, "id": f"{label}{seed}", "status": status, "error": "", **metrics}


@pytest.fixture
def frame():
    vae = [line("VAE", s, nll=150. + s, ap_nll=144. + 6 * s, mi=6. + s, ap_mi=5.4, mi_ceiling=9.9, device="cpu", device_name="x86_64", commit="abc") for s in range(5)]
    critic = [line("Self critic", 0, nll=160., ap_nll=159., mi=9.6, ap_mi=6.8, mi_ceiling=9.9, device="cpu", device_name="x86_64", commit="abc")]
    return pd.DataFrame(vae + critic + [line("Self critic", 1, "diverged"), line("Self critic", 2, "missing"), line("Neural critic", 0, "diverged")])


def test_every_published_table_can_be_read():
    names = [f"{p}_{t}" for p, ts in published_names().items() for t in ts]
    assert names == [p.stem for p in published_tables()]
    assert all(len(published(*n.rsplit("_", 1))) for n in names)


@pytest.mark.parametrize("paper, table, message", [("scale_vea", "table1", "Did you mean 'scale_vae'"), ("critics", "table9", "Known: fig1, table1")])
def test_unknown_published_table(paper, table, message):
    with pytest.raises(ValueError, match=message): published(paper, table)


PUBLISHED = [(p, t) for p, ts in published_names().items() for t in ts]


@pytest.mark.parametrize("paper, table", PUBLISHED)
def test_every_published_number_is_in_the_long_form_once(paper, table):
    raw, long = published(paper, table), printed(paper, table)
    assert list(long.columns[:4]) == ["model", "metric", "mean", "std"] and long["model"].notna().all() and long["mean"].notna().all()
    values = raw[[c for c in raw if c not in (*KEYS, "std")]].to_numpy(float).ravel()
    assert sorted(long["mean"]) == sorted(values[~np.isnan(values)])


@pytest.mark.parametrize("paper, table", [k for k in PUBLISHED if k != ("critics", "fig1")])
def test_a_label_and_metric_of_one_data_set_name_one_number(paper, table):
    long = printed(paper, table)
    assert not long.duplicated(["model", "metric", *({"dataset"} & set(long))]).any()


@pytest.mark.parametrize("paper, table, where, model, metric, value", [
    ("ne_vae", "table1", {}, "Aggr. no anneal", "KL", 2.38), ("ne_vae", "table1", {}, "VAE", "neg_elbo", 88.91), ("ne_vae", "table1", {}, "VAE no anneal", "AU", 2),
    ("ne_vae", "table1", {}, "beta-VAE(0.5)", "KL", 46.37), ("ne_vae", "table1", {}, "NE-VAE lp(c=-0.1)", "MI", 1.21), ("ne_vae", "table1", {}, "NE-VAE se", "MI", 2.39),
    ("ne_vae", "table2", {}, "NE-VAE se, 64", "AU", 55), ("ne_vae", "lso", {}, "VAE", "iterations_at_threshold_0", 26900),
    ("critics", "table1", {}, "VAE", "NLL", 144.09), ("critics", "fig1", {"epoch": 14}, "Self critic", "MI", 4.039),
    ("scale_vae", "table1", {"dataset": "Yelp"}, "Scale-VAE(1.1, 7) no anneal", "KL", 8.1), ("scale_vae", "table1", {"dataset": "Yahoo"}, "Free-Bits(0.1)", "MI", 2.4),
    ("scale_vae", "table2", {"dataset": "Yelp"}, "BN-VAE", "ratio", 0.95), ("scale_vae", "table3", {}, "Scale-VAE(0.7, 3)", "NLL", 324.6),
    ("scale_vae", "table4", {}, "DU-VAE(0.5, 0.8) quoted", "accuracy, 100 labels", 88.9), ("scale_vae", "table5", {}, "Scale-VAE(1.1, 1)", "PPL", 274.93)])
def test_numbers_of_the_long_form(paper, table, where, model, metric, value):
    p = printed(paper, table, **where)
    assert p[(p["model"] == model) & (p["metric"] == metric)]["mean"].tolist() == [value]


def test_columns_that_pick_lines():
    assert printed("scale_vae", "table1", dataset="Yahoo", quoted=1)["model"].unique().tolist() == ["SA-VAE", "Skip-VAE", "Agg-VAE", "MAE(1, 0.2)"]
    assert printed("critics", "table2", model="VAE")["std"].tolist() == [0., 0.03, 0., 0.03, 0.]
    with pytest.raises(ValueError, match="unknown epoch of critics fig1: 3"): printed("critics", "fig1", epoch=3)
    with pytest.raises(ValueError, match="unknown column of ne_vae table1: 'dataset'"): printed("ne_vae", "table1", dataset="Yahoo")


def test_summary_keeps_absent_apart_from_zero(frame):
    s = summary(frame, ["nll"]).set_index("label")
    assert list(s.index) == ["VAE", "Self critic", "Neural critic"] and list(s["n"]) == [5, 1, 0] and list(s["diverged"]) == [0, 1, 1]
    assert s["std"]["VAE"] == pytest.approx(np.std(range(5), ddof=1)) and math.isnan(s["std"]["Self critic"]) and math.isnan(s["mean"]["Neural critic"])
    assert s["status"]["Neural critic"] == "diverged"
    assert math.isnan(summary(frame, ["no_such_metric"])["mean"][0])


def test_three_lines_for_each_model_of_the_paper(frame):
    t = beside("critics", "table1", frame, COLUMNS, {"re-encoding": "reencode"}, ceiling=math.log(1024))
    assert t.index.tolist() == [(m, l) for m in ("VAE", "Self critic", "Neural critic") for l in ("published", "as published, ours", "strict, ours")]
    vae, critic, neural = (t.loc[m] for m in ("VAE", "Self critic", "Neural critic"))
    assert list(vae["NLL"]) == ["144.09 (12.59)", f"150.00 ({np.std([144, 150, 156]):.2f})", f"152.00 ({np.std(range(5), ddof=1):.2f})"]
    assert list(vae["seeds"]) == ["", "3", "5"] and list(vae["re-encoding"]) == ["", "", "–"]
    assert list(critic["MI"]) == ["6.79 (0.01) ≥", "6.80 ≥", "9.60 ≥"] and list(critic["seeds"])[1:] == ["1 of 3, 1 diverged"] * 2
    assert list(neural["NLL"]) == ["158.69 (18.64)", "diverged", "diverged"]
    assert any("≥" in n for n in t.attrs["notes"])


def test_a_metric_of_the_paper_that_we_do_not_have_is_empty(frame):
    assert list(beside("critics", "table1", frame, {"AU": ("ap_au", None)}).loc["VAE"]["AU"]) == ["4.00 (0.00)", "–", ""]


def test_misspelt_labels_and_metrics_are_refused(frame):
    with pytest.raises(ValueError, match="Did you mean 'Self critic'"): beside("critics", "table1", frame.replace("Self critic", "self-critic"), COLUMNS)
    with pytest.raises(ValueError, match="Did you mean 'Coverage'"): deviations("critics", "table1", frame, {"coverage": ("ap_coverage", "coverage")})
    with pytest.raises(ValueError, match="Did you mean 'NE-VAE se'"): beside("ne_vae", "table1", frame.assign(label="NE VAE se"), {"MI": ("ap_mi", "mi")})
    with pytest.raises(ValueError, match="Did you mean 'my critic'"): beside("critics", "table1", frame.replace("Neural critic", "my critics"), COLUMNS, ours=["my critic"])
    with pytest.raises(ValueError, match="'VAE' is a model of published"): deviations("critics", "table1", frame, COLUMNS, ours=["VAE"])


def test_a_wide_table_of_two_data_sets_with_a_label_of_our_own(frame):
    frame = frame.replace({"Self critic": "BN-VAE(0.6)", "Neural critic": "both"})
    t = beside("scale_vae", "table1", frame, COLUMNS, where={"dataset": "Yelp"}, ours=["absent", "both"])
    assert t.index.get_level_values(0).unique().tolist() == [*printed("scale_vae", "table1", dataset="Yelp")["model"].unique(), "both"]
    assert list(t.loc["BN-VAE(0.6)"]["NLL"]) == ["356.60", "159.00", "160.00"] and list(t.loc["both"]["NLL"]) == ["", "diverged", "diverged"]
    assert list(t.loc["LSTM-LM"]["MI"]) == ["", "–", "–"] and list(t.loc["Agg-VAE"]["seeds"]) == ["", "0", "0"]
    assert "of the population in the second line" in t.attrs["notes"][0]
    d = deviations("scale_vae", "table1", frame, COLUMNS, where={"dataset": "Yelp"}, ours=["both"], at_least=200.).set_index(["model", "metric"])
    assert d.loc[("VAE", "NLL"), "difference"] == pytest.approx(150 - 358) and not d.loc[("VAE", "NLL"), "within"] and d.loc[("BN-VAE(0.6)", "NLL"), "within"]
    assert "both" not in d.index and d.loc[("Agg-VAE", "NLL"), "within"] is pd.NA
    for f in (beside, deviations):
        with pytest.raises(ValueError, match=r"has NLL of LSTM-LM 2 times; pick by `where` from \{'dataset': \['Yahoo', 'Yelp'\]\}"): f("scale_vae", "table1", frame, COLUMNS, ours=["both"])


def test_deviations(frame):
    d = deviations("critics", "table1", frame, COLUMNS).set_index(["model", "metric"])
    assert d.loc[("VAE", "NLL"), "allowed"] == pytest.approx(25.18) and d.loc[("VAE", "NLL"), "difference"] == pytest.approx(5.91) and d.loc[("VAE", "NLL"), "within"]
    assert d.loc[("Self critic", "MI"), "allowed"] == 0.05 and d.loc[("Self critic", "MI"), "within"]
    assert d.loc[("Neural critic", "NLL"), "within"] is pd.NA
    far = frame.assign(ap_nll=frame.ap_nll + 40)
    assert not deviations("critics", "table1", far, COLUMNS).set_index(["model", "metric"]).loc[("VAE", "NLL"), "within"]


def test_deviations_are_of_the_published_seeds_alone(frame):
    later = frame.assign(ap_nll=frame.ap_nll.where(frame.seed < 3, 1e6))
    assert deviations("critics", "table1", later, COLUMNS)["ours"][0] == 150.


def test_cells(frame):
    t = cells(frame, {"NLL": ("nll", 1), "MI": "mi"}, note="a stand-in")
    assert t.loc["VAE", "NLL"] == "152.0 (1.6)" and t.loc["Neural critic", "MI"] == "diverged" and t.loc["Self critic", "seeds"] == "1 of 3, 1 diverged"
    assert t.attrs["notes"][0] == "a stand-in"
    assert cell(1.) == "1.00" and cell(math.nan, status="failed") == "failed"


def test_markdown_and_html(frame):
    t = beside("critics", "table1", frame, COLUMNS, note="a | b", ceiling=math.log(1024))
    lines = to_markdown(t).splitlines()
    widths = {l.count(" | ") for l in lines if l.startswith("| ") and "---" not in l}
    assert len(widths) == 1 and sum(l.startswith("| ") for l in lines) == 11 and "a | b" in lines
    assert to_markdown(pd.DataFrame({"x|y": [1.234, math.nan], "n": [1, 2]}, index=["p", "q"])).splitlines()[2:4] == ["| p | 1.23 | 1 |", "| q | – | 2 |"]
    counted = to_markdown(pd.DataFrame({"within": pd.array([True, pd.NA], dtype="boolean"), "why": ["a sentence of some length, to the left", "b"]})).splitlines()
    assert counted == ["| within | why |", "| ---: | --- |", "| True | a sentence of some length, to the left |", "| – | b |"]
    page = show(t, "Table <1>").data
    assert "Table &lt;1&gt;" in page and "≥" in page and page.count("<tr") == 11


def test_provenance(frame):
    text = provenance(frame, "full", "digits in place of Omniglot")
    assert text == "6 of 9 runs (2 diverged, 1 missing); seeds 0 to 4; scale full; on cpu (x86_64); commit abc; digits in place of Omniglot"
    assert provenance(frame[frame.status == "missing"]).startswith("0 of 1 runs (1 missing)")


# --- files ------------------------------------------------------------------------------------------------------------
def test_table_files(tmp_path, frame):
    t = beside("critics", "table1", frame, COLUMNS)
    path = save_table(t, "critics", "full", "table1", tmp_path, provenance(frame, "full"))
    assert path == tmp_path / "critics" / "full" / "table1.csv" and "abc" in path.with_suffix(".md").read_text()
    assert read_data(path)["NLL"].tolist() == t["NLL"].tolist() and path.read_text().startswith("# mean (standard deviation)")


def test_a_failed_write_leaves_the_old_file(tmp_path, frame):
    fig = plot_tradeoff(frame)
    png = save_figure(fig, frame, "p", "smoke", "f", tmp_path)
    before = {p.name: p.read_bytes() for p in png.parent.iterdir()}
    def full(*a, **k): raise OSError(28, "No space left on device")
    fig.savefig = full
    with pytest.raises(OSError, match="No space"): save_figure(fig, frame, "p", "smoke", "f", tmp_path)
    assert {p.name: p.read_bytes() for p in png.parent.iterdir()} == before


def test_numbers_survive_the_csv_to_the_last_bit(tmp_path):
    data = pd.DataFrame({"label": ["a"] * 50, "epoch": range(50), "seed": 0, "valid_mi": np.random.default_rng(0).normal(size=50)})
    png = save_figure(plot_curves(data, "valid_mi"), data, "p", "smoke", "c", tmp_path, "a note\nof two lines")
    again = read_data(png.with_suffix(".csv"))
    pd.testing.assert_frame_equal(again, data)
    assert save_figure(plot_curves(again, "valid_mi"), again, "p", "smoke", "d", tmp_path).read_bytes() == png.read_bytes()


def test_sign_of_notes_in_a_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="begins the notes"): save_table(pd.DataFrame({"a": ["x # y"]}), "p", "smoke", "t", tmp_path)
    assert not list(tmp_path.rglob("*.csv"))


# --- figures ----------------------------------------------------------------------------------------------------------
def test_tradeoff_has_a_point_and_a_name_for_each_label_with_numbers(frame):
    ax = plot_tradeoff(frame).axes[0]
    assert [t.get_text() for t in ax.texts] == ["VAE", "Self critic"] and ax.get_xlabel() == "MI (nats)" and ax.get_ylabel() == "NLL (nats)"
    with pytest.raises(ValueError, match="Did you mean 'nll'"): plot_tradeoff(frame, y="nlll")


def test_curves_of_two_seeds_have_a_band():
    data = pd.DataFrame([{"label": l, "seed": s, "epoch": e, "valid_kl": e + s} for l in "ab" for s in range(2 if l == "a" else 1) for e in range(3)])
    ax = plot_curves(data, "valid_kl").axes[0]
    assert len(ax.lines) == 2 and len(ax.collections) == 1 and list(ax.lines[0].get_ydata()) == [0.5, 1.5, 2.5]


def test_pictures_keep_their_pixels(tmp_path):
    x = torch.rand(3, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    row = {"id": "a", "pictures": {k: pack_pictures(x) for k in ("data", "reconstruction", "exchanged", "prior")}}
    data = pd.concat([pictures(row, "VAE"), pictures(row, "Self critic")], ignore_index=True)
    fig = plot_pictures(data, "title")
    assert len(fig.axes) == 3 * 7       # data once, three kinds for each of two models
    drawn = fig.axes[0].images[0].get_array()
    assert np.abs(drawn - x[0, 0].numpy()).max() <= 0.5 / 255 + 1e-6
    pd.testing.assert_frame_equal(read_data(save_figure(fig, data, "p", "smoke", "x", tmp_path).with_suffix(".csv")), data)
    with pytest.raises(ValueError, match="holds no pictures"): pictures({"id": "a"})


@pytest.fixture
def study(tmp_path):
    "Two labels; the second has a run that was not watched, one that diverged, and one without a row."
    tiny = dict(model=dict(name="mlp", x_dim=32, latent_dim=3, hidden=(16,)), recipe=Recipe(epochs=2), scale="smoke")
    s = Study("p", "t", "smoke", {l: [Run("simplex", methods=m, seed=i, **tiny) for i in range(n)] for l, m, n in (("VAE", (), 2), ("beta", ({"name": "Beta"},), 3))})
    looks = [{"epoch": 0.5 * e, "mi": 0.1 * e, "reencode": 2. - e} for e in (1, 2)]
    more = [{"watched": looks, "metrics": {"activity": [0.1, 0.9, 0.5]}}, {"watched": looks, "metrics": {"activity": [0.7, 0.3, 0.]}},
            {"watched": [], "metrics": {"activity": [0.2, 0.2, 0.1]}}, {"status": "diverged", "metrics": {}}]
    for run, row in zip(s.runs, more):
        history = [{"epoch": 1, "seconds": 1., "valid_mi": 0.3}]
        write_row(row_path(run, tmp_path, "p"), {"format": FORMAT, "id": run.id, "run": run.to_dict(), "status": "done", "history": history, "env": {}, **row})
    return s


def test_frames_of_curves_looks_and_activities(study, tmp_path):
    assert curves(study, tmp_path)[["label", "seed", "epoch", "valid_mi"]].values.tolist() == [[l, s, 1, 0.3] for l, s in (("VAE", 0), ("VAE", 1), ("beta", 0), ("beta", 1))]
    w = watched(study, tmp_path)
    assert list(w) == ["label", "seed", "epoch", "mi", "reencode"] and w["epoch"].tolist() == [0.5, 1.] * 2 and set(w["label"]) == {"VAE"}
    a = activities(study, tmp_path)
    assert a["activity"].tolist() == [0.9, 0.5, 0.1, 0.7, 0.3, 0., 0.2, 0.2, 0.1] and a["dim"].tolist() == [1, 2, 3] * 3
    assert all(f(study, tmp_path / "none").empty for f in (curves, watched, activities))


def test_levels_are_drawn_and_named(study, tmp_path):
    ax = plot_curves(watched(study, tmp_path), "reencode", lines={"collapsed": 2.}).axes[0]
    assert [t.get_text() for t in ax.texts] == ["collapsed"] and list(ax.lines[-1].get_ydata()) == [2., 2.] and ax.get_ylabel() == "re-encoding error"
    ax = plot_activity(activities(study, tmp_path), lines=(0.01, 0.1)).axes[0]
    assert [t.get_text() for t in ax.texts] == ["0.01", "0.1"] and ax.get_yscale() == "log" and np.allclose(ax.lines[0].get_ydata(), [0.8, 0.4, 0.05])
    assert ax.get_legend_handles_labels()[1] == ["VAE", "beta"]
    with pytest.raises(ValueError, match="Did you mean 'reencode'"): plot_curves(watched(study, tmp_path), "re-encode")
    with pytest.raises(ValueError, match="unknown metric 'dim'"): plot_activity(pd.DataFrame())


def test_axes_that_are_given_are_drawn_on(study, tmp_path):
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    assert plot_activity(activities(study, tmp_path), ax=ax, lines=()) is ax.figure and len(ax.lines) == 2 and not ax.texts


@pytest.mark.parametrize("n, columns, lines", [(1, 20, 1), (20, 20, 1), (21, 20, 2), (6, 1, 6)])
def test_sheet_has_every_picture_in_its_place(n, columns, lines):
    x = torch.rand(n, 1, 4, 3, generator=torch.Generator().manual_seed(n))
    page = sheet(x, columns)
    assert page.shape == (lines * 5 + 1, columns * 4 + 1) and page.sum() == pytest.approx(float(x.sum()), rel=1e-5)
    for i in range(n):
        r, c = divmod(i, columns)
        assert np.array_equal(page[r * 5 + 1:r * 5 + 5, c * 4 + 1:c * 4 + 4], x[i, 0].numpy())
    assert np.array_equal(sheet(list(x), columns), page) and np.array_equal(sheet(x[:, 0], columns), page)


@pytest.mark.parametrize("bad", [torch.rand(2, 3, 4, 4), torch.rand(4, 4), [], [torch.rand(1, 4, 4), torch.rand(1, 5, 5)]])
def test_sheets_of_other_shapes_are_refused(bad):
    with pytest.raises(ValueError, match="takes pictures of one shape"): sheet(bad)


def test_sheets_are_drawn_from_their_numbers(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = {"3": torch.rand(5, 1, 4, 3, generator=g).round(), "": torch.rand(25, 1, 6, 6, generator=g)}
    data = sheets(x)
    png = save_figure(plot_sheets(data, title="walks"), data, "p", "smoke", "s", tmp_path)
    again = read_data(png.with_suffix(".csv"))
    assert save_figure(plot_sheets(again, title="walks"), data, "p", "smoke", "again", tmp_path).read_bytes() == png.read_bytes()
    fig = plot_sheets(x, columns=10)
    assert [a.images[0].get_array().shape for a in fig.axes] == [(6, 41), (22, 71)]
    assert np.array_equal(fig.axes[0].images[0].get_array()[1:5, 1:4], x["3"][0, 0].numpy())
