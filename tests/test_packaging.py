"settings.ini and pyproject.toml agree; the wheel and the sdist hold what they should."

import re, subprocess, sys, tarfile, tomllib, zipfile
from configparser import ConfigParser
import shutil
import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def settings():
    p = ConfigParser(interpolation=None)
    p.read(ROOT / "settings.ini")
    return p["DEFAULT"]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_names(settings, project):
    assert settings["lib_name"] == settings["lib_path"] == project["name"] == "nash_lab"
    assert settings["description"] == project["description"]
    assert settings["author"] == project["authors"][0]["name"]
    assert settings["keywords"].split() == project["keywords"]
    init = (ROOT / "nash_lab/__init__.py").read_text()
    assert re.search(r'^__version__ = "(.+)"', init, re.M)[1] == settings["version"], (
        "run `make export`"
    )


def test_constraints(project):
    "Every direct dependency has its version in constraints.txt, inside the range pyproject.toml asks for"
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = dict(
        o.split("==")
        for o in (ROOT / "constraints.txt").read_text().splitlines()
        if o and not o.startswith("#")
    )
    extras = project["optional-dependencies"]
    for r in map(
        Requirement, project["dependencies"] + extras["dev"] + extras["docs"] + extras["parity"]
    ):
        name = canonicalize_name(r.name)
        if name == "torch":
            continue  # its builds differ by machine; .ci/run names the version
        assert name in pins, f"{r.name} is not in constraints.txt: run `make constraints`"
        assert r.specifier.contains(pins[name]), f"{r} but constraints.txt has {pins[name]}"
    assert not {"torch", "nash-lab"} & pins.keys()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Wheel and sdist, built from a copy without a network"
    to = tmp_path_factory.mktemp("built")
    skip = shutil.ignore_patterns(
        ".git",
        ".venv",
        ".*_cache",
        "runs",
        "_docs",
        "_proc",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".ipynb_checkpoints",
    )
    shutil.copytree(ROOT, to / "src", ignore=skip)
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            str(to / "dist"),
            str(to / "src"),
        ],
        capture_output=True,
        text=True,
    )
    if "ERROR Missing dependencies" in r.stdout + r.stderr:
        pytest.skip(f"the build backend is not installed here: {r.stdout[-300:]}")
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return to / "dist"


def test_wheel(built, settings):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    info = f"nash_lab-{settings['version']}.dist-info/"
    strange = [
        o for o in names if not (o.startswith(info) or re.fullmatch(r"nash_lab/(\w+/)*\w+\.py", o))
    ]
    assert not strange, f"the wheel holds {strange}"
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nash_lab").rglob("*.py")}
    assert here == {o for o in names if o.endswith(".py")}, "modules missing from the wheel"
    assert f"{info}licenses/LICENSE" in names and f"{info}entry_points.txt" in names


def test_sdist(built):
    names = tarfile.open(next(built.glob("*.tar.gz"))).getnames()
    assert any(o.endswith("/LICENSE") for o in names) and any(
        o.endswith("/nash_lab/__init__.py") for o in names
    )
