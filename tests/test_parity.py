"Layers against PyTorch and Hugging Face's transformers, which only the `parity` extra installs: skipped without them."

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from nash_lab.model.layers import ACTIVATIONS, activate
from nash_lab.model.layers import RMSNorm, RopeConfig, rope, rope_frequencies

pytestmark = pytest.mark.parity
NORMAL = np.random.default_rng(0).standard_normal


def theirs(head_dim, cfg):
    "(frequencies, attention scaling) of transformers for one of our configs"
    rope = dict(
        rope_type={"none": "linear"}.get(cfg.scaling, cfg.scaling),
        rope_theta=cfg.theta,
        factor=cfg.factor,
        partial_rotary_factor=cfg.rotary_fraction,
        original_max_position_embeddings=cfg.original_len,
    )
    if cfg.scaling == "yarn":
        rope |= dict(
            beta_fast=cfg.beta_fast,
            beta_slow=cfg.beta_slow,
            attention_factor=cfg.attention_factor or None,
        )
    if cfg.scaling == "llama3":
        rope |= dict(low_freq_factor=cfg.low_freq_factor, high_freq_factor=cfg.high_freq_factor)
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters=rope,
        max_position_embeddings=int(cfg.factor * cfg.original_len),
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return frequencies.numpy(), scale


ROPES = dict(
    plain=RopeConfig(),
    long_base=RopeConfig(theta=500_000.0),
    partial=RopeConfig(rotary_fraction=0.25),
    yarn=RopeConfig(scaling="yarn", factor=4.0, original_len=2048),
    yarn_deepseek=RopeConfig(scaling="yarn", factor=40.0, original_len=4096),
    yarn_narrow=RopeConfig(
        scaling="yarn", factor=8.0, original_len=512, beta_fast=16.0, beta_slow=2.0
    ),
    yarn_told=RopeConfig(scaling="yarn", factor=4.0, original_len=4096, attention_factor=1.0),
    yarn_partial=RopeConfig(scaling="yarn", factor=4.0, original_len=2048, rotary_fraction=0.5),
    yarn_short=RopeConfig(scaling="yarn", factor=4.0, original_len=64),
    llama3=RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_len=8192),
    llama32=RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_len=8192),
    llama3_partial=RopeConfig(
        scaling="llama3", factor=4.0, original_len=1024, rotary_fraction=0.5, high_freq_factor=8.0
    ),
)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies(name, head_dim):
    ours, (frequencies, scale) = (
        rope_frequencies(head_dim, ROPES[name]),
        theirs(head_dim, ROPES[name]),
    )
    np.testing.assert_allclose(
        ours.frequencies, frequencies, rtol=1e-5
    )  # theirs are powers in fp32
    assert ours.scale == pytest.approx(scale, abs=1e-12)


@pytest.mark.parametrize("name", ["plain", "yarn", "llama3"])
def test_rotated_queries(name):
    "Half-split pairs, and the temperature on cos and sin, as LLaMA's own function applies them"
    x, positions = NORMAL((2, 7, 3, 64)).astype(np.float32), np.array([[0, 1, 2, 3, 50, 51, 500]])
    frequencies, scale = theirs(64, ROPES[name])
    angle = torch.tensor(
        positions[0][:, None] * np.tile(frequencies, 2)[None], dtype=torch.float32
    )[None]
    q = torch.tensor(x).transpose(1, 2)
    want, _ = apply_rotary_pos_emb(q, q, angle.cos() * scale, angle.sin() * scale)
    got = rope(jnp.asarray(x), jnp.asarray(positions), rope_frequencies(64, ROPES[name]))
    np.testing.assert_allclose(
        got, want.transpose(1, 2).numpy(), atol=5e-4 if name == "plain" else 2e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["uncentred", "centred", "scalar", "none"])
def test_rms_norm(mode, dtype):
    "LLaMA's norm multiplies by its weight, Gemma's by one plus its weight; torch's own takes no weight"
    x, gain, eps = NORMAL((3, 5, 16)).astype(np.float32), NORMAL(16).astype(np.float32), 1e-5
    ours, t = RMSNorm(16, eps, mode), torch.tensor(x).to(getattr(torch, dtype))
    if mode != "none":
        ours.gain[...] = jnp.asarray(gain[0] if mode == "scalar" else gain)
    if mode == "uncentred":
        norm = LlamaRMSNorm(16, eps=eps)
    elif mode == "centred":
        norm = GemmaRMSNorm(16, eps=eps)
    else:
        norm = lambda t: (
            torch.nn.functional.rms_norm(t.float(), (16,), eps=eps)
            .mul(float(gain[0]) if mode == "scalar" else 1)
            .to(t.dtype)
        )
    if isinstance(norm, torch.nn.Module):
        norm.weight.data = torch.tensor(gain)
    with torch.no_grad():
        want = norm(t).float().numpy()
    got = ours(jnp.asarray(x, dtype)).astype(jnp.float32)
    np.testing.assert_allclose(
        got, want, rtol=1e-5 if dtype == "float32" else 2**-7, atol=1e-6
    )  # LLaMA rounds before the gain


def test_activations():
    u = np.concatenate([NORMAL(200) * 3, [0.0]]).astype(np.float32)
    t = torch.tensor(u, requires_grad=True)
    leaky = torch.nn.functional.leaky_relu(t, 0.25)
    want = dict(
        gelu=torch.nn.functional.gelu(t, approximate="tanh"),
        relu2=torch.relu(t) ** 2,
        leaky_relu2=leaky * leaky.abs(),
        signed_sqrt=t / torch.sqrt(t.abs() + 1e-4),
    )
    assert set(want) == set(ACTIVATIONS)
    for name, y in want.items():
        np.testing.assert_allclose(
            activate(jnp.asarray(u), name), y.detach().numpy(), rtol=2e-5, atol=1e-6
        )
        (slope,) = torch.autograd.grad(y.sum(), t)
        np.testing.assert_allclose(
            jax.vmap(jax.grad(lambda u: activate(u, name)))(jnp.asarray(u)),
            slope.numpy(),
            rtol=2e-4,
            atol=2e-5,
        )
