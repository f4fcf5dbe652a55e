"Update rules over the stacked weights of real models: memory, exactness, groups, averages, checkpoints."

import jax, jax.numpy as jnp, numpy as np, optax, pytest
from flax import nnx
from nash_lab.core.configs import from_json, to_json
from nash_lab.model.moe import MoEConfig
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.train.optim import by_path, factored_rms, kept_weights, matrix_stack, tree_bytes
from nash_lab.train.optim import GroupRule, OptimConfig, rule_names, optimizer, schedule
from nash_lab.train.step import fresh_state, make_train_step

KINDS = {
    "mhc": {},
    "plain": dict(residual="plain"),
    "moe": dict(ffn="moe", moe=MoEConfig(experts=4, top_k=2)),
    "maha": dict(attention="maha"),
    "mtp": dict(mtp="sequential"),
    "mla": dict(attention="mla"),
}


def shapes(cfg):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: LM(cfg, nnx.Rngs(0))), nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


@pytest.mark.parametrize("kind", KINDS)
def test_no_moment_mixes_layers(kind):
    "Every array that Adafactor keeps has the axis of layers in front, and none is averaged over it"
    params = shapes(
        ModelConfig.tiny(
            layers=3,
            width=128,
            heads=2,
            kv_heads=2,
            head_dim=64,
            ffn_width=256,
            vocab_size=256,
            **KINDS[kind],
        )
    )[1]
    stacks = by_path(
        lambda path, x: jax.eval_shape(lambda x: matrix_stack(path, x), x).shape[0], params
    )
    state = jax.eval_shape(factored_rms().init, params)
    jax.tree.map(
        lambda n, own: [
            x.shape[0] == n or pytest.fail(f"{x.shape}, expected {n} in front")
            for x in jax.tree.leaves(own)
        ],
        stacks,
        state,
    )
    assert all(n % 3 == 0 for n in jax.tree.leaves(stacks["blocks"]))


@pytest.mark.parametrize(
    "path", ["blocks/attention/q/weight", "blocks/attention/o/weight", "blocks/ffn/up/weight"]
)
def test_adafactor_is_that_of_each_layer(path):
    *above, last = path.split("/")

    def nest(x):
        for name in reversed(above + [last]):
            x = {name: x}
        return x

    shape = {"q": (2, 130, 2, 70), "o": (2, 2, 70, 130), "up": (2, 130, 140)}[above[-1]]
    params, tx, alone = (
        nest(jnp.ones(shape)),
        factored_rms(),
        optax.adafactor(1.0, multiply_by_parameter_scale=False),
    )
    state, own, rng = (
        tx.init(params),
        [alone.init(jnp.ones(matrix_stack(path, np.ones(shape)).shape[1:]))] * 2,
        np.random.default_rng(0),
    )
    for _ in range(3):
        g = rng.normal(size=shape).astype(np.float32) * np.array([1, 1e3]).reshape(
            2, *[1] * (len(shape) - 1)
        ).astype(np.float32)
        ours, state = tx.update(nest(jnp.asarray(g)), state, params)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            flat = matrix_stack(path, jnp.asarray(g))
            pairs = [alone.update(flat[i], own[i], jnp.ones(flat.shape[1:])) for i in range(2)]
        own = [s for _, s in pairs]
        for i in range(2):
            np.testing.assert_allclose(
                matrix_stack(path, jax.tree.leaves(ours)[0])[i], -pairs[i][0], rtol=2e-4, atol=1e-6
            )


