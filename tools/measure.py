"""How dense is the code, and who is speaking in the prose? Prints the figures of the book; the tests hold them to their limits.

    python tools/measure.py [WORD ...]      only modules and pages with one of the words in their name

A number here is a smell detector. Met by packing lines, or by splitting a function for its own sake, it means nothing."""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

from pages import NBS, ROOT, notebooks, read, source

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SILENT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
NOT_PROSE = re.compile(
    r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|https?://\S+|\|.*?\|$", re.S | re.M
)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
WE = set("we us our let's you your".split())
NEGATIONS = set("not no nothing nobody none never nor".split())
EXAMPLE = re.compile(r"for example|for instance|suppose|imagine|say,", re.I)


def modules() -> list[Path]:
    "The generated modules of the package."
    found = (ROOT / "nash_lab").rglob("*.py")
    return sorted(p for p in found if p.name not in ("_modidx.py", "__init__.py"))


def code_lines(text: str, tree: ast.Module) -> list[int]:
    "Numbers of the lines that hold code: no blanks, comments or docstrings."
    docstrings = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                docstrings.update(range(body[0].lineno, body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return sorted(lines - docstrings)


def code_figures(paths: list[Path]) -> dict:
    "Density of some modules; a name counts as used wherever in the package it is used."
    used = Counter()
    defined = Counter()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                used[node.id] += 1
            elif isinstance(node, ast.Attribute):
                used[node.attr] += 1
            elif isinstance(node, FUNCTIONS):
                defined[node.name] += 1

    nodes = characters = lines = headers = several = 0
    names, bodies, wide = set(), {}, []
    for path in paths:
        text = path.read_text()
        tree = ast.parse(text)
        kept = code_lines(text, tree)
        rows = text.splitlines()
        lines += len(kept)
        characters += sum(len(rows[n - 1].strip()) for n in kept)
        wide += [f"{path.relative_to(ROOT)}:{n}" for n in kept if len(rows[n - 1]) > 100]
        statements = Counter()
        for node in ast.walk(tree):
            nodes += 1
            if isinstance(node, ast.stmt):
                statements[node.lineno] += 1
            if isinstance(node, FUNCTIONS):
                first = node.body[0].lineno
                headers += sum(node.lineno <= n < first for n in kept)
                bodies[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = sum(
                    first <= n <= node.end_lineno for n in kept
                )
                names.add(node.name)
        several += sum(count > 1 for count in statements.values())
    once = {n for n in names if used[n] <= 1 and not n.startswith("__")}
    twice = {n for n in names if defined[n] > 1 and not n.startswith("_")}
    return {
        "lines": lines,
        "nodes a line": nodes / max(lines, 1),
        "characters a line": characters / max(lines, 1),
        "header share": headers / max(lines, 1),
        "lines with several statements": several,
        "share of names used once": len(once) / max(len(names), 1),
        "names defined more than once": sorted(twice),
        "lines over 100 columns": wide,
        "longest function": max(bodies.items(), key=lambda item: item[1], default=("", 0)),
    }


def prose_cells(path: Path) -> list[str]:
    "The sentences of each Markdown cell of a page, without code, formulas, addresses and tables."
    cells = (source(c) for c in read(path)["cells"] if c["cell_type"] == "markdown")
    return [NOT_PROSE.sub(" x ", text) for text in cells]


def prose_figures(paths: list[Path]) -> dict:
    "The voice of some pages, counts per 1,000 words."
    words, examples, long = [], 0, []
    for path in paths:
        for text in prose_cells(path):
            words += [w.lower() for w in WORD.findall(text)]
            examples += len(EXAMPLE.findall(text))
            for sentence in re.split(r"(?<=[.!?:])\s", text):
                if len(WORD.findall(sentence)) > 40:
                    long.append(f"{path.name}: " + " ".join(sentence.split())[:80])
    per_thousand = 1000 / max(len(words), 1)
    return {
        "words": len(words),
        "we and you": sum(w in WE for w in words) * per_thousand,
        "examples": examples * per_thousand,
        "negations": sum(w in NEGATIONS for w in words) * per_thousand,
        "sentences above 40 words": long,
    }


def report(figures: dict) -> str:
    "The figures, a line each."
    rows = []
    for name, value in figures.items():
        shown = f"{value:.3g}" if isinstance(value, float) else value
        rows.append(f"{name:32} {shown}")
    return "\n".join(rows)


def main():
    words = sys.argv[1:]

    def chosen(paths: list[Path]) -> list[Path]:
        return [p for p in paths if not words or any(w in str(p.relative_to(ROOT)) for w in words)]

    print(report(code_figures(chosen(modules()))) + "\n")
    print(report(prose_figures(chosen(notebooks(NBS)))))


if __name__ == "__main__":
    main()
