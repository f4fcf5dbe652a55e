"Preflight: the programs of a run compiled for chips that are not here."

import ast
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
import jax
import nbformat
import pytest
from pages import NBS
from nash_lab.data.stream import StreamConfig
from nash_lab.core.configs import from_json, to_json
from nash_lab.model.transformer import ModelConfig
from nash_lab.train import preflight as pf
from nash_lab.train.preflight import GIB
from nash_lab.train.parallel import MeshConfig
from nash_lab.train.preflight import (
    CHIPS,
    PreflightConfig,
    candidate_settings,
    estimate,
    hbm_bytes,
    preflight,
    preflight_text,
    first_that_fits,
    traffic,
)

libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: nothing can be compiled for a TPU"
)
SMALL = PreflightConfig(
    target="local",
    seq_len=64,
    prompt_len=32,
    batch_size=4,
    serve_rows=4,
    mesh=MeshConfig(),
    model=ModelConfig.tiny(),
)


def test_report_on_this_machine():
    code, text = preflight_text(SMALL)
    assert code == 0 and "fits: " in text and text.startswith("39,820 parameters on local")
    assert all(
        word in text
        for word in ("train", "prefill", "decode", "args GiB", "temp GiB", "TFLOP", "compile s")
    )


def test_how_many_tokens_steps_and_hours(monkeypatch):
    "20 tokens a parameter (2203.15556): bytes of the packed file, updates, and hours at the bound"
    chip = replace(CHIPS["v6e"], hbm=16.0)
    monkeypatch.setattr(pf, "chip_of", lambda target: chip)
    program = pf.Program("train", tokens=16_384, useful=1e13, flops=918e12, moved=1.0)
    model = ModelConfig.preset("mhc-120m")  # 118,454,664 weights, two bytes a token
    cfg = replace(SMALL, programs=("train",), model=model)
    text = pf.report_text(pf.PreflightReport(cfg, chip, (program,)))
    line = "20 tokens a parameter: 2.37 billion, 4.74 GB packed, 144,598 steps, at the bound 40.17 hours"
    assert line in text.splitlines()


def test_a_chip_that_is_too_small(monkeypatch):
    monkeypatch.setattr(pf, "chip_of", lambda target: replace(CHIPS["v6e"], hbm=1e-4))
    code, text = preflight_text(replace(SMALL, programs=("train",)))
    assert (
        code == 1
        and "does not fit" in text
        and "what to change" in text
        and "--model.remat block" not in text.splitlines()[1]
    )


def test_search_finds_remat_or_pieces(monkeypatch):
    "With room for half of what the plain step takes, something else fits; what fits is compiled, not guessed"
    full = preflight(replace(SMALL, programs=("train",), batch_size=16))
    monkeypatch.setattr(
        pf, "chip_of", lambda target: replace(CHIPS["v6e"], hbm=0.6 * full.needed_gib)
    )
    best, tried = first_that_fits(replace(SMALL, batch_size=16, tries=8))
    assert (
        best is not None
        and best.needed_gib <= 0.6 * full.needed_gib
        and best.config != full.config
        and len(tried) <= 8
    )
    assert best.config.optim == SMALL.optim  # the update rule is the last thing to change


@pytest.mark.parametrize("preset", ["mhc-350m", "pythoncoder-1b", "nash-3b", "gpt-d12-mhc"])
def test_estimates_are_in_order(preset):
    cfg = PreflightConfig(model=replace(ModelConfig.preset(preset), remat="none"), seq_len=1024)
    none, dots, block = (
        estimate(replace(cfg, model=replace(cfg.model, remat=r))) for r in ("none", "dots", "block")
    )
    assert (
        none.saved > block.saved
        and dots.memory >= block.memory * 0.8
        and none.weights == block.weights
    )
    halves = estimate(replace(cfg, accumulate=2))
    assert halves.saved < 0.6 * none.saved and halves.gradients == 2 * none.gradients


