"Studies under bad conditions: full disks, damaged rows, wrong words, time running out."
import errno
import json
import os
import time

import pytest
import torch

from pcvae.studies import Recipe, RowError, Run, Study, default_device, execute, read_row, row_path, run_study, write_row

COMMON = dict(data="simplex", model=dict(name="mlp", x_dim=32, latent_dim=4, hidden=(16,), variance=1.), recipe=Recipe(epochs=2, batch=256),
              evaluation=dict(n_samples=5), scale="smoke")

def run(**changes): return Run(**{**COMMON, **changes})
def places(folder): return dict(results=folder / "results", work=folder / "state", progress=False)

def test_a_full_disk_leaves_nothing_and_loses_nothing(tmp_path, monkeypatch):
    "No half-written row; the training is kept, so that the next call only evaluates."
    study = Study("demo", "t", "smoke", {"VAE": [run()]})
    with monkeypatch.context() as m:
        def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
        m.setattr(os, "fsync", full)
        frame = run_study(study, **places(tmp_path))
    assert frame.status[0] == "failed" and "No space left" in frame.error[0] and "make room" in frame.error[0]
    assert not list((tmp_path / "results").rglob("*.*"))
    state = tmp_path / "state" / f"{run().train_id}.pt"
    stamp = state.stat().st_mtime_ns
    assert run_study(study, **places(tmp_path)).status[0] == "done"
    assert state.stat().st_mtime_ns == stamp

def test_time_runs_out_and_the_study_goes_on(tmp_path):
    long = Study("demo", "t", "smoke", {"VAE": [run(recipe=Recipe(epochs=6, batch=32))]})
    whole = run_study(long, results=tmp_path / "whole", work=tmp_path / "w", progress=False)
    for _ in range(200):
        frame = run_study(long, **places(tmp_path), max_minutes=0.01)
        if frame.status[0] == "done": break
        assert frame.status[0] == "missing"
    assert frame.nll[0] == whole.nll[0] and frame.mi[0] == whole.mi[0]

def test_evaluation_settings_do_not_train_again(tmp_path):
    execute(run(), "demo", **{k: v for k, v in places(tmp_path).items() if k != "progress"})
    state = tmp_path / "state" / f"{run().train_id}.pt"
    stamp = state.stat().st_mtime_ns
    other = run(evaluation=dict(n_samples=9))
    assert other.id != run().id
    execute(other, "demo", results=tmp_path / "results", work=tmp_path / "state")
    assert state.stat().st_mtime_ns == stamp

@pytest.mark.parametrize("damage, says", [
    (lambda t: t[:50], "damaged"), (lambda t: "", "damaged"), (lambda t: "[]", "format None"),
    (lambda t: t.replace('"format": 1', '"format": 0'), "format 0, this version reads 1"),
    (lambda t: t.replace('"metrics"', '"metrix"'), "lacks metrics"),
    (lambda t: t.replace('"seed": 0', '"seed": 5'), "was edited or made by another version"),
    (lambda t: t.replace('"name": "mlp"', '"name": "perceptron"'), "does not know"),
])
def test_damaged_rows_are_named(tmp_path, damage, says):
    path = row_path(run(), tmp_path, "demo")
    write_row(path, {"format": 1, "id": run().id, "run": run().to_dict(), "status": "done", "metrics": {}, "history": [], "env": {}})
    read_row(path, run())
    path.write_text(damage(path.read_text()))
    with pytest.raises(RowError, match=says) as e: read_row(path, run())
    assert str(path) in str(e.value) and "delete the file" in str(e.value)
    with pytest.raises(RowError): run_study(Study("demo", "t", "smoke", {"VAE": [run()]}), results=tmp_path, work=tmp_path, progress=False)

def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    state = tmp_path / "state" / f"{run().train_id}.pt"
    state.parent.mkdir()
    state.write_bytes(b"not a checkpoint")
    frame = run_study(Study("demo", "t", "smoke", {"VAE": [run()]}), **places(tmp_path))
    assert frame.status[0] == "failed" and "delete it to train this run anew" in frame.error[0]

@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_asked_for_and_absent(tmp_path):
    with pytest.raises(RuntimeError, match="no CUDA GPU"): default_device("cuda:0")
    with pytest.raises(RuntimeError, match="no CUDA GPU"): run_study(Study("demo", "t", "smoke", {"VAE": [run()]}), **places(tmp_path), device="cuda")
    assert not (tmp_path / "results").exists()

def test_a_row_says_where_it_comes_from(tmp_path):
    row = execute(run(), "demo", results=tmp_path, work=tmp_path / "state")
    assert {"pcvae", "commit", "torch", "device", "threads", "date", "cpu_seconds", "data_note"} <= set(row["env"])
    assert row["metrics"]["nll"] > 0 and len(row["history"]) == 2
    json.loads(row_path(run(), tmp_path, "demo").read_text())      # plain JSON: no NaN would pass a strict reader
    assert time.time() - row_path(run(), tmp_path, "demo").stat().st_mtime < 60

def test_threads_and_denormals_are_left_as_they_were(tmp_path):
    before = torch.get_num_threads()
    execute(run(), "demo", results=tmp_path, work=tmp_path / "state")
    assert torch.get_num_threads() == before
