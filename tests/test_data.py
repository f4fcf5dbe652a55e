"Tokenizer, corpus and loader from outside: other processes, kills, bounded memory, real files."

import hashlib, json, os, random, shutil, signal, subprocess, sys
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
import numpy as np
import pytest
from nash_lab.data.corpus import (
    CorpusConfig,
    CorpusReport,
    Document,
    PackedTokens,
    corpus_files,
    documents,
    pack,
)
from nash_lab.data.loader import LoaderConfig, eval_batches, loader
from nash_lab.data.sources import SourceConfig, fingerprint
from nash_lab.data.stream import Documents, StreamConfig
from nash_lab.data.tokenizer import EOS, TokenizerConfig, UNK, load_tokenizer, train_tokenizer

SAMPLE = CorpusConfig(max_bytes=400_000)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    "A folder with a tokenizer and both splits of 400 kB of the standard library"
    folder = tmp_path_factory.mktemp("stdlib")
    tok = train_tokenizer(
        (d.text for d in documents(SAMPLE)), folder / "tok.model", TokenizerConfig(vocab_size=1024)
    )
    for split in ("train", "validation"):
        pack(documents(SAMPLE, split), tok, folder / f"{split}.bin", split=split)
    return SimpleNamespace(
        folder=folder,
        tok=tok,
        train=PackedTokens.open(folder / "train.bin", tokenizer_hash=tok.hash),
    )


def child(code: str, *args, check=True, timeout=120, **env) -> subprocess.CompletedProcess:
    p = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=timeout,
    )
    if check:
        assert p.returncode == 0, p.stderr
    return p


def message(call, kind=ValueError) -> str:
    with pytest.raises(kind) as e:
        call()
    assert "\n" not in str(e.value), "an error is one line"
    return str(e.value)


# ---- tokenizer


def test_training_is_deterministic_and_quiet(stdlib, tmp_path, capfd):
    code = """if 1:
        import sys
        from nash_lab.data.corpus import CorpusConfig, documents
        from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
        docs = documents(CorpusConfig(max_bytes=400_000))
        print(train_tokenizer((d.text for d in docs), sys.argv[1], TokenizerConfig(vocab_size=1024)).hash)"""
    out = child(code, tmp_path / "again.model", PYTHONHASHSEED="7", OMP_NUM_THREADS="1")
    assert out.stdout.split() == [stdlib.tok.hash]
    assert "trainer" not in out.stderr and "sentencepiece" not in out.stderr
    train_tokenizer(
        ["quiet please\n"] * 5, tmp_path / "quiet.model", TokenizerConfig(vocab_size=280)
    )
    assert capfd.readouterr() == ("", "")


def test_round_trip_of_everything(stdlib):
    rng = random.Random(1)
    alphabet = [
        *range(0x80),
        *range(0x2580, 0x2590),
        0x2581,
        0xFEFF,
        0x1F642,
        0xFFFD,
        0x10FFFF,
        0xE000,
    ]
    texts = ["".join(map(chr, rng.choices(alphabet, k=rng.randrange(80)))) for _ in range(500)]
    texts += [d.text for d in islice(documents(CorpusConfig(), "validation"), 10)]
    for text, ids in zip(texts, stdlib.tok.encode_batch(texts)):
        assert stdlib.tok.decode(ids) == text and UNK not in ids and EOS not in ids
        assert stdlib.tok.encode(text) == ids


def test_vocabulary_holds_newlines_and_indentation(stdlib):
    pieces = set(stdlib.tok.pieces)
    assert {"▁" * 4, "▁" * 8, ":\n", "\n\n"} <= pieces
    assert not any(sum(c.isdigit() for c in p) > 1 for p in pieces if not p.startswith("<0x"))


def test_training_text_is_bounded(tmp_path):
    read = []

    def endless():
        while True:
            read.append(1)
            yield "one two three four five six\n" * 100

    train_tokenizer(
        endless(), tmp_path / "t.model", TokenizerConfig(vocab_size=290, max_text_bytes=50_000)
    )
    assert len(read) <= 20


