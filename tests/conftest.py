"Settings every test runs under, set before jax is imported; subprocesses inherit them."

import gc, os, re, signal, sys, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    WANDB_MODE="offline",
    MPLBACKEND="agg",
    HF_HUB_OFFLINE="1",
)
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell's background job; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(ROOT / "tools"))
from pages import quick_compile

# most of the time goes into compiling; what is timed sets XLA_FLAGS itself
if "xla_" not in (flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{flags} {quick_compile()}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

NAMED = set(re.findall(r"`(tests/\w+\.py::\w+)", (ROOT / "docs/FAULTS.md").read_text()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Whatever the page of faults names is one of `make test-faults`, wherever it stands"
    for item in items:
        if item.nodeid.split("[")[0] in NAMED:
            item.add_marker("faults")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return ROOT / "tests/fixtures"


@pytest.fixture(scope="session")
def data() -> Path:
    "Folder of real corpora and benchmarks, named by NASH_LAB_DATA; without it the test is skipped"
    folder = os.environ.get("NASH_LAB_DATA")
    if not folder:
        pytest.skip("NASH_LAB_DATA is not set: it names the folder with the real data sets")
    if not Path(folder).is_dir():
        pytest.fail(f"NASH_LAB_DATA={folder} is not a folder", pytrace=False)
    return Path(folder).resolve()


@pytest.fixture(autouse=True)
def few_mappings():
    "Forget compiled programs before their memory mappings reach what Linux allows a process (65,530), where LLVM aborts"
    begin = time.monotonic()
    yield
    if time.monotonic() - begin < 0.1:  # too short to compile much, and counting takes a while
        return
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> dict:
    "Settings of a run on a few lines of Python: a tokenizer of 300 pieces, and both splits"
    from nash_lab.data.corpus import Document, pack
    from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer

    home = tmp_path_factory.mktemp("packed")
    text = "def add(a, b):\n    return a + b\n\nclass Point:\n    x = 0\n\n" * 9
    tokenizer = train_tokenizer([text], home / "t.model", TokenizerConfig(vocab_size=300))
    for split in ("train", "validation"):
        docs = [Document(text + split * i, f"{split}{i}.py") for i in range(9)]
        pack(docs, tokenizer, home / f"{split}.bin", split=split)
    return dict(
        train_bin=str(home / "train.bin"),
        val_bin=str(home / "validation.bin"),
        tokenizer=str(home / "t.model"),
    )