def test_settings_divide():
    cfg = PreflightConfig(
        model=ModelConfig.tiny(),
        target="v6e-8",
        seq_len=64,
        prompt_len=32,
        batch_size=8,
        mesh=MeshConfig(data=8),
    )
    for c, _ in candidate_settings(cfg):
        assert (
            c.mesh.data * c.mesh.fsdp * c.mesh.tp == 8
            and c.batch_size // c.accumulate % (c.mesh.data * c.mesh.fsdp) == 0
        )
        assert c.model.kv_heads % c.mesh.tp == 0


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(mesh=MeshConfig(data=3)), "data=3 .* does not make"),
        (dict(target="v6e-4", mesh=MeshConfig(data=2, tp=4)), "does not make 4 devices"),
        (dict(target="v6e-4", mesh=MeshConfig(data=8)), "does not make 4 devices"),
        (
            dict(target="v6e-4", mesh=MeshConfig(data=4), batch_size=2, serve_rows=4),
            "2 rows of a batch do not divide",
        ),
    ],
)
def test_refused(change, said):
    if "rows" in said and find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    with pytest.raises(ValueError, match=said) as error:
        preflight(replace(SMALL, **change))
    assert "\n" not in str(error.value)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(pf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs libtpu, which is not installed"):
        preflight(replace(SMALL, target="v5e-1"))


def test_a_compiler_that_dies(monkeypatch):
    monkeypatch.setattr(pf, "find_spec", lambda name: True)
    monkeypatch.setattr(pf.sys, "executable", "/bin/false")
    with pytest.raises(
        ValueError, match="target 'v6e-1': the compiler's process failed: no answer"
    ):
        preflight(replace(SMALL, target="v6e-1"))


def test_unknown_target():
    data = to_json(SMALL) | {"target": "v7"}
    with pytest.raises(ValueError, match="PreflightConfig.target: expected 'v6e-1'"):
        from_json(PreflightConfig, data)


@pytest.mark.parametrize(
    "change",
    [
        dict(seq_len=128),
        dict(accumulate=3),
        dict(prompt_len=65),
        dict(programs=("eval",)),
        dict(target="v7"),
        dict(tries=0),
        dict(timeout_s=0),
    ],
)
def test_settings_that_do_not_fit(change):
    ((name, value),) = change.items()
    name, value = ("batch_size", 4) if name == "accumulate" else (name, value)
    with pytest.raises(ValueError) as error:
        replace(SMALL, **change)
    assert f"PreflightConfig.{name}" in str(error.value) and repr(value) in str(error.value)


def test_a_text_that_is_no_program():
    assert traffic("no program") == {} and hbm_bytes("token[]") == 0


@pytest.mark.parametrize(
    "said, gib",
    [
        ("RESOURCE_EXHAUSTED: Used 33.10G of 31.25G hbm", 33.10),
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (46.21G) exceeds available HBM (31.24G).",
            46.21,
        ),
    ],
)
def test_out_of_memory_is_an_answer(monkeypatch, said, gib):
    def fail(self, *args, **kw):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    found = preflight(replace(SMALL, programs=("train",)))
    assert found.programs[0].temporaries == gib * GIB and found.programs[0].error and not found.fits


def test_a_compiler_that_fails(monkeypatch):
    def fail(self, *args, **kw):
        raise jax.errors.JaxRuntimeError("INTERNAL: x\ny")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(ValueError, match="the compiler failed: INTERNAL: x$"):
        preflight(replace(SMALL, programs=("train",)))


def asked_on_colab(choice):
    "The preflight that the Colab page asks for on a TPU, from the page's own cells"
    nodes = [
        n
        for c in nbformat.read(NBS / "lab/87_colab_tpu.ipynb", 4).cells
        if c.cell_type == "code"
        for n in ast.parse(c.source).body
    ]
    plain = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module.startswith("nash_lab")]
    names = {"test", "real", "plan", "model", "cfg", "wanted"}
    plain += [
        n
        for n in nodes
        if isinstance(n, ast.Assign)
        and getattr(n.targets[0], "id", "") in names
        and "REPOSITORY" not in ast.unparse(n)
    ]
    scope = dict(
        TINY=False,
        DRIVE=False,
        CHOICE=choice,
        home=Path("colab"),
        path="tokenizer",
        stream=StreamConfig(),
    )
    exec(compile(ast.Module(plain, []), "73_colab_tpu", "exec"), scope)
    return scope["wanted"]


def test_colab_asks_for_its_presets():
    for choice in ("mhc-120m", "pythoncoder-1b"):
        asked = asked_on_colab(choice)
        assert (
            asked.target == "v6e-1"
            and asked.model == ModelConfig.preset(choice)
            and asked.seq_len == 2048
        )
        assert estimate(asked).memory < CHIPS["v6e"].hbm


@libtpu
def test_what_colab_trains_fits(monkeypatch):
    "The run of the Colab page on one v6e, compiled as the page compiles it"
    monkeypatch.delenv("XLA_FLAGS")  # which tell the tests' compiler to be quick
    found = preflight(asked_on_colab("mhc-120m"))
    (train,) = found.programs
    assert found.fits and train.name == "train" and train.tokens == 64 * 2048
    assert (
        1.0 < train.flops / train.useful < 1.6
        and train.moved > 2 * train.arguments
        and train.aliased > 0.99 * train.results
    )
