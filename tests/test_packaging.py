"""The repository's own rules: pins, notebooks, import order, sizes, what an import costs, no traces of one machine."""
import ast, json, os, re, shutil, subprocess, sys, warnings
from configparser import ConfigParser
from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import nbformat, pytest, yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import pcvae

root = Path(__file__).resolve().parent.parent
nbs = root/"nbs"
notebooks = sorted(p for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
every_notebook = pytest.mark.parametrize("path", notebooks, ids=lambda p: p.relative_to(nbs).as_posix())
cfg = ConfigParser()
cfg.read(root/"settings.ini", encoding="utf8")
cfg = cfg["DEFAULT"]


@cache
def load(path): return json.loads(path.read_text(encoding="utf8"))

def source(cell): return "".join(cell["source"])

def outputs(path): return [o for c in load(path)["cells"] for o in c.get("outputs", [])]


# --- pins -------------------------------------------------------------------------------------------------------------
def pins():
    lines = (root/"constraints.txt").read_text().splitlines()
    return {canonicalize_name(n): v for n, v in (l.split("==") for l in lines if l and not l.startswith("#"))}


@pytest.mark.parametrize("key", [k for k in cfg if k == "requirements" or k.endswith("_requirements")])
def test_requirements_are_pinned_and_the_pins_meet_them(key):
    for r in map(Requirement, cfg[key].split()):
        assert canonicalize_name(r.name) in pins(), f"{r.name} of settings.ini has no pin in constraints.txt"
        assert r.specifier.contains(pins()[canonicalize_name(r.name)]), f"the pin of {r.name} is outside {r}"


def test_pins_carry_no_local_label(): assert not [v for v in pins().values() if "+" in v]


def test_pinned_packages_allow_the_oldest_python():
    "One pin that asks for a later 3.11.x, and pip searches for hours where Python is 3.11.2."
    oldest = f"{cfg['min_python']}.0"
    late = {d.name: r for d in distributions() if (r := d.metadata["Requires-Python"]) and oldest not in SpecifierSet(r)}
    assert not late


def test_environment_takes_its_pins_from_constraints():
    deps = yaml.safe_load((root/"environment.yml").read_text())["dependencies"]
    assert [d for d in deps if isinstance(d, str) and d.startswith("python=")] == [f"python={cfg['min_python']}"]
    pip = next(d["pip"] for d in deps if isinstance(d, dict))
    assert "-c constraints.txt" in pip and "-e .[dev]" in pip
    names = [Requirement(d).name for d in pip if not d.startswith("-")]
    assert all(canonicalize_name(n) in pins() for n in names) and not any("==" in d for d in pip)


def test_version_stands_in_settings_alone(): assert pcvae.__version__ == cfg["version"]


def test_published_tables_are_package_data():
    tables = list(Path(pcvae.__file__).parent.glob("published/*.csv"))
    assert len(tables) >= 12 and all(t.read_text().count("\n") > 1 for t in tables)


def test_ci_script_can_be_run(): assert os.access(root/".ci/run", os.X_OK)


# --- notebooks --------------------------------------------------------------------------------------------------------
@every_notebook
def test_notebook_opens_without_a_warning(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nb = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5)
    spec = nb.metadata.kernelspec
    assert spec.name == "python3" and spec.language == "python" and spec.display_name
    ids = [c.id for c in nb.cells]
    assert len(ids) == len(set(ids))


@every_notebook
def test_notebook_shows_no_error(path):
    assert not [o for o in outputs(path) if o["output_type"] == "error"]


@pytest.mark.parametrize("path", sorted((nbs/"papers").glob("*.ipynb")), ids=lambda p: p.stem)
def test_paper_has_one_parameters_cell(path):
    tagged = [c for c in load(path)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["cell_type"] == "code"


# --- import order -----------------------------------------------------------------------------------------------------
def default_exp(path):
    "The module a notebook exports to, or None."
    m = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, load(path)["cells"])), re.M)
    return m and f"pcvae.{m[1]}"


homes = {m: p for p in notebooks if (m := default_exp(p))}      # module -> notebook


def exported_cells(path):
    return [source(c) for c in load(path)["cells"] if c["cell_type"] == "code"
            and re.search(r"^#\|\s*(export|exporti|exports)\b", source(c), re.M)]


def imported(code):
    "The modules of pcvae that `code` imports, wherever in it."
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.startswith("pcvae."))
        elif isinstance(node, ast.ImportFrom) and node.module == "pcvae":
            yield from (f"pcvae.{pcvae._home.get(a.name, a.name)}" for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pcvae."):
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in homes)


def sources_of(module):
    "The notebooks behind a module; for a package, those of all its modules."
    return [homes[module]] if module in homes else [p for m, p in homes.items() if m.startswith(module + ".")]


def place(path):
    "Where a notebook stands in the order of reading: by name, but the leaderboard after the papers whose rows it borrows."
    return path.name == "leaderboard.ipynb", path.relative_to(nbs)


@every_notebook
def test_notebook_imports_only_from_earlier_ones(path):
    for module in {m for code in exported_cells(path) for m in imported(code)}:
        late = [p.relative_to(nbs).as_posix() for p in sources_of(module) if place(p) >= place(path)]
        assert not late, f"{path.relative_to(nbs)} imports {module}, which comes from {late}"


