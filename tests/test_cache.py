"Keys and values as int8: every value of the grid, what reading may be off, decoding by every path, and bytes."

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.core.configs import from_json, to_json
from nash_lab.discover.ttt import TOLERANCE
from nash_lab.maths.precision import Int8Rows, empty_rows, keep_rows, float_rows
from nash_lab.model.attention import KVCache, write_cache
from nash_lab.model.block import ModelConfig
from nash_lab.model.generate import FEW, SampleConfig, best_of_n, rollout, sequence_logprobs
from nash_lab.model.speculative import speculate
from nash_lab.model.transformer import LM

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 24)))
keep = jax.jit(lambda x: keep_rows(x, empty_rows(x.shape, jnp.int8)))
read = jax.jit(float_rows)


def test_every_value_midpoint_and_neighbour():
    "At scale one each integer stays, a midpoint goes to the even side, the numbers beside it to the nearer one"
    grid = np.arange(-127, 128, dtype=np.float32)
    middle = grid[:-1] + np.float32(0.5)
    below, above = (np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf))
    rows = np.zeros((4, 256), np.float32)
    rows[:, 255] = 127
    rows[0, :255] = grid
    for row, numbers in zip(rows[1:], (middle, below, above)):
        row[:254] = numbers
    for power in (1.0, 2.0**-120, 2.0**110):
        kept = keep(jnp.asarray(rows * np.float32(power)))
        assert (np.asarray(kept.scale) == np.float32(power)).all()
        values = np.asarray(kept.values)
        assert (values[0, :255] == grid).all()
        assert (values[1, :254] == np.where(grid[:-1] % 2 == 0, grid[:-1], grid[1:])).all()
        assert (values[2, :254] == grid[:-1]).all() and (values[3, :254] == grid[1:]).all()
        assert (np.asarray(read(kept))[0, :255] == grid * np.float32(power)).all()


def test_half_a_scale():
    "No finite number is read more than half a scale away, from 1e-35 to 3.3e38, in both compute types; a sign is only a sign"
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 64)) * np.exp(2 * rng.standard_normal((400, 64)))
    x = x / np.abs(x).max(1, keepdims=True) * np.geomspace(1e-35, 3.3e38, 400)[:, None]
    for dtype in (jnp.float32, jnp.bfloat16):
        given = jnp.asarray(x, jnp.float32).astype(dtype)
        kept = keep(given)
        exact, got, scale = (np.float64(a) for a in (given, read(kept), kept.scale))
        assert np.isfinite(got).all() and (np.abs(kept.values).max(1) == 127).all()
        # 2**-15: one division and one product in float32
        assert (np.abs(got - exact) <= scale[:, None] * (0.5 + 2**-15)).all()
        assert (np.asarray(read(keep(-given))) == -got).all()


def test_rows_of_nothing_and_rows_that_are_broken():
    "Zeros and what is below 1e-36 are read as zero; infinity and NaN spoil their own row and no other"
    x = np.ones((5, 8), np.float32)
    x[0] = 0
    x[1] = 1e-37
    x[2, 3] = np.inf
    x[3, 5] = np.nan
    kept = keep(jnp.asarray(x))
    got = np.asarray(read(kept))
    assert (got[:2] == 0).all() and not np.isfinite(got[2:4]).any() and (got[4] == 1).all()
    assert (np.asarray(kept.scale)[:2] == 1).all()


def test_only_the_written_slots_change():
    "Values and scales go to one slot; the others keep theirs, and what is past the end is dropped"
    shape = (3, 2, 4, 2, 8)  # three layers, two rows of four slots, two heads
    empty = empty_rows(shape, jnp.int8)
    cache = KVCache(empty, empty, jnp.int32(1))
    new = jax.random.normal(jax.random.key(0), (2, 2, 2, 8))
    at = jnp.array([[1, 2], [3, 4]])
    cache = write_cache(cache, (new, 2 * new), at)
    own = keep(new)
    for held, factor in ((cache.k, 1), (cache.v, 2)):
        assert isinstance(held, Int8Rows) and held.scale.shape == shape[:-1]
        assert (held.values[1, 0, 1:3] == own.values[0]).all()
        assert (held.scale[1, 1, 3] == factor * own.scale[1, 0]).all()
        assert int((held.scale != 0).sum()) == 3 * 2  # slots, heads


def through(lm):
    "Logits of TOKENS by one step through a cache, and the bytes of that cache"

    @nnx.jit
    def run(lm):
        b, t = TOKENS.shape
        positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
        hidden, cache = lm.step(TOKENS, positions, lm.init_cache(b, t))
        return lm.logits(hidden), cache

    logits, cache = run(lm)
    return np.asarray(logits), cache


