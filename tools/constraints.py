"Write the constraints of this Python: the installed version of all that the project and its `dev`, `docs`, `parity` and `preflight` extras pull in."

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT, EXTRAS = Path(__file__).resolve().parents[1], ("dev", "docs", "parity", "preflight")
# jax and flax end at 0.10.2 and 0.12.8 on Python 3.11, so there are two lists, each made on the oldest Python that it is for
FILES = {"constraints.txt": "3.11", "constraints-3.12.txt": "3.12 to 3.14"}
HEAD = """# Versions the tests last passed with, for Python {pythons}; pip and uv read it as `-c {name}`.
# Written by `make constraints` in an environment of the oldest of these Pythons.
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
    name = "constraints.txt" if sys.version_info < (3, 12) else "constraints-3.12.txt"
    if "peft" not in pins:
        sys.exit(
            f"the parity extra is not installed here: uv pip install -e '.[parity]' -c {name}"
        )
    pins.pop("torch", None)  # its builds differ by machine: 2.13.0+cpu; .ci/run names the version
    text = HEAD.format(name=name, pythons=FILES[name])
    text += "".join(f"{k}=={v}\n" for k, v in sorted(pins.items()))
    (ROOT / name).write_text(text)
    print(f"{name}: {len(pins)} versions")


if __name__ == "__main__":
    main()
