"What a page test runs in a process of its own, and what the process it is forked from has imported by then."
import os
from multiprocessing import get_context
from pathlib import Path

# third-party and slow to import; none of them starts a JAX backend, which would not survive a fork
IMPORTED = ['jax', 'flax.nnx', 'optax', 'orbax.checkpoint', 'grain.python', 'nbdev.test', 'nbdev.showdoc', 'fastcore.test', 'matplotlib.pyplot']

def run(path: Path, log: Path, root: Path):
    "Run the notebook `path` as `nbdev_test` does, in the folder `root`; what it prints goes to the file `log`"
    with open(log, 'w') as f:
        for fd in (1, 2): os.dup2(f.fileno(), fd)
    os.chdir(root)
    from nbdev.test import nbdev_test
    nbdev_test(path=str(path), n_workers=0)

def start(path: Path, log: Path, root: Path):
    "A started process that runs the notebook `path`"
    forks = get_context('forkserver')
    forks.set_forkserver_preload(IMPORTED)
    (child := forks.Process(target=run, args=(path, log, root))).start()
    return child
