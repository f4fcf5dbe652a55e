"What can go wrong with data while it is read: broken records by the hundred, giant lines, files that change, workers that die."

import gc, json, multiprocessing, os, random, signal, struct, subprocess, sys, time
from dataclasses import replace
import numpy as np
import pytest
from nash_lab.data.corpus import CorpusConfig, CorpusReport, Document, PackedTokens, documents, pack
from nash_lab.data.loader import LoaderConfig, loader
from nash_lab.data.sources import MAX_LINE, Source, SourceConfig
from nash_lab.data.stream import StreamConfig, stream_loader
from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [f"line {i} of a text with {i * 7} words\n" for i in range(300)]
    return train_tokenizer(
        texts, tmp_path_factory.mktemp("tok") / "tok.model", TokenizerConfig(vocab_size=320)
    )


def message(call, kind=ValueError) -> str:
    with pytest.raises(kind) as e:
        call()
    assert "\n" not in str(e.value), "an error is one line"
    return str(e.value)


def rows(path, n, bad=()):
    path.write_text(
        "\n".join('{"text": 5}' if i in bad else json.dumps({"text": f"row {i}"}) for i in range(n))
        + "\n"
    )
    return CorpusConfig("jsonl", (str(path),), holdout=0, on_error="skip")


# ---- a share of broken records


def test_more_than_one_per_cent_of_broken_records_stops(tmp_path):
    report = CorpusReport()
    assert (
        len(list(documents(rows(tmp_path / "few.jsonl", 3000, range(0, 3000, 100)), report=report)))
        == 2970
    )
    assert (report.records, report.bad) == (3000, 30)
    cfg = rows(tmp_path / "many.jsonl", 3000, range(2969, 3000))
    assert (
        "31 of 3000 records cannot be read, more than max_bad_share=0.01; the first: "
        in message(lambda: list(documents(cfg)))
    )
    assert len(list(documents(replace(cfg, max_bad_share=1)))) == 2969


def test_a_file_of_another_kind_stops_early(tmp_path):
    "All of it is broken: no need to read to the end"
    report = CorpusReport()
    cfg = rows(tmp_path / "none.jsonl", 50_000, range(50_000))
    assert (
        "999 of 1000 records" in message(lambda: list(documents(cfg, report=report)))
        and report.records == 1000
    )


def test_rows_that_are_no_text_in_a_stream(tmp_path, tok):
    (tmp_path / "odd.jsonl").write_text(
        "\n".join(json.dumps({"text": None if i % 50 == 0 else f"row {i}"}) for i in range(2000))
    )
    cfg = StreamConfig(
        (SourceConfig(str(tmp_path / "odd.jsonl")),),
        seq_len=32,
        batch_size=2,
        epochs=1,
        on_error="skip",
        prefetch=0,
    )
    assert "of 1000 rows are no text" in message(lambda: list(stream_loader(cfg, tok)))
    run = stream_loader(replace(cfg, max_bad_share=0.03), tok)
    assert sum(1 for _ in run) > 10 and run.counters()[cfg.sources[0].name]["not text"] >= 35
    assert "'text' is NoneType, not str" in message(
        lambda: list(stream_loader(replace(cfg, on_error="error"), tok))
    )


# ---- giant lines

PEAK = """
def peak():
    "kB this process has held at most. Not by getrusage where there is another way: it begins with what the parent held before exec"
    from pathlib import Path
    about = Path('/proc/self/status')
    if about.exists(): return int(about.read_text().split('VmHWM:')[1].split()[0])
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""

GIANT = (
    PEAK
    + """if 1:
    import sys
    from nash_lab.data.corpus import CorpusConfig, CorpusReport, documents
    report = CorpusReport()
    cfg = CorpusConfig(sys.argv[1], (sys.argv[2],), holdout=0, on_error='skip', max_bad_share=1, separator=sys.argv[3])
    before = peak()
    print(len(list(documents(cfg, report=report))), report.skipped['too long'], (peak() - before) // 1024)"""
)


