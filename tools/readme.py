"""Write README.md from nbs/index.ipynb, and the tables that a guide takes from a page. `--check` only compares.

README.md has the words of the index, and pictures as files beside the site's. Its links and pictures are full addresses in
the repository of settings.ini, because the package index shows it too. A guide says
`<!-- table: nbs/FLOOR/PAGE.ipynb | HEADING -->`, and the first table below that heading is put between this and `<!-- end -->`."""

import argparse
import base64
import re
import sys
import nbformat
from nbdev.config import get_config
from pages import GUIDES, NBS, ROOT, addresses, read, relink, source, text_outputs

INDEX, PICTURES = NBS / "index.ipynb", "docs/_static"
HEAD = "<!-- made from nbs/index.ipynb by `make readme`; edit that notebook -->\n\n"


def flags(source: str) -> dict:
    "{word: value} of the `#|` lines of a cell"
    lines = [o.strip()[2:].strip() for o in source.splitlines() if o.lstrip().startswith("#|")]
    return {k.strip(): v.strip() for k, _, v in (o.partition(":") for o in lines)}


def public(path: str) -> str:
    "The address of a file of the project: a picture as it is, anything else as a page"
    cfg = get_config(path=ROOT)
    kind = "raw" if path.endswith(".png") else "blob"
    return f"{cfg.git_url}/{kind}/{cfg.branch}/{path}"


def place(target: str) -> str:
    "A link written in nbs/index.ipynb, as an address that holds everywhere"
    if re.match(r"[a-z]+:|#", target):
        return target
    path, _, anchor = target.partition("#")
    file = (NBS / path).resolve()
    if not file.exists():
        sys.exit(f"nbs/index.ipynb: link to {target}, which does not exist")
    return public(file.relative_to(ROOT).as_posix()) + (f"#{anchor}" if anchor else "")


def title(source: str) -> str:
    "The title cell without its `- key: value` lines"
    return "\n".join(o for o in source.splitlines() if not re.match(r"-\s+\w[\w-]*:\s", o)).strip()


def outputs(cell, pictures: dict, alt: str) -> list[str]:
    "What a code cell shows, as Markdown; pictures go to `pictures`, described by `alt`"
    parts = []
    for o in cell.get("outputs", ()):
        data = o.get("data", {"text/plain": o.get("text", "")})
        if "image/png" in data:
            name = f"{PICTURES}/readme_{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode(data["image/png"])
            parts.append(f"![{alt}]({public(name)})")
        elif "text/markdown" in data:
            parts.append(relink(data["text/markdown"], place))
        elif data.get("text/plain", "").strip():
            parts.append(f"```\n{data['text/plain'].rstrip()}\n```")
    return parts


def render(nb) -> tuple[str, dict]:
    "(README text, {path: PNG bytes}) of the index notebook"
    parts, pictures, cfg = [], {}, get_config(path=ROOT)
    for i, c in enumerate(nb.cells):
        if c.cell_type == "markdown":
            parts.append(
                relink(addresses(title(c.source) if i == 0 else c.source.strip(), cfg), place)
            )
        elif c.cell_type == "code":
            has = flags(c.source)
            if has.keys() & {"hide", "default_exp", "include"} or "nbdev_export(" in c.source:
                continue
            code = re.sub(r"\A(\s*#\|.*\n?)+", "", c.source).strip()
            if not has.keys() & {"echo", "code-fold"} and code:
                joins = parts and parts[-1].startswith(
                    "```python\n"
                )  # cells with nothing between them read as one block
                parts.append(
                    (parts.pop().removesuffix("```") + "\n" if joins else "```python\n")
                    + f"{code}\n```"
                )
            parts += outputs(c, pictures, has.get("fig-alt", "picture").strip('"'))
    return HEAD + "\n\n".join(p for p in parts if p) + "\n", pictures


TAKEN = re.compile(r"(<!-- table: (\S+) \| (.+?) -->\n).*?(<!-- end -->)", re.S)


def table_of(page: str, heading: str) -> str:
    "The first table below a heading of a page, in its text or among its outputs."
    below = False
    for cell in read(ROOT / page)["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            found = re.search(rf"^#+ {re.escape(heading)}$", text, re.M)
            if found:
                below = True
                text = text[found.end() :]
        else:
            text = text_outputs(cell)
        if below:
            found = re.search(r"^\|.*\|$(?:\n\|.*\|$)+", text, re.M)
            if found:
                return found[0]
    sys.exit(f"{page} has no table below the heading {heading!r}")


def filled(text: str) -> str:
    "A guide with its tables as the pages have them now."
    return TAKEN.sub(lambda m: f"{m[1]}{table_of(m[2], m[3])}\n{m[4]}", text)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail when something is not what its page gives",
    )
    check = p.parse_args().check
    text, pictures = render(nbformat.read(INDEX, as_version=4))
    files = {"README.md": text.encode(), **pictures}
    for guide in GUIDES.glob("*.md"):
        files[str(guide.relative_to(ROOT))] = filled(guide.read_text(encoding="utf-8")).encode()
    stale = {
        str(o.relative_to(ROOT)) for o in (ROOT / PICTURES).glob("readme_*.png")
    } - pictures.keys()
    differ = [
        k for k, v in files.items() if not (ROOT / k).exists() or (ROOT / k).read_bytes() != v
    ] + sorted(stale)
    if check:
        sys.exit(
            f"not what the pages give (run `make readme`): {', '.join(differ)}" if differ else 0
        )
    for k, v in files.items():
        (ROOT / k).write_bytes(v)
    for k in stale:
        (ROOT / k).unlink()
    print(f"README.md: {len(text.split())} words, {len(pictures)} pictures")


if __name__ == "__main__":
    main()
