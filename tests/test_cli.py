"""The command line: what each wrong command says and returns, runs without a notebook, and a notebook run by papermill."""
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import nbformat
import pytest
import torch

from pcvae import cli, schedules  # noqa: F401
from pcvae.method import Method
from pcvae.studies import STUDIES, Recipe, Run, Study, get_study


class CrashInStep(Method):
    "Fails at the first batch."
    def penalty(self, b): raise ValueError("no such luck")


TINY = dict(model=dict(name="mlp", x_dim=32, latent_dim=4, hidden=(8,), variance=1.), evaluation=dict(n_samples=5))


@pytest.fixture
def demo(monkeypatch, tmp_path):
    "A paper with two tables, one of which fails, and a working directory of its own."
    recipe = lambda epochs: dict(recipe=Recipe(epochs=epochs, batch=1000), **TINY)
    runs = lambda ms, scale, seeds, epochs=1: [Run("simplex", methods=ms, seed=s, scale=scale, **recipe(epochs)) for s in seeds or (0, 1)]
    good = lambda scale, seeds: Study("demo", "good", scale, {"VAE": runs([], scale, seeds), "beta 0.4": runs([schedules.Beta(0.4)], scale, seeds)}, "a toy")
    bad = lambda scale, seeds: Study("demo", "bad", scale, {"VAE": runs([], scale, seeds), "crash": runs([CrashInStep()], scale, (0,))})
    slow = lambda scale, seeds: Study("demo", "slow", scale, {"VAE": runs([], scale, (0,), 100_000)})
    monkeypatch.setitem(STUDIES, "demo", {"good": good, "bad": bad, "slow": slow})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_only(*args): return ["reproduce", "demo", "--scale", "smoke", "--rows-only", "--results", "results", "--workers", "1", *args]


# --- wrong commands ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command, message", [
    ("", "required: COMMAND"),
    ("reprduce demo", "unknown command 'reprduce'. Did you mean 'reproduce'?"),
    ("reproduce", "required: PAPER|all"),
    ("reproduce dmeo", "unknown paper 'dmeo'. Did you mean 'demo'?"),
    ("reproduce demo --scale ful", "unknown scale 'ful'. Did you mean 'full'?"),
    ("reproduce demo --only goood", "unknown table or figure of demo: 'goood'. Did you mean 'good'?"),
    ("reproduce all --only tabel1", "unknown table or figure 'tabel1'. Did you mean 'table1'?"),
    ("reproduce demo --device gpu", "unknown device 'gpu'."),
    ("reproduce demo --seeds 0;1", "--seeds '0;1' should be whole numbers with commas between them, such as 0,1,2"),
    ("reproduce demo --seeds 0,0", "different numbers"),
    ("reproduce demo --seeds -1", "different numbers from 0 on"),
    ("reproduce demo --workers 0", "--workers should be more than 0, got 0"),
    ("reproduce demo --workers two", "invalid int value: 'two'"),
    ("reproduce demo --max-minutes 0", "--max-minutes should be more than 0, got 0"),
    ("reproduce demo --stack -2", "--stack -2 should be a number of runs, 2 or more"),
    ("reproduce demo -p a 1", "-p sets a parameter of a notebook"),
    ("reproduce demo --device cpu,gpu", "unknown device 'gpu'."),
    ("reproduce demo --executor slrum", "unknown executor 'slrum'. Did you mean 'slurm'? Known: process, dask, slurm, submitit-local"),
    ("reproduce demo --executor process:4", "executor process takes nothing after its name, got '4'"),
    ("reproduce demo --executor slurm:gpu", "option 'gpu' of slurm should look like key=value, as in slurm:partition=gpu,time=60"),
    ("reproduce demo --executor dask", "dask needs the address of a scheduler"),
    ("list --scale tiny", "unknown scale 'tiny'"),
    ("data --fetch mnits", "unknown data set 'mnits'. Did you mean 'mnist'?")])
def test_wrong_command_is_one_line_and_status_2(demo, capsys, command, message):
    argv = command.split() + (["--rows-only"] if command.startswith("reproduce ") else [])
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pcvae: error: ") and err.count("\n") == 1 and message in err
    assert not list(demo.iterdir()), "a refused command leaves nothing behind"


