"""A mesh changes where numbers lie and never what they are: losses, tokens, checkpoints and the order of batches on eight virtual devices, and in two real processes.

Specs are shapes and need no devices. What needs eight runs in processes of its own (parallel_checks.py); what needs two processes, in tools/two_processes.py."""

import json, os, subprocess, sys
from dataclasses import replace
from contextlib import closing

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

import two_processes
from nash_lab.model.block import PRESETS, MLAConfig, ModelConfig
from nash_lab.model.transformer import LM
from nash_lab.run.checkpoint import Checkpoints
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.parallel import (
    AXES,
    LOGICAL,
    RULES,
    bytes_per_device,
    cache_specs,
    logical_axes,
    param_specs,
    path_name,
    placed,
    state_shardings,
    unsharded,
)
from nash_lab.model.residuals import RESIDUALS as FAMILY
from nash_lab.train.step import fresh_state

ATTENTIONS, RESIDUALS, MTPS = (
    ("gqa", "diff1", "diff2", "mla", "maha"),
    ("plain", "mhc"),
    ("none", "parallel", "sequential"),
)
FFNS = ("swiglu", "gelu", "relu2", "leaky_relu2", "signed_sqrt", "moe")
MODELS = [
    dict(attention=a, residual=r, mtp=m) for a in ATTENTIONS for r in RESIDUALS for m in MTPS
] + [dict(ffn=f, ffn_width=96) for f in FFNS]
MODELS += [
    dict(attention="mla", mla=MLAConfig(q_rank=16)),
    dict(tie_embeddings=False),
    dict(ffn="moe", ffn_width=96, mtp="sequential"),
    *(dict(residual=name) for name in FAMILY if name not in ("plain", "mhc")),
]


def abstract(data=1, fsdp=1, tp=1, ep=1):
    return AbstractMesh((data, fsdp, tp, ep), AXES)


def shapes(cfg):
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: LM(cfg, nnx.Rngs(0))), nnx.Param))


def leaves(tree):
    return {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def check(name, *args):
    "what parallel_checks.py found"
    script = os.path.join(os.path.dirname(__file__), "parallel_checks.py")
    r = subprocess.run(
        [sys.executable, script, name, *map(str, args)], capture_output=True, text=True, timeout=300
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads(r.stdout.splitlines()[-1])


def off(losses, reference):
    return np.max(np.abs(np.array(losses) / np.array(reference) - 1))


@pytest.mark.parametrize(
    "model",
    MODELS,
    ids=lambda m: "-".join(str(v) for v in m.values() if isinstance(v, (str, bool))),
)
def test_every_large_weight_is_divided(model):
    "fsdp=2 and tp=2: all but maps into few numbers is in four parts, nothing above 256 numbers is whole, every wish of the rules is met"
    mesh, params = abstract(fsdp=2, tp=2), shapes(ModelConfig.tiny(kv_heads=4, **model))
    assert unsharded(params, RULES, mesh, least=257) == {}
    parts = {}
    for (name, x), s in zip(
        leaves(params).items(), jax.tree.leaves(param_specs(params, RULES, mesh))
    ):
        parts[name] = x.size // int(np.prod(s.shard_shape(x.shape)))
        few = ("phi", "router", "latent/down", "key/weight", "ends/embedding", "inject", "mixer")
        few = any(word in name for word in few)  # into n, e, c or r numbers
        few = few or name.endswith(("_hyper/down", "_hyper/up"))
        small = x.size <= 256 or x.ndim <= 2 and name.endswith(("gain", "bias"))
        assert parts[name] == (2 if few else 4) or small, (
            f"{name}{x.shape} is in {parts[name]} parts"
        )
    whole = sum(x.size for name, x in leaves(params).items() if parts[name] == 1)
    assert whole < 0.1 * sum(x.size for x in leaves(params).values())


def test_every_rule_is_used():
    "no line of the table stands for a parameter that no model has"
    seen = {
        (name, x.ndim)
        for model in [*MODELS, dict(mhc=ModelConfig().mhc.deepseek_v4())]
        for name, x in leaves(shapes(ModelConfig.tiny(**model))).items()
    }
    seen |= {(name, x.ndim) for name, x in leaves(shapes(ModelConfig.preset("nash-tiny"))).items()}
    from nash_lab.model.maha import MAHAConfig

    seen |= {
        (name, x.ndim)
        for name, x in leaves(
            shapes(
                ModelConfig.tiny(attention="maha", kv_heads=4, maha=MAHAConfig(downsample="conv"))
            )
        ).items()
    }
    used = {logical_axes(name, ndim) for name, ndim in seen}
    for pattern, axes in LOGICAL:
        assert used & {axes, ("layers", *axes)}, f"{pattern} {axes} fits nothing"


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if name not in ("tiny", "demo", "nash-tiny")]
)
def test_presets_divide(preset):
    "the named models on fsdp=4, tp=2: a device keeps a seventh of the state or less"
    mesh, tx = abstract(fsdp=4, tp=2), optimizer(OptimConfig(), 1000)
    state = jax.eval_shape(
        lambda: fresh_state(
            jax.tree.map(
                lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes(ModelConfig.preset(preset))
            ),
            tx,
        )
    )
    assert unsharded(state.params, RULES, mesh) == {}
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert bytes_per_device(placed(state, state_shardings(state, mesh))) < whole / 7


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_follows_its_parameter(name):
    "each moment lies where its parameter does, and with ZeRO in half as large parts along data=2"
    mesh, tx = abstract(data=2, fsdp=2, tp=2), optimizer(OptimConfig(name=name), 1000)
    params = shapes(ModelConfig.tiny(ffn="moe", ffn_width=96))
    state = jax.eval_shape(
        lambda: fresh_state(jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), params), tx)
    )
    place, plain = (
        leaves(param_specs(params, RULES, mesh)),
        state_shardings(state, mesh, zero=False),
    )
    zero, moments = leaves(state_shardings(state, mesh).opt_state), 0
    for path, s in leaves(plain.opt_state).items():
        x = leaves(state.opt_state)[path]
        owner = next(
            (p for p in sorted(place, key=len, reverse=True) if path.endswith("/" + p)), None
        )
        if owner is None or x.ndim == 0:
            continue
        moments += 1
        assert s == place[owner], path
        if x.size > 256:
            assert 2 * np.prod(zero[path].shard_shape(x.shape)) == np.prod(
                s.shard_shape(x.shape)
            ), path
    assert moments >= len(place)


