"""Build the site: nbdev's own processors turn every notebook into what a reader sees, Sphinx turns that into pages.

Nothing is executed. A link that leads nowhere, or any other warning, fails the build."""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys

os.environ["IN_TEST"] = "1"
from pathlib import Path, PurePosixPath
import yaml
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults
from api import entry
from pages import (
    FLOORS,
    GUIDES,
    ROOT,
    addresses,
    linked_reads,
    named,
    notebooks,
    number,
    read,
    relink,
    source,
)

CFG = get_config(path=ROOT)
BASE = f"{CFG.doc_host}{CFG.doc_baseurl}".rstrip("/") + "/"
BLOB = f"{CFG.git_url}/blob/{CFG.branch}/"
TAGS = {
    "echo: false": "remove-input",
    "output: false": "remove-output",
    "include: false": "remove-cell",
    "code-fold: true": "hide-input",
    "code-fold: show": "hide-input",
}
CAPTIONS = {floor: floor.capitalize() for floor in FLOORS} | {"guides": "Guides"}
GUIDE_ORDER = ("READING", "TRAINING", "DATA", "TPU_SETUP", "FAULTS", "SECURITY", "LOG")


class Processors(FilterDefaults):
    "nbdev's processors, without those that run code, place API entries (`api.py` makes them from the source), link, or fold"

    mine = "add_show_docs exec_show_docs clean_show_doc mv_exports add_links add_fold".split()

    def base_procs(self):
        return [o for o in super().base_procs() if o.__name__ not in self.mine]


# pictures that a notebook takes from the network and the site does not
LOCAL = {
    "https://colab.research.google.com/assets/colab-badge.svg": GUIDES / "_static" / "colab.svg"
}


def guides() -> dict:
    "{page name: file} of the guides in docs/ and the log, in reading order"
    found = {p.stem: p for p in [*GUIDES.glob("*.md"), ROOT / "LOG.md"]}
    return {
        k: found[k]
        for k in sorted(found, key=lambda k: (GUIDE_ORDER.index(k) if k in GUIDE_ORDER else 99, k))
    }


class Site:
    "Where every file of the project stands on the site, and the links between them"

    def __init__(self):
        self.pages = {p: PurePosixPath(named(p) + ".ipynb") for p in notebooks()}
        self.pages |= {p: PurePosixPath("guides") / f"{k}.md" for k, p in guides().items()}
        self.lookup = NbdevLookup(incl_libs=CFG.lib_name)
        self.headings, self.dead, self.pictures = {}, [], {}

    def place(self, target: str, source: Path) -> str:
        "Link `target` written in file `source` -> what it is on the site; unknown ones are kept in `dead`"
        here = self.pages[source]
        if target.startswith(BASE):  # what nbdev's back-tick links point at
            path, _, anchor = target[len(BASE) :].partition("#")
            page = PurePosixPath(path.removesuffix(".html") + ".ipynb")
            if page not in self.pages.values():
                self.dead.append(f"{source.relative_to(ROOT)}: {target}")
                return target
            anchor = anchor.replace(".", "").lower()
            return self.relative(page, here) + (
                f"#{anchor}" if anchor in self.headings.get(page, ()) else ""
            )
        if target in LOCAL:
            target = os.path.relpath(LOCAL[target], source.parent)
        if re.match(r"[a-z]+:|#|attachment:", target):
            return target
        path, _, anchor = target.partition("#")
        file = (source.parent / path).resolve()
        if file in self.pages:
            return self.relative(self.pages[file], here) + (f"#{anchor}" if anchor else "")
        if file == ROOT / "README.md":
            return self.relative(PurePosixPath("index.ipynb"), here)
        if file.suffix in (".png", ".svg", ".jpg") and file.exists():
            self.pictures[file] = PurePosixPath("pictures") / file.name
            return self.relative(self.pictures[file], here)
        if file.exists() and file.is_relative_to(ROOT):
            return BLOB + file.relative_to(ROOT).as_posix() + (f"#{anchor}" if anchor else "")
        self.dead.append(f"{source.relative_to(ROOT)}: {target}")
        return target

    def relative(self, page, here):
        return os.path.relpath(page, here.parent)

    def embed(self, text: str, source: Path) -> str:
        "A link to a page of `docs/assets` -> that page in a frame, and the link for a window of its own"

        def frame(m) -> str:
            if not (GUIDES / "assets" / m[2]).exists():
                self.dead.append(f"{source.relative_to(ROOT)}: docs/assets/{m[2]}")
            to = self.relative(PurePosixPath(m[2]), self.pages[source])  # conf.py puts it there
            link = f'<a href="{to}">{m[1]}</a>'
            return f'{link}{m[3]}\n\n<iframe class="page" src="{to}" title="{m[1]}" loading="lazy"></iframe>\n'

        return re.sub(r"\[([^\]]+)\]\((?:\.\./)+docs/assets/(\w+\.html)\)(.*)", frame, text)

    def markdown(self, text: str, source: Path) -> str:
        "nbdev links and callouts -> MyST"
        text = self.embed(text, source)
        text = relink(
            addresses(text, CFG) if source.name == "index.ipynb" else text,
            lambda t: self.place(t, source),
        )
        return re.sub(r"^:::+\s*\{\.callout-(\w+).*?\}", r":::{\1}", text, flags=re.M)