def with_int8(lm):
    lm = nnx.clone(lm)
    lm.cfg = replace(lm.cfg, cache_dtype="int8")
    return lm


@pytest.mark.parametrize(
    "attention, row, dtype",
    [("gqa", 32, "bfloat16"), ("diff1", 32, "float32"), ("diff2", 32, "float32"), ("mla", 24, "float32")],
)
def test_near_the_float_cache(attention, row, dtype):
    "Logits within a fifth of their spread, nearly all greedy tokens the same; bytes as arithmetic says"
    cfg = ModelConfig.tiny(
        attention=attention, layers=1, init_std=0.2, compute_dtype=dtype, head_dim=32 if attention != "mla" else 8
    )
    lm = LM(cfg.plain())
    (want, full), (got, small) = (through(model) for model in (lm, with_int8(lm)))
    apart = np.abs(want - got).max()
    assert 0 < apart < 0.2 * want.std(), (apart, want.std())
    assert (want.argmax(-1) == got.argmax(-1)).mean() > 0.95
    numbers = sum(a.size for a in jax.tree.leaves(full))
    scales = [a for a in jax.tree.leaves(small) if a.dtype == jnp.float32]
    assert sum(a.nbytes for a in jax.tree.leaves(small)) == numbers + 4 * sum(a.size for a in scales)
    assert {a.dtype.name for a in jax.tree.leaves(small)} == {"int8", "float32"}


@pytest.mark.parametrize(
    "layers, window", [(2, dict(window=6, full_layers=(0,))), (FEW + 1, {})], ids=["few", "many"]
)
def test_sampling_reads_the_same_cache(layers, window):
    "What rows drawn together (few layers, one with a window) and a stack (many) say of their tokens is what one pass through the cache says"
    lm = with_int8(LM(ModelConfig.tiny(layers=layers, init_std=0.2, **window).plain()))
    prompt = TOKENS[0, :12].tolist()
    drawn = rollout(lm, [prompt], SampleConfig(12), jax.random.key(0), copies=4)
    rows = jnp.concatenate([jnp.tile(TOKENS[:1, :12], (4, 1)), jnp.asarray(drawn.tokens)], 1)

    @nnx.jit
    def score(lm):
        at = jnp.broadcast_to(jnp.arange(24)[None], rows.shape)
        hidden, _ = lm.step(rows, at, lm.init_cache(4, 24))
        logprobs = jax.nn.log_softmax(lm.logits(hidden))
        said = jnp.take_along_axis(logprobs[:, 11:-1], rows[:, 12:, None], -1)[..., 0]
        return said, sequence_logprobs(lm, rows)[:, 12:]

    said, exact = (np.asarray(a) for a in score(lm))
    assert np.abs(said - drawn.logprobs).max() < 1e-4
    gap = np.abs(exact - drawn.logprobs).max()
    assert 1e-3 < gap < TOLERANCE["int8"]  # rounding is there, and a search may learn from it


def test_drafts_and_best_of_n():
    "Drafts change no token of greedy decoding through an int8 cache, and best of n draws from it"
    lm = LM(ModelConfig.tiny(layers=1, init_std=0.2, mtp="sequential", mtp_depth=2).plain())
    lm = with_int8(lm)
    cfg = SampleConfig(12, temperature=0.0)
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist()]
    plain = rollout(lm, prompts, cfg)
    drafted, stats = speculate(lm, prompts, cfg)
    assert (drafted.tokens == plain.tokens).all() and stats.calls > 0
    assert np.allclose(drafted.logprobs, plain.logprobs, atol=1e-4)
    found = best_of_n(lm, prompts[0], 2, key=jax.random.key(0), cfg=cfg)
    assert [row for _, row in found] == [plain.tokens[0].tolist()] * 2


def test_every_type_of_a_cache_has_a_tolerance():
    "A search compares what it sampled with what it learns from, whatever the cache keeps; old settings open"
    kept = {
        ModelConfig.tiny(compute_dtype=dtype, cache_dtype=cache).kept_dtype.name
        for dtype in ("float32", "bfloat16")
        for cache in ("compute", "int8")
    }
    assert kept == set(TOLERANCE)
    old = to_json(ModelConfig.tiny())
    assert old.pop("cache_dtype") == "compute"
    assert from_json(ModelConfig, old) == ModelConfig.tiny()
