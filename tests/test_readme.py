"README keeps its promises: the example runs, the tables are those of the committed figures."
import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf8")

def test_the_example_is_short_and_runs(tmp_path, monkeypatch):
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", TEXT, re.S)[1]
    assert len(code.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out): exec(compile(code, "README example", "exec"), {"__name__": "readme"})
    lines = [l for l in out.getvalue().splitlines() if re.match(r"\d ", l)]
    assert len(lines) == 3 and not any("NaN" in l for l in lines)
    assert len(list(tmp_path.rglob("results/**/*.json"))) == 3

def test_the_example_with_own_data_and_network_runs():
    code = re.search(r"<!-- example data -->\n```python\n(.*?)```", TEXT, re.S)[1]
    assert len(code.splitlines()) <= 25
    out, names = io.StringIO(), {"__name__": "readme"}
    with contextlib.redirect_stdout(out): exec(compile(code, "README example", "exec"), names)
    assert len(re.findall(r"^(?:VAE|warm-up|both) .*\d", out.getvalue(), re.M)) == 3 and "NaN" not in out.getvalue()
    assert len({tuple(v.model.encoder.head.weight.flatten()[:5].tolist()) for v in names["trained"].values()}) == 3
    assert "ollapsed: the codes tell" in out.getvalue(), "the text says that the plain VAE collapses"
    mi = {name: names["evaluate"](view, names["data"])["mi"] for name, view in names["trained"].items()}
    assert mi["VAE"] < 0.3 < mi["warm-up"] < mi["both"]

def test_own_text_as_it_says():
    from pcvae.data.text import text_data
    from pcvae.models.lstm import lstm
    make = lambda n: [f"the {'cat dog bird'.split()[i % 3]} sees a {'tree house'.split()[i % 2]}" for i in range(n)]
    data = eval(re.search(r"`(text_data\(.*?\}\))`", TEXT)[1], {"text_data": text_data, "lines": make(12), "more": make(5), "others": make(6)})
    model = eval(re.search(r"`(lstm\(.*?\))` of", TEXT)[1], {"lstm": lstm, "data": data})
    assert model.log_prob(data.test, model.encode(data.test).mean).shape == (6,)

BLOCKS = re.findall(r"<!-- table ([\w/]+) -->\n(.*?)<!-- end -->", TEXT, re.S)

@pytest.mark.parametrize("name, block", BLOCKS, ids=[n for n, _ in BLOCKS])
def test_tables_are_those_of_the_rows(name, block):
    assert block.strip() == (ROOT / "figures" / f"{name}.md").read_text(encoding="utf8").strip(), "run `make readme`"

def test_pictures_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT): assert (ROOT / path).exists(), path
