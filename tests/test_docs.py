"The site builds with no warning, no link of its own is dead, and it needs no network."

import os, re, subprocess, sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import pytest
from pages import ROOT, named, notebooks, number


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site that NASH_LAB_SITE names, which .ci/run has built a moment ago; without it a fresh one"
    if built := os.environ.get("NASH_LAB_SITE"):
        return Path(built)
    out = tmp_path_factory.mktemp("site")
    r = subprocess.run(
        [sys.executable, "tools/build_docs.py", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if r.returncode:
        pytest.fail(r.stdout[-4000:] + r.stderr[-8000:], pytrace=False)
    return out / "html"


class Page(HTMLParser):
    "Links, anchors and assets of one page"

    def __init__(self, file):
        super().__init__()
        self.links, self.ids, self.assets = [], set(), []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"):
            self.ids.add(a["id"])
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon", "preload"):
            self.assets.append(a["href"])
        if tag in ("img", "script", "iframe") and a.get("src"):
            self.assets.append(a["src"])


def test_every_page_is_there(site):
    for p in notebooks():
        assert (site / f"{named(p)}.html").exists(), f"{p.name} has no page"
    for guide in (*(ROOT / "docs").glob("*.md"), ROOT / "LOG.md"):
        assert (site / f"guides/{guide.stem}.html").exists(), f"{guide.name} has no page"


def test_links(site):
    "Every relative link and asset of every page leads to a file, every #anchor to an id"
    pages, dead = {f: Page(f) for f in site.rglob("*.html")}, []
    for file, page in pages.items():
        for link in page.links + page.assets:
            link = unescape(link)
            if re.match(r"[a-z]+:", link) or link == "#":
                continue
            path, _, anchor = unquote(link).partition("#")
            to = (file.parent / path.split("?")[0]).resolve() if path else file
            if not to.exists() or (anchor and to in pages and anchor not in pages[to].ids):
                dead.append(f"{file.relative_to(site)}: {link}")
    assert not dead, "\n".join(dead)


def test_no_network(site):
    "Scripts, styles, fonts and pictures are local"
    for file in site.rglob("*.html"):
        far = [o for o in Page(file).assets if re.match(r"(https?:)?//", o)]
        assert not far, f"{file.relative_to(site)} loads {far}"
    for css in site.rglob("*.css"):
        assert not re.search(r'url\(["\']?(https?:)?//|@import\s+["\']?https?:', css.read_text()), (
            f"{css.name} loads from the network"
        )
    assert (site / "_static/tex-svg.js").exists(), "MathJax is not local"


def test_search_index(site):
    index = (site / "searchindex.js").read_text()
    for p in notebooks():
        assert f'"{named(p)}"' in index, f"{named(p)} is not in the search index"
    assert "sinkhorn" in index


def test_reading_order(site):
    "The sidebar lists the pages in the order of their numbers"
    sidebar = Path(site / "index.html").read_text().split("sidebar-tree")[1].split("</aside>")[0]
    listed = re.findall(r'href="((?:\w+/)\w+)\.html', sidebar)
    pages = [named(p) for p in notebooks() if p.name != "index.ipynb"]
    assert [o for o in listed if not o.startswith("guides/")] == pages
    shown = re.findall(r'href="((?:\w+/)\w+)\.html[^"]*">(\d\d) [^<]+</a>', sidebar)
    numbers = {named(p): f"{number(p):02}" for p in notebooks()}
    assert {place: numbers[place] for place in pages} == dict(shown), "numbers in the sidebar"
