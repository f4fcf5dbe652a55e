"Every shell command of the guides works as it is printed: run in small, or read by the real command line."

import json, re, shlex, subprocess, sys, tomllib
from pathlib import Path
import pytest
from nash_lab.lab.cli import VERBS, main
from pages import ROOT

GUIDES = (
    "docs/DATA.md",
    "docs/TRAINING.md",
    "docs/TPU_SETUP.md",
    "docs/READING.md",
    "docs/SECURITY.md",
)
GUIDES += ("README.md", "CONTRIBUTING.md")
PROGRAMS = ("nash_lab", "make", "pip", "python", "git")

# what is appended to a command so that it runs in seconds, by how the command begins; the last that fits counts
TOKENIZER = "--tokenizer.vocab-size 400 --corpus.max-bytes 60000"
MODEL = (
    "--model.vocab-size 400 --model.layers 2 --model.width 32 --model.heads 2 --model.kv-heads 2 --model.head-dim 16"
    " --model.ffn-width 48 --model.compute-dtype float32 --loader.seq-len 32 --loader.batch-size 4 --steps 4"
    " --optim.warmup-steps 1 --eval-batches 2"
)
RUN = {
    "nash_lab tokenizer": TOKENIZER,
    "nash_lab tokenizer --config": "--tokenizer.vocab-size 400",
    "nash_lab tokenizer --config mix.json": "--tokenizer.vocab-size 400",
    "nash_lab tokenizer --corpus.source text": "--tokenizer.vocab-size 400",
    "nash_lab pack": "--corpus.max-bytes 60000 --corpus.holdout 0.1",
    "nash_lab pack --config": "--corpus.holdout 0.2",
    "nash_lab pack --config mix.json": "--stream.holdout 0.3 --shard-tokens 9000",
    "nash_lab pack --corpus.source text": "",
    "nash_lab pretrain --preset demo-plain": MODEL,
    "nash_lab pretrain --preset demo --model.vocab-size 32000": MODEL,
    "nash_lab generate --run runs/play": "--max-new-tokens 4",
    "nash_lab eval --run runs/play": "",
    "nash_lab pretrain --preset mhc-120m --run": MODEL,
    "nash_lab pretrain --preset mhc-120m-plain --run": MODEL,
    "nash_lab generate --run runs/first": "--max-new-tokens 4",
    "nash_lab eval --run runs/first": "",
    "nash_lab report --run runs/first": "",
    "nash_lab sdft --run runs/play": "",
    "nash_lab report --run runs/continual": "",
    "python -c": "",
}
# what is read and not run, and why
READ = {
    "nash_lab pretrain --mesh": "needs eight devices",
    "nash_lab pretrain --processes": "needs a second machine",
    "nash_lab pretrain --data": "needs the hub, or the reader's own files",
    "nash_lab eval --run runs/imported": "needs a folder of transformers and benchmarks",
    "nash_lab hf": "needs a folder of transformers; tests/test_hf.py runs it",
    "nash_lab generate --run runs/imported": "needs a folder of transformers",
    "nash_lab eval --compare": "needs two reports",
    "nash_lab sdft": "takes minutes; tests/test_cli.py runs it",
    "nash_lab discover": "takes minutes; tests/test_cli.py runs it",
    "nash_lab consolidate": "takes minutes; tests/test_cli.py runs it",
    "nash_lab probe": "needs a trained run; tests/test_cli.py runs it",
    "nash_lab gates": "needs a trained run; tests/test_gates.py runs it",
    "nash_lab pretrain --preset gpt-d12": "needs a GPU",
    "nash_lab study": "takes hours",
    "nash_lab sweep": "takes minutes; tests/test_sweep.py runs it",
    "nash_lab pretrain --preset gpt-d12-mhc --run": "needs a GPU",
    "nash_lab bench --what accelerator": "needs a GPU or TPU",
    "nash_lab preflight": "needs the TPU compiler; tests/test_preflight.py runs it",
    "make": "installs; its targets are looked up",
    "pip": "installs; its extras are looked up",
    "git": "needs the network",
}


def fenced(guide: str) -> list[tuple[str, str]]:
    "(language, text) of the fenced blocks of a guide, continued lines joined"
    text = (ROOT / guide).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [(language, re.sub(r"\\\n\s*", "", body)) for language, body in found]


def commands(guide: str) -> list[list[str]]:
    "The words of every shell command of a guide; a block without a language holds commands alone, or none"
    found = []
    for language, body in fenced(guide):
        lines = [line for line in body.splitlines() if line.strip()]
        first = lines[0].split()[0]
        if language in ("sh", "bash", "shell", "console") or (not language and first in PROGRAMS):
            for line in lines:
                for part in line.split(" && "):
                    words = shlex.split(part, comments=True)
                    if words[:1] != ["cd"]:
                        found.append(words)
                        assert words[0] in PROGRAMS, (
                            f"{guide}: {line!r} is no command that a test knows"
                        )
    return found


