"""Every notebook runs from top to bottom and shows what is stored.

Each has a process of its own: state such as x64 would leak into the next one."""

import pytest
from page_child import start
from pages import NBS, ROOT, notebooks

LIMIT = 600  # seconds, on a machine that does other things too


@pytest.mark.parametrize("name", [p.relative_to(NBS).as_posix() for p in notebooks()])
def test_notebook(name, tmp_path):
    log = tmp_path / "log"
    child = start(NBS / name, log, ROOT)
    child.join(LIMIT)
    late = child.is_alive()
    if late:
        child.kill()
        child.join()
    said = log.read_text()
    if late:
        pytest.fail(
            f"not done after {LIMIT} s (a page runs in under 60 on two idle cores)\n{said}",
            pytrace=False,
        )
    if child.exitcode or "Success" not in said:
        pytest.fail(f"exit code {child.exitcode}\n{said}", pytrace=False)
