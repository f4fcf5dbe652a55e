"Which module may import what: pages from lower numbers, studies by nobody, matplotlib in viz alone, the package bare."

import ast
import subprocess
import sys

import pytest
from pages import NBS, ROOT, code_cells, imported, named, notebooks, number, parse

MODULES = {f"nash_lab.{named(p).replace('/', '.')}": p for p in notebooks()}
GENERATED = sorted(
    p for p in (ROOT / "nash_lab").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")
)
HEAVY = ("nbdev", "fastcore", "torch", "wandb", "matplotlib", "IPython", "transformers", "datasets")
NEVER = ("nbdev", "fastcore", "IPython", "torch", "execnb")
LOADING = number(next(p for p in notebooks() if named(p) == "lab/run"))


def absolute(tree: ast.Module, package: str) -> set[str]:
    "Modules that `tree` imports, relative ones made absolute from `package`"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1]
            node.module = ".".join(base + ([node.module] if node.module else []))
    return imported(tree)


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(NBS).as_posix())
def test_imports_from_lower_numbers(path):
    "index (the README) shows the package as a user has it and may import all"
    if path.name == "index.ipynb":
        return
    for text in code_cells(path):
        tree = parse(text)
        for node in ast.walk(tree):
            lazy = (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) in ("nash_lab", "nl")
                and node.attr in ("load", "Model")
            )
            assert not lazy or number(path) >= LOADING, (
                f"{path.name} uses nash_lab.{node.attr}, which is defined on a later page"
            )
        for name in imported(tree):
            if name in MODULES:
                assert number(MODULES[name]) < number(path), (
                    f"{path.name} imports {name}, which comes later"
                )
                assert not name.startswith("nash_lab.studies."), (
                    f"{path.name} imports {name}: nothing imports a study"
                )


def test_generated_imports():
    "As the notebooks, seen from the package"
    for path in GENERATED:
        parts = path.relative_to(ROOT).with_suffix("").parts
        me = ".".join(parts)
        for name in absolute(ast.parse(path.read_text()), ".".join(parts[:-1])):
            if name in MODULES and me in MODULES:
                assert number(MODULES[name]) < number(MODULES[me]), f"{me} imports {name}"
                assert not name.startswith("nash_lab.studies."), (
                    f"{me} imports {name}: nothing imports a study"
                )
            top = name.split(".")[0]
            peer = (me, top) == ("nash_lab.studies.peers", "torch")  # inside its functions
            assert top not in NEVER or peer, f"{me} imports {name}"
            if top == "matplotlib":
                assert me == "nash_lab.lab.viz", f"{me} imports {name}: pictures belong to lab/viz"


@pytest.mark.parametrize("path", GENERATED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_form(path):
    "Docstring (the page's `>` line), `__all__` of names that exist, no star imports, nothing run at import but definitions"
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring: its page has no `>` line"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"star import from {node.module}"
    loose = []
    for node in tree.body[1:]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if (
                "defvjp" not in called and "register_" not in called
            ):  # derivatives and pytree nodes of JAX
                loose.append(node.lineno)
    assert not loose, f"calls at import in lines {loose}"
    assigned = [
        n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    ]
    assert assigned and ast.literal_eval(assigned[0].value), f"{path} has no __all__"


def test_bare_import():
    "`import nash_lab` is quick and takes nothing that only some users have"
    code = (
        "import sys, time; t = time.perf_counter(); import nash_lab; t = time.perf_counter() - t\n"
        f"print(t, *[m for m in {HEAVY!r} if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
        for _ in range(3)
    ]
    assert all(r.returncode == 0 for r in runs), runs[0].stderr
    heavy = runs[0].stdout.split()[1:]
    assert not heavy, f"import nash_lab imports {heavy}"
    seconds = min(float(r.stdout.split()[0]) for r in runs)
    assert seconds < 3, f"import nash_lab takes {seconds:.1f} s"


def test_every_module_imports():
    "All of them in one fresh process without torch or wandb behind the scenes"
    names = [m for m, p in MODULES.items() if "default_exp" in p.read_text()]
    code = f'import sys, importlib\nfor m in {names!r}: importlib.import_module(m)\nprint(*[m for m in ("torch", "wandb", "nbdev") if m in sys.modules])'
    r = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert not r.stdout.split(), f"importing the modules imports {r.stdout}"
