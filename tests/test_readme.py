"README.md is what nbs/index.ipynb gives, and its Python works as it stands."
import re, subprocess, sys
from configparser import ConfigParser
from pages import NBS, ROOT

def run(*args, **kw): return subprocess.run([sys.executable, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL, **kw)

def test_readme_is_the_index():
    r = run('tools/readme.py', '--check', cwd=ROOT)
    assert r.returncode == 0, r.stdout + r.stderr

def test_code_blocks(tmp_path):
    "All Python blocks of README.md, one after the other in one process, from an empty folder; a last expression is printed"
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT/'README.md').read_text(), re.M | re.S)
    assert blocks, 'README.md has no Python block'
    (tmp_path/'readme.py').write_text('\n'.join(blocks))
    r = run('readme.py', cwd=tmp_path)
    assert r.returncode == 0, r.stderr

def test_links():
    "Relative links and pictures lead to files of the project"
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', (ROOT/'README.md').read_text())
    for link in (a or b for a, b in links):
        if not re.match(r'[a-z]+:|#', link): assert (ROOT/link.partition('#')[0]).exists(), f'README.md: dead link {link}'

def test_addresses():
    "The public addresses stand in settings.ini; the index has placeholders for them, README.md what they stand for"
    settings = ConfigParser(interpolation=None)
    settings.read(ROOT/'settings.ini')
    index, readme = (NBS/'index.ipynb').read_text(), (ROOT/'README.md').read_text()
    for key in ('git_url', 'doc_host'): assert settings['DEFAULT'][key] not in index, f'nbs/index.ipynb spells out {key}: write {{git_url}} or {{doc_url}}'
    assert '{git_url}' not in readme and '{doc_url}' not in readme