def directives(source: str) -> list[str]:
    "`#|` lines of a cell, as `word` or `key: value`"
    lines = [o.strip()[2:].strip() for o in source.splitlines() if o.lstrip().startswith("#|")]
    return [re.sub(r"\s*:\s*", ": ", o, count=1) for o in lines]


def document(nb, module: str, lookup) -> None:
    "Put an API entry before each exported cell of `nb`, and in place of each `show_doc(name)`"
    code = [
        c
        for c in nb.cells
        if c.cell_type == "code" and re.search(r"^(def|class|@)", c.source, re.M)
    ]
    trees = [
        (ast.parse(o), o) for o in (re.sub(r"^\s*[%!].*$", "", c.source, flags=re.M) for c in code)
    ]
    link = lambda name: lookup.code(f"{module}.{name}") or lookup.code(name)
    asked, cells = (
        set(re.findall(r"^show_doc\(([\w.]+)", "\n".join(c.source for c in nb.cells), re.M)),
        [],
    )
    for c in nb.cells:
        flags = directives(c.source) if c.cell_type == "code" else []
        if c in code and {"export", "exports"} & set(flags) and "hide" not in flags:
            names = [
                n.name
                for n in trees[code.index(c)][0].body
                if hasattr(n, "name") and not n.name.startswith("_")
            ]
            made = [
                entry(n, trees, link(n), brief="exports" in flags) for n in names if n not in asked
            ]
            if made:
                cells.append(mk_cell("\n\n".join(made), "markdown"))
        if (
            m := re.search(r"^show_doc\(([\w.]+)", c.source, re.M)
            if c.cell_type == "code"
            else None
        ):
            c = mk_cell(entry(m[1], trees, link(m[1]), level=4 if "." in m[1] else 3), "markdown")
        cells.append(c)
    nb.cells = cells
    for i, c in enumerate(nb.cells):
        c.idx_ = i


