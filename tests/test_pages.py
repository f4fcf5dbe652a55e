"""The form of every page, and the limits of the book: density of the code, voice of the prose, truth of what is stored.

The limits are smell detectors, set where books of code that are a pleasure to read stand; `tools/measure.py` prints the figures."""

import ast
import base64
import re

import pytest
from measure import code_figures, modules, prose_figures, report
from pages import (
    FLOORS,
    NBS,
    code_cells,
    directives,
    exported,
    named,
    notebooks,
    number,
    parse,
    read,
    reads_rows,
    source,
)

PAGES = [p for p in notebooks() if p.name != "index.ipynb"]
LEAK = re.compile(r"0x[0-9a-f]{8,}|/tmp/|/home/|/root/|/Users/|site-packages/")
EACH = dict(ids=[p.relative_to(NBS).as_posix() for p in PAGES])
WITH_INDEX = dict(ids=[p.relative_to(NBS).as_posix() for p in notebooks()])


def test_density_of_the_code(capsys):
    found = code_figures(modules())
    with capsys.disabled():
        print("\n" + report(found))
    assert found["nodes a line"] <= 9.5
    assert found["characters a line"] <= 42
    assert found["header share"] <= 0.20
    assert found["lines with several statements"] <= 20
    assert found["share of names used once"] <= 0.31
    protocol = {"begin", "end", "read", "write"}  # of every residual connection
    protocol |= {"step"}  # of a gymnasium environment, and of the language model
    assert len(set(found["names defined more than once"]) - protocol) <= 10
    assert found["lines over 100 columns"] == []
    assert found["longest function"][1] <= 80


def test_voice_of_the_prose(capsys):
    found = prose_figures(notebooks())
    with capsys.disabled():
        print("\n" + report(found))
    assert found["we and you"] >= 12
    assert found["examples"] >= 1.5
    assert found["negations"] <= 10
    assert len(found["sentences above 40 words"]) <= 10


@pytest.mark.parametrize("path", PAGES, **EACH)
def test_opening(path):
    "Title and verdict, then a paragraph to the reader with the paper's address and what the page reads and feeds"
    cells = read(path)["cells"]
    title = [line for line in source(cells[0]).splitlines() if line.strip()]
    assert cells[0]["cell_type"] == "markdown"
    assert re.match(r"# \S", title[0]) and title[1].startswith("> "), (
        "the first cell is `# Title` and a `> line`"
    )
    assert all(re.match(r"- [\w-]+: ", line) for line in title[2:]), (
        "only `- key: value` lines after the `> line`"
    )
    opening = source(cells[1])
    assert cells[1]["cell_type"] == "markdown" and not opening.lstrip().startswith("#")
    assert re.search(r"^\| \*\*(Paper|Source)s?\*\* \|", opening, re.M), (
        "the box names its paper or source"
    )
    assert "http" in opening, "the second cell links it"
    rows = [line for line in opening.splitlines() if re.match(r"\| \*\*(Reads|Feeds)", line)]
    assert rows == reads_rows(path), "run `make export`, which writes these rows"


@pytest.mark.parametrize("path", PAGES, **EACH)
def test_cells(path):
    "default_exp first, imports alone, the export last; no marker of a cell or directive inside another cell"
    cells = read(path)["cells"]
    code = code_cells(path)
    exports = exported(path)
    if exports:
        assert f"#| default_exp {named(path).replace('/', '.')}" in code[0], (
            f"default_exp of {path.name}"
        )
        assert "nbdev.nbdev_export()" in code[-1] and "hide" in directives(code[-1]), (
            "the last cell is the hidden export"
        )
        headings = [source(c).strip() for c in cells if c["cell_type"] == "markdown"]
        assert headings[-1].startswith("## Export -"), "the last Markdown cell is `## Export -`"
    for text in code[:-1]:
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in parse(text).body}
        assert kinds != {True, False}, f"imports beside other code:\n{text}"
    for text in exports:
        assert not re.search(r"^\s*from __future__|^\s*from \S+ import \*", text, re.M), (
            f"star or __future__ import:\n{text}"
        )
    for text in code:
        lines = text.splitlines()
        head = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
        inside = [line for line in lines[head:] if line.startswith(("# %%", "#|", "%%%%"))]
        assert not inside, f"a cell marker or directive stands inside a cell: {inside}"


@pytest.mark.parametrize("path", notebooks(), **WITH_INDEX)
def test_stored_outputs(path):
    "No error, no address or path of a machine, small pictures, a small file"
    assert path.stat().st_size <= 500_000, f"{path.name} is {path.stat().st_size:,} bytes"
    for i, cell in enumerate(read(path)["cells"]):
        for output in cell.get("outputs", ()):
            assert output["output_type"] != "error", (
                f"cell {i} stores an error: {output.get('ename')}"
            )
            assert output.get("name") != "stderr", (
                f"cell {i} stores what went to stderr: {''.join(output['text'])[:200]}"
            )
            data = output.get("data", {"text/plain": output.get("text", "")})
            shown = "".join("".join(v) for kind, v in data.items() if kind.startswith("text"))
            leak = LEAK.search(shown)
            assert not leak, f"cell {i} shows {leak[0]!r}: an address or a path"
            if "image/png" in data:
                size = len(base64.b64decode("".join(data["image/png"])))
                assert size <= 50_000, f"cell {i}: a picture of {size:,} bytes"


def test_numbers():
    "Numbers are whole, unique, and rise from floor to floor"
    numbers = [number(p) for p in PAGES]
    assert len(numbers) == len(set(numbers)), "two pages with one number"
    floors = [p.parent.name for p in PAGES]
    assert floors == sorted(floors, key=FLOORS.index), "a floor stands among the numbers of another"
