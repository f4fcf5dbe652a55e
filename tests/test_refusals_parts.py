"What the parts of a model refuse (layers, attention and its variants, experts): the words that must be in the message."

import jax.numpy as jnp
import pytest
from flax import nnx

from nash_lab.model.attention import GQA
from nash_lab.model.diff import DIFF1, DIFF2, DiffConfig, diff_attention_v1, diff_attention_v2
from nash_lab.model.layers import FFNS, RMSNorm, RopeConfig, activate, rope_frequencies
from nash_lab.model.maha import MAHA, MAHAConfig
from nash_lab.model.mla import MLA, MLAConfig
from nash_lab.model.moe import MoE, MoEConfig


def build(cls, **change):
    shape = dict(width=16, heads=4, kv_heads=2, head_dim=4, rope=RopeConfig())
    return cls(**(shape | change), std=0.5, out_std=0.5, rngs=nnx.Rngs(0))


def heads(count, time=3):
    return jnp.ones((1, time, count, 4))


def both_documents_and_cache(cls):
    layer = build(cls)
    where = jnp.zeros((1, 3), jnp.int32)
    layer(jnp.ones((1, 3, 16)), positions=where, segments=where, cache=layer.init_cache(1, 4))


REFUSED = {
    # layers
    "base": (lambda: RopeConfig(theta=1.0), ["RopeConfig.theta=1.0", "more than 1"]),
    "factor alone": (lambda: RopeConfig(factor=4.0), ["RopeConfig.factor=4.0", "scaling"]),
    "scaling": (
        lambda: RopeConfig(scaling="ntk"),
        ["RopeConfig.scaling='ntk'", "none", "yarn", "llama3"],
    ),
    "ramp of yarn": (
        lambda: RopeConfig(beta_fast=1.0),
        ["RopeConfig.beta_fast=1.0", "more than 1.0"],
    ),
    "ramp of llama3": (
        lambda: RopeConfig(high_freq_factor=1.0),
        ["RopeConfig.high_freq_factor=1.0"],
    ),
    "trained length": (
        lambda: RopeConfig(original_len=6),
        ["RopeConfig.original_len=6", "at least 7"],
    ),
    "odd rotary head": (lambda: rope_frequencies(7, RopeConfig()), ["head_dim=7", "even"]),
    "odd part that turns": (
        lambda: rope_frequencies(8, RopeConfig(rotary_fraction=0.4)),
        ["rotary_fraction=0.4", "3"],
    ),
    "norm": (lambda: RMSNorm(8, mode="centered"), ["mode='centered'", "uncentred", "centred"]),
    "activation": (
        lambda: activate(jnp.zeros(()), "tanh"),
        ["activation='tanh'", "gelu", "signed_sqrt"],
    ),
    "activation of a layer": (
        lambda: FFNS["gelu"].func(8, 8, activation="tanh", std=0.1, out_std=0.1, rngs=nnx.Rngs(0)),
        ["activation='tanh'"],
    ),
    # attention
    "heads without groups": (lambda: build(GQA, kv_heads=3), ["heads=4", "kv_heads=3"]),
    "no key heads": (lambda: build(DIFF2, kv_heads=0), ["heads=4", "kv_heads=0"]),
    "an odd head": (lambda: build(GQA, head_dim=7), ["head_dim=7", "even"]),
    # differential attention
    "odd groups": (lambda: build(DIFF1, heads=6, kv_heads=3), ["heads=6", "kv_heads=3", "even"]),
    "odd heads": (lambda: build(DIFF1, heads=5, kv_heads=5), ["heads=5", "kv_heads=5", "even"]),
    "one key head": (lambda: build(DIFF1, kv_heads=1), ["heads=4", "kv_heads=1", "even"]),
    "pairs without groups": (lambda: build(DIFF1, heads=6, kv_heads=4), ["heads=6", "kv_heads=4"]),
    "v2 without groups": (lambda: build(DIFF2, kv_heads=3), ["heads=4", "kv_heads=3"]),
    "v2 with an odd head": (lambda: build(DIFF2, head_dim=5), ["head_dim=5", "even"]),
    "v2 stabilised": (
        lambda: build(DIFF2, cfg=DiffConfig(stabilised=True)),
        ["DiffConfig.stabilised=True", "V1"],
    ),
    "kernel": (
        lambda: DiffConfig(kernel="flash"),
        ["DiffConfig.kernel='flash'", "auto", "xla", "cudnn"],
    ),
    "gain of the heads": (lambda: DiffConfig(gain_init=0.0), ["DiffConfig.gain_init=0.0"]),
    "kernel of a map": (
        lambda: DiffConfig(kernel="cudnn", stabilised=True),
        ["DiffConfig.kernel='cudnn'", "stabilised"],
    ),
    "lambda": (
        lambda: diff_attention_v1(heads(4), heads(2), heads(4), heads(2), heads(2), jnp.ones(3)),
        ["(3,)", "(4,)"],
    ),
    "no partner": (
        lambda: diff_attention_v2(heads(6), heads(2), heads(2), 0.5),
        ["6 query heads", "2 groups"],
    ),
    "no mask": (
        lambda: diff_attention_v2(heads(4), heads(2, 7), heads(2, 7), 0.5),
        ["3 queries", "7 keys", "mask"],
    ),
    # latent attention
    "odd rotary part": (lambda: MLAConfig(rope_dim=7), ["MLAConfig.rope_dim=7", "even"]),
    "no rank": (lambda: MLAConfig(kv_rank=0), ["MLAConfig.kv_rank=0", "at least 1"]),
    "no compression": (
        lambda: build(MLA, width=4, cfg=MLAConfig(kv_rank=8, rope_dim=4)),
        ["MLAConfig.kv_rank=8", "width=4"],
    ),
    "no compression of queries": (
        lambda: build(MLA, width=128, cfg=MLAConfig(q_rank=65)),
        ["MLAConfig.q_rank=65"],
    ),
    "no pair turns": (
        lambda: build(MLA, rope=RopeConfig(rotary_fraction=0.1)),
        ["must be even and positive"],
    ),
    # attention at several scales
    "no scale": (lambda: MAHAConfig(scales=0), ["MAHAConfig.scales=0", "at least 1"]),
    "no stride": (lambda: MAHAConfig(stride=1), ["MAHAConfig.stride=1", "at least 2"]),
    "downsampler": (
        lambda: MAHAConfig(downsample="max"),
        ["MAHAConfig.downsample='max'", "pool", "conv"],
    ),
    "taps that leave gaps": (
        lambda: MAHAConfig(downsample="conv", stride=4),
        ["MAHAConfig.kernel=3", "stride=4"],
    ),
    "aggregate": (
        lambda: MAHAConfig(aggregate="mean"),
        ["MAHAConfig.aggregate='mean'", "convex", "simplex", "nash"],
    ),
    "temperature": (
        lambda: MAHAConfig(temperature=0.0),
        ["MAHAConfig.temperature=0.0", "more than 0"],
    ),
    "blocks beyond the row": (
        lambda: MAHAConfig(scales=8).check_scales(
            width=16, heads=4, kv_heads=2, head_dim=4, max_len=64
        ),
        ["MAHAConfig.scales=8", "max_len=64", "128"],
    ),
    "scales without groups": (lambda: build(MAHA, kv_heads=3), ["heads=4", "kv_heads=3"]),
    "channels": (
        lambda: build(MAHA, cfg=MAHAConfig(downsample="conv")),
        ["MAHAConfig.downsample='conv'", "kv_heads=2", "head_dim=4", "width=16"],
    ),
    # experts
    "choices": (lambda: MoEConfig(top_k=9), ["MoEConfig.top_k=9", "8"]),
    "no expert": (lambda: MoEConfig(experts=0), ["MoEConfig.experts=0", "at least 1"]),
    "balance": (
        lambda: MoEConfig(balance="loss"),
        ["MoEConfig.balance='loss'", "bias", "switch", "none"],
    ),
    "score": (lambda: MoEConfig(score="relu"), ["MoEConfig.score='relu'", "sigmoid", "softmax"]),
    "gates": (lambda: MoEConfig(scale=0.0), ["MoEConfig.scale=0.0", "more than 0"]),
    "nothing to share": (
        lambda: MoE(16, 2, std=0.1, out_std=0.1, rngs=nnx.Rngs(0)),
        ["MoEConfig.top_k=2", "shared=1", "ffn_width=2"],
    ),
    # all of them
    "documents and a cache": (lambda: both_documents_and_cache(GQA), ["segments and cache"]),
    "documents and a pair cache": (lambda: both_documents_and_cache(DIFF1), ["segments and cache"]),
    "documents and a cache of scales": (
        lambda: both_documents_and_cache(MAHA),
        ["segments and cache"],
    ),
    "documents and a latent cache": (lambda: both_documents_and_cache(MLA), ["segments and cache"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_refuse(name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
        error.value
    )
