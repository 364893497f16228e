"Writes the tables of figures/**.md between the `<!-- table NAME -->` marks of README.md: `make readme`."
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

def fill(text: str) -> str:
    "README's text with every marked block replaced by the table it names."
    table = lambda m: f"{m[1]}\n{(ROOT / 'figures' / f'{m[2]}.md').read_text(encoding='utf8').strip()}\n<!-- end -->"
    return re.sub(r"(<!-- table ([\w/]+) -->)\n.*?<!-- end -->", table, text, flags=re.S)

if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf8")), encoding="utf8")
