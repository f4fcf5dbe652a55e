"What every tool here asks of the book: its notebooks in reading order, and where a link between files leads."
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, GUIDES = ROOT/'nbs', ROOT/'docs'
LINK = re.compile(r'(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s]+)((?:\s+"[^"]*")?)\)')   # [text](target "title")
FENCE = re.compile(r'(^(?:```|~~~).*?^(?:```|~~~)[^\n]*$|`[^`\n]+`)', re.M | re.S)          # code, where links are none

def order(nb: Path) -> tuple:
    "Sort key: `index` first, then by page number and letter (`11` < `11a` < `12`)"
    m = re.match(r'(\d+)([a-z]*)_', nb.name)
    return (int(m[1]), m[2], nb.name) if m else (-1, '', nb.name)

@cache
def notebooks(nbs: Path = NBS) -> list[Path]:
    "All notebooks under `nbs`, in reading order"
    found = (p for p in nbs.rglob('*.ipynb') if not any(o.startswith(('.', '_')) for o in p.relative_to(nbs).parts))
    return sorted(found, key=order)

def named(nb: Path) -> str:
    "`nbs/model/16_mhc.ipynb` -> `model/mhc`: the module's and the page's name"
    p = nb.relative_to(NBS)
    return (p.parent/re.sub(r'^\d+[a-z]*_', '', p.stem)).as_posix()

def addresses(text: str, cfg) -> str:
    "`text` of the index with `{git_url}` and `{doc_url}` as settings.ini gives them"
    return text.replace('{git_url}', cfg.git_url).replace('{doc_url}', cfg.doc_host + cfg.doc_baseurl)

def relink(text: str, place) -> str:
    "Markdown `text` with every link target `t` outside code replaced by `place(t)`"
    inner = lambda t: f'[{LINK.sub(swap, t[1:-1])}]' if t.startswith('[') else t          # a picture that is a link
    swap = lambda m: f'{inner(m[1])}({place(m[2])}{m[3]})'
    parts = FENCE.split(text)
    return ''.join(o if i % 2 else LINK.sub(swap, o) for i, o in enumerate(parts))
