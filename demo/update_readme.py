"""Put the demo's chart, table and records into README.md and docs/: run it after `make demo`."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKS = re.compile(r"(<!-- demo table -->\n).*?(<!-- /demo table -->)", re.DOTALL)


def main() -> None:
    table = (ROOT / "plots" / "out" / "demo.md").read_text(encoding="utf-8")
    readme = ROOT / "README.md"
    text, count = MARKS.subn(lambda found: f"{found[1]}{table}{found[2]}", readme.read_text(encoding="utf-8"))
    assert count == 1, "README.md has one place for the table"
    readme.write_text(text, encoding="utf-8")
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "plots" / "out" / "demo.png", images / "demo.png")
    (ROOT / "docs" / "results").mkdir(exist_ok=True)
    shutil.copyfile(ROOT / "plots" / "out" / "demo.json", ROOT / "docs" / "results" / "demo.json")


if __name__ == "__main__":
    main()