def test_cuda_that_is_not_there(demo, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(rows_only("--device", "cuda")) == 2
    assert "torch sees no CUDA GPU here; use device='cpu'" in capsys.readouterr().err


def test_debug_shows_where(demo):
    with pytest.raises(cli.Usage, match="unknown paper"): cli.main(["reproduce", "dmeo", "--debug"])


def test_installed_without_notebooks(demo, capsys, monkeypatch):
    monkeypatch.setattr(cli, "checkout", lambda: None)
    assert cli.main(["reproduce", "demo"]) == 2
    assert "notebooks are not part of the installed package" in capsys.readouterr().err


def test_paper_without_a_notebook(demo, capsys):
    assert cli.main(["reproduce", "demo"]) == 2
    assert "paper 'demo' has no notebook" in capsys.readouterr().err


# --- without a notebook -----------------------------------------------------------------------------------------------
def test_rows_only_trains_once(demo, capsys):
    assert cli.main(rows_only("--only", "good")) == 0
    first = capsys.readouterr().out
    lines = first.splitlines()
    assert len(lines) == 6 and lines[-1] == "4 of 4 runs done" and all(l.startswith("done") and "nll" in l for l in lines[1:-1])
    stamps = {p: p.stat().st_mtime_ns for p in demo.rglob("*.json")}
    assert cli.main(rows_only("--only", "good")) == 0
    assert capsys.readouterr().out == first and stamps == {p: p.stat().st_mtime_ns for p in demo.rglob("*.json")}
    assert len(stamps) == 4 and (demo / "runs" / "state").is_dir()


def test_seeds_are_those_asked_for(demo, capsys):
    assert cli.main(rows_only("--only", "good", "--seeds", "7")) == 0
    assert {json.loads(p.read_text())["run"]["seed"] for p in demo.rglob("*.json")} == {7}


def test_workers_give_the_rows_of_one_process(demo, capsys):
    metrics = lambda folder: {p.stem: json.loads(p.read_text())["metrics"] for p in folder.rglob("*.json")}
    assert cli.main(["reproduce", "demo", "--scale", "smoke", "--rows-only", "--results", "a/results", "--workers", "2", "--only", "good"]) == 0
    assert cli.main(["reproduce", "demo", "--scale", "smoke", "--rows-only", "--results", "b/results", "--workers", "1", "--only", "good"]) == 0
    assert len(metrics(demo / "a")) == 4 and metrics(demo / "a") == metrics(demo / "b")


def test_stacked_runs_get_the_rows_of_runs_alone(demo, capsys):
    rows = lambda folder: {p.stem: json.loads(p.read_text()) for p in folder.rglob("*.json")}
    for folder, how in (("a", ["--stack", "4"]), ("b", [])):
        assert cli.main(["reproduce", "demo", "--scale", "smoke", "--rows-only", "--results", f"{folder}/results", "--workers", "1", "--only", "good", *how]) == 0
    a, b = rows(demo / "a"), rows(demo / "b")
    assert a.keys() == b.keys() and any(r["env"].get("stacked", 1) > 1 for r in a.values()) and not any("stacked" in r["env"] for r in b.values())
    for k in a: assert a[k]["metrics"]["kl"] == pytest.approx(b[k]["metrics"]["kl"], rel=1e-3, abs=1e-4)


def test_the_executor_is_the_one_asked_for(demo, capsys, monkeypatch):
    opened = []
    def open_executor(*args): opened.append(args); return nullcontext()
    monkeypatch.setattr("pcvae.batch.open_executor", open_executor)
    monkeypatch.setattr(cli, "run_notebooks", lambda args, chosen, deadline: opened.append((args.device, chosen)) or 0)
    monkeypatch.setattr(cli, "notebook", lambda paper: demo)
    command = ["reproduce", "demo", "--scale", "smoke", "--only", "good", "--results", "results", "--executor", "dask:tcp://1.2.3.4:5", "--device", "cpu"]
    assert cli.main([*command, "--rows-only"]) == 0 and "4 of 4 runs done" in capsys.readouterr().out
    assert opened == [("dask:tcp://1.2.3.4:5", min(2, os.cpu_count()), (demo / "runs" / "jobs").resolve())]
    assert cli.main(command) == 0 and opened[2] == ("auto", ["demo"]), "the notebook comes after the rows, here"


def test_what_an_executor_lacks_is_one_line(demo, capsys, monkeypatch):
    monkeypatch.setattr("pcvae.batch.find_spec", lambda package: None)
    assert cli.main(rows_only("--only", "good", "--executor", "dask:x")) == 1
    err = capsys.readouterr().err
    assert "executor dask needs the package distributed, which is not installed: pip install 'pcvae[batch]'" in err and err.count("\n") == 1


def test_several_devices(demo, capsys):
    assert cli.main(rows_only("--only", "good", "--seeds", "0", "--device", "cpu,cpu")) == 0
    assert {json.loads(p.read_text())["env"]["device"] for p in demo.rglob("*.json")} == {"cpu"}


def test_a_failed_run_is_reported_and_the_others_go_on(demo, capsys):
    assert cli.main(rows_only("--only", "bad")) == 1
    out, err = capsys.readouterr()
    assert "failed" in out and "crash, seed 0: ValueError: no such luck" in out and "2 of 3 runs done, 1 failed" in out
    assert "pcvae: error: 1 of 3 runs failed" in err and "Traceback" not in err


def test_out_of_time_is_no_error_and_goes_on(demo, capsys, monkeypatch):
    assert cli.main(rows_only("--only", "slow", "--max-minutes", "0.03")) == 0
    assert "0 of 1 runs done, 1 missing" in (out := capsys.readouterr().out) and "the same command goes on where it stopped" in out
    [state] = (demo / "runs" / "state").glob("*.pt")
    before = torch.load(state, weights_only=True)["step"]
    assert cli.main(rows_only("--only", "slow", "--max-minutes", "0.03")) == 0
    assert torch.load(state, weights_only=True)["step"] > before > 0 and not list(demo.rglob("*.json"))


def test_damaged_row_is_named(demo, capsys):
    assert cli.main(rows_only("--only", "good", "--seeds", "0")) == 0
    path = next(demo.rglob("*.json"))
    path.write_text(path.read_text()[:200])
    capsys.readouterr()
    assert cli.main(rows_only("--only", "good", "--seeds", "0")) == 1
    assert f"{path.name} is damaged" in (err := capsys.readouterr().err) and "delete the file" in err
    assert cli.main(["list", "--scale", "smoke", "--json", "--results", "results"]) == 0
    out, err = capsys.readouterr()
    assert "is damaged" in err and {r["id"]: r["status"] for r in map(json.loads, out.splitlines())}[path.stem] == "damaged"


# --- list and audit ---------------------------------------------------------------------------------------------------
def test_list_tells_what_is_done(demo, capsys):
    assert cli.main(rows_only("--only", "good", "--seeds", "0")) == 0
    capsys.readouterr()
    assert cli.main(["list", "--scale", "smoke", "--json", "--results", "results"]) == 0
    rows = [r for r in map(json.loads, capsys.readouterr().out.splitlines()) if r["table"] == "good"]
    assert all({"paper", "table", "id", "scale", "seed", "method", "data", "done", "device"} <= set(r) for r in rows)
    assert [(r["method"], r["seed"], r["done"], r["device"]) for r in rows] == [("VAE", 0, True, "cpu"), ("VAE", 1, False, None), ("beta 0.4", 0, True, "cpu"), ("beta 0.4", 1, False, None)]
    assert cli.main(["list", "--results", "results"]) == 0
    line = next(l for l in capsys.readouterr().out.splitlines() if l.startswith("demo") and "good" in l)
    assert line.split()[1:] == ["good", "smoke", "2/4", "quick", "0/4", "small", "0/4", "full", "0/4"]


def test_audit_of_rows(demo, capsys):
    assert cli.main(rows_only("--only", "good")) == 0
    assert cli.main(["audit", "results"]) == 0
    assert "4 rows audited" in capsys.readouterr().out
    path = next(demo.rglob("*.json"))
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"metrics": row["metrics"] | {"au": 5.}}))
    assert cli.main(["audit", "results"]) == 1
    assert "a code of 4 dimensions has no 5 active units" in capsys.readouterr().out


