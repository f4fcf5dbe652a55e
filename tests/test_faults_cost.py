"What the guards cost: the loop beside a bare one, a save beside Orbax alone, a run whose tracker gets no answer. Timings, so never part of `make test`, and one after the other."

import http.server, json, os, shutil, socket, statistics, subprocess, sys, threading, time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
import faults_child
import jax
import pytest
import test_faults
from nash_lab.core.configs import to_json
from nash_lab.model.transformer import ModelConfig
from nash_lab.train import pretrain as module
from nash_lab.run.checkpoint import Checkpoints
from nash_lab.run.guard import Guard, Ledger, run_lock
from nash_lab.run.rundir import MetricsLog, read_metrics

HERE = Path(__file__).parent
cfg, shakespeare = test_faults.cfg, test_faults.shakespeare  # its fixtures
pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_guarded_loop_beside_a_bare_one(cfg, tmp_path, monkeypatch, capsys):
    "Tokens per second with lock, signal handlers, watchdog, ledger, positions, log and the search for bad steps: at least 98 % of those without any of it"
    from nash_lab.data.loader import LoaderConfig

    cfg = replace(
        cfg,
        run=str(tmp_path / "run"),
        steps=10_000,
        log_every=10,
        eval_every=10_000,
        checkpoint_every=10_000,
        val_bin="",
        accumulate=1,
        model=ModelConfig.tiny(vocab_size=400, width=128, residual="plain", layers=2),
        loader=LoaderConfig(seq_len=64, batch_size=16),
    )
    ratios, n = [], 30
    with closing(Checkpoints(tmp_path / "run/checkpoints")) as points:
        mesh = module.make_mesh(cfg.mesh)
        batches, _ = module.open_data(cfg, mesh)
        graphdef, key, at, _ = module.start(cfg, mesh, batches, points, Ledger())
        run = module.Run(
            cfg=replace(cfg, steps=n + 10),
            mesh=mesh,
            graphdef=graphdef,
            key=key,
            batches=batches,
            validation=None,
            checkpoints=points,
            ledger=Ledger(),
            bar=module.tqdm(disable=True),
        )
        compiled, state = module.compile_step(run, at.state), at.state
        monkeypatch.setattr(module, "compile_step", lambda run, state: compiled)
        monkeypatch.setattr(module, "save_checkpoint", lambda run, at: None)
        monkeypatch.setattr(module, "save_and_wait", lambda run, at: None)

        def bare():
            nonlocal state
            begin = time.monotonic()
            for i in range(n):
                state, metrics = compiled(state, module.next_batch(run, i), key)
                if i % 10 == 9:
                    jax.device_get(metrics)
            return time.monotonic() - begin

        def guarded():
            nonlocal state
            with (
                run_lock(tmp_path / "run"),
                Guard(tmp_path / "run", watchdog_s=1800.0) as guard,
                closing(MetricsLog(tmp_path / "run/metrics.jsonl")) as log,
            ):
                at, begin = module.Progress(10, state, batches.bookmark()), time.monotonic()
                at = module.training_loop(
                    replace(run, ledger=guard.ledger),
                    at,
                    guard,
                    lambda record, state: log.write(module.as_record(record)),
                )
                state = at.state
                return time.monotonic() - begin

        bare(), guarded()
        for i in range(14):  # neither is always the first of the two
            first, second = (bare, guarded) if i % 2 else (guarded, bare)
            times = {first: first(), second: second()}
            ratios.append(times[bare] / times[guarded])
    ratio = statistics.median(ratios)
    with capsys.disabled():
        print(
            f"\nguarded loop: {100 * ratio:.1f} % of the bare loop (median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f})"
        )
    assert ratio >= 0.98


