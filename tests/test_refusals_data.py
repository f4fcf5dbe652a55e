"What the floor of data refuses: every value by its name, and every bad input with what was found."

import json
from dataclasses import replace
from pathlib import Path
import pytest
from nash_lab.data.corpus import CorpusConfig, Document, PackedTokens, documents, pack
from nash_lab.data.loader import LoaderConfig, eval_batches, loader
from nash_lab.data.filters import Memory
from nash_lab.data.sources import Source, SourceConfig, local_files, parse_source
from nash_lab.data.stream import Mixture, StreamConfig, merge_states, share, stream_loader
from nash_lab.data.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    TokenizerConfig,
    load_tokenizer,
    special_ids,
    train_tokenizer,
)

SETTINGS = [
    (TokenizerConfig, dict(vocab_size=260)),
    (TokenizerConfig, dict(character_coverage=0.0)),
    (TokenizerConfig, dict(character_coverage=1.1)),
    (TokenizerConfig, dict(max_text_bytes=-1)),
    (CorpusConfig, dict(source="csv")),
    (CorpusConfig, dict(source="text", paths=())),
    (CorpusConfig, dict(paths=("a.txt",))),
    (CorpusConfig, dict(holdout=1.0)),
    (CorpusConfig, dict(holdout=-0.1)),
    (CorpusConfig, dict(max_bytes=-1)),
    (CorpusConfig, dict(on_error="go on")),
    (LoaderConfig, dict(seq_len=0)),
    (LoaderConfig, dict(batch_size=0)),
    (LoaderConfig, dict(seed=-1)),
    (LoaderConfig, dict(seed=2**32)),
    (LoaderConfig, dict(epochs=-1)),
    (LoaderConfig, dict(prefetch=-1)),
    (LoaderConfig, dict(documents="cut")),
    (SourceConfig, dict(name="")),
    (SourceConfig, dict(name="a", weight=0)),
    (SourceConfig, dict(name="a", shuffle_buffer=-1)),
    (SourceConfig, dict(name="a", sample_by="word")),
    *((StreamConfig, {name: 0}) for name in ("seq_len", "batch_size", "lanes", "window")),
    *(
        (StreamConfig, {name: -1})
        for name in ("epochs", "min_chars", "max_chars", "workers", "prefetch", "seed")
    ),
    *((StreamConfig, {name: 1.5}) for name in ("holdout", "max_bad_share", "similarity")),
    *((StreamConfig, {name: "fuzzy"}) for name in ("documents", "dedup", "split", "on_error")),
    (StreamConfig, dict(lanes=4, batch_size=6)),
    (CorpusConfig, dict(max_bad_share=1.1)),
    (CorpusConfig, dict(max_record_bytes=0)),
]


@pytest.mark.parametrize(
    "cls, values",
    SETTINGS,
    ids=lambda o: o.__name__ if isinstance(o, type) else ",".join(map(str, o)),
)
def test_a_setting_is_refused_by_name_and_value(cls, values):
    with pytest.raises(ValueError) as error:
        cls(**values)
    name, value = list(values.items())[-1]
    assert f"{cls.__name__}.{name}={value!r}" in str(error.value)


# ---- tokenizers


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [f"line {i} of a text with {i * 7} words\n" for i in range(300)]
    return train_tokenizer(
        texts, tmp_path_factory.mktemp("tok") / "tok.model", TokenizerConfig(vocab_size=320)
    )


@pytest.mark.parametrize(
    "texts, found",
    [([], "no text"), (["too little"], "vocab_size=32000"), (["half \udc00"], "U+DC00")],
)
def test_a_failed_training_leaves_no_file(tmp_path, texts, found):
    with pytest.raises(ValueError, match="none.model|U\\+DC00") as error:
        train_tokenizer(texts, tmp_path / "none.model")
    assert found in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("ids", [[320], [-1]])
def test_an_id_out_of_range_is_refused(tok, ids):
    with pytest.raises(ValueError, match=f"{ids[0]}.*320"):
        tok.decode(ids)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    for path in ("vocab.txt", "vocab"):
        with pytest.raises(ValueError, match=path):
            load_tokenizer(path)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"something else")
    with pytest.raises(ValueError, match="t.json: not a tokenizer.json"):
        HFTokenizer(b"{}", Path("t.json"))
    with pytest.raises(ValueError, match="ends a document"):
        special_ids(None, {"a": 0})


def test_a_named_special_piece_has_to_be_there(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    hf = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="begins a text"):
        hf.encode("a", bos=True)
    with pytest.raises(ValueError, match="3.*vocabulary of 3"):
        hf.decode([3])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(ValueError, match="<|end|>"):
        load_tokenizer(tmp_path)


# ---- packed files


def test_nothing_to_pack_is_an_error_and_no_file(tmp_path, tok):
    (tmp_path / "a.txt").write_text("one document, which is train")
    cfg = CorpusConfig("text", (str(tmp_path / "a.txt"),))
    with pytest.raises(ValueError, match="none.bin.*no documents.*validation"):
        pack(documents(cfg, "validation"), tok, tmp_path / "none.bin", split="validation")
    assert not (tmp_path / "none.bin").exists()
    with pytest.raises(ValueError, match="split='test'"):
        next(documents(cfg, "test"))


