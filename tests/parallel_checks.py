"Checks that need eight devices: `python parallel_checks.py NAME [FOLDER]` runs one of them in a process of its own and prints what it found as JSON."

import hashlib, json, shutil, sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
import optax
from flax import nnx

from nash_lab.data.corpus import PackedMeta, PackedTokens
from nash_lab.data.loader import LoaderConfig, loader
from nash_lab.model import attention
from nash_lab.model.block import MAHAConfig, ModelConfig
from nash_lab.model.generate import generate
from nash_lab.core.configs import to_json
from nash_lab.model.residuals import RESIDUALS, ResidualConfig
from nash_lab.model.transformer import LM
from nash_lab.run.checkpoint import Checkpoints
from nash_lab.train.settings import TrainConfig
from nash_lab.run.guard import Stopped
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.parallel import (
    RULES,
    MeshConfig,
    cache_specs,
    data_shard,
    make_mesh,
    param_specs,
    place_rows,
    put_batch,
    replicate,
    shard_step,
    state_shardings,
)
from nash_lab.train import pretrain as training
from nash_lab.train.pretrain import pretrain
from nash_lab.run.rundir import read_metrics
from nash_lab.train.step import fresh_state, make_train_step

MESHES = {
    "1": (1, 1, 1, 1),
    "8,1,1": (8, 1, 1, 1),
    "1,8,1": (1, 8, 1, 1),
    "2,2,2": (2, 2, 2, 1),
    "1,1,2": (1, 1, 2, 1),
    "2,1,2,2": (2, 1, 2, 2),
}
KINDS = {
    "mhc": {},
    "diff1": dict(attention="diff1", residual="plain"),
    "diff2": dict(attention="diff2", residual="plain"),
    "mla": dict(attention="mla", residual="plain"),
    "maha": dict(attention="maha", maha=MAHAConfig(scales=2), residual="plain"),
    "moe": dict(ffn="moe", ffn_width=96, residual="plain"),
    "mtp": dict(mtp="sequential", residual="plain"),
    "plain": dict(residual="plain", dropout=0.1, tie_embeddings=False),
    "window": dict(residual="plain", window=5, full_layers=(1,)),
} | {
    name: dict(residual=name, residuals=ResidualConfig(rank=8, block=2))
    for name in RESIDUALS
    if name not in ("plain", "mhc")
}


def mesh_of(name):
    sizes = MESHES[name]
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def packed():
    ids = np.random.default_rng(0).integers(0, 256, 5_001).astype(np.uint16)
    meta = PackedMeta(
        dtype="uint16",
        vocab_size=256,
        tokens=len(ids),
        documents=1,
        text_bytes=len(ids),
        tokenizer_hash="",
        sha256="made up",
        source_hashes={},
    )
    return PackedTokens(ids, meta, Path("made up"))


def batches(count):
    rows = loader(packed(), LoaderConfig(seq_len=16, batch_size=16, prefetch=0))
    return [
        {k: v for k, v in next(rows).items() if k in ("tokens", "targets", "mask")}
        for _ in range(count)
    ]


def job(kind, mesh, optim=OptimConfig(warmup_steps=1)):
    cfg, tx = ModelConfig.tiny(**KINDS[kind]), optimizer(optim, 10)
    make = lambda: LM(cfg, nnx.Rngs(0))
    graphdef = nnx.graphdef(place_rows(nnx.eval_shape(make), mesh))
    return graphdef, tx, lambda: fresh_state(nnx.to_pure_dict(nnx.state(make(), nnx.Param)), tx)


def train(kind, mesh, steps=3, accumulate=1, zero=True):
    mesh = mesh_of(mesh)
    graphdef, tx, initial = job(kind, mesh)
    places = state_shardings(jax.eval_shape(initial), mesh, zero=zero)
    state, key, losses, data = (
        jax.jit(initial, out_shardings=places)(),
        replicate(jax.random.key(0), mesh),
        [],
        batches(steps),
    )
    run = shard_step(make_train_step(graphdef, tx, accumulate), places).lower(
        state, put_batch(data[0], mesh), key
    )
    run = run.compile(compiler_options={"xla_backend_optimization_level": 0})
    for batch in data:
        state, metrics = run(state, put_batch(batch, mesh), key)
        losses.append(float(metrics["loss"]))
    at = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, places)
    assert jax.tree.all(at), "the state moved"
    return graphdef, state, losses


def losses(*_):
    "one model on every mesh, ZeRO on and off, and in micro-batches"
    found = {name: train("plain", name, 4)[2] for name in ("1", "8,1,1", "1,8,1", "2,2,2", "1,1,2")}
    found["8,1,1 without ZeRO"] = train("plain", "8,1,1", 4, zero=False)[2]
    return found


def accumulated(*_):
    "in micro-batches, with hyper-connections"
    return {name: train("mhc", name, 3, accumulate=2)[2] for name in ("1", "2,2,2")}


def gradient(kind, name):
    "mean loss of a batch and the norm of its gradient"
    mesh = mesh_of(name)
    graphdef, _, initial = job(kind, mesh)
    shapes = jax.eval_shape(initial).params
    params = jax.jit(lambda: initial().params, out_shardings=param_specs(shapes, RULES, mesh))()

    def mean(params, batch):
        return nnx.merge(graphdef, params).objective(**batch)[0] / batch["mask"].sum(
            dtype="float32"
        )

    both = jax.jit(
        lambda params, batch: (lambda loss, grads: (loss, optax.tree.norm(grads)))(
            *jax.value_and_grad(mean)(params, batch)
        )
    )
    args = params, put_batch(batches(1)[0], mesh)
    return [
        float(x)
        for x in both.lower(*args).compile(compiler_options={"xla_backend_optimization_level": 0})(
            *args
        )
    ]


