"""Run the notebooks as nbdev_test does, each in a process of its own, and count what passed.

    python tests/run_notebooks.py [NOTEBOOK_OR_FOLDER ...] [--workers 2] [--flags "slow gpu"] [--limit 600]

Folders with a file .notest, cells with a flag of tst_flags and cells with `#| eval: false` are skipped.
nbdev_test itself may be used as well: it reuses its processes and prints no count.
"""
import argparse, os, sys, time
from multiprocessing import connection, get_context
from pathlib import Path

root = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

import torch, pandas, matplotlib.pyplot     # noqa: F401  imported once: a forked worker then starts with them


def find(paths):
    "The notebooks under `paths`, in reading order, without those beside a .notest file."
    files = [f for p in paths for f in ([p] if p.is_file() else nbglob(p, as_path=True))]
    return [f.absolute() for f in sorted(set(files)) if not (f.parent/".notest").exists()]


def work(file, flags, conn):
    "In the worker: run one notebook and send back whether it passed and its seconds (0: it says skip_exec)."
    cfg = get_config()
    os.chdir(cfg.nbs_path)
    conn.send(test_nb(file, skip_flags=cfg.tst_flags.split(), force_flags=flags, basepath=cfg.config_path))


def run(files, workers, flags, limit):
    "Yield (file, verdict, seconds) as notebooks end; a worker that dies or passes `limit` seconds has failed."
    ctx, waiting, running = get_context("fork" if sys.platform == "linux" else "spawn"), list(files), {}
    while waiting or running:
        while waiting and len(running) < workers:
            receive, send = ctx.Pipe(duplex=False)
            p = ctx.Process(target=work, args=(file := waiting.pop(0), flags, send))
            p.start()
            send.close()
            running[p] = file, receive, time.monotonic()
        connection.wait([p.sentinel for p in running], timeout=1)
        for p, (file, receive, start) in list(running.items()):
            seconds = time.monotonic() - start
            if p.is_alive() and seconds < limit: continue
            if p.is_alive(): verdict = f"FAILED (stopped after {limit:.0f} s)"; p.kill()
            else: verdict = outcome(receive, p.exitcode)
            p.join()
            del running[p]
            yield file, verdict, seconds


def outcome(receive, exitcode):
    try: passed, seconds = receive.recv()
    except EOFError: return f"FAILED (its process ended with status {exitcode})"
    return "FAILED" if not passed else "ok" if seconds else "skipped"


def main():
    os.chdir(root)                          # nbdev finds settings.ini from here
    ap = argparse.ArgumentParser(description="Run the notebooks and count what passed")
    ap.add_argument("paths", nargs="*", type=Path, default=[get_config().nbs_path], help="notebooks or folders (default: nbs)")
    ap.add_argument("--workers", type=int, default=2, help="processes at once")
    ap.add_argument("--flags", default="", help="test flags whose cells are run, as in nbdev_test")
    ap.add_argument("--limit", type=float, default=600, help="seconds a notebook may take")
    a = ap.parse_args()
    files, count = find(a.paths), {"ok": 0, "skipped": 0, "FAILED": 0}
    for file, verdict, seconds in run(files, a.workers, a.flags.split(), a.limit):
        count[verdict.split()[0]] += 1
        print(f"{seconds:6.1f} s  {file.relative_to(root)}  {verdict}", flush=True)
    if count["skipped"]: print(f"{count['skipped']} skipped by their front matter (skip_exec)")
    print(f"nbdev_test: {count['ok']} passed, {count['FAILED']} failed")
    return count["FAILED"] > 0 or not files


if __name__ == "__main__": sys.exit(main())
