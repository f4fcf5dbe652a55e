"""Training processes that tests/test_faults.py stops, starves and kills: `python faults_child.py` forks one for each line on stdin.

A line is JSON: config (of the run), modes (names below, with an argument behind a colon), err (file for stderr). What comes back is a line with
the pid, and one with the exit code when it has ended. Everything is imported once, before the first fork and before JAX starts a thread."""

import functools, hashlib, json, os, resource, shutil, signal, sys, threading, time
from pathlib import Path
from flax import nnx
from nash_lab.model.generate import generate
from nash_lab.core.configs import from_json
from nash_lab.model.transformer import model_shapes
from nash_lab.run import checkpoint, guard, rundir
from nash_lab.train import pretrain
from nash_lab.train.settings import TrainConfig


def say(run):
    (Path(run) / "here").write_text("here")  # seen by the test


def deep():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C: no Python handler runs meanwhile


def forever():
    time.sleep(600)


def at_step(run, wanted, action):
    "A wrapper of `next_batch` that does `action` before the batch after step `wanted`"
    real = pretrain.next_batch

    def wrapped(job, step):
        if step == wanted:
            say(run)
            action()
        return real(job, step)

    pretrain.next_batch = wrapped


def in_step(run, wanted, action):
    "A wrapper of the compiled step that does `action` in step `wanted`, after the arrays have been donated"
    real = pretrain.compile_step

    def compiled(*args):
        step = real(*args)

        def wrapped(state, *rest):
            now = int(state.step) + 1
            out = step(state, *rest)
            if now == wanted:
                say(run)
                action()
            return out

        return wrapped

    pretrain.compile_step = compiled


def in_call(module, name, run, nth, action):
    "Does `action` when `module.name` is called for the nth time"
    real, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            say(run)
            action()
        return real(*args, **kwargs)

    setattr(module, name, wrapped)


def fill(folder, seconds):
    "Leaves no byte free on the drive of `folder`; after `seconds` (if any) it is free again"
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    if seconds:
        threading.Timer(seconds, (folder / "filler").unlink).start()


def limit(kind, value):
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def starve():
    "What the next batch needs is more than this process may have"
    limit(
        resource.RLIMIT_AS,
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (64 << 20),
    )
    bytes(1 << 30)


def generating(cfg, state):
    "A function that writes eight tokens with the weights of `state`"
    lm = nnx.merge(model_shapes(cfg.model)[0], state.params)
    return lambda: generate(lm, [[1, 2, 3]], max_new_tokens=8, temperature=0.0)


def hooks_of(cfg, modes):
    run, n = Path(cfg.run), lambda name: int(modes[name].split(",")[0])

    def hook(record, state):
        step = record["step"]
        if "pause" in modes:
            time.sleep(float(modes["pause"]))
        if "hook" in modes and step == n("hook"):
            say(run)
            forever()
        if "generate" in modes and step == n("generate"):
            write = generating(cfg, state)
            while True:
                write()
                say(run)
        if "crash" in modes and step == n("crash"):
            raise RuntimeError("crash")
        if "full" in modes and step == n("full"):
            fill(run.parent, float(modes["full"].split(",")[1]))
        if "longest" in modes and step == n("longest"):
            limit(resource.RLIMIT_FSIZE, (run / "metrics.jsonl").stat().st_size)
        if "vanish" in modes and step == n("vanish"):
            run.rename(run.parent / "elsewhere")
        if "lose" in modes and step == n("lose"):
            (run / "checkpoints").rename(run / "elsewhere")
            (run / "checkpoints").mkdir()
        if "block" in modes and step == n("block"):
            (run / "checkpoints").rename(run / "elsewhere")
            (run / "checkpoints").write_text("")

    return [hook]


def prepare(cfg, modes):
    run = cfg.run
    pretrain.PAUSES[:] = [0.2, 0.2]
    rundir.MetricsLog.pauses = (0.2, 0.2)
    if "sync" in modes:
        pretrain.Checkpoints = functools.partial(checkpoint.Checkpoints, asynchronous=False)
    if "grace" in modes:
        pretrain.Guard = functools.partial(guard.Guard, grace_s=float(modes["grace"]))
    if "compile" in modes:
        in_call(pretrain, "compile_step", run, 1, deep if modes["compile"] == "deep" else forever)
    if "data" in modes:
        at_step(run, int(modes["data"]), forever)
    if "memory" in modes:
        at_step(run, int(modes["memory"]), starve)
    if "longest" in modes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if "step" in modes:
        in_step(run, int(modes["step"]), lambda: time.sleep(1))
    if "hang" in modes:
        in_step(run, int(modes["hang"]), deep)
    if "eval" in modes:
        in_call(pretrain, "evaluate_loss", run, int(modes["eval"]), forever)
    if "save" in modes:
        in_call(checkpoint, "write_manifest", run, int(modes["save"]), lambda: time.sleep(1))


def train(job):
    signal.alarm(90)  # whatever goes wrong, no process is left
    cfg, modes = from_json(TrainConfig, job["config"]), job["modes"]
    prepare(cfg, modes)
    try:
        pretrain.pretrain(cfg, hooks=hooks_of(cfg, modes))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 1)
    return 0


def main():
    print(json.dumps({"threads": len(os.listdir("/proc/self/task"))}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if not (pid := os.fork()):
            err = os.open(job["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(err, 2)
            os.dup2(err, 1)
            os.close(0)
            os._exit(train(job))
        print(json.dumps({"pid": pid}), flush=True)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps({"exit": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:  # one job, in this very process
        job = json.loads(sys.argv[1])
        code = train(job)
        if "keep" in job and os.path.exists(job["config"]["run"]):
            shutil.copytree(job["config"]["run"], job["keep"])
        sys.exit(code)
    main()
