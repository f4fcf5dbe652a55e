"Eight bits: every value of the formats, every midpoint between two and its neighbours on both sides; products, gradients, a step of training, int8 weights."

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from nash_lab.core.configs import from_json, to_json
from nash_lab.maths.precision import KINDS, QuantConfig, contract8, quantize, quantized_dot
from nash_lab.model.block import ModelConfig
from nash_lab.model.layers import Linear, QuantizedLinear, eight_bit_layers
from nash_lab.model.moe import MoEConfig
from nash_lab.model.transformer import LM, int8_weights, model_shapes
from nash_lab.train.preflight import product_flops
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.step import fresh_state, make_train_step

qwix = pytest.importorskip("qwix", reason="needs the quant extra")
BITS = {"float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8, "float16": np.uint16, "bfloat16": np.uint16}


def every(kind):
    "All finite values of a format, sorted, zero once, in float32"
    if kind == "int8":
        return np.arange(-127, 128, dtype=np.float32)
    bits = np.arange(2 ** (8 * np.dtype(BITS[kind]).itemsize), dtype=BITS[kind])
    values = bits.view(getattr(ml_dtypes, kind, kind)).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


def at_scale_one(values, kind):
    "What `quantize` stores of a row whose largest number makes its scale 1"
    top = 127.0 if kind == "int8" else float(jnp.finfo(kind).max)
    row = jnp.concatenate([jnp.asarray(values, jnp.float32), jnp.array([top])])[None]
    stored = quantize(row, kind, (1,))
    assert stored.scale.tolist() == [[1.0]] and stored.qvalue.dtype == kind
    return np.asarray(stored.qvalue.astype(jnp.float32))[0, :-1]


@pytest.mark.parametrize("kind, count", [("int8", 255), ("float8_e4m3fn", 253), ("float8_e5m2", 247)])
def test_every_value_and_midpoint(kind, count):
    "Each value is a fixed point; a midpoint goes to the even neighbour, the numbers beside it to the nearer one"
    values = every(kind)
    assert len(values) == count  # of 256 without NaN, infinities and the second zero
    assert (at_scale_one(values, kind) == values).all()

    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    assert (middle.astype(np.float64) * 2 == low.astype(np.float64) + high).all()  # exact
    assert (at_scale_one(np.nextafter(middle, -np.float32(np.inf)), kind) == low).all()
    assert (at_scale_one(np.nextafter(middle, np.float32(np.inf)), kind) == high).all()
    if kind == "int8":
        odd = low.astype(int) % 2 != 0
    else:
        odd = low.astype(getattr(ml_dtypes, kind)).view(np.uint8) % 2 != 0
    assert (at_scale_one(middle, kind) == np.where(odd, high, low)).all()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_the_top_saturates(kind):
    "The largest number of a row becomes the largest value, with either sign and any scale, and never NaN or infinity"
    top = every(kind)[-1]
    for size in np.float32([1e-12, 0.1, 1, 3, 7e4, 3e38]):
        stored = quantize(jnp.array([[size, -size, np.nextafter(size, np.float32(0))]]), kind, (1,))
        assert np.asarray(stored.qvalue.astype(jnp.float32)).tolist() == [[top, -top, top]]
        back = np.asarray(qwix.dequantize(stored))[0]
        assert np.abs(back[:2]).max() <= size * 1.000001 and np.abs(back[0] - size) <= size * 1e-6


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_sixteen_bits_round_trip(kind):
    "All 65,536 patterns survive float32; midpoints go to even and their neighbours to the nearer value"
    values = every(kind)
    assert len(values) == {"float16": 63487, "bfloat16": 65279}[kind]
    cast = jax.jit(lambda x: x.astype(kind).astype(jnp.float32))
    normal = np.abs(values) >= np.finfo(np.float32).tiny  # a CPU flushes what is below in float32
    values = values[normal | (values == 0)]
    assert (np.asarray(cast(values)) == values).all()
    low, high = values[:-1], values[1:]
    together = high - low < np.float32(np.inf)
    low, high = low[together], high[together]
    middle = ((low.astype(np.float64) + high) / 2).astype(np.float32)
    inside = (np.abs(low) > 0) & (np.abs(high) > 0)  # beside zero lie the numbers that are flushed
    low, high, middle = low[inside], high[inside], middle[inside]
    assert (np.asarray(cast(np.nextafter(middle, -np.float32(np.inf)))) == low).all()
    assert (np.asarray(cast(np.nextafter(middle, np.float32(np.inf)))) == high).all()
    even = low.astype(getattr(ml_dtypes, kind, kind)).view(np.uint16) % 2 == 0
    assert (np.asarray(cast(middle)) == np.where(even, low, high)).all()


@pytest.mark.parametrize("kind, top, over", [("float8_e4m3fn", 448, 464), ("float8_e5m2", 57344, 61440), ("float16", 65504, 65520)])
def test_past_the_largest(kind, top, over):
    "What is not finite stays so, every pattern of it; just below the last midpoint is the largest value, just above it is none"
    bits = np.arange(2 ** (8 * np.dtype(BITS[kind]).itemsize), dtype=BITS[kind])
    values = jnp.asarray(bits.view(getattr(ml_dtypes, kind, kind)))
    wide = np.asarray(jax.jit(lambda x: x.astype(jnp.float32))(values))
    cast = jax.jit(lambda x: x.astype(kind).astype(jnp.float32))
    back = np.asarray(cast(wide))
    broken = ~np.isfinite(wide)
    assert broken.sum() == {"float8_e4m3fn": 2, "float8_e5m2": 8, "float16": 2048}[kind]
    assert (np.isnan(back) == np.isnan(wide)).all() and (back[np.isinf(wide)] == wide[np.isinf(wide)]).all()
    over = np.float32(over)
    edge = np.float32([np.nextafter(over, np.float32(0)), np.nextafter(over, np.float32(np.inf))])
    for sign in (1, -1):
        below, above = np.asarray(cast(sign * edge))
        assert below == sign * top and not np.isfinite(above)


def test_float16_needs_what_bfloat16_does_not():
    "A gradient of 1e-8 is zero in float16 unless the loss is scaled, and 70,000 is infinite; bfloat16 holds both"
    values = np.float32([1e-8, 1e-8 * 2**15, 7e4])
    half, brain = (np.asarray(jnp.asarray(values).astype(k).astype(jnp.float32)) for k in ("float16", "bfloat16"))
    assert half[0] == 0 and half[1] > 0 and half[2] == np.inf
    assert np.allclose(brain, values, rtol=2**-8)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_rows_of_nothing_and_rows_that_are_broken(kind):
    "A row of zeros stays zero; an infinity or a NaN spoils its own row of the product and no other"
    x = np.ones((4, 8), np.float32)
    x[0] = 0
    x[1, 3] = np.inf
    x[2, 5] = np.nan
    w = quantize(jnp.ones((8, 3)), kind, (0,))
    y = np.asarray(quantized_dot(quantize(jnp.asarray(x), kind, (1,)), w, ((1,), (0,))))
    assert (y[0] == 0).all() and not np.isfinite(y[1:3]).any()
    assert np.allclose(y[3], 8, rtol=0.01)


def test_sums_of_int8_are_exact():
    "1,040 of the largest products are summed to the last integer in float32, as int32 sums them; one more is not promised"
    key = jax.random.key(0)
    a = jax.random.randint(key, (16, 1040), -127, 128, jnp.int8).at[0].set(127)
    b = jax.random.randint(jax.random.fold_in(key, 1), (1040, 16), -127, 128, jnp.int8).at[:, 0].set(-127)
    ones = [jnp.ones(shape, jnp.float32) for shape in ((16, 1), (1, 16))]
    got = quantized_dot(qwix.QArray(a, ones[0]), qwix.QArray(b, ones[1]), ((1,), (0,)))
    want = np.asarray(a, np.int64) @ np.asarray(b, np.int64)
    assert (np.asarray(got, np.int64) == want).all() and np.abs(want).max() == 1040 * 127**2
    assert 1040 * 127**2 < 2**24 < 1041 * 127**2


def fixed(x, kind, summed):
    return np.float64(qwix.dequantize(quantize(x, kind, summed)))


@pytest.mark.parametrize("backward", ["none", "same"])
@pytest.mark.parametrize("forward", ["int8", "fp8"])
def test_gradients_against_float64(forward, backward):
    "Value and both gradients of a product over two axes, with operands that are rounded here"
    kind, gradient = KINDS[forward]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, dy = (jax.random.normal(k, s) for k, s in zip(keys, ((2, 5, 4, 6), (4, 6, 7), (2, 5, 7))))
    y, pull = jax.vjp(partial(contract8, axes=2, cfg=QuantConfig(forward, backward)), x, w)
    dx, dw = pull(dy)
    want = np.einsum("bthk,hkd->btd", fixed(x, kind, (2, 3)), fixed(w, kind, (0, 1)))
    assert np.allclose(y, want, atol=2e-5)
    operands = [np.float64(a) for a in (dy, w, x, dy)]
    if backward == "same":
        operands = [fixed(dy, gradient, (2,)), fixed(w, kind, (2,))]
        operands += [fixed(x, kind, (0, 1)), fixed(dy, gradient, (0, 1))]
    assert np.allclose(dx, np.einsum("btd,hkd->bthk", *operands[:2]), atol=2e-5)
    assert np.allclose(dw, np.einsum("bthk,btd->hkd", *operands[2:]), atol=2e-5)


TOKENS = np.random.default_rng(0).integers(0, 256, (2, 17))


@pytest.mark.parametrize("forward, backward", [("int8", "same"), ("fp8", "same")])
def test_a_step_of_training(forward, backward):
    "A step in 8 bits under bfloat16 and remat: near the step in bfloat16 and not the same"
    losses = {}
    for quant in (QuantConfig(), QuantConfig(forward, backward)):
        cfg = ModelConfig.tiny(quant=quant, compute_dtype="bfloat16", remat="dots", layers=1, init_std=0.2)
        graph, params = nnx.split(LM(cfg.plain()), nnx.Param)
        tx = optimizer(OptimConfig(warmup_steps=0), 10)
        step = jax.jit(make_train_step(graph, tx, 1))
        batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "mask": np.ones((2, 16), bool)}
        state = fresh_state(nnx.to_pure_dict(params), tx)
        for _ in range(2):
            state, found = step(state, batch, jax.random.key(0))
        losses[quant.forward] = float(found["loss"])
    assert losses["none"] != losses[forward]
    assert abs(losses["none"] - losses[forward]) < 0.02 * losses["none"]


