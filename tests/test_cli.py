"The command line as a shell sees it: what runs, what is refused, in one line and with which exit code."

import json, shutil, subprocess, sys
from pathlib import Path
import jax
import numpy as np
import pytest
from nash_lab.adapt.lora import LoRAConfig, init_adapter, write_peft
from nash_lab.lab.cli import VERBS, find, main, overlay
from nash_lab.core.configs import to_json
from nash_lab.lab.run import load
from nash_lab.train.pretrain import load_run
from nash_lab.train.settings import TrainConfig

SMALL = [
    "--preset",
    "tiny",
    "--model.vocab-size",
    "400",
    "--loader.seq-len",
    "32",
    "--loader.batch-size",
    "4",
    "--steps",
    "4",
    "--eval-every",
    "4",
    "--eval-batches",
    "2",
    "--optim.warmup-steps",
    "1",
    "--log-every",
    "2",
]


def data_flags(home):
    return [
        "--train-bin",
        f"{home}/train.bin",
        "--val-bin",
        f"{home}/validation.bin",
        "--tokenizer",
        f"{home}/tokenizer.model",
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tokenizer, packed data and a trained tiny model, all made by commands"
    home = tmp_path_factory.mktemp("cli")
    corpus = ["--corpus.max-bytes", "60000", "--corpus.holdout", "0.1"]
    assert (
        main(
            [
                "tokenizer",
                "--out",
                f"{home}/tokenizer.model",
                "--tokenizer.vocab-size",
                "400",
                *corpus,
            ]
        )
        == 0
    )
    assert (
        main(["pack", "--out", str(home), "--tokenizer", f"{home}/tokenizer.model", *corpus]) == 0
    )
    assert main(["pretrain", "--run", f"{home}/run", *SMALL, *data_flags(home)]) == 0
    return home


def leaves(data, at=""):
    "Nested dictionaries as one, keys joined by dots"
    if not isinstance(data, dict):
        return {at: data}
    return {
        path: value
        for name, item in data.items()
        for path, value in leaves(item, f"{at}.{name}" if at else name).items()
    }


def fails(capsys, args, code, *says):
    "The command exits with `code` and one line on stderr that holds each of `says`"
    capsys.readouterr()
    assert main([str(a) for a in args]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    for word in says:
        assert str(word) in lines[0], lines[0]


def test_run_directory(home):
    "What DESIGN promises to be in a run directory"
    run = home / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (
        rows[-1]["step"] == 4
        and {
            "loss",
            "lr",
            "grad_norm",
            "tokens",
            "tokens_per_s",
            "mfu",
            "val_loss",
            "val_bpb",
            "routing",
        }
        <= rows[-1].keys()
    )
    assert json.loads((run / "config.json").read_text())["model"]["vocab_size"] == 400
    assert (run / "environment.json").exists() and (run / "checkpoints/4/manifest.json").exists()


def test_generate_eval_report(home, capsys):
    assert (
        main(
            [
                "generate",
                "--run",
                f"{home}/run",
                "--prompt",
                "def ",
                "import ",
                "--max-new-tokens",
                "4",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "def " in out and "import " in out
    (home / "probes.jsonl").write_text('{"prompt": "def ", "target": ".", "kind": "regex"}\n')
    assert (
        main(
            [
                "eval",
                "--run",
                f"{home}/run",
                "--tables",
                "--probes",
                f"{home}/probes.jsonl",
                "--cache-dtype=int8",
                "--out",
                f"{home}/eval.json",
            ]
        )
        == 0
    )
    report = json.loads((home / "eval.json").read_text())
    assert {"uniform", "unigram", "bigram"} == report["tables"].keys() and report["probes"][
        "total"
    ] == 1
    assert f"model: {report['model']['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    assert main(["report", "--run", f"{home}/run", "--out", f"{home}/r.html"]) == 0
    assert (home / "r.html").read_text().startswith("<!doctype html>")


def test_probe(home, capsys):
    "The table, the picture and the JSON beside the run; what does not fit is refused in one line"
    run = ["probe", "--run", f"{home}/run"]
    assert main([*run, "--how", "identity", "silent", "--batches", "1"]) == 0
    said = capsys.readouterr().out
    assert "untouched: " in said and "layer 1, FFN" in said and "stream 3 silent everywhere" in said
    assert (home / "run/plots/probe.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((home / "run/probe.json").read_text())
    assert len(found["effects"]) == 5 + 4 and len(found["distance"]) == 4
    fails(capsys, [*run, "--how", "none"], 2, "none")
    fails(capsys, [*run, "--layers", "7"], 1, "no layer 7, the model has layers 0 to 1")
    fails(capsys, [*run, "--text", "def " * 99], 1, "tokens, the model reads at most 64")
    product = load(home / "run").depth_product("def f(x):", 1, 3)
    np.testing.assert_allclose(product.sum(-1), 1, atol=1e-4)
    with pytest.raises(ValueError, match="sublayers 2 to 4: the model has 0 to 3"):
        load(home / "run").depth_product("def", 2, 4)


def test_lora(home, capsys):
    "An adapter beside the weights writes what the merged run writes; what it changed can be exported again"
    run, lm = f"{home}/run", load_run(home / "run")[0]
    keys, one, two = (
        iter(jax.random.split(jax.random.key(0), 99)),
        LoRAConfig(rank=2, alpha=4),
        LoRAConfig(rank=1, alpha=2, targets=("*/up",)),
    )
    fill = lambda adapter: jax.tree.map(
        lambda x: 0.3 * jax.random.normal(next(keys), x.shape), adapter
    )
    folders = [
        str(
            write_peft(
                home / f"adapter{cfg.rank}", fill(init_adapter(lm, cfg, jax.random.key(0))), cfg, lm
            )
        )
        for cfg in (one, two)
    ]
    sampling = ["--prompt", "def ", "--max-new-tokens", "8", "--temperature", "0"]

    def text(*args):
        capsys.readouterr()
        assert main([*args, *sampling, "--quiet"]) == 0
        return capsys.readouterr().out

    beside, base = (
        text("lora", "apply", "--run", run, "--adapters", *folders),
        text("generate", "--run", run),
    )
    assert (
        main(["lora", "merge", "--run", run, "--adapters", *folders, "--out", f"{home}/merged"])
        == 0
    )
    assert beside == text("generate", "--run", f"{home}/merged") != base
    assert base == text(
        "lora", "apply", "--run", run, "--adapters", *folders, "--weights", "0", "0"
    )
    assert json.loads((home / "merged/merged.json").read_text())["adapters"] == folders
    assert (
        main(
            [
                "lora",
                "export",
                "--run",
                run,
                "--tuned",
                f"{home}/merged",
                "--out",
                f"{home}/again",
                "--lora.rank",
                "3",
            ]
        )
        == 0
    )
    assert "100.00 % of the change" in capsys.readouterr().out
    assert beside == text("lora", "apply", "--run", run, "--adapters", f"{home}/again")
    assert (
        main(
            [
                "lora",
                "export",
                "--run",
                run,
                "--adapters",
                folders[1],
                "--out",
                f"{home}/single",
                "--lora.rank",
                "1",
            ]
        )
        == 0
    )
    assert "rank 1 beside 1 linear maps, 100.00 %" in capsys.readouterr().out
    fails(
        capsys,
        ["lora", "merge", "--run", run, "--adapters", folders[0], "--out", home / "merged"],
        1,
        "there is a run already",
    )
    fails(capsys, ["lora", "export", "--run", run], 1, "either --adapters or --tuned")
    fails(capsys, ["lora", "apply", "--run", run, "--adapters", home], 1, "adapter_config.json")
    fails(capsys, ["lora", "melt"], 2, "lora apply, lora merge, lora export")


def test_rerun_of_a_finished_run_changes_nothing(home):
    "The same command again finds the run finished and changes no line of its metrics"
    before = (home / "run/metrics.jsonl").read_bytes()
    assert main(["pretrain", "--run", f"{home}/run", *SMALL, *data_flags(home)]) == 0
    assert (home / "run/metrics.jsonl").read_bytes() == before


def test_dry_run_is_a_config(tmp_path, capsys):
    "What --dry-run prints can be given back as --config; flags win over it"
    assert main(["pretrain", "--dry-run", "--steps", "77"]) == 0
    (tmp_path / "job.json").write_text(capsys.readouterr().out)
    assert (
        main(
            [
                "pretrain",
                "--dry-run",
                "--config",
                f"{tmp_path}/job.json",
                "--optim.learning-rate",
                "0.5",
            ]
        )
        == 0
    )
    job = json.loads(capsys.readouterr().out)
    assert job["steps"] == 77 and job["optim"]["learning_rate"] == 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_help_documents_every_field(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for path in leaves(to_json(find(VERBS[verb].job)())):
        assert f"--{path.replace('_', '-')}" in out or path.endswith(
            ("optim.groups", "stream.sources")
        ), path  # lists of objects come from a file


def test_preset_file_and_flags_are_checked_together(tmp_path, capsys):
    "Neither the preset nor the file need fit the defaults; a flag wins over both"
    (tmp_path / "a.json").write_text(
        '{"loader": {"seq_len": 1024}, "model": {"tie_embeddings": false}}'
    )
    assert (
        main(
            [
                "pretrain",
                "--dry-run",
                "--preset",
                "mhc-120m",
                "--config",
                f"{tmp_path}/a.json",
                "--model.layers",
                "2",
            ]
        )
        == 0
    )
    job = json.loads(capsys.readouterr().out)
    assert (
        job["model"]["width"],
        job["model"]["layers"],
        job["model"]["tie_embeddings"],
        job["loader"]["seq_len"],
    ) == (768, 2, False, 1024)


def test_bench(capsys):
    assert (
        main(
            [
                "bench",
                "--preset",
                "tiny",
                "--batch-size",
                "2",
                "--seq-len",
                "16",
                "--rounds",
                "1",
                "--steps",
                "1",
                "--new-tokens",
                "4",
            ]
        )
        == 0
    )
    assert "cached loop" in capsys.readouterr().out


def test_another_directory(home, tmp_path, monkeypatch):
    "A run keeps its tokenizer: it opens from anywhere, also when the one it was made with is gone"
    shutil.copytree(home / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--run", "run", "--max-new-tokens", "4"]) == 0
    (tmp_path / "run/tokenizer.model").write_bytes(b"junk")
    assert main(["generate", "--run", "run", "--max-new-tokens", "4"]) == 1


def test_bad_use(tmp_path, capsys):
    fails(capsys, ["pretrain", "--model.widht", "3"], 2, "--model.widht", "--model.width")
    fails(capsys, ["pretrain", "--steps", "many"], 2, "'many'")
    fails(
        capsys,
        ["pretrain", "--model.heads", "3", "--model.kv-heads", "2"],
        2,
        "heads=3",
        "kv_heads=2",
    )
    fails(capsys, ["fly"], 2, "'fly'", "pretrain")
    fails(capsys, ["pretrain", "--config"], 2, "--config needs a value")
    twice = ["pretrain", "--preset", "tiny", "--preset=demo"]
    fails(capsys, twice, 2, "--preset is given twice, expected once")
    (tmp_path / "a.json").write_text('{"modle": 1}')
    fails(
        capsys, ["pretrain", "--config", f"{tmp_path}/a.json"], 2, "a.json", "unknown key 'modle'"
    )
    (tmp_path / "a.json").write_text('{"steps": ')
    fails(capsys, ["pretrain", "--config", f"{tmp_path}/a.json"], 2, "a.json", "Expecting value")
    (tmp_path / "a.json").write_text('{"model": {"widht": 3}}')
    fails(
        capsys,
        ["pretrain", "--config", f"{tmp_path}/a.json"],
        2,
        "a.json",
        "ModelConfig",
        "'widht'",
    )
    (tmp_path / "a.json").write_text('{"optim": {"learning_rate": "fast"}}')
    fails(
        capsys,
        ["pretrain", "--config", f"{tmp_path}/a.json"],
        2,
        "a.json",
        "OptimConfig.learning_rate",
        "'fast'",
    )
    (tmp_path / "a.json").write_text("[1]")
    fails(
        capsys,
        ["pretrain", "--config", f"{tmp_path}/a.json"],
        2,
        "a.json",
        "expected a JSON object",
    )
    fails(capsys, ["generate", "--preset", "tiny"], 2, "GenerateJob holds no model")
    fails(capsys, ["generate", "--cache-dtype", "int4"], 2, "--cache-dtype", "int4")
    says = ("EvalJob.cache_dtype='int8'", "--tasks", "--probes")
    fails(capsys, ["eval", "--cache-dtype", "int8"], 2, *says)
    fails(capsys, ["pretrain", "--preset", "huge"], 2, "'huge'")
    fails(capsys, ["study", "nothing"], 2, "study ablation, study arms, study gates")
    fails(capsys, ["lora", "melt"], 2, "lora apply, lora merge, lora export")


def test_a_file_is_overlaid_unchecked_and_checked_as_a_whole(tmp_path, capsys):
    "A list of objects comes from the file; a flag mends what preset or file alone would be refused for"
    rule = {"pattern": "blocks/ffn/*", "learning_rate_scale": 0.5}
    (tmp_path / "a.json").write_text(
        json.dumps({"optim": {"groups": [rule]}, "model": {"heads": 3}, "steps": 77})
    )
    assert (
        main(
            [
                "pretrain",
                "--dry-run",
                f"--config={tmp_path}/a.json",
                "--model.kv-heads",
                "3",
                "--model.no-tie-embeddings",
            ]
        )
        == 0
    )
    job = json.loads(capsys.readouterr().out)
    assert (
        job["model"]["heads"],
        job["model"]["kv_heads"],
        job["steps"],
        job["model"]["tie_embeddings"],
    ) == (3, 3, 77, False)
    assert job["optim"]["groups"][0]["learning_rate_scale"] == 0.5
    fails(capsys, ["pretrain", "--dry-run", "--config", f"{tmp_path}/a.json"], 2, "heads=3")
    (tmp_path / "a.json").write_text(
        '{"optim": {"groups": [{"pattern": "*", "learning_rate_scale": -1.0}]}}'
    )
    fails(
        capsys,
        ["pretrain", "--config", f"{tmp_path}/a.json"],
        2,
        "GroupRule.learning_rate_scale",
        "-1.0",
    )
    (tmp_path / "a.json").write_text('{"model": {"casts": []}}')  # of a config.json of version 0.1
    assert main(["pretrain", "--dry-run", "--config", f"{tmp_path}/a.json"]) == 0
    assert TrainConfig() == overlay(TrainConfig(), to_json(TrainConfig()))


def test_nothing_imports_a_study():
    "Commands that are no study load none"
    code = "import sys, nash_lab.lab.cli as c; c.main(['bench', '--dry-run']); assert not [m for m in sys.modules if m.startswith('nash_lab.studies.')]"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "words, says",
    [
        ("bench --rounds 0", "BenchConfig.rounds=0"),
        ("bench --what speculative", "BenchConfig.run"),
        ("bench --what speed", "'speed'"),
        ("bench --ablation.seeds 0", "AblationConfig.seeds=0"),
        ("bench --ablation.vocab-size 512", "AblationConfig.vocab_size=512"),
        ("bench --ablation.attentions", "AblationConfig.attentions"),
        ("study ablation --steps 0", "Config.steps=0"),
    ],
)
def test_refused_values(words, says, capsys):
    capsys.readouterr()
    assert main(words.split()) in (1, 2)
    assert says in capsys.readouterr().err


def test_refused_by_the_page_that_does_the_work(home, capsys):
    fails(
        capsys,
        ["consolidate", "--run", f"{home}/run", "--out", f"{home}/night"],
        1,
        "no searches and no problems",
    )
    fails(capsys, ["discover"], 1, "DiscoverConfig.run")


def test_bad_data(home, tmp_path, capsys):
    "Each bad input is named before step 1, and leaves no run directory"

    def refused(*says, flags=(), code=1, **files):
        for name in (
            "train.bin",
            "train.bin.json",
            "validation.bin",
            "validation.bin.json",
            "tokenizer.model",
        ):
            shutil.copy(home / name, tmp_path)
        for change in files.values():
            change()
        fails(
            capsys,
            ["pretrain", "--run", f"{tmp_path}/run", *SMALL, *data_flags(tmp_path), *flags],
            code,
            *says,
        )
        assert not (tmp_path / "run").exists()

    bin, meta = tmp_path / "train.bin", tmp_path / "train.bin.json"

    def edit(**changes):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))

    refused("train.bin", "no packed tokens", change=bin.unlink, code=2)
    refused("train.bin.json", "missing", change=meta.unlink)
    refused("train.bin", "bytes, expected", change=lambda: bin.write_bytes(bin.read_bytes()[:-7]))
    refused("train.bin", "uint32", change=lambda: edit(dtype="uint32"))
    refused(
        "train.bin",
        "id 999 at token 0",
        change=lambda: bin.write_bytes(
            np.full(json.loads(meta.read_text())["tokens"], 999, "<u2").tobytes()
        ),
    )
    refused("train.bin", "tokenizer_hash", change=lambda: edit(tokenizer_hash="0" * 64))
    refused("vocab_size", "300", flags=["--model.vocab-size", "300"])
    refused("tokenizer.model", change=lambda: (tmp_path / "tokenizer.model").write_bytes(b"junk"))
    refused("seq_len", flags=["--loader.seq-len", "60000", "--model.max-len", "70000"])


def test_bad_corpus(tmp_path, capsys):
    fails(
        capsys,
        [
            "tokenizer",
            "--corpus.source",
            "text",
            "--corpus.paths",
            f"{tmp_path}/none.txt",
            "--out",
            f"{tmp_path}/t.model",
        ],
        2,
        "none.txt",
    )
    (tmp_path / "empty.txt").write_text("")
    fails(
        capsys,
        [
            "tokenizer",
            "--corpus.source",
            "text",
            "--corpus.paths",
            f"{tmp_path}/empty.txt",
            "--out",
            f"{tmp_path}/t.model",
        ],
        1,
        "t.model",
    )
    assert not (tmp_path / "t.model").exists()
    fails(
        capsys,
        ["pack", "--tokenizer", f"{tmp_path}/none.model", "--out", tmp_path],
        2,
        "none.model",
    )


def test_bad_run(home, tmp_path, capsys):
    fails(capsys, ["generate", "--run", f"{tmp_path}/none"], 2, "none/config.json")
    shutil.copytree(home / "run", tmp_path / "run")
    array = max(
        (p for p in (tmp_path / "run/checkpoints/4").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    array.write_bytes(array.read_bytes()[:-1])
    fails(capsys, ["generate", "--run", f"{tmp_path}/run"], 1, array.name)
    fails(capsys, ["generate", "--run", f"{home}/run", "--max-new-tokens", "100"], 1, "max_len")
    fails(
        capsys,
        ["eval", "--run", f"{home}/run", "--probes", f"{tmp_path}/none.jsonl"],
        2,
        "none.jsonl",
    )
    fails(
        capsys,
        ["pretrain", "--run", f"{home}/run", *SMALL, *data_flags(home), "--seed", "9"],
        1,
        "seed: 0 -> 9",
    )


def test_shell():
    "The installed program: exit codes, messages on stderr, a traceback only on request"
    program = Path(sys.executable).with_name("nash_lab")
    run = lambda *args: subprocess.run(
        [program, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (r := run("--help")).returncode == 0 and all(verb in r.stdout for verb in VERBS)
    r = run("pack", "--tokenizer", "none.model")
    assert r.returncode == 2 and r.stderr == "nash_lab pack: none.model: no tokenizer file here\n"
    assert run("fly").returncode == 2
    assert "Traceback" in run("pack", "--tokenizer", "none.model", "--debug").stderr
