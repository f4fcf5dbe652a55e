"""Faults that a run has to survive, seen from outside: a process is stopped, starved or killed, and what it left has to lead to the losses, bit
for bit, of a run that nothing happened to."""

import hashlib, json, math, os, random, re, shutil, signal, subprocess, sys, tempfile, time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock
import faults_child
import jax, jax.numpy as jnp, numpy as np
import pytest
from nash_lab.data.corpus import Document, PackedTokens, pack
from nash_lab.data.loader import LoaderConfig, row_count
from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
from nash_lab.core.configs import to_json
from nash_lab.model.transformer import ModelConfig
from nash_lab.run import checkpoint
from nash_lab.train import pretrain as module
from nash_lab.train import step as step_module
from nash_lab.run.checkpoint import (
    Checkpoints,
    Damaged,
    hashed_ahead,
    numbered,
    read_manifest,
    steps_in,
    verify,
    write_manifest,
)
from nash_lab.train.settings import TrainConfig
from nash_lab.run.guard import HUNG, NONFINITE, STOPPED, NonFinite, Stopped
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.pretrain import load_run, pretrain
from nash_lab.run.rundir import MetricsLog, read_metrics

pytestmark = pytest.mark.faults
slow = pytest.mark.slow
STEPS, EXACT = 60, ("step", "loss", "grad_norm", "lr", "tokens", "skipped", "val_loss", "val_bpb")


def stop_at(step=None):
    "A hook that stops a run as Ctrl-C would, at this line or at the next"

    def press(record, state):
        if step in (None, record["step"]):
            raise KeyboardInterrupt

    return press


# -- the run that nothing happens to


@pytest.fixture(scope="session")
def shakespeare() -> str:
    folder = os.environ.get("NASH_LAB_DATA")
    if folder:
        return (Path(folder) / "text/tinyshakespeare.txt").read_text()[:40_000]
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(400)]
    return " ".join(rng.choices(words, k=8000))


@pytest.fixture(scope="session")
def cfg(shakespeare, tmp_path_factory) -> TrainConfig:
    "60 steps with dropout, accumulation, masked documents and several epochs"
    home = tmp_path_factory.mktemp("faults")
    tokenizer = train_tokenizer(
        [shakespeare], home / "tokenizer.model", TokenizerConfig(vocab_size=400)
    )
    for split, begin, size in (("train", 0, 9000), ("validation", 20_000, 2000)):
        pack(
            [Document(shakespeare[i : i + 300], f"{i}") for i in range(begin, begin + size, 300)],
            tokenizer,
            home / f"{split}.bin",
            split=split,
        )
    return TrainConfig(
        run="",
        train_bin=str(home / "train.bin"),
        val_bin=str(home / "validation.bin"),
        tokenizer=str(home / "tokenizer.model"),
        steps=STEPS,
        accumulate=2,
        log_every=1,
        eval_every=20,
        eval_batches=2,
        checkpoint_every=2,
        keep=2,
        model=ModelConfig.tiny(vocab_size=400, residual="plain", dropout=0.2),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=3),
        loader=LoaderConfig(seq_len=16, batch_size=8, documents="mask"),
    )


@contextmanager
def fed(points):
    "Hashes of the batches that a run in this process takes, by step, and what an earlier process had left behind in `points` when it took the first"
    real, seen, left = module.next_batch, {}, []

    def taken(run, step):
        if not seen:
            left.extend(p.name for p in points.glob("*") if checkpoint.LEFTOVER.match(p.name))
        batch = real(run, step)
        seen[str(step + 1)] = hashlib.sha256(
            b"".join(np.asarray(batch[k]).tobytes() for k in sorted(batch))
        ).hexdigest()
        return batch

    with mock.patch.object(module, "next_batch", taken):
        yield seen, left


@pytest.fixture(scope="session")
def oracle(cfg, tmp_path_factory):
    run = tmp_path_factory.mktemp("oracle") / "run"
    with fed(run / "checkpoints") as (seen, _):
        pretrain(replace(cfg, run=str(run), checkpoint_every=20))
    (run / "fed.json").write_text(json.dumps(seen))
    return run


def lines(run):
    return [[row.get(k) for k in EXACT] for row in read_metrics(Path(run) / "metrics.jsonl")]


def state_of(cfg):
    from flax import nnx

    lm = module.LM(cfg.model, nnx.Rngs(cfg.seed))
    return module.fresh_state(
        nnx.to_pure_dict(nnx.state(lm, nnx.Param)), optimizer(cfg.optim, cfg.steps)
    )


def saved(run, step=None):
    "What a checkpoint holds: weights, optimizer, position in the data, key, and the counters that are not clocks"
    shapes = jax.eval_shape(lambda: state_of(module.saved_config(Path(run))))
    template = {
        "model": shapes.params,
        "optimizer": shapes.opt_state,
        "rng": {"key": jax.ShapeDtypeStruct((2,), jnp.uint32)},
        "data": None,
        "counters": None,
    }
    with closing(Checkpoints(Path(run) / "checkpoints")) as points:
        items = points.restore(step, template=template)
    for clock in ("time_s", "seconds"):
        del items["counters"][clock]
    return jax.tree.map(np.asarray, {k: items.pop(k) for k in ("model", "optimizer", "rng")}), items


def survives(cfg, oracle):
    "Goes on behind the newest step that verifies, with the batches of the oracle; at its end the run has the oracle's losses and its state"
    points = Path(cfg.run) / "checkpoints"
    newest = max(
        (
            s
            for s in numbered(points)
            if not damaged(points / str(s)) and read_manifest(points / str(s))["step"] == s
        ),
        default=0,
    )
    with fed(points) as (seen, left):
        pretrain(cfg)
    assert seen == {
        k: v for k, v in json.loads((oracle / "fed.json").read_text()).items() if int(k) > newest
    }, (newest, min(seen, default=None))
    assert not left, f"still there at the first step: {left}"
    assert lines(cfg.run) == lines(oracle)
    (arrays, rest), (expected, others) = saved(cfg.run), saved(oracle)
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)
    assert rest == others
    left = [
        p.name
        for p in (Path(cfg.run) / "checkpoints").iterdir()
        if checkpoint.LEFTOVER.match(p.name)
    ]
    assert not left, f"left behind: {left}"


# -- processes


