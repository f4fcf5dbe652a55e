"Differential and latent attention from outside: naive loops in float64, any chunking of the cache, stacked caches, dtypes, configs."

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.model.attention import causal_mask
from nash_lab.model.diff import (
    DIFF1,
    DIFF2,
    LAMBDAS,
    DiffConfig,
    diff_attention_v1,
    diff_attention_v2,
)
from nash_lab.model.layers import RopeConfig
from nash_lab.core.configs import from_json, to_json
from nash_lab.core.keys import named_key
from nash_lab.model import mla
from nash_lab.model.mla import MLA, MLAConfig, absorbed, explicit

STABILISED = DiffConfig(stabilised=True)
LAYERS = {
    "diff1": (DIFF1, DiffConfig()),
    "diff1-stabilised": (DIFF1, STABILISED),
    "diff2": (DIFF2, DiffConfig()),
    "mla": (MLA, MLAConfig(kv_rank=8, rope_dim=4)),
    "mla-q": (MLA, MLAConfig(kv_rank=12, q_rank=6, rope_dim=2, v_head_dim=6)),
}


def normal(name, *shape, dtype=jnp.float32):
    return jax.random.normal(named_key(jax.random.key(3), name), shape, dtype)


def build(kind, **change):
    cls, cfg = LAYERS[kind]
    shape = dict(width=16, heads=4, kv_heads=2, head_dim=4, rope=RopeConfig(), std=0.5, out_std=0.5)
    return cls(**(shape | change), rngs=nnx.Rngs(0), cfg=cfg)


