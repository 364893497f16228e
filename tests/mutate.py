"""Mutation run: of all small errors that could be made in the metrics, how many do the tests notice?

    python tests/mutate.py                          # all modules; hours of one core
    python tests/mutate.py --only gaussian          # one of them
    python tests/mutate.py --minutes 20             # as many as fit into the time, in a random order
    python tests/mutate.py --log run.jsonl --write  # resumes from the log, tries its survivors again, writes tests/mutations.md

A mutant differs from a module in one place: another operator, a constant plus one or doubled, a sign, an edge of a comparison, a
mean for a sum, a result doubled. pytest collects the tests once and runs each under a tracer, so that it is known which lines it
reaches. Every mutant is then a fork of this process: its code is put into the functions that the tests already hold, the tests that
reach the line run, shortest first, and the first failure kills it. Nothing is written to the package.
"""
import argparse, ast, collections, hashlib, inspect, itertools, json, math, os, random, re, resource, sys, time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "pcvae"
MODULES = ["gaussian", *(f"metrics.{p.stem}" for p in sorted((PACKAGE / "metrics").glob("*.py")) if p.stem != "__init__")]
FILES = {str(PACKAGE / (m.replace(".", "/") + ".py")): m for m in MODULES}
TESTS = ["test_metrics.py", "test_adaptive.py", "test_audit.py", "test_latent.py", "test_probes.py", "test_text_metrics.py", *sorted(p.name for p in HERE.glob("test_mutations*.py"))]

SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
EDGE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
        ast.In: ast.NotIn, ast.NotIn: ast.In}
OTHER = dict(a.split("-") for a in "min-max max-min amin-amax amax-amin mean-sum sum-mean any-all all-any".split())

# What no test can notice, with the reason: module, pattern of "function: before -> after".
EQUIVALENT = [tuple(line.split(" | ", 2)) for line in (HERE / "mutations_equivalent.txt").read_text().splitlines() if line and not line.startswith("#")] \
    if (HERE / "mutations_equivalent.txt").exists() else []


# --- mutants -----------------------------------------------------------------------------------------------------------
def options(n: ast.AST, parent: ast.AST):
    "What may stand in place of a node."
    if isinstance(n, ast.BinOp) and type(n.op) in SWAP: yield ast.BinOp(n.left, SWAP[type(n.op)](), n.right)
    elif isinstance(n, ast.AugAssign) and type(n.op) in SWAP: yield ast.AugAssign(n.target, SWAP[type(n.op)](), n.value)
    elif isinstance(n, ast.Compare):
        for i, op in enumerate(n.ops):
            if type(op) in EDGE: yield ast.Compare(n.left, [EDGE[type(op)]() if j == i else o for j, o in enumerate(n.ops)], n.comparators)
    elif isinstance(n, ast.BoolOp): yield ast.BoolOp(ast.Or() if isinstance(n.op, ast.And) else ast.And(), n.values)
    elif isinstance(n, ast.UnaryOp) and isinstance(n.op, (ast.USub, ast.Not)): yield n.operand
    elif isinstance(n, ast.Constant) and isinstance(n.value, bool): yield ast.Constant(not n.value)
    elif isinstance(n, ast.Constant) and isinstance(n.value, (int, float)):
        for v in {n.value + 1, n.value * 2} - {n.value}: yield ast.Constant(v)
    elif isinstance(n, ast.Attribute) and n.attr in OTHER and isinstance(parent, ast.Call) and parent.func is n: yield ast.Attribute(n.value, OTHER[n.attr], n.ctx)
    elif isinstance(n, ast.Name) and n.id in ("min", "max", "any", "all") and isinstance(parent, ast.Call) and parent.func is n: yield ast.Name(OTHER[n.id], n.ctx)
    elif isinstance(n, ast.Return) and isinstance(n.value, (ast.Call, ast.BinOp, ast.Name)) and getattr(parent, "returns", None) is not None \
            and ast.unparse(parent.returns) in ("float", "Tensor"):
        yield ast.Return(ast.BinOp(ast.Constant(2), ast.Mult(), n.value))

def mutants(module: str) -> list:
    "All of a module: where (parent, field, index), by what, and how it is called."
    tree, out, seen = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf8")), [], collections.Counter()

    def visit(n, parent, field, index, top, name):
        if isinstance(n, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)) or field in ("annotation", "returns", "decorator_list"): return
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__": return
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            top, name = top if isinstance(top, ast.FunctionDef) else n, f"{name}.{n.name}".lstrip(".")
            if n.name in ("__repr__", "_repr_html_"): return
        for new in options(n, parent):
            text = f"{name or 'module'}: {ast.unparse(n)} -> {ast.unparse(ast.copy_location(new, n))}"
            seen[text] += 1
            out.append(dict(module=module, text=text, key=f"{module} {text} #{seen[text]}", line=n.lineno, top=top, at=(parent, field, index), new=new))
        for f, value in ast.iter_fields(n):
            if isinstance(value, ast.AST): visit(value, n, f, None, top, name)
            elif isinstance(value, list):
                for i, v in enumerate(value):
                    if isinstance(v, ast.AST): visit(v, n, f, i, top, name)

    for i, n in enumerate(tree.body): visit(n, tree, "body", i, n, "")
    for m in out: m["tree"] = tree
    return out

