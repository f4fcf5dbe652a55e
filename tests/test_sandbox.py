"The sandbox from outside: reference solutions pass, attacks stay in the box, nothing is left behind."

import gzip, json, os, platform, shutil, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import pytest
import sandbox_attacks
from sandbox_attacks import ATTACKS, HEAVY, QUICK
from nash_lab.evals import confine, sandbox
from nash_lab.evals.sandbox import (
    Limits,
    Result,
    SandboxError,
    offered,
    outcome_of,
    run_many,
    run_python,
)
from nash_lab.core.files import parse_json

LEVELS = ("3", "2", "1", "3u", "2u")  # u: for a plain user
NAMESPACES = [
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--ipc",
    "--mount",
    "--net",
    "--mount-proc",
    "--propagation",
    "private",
]
MILD = Limits(unsafe=True, wall_s=20.0)

# -- the confinement of the escape suite


@contextmanager
def control_group(name):
    "Folders whose `cgroup.procs` bounds memory (2 GB) and processes (600); none where control groups are not ours to make"
    made = []
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            for kind, limits in {
                "memory": {"memory.limit_in_bytes": 2 << 30},
                "pids": {"pids.max": 600},
                "": {"memory.max": 2 << 30, "pids.max": 600},
            }.items():
                if kind not in (kinds.split(",") if kinds else [""]):
                    continue
                folder = Path("/sys/fs/cgroup", kind, path.lstrip("/"), name)
                try:
                    folder.mkdir()
                    if not (folder / "cgroup.procs").exists():
                        folder.rmdir()
                        continue  # a plain folder: the place holds the mounts of version 1
                    made.append(folder)
                    for file, value in limits.items():
                        (folder / file).write_text(str(value))
                except OSError:
                    if folder in made:
                        made.remove(folder)
                        folder.rmdir()
        yield made
    finally:
        for folder in made:
            for _ in range(40):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)


@pytest.fixture(scope="session")
def namespaces():
    if platform.system() != "Linux" or os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip(
            "attacks run only in namespaces of their own, which needs Linux and the administrator"
        )
    r = subprocess.run(
        [*NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, text=True
    )
    if r.returncode:
        pytest.skip(
            f"attacks run only in namespaces of their own, which this machine refuses: {r.stderr.strip()[:150]}"
        )


def attack(level, name):
    with control_group(f"nash_lab-{os.getpid()}-{time.monotonic_ns()}") as groups:
        if (
            name in HEAVY
            and len(groups) < 2
            and not any((g / "memory.max").exists() for g in groups)
        ):
            pytest.skip("no control groups for memory and processes: bombs stay packed")
        enter = "".join(f"echo $$ > {g}/cgroup.procs; " for g in groups)
        command = [
            "sh",
            "-c",
            f'{enter}exec "$@"',
            "sh",
            *NAMESPACES,
            sys.executable,
            "-B",
            sandbox_attacks.__file__,
            "confine",
            level,
            name,
        ]
        r = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240
        )
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-3000:]
    report = json.loads(r.stdout.splitlines()[-1])
    if "skip" in report:
        pytest.skip(f"level {level} is not offered here: {report['skip']}")
    return report["escaped"]


def slow(level, name):
    return name not in QUICK or level in ("1", "3u")


@pytest.mark.faults
@pytest.mark.parametrize(
    "level,name",
    [
        pytest.param(level, name, marks=pytest.mark.slow if slow(level, name) else ())
        for name in ATTACKS
        for level in LEVELS
    ],
)
def test_attack(namespaces, level, name):
    assert attack(level, name) == []


def test_suite_refuses_to_start_unconfined():
    r = subprocess.run(
        [sys.executable, sandbox_attacks.__file__, "run", "2", "network"],
        capture_output=True,
        text=True,
    )
    assert r.returncode and "refusing to start" in r.stderr


# -- reference solutions


