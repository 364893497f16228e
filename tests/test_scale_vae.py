"The Scale-VAE study: its rows are the paper's, and every run can be built."
import pytest

from pcvae.data.core import SOURCES
from pcvae.papers import scale_vae
from pcvae.reports import printed
from pcvae.studies import STUDIES, Run, get_study

@pytest.mark.parametrize("scale", ("smoke", "quick", "small", "full"))
@pytest.mark.parametrize("table", list(STUDIES["scale_vae"]))
def test_every_run_can_be_built(table, scale):
    study = get_study("scale_vae", table, scale)
    assert len({r.id for r in study.runs}) == len(study.runs)
    for run in study.runs: assert run.scale == scale and run.data["name"] in SOURCES and run.recipe["optimizer"] == "sgd" and run.recipe["clip"] == 5.

def test_rows_are_those_of_the_slides_for_yahoo_and_one_more():
    rows, published = list(get_study("scale_vae", "table1", "full").rows), list(printed("scale_vae", "table1", dataset="Yahoo").model.unique())
    assert set(rows) - set(published) == {"VAE not annealed"} and set(published) <= set(rows)

def test_the_grid_is_that_of_table3():
    assert list(get_study("scale_vae", "table3", "full").rows) == list(printed("scale_vae", "table3", dataset="Yahoo").model.unique())

def test_the_network_without_a_code_has_no_method_and_the_others_one_backbone():
    rows = get_study("scale_vae", "table1", "small").rows
    assert rows["LSTM-LM"][0].model["name"] == "lstm_lm" and not rows["LSTM-LM"][0].methods
    backbones = {tuple((k, v) for k, v in r.model.items() if k not in ("init", "kind")) for l, runs in rows.items() if l != "LSTM-LM" for r in runs}
    assert len(backbones) == 1

def test_three_seeds_where_the_small_scale_promises_them():
    seeds = {l: [r.seed for r in runs] for l, runs in get_study("scale_vae", "table1", "small").rows.items()}
    assert {l for l, s in seeds.items() if s == [0, 1, 2]} == set(scale_vae.SEEDED)

def test_yelp_has_the_rows_that_the_slides_print_for_it():
    rows, published = set(get_study("scale_vae", "table1_yelp", "full").rows), set(printed("scale_vae", "table1", dataset="Yelp").model.unique())
    assert rows - published == {"VAE not annealed"} and published <= rows

def test_tables_4_and_5_are_those_of_the_slides():
    rows, published = get_study("scale_vae", "table4", "small").rows, set(printed("scale_vae", "table4").model.unique())
    assert published - set(rows) == {"DU-VAE(0.5, 0.8) quoted"} and set(rows) <= published
    shared = set(get_study("scale_vae", "table1", "small").runs)
    assert sum(r in shared for r in get_study("scale_vae", "table4", "small").runs) == len(rows) - 2      # MAE and DU-VAE have settings of their own for Yelp
    generated = get_study("scale_vae", "table5", "small")
    assert set(printed("scale_vae", "table5").model.unique()) <= set(generated.rows)
    judge = get_study("scale_vae", "table1", "small").rows["LSTM-LM"][0].train_id
    assert {Run(**r.evaluation["probes"]["generation"]["judge"]).train_id for r in generated.runs} == {judge}
    assert {r.train_id for r in generated.runs} <= {r.train_id for r in shared}        # nothing is trained for it