class Nursery:
    "Forks training processes, one at a time"

    def __init__(self, home):
        self.home, self.count, self.child = home, 0, None
        self.server = subprocess.Popen(
            [sys.executable, faults_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )
        assert self.answer()["threads"] == 1, "a fork would lose the other threads"

    def answer(self):
        return json.loads(self.server.stdout.readline())

    def start(self, cfg, **modes):
        self.count += 1
        self.run, self.err = Path(cfg.run), self.home / f"{self.count}.err"
        (self.run / "here").unlink(missing_ok=True)
        job = dict(
            config=to_json(cfg), modes={k: str(v) for k, v in modes.items()}, err=str(self.err)
        )
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.pid = self.answer()["pid"]
        return self

    def signal(self, number):
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def end(self) -> int:
        self.code = self.answer()["exit"]
        return self.code

    def said(self):
        return self.err.read_text()

    def until(self, condition, seconds=40):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"nothing happened in {seconds} s: {self.said()[-2000:]}"
            time.sleep(0.001)

    def here(self, seconds=40):
        self.until((self.run / "here").exists, seconds)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    n = Nursery(tmp_path_factory.mktemp("processes"))
    yield n
    n.server.stdin.close()
    n.server.wait(60)


# -- 1: killed during a save

PARTS = [
    pytest.param(mode, 5, part, marks=slow) for mode in ("sync", "async") for part in "abcd"
]  # 20 of each


@pytest.mark.parametrize("mode,kills,part", [("sync", 2, ""), ("async", 2, ""), *PARTS])
def test_kill_during_a_save(cfg, oracle, nursery, tmp_path, mode, kills, part):
    "Each kill comes at a random moment of a save (another one does not count); the newest step that verifies is at most one interval behind, two if saves overlap with steps"
    random.seed(f"{mode} {kills} {part}")
    done, runs = 0, 0
    while done < kills:
        run, runs = replace(cfg, run=str(tmp_path / f"run{runs}")), runs + 1
        points = Path(run.run) / "checkpoints"
        while done < kills:
            saved = steps_in(points)[-1:] or [0]
            if saved[0] > STEPS - 8:
                break  # the rest of this run goes undisturbed
            nursery.start(run, **{mode: "", "pause": 0.01})
            wanted = saved[0] + 2 * random.randint(1, 2)  # the save of this step
            nursery.until(
                lambda: any(points.glob(f"{wanted}.partial*")) or wanted in steps_in(points)
            )
            time.sleep(random.uniform(0, 0.06))
            nursery.signal(signal.SIGKILL)
            assert nursery.end() == -signal.SIGKILL, nursery.said()
            done += any(checkpoint.LEFTOVER.match(p.name) for p in points.iterdir())
            whole = [0] + [s for s in numbered(points) if not damaged(points / str(s))]
            last = read_metrics(Path(run.run) / "metrics.jsonl")[-1]["step"]
            assert last - whole[-1] <= (2 if mode == "sync" else 4), (last, whole)
        survives(run, oracle)


def damaged(folder):
    try:
        verify(folder)
    except Damaged as error:
        return str(error)


# -- 2: SIGTERM and SIGINT

PHASES = {
    "compile": (dict(compile="sleep"), 0),
    "compiler that does not listen": (dict(compile="deep", grace=1), 0),
    "step": (dict(step=7), 7),
    "data": (dict(data=5), 5),
    "save": (dict(save=2), None),
    "validation": (dict(eval=2), 20),
    "hook": (dict(hook=5), 5),
    "hook that generates": (dict(generate=5), 5),
}

QUICK = {
    "SIGTERM-compiler that does not listen",
    "SIGTERM-data",
    "SIGTERM-validation",
    "SIGINT-step",
    "SIGINT-save",
    "SIGINT-hook",
}
CASES = [f"{number}-{phase}" for number in ("SIGTERM", "SIGINT") for phase in PHASES]


@pytest.mark.parametrize("case", [pytest.param(o, marks=() if o in QUICK else slow) for o in CASES])
def test_signal_saves_that_step(cfg, oracle, nursery, tmp_path, case):
    name, phase = case.split("-")
    (modes, step), number = PHASES[phase], getattr(signal, name)
    if name == "SIGINT":
        modes = {
            k: v for k, v in modes.items() if k != "grace"
        }  # the one that the package has, 15 s
    run = replace(cfg, run=str(tmp_path / "run"))
    nursery.start(run, **modes)
    nursery.here()
    begin = time.monotonic()
    nursery.signal(number)
    if phase == "save":
        for again in (signal.SIGINT, signal.SIGTERM):
            time.sleep(0.1)
            nursery.signal(again)  # impatience does no harm
    assert nursery.end() == STOPPED, nursery.said()
    assert time.monotonic() - begin < 25
    saved, last = (
        steps_in(tmp_path / "run/checkpoints")[-1],
        (read_metrics(tmp_path / "run/metrics.jsonl") or [{"step": 0}])[-1]["step"],
    )
    if step is None:
        assert saved >= 4 and saved == last
    else:
        assert saved == step and last in (step, step - 1, 0)
    assert "the same command continues" in nursery.said()
    survives(run, oracle)


@slow
def test_the_command_line_says_how_it_ended(cfg, tmp_path):
    "The exit code that the page of faults names, twice, and a step further each time"
    flags = dict(
        run=tmp_path / "run",
        train_bin=cfg.train_bin,
        val_bin=cfg.val_bin,
        tokenizer=cfg.tokenizer,
        preset="tiny",
        steps=100_000,
        log_every=1,
        eval_every=100_000,
        checkpoint_every=100_000,
    )
    flags |= {"model.vocab-size": 400, "loader.seq-len": 16, "loader.batch-size": 8}
    command = [
        "-c",
        "import sys; from nash_lab.lab.cli import main; sys.exit(main())",
        "pretrain",
        *(str(o) for k, v in flags.items() for o in (f"--{k.replace('_', '-')}", v)),
    ]
    steps, reached = tmp_path / "run/metrics.jsonl", 0
    for number in (signal.SIGTERM, signal.SIGINT):
        child = subprocess.Popen(
            [sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        end = time.monotonic() + 50
        while not (
            steps.exists() and (rows := read_metrics(steps)) and rows[-1]["step"] > reached + 3
        ):
            assert child.poll() is None and time.monotonic() < end and not time.sleep(0.05)
        child.send_signal(number)
        said = child.communicate(timeout=25)[1].splitlines()
        assert child.returncode == STOPPED and said[-1].endswith(
            f"stopped at step {(now := steps_in(tmp_path / 'run/checkpoints')[-1])}, saved; the same command continues"
        ), said
        assert now > reached
        reached = now


# -- 3: stop and go on, often


def test_ten_stops(cfg, oracle, tmp_path):
    "At ten random steps and at the edge of an epoch, all with accumulation and with prefetched rows"
    epoch = math.ceil(
        row_count(len(PackedTokens.open(cfg.train_bin)), cfg.loader.seq_len) / cfg.loader.batch_size
    )
    assert 1 < epoch < STEPS
    run, stops = (
        replace(cfg, run=str(tmp_path / "run")),
        sorted({epoch, *random.Random(3).sample([s for s in range(1, STEPS) if s != epoch], 10)}),
    )
    for stop in stops:
        with pytest.raises(Stopped, match=f"stopped at step {stop}, saved"):
            pretrain(run, hooks=[stop_at(stop)])
    survives(run, oracle)


# -- 4, 5: damage and strangers

SMALL = {
    "model": {
        "w": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        "b": jax.ShapeDtypeStruct((9,), jnp.float32),
    },
    "data": None,
}


def small(step):
    return {
        "model": {
            "w": np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32),
            "b": np.arange(9, dtype=np.float32) * step,
        },
        "data": {"row": step},
    }


@pytest.fixture
def two(tmp_path):
    "Checkpoints of steps 1 and 2"
    with closing(Checkpoints(tmp_path / "points", asynchronous=False)) as points:
        for step in (1, 2):
            points.save(step, small(step))
        yield points


def is_step(got, step):
    np.testing.assert_array_equal(got["model"]["w"], small(step)["model"]["w"])
    np.testing.assert_array_equal(got["model"]["b"], small(step)["model"]["b"])
    assert got["data"] == {"row": step}


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


DAMAGE = {
    "one bit": lambda b: flipped(b, len(b) * 4),
    "empty": lambda b: b"",
    "half": lambda b: b[: len(b) // 2],
    "99 %": lambda b: b[: max(len(b) * 99 // 100, 0)],
    "longer": lambda b: b + b"\0",
    "deleted": None,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_any_file(two, capsys, how):
    "Found before use, put aside by renaming, the step before is used, and the file is named"
    folder = two.folder / "2"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        if not whole:
            continue
        path.unlink() if DAMAGE[how] is None else path.write_bytes(DAMAGE[how](whole))
        is_step(two.restore(template=SMALL, repair=True), 1)
        said = capsys.readouterr().err
        assert (
            path.name in said
            and "step 1 is used instead, moved to 2.damaged" in said
            and len(said.splitlines()) == 1
        )
        shutil.move(two.folder / "2.damaged", folder)
        path.write_bytes(whole)
        is_step(two.restore(template=SMALL), 2)


def test_unreadable_file(capsys):
    "Mode 000, as somebody who is not the administrator: put aside, the step before is used, and the file is named"
    if os.geteuid():
        pytest.skip("only the administrator can become somebody else")
    with tempfile.TemporaryDirectory() as place:
        os.chown(place, 65534, 65534)
        os.seteuid(65534)
        try:
            with closing(Checkpoints(f"{place}/points", asynchronous=False)) as points:
                for step in (1, 2):
                    points.save(step, small(step))
                secret = max(
                    (p for p in (points.folder / "2").rglob("*") if p.is_file()),
                    key=lambda p: p.stat().st_size,
                )
                secret.chmod(0)
                with pytest.raises(Damaged, match=f"{secret.name}: cannot be read"):
                    verify(points.folder / "2")
                is_step(points.restore(template=SMALL, repair=True), 1)
                assert steps_in(points.folder) == [1] and (points.folder / "2.damaged").is_dir()
        finally:
            os.seteuid(0)
    said = capsys.readouterr().err
    assert (
        f"{secret.name}: cannot be read: Permission denied; step 1 is used instead, moved to 2.damaged"
        in said
    )


def test_forty_bit_flips(two, capsys):
    "None is restored as if nothing were wrong, in whichever file and bit"
    rng, files = (
        random.Random(40),
        [p for p in (two.folder / "2").rglob("*") if p.is_file() and p.stat().st_size],
    )
    for _ in range(40):
        path = (
            rng.choice(files)
            if rng.random() < 0.5
            else rng.choices(files, [p.stat().st_size for p in files])[0]
        )
        whole = path.read_bytes()
        path.write_bytes(flipped(whole, rng.randrange(8 * len(whole))))
        is_step(two.restore(template=SMALL), 1)
        path.write_bytes(whole)
    is_step(two.restore(template=SMALL), 2)
    assert len(capsys.readouterr().err.splitlines()) == 40


@pytest.mark.parametrize("how", ["rewritten", "grown", "replaced", "busy"])
def test_a_file_that_changes_after_it_was_hashed(tmp_path, how):
    "A digest taken while a save is still running counts only for a file that nobody has touched since"
    file, other = tmp_path / "7.partial.somewhere/weights", tmp_path / "other"
    file.parent.mkdir()
    with hashed_ahead(tmp_path / "7.partial", settled=0.02) as known:
        file.write_bytes(b"0" * 1000)
        end = time.monotonic() + 10
        while not known:
            assert time.monotonic() < end and not time.sleep(0.01), "never hashed"
        if how == "rewritten":
            file.write_bytes(b"1" * 1000)  # in place, and as long as before
        if how == "grown":
            file.write_bytes(b"0" * 1001)
        if how == "replaced":
            other.write_bytes(b"1" * 1000)
            os.replace(other, file)
        for i in range(1000 if how == "busy" else 0):
            file.write_bytes(b"%d" % (i % 10) * 1000)
    os.rename(file.parent, tmp_path / "7")
    write_manifest(tmp_path / "7", {"step": 7}, known)
    assert verify(tmp_path / "7")["step"] == 7


def test_all_damaged_is_no_fresh_start(cfg, tmp_path):
    run = replace(cfg, run=str(tmp_path / "run"))
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at(4)])
    log, names = (
        (tmp_path / "run/metrics.jsonl").read_bytes(),
        [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())],
    )
    for name in names:
        (tmp_path / "run/checkpoints" / name / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(
            Damaged, match="none of 2 checkpoints verifies; the newest: .*4/manifest.json"
        ):
            pretrain(run)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == log and [
        p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())
    ] == names
    for name in names:
        (tmp_path / "run/checkpoints" / name).rename(tmp_path / f"run/checkpoints/{name}.damaged")
    with pytest.raises(Damaged, match="nothing left but 2.damaged, 4.damaged"):
        pretrain(run)


def test_damaged_newest_step_and_strangers(cfg, oracle, tmp_path, capsys):
    "The run goes on from the step before; what is not a checkpoint is left alone, or put aside where a step has to go"
    run = replace(cfg, run=str(tmp_path / "run"))
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at(5)])
    points = tmp_path / "run/checkpoints"
    payload = max(
        (p for p in (points / "5").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    payload.write_bytes(flipped(payload.read_bytes(), 4000))
    (points / "99").mkdir()
    (points / "8").mkdir()
    (points / "7").write_text("a file")
    (points / "10").write_text("where a step goes")
    (points / "6.partial").mkdir()
    (points / "6.partial/x").write_text("x")
    (points / "4.orbax-checkpoint-tmp").mkdir()
    (points / "98").symlink_to(points / "4")
    shutil.copytree(points / "4", points / "97")
    os.utime(points / "4", (0, 0))
    os.utime(points / "97", (4e9, 4e9))
    capsys.readouterr()
    survives(run, oracle)
    said = capsys.readouterr().err
    assert payload.name in said and "97/manifest.json: is of step 4" in said
    assert (
        (points / "99").is_dir()
        and (points / "7").read_text() == "a file"
        and (points / "98").is_symlink()
    )
    assert (points / "10.damaged").read_text() == "where a step goes" and (
        points / "5.damaged"
    ).is_dir()


# -- 6, 7: the disk and the directory

MOUNT = ["unshare", "--mount", "--propagation", "private"]


@pytest.fixture(scope="session")
def mounts():
    if (
        not shutil.which("unshare")
        or subprocess.run([*MOUNT, "true"], capture_output=True).returncode
    ):
        pytest.skip("no mount namespaces for this user")


def on_a_drive(cfg, home, options, **modes):
    "Trains on a tmpfs that nobody else sees; the run comes back as home/kept"
    drive = home / "drive"
    drive.mkdir(exist_ok=True)
    job = dict(
        config=to_json(replace(cfg, run=str(drive / "run"))),
        modes={k: str(v) for k, v in modes.items()},
        keep=str(home / "kept"),
    )
    script = f'mount -t tmpfs -o size=64m tmpfs {drive} && {{ [ -d {home}/kept ] && cp -r {home}/kept {drive}/run; rm -rf {home}/kept; mount -o remount,{options} {drive}; exec "$@"; }}'
    command = [
        *MOUNT,
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        faults_child.__file__,
        json.dumps(job),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )


@slow
def test_full_disk_for_a_moment(cfg, oracle, mounts, tmp_path):
    "Said within that save, tried again when there is room, and nothing is lost"
    r = on_a_drive(cfg, tmp_path, "size=8m", full="10,0.3")
    assert r.returncode == 0, r.stderr
    failed = [o for o in r.stderr.splitlines() if "; saving step " in o]
    assert failed and ("No space left" in failed[0] or "RESOURCE_EXHAUSTED" in failed[0]), r.stderr
    assert 10 <= int(re.search(r"saving step (\d+)", failed[0])[1]) <= 12, failed[
        0
    ]  # full since step 10
    assert lines(tmp_path / "kept") == lines(oracle)


@slow
def test_full_disk_for_good(cfg, oracle, mounts, tmp_path):
    "One line and an end; older steps are whole, nothing of the failed save is left, and with room the run goes on"
    r = on_a_drive(cfg, tmp_path, "size=8m", full="10,0")
    assert r.returncode == 1 and r.stderr.splitlines()[-1].startswith("OSError: "), (
        r.stderr
    )  # tensorstore's own threads may complain before
    points = tmp_path / "kept/checkpoints"
    assert (
        steps_in(points)
        and steps_in(points)[-1] in (6, 8, 10)
        and all(not damaged(points / str(s)) for s in numbered(points))
    )
    assert not [p.name for p in points.iterdir() if checkpoint.LEFTOVER.match(p.name)]
    assert read_metrics(tmp_path / "kept/metrics.jsonl")[-1]["step"] <= 12
    assert on_a_drive(cfg, tmp_path, "size=64m").returncode == 0
    assert lines(tmp_path / "kept") == lines(oracle)


def test_failed_save_is_made_up_for(cfg, oracle, tmp_path, monkeypatch, capsys):
    "A save that fails in the background is reported a step or two later, not with the next one, and another step is saved in its place"
    real, calls, seen = checkpoint.write_manifest, [], []

    def fails_once(*args):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(checkpoint, "write_manifest", fails_once)
    monkeypatch.setattr(module, "PAUSES", [0, 0])
    run = replace(cfg, run=str(tmp_path / "run"), checkpoint_every=20, keep=9)

    def watch(record, state):
        time.sleep(0.02)
        if record["step"] == 39:
            seen.extend(steps_in(tmp_path / "run/checkpoints"))

    pretrain(run, hooks=[watch])
    said = capsys.readouterr().err
    assert (
        "20: checkpoint not saved: OSError: [Errno 28] No space left on device; saving step" in said
    )
    assert len(seen) == 1 and 20 < seen[0] < 39 and lines(tmp_path / "run") == lines(oracle)


@slow
def test_read_only_drive(cfg, mounts, tmp_path):
    r = on_a_drive(cfg, tmp_path, "ro")
    assert r.returncode == 1 and r.stderr.splitlines()[-1].startswith(
        "OSError: [Errno 30] Read-only file system"
    ), r.stderr


@pytest.mark.parametrize("where", ["the run", "its parent", "checkpoints"])
def test_file_in_the_place_of_a_folder(cfg, tmp_path, where):
    "Refused before step 1"
    run = tmp_path / "parent/run"
    {"the run": run, "its parent": run.parent, "checkpoints": run / "checkpoints"}[
        where
    ].parent.mkdir(parents=True, exist_ok=True)
    {"the run": run, "its parent": run.parent, "checkpoints": run / "checkpoints"}[
        where
    ].write_text("a file")
    with pytest.raises((OSError, ValueError)) as error:
        pretrain(replace(cfg, run=str(run)))
    assert (
        len(str(error.value).splitlines()) == 1
        and str(tmp_path / "parent") in str(error.value)
        and not (run / "metrics.jsonl").exists()
    )


@pytest.mark.parametrize("how", [pytest.param("lose", marks=slow), "block", "vanish"])
def test_directory_gone_midway(cfg, oracle, nursery, tmp_path, how):
    "Another folder, a file or nothing where the checkpoints were: three attempts, one clear end, nothing written elsewhere; put back, the run goes on"
    run = replace(cfg, run=str(tmp_path / "new/run"))  # neither is there before
    nursery.start(run, **{how: 9})
    assert nursery.end() == 1
    said = nursery.said().splitlines()
    assert (
        said[-1].startswith("OSError: ")
        and " not saved" in said[-1]
        and sum("trying again" in o for o in said) >= 2
    )
    points = tmp_path / "new/run/checkpoints"
    if how == "vanish":
        assert not [p for p in points.parent.rglob("*") if p.is_file()]
        shutil.rmtree(points.parent, ignore_errors=True)
        (tmp_path / "new/elsewhere").rename(points.parent)
    else:
        assert points.is_file() or not list(points.iterdir())
        points.unlink() if points.is_file() else points.rmdir()
        (tmp_path / "new/run/elsewhere").rename(points)
    survives(run, oracle)


def test_log_that_is_full(cfg, oracle, nursery, tmp_path):
    "No byte more fits into metrics.jsonl, while there is room for everything else: three attempts, one line, and with room the run goes on"
    run = replace(cfg, run=str(tmp_path / "run"), checkpoint_every=4, eval_every=20)
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at(4)])
    nursery.start(replace(run, checkpoint_every=60), longest=9)
    assert nursery.end() == 1
    assert (
        nursery.said().splitlines()[-1].startswith("OSError: ")
        and "metrics.jsonl: line not written: File too large" in nursery.said()
    )
    assert (
        read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == 9
        and steps_in(tmp_path / "run/checkpoints")[-1] == 4
    )
    survives(run, oracle)


# -- 8: not a number


def poison(cfg, monkeypatch, bad, how):
    "Gradients of the steps `bad` (counted from 0) are spoiled inside the compiled step, which knows its number by its key"
    real, base = step_module.batch_gradient, module.named_key(jax.random.key(cfg.seed), "dropout")
    keys = [jax.random.key_data(jax.random.fold_in(base, s)) for s in bad]

    def spoiled(graphdef, params, batch, key, *more):
        terms, grads = real(graphdef, params, batch, key, *more)
        now = jnp.stack([(jax.random.key_data(key) == k).all() for k in keys]).any()
        leaves, tree = jax.tree.flatten(grads)
        if how == "bfloat16":
            leaves = [
                jnp.where(now, (x.astype(jnp.bfloat16) + 3e38).astype(x.dtype) * 1e3, x)
                for x in leaves
            ]
        hit = {"one leaf": {0}, "all leaves": set(range(len(leaves)))}.get(how, set())
        leaves = [
            jnp.where(now, jnp.nan if how == "one leaf" else jnp.inf, x) if i in hit else x
            for i, x in enumerate(leaves)
        ]
        if how == "loss":
            terms = terms | {"loss": jnp.where(now, jnp.nan, terms["loss"])}
        return terms, jax.tree.unflatten(tree, leaves)

    monkeypatch.setattr(step_module, "batch_gradient", spoiled)
    module._jitted_step.cache_clear()


@pytest.fixture
def clean_cache():
    yield
    module._jitted_step.cache_clear()


@pytest.mark.parametrize(
    "how",
    [
        "one leaf",
        pytest.param("all leaves", marks=slow),
        pytest.param("loss", marks=slow),
        pytest.param("bfloat16", marks=slow),
    ],
)
def test_bad_step_changes_nothing(cfg, tmp_path, monkeypatch, clean_cache, how):
    poison(cfg, monkeypatch, [4], how)
    run = replace(cfg, run=str(tmp_path / "run"), checkpoint_every=1, keep=9, eval_every=100)
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at(6)])
    (four, before), (five, after), (six, last) = (
        saved(tmp_path / "run", step) for step in (4, 5, 6)
    )
    jax.tree.map(np.testing.assert_array_equal, five, four)
    assert [o["counters"]["skipped"] for o in (before, after, last)] == [0, 1, 1] and before[
        "data"
    ] != after["data"]
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(five), jax.tree.leaves(six)))
    row = read_metrics(tmp_path / "run/metrics.jsonl")[5]
    assert row["skipped"] == 1 and (row["grad_norm"] is None or row["loss"] is None)