# --- the package ------------------------------------------------------------------------------------------------------
def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_functions_are_short():
    sizes = {f"{p.relative_to(root)}:{f.name}": f.end_lineno - f.lineno + 1 for p in root.glob("pcvae/**/*.py") for f in functions(p)}
    assert not {name: n for name, n in sizes.items() if n > 60}
    assert sorted(sizes.values())[len(sizes)//2] <= 8, "the median function has more than 8 lines"


def modules_after(statement):
    "The top-level modules that are loaded once `statement` has run in a fresh interpreter."
    code = f"{statement}; import sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    return set(json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout))


def test_import_of_the_package_is_cheap():
    assert not modules_after("import pcvae") & {"torch", "numpy", "pandas", "matplotlib", "papermill", "sklearn", "lightning"}


def test_import_of_the_core_brings_no_plotting():
    heavy = {"matplotlib", "papermill", "sklearn", "lightning"}
    assert not modules_after("from pcvae import DiagGaussian, VAE, Method") & heavy


@pytest.mark.parametrize("name", sorted(pcvae._home))
def test_lazy_names_resolve(name):
    assert find_spec(f"pcvae.{pcvae._home[name]}"), f"pcvae.{name} is listed, but its module does not exist"
    assert getattr(pcvae, name).__name__ == name and name in dir(pcvae)


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'pcvae' has no attribute 'collapse'"): pcvae.collapse


# --- text -------------------------------------------------------------------------------------------------------------
# Nothing may depend on, or tell of, the machine it was written on. Each pattern is spelt so that it does not match itself.
traces = {
    "a machine's path": r"(?<![\w.-])/(?:work|farm|root|tmp|home|opt|mnt|Users)/",
    "a package index": r"(?:index-ur[l]|trusted-hos[t]|find-link[s]\b|file:[/]{3})",
    "how it was made": r"(?i)\b(?:hel[p]ers?|sessio[n]s?|(?<!user-)agen[t]s?|fact[s] sheets?|issu[e] 2)\b",
}


def tracked():
    "Files that belong to the repository: git's list, or (without git) all outside the folders that .gitignore names."
    ls = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True) if (root/".git").exists() else None
    if ls and ls.returncode == 0: return [root/f for f in ls.stdout.splitlines() if (root/f).is_file()]
    skip = {l.rstrip("/") for l in (root/".gitignore").read_text().splitlines() if l.endswith("/")}
    return [p for p in root.rglob("*") if p.is_file() and not {q for q in p.relative_to(root).parts if q in skip or q.endswith(".egg-info")}]


def strings(node):
    "All strings in a parsed notebook, without embedded pictures."
    if isinstance(node, str): yield node
    elif isinstance(node, list): yield from (s for n in node for s in strings(n))
    elif isinstance(node, dict): yield from (s for k, n in node.items() if k not in ("image/png", "image/svg+xml", "id") for s in strings(n))


def text_of(path):
    if path.suffix == ".ipynb": return "\n".join(strings(load(path)))
    return "" if path.suffix in {".png", ".pdf"} else path.read_text(encoding="utf8", errors="replace")


@pytest.mark.parametrize("what", traces)
def test_no_traces_of_one_machine(what):
    found = {p.relative_to(root).as_posix(): m[0] for p in tracked() if p.name != "LICENSE" if (m := re.search(traces[what], text_of(p)))}
    assert not found, f"{what} is named in {found}"


# --- the checks themselves --------------------------------------------------------------------------------------------
def write_notebook(path, *cells):
    "A clean notebook with the given code cells."
    cells = [nbformat.v4.new_code_cell(s, id=f"c{i}") for i, s in enumerate(cells)]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def test_sync_check_sees_stale_and_orphaned_modules(tmp_path, monkeypatch):
    import check_sync
    src, to = tmp_path/"src", tmp_path/"copy"
    write_notebook(src/"nbs/00_a.ipynb", "#| default_exp a", "#| export\nx = 1")
    shutil.copy(root/"settings.ini", src)
    (src/"pcvae").mkdir()
    (src/"pcvae/a.py").write_text(f"# {check_sync.written}\nx = 2\n")
    (src/"pcvae/gone.py").write_text(f"# {check_sync.written}\n")
    monkeypatch.setattr(check_sync, "root", src)
    check_sync.copy_tree(to)
    check_sync.nbdev("nbdev_export", to)
    found = "\n".join(check_sync.differences(to))
    assert "a.py: differs" in found and "gone.py: no notebook exports it" in found and "00_a.ipynb" not in found


def test_runner_counts_passes_failures_and_deaths(tmp_path):
    import run_notebooks
    write_notebook(tmp_path/"good.ipynb", "assert 1 + 1 == 2", "#| eval: false\nassert False", "#| gpu\nassert False")
    write_notebook(tmp_path/"bad.ipynb", "assert 1 + 1 == 3")
    write_notebook(tmp_path/"dies.ipynb", "import os; os._exit(3)")
    write_notebook(tmp_path/"left/out.ipynb", "assert False")
    (tmp_path/"left/.notest").touch()
    files = run_notebooks.find([tmp_path])
    verdict = {f.stem: v for f, v, _ in run_notebooks.run(files, workers=2, flags=[], limit=600)}
    assert set(verdict) == {"good", "bad", "dies"}
    assert verdict["good"] == "ok" and verdict["bad"] == "FAILED" and "status 3" in verdict["dies"]


def test_runner_stops_a_notebook_that_hangs(tmp_path):
    import run_notebooks
    write_notebook(tmp_path/"hangs.ipynb", "import time; time.sleep(600)")
    [(_, verdict, _)] = run_notebooks.run([tmp_path/"hangs.ipynb"], workers=2, flags=[], limit=1)
    assert "stopped after 1 s" in verdict
