"README.md is what nbs/index.ipynb gives, and its Python works as it stands."

import re, subprocess, sys
from configparser import ConfigParser
from pages import FLOORS, NBS, ROOT, named, notebooks


def run(*args, **kw):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL, **kw
    )


def test_readme_is_the_index():
    r = run("tools/readme.py", "--check", cwd=ROOT)
    assert r.returncode == 0, r.stdout + r.stderr


def test_code_blocks(tmp_path):
    "All Python blocks of README.md, one after the other in one process, from an empty folder; a last expression is printed"
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks, "README.md has no Python block"
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    r = run("readme.py", cwd=tmp_path)
    assert r.returncode == 0, r.stderr


def own(link):
    "The file of the project that an address of README.md stands for, None for an address elsewhere"
    address = r"https://github\.com/nash-lab/nash_lab/(?:blob|raw)/main/([^#]+)"
    found = re.match(address, link)
    return ROOT / found[1] if found else None


def test_links():
    "No link is relative, as the package index has no files beside it; those into the project lead to files"
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', (ROOT / "README.md").read_text())
    for link in (a or b for a, b in links):
        assert re.match(r"[a-z]+:|#", link), f"README.md: relative link {link}"
        assert own(link) is None or own(link).exists(), f"README.md: dead link {link}"
    assert sum(own(a or b) is not None for a, b in links) > 50


def test_addresses():
    "The public addresses stand in settings.ini; the index has placeholders for them, README.md what they stand for"
    settings = ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    index, readme = (NBS / "index.ipynb").read_text(), (ROOT / "README.md").read_text()
    for key in ("git_url", "doc_host"):
        assert settings["DEFAULT"][key] not in index, (
            f"nbs/index.ipynb spells out {key}: write {{git_url}} or {{doc_url}}"
        )
    assert "{git_url}" not in readme and "{doc_url}" not in readme


def section(title):
    "The text of README.md below a heading, up to the next one"
    return re.split(
        r"^## ",
        (ROOT / "README.md").read_text().partition(f"\n## {title}\n")[2],
        maxsplit=1,
        flags=re.M,
    )[0]


def test_the_map_names_every_page_once():
    "Each row is a floor and its pages, in reading order; none is left out, none is there twice"
    links = re.findall(r"/(nbs/(\w+)/[^)]+\.ipynb)\)", section("The map"))
    pages = [p.relative_to(ROOT).as_posix() for p in notebooks() if p.parent != NBS]
    assert [link for link, _ in links] == pages
    for row in re.findall(r"^\| `(\w+)`: .*$", section("The map"), re.M):
        assert row in FLOORS
    for floor, cells in re.findall(r"^\| `(\w+)`: [^|]*\|([^|]*)\|$", section("The map"), re.M):
        assert {folder for _, folder in re.findall(r"/(nbs/(\w+)/[^)]+\.ipynb)\)", cells)} == {
            floor
        }


def test_limits_are_true():
    "The design that is said to be missing is missing, and nothing that has a page is said to be"
    limits = section("Limits")
    assert ("mHC gates tuned by reinforcement learning" in limits) == (
        not list((NBS / "discover").glob("*_gates.ipynb"))
    )
    assert "not here yet" not in limits
    for name in ("adapt/sdft", "discover/ttt"):
        assert any(named(p) == name for p in notebooks()), f"README.md promises {name}"


def test_results_are_those_of_the_log():
    "Every measured number of the results stands in the log"
    log = (ROOT / "LOG.md").read_text()
    for number in (
        "3.692",
        "2.973",
        "1.970",
        "1.651",
        "1.519",
        "0.3982",
        "0.3854",
        "0.3862",
        "0.0046",
        "0.0013",
        "0.0014",
    ):
        assert number in section("Results") and number in log, number
