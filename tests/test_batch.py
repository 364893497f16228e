"Many runs beyond one process: leases, lost workers, dask, batch systems, devices dealt out, and two who share one folder."
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pcvae import batch, cli, studies
from pcvae.batch import JobExecutor, KilledTwice, Lease, LocalPool, WorkerLost, open_executor, this_machine
from pcvae.method import Method
from pcvae.studies import Recipe, Run, Study, default_device, execute, read_row, row_path, run_study

TINY = dict(data="simplex", model=dict(name="mlp", x_dim=32, latent_dim=4, hidden=(16,), variance=1.), evaluation=dict(n_samples=5), scale="smoke")
GONE = 2 ** 22 + 5      # no process has this number


def run(seed=0, epochs=2, **changes): return Run(**{**TINY, "seed": seed, "recipe": Recipe(epochs=epochs, batch=256), **changes})
def study(*runs): return Study("demo", "t", "smoke", {f"run {i}": [r] for i, r in enumerate(runs)})
def places(folder): return dict(results=folder / "results", work=folder / "state", progress=False, device="cpu")
def leases(folder): return sorted(folder.rglob("*.lease*"))
def lease_text(**changes): return json.dumps({"machine": this_machine(), "host": "here", "pid": GONE, "started": "1", "sweep": "", "deaths": 0} | changes)
def wait_for(what, seconds=120.):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found

def numbers(folder):
    "What rows must agree in: all but times, dates and the commit."
    out = {}
    for path in sorted((folder / "results").rglob("*.json")):
        row = read_row(path)
        out[row["id"]] = json.dumps([row["status"], row["metrics"], [{k: v for k, v in h.items() if k != "seconds"} for h in row["history"]]], sort_keys=True)
    return out

@pytest.fixture(autouse=True)
def look_often(monkeypatch): monkeypatch.setattr(studies, "POLL", 0.1)


# --- leases -----------------------------------------------------------------------------------------------------------
def test_a_run_that_another_machine_holds_is_waited_for_and_its_row_taken(tmp_path):
    mine, theirs = run(0), run(1)
    held = row_path(theirs, tmp_path / "results", "demo").with_suffix(".lease")
    held.parent.mkdir(parents=True)
    held.write_text(lease_text(machine="elsewhere", host="elsewhere"))
    execute(theirs, "demo", tmp_path / "there" / "results", tmp_path / "there" / "state")
    def elsewhere():        # the other machine ends while this one waits
        wait_for(lambda: row_path(mine, tmp_path / "results", "demo").exists())
        shutil.copy(row_path(theirs, tmp_path / "there" / "results", "demo"), row_path(theirs, tmp_path / "results", "demo"))
        held.unlink()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(elsewhere)
        frame = run_study(study(theirs, mine), **places(tmp_path))
        other.result()
    assert list(frame.status) == ["done", "done"] and not leases(tmp_path)
    assert not (tmp_path / "state" / f"{theirs.train_id}.pt").exists(), "it was not trained here"

def test_time_runs_out_while_another_works(tmp_path):
    held = row_path(run(), tmp_path / "results", "demo").with_suffix(".lease")
    held.parent.mkdir(parents=True)
    held.write_text(lease_text(machine="elsewhere"))
    assert run_study(study(run()), **places(tmp_path), max_minutes=0.01).status[0] == "missing"
    assert held.exists()

@pytest.mark.parametrize("text, old", [(lease_text(), False), (lease_text(machine="elsewhere"), True), ("", True), ('{"pid": 1', True), ("[1, 2]", True), ("\0" * 99, True)], ids=range(6))
def test_dead_expired_and_damaged_leases_are_taken_over(tmp_path, text, old):
    for path in (row_path(run(), tmp_path / "results", "demo"), tmp_path / "state" / f"{run().train_id}.pt"):
        path.parent.mkdir(parents=True)
        path.with_suffix(".lease").write_text(text)
        if old: os.utime(path.with_suffix(".lease"), (time.time() - 2 * batch.EXPIRY,) * 2)
    assert run_study(study(run()), **places(tmp_path)).status[0] == "done"
    assert not leases(tmp_path)

