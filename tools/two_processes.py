"""Two processes of four virtual devices train one model; one is killed, the other notices and ends, both start again and continue exactly.

    python tools/two_processes.py          # 40 seconds; prints what it saw, exit code 1 when anything differs

The same file is the worker: `--process I` of `--processes N` with `--devices K` each, on CPU, where gloo carries the sums between processes."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, SAVE_EVERY, KILL_AFTER = 10, 3, 5


def worker(a):
    "Trains to STEPS in each of the folders `a.run`, from the newest checkpoint there; process 0 prints a line of JSON a step"
    import jax

    jax.config.update("jax_num_cpu_devices", a.devices)
    from nash_lab.train.parallel import MeshConfig, make_mesh
    from nash_lab.core.processes import ProcessConfig, initialize

    initialize(
        ProcessConfig(
            f"127.0.0.1:{a.port}", a.processes, a.process, heartbeat_s=a.heartbeat, patience_s=60
        )
        if a.processes > 1
        else ProcessConfig(detect=False)
    )
    import numpy as np
    from flax import nnx
    from nash_lab.data.corpus import PackedMeta, PackedTokens
    from nash_lab.data.loader import LoaderConfig, loader
    from nash_lab.model.transformer import LM, ModelConfig
    from nash_lab.run.checkpoint import Checkpoints
    from nash_lab.train.optim import OptimConfig, optimizer
    from nash_lab.train.parallel import (
        data_shard,
        place_rows,
        put_batch,
        replicate,
        shard_step,
        state_shardings,
    )
    from nash_lab.core.processes import gather_json, is_main_process
    from nash_lab.train.settings import joined_position, own_position
    from nash_lab.train.step import fresh_state, make_train_step

    say = lambda **line: is_main_process() and print(json.dumps(line), flush=True)
    mesh = make_mesh(MeshConfig(**json.loads(a.mesh)))
    cfg, tx = (
        ModelConfig.tiny(residual=a.residual, ffn=a.ffn),
        optimizer(OptimConfig(warmup_steps=2), STEPS),
    )
    make = lambda: LM(cfg, nnx.Rngs(0))
    graphdef, initial = (
        nnx.graphdef(place_rows(nnx.eval_shape(make), mesh)),
        lambda: fresh_state(nnx.to_pure_dict(nnx.state(make(), nnx.Param)), tx),
    )
    shapes = jax.eval_shape(initial)
    places = state_shardings(shapes, mesh)

    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, 20_001).astype(np.uint16)
    meta = PackedMeta(
        dtype="uint16",
        vocab_size=cfg.vocab_size,
        tokens=len(ids),
        documents=1,
        text_bytes=len(ids),
        tokenizer_hash="",
        sha256="made up",
        source_hashes={},
    )
    shard, shards = data_shard(mesh)
    packed, places_of = (
        PackedTokens(ids, meta, Path("made up")),
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    )
    key, step = replicate(jax.random.key(0), mesh), None

    fetch = lambda batches: put_batch(
        {k: v for k, v in next(batches).items() if k in ("tokens", "targets", "mask")}, mesh
    )
    for run in a.run.split(os.pathsep):
        batches = loader(
            packed, LoaderConfig(seq_len=32, batch_size=16, prefetch=0), shard=shard, shards=shards
        )
        points, done = Checkpoints(run, asynchronous=True), 0
        if points.latest() is None:
            state = jax.jit(initial, out_shardings=places)()
        else:
            template = jax.tree.map(places_of, shapes, places)
            got = points.restore(
                template={
                    "model": template.params,
                    "optimizer": template.opt_state,
                    "data": None,
                    "counters": None,
                }
            )
            done = got["counters"]["step"]
            batches.set_state(own_position(got["data"], jax.process_index(), jax.process_count()))
            state = shapes._replace(
                params=got["model"],
                opt_state=got["optimizer"],
                step=replicate(np.int32(done), mesh),
                skipped=replicate(np.int32(0), mesh),
            )
        say(run=run, begins=done)
        position, batch = batches.get_state(), fetch(batches)
        step = step or shard_step(make_train_step(graphdef, tx), places).lower(
            state, batch, key
        ).compile(compiler_options={"xla_backend_optimization_level": 0})
        while done < STEPS:
            state, metrics = step(state, batch, key)
            done += 1
            position, batch = batches.get_state(), fetch(batches)
            say(run=run, step=done, loss=float(metrics["loss"]).hex())
            if done % SAVE_EVERY == 0 or done == STEPS:
                points.save(
                    done,
                    {
                        "model": state.params,
                        "optimizer": state.opt_state,
                        "data": joined_position(gather_json(position)),
                        "counters": {"step": done},
                    },
                )
            if run == a.slow:
                points.wait()
                time.sleep(0.5)
        points.close()
        say(run=run, ends=done)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(run, *, processes=2, devices=4, mesh=None, **more) -> list[subprocess.Popen]:
    "The workers of one run; `more` are further flags"
    port, env = (
        free_port(),
        {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | dict(JAX_PLATFORMS="cpu"),
    )
    flags = (
        dict(
            run=run,
            port=port,
            processes=processes,
            devices=devices,
            mesh=json.dumps(dict(data=2, fsdp=2, tp=2) if mesh is None else mesh),
        )
        | more
    )
    line = [sys.executable, __file__, *(str(o) for k, v in flags.items() for o in (f"--{k}", v))]
    return [
        subprocess.Popen(
            [*line, "--process", str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def losses(lines, run) -> dict:
    "Loss by step of one run, from the lines that process 0 has printed; they begin with a brace, what libraries say does not"
    found = [json.loads(o) for o in lines if o.startswith("{")]
    return {o["step"]: o["loss"] for o in found if o["run"] == run and "step" in o}


def finish(workers, timeout=240) -> list[str]:
    "What process 0 printed; RuntimeError with the end of stderr when a worker fails"
    out = [w.communicate(timeout=timeout) for w in workers]
    if any(w.returncode for w in workers):
        raise RuntimeError(
            "\n".join(
                f"process {i} ended with {w.returncode}: {e[-2000:]}"
                for i, (w, (_, e)) in enumerate(zip(workers, out))
            )
        )
    return out[0][0].splitlines()


def main() -> int:
    with tempfile.TemporaryDirectory() as home:
        straight, broken = f"{home}/straight", f"{home}/broken"
        workers, lines = start(os.pathsep.join((straight, broken)), slow=broken, heartbeat=10), []
        for line in workers[0].stdout:
            lines.append(line)
            if len(losses(lines, broken)) >= KILL_AFTER:
                break
        whole = losses(lines, straight)
        print(f"uninterrupted: {len(whole)} steps, last loss {float.fromhex(whole[STEPS]):.6f}")
        workers[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        rest, error = workers[0].communicate(timeout=120)
        seen = losses(lines + rest.splitlines(), broken)
        why = next(
            (
                o
                for o in error.splitlines()
                if re.search("fatal error|heartbeat|closed by peer|JaxRuntimeError", o)
            ),
            "nothing said",
        )
        print(
            f"process 1 killed after step {max(seen)}; process 0 ended {time.monotonic() - killed:.1f} s later with {workers[0].returncode}: {why[:300]}"
        )

        lines = finish(start(broken))
        again = losses(lines, broken)
        print(f"restarted: continued after step {min(again) - 1}, finished step {max(again)}")
    both = seen | again
    differ = [s for s in range(1, STEPS + 1) if both.get(s) != whole.get(s)] + [
        s for s in again if s in seen and again[s] != seen[s]
    ]
    print(
        f"losses of {len(whole)} steps equal the uninterrupted run bit for bit"
        if not differ
        else f"losses differ at steps {differ}"
    )
    return int(bool(differ) or workers[0].returncode == 0 or not 1 < min(again) <= max(seen) + 1)


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind, default in (
        ("process", int, -1),
        ("processes", int, 1),
        ("port", int, 0),
        ("devices", int, 4),
        ("heartbeat", int, 100),
        ("run", str, ""),
        ("mesh", str, "{}"),
        ("slow", str, ""),
        ("residual", str, "plain"),
        ("ffn", str, "swiglu"),
    ):
        p.add_argument(f"--{name}", type=kind, default=default)
    a = p.parse_args()
    if a.process >= 0:
        worker(a)
    else:
        sys.exit(main())
