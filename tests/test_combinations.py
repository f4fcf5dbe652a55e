"""Every sensible combination of the switches trains, decodes with a cache and survives a checkpoint; drafts change no token.

Attention, residual and multi-token prediction meet in the block, in the cache and in the objective, so all 30 of their combinations are
run. The FFN works on each token alone and knows none of the three: each kind meets each of the others at least once in pairs, which takes
10 more. What is left out makes no other program: h_res modes, norms, aggregation and balance have tests on their own pages, and a tied or
untied head, dropout and remat do not touch a switch. One program trains two steps, one decodes and runs the full pass. Compiling them is all the time
there is, so they are compiled quickly rather than well, and the weights are drawn by NumPy, not by forty programs that initialise."""

import json
from contextlib import closing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.model.block import MAHAConfig, ModelConfig
from nash_lab.model.generate import SampleConfig, rollout
from nash_lab.core.configs import from_json, to_json
from nash_lab.model.speculative import speculate
from nash_lab.model.transformer import LM
from nash_lab.run.checkpoint import Checkpoints
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.step import fresh_state, make_train_step

ATTENTIONS, RESIDUALS, MTPS = (
    ("gqa", "diff1", "diff2", "mla", "maha"),
    ("plain", "mhc"),
    ("none", "parallel", "sequential"),
)
GRID = [(a, "swiglu", r, m) for a in ATTENTIONS for r in RESIDUALS for m in MTPS]
PAIRS = [
    ("gqa", "moe", "mhc", "sequential"),
    ("diff1", "moe", "plain", "parallel"),
    ("diff2", "moe", "mhc", "none"),
    ("mla", "moe", "plain", "none"),
    ("maha", "moe", "mhc", "parallel"),
    ("gqa", "gelu", "plain", "parallel"),
    ("mla", "relu2", "mhc", "none"),
    ("maha", "gelu", "mhc", "sequential"),
    ("diff1", "leaky_relu2", "mhc", "sequential"),
    ("diff2", "signed_sqrt", "plain", "none"),
]
T = 12


def config(attention, ffn, residual, mtp):
    return ModelConfig.tiny(
        attention=attention,
        ffn=ffn,
        residual=residual,
        mtp=mtp,
        vocab_size=64,
        init_std=0.2,
        maha=MAHAConfig(scales=2, aggregate="nash"),
    )


def batch():
    "two rows, the second with two documents"
    ids = np.random.default_rng(0).integers(1, 64, (2, T + 1), dtype=np.int32)
    segments = np.array([[1] * T, [1] * 7 + [2] * (T - 7)], np.int32)
    positions = np.array([range(T), [*range(7), *range(T - 7)]], np.int32)
    mask = np.ones((2, T), bool)
    mask[1, 6] = False
    return dict(
        tokens=ids[:, :-1], targets=ids[:, 1:], mask=mask, segments=segments, positions=positions
    )


def weights(cfg):
    "structure and made-up weights of a model; norms near one, everything else small"
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: LM(cfg)), nnx.Param)
    rng = np.random.default_rng(0)
    near = lambda path: 1.0 if "gain" in jax.tree_util.keystr(path) else 0.0
    fill = lambda path, a: jnp.asarray(near(path) + rng.normal(0, 0.15, a.shape), a.dtype)
    return graphdef, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(shapes))


def quickly(lowered):
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


@partial(jax.jit, static_argnums=0)
def decode(graphdef, params, tokens):
    "logits of prefill and single steps through the cache, and of one full pass"
    lm, b = nnx.merge(graphdef, params), tokens.shape[0]
    hidden, cache = lm.step(
        tokens[:, :5], jnp.broadcast_to(jnp.arange(5)[None], (b, 5)), lm.init_cache(b, T + 3)
    )

    def one(cache, i):
        new, cache = lm.step(
            jax.lax.dynamic_slice_in_dim(tokens, i, 1, 1), jnp.full((b, 1), i), cache
        )
        return cache, new[:, 0]

    _, rest = jax.lax.scan(one, cache, jnp.arange(5, T))
    return lm.logits(jnp.concatenate([hidden, jnp.moveaxis(rest, 0, 1)], 1)), lm(tokens)