@pytest.mark.parametrize("log_every", [1, pytest.param(4, marks=slow)])
def test_bad_steps_in_a_row_end_the_run(cfg, oracle, tmp_path, monkeypatch, clean_cache, log_every):
    "Steps 4 and 8 to 12 are bad: one passes, three in a row end the run at step 7, with the parameters it had there"
    poison(cfg, monkeypatch, [3, 7, 8, 9, 10, 11], "one leaf")
    run = replace(
        cfg,
        run=str(tmp_path / "run"),
        max_bad_steps=3,
        log_every=log_every,
        checkpoint_every=30,
        eval_every=100,
    )
    for _ in range(2):  # the same command ends there again
        with pytest.raises(
            NonFinite, match="steps in a row without a finite loss and gradient; stopped at step 7"
        ) as error:
            pretrain(run)
        assert error.value.exit_code == NONFINITE and steps_in(tmp_path / "run/checkpoints") == [7]
    counters = saved(tmp_path / "run")[1]["counters"]
    assert counters["step"] == 7 and counters["skipped"] == 1
    monkeypatch.undo()
    module._jitted_step.cache_clear()
    assert (
        pretrain(replace(run, log_every=1)).step == STEPS
    )  # without the poison it goes on from there


def test_bad_steps_between_two_lines(cfg, tmp_path, monkeypatch, clean_cache):
    "Steps 3 to 5 are bad, lines are written at 1, 6 and 12: the run ends at 6, and the same command goes on from there"
    poison(cfg, monkeypatch, [2, 3, 4], "one leaf")
    run = replace(
        cfg,
        run=str(tmp_path / "run"),
        steps=12,
        max_bad_steps=3,
        log_every=6,
        checkpoint_every=30,
        eval_every=100,
    )
    with pytest.raises(
        NonFinite, match="3 steps in a row without a finite loss and gradient; stopped at step 6"
    ):
        pretrain(run)
    assert (counters := saved(tmp_path / "run")[1]["counters"])["step"] == 6 and counters[
        "skipped"
    ] == 3
    assert pretrain(run).step == 12