def test_bad_tokenizers(stdlib, tmp_path):
    assert "no tokenizer file here" in message(
        lambda: load_tokenizer(tmp_path / "none.model"), FileNotFoundError
    )
    assert "no tokenizer file here" in message(lambda: load_tokenizer(tmp_path), FileNotFoundError)
    data = (stdlib.folder / "tok.model").read_bytes()
    for share in (0, 0.5, 0.99):
        (tmp_path / "cut.model").write_bytes(data[: int(len(data) * share)])
        assert "cut.model" in message(lambda: load_tokenizer(tmp_path / "cut.model"))
    assert "no text to train" in message(lambda: train_tokenizer(["", " \n"], tmp_path / "x.model"))
    assert "U+D83D" in message(lambda: train_tokenizer(["\ud83d"], tmp_path / "x.model"))
    assert not (tmp_path / "x.model").exists() and not list(tmp_path.glob("*.part"))


# ---- corpus


def test_stdlib_splits_share_no_content():
    train, validation = (
        {d.text for d in documents(CorpusConfig(), split)} for split in ("train", "validation")
    )
    assert train and validation and train.isdisjoint(validation)
    assert 0.01 < len(validation) / (len(train) + len(validation)) < 0.12
    report = CorpusReport()
    n = sum(1 for _ in documents(CorpusConfig(holdout=0), report=report))
    assert n == report.documents and n + sum(report.skipped.values()) == len(
        corpus_files(CorpusConfig())
    )


