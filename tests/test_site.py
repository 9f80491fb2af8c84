"""The pages as a site: ``mkdocs build --strict``, which follows every link and anchor."""

import json
import re
from pathlib import Path

import pytest

import sparsyfed

pytest.importorskip("material", reason="mkdocs is in the extra docs")
pytest.importorskip("mkdocstrings", reason="mkdocs is in the extra docs")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning ends the build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_every_page_is_in_the_navigation(site):
    """Those of docs/ and the pages elsewhere that they link to; and none asks another host for anything."""
    (start,) = site.glob("index.html")
    linked = set(re.findall(r'href="([^":#?]+/)" class="md-nav__link"', start.read_text(encoding="utf-8")))
    built = {str(path.parent.relative_to(site)) + "/" for path in site.glob("*/**/index.html")}
    assert linked - {"./"} == built
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)\b[^>]* (?:src|href)="(\w+://[^"]*)', page.read_text())
        assert not loaded, (page, loaded)


def test_the_reference_documents_the_public_names(site):
    """All but the small pieces that a method may use, which docs/writing-methods.md leads to."""
    shown = set(re.findall(r"^::: sparsyfed\.(\w+)", (ROOT / "docs/reference.md").read_text(), re.MULTILINE))
    assert shown <= set(sparsyfed.__all__)
    assert set(sparsyfed.__all__) - set(sparsyfed.algorithms.__all__) <= shown
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in shown:
        assert re.search(rf'id="[\w.]*\b{name}"', page), name
    assert ":class:" not in page


def test_links_between_the_rooms_of_the_repository(site):
    """A page of docs/, one elsewhere, and a file that is no page."""
    writing = (site / "writing-methods" / "index.html").read_text(encoding="utf-8")
    assert 'href="../repository/#your-own-method"' in writing
    readme = (site / "repository" / "index.html").read_text(encoding="utf-8")
    assert 'href="../experiments/#data-sets"' in readme
    assert 'src="../laptop.png"' in readme
    assert "Cite it by CITATION.cff." in readme


def test_a_notebook_is_a_page_with_its_outputs(site):
    """Cells, tables and pictures of docs/tour.ipynb, whose bytes are untouched."""
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))
    page = (site / "tour" / "index.html").read_text(encoding="utf-8")
    outputs = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    pictures = ["".join(data["image/png"]).strip() for data in outputs if "image/png" in data]
    assert re.findall(r'src="data:image/png;base64,([^"]*)"', page) == pictures
    assert "<th>test/accuracy</th>" in page
    assert 'href="../writing-methods/"' in page