def put(m: dict):
    "Compile the mutant and put its code into the live module."
    parent, field, index = m["at"]
    if index is None: setattr(parent, field, m["new"])
    else: getattr(parent, field)[index] = m["new"]
    live = sys.modules[f"pcvae.{m['module']}"]
    fresh = dict(vars(live))
    exec(compile(ast.fix_missing_locations(m["tree"]), live.__file__, "exec"), fresh)
    transplant(vars(live), fresh, live.__name__)
    if isinstance(m["top"], ast.Assign):                                        # a constant of the module, wherever it went by import
        for name in {t.id for t in ast.walk(m["top"]) if isinstance(t, ast.Name) and t.id in fresh}:
            for other in [v for k, v in sys.modules.items() if k.startswith(("pcvae", "test_"))]:
                if vars(other).get(name) is vars(live)[name] and other is not live: setattr(other, name, fresh[name])
            setattr(live, name, fresh[name])

def transplant(old, new, module: str):
    "Give the functions of one namespace the code and the defaults of those of another."
    for name, a in list(old.items()):
        a, b = (getattr(v, "fget", None) or getattr(v, "__func__", v) for v in (a, new.get(name)))
        if isinstance(a, type) and a.__module__ == module:
            transplant(vars(a), vars(b), module)
            for k, v in vars(b).items():
                if isinstance(v, (bool, int, float, str)) and not k.startswith("__") and vars(a).get(k) != v: setattr(a, k, v)
        elif inspect.isfunction(a) and a.__module__ == module:
            a, b = inspect.unwrap(a), inspect.unwrap(b)
            a.__code__, a.__defaults__, a.__kwdefaults__ = b.__code__, b.__defaults__, b.__kwdefaults__


# --- tests -------------------------------------------------------------------------------------------------------------
class Mutation:
    "A pytest plugin that takes the place of the loop over the tests."
    def __init__(self, options): self.options, self.results, self.failed = options, [], []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items): self.items = items

    def pytest_runtestloop(self):
        self.reach, self.cost, items = collections.defaultdict(set), {}, self.items
        notes = Path(self.options.log + ".reach") if self.options.log else None         # what tests reached last time
        code = "".join(Path(f).read_text(encoding="utf8") for f in FILES)
        key = lambda item: hashlib.sha256((item.nodeid + inspect.getsource(item.function) + code).encode()).hexdigest()
        known = json.loads(notes.read_text()) if notes and notes.exists() else {}
        for i, item in enumerate(items):
            if key(item) not in known: known[key(item)] = self.trace(item)
            self.cost[i], seen = known[key(item)]
            for module, line in seen: self.reach[module, line].add(i)
        self.pins = {i for i, item in enumerate(items) if "defaults" in item.name}      # they read signatures and run nothing
        if self.failed: return True
        if notes: notes.write_text(json.dumps({key(item): known[key(item)] for item in items}))
        self.say(f"{len(items)} tests, {sum(self.cost.values()):.0f} CPU seconds")
        self.loop(items)
        return True

    def trace(self, item) -> tuple:
        "CPU seconds of a test, and the lines (module, number) it reaches."
        seen, start = set(), time.process_time()
        def local(frame, event, arg): seen.add((FILES[frame.f_code.co_filename], frame.f_lineno)); return local
        sys.settrace(lambda frame, event, arg: local(frame, event, arg) if frame.f_code.co_filename in FILES else None)
        reports = runtestprotocol(item, log=False)
        sys.settrace(None)
        if any(r.failed for r in reports): self.failed.append(item.nodeid)
        return time.process_time() - start, sorted(seen)

    def say(self, text): os.write(self.options.out, (text + "\n").encode())         # past pytest's capture

    def tests_of(self, m: dict) -> list:
        "Tests that reach the line, or else the function, or else the module; shortest first, as many as the budget has room for."
        within = range(m["top"].lineno, m["top"].end_lineno + 1) if isinstance(m["top"], (ast.FunctionDef, ast.ClassDef)) else ()
        exact = self.reach.get((m["module"], m["line"]), set())
        signature = not isinstance(m["top"], ast.FunctionDef) or m["line"] < m["top"].body[0].lineno
        found = (exact or {i for (module, line), tests in self.reach.items() if module == m["module"] and (line in within or not within) for i in tests}) | (self.pins if signature else set())
        found, total = sorted(found, key=self.cost.get), itertools.accumulate
        return [i for i, t in zip(found, total(map(self.cost.get, found))) if t <= self.options.budget] or found[:1]

    def child(self, m: dict, items, tests):
        "Exit code 0: survived. Anything else, the limit of CPU time included: killed."
        limit = int(20 + 5 * sum(self.cost[i] for i in tests))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2 ** 30, 16 * 2 ** 30))
        try: put(m)
        except BaseException: os._exit(3)
        for i in tests:
            if any(r.failed for r in runtestprotocol(items[i], log=False)): os._exit(2)
        os._exit(0)

    def loop(self, items):
        queue, running, end = self.options.queue[::-1], {}, time.monotonic() + 60 * self.options.minutes
        while queue or running:
            if time.monotonic() > end: queue = []
            while queue and len(running) < self.options.jobs:
                m = queue.pop()
                tests = self.tests_of(m)
                pid = os.fork()
                if not pid: self.child(m, items, tests)
                running[pid] = m
            pid, status = os.wait()
            m = running.pop(pid)
            self.results.append({"key": m["key"], "module": m["module"], "text": m["text"], "line": m["line"], "killed": status != 0})
            if self.options.log:
                with open(self.options.log, "a") as f: f.write(json.dumps(self.results[-1]) + "\n")
            if not status: self.say(f"survived  {m['module']}:{m['line']}  {m['text']}")