def test_who_died_while_taking_over_blocks_nobody(tmp_path):
    path, dead = tmp_path / "x.lease", lease_text()
    path.write_text(dead)
    right = path.with_name(f"x.lease.{batch.hashlib.sha256(dead.encode()).hexdigest()[:8]}")
    right.write_text(lease_text(deaths=1))
    with Lease(path): pass
    assert not leases(tmp_path)

def test_the_clock_of_the_file_system_decides(tmp_path, monkeypatch):
    "A machine whose clock is a day ahead does not take a living lease."
    path = tmp_path / "x.lease"
    path.write_text(lease_text(machine="elsewhere"))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400)
    assert batch.is_held(path)

def test_a_lease_is_kept_alive_and_a_lost_one_stops_the_writing(tmp_path, monkeypatch):
    path = tmp_path / "x.lease"
    with Lease(path, beat=0.02):
        os.utime(path, (0, 0))
        wait_for(lambda: path.stat().st_mtime > 0)

    class Robbed(Method):       # in the middle of training another takes the lease
        def on_epoch_end(self, trainer): next((tmp_path / "state").glob("*.lease")).write_text(lease_text(machine="elsewhere"))
    monkeypatch.setattr(studies, "RETRIES", 0)
    frame = run_study(study(run(methods=[Robbed()])), **places(tmp_path), save_every=0.)
    assert frame.status[0] == "failed" and "LeaseLost" in frame.error[0] and "nothing more is written" in frame.error[0]
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.json"))

def test_a_full_disk_leaves_no_lease(tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr("builtins.open", full)
        with pytest.raises(OSError, match="make room"): Lease(tmp_path / "x.lease").__enter__()
    assert not leases(tmp_path)

def test_ctrl_c_leaves_no_lease(tmp_path):
    class Interrupt(Method):
        def on_epoch_end(self, trainer): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_study(study(run(methods=[Interrupt()]), run(1)), **places(tmp_path))
    assert not leases(tmp_path) and not list(tmp_path.rglob("*.json"))


# --- two who share one folder -----------------------------------------------------------------------------------------
RACE = """
import sys
from pathlib import Path
import pcvae.studies as s
from test_batch import run, study, places
s.POLL = 0.1
fit = s.Trainer.fit
def noted(trainer, *args, **kwargs):
    if not args[0].exists():
        with open(sys.argv[1] + "/trained", "a") as f: print(args[-1], file=f)
    return fit(trainer, *args, **kwargs)
s.Trainer.fit = noted
print("ready", flush=True); sys.stdin.readline()
runs = [run(seed) for seed in range(4)] + [run(3, evaluation=dict(n_samples=7))]        # the last two share one training
frame = s.run_study(study(*runs[::int(sys.argv[2])]), **places(Path(sys.argv[1])))
assert list(frame.status) == ["done"] * 5, frame.error.tolist()
"""

def test_two_processes_share_a_folder_and_train_nothing_twice(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    both = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), step], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for step in ("1", "-1")]
    for p in both: assert p.stdout.readline() == "ready\n"
    for p in both: p.stdin.write("go\n"); p.stdin.flush()
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    begun = (tmp_path / "trained").read_text().split()
    assert len(begun) == len(set(begun)) == 4
    assert len(numbers(tmp_path)) == 5 and not leases(tmp_path) and not list(tmp_path.rglob("*.tmp"))


# --- lost workers -----------------------------------------------------------------------------------------------------
def test_a_failed_run_is_tried_once_more(tmp_path, monkeypatch):
    calls = []
    def unlucky(r, *args):
        calls.append(r.id)
        if calls.count(r.id) == 1 or r.seed == 1: raise OSError("the network was away")
        return execute(r, *args)
    monkeypatch.setattr(studies, "execute", unlucky)
    frame = run_study(study(run(0), run(1), run(2)), **places(tmp_path))
    assert list(frame.status) == ["done", "failed", "done"] and "the network was away" in frame.error[1]
    assert {k: len(v) for k, v in frame.attrs["failures"].items()} == {run(0).id: 1, run(1).id: 2, run(2).id: 1}
    assert calls == [run(i).id for i in (0, 1, 2, 0, 1, 2)], "after the others"