def test_audit_of_files(demo, capsys):
    (demo / "my.csv").write_text("model,metric,std\na,MI,0.1\n")
    assert cli.main(["audit", "my.csv"]) == 1
    assert "my lacks the column 'mean'" in capsys.readouterr().err
    assert cli.main(["audit", "none.csv"]) == 1
    assert "there is no table or folder none.csv" in capsys.readouterr().err
    assert cli.main(["audit", "--published"]) == 0
    assert "15 impossible" in capsys.readouterr().out


def test_data_are_listed(demo, capsys):
    assert cli.main(["data"]) == 0
    assert {"simplex", "gmm", "omniglot"} <= {l.split()[0] for l in capsys.readouterr().out.splitlines()}


# --- notebooks --------------------------------------------------------------------------------------------------------
@pytest.fixture
def paper_notebook(demo, monkeypatch):
    "A small notebook in place of the paper's: it writes its parameters and two rows, or fails where it is told to."
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    parameters = 'scale = "quick"\nseeds = ""\ndevice = "auto"\nonly = ""\nmax_minutes = 0.0\nworkers = 0\ntrain = True\nresults_dir = ""\nfigures_dir = ""\nrate = 0.5\nfail = False'
    body = ('import json, os, pathlib, sys\nassert not fail, "told to"\nprint("half way", file=sys.stderr)\n'
            'pathlib.Path(figures_dir).mkdir()\npathlib.Path(figures_dir, "seen.json").write_text(json.dumps([scale, only, device, workers, results_dir, rate, os.getcwd(), os.environ.get("MPLBACKEND", "")]))')
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}, id="a"), nbformat.v4.new_code_cell(body, id="b"), nbformat.v4.new_code_cell("1", id="c")]
    path = demo / "nbs" / "demo.ipynb"
    path.parent.mkdir()
    nbformat.write(nb, path)
    monkeypatch.setattr(cli, "notebook", lambda paper: path)
    return path


