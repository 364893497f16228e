"The probes of text runs, through rows: few labels, length, generation with a judge, the generator's own likelihood."
import json

import pytest
import torch

from pcvae.data import load
from pcvae.data.text import exact_log_prob
from pcvae.metrics.text import length_r2
from pcvae.schedules import LinearWarmup
from pcvae.studies import PROBES, Recipe, Run, Study, execute, run_study, trained

DATA = {"name": "synthetic_text", "n": 300}
NET = dict(vocab_size="data", embedding=8, hidden=8)
HOW = Recipe(1, 16, "sgd", 1., clip=5.)
METRICS = dict(n_samples=2, n_nll=10, n_fit=50, batch=64)

def lm(**probes): return Run(DATA, {"name": "lstm_lm", **NET}, [], HOW, METRICS | ({"probes": probes} if probes else {}), 0, "smoke")
def vae(**probes): return Run(DATA, {"name": "lstm", "latent_dim": 2, "max_len": 10, **NET}, [LinearWarmup(1.)], HOW, METRICS | {"probes": probes}, 0, "smoke")

def test_generation_is_judged_by_another_run_and_nothing_is_trained_twice(tmp_path):
    judge = lm()
    run = vae(generation={"judge": judge.to_dict() | {"evaluation": {}}, "n": 40}, labels={"sizes": [20, 50], "draws": 2})
    study = Study("p", "t", "smoke", {"LM": [judge], "VAE": [run]})
    frame = run_study(study, results=tmp_path/"r", work=tmp_path/"w", progress=False)
    assert (frame.status == "done").all(), frame.error.tolist()
    assert len(list((tmp_path/"w").glob("*.pt"))) == 2
    row = frame.set_index("label").loc["VAE"]
    data = load(**DATA)
    view, _ = trained(judge, tmp_path/"w")
    words = (data.test != 0).sum() - len(data.test)
    own = -float(view.log_prob(data.test, torch.zeros(len(data.test), 0)).detach().sum())
    assert row.generation_ppl_data == pytest.approx(torch.exp(torch.tensor(own / int(words))).item(), rel=1e-4)
    assert {"generation_gram2_matched", "generation_dist1_eq_standard", "labels_acc_20", "labels_acc_20_std", "labels_ap_acc_50", "labels_ap_charged_acc_50"} <= set(frame)
    assert 0 <= row.labels_acc_50 <= 1 and row.labels_chance >= 0.25
    assert row.epochs == 1

def test_the_truth_is_the_generators_likelihood():
    data = load("synthetic_text", n=100)
    class Uniform:
        prior = type("P", (), {"shape": (0,), "mean": torch.zeros(0)})()
        def log_prob(self, x, z): return torch.full((len(x),), -11 * torch.tensor(1004.).log())
    few = PROBES["truth"](Uniform(), data, n=5)
    every = PROBES["truth"](Uniform(), data, n=len(data.test))
    exact = -exact_log_prob(data.test, data.info["generator"])
    assert every["nll"] == pytest.approx(float(exact.mean()), abs=1e-3) and abs(few["nll"] - every["nll"]) < 4 * few["se"] and few["items"] == 5
    view = type("V", (), {"prior": type("P", (), {"shape": (2,)})()})()
    with pytest.raises(ValueError, match="a code of 2 dimensions"): PROBES["truth"](view, data)

def test_length_is_that_of_the_fed_means(tmp_path):
    row = execute(vae(length={}), "p", tmp_path/"r", tmp_path/"w")
    assert row["probes"]["length"]["r2"] == 0           # all of one length
    assert row["env"]["tokens_per_second"] == pytest.approx(240 * 11 / 15 * row["env"]["steps_per_second"])
    with pytest.raises(ValueError, match="Did you mean 'length'"): vae(lenght={})
    bad = lm().to_dict() | {"evaluation": {}, "recipe": {"epoch": 3}}
    with pytest.raises(ValueError, match="epochs"): vae(generation={"judge": bad})
    assert json.loads(json.dumps(row))["status"] == "done" and length_r2(torch.randn(50, 2), torch.arange(50)) < 0.5