def train_and_decode(cfg):
    "state after two steps that lower the loss, paths that did not move, logits through the cache and of a full pass"
    (graphdef, params), tx = weights(cfg), optimizer(OptimConfig(warmup_steps=1), 10)
    state, losses = fresh_state(params, tx), []
    before = jax.tree.map(np.array, state.params)  # copies: the step takes the state's memory
    step = quickly(make_train_step(graphdef, tx).lower(state, batch(), jax.random.key(0)))
    for _ in range(2):
        state, metrics = step(state, batch(), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[1] < losses[0] and int(state.skipped) == 0
    still = [
        jax.tree_util.keystr(path)
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(before)
        )
        if np.array_equal(new, old)
    ]
    tokens = batch()["tokens"]
    cached, full = quickly(decode.lower(graphdef, state.params, tokens))(state.params, tokens)
    return state, still, cached, full


@pytest.mark.parametrize(
    "attention, ffn, residual, mtp", GRID + PAIRS, ids=["-".join(c) for c in GRID + PAIRS]
)
def test_trains_decodes_and_checkpoints(tmp_path, attention, ffn, residual, mtp):
    cfg = config(attention, ffn, residual, mtp)
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(cfg)))) == cfg
    state, still, cached, full = train_and_decode(cfg)
    assert not still, f"not trained: {still}"
    np.testing.assert_allclose(cached, full, atol=2e-4, rtol=2e-4)

    with closing(Checkpoints(tmp_path, asynchronous=False)) as points:
        points.save(2, {"model": state.params, "optimizer": state.opt_state})
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state.params, state.opt_state)
        )
        got = points.restore(template={"model": shapes[0], "optimizer": shapes[1]})
    jax.tree.map(
        np.testing.assert_array_equal,
        (got["model"], got["optimizer"]),
        (state.params, state.opt_state),
    )


def copying(lm):
    "heads that repeat what the trunk says: right wherever greedy text repeats a token, wrong elsewhere, so that rows advance by 1, 2 and 3"
    for layer in (lm.mtp.block.attention.o, lm.mtp.block.ffn.down):
        layer.weight[...] = jnp.zeros_like(layer.weight[...])
    if lm.mtp.project is not None:
        lm.mtp.project.weight[...] = jnp.broadcast_to(jnp.eye(64, 32), lm.mtp.project.weight.shape)
    return lm


@pytest.mark.parametrize(
    "attention, residual, mtp",
    [
        ("gqa", "mhc", "sequential"),
        ("diff1", "plain", "parallel"),
        ("diff2", "plain", "sequential"),
        ("mla", "plain", "sequential"),
        ("maha", "plain", "sequential"),
        ("maha", "mhc", "parallel"),
    ],
)
def test_speculation_changes_no_token(attention, residual, mtp):
    "ragged rows, an end token, and two drafts of which none, one or both stay: every rollback of every cache"
    lm = copying(
        LM(
            ModelConfig.tiny(
                attention=attention,
                residual=residual,
                mtp=mtp,
                mtp_depth=2,
                vocab_size=16,
                init_std=0.3,
                maha=MAHAConfig(scales=2),
            )
        )
    )
    prompts = [[1], [2, 3], list(range(6, 15)), [4, 4, 4, 4], [15, 1, 2], [9] * 7, [8, 6], [7]]
    how = SampleConfig(max_new_tokens=16, temperature=0)
    free = rollout(lm, prompts, how).tokens
    ends = (int(free[2, 3]), int(free[5, 12]))  # two that do come up
    how = SampleConfig(max_new_tokens=16, temperature=0, eos_id=ends)
    plain, (fast, stats) = rollout(lm, prompts, how), speculate(lm, prompts, how)
    np.testing.assert_array_equal(fast.tokens, plain.tokens)
    np.testing.assert_array_equal(fast.lengths, plain.lengths)
    np.testing.assert_allclose(fast.logprobs, plain.logprobs, atol=5e-4)
    assert len(set(plain.lengths.tolist())) > 1 and stats.tokens == plain.lengths.sum() - 8
    assert 0 < stats.acceptance < 1 and 1 < stats.tokens_per_call < 3