def by_notebook(*args): return ["reproduce", "demo", "--scale", "smoke", "--only", "good", "--results", "results", "--figures", "figures", *args]


@pytest.mark.parametrize("args, message", [
    (["-p", "raet", "1"], "unknown parameter of demo.ipynb: 'raet'. Did you mean 'rate'?"),
    (["-p", "rate", "high"], "parameter rate='high' of demo.ipynb should be float, as its default 0.5"),
    (["-p", "fail", "1"], "should be bool"),
    (["-p", "scale", "full"], "-p scale: this parameter has an option of its own, --scale"),
    (["-p", "results_dir", "x"], "an option of its own, --results"),
    (["-p", "train", "False"], "an option of its own, --no-train")])
def test_wrong_notebook_parameter(demo, paper_notebook, capsys, args, message):
    assert cli.main(by_notebook(*args)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (demo / "runs").exists()


def test_notebook_run(demo, paper_notebook, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert cli.main(rows_only("--only", "good")) == 0
    assert cli.main(by_notebook("-p", "rate", "2")) == 0
    out, err = capsys.readouterr()
    scale, only, device, workers, results, rate, cwd, backend = json.loads((demo / "figures" / "seen.json").read_text())
    assert (scale, only, device, rate) == ("smoke", "good", cli_device(), 2) and workers >= 1 and results == str((demo / "results").resolve())
    assert cwd == str(paper_notebook.parent.resolve()) and "inline" in backend, "pictures are drawn into the notebook"
    assert "half way" in err and "runs/demo.smoke.ipynb" in out
    assert nbformat.read(demo / "runs" / "demo.smoke.ipynb", 4).metadata.papermill.exception is None


def cli_device(): return "cuda" if torch.cuda.is_available() else "cpu"


def test_notebook_that_fails(demo, paper_notebook, capsys):
    assert cli.main(by_notebook("-p", "fail", "True")) == 1
    err = capsys.readouterr().err
    assert "demo.ipynb, cell" in err and "AssertionError: told to; the notebook up to there is runs/demo.smoke.ipynb" in err and "Traceback" not in err
    assert (demo / "runs" / "demo.smoke.ipynb").exists()


def test_notebook_that_leaves_runs_undone(demo, paper_notebook, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run_notebook", lambda *a: None)
    assert cli.main(by_notebook()) == 1
    assert "demo: 4 runs have no row" in capsys.readouterr().err
    assert cli.main(by_notebook("--max-minutes", "5")) == 0
    assert "time is up before 4 runs were done" in capsys.readouterr().out


def test_no_train_shows_what_there_is(demo, paper_notebook, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "run_notebook", lambda paper, output, parameters: asked.append(parameters))
    assert cli.main(by_notebook("--no-train")) == 0
    assert asked[0]["train"] is False and "demo: 4 runs have no row, and are shown as missing" in capsys.readouterr().out
    for more in (["--rows-only"], ["--stack", "2"], ["--max-minutes", "1"], ["--executor", "submitit-local"]):
        assert cli.main(by_notebook("--no-train", *more)) == 2
        assert "--no-train shows the rows there are" in capsys.readouterr().err


# --- the start --------------------------------------------------------------------------------------------------------
def modules_after(code):
    code = f"import sys, json\n{code}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    return set(json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def test_help_imports_neither_torch_nor_papermill():
    loaded = modules_after("from pcvae.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: assert e.code == 0")
    assert not loaded & {"torch", "papermill", "pandas", "numpy", "matplotlib"}


def test_list_imports_no_papermill(): assert not modules_after("from pcvae.cli import main; main(['list', '--scale', 'smoke'])") & {"papermill", "matplotlib", "nbformat"}


def test_real_papers_are_found():
    assert "critics" in cli.papers() and cli.tables("critics") and cli.notebook("critics").exists()
    assert get_study("critics", cli.tables("critics")[0], "smoke").runs


def test_the_leaderboard_is_reproduced_like_a_paper_but_is_none():
    assert "leaderboard" in cli.subjects() and "leaderboard" not in cli.papers()
    assert cli.tables("leaderboard") == ["simplex", "digits", "pooling", "pooling_yelp"] and cli.notebook("leaderboard").parent.name == "nbs"
