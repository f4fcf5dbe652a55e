"The tools that tests rely on see what they are there to see."

import json
import pytest
from page_child import start
from pages import NBS, ROOT, named, notebooks, number, reads, same_text


@pytest.mark.parametrize(
    "stored, fresh, same",
    [
        ("loss 1.5192", "loss 1.5193", True),
        ("loss 1.5192", "loss 1.62", False),
        ("[0.1 0.2]", "[ 0.1  0.2]", True),
        ("accepted True", "accepted False", False),
        ("{'lost': 0}", "{'lost': 0, 'copy': False}", False),
        ("3 layers", "4 layers", False),
        ("12,345 tokens", "12,346 tokens", True),
        ("1e-08", "3e-08", True),  # both are rounding
        ("", "anything", False),
    ],
)
def test_same_text(stored, fresh, same):
    assert same_text(stored, fresh) == same


def test_a_stored_output_that_is_not_the_code_s_is_found(tmp_path):
    "The comparison of the book, on a page whose stored output was changed by hand"
    page = NBS / "core/00_files.ipynb"
    nb = json.loads(page.read_text())
    nb["cells"].insert(
        -2,
        dict(
            cell_type="code",
            id="x",
            metadata={},
            execution_count=None,
            source=["6 * 7"],
            outputs=[
                dict(
                    output_type="execute_result",
                    metadata={},
                    execution_count=None,
                    data={"text/plain": ["54"]},
                )
            ],
        ),
    )
    copy = tmp_path / "page.ipynb"
    copy.write_text(json.dumps(nb))
    child = start(copy, log := tmp_path / "log", ROOT)
    child.join(120)
    assert child.exitcode == 1 and "fresh:  42" in log.read_text(), log.read_text()


def test_reads_follow_the_imports():
    pages = {named(p): p for p in notebooks()}
    used = reads()[pages["model/mhc"]]
    assert pages["maths/birkhoff"] in used and all(
        number(p) < number(pages["model/mhc"]) for p in used
    )


def test_guards_are_removed_by_name():
    from mutate import without

    text = "def f(x):\n    if x < 0:  # guard: sign\n        raise ValueError(x)\n    check(\n        x,\n    )  # guard: range\n    return x\n"
    assert "if False:" in without(text, "sign") and "raise ValueError" in without(text, "sign")
    assert "check" not in without(text, "range") and "return x" in without(text, "range")
    assert without(text, "sign", "if x > 9:").splitlines()[1] == "    if x > 9:"


def test_every_guard_is_marked_once():
    from mutate import GUARDS, ROOT, places

    assert GUARDS.keys() == places(ROOT / "nash_lab").keys()


def test_renumbering_closes_up_to_the_first_gap():
    from pathlib import Path
    from renumber import mend, moves

    floor = [Path(f"model/{n}.ipynb") for n in ("16_first", "17_second", "20_third")]
    page = Path("model/new.ipynb")
    assert moves(page, 16, [*floor, page]) == {
        page: Path("model/16_new.ipynb"),
        floor[0]: Path("model/17_first.ipynb"),
        floor[1]: Path("model/18_second.ipynb"),
    }
    renamed = {"16_first": "17_first", "17_second": "18_second"}
    assert (
        mend("[mHC](../model/16_first.ipynb), 17_second, 16_first_part", renamed)
        == "[mHC](../model/17_first.ipynb), 18_second, 16_first_part"
    )
