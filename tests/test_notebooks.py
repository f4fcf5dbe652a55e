"Every notebook runs from top to bottom, each in a process of its own: state such as x64 leaks otherwise."
import subprocess, sys
import pytest
from pages import NBS, ROOT, notebooks

LIMIT = 600   # seconds, on a machine that does other things too
RUN = 'import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)'

@pytest.mark.parametrize('name', [p.relative_to(NBS).as_posix() for p in notebooks()])
def test_notebook(name):
    try: r = subprocess.run([sys.executable, '-c', RUN, str(NBS/name)], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    except subprocess.TimeoutExpired as e: pytest.fail(f'not done after {LIMIT} s (a page runs in under 60 on two idle cores)\n{e.stdout}\n{e.stderr}', pytrace=False)
    if r.returncode or 'Success' not in r.stdout: pytest.fail(r.stdout + r.stderr, pytrace=False)
