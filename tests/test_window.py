"A sliding window: what a query sees, in whole rows, long rows and caches; what it saves; what is refused."

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.model import attention, generate
from nash_lab.model.attention import LONG, Window, attention_mask, causal_mask
from nash_lab.model.block import ATTENTIONS, ModelConfig
from nash_lab.model.generate import SampleConfig, by_layer, rollout
from nash_lab.model.layers import RopeConfig
from nash_lab.model.speculative import speculate
from nash_lab.model.transformer import LM, flops_per_token

CFG = ModelConfig.tiny(
    residual="plain", layers=3, vocab_size=64, window=5, full_layers=(1,), init_std=0.3
)
RNG = np.random.default_rng(0)


def test_masks_by_hand():
    "as `transformers` has it: key > query - window, within a document"
    query, key = np.mgrid[:9, :9]
    band = (key <= query) & (key > query - 3)
    documents = np.array([[1, 1, 1, 1, 1, 2, 2, 0, 0]])
    same = (documents[0][:, None] == documents[0]) & (documents[0] != 0)
    rows = jnp.arange(9)[None]
    np.testing.assert_array_equal(attention_mask(rows, None, Window(3))[0, 0], band)
    np.testing.assert_array_equal(
        attention_mask(rows, jnp.array(documents), Window(3))[0, 0], band & same
    )
    at = jnp.array([[8, 2], [0, 5]])  # rows of different lengths
    seen = np.asarray(causal_mask(at, 9, Window(3)))[:, 0]
    for row, positions in zip(seen, at):
        np.testing.assert_array_equal(row, band[positions])
    off = causal_mask(at, 9, Window(3, jnp.array(True)))
    np.testing.assert_array_equal(off, causal_mask(at, 9))


@pytest.mark.parametrize("name", ["gqa", "diff1", "diff2", "mla"])
def test_any_chunking_of_the_cache_gives_the_full_pass(name):
    kind, _ = ATTENTIONS[name]
    layer = kind(32, 4, 2, 8, rope=RopeConfig(), std=0.5, out_std=0.5, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(layer)

    @jax.jit
    def run(x, positions, cache, off):
        call = partial(nnx.merge(graph, weights), x, positions=positions)
        return call(cache=cache, window=Window(4, off))

    x = jnp.asarray(RNG.normal(size=(2, 12, 32)), jnp.float32)
    rows = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    local, _ = run(x, rows, None, jnp.array(False))
    whole, _ = run(x, rows, None, jnp.array(True))
    np.testing.assert_allclose(local[:, :4], whole[:, :4], atol=1e-6)
    assert jnp.abs(local[:, 4:] - whole[:, 4:]).max() > 0.05
    np.testing.assert_allclose(whole, layer(x, positions=rows)[0], atol=1e-5)
    cache, parts = layer.init_cache(2, 13), []
    for a, b in ((0, 6), (6, 7), (7, 12)):
        part, cache = run(x[:, a:b], rows[:, a:b], cache, jnp.array(False))
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), local, atol=1e-5)
    # a rejected draft is written over; the row that is behind does not see what is far ahead
    again, _ = run(x[:, 7:8], jnp.array([[11], [7]]), cache, jnp.array(False))
    np.testing.assert_allclose(again[1, 0], local[1, 7], atol=1e-5)


@pytest.mark.parametrize("full_layers", [(), (1,)])
def test_outside_the_window_nothing_changes(full_layers):
    "gradients are exactly zero beyond l (w - 1) tokens, of the model and of its head"
    cfg = replace(
        CFG, layers=2, window=3, full_layers=full_layers, tie_embeddings=False, mtp="parallel"
    )
    graph, weights = nnx.split(LM(cfg))
    tokens = jnp.arange(12)[None]

    @jax.jit
    @jax.grad
    def slopes(weights):
        lm = nnx.merge(graph, weights)
        mask = jnp.zeros((1, 12)).at[:, -1].set(1.0)
        return lm.objective(tokens, tokens + 1, mask)[0]

    moved = np.abs(slopes(weights).embedding[...]).sum(1)[:12] > 0
    # the head asks one token earlier, and its block is a third layer: 10 - 3 (3 - 1)
    first = 0 if full_layers else 4
    np.testing.assert_array_equal(moved, np.arange(12) >= first)


