"Flax's tree mode, which is to become its default: every use of NNX here gives the same with it."

import os, subprocess, sys
import pytest
from pages import ROOT

CHILD = """
import jax, jax.numpy as jnp, numpy as np
from dataclasses import replace
from flax import nnx
from nash_lab.adapt.lora import LoRAConfig, attach, init_adapter, linear_layers, merge_adapter
from nash_lab.model.generate import generate
from nash_lab.model.transformer import LM, ModelConfig, parameter_count
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.step import fresh_state, make_train_step

assert nnx.set_graph_mode.current_value() == (sys.argv[1] == "true")
tokens = jnp.arange(2 * 12).reshape(2, 12) % 50
cfg = ModelConfig.tiny(mtp="sequential", remat="block")
lm = LM(cfg)
forward = nnx.jit(lambda lm, x: lm(x))  # as nash_lab.lab.run has it
out = [forward(lm, tokens), nnx.jit(lambda lm, x: lm.routing(x).res)(lm, tokens), parameter_count(cfg)]

graphdef, params = nnx.split(lm, nnx.Param)
tx = optimizer(OptimConfig(warmup_steps=1), 4)
state = fresh_state(nnx.to_pure_dict(params), tx)
step = make_train_step(graphdef, tx)
batch = dict(zip(PLAIN, (tokens, tokens, jnp.ones(tokens.shape, bool))))
state, metrics = step(jax.tree.map(jnp.copy, state), batch, jax.random.key(0))
out += [metrics["loss"], metrics["grad_norm"], *jax.tree.leaves(state.params)]

adapter = init_adapter(lm, LoRAConfig(rank=2), jax.random.key(1))
adapter = jax.tree.map(lambda x: x + 0.01, adapter)
out += [forward(attach(lm, adapter), tokens), forward(merge_adapter(lm, adapter), tokens)]
out += [forward(lm, tokens), len(linear_layers(lm))]  # the base is untouched
out += [generate(lm, [[1, 2, 3], [4]], max_new_tokens=4, temperature=0.0)[0]]
again = LM(cfg)
nnx.update(again, state.params)
out += [forward(again, tokens)]
np.savez(sys.argv[2], *[np.asarray(x) for x in out])
"""


def test_every_use_of_nnx_is_one_of_trees(tmp_path):
    "Building, split and merge, scan, remat, the train step, adapters, decoding: both modes, the same bits"
    import numpy as np
    from flax import nnx

    if not hasattr(nnx, "set_graph_mode"):
        pytest.skip("this Flax has no tree mode")
    child = "import sys\nfrom nash_lab.train.step import PLAIN\n" + CHILD
    for mode in ("true", "false"):
        env = os.environ | {"NNX_GRAPH_MODE": mode, "NNX_GRAPH_UPDATES": mode}
        command = [sys.executable, "-c", child, mode, str(tmp_path / f"{mode}.npz")]
        r = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr[-2000:]
    graph, tree = (np.load(tmp_path / f"{mode}.npz") for mode in ("true", "false"))
    assert len(graph.files) > 20 and graph.files == tree.files
    for name in graph.files:
        np.testing.assert_array_equal(graph[name], tree[name])