KILLER = run(evaluation=dict(n_samples=5), recipe=Recipe(epochs=10_000, batch=2048))

def test_a_run_that_kills_its_process_twice_has_failed_and_the_others_go_on(tmp_path):
    def kill():
        "Kill whatever process holds the lease of that run."
        lease, killed = row_path(KILLER, tmp_path / "results", "demo").with_suffix(".lease"), set()
        while len(killed) < 2:
            who = batch.holder(batch.read(lease) or "")
            if who and who["pid"] not in killed: os.kill(who["pid"], signal.SIGKILL); killed.add(who["pid"])
            time.sleep(0.05)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with LocalPool(1) as pool:
        frame = run_study(study(KILLER, run(1), run(2)), pool, **places(tmp_path))
        assert pool.lost == 2
    assert list(frame.status) == ["failed", "done", "done"]
    assert "WorkerLost" in frame.error[0] and "SIGKILL" in frame.error[0]
    killer.join(5)

def test_the_third_heir_of_a_run_refuses(tmp_path):
    lease = row_path(run(), tmp_path / "results", "demo").with_suffix(".lease")
    lease.parent.mkdir(parents=True)
    lease.write_text(lease_text(sweep="s", deaths=1))
    with pytest.raises(KilledTwice): execute(run(), "demo", tmp_path / "results", tmp_path / "state", sweep="s")
    assert not leases(tmp_path)
    lease.write_text(lease_text(sweep="s", deaths=1))
    execute(run(), "demo", tmp_path / "results", tmp_path / "state", sweep="of another call")


# --- devices ----------------------------------------------------------------------------------------------------------
def test_devices_are_dealt_out(tmp_path, monkeypatch):
    running, seen, most, lock = {}, [], [], threading.Lock()
    class Device(str): pass
    one, two = Device("cpu"), Device("cpu")         # equal by name, so told apart by what they are
    def watched(r, paper, results, work, device, *args):
        key = 1 if device is one else 2
        with lock: running[key] = running.get(key, 0) + 1; most.append(max(running.values())); seen.append(key)
        time.sleep(0.02)
        with lock: running[key] -= 1
        return {}
    monkeypatch.setattr(studies, "execute", watched)
    monkeypatch.setattr(studies, "device_list", lambda device, executor: [one, two])
    pool = ThreadPoolExecutor(2)
    pool.workers = 2
    run_study(study(*[run(i) for i in range(10)]), pool, **places(tmp_path))
    assert len(seen) == 10 and set(seen) == {1, 2} and max(most) == 1

def test_lists_of_devices(monkeypatch):
    assert default_device("cpu, cpu") == "cpu,cpu" and default_device("cuda:3,auto", here=False) == "cuda:3,auto"
    for wrong in ("cpu,gpu", "cpu,", "cuda:x"):
        with pytest.raises(ValueError, match="unknown device"): default_device(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="the last GPU here is cuda:1"): default_device("cuda:0,cuda:2")
    pool = LocalPool(2)
    assert studies.device_list("cuda", pool) == ["cuda:0", "cuda:1"] and studies.device_list("cuda", studies.InProcess()) == ["cuda"]
    assert studies.device_list("cuda:5", object()) == ["cuda:5"], "a worker elsewhere sees for itself"
    pool.shutdown()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [cli.default_workers(d) for d in ("cuda", "cuda:0,cuda:2", "cpu")] == [3, 2, min(2, os.cpu_count())]


# --- dask -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def dask_address(tmp_path):
    "A scheduler and two workers of one thread, each a process of its own."
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None, silence_logs=50,
                                  local_directory=str(tmp_path)) as cluster: yield cluster.scheduler_address

