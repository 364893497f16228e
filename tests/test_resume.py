"A study killed at a random moment and started again ends with the same rows, bit for bit, as one that was not."
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pcvae.critics import SelfCritic
from pcvae.scaling import ScaleUp
from pcvae.schedules import LinearWarmup
from pcvae.studies import Recipe, Run, Study, run_study

common = dict(model=dict(name="mlp", x_dim=32, latent_dim=4, hidden=(32,), variance=1.), recipe=Recipe(epochs=30, batch=128, clip=5.),
              evaluation=dict(n_samples=5), scale="smoke")
study = Study("demo", "kill", "smoke", {"warm-up, Scale": [Run("simplex", methods=[LinearWarmup(20.), ScaleUp(1.1)], **common)],
                                        "critic": [Run("simplex", methods=[SelfCritic(1.)], **common)]})
if __name__ == "__main__":
    frame = run_study(study, results=sys.argv[1] + "/results", work=sys.argv[1] + "/state", device="cpu", progress=False, save_every=0.)
    assert list(frame.status) == ["done", "done"], frame.error.tolist()
"""

def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"})

def rows(folder: Path) -> dict:
    "What must agree: all but times, dates and the commit."
    out = {}
    for path in sorted(folder.rglob("results/**/*.json")):
        row = json.loads(path.read_text())
        row.pop("env")
        for h in row["history"]: h.pop("seconds")
        out[path.name] = json.dumps(row, sort_keys=True)
    return out

@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder).wait(timeout=300) == 0
    assert len(rows(folder)) == 2
    return rows(folder)

@pytest.mark.parametrize("attempt", range(2))
def test_killed_study_gives_the_same_rows(unbroken, tmp_path, attempt):
    process = start(tmp_path)
    while not list(tmp_path.rglob("*.pt")):            # training has begun and saved once
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(tmp_path).wait(timeout=300) == 0
    assert rows(tmp_path) == unbroken
    assert not list(tmp_path.rglob("results/**/*.tmp"))