@slow
def test_no_state_is_saved_that_is_not_finite(cfg, tmp_path):
    "A learning rate that throws finite gradients past the largest float"
    run = replace(
        cfg,
        run=str(tmp_path / "run"),
        checkpoint_every=1,
        optim=OptimConfig(learning_rate=1e39, warmup_steps=3),
    )
    with pytest.raises(NonFinite) as error:
        pretrain(run)
    assert error.value.exit_code == NONFINITE
    for step in steps_in(tmp_path / "run/checkpoints"):
        assert module.all_finite(saved(tmp_path / "run", step)[0])


# -- 17: a checkpoint that was made to hurt


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def forge(folder, change):
    "Changes files and writes a manifest that agrees, as whoever can write the folder can"
    manifest = read_manifest(folder)
    change(folder)
    (folder / "manifest.json").unlink()
    write_manifest(folder, {k: v for k, v in manifest.items() if k != "files"})


def test_nothing_is_unpickled(two, tmp_path):
    import pickle

    payload, canary = pickle.dumps(Canary(tmp_path / "canary")), tmp_path / "canary"
    objects, refused = tmp_path / "objects.npy", 0
    np.save(objects, np.array([Canary(canary)], object), allow_pickle=True)
    for name in ("model/payload.pkl", "model/array.npy", "payload"):
        data = objects.read_bytes() if name.endswith("npy") else payload
        (two.folder / "2" / name).write_bytes(data)
        with pytest.raises(Damaged, match="not in the manifest"):
            two.restore(2, template=SMALL)
        forge(two.folder / "2", lambda folder: None)
        is_step(two.restore(2, template=SMALL), 2)  # there, listed, and never opened as what it is
    for path in [
        p for p in (two.folder / "2").rglob("*") if p.is_file() and p.name != "manifest.json"
    ]:
        whole = path.read_bytes()
        forge(two.folder / "2", lambda folder: path.write_bytes(payload))
        try:
            got = two.restore(
                2, template=SMALL
            )  # numbers of its length, or a description: either refused, or read as what it says
        except ValueError as error:
            assert "\n" not in str(error) and str(two.folder / "2") in str(error)
            refused += 1
        else:
            assert {k: v.dtype for k, v in got["model"].items()} == {
                "w": np.float32,
                "b": np.float32,
            } and got["data"] == small(2)["data"]
        forge(two.folder / "2", lambda folder: path.write_bytes(whole))
    assert refused >= 4 and not canary.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "model/../../secret", ".."])
