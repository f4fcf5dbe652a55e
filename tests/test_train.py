"Training: the step, exact resume after every kind of stop, checkpoints under kills and damage, the run directory."

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.data.corpus import CorpusConfig, Document, PackedTokens, corpus_files, pack
from nash_lab.data.loader import LoaderConfig, make_batch, row_count
from nash_lab.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from nash_lab.core.configs import from_json, to_json
from nash_lab.lab.cli import main
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.train import pretrain as module
from nash_lab.run import rundir
from nash_lab.train import step as step_module
from nash_lab.run.checkpoint import Checkpoints, Damaged, read_manifest, steps_in, verify
from nash_lab.run.guard import run_lock
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.settings import TrainConfig, misaligned
from nash_lab.train.pretrain import load_run, pretrain, read_metrics
from nash_lab.train.step import batch_gradient, batch_shapes, fresh_state, make_train_step

EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "skipped", "val_loss", "val_bpb")


def test_a_chunk_of_the_loss_counts_tokens_of_all_rows():
    "Four times the rows and no more logits at once; a file of version 0.1, in steps, reads as before."

    def temporaries(rows):
        lm = nnx.eval_shape(lambda: LM(ModelConfig.tiny(vocab_size=8192, layers=1, residual="plain")))
        graphdef, shapes = nnx.split(lm, nnx.Param)
        gradient = jax.jit(partial(batch_gradient, graphdef))
        batch = batch_shapes(rows, 64, "cross")
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = gradient.lower(nnx.to_pure_dict(shapes), batch, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = 4 * 8192 * 64 * (32 - 8)
    assert temporaries(32) - temporaries(8) < all_logits / 2

    demo = ModelConfig.preset("demo")
    old = from_json(ModelConfig, to_json(demo) | {"loss_chunk": 16})
    assert old.chunk_steps(16) == demo.chunk_steps(16) == 16
    assert ModelConfig(loss_chunk=1024).chunk_steps(8) == 128
    assert ModelConfig().chunk_steps(1000) == 1


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "A tokenizer and two small packed files; the training file is passed about every 6 steps of 8 x 16 tokens."
    home = tmp_path_factory.mktemp("corpus")
    text = "".join(path.read_text() for _, path in corpus_files(CorpusConfig())[:8])[:60_000]
    tokenizer = train_tokenizer([text], home / "tokenizer.model", TokenizerConfig(vocab_size=400))
    for split, start, size in (("train", 0, 900), ("validation", 30_000, 1500)):
        parts = [Document(text[i : i + 300], f"{i}.py") for i in range(start, start + size, 300)]
        pack(parts, tokenizer, home / f"{split}.bin", split=split)
    return home


@pytest.fixture(scope="session")
def cfg(corpus):
    return TrainConfig(
        run="",
        train_bin=str(corpus / "train.bin"),
        val_bin=str(corpus / "validation.bin"),
        tokenizer=str(corpus / "tokenizer.model"),
        steps=12,
        accumulate=2,
        log_every=1,
        eval_every=6,
        eval_batches=2,
        checkpoint_every=4,
        keep=2,
        model=ModelConfig.tiny(vocab_size=400, residual="plain", dropout=0.2),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=3, schedule="wsd"),
        loader=LoaderConfig(seq_len=16, batch_size=8, documents="mask"),
    )


@pytest.fixture(scope="session")
def straight(cfg, tmp_path_factory):
    "The run that is never stopped."
    return pretrain(replace(cfg, run=str(tmp_path_factory.mktemp("runs") / "straight"))).run


def lines(run):
    return [[row.get(name) for name in EXACT] for row in read_metrics(run / "metrics.jsonl")]


def weights(run, step=None):
    return nnx.to_pure_dict(nnx.state(load_run(run, step)[0], nnx.Param))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def raising(step, error):
    def hook(record, state):
        if record["step"] == step:
            raise error

    return hook


