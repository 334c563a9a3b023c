"""Writes the pages of docs/ that are generated from code; `--check` only says whether they are current."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from commonweight.recipe.docs import reference_markdown
from commonweight.recipe.methods import methods_markdown

DOCS = Path(__file__).parent.parent / "docs"


def pages() -> dict[Path, str]:
    """The generated pages, by path."""
    return {DOCS / "recipe.md": reference_markdown(), DOCS / "methods.md": methods_markdown()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if parser.parse_args().check:
        sys.exit(f"not current: {', '.join(p.name for p in stale)}; run `make docs`" if stale else 0)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote docs/{path.name}")


if __name__ == "__main__":
    main()