def test_names_that_lead_out(two, name):
    (two.folder / "secret").write_text("secret")
    body = read_manifest(two.folder / "2")
    body["files"][name] = {"bytes": 6, "sha256": "x"}
    text = checkpoint._text({**body, "digest": checkpoint._digest(body)})
    (two.folder / "2/manifest.json").write_text(text)
    with pytest.raises(Damaged, match="missing from the checkpoint"):
        two.restore(2, template=SMALL)


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "pipe", "manifest", "step"])
def test_links_and_pipes(two, tmp_path, kind):
    "Nothing is followed, and nothing waits for a writer that never comes"
    folder = two.folder / "2"
    (tmp_path / "secret").write_text("secret")
    if kind == "link to a file":
        (folder / "model/link").symlink_to(tmp_path / "secret")
    if kind == "link to a folder":
        shutil.move(folder / "model", tmp_path / "model")
        (folder / "model").symlink_to(tmp_path / "model")
    if kind == "pipe":
        os.mkfifo(folder / "model/pipe")
    if kind == "manifest":
        shutil.move(folder / "manifest.json", tmp_path / "m")
        (folder / "manifest.json").symlink_to(tmp_path / "m")
    if kind == "step":
        shutil.move(folder, tmp_path / "step")
        folder.symlink_to(tmp_path / "step")
    begin = time.monotonic()
    is_step(two.restore(template=SMALL), 1)
    assert time.monotonic() - begin < 5