def humaneval(folder):
    rows = map(json.loads, gzip.open(folder / "humaneval/HumanEval.jsonl.gz"))
    return [
        (r["prompt"] + r["canonical_solution"], f"{r['test']}\ncheck({r['entry_point']})")
        for r in rows
    ]


def mbpp(folder):
    rows = json.loads((folder / "mbpp/sanitized-mbpp.json").read_text())
    return [(r["code"], "\n".join(r["test_imports"] + r["test_list"])) for r in rows]


@pytest.mark.parametrize("load,count", [(humaneval, 164), (mbpp, 427)], ids=["humaneval", "mbpp"])
def test_reference_solutions(data, load, count):
    jobs = load(data)
    assert len(jobs) == count
    failed = [(i, r.status, r.error) for i, r in enumerate(run_many(jobs, MILD)) if not r.passed]
    assert not failed


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("level", [3, 2, 1])
@pytest.mark.parametrize("load", [humaneval, mbpp])
def test_reference_solutions_at_every_level(data, load, level):
    if why := offered()[level]:
        pytest.skip(f"level {level} is not offered here: {why}")
    assert not [
        (i, r.status, r.error)
        for i, r in enumerate(run_many(load(data), Limits(level=level, wall_s=20.0)))
        if not r.passed
    ]


def test_wrong_solutions_fail(data):
    "The next task's solution under this task's name"
    jobs = humaneval(data)[:12]
    assert not any(
        r.passed
        for r in run_many(
            [
                ("def candidate(*a): return None\n" + code.split("def ")[0], tests)
                for code, tests in jobs
            ],
            MILD,
        )
    )


def test_numpy():
    import numpy

    r = run_python(
        "import numpy as np",
        ["np.linalg.inv(np.eye(2) * 4)", "int(np.arange(4).sum())"],
        Limits(unsafe=True, wall_s=30.0, packages=(str(Path(numpy.__file__).parents[1]),)),
    )
    assert r.values == ([[0.25, 0], [0, 0.25]], 6), r


# -- what leaves the box

EARLY = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "raise SystemExit",
    "import os; os.abort()",
]


@pytest.mark.parametrize("code", EARLY)
def test_leaving_early_is_no_pass(code):
    r = run_python(code, "assert True", MILD)
    assert not r.passed and r.status in ("error", "crashed")


@pytest.mark.parametrize("code", EARLY)
def test_leaving_from_the_tests_is_no_pass(code):
    body = "\n".join(" " + o for o in code.split("; "))
    for tests in ("f()", "assert f()", {"f()": 1}, ["f()"]):
        assert not run_python(f"def f():\n{body}", tests, MILD).passed
    assert not run_python("", code, MILD).passed


