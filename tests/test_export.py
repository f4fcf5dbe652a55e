"The package is what the notebooks export, all of it and nothing else; the notebooks are clean."

import json, shutil, subprocess, sys
import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    "A copy of the project with the package deleted, exported and cleaned anew"
    to = tmp_path_factory.mktemp("again")
    for name in ("nbs", "nash_lab", "tools"):
        shutil.copytree(
            ROOT / name,
            to / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, to / name)
    by_hand = {"__init__.py"}
    for p in (to / "nash_lab").rglob("*.py"):
        if p.name not in by_hand:
            p.unlink()
    r = subprocess.run([sys.executable, "tools/sync.py"], cwd=to, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return to


def files(folder, pattern):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob(pattern)
        if ".ipynb_checkpoints" not in p.parts
    }


def test_package_is_the_export(again):
    here, there = files(ROOT / "nash_lab", "*.py"), files(again / "nash_lab", "*.py")
    assert sorted(here) == sorted(there), (
        "modules without a notebook, or never exported: run `make export`"
    )
    assert [k for k in here if here[k] != there[k]] == [], (
        "edited by hand or stale: run `make export`"
    )


def test_notebooks_are_clean(again):
    here, there = files(ROOT / "nbs", "*.ipynb"), files(again / "nbs", "*.ipynb")
    assert [k for k in here if here[k] != there[k]] == [], "not clean: run `make export`"


def test_ruff():
    "Style of the package and of the scripts; only the `__all__` that nbdev wraps may pass 120 columns"
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--output-format",
            "json",
            "nash_lab",
            "tools",
            "tests",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert r.returncode in (0, 1), r.stderr
    found = [
        (o["filename"], o["location"]["row"], o["code"], o["message"]) for o in json.loads(r.stdout)
    ]
    code = lambda file: next(
        (i for i, o in enumerate(open(file), 1) if o.startswith("# %% ../")), 0
    )  # where exported cells begin
    found = [
        f"{f}:{row}: {rule} {text}"
        for f, row, rule, text in found
        if not (rule == "E501" and row < code(f))
    ]
    assert not found, "\n" + "\n".join(found)
