"Text as it comes from other systems and other tools: marks, line ends, hidden files, packed files, Parquet of many shapes, one long text."

import codecs, contextlib, gzip, json, os, shutil, signal, subprocess, sys, tempfile, time
from dataclasses import replace
from itertools import islice
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nash_lab.core.files import read_json, read_rows, read_text, split_records
from nash_lab.data.corpus import (
    LONG_DOCUMENT,
    CorpusConfig,
    CorpusReport,
    PackedTokens,
    documents,
    split_of,
    validation_start,
)
from nash_lab.data.sources import Source, SourceConfig, local_files, text_rows
from nash_lab.data.stream import Documents, StreamConfig, stream_documents
from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
from nash_lab.discover.problems import code_problems


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def message(call, kind=ValueError) -> str:
    with pytest.raises(kind) as e:
        call()
    assert "\n" not in str(e.value), "an error is one line"
    return str(e.value)


def packed(codec, data):
    if codec == "gz":
        return gzip.compress(data)
    return pa.compress(data, codec="zstd", asbytes=True) if codec == "zst" else data


def read(path, **how):
    return list(Source(SourceConfig(str(path), **how), epochs=1))


# ---- one reader

TEXT = "one\u2028still \u2029 one \x85 and \x0b \x0c \x1c \r too"  # none of these ends a line


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("codec", ["", "gz", "zst"])
def test_one_reader_for_every_text(tmp_path, mark, end, codec):
    "Rows through corpus, sources and read_rows alike; other characters that end lines elsewhere are text"
    rows = [{"text": TEXT}, {"text": "two"}, {"text": "three"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    lines[1] = lines[1].replace(b"two", b"t\xe2\x80\xa8wo")
    texts = [TEXT, "t\u2028wo", "three"]
    for last in (b"", end):
        path = tmp_path / ("a.jsonl" + f".{codec}" * bool(codec))
        path.write_bytes(packed(codec, mark + end.join(lines) + last))
        assert [row["text"] for row in read_rows(path)] == texts
        assert [d.text for d in documents(CorpusConfig("jsonl", (str(path),), holdout=0))] == texts
        assert read(path) == texts == read(path, streaming=False)
    plain = tmp_path / ("a.txt" + f".{codec}" * bool(codec))
    plain.write_bytes(packed(codec, mark + end.join(t.encode() for t in texts) + end))
    assert read(plain, sample_by="line") == texts
    assert read_text(plain) == end.decode().join([*texts, ""])
    for name in ("utf-16", "utf-32"):
        path.write_bytes(packed(codec, '{"text": "a"}\n'.encode(name)))
        said = f"{name.upper()} text, expected UTF-8"
        for call in (
            lambda: read_text(path),
            lambda: read_json(path),
            lambda: read_rows(path),
            lambda: list(documents(CorpusConfig("jsonl", (str(path),), holdout=0))),
            lambda: list(Documents(StreamConfig((SourceConfig(str(path)),), epochs=1))),
        ):
            error = message(call)
            assert said in error and str(path) in error


def test_files_joined_of_several_with_marks(tmp_path):
    one = codecs.BOM_UTF8 + b'{"text": "a"}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(one * 3)
    assert read(path) == ["a"] * 3 == [row["text"] for row in read_rows(path)]
    cfg = CorpusConfig("jsonl", (str(path),), holdout=0)
    assert [d.text for d in documents(cfg)] == ["a"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_generated_problems_with_line_separators(tmp_path, name):
    row = {
        "task_id": 11,
        "text": "splits lines\u2028and\x85tabs",
        "code": "",
        "test_list": ["assert f(1) == 1"],
    }
    text = json.dumps(row if name == "a.jsonl" else [row, row], ensure_ascii=False)
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode() + b"\r\n\r\n")
    found = code_problems(tmp_path / name, None)
    assert [problem.name for problem in found] == ["mbpp/11"] * (1 + (name == "a.json"))
    assert "lines\u2028and\x85tabs" in found[0].context(found[0].initial_state(0))


def test_a_bad_byte_is_named_as_it_stands_behind_a_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"ab\ncd\xfe\n")
    assert "a.txt:2: invalid UTF-8: byte 0xFE" in message(lambda: read_text(path))
    cfg = CorpusConfig("text", (str(path),), holdout=0)
    assert "a.txt:2: invalid UTF-8: byte 0xFE" in message(lambda: list(documents(cfg)))
    [row] = text_rows(path, "document")
    assert (str(row), row.line) == ("invalid UTF-8: character 3 of the line", 1)


def test_a_packed_file_that_is_cut_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    cfg = CorpusConfig("jsonl", (str(path),), holdout=0)
    for call in (lambda: read_rows(path), lambda: list(documents(cfg)), lambda: read(path)):
        assert str(path) in message(call)


@pytest.mark.parametrize("unit", ["paragraph", "document"])
@pytest.mark.parametrize(
    "text", ["", "\n", "a", "a\n", "\n\na", "a\n\n\nb\n\n", "a\n\n\n\nb", "\n\n\n"]
)
def test_paragraphs_are_those_of_datasets(tmp_path, unit, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    pieces = [piece for piece in text.split("\n\n") if piece]
    assert list(text_rows(path, unit)) == (pieces if unit == "paragraph" else [text])


def test_the_empty_line_behind_the_last_newline(tmp_path):
    path = tmp_path / "a.txt"
    for data in (b"", b"a", b"a\n", b"a\n\n"):
        path.write_bytes(data)
        lines = [line for _, line in split_records(path, b"\n", last=True)]
        assert lines == data.split(b"\n")


# ---- hidden files

HIDDEN = ["._a.txt", ".git/b.txt", "__MACOSX/a.txt", "__MACOSX/._a.txt", "deep/.c.txt"]


def test_hidden_files_are_left_out_and_counted(tmp_path):
    folder = tmp_path / ".home" / "texts"  # what you name yourself may have a dot
    for name in ("a.txt", "deep/b.txt", *HIDDEN, ".DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7" if name in HIDDEN else name.encode())
    for name in (str(folder), str(folder / "**/*.txt")):
        report = CorpusReport()
        found = list(documents(CorpusConfig("text", (name,), holdout=0), report=report))
        assert [d.text for d in found] == ["a.txt", "deep/b.txt"]
        assert dict(report.skipped) == {"hidden file": len(HIDDEN)}
        assert [path.name for path in local_files(name)] == ["a.txt", "b.txt"]
        cfg = StreamConfig((SourceConfig(name),), epochs=1)
        found = stream_documents(cfg)
        assert len(list(found)) == 2 and found.skipped == {"hidden file": len(HIDDEN)}
    assert len(local_files(str(folder / "._a.txt"))) == 1
    assert len(local_files(str(folder / "deep/.*.txt"))) == 1
    for path in ("a.txt", "deep/b.txt"):
        (folder / path).unlink()
    error = message(lambda: local_files(str(folder)), FileNotFoundError)
    assert f"{len(HIDDEN)} hidden left out" in error


# ---- tables


def shards(folder, *tables, **how):
    folder.mkdir()
    for i, table in enumerate(tables):
        pq.write_table(table, folder / f"{i}.parquet", **how)
    return folder


def texts(first, n):
    return [f"text {i}" for i in range(first, first + n)]


@pytest.mark.parametrize("streaming", [True, False])
def test_columns_of_many_types_file_by_file(tmp_path, streaming):
    "A column more, a shard without rows, one without row groups; each file has its own type of string"
    plain = pa.table({"text": texts(0, 20)})
    more = pa.table({"n": range(5), "text": texts(20, 5), "tags": [["a"]] * 5})
    large = pa.table({"text": pa.array(texts(25, 5), pa.large_string())})
    words = pa.table({"text": pa.array(texts(30, 5)).dictionary_encode()})
    views = pa.table({"text": pa.array(texts(35, 5), pa.string_view())})
    folder = shards(
        tmp_path / "p", plain, more, plain.slice(0, 0), large, words, views, row_group_size=3
    )
    pq.ParquetWriter(folder / "none.parquet", plain.schema).close()  # no row group
    assert read(folder, streaming=streaming) == texts(0, 40)
    (tmp_path / "z").mkdir()
    (tmp_path / "z/a.parquet.gz").write_bytes(gzip.compress((folder / "1.parquet").read_bytes()))
    assert read(tmp_path / "z", streaming=streaming) == texts(20, 5)


def test_every_place_in_parquet_is_resumed(tmp_path):
    folder = shards(
        tmp_path / "p",
        pa.table({"text": texts(0, 25)}),
        pa.table({"text": texts(25, 7)}),
        row_group_size=4,
    )
    for shuffle in (0, 3):
        cfg = SourceConfig(str(folder), shuffle_buffer=shuffle)
        whole = list(Source(cfg, epochs=2))
        assert sorted(whole) == sorted(texts(0, 32) * 2)
        for stop in range(len(whole)):
            before, after = Source(cfg, epochs=2), Source(cfg, epochs=2)
            assert list(islice(before, stop)) == whole[:stop]
            state = before.get_state()
            if state["at"]:  # as version 0.1 wrote it
                state["at"] = dict(state["at"], place={"examples_iterable": {}, "epoch": 0})
            after.set_state(json.loads(json.dumps(state)))
            assert list(after) == whole[stop:]


@pytest.mark.parametrize(
    "column, found",
    [
        (pa.array([["a"]]), "list<"),
        (pa.array([1]), "int64"),
        (pa.array([{"a": "b"}]), "struct<"),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_column_that_is_no_text_is_refused(tmp_path, column, found, streaming):
    folder = shards(tmp_path / "p", pa.table({"text": ["a"]}), pa.table({"text": column}))
    error = message(lambda: Source(SourceConfig(str(folder), streaming=streaming)))
    assert f"{folder}/1.parquet: column 'text' is {found}" in error and "expected text" in error


def test_a_column_missing_in_one_file_is_named(tmp_path):
    folder = shards(tmp_path / "p", pa.table({"text": ["a"]}), pa.table({"body": ["b"], "n": [1]}))
    error = message(lambda: Source(SourceConfig(str(folder))))
    assert f"{folder}/1.parquet: no column 'text', there are 'body', 'n'" == error


def test_nested_columns_and_rows_without_text(tmp_path):
    rows = [{"title": "a", "deep": {"x": "b"}}, None, {"title": None, "deep": None}]
    for kind in ("parquet", "arrow"):
        table = pa.table({"meta": rows, "text": ["1", None, "3"], "a.b": ["x"] * 3})
        path = tmp_path / f"n.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        assert read(path, column="meta.title") == ["a", None, None]
        assert read(path, column="meta.deep.x", streaming=False) == ["b", None, None]
        assert read(path, column="a.b") == ["x"] * 3 and read(path) == ["1", None, "3"]
        for wrong in ("meta.none", "text.a", "none"):
            assert "no column" in message(lambda: read(path, column=wrong))
    docs = Documents(StreamConfig((SourceConfig(str(tmp_path / "n.parquet")),), epochs=1))
    assert f"{tmp_path}/n.parquet: row 2: 'text' is NoneType, not str" in message(
        lambda: list(docs)
    )


def test_bytes_that_are_text_or_not(tmp_path):
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": [b"caf\xc3\xa9", b"\xff"]}), path)
    good, bad = read(path)
    assert good == "café" and "invalid UTF-8" in str(bad)
    assert [str(value) for value in read(path, streaming=False)] == [good, str(bad)]


def test_rows_of_any_kind_come_back_from_the_cache(tmp_path):
    values = ["a", 5, None, True, ["x"], {"k": 1.5}, "\ud800", "", "\u2028"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    assert read(path) == values == read(path, streaming=False) == read(path, streaming=False)
    path.write_text('{"text": "new"}\n')
    assert read(path, streaming=False) == ["new"]


# ---- one long text


def paragraphs(n):
    return "".join(f"Speaker {i}:\nSome words of {i} and more.\n\n" for i in range(n))


@pytest.mark.parametrize("source", ["text", "jsonl"])
@pytest.mark.parametrize("holdout", [0.05, 0.1, 0.001])
def test_one_long_document_is_cut_near_its_end(tmp_path, source, holdout):
    text = paragraphs(2000)
    path = tmp_path / f"a.{'txt' if source == 'text' else 'jsonl'}"
    path.write_text(text if source == "text" else json.dumps({"text": text}) + "\n")
    cfg = CorpusConfig(source, (str(path),), holdout=holdout)
    report = CorpusReport()
    [train] = documents(cfg, "train", report)
    [held] = documents(cfg, "validation")
    assert train.text + held.text == text and report.cut == 1
    assert abs(len(held.text) / len(text) - holdout) < 0.6 * holdout
    assert train.text.endswith("\n\n") or holdout == 0.001
    [whole] = documents(replace(cfg, holdout=0))
    assert whole.text == text


def test_two_long_files_are_cut_when_one_half_is_empty(tmp_path):
    long = [paragraphs(900 + i) for i in range(2)]
    for i, text in enumerate([*long, "short", ""]):
        (tmp_path / f"{i}.txt").write_text(text)
    cfg = CorpusConfig("text", (str(tmp_path),), holdout=1e-3)
    report = CorpusReport()
    train = [d.text for d in documents(cfg, report=report)]
    held = [d.text for d in documents(cfg, "validation")]
    assert [a + b for a, b in zip(train, held)] == long and train[2] == "short" and len(held) == 2
    assert (report.cut, dict(report.skipped)) == (2, {"blank": 1})


def test_a_corpus_with_both_halves_is_split_as_ever(tmp_path):
    "By the hashes of whole documents, however long"
    import hashlib

    found = {}
    for i in range(40):
        text = f"{i}\n" + paragraphs(300)
        (tmp_path / f"{i}.txt").write_text(text)
        found[text] = split_of(hashlib.sha256(text.encode()).digest(), 0.2)
    cfg = CorpusConfig("text", (str(tmp_path),), holdout=0.2)
    for split in ("train", "validation"):
        expected = {text for text, half in found.items() if half == split}
        assert expected and {d.text for d in documents(cfg, split)} == expected


@pytest.mark.parametrize("end", ["\n\n", "\n", " "])
def test_where_a_long_text_is_cut(end):
    text = f"word word{end}" * 2000
    at = validation_start(text, 0.05)
    assert len(text) >= LONG_DOCUMENT and abs((len(text) - at) / len(text) - 0.05) < 0.001
    assert text[:at].endswith(end) or end == " "


# ---- a tokenizer, and patience

TRAINING = """if 1:
    import random, sys
    from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
    rng = random.Random(0)
    def letters(): return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
    def texts():
        for i in range(15_000): yield " ".join(letters() for _ in range(40))
        print("read", flush=True)
    try: train_tokenizer(texts(), sys.argv[1], TokenizerConfig(vocab_size=16_000))
    except KeyboardInterrupt: sys.exit(130)"""


@pytest.mark.faults
def test_an_interrupt_ends_the_training_of_a_tokenizer(tmp_path):
    "Within seconds, though the library's call takes many; no file and no process stays"
    path = tmp_path / "out/tok.model"
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(path)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout.readline() == b"read\n"
    time.sleep(1)
    assert child.poll() is None
    start = time.monotonic()
    child.send_signal(signal.SIGINT)  # to the one process, as a supervisor does
    assert child.wait(30) == 130 and time.monotonic() - start < 5
    assert not path.parent.exists() or not list(path.parent.iterdir())
    alive = [path]
    while alive and time.monotonic() - start < 5:  # a killed process takes a moment to go
        alive = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                alive += [stat] * (int(group) == child.pid and state != "Z")
    assert not alive


def test_vocabularies_that_do_not_fit_name_our_flags(tmp_path):
    def train(texts, **how):
        return message(lambda: train_tokenizer(texts, tmp_path / "t.model", TokenizerConfig(**how)))

    few = train(["hello world"], vocab_size=5000)
    assert "vocab_size=5000: this text gives 286 pieces at most" in few
    assert "--tokenizer.vocab-size 286" in few
    many = train(["".join(chr(0x4E00 + i) for i in range(900))], vocab_size=300)
    assert (
        "vocab_size=300: its characters take 116" in many and "--tokenizer.vocab-size 116" in many
    )
    assert not list(tmp_path.iterdir())


# ---- the first corpus of a newcomer, and machines without a home


def cli(*args, cwd):
    code = "import sys; from nash_lab.lab.cli import main; sys.exit(main())"
    run = [sys.executable, "-c", code, *args]
    return subprocess.run(run, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_one_long_file_as_the_first_corpus(tmp_path):
    "As a nanoGPT user starts: one file, default holdout; and what cannot be split is refused before work"
    (tmp_path / "input.txt").write_text(paragraphs(1200))
    (tmp_path / "short.txt").write_text("To be, or not to be\n" * 20)
    for name in ("input", "short"):
        cfg = {"corpus": {"source": "text", "paths": [f"{name}.txt"]}}
        (tmp_path / f"{name}.json").write_text(json.dumps(cfg))
    config = CorpusConfig("text", (str(tmp_path / "input.txt"),))
    train_tokenizer(
        (d.text for d in documents(config)), tmp_path / "t.model", TokenizerConfig(vocab_size=300)
    )
    done = cli(
        "pack", "--config", "input.json", "--tokenizer", "t.model", "--out", "d", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "d").iterdir()} >= {"train.bin", "validation.bin"}
    held = PackedTokens.open(tmp_path / "d/validation.bin").meta
    whole = held.text_bytes + PackedTokens.open(tmp_path / "d/train.bin").meta.text_bytes
    assert whole == len(paragraphs(1200)) and 0.03 < held.text_bytes / whole < 0.08

    done = cli(
        "pack", "--config", "short.json", "--tokenizer", "t.model", "--out", "s", cwd=tmp_path
    )
    [error] = done.stderr.splitlines()
    assert done.returncode == 1 and not (tmp_path / "s").exists()
    assert "--corpus.separator" in error and "--corpus.holdout" in error and "validation" in error


HOMELESS = """if 1:
    import os, sys
    from nash_lab.core.files import cache_folder, hide_home, spare_home
    from nash_lab.data.corpus import CorpusConfig, documents
    from nash_lab.data.sources import Source, SourceConfig
    from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
    for streaming in (True, False):
        for name in ("rows.jsonl", "rows.parquet", "*.txt"):
            source = SourceConfig(name, streaming=streaming, sample_by="line")
            assert list(Source(source, epochs=1)) == ["one", "two"], name
    train_tokenizer(["some words"] * 9, "t.model", TokenizerConfig(vocab_size=268))
    print(cache_folder("x"), hide_home("/a/b"))
    spare_home()
    import datasets, matplotlib.pyplot
    assert os.path.isdir(os.environ["HF_HOME"]) or cache_folder("x")
    from nash_lab.run.rundir import environment
    environment()"""


@pytest.fixture
def open_folder():
    "A folder that other users may enter, which pytest's are not"
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("home", ["none", "", "/", "/proc/none", "read-only"])
def test_nothing_is_written_without_a_home(open_folder, home):
    "An unknown uid, HOME unset or empty, the root, missing, or not writable: it works, and no folder is made"
    if os.geteuid():
        pytest.skip("only root can become a user without a name")
    if not shutil.which("setpriv"):
        pytest.skip("setpriv is not installed")
    work = open_folder / "work"
    work.mkdir()
    (work / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (work / "rows.txt").write_text("one\ntwo\n")
    pq.write_table(pa.table({"text": ["one", "two"]}), work / "rows.parquet")
    os.chown(work, 12345, 12345)
    env = {} if home == "none" else {"HOME": home}
    if home == "read-only":
        (open_folder / "home").mkdir(mode=0o555)
        env = {"HOME": str(open_folder / "home")}
    env["TMPDIR"] = str(work / "tmp")
    (work / "tmp").mkdir()
    os.chown(work / "tmp", 12345, 12345)
    keep = ("PATH", "PYTHONPATH", "JAX_PLATFORMS", "HF_HUB_OFFLINE")
    env |= {name: os.environ[name] for name in keep if name in os.environ}
    become = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    done = subprocess.run(
        [*become, sys.executable, "-c", HOMELESS], cwd=work, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None /a/b\n" and "Matplotlib" not in done.stderr
    left = {path.name for path in work.iterdir()}
    assert left == {"rows.jsonl", "rows.txt", "rows.parquet", "t.model", "t.vocab", "tmp"}
    assert not list((work / "tmp").iterdir())
