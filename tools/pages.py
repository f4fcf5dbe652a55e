"What every tool here asks of the book: its notebooks in reading order, what each imports, and where links lead."

import ast
import json
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
GUIDES = ROOT / "docs"
FLOORS = "core maths model data run train evals adapt discover lab studies".split()  # ground first
LINK = re.compile(
    r'(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s]+)((?:\s+"[^"]*")?)\)'
)  # [text](target "title")
FENCE = re.compile(
    r"(^(?:```|~~~).*?^(?:```|~~~)[^\n]*$|`[^`\n]+`)", re.M | re.S
)  # code, where links are none


def quick_compile() -> str:
    "XLA flags that halve the time of compiling: LLVM does not optimize, loops are emitted the old way where XLA still can."
    jaxlib = tuple(map(int, version("jaxlib").split(".")[:3]))
    old = " --xla_cpu_use_fusion_emitters=false" if jaxlib < (0, 11, 1) else ""
    return f"--xla_backend_optimization_level=0{old}"


def number(path: Path) -> int:
    "The number of a page: `nbs/model/16_mhc.ipynb` -> 16; -1 for the index."
    found = re.match(r"(\d+)_", path.name)
    return int(found[1]) if found else -1


@cache
def notebooks(nbs: Path = NBS) -> list[Path]:
    "All notebooks under `nbs`, in reading order."
    hidden = lambda p: any(part.startswith((".", "_")) for part in p.relative_to(nbs).parts)
    return sorted(
        (p for p in nbs.rglob("*.ipynb") if not hidden(p)), key=lambda p: (number(p), p.name)
    )


def named(path: Path) -> str:
    "`nbs/model/16_mhc.ipynb` -> `model/mhc`: the module's and the page's name."
    relative = path.relative_to(NBS)
    return (relative.parent / re.sub(r"^\d+_", "", relative.stem)).as_posix()


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def directives(text: str) -> dict[str, str]:
    "{word: value} of the `#|` lines of a code cell."
    lines = [line.strip()[2:] for line in text.splitlines() if line.lstrip().startswith("#|")]
    pairs = (line.partition(":") for line in lines)
    return {word.strip(): value.strip() for word, _, value in pairs}


def parse(text: str) -> ast.Module:
    "The syntax tree of a code cell, without its magics."
    return ast.parse(re.sub(r"^\s*[%!].*$", "", text, flags=re.M))


def code_cells(path: Path) -> list[str]:
    return [source(c) for c in read(path)["cells"] if c["cell_type"] == "code"]


def exported(path: Path) -> list[str]:
    "The code cells of a page that go into the package."
    return [text for text in code_cells(path) if {"export", "exports"} & directives(text).keys()]


def imported(tree: ast.Module) -> set[str]:
    "Modules that `tree` imports; of `from a import b` both `a` and `a.b`."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@cache
def reads() -> dict[Path, list[Path]]:
    "{page: the pages whose modules its own module imports}, in reading order."
    modules = {"nash_lab." + named(p).replace("/", "."): p for p in notebooks()}
    found = {}
    for page in notebooks():
        names = set().union(*(imported(parse(text)) for text in exported(page)))
        found[page] = sorted({modules[n] for n in names if n in modules} - {page}, key=number)
    return found


def reads_rows(page: Path) -> list[str]:
    "Two rows for the box of a page: what it uses and who uses it; the site makes links of the names."

    def names(pages: list[Path], most: int = 8) -> str:
        shown = [f"`{named(p)}`" for p in pages[:most]]
        more = [f"{len(pages) - most} more"] if len(pages) > most else []
        return ", ".join(shown + more) or "no other page"

    feeds = [p for p, used in reads().items() if page in used]
    return [f"| **Reads** | {names(reads()[page])} |", f"| **Feeds** | {names(feeds)} |"]


def linked_reads(text: str, page: Path) -> str:
    "Markdown of `page` with the names in the rows of its box as links to their notebooks."
    files = {named(p): p for p in notebooks()}

    def link(m) -> str:
        return f"[{m[1]}](../{files[m[1]].relative_to(NBS).as_posix()})" if m[1] in files else m[0]

    rows = (
        re.sub(r"`(\w+/\w+)`", link, row) if row.startswith(("| **Reads**", "| **Feeds**")) else row
        for row in text.split("\n")
    )
    return "\n".join(rows)


def text_outputs(cell: dict) -> str:
    "What a reader sees of a cell's outputs as text; pictures and their `<Figure ...>` left out."
    parts = []
    for output in cell.get("outputs", ()):
        data = output.get("data", {"text/plain": output.get("text", "")})
        if any(kind.startswith("image/") for kind in data):
            continue
        for kind in ("text/markdown", "text/plain"):
            if kind in data:
                parts.append("".join(data[kind]).strip())
                break
    return "\n".join(part for part in parts if part)


def addresses(text: str, cfg) -> str:
    "`text` of the index with `{git_url}` and `{doc_url}` as settings.ini gives them."
    return text.replace("{git_url}", cfg.git_url).replace(
        "{doc_url}", cfg.doc_host + cfg.doc_baseurl
    )


def relink(text: str, place) -> str:
    "Markdown `text` with every link target `t` outside code replaced by `place(t)`."

    def inner(label: str) -> str:  # a picture that is a link
        return f"[{LINK.sub(swap, label[1:-1])}]" if label.startswith("[") else label

    def swap(m) -> str:
        return f"{inner(m[1])}({place(m[2])}{m[3]})"

    parts = FENCE.split(text)
    return "".join(part if i % 2 else LINK.sub(swap, part) for i, part in enumerate(parts))


NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d[\d,]*)(?:\.\d+)?(?:[eE][-+]?\d+)?")


def _close(a: str, b: str) -> bool:
    "Are two numbers as printed equal to 2 %, or to two units of the last digit shown?"
    x, y = (float(n.replace(",", "").replace("−", "-")) for n in (a, b))
    shown = re.search(r"\.(\d+)", a)
    unit = 10.0 ** -len(shown[1]) if shown and "e" not in a.lower() else 0.0
    return abs(x - y) <= max(0.02 * max(abs(x), abs(y)), 2 * unit, 1e-6)


def same_text(stored: str, fresh: str) -> bool:
    "Is `fresh` the stored output, but for white space and the last digits of its numbers?"
    a, b = ("".join(NUMBER.sub("#", text).split()) for text in (stored, fresh))
    numbers = list(zip(NUMBER.findall(stored), NUMBER.findall(fresh)))
    return a == b and all(_close(x, y) for x, y in numbers)
