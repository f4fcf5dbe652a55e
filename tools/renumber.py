"""Give a page a number, move the rest of its floor up by one, and mend every link and mention.

    python tools/renumber.py nbs/model/16_mhc.ipynb 17
    python tools/renumber.py nbs/model/residuals.ipynb 17      a new page

Then `make export`, which writes the package again."""

import re
import sys
from pathlib import Path

from pages import NBS, ROOT, number

TEXT = (".ipynb", ".md", ".py", ".yml", ".toml", ".sh")


def moves(page: Path, wanted: int, floor: list[Path]) -> dict[Path, Path]:
    "{page: where it goes}: `page` at `wanted`, and those after it as far up as they have to move."
    free = wanted + 1
    found = {page: page.with_name(f"{wanted:02d}_" + re.sub(r"^\d+_", "", page.name))}
    for other in sorted(floor, key=number):
        if other != page and number(other) >= wanted:
            if number(other) >= free:
                break  # a gap: nothing above has to move
            found[other] = other.with_name(f"{free:02d}_" + re.sub(r"^\d+_", "", other.name))
            free += 1
    return found


def mend(text: str, renamed: dict[str, str]) -> str:
    "`text` with every mention of an old page name replaced, all in one pass."
    if not renamed:
        return text
    names = "|".join(sorted(map(re.escape, renamed), key=len, reverse=True))
    return re.sub(rf"(?<![\w])({names})(?!\w)", lambda m: renamed[m[1]], text)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    page, wanted = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    floor = list(page.parent.glob("*.ipynb"))
    plan = {old: new for old, new in moves(page, wanted, floor).items() if old != new}
    taken = [
        p
        for p in NBS.rglob("*.ipynb")
        if p not in floor and number(p) in {number(new) for new in plan.values()}
    ]
    if taken:
        sys.exit(
            f"{taken[0].relative_to(ROOT)} has a number that is needed: renumber its floor first"
        )

    renamed = {old.stem: new.stem for old, new in plan.items() if number(old) >= 0}
    for folder in ("nbs", "docs", "tests", "tools", ".github"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in TEXT and path.is_file():
                text = path.read_text(encoding="utf-8")
                new = mend(text, renamed)
                if new != text:
                    path.write_text(new, encoding="utf-8")
    for old, new in sorted(plan.items(), key=lambda item: number(item[1]), reverse=True):
        old.rename(new)
        print(f"{old.relative_to(ROOT)} -> {new.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
