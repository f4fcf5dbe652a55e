"""What is trained: a run that begins with another's weights and trains LoRA and maps, and what is refused of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.adapt.streams import with_streams
from nash_lab.data.corpus import Document, pack
from nash_lab.data.loader import LoaderConfig
from nash_lab.model.block import ModelConfig
from nash_lab.model.transformer import LM
from nash_lab.run.rundir import read_metrics
from nash_lab.train.optim import OptimConfig
from nash_lab.train.parallel import logical_axes
from nash_lab.train.pretrain import load_run, pretrain, write_run
from nash_lab.train.settings import TrainConfig
from nash_lab.train.tune import LoRAConfig, trained_part, tuned, with_part

PLAIN = ModelConfig.tiny(residual="plain", vocab_size=64, layers=2, init_std=0.2)
LORA = LoRAConfig(rank=2, alpha=6)


class Numbers:
    vocab_size, eos_id, hash = 64, 0, "numbers"

    def encode_batch(self, texts):
        return [[int(number) for number in text.split()] for text in texts]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Packed numbers, and a run of a dense model that was given streams"
    home = tmp_path_factory.mktemp("tune")
    texts = (" ".join(str((i + 3 * j) % 63 + 1) for j in range(20)) for i in range(40))
    pack((Document(text, "") for text in texts), Numbers(), home / "train.bin")
    rows = LoaderConfig(seq_len=16)
    cfg = TrainConfig(tokenizer="", train_bin="", val_bin="", model=PLAIN, loader=rows)
    write_run(with_streams(LM(PLAIN), "wide"), cfg, home / "streams")
    return home


def config(home, name, **changes):
    base, _ = load_run(home / "streams")
    cfg = TrainConfig(
        run=str(home / name),
        train_bin=str(home / "train.bin"),
        val_bin="",
        tokenizer="",
        steps=4,
        log_every=1,
        checkpoint_every=2,
        model=base.cfg,
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=0),
        loader=LoaderConfig(seq_len=16, batch_size=4),
        start_from=str(home / "streams"),
        tune="lora+maps",
        lora=LORA,
    )
    return replace(cfg, **changes)


def by_path(lm):
    flat = nnx.to_flat_state(nnx.state(lm, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


def stop_at_two(record, state):
    if record["step"] == 2:
        raise KeyboardInterrupt


def test_a_run_on_the_weights_of_another(home):
    "Frozen weights stay to the bit, maps and adapted layers move, a stop changes nothing, a plain model comes back"
    base, _ = load_run(home / "streams")
    straight = pretrain(config(home, "straight"))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(home, "stopped"), hooks=[stop_at_two])
    stopped = pretrain(config(home, "stopped"))
    losses = []
    for run in (straight.run, stopped.run):
        rows = read_metrics(run / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if row["step"]])
    assert losses[0] == losses[1] and len(losses[0]) == 4

    lm, cfg = load_run(straight.run)
    assert cfg.tune == "lora+maps" and nnx.graphdef(lm) == nnx.graphdef(base)
    before = by_path(base)
    after = by_path(lm)
    jax.tree.map(np.testing.assert_array_equal, after, by_path(load_run(stopped.run)[0]))
    moved = {path for path in before if (before[path] != after[path]).any()}
    layers = {p for p in before if p.startswith(("blocks/attention/", "blocks/ffn/"))}
    maps = {p for p in before if "_hyper/" in p or p.startswith("ends/")}
    assert layers <= moved <= layers | maps and moved & maps
    assert {"embedding", "norm/gain"}.isdisjoint(moved)

    again = write_run(lm, cfg, home / "plain")  # merged weights are an ordinary run
    assert load_run(again)[1].tune == "full" and load_run(again)[1].start_from == ""


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(start_from=""), "TrainConfig.start_from='': expected a run to begin with"),
        (dict(tune="some"), "TrainConfig.tune='some'"),
        (dict(lora=LoRAConfig(dropout=0.1)), "lora.dropout=0.1: expected 0 with tune='lora+maps'"),
        (dict(optim=OptimConfig(ema=0.9)), "optim.ema=0.9: expected 0"),
        (dict(model=PLAIN), "model.residual='plain' has no maps to train"),
    ],
)
def test_refused_settings(home, changes, says):
    with pytest.raises(ValueError, match=".") as error:
        config(home, "never", **changes)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_refused_runs(home):
    "Another model, and no run: one line, and no directory is left"
    other = replace(config(home, "never").model, heads=2, head_dim=16)
    with pytest.raises(ValueError, match="start_from has another model: head_dim: 8 -> 16; heads"):
        pretrain(config(home, "never", model=other))
    with pytest.raises(FileNotFoundError, match="nowhere/config.json: no such file"):
        pretrain(config(home, "never", start_from="nowhere"))
    assert not (home / "never").exists()


def test_parts_of_a_model():
    "Parts put back change nothing; a moved part is the same beside and inside, and as a trained model"
    lm = LM(ModelConfig.tiny(init_std=0.2, layers=2))
    tokens = jnp.arange(12)[None]
    part = trained_part(lm, "lora+maps", LORA, jax.random.key(0))
    np.testing.assert_allclose(with_part(lm, part, LORA)(tokens), lm(tokens), atol=1e-5)
    moved = jax.tree.map(lambda x: x + 0.02, part)
    beside = with_part(lm, moved, LORA)(tokens)
    inside = with_part(lm, moved, LORA, merge=True)(tokens)
    np.testing.assert_allclose(inside, beside, atol=1e-4)
    assert float(jnp.abs(beside - lm(tokens)).max()) > 1e-2
    with pytest.raises(ValueError, match="tune='maps': residual='plain' has no maps"):
        trained_part(LM(ModelConfig.tiny(residual="plain")), "maps", LORA, jax.random.key(0))
    with pytest.raises(ValueError, match="no linear layer fits target"):
        tuned(lm, "lora", LoRAConfig(targets=("*/none",)), jax.random.key(0))


def test_frozen_weights_are_sharded_as_before():
    "A layer that an adapter wraps keeps its rule, the thin matrices are whole on every device"
    lm = LM(PLAIN)
    rules = {}
    for model in (lm, tuned(lm, "lora", LORA, jax.random.key(0))):
        for path, x in by_path(model).items():
            axes = logical_axes(path, x.ndim)
            assert rules.setdefault(path.replace("/base/", "/"), axes) == axes
    assert rules["blocks/attention/q/weight"] == ("layers", "width", "heads", None)
    assert not any(rules["blocks/attention/q/a"])