def test_deep_and_huge_manifests(two):
    for text in (
        "[" * 200_000,
        '{"digest": ' * 50_000,
        '{"step": NaN}',
        "null",
        "{}",
        '{"digest": 3}',
        "\ufeff{}",
        "\0" * 100,
    ):
        (two.folder / "2/manifest.json").write_text(text)
        with pytest.raises(Damaged, match="manifest.json"):
            two.restore(2, template=SMALL)
    with open(two.folder / "2/manifest.json", "wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    with pytest.raises(Damaged, match="manifest.json"):
        two.restore(2, template=SMALL)
    is_step(two.restore(template=SMALL), 1)


READ = """import json, resource, sys, jax, jax.numpy as jnp
from nash_lab.run.checkpoint import Checkpoints, Damaged
jnp.zeros(3).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: Checkpoints(sys.argv[1]).restore(2, template=dict(model=dict(w=jax.ShapeDtypeStruct(json.loads(sys.argv[2]), jnp.float32))))
except Damaged as error: print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, 'MiB more')
"""


def test_a_file_that_unpacks_to_two_gigabytes(two):
    "Two megabytes on the disk, a manifest that agrees: refused by what the array says of itself, in bounded memory"
    import zlib

    array = two.folder / "2/model/w"

    def pack(folder):
        about, press = json.loads((array / ".zarray").read_text()), zlib.compressobj(9)
        (array / ".zarray").write_text(
            json.dumps(about | dict(compressor=dict(id="zlib", level=9)))
        )
        piece = next(path for path in array.iterdir() if path.name != ".zarray")
        with piece.open("wb") as file:
            for _ in range(32):
                file.write(press.compress(bytes(1 << 26)))
            file.write(press.flush())
        assert piece.stat().st_size < 3e6

    forge(two.folder / "2", pack)
    shape = json.dumps(SMALL["model"]["w"].shape)
    r = subprocess.run(
        [sys.executable, "-c", READ, str(two.folder), shape],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=50,
    )
    said, more = r.stdout.splitlines()
    assert (
        "w/.zarray: not the description of an array in plain files" in said
        and int(more.split()[0]) < 100
    ), r.stderr


def test_tensors_with_a_lying_header(tmp_path):
    "Of an adapter, and of a model in HuggingFace's layout: one line that names the file, and no memory for what the header claims"
    import resource
    from flax import nnx
    from nash_lab.adapt.hf import load_hf, save_hf
    from nash_lab.adapt.lora import LoRAConfig, init_adapter, read_peft, write_peft

    lm, lora = (
        module.LM(ModelConfig.tiny(vocab_size=400, residual="plain"), nnx.Rngs(0)),
        LoRAConfig(rank=2),
    )
    adapter, model = (
        write_peft(tmp_path / "adapter", init_adapter(lm, lora, jax.random.key(0)), lora, lm),
        save_hf(lm, tmp_path / "model"),
    )
    for folder, read in (
        (adapter, lambda: read_peft(adapter, lm)),
        (model, lambda: load_hf(model)),
    ):
        read()
        before, file = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            next(Path(folder).glob("*.safetensors")),
        )
        for head in (
            (1 << 63).to_bytes(8, "little"),
            (1 << 40).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"[]",
            b"",
            b"\x80\x05",
        ):
            file.write_bytes(head + b"x" * 100 * bool(head))
            with pytest.raises(ValueError, match=f"{file.name}: ") as error:
                read()
            assert "\n" not in str(error.value)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_shape_that_the_template_does_not_have(two):
    "What the description says is not believed: arrays are read in the shape that is asked for, or not at all"
    body = read_manifest(two.folder / "2")
    body["items"]["model"]["w"] = "float32[1000000,1000000]"
    (two.folder / "2/manifest.json").write_text(
        checkpoint._text({**body, "digest": checkpoint._digest(body)})
    )
    with pytest.raises(ValueError, match="model/w: the checkpoint has"):
        two.restore(2, template=SMALL)