def saves(folder, pairs, defaults, capsys, **env):
    "Runs the child; prints and returns medians: what training waits and the whole save, by kind, and the share that lock and manifest add to a save"
    r = subprocess.run(
        [sys.executable, HERE / "saves_child.py", folder, str(pairs), str(defaults)],
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    waits, whole = json.loads(r.stdout.splitlines()[-1])
    added = (
        statistics.median(b / a for a, b in list(zip(whole["plain"], whole["ours"]))[1:]) - 1
    )  # the first of each warms up
    with capsys.disabled():
        for kind in whole:
            print(
                f"\n{kind}: training waits {statistics.median(waits[kind][1:]):.3f} s, the whole save takes {statistics.median(whole[kind][1:]):.3f} s ({min(whole[kind][1:]):.2f} to {max(whole[kind][1:]):.2f})",
                end="",
            )
        print(f"\nlock and manifest add {100 * added:+.1f} % (median of {pairs - 1} pairs)")
    return *({k: statistics.median(v[1:]) for k, v in o.items()} for o in (waits, whole)), added


def test_manifest_beside_orbax_alone(tmp_path, capsys):
    "On this disk, however quick: training waits no longer, and the save is no longer than with Orbax as it comes; the share over the same plain files is printed"
    waits, whole, _ = saves(tmp_path, 9, 3, capsys)
    assert (
        waits["ours"] - waits["plain"] < 0.05 * whole["plain"]
        and whole["ours"] < 1.05 * whole["default"]
    )


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_manifest_on_a_disk_of_half_a_gigabyte_per_second(tmp_path, capsys):
    "A quick disk of a cloud machine: hashing is done by the time the disk is, so lock and manifest add less than 5 %"
    subprocess.run(
        [
            "cc",
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            tmp_path / "slow_disk.so",
            HERE / "slow_disk.c",
            "-ldl",
        ],
        check=True,
    )
    waits, whole, added = saves(
        tmp_path, 5, 0, capsys, LD_PRELOAD=str(tmp_path / "slow_disk.so"), SLOW_DISK="500"
    )
    assert whole["plain"] > 2.5, "the disk is not slow"
    assert added < 0.05 and waits["ours"] - waits["plain"] < 0.05 * whole["plain"]


# -- a tracker that nobody answers

TRACK = """import sys, time
from pathlib import Path
from nash_lab.run.rundir import Trackers
with Trackers(sys.argv[2:], Path(sys.argv[1]), {}) as trackers:
    for step in range(20): trackers(dict(step=step, loss=1.0)); time.sleep(.15)
"""


class Silent(http.server.ThreadingHTTPServer):
    "A W&B server that falls silent: before its first answer, after it, or once a run is registered"

    daemon_threads = True

    def __init__(self, when):
        super().__init__(("127.0.0.1", 0), Answer)
        self.left, self.over = dict(deaf=0, later=1, midway=1000)[when], threading.Event()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.left <= 0:
            self.server.over.wait(60)
            return
        self.server.left -= 1000 if b"upsertBucket" in asked else 1
        project = dict(id="UA==", name="nash_lab", entity=dict(id="RQ==", name="me"))
        bucket = dict(
            id="UnVuOjE=",
            name="run",
            displayName="run",
            description=None,
            config=None,
            sweepName=None,
            historyLineCount=0,
            project=project,
        )
        reply = json.dumps(
            dict(data=dict(upsertBucket=dict(inserted=True, bucket=bucket)))
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("when", ["deaf", "later", "midway"])
def test_trackers_without_an_answer(tmp_path, when):
    "From its first import to its end, a process whose tracker gets no answer takes at most 5 s longer than one without a tracker"
    pytest.importorskip("wandb")

    def seconds(env, *names):
        begin = time.monotonic()
        r = subprocess.run(
            [sys.executable, "-c", TRACK, str(tmp_path), *names],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=100,
            env=env,
        )
        assert r.returncode == 0, r.stderr
        return time.monotonic() - begin, r.stderr

    server = Silent(when)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = os.environ | dict(
        WANDB_MODE="online",
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL=f"http://127.0.0.1:{server.server_address[1]}",
    )
    try:
        alone, (took, said) = seconds(os.environ)[0], seconds(online, "wandb")
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
    assert (
        took - alone < 5
        and dict(deaf="does not answer", later="is left out", midway="finishing run")[when] in said
    ), (alone, took, said)


@pytest.mark.parametrize("where", ["deaf", "no network"])
def test_training_beside_a_tracker_out_of_reach(cfg, tmp_path, where):
    "A server that accepts and never answers, or no network at all: training ends at most 5 s later than without a tracker, and every line is in the run's own log"
    pytest.importorskip("wandb")
    alone = ["unshare", "--net"] if where == "no network" else []
    if alone and (
        not shutil.which("unshare")
        or subprocess.run([*alone, "true"], capture_output=True).returncode
    ):
        pytest.skip("no network namespaces for this user")

    def seconds(name, env, **settings):
        job, begin = (
            dict(
                config=to_json(replace(cfg, run=str(tmp_path / name), steps=20, **settings)),
                modes={},
            ),
            time.monotonic(),
        )
        r = subprocess.run(
            [*alone, sys.executable, faults_child.__file__, json.dumps(job)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=100,
            env=os.environ | env,
        )
        assert r.returncode == 0, r.stderr
        assert [row["step"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] == list(
            range(21)
        )
        return time.monotonic() - begin, r.stderr

    with socket.create_server(("127.0.0.1", 0)) as server:
        online = dict(WANDB_MODE="online", WANDB_API_KEY="0" * 40)
        if not alone:
            online["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        without, (took, said) = (
            seconds("without", {})[0],
            seconds("with", online, trackers=("wandb",)),
        )
    assert took - without < 5 and "tracker wandb" in said, (without, took, said)
