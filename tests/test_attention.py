"Layers and attention from outside: against the naive form over shapes and dtypes, random caches, configs, named keys."

import json
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.model.attention import (
    GQA,
    KVCache,
    attention,
    attention_mask,
    causal_mask,
    read_cache,
    write_cache,
)
from nash_lab.model.layers import FFNS
from nash_lab.model.layers import (
    Linear,
    RMSNorm,
    RopeConfig,
    dropout,
    rms_norm,
    rope,
    rope_frequencies,
)
from nash_lab.core.configs import from_json, to_json
from nash_lab.core.keys import named_key


def normal(name, *shape, dtype=jnp.float32):
    return jax.random.normal(named_key(jax.random.key(7), name), shape, dtype)


def naive(q, k, v, mask):
    "float64 loops over queries; zeros where nothing is visible"
    q, k, v, mask = (
        np.asarray(a, bool if a.dtype == bool else np.float64) for a in (q, k, v, mask)
    )
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        sees = mask[b % len(mask), 0, t]
        if not sees.any():
            continue
        score = k[b, sees, h // group] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        out[b, t, h] = weight / weight.sum() @ v[b, sees, h // group]
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_attention_is_the_naive_form(heads, kv_heads, dtype, tolerance):
    q, k, v = (
        normal("q", 2, 5, heads, 8, dtype=dtype),
        *(normal(n, 2, 9, kv_heads, 8, dtype=dtype) for n in "kv"),
    )
    mask = (
        jax.random.bernoulli(named_key(jax.random.key(0), "mask"), 0.5, (2, 1, 5, 9))
        .at[1, 0, 2]
        .set(False)
    )
    out = jax.jit(attention)(q, k, v, mask)
    assert out.dtype == dtype and out.shape == q.shape
    np.testing.assert_allclose(
        out.astype(jnp.float32),
        naive(*(a.astype(jnp.float32) for a in (q, k, v)), mask),
        atol=tolerance,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite_with_padding(dtype):
    layer = GQA(16, 4, 2, 4, rope=RopeConfig(), std=0.5, out_std=0.5, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(layer)
    segments = jnp.array([[1, 1, 2, 2, 0, 0], [0] * 6])
    x = normal("x", 2, 6, 16, dtype=dtype)
    loss = lambda w, x: (
        nnx.merge(graph, w)(x, positions=jnp.arange(6)[None], segments=segments)[0]
        .astype(jnp.float32)
        .var()
    )
    grads = jax.jit(jax.grad(loss, (0, 1)))(weights, x)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert grads[1].dtype == dtype and all(
        g.dtype == jnp.float32 for g in jax.tree.leaves(grads[0])
    )
    assert (grads[1][1] == 0).all()  # a row of padding only


def test_any_chunking_of_the_cache_gives_the_full_pass():
    layer, x = (
        GQA(16, 4, 2, 4, rope=RopeConfig(), std=0.5, out_std=0.5, rngs=nnx.Rngs(0)),
        normal("x", 3, 12, 16),
    )
    rows = jnp.broadcast_to(jnp.arange(12)[None], (3, 12))
    cached = jax.jit(lambda x, rows, cache: layer(x, positions=rows, cache=cache))
    full, _ = layer(x, positions=rows)
    for cuts in ([4, 8], [1, 2, 3, 11], [6]):
        cache, parts = layer.init_cache(3, 16), []
        for a, b in zip([0, *cuts], [*cuts, 12]):
            part, cache = cached(x[:, a:b], rows[:, a:b], cache)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=1e-5)


def test_rows_at_different_positions_and_rollback():
    layer, x = (
        GQA(16, 4, 2, 4, rope=RopeConfig(), std=0.5, out_std=0.5, rngs=nnx.Rngs(0)),
        normal("x", 3, 12, 16),
    )
    rows, lengths = jnp.broadcast_to(jnp.arange(12)[None], (3, 12)), jnp.array([9, 2, 5])
    run = jax.jit(lambda x, rows, cache=None: layer(x, positions=rows, cache=cache))
    _, cache = run(x[:, :11], rows[:, :11], layer.init_cache(3, 16))  # right padding beyond lengths
    y, _ = run(x[:, 11:], lengths[:, None], cache)
    for i, n in enumerate([9, 2, 5]):
        own = jnp.concatenate([x[i : i + 1, :n], x[i : i + 1, 11:]], 1)
        alone, _ = run(own, jnp.arange(n + 1)[None])
        np.testing.assert_allclose(y[i, 0], alone[0, n], atol=1e-5)


def test_stacked_cache_is_the_single_one_and_leaves_other_layers_alone():
    k, v, at = normal("k", 2, 3, 2, 4), normal("v", 2, 3, 2, 4), jnp.array([[0, 1, 2], [3, 4, 9]])
    empty = jnp.zeros((2, 6, 2, 4))
    single = write_cache(KVCache(empty, empty), (k, v), at)
    stacked = jax.jit(write_cache)(
        KVCache(*[jnp.zeros((4, 2, 6, 2, 4))] * 2, layer=jnp.int32(2)), (k, v), at
    )
    for one, other in zip(read_cache(single), read_cache(stacked)):
        np.testing.assert_array_equal(one, other)
    assert not np.delete(np.asarray(stacked.k), 2, axis=0).any()
    assert not np.asarray(single.k[1, 5:]).any()  # position 9 is past the end: dropped, not clipped


def test_masks():
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    mask = np.asarray(attention_mask(positions, segments))[:, 0]
    for b, t, s in np.ndindex(2, 6, 6):
        assert mask[b, t, s] == (
            segments[b, t] == segments[b, s] != 0 and positions[b, s] <= positions[b, t]
        )
    np.testing.assert_array_equal(causal_mask(positions, 8)[1, 0], np.tril(np.ones((6, 8), bool)))


def test_rope_in_bfloat16_has_fp32_angles():
    x, far = normal("x", 1, 1, 1, 64, dtype=jnp.bfloat16), jnp.array([[100_003]])
    exact = rope(x.astype(jnp.float32), far, rope_frequencies(64, RopeConfig()))
    assert (
        jnp.abs(rope(x, far, rope_frequencies(64, RopeConfig())).astype(jnp.float32) - exact).max()
        < 2e-2
    )


def test_double_precision_stays():
    with jax.enable_x64(True):
        x = jnp.linspace(1, 2, 8, dtype=jnp.float64)[None, None, None]
        assert (
            rms_norm(x, jnp.ones(8, jnp.float32)).dtype
            == rope(x, jnp.array([[3]]), rope_frequencies(8, RopeConfig())).dtype
            == jnp.float64
        )


@pytest.mark.parametrize("name", FFNS)
def test_ffns_stack_and_scan_in_both_dtypes(name):
    graph, weights = nnx.split(
        nnx.vmap(lambda r: FFNS[name](8, 16, std=0.3, out_std=0.3, rngs=r))(nnx.Rngs(0).split(3))
    )
    for dtype in (jnp.float32, jnp.bfloat16):
        y, _ = jax.lax.scan(
            lambda h, w: (h + nnx.merge(graph, w)(h), None),
            normal("x", 2, 3, 8, dtype=dtype),
            weights,
        )
        assert y.dtype == dtype and jnp.isfinite(y).all()


def test_layers_reuse_no_random_number():
    ffn = FFNS["swiglu"](8, 8, std=1.0, out_std=1.0, rngs=nnx.Rngs(0))
    a, b, c = (getattr(ffn, n).weight[...] for n in ("gate", "up", "down"))
    assert (a != b).all() and (b != c).all()
    assert (
        abs(float(Linear((64,), (64,), std=0.02, rngs=nnx.Rngs(1)).weight[...].std()) - 0.02) < 1e-3
    )
    assert RMSNorm(4)(jnp.zeros((1, 4))).tolist() == [[0.0] * 4]  # no NaN at zero


def test_named_keys_are_the_same_everywhere():
    assert jax.random.key_data(named_key(jax.random.key(0), "dropout")).tolist() == [
        116798348,
        4143519482,
    ]
    assert dropout(jnp.ones((4, 4), jnp.bfloat16), 0.5, jax.random.key(0)).dtype == jnp.bfloat16


@dataclass(frozen=True)
class Leaf:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1,)
    pair: tuple[int, str] = (1, "a")


@dataclass(frozen=True)
class Tree:
    name: str
    leaf: Leaf = field(default_factory=Leaf)
    maybe: Leaf | None = None
    kind: Literal["a", "b", 1] = "a"
    counts: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    "tree", [Tree("x"), Tree("y", Leaf(1.0, (), (2, "b")), Leaf(), 1, {"k": 3})]
)
def test_config_round_trip(tree):
    assert from_json(Tree, json.loads(json.dumps(to_json(tree)))) == tree


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "Tree: missing key 'name'"),
        ({"name": 3}, "Tree.name: expected str, found 3"),
        ({"name": "x", "leaf": {"rate": True}}, "Leaf.rate: expected float, found True"),
        ({"name": "x", "leaf": None}, "Leaf: expected an object, found None"),
        ({"name": "x", "maybe": {"ratte": 1}}, "Leaf: unknown key 'ratte'"),
        ({"name": "x", "leaf": {"pair": [1]}}, "Leaf.pair: expected"),
        ({"name": "x", "leaf": {"sizes": 3}}, "Leaf.sizes: expected tuple, found 3"),
        ({"name": "x", "kind": True}, "Tree.kind: expected 'a' | 'b' | 1, found True"),
        ({"name": "x", "counts": {"k": 1.5}}, "Tree.counts['k']: expected int, found 1.5"),
    ],
)
def test_config_mistakes_are_one_line(data, message):
    with pytest.raises(ValueError) as error:
        from_json(Tree, data)
    assert message in str(error.value) and "\n" not in str(error.value)
