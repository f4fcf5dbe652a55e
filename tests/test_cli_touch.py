"The command line at first touch: what it says before it works, how soon, how it helps, and how it ends when somebody leaves."

import json
import os
import pty
import re
import select
import signal
import statistics
import subprocess
import sys
import time

import pytest

from nash_lab.lab import cli
from nash_lab.lab.cli import VERBS, did_you_mean, find, main, with_guess

PROGRAM = [sys.executable, "-c", "import sys; from nash_lab.lab.cli import main; sys.exit(main())"]
AB = ["--prompt", "ab", "--max-new-tokens", "2"]


def run(*args, env=(), **how):
    "The finished program."
    environment = {**os.environ, **dict(env)}
    return subprocess.run(
        [*PROGRAM, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        **how,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A run of a tiny model with random weights, and packed files of its tokenizer."
    from nash_lab.discover.prior import prior_run
    from nash_lab.discover.problems import character_tokenizer
    from nash_lab.model.transformer import LM, ModelConfig

    home = tmp_path_factory.mktemp("touch")
    words = character_tokenizer("abcdefgh \n")
    lm = LM(ModelConfig.tiny(vocab_size=words.vocab_size, residual="plain"))
    prior_run(lm, words, home / "run")
    return home


# before the work


def test_a_job_begins_with_three_short_lines(base, capsys):
    "Verb, then device, size and target, then what differs from the defaults; the JSON only when asked for."
    assert main(["generate", f"{base}/run", *AB]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "generate: continue prompts with a trained model"
    assert re.fullmatch(r"  on cpu, a model of [\d,]+ parameters", lines[1])
    assert lines[2].endswith("--prompt ab --max-new-tokens 2")
    assert lines[3].startswith("ab") and len(lines) == 4
    assert main(["generate", f"{base}/run", *AB, "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("ab")


def test_only_what_differs_is_said(tmp_path, capsys):
    "A preset by its name, a file by its values, at most eight of them; the rest is counted."
    values = {"seed": 3, "keep": 1, "log_every": 5, "eval_every": 7, "eval_batches": 1}
    more = {"checkpoint_every": 9, "val_documents": 2, "max_bad_steps": 3, "steps": 60}
    (tmp_path / "a.json").write_text(json.dumps(values | more))
    line = ["pretrain", "--config", f"{tmp_path}/a.json", "--preset", "mhc-120m"]
    assert main([*line, "--run", f"{tmp_path}/run"]) == 1  # there is no data
    first, second, third = capsys.readouterr().out.splitlines()
    assert "60 steps of 2,048 tokens" in second and second.endswith(f"to {tmp_path}/run")
    assert third.startswith("  with --preset mhc-120m") and third.endswith("and 3 more")
    assert "model.width" not in third


@pytest.mark.parametrize("verb", VERBS)
def test_dry_run_is_json_alone(verb, capsys):
    assert main([*verb.split(), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)


# help


def test_help_with_stand_ins_is_the_help(capsys):
    "The large libraries change nothing in the text of any verb, and pages are forgotten afterwards."
    code = (
        "import contextlib, io, json, sys\n"
        "from nash_lab.lab.cli import VERBS, read_job, stand_ins\n"
        "found = {}\n"
        "for verb in VERBS:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit), stand_ins():\n"
        "        read_job([*verb.split(), '--help'])\n"
        "    found[verb] = out.getvalue()\n"
        "assert 'nash_lab.train.settings' not in sys.modules and 'jax' not in sys.modules\n"
        "print(json.dumps(found))"
    )
    env = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    found = json.loads(done.stdout)
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])  # JAX is here already
        assert capsys.readouterr().out == found[verb], verb


def test_help_imports_no_large_library():
    code = (
        "import sys; from nash_lab.lab.cli import main, LARGE\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted(LARGE & set(sys.modules)), [m for m in sys.modules if m.startswith('nash_lab.train')], file=sys.stderr)"
    )
    for args in (["--help"], ["pretrain", "--help"], ["lora", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.stderr.split("\n")[-2] == "[] []", (args, done.stderr)


def test_help_comes_before_an_import_of_jax_would_have():
    "Help of a verb against importing JAX alone, in turns: less time, whatever the machine is doing."
    seconds = {"help": [], "jax": []}
    for _ in range(3):
        for name, command in (
            ("help", [*PROGRAM, "pretrain", "--help"]),
            ("jax", [sys.executable, "-c", "import jax, flax.nnx, orbax.checkpoint"]),
        ):
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            seconds[name].append(time.perf_counter() - start)
    assert statistics.median(seconds["help"]) < statistics.median(seconds["jax"])


@pytest.mark.parametrize("group", ["lora", "hf", "study"])
@pytest.mark.parametrize("form", ["{} --help", "{} -h", "help {}", "--help {}"])
def test_help_of_a_group_lists_its_verbs(group, form, capsys):
    assert main(form.format(group).split()) == 0
    out = capsys.readouterr().out
    for name in VERBS:
        assert (f"  {name} " in out) == name.startswith(f"{group} ")


def test_help_in_other_forms(capsys):
    "`nash_lab help`, `-h`, `help VERB`, a flag before --help, a verb that is a group as well"
    for line in ("--help", "-h", "help"):
        assert main([line]) == 0
        assert "study learning" in capsys.readouterr().out
    for line in (
        "help pretrain",
        "pretrain --steps 3 --help",
        "pretrain -h",
        "--debug pretrain -h",
    ):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        assert stop.value.code == 0 and "--optim.learning-rate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["discover", "--help"])
    assert "nash_lab discover arms" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert re.fullmatch(r"nash_lab \d+\.\d+.*\n", capsys.readouterr().out)


@pytest.mark.parametrize("columns", [40, 80])
def test_help_fits_the_terminal(columns):
    for args in (["--help"], ["help", "lora"], ["generate", "--help"], ["pretrain", "--help"]):
        done = run(*args, env={"COLUMNS": str(columns)})
        wide = [line for line in done.stdout.splitlines() if len(line) > columns]
        assert done.returncode == 0 and not wide, wide


# what was meant


@pytest.mark.parametrize(
    "line, says",
    [
        ("pretrain --mesh-data 2", "--mesh.data?"),
        ("pretrain --mesh_data=2", "--mesh.data?"),
        ("pretrain --lr 3", "--optim.learning-rate?"),
        ("pretrain --learning_rate 3", "--optim.learning-rate?"),
        ("pretrain --batch-size 3", "--loader.batch-size or --stream.batch-size?"),
        ("pretrain --model.widht 3", "--model.width?"),
        ("pretrain --modle.width 3", "--model.width?"),
        ("pretrain --dryrun", "--dry-run?"),
        ("pretrain --no-tie-embeddings", "--model.no-tie-embeddings?"),
        ("pretrain --nothing-like-it 3", "--help lists all flags"),
        ("generate --max-tokens 3", "--max-new-tokens?"),
        ("pretrain --model.attention gqqa", "gqa?"),
        ("pretrain --optim.name adam", "adamw?"),
        ("pretrain --preset mhc120m", "mhc-120m?"),
        ("pretrain --preset tniy", "tiny?"),
        ("trian", "pretrain?"),
        ("pre-train", "pretrain?"),
        ("evaluate", "eval?"),
        ("import", "hf import?"),
        ("lora-merge", "lora merge?"),
        ("hf_import --folder x", "hf import?"),
        ("lora mrege", "expected one of lora train, lora apply, lora merge, lora export; did you mean merge?"),
        ("study ablaton", "ablation?"),
        ("fly", "expected one of tokenizer, pack"),
        ("--steps 3", "a verb comes first"),
        ("tokenizer notes.txt", "every value follows a flag"),
    ],
)
def test_a_mistyped_line_says_what_was_meant(line, says, capsys):
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1, err


def test_a_wrong_name_that_the_work_finds(base, capsys):
    "Names of problems and benchmarks are known to their pages: nearest one, exit code 2"
    assert main(["discover", "--problem", "erdoes", "--run", f"{base}/run"]) == 2
    assert "did you mean erdos?" in capsys.readouterr().err
    message = "task 'gms8k', expected gsm8k, hellaswag, arc_easy or another of lm-eval"
    assert with_guess(message).endswith("; did you mean gsm8k?")
    for message in ("TrainConfig.steps: expected int, found '5'", "a.txt: no such file"):
        assert with_guess(message) == message


def test_switches_take_true_and_false(capsys):
    line = (
        "pretrain --dry-run --model.tie-embeddings false --loader.shuffle=False --stream.clean True"
    )
    assert main(line.split()) == 0
    job = json.loads(capsys.readouterr().out)
    found = job["model"]["tie_embeddings"], job["loader"]["shuffle"], job["stream"]["clean"]
    assert found == (False, False, True)


def test_no_suggestion_where_nothing_is_near():
    assert did_you_mean("--colour", ["--steps", "--seed"]) == ""
    assert did_you_mean("", ["--steps"]) == ""


# exit codes


@pytest.mark.parametrize(
    "line, code, says",
    [
        ("generate --top-k -1", 2, "top_k=-1: expected at least 0"),
        ("generate --temperature -0.5", 2, "temperature=-0.5"),
        ("generate --top-p 2", 2, "top_p=2.0"),
        ("generate --max-new-tokens 0", 2, "max_new_tokens=0"),
        ("generate --max-new-tokens 1.5", 2, "--max-new-tokens: no whole number: '1.5'"),
        ("lora apply --temperature -1", 2, "nash_lab lora apply: SampleConfig.temperature"),
        ("lora merge --weights 1 2", 2, "nash_lab lora merge: MergeJob.weights"),
        ("eval --batches -1", 2, "EvalJob.batches=-1"),
        ("eval --compare a.json", 2, "expected two reports"),
        ("eval --limit -1", 2, "EvalJob.limit"),
        ("hf export --shard-bytes 0", 2, "nash_lab hf export: ExportHFJob.shard_bytes=0"),
        ("pretrain --config none.json", 2, "none.json: no such file"),
        ("report --run nowhere", 2, "nowhere/config.json"),
        ("pack --tokenizer none.model", 2, "none.model"),
        ("hf import --folder nowhere", 2, "nowhere"),
        ("hf import nowhere", 2, "nowhere/config.json: no such file, so this is no model"),
        ("report nowhere", 2, "nowhere/config.json"),
        ("tokenizer --corpus.source text --corpus.paths none.txt", 2, "none.txt"),
        ("eval --compare a.json b.json", 2, "a.json"),
        ("discover --options {bad", 2, "expected a JSON object"),
        ("pack", 1, "data/tokenizer.model"),  # nobody typed that name
        ("hf export", 1, "runs/imported"),
    ],
)
def test_exit_codes(line, code, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == code
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and "Traceback" not in err, err


def test_bad_json_names_its_place(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"steps": 5,}')
    assert main(["pretrain", "--config", f"{tmp_path}/a.json"]) == 2
    assert "line 1 column" in capsys.readouterr().err


def test_a_failure_that_is_no_exception_is_one_line(capsys, monkeypatch):
    "A panic of a library written in Rust is a BaseException"

    class PanicException(BaseException):
        pass

    def panic(args, switches):
        raise PanicException("index out of bounds\nat src/lib.rs")

    monkeypatch.setattr(cli, "perform_line", panic)
    assert main(["pack"]) == 1
    err = capsys.readouterr().err
    assert err == "nash_lab pack: PanicException: index out of bounds at src/lib.rs (see --debug)\n"


# somebody leaves


def interrupted(args, after, env=(), until=""):
    "Exit code, seconds and standard error of a program that gets Ctrl-C when it has said `until`."
    environment = {**os.environ, **dict(env)}
    child = subprocess.Popen(
        [*PROGRAM, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if until:
        while until not in (line := child.stdout.readline()):
            assert line, child.stderr.read()
    time.sleep(after)
    assert child.poll() is None, child.communicate()
    start = time.perf_counter()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    return child.returncode, time.perf_counter() - start, err


SLOW = """
import ctypes, sys, time
from nash_lab.lab import cli
class Job:
    def native(self): ctypes.CDLL(None).sleep(60)           # a compiler: no bytecode until it ends
    def swallow(self):
        try: time.sleep(60)
        except KeyboardInterrupt: time.sleep(60)             # an import that catches everything
def work(args, switches):
    print("working", flush=True)
    getattr(Job(), args[0])()
cli.perform_line = work
sys.argv = ["nash_lab", *sys.argv[1:]]
sys.exit(cli.main())
"""


@pytest.mark.parametrize("kind", ["native", "swallow"])
def test_ctrl_c_ends_what_does_not_listen(kind):
    "In a call that runs no Python, and where somebody catches the interrupt: 130 within 5 s, one line"
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "working\n"
    time.sleep(0.3)
    start = time.perf_counter()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130 and time.perf_counter() - start < 6
    assert err == "nash_lab: interrupted\n"


def test_ctrl_c_while_importing_and_working(base):
    "During the imports, and in a generation that would go on: one line, 130, within 5 s"
    code, seconds, err = interrupted(["pack"], 0.5)
    if code != 1:  # it may have come to its missing tokenizer
        assert code == 130 and err == "nash_lab pack: interrupted\n" and seconds < 6, err
    line = ["generate", f"{base}/run", "--prompt", *["ab"] * 20000, "--max-new-tokens", "40"]
    code, seconds, err = interrupted(line, 1.0, until="  with ")
    assert err == "nash_lab generate: interrupted\n"
    assert code == 130 and seconds < 6


def test_a_second_ctrl_c_changes_nothing(base):
    line = ["generate", f"{base}/run", "--prompt", *["ab"] * 20000, "--max-new-tokens", "40"]
    child = subprocess.Popen(
        [*PROGRAM, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "  with " not in child.stdout.readline():
        pass
    time.sleep(0.5)
    for _ in range(3):
        child.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, err = child.communicate(timeout=30)
    assert err == "nash_lab generate: interrupted\n"
    assert child.returncode == 130


@pytest.mark.parametrize(
    "args", [["--help"], ["pretrain", "--help"], ["pretrain", "--dry-run"], ["doctor"]]
)
def test_a_closed_pipe_is_silent(args):
    "`nash_lab ... | head -c 1`, and a reader that is gone before the first byte"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, *args], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert done.stderr == "" and done.returncode == 141
    both = subprocess.run(
        ["bash", "-c", '"$@" 2>&1 | head -c 1', "bash", *PROGRAM, *args],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert len(both.stdout) == 1 and both.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_stream_that_is_closed(closed):
    "As some supervisors start a program: the work is done, and says what it can where it can"
    for args, code in ((["pretrain", "--dry-run"], 0), (["pretrian"], 2)):
        done = subprocess.run(
            ["bash", "-c", f'"$@" {closed}', "bash", *PROGRAM, *args],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code
        assert "Error" not in done.stderr and len(done.stderr.splitlines()) == (
            code == 2 and closed == ">&-"
        )


ASCII = {
    "PYTHONIOENCODING": "ascii",
    "LC_ALL": "C",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "COLUMNS": "40",
}


def test_an_ascii_terminal(base):
    "Help, errors, results and text that has no ASCII form: nothing fails for the sake of a letter"
    for args, code in (
        (["generate", "--help"], 0),
        (["generate", "--rün", "é"], 2),
        (["lora", "-h"], 0),
    ):
        done = run(*args, env=ASCII)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert (done.stdout + done.stderr).isascii()
    done = run("generate", f"{base}/run", "--prompt", "é ab", "--max-new-tokens", "2", env=ASCII)
    assert done.returncode == 0 and "\\xe9 ab" in done.stdout, done.stderr


def test_a_terminal_without_colours():
    "On a real terminal that wants no colour there is no escape sequence"
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "60"}
    done = subprocess.Popen([*PROGRAM, "generate", "--help"], stdout=child, stderr=child, env=env)
    os.close(child)
    text = b""
    while select.select([parent], [], [], 30)[0]:
        try:
            data = os.read(parent, 4096)
        except OSError:
            break
        if not data:
            break
        text += data
    os.close(parent)
    assert done.wait(timeout=30) == 0 and b"--top-k" in text and b"\x1b" not in text


# places to write


def test_a_home_that_cannot_be_written_to(base, tmp_path):
    "No warning of a plotting library or of JAX, no folder named ~, nothing kept"
    home = tmp_path / "home"
    home.write_text("a file, so nothing can be made below it")
    env = {"HOME": str(home)}
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "MPLCONFIGDIR"):
        env[name] = ""
    command = [*PROGRAM, "generate", f"{base}/run", "--prompt", "ab", "--max-new-tokens", "2"]
    environment = {k: v for k, v in {**os.environ, **env}.items() if v}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]


def cached(base, tmp_path, *args, **env):
    "Output of a generation whose compiled programs go where its environment says."
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **env}
    environment = {k: v for k, v in environment.items() if v}
    line = ["generate", f"{base}/run", "--prompt", "ab", "--max-new-tokens", "4", *args]
    done = subprocess.run([*PROGRAM, *line], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_compiled_programs_are_kept(base, tmp_path):
    "In the user's cache, by kind of processor; the second command writes the same and compiles no model anew"
    own = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = cached(base, tmp_path, **own)
    files = {p for p in (tmp_path / "cache/nash_lab/jax").rglob("*-cache")}
    assert files and all(re.fullmatch(r"\w+-[0-9a-f]{8}", p.parent.name) for p in files)
    stamps = {p: p.stat().st_mtime_ns for p in files}
    assert cached(base, tmp_path, **own) == first
    again = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache/nash_lab/jax").rglob("*-cache")}
    assert stamps.items() <= again.items()
    assert all("threefry" in p.name for p in again.keys() - stamps.keys())  # keys of the draw


def test_the_cache_of_the_user_goes_first_and_can_be_switched_off(base, tmp_path):
    mine = tmp_path / "mine"
    cached(base, tmp_path, JAX_COMPILATION_CACHE_DIR=str(mine))
    assert any(mine.iterdir())
    cached(base, tmp_path, "--no-cache", JAX_COMPILATION_CACHE_DIR="")
    cached(base, tmp_path, JAX_COMPILATION_CACHE_DIR="", JAX_ENABLE_COMPILATION_CACHE="false")
    assert not list((tmp_path / "cache").rglob("*-cache"))


# doctor


def test_doctor_prints_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--no-sandbox", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[:18].strip() for line in lines]
    wanted = {"python", "nash_lab", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint"}
    wanted |= {"jax with flax", "device", "processors", "memory", "disk", "compiled programs"}
    assert wanted <= set(names)
    assert all(line[19:26].strip() in ("ok", "note", "absent", "BROKEN", "") for line in lines[1:])


def test_doctor_fails_when_something_is_broken(monkeypatch, capsys):
    doctor = find("lab.doctor:DoctorJob")
    module = sys.modules[doctor.__module__]
    real = module.importlib.metadata.version
    old = lambda name: "0.9.0" if name == "flax" else real(name)
    monkeypatch.setattr(module.importlib.metadata, "version", old)
    assert main(["doctor", "--no-sandbox"]) == 1
    out, err = capsys.readouterr()
    assert "BROKEN  0.9.0, needs" in out and err == "nash_lab doctor: broken: flax\n"


@pytest.mark.parametrize(
    "jax, flax, state",
    [
        ("0.10.2", "0.12.8", "ok"),
        ("0.11.1", "0.12.8", "BROKEN"),
        ("0.11.1", "0.12.9", "ok"),
        ("0.11.2", "0.12.9", "BROKEN"),
        ("0.12.0.1", "0.12.12", "ok"),
        ("0.12.0", "0.12.9", "BROKEN"),
        ("0.7.2", "0.11.2", "BROKEN"),
        ("0.13.0", "0.12.12", "note"),
        ("0.12.0", "0.13.0", "note"),
        ("0.11.5", "0.12.10", "ok"),
    ],
)
def test_known_pairs(jax, flax, state):
    assert find("lab.doctor:check_pair")(jax, flax).state == state


def test_doctor_in_a_broken_environment(tmp_path):
    "A JAX that does not import is a row of the table, not a traceback"
    (tmp_path / "jax.py").write_text("raise ImportError('this jax is broken')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = run("doctor", "--no-sandbox", env={"PYTHONPATH": path})
    assert done.returncode == 1 and "this jax is broken" in done.stdout
    assert done.stderr == "nash_lab doctor: broken: imports\n"


# trackers and notes


@pytest.mark.parametrize(
    "variables, project, name",
    [
        ({}, "nash_lab", "first"),
        ({"WANDB_PROJECT": "mine"}, "mine", "first"),
        (
            {
                "WANDB_PROJECT": "mine",
                "WANDB_NAME": "late",
                "WANDB_TAGS": "a,b",
                "WANDB_ENTITY": "us",
            },
            "mine",
            "late",
        ),
    ],
)
def test_wandb_as_its_variables_say(variables, project, name, tmp_path):
    "WANDB_PROJECT, WANDB_NAME, WANDB_TAGS, WANDB_ENTITY and WANDB_DIR; our own names only where they are silent"
    pytest.importorskip("wandb")
    code = (
        "import json, pathlib, sys, wandb; from nash_lab.run.rundir import wandb_tracker\n"
        "log, finish = wandb_tracker(pathlib.Path('first'), {})\n"
        "job = wandb.run\n"
        "print(json.dumps([job.project, job.name, list(job.tags or ()), job.entity])); finish()"
    )
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    (tmp_path / "first").mkdir()
    (tmp_path / "elsewhere").mkdir()
    env = {**quiet, "WANDB_MODE": "offline", **variables}
    if variables:
        env["WANDB_DIR"] = str(tmp_path / "elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[0])
    assert found[:2] == [project, name]
    if "WANDB_TAGS" in variables:
        assert found[2:] == [["a", "b"], "us"]
    place = tmp_path / ("elsewhere" if variables else "first")
    assert list(place.glob("wandb/offline-run-*/*.wandb"))


def test_a_run_notes_where_programs_are_kept(monkeypatch, tmp_path):
    import jax

    from nash_lab.run.rundir import environment

    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert environment()["compiled"].endswith(tmp_path.name)
        jax.config.update("jax_compilation_cache_dir", None)
        assert environment()["compiled"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