def test_two_workers_of_dask_are_killed_and_the_rows_are_the_serial_ones(tmp_path, dask_address):
    runs = [run(seed, epochs=3) for seed in range(16)]
    serial = places(tmp_path / "serial")
    assert list(run_study(study(*runs), **serial).status) == ["done"] * 16
    killed = {}
    def kill_twice():
        "Kill two workers, each while it trains a run: not the same run, since that would have failed then."
        while len(killed) < 2:
            for lease in (tmp_path / "dask" / "results").rglob("*.lease"):
                who = batch.holder(batch.read(lease) or "")
                if who and lease.stem not in killed and who["pid"] not in killed.values() and who["pid"] != os.getpid():
                    os.kill(who["pid"], signal.SIGKILL); killed[lease.stem] = who["pid"]
                    break
            time.sleep(0.01)
    killer = threading.Thread(target=kill_twice, daemon=True)
    killer.start()
    with open_executor(f"dask:{dask_address}") as executor: frame = run_study(study(*runs), executor, **places(tmp_path / "dask"))
    killer.join(5)
    assert len(killed) == 2 and list(frame.status) == ["done"] * 16
    assert numbers(tmp_path / "dask") == numbers(tmp_path / "serial") and len(numbers(tmp_path / "dask")) == 16
    assert not leases(tmp_path)

def test_no_dask_scheduler_there():
    pytest.importorskip("distributed")
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="no dask scheduler answers at 'tcp://127.0.0.1:1'"): open_executor("dask:tcp://127.0.0.1:1").__enter__()
    assert time.monotonic() - begun < 60

@pytest.mark.parametrize("name, package", [("dask:x", "distributed"), ("slurm", "submitit"), ("submitit-local", "submitit")])
def test_packages_that_are_not_installed(monkeypatch, name, package):
    monkeypatch.setattr(batch, "find_spec", lambda p: None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs the package {package}.*pcvae\[batch\]"): open_executor(name).__enter__()


# --- batch systems ----------------------------------------------------------------------------------------------------
def test_jobs_of_submitit(tmp_path):
    "By submitit's local executor: a row, a job that is killed and tried again, an error as itself."
    pytest.importorskip("submitit")
    with open_executor("submitit-local", folder=tmp_path / "jobs") as executor:
        wrong, dies = executor.submit(divmod, 1, 0), executor.submit(os._exit, 7)
        frame = run_study(study(run(0)), executor, **places(tmp_path))
        assert isinstance(wrong.exception(60), ZeroDivisionError)
        assert isinstance(dies.exception(60), WorkerLost) and "ended without a result" in str(dies.exception())
    assert list(frame.status) == ["done"]

def test_slurm_options(monkeypatch):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="Did you mean 'partition'"): open_executor("slurm:partitoin=gpu")
    with pytest.raises(ValueError, match="more than"): open_executor("slurm:time=1")
    monkeypatch.setattr(batch.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="sbatch"): open_executor("slurm")

def slurm_is_here():
    try: return b"idle" in subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired): return False

@pytest.mark.skipif(not slurm_is_here(), reason="no SLURM with a free node is here")
def test_a_study_on_slurm(tmp_path):
    "One array of two jobs; a third job is killed by scancel and reported as lost."
    pytest.importorskip("submitit")
    with open_executor("slurm:time=5", folder=tmp_path / "jobs") as executor:
        asleep = executor.submit(time.sleep, 300)
        job = wait_for(lambda: executor.flying.get(asleep))
        frame = run_study(study(run(0), run(1)), executor, **places(tmp_path))
        subprocess.run(["scancel", job.job_id], check=True)
        assert isinstance(asleep.exception(120), WorkerLost)
    assert list(frame.status) == ["done", "done"] and not leases(tmp_path)
    assert len({Path(p).name.split("_")[0] for p in (tmp_path / "jobs").glob("*_submitted.pkl")}) == 2, "the two runs went as one array"

def test_a_job_that_ends_too_early_is_sent_again(tmp_path, monkeypatch):
    "Each job has less time than the run needs; every one goes on where the last stopped."
    jobs = []
    class ShortJobs(batch.InProcess):
        def submit(self, fn, *args):
            jobs.append(1)
            monkeypatch.setattr(batch, "_job_end", time.time() + 0.3)
            return super().submit(fn, *args)
    long = run(recipe=Recipe(epochs=12, batch=64))
    frame = run_study(study(long), ShortJobs(), **places(tmp_path))
    assert frame.status[0] == "done" and len(jobs) > 1