@pytest.mark.parametrize("backward", ["none", "same"])
def test_recomputation_keeps_the_products(backward):
    "What remat runs again are the same products with 8 bits as without: a linear layer multiplies once forward"

    def operations(quant):
        cfg = ModelConfig.tiny(quant=quant, remat="dots", layers=1).plain()
        lm = nnx.eval_shape(lambda: LM(cfg))
        graph, params = nnx.split(lm, nnx.Param)
        loss = jax.grad(lambda params: nnx.merge(graph, params).objective(TOKENS[:, :-1], TOKENS[:, 1:])[0])
        return product_flops(jax.make_jaxpr(loss)(params))

    assert operations(QuantConfig("int8", backward)) == operations(QuantConfig())


def test_off_is_off():
    "Without 8 bits a model is the same program, and no layer has settings"
    plain = ModelConfig.tiny()
    assert not any(layer.quant for layer in eight_bit_layers(LM(plain)).values())
    old = to_json(plain)
    del old["quant"]  # a config of an earlier version
    assert from_json(ModelConfig, old) == plain


@pytest.mark.parametrize("attention", ["gqa", "mla", "maha", "diff2"])
def test_which_layers(attention):
    "Attention and FFN multiply 8 bits; maps, ends and absorbed matrices do not, nor what `skip` names"
    lm = nnx.eval_shape(lambda: LM(ModelConfig.tiny(attention=attention, residual="wider", mtp="sequential")))
    chosen = eight_bit_layers(lm, ("blocks/ffn/down",))
    assert {"blocks/attention/q", "blocks/attention/o", "blocks/ffn/up", "mtp/block/ffn/down"} <= chosen.keys()
    for path in chosen:
        assert not any(word in path for word in ("hyper", "ends", "k_up", "v_up"))
    assert "blocks/ffn/down" not in chosen


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_for_serving(bias):
    "int8 weights and one scale for each output channel: the product with the rounded weight, in both compute types"
    stack = nnx.split_rngs(splits=2)(
        nnx.vmap(lambda rngs: Linear((4, 8), (6,), std=0.1, bias=bias, rngs=rngs))
    )(nnx.Rngs(0))
    if bias:
        stack.bias[...] = jnp.ones((2, 6))
    graph, weights = nnx.split(QuantizedLinear(stack))
    layer = nnx.merge(graph, jax.tree.map(lambda w: w[1], weights))
    assert layer.weight.dtype == jnp.int8 and layer.scale.shape == (1, 1, 6)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    kept = np.asarray(layer.weight[...], np.float64) * np.asarray(layer.scale[...], np.float64)
    want = np.einsum("bthk,hkd->btd", np.float64(x), kept) + bias
    assert np.allclose(layer(x), want, atol=1e-5)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.allclose(layer(x.astype(jnp.bfloat16)).astype(jnp.float32), want, atol=0.05)