def saved_items(run, cfg):
    "Everything the newest checkpoint holds."
    tx = optimizer(cfg.optim, cfg.steps)
    init = lambda: fresh_state(
        nnx.to_pure_dict(nnx.state(LM(cfg.model, nnx.Rngs(0)), nnx.Param)), tx
    )
    shapes = jax.eval_shape(init)
    with closing(Checkpoints(run / "checkpoints")) as points:
        items = points.restore(
            template={
                "model": shapes.params,
                "optimizer": shapes.opt_state,
                "data": None,
                "counters": None,
                "rng": {"key": jax.ShapeDtypeStruct((2,), jnp.uint32)},
            }
        )
    for name in ("time_s", "seconds"):
        items["counters"].pop(name)  # how long it took
    return items


# The step


@pytest.fixture(scope="module")
def tiny():
    graphdef, state = nnx.split(LM(ModelConfig.tiny(residual="plain"), nnx.Rngs(0)), nnx.Param)
    ids = np.random.default_rng(0).integers(0, 256, (8, 17), dtype=np.int32)
    mask = (
        np.arange(16)[None] < np.array([1, 16, 3, 0, 9, 0, 0, 0])[:, None]
    )  # the last micro-batch counts nothing
    return (
        graphdef,
        nnx.to_pure_dict(state),
        {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": mask},
    )


def test_accumulation_is_the_big_batch(tiny):
    graphdef, params, batch = tiny
    gradient = jax.jit(batch_gradient, static_argnums=(0, 4))
    (loss, grads), (loss_4, grads_4) = (
        gradient(graphdef, params, batch, jax.random.key(0), n) for n in (1, 4)
    )
    np.testing.assert_allclose(loss["loss"], loss_4["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, grads_4)
    padding = batch | {"mask": np.zeros_like(batch["mask"])}
    loss, grads = gradient(graphdef, params, padding, jax.random.key(0), 4)
    assert loss["loss"] == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_non_finite_step_changes_nothing(tiny, value):
    graphdef, params, batch = tiny
    tx = optimizer(OptimConfig(warmup_steps=0), 10)
    step = make_train_step(graphdef, tx, 4)
    fresh = lambda: fresh_state(jax.tree.map(jnp.array, params), tx)
    good, _ = step(fresh(), batch, jax.random.key(0))  # moments are no longer zero
    good = jax.tree.map(np.array, good)
    for change in (
        lambda p: p["norm"] | {"gain": p["norm"]["gain"].at[3].set(value)},
        lambda p: jax.tree.map(lambda x: jnp.full_like(x, value), p["norm"]),
    ):
        bad = jax.tree.map(jnp.array, good)
        bad = bad._replace(params=bad.params | {"norm": change(bad.params)})
        before = jax.tree.map(np.array, bad)
        after, metrics = step(bad, batch, jax.random.key(0))
        same((after.params, after.opt_state), (before.params, before.opt_state))
        assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert step._cache_size() == 1  # compiled once


def test_finite_loss_with_bad_gradient_is_skipped(tiny, monkeypatch):
    graphdef, params, batch = tiny

    def poisoned(graphdef, params, batch, *rest):
        *batch, gain, others = batch.values()
        loss, grads = batch_gradient(
            graphdef, params, dict(zip(("mask", "targets", "tokens"), batch)), *rest
        )
        bad = grads["norm"]["gain"].at[0].mul(gain)
        return loss, jax.tree.map(lambda g: g * others, grads) | {"norm": {"gain": bad}}

    monkeypatch.setattr(step_module, "batch_gradient", poisoned)
    tx = optimizer(OptimConfig(warmup_steps=0), 10)
    step = make_train_step(graphdef, tx)
    for gain, others, skipped in (
        (jnp.inf, 1, 1),
        (jnp.nan, jnp.nan, 1),
        (1, jnp.inf, 1),
        (1, 1, 0),
    ):
        state = fresh_state(jax.tree.map(jnp.array, params), tx)
        poison = {"x_gain": jnp.float32(gain), "x_others": jnp.float32(others)}
        state, metrics = step(state, batch | poison, jax.random.key(0))
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) == (not skipped)
        assert int(state.skipped) == skipped
        if skipped:
            same((state.params, state.opt_state), (params, tx.init(params)))


def test_dropout_is_on_and_keyed_by_step(cfg):
    graphdef, state = nnx.split(LM(cfg.model, nnx.Rngs(0)), nnx.Param)
    params, ids = (
        nnx.to_pure_dict(state),
        np.random.default_rng(0).integers(0, 400, (8, 17), dtype=np.int32),
    )
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": np.ones((8, 16), bool)}
    tx = optimizer(replace(cfg.optim, learning_rate=1e-30), 10)
    step = make_train_step(graphdef, tx)

    def losses():
        state, out = fresh_state(jax.tree.map(jnp.array, params), tx), []
        for _ in range(3):
            state, metrics = step(state, batch, jax.random.key(0))
            out.append(float(metrics["loss"]))
        return out

    first = losses()
    assert len(set(first)) == 3 and losses() == first


# Exact resume


def test_log_has_each_step_once(straight, cfg):
    rows = read_metrics(straight / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 6, 12]
    assert rows[-1]["val_bpb"] < rows[0]["val_bpb"] and rows[-1]["mfu"] is None
    assert rows[-1]["tokens"] == 12 * 8 * 16 and rows[-1]["time_s"] > 0
    rates = [row["lr"] for row in rows[1:]]
    assert (
        max(rates) == rates[2] == rates[9] and rates[-1] < rates[10] < rates[9]
    )  # warm-up 3, decay over the last 2
    assert steps_in(straight / "checkpoints") == [8, 12]
    metrics = {step: verify(straight / f"checkpoints/{step}")["metrics"] for step in (8, 12)}
    assert metrics == {8: {}, 12: {name: rows[-1][name] for name in ("val_loss", "val_bpb")}}


def mean_nats(lm, packed, loader, how):
    "Nats per counted target of a file, by hand: rows from `make_batch`, the objective of training"
    rows = np.arange(row_count(len(packed), loader.seq_len))
    batch = make_batch(packed.tokens, rows, loader.seq_len, how, packed.meta.eos_id)
    batch = {name: batch[name] for name in step_module.batch_fields(how)}
    _, terms = lm.objective(**batch)
    return float(terms["nats"] / terms["count"]), int(terms["count"])


@pytest.mark.parametrize("documents", ["cross", "mask"])
def test_validation_and_eval_measure_what_is_trained(cfg, tmp_path, documents):
    """Short documents end often. The loss of the log falls with that of training, it is what the objective of training says of
    the held-out rows, and `eval`, the tables beside it, the kept checkpoint and a gate's text all ask for the same"""
    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(cfg.tokenizer)
    for split, count in (("train", 600), ("validation", 60)):
        words = ("".join(rng.choice(list("abcde"), 1 + rng.integers(6))) for _ in range(count))
        docs = [Document(word, f"{i}") for i, word in enumerate(words)]
        pack(docs, tokenizer, tmp_path / f"{split}.bin", split=split)
    loader = LoaderConfig(seq_len=32, batch_size=16, documents=documents)
    run = replace(
        cfg,
        run=str(tmp_path / "run"),
        train_bin=str(tmp_path / "train.bin"),
        val_bin=str(tmp_path / "validation.bin"),
        steps=40,
        log_every=20,
        eval_every=20,
        checkpoint_every=20,
        eval_batches=0,
        loader=loader,
    )
    pretrain(run)
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "val_loss" in row]
    assert rows[0]["val_loss"] > rows[1]["val_loss"] > rows[2]["val_loss"]
    assert rows[2]["val_loss"] < 1.2 * rows[2]["loss"]

    lm, _ = load_run(tmp_path / "run")
    packed = PackedTokens.open(run.val_bin)
    right, count = mean_nats(lm, packed, loader, documents)
    assert rows[2]["val_loss"] == pytest.approx(right, rel=1e-5)
    other = "cross" if documents == "mask" else "mask"
    assert abs(mean_nats(lm, packed, loader, other)[0] - right) > 0.01
    best = [read_manifest(tmp_path / f"run/checkpoints/{step}")["metrics"] for step in (20, 40)]
    assert [kept["val_loss"] for kept in best] == [row["val_loss"] for row in rows[1:]]

    assert main(["eval", "--run", run.run, "--tables", "--out", str(tmp_path / "e.json")]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["model"]["nats_per_token"] == pytest.approx(right, rel=1e-5)
    assert {table["tokens"] for table in report["tables"].values()} == {count}
    assert report["model"]["tokens"] == count


def test_epoch_edge_is_inside_the_run(cfg):
    batches, _ = module.open_data(cfg, module.make_mesh(cfg.mesh))
    states = []
    for _ in range(cfg.steps):
        next(batches)
        states.append(batches.get_state()["epoch"])
    assert states[0] == 0 and states[-1] >= 1


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_interrupted_run_resumes_bit_for_bit(cfg, straight, tmp_path, stop):
    run = replace(cfg, run=str(tmp_path / "run"))
    with pytest.raises(
        KeyboardInterrupt, match=f"stopped at step {stop}, saved; the same command continues"
    ):
        pretrain(run, hooks=[raising(stop, KeyboardInterrupt())])
    assert steps_in(tmp_path / "run/checkpoints")[-1] == stop
    pretrain(run)
    assert lines(tmp_path / "run") == lines(straight)
    same(saved_items(tmp_path / "run", cfg), saved_items(straight, cfg))


def test_signal_in_a_step_stops_after_it(cfg, straight, tmp_path):
    run, before = replace(cfg, run=str(tmp_path / "run")), signal.getsignal(signal.SIGINT)

    def press(record, state):
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
        pretrain(run, hooks=[press])
    assert signal.getsignal(signal.SIGINT) is before
    pretrain(run)
    assert lines(tmp_path / "run") == lines(straight)


def test_crash_and_stray_files_resume_from_the_newest_whole_checkpoint(cfg, straight, tmp_path):
    home = tmp_path / "run"
    run = replace(cfg, run=str(home))
    with pytest.raises(RuntimeError, match="crash"):
        pretrain(run, hooks=[raising(7, RuntimeError("crash"))])
    assert read_metrics(home / "metrics.jsonl")[-1]["step"] == 7 and steps_in(
        home / "checkpoints"
    ) == [4]
    with open(home / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    for stray in ("99", "6", "5.orbax-checkpoint-tmp", "notes"):
        (home / "checkpoints" / stray).mkdir()
    (home / "checkpoints/7").write_text("a file")
    (home / "checkpoints/6/model").mkdir()
    pretrain(run)
    assert lines(home) == lines(straight)
    same(weights(home), weights(straight))
    assert (home / "checkpoints/99").is_dir() and (home / "checkpoints/7").read_text() == "a file"


CHILD = """
import json, sys, time
from nash_lab.core.configs import from_json
from nash_lab.train.settings import TrainConfig, misaligned
from nash_lab.train.pretrain import pretrain
pretrain(from_json(TrainConfig, json.loads(sys.argv[1])), hooks=[lambda record, state: time.sleep(0.03)])
"""


def test_killed_training_resumes_bit_for_bit(cfg, straight, tmp_path):
    home = tmp_path / "run"
    run = replace(cfg, run=str(home), checkpoint_every=1)
    child = subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(to_json(run))])
    wait_for(child, lambda: len(list(home.glob("checkpoints/*/manifest.json"))) >= 2)
    with pytest.raises(ValueError, match=f'this run is being written by {{"pid": {child.pid}'):
        pretrain(run)
    child.kill()
    child.wait()
    left = steps_in(home / "checkpoints")
    assert left and left[-1] < 12  # killed in the middle of it
    pretrain(replace(run, checkpoint_every=4))
    assert lines(home) == lines(straight)
    same(weights(home), weights(straight))


def wait_for(child, condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.002)


def test_finished_run_is_only_reported(cfg, straight):
    before = {
        p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file() and p.name != "lock"
    }
    again = pretrain(replace(cfg, run=str(straight)))
    assert again.step == 12 and again.val_bpb < again.untrained_bpb
    assert before == {
        p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file() and p.name != "lock"
    }


def test_host_waits_only_where_a_line_is_due(cfg, tmp_path, monkeypatch):
    fetched, get = [], jax.device_get
    monkeypatch.setattr(module.jax, "device_get", lambda tree: fetched.append(1) or get(tree))
    few = replace(cfg, run=str(tmp_path / "run"), log_every=5, eval_every=100, checkpoint_every=100)
    pretrain(few)
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [0, 5, 10, 12]
    assert len(fetched) == 3 + 2  # three lines, two validations


# Checkpoints

SAVER = """
import sys, numpy as np
from nash_lab.run.checkpoint import Checkpoints
points = Checkpoints(sys.argv[1], keep=2, asynchronous=sys.argv[2] == "async")
for step in range(1, 10_000):
    points.save(step, {"model": {"w": np.full((500, 1000), step, np.float32)}, "counters": {"step": step}})
"""


@pytest.mark.parametrize("mode, delay", [("sync", 0.013), ("async", 0.005), ("async", 0.031)])
def test_killed_save_is_never_taken_as_whole(tmp_path, mode, delay):
    child = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path), mode])
    wait_for(child, lambda: len(steps_in(tmp_path)) >= 2)
    time.sleep(delay)
    child.kill()
    child.wait()
    whole = steps_in(tmp_path)
    assert whole
    template = {"model": {"w": jax.ShapeDtypeStruct((500, 1000), jnp.float32)}, "counters": None}
    with closing(Checkpoints(tmp_path, keep=2)) as points:
        for step in whole:
            got = points.restore(step, template=template)
            assert (np.asarray(got["model"]["w"]) == step).all() and got["counters"] == {
                "step": step
            }
        points.save(
            whole[-1] + 1, {"model": {"w": jnp.ones(3)}}
        )  # over what the killed save left there
        points.wait()
        assert points.latest() == whole[-1] + 1


