"""The pages of the documentation: links, anchors, pictures, and that the site builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", t.lower()).strip().replace(" ", "-") for t in titles}


def broken(page: Path, text: str) -> list[str]:
    """The page's relative links that lead nowhere."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken(page, page.read_text())


def test_a_broken_link_would_be_seen():
    text = "# A b\n[x](no.md) [y](#a-b) [z](#c) [w](docs/recipes.md#uptrain) [v](docs/mfa.md#no)"
    page = ROOT / "x.md"
    assert broken(page, text.replace("[y](#a-b) [z](#c) ", "")) == ["no.md", "docs/mfa.md#no"]
    assert anchors(text) == {"a-b"}


def test_every_page_is_in_the_menu_and_every_picture_in_use():
    menu = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w-]+\.md", menu))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
    used = set(re.findall(r"images/([\w.-]+)", " ".join(page.read_text() for page in PAGES)))
    assert {path.name for path in (ROOT / "docs" / "images").iterdir()} <= used


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "recipes" / "index.html").read_text()
    assert 'src="../images/report.png"' in page
