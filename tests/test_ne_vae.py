"The NE-VAE study: its rows are the paper's, its recipes what the notebook says, its claims computed from rows."
import pytest

from pcvae.data.core import SOURCES
from pcvae.method import Ctx, make_method
from pcvae.models import build_model
from pcvae.papers import ne_vae
from pcvae.reports import printed
from pcvae.studies import STUDIES, get_study

SCALES = ("smoke", "quick", "small", "full")

def test_table1_has_the_nineteen_models_of_the_paper_in_its_order():
    assert list(get_study("ne_vae", "table1", "full").rows) == list(printed("ne_vae", "table1").model.unique())

def test_table2_has_the_nine_cells_of_the_paper():
    assert set(get_study("ne_vae", "table2", "full").rows) == set(printed("ne_vae", "table2").model)
    assert set(get_study("ne_vae", "table2", "small").rows) <= set(printed("ne_vae", "table2").model)

@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", list(STUDIES["ne_vae"]))
def test_every_run_can_be_built(table, scale):
    study = get_study("ne_vae", table, scale)
    assert len({r.id for r in study.runs}) == len(study.runs)
    for run in study.runs: assert run.scale == scale and run.data["name"] in SOURCES and run.recipe["batch"] == 50

def test_three_seeds_where_the_small_scale_promises_them():
    seeds = {label: [r.seed for r in runs] for label, runs in get_study("ne_vae", "table1", "small").rows.items()}
    assert {l for l, s in seeds.items() if s == [0, 1, 2]} == {"VAE", "beta-VAE(0.8)", "NE-VAE se"} and all(s in ([0], [0, 1, 2]) for s in seeds.values())

def weights(label: str, at) -> list:
    "The KL weight of a row of the full study at some epochs."
    [run] = get_study("ne_vae", "table1", "full").rows[label]
    out = []
    for epoch in at:
        w = 1.
        for m in map(lambda m: make_method(**m), run.methods): w = m.kl_weight(w, Ctx(step=int(epoch * 447), steps_per_epoch=447, n_epochs=100))
        out.append(float(w))
    return out

def test_the_kl_weight_rises_over_ten_epochs_and_stops_at_beta():
    assert weights("VAE", (0, 5, 10, 50)) == pytest.approx([0.1, 0.55, 1., 1.], abs=2e-3)
    assert weights("beta-VAE(0.5)", (0, 4, 4.5, 10, 99)) == pytest.approx([0.1, 0.46, 0.5, 0.5, 0.5], abs=2e-3)
    assert weights("VAE no anneal", (0, 1)) == [1., 1.]

def test_networks_are_those_of_the_table():
    count = lambda scale: sum(p.numel() for p in build_model(**ne_vae.network(scale)).parameters())
    full = build_model(**ne_vae.network("full"))
    assert sum(p.numel() for p in full.encoder.parameters()) == 752_448        # of the public reference configuration
    assert count("quick") < count("small") < 300_000 < count("full")

def test_models_of_the_figures_are_rows_of_the_table():
    rows = get_study("ne_vae", "table1", "quick").rows
    assert set(ne_vae.WALKED) | set(ne_vae.SEARCHED) | set(ne_vae.ANNEALED_SEEDS) <= set(rows)
    for label, [run] in rows.items():
        assert ("walks" in run.evaluation.get("probes", {})) == (label in ne_vae.WALKED)
    searched = get_study("ne_vae", "search", "quick").rows
    assert set(searched) == set(ne_vae.SEARCHED) and {r.train_id for [r] in searched.values()} <= {r.train_id for [r] in rows.values()}

def test_the_constant_study_differs_from_table1_in_the_constant_alone():
    rows = get_study("ne_vae", "table1", "small").rows
    for label, [run] in get_study("ne_vae", "constant", "small").rows.items():
        [plain] = rows[label.split(", with")[0]]
        a, b = run.methods[1], plain.methods[1]
        assert a["lp_const"] and not b["lp_const"] and {k: v for k, v in a.items() if k != "lp_const"} == {k: v for k, v in b.items() if k != "lp_const"}
        assert run.recipe == plain.recipe and run.model == plain.model and run.methods[0] == plain.methods[0]
