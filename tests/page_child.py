"What a page test runs in a process of its own, and what the process it is forked from has imported by then."

import os
from multiprocessing import get_context
from pathlib import Path

# slow to import, or imported by every page; none of them starts a JAX backend, which would not survive a fork
IMPORTED = [
    "jax",
    "flax.nnx",
    "optax",
    "orbax.checkpoint",
    "grain.python",
    "nbdev.test",
    "nbdev.showdoc",
    "fastcore.test",
    "matplotlib.pyplot",
    "nash_lab.lab.demo",
]


def run(path: Path, log: Path, root: Path):
    "Run the quick cells of a notebook as `nbdev_test` does, and compare the text that they show with what is stored."
    with open(log, "w") as file:
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
    os.environ["IN_TEST"] = "1"
    os.chdir(path.parent)
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from pages import directives, read, same_text, text_outputs

    slow = set(get_config(path=root).tst_flags.split())
    stored = [text_outputs(cell) for cell in read(path)["cells"]]
    nb = read_nb(path)
    ran = []

    def left_out(cell) -> bool:
        if cell.cell_type != "code" or "nbdev_export(" in cell.source:
            return True
        flags = directives(cell.source)
        if flags.get("eval") == "false" or slow & flags.keys():
            return True
        ran.append(cell)
        return False

    shell = CaptureShell(path)
    try:
        shell.run_all(nb, exc_stop=True, preproc=left_out)
    except Exception:
        print(shell.prettytb(fname=path))
        raise SystemExit(1)
    for i, cell in enumerate(nb.cells):
        if cell in ran and not same_text(stored[i], fresh := text_outputs(cell)):
            print(
                f"cell {i} of {path.name} shows other text than what is stored (make refresh stores it anew):"
            )
            print(f"stored: {stored[i]}\nfresh:  {fresh}")
            raise SystemExit(1)
    print("Success.")


def start(path: Path, log: Path, root: Path):
    "A started process that runs the notebook `path`."
    forks = get_context("forkserver")
    forks.set_forkserver_preload(IMPORTED)
    child = forks.Process(target=run, args=(path, log, root))
    child.start()
    return child