# -- 20 to 22: two of them, clocks, another config


def test_second_process_is_refused(cfg, nursery, tmp_path):
    run = replace(cfg, run=str(tmp_path / "run"))
    nursery.start(run, data=3)
    nursery.here()
    begin = time.monotonic()
    with pytest.raises(
        ValueError,
        match=f'this run is being written by {{"pid": {nursery.pid}, "host": ".*", "start": ',
    ):
        pretrain(run)
    assert time.monotonic() - begin < 2
    nursery.signal(signal.SIGKILL)
    nursery.end()
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at()])  # the lock went with its holder


@slow
def test_clocks_do_not_matter(cfg, oracle, tmp_path, monkeypatch):
    "Files from 1970 and 2099, and a clock that is set back an hour in the middle"
    run, real = replace(cfg, run=str(tmp_path / "run")), time.time
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at(6)])
    for i, path in enumerate(sorted((tmp_path / "run/checkpoints").rglob("*"))):
        os.utime(path, (0, 0) if "6" in path.parts[-1] or i % 2 else (4.08e9, 4.08e9))
    begin = real()
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * (real() > begin + 0.2))
    survives(run, oracle)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert all(row["tokens_per_s"] > 0 for row in rows[1:]) and all(
        a["time_s"] <= b["time_s"] for a, b in zip(rows, rows[1:])
    )


def test_changed_config(cfg, tmp_path):
    run = replace(cfg, run=str(tmp_path / "run"), eval_every=100)
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at(4)])
    other = replace(run.loader, seed=5)
    changes = {
        "seed: 0 -> 1": dict(seed=1),
        "model.width: 32 -> 64": dict(model=replace(cfg.model, width=64)),
        "optim.schedule: cosine -> wsd": dict(optim=replace(cfg.optim, schedule="wsd")),
        "loader.seed: 0 -> 5": dict(loader=other),
        "steps: 60 -> 70": dict(steps=70),
    }
    for said, change in changes.items():
        with pytest.raises(
            ValueError, match=f"made with other settings: .*{said}.*--allow-changes"
        ):
            pretrain(replace(run, **change))
    with pytest.raises(ValueError, match="the checkpoint has"):
        pretrain(replace(run, model=replace(cfg.model, width=64), allow_changes=True))
    assert (
        json.loads((tmp_path / "run/config.json").read_text())["model"]["width"] == 32
        and not (tmp_path / "run/changes.jsonl").exists()
    )
    new = replace(
        run, loader=other, steps=8, optim=replace(cfg.optim, learning_rate=5e-3), allow_changes=True
    )
    assert pretrain(new).step == 8
    recorded = json.loads((tmp_path / "run/changes.jsonl").read_text())
    assert (
        recorded["step"] == 4
        and "steps: 60 -> 8" in recorded["changes"]
        and any("the new data is read from its beginning" in o for o in recorded["changes"])
    )


def test_another_tokenizer(cfg, shakespeare, tmp_path):
    "Trained and packed anew under the same names: refused, unless changes are allowed. Exchanged within the run: refused by whoever loads it"
    copied = {
        field: shutil.copy(getattr(cfg, field), tmp_path)
        for field in ("train_bin", "val_bin", "tokenizer")
    }
    for field in ("train_bin", "val_bin"):
        shutil.copy(getattr(cfg, field) + ".json", tmp_path)
    run, own = (
        replace(cfg, run=str(tmp_path / "run"), eval_every=100, **copied),
        tmp_path / "run/tokenizer.model",
    )
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at(4)])
    other = train_tokenizer(
        [shakespeare[::-1]], copied["tokenizer"], TokenizerConfig(vocab_size=400)
    )
    for split, field in (("train", "train_bin"), ("validation", "val_bin")):
        pack(
            [Document(shakespeare[i : i + 300], f"{i}") for i in range(0, 9000, 300)],
            other,
            copied[field],
            split=split,
        )
    with pytest.raises(ValueError, match="checkpoints/4: made with another tokenizer"):
        pretrain(run)
    with pytest.raises(ValueError, match="tokenizer: .* -> .*elsewhere"):
        pretrain(
            replace(run, tokenizer=shutil.copy(copied["tokenizer"], tmp_path / "elsewhere.model"))
        )
    assert load_run(run.run)[1] == run
    first = own.read_bytes()
    own.write_bytes(Path(copied["tokenizer"]).read_bytes())
    with pytest.raises(ValueError, match="checkpoints/4: made with another tokenizer"):
        load_run(run.run)
    own.write_bytes(first)
    assert pretrain(replace(run, steps=6, allow_changes=True)).step == 6
    assert (
        own.read_bytes() == Path(copied["tokenizer"]).read_bytes()
        and load_run(run.run)[1].steps == 6
    )


@slow
def test_config_of_an_older_version(cfg, oracle, tmp_path):
    "Fields that did not exist then have their defaults, and the run goes on"
    run = replace(cfg, run=str(tmp_path / "run"))
    with pytest.raises(Stopped):
        pretrain(run, hooks=[stop_at(4)])
    path = tmp_path / "run/config.json"
    old = json.loads(path.read_text())
    for name in ("max_bad_steps", "watchdog_s", "allow_changes"):
        del old[name]
    path.write_text(json.dumps(old))
    survives(run, oracle)


# -- 25, 26: a hang, and a cut line


def test_hang_is_ended_and_explained(cfg, oracle, nursery, tmp_path):
    run = replace(cfg, run=str(tmp_path / "run"))
    nursery.start(replace(run, watchdog_s=4.0), hang=7)
    nursery.here()
    begin = time.monotonic()
    assert nursery.end() == HUNG
    assert time.monotonic() - begin < 10
    for text in (nursery.said(), (tmp_path / "run/stacks.txt").read_text()):
        assert "thread MainThread" in text and "pbkdf2" in text
    assert "step did not end in 4 s" in nursery.said()
    survives(run, oracle)


