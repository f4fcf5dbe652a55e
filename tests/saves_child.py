"Times saves of 120 million parameters with two moments, 1.44 GB, in pairs: Orbax alone, and with lock and manifest. Arguments: folder, pairs, saves of Orbax as it comes."

import json, os, shutil, sys, time
from contextlib import closing
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
from nash_lab.run import checkpoint
from nash_lab.run.guard import run_lock


def main(folder, pairs, defaults):
    rng, waits, whole = np.random.default_rng(0), {}, {}
    state = {"model": {}, "optimizer": {}}
    for i in range(30):
        state["model" if i < 10 else "optimizer"][f"w{i}"] = jnp.asarray(
            rng.standard_normal((12, 1000, 1000), dtype=np.float32)
        )
    jax.block_until_ready(state)

    def timed(kind, save, wait):
        shutil.rmtree(folder / kind, ignore_errors=True)
        os.sync()  # what was deleted leaves the disk in nobody's time
        begin = time.monotonic()
        save()
        waits.setdefault(kind, []).append(time.monotonic() - begin)
        wait()
        whole.setdefault(kind, []).append(time.monotonic() - begin)

    def alone(orbax, kind, save):
        timed(
            kind,
            lambda: orbax.save(
                folder / kind, args=ocp.args.Composite(**{k: save(v) for k, v in state.items()})
            ),
            orbax.wait_until_finished,
        )

    def ours(step):
        with run_lock(folder / "ours"):
            points.save(step, state)

    plain, default = (
        checkpoint.Checkpoints(folder).orbax,
        ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler()),
    )
    with closing(checkpoint.Checkpoints(folder / "ours/points")) as points:
        for i in range(pairs):
            alone(plain, "plain", ocp.args.PyTreeSave)
            timed("ours", lambda: ours(i), points.wait)
        for i in range(defaults):
            alone(default, "default", ocp.args.StandardSave)
    print(json.dumps([waits, whole]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
