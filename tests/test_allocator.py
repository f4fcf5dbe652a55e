"The allocator that a command starts with: found, preloaded once, kept out of its children."

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nash_lab.core.files import allocator

linux = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
SCRIPT = """
import os, subprocess, sys
from nash_lab.core.files import allocator, preload_allocator
print("started", *sys.argv[1:], flush=True)
preload_allocator()
child = subprocess.run(["env"], capture_output=True, text=True).stdout
print(allocator(), "LD_PRELOAD" in child, "NASH_LAB_ALLOCATOR" in child)
"""


def lines(folder, **env):
    "what the script prints where a wheel lies in `folder`"
    wheel = folder / "cmeel.prefix/lib/libmimalloc.so"
    if not wheel.exists():
        wheel.parent.mkdir(parents=True)
        # any library will do for the loader; libc and its parts are not loaded twice
        loaded = Path("/proc/self/maps").read_text()
        some = re.search(r"/\S*/lib(z|ffi|crypto|stdc\+\+|gcc_s)[\w.-]*\.so[\d.]*", loaded)
        if some is None:
            pytest.skip("no library to stand in for an allocator")
        shutil.copy(some[0], wheel)
    keep = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "NASH_LAB_ALLOCATOR")}
    keep["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "a b", "--c"], env=keep | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@linux
def test_a_command_starts_once_more(tmp_path):
    "with the same arguments, and its children are as they were"
    assert lines(tmp_path) == ["started a b --c"] * 2 + ["mimalloc False False"]


@linux
def test_the_switch_and_a_library_of_your_own(tmp_path):
    said = lines(tmp_path, NASH_LAB_ALLOCATOR="system")
    assert said[:2] == ["started a b --c", f"{allocator()} False True"]
    assert lines(tmp_path, LD_PRELOAD="")[1].endswith("True False")


@linux
def test_a_path_that_cannot_be_preloaded(tmp_path):
    "a space parts the names of LD_PRELOAD"
    assert lines(tmp_path / "a folder")[1].startswith(allocator())


def test_an_interpreter_that_may_not_be_started(tmp_path, monkeypatch):
    "The command goes on as it is, and leaves nothing behind for its children"
    import nash_lab.core.files as files

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "allocator_library", lambda: "/some/libmimalloc.so")
    monkeypatch.setattr(os, "execv", refuse)
    for name in ("LD_PRELOAD", "NASH_LAB_ALLOCATOR"):
        monkeypatch.delenv(name, raising=False)
    files.preload_allocator()
    assert not {"LD_PRELOAD", "NASH_LAB_ALLOCATOR"} & os.environ.keys()
