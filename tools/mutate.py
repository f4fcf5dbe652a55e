"""Remove one guard after the other: the test that stands for it has to fail.

    python tools/mutate.py [WORD ...]     only the guards whose name has one of the words

A guard is a statement of the package with a comment `# guard: NAME`; two on one line are parted by `|`. Removed, an `if`
never holds and any other statement is `pass`, unless GUARDS names what stands there instead. Works on a copy of the package and
the tests in a temporary folder. First every test runs on the unchanged copy, where it has to pass, so that a failure
later is the guard's. A test that is skipped shows nothing, and counts as not shown."""
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ('nash_lab', 'tests', 'tools', 'nbs', 'docs', 'pyproject.toml', 'settings.ini')
LIMIT = 300  # seconds for one test


class Guard(NamedTuple):
    test: str  # what has to fail without it
    instead: str = ''  # stands in place of the statement, or of the first line of a block


GUARDS = {
}


def marks(text: str) -> dict[str, int]:
    "{name: line} of the guards that a module marks."
    found = {}
    for i, line in enumerate(text.splitlines(), start=1):
        if '# guard: ' in line:
            found.update({name.strip(): i for name in line.split('# guard: ')[1].split('|')})
    return found


def places(package: Path) -> dict[str, Path]:
    "{name: module} of every guard. ValueError when one is marked twice."
    found = {}
    for path in sorted(package.rglob('*.py')):
        for name in marks(path.read_text(encoding='utf-8')):
            if name in found:
                raise ValueError(f'guard {name!r} is marked in {found[name]} and in {path}')
            found[name] = path
    return found


def without(text: str, name: str, instead: str = '') -> str:
    "The source of a module after the guard `name` is removed."
    line = marks(text)[name]
    lines = text.splitlines()

    def last(node) -> int:  # line of a simple statement, or of the head of a block
        return node.body[0].lineno - 1 if hasattr(node, 'body') else node.end_lineno

    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    node = max((n for n in statements if n.lineno <= line <= last(n)), key=lambda n: n.lineno)
    head = lines[node.lineno - 1]
    indent = head[: len(head) - len(head.lstrip())]
    word = head.split()[0]
    if not instead:
        instead = f'{word} False:' if word in ('if', 'elif') else 'pass'
    whole = not instead.endswith(':')
    end = node.end_lineno if whole else last(node)
    new = [indent + row for row in instead.splitlines()]
    return '\n'.join(lines[: node.lineno - 1] + new + lines[end:]) + '\n'


def copy(folder: Path):
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)


def outcome(folder: Path, test: str) -> tuple[str, str]:
    "passed, failed or skipped, and the last line of pytest."
    env = os.environ | {'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'}
    run = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-m', '', test]
    try:
        r = subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return 'failed', f'not done after {LIMIT} s'
    last = (r.stdout.strip().splitlines() or [r.stderr.strip()[-200:]])[-1].strip('= ')
    if r.returncode not in (0, 1):
        return 'broken', last
    if r.returncode:
        return 'failed', last
    return ('passed' if 'passed' in last else 'skipped'), last


def main(words) -> int:
    chosen = {name: guard for name, guard in GUARDS.items() if not words or any(w in name for w in words)}
    if not chosen:
        sys.exit(f'no guard has {words} in its name')
    shown = 0
    with tempfile.TemporaryDirectory(prefix='nash_lab-mutate-') as place:
        os.chmod(place, 0o755)  # a plain user reads it too
        folder = Path(place)
        copy(folder)
        files = places(folder / 'nash_lab')
        for name, guard in chosen.items():
            said, why = outcome(folder, guard.test)
            if said != 'passed':
                print(f'{name:<36} NOT SHOWN: its test is {said} with the guard: {why}', flush=True)
                continue
            before = files[name].read_text(encoding='utf-8')
            files[name].write_text(without(before, name, guard.instead), encoding='utf-8')
            said, why = outcome(folder, guard.test)
            files[name].write_text(before, encoding='utf-8')
            shown += said == 'failed'
            print(f'{name:<36} removed: ' + ('its test fails' if said == 'failed' else f'NOT NOTICED: {why}'), flush=True)
    print(f'{shown} of {len(chosen)} guards are missed when they are gone')
    return shown < len(chosen)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