def fits(words: list[str], table: dict) -> str | None:
    "The last key of a table that a command begins with"
    line = " ".join(words)
    found = [key for key in table if line.startswith(key)]
    return found[-1] if found else None


def look_up(words: list[str]) -> None:
    "A target of the Makefile, or the extras of an installation"
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets, words
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(words) if words[0] == "pip" else ""):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extra in project["optional-dependencies"], words


def perform(words: list[str]) -> str:
    "Run one command in small, or have it read; how it was done"
    run = fits(words, RUN)
    if run is None:
        why = READ[fits(words, READ)]  # a KeyError is a command that neither table knows
        if words[0] != "nash_lab":
            look_up(words)
        else:
            assert main([*(w for w in words[1:] if w != "..."), "--dry-run"]) == 0, words
        return why
    small = [*words[1:], *RUN[run].split()]
    if words[0] == "python":
        subprocess.run([sys.executable, *small], check=True, capture_output=True, env=None)
    else:
        assert main(small) == 0, " ".join(small)
    return "run"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A fresh folder with a reader's own texts"
    folder = tmp_path_factory.mktemp("guides")
    (folder / "texts").mkdir()
    library = sorted(Path(json.__file__).parent.glob("*.py")) * 8
    rows = [{"text": f"# {i}\n" + p.read_text()[:3000]} for i, p in enumerate(library)]
    (folder / "texts/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "input.txt").write_text("\n\n".join(row["text"] for row in rows))
    return folder


def test_the_commands_of_the_guides(place, monkeypatch, capsys):
    "In the order of the guides, one after the other, in one folder"
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = [body for guide in GUIDES for language, body in fenced(guide) if language == "json"]
    corpus = next(body for body in settings if "corpus" in json.loads(body))
    (place / "corpus.json").write_text(corpus)
    mixture = json.loads(next(body for body in settings if "stream" in json.loads(body)))
    for source, name in zip(mixture["stream"]["sources"], ("texts", "input.txt"), strict=True):
        source |= dict(name=name, subset="", column="text")  # the reader's own in place of the hub
    (place / "mix.json").write_text(json.dumps(mixture))
    texts = [body for guide in GUIDES for language, body in fenced(guide) if language == "text"]
    examples = next(body for body in texts if '"demonstration"' in body)
    (place / "demonstrations.jsonl").write_text(examples)
    how = {}
    for guide in GUIDES:
        for words in commands(guide):
            how[" ".join(words)] = perform(words)
            error = capsys.readouterr().err
            assert "Traceback" not in error, error
    ran = [line for line, done in how.items() if done == "run"]
    assert len(ran) >= 11, ran
    assert len(list((place / "data/mix").glob("train-*.bin"))) > 1
    for folder in ("runs/first", "runs/first/plain"):
        assert (place / folder / "checkpoints/4/manifest.json").exists()
    assert "of 1 updates accepted" in (place / "runs/continual/report.html").read_text()
    assert (place / "runs/first/report.html").exists() and (place / "runs/first/eval.json").exists()
    for body in settings:
        (place / "settings.json").write_text(body)
        verb = "pretrain" if "stream" in json.loads(body) else "pack"
        assert main([verb, "--config", "settings.json", "--dry-run"]) == 0, body
    with capsys.disabled():
        print(f"\n{len(ran)} of {len(how)} commands of the guides run in small; read only:")
        for line, why in how.items():
            if why != "run":
                print(f"  {line[:70]}  ({why})")


def test_every_row_of_the_tables_is_of_use():
    "A key that no command begins with is a command that left the guides"
    said = [words for guide in GUIDES for words in commands(guide)]
    used = {fits(words, RUN) or fits(words, READ) for words in said}
    assert used == RUN.keys() | READ.keys(), (RUN.keys() | READ.keys()) - used


def test_commands_in_the_text_are_read():
    "Commands between back-ticks, but for those with a name to fill in"
    for guide in GUIDES:
        text = re.sub(r"^```.*?^```", "", (ROOT / guide).read_text(), flags=re.M | re.S)
        for line in re.findall(r"`(nash_lab [^`]+)`", text):
            words = [w for w in shlex.split(line)[1:] if w != "..."]
            missing = guide in ("README.md", "CONTRIBUTING.md") and words[0] not in " ".join(VERBS)
            if missing or any(w.isupper() or w.startswith("FILE") for w in words):
                continue  # the README says in its limits what is missing
            try:
                code = main(words if "--help" in words else [*words, "--dry-run"])
            except SystemExit as end:  # of the help
                code = end.code
            assert code == 0, f"{guide}: {line}"