def test_long_rows_of_whole_and_windowed_layers(monkeypatch):
    "the kernels under scan, `cond` and recomputation are the masks, in loss and gradients"
    cfg = replace(CFG, layers=2, max_len=LONG, window=100, remat="dots")
    lm = LM(cfg)
    ids = jnp.asarray(RNG.integers(1, 64, (1, LONG + 1)))
    documents = (jnp.arange(LONG)[None] // 300 + 1) % 2 + 1

    def objective(cfg):
        graph, weights = nnx.split(lm)
        other = nnx.split(nnx.eval_shape(lambda: LM(cfg)))[0]

        def loss(weights):
            model = nnx.merge(other, weights)
            return model.objective(ids[:, :-1], ids[:, 1:], segments=documents)[0] / LONG

        return jax.jit(jax.value_and_grad(loss))(weights)

    blocks = objective(cfg)
    monkeypatch.setattr(attention, "LONG", 10**6)
    masks = objective(replace(cfg, remat="none"))
    assert abs(objective(replace(cfg, remat="none", full_layers=()))[0] - masks[0]) > 1e-3
    np.testing.assert_allclose(blocks[0], masks[0], rtol=1e-5)
    for ours, expected in zip(jax.tree.leaves(blocks[1]), jax.tree.leaves(masks[1])):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_window_as_long_as_the_row_is_the_same_program():
    def program(window, t):
        graph, weights = nnx.split(nnx.eval_shape(lambda: LM(replace(plain, window=window))))
        tokens = jax.ShapeDtypeStruct((2, t), jnp.int32)
        return jax.jit(lambda w, ids: nnx.merge(graph, w)(ids)).lower(weights, tokens).as_text()

    plain = replace(CFG, full_layers=(), max_len=LONG)
    assert program(5, 5) == program(0, 5) != program(4, 5)
    assert program(10**9, LONG) == program(0, LONG)


def test_decoding_is_the_full_pass(monkeypatch):
    "ragged prompts, shared prompts, rings, the scanned cache and drafts: one model, one text"
    lm = LM(replace(CFG, mtp="sequential"))
    prompts = [RNG.integers(1, 64, n).tolist() for n in (3, 11, 7, 1)]
    how = SampleConfig(max_new_tokens=8, temperature=0)
    drawn = rollout(lm, prompts, how)
    full = jax.jit(lambda ids: jax.nn.log_softmax(lm(ids)))
    for prompt, new, logprobs in zip(prompts, drawn.tokens, drawn.logprobs):
        row = [*prompt, *new.tolist()]
        z = np.asarray(full(jnp.array([row + [0] * (19 - len(row))])))[0, len(prompt) - 1 :]
        np.testing.assert_array_equal(z[:8].argmax(-1), new)
        np.testing.assert_allclose(z[np.arange(8), new], logprobs, atol=1e-4)

    twice = rollout(lm, prompts, how, copies=2)
    np.testing.assert_array_equal(twice.tokens, np.repeat(drawn.tokens, 2, 0))
    np.testing.assert_array_equal(speculate(lm, prompts, how)[0].tokens, drawn.tokens)
    monkeypatch.setattr(generate, "FEW", 0)
    generate._decode.clear_cache()
    scanned = rollout(lm, prompts, how)
    generate._decode.clear_cache()
    np.testing.assert_array_equal(scanned.tokens, drawn.tokens)
    np.testing.assert_allclose(scanned.logprobs, drawn.logprobs, atol=1e-4)


def test_a_layer_with_a_window_keeps_so_many_tokens():
    lm = LM(CFG)
    at = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))
    _, cache = lm.step(jnp.ones((2, 8), jnp.int32), at, lm.init_cache(2, 8))
    lengths = jnp.array([8, 3])
    _, layers, rings = by_layer(lm, cache, lengths, 16)
    assert rings == {0, 2}
    assert [keys.shape[2] for keys, _ in layers] == [5, 8, 5]
    newest = np.asarray(cache.v[2]).swapaxes(1, 2)
    np.testing.assert_array_equal(layers[2][1][0], newest[0, :, 3:])
    np.testing.assert_array_equal(layers[2][1][1, :, 2:], newest[1, :, :3])
    assert by_layer(lm, cache, lengths, 5)[2] == set()  # nothing would be forgotten


def test_counted_products():
    "a layer with a window meets `window` keys a query, the others the whole row"
    plain = replace(CFG, window=0, full_layers=())
    keys = lambda cfg, t: flops_per_token(cfg, t) - flops_per_token(cfg, 1)
    one = keys(plain, 33) / 32 / 3  # a layer, a key
    assert keys(CFG, 33) == pytest.approx(one * (2 * 4 + 32))
    assert keys(replace(CFG, full_layers=()), 33) == pytest.approx(one * 3 * 4)
    assert keys(CFG, 4) == pytest.approx(keys(plain, 4))