def test_decoding_from_int8_weights():
    "A model with int8 weights says what the float32 model with the same rounded weights says, with and without a cache"
    lm = LM(ModelConfig.tiny(init_std=0.2).plain())
    served = int8_weights(lm)
    for path, layer in eight_bit_layers(lm).items():
        parent = served
        for name in path.split("/"):
            parent = getattr(parent, name)
        layer.weight[...] = parent.weight[...].astype(jnp.float32) * parent.scale[...]
    tokens = jnp.asarray(TOKENS[:, :8])
    want = nnx.jit(lambda m: m(tokens))(lm)
    assert np.allclose(nnx.jit(lambda m: m(tokens))(served), want, atol=2e-5)

    @nnx.jit
    def cached(model):
        cache = model.init_cache(2, 8)
        said = []
        for t in range(8):
            hidden, cache = model.step(tokens[:, t : t + 1], jnp.full((2, 1), t), cache)
            said.append(model.logits(hidden))
        return jnp.concatenate(said, 1)

    assert np.allclose(cached(served), want, atol=2e-5)
    old, new = (sum(a.nbytes for a in jax.tree.leaves(nnx.state(m.blocks.ffn))) for m in (lm, served))
    assert new < 0.29 * old


def test_shapes_of_a_served_model():
    "Preflight's way: int8 weights of a model that has no memory"
    _, shapes = model_shapes(ModelConfig.preset("mhc-120m"), partial(nnx.eval_shape, int8_weights))
    q = shapes["blocks"]["attention"]["q"]
    assert q["weight"].dtype == jnp.int8 and q["scale"].shape == (12, 1, 12, 64)