def softmax_map(q, k):
    score = np.where(np.tri(len(q), dtype=bool), q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    return np.exp(score) / np.exp(score).sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "heads, groups, width, dtype, tolerance",
    [
        (4, 2, 16, "float64", 1e-12),
        (6, 1, 3, "float64", 1e-12),
        (2, 2, 16, "float32", 1e-5),
        (4, 2, 8, "bfloat16", 0.1),
    ],
)
def test_functions_are_the_naive_loops(heads, groups, width, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        q1, q2 = (
            normal("q1", 2, 6, heads, 8, dtype=dtype),
            normal("q2", 2, 6, heads, 8, dtype=dtype),
        )
        k1, k2, v = (
            normal("k1", 2, 6, groups, 8, dtype=dtype),
            normal("k2", 2, 6, groups, 8, dtype=dtype),
            normal("v", 2, 6, groups, width, dtype=dtype),
        )
        lam = jax.nn.sigmoid(normal("lam", 2, 6, heads, dtype=dtype))
        v1 = jax.jit(diff_attention_v1)(q1, k1, q2, k2, v, lam[0, 0])
        floored = jax.jit(partial(diff_attention_v1, stabilised=True))(q1, k1, q2, k2, v, 0.8)
        pairs = jnp.stack([q1, q2], 3).reshape(2, 6, 2 * heads, 8)
        v2 = jax.jit(diff_attention_v2)(pairs, k1, v, lam)
        assert v1.dtype == v2.dtype == floored.dtype == dtype and v1.shape == v2.shape == (
            2,
            6,
            heads,
            width,
        )
        Q1, Q2, K1, K2, V, L = (np.asarray(a, np.float64) for a in (q1, q2, k1, k2, v, lam))
        for b, h in np.ndindex(2, heads):
            g = h * groups // heads
            first, second = (
                softmax_map(Q1[b, :, h], K1[b, :, g]),
                softmax_map(Q2[b, :, h], K2[b, :, g]),
            )
            shared = softmax_map(Q2[b, :, h], K1[b, :, g])
            for ours, difference in (
                (v1, first - L[0, 0, h] * second),
                (floored, np.maximum(first - 0.8 * second, 0)),
                (v2, first - L[b, :, h, None] * shared),
            ):
                np.testing.assert_allclose(
                    np.asarray(ours[b, :, h], np.float64),
                    difference @ V[b, :, g],
                    rtol=0,
                    atol=tolerance,
                )


def test_arrays_of_numpy_and_python_numbers_will_do():
    q, k = np.ones((1, 3, 2, 4), np.float32), np.ones((1, 3, 1, 4), np.float32)
    np.testing.assert_allclose(diff_attention_v1(q, k, q, k, k, 0.25), 0.75, rtol=1e-6)
    np.testing.assert_allclose(diff_attention_v2(q, k, k, np.float32(0.25)), 0.75, rtol=1e-6)


def test_a_mask_is_used():
    q, k, v = normal("q", 2, 2, 4, 8), normal("k", 2, 9, 2, 8), normal("v", 2, 9, 2, 8)
    mask = causal_mask(jnp.array([[3, 4], [0, 1]]), 9)
    garbage = v.at[0, 5:].set(1e6).at[1, 2:].set(-1e6)
    np.testing.assert_array_equal(
        diff_attention_v2(q, k, v, 0.5, mask=mask), diff_attention_v2(q, k, garbage, 0.5, mask=mask)
    )
    blind = mask.at[1, :, 0].set(False)
    assert not np.asarray(diff_attention_v1(q, k, q, k, v, 0.5, mask=blind)[1, 0]).any()


@pytest.mark.parametrize("kind", LAYERS)
def test_any_chunking_of_the_cache_gives_the_full_pass(kind):
    layer, x = build(kind), normal("x", 3, 12, 16)
    rows, run = (
        jnp.broadcast_to(jnp.arange(12)[None], (3, 12)),
        nnx.jit(lambda layer, x, **where: layer(x, **where)),
    )
    full, _ = run(layer, x, positions=rows)
    for cuts in ([6], [1, 7, 8]):
        cache, parts = layer.init_cache(3, 16), []
        for a, b in zip([0, *cuts], [*cuts, 12]):
            part, cache = run(layer, x[:, a:b], positions=rows[:, a:b], cache=cache)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=2e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_stacked_cache_is_the_single_one(kind):
    layer, x, at = build(kind), normal("x", 2, 3, 16), jnp.array([[0, 1, 2], [3, 4, 9]])
    single = layer.init_cache(2, 6)
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 4), single)._replace(layer=jnp.int32(2))
    y, single = layer(x, positions=at, cache=single)
    z, stacked = jax.jit(lambda c: layer(x, positions=at, cache=c))(stacked)
    np.testing.assert_allclose(
        z[:, :2], y[:, :2], atol=1e-5
    )  # position 9 is past the end: never written
    for one, other in zip(single[:-1], stacked[:-1]):
        np.testing.assert_allclose(other[2], one, atol=1e-6)
        assert (
            not np.delete(np.asarray(other), 2, axis=0).any() and not np.asarray(one[1, 5:]).any()
        )


@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_and_gradients_with_padding(kind):
    graph, weights = nnx.split(build(kind))
    segments = jnp.array([[1, 1, 2, 2, 0, 0], [0] * 6])
    x = normal("x", 2, 6, 16, dtype=jnp.bfloat16)
    loss = lambda w, x: (
        nnx.merge(graph, w)(
            x, positions=jnp.arange(6)[None], segments=segments, depth=jnp.int32(2)
        )[0]
        .astype(jnp.float32)
        .var()
    )
    grads = jax.jit(jax.grad(loss, (0, 1)))(weights, x)
    assert (
        grads[1].dtype == jnp.bfloat16 and not np.asarray(grads[1][1], np.float32).any()
    )  # a row of padding only
    for g in jax.tree.leaves(grads[0]):
        assert g.dtype == jnp.float32 and np.isfinite(g).all()
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads[0])), "every parameter learns"


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_stack_and_scan_with_their_depth(kind):
    cls, cfg = LAYERS[kind]
    make = lambda rngs: cls(
        16, 4, 2, 4, rope=RopeConfig(), std=0.3, out_std=0.1, rngs=rngs, cfg=cfg
    )
    graph, weights = nnx.split(nnx.vmap(make)(nnx.Rngs(0).split(3)))
    where = dict(positions=jnp.arange(5)[None])
    step = lambda h, own: (h + nnx.merge(graph, own[0])(h, depth=own[1], **where)[0], None)
    scanned, _ = jax.jit(lambda h: jax.lax.scan(step, h, (weights, jnp.arange(3))))(
        x := normal("x", 1, 5, 16)
    )
    one = jax.jit(lambda h, i: step(h, (jax.tree.map(lambda a: a[i], weights), i))[0])
    for i in range(3):
        x = one(x, i)
    np.testing.assert_allclose(scanned, x, atol=2e-5)