def test_reading_fails_inside_a_run(cfg, oracle, tmp_path):
    "In the thread that reads ahead: the error comes out within ten seconds, and the checkpoints are whole"
    run, real, calls = replace(cfg, run=str(tmp_path / "run")), PackedTokens.check_unchanged, []

    def failing(self):
        calls.append(time.monotonic())
        if len(calls) == 25:
            raise OSError(5, "Input/output error")
        return real(self)

    with (
        mock.patch.object(PackedTokens, "check_unchanged", failing),
        pytest.raises(OSError, match="Input/output error"),
    ):
        pretrain(run)
    assert (
        time.monotonic() - calls[24] < 10 and 0 < steps_in(tmp_path / "run/checkpoints")[-1] <= 25
    )
    survives(run, oracle)


def test_no_memory_inside_a_run(cfg, oracle, nursery, tmp_path):
    "A limit for the process, and a batch that does not fit: it ends within ten seconds, and the checkpoints are whole"
    run = replace(cfg, run=str(tmp_path / "run"))
    nursery.start(run, memory=9)
    nursery.here()
    begin = time.monotonic()
    assert nursery.end() == 1 and "MemoryError" in nursery.said()
    assert time.monotonic() - begin < 10
    survives(run, oracle)


def test_line_cut_at_every_byte(tmp_path):
    rows = [{"step": s, "loss": math.exp(-s), "note": "é"} for s in range(4)]
    log = MetricsLog(tmp_path / "whole.jsonl")
    for row in rows:
        log.write(row)
    log.close()
    whole = (tmp_path / "whole.jsonl").read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        assert read_metrics(tmp_path / "cut.jsonl") == rows[:3]
        log = MetricsLog(tmp_path / "cut.jsonl", 3)
        log.write(rows[3])
        log.close()
        assert (tmp_path / "cut.jsonl").read_bytes() == whole


# -- 27, 28: killed between any two operations on files

KILLER = """
import os, shutil, sys
from pathlib import Path
from nash_lab.run import checkpoint
action, place, template = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
def ending(real):
    def wrapped(*args, **kwargs):
        left[0] -= 1
        if not left[0]: os._exit(9)
        return real(*args, **kwargs)
    return wrapped
def halves(a, b):
    with open(b, 'wb') as file: file.write(Path(a).read_bytes()[:os.path.getsize(a) // 2])
    tick()
    return shutil.copyfile(a, b)
def copying(a, b):
    shutil.copytree(a, b, copy_function=halves)
    shutil.rmtree(a)
for n in range(1, 500):
    shutil.copytree(template, home := place / str(n))
    if not (pid := os.fork()):
        left = [n]
        tick = ending(lambda: None)
        if action == 'publish': os.rename = copying
        for name in ('rename', 'replace', 'unlink', 'rmdir', 'mkdir'): setattr(os, name, ending(getattr(os, name)))
        if action == 'prune': checkpoint.prune(home, None, 1, 3)
        else: checkpoint._publish(home / '3.partial', home / '3')
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0: break
print(n)
"""


def killed(action, place, template) -> int:
    "Runs `action` on copies of `template`, ending the process before the first, second, ... change to the file system; how many there were"
    place.mkdir()
    r = subprocess.run(
        [sys.executable, "-c", KILLER, action, str(place), str(template)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert r.returncode == 0, r.stderr
    return int(r.stdout)


@pytest.fixture
def three(tmp_path):
    with closing(Checkpoints(tmp_path / "template", keep=9, asynchronous=False)) as points:
        for step in (1, 2, 3):
            points.save(step, small(step))
        yield points


def test_kill_at_each_deletion(three, tmp_path):
    "At no moment is there less than one checkpoint that verifies, and what is left half deleted is gone after the next start"
    count = killed("prune", tmp_path / "killed", three.folder)
    assert count > 10
    for n in range(1, count + 1):
        folder = tmp_path / f"killed/{n}"
        assert [s for s in numbered(folder) if not damaged(folder / str(s))][-1] == 3
        three.folder = folder
        is_step(three.restore(template=SMALL), 3)
        assert all(not damaged(folder / str(s)) for s in numbered(folder))
        three.take_over()
        assert {p.name for p in folder.iterdir()} <= {"1", "2", "3"}


def test_drive_that_copies_instead_of_renaming(three, tmp_path, capsys):
    "Killed after each file and half file of the copy, and of the deletion behind it: the manifest decides"
    (three.folder / "3").rename(three.folder / "3.partial")
    count = killed("publish", tmp_path / "killed", three.folder)
    assert count > 30
    used = []
    for n in range(1, count + 1):
        folder = tmp_path / f"killed/{n}"
        three.folder = folder
        three.take_over()
        got = three.restore(template=SMALL, repair=True)
        used.append(got["data"]["row"])
        is_step(got, used[-1])
    assert set(used) == {2, 3} and used[-1] == 3


# -- 29: secrets


@slow
def test_no_secret_is_written(cfg, tmp_path):
    "Neither values of the environment nor the home directory, where program, data and run lie, in checkpoints, logs, reports of a hang or messages"
    home = tmp_path / "home-27182818"
    home.mkdir()
    program = shutil.copy(faults_child.__file__, home)
    names = {
        field: Path(shutil.copy(getattr(cfg, field), home)).name
        for field in ("train_bin", "val_bin", "tokenizer")
    }
    for field in ("train_bin", "val_bin"):
        shutil.copy(getattr(cfg, field) + ".json", home)
    env = os.environ | dict(HOME=str(home), HF_TOKEN="token-31415926", WANDB_API_KEY="key-14142135")
    outputs = ""
    for i, modes in enumerate((dict(crash="5"), dict(hang="5"), dict(data="5"))):
        run = replace(cfg, run=f"run{i}", watchdog_s=3.0, **names)
        r = subprocess.run(
            [sys.executable, program, json.dumps(dict(config=to_json(run), modes=modes))],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            env=env,
            cwd=home,
        )
        assert r.returncode == (1 if "crash" in modes else HUNG), r.stderr
        if "crash" not in modes:
            assert "~/faults_child.py" in r.stderr, "the stacks name no file in the home directory"
        outputs += r.stdout + r.stderr
        for path in (home / run.run).rglob("*"):
            if path.is_file():
                outputs += path.read_bytes().decode("latin-1")
    for secret in ("home-27182818", "token-31415926", "key-14142135"):
        assert secret not in outputs, outputs[max(0, outputs.index(secret) - 500) :][:1000]