def test_odd_text_files(tmp_path):
    files = dict(
        crlf=b"a\r\nb\r\n",
        bom=b"\xef\xbb\xbfbom\n",
        nul=b"a\0b",
        blank=b" \n\t\n",
        empty=b"",
        copy=b"a\r\nb\r\n",
        bad=b"x\ny\xffz\n",
    )
    for name, data in files.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    cfg = dict(source="text", paths=(str(tmp_path),), holdout=0)
    report = CorpusReport()
    assert sorted(
        d.text
        for d in documents(CorpusConfig(**cfg, on_error="skip", max_bad_share=1), report=report)
    ) == ["a\0b", "a\r\nb\r\n", "bom\n"]
    assert report.skipped == {"blank": 2, "duplicate": 1, "invalid UTF-8": 1}
    assert "bad.txt:2: invalid UTF-8: byte 0xFF" in message(
        lambda: list(documents(CorpusConfig(**cfg)))
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_or_a_folder_is_no_input(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in ("pipe.txt", ".", "none.txt", "*.csv"):
        cfg = CorpusConfig("text", (str(tmp_path / path),))
        assert str(tmp_path / path) in message(lambda: list(documents(cfg)), FileNotFoundError)


OPENED = """if 1:
    import sys
    from nash_lab.data.corpus import PackedTokens
    from nash_lab.data.tokenizer import load_tokenizer
    what, path = sys.argv[1:]
    try: (PackedTokens.open if what == 'packed' else load_tokenizer)(path)
    except FileNotFoundError as error: print(error)"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize(
    "name", ["t.bin", "t.bin.json", "t.model", "t.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer(stdlib, tmp_path, name, kind):
    "In a process of its own, that ends: one line names the file, and nothing is waited for"
    packed = name.startswith("t.bin")
    if packed:
        (
            shutil.copy(stdlib.folder / "train.bin", tmp_path / "t.bin"),
            shutil.copy(stdlib.folder / "train.bin.json", tmp_path / "t.bin.json"),
        )
    if name == "tokenizer_config.json":
        save_small_json(tmp_path / "tokenizer.json")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).mkdir()
    opened = tmp_path if name.startswith("tokenizer") else tmp_path / ("t.bin" if packed else name)
    if name == "t.json" and kind == "folder":
        opened = tmp_path / name / "tokenizer.json"  # a folder is looked into
    out = child(OPENED, "packed" if packed else "tokenizer", opened, timeout=30)
    if name == "tokenizer_config.json":
        assert out.stdout == ""  # as if it were not there
    else:
        [line] = out.stdout.splitlines()
        assert str(tmp_path / name) in line and any(
            o in line for o in ("no packed tokens here", "is not whole", "no tokenizer file here")
        )


def save_small_json(path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1, "[UNK]": 2}, unk_token="[UNK]")).save(
        str(path)
    )


BAD_LINES = pytest.mark.parametrize(
    "line, cause",
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "a"} x', "not JSON"),
        (b'{"text": Infinity}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"txt": "a"}', "key missing"),
        (b'{"text": null}', "wrong type"),
        (b'"text"', "not an object"),
        (b'{"text": "a", "text": "b"}', "key given twice"),
        (b'{"text": "\\udfff"}', "unpaired surrogate"),
        (b'{"text": "\xc3"}', "invalid UTF-8"),
    ],
)


@BAD_LINES
def test_bad_json_lines(tmp_path, line, cause):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also"}')
    cfg = dict(source="jsonl", paths=(str(tmp_path / "rows.jsonl"),), holdout=0)
    assert f"rows.jsonl:2: {cause}" in message(lambda: list(documents(CorpusConfig(**cfg))))
    report = CorpusReport()
    assert [
        d.text
        for d in documents(CorpusConfig(**cfg, on_error="skip", max_bad_share=1), report=report)
    ] == ["good", "also"]
    assert report.skipped == {cause: 1} and f"rows.jsonl:2: {cause}" in report.examples[0]


@pytest.mark.parametrize("streaming", [True, False])
@BAD_LINES
def test_bad_json_lines_in_a_stream(tmp_path, line, cause, streaming):
    "Every kind of line costs itself and no other, and the error names its place"
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n\n{"text": "good"}\n')
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "more"}\n' + line + b'\n{"text": "also"}')
    cfg = StreamConfig((SourceConfig(str(tmp_path), streaming=streaming),), epochs=1, min_chars=0)
    cause = {"wrong type": "'text' is NoneType, not str", "unpaired surrogate": "'text' "}.get(
        cause, cause
    )
    assert f"rows.jsonl:2: {cause}" in message(lambda: list(Documents(cfg)))
    found = Documents(replace(cfg, on_error="skip", max_bad_share=1))
    assert [d.text for d in found] == ["first", "good", "more", "also"] and found.counts[0][
        "not text"
    ] == 1
    assert f"; the last: {tmp_path}/rows.jsonl:2: {cause}" in message(
        lambda: list(Documents(replace(cfg, on_error="skip")))
    )


ODD_TEXT = {  # what a row is -> the rows that are text, where the one stands that is none
    "document": (["first\n\nsecond\0\n"], ":4"),
    "paragraph": (["first", "second\0\n", "good", "also\n"], ": row 2"),
    "line": (["first", "second\0", "good", "x", "also"], ":4"),
}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("unit", ODD_TEXT)
def test_odd_text_files_in_a_stream(tmp_path, unit, streaming):
    "As in packed text: a byte order mark is none of the text, NUL is a character, a byte that is not UTF-8 costs its row; line ends are newlines"
    for name, data in dict(
        a=b"\xef\xbb\xbffirst\r\n\r\nsecond\0\n", b=b"good\n\nx\ny\xffz\n\nalso\n"
    ).items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    cfg = StreamConfig(
        (SourceConfig(str(tmp_path), streaming=streaming, sample_by=unit),), epochs=1, clean=False
    )
    texts, place = ODD_TEXT[unit]
    fault = f"b.txt{place}: invalid UTF-8: character 2 of the line"
    assert fault in message(lambda: list(Documents(cfg)))
    found = Documents(replace(cfg, on_error="skip", max_bad_share=1))
    assert [d.text for d in found] == texts and found.counts[0]["not text"] == 1
    error = message(lambda: list(Documents(replace(cfg, on_error="skip"))))
    assert (
        f"1 of {found.counts[0]['rows']} rows are no text, more than max_bad_share=0.01" in error
        and f"; the last: {tmp_path}/{fault}" in error
    )


def test_a_position_in_text_read_with_its_byte_order_mark_is_of_another_stream(tmp_path):
    "The first row of such a file was another one"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    assert (
        fingerprint(SourceConfig(str(tmp_path / "a.txt")))
        != hashlib.sha256(b"a.txt 8\n").hexdigest()[:16]
    )


# ---- packing


def test_wide_ids_for_a_large_vocabulary(tmp_path):
    tok = SimpleNamespace(
        vocab_size=70_000,
        hash="wide",
        eos_id=EOS,
        encode_batch=lambda texts: [[69_999, 5]] * len(texts),
    )
    pack([Document("x", "a"), Document("y", "b")], tok, tmp_path / "wide.bin")
    packed = PackedTokens.open(tmp_path / "wide.bin", tokenizer_hash="wide", vocab_size=70_000)
    assert packed.meta.dtype == "uint32" and packed.tokens.tolist() == [69_999, 5, EOS] * 2
    meta = json.loads((tmp_path / "wide.bin.json").read_text())
    for tokens in (6, 12):  # with 12 the bytes, their hash and the ids fit
        (tmp_path / "wide.bin.json").write_text(
            json.dumps(meta | dict(dtype="uint16", tokens=tokens))
        )
        assert "dtype='uint16': expected 'uint32'" in message(
            lambda: PackedTokens.open(tmp_path / "wide.bin")
        )


@pytest.mark.parametrize("share", [0, 0.5, 0.99, 1.01])
def test_a_file_of_another_length_is_refused(stdlib, tmp_path, share):
    data = (stdlib.folder / "train.bin").read_bytes()
    (tmp_path / "t.bin").write_bytes((data * 2)[: int(len(data) * share)])
    (tmp_path / "t.bin.json").write_bytes((stdlib.folder / "train.bin.json").read_bytes())
    assert f"t.bin: {int(len(data) * share)} bytes, expected {len(data)}" in message(
        lambda: PackedTokens.open(tmp_path / "t.bin")
    )
    (tmp_path / "t.bin").write_bytes(data[:-1])
    assert f"t.bin: {len(data) - 1} bytes, expected {len(data)}" in message(
        lambda: PackedTokens.open(tmp_path / "t.bin")
    ), "half an id"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "Expecting value"),
        ('{"dtype": "uint16"', "Expecting ',' delimiter"),
        ("[]", "expected an object"),
        ('{"dtype": "uint16"}', "missing key"),
        ('{"magic": 1}', "unknown key 'magic'"),
    ],
)
def test_a_damaged_description_is_refused(stdlib, tmp_path, text, expected):
    (tmp_path / "t.bin").write_bytes((stdlib.folder / "train.bin").read_bytes())
    (tmp_path / "t.bin.json").write_text(text)
    error = message(lambda: PackedTokens.open(tmp_path / "t.bin"))
    assert "t.bin.json" in error and expected in error


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(tokens=0), "PackedMeta.tokens=0"),
        (dict(documents=0), "PackedMeta.documents=0"),
        (dict(version=2), "PackedMeta.version=2"),
        (dict(dtype="uint32"), "dtype='uint32': expected 'uint16'"),
        (dict(vocab_size=70_000), "dtype='uint16': expected 'uint32'"),
    ],
    ids=lambda o: "" if isinstance(o, str) else next(iter(o)),
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_description_that_no_packed_file_can_have_is_refused(
    stdlib, tmp_path, change, expected, empty
):
    "Whether or not the .bin is empty too: then the counts would agree"
    data = b"" if empty else (stdlib.folder / "train.bin").read_bytes()
    meta = json.loads((stdlib.folder / "train.bin.json").read_text()) | dict(
        sha256=hashlib.sha256(data).hexdigest()
    )
    (tmp_path / "t.bin").write_bytes(data)
    (tmp_path / "t.bin.json").write_text(json.dumps(meta | change))
    error = message(lambda: PackedTokens.open(tmp_path / "t.bin"))
    assert "t.bin.json" in error and expected in error


def test_an_id_beyond_the_vocabulary_is_refused(stdlib, tmp_path):
    "Size and hash agree: only the ids are looked at"
    meta = json.loads((stdlib.folder / "train.bin.json").read_text())
    for dtype, vocab, wrong in (
        ("<u2", 1024, 1024),
        ("<u2", 1024, 65_535),
        ("<u4", 70_000, 70_000),
    ):
        ids = np.array([5, 6, EOS] * 20, dtype)
        ids[7] = wrong
        (tmp_path / "t.bin").write_bytes(ids.tobytes())
        about = dict(
            dtype={"<u2": "uint16", "<u4": "uint32"}[dtype],
            vocab_size=vocab,
            tokens=60,
            documents=20,
            sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
        )
        (tmp_path / "t.bin.json").write_text(json.dumps(meta | about))
        assert f"t.bin: id {wrong} at token 7, expected ids below {vocab}" in message(
            lambda: PackedTokens.open(tmp_path / "t.bin")
        )


def test_a_description_without_eos_id_means_two(stdlib, tmp_path):
    "Files packed before the field was there"
    (tmp_path / "t.bin").write_bytes((stdlib.folder / "validation.bin").read_bytes())
    meta = json.loads((stdlib.folder / "validation.bin.json").read_text())
    assert meta.pop("eos_id") == EOS
    (tmp_path / "t.bin.json").write_text(json.dumps(meta))
    packed = PackedTokens.open(tmp_path / "t.bin")
    assert packed.meta.eos_id == EOS and (packed.tokens == EOS).sum() == packed.meta.documents
    (tmp_path / "t.bin.json").write_text(json.dumps(meta | dict(eos_id=1024)))
    assert "PackedMeta.eos_id=1024" in message(lambda: PackedTokens.open(tmp_path / "t.bin"))


def test_every_flipped_bit_is_found(stdlib, tmp_path):
    data, rng = bytearray((stdlib.folder / "validation.bin").read_bytes()), random.Random(0)
    (tmp_path / "t.bin.json").write_bytes((stdlib.folder / "validation.bin.json").read_bytes())
    for _ in range(20):
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        (tmp_path / "t.bin").write_bytes(data)
        assert "t.bin" in message(lambda: PackedTokens.open(tmp_path / "t.bin"))
        data[at] ^= bit


KILLED = """if 1:
    import os, signal, sys
    from nash_lab.data import corpus
    from nash_lab.data.tokenizer import load_tokenizer
    folder, when = sys.argv[1:]
    def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
    def docs():
        for i in range(300):
            if when == 'reading' and i == 250: die()
            yield corpus.Document(f'document {i} ' * 1000, 'made')
    if when == 'before rename': os.replace = die
    if when == 'after rename': corpus.write_json = die
    corpus.pack(docs(), load_tokenizer(folder + '/tok.model'), folder + '/k.bin')"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("when", ["reading", "before rename", "after rename"])
def test_a_kill_leaves_nothing_that_looks_whole(stdlib, tmp_path, when):
    (tmp_path / "tok.model").write_bytes((stdlib.folder / "tok.model").read_bytes())
    old = pack([Document("old", "made")], stdlib.tok, tmp_path / "k.bin")
    assert child(KILLED, tmp_path, when, check=False).returncode == -signal.SIGKILL
    if when == "reading":
        assert PackedTokens.open(tmp_path / "k.bin").meta == old  # still whole: nothing was touched
    else:  # the old description goes before its ids do
        assert not (tmp_path / "k.bin.json").exists()
        message(lambda: PackedTokens.open(tmp_path / "k.bin"), FileNotFoundError)
    new = pack(
        [Document("new", "made")], stdlib.tok, tmp_path / "k.bin"
    )  # what a kill left is no obstacle
    assert PackedTokens.open(tmp_path / "k.bin").meta == new and not list(tmp_path.glob("*.part"))


MEMORY = """if 1:
    import resource, sys
    from nash_lab.data.corpus import Document, pack
    from nash_lab.data.tokenizer import load_tokenizer
    tok = load_tokenizer(sys.argv[1])
    docs = (Document(f'line {i} of a corpus that would not fit\\n' * 500, 'made') for i in range(int(sys.argv[3])))
    meta = pack(docs, tok, sys.argv[2])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, meta.text_bytes)"""


def test_packing_keeps_memory_bounded(stdlib, tmp_path):
    (small, few), (large, many) = (
        map(int, child(MEMORY, stdlib.folder / "tok.model", tmp_path / "m.bin", n).stdout.split())
        for n in (100, 1000)
    )
    assert few < 2e6 and many > 19e6
    assert large - small < 12, f"{small} MB for {few:,} bytes, {large} MB for {many:,}"


# ---- loader


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", ["cross", "mask"])
def test_resume_in_another_process_is_exact(stdlib, mode):
    "Random stops around the edges of epochs; the rest of the stream is hashed in a fresh process"
    code = """if 1:
        import hashlib, json, sys
        from itertools import islice
        from nash_lab.data.corpus import PackedTokens
        from nash_lab.data.loader import LoaderConfig, loader
        data = loader(PackedTokens.open(sys.argv[1]), LoaderConfig(**json.loads(sys.argv[2])))
        for state in json.loads(sys.argv[3]):
            data.set_state(state)
            print(hashlib.sha256(b''.join(b[k].tobytes() for b in islice(data, 5) for k in sorted(b))).hexdigest())"""
    cfg = dict(seq_len=96, batch_size=12, seed=5, documents=mode)
    once = loader(stdlib.train, LoaderConfig(**cfg))
    edge = -(-len(stdlib.train) // (96 * 12))
    stops = sorted(
        {
            0,
            1,
            edge - 2,
            edge - 1,
            edge,
            edge + 1,
            2 * edge,
            *random.Random(0).sample(range(2 * edge), 4),
        }
    )
    states, batches = {}, []
    while len(batches) < stops[-1] + 5:
        if len(batches) in stops:
            states[len(batches)] = once.get_state()
        batches.append(next(once))
    want = [
        hashlib.sha256(
            b"".join(b[k].tobytes() for b in batches[s : s + 5] for k in sorted(b))
        ).hexdigest()
        for s in stops
    ]
    out = child(
        code, stdlib.folder / "train.bin", json.dumps(cfg), json.dumps([states[s] for s in stops])
    )
    assert out.stdout.split() == want


@pytest.mark.parametrize("shards", [2, 3, 6])
def test_processes_divide_every_batch(stdlib, shards):
    cfg = LoaderConfig(seq_len=96, batch_size=12, seed=3)
    whole = loader(stdlib.train, cfg)
    for _ in range(4):
        next(whole)
    parts = [loader(stdlib.train, cfg, shard=p, shards=shards) for p in range(shards)]
    for p in parts:
        p.set_state(whole.get_state())  # one process's position serves all
    for _ in range(10):
        made = [next(p) for p in parts]
        assert equal(next(whole), {k: np.concatenate([m[k] for m in made]) for k in made[0]})


def test_an_epoch_covers_the_file_once(stdlib):
    cfg = LoaderConfig(seq_len=100, batch_size=7, epochs=2)
    seen = np.concatenate([b["targets"][b["mask"]] for b in loader(stdlib.train, cfg)])
    assert np.array_equal(
        np.bincount(seen, minlength=1024), 2 * np.bincount(stdlib.train.tokens[1:], minlength=1024)
    )
    held = np.concatenate([b["targets"][b["mask"]] for b in eval_batches(stdlib.train, 100, 7)])
    assert np.array_equal(held, stdlib.train.tokens[1:])


def test_seeds_and_epochs_give_different_orders(stdlib):
    def first(seed, epoch):
        data = loader(stdlib.train, LoaderConfig(seq_len=64, batch_size=8, seed=seed))
        data.set_state(data.get_state() | dict(batch=epoch * (data.rows // 8)))
        return next(data)["tokens"].tobytes()

    assert len({first(s, e) for s in range(4) for e in range(3)}) == 12


def test_bad_loaders(stdlib):
    n = len(stdlib.train)
    assert f"seq_len={n} needs {n + 1} tokens, found {n}" in message(
        lambda: loader(stdlib.train, LoaderConfig(seq_len=n))
    )
    next(loader(stdlib.train, LoaderConfig(seq_len=n - 1)))  # the longest row there is
    state = loader(stdlib.train, LoaderConfig()).get_state()
    for change in (
        dict(seq_len=64),
        dict(batch_size=8),
        dict(seed=1),
        dict(shuffle=False),
        dict(documents="mask"),
    ):
        assert next(iter(change)) in message(
            lambda: loader(stdlib.train, LoaderConfig(**change)).set_state(state)
        )
    validation = PackedTokens.open(stdlib.folder / "validation.bin")
    assert "sha256" in message(lambda: loader(validation, LoaderConfig()).set_state(state))


# ---- real files


def test_real_text(data, tmp_path):
    "A play as one document, stories between end-of-text marks, questions from JSON lines"

    def texts(**kwargs):
        return [d.text for d in documents(CorpusConfig(holdout=0, **kwargs))]

    play = texts(source="text", paths=(str(data / "text/tinyshakespeare.txt"),))
    assert [t.encode() for t in play] == [(data / "text/tinyshakespeare.txt").read_bytes()]
    stories = texts(
        source="text", paths=(str(data / "text/tinystories_sample.txt"),), separator="<|endoftext|>"
    )
    raw = (data / "text/tinystories_sample.txt").read_text()
    assert stories == [t for t in raw.split("<|endoftext|>") if t.strip()] and len(stories) >= 5
    questions = texts(
        source="jsonl",
        paths=(str(data / "gsm8k/train.jsonl"),),
        field="question",
        max_bytes=300_000,
    )
    assert len(questions) > 500 and all(questions)
    tok = train_tokenizer(
        [*play, *stories, *questions], tmp_path / "t.model", TokenizerConfig(vocab_size=2048)
    )
    assert [tok.decode(i) for i in tok.encode_batch(questions)] == questions
    meta = pack(
        (Document(t, "all") for t in [*play, *stories, *questions]), tok, tmp_path / "t.bin"
    )
    assert 2.5 < PackedTokens.open(tmp_path / "t.bin").bytes_per_token < 4.5
    assert meta.text_bytes == sum(len(t.encode()) for t in [*play, *stories, *questions])