def test_only_v1_knows_depth_and_only_its_vectors_are_shared():
    x, where = normal("x", 1, 5, 16), dict(positions=jnp.arange(5)[None])
    run = nnx.jit(lambda layer, depth: layer(x, depth=depth, **where)[0])
    for kind in LAYERS:
        assert np.array_equal(run(build(kind), 0), run(build(kind), 7)) == (
            LAYERS[kind][0] is not DIFF1
        )
    assert [getattr(build("diff1"), n).shape for n in LAMBDAS] == [(4,)] * 4
    draws = lambda kind: np.concatenate(
        [getattr(build(kind, head_dim=512), n)[...] for n in LAMBDAS]
    )
    assert (
        abs(draws("diff1").std() - 0.1) < 5e-3
        and abs(draws("diff1-stabilised").std() - 0.01) < 5e-4
    )


@pytest.mark.parametrize("t", [3])
def test_latent_forms_agree_in_double_precision(t):
    with jax.enable_x64(True):
        q, latent = (
            normal("q", 2, t, 3, 7, dtype=jnp.float64),
            normal("c", 2, 9, 11, dtype=jnp.float64),
        )
        ups = normal("uk", 9, 3, 5, dtype=jnp.float64), normal("uv", 9, 3, 4, dtype=jnp.float64)
        mask = causal_mask(jnp.broadcast_to(jnp.arange(9 - t, 9)[None], (2, t)), 9)
        np.testing.assert_allclose(
            absorbed(q, latent, *ups, mask, 0.3),
            explicit(q, latent, *ups, mask, 0.3),
            rtol=1e-10,
            atol=1e-12,
        )


@pytest.mark.parametrize("t, absorbs", [(1, True), (170, True), (171, False), (299, False)])
def test_few_new_tokens_are_absorbed_and_many_expanded(monkeypatch, t, absorbs):
    layer = MLA(
        512,
        2,
        2,
        128,
        rope=RopeConfig(),
        std=0.1,
        out_std=0.1,
        rngs=nnx.Rngs(0),
        cfg=MLAConfig(kv_rank=512, rope_dim=64),
    )
    used = []
    for name in ("absorbed", "explicit"):
        form = getattr(mla, name)
        monkeypatch.setattr(
            mla, name, lambda *args, name=name, form=form: used.append(name) or form(*args)
        )
    jax.eval_shape(
        lambda x: layer(x, positions=jnp.arange(t)[None], cache=layer.init_cache(1, 512))[0],
        jnp.zeros((1, t, 512)),
    )
    assert used == ["absorbed" if absorbs else "explicit"]


@pytest.mark.parametrize(
    "cfg",
    [
        DiffConfig(),
        STABILISED,
        DiffConfig(kernel="xla"),
        MLAConfig(),
        MLAConfig(512, 1536, 64, 128),
    ],
)
def test_config_round_trip(cfg):
    assert from_json(type(cfg), to_json(cfg)) == cfg


def test_start_of_the_gain():
    "A quarter by default, also of a file that does not name it; the paper's on request"
    quarter = build("diff1")
    assert (quarter.norm.gain[...] == 0.25).all()
    kind = LAYERS["diff1"][0]
    sizes = dict(width=16, heads=4, kv_heads=2, head_dim=4, rope=RopeConfig(), std=1.0, out_std=1.0)
    one = kind(**sizes, rngs=nnx.Rngs(0), cfg=DiffConfig(gain_init=1.0))
    assert (one.norm.gain[...] == 1).all()
    assert from_json(DiffConfig, {"stabilised": False}).gain_init == 0.25
