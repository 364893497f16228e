"Each paper's notebook runs from papermill at smoke scale, and what it trained is not trained again."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPERS = sorted(p.stem for p in (ROOT / "nbs" / "papers").glob("*.ipynb"))

def reproduce(paper: str, folder: Path, *more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pcvae.cli", "reproduce", paper, "--scale", "smoke", "--workers", "1", "--device", "cpu",
               "--results", str(folder / "results"), "--figures", str(folder / "figures"), *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)

@pytest.mark.parametrize("paper", PAPERS)
def test_smoke(paper, tmp_path):
    done = reproduce(paper, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = sorted(tmp_path.rglob("results/**/*.json"))
    assert rows and all(json.loads(p.read_text())["status"] == "done" for p in rows)
    drawn = {p.stem for p in tmp_path.rglob("figures/**/*.png")}
    assert drawn and drawn <= {p.stem for p in tmp_path.rglob("figures/**/*.csv")}, "a figure without its numbers"
    stamps = [p.stat().st_mtime_ns for p in rows]
    assert reproduce(paper, tmp_path, "--rows-only").returncode == 0
    assert [p.stat().st_mtime_ns for p in rows] == stamps, "a second call trained again"