@pytest.mark.parametrize("source, separator", [("jsonl", ""), ("text", "<|end|>"), ("text", "")])
def test_a_giant_line_is_refused_in_bounded_memory(tmp_path, source, separator):
    "100 MB without white space: counted as too long, the records around it are read, memory stays below a line of the limit and some"
    part = (separator or "\n").encode()
    with open(tmp_path / "giant.txt", "wb") as f:
        f.write(b'{"text": "before"}' + part + b'{"text": "')
        for _ in range(100):
            f.write(b"x" * 1_000_000)
        f.write(b'"}' + part + b'{"text": "after"}')
    out = subprocess.run(
        [sys.executable, "-c", GIANT, source, str(tmp_path / "giant.txt"), separator],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    docs, long, mb = map(int, out.stdout.split())
    assert (docs, long) == ((0, 1) if source == "text" and not separator else (2, 1))
    assert mb < 80, f"{mb} MB for a line of 100 MB that is not kept"


def test_a_limit_is_exact(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "%s"}\n' % ("x" * 88))  # 100 bytes
    cfg = CorpusConfig("jsonl", (str(tmp_path / "a.jsonl"),), holdout=0, max_record_bytes=100)
    assert len(list(documents(cfg))) == 1
    assert "a.jsonl:1: too long: more than 99 bytes" in message(
        lambda: list(documents(replace(cfg, max_record_bytes=99)))
    )


STREAMED = (
    PEAK
    + """if 1:
    import json, sys
    from nash_lab.data.sources import SourceConfig
    from nash_lab.data.stream import Documents, StreamConfig
    def read(folder):
        source = SourceConfig(folder, sample_by=sys.argv[1], streaming=sys.argv[2] == 'stream')
        docs = Documents(StreamConfig((source,), epochs=1, on_error='skip', max_bad_share=1))
        return [len(d.text) for d in docs], docs.counts[0]['not text'], docs.bad[0]
    read(sys.argv[3])
    before = peak()
    for folder in sys.argv[4:]: print(json.dumps([*read(folder), (peak() - before) // 1024]))"""
)

GIANTS = {
    ("jsonl", "line"): ([6, 5], ":2"),
    ("txt", "line"): ([6, 5], ":3"),
    ("txt", "paragraph"): ([6, 5], ": row 2"),
    ("txt", "document"): ([], ":3"),
}


@pytest.mark.parametrize(
    "kind, unit, how", [(*o, "stream") for o in GIANTS] + [("jsonl", "line", "disk")]
)
def test_a_giant_line_in_a_stream(tmp_path, kind, unit, how):
    "No white space: 5 MB are a text that is cut, 50 MB are refused by the limit, in memory for the limit and not for the line; the rows around are read"
    head, tail = ('{"text": "', '"}\n') if kind == "jsonl" else ("", "\n\n")
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)).encode()

    def folder(name, mb, line):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"a.{kind}").write_text(f"{head}good{tail}")
        (tmp_path / name / f"b.{kind}").write_bytes(
            f"{head}before{tail}{head}".encode() + line * mb + f"{tail}{head}after{tail}".encode()
        )
        return str(tmp_path / name)

    around, place = GIANTS[kind, unit]
    small = folder("small", 1, b"\xff")  # for what reading and naming a place import
    args = [unit, how, small, folder("5", 5, letters), folder("50", 50, letters)]
    out = subprocess.run(
        [sys.executable, "-c", STREAMED, *args], capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stderr
    for mb, expected, bad, line in zip(
        (5, 50),
        ([*around[:1], 1_000_000, *around[1:]], around),
        (0, 1),
        out.stdout.splitlines(),
        strict=True,
    ):
        lengths, refused, last, used = json.loads(line)
        assert (lengths, refused) == ([4, *expected], bad)
        if bad:
            assert last.endswith(f"b.{kind}{place}: too long: a line of more than {MAX_LINE} bytes")
        assert used < (110 if bad else 50), f"{used} MB for a line of {mb} MB"


def test_a_run_of_spaces_is_cleaned_in_one_pass():
    "Half a million spaces within a line; an attempt at each of them would take a quarter of an hour, so a child of 30 s is ended before"
    code = 'from nash_lab.data.filters import clean; text = "a" + " " * 500_000 + "b"; assert clean(text + "  \\n") == text'
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


# ---- files that change under the reader


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def append(path):
    path.open("ab").write(b'{"text": "more"}\n')


def swap(path):
    (path.parent / "other").write_bytes(path.read_bytes())
    os.replace(path.parent / "other", path)


def rewrite(path):
    path.write_bytes(path.read_bytes().replace(b"row", b"ROW"))
    os.utime(path, ns=(1, 1))


def delete(path):
    path.unlink()


CHANGES = pytest.mark.parametrize(
    "change", [truncate, append, swap, rewrite, delete], ids=lambda f: f.__name__
)


@CHANGES
def test_a_text_file_that_changes_is_an_error(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"row {i} {'long ' * 20}"}) + "\n" for i in range(30_000))
    )  # more than a block
    docs = documents(CorpusConfig("jsonl", (str(path),), holdout=0))
    next(docs)
    change(path)
    error = message(lambda: list(docs))
    assert "rows.jsonl" in error and ("changed while it was in use" in error or "not JSON" in error)