MOE = dict(ffn="moe", moe=MoEConfig(experts=2, top_k=1))
REFUSED = {
    "forward": (lambda: QuantConfig("int4"), ["QuantConfig.forward", "int4", "fp8"]),
    "backward": (lambda: QuantConfig("int8", "int8"), ["QuantConfig.backward", "int8", "same"]),
    "backward alone": (lambda: QuantConfig(backward="same"), ["QuantConfig.backward", "forward"]),
    "skip alone": (lambda: QuantConfig(skip=("*/q",)), ["QuantConfig.skip", "*/q"]),
    "skip of nothing": (
        lambda: LM(ModelConfig.tiny(layers=1, quant=QuantConfig("int8", skip=("block/*",)))),
        ["skip 'block/*'", "blocks/attention/q"],
    ),
    "experts": (lambda: ModelConfig.tiny(quant=QuantConfig("fp8"), **MOE), ["ModelConfig.quant", "experts"]),
    "served experts": (
        lambda: nnx.eval_shape(int8_weights, nnx.eval_shape(lambda: LM(ModelConfig.tiny(**MOE)))),
        ["int8", "moe"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, words = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        make()
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_without_qwix(monkeypatch):
    "One line names what to install, in settings and for int8 weights"
    monkeypatch.setattr("nash_lab.maths.precision.find_spec", lambda name: None)
    for make in (lambda: QuantConfig("int8"), lambda: int8_weights(None)):
        with pytest.raises(ValueError, match="qwix"):
            make()
    assert replace(ModelConfig.tiny(), width=16).quant == QuantConfig()