def test_factors_of_a_moment():
    "Adafactor's row and column sums lose the entry of the axis they sum over"
    mesh, params = (
        abstract(fsdp=2, tp=2),
        {"blocks": {"ffn": {"up": {"weight": jax.ShapeDtypeStruct((2, 256, 512), "float32")}}}},
    )
    from typing import NamedTuple

    class State(NamedTuple):
        params: dict
        opt_state: dict

    part = lambda *shape: {
        "blocks": {"ffn": {"up": {"weight": jax.ShapeDtypeStruct(shape, "float32")}}}
    }
    got = state_shardings(
        State(params, {"row": part(2, 256), "column": part(2, 512), "other": part(1)}), mesh
    ).opt_state
    assert [tuple(s.spec) for s in jax.tree.leaves(got)] == [
        (None, "tp"),
        (),
        (None, "fsdp"),
    ]  # column, other, row


@pytest.mark.parametrize(
    "shape, spec",
    [((2, 32, 64), (None, None, "data")), ((2, 64, 33), (None, "data", None)), ((3, 5, 7), ())],
)
def test_zero_divides_the_longest_axis_that_divides(shape, spec):
    from typing import NamedTuple

    class State(NamedTuple):
        params: dict
        opt_state: dict

    params = {"blocks": {"ffn": {"up": {"weight": jax.ShapeDtypeStruct(shape, "float32")}}}}
    for zero in (False, True):
        (got,) = jax.tree.leaves(
            state_shardings(State(params, params), abstract(data=2), zero=zero).opt_state
        )
        want = spec if zero else ()
        assert (*got.spec, None, None, None)[:3] == (*want, None, None, None)[:3]