def test_the_nonce_is_fresh_and_checked():
    line = lambda **k: (
        b'{"ready": true}\n'
        + json.dumps(dict(nonce="n", status="passed", error="", values=[]) | k).encode()
        + b"\n"
    )
    read = lambda data: outcome_of(data, False, 0, "n", "")["status"]
    assert read(line()) == "passed"
    for bad in (
        line(nonce="m"),
        line(nonce=None),
        line(status="great"),
        line(error=1),
        line(more=1),
        line(values=["NaN"]),
        line(values=["1 2"]),
        line()[:-1],
        line() + b"\n",
        line() + line(),
        b"",
        b"\n\n",
        line(values=3),
    ):
        assert read(bad) in ("invalid", "crashed"), bad


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "-Infinity",
        "1e999",
        '{"a": 1, "a": 1}',
        "[" * 100_000,
        "[1,]",
        '"\ud800',
        "",
        "9" * 5000,
    ],
)
def test_strict_json(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_values_are_compared_outside():
    code = 'def f(x): return (x, [1.0, {"a": None}])'
    assert run_python(code, {"f(1)": (1, [1, {"a": None}])}, MILD).passed
    r = run_python(code, {"f(1)": [1, [1, {"a": 0}]]}, MILD)
    assert r.status == "failed" and "expected" in r.error
    assert run_python(code, ["f(2)[0]"], MILD).values == (2,)


def test_surrogates_and_nul_in_code():
    for code in ('x = "\ud800"', "x = 1\0", "\ufeffx = 1", 'x = "é" * 3'):
        assert isinstance(run_python(code, "", MILD), Result)


# -- levels


def test_level_0_needs_a_word(monkeypatch):
    monkeypatch.setattr(sandbox, "offered", lambda: {3: "a", 2: "b", 1: "c"})
    with pytest.raises(SandboxError, match="no isolation on this machine .a; b; c."):
        run_python("x = 1")
    with pytest.raises(SandboxError, match="no isolation"):
        run_many([("x = 1", "")])
    r = run_python("x = 1", "assert x", MILD)
    assert r.passed and r.level == 0 and r.guards == ("limits",)
    with pytest.raises(ValueError, match="unsafe=True"):
        Limits(level=0)


def test_a_level_that_is_missing_is_an_error(monkeypatch):
    def no_landlock(*args):
        raise OSError("no such call")

    monkeypatch.setattr(confine, "kernel", no_landlock)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for level in (2, 3):
        with pytest.raises(SandboxError, match=f"level {level}: "):
            run_python("x = 1", "", Limits(level=level))


def test_a_guard_that_fails_runs_nothing(monkeypatch):
    monkeypatch.setattr(
        sandbox, "LAUNCHER", [sandbox.INTERPRETER, "-c", 'import sys; sys.exit("no such guard")']
    )
    with pytest.raises(SandboxError, match="no such guard"):
        run_python("x = 1", "", MILD)


def test_every_offered_level_says_so():
    for level, missing in offered().items():
        if not missing:
            r = run_python("x = 1", "assert x", Limits(level=level, wall_s=20.0))
            assert r.passed and r.level == level and "seccomp" in r.guards


# -- many


def test_run_many_keeps_the_order():
    results = run_many([(f"x = {i}", ["x"]) for i in range(20)], MILD, workers=4)
    assert [r.values for r in results] == [(i,) for i in range(20)]
    assert run_many([], MILD) == []


def test_nothing_is_left():
    run_python("", "", MILD)
    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc")
    here = lambda: (
        len(os.listdir("/proc/self/fd")),
        *(p.read_text() for p in Path("/proc/self/task").glob("*/children")),
    )
    before = here()
    for code in ("x = 1", "import os; os._exit(0)", "import time; time.sleep(60)"):
        run_python(code, "", Limits(unsafe=True, wall_s=0.3))
    assert here() == before


# -- what is refused before anything runs


@pytest.mark.parametrize(
    "name,value",
    [
        ("wall_s", 0),
        ("wall_s", float("nan")),
        ("cpu_s", -1),
        ("memory_mb", 0),
        ("threads", 0),
        ("files", 0),
        ("output_bytes", 0),
        ("start_s", 0),
        ("level", 4),
        ("level", 0),
    ],
)
def test_limits_that_are_no_limits(name, value):
    with pytest.raises(ValueError, match=rf"Limits\.{name}={value}: expected"):
        Limits(**{name: value})


def test_processors_without_numbers():
    for call in (
        lambda: confine.filter_program("mips", 1, True),
        lambda: confine.call_numbers("a 1 2", "mips"),
    ):
        with pytest.raises(ValueError, match="machine='mips': no system call numbers"):
            call()


def test_exceptions_on_one_line():
    class Odd(Exception):
        def __str__(self):
            raise SystemExit

    assert confine.exception_line(ValueError("two\nlines")) == "ValueError: two lines"
    assert confine.exception_line(Odd()) == "an exception that cannot be described"


def test_values_that_are_no_numbers():
    assert run_python('def f(): return float("nan")', ["f()"], MILD).status == "failed"
    assert run_python("1 +", "", MILD).error == "SyntaxError: invalid syntax (<code>, line 1)"
