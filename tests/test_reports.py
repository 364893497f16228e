"""Tables beside the published ones, their files, and figures that can be drawn again from their CSV."""
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("agg")
from pcvae.metrics.audit import published_tables
from pcvae.reports import (beside, cell, cells, deviations, pictures, plot_curves, plot_pictures, plot_tradeoff, provenance, published,
                           published_names, read_data, save_figure, save_table, show, summary, to_markdown)
from pcvae.studies import pack_pictures

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
    with pytest.raises(ValueError, match="beside needs model, metric, mean"): beside("scale_vae", "table1", frame, COLUMNS)


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