def kinds(*names):
    "every kind of model on one mesh and on one device"
    return {
        kind: {
            name: gradient(kind, name) for name in ("1", "2,1,2,2" if kind == "moe" else "2,2,2")
        }
        for kind in names
    }


def long_rows(*names):
    "the same, with rows that count as long: attention in blocks, divided over devices by hand"
    attention.LONG = 16
    return kinds(*names)


def checkpoints(folder):
    "saved on one mesh, restored on others: the numbers of every array, and where they lie"
    _, state, _ = train("plain", "2,2,2", 2)
    _, _, initial = job("plain", mesh_of("1"))
    shapes, differ = jax.eval_shape(initial), []
    with closing(Checkpoints(folder, asynchronous=False)) as points:
        points.save(2, {"model": state.params, "optimizer": state.opt_state, "data": {"batch": 2}})
        for name in ("1", "8,1,1", "1,8,1", "1,1,2"):
            places = state_shardings(shapes, mesh_of(name))
            want = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
            )
            got = points.restore(template={"model": want.params, "optimizer": want.opt_state})
            for old, new, place in zip(
                jax.tree.leaves((state.params, state.opt_state)),
                jax.tree.leaves((got["model"], got["optimizer"])),
                jax.tree.leaves((places.params, places.opt_state)),
            ):
                if not (np.array_equal(old, new) and new.sharding == place):
                    differ.append(name)
    np.savez(Path(folder) / "params.npz", *map(np.asarray, jax.tree.leaves(state.params)))
    return {"differ": differ}


def pretraining(folder):
    "losses of a run on one device, and of one that is stopped on eight devices and continued on one, two and eight"
    data, file = packed(), Path(folder) / "train.bin"
    data.tokens.tofile(file)
    meta = replace(data.meta, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    file.with_name("train.bin.json").write_text(json.dumps(to_json(meta)))

    def run(name, mesh, until=None, devices=8):
        training.make_mesh = lambda cfg: make_mesh(cfg, jax.devices()[:devices])

        def stop(record, state):
            if record["step"] == until:
                raise KeyboardInterrupt

        cfg = TrainConfig(
            run=f"{folder}/{name}",
            train_bin=str(file),
            val_bin="",
            tokenizer="",
            steps=4,
            log_every=1,
            mesh=mesh,
            optim=OptimConfig(warmup_steps=1),
            model=ModelConfig.tiny(**KINDS["plain"]),
            loader=LoaderConfig(seq_len=16, batch_size=16, prefetch=0),
        )
        try:
            pretrain(cfg, hooks=[stop])
        except Stopped:
            assert until
        return {
            r["step"]: r["loss"]
            for r in read_metrics(Path(folder) / str(name) / "metrics.jsonl")
            if "loss" in r
        }

    one, half = run("one", MeshConfig()), run("moved", MeshConfig(data=2, fsdp=2, tp=2), until=2)
    found = {"one": [*one.values()]}
    for devices, mesh in {1: MeshConfig(), 2: MeshConfig(data=2), 8: MeshConfig(fsdp=8)}.items():
        shutil.copytree(f"{folder}/moved", f"{folder}/{devices}")
        moved = run(devices, mesh, devices=devices)
        assert (
            [*half] == [1, 2]
            and [*moved] == [1, 2, 3, 4]
            and {step: moved[step] for step in half} == half
        )
        found[devices] = [*moved.values()]
    return found


def order(*_):
    "the rows of each batch, read by 1, 2 and 8 processes and put on as many devices"
    found = {}
    for n in (1, 2, 8):
        mesh = make_mesh(MeshConfig(data=n), jax.devices()[:n])
        assert data_shard(mesh) == (0, 1)
        parts = [
            loader(packed(), LoaderConfig(seq_len=16, batch_size=16, prefetch=0), shard=i, shards=n)
            for i in range(n)
        ]
        rows = [np.concatenate([next(part)["tokens"] for part in parts]) for _ in range(4)]
        found[n] = [
            np.asarray(put_batch({"tokens": r}, mesh)["tokens"]).sum(1).tolist() for r in rows
        ]
    return found


def decoding(*kinds):
    "greedy tokens and logits through a placed cache, on a mesh and on one device"
    found, prompts = {}, [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    for kind in kinds:
        cfg = ModelConfig.tiny(**KINDS[kind] | dict(init_std=0.3))
        params, answers, logits = (
            nnx.to_pure_dict(nnx.state(LM(cfg, nnx.Rngs(0)), nnx.Param)),
            [],
            [],
        )
        for name in ("1", "2,2,2"):
            mesh = mesh_of(name)
            graphdef = nnx.graphdef(place_rows(nnx.eval_shape(lambda: LM(cfg, nnx.Rngs(0))), mesh))  # noqa: B023
            lm = nnx.merge(graphdef, jax.device_put(params, param_specs(params, RULES, mesh)))
            answers.append(
                np.asarray(generate(lm, prompts, max_new_tokens=8, temperature=0)[0]).tolist()
            )
            cache = lm.init_cache(4, 8)
            cache = jax.device_put(cache, cache_specs(cache, RULES, mesh))
            tokens = np.arange(32, dtype=np.int32).reshape(4, 8)
            run = nnx.jit(
                lambda lm, ids, at, cache: (lambda h, c: (lm.logits(h), c))(
                    *lm.step(ids, at, cache)
                )
            )
            for t in range(8):
                out, cache = run(lm, tokens[:, t : t + 1], np.full((4, 1), t, np.int32), cache)
            logits.append(np.asarray(out))
        found[kind] = dict(
            same=answers[0] == answers[1], error=float(np.abs(logits[0] - logits[1]).max())
        )
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
