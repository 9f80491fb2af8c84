"""What mkdocs does with links that lead out of ``docs/``, and with a notebook.

On the site the pages of ``docs/`` are the root. Pages elsewhere in the repository that they link to lie in
``repository/``; a link to any other file is left as its text. A notebook becomes a page, outputs and all.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "ray_configs/README.md", "tests/golden/README.md")


def place(path: str) -> str | None:
    """Where a file of the repository lies on the site; None where it is not there."""
    if path in OUTSIDE:
        return f"repository/{path}"
    if not path.startswith("docs/") or path.startswith("docs/results/"):
        return None
    return path.removeprefix("docs/").replace(".ipynb", ".md")


def relinked(text: str, path: str) -> str:
    """A page's text with its links as they are on the site.

    Args:
        text: Markdown.
        path: The page's file in the repository.
    """

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found.groups(default="")
        if not target or re.match(r"\w+:", target):
            return found[0]
        there = place(posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))
        here = place(path)
        assert here is not None
        if there is None:
            return label
        return f"[{label}]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor})"

    # Not inside of code: every second piece is some.
    pieces = re.split(r"(^```.*?^```|`[^`\n]+`(?!\]))", text, flags=re.DOTALL | re.MULTILINE)
    for number in range(0, len(pieces), 2):
        pieces[number] = re.sub(r"\[([^\[\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, pieces[number])
    return "".join(pieces)


def page_of(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown."""
    pieces = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        pieces.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                pieces.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif "text/html" in data:
                # Without its own looks a pandas frame has those of the other tables.
                html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
                table = re.sub(r"<table[^>]*", "<table", html)
                pieces.append(table.replace("\n\n", "\n"))
            else:
                pieces.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(pieces) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, and those of notebooks."""
    pages = {path: (ROOT / path).read_text(encoding="utf-8") for path in OUTSIDE}
    for file in (ROOT / "docs").glob("*.ipynb"):
        pages[f"docs/{file.name}"] = page_of(json.loads(file.read_text(encoding="utf-8")))
        files.remove(files.src_uris[file.name])
    for path, text in pages.items():
        uri = place(path)
        assert uri is not None
        files.append(File.generated(config, uri, content=relinked(text, path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the pages of ``docs/`` itself."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else relinked(markdown, f"docs/{uri}")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings' references to names are names in code."""
    return re.sub(r":(?:class|data|func|meth|mod):(?=<code>)", "", html)