def processed(path: Path, lookup):
    "The notebook at `path` as a reader of the site sees it, links not yet placed"
    nb, cells = read_nb(path), []
    document(nb, f"{CFG.lib_name}.{named(path).replace('/', '.')}", lookup)
    Processors()(nb)
    for c in nb.cells:
        if c.source.startswith("<!-- WARNING"):
            continue
        if c.cell_type == "raw" and c.source.startswith("---"):  # the title cell, as front matter
            fm = yaml.safe_load(c.source.split("---")[1])
            c = mk_cell(
                f"# {fm['title']}\n\n{{.lead}}\n{fm.get('description', fm['title'])}", "markdown"
            )
        if c.cell_type == "code":
            flags = directives(c.source)
            alt = next(
                (
                    o.removeprefix("fig-alt: ").strip('"')
                    for o in flags
                    if o.startswith("fig-alt: ")
                ),
                None,
            )
            c.metadata = {"tags": [TAGS[o] for o in flags if o in TAGS]} | (
                {"mystnb": {"image": {"alt": alt}}} if alt else {}
            )
            c.source = re.sub(r"\A(\s*#\|.*\n?)+", "", c.source)
            if not c.source.strip() and not c.get("outputs"):
                continue
        if c.cell_type == "markdown":
            c.source = lookup.linkify(linked_reads(c.source, path))
        cells.append(c)
    nb.cells, nb.metadata = (
        cells,
        {"kernelspec": dict(name="python3", display_name="python3", language="python")},
    )
    return nb


def slugs(nb) -> set:
    "Anchors MyST makes of the headings in `nb`"
    heads = re.findall(
        r"^#{1,4}\s+(.*)$", "\n".join(c.source for c in nb.cells if c.cell_type == "markdown"), re.M
    )
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h)).strip().lower().replace(" ", "-")
        for h in heads
    }


def toctrees(site: Site) -> str:
    "One hidden toctree for each folder, in reading order and with the pages' numbers, then the guides"
    groups = {}
    for path, page in site.pages.items():
        if page.name == "index.ipynb":
            continue
        place = page.with_suffix("").as_posix()
        if page.suffix == ".md":
            groups.setdefault("guides", []).append(place)
        else:
            title = source(read(path)["cells"][0]).splitlines()[0].lstrip("# ")
            entry = f"{number(path):02} {title.replace('`', '')} <{place}>"
            groups.setdefault(page.parts[0], []).append(entry)
    caption = lambda k: CAPTIONS.get(k, k.capitalize())
    return "\n\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {caption(k)}\n\n" + "\n".join(v) + "\n```"
        for k, v in groups.items()
    )


def write_sources(src: Path) -> Site:
    "Everything Sphinx reads, under `src`; raises SystemExit when a link is dead"
    shutil.rmtree(src, ignore_errors=True)
    site, done = Site(), {}
    for path in site.pages:
        if path.suffix == ".ipynb":
            done[path] = processed(path, site.lookup)
            site.headings[site.pages[path]] = slugs(done[path])
    for path, page in site.pages.items():
        out = src / page
        out.parent.mkdir(parents=True, exist_ok=True)
        if path in done:
            nb = done[path]
            for c in nb.cells:
                if c.cell_type == "markdown":
                    c.source = site.markdown(c.source, path)
            if page.name == "index.ipynb":
                nb.cells.append(mk_cell(toctrees(site), "markdown"))
            write_nb(nb, out)
        else:
            out.write_text(site.markdown(site.lookup.linkify(path.read_text()), path))
    for file, to in site.pictures.items():
        (src / to).parent.mkdir(exist_ok=True)
        shutil.copy(file, src / to)
    if site.dead:
        sys.exit("dead links:\n  " + "\n  ".join(site.dead))
    return site


def build(out: Path) -> int:
    "Sources and HTML under `out`; Sphinx's exit status"
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    write_sources(out / "src")
    shutil.rmtree(out / "html", ignore_errors=True)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-b",
            "html",
            "-c",
            str(ROOT / "docs"),
            "-d",
            str(out / "doctrees"),
            "-W",
            "--keep-going",
            str(out / "src"),
            str(out / "html"),
        ]
    ).returncode


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder for the site")
    args = p.parse_args()
    code = build(args.out.resolve())
    if not code:
        print(f"the site: {args.out}/html/index.html")
    sys.exit(code)


if __name__ == "__main__":
    main()