def test_full_disk_is_reported_and_survived(tmp_path):
    big, small = (
        {"model": {"w": jax.random.normal(jax.random.key(0), (500, 1000))}},
        {"model": {"w": jnp.ones(3)}},
    )
    old, ignored = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    with closing(Checkpoints(tmp_path)) as points:
        points.save(1, small)
        points.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, old[1]))
            points.save(2, big)  # asynchronous: the error comes by itself, not with the next save
            with pytest.raises(OSError, match="2: checkpoint not saved") as error:
                for _ in range(1000):
                    points.poll()
                    time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, ignored)
        assert len(str(error.value).splitlines()) == 1 and points.steps() == [1]
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        points.save(2, big)
        points.wait()
        same(points.restore(template=big), big)


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = step({str(i): jnp.zeros((300, 1000)) for i in range(8)})
    with closing(Checkpoints(tmp_path, keep=9)) as points:
        for n in range(1, 6):
            points.save(n, {"model": tree})
            for _ in range(10):
                tree = step(tree)
        points.wait()
        for n in range(1, 6):
            got = points.restore(n, template={"model": tree})["model"]
            assert all((np.asarray(x) == 10 * n - 9).all() for x in got.values())


def test_damage_stops_the_resume_and_names_the_file(cfg, tmp_path):
    home = tmp_path / "run"
    run = replace(cfg, run=str(home))
    with pytest.raises(KeyboardInterrupt):
        pretrain(run, hooks=[raising(2, KeyboardInterrupt())])
    step = home / "checkpoints/2"
    payload = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    good, log = payload.read_bytes(), (home / "metrics.jsonl").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 16
    for broken in (bytes(flipped), good[: len(good) // 2], b"", None):
        payload.unlink() if broken is None else payload.write_bytes(broken)
        with pytest.raises(Damaged, match=payload.name) as error:
            pretrain(run)
        assert len(str(error.value).splitlines()) == 1
        payload.write_bytes(good)
    (step / "manifest.json").write_text("{")
    with pytest.raises(Damaged, match="manifest.json: not a JSON object"):
        pretrain(run)
    assert [p.name for p in (home / "checkpoints").iterdir()] == [
        "2"
    ]  # the only one stays where it is
    assert (home / "metrics.jsonl").read_bytes() == log  # nothing was touched


def test_best_checkpoint_outlives_newer_ones(tmp_path):
    with closing(Checkpoints(tmp_path, keep=2)) as points:
        for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5], start=1):
            points.save(
                step,
                {"model": {"w": jnp.full(2, step)}},
                {} if loss is None else {"val_loss": loss},
            )
        points.wait()
        assert (points.steps(), points.best(), points.latest()) == ([2, 4, 5], 2, 5)
    assert all(verify(tmp_path / str(step)) for step in (2, 4, 5))