def test_caches_are_divided():
    mesh = abstract(data=2, fsdp=2, tp=2)
    for kind in ATTENTIONS:
        lm = nnx.eval_shape(lambda: LM(ModelConfig.tiny(attention=kind, kv_heads=4), nnx.Rngs(0)))  # noqa: B023
        cache = jax.eval_shape(lambda: lm.init_cache(8, 64))  # noqa: B023
        for x, s in zip(jax.tree.leaves(cache), jax.tree.leaves(cache_specs(cache, RULES, mesh))):
            assert x.shape[1] == 4 * s.shard_shape(x.shape)[1], kind
            if x.ndim == 5 and x.shape[3] > 1:
                assert x.shape[3] == 2 * s.shard_shape(x.shape)[3], kind
        if kind == "maha":
            continue
        lm.cfg = replace(lm.cfg, cache_dtype="int8")
        specs = cache_specs(jax.eval_shape(lambda: lm.init_cache(8, 64)), RULES, mesh)  # noqa: B023
        for own in specs[:-1]:  # each int8 with its scale: the same devices for the same slots
            values, scale = ((*spec.spec, None, None, None, None, None) for spec in own)
            axes = 3 if kind == "mla" else 4
            assert values[:axes] == scale[:axes] and "tp" in (*values, "tp" if kind == "mla" else None), kind


def test_losses_on_every_mesh():
    found = check("losses")
    for name, losses in found.items():
        assert off(losses, found["1"]) < 1e-5, (name, found)


def test_losses_in_micro_batches():
    found = check("accumulated")
    assert off(found["2,2,2"], found["1"]) < 1e-5, found


@pytest.mark.parametrize(
    "kinds",
    [
        "diff1 diff2",
        "mla maha",
        "moe mtp",
        "wider hc frac v4",
        "v41 lite kromhc ihc",
        "gated wide attnres",
    ],
)
def test_gradients_of_every_kind(kinds):
    "loss and norm of the gradient"
    for kind, found in check("kinds", *kinds.split()).items():
        (_, one), (name, many) = found.items()
        assert off(many, one) < 1e-5, (kind, name, found)


def test_checkpoints_move_between_meshes(tmp_path):
    "written on data=2, fsdp=2, tp=2; read on four other meshes, and here, where there is one device"
    assert check("checkpoints", tmp_path) == {"differ": []}
    params = shapes(ModelConfig.tiny(residual="plain", dropout=0.1, tie_embeddings=False))
    with closing(Checkpoints(tmp_path)) as points:
        got = points.restore(template={"model": params})["model"]
    saved = np.load(tmp_path / "params.npz")
    for new, name in zip(jax.tree.leaves(got), saved.files):
        np.testing.assert_array_equal(new, saved[name])


def test_a_run_moves_between_meshes(tmp_path):
    "pretrain stopped after two steps on data=2, fsdp=2, tp=2, continued on one device, on data=2 and on fsdp=8: the losses of one device"
    found = check("pretraining", tmp_path)
    assert len(found) == 4
    for losses in found.values():
        assert off(losses, found["one"]) < 1e-5, found


def test_order_of_batches():
    found = check("order")
    assert found["1"] == found["2"] == found["8"] and len(found["1"]) == 4


def test_long_rows_on_a_mesh():
    "attention in blocks, each device its rows and heads: the numbers of one device"
    for kind, found in check("long_rows", "window", "mla").items():
        assert off(found["1"], found["2,2,2"]) < 1e-4, (kind, found)


def test_decoding_on_a_mesh():
    for kind, found in check("decoding", "window", "mla", "maha").items():
        assert found["same"] and found["error"] < 1e-4, (kind, found)


def test_two_processes_equal_one(tmp_path):
    "two processes of four devices: losses of one process, a checkpoint with one manifest, read bit for bit by one process"
    trained = lambda name, **how: two_processes.finish(two_processes.start(tmp_path / name, **how))
    one = two_processes.losses(
        trained("one", processes=1, devices=1, mesh={}), str(tmp_path / "one")
    )
    two = two_processes.losses(trained("two"), str(tmp_path / "two"))
    numbers = lambda found: [float.fromhex(found[step]) for step in sorted(found)]
    assert off(numbers(two), numbers(one)) < 1e-5
    with closing(Checkpoints(tmp_path / "two")) as points:
        assert points.latest() == two_processes.STEPS
    again = [json.loads(o) for o in trained("two", processes=1, devices=8) if o.startswith("{")]
    assert [o for o in again if "step" in o] == [] and again[0]["begins"] == two_processes.STEPS


@pytest.mark.faults
@pytest.mark.slow
def test_one_of_two_processes_is_killed():
    r = subprocess.run(
        [sys.executable, two_processes.__file__], capture_output=True, text=True, timeout=400
    )
    assert r.returncode == 0, r.stdout + r.stderr
    assert "bit for bit" in r.stdout
