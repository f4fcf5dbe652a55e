"Write constraints.txt: the installed version of everything the project and its `dev`, `docs`, `parity` and `preflight` extras pull in."

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT, EXTRAS = Path(__file__).resolve().parents[1], ("dev", "docs", "parity", "preflight")
HEAD = """# Versions the tests last passed with; pip and uv read it as `-c constraints.txt`. Written by `make constraints`.
# One list for Python 3.11 to 3.13, made on the oldest of them.
"""


def closure(name, extras=()):
    "{name: version} of what distribution `name` needs here, itself left out"
    found, seen, todo = {}, set(), [(name, tuple(extras))]
    while todo:
        here, wanted = todo.pop()
        if (here, wanted) in seen:
            continue
        seen.add((here, wanted))
        try:
            dist = distribution(here)
        except PackageNotFoundError:
            continue  # needed on another platform or Python only
        found[canonicalize_name(here)] = dist.version
        for r in map(Requirement, dist.requires or ()):
            if r.marker and not any(r.marker.evaluate({"extra": e}) for e in ("", *wanted)):
                continue
            todo.append((r.name, tuple(sorted(r.extras))))
    return {k: v for k, v in found.items() if k != canonicalize_name(name)}


def main():
    pins = closure("nash_lab", EXTRAS)
    if "torch" not in pins:
        sys.exit(
            "the parity extra is not installed here: uv pip install -e '.[parity]' -c constraints.txt"
        )
    del pins["torch"]  # its builds differ by machine: 2.13.0+cpu; .ci/run names the version
    text = HEAD + "".join(f"{k}=={v}\n" for k, v in sorted(pins.items()))
    (ROOT / "constraints.txt").write_text(text)
    print(f"constraints.txt: {len(pins)} versions")


if __name__ == "__main__":
    main()
