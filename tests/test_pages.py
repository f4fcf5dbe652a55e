"The form of every page, and the budgets of the book: short cells and functions, more prose than code, claims asserted, little hidden."
import ast, base64, json, re
from statistics import median
import pytest
from api import comments, parameters
from pages import NBS, named, notebooks, order

DECADES = dict(maths=0, model=10, data=20, train=30, evals=40, adapt=50, discover=60, lab=70)
PAGES = [p for p in notebooks() if p.name != 'index.ipynb']
# what the book aims at; it fails when a number is SLACK beyond, a page when it is beyond PAGE
BOOK = dict(cell_median=5, cell_p90=15, cell_max=40, function_median=10, function_p90=25, function_max=60, prose=1.5, asserts=.25, hidden=.1, docments=.9, module=400)
PAGE = dict(cell_median=9, cell_p90=25, cell_max=48, function_median=18, function_p90=40, function_max=60, prose=1.0, asserts=.18, hidden=.2, docments=.6, module=450)
SLACK = 1.2
AT_LEAST = ('prose', 'asserts', 'docments')
LEAK = re.compile(r'0x[0-9a-f]{8,}|/tmp/|/home/|/root/|/Users/|site-packages/')

def load(path): return json.loads(path.read_text())
def text(cell): return ''.join(cell['source'])
def flags(source): return {o.strip()[2:].strip().split(':')[0].split()[0] for o in source.splitlines() if o.lstrip().startswith('#|') and o.strip() != '#|'}
def lines(source): return [o for o in source.splitlines() if o.strip() and not o.lstrip().startswith('#|')]
def parse(source): return ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M))
def p90(xs): return sorted(xs)[int(.9 * (len(xs) - 1) + .5)]

def functions(tree):
    "Functions and methods of the definitions in `tree`, not those inside functions"
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)): yield n
        elif isinstance(n, ast.ClassDef): yield from functions(n)

def raw(paths) -> dict:
    "Numbers behind the budgets, of one page or of many"
    m = dict(cells=[], functions=[], words=0, lines=0, asserts=0, code=0, hidden=0, all=0, documented=0, parameters=0, module=0)
    for path in paths:
        module = 0
        for c in load(path)['cells']:
            source = text(c)
            if c['cell_type'] == 'markdown':
                m['words'] += len(re.findall(r'\w[\w\'’-]*', re.sub(r'```.*?```|\$\$.*?\$\$', '', source, flags=re.S)))
            if c['cell_type'] != 'code' or not lines(source): continue
            has, n = flags(source), len(lines(source))
            m['all'] += 1
            m['hidden'] += 'hide' in has
            if 'hide' in has or 'default_exp' in has: continue
            tree = parse(source)
            if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in tree.body): module += n * bool({'export', 'exports'} & has); continue
            m['cells'].append(n); m['lines'] += n; m['code'] += 1
            m['asserts'] += bool(re.search(r'^\s*assert\b|\btest_\w+\(|ExceptionExpected|assert_\w+\(', source, re.M))
            if {'export', 'exports'} & has:
                module += n
                notes = comments(source)
                for f in functions(tree):
                    m['functions'].append(len(lines('\n'.join(source.splitlines()[f.lineno - 1:f.end_lineno]))))
                    if f.name.startswith('_'): continue
                    rows = parameters(f, notes)
                    m['parameters'] += len(rows); m['documented'] += sum(bool(r[3]) for r in rows)
        m['module'] = max(m['module'], module)
    return m

def budget(paths) -> dict:
    m = raw(paths)
    cells, fs = m['cells'] or [0], m['functions'] or [0]
    return dict(cell_median=median(cells), cell_p90=p90(cells), cell_max=max(cells), function_median=median(fs), function_p90=p90(fs), function_max=max(fs),
                prose=m['words'] / max(m['lines'], 1), asserts=m['asserts'] / max(m['code'], 1), hidden=m['hidden'] / max(m['all'], 1),
                docments=m['documented'] / m['parameters'] if m['parameters'] else 1.0, module=m['module'])

def over(found: dict, limits: dict, slack=1.0) -> list[str]:
    "What is beyond `limits` by more than the factor `slack`"
    bad = lambda k: found[k] * slack < limits[k] if k in AT_LEAST else found[k] > limits[k] * slack
    return [f"{k} {found[k]:.3g}, aim {'at least' if k in AT_LEAST else 'at most'} {limits[k]:g}" for k in limits if bad(k)]

