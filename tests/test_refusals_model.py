"What the configurations and functions of maths and model refuse: the message names the field or argument and its value."

import jax
import jax.numpy as jnp
import pytest

from nash_lab.core.configs import from_json
from nash_lab.model.block import MAHAConfig, MLAConfig, ModelConfig, MoEConfig
from nash_lab.maths.nash import nash_weights
from nash_lab.model.generate import SampleConfig, rollout
from nash_lab.model.mhc import MHCConfig, routing
from nash_lab.model.transformer import LM, gates

TOKENS = jnp.zeros((1, 2), jnp.int32)
X, PHI = jnp.zeros((2, 5, 4, 32)), jnp.zeros((128, 24))
REFUSED = {
    "no stream": (lambda: MHCConfig(streams=0), ["MHCConfig.streams", "0"]),
    "too many permutations": (
        lambda: MHCConfig(h_res="lite", streams=6),
        ["MHCConfig.streams", "6"],
    ),
    "a gate on the identity": (
        lambda: MHCConfig(h_res="identity", gates=True),
        ["MHCConfig.gates", "True"],
    ),
    "unknown h_res": (lambda: MHCConfig(h_res="softmax"), ["MHCConfig.h_res", "'softmax'"]),
    "unknown convention": (
        lambda: MHCConfig(convention="deepseak"),
        ["MHCConfig.convention", "'deepseak'"],
    ),
    "one iteration of DeepSeek's": (
        lambda: MHCConfig.deepseek_v4(iterations=1),
        ["MHCConfig.iterations", "1"],
    ),
    "negative clamp": (lambda: MHCConfig(clamp=-1.0), ["MHCConfig.clamp", "-1.0"]),
    "phi of another size": (
        lambda: routing(X, PHI[:10], jnp.ones(3), jnp.zeros(24), MHCConfig()),
        ["(10, 24)", "(128, 24)"],
    ),
    "heads that share no key": (
        lambda: ModelConfig.tiny(heads=3),
        ["ModelConfig.heads", "3", "kv_heads=2"],
    ),
    "odd heads": (lambda: ModelConfig.tiny(head_dim=7), ["ModelConfig.head_dim", "7"]),
    "biases outside gqa": (
        lambda: ModelConfig.tiny(attention="mla", qkv_bias=True),
        ["ModelConfig.qkv_bias", "mla"],
    ),
    "odd heads of diff1": (
        lambda: ModelConfig.tiny(heads=3, kv_heads=1, attention="diff1"),
        ["heads", "3", "even"],
    ),
    "a negative window": (lambda: ModelConfig.tiny(window=-1), ["ModelConfig.window=-1", "at least 0"]),
    "a window over blocks": (
        lambda: ModelConfig.tiny(attention="maha", window=8),
        ["ModelConfig.window=8", "maha"],
    ),
    "a whole layer beyond the last": (
        lambda: ModelConfig.tiny(window=8, full_layers=(0, 2)),
        ["ModelConfig.full_layers=(0, 2)", "0 to 1"],
    ),
    "a whole layer twice": (
        lambda: ModelConfig.tiny(window=8, full_layers=(1, 1)),
        ["ModelConfig.full_layers=(1, 1)"],
    ),
    "whole layers without a window": (
        lambda: ModelConfig.tiny(full_layers=(1,)),
        ["ModelConfig.full_layers=(1,)", "none without a window"],
    ),
    "checkpoints that do not divide the layers": (
        lambda: ModelConfig.tiny(layers=4, remat_every=3),
        ["ModelConfig.remat_every=3", "a divisor of layers=4"],
    ),
    "blocks beyond max_len": (
        lambda: ModelConfig.tiny(attention="maha", maha=MAHAConfig(scales=8)),
        ["128", "64"],
    ),
    "a rank that compresses nothing": (
        lambda: ModelConfig.tiny(attention="mla", mla=MLAConfig(kv_rank=64)),
        ["kv_rank", "64"],
    ),
    "more experts chosen than there are": (
        lambda: ModelConfig.tiny(ffn="moe", moe=MoEConfig(experts=2, top_k=3)),
        ["top_k", "3", "2"],
    ),
    "experts without width": (lambda: ModelConfig.tiny(ffn="moe", ffn_width=2), ["ffn_width=2"]),
    "depths beyond max_len": (
        lambda: ModelConfig.tiny(mtp="sequential", mtp_depth=63),
        ["ModelConfig.mtp_depth", "63", "64"],
    ),
    "no depth": (
        lambda: ModelConfig.tiny(mtp="parallel", mtp_depth=0),
        ["ModelConfig.mtp_depth", "0"],
    ),
    "unknown mtp": (lambda: ModelConfig.tiny(mtp="both"), ["ModelConfig.mtp", "both"]),
    "negative mtp weight": (
        lambda: ModelConfig.tiny(mtp_weight=-0.1),
        ["ModelConfig.mtp_weight", "-0.1"],
    ),
    "all dropped": (lambda: ModelConfig.tiny(dropout=1.0), ["ModelConfig.dropout", "1.0"]),
    "unknown ffn": (lambda: ModelConfig.tiny(ffn="swish"), ["ModelConfig.ffn", "swish"]),
    "unknown preset": (lambda: ModelConfig.preset("mhc-7b"), ["preset", "mhc-7b", "tiny"]),
    "unknown key": (lambda: from_json(ModelConfig, {"widht": 3}), ["ModelConfig", "widht"]),
    "retired casts": (
        lambda: from_json(ModelConfig, {"casts": [{"pattern": "*"}]}),
        ["ModelConfig", "casts"],
    ),
    "an unknown type of the cache": (
        lambda: ModelConfig.tiny(cache_dtype="int4"),
        ["ModelConfig.cache_dtype", "int4", "int8"],
    ),
    "an int8 cache of maha": (
        lambda: ModelConfig.tiny(attention="maha", cache_dtype="int8"),
        ["cache_dtype", "int8", "maha"],
    ),
    "nothing left to draw": (
        lambda: SampleConfig(forbidden=tuple(range(256))).sampling(256),
        ["SampleConfig.forbidden", "256"],
    ),
    "forbidden outside the vocabulary": (
        lambda: SampleConfig(forbidden=(300,)).sampling(256),
        ["SampleConfig.forbidden", "300"],
    ),
    "negative temperature": (
        lambda: SampleConfig(temperature=-1.0),
        ["SampleConfig.temperature", "-1.0"],
    ),
    "no nucleus": (lambda: SampleConfig(top_p=0.0), ["SampleConfig.top_p", "0.0"]),
    "negative top_k": (lambda: SampleConfig(top_k=-1), ["SampleConfig.top_k", "-1"]),
    "min_p above 1": (lambda: SampleConfig(min_p=2.0), ["SampleConfig.min_p", "2.0"]),
    "no new token": (lambda: SampleConfig(max_new_tokens=0), ["SampleConfig.max_new_tokens", "0"]),
    "no copies": (
        lambda: rollout(LM(ModelConfig.tiny()), [[1]], SampleConfig(), jax.random.key(0), 0),
        ["copies=0"],
    ),
    "maps of a plain model": (
        lambda: LM(ModelConfig.tiny().plain()).routing(TOKENS),
        ["residual='plain'"],
    ),
    "gates of a model without": (lambda: gates(LM(ModelConfig.tiny())), ["mhc.gates"]),
    "a row without a further token": (
        lambda: LM(ModelConfig.tiny(mtp="parallel", mtp_depth=2)).objective(TOKENS, TOKENS),
        ["mtp_depth=2", "2 tokens"],
    ),
    "steps of a game": (lambda: nash_weights(X, -1), ["steps=-1"]),
    "temperature of a game": (lambda: nash_weights(X, 3, 0.0), ["temperature=0.0"]),
    "other streams": (
        lambda: routing(X[:, :, :3], PHI, jnp.ones(3), jnp.zeros(24), MHCConfig()),
        ["3 streams", "4"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_field_and_value(case):
    call, words = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said
