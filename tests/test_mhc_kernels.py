"Streams read and written in one pass: against the plain form in float64, in the model, for a TPU."

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.model.block import ModelConfig
from nash_lab.model.mhc import HyperConnection, MHCConfig, StreamEnds
from nash_lab.model.transformer import LM

# streams, rows, tokens of a row, width, type of the streams, settings
CASES = {
    "paper, gates": (3, 2, 100, 24, "float32", dict(gates=True)),
    "half precision": (4, 1, 300, 64, "bfloat16", {}),
    "deepseek": (4, 1, 150, 16, "float32", dict(convention="deepseek", gain=False)),
    "identity": (2, 1, 128, 16, "float32", dict(h_res="identity")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fused_sublayer_is_the_plain_one(case):
    "what is read, what is written, and every gradient"
    n, b, t, d, dtype, settings = CASES[case]
    cfg = MHCConfig(streams=n, iterations=3, kernel="pallas", **settings)
    layer = HyperConnection(d, cfg, rngs=nnx.Rngs(1))
    layer.alpha[...] = jnp.array([0.5, -0.7, 1.0])
    graph, weights = nnx.split(layer, nnx.Param)
    keys = jax.random.split(jax.random.key(len(case)), 2 * n + 1)
    streams = tuple(jax.random.normal(k, (b, t, d)).astype(dtype) for k in keys[:n])
    cotangents = [jax.random.normal(k, (b, t, d)) for k in keys[n:]]

    def both_passes(kernel, weights, streams, cotangents):
        def total(weights, streams):
            layer = nnx.merge(graph, weights)
            layer.cfg = replace(cfg, kernel=kernel)
            read, context = layer.read(streams)
            found = read, *layer.write(streams, jnp.tanh(read), context)
            pairs = zip(found, cotangents)
            return sum(jnp.sum(x.astype(c.dtype) * c) for x, c in pairs), found

        passes = jax.value_and_grad(total, (0, 1), has_aux=True)
        return jax.tree.leaves(jax.jit(passes)(weights, streams))

    ours = both_passes("pallas", weights, streams, cotangents)
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)), (weights, streams, cotangents)
        )
        exact = both_passes("xla", *exact)
    assert len(ours) == len(exact)
    tolerance = 3e-6 if dtype == "float32" else 2e-2
    for mine, expected in zip(ours, exact):
        mine, expected = np.asarray(mine, np.float64), np.asarray(expected)
        np.testing.assert_allclose(mine, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_the_model_with_kernels_is_itself():
    "loss and gradients; the maps of every layer are handed out bare"
    ids = jax.random.randint(jax.random.key(0), (2, 64), 0, 256)
    found = []
    for kernel in ("pallas", "xla"):
        mhc = MHCConfig(streams=2, iterations=2, kernel=kernel)
        cfg = ModelConfig.tiny(remat="block", layers=1, mhc=mhc)
        graph, weights = nnx.split(LM(cfg, nnx.Rngs(0)), nnx.Param)
        total = lambda w: nnx.merge(graph, w).objective(ids, ids)[0]
        found.append(jax.jit(jax.value_and_grad(total))(weights))
    for mine, theirs in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-4 * np.abs(theirs).max())


def test_less_than_a_block_of_tokens_keeps_the_plain_form():
    cfg = MHCConfig(streams=2, kernel="pallas")
    layer = HyperConnection(8, cfg, rngs=nnx.Rngs(0))
    for tokens, fused in ((127, False), (128, True)):
        streams = StreamEnds(8, cfg, rngs=nnx.Rngs(0)).begin(jnp.zeros((1, tokens, 8)))
        text = str(jax.make_jaxpr(lambda s: layer.read(s)[0])(streams))
        assert ("pallas_call" in text) == fused


COMPILE = """
import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from nash_lab.model.mhc import HyperConnection, MHCConfig
(device,) = topologies.get_topology_desc(
    platform="tpu", topology_name="v6e:1x1", chips_per_host_bounds=(1, 1, 1), num_slices=1
).devices
here = jax.sharding.SingleDeviceSharding(device)
layer = HyperConnection(200, MHCConfig(iterations=2, kernel="pallas"), rngs=nnx.Rngs(0))
graph, weights = nnx.split(layer)
place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
x = jax.ShapeDtypeStruct((1, 300, 200), jnp.bfloat16, sharding=here)
def total(weights, streams):
    layer = nnx.merge(graph, weights)
    read, held = layer.read(streams)
    after = layer.write(streams, read, held)
    return sum(jnp.sum(x.astype(jnp.float32)) for x in after)
program = jax.jit(jax.value_and_grad(total, (0, 1)))
text = program.lower(jax.tree.map(place, weights), (x,) * 4).compile().as_text()
print(text.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: nothing can be compiled for a TPU"
)
def test_the_kernels_compile_for_a_v6e():
    "two forwards, two backwards"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v6e-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    run = [sys.executable, "-c", COMPILE]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == 4