def table(rows: dict) -> str:
    head = f"{'page':<22}" + ''.join(f"{k.replace('function', 'f').replace('cell', 'c').replace('_median', '.med').replace('_', '.'):>9}" for k in BOOK)
    show = lambda v: f'{v:>9.2f}' if isinstance(v, float) and v != int(v) else f'{int(v):>9}'
    return '\n'.join([head, *(f'{k:<22}' + ''.join(show(v[o]) for o in BOOK) for k, v in rows.items())])

def test_budgets_of_the_book(capsys):
    rows = {named(p): budget([p]) for p in PAGES} | {'the book': budget(PAGES), 'what it aims at': BOOK}
    with capsys.disabled(): print('\n\n' + table(rows))
    assert not (bad := over(rows['the book'], BOOK, SLACK)), f'the book as a whole: {bad}'

ids = dict(ids=[p.relative_to(NBS).as_posix() for p in PAGES])

@pytest.mark.parametrize('path', PAGES, **ids)
def test_budgets_of_a_page(path): assert not (bad := over(budget([path]), PAGE)), f'{path.name}: {bad}'

@pytest.mark.parametrize('path', PAGES, **ids)
def test_form(path):
    "Title cell, the four lines, default_exp, imports alone, Export at the end, in the order HOUSE gives them"
    cells = load(path)['cells']
    title = [o for o in text(cells[0]).splitlines() if o.strip()]
    assert cells[0]['cell_type'] == 'markdown' and re.match(r'# \S', title[0]) and title[1].startswith('> '), 'the first cell is `# Title` and a `> line`'
    assert all(re.match(r'- [\w-]+: ', o) for o in title[2:]), 'only `- key: value` lines after the `> line`'
    lead = text(cells[1])
    assert cells[1]['cell_type'] == 'markdown' and not lead.lstrip().startswith('#'), 'the second cell is the four lines'
    for word in ('paper|source', 'at the end', 'reads', 'symbols'): assert re.search(word, lead.lower()), f'the second cell does not say {word!r}'
    assert 'http' in lead, 'the second cell links its paper or source'
    code = [text(c) for c in cells if c['cell_type'] == 'code']
    exports = [o for o in code if {'export', 'exports'} & flags(o)]
    if exports:
        assert f'#| default_exp {named(path).replace("/", ".")}' in code[0], f'default_exp of {path.name}'
        assert 'nbdev.nbdev_export()' in code[-1] and 'hide' in flags(code[-1]), 'the last cell is the hidden export'
        heads = [text(c).strip() for c in cells if c['cell_type'] == 'markdown']
        assert heads[-1].startswith('## Export -'), 'the last Markdown cell is `## Export -`'
    for o in code[:-1]:
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in parse(o).body}
        assert kinds != {True, False}, f'imports beside other code:\n{o}'
    for o in exports: assert not re.search(r'^\s*from __future__|^\s*from \S+ import \*', o, re.M), f'star or __future__ import:\n{o}'
    for o in exports:
        for f in (n for n in ast.walk(parse(o)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))):
            assert '\n' not in (ast.get_docstring(f, clean=False) or ''), f'{f.name}: docstrings are one line'

@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.relative_to(NBS).as_posix())
def test_outputs(path):
    "What is stored: no error, no address or path of a machine, small pictures, a small file"
    assert path.stat().st_size <= 500_000, f'{path.name} is {path.stat().st_size:,} bytes'
    for i, c in enumerate(load(path)['cells']):
        for o in c.get('outputs', ()):
            assert o['output_type'] != 'error', f"cell {i} stores an error: {o.get('ename')}"
            assert o.get('name') != 'stderr', f"cell {i} stores what went to stderr: {''.join(o['text'])[:200]}"
            data = o.get('data', {'text/plain': o.get('text', '')})
            shown = ''.join(''.join(v) for k, v in data.items() if k.startswith('text'))
            assert not (m := LEAK.search(shown)), f'cell {i} shows {m[0]!r}: an address or a path'
            if 'image/png' in data:
                size = len(base64.b64decode(''.join(data['image/png'])))
                assert size <= 50_000, f'cell {i}: a picture of {size:,} bytes'

def test_numbers():
    "Numbers are unique and stand in their folder's decade"
    keys = [order(p)[:2] for p in PAGES]
    assert len(keys) == len(set(keys)), 'two pages with one number'
    for p, (n, _) in zip(PAGES, keys):
        folder = p.parent.name
        assert folder in DECADES and 0 <= n - DECADES[folder] < 10, f'{p.relative_to(NBS)} does not belong to {folder}'
