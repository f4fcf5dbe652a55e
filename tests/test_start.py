"""The first commands of a newcomer: every preset trains on the CPU at its own dtype, defaults fit each other, a run that cannot
begin leaves nothing behind, and switches of JAX do not stop one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nash_lab.adapt.sdft import SDFTConfig
from nash_lab.data.corpus import Document, pack
from nash_lab.data.loader import LoaderConfig
from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
from nash_lab.lab.cli import main
from nash_lab.lab.demo import DemoConfig
from nash_lab.model.block import PRESETS, ModelConfig, einsum32
from nash_lab.model.transformer import model_shapes
from nash_lab.train import pretrain as module
from nash_lab.train.optim import OptimConfig, optimizer, schedule, with_warmup
from nash_lab.train.pretrain import pretrain, read_metrics
from nash_lab.train.settings import TrainConfig, saved_config
from nash_lab.train.step import TrainState, batch_fields, make_train_step, peak_flops

NAMES = [*PRESETS, *(f"{name}-plain" for name in PRESETS if PRESETS[name].get("residual") != "plain")]


def small(name):
    """A preset at a size for tests: two groups of heads of 8, 2 layers (more where one turn of the scan holds more), 300 tokens. What
    decides which program is compiled stays: attention, FFN, residual, MTP, ratio of heads, dtype, chunk, remat, unroll, longest row"""
    cfg = ModelConfig.preset(name)
    heads = 2 * cfg.heads // cfg.kv_heads
    sizes = dict(heads=heads, kv_heads=2, head_dim=8, width=8 * heads, ffn_width=64, vocab_size=300)
    return replace(cfg, **sizes, layers=max(2, cfg.unroll))


PROGRAMS = {}  # presets that differ in size alone are one program
for name in NAMES:
    PROGRAMS.setdefault(small(name), []).append(name)


@pytest.mark.parametrize("model", [pytest.param(m, id="+".join(n)) for m, n in PROGRAMS.items()])
def test_every_preset_trains_at_its_own_dtype(model):
    "Two steps with the loader and the optimizer that `pretrain --preset NAME` takes, 2 rows of them"
    cfg = TrainConfig(
        steps=2, model=model, loader=LoaderConfig(seq_len=min(128, model.max_len), batch_size=2)
    )
    graphdef, shapes = model_shapes(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes)
    tx = optimizer(cfg.optim, cfg.steps)
    moments = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(tx.init, params))
    state = TrainState(params, moments, jnp.int32(0), jnp.int32(0))
    shape = (2, cfg.loader.seq_len)
    ids = rng.integers(0, 300, (2, *shape), np.int32)
    batch = {"tokens": ids[0], "targets": ids[1], "mask": np.ones(shape, bool)}
    assert set(batch) == set(batch_fields(cfg.loader.documents))
    step = make_train_step(graphdef, tx, cfg.accumulate, cfg.accumulate_dtype)
    for _ in range(2):
        state, metrics = step(state, batch, jax.random.key(0))
    assert np.isfinite(float(metrics["loss"])) and int(metrics["skipped"]) == 0


def test_a_transposed_product_of_bfloat16_runs_here():
    "XLA's CPU backend finds no kernel for it; accelerators keep their own bf16 product"
    a, b = (jnp.ones(shape, jnp.bfloat16) for shape in ((2, 8, 16), (2, 8, 32)))
    product = jax.jit(lambda a, b: einsum32("btd,btv->dv", a, b).T)
    assert product(a, b).dtype == jnp.float32 and float(product(a, b)[0, 0]) == 16
    for platform, kind in (("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")):
        text = product.trace(a, b).lower(lowering_platforms=(platform,)).as_text()
        (dot,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert f"(tensor<2x8x16x{kind}>" in dot


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    home = tmp_path_factory.mktemp("start")
    text = "def area(width, height):\n    return width * height  # of a rectangle\n"
    tokenizer = train_tokenizer([text * 40], home / "t.model", TokenizerConfig(vocab_size=290))
    for split, count in (("train", 60), ("validation", 12)):
        docs = [Document(f"{text}{i}", f"{i}") for i in range(count)]
        pack(docs, tokenizer, home / f"{split}.bin", split=split)
    return TrainConfig(
        run=str(home / "run"),
        train_bin=str(home / "train.bin"),
        val_bin=str(home / "validation.bin"),
        tokenizer=str(home / "t.model"),
        model=ModelConfig.tiny(vocab_size=tokenizer.vocab_size, residual="plain"),
        loader=LoaderConfig(seq_len=32, batch_size=4),
    )


def flags(cfg, run):
    "The flags of a command that trains `cfg` in another folder"
    found = ["--run", str(run), "--train-bin", cfg.train_bin, "--val-bin", cfg.val_bin]
    found += ["--tokenizer", cfg.tokenizer, "--model.vocab-size", str(cfg.model.vocab_size)]
    return [*found, "--loader.seq-len", "32", "--loader.batch-size", "4"]


def test_twenty_steps_in_bfloat16_with_one_chunk(cfg, tmp_path, capsys):
    "`pretrain --steps 20` with the defaults trains, validates and saves at its end; then eval and generate"
    run = str(tmp_path / "run")
    half = ["--model.compute-dtype", "bfloat16", "--model.loss-chunk", "128"]
    given = ["pretrain", "--preset", "tiny-plain", *flags(cfg, run), *half, "--steps", "20"]
    assert main(given) == 0
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert rows[-1]["val_loss"] < 0.9 * rows[0]["val_loss"] and rows[-1]["mfu"] is None
    assert saved_config(tmp_path / "run").optim.warmup_steps == 2
    assert main(["eval", "--run", run]) == 0
    assert main(["generate", "--run", run, "--prompt", "def ", "--max-new-tokens", "4"]) == 0
    assert main(given) == 0  # the same command again finds its run
    assert "def " in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 49, 50, 51, 55, 62, 63, 100])
def test_a_warm_up_that_nobody_gave_fits(shape, steps):
    optim = OptimConfig(schedule=shape)
    warm = with_warmup(optim, steps).warmup_steps
    left = steps - (max(1, round(0.2 * steps)) if shape == "wsd" else 1)
    assert warm == (50 if left >= 50 else min(steps // 10, left))
    rates = [float(schedule(optim, steps)(i)) for i in range(steps)]
    assert all(0 < rate <= 2e-3 * (1 + 1e-6) for rate in rates)
    if steps >= 10:
        assert max(rates) == pytest.approx(2e-3)
    TrainConfig(steps=steps, optim=optim)
    SDFTConfig(steps=steps)
    DemoConfig(steps=steps)


def test_a_warm_up_that_does_not_fit_says_what_would(cfg):
    with pytest.raises(ValueError, match="warmup_steps=20 and 1 more .* give 19 warm-up .* 21 steps"):
        replace(cfg, steps=20, optim=OptimConfig(warmup_steps=20))
    with pytest.raises(ValueError, match="=90 and 20 more do not fit into steps=100, give 80 warm"):
        replace(cfg, steps=100, optim=OptimConfig(schedule="wsd", warmup_steps=90))


def test_settings_larger_than_the_data(cfg, tmp_path):
    "More rows, more batches and longer pauses than there are: it trains. A row longer than the data, or nothing to validate: refused"
    few = replace(
        cfg,
        run=str(tmp_path / "few"),
        steps=3,
        eval_every=10,
        checkpoint_every=10,
        log_every=10,
        eval_batches=100,
        loader=LoaderConfig(seq_len=32, batch_size=256),
    )
    assert pretrain(few).step == 3
    assert read_metrics(tmp_path / "few/metrics.jsonl")[-1]["val_loss"] > 0
    long = LoaderConfig(seq_len=4000, batch_size=4)
    model = replace(cfg.model, max_len=4000)
    for message, changes in {
        "seq_len=4000 needs 4001 tokens": dict(loader=long, model=model),
        "loader.seq_len of at most 64": dict(loader=LoaderConfig()),
    }.items():
        with pytest.raises(ValueError, match=message):
            pretrain(replace(cfg, run=str(tmp_path / "no"), **changes))
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("where", ["compile_step", "validate"])
def test_a_run_that_cannot_begin_leaves_nothing(cfg, tmp_path, monkeypatch, where):
    "A failed compile takes the new directory back, and the user's own files stay. A run with steps stays whole"
    run = replace(cfg, run=str(tmp_path / "run"), steps=4, checkpoint_every=2)

    def fail(*_):
        raise RuntimeError("no kernel for this")

    with monkeypatch.context() as patch:
        patch.setattr(module, where, fail)
        with pytest.raises(RuntimeError, match="no kernel"):
            pretrain(run)
        assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        (tmp_path / "run/notes.txt").write_text("mine")
        with pytest.raises(RuntimeError, match="no kernel"):
            pretrain(run)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    pretrain(run)
    with monkeypatch.context() as patch:
        patch.setattr(module, where, fail)
        longer = replace(run, steps=8, allow_changes=True)
        with pytest.raises(RuntimeError, match="no kernel"):
            pretrain(longer)
    assert saved_config(tmp_path / "run").steps == 8 and pretrain(longer).step == 8


@pytest.mark.parametrize("switch", ["disable_jit", "debug_nans", "enable_x64", "matmul"])
def test_switches_of_jax_do_not_stop_a_run(cfg, tmp_path, capsys, switch):
    "The losses are those of a run without; a switch that is left aside is named in a line"
    run = replace(cfg, steps=3, log_every=1)
    straight = pretrain(replace(run, run=str(tmp_path / "a")))
    turned = {
        "disable_jit": jax.disable_jit,
        "debug_nans": lambda: jax.debug_nans(True),
        "enable_x64": lambda: jax.enable_x64(True),
        "matmul": lambda: jax.default_matmul_precision("highest"),
    }[switch]
    capsys.readouterr()
    with turned():
        other = pretrain(replace(run, run=str(tmp_path / "b")))
    said = capsys.readouterr().err
    assert (f"JAX_{switch.upper()}: left aside" in said) == (switch in ("disable_jit", "enable_x64"))
    assert len(said.splitlines()) <= 1
    assert other.val_loss == pytest.approx(straight.val_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "peak"),
    {
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "Tesla T4": 65e12,
        "Tesla V100-SXM2-16GB": 125e12,
        "Tesla V100-PCIE-32GB": 112e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA A10": 125e12,
        "NVIDIA A10G": 70e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835.5e12,
        "NVIDIA H200": 989e12,
        "NVIDIA B200": 2250e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "TPU7x": 2307e12,
        "NVIDIA A1000": None,
        "NVIDIA T400": None,
        "NVIDIA L20": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "TPU v9": None,
        "cpu": None,
        "": None,
    }.items(),
)
def test_peak_of_a_chip_by_its_exact_name(kind, peak):
    assert peak_flops(kind) == peak