@CHANGES
def test_a_source_that_changes_is_an_error(tmp_path, change):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": f"row {i}.{j}"}) + "\n" for j in range(50))
        )
    source = Source(SourceConfig(str(tmp_path)), epochs=1)
    next(source)
    change(tmp_path / "2.jsonl")
    error = message(lambda: list(source))
    assert "2.jsonl" in error and "changed while it was in use" in error


@CHANGES
def test_a_packed_file_that_changes_is_an_error_and_no_signal(tmp_path, tok, change):
    pack(
        (Document(f"row {i} of a file that will change", "made") for i in range(3000)),
        tok,
        tmp_path / "t.bin",
    )
    packed = PackedTokens.open(tmp_path / "t.bin")
    data = loader(packed, LoaderConfig(seq_len=64, batch_size=4, shuffle=False, prefetch=0))
    next(data)
    change(tmp_path / "t.bin")
    assert "t.bin: changed while it was in use" in message(lambda: [next(data) for _ in range(100)])
    data.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("name", ["pipe.jsonl", "folder.jsonl", "none.jsonl", "*.csv"])
def test_a_pipe_or_nothing_is_no_source(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    start = time.monotonic()
    assert str(tmp_path / name) in message(
        lambda: Source(SourceConfig(str(tmp_path / name))), FileNotFoundError
    )
    assert time.monotonic() - start < 10


# ---- empty and tiny documents


def test_blank_and_one_token_documents(tmp_path, tok):
    texts = ["", " ", "\n", "a", "b", "\ufeff", "c" * 3, "a"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    cfg = StreamConfig(
        (SourceConfig(str(tmp_path / "t.jsonl")),), seq_len=4, batch_size=2, epochs=1, prefetch=0
    )
    run = stream_loader(cfg, tok)
    batches = list(run)
    assert batches and all(b["mask"].any() for b in batches)
    assert run.counters()[cfg.sources[0].name] | {"bytes": 0} == {
        "rows": 8,
        "too short": 4,
        "documents": 3,
        "exact duplicate": 1,
        "bytes": 0,
        "epoch": 1,
    }
    (tmp_path / "none.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[:3]))
    for epochs in (0, 1):  # without end it would be read for ever
        empty = replace(cfg, sources=(SourceConfig(str(tmp_path / "none.jsonl")),), epochs=epochs)
        assert "a whole pass gave no document (too short 3)" in message(
            lambda: next(stream_loader(empty, tok))
        )


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "kind, unit", [("jsonl", "line"), ("txt", "line"), ("txt", "paragraph"), ("txt", "document")]
)
def test_an_empty_file_is_no_source_and_no_obstacle(tmp_path, tok, kind, unit, streaming):
    "Alone it is an error when the source is opened; beside others it has no rows, or as a document a blank one that is counted"
    (tmp_path / f"b.{kind}").write_bytes(b"")
    source = SourceConfig(str(tmp_path), sample_by=unit, streaming=streaming)
    cfg = StreamConfig((source,), seq_len=4, batch_size=2, prefetch=0)
    for epochs in (0, 1):
        assert (
            message(lambda: stream_loader(replace(cfg, epochs=epochs), tok))
            == f"{tmp_path}: no rows, the files are empty"
        )
    for name in "ac":
        (tmp_path / f"{name}.{kind}").write_text(json.dumps({"text": f"text {name}"}) + "\n")
    run = stream_loader(replace(cfg, epochs=2), tok)
    assert all(b["mask"].any() for b in run)
    blank = {"too short": 2} if unit == "document" else {}
    assert run.counters()[str(tmp_path)] | {"bytes": 0} == {
        "rows": 4,
        "documents": 4,
        "bytes": 0,
        "epoch": 2,
    } | blank | ({"rows": 6} if blank else {})


# ---- threads and workers that die


class Failing:
    "Tokens on a disk that fails"

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        raise OSError("[Errno 5] Input/output error")


def test_an_error_in_the_thread_of_the_loader_comes_out(tmp_path, tok):
    pack((Document(f"row {i}", "made") for i in range(300)), tok, tmp_path / "t.bin")
    packed = PackedTokens.open(tmp_path / "t.bin")
    broken = PackedTokens(Failing(len(packed)), packed.meta, packed.path)
    start = time.monotonic()
    data = loader(broken, LoaderConfig(seq_len=16, batch_size=2, prefetch=4))
    assert (
        "Input/output error" in message(lambda: next(data), OSError)
        and time.monotonic() - start < 10
    )
    data.close()


def corpus(folder, files=4, rows=400):
    for f in range(files):
        (folder / f"{f}.jsonl").write_text(
            "\n".join(
                json.dumps({"text": f"text {f}.{i} " + "and more " * (i % 9)}) for i in range(rows)
            )
        )
    return SourceConfig(str(folder))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("amid", [False, True], ids=["killed", "amid a message"])
def test_a_killed_worker_is_an_error_within_ten_seconds_and_no_batch_is_lost(tmp_path, tok, amid):
    cfg = StreamConfig(
        (corpus(tmp_path),), seq_len=32, batch_size=4, lanes=2, workers=2, prefetch=1
    )
    expected = stream_loader(replace(cfg, workers=0), tok)
    whole = [next(expected) for _ in range(30)]
    run = stream_loader(cfg, tok)
    try:
        for b in whole[:3]:
            assert all(
                np.array_equal(v, next_[k]) for next_ in [next(run)] for k, v in b.items()
            )  # workers change nothing
        children = [p for p in multiprocessing.active_children() if "grain" in p.name]
        assert len(children) == 2
        os.kill(children[1].pid, signal.SIGKILL)
        if amid:  # what is left of a message of 1,024 bytes in the queue of a killed process
            children[1].join()
            kind = "ProcessPrefetchDatasetIterator"
            readers = [x for x in gc.get_objects() if type(x).__name__ == kind]
            (reader,) = [x for x in readers if x._prefetch_process is children[1]]
            os.write(reader._buffer._writer.fileno(), struct.pack("!i", 1024) + b"cut")
        start, made = time.monotonic(), 3
        with pytest.raises(ChildProcessError, match="a data worker died: .* exit code -9"):
            while made < 30:
                next(run)
                made += 1
        assert time.monotonic() - start < 10
        state = json.loads(json.dumps(run.get_state()))
        assert state["batch"] == made
    finally:
        run.close()
    for child in children:  # the other one too; a thread may still be ending it
        child.join(20)
        assert not child.is_alive()
    again = stream_loader(replace(cfg, workers=0), tok)
    again.set_state(state)
    assert all(
        np.array_equal(v, b[k])
        for b, w in zip([next(again) for _ in range(5)], whole[made:])
        for k, v in w.items()
    )
    for r in (again, expected):
        r.close()
