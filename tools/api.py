"API entries of the site, read from the source alone: heading, signature, docstring, table of parameters, list of methods."

import ast
import io
import tokenize
from textwrap import indent

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def comments(source: str) -> dict:
    "{line: comment} of `source`; a comment on a line of its own belongs to the next line with code"
    found, waiting = {}, []
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == tokenize.COMMENT:
            text = t.string.lstrip("#").strip()
            if t.line.strip().startswith("#"):
                waiting.append(text)
            else:
                found[t.start[0]] = text
        elif waiting and t.type not in (
            tokenize.NL,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.NEWLINE,
        ):
            found.setdefault(t.start[0], " ".join(waiting))
            waiting = []
    return found


def bound(f) -> bool:
    return (
        f.args.args[:1]
        and f.args.args[0].arg in ("self", "cls")
        and f.args.args[0].annotation is None
    )


def parameters(f, notes: dict) -> list[tuple]:
    "(name, type, default, comment) of each parameter of function `f`, a method's first one left out"
    a, rows = f.args, []
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    named = [
        *zip(plain, defaults),
        (a.vararg, None),
        *zip(a.kwonlyargs, a.kw_defaults),
        (a.kwarg, None),
    ]
    last = {
        p.end_lineno: p for p, _ in named if p
    }  # of several on one line the last one has the comment
    for p, d in named:
        if p is None or (bound(f) and p is f.args.args[0]):
            continue
        end = max(p.end_lineno, d.end_lineno if d else 0)
        star = "*" if p is a.vararg else "**" if p is a.kwarg else ""
        rows.append(
            (star + p.arg, p.annotation, d, notes.get(end, "") if last[p.end_lineno] is p else "")
        )
    return rows


def fields(c, notes: dict) -> list[tuple]:
    "(name, type, default, comment) of each annotated field of class `c`"
    return [
        (s.target.id, s.annotation, s.value, notes.get(s.end_lineno, notes.get(s.lineno, "")))
        for s in c.body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    ]


def signature(f, name: str) -> str:
    "`name(...)` of function `f` as in its source, one parameter a line when it is long"
    a = ast.unparse(f.args)
    if bound(f):
        a = a.partition(", ")[2]
    back = f" -> {ast.unparse(f.returns)}" if f.returns else ""
    if len(name + a + back) < 88:
        return f"{name}({a}){back}"
    return f"{name}(\n{indent(wrapped(f), '    ')}\n){back}"


def wrapped(f) -> str:
    lines, kwonly = [], {p.arg for p in f.args.kwonlyargs}
    for name, kind, default, _ in parameters(f, {}):
        if name in kwonly and not f.args.vararg and "*," not in lines:
            lines.append("*,")
        lines.append(
            name
            + (f": {ast.unparse(kind)}" if kind else "")
            + (f" = {ast.unparse(default)}" if default else "")
            + ","
        )
    return "\n".join(lines)


def cell(node, code=True) -> str:
    text = node if isinstance(node, str) else ast.unparse(node) if node else ""
    text = text.replace("|", "\\|").replace("\n", " ")
    return f"`{text}`" if text and code else text


def table(rows: list, returns=None, note="") -> str:
    "Markdown table of parameters; empty when no comment says more than the signature"
    if not any(r[3] for r in rows) and not note:
        return ""
    lines = ["| | Type | Default | Details |", "|---|---|---|---|"]
    lines += [f"| **{n}** | {cell(t)} | {cell(d)} | {cell(c, code=False)} |" for n, t, d, c in rows]
    if returns is not None:
        lines.append(f"| **Returns** | {cell(returns)} | | {cell(note, code=False)} |")
    drop = [i for i in (2, 3) if all(r[i - 1] is None for r in rows)]
    return "\n".join(
        "|".join(o for i, o in enumerate(split(row)) if i not in drop) for row in lines
    )


def split(row: str) -> list[str]:
    "Columns of a table row, escaped bars kept"
    return [o.replace("\0", "\\|") for o in row.replace("\\|", "\0").split("|")]


def find(trees: list, name: str):
    "(node, source) of the last definition of `name` (`f`, `Class` or `Class.method`) in [(tree, source)]"
    first, *rest = name.split(".")
    for tree, source in reversed(trees):
        for node in tree.body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == first:
                for r in rest:
                    node = next(o for o in node.body if getattr(o, "name", "") == r)
                return node, source


def methods(c) -> list[str]:
    "One line for each public method of class `c`"
    lines = []
    for f in c.body:
        if not isinstance(f, FUNCTIONS) or (f.name.startswith("_") and f.name != "__call__"):
            continue
        kinds = {ast.unparse(d) for d in f.decorator_list}
        label = (
            f.name
            if "property" in kinds
            else " ".join(signature(f, f.name).replace("(\n", "(").replace(",\n)", ")").split())
        )
        prefix = "classmethod " if "classmethod" in kinds else ""
        lines.append(
            f"- `{prefix}{label}`" + (f": {ast.get_docstring(f)}" if ast.get_docstring(f) else "")
        )
    return lines


def entry(name: str, trees: list, link=None, brief=False, level=3) -> str:
    "Markdown of the API entry of `name`; where the code itself follows, `brief` leaves the signature out and folds the table"
    node, source = find(trees, name)
    notes, parts = comments(source), [f"{'#' * level} {name}"]
    if link:
        parts.append(f'<a class="source-link" href="{link}">source</a>')
    if isinstance(node, ast.ClassDef):
        init = next((o for o in node.body if getattr(o, "name", "") == "__init__"), None)
        rows, returns, note = (parameters(init, notes) if init else fields(node, notes)), None, ""
        bases = ", ".join(map(ast.unparse, node.bases))
        head = (
            f"class {signature(init, name)}"
            if init
            else f"class {name}" + (f"({bases})" if bases else "")
        )
    else:
        rows, returns, head = parameters(node, notes), node.returns, f"{signature(node, name)}"
        note = notes.get(node.returns.end_lineno, "") if returns is not None else ""
        if any(note and note == r[3] for r in rows):
            note = ""
    if not brief:
        parts.append(f"```python\n{head}\n```")
    parts.append(ast.get_docstring(node) or "")
    if rows := table(rows, returns, note):
        parts.append(f":::{{dropdown}} Parameters\n{rows}\n:::" if brief else rows)
    if isinstance(node, ast.ClassDef) and not brief:
        parts.append("\n".join(methods(node)))
    return "\n\n".join(p for p in parts if p)
