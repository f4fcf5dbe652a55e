"Streams read and written in one pass: against the plain form in float64, in the model, for a TPU."

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

from nash_lab.model.block import ModelConfig
from nash_lab.model.layers import RMSNorm
from nash_lab.model.mhc import HyperConnection, MHCConfig, merge_streams
from nash_lab.model.residuals import ResidualConfig
from nash_lab.model.transformer import LM
from nash_lab.train.preflight import parse_hlo

# streams, rows, tokens of a row, width, type of the streams, settings
CASES = {
    "paper, gates": (3, 2, 100, 24, "float32", dict(gates=True)),
    "half precision": (4, 1, 300, 64, "bfloat16", {}),
    "deepseek": (4, 1, 150, 16, "float32", dict(convention="deepseek", gain=False)),
    "identity": (2, 1, 128, 16, "float32", dict(h_res="identity")),
    "lite": (2, 3, 43, 40, "float32", dict(h_res="lite")),
    "single pass": (4, 1, 129, 8, "float32", dict(convention="deepseek", norm_eps=1e-20)),
}
KINDS = [settings for *_, settings in CASES.values()]


def drawn_case(seed):
    "a shape, a type and a kind of maps by lot; the kinds take turns"
    rng = np.random.default_rng(seed)
    n, rows = rng.integers(1, 6), rng.integers(1, 4)
    length = -(-128 // rows) + rng.integers(0, 150)
    dtype = "bfloat16" if rng.random() < 0.25 else "float32"
    return n, rows, length, 8 * rng.integers(1, 9), dtype, KINDS[seed % len(KINDS)]


def check_crossings(case, seeds):
    "a read, two writes with the next reads, and every gradient, against float64"
    n, b, t, d, dtype, settings = case
    cfg = MHCConfig(streams=int(n), iterations=3, **settings)
    single = "norm_eps" in settings
    layer = HyperConnection(d, cfg, rngs=nnx.Rngs(1))
    layer.hands_on = single
    norm = RMSNorm(d, 1e-3, "centred" if n == 3 else "uncentred")
    graph, weights = nnx.split((layer, norm), nnx.Param)

    def crossed(layer, norm, streams):
        maps = layer(streams)
        state = (streams, tuple(maps.pre)) if single else streams
        y = jnp.tanh(norm(merge_streams(streams, maps.pre)))
        before = state, y, maps
        state, x, u = layer.cross(*before, norm)
        state, x, u = layer.cross(state, jnp.sin(x), layer.maps(u), norm, before)
        return *(state[0] if single else state), x, u

    def apart(layer, norm, streams):
        maps = layer(streams)
        x = norm(merge_streams(streams, maps.pre))
        for f in (jnp.tanh, jnp.sin):
            streams = layer.write(streams, f(x), maps)
            handed = maps.pre
            maps = layer(streams)
            x = norm(merge_streams(streams, handed if single else maps.pre))
        return *streams, x, layer.projected(streams)

    def both_passes(form):
        def total(weights, streams, cotangents):
            found = form(*nnx.merge(graph, weights), streams)
            pairs = zip(found, cotangents)
            return sum(jnp.sum(x.astype(c.dtype) * c) for x, c in pairs), found

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))

    fast, slow = both_passes(crossed), both_passes(apart)
    tolerance = 3e-5 if dtype == "float32" else 5e-2
    for seed in seeds:
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        drawn = jax.tree.map(lambda w: w + 0.3 * draw(*w.shape), weights)
        streams = tuple(jnp.asarray(draw(b, t, d), dtype) for _ in range(n))
        cotangents = [draw(b, t, d) for _ in range(n + 1)] + [draw(cfg.packed, b, t)]
        given = drawn, streams, cotangents
        ours = jax.tree.leaves(fast(*given))
        with jax.enable_x64(True):
            given = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), given)
            exact = jax.tree.leaves(slow(*given))
        assert len(ours) == len(exact)
        for mine, expected in zip(ours, exact):
            mine, expected = np.asarray(mine, np.float64), np.asarray(expected)
            few = expected.size <= 3  # sums over all tokens that cancel
            if few and dtype == "bfloat16":
                continue
            # the gate of a single stream has a gradient of zero
            least = 1e-2 if few and n == 1 else 1e-3
            error = np.abs(mine - expected).max() / max(np.abs(expected).max(), least)
            assert error <= (10 if few else 1) * tolerance, (case, seed, mine.shape, error)


