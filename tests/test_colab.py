"The Colab page in a kernel like Colab's: what the kernel has loaded stays, what it imports afterwards works."

import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from pages import NBS, ROOT, code_cells

PAGE = NBS / "lab/87_colab_tpu.ipynb"
# of the TPU runtime of 2026-08, Python 3.13, as far as it meets what this package needs
FROZEN = (
    "jax==0.7.2 jaxlib==0.7.2 flax==0.11.2 orbax-checkpoint==0.12.4 datasets==4.8.5 fastcore==2.2.12 ipython==7.34.0 "
    "numpy==2.1.3 pandas<3 ipykernel<7 nbclient jedi pip setuptools scipy matplotlib optax"
).split()
# google.colab is there before the first cell runs, and has loaded these
PRELOAD = """
import sys
sys.path.append("played")
import google.colab.output, numpy, pandas, IPython
numpy.ones(3).sum()
"""
AFTER = """
import json, sys
from importlib.metadata import version
import numpy, jax, flax, datasets, jax.numpy as jnp
import nash_lab as nl
import nash_lab.lab.demo, nash_lab.train.pretrain, nash_lab.data.stream
from nash_lab.model.transformer import LM, ModelConfig
lm = LM(ModelConfig.tiny())
assert lm(jnp.arange(12)[None]).shape[:2] == (1, 12)
assert numpy.__version__ == version("numpy"), "NumPy moved under the kernel"
print(json.dumps({name: version(name) for name in ("numpy", "jax", "flax", "datasets", "orbax-checkpoint")}))
"""
RUN = """
import json, sys, nbformat
from nbclient import NotebookClient
cells = json.load(open(sys.argv[1]))
nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
NotebookClient(nb, timeout=900, kernel_name="python3").execute()
texts = ["".join(o.text for o in cell.outputs if o.get("name") == "stdout") for cell in nb.cells]
print(json.dumps(texts))
"""


def install_cells(wheel: Path) -> list[str]:
    "The cells of the page that install, taking `wheel` for the repository; without the TPU's own library."
    imports, install = code_cells(PAGE)[:2]
    assert "pip" in install and "packages_distributions" in imports
    theirs = 'f"nash_lab[tpu] @ git+{REPOSITORY}"'
    assert theirs in install
    return [imports, install.replace(theirs, repr(f"nash_lab @ {wheel.as_uri()}"))]