@pytest.mark.parametrize(
    "changes",
    [
        dict(name="adafactor"),
        dict(name="muon", moment_dtype="bfloat16"),
        dict(moment_dtype="bfloat16", ema=0.9),
    ],
    ids=["adafactor", "muon-bf16", "adamw-bf16-ema"],
)
def test_every_rule_trains(changes):
    cfg = ModelConfig.tiny(ffn="moe", moe=MoEConfig(experts=4, top_k=2))
    graphdef, params = nnx.split(LM(cfg, nnx.Rngs(0)), nnx.Param)
    tx = optimizer(
        OptimConfig(
            learning_rate=1e-2, warmup_steps=2, groups=(GroupRule("*/phi", 0.5),), **changes
        ),
        20,
    )
    state, step = (
        fresh_state(nnx.to_pure_dict(params), tx),
        make_train_step(graphdef, tx, 2, "bfloat16"),
    )
    ids = np.random.default_rng(0).integers(0, 256, (4, 17), dtype=np.int32)
    batch, losses = (
        {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": np.ones((4, 16), bool)},
        [],
    )
    for _ in range(6):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3 and int(state.skipped) == 0
    if "ema" in changes:
        mean = jax.tree.leaves(kept_weights(None, state.opt_state))
        assert all(x.dtype == jnp.float32 for x in mean) and len(mean) == len(
            jax.tree.leaves(state.params)
        )
        assert any(not np.array_equal(a, b) for a, b in zip(mean, jax.tree.leaves(state.params)))


def test_a_broken_step_leaves_the_average_alone():
    cfg = ModelConfig.tiny()
    graphdef, params = nnx.split(LM(cfg, nnx.Rngs(0)), nnx.Param)
    tx = optimizer(OptimConfig(ema=0.9, warmup_steps=2), 20)
    state, step = fresh_state(nnx.to_pure_dict(params), tx), make_train_step(graphdef, tx)
    state.params["norm"]["gain"] = state.params["norm"]["gain"].at[0].set(jnp.nan)
    before = jax.tree.map(np.array, kept_weights(None, state.opt_state))
    ids = np.zeros((2, 8), np.int32)
    state, metrics = step(
        state, {"tokens": ids, "targets": ids, "mask": np.ones((2, 8), bool)}, jax.random.key(0)
    )
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, kept_weights(None, state.opt_state), before)


def test_bytes_of_a_large_model():
    "nash-3b: what each optimizer keeps, from shapes alone"
    params = shapes(ModelConfig.preset("nash-3b"))[1]
    kept = lambda **c: (
        tree_bytes(jax.eval_shape(optimizer(OptimConfig(**c), 1000).init, params))
        / tree_bytes(params)
    )
    assert abs(kept() - 2) < 1e-3 and abs(kept(moment_dtype="bfloat16") - 1) < 1e-3
    assert (
        kept(name="muon") < 1.2
        and kept(name="adafactor") < 0.02
        and abs(kept(name="adafactor", ema=0.999) - 1) < 0.02
    )


def test_config_round_trip():
    cfg = OptimConfig(
        name="muon",
        groups=(
            GroupRule("*/phi", 0.1),
            GroupRule("embedding", weight_decay=0.0, name="adafactor"),
        ),
        ema=0.99,
    )
    assert from_json(OptimConfig, to_json(cfg)) == cfg
    one = np.zeros((1, 1, 1))
    names = rule_names(
        cfg,
        {
            "embedding": one[0],
            "blocks": {"ffn": {"up": {"weight": one}}, "ffn_hyper": {"phi": one}},
        },
    )
    assert names["embedding"] == "1:adafactor" and names["blocks"]["ffn"]["up"]["weight"] == "muon"


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: OptimConfig(name="sgd"), "OptimConfig.name='sgd'"),
        (lambda: OptimConfig(ema=1.0), "OptimConfig.ema=1.0"),
        (lambda: OptimConfig(schedule="triangle"), "OptimConfig.schedule='triangle'"),
        (lambda: OptimConfig(learning_rate=-1.0), "OptimConfig.learning_rate=-1.0"),
        (lambda: OptimConfig(moment_dtype="float16"), "OptimConfig.moment_dtype='float16'"),
        (
            lambda: OptimConfig(moment_dtype="bfloat16", beta2=0.999),
            "OptimConfig.beta2=0.999: expected .*0.99",
        ),
        (lambda: GroupRule("x", learning_rate_scale=-1.0), "GroupRule.learning_rate_scale=-1.0"),
        (lambda: GroupRule("x", weight_decay=-1.0), "GroupRule.weight_decay=-1.0"),
        (lambda: GroupRule("x", name="lion"), "GroupRule.name='lion'"),
        (
            lambda: schedule(OptimConfig(warmup_steps=50), 50),
            "warmup_steps=50 and 1 more do not fit into steps=50",
        ),
        (lambda: schedule(OptimConfig(schedule="wsd", warmup_steps=9), 10), "9 and 2 more"),
        (
            lambda: optimizer(OptimConfig(groups=(GroupRule("nothing/*"),)), 100).init(
                {"w": jnp.ones(2)}
            ),
            r"'nothing/\*': fits none of the paths, such as 'w'",
        ),
    ],
)
def test_refused(wrong, said):
    with pytest.raises(ValueError, match=said) as error:
        wrong()
    assert "\n" not in str(error.value)
