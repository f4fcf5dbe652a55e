"The fault page names tests that exist, and every test of a fault is on it."

import ast, re
from pages import ROOT

PAGE = ROOT / "docs/FAULTS.md"
NAMED = re.findall(r"`(tests/\w+\.py)::(\w+)(?:\[([\w-]+)\])?`", PAGE.read_text())


def names_in(path):
    return {
        n.name
        for n in ast.parse((ROOT / path).read_text()).body
        if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
    }


def test_every_named_test_exists():
    from sandbox_attacks import ATTACKS

    assert len(NAMED) > 50
    for path, name, case in NAMED:
        assert name in names_in(path), f"docs/FAULTS.md names {path}::{name}, which does not exist"
        if case and name == "test_attack":
            assert case.split("-")[1] in ATTACKS, (
                f"docs/FAULTS.md names the attack {case}, which does not exist"
            )


def test_every_row_has_a_test():
    rows = [
        o
        for part in PAGE.read_text()
        .split("## The process")[1]
        .split("## Not covered")[0]
        .splitlines()
        if (o := part).startswith("| ") and not re.match(r"\| (fault|attack|guard) \|", o)
    ]
    assert len(rows) > 45
    for row in rows:
        assert re.search(r"`tests/\w+\.py::\w+", row.split("|")[-2]), (
            f"no test in the row {row[:80]}"
        )


def test_every_fault_test_is_on_the_page():
    assert not (missing := names_in("tests/test_faults.py") - {name for _, name, _ in NAMED}), (
        f"docs/FAULTS.md does not name {sorted(missing)}"
    )
    from sandbox_attacks import ATTACKS

    assert not (
        missing := set(ATTACKS) - {case.split("-")[1] for _, name, case in NAMED if case}
    ), f"docs/FAULTS.md does not name {sorted(missing)}"