DAMAGE = {  # what happens to the file, to its description -> what the message holds
    "one bit": (lambda data: bytes([data[0] ^ 1]) + data[1:], {}, "not the file that was packed"),
    "cut": (lambda data: data[:-3], {}, "bytes, expected"),
    "an id": (lambda data: b"\x40\x01" + data[2:], {}, "id 320 at token 0, expected ids below 320"),
    "smaller vocabulary": (lambda data: data, dict(vocab_size=270), "expected ids below 270"),
    "type": (lambda data: data, dict(tokens="9"), "PackedMeta.tokens"),
    "no description": (lambda data: data, None, "t.bin.json: missing"),
    "no file": (None, {}, "no packed tokens here"),
}


@pytest.mark.parametrize("data, about, found", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_packed_file_is_refused(tmp_path, tok, data, about, found):
    path, said = tmp_path / "t.bin", tmp_path / "t.bin.json"
    pack((Document(f"row {i}", "made") for i in range(99)), tok, path)
    if data:
        path.write_bytes(data(path.read_bytes()))
    else:
        path.unlink()
    if about is None:
        said.unlink()
    else:
        said.write_text(json.dumps(json.loads(said.read_text()) | about))
    with pytest.raises((ValueError, FileNotFoundError), match=found):
        PackedTokens.open(path)


def test_a_file_for_another_tokenizer_is_refused(tmp_path, tok):
    pack([Document("row", "made")], tok, tmp_path / "t.bin")
    with pytest.raises(ValueError, match="tokenizer_hash.*another"):
        PackedTokens.open(tmp_path / "t.bin", tokenizer_hash="another")
    with pytest.raises(ValueError, match="vocab_size 320, expected at most 256"):
        PackedTokens.open(tmp_path / "t.bin", vocab_size=256)


# ---- positions and shares


@pytest.fixture(scope="module")
def packed(tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "t.bin"
    pack((Document(f"row {i}", "made") for i in range(99)), tok, path)
    return PackedTokens.open(path)


CFG = LoaderConfig(seq_len=8, batch_size=4, epochs=3)


@pytest.mark.parametrize(
    "how, found",
    [
        (dict(shards=3), "batch_size=4.*shards=3"),
        (dict(shard=2, shards=2), "shard=2"),
        (dict(shard=-1), "shard=-1"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(packed, how, found):
    with pytest.raises(ValueError, match=found):
        loader(packed, CFG, **how)


def test_a_position_beyond_the_end_or_of_nothing_is_refused(packed):
    run = loader(packed, CFG)
    state = run.get_state()
    for batch in (-1, run.batches + 1, None, "1"):
        with pytest.raises(ValueError, match=f"batch {batch!r}"):
            run.set_state(state | dict(batch=batch))
    with pytest.raises(ValueError, match="sha256 None"):
        run.set_state({})
    with pytest.raises(ValueError, match="expected at least 2"):
        next(eval_batches(replace(packed, tokens=packed.tokens[:1]), 8, 4))


# ---- sources and streams


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"row {i} of a list in plain words"}) for i in range(40))
    )
    return SourceConfig(str(tmp_path / "rows"))


def test_local_files_of_no_kind_or_two_are_refused(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none: no .parquet"):
        local_files(str(tmp_path / "none"))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match="a.md.*endings .parquet"):
        local_files(str(tmp_path / "*.md"))
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / "none" / name).write_text("{}")
    with pytest.raises(ValueError, match="json, text"):
        local_files(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="name"):
        parse_source("")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"hello")
    with pytest.raises(ValueError, match="bad.parquet: ArrowInvalid"):
        list(Source(SourceConfig(str(tmp_path / "bad.parquet")), epochs=1))


@pytest.mark.parametrize(
    "how, place, found",
    [
        (dict(lanes=4), (0, 3), "lanes=4.*shards=3"),
        (dict(lanes=4, epochs=1), (0, 2), "different steps"),
        (dict(workers=2), (0, 1), "workers=2"),
        ({}, (2, 2), "shard=2"),
        (dict(batch_size=9, lanes=3), (0, 6), "batch_size=9"),
    ],
)
def test_processes_that_do_not_fit_are_refused(how, place, found):
    with pytest.raises(ValueError, match=found):
        share(StreamConfig(**dict(batch_size=8) | how), *place)


def test_streams_that_give_nothing_are_refused(tok, rows):
    cfg = StreamConfig((rows,), seq_len=16, batch_size=2, epochs=1, prefetch=0)
    with pytest.raises(ValueError, match="whole pass gave no document .too short 40"):
        next(stream_loader(replace(cfg, min_chars=500), tok))
    with pytest.raises(ValueError, match="StreamConfig.sources"):
        stream_loader(StreamConfig(), tok)
    for weights in ([], [1, 0], [-1.0]):
        with pytest.raises(ValueError, match="positive"):
            Mixture(weights)


def test_positions_that_lack_a_lane_or_a_log_are_refused(tok, rows):
    cfg = StreamConfig((rows,), seq_len=16, batch_size=4, lanes=2, prefetch=0)
    half = stream_loader(cfg, tok, shard=0, shards=2).get_state()
    with pytest.raises(ValueError, match="no lane 1"):
        stream_loader(cfg, tok).set_state(half)
    with pytest.raises(ValueError, match=r"batches \[0, 1\]"):
        merge_states([half, half | dict(batch=1)])
    with pytest.raises(ValueError, match="3 bytes, expected 1 x 14"):
        Memory(1, 3, "AAAA", 1)