def run_cells(python: Path, cells: list[str], folder: Path) -> list[str]:
    played = folder / "played/google/colab"  # jax looks for its output
    played.mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "output.py"):
        (played / name).touch()
    (folder / "cells.json").write_text(json.dumps(cells))
    (folder / "run.py").write_text(RUN)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    env |= {"JAX_PLATFORMS": "cpu", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    r = subprocess.run(
        [python, "run.py", "cells.json"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads(r.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "runs", "_docs", "build", "dist", "*.egg-info", "tests")
    shutil.copytree(ROOT, to / "src", ignore=skip)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        to,
        to / "src",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(to.glob("*.whl"))


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> Path:
    "The Python of a frozen environment; NASH_LAB_COLAB names one that is there already, which is changed"
    if (there := os.environ.get("NASH_LAB_COLAB")) is not None:
        return Path(there) / "bin/python"
    base = shutil.which("python3.13")
    if base is None or subprocess.run([base, "--version"], capture_output=True).returncode:
        pytest.skip("no Python 3.13 here, which is Colab's")
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([base, "-m", "venv", folder], check=True)
    got = subprocess.run(
        [folder / "bin/python", "-m", "pip", "install", "--quiet", *FROZEN],
        capture_output=True,
        text=True,
    )
    if got.returncode:
        pytest.skip(f"the package index cannot be reached: {got.stderr.strip().splitlines()[-1]}")
    return folder / "bin/python"


@pytest.mark.slow
@pytest.mark.network
def test_the_install_cell_leaves_an_importable_library_and_numpy_alone(colab, wheel, tmp_path):
    before, *_, after = run_cells(
        colab,
        [PRELOAD + "print(numpy.__version__)", *install_cells(wheel), AFTER],
        tmp_path,
    )
    found = json.loads(after)
    assert found["numpy"] == before.strip(), found
    assert found["jax"] != "0.7.2" and found["flax"] != "0.11.2", found
    # a second run of the cells, as after a restart, installs nothing and works too
    again = run_cells(colab, [PRELOAD, *install_cells(wheel), AFTER], tmp_path)
    assert json.loads(again[-1]) == found and not again[2], again


def test_without_a_way_out_it_says_restart_now_once(tmp_path, capfd):
    "pip refuses the pins: installed without them, one line, the cell ends; pip itself is played"
    from types import SimpleNamespace
    import subprocess as real

    imports, install = code_cells(PAGE)[:2]
    calls = []

    def run(command, **_):
        calls.append(command)
        return SimpleNamespace(returncode=int("--constraint" in command))

    space = {}
    exec(imports, space)
    space |= {"find_spec": lambda name: None, "subprocess": SimpleNamespace(run=run)}
    sys.modules["google.colab"] = SimpleNamespace()
    try:
        with pytest.raises(SystemExit) as stop:
            exec(install, space)
    finally:
        del sys.modules["google.colab"]
    assert str(stop.value).startswith("restart now") and len(str(stop.value).splitlines()) == 1
    pinned, free = calls
    pins = Path(pinned[pinned.index("--constraint") + 1]).read_text()
    import numpy

    assert f"numpy=={numpy.__version__}\n" in pins and "--constraint" not in free
    assert real.run is subprocess.run


def test_sources_that_do_not_answer_are_left_out_and_said_so(tmp_path, capsys, monkeypatch):
    "Without the hub the corpus is the library: the page's own cell, as on a TPU"
    from dataclasses import replace
    import sysconfig
    from nash_lab.data.sources import SourceConfig
    from nash_lab.data.stream import StreamConfig, stream_documents

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (cell,) = [text for text in code_cells(PAGE) if "left out:" in text]
    space = dict(
        TINY=False, home=tmp_path, json=json, Path=Path, sysconfig=sysconfig, replace=replace
    )
    space |= dict(
        SourceConfig=SourceConfig, StreamConfig=StreamConfig, stream_documents=stream_documents
    )
    exec(cell, space)
    said = capsys.readouterr().out
    assert said.count("left out:") == 2 and "the corpus is the standard library" in said, said
    (source,) = space["stream"].sources
    assert next(stream_documents(StreamConfig(sources=(source,)))).text


def test_small_checkpoints_resume(tmp_path, monkeypatch, capsys):
    "What the page asks for on a Drive: half the bytes, the two newest, asynchronous; the run resumes and is loaded"
    import numpy as np
    from nash_lab.lab.cli import main
    from nash_lab.train.pretrain import load_run

    monkeypatch.chdir(tmp_path)
    corpus = "--corpus.max-bytes 60000 --corpus.holdout 0.1".split()
    assert main(["tokenizer", "--tokenizer.vocab-size", "400", *corpus]) == 0
    assert main(["pack", *corpus]) == 0
    small = (
        "pretrain --preset tiny --model.vocab-size 400 --loader.seq-len 32 --loader.batch-size 4 --eval-batches 2"
        " --optim.warmup-steps 1 --checkpoint-every 1 --keep 2 --steps 4"
    ).split()
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        run = tmp_path / dtype
        assert main([*small, "--run", dtype, "--checkpoint-dtype", dtype]) == 0
        steps = {int(p.name) for p in (run / "checkpoints").iterdir()}
        assert {3, 4} <= steps and len(steps) <= 3, steps  # and the best, where it is an older one
        arrays = [run / "checkpoints/4" / item for item in ("model", "optimizer")]
        sizes[dtype] = sum(
            p.stat().st_size for a in arrays for p in a.rglob("[0-9]*") if p.is_file()
        )
    assert sizes["bfloat16"] < 0.55 * sizes["float32"], sizes
    half, cfg = load_run(tmp_path / "bfloat16")
    whole, _ = load_run(tmp_path / "float32")
    assert half.embedding[...].dtype == np.float32 and cfg.checkpoint_dtype == "bfloat16"
    np.testing.assert_allclose(half.embedding[...], whole.embedding[...], rtol=2**-8)
    # longer, and with whole checkpoints from here on: the type on the disk may always change
    again = [
        *small[:-1],
        "6",
        "--allow-changes",
        "--run",
        "bfloat16",
        "--checkpoint-dtype",
        "float32",
    ]
    assert main(again) == 0
    assert (tmp_path / "bfloat16/checkpoints/6").exists()
    load_run(tmp_path / "bfloat16", 6)