@pytest.mark.parametrize("case", CASES)
def test_crossings_are_reads_norms_and_writes(case):
    "over 8 seeds"
    check_crossings(CASES[case], range(8))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_crossings_of_200_shapes(part):
    for seed in range(20 * part, 20 * part + 20):
        check_crossings(drawn_case(seed), [seed])


@pytest.mark.parametrize("residual", ["mhc", "v41"])
def test_the_model_with_kernels_is_itself(residual):
    "loss, gradients, and the maps of every layer"
    ids = jax.random.randint(jax.random.key(0), (2, 64), 0, 256)
    found = []
    for kernel in ("pallas", "xla"):
        few = dict(streams=2, iterations=2, kernel=kernel)
        own = dict(mhc=MHCConfig(**few), residuals=ResidualConfig(**few))
        remat = dict(remat="dots")
        if residual == "v41":
            remat = dict(remat="block", remat_every=2 if kernel == "pallas" else 1)
        cfg = ModelConfig.tiny(residual=residual, **remat, **own)
        graph, weights = nnx.split(LM(cfg, nnx.Rngs(0)), nnx.Param)

        def total(w):
            lm = nnx.merge(graph, w)
            return lm.objective(ids, ids)[0], lm.routing(ids)

        found.append(jax.jit(jax.value_and_grad(total, has_aux=True))(weights))
    for mine, theirs in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-4 * np.abs(theirs).max())


def test_less_than_a_block_of_tokens_keeps_the_plain_form():
    cfg = ModelConfig.tiny(mhc=MHCConfig(streams=2, kernel="pallas"))
    graph, weights = nnx.split(nnx.eval_shape(lambda: LM(cfg, nnx.Rngs(0))))
    for tokens, fused in ((31, False), (32, True)):
        ids = jnp.zeros((4, tokens), jnp.int32)
        text = str(jax.make_jaxpr(lambda w: nnx.merge(graph, w).hidden(ids))(weights))
        assert ("pallas_call" in text) == fused


COMPILE = """
import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from nash_lab.model.block import Block, ModelConfig, run_stack, stacked
from nash_lab.model.mhc import MHCConfig
(device,) = topologies.get_topology_desc(
    platform="tpu", topology_name="v6e:1x1", chips_per_host_bounds=(1, 1, 1), num_slices=1
).devices
here = jax.sharding.SingleDeviceSharding(device)
mhc = MHCConfig(iterations=2, kernel="pallas")
cfg = ModelConfig.tiny(layers=3, remat="block", compute_dtype="bfloat16", mhc=mhc)
make = lambda: stacked(lambda rngs, i: Block(cfg, i, rngs=rngs), cfg.layers, nnx.Rngs(0))
graph, weights = nnx.split(nnx.eval_shape(make))
place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
x = jax.ShapeDtypeStruct((1, 300, cfg.width), jnp.bfloat16, sharding=here)
def total(weights, streams):
    blocks = nnx.merge(graph, weights)
    end = run_stack(cfg, blocks, streams, positions=jnp.arange(300)[None])[0]
    return sum(jnp.sum(x.astype(jnp.float32)) for x in end)
both_ways = jax.value_and_grad(total, (0, 1))
program = jax.jit(lambda *args: (both_ways(*args), total(*args)))
print(program.lower(jax.tree.map(place, weights), (x,) * 4).compile().as_text())
"""


@pytest.mark.skipif(
    find_spec("libtpu") is None,
    reason="libtpu is not installed: nothing can be compiled for a TPU",
)
def test_the_kernels_compile_for_a_v6e():
    "two forwards, one of them again, two backwards, and two forwards alone; no loop copies a stack"
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

    kernels = 0
    touched = set()  # what loops do with the stack of three layers and their end
    computations, _ = parse_hlo(done.stdout)
    for loop in (op for ops in computations.values() for op in ops if op.kind == "while"):
        body = computations[re.search(r"body=%([\w.\-]+)", loop.rest)[1]]
        kernels += sum("tpu_custom_call" in op.rest for op in body)
        touched |= {op.kind for op in body if "[4,300,32]" in op.shape}
    assert kernels == 7
    assert touched == {"parameter", "get-tuple-element", "tuple", "custom-call"}