# --- the run -----------------------------------------------------------------------------------------------------------
def reason(r: dict) -> str | None:
    "Why no test can notice this mutant, if that is known."
    return next((why for module, pattern, why in EQUIVALENT if module == r["module"] and re.search(pattern, r["text"])), None)

def report(chosen: list, results: dict) -> str:
    "Markdown: a table, the survivors, and the equivalent mutants with the reason."
    rows, alive, same = [], [], collections.defaultdict(list)
    for module in [m for m in MODULES if any(c["module"] == m for c in chosen)] + ["all"]:
        of = [m for m in chosen if module in (m["module"], "all")]
        tried = [results[m["key"]] for m in of if m["key"] in results and not reason(m)]
        killed, equal = sum(r["killed"] for r in tried), [m for m in of if reason(m)]
        rows.append(f"| {module} | {len(of)} | {len(equal)} | {len(tried)} | {killed} | {len(tried) - killed} | {killed / max(1, len(tried)):.1%} |")
        if module == "all": break
        alive += [f"- `{module}` line {r['line']}, {r['text'].replace(': ', ': `', 1)}`" for r in tried if not r["killed"]]
        for m in equal: same[f"`{module}`: {reason(m)}"].append(m["text"])
    head = ["# Mutation run", "", "Written by `python tests/mutate.py --log FILE --write`; what a mutant is stands at the head of that script. Mutants are tried in a random order; where fewer are tried than",
            "there are, the time ran out. Equivalent ones are those that no test can notice (`mutations_equivalent.txt`); they are not run.", "",
            "| module | mutants | equivalent | tried | killed | survived | killed of tried |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", "## Survivors", "", *(alive or ["none"]), "", "## Equivalent mutants", "",
                      *[f"- {why}\n" + "\n".join(f"  - `{t}`" for t in texts) for why, texts in same.items()], ""])

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=MODULES, choices=MODULES, metavar="MODULE")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the mutants are tried in a random order")
    parser.add_argument("--seed", type=int, default=0, help="of that order")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget", type=float, default=math.inf, help="CPU seconds of tests that one mutant may cost")
    parser.add_argument("--log", help="file of results, one JSON a line; killed mutants in it are not tried again")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--write", action="store_true", help="write tests/mutations.md")
    o = parser.parse_args(argv)
    chosen = [m for module in o.only for m in mutants(module)]
    if o.list: return print(*(f"{m['module']}:{m['line']}  {m['text']}" for m in chosen), len(chosen), sep="\n")
    known = {r["key"]: r for r in map(json.loads, open(o.log))} if o.log and os.path.exists(o.log) else {}
    random.Random(o.seed).shuffle(order := list(chosen))
    o.queue, o.out = [m for m in order if not known.get(m["key"], {}).get("killed") and not reason(m)], os.dup(1)
    run = Mutation(o)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[name] = "1"
    if o.queue: pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=", "--no-header", "-W", "ignore::pytest.PytestCollectionWarning", *(str(HERE / t) for t in TESTS)], plugins=[run])
    if run.failed: sys.exit(f"without any mutant these tests fail: {', '.join(run.failed)}")
    known |= {r["key"]: r for r in run.results}
    text = report(chosen, known)
    print(text)
    if o.write: (HERE / "mutations.md").write_text(text, encoding="utf8")


if __name__ == "__main__": main()
