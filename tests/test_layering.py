"Which module may import what: pages from lower numbers, matplotlib in viz alone, the package bare."
import ast, json, subprocess, sys
import pytest
from pages import NBS, ROOT, named, notebooks, order

MODULES = {f'nash_lab.{named(p).replace("/", ".")}': p for p in notebooks()}
GENERATED = sorted(p for p in (ROOT/'nash_lab').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
HEAVY = ('nbdev', 'fastcore', 'torch', 'wandb', 'matplotlib', 'IPython', 'transformers', 'datasets')

def imported(tree, package: str = ''):
    "Modules that `tree` imports, relative ones made absolute from `package`"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package.split('.')[:len(package.split('.')) - node.level + 1]) if node.level else ''
            name = '.'.join(o for o in (base, node.module) if o)
            yield name
            yield from (f'{name}.{a.name}' for a in node.names)   # `from nash_lab.model import mhc`

def cells(path) -> list[str]: return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']

@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.relative_to(NBS).as_posix())
def test_imports_from_lower_numbers(path):
    "index (the README) shows the package as a user has it and may import all"
    if path.name == 'index.ipynb': return
    for source in cells(path):
        tree = ast.parse('\n'.join(o for o in source.splitlines() if not o.lstrip().startswith(('%', '!'))))
        lazy = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == 'nash_lab' and n.attr in ('load', 'Model')]
        if order(path) < (70,): assert not lazy, f'{path.name} uses nash_lab.{lazy[0]}, which is defined on a later page'
        for name in imported(tree):
            if name in MODULES: assert order(MODULES[name]) < order(path), f'{path.name} imports {name}, which comes later'

def test_generated_imports():
    "As the notebooks, seen from the package: nothing imports upwards, only viz imports matplotlib, nothing imports nbdev"
    for p in GENERATED:
        package = '.'.join(p.relative_to(ROOT).with_suffix('').parts[:-1])
        me = '.'.join(p.relative_to(ROOT).with_suffix('').parts)
        for name in imported(ast.parse(p.read_text()), package):
            if name in MODULES and me in MODULES: assert order(MODULES[name]) < order(MODULES[me]), f'{me} imports {name}'
            top = name.split('.')[0]
            assert top not in ('nbdev', 'fastcore', 'IPython', 'torch', 'execnb'), f'{me} imports {name}'
            if top == 'matplotlib': assert me == 'nash_lab.lab.viz', f'{me} imports {name}: pictures belong to lab/viz'

@pytest.mark.parametrize('path', GENERATED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_form(path):
    "Docstring (the page's `>` line), `__all__` of names that exist, no star imports, nothing run at import but definitions"
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f'{path} has no docstring: its page has no `>` line'
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom): assert all(a.name != '*' for a in node.names), f'star import from {node.module}'
    loose = [n.lineno for n in tree.body[1:] if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
             and 'defvjp' not in ast.unparse(n.value.func) and 'register' not in ast.unparse(n.value.func)]
    assert not loose, f'calls at import in lines {loose}'
    names = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__'), None)
    assert names, f'{path} has no __all__'

def test_bare_import():
    "`import nash_lab` is quick and takes nothing that only some users have"
    code = ('import sys, time; t = time.perf_counter(); import nash_lab; t = time.perf_counter() - t\n'
            f'print(t, *[m for m in {HEAVY!r} if m in sys.modules])')
    runs = [subprocess.run([sys.executable, '-c', code], cwd='/', capture_output=True, text=True) for _ in range(3)]
    assert all(r.returncode == 0 for r in runs), runs[0].stderr
    seconds, heavy = min(float(r.stdout.split()[0]) for r in runs), runs[0].stdout.split()[1:]
    assert not heavy, f'import nash_lab imports {heavy}'
    assert seconds < 3, f'import nash_lab takes {seconds:.1f} s'

def test_every_module_imports():
    "All of them in one fresh process without torch or wandb behind the scenes"
    code = f'import sys, importlib\nfor m in {[m for m, p in MODULES.items() if "default_exp" in p.read_text()]!r}: importlib.import_module(m)\nprint(*[m for m in ("torch", "wandb", "nbdev") if m in sys.modules])'
    r = subprocess.run([sys.executable, '-c', code], cwd='/', capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert not r.stdout.split(), f'importing the modules imports {r.stdout}'
