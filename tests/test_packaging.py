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


def test_one_version_and_one_address(settings, project):
    "Both stand in settings.ini; what repeats them agrees"
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    site = settings["doc_host"] + settings["doc_baseurl"]
    assert "version" in project["dynamic"] and "version" not in project
    assert citation["version"] == settings["version"]
    assert f"\n## {settings['version']}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["repository-code"] == project["urls"]["Source"] == settings["git_url"]
    assert citation["url"] == project["urls"]["Homepage"] == site
    assert citation["keywords"] == project["keywords"]
    changes = f"{settings['git_url']}/blob/{settings['branch']}/CHANGELOG.md"
    assert project["urls"]["Changes"] == changes


def pinned(name):
    "{distribution: version} of a file of constraints"
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize(
    "name, python", [("constraints.txt", "3.11"), ("constraints-3.12.txt", "3.12")]
)
def test_constraints(project, name, python):
    "Every direct dependency has its version in the constraints, inside the range pyproject.toml asks for"
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = pinned(name)
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["docs"] + extras["parity"]
    for r in map(Requirement, wanted):
        if r.name == "torch":
            continue  # its builds differ by machine; .ci/run names the version
        if r.marker and not r.marker.evaluate({"python_version": python}):
            continue
        distribution = canonicalize_name(r.name)
        assert distribution in pins, f"{r.name} is not in {name}: run `make constraints`"
        assert r.specifier.contains(pins[distribution]), f"{r} but {name} has {pins[distribution]}"
    assert not {"torch", "nash-lab"} & pins.keys()


# (jax, least flax that works with it), each tried with Python 3.13: every module imported, loss, gradient and decoding
# equal; one version less fails at `import flax` but for the first two, which were not tried below 0.12.7
TRIED = {
    "0.10.2": "0.12.8",
    "0.11.0": "0.12.8",
    "0.11.1": "0.12.9",
    "0.11.2": "0.12.10",
    "0.12.0": "0.12.10",
    "0.12.0.1": "0.12.10",
}


def allowed(project, name, python):
    "The versions of a dependency that pyproject.toml lets a resolver take on one Python"
    from packaging.requirements import Requirement

    found = [r for r in map(Requirement, project["dependencies"]) if r.name == name]
    (r,) = [r for r in found if not r.marker or r.marker.evaluate({"python_version": python})]
    return r.specifier


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_only_good_pairs_of_jax_and_flax(project, python):
    "Whatever a resolver takes of both is a pair that works; the next jax is not let in before it was tried"
    from packaging.version import Version

    jax, flax = (allowed(project, name, python) for name in ("jax", "flax"))
    # on the index: 3.11 ends with the first of these
    jaxes = ["0.10.2"] if python == "3.11" else list(TRIED)
    flaxes = ["0.12.7", "0.12.8"]
    if python != "3.11":
        flaxes += ["0.12.9", "0.12.10", "0.12.11", "0.12.12"]
    taken = [(j, f) for j in jaxes if j in jax for f in flaxes if f in flax]
    assert taken, "no pair is left"
    for j, f in taken:
        assert Version(f) >= Version(TRIED[j]), f"jax {j} does not work with flax {f}"
    assert "0.12.11" not in flax, "yanked"
    assert "0.12.1" not in jax and "0.13.0" not in jax and "0.13.0" not in flax
    assert "1.0.0" not in allowed(project, "orbax-checkpoint", python)
    assert "1.0.0" not in allowed(project, "tokenizers", python)


def test_the_doctor_knows_the_same_pairs():
    doctor = pytest.importorskip("nash_lab.lab.doctor")
    assert dict(doctor.PAIRS) == TRIED


def test_python_versions_agree(project):
    "requires-python, classifiers, venv.sh, the workflows and the index name the same Pythons"
    from packaging.specifiers import SpecifierSet

    rows = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert rows == [
        f"3.{n}" for n in range(30) if f"3.{n}" in SpecifierSet(project["requires-python"])
    ]
    least, most = rows[0], rows[-1]
    assert f"Python {least} to {most}" in (ROOT / "README.md").read_text()
    venv = (ROOT / "tools/venv.sh").read_text()
    bounds = f"(3, {least[2:]}) <= sys.version_info < (3, {int(most[2:]) + 1})"
    assert bounds in venv and f"Python {least} to {most}" in venv
    test = (ROOT / ".github/workflows/test.yml").read_text()
    assert all(f'"{row}"' in test for row in rows)


def test_issue_forms_ask_for_the_doctor():
    import yaml

    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    asked = [p for p in forms if p.name != "config.yml"]
    assert asked
    for path in asked:
        fields = yaml.safe_load(path.read_text())["body"]
        doctor = [f for f in fields if "nash_lab doctor" in f["attributes"]["label"]]
        assert doctor and doctor[0]["validations"]["required"], path.name


def test_contributing_and_its_policy():
    "It leads to the guide, and says in three lines what may change"
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert "docs/READING.md" in text and "CHANGELOG.md" in text
    policy = text.partition("## What may change\n")[2].strip().splitlines()
    assert len(policy) == 3, policy
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


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
    browser = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nash_lab/lab/browser").iterdir()}
    strange = [
        o
        for o in names
        if not (o.startswith(info) or o in browser or re.fullmatch(r"nash_lab/(\w+/)*\w+\.py", o))
    ]
    assert not strange, f"the wheel holds {strange}"
    assert len(browser) == 4 and browser <= set(names), "parts of the laboratory are missing"
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nash_lab").rglob("*.py")}
    assert here == {o for o in names if o.endswith(".py")}, "modules missing from the wheel"
    assert f"{info}licenses/LICENSE" in names and f"{info}entry_points.txt" in names


def test_sdist(built):
    names = tarfile.open(next(built.glob("*.tar.gz"))).getnames()
    for end in ("/LICENSE", "/nash_lab/__init__.py", "/nash_lab/lab/browser/model.js"):
        assert any(o.endswith(end) for o in names), f"no {end} in the sdist"


def test_the_index_takes_it(built):
    "twine's own check, strict, of both files"
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    r = subprocess.run(command, capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.count("PASSED") == 2, r.stdout + r.stderr


def test_readme_renders_on_the_index(settings):
    "As the index renders it: a picture that is found from there, a table, code, and no relative link"
    markdown = pytest.importorskip("readme_renderer.markdown")
    html = markdown.render((ROOT / "README.md").read_text(), variant="GFM")
    assert html and "<table" in html and "<pre" in html
    pictures = re.findall(r'<img[^>]* src="([^"]+)"', html)
    address = f"{settings['git_url']}/raw/{settings['branch']}/"
    assert pictures and all(p.startswith(address) for p in pictures), pictures
    assert all((ROOT / p.removeprefix(address)).exists() for p in pictures)
    links = re.findall(r'href="([^"]+)"', html)
    assert all(re.match(r"https?:|#", link) for link in links), links