# The run directory and bad input


def test_bad_input_is_refused_before_anything_is_written(cfg, corpus, tmp_path):
    other = train_tokenizer(
        ["other text " * 500], tmp_path / "other.model", TokenizerConfig(vocab_size=280)
    )
    cut = tmp_path / "cut.bin"
    cut.write_bytes((corpus / "train.bin").read_bytes()[:-3])
    (tmp_path / "cut.bin.json").write_bytes((corpus / "train.bin.json").read_bytes())
    run = replace(cfg, run=str(tmp_path / "run"))
    long = dict(
        loader=LoaderConfig(seq_len=2000, batch_size=2), model=replace(cfg.model, max_len=4000)
    )
    bad = {
        "nowhere": dict(train_bin="nowhere.bin"),
        "missing.model": dict(tokenizer="missing.model"),
        "tokenizer_hash": dict(tokenizer=str(other.path)),
        "bytes, expected": dict(train_bin=str(cut)),
        "vocab_size 400, expected at most 256": dict(model=ModelConfig.tiny()),
        "seq_len=2000": long,
        "loader.epochs=1": dict(loader=replace(cfg.loader, epochs=1)),
    }
    for message, changes in bad.items():
        with pytest.raises((ValueError, OSError), match=message) as error:
            pretrain(replace(run, **changes))
        assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="seq_len=128 is above model.max_len=64"):
        replace(run, loader=LoaderConfig())
    with pytest.raises(ValueError, match="warmup_steps=3 and 1 more"):
        replace(run, steps=3)


