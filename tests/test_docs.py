"""What README.md and docs/ say is true: links lead somewhere, messages are ours, the site and the notebook work."""

import ast
import os
import re
import sysconfig
from pathlib import Path

import nbformat
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TROUBLES = ROOT / "docs" / "troubleshooting.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


def test_every_message_explained_is_one_of_ours():
    literals = set()
    for file in (ROOT / "asd_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                literals.add("…".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.add(node.value)
    explained = re.findall(r"^\*\*`(.*)`\*\*$", TROUBLES.read_text(), re.MULTILINE)
    assert len(explained) > 10
    for message in explained:
        parts = [part.strip(" :") for part in message.split("…") if part.strip(" :")]
        assert any(all(part in literal for part in parts) for literal in literals), message


def test_the_site_builds_without_a_warning(tmp_path, caplog):
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert "DistillationTrainer" in (tmp_path / "api" / "training" / "index.html").read_text()
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert not re.findall(
        r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://", pages
    )  # it asks nothing of another server


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(ROOT / "docs" / "notebooks" / "quickstart.ipynb", 4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("STEPS = 300")
    cells[0].source = "STEPS = 2"
    cells[1].source = cells[1].source.replace("1000", "40").replace("--num-val 100", "--num-val 8")
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    table = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert re.search(r"^teacher .*\nstudent ", table, re.MULTILINE)
