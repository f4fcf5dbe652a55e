"Attention that holds no scores: against float64, against the plain form in every variant, and in what is compiled."

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.core.keys import named_key
from nash_lab.maths import flash
from nash_lab.maths.flash import (
    flash_attention,
    library_attention,
    splash_backward,
    splash_forward,
)
from nash_lab.model import attention as page
from nash_lab.model.attention import LONG, attend, attention, row_mask
from nash_lab.model.block import MAHAConfig, MLAConfig, ModelConfig
from nash_lab.model.transformer import LM


def normal(name, *shape, dtype=jnp.float32):
    return jax.random.normal(named_key(jax.random.key(3), name), shape, dtype)


def rows(t, heads, groups, k, m, dtype="float32", b=2):
    shapes = ((b, t, heads, k), (b, t, groups, k), (b, t, groups, m))
    return [normal(name, *shape, dtype=dtype) for name, shape in zip("qkv", shapes)]


def exact(q, k, v, segments=None, window=None, scale=None):
    "float64, every score; zeros for document 0"
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    t, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    s = np.einsum("bthk,bshk->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    see = np.tri(t, dtype=bool)[None, None]
    if window:
        see = see & ~np.tri(t, k=-window, dtype=bool)[None, None]
    if segments is not None:
        ids = np.asarray(segments)
        see = see & (ids[:, None, :, None] == ids[:, None, None])
    s = np.where(see, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    y = np.einsum("bhts,bshm->bthm", p / p.sum(-1, keepdims=True), v)
    return y if segments is None else np.where(ids[..., None, None] != 0, y, 0)


def documents(t, *ends):
    "one row of documents 1, 2, ... that end there, then padding; and one document"
    ids = sum((np.arange(t) >= end).astype(np.int32) for end in (0, *ends))
    return jnp.asarray(np.stack([np.where(ids > len(ends), 0, ids), np.ones(t, np.int32)]))


CASES = {
    "one token": (1, 2, 1, 8, 8, None, None, None),
    "less than a block": (100, 4, 2, 8, 8, None, None, None),
    "a block and one": (129, 2, 2, 6, 10, None, None, 0.2),
    "documents, padding": (300, 4, 1, 8, 16, (1, 130, 250), None, None),
    "one document a token": (140, 2, 1, 4, 4, range(1, 140), None, None),
    "window": (400, 2, 1, 8, 4, None, 150, None),
    "window of one": (200, 2, 1, 8, 8, None, 1, None),
    "window, documents": (390, 3, 3, 8, 8, (128, 256), 100, None),
    "larger blocks": (1024, 4, 2, 8, 8, (1, 300, 1000), None, None),
    "larger blocks, window": (1024, 2, 1, 8, 4, None, 300, None),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_the_naive_form(case):
    t, heads, groups, k, m, ends, window, scale = CASES[case]
    arrays = rows(t, heads, groups, k, m)
    segments = None if ends is None else documents(t, *ends)
    how = dict(scale=scale, window=window)
    y = jax.jit(lambda *a: flash_attention(*a, segments, **how))(*arrays)
    np.testing.assert_allclose(y, exact(*arrays, segments, **how), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, tolerance, t", [("float32", 2e-5, 300), ("bfloat16", 6e-2, 300), ("float32", 2e-5, 1024)]
)
def test_gradients_are_those_of_the_plain_form(dtype, tolerance, t, monkeypatch):
    "at 1,024 tokens blocks of 256, and two parts of two key heads each"
    monkeypatch.setattr(flash, "CACHED", 4 * 256**2)
    arrays = rows(t, 4, 2, 8, 8, dtype)
    segments = documents(t, 100, 290)
    weight = normal("weight", 2, t, 4, 8)

    def gradients(f):
        total = lambda *a: jnp.sum(weight * f(*a).astype(jnp.float32))
        return jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)

    ours = gradients(lambda *a: flash_attention(*a, segments))
    plain = gradients(lambda *a: attention(*a, row_mask(*a[:2], segments)))
    for mine, expected in zip(ours, plain):
        assert mine.dtype == dtype
        a, b = (np.asarray(x, np.float32) for x in (mine, expected))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("window", [None, 90])
def test_the_kernel_of_a_tpu_interpreted(window):
    "forward and backward, documents, grouped heads, values wider than keys"
    q, k, v = (a.swapaxes(1, 2) for a in rows(256, 4, 2, 8, 16))
    segments = documents(256, 60, 200) + 1
    weight = normal("weight", *q.shape[:3], 16)
    call = lambda *a: library_attention(*a, segments, window, implementation="xla")
    expected, pull = jax.vjp(call, q, k, v)
    y, logsum = splash_forward(q, k, v, segments, window, interpret=True)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    gradients = splash_backward(q, k, v, segments, y, logsum, weight, window, interpret=True)
    for mine, theirs in zip(gradients, pull(weight)):
        np.testing.assert_allclose(mine, theirs, atol=3e-5)


def test_large_scores_do_not_overflow():
    "scores of several hundred in blocks of 256: the largest is subtracted first"
    q, k, v = rows(1024, 2, 1, 4, 4, b=1)
    y = jax.jit(flash_attention)(q * 12, k * 12, v)
    expected = exact(q * 12, k * 12, v)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-3)


def test_a_block_is_no_wider_than_its_use():
    "tokens of a block and key heads at once: rows of 512 together, rows of 2,048 by themselves"
    sizes = []
    for b, t, h, g, window in ((8, 512, 4, 4, None), (8, 2048, 4, 4, None), (1, 4096, 12, 1, 300)):
        q, k = (jax.ShapeDtypeStruct((b, heads, t, 32), "float32") for heads in (h, g))
        found = jax.eval_shape(lambda q, k: flash.in_parts(q, k, None, window)[1][2], q, k)
        sizes.append(found.shape)
    assert sizes == [(1, 32, 1, 512, 32), (8, 4, 1, 2048, 32), (1, 1, 1, 4096, 32)]


def test_short_rows_keep_the_plain_form_to_the_last_digit():
    arrays = rows(LONG - 1, 2, 1, 4, 4, b=1)
    np.testing.assert_array_equal(attend(*arrays), attention(*arrays, row_mask(*arrays[:2])))
    with pytest.raises(ValueError, match="3 queries over 5 keys need a mask"):
        attend(arrays[0][:, :3], arrays[1][:, :5], arrays[2][:, :5])


KINDS = {
    "gqa": {},
    "diff1": dict(attention="diff1"),
    "diff2": dict(attention="diff2"),
    "mla": dict(attention="mla", mla=MLAConfig(v_head_dim=6)),
    "maha": dict(attention="maha", maha=MAHAConfig(scales=2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_in_blocks_is_itself(kind, monkeypatch):
    "loss and gradients of packed documents"
    lm = LM(ModelConfig.tiny(residual="plain", init_std=0.3, **KINDS[kind]))
    graph, weights = nnx.split(lm, nnx.Param)
    ids = jax.random.randint(jax.random.key(0), (2, 48), 0, 256)
    segments = documents(48, 7, 30, 40)
    found = []
    for long in (16, 10**6):
        monkeypatch.setattr(page, "LONG", long)
        total = lambda w: nnx.merge(graph, w).objective(ids, ids, segments=segments)[0]
        found.append(jax.jit(jax.value_and_grad(total))(weights))
    (loss, ours), (expected, plain) = found
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max() + 1e-6)


def lowered_for_tpu(**changes):
    "the gradient of a model over rows of 2,048 tokens, as XLA gets it for a TPU"
    cfg = ModelConfig.tiny(
        residual="plain", compute_dtype="bfloat16", max_len=2048, loss_chunk=128, **changes
    )
    lm = nnx.eval_shape(lambda: LM(cfg, nnx.Rngs(0)))
    graph, weights = nnx.split(lm, nnx.Param)
    ids = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    total = lambda w, ids, seg: nnx.merge(graph, w).objective(ids, ids, segments=seg)[0]
    traced = jax.jit(jax.grad(total)).trace(weights, ids, ids)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("kind", KINDS)
def test_no_scores_reach_the_tpu_compiler(kind):
    text = lowered_for_tpu(**KINDS[kind])
    assert "tpu_custom_call" in text and "2048x2048" not in text
    if kind == "maha":
        assert "1024x1024" not in text


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_no_policy_runs_attention_twice(remat):
    "one kernel forwards, one backwards"
    assert lowered_for_tpu(remat=remat).count("@tpu_custom_call") == 2


COMPILE = """
import json, sys
from dataclasses import replace
from jax.experimental import topologies
from nash_lab.model.block import ModelConfig
from nash_lab.train import preflight as pf
model = ModelConfig.preset("mhc-120m-plain")
small = dict(layers=1, width=128, heads=2, kv_heads=1, vocab_size=256, ffn_width=256)
cfg = pf.PreflightConfig(model=replace(model, **small), programs=("train",), batch_size=1)
devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v6e:1x1", chips_per_host_bounds=(1, 1, 1), num_slices=1
).devices
program = pf.compile_program(cfg, "train", devices, sys.argv[1])
print(json.dumps(dict(kernels=program.kernels, modules=program.modules, moved=program.moved)))
"""


@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: nothing can be compiled for a TPU"
)
def test_the_program_compiled_for_a_v6e_holds_no_scores(tmp_path):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v6e-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    texts = [p.read_text() for p in tmp_path.glob("*jit*after_optimizations.txt")]
    assert texts and any("tpu_custom_call" in text for text in texts)
    for text in texts:
        assert not re.search(r"\[(\d+,)*2048,2048\]", text)

    # what both kernels read and write counts for the page that calls them
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["kernels"] < found["modules"]["model/attention"] < found["moved"]