def test_batches_that_reach_over_an_epoch_count_once(cfg):
    "As many steps as the rows of all epochs fill batches are accepted, and not one more"
    epochs, size, mesh = 4, cfg.loader.batch_size, module.make_mesh(cfg.mesh)
    rows = row_count(len(PackedTokens.open(cfg.train_bin)), cfg.loader.seq_len)
    most = -(-epochs * rows // size)
    assert most < epochs * -(-rows // size)  # else no batch holds rows of two epochs
    run = replace(cfg, loader=replace(cfg.loader, epochs=epochs), steps=most)
    batches, _ = module.open_data(run, mesh)
    assert len(list(batches)) == most
    with pytest.raises(ValueError, match=f"epochs=4 give {most} batches, steps={most + 1}"):
        module.open_data(replace(run, steps=most + 1), mesh)


def test_changed_config_is_refused_and_free_fields_are_not(cfg, straight):
    run = replace(cfg, run=str(straight))
    model = "model.dropout: 0.2 -> 0.0; model.residual: plain -> mhc"
    for change, difference in (
        (dict(seed=1), "seed: 0 -> 1"),
        (dict(model=ModelConfig.tiny(vocab_size=400)), model),
    ):
        with pytest.raises(ValueError, match=difference):
            pretrain(replace(run, **change))
    assert pretrain(replace(run, log_every=3, keep=1, checkpoint_every=2)).step == 12


def test_foreign_directory_and_unknown_key_are_refused(cfg, straight, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="exists without config.json"):
        pretrain(replace(cfg, run=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir() if path.name != "lock"] == ["metrics.jsonl"]
    config = json.loads((straight / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"momentum": 1}))
    with pytest.raises(ValueError, match="config.json: TrainConfig: unknown key 'momentum'"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3, found"):
        load_run(straight, step=3)


def test_environment_holds_no_secret(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "marker-3141592653589793")
    pretrain(replace(cfg, run=str(tmp_path / "run")))
    made_with = json.loads((tmp_path / "run/environment.json").read_text())
    assert (
        made_with["backend"] == "cpu"
        and made_with["versions"]["jax"] == jax.__version__
        and made_with["command"]
    )
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"marker-3141592653589793" not in path.read_bytes(), path


def test_trackers_get_the_records_and_never_stop_a_run(cfg, tmp_path, monkeypatch, capsys):
    seen, closed = [], []

    def late(run, config):
        def log(record):
            if record["step"] == 2:
                raise ConnectionError("gone")
            seen.append(record["step"])

        return log, lambda: closed.append("late")

    def never(run, config):
        raise TimeoutError("no answer\nat all")

    monkeypatch.setitem(rundir.TRACKERS, "wandb", late)
    monkeypatch.setitem(rundir.TRACKERS, "never", never)
    run = replace(cfg, run=str(tmp_path / "run"), trackers=("never", "wandb", "tensorboard"))
    assert pretrain(run).step == 12 and seen == [0, 1] and closed == []
    said = capsys.readouterr().err
    assert "tracker never is left out: TimeoutError: no answer\n" in said
    assert "tracker wandb is left out: ConnectionError: gone\n" in said
    assert any((tmp_path / "run/tensorboard").iterdir())


def test_wandb_offline_writes_its_run(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(
        module, "Trackers", partial(rundir.Trackers, patience=120)
    )  # a busy machine is not the question
    pretrain(replace(cfg, run=str(tmp_path / "run"), trackers=("wandb",)))
    assert "left out" not in capsys.readouterr().err
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_where_wandb_shows_a_run(tmp_path, monkeypatch):
    "the settings first, then its own variables, then ours"
    wandb = pytest.importorskip("wandb")
    found = SimpleNamespace(mode="offline", project=None, run_name=None)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=found))
    asked = []
    job = SimpleNamespace(log=None, finish=None)
    monkeypatch.setattr(wandb, "init", lambda **how: asked.append(how) or job)
    mine = rundir.WandbConfig("mine", "team", "first", ("a", "b"))
    for project, whose in ((None, rundir.WandbConfig()), ("theirs", rundir.WandbConfig()), ("theirs", mine)):
        found.project = project
        rundir.wandb_tracker(tmp_path / "run", to_json(TrainConfig(wandb=whose)))
    ours, theirs, said = asked
    assert (ours["project"], ours["name"]) == ("nash_lab", "run") and "entity" not in ours
    assert "project" not in theirs and "tags" not in theirs
    assert [said[k] for k in ("project", "entity", "name")] == ["mine", "team", "first"]
    assert list(said["tags"]) == ["a", "b"]


def test_device_memory_where_the_device_tells_it(cfg, tmp_path, monkeypatch):
    "and no field where it does not; sizes that a TPU pads are named"
    line = dict(loss=1.0, aux=0, mtp=0, grad_norm=1.0, skipped=0)
    run = SimpleNamespace(
        cfg=cfg,
        ledger=SimpleNamespace(training_s=lambda: 1.0),
        mesh=SimpleNamespace(size=1),
        bar=SimpleNamespace(set_postfix_str=lambda *_, **__: None),
    )
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7}, device_kind="x")
    assert "peak_memory" not in module.step_line(run, 1, line, (0, 0.0))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert module.step_line(run, 1, line, (0, 0.0))["peak_memory"] == 7
    said = misaligned(replace(cfg.model, width=384, ffn_width=1000), 512)
    assert [x.split(" is no")[0] for x in said] == ["model.vocab_size=400", "model.ffn_width=1,000"]
    assert said[1].endswith("nearest: 896 or 1,024") and said[0].endswith("nearest: 384 or 512")


HOLDER = """
import sys, time
from nash_lab.run.guard import run_lock
with run_lock(sys.argv[1]): time.sleep(600)
"""


def test_lock_is_exclusive_and_dies_with_its_holder(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)])
    wait_for(
        child, lambda: (tmp_path / "lock").exists() and "pid" in (tmp_path / "lock").read_text()
    )
    with pytest.raises(ValueError, match=f'{{"pid": {child.pid}, "host"'), run_lock(tmp_path):
        pass
    child.kill()
    child.wait()
    with run_lock(tmp_path):
        pass


def test_quiet_without_a_terminal(cfg, tmp_path, capfd):
    pretrain(replace(cfg, run=str(tmp_path / "run")))
    assert capfd.readouterr() == ("", "")
