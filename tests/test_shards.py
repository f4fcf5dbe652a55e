"One data path: what a stream reads can be packed, in shards that continue, and trained on as one file."

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from nash_lab.data.corpus import CorpusConfig, Document, PackedMeta, PackedTokens, pack
from nash_lab.data.loader import LoaderConfig, eval_batches, loader
from nash_lab.data.sources import Source, SourceConfig
from nash_lab.data.stream import (
    CorpusDocuments,
    Documents,
    StreamConfig,
    pack_stream,
    stream_loader,
)
from nash_lab.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from nash_lab.lab.cli import main
from nash_lab.model.transformer import ModelConfig
from nash_lab.train.optim import OptimConfig
from nash_lab.train.pretrain import load_run, pretrain, read_metrics
from nash_lab.train.settings import TrainConfig

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()


def sentence(i, length=40):
    rng = np.random.default_rng(i)
    return " ".join(rng.choice(WORDS, length)) + f" {i}\n"


def equal(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def refused(capsys, line):
    "The one line with which a command is refused."
    assert main(line) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "Traceback" not in said, said
    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Two sources of 60 documents, a third of the second near copies of others; a tokenizer."
    home = tmp_path_factory.mktemp("shards")
    rows = [json.dumps({"text": sentence(i)}) + "\n" for i in range(60)]
    (home / "one.jsonl").write_text("".join(rows))
    texts = [sentence(1000 + i) for i in range(40)]
    texts += [text.replace(" 10", " 20") for text in texts[:20]]  # another number at the end
    (home / "two.txt").write_text("<|next|>".join(texts))
    tok = train_tokenizer(map(sentence, range(30)), home / "t.model", TokenizerConfig(300))
    sources = (
        SourceConfig(str(home / "one.jsonl"), weight=3),
        SourceConfig(str(home / "two.txt"), separator="<|next|>", weight=1),
    )
    cfg = StreamConfig(sources, seq_len=16, batch_size=4, epochs=1, dedup="minhash")
    return home, cfg, tok


def test_shards_are_one_file_and_one_stream(made, tmp_path):
    "the same ids, hash, batches and positions, and the counts of what was left out"
    home, cfg, tok = made
    whole = pack_stream(Documents(cfg), tok, tmp_path / "whole.bin")
    parts = pack_stream(Documents(cfg), tok, tmp_path / "part.bin", shard_tokens=700)
    assert parts.sha256 == whole.sha256 and parts.documents == whole.documents == 100
    assert parts.skipped == whole.skipped == {"minhash duplicate": 20}
    assert parts.counts == whole.counts
    assert parts.counts[str(home / "two.txt")]["minhash duplicate"] == 20

    one = PackedTokens.open(tmp_path / "whole.bin")
    many = PackedTokens.open(tmp_path / "part-*.bin")
    sizes = [len(part) for part in many.tokens.parts]
    assert len(sizes) > 3 and all(700 <= n < 850 for n in sizes[:-1])
    alone = [PackedTokens.open(path).meta for path in sorted(tmp_path.glob("part-*.bin"))]
    assert sum(meta.documents for meta in alone) == 100 and alone[0].documents < 10

    rows = LoaderConfig(16, 4, seed=3, epochs=2)
    with closing(loader(one, rows)) as a, closing(loader(many, rows)) as b:
        for _ in range(20):
            assert equal(next(a), next(b))
        at = a.get_state()
        rest = list(a)
    with closing(loader(many, rows)) as b:  # a position in the file is one in its shards
        b.set_state(at)
        assert all(equal(x, y) for x, y in zip(b, rest, strict=True))
        assert b.counters()[str(home / "two.txt")]["minhash duplicate"] == 20
    scored = zip(eval_batches(one, 16, 4), eval_batches(many, 16, 4), strict=True)
    assert all(equal(a, b) for a, b in scored)
    order = LoaderConfig(16, 4, shuffle=False, epochs=1, documents="mask")
    with closing(stream_loader(cfg, tok)) as stream, closing(loader(many, order)) as b:
        assert all(equal(x, y) for x, y in zip(stream, b, strict=True))


@pytest.mark.parametrize("kind", ["stream", "corpus"])
def test_a_packing_that_dies_continues_to_the_byte(made, tmp_path, monkeypatch, kind):
    home, cfg, tok = made
    cfg = replace(cfg, dedup="exact")
    (tmp_path / "d").mkdir()
    for i in range(50):
        (tmp_path / f"d/{i}.txt").write_text(sentence(i % 45))
    corpus = CorpusConfig("text", (str(tmp_path / "d"),), holdout=0.1)
    docs = {"stream": lambda: Documents(cfg), "corpus": lambda: CorpusDocuments(corpus)}[kind]
    how = dict(split="train", shard_tokens=500)
    whole = pack_stream(docs(), tok, tmp_path / "whole/train.bin", **how)

    write = PackedMeta.write
    for dies in (1, 4, 7, 8):  # before a description, with its counts or without
        folder = tmp_path / str(dies)
        count = 0

        def killed(meta, path):
            nonlocal count
            count += 1
            if count == dies:
                raise KeyboardInterrupt
            write(meta, path)

        monkeypatch.setattr(PackedMeta, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            pack_stream(docs(), tok, folder / "train.bin", **how)
        monkeypatch.setattr(PackedMeta, "write", write)
        if (folder / "train.shards.json").exists():
            with pytest.raises(ValueError, match="not finished; the same nash_lab pack"):
                PackedTokens.open(str(folder / "train-*.bin"))
        else:  # one shard at most, and nothing that says it is a part
            for file in folder.glob("*"):
                file.unlink()
        assert pack_stream(docs(), tok, folder / "train.bin", **how).sha256 == whole.sha256
        for file in (tmp_path / "whole").iterdir():
            assert file.read_bytes() == (folder / file.name).read_bytes()
        assert not list(folder.glob("*.part"))
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert pack_stream(docs(), tok, folder / "train.bin", **how).sha256 == whole.sha256
    assert before == {f: f.stat().st_mtime_ns for f in folder.iterdir()}  # there already


def test_shares_to_the_end(made, tmp_path):
    "with a number of tokens the mixture begins its short source again: three to one in bytes"
    home, cfg, tok = made
    endless = replace(cfg, epochs=0)
    meta = pack_stream(Documents(endless), tok, tmp_path / "t.bin", max_tokens=20_000)
    sizes = [counts["bytes"] for counts in meta.counts.values()]
    assert 20_000 <= meta.tokens < 20_200
    assert abs(sizes[0] / sum(sizes) - 0.75) < 0.01
    few = pack_stream(Documents(cfg), tok, tmp_path / "few.bin", max_documents=7)
    assert few.documents == 7
    parts = dict(shard_tokens=300, max_tokens=1000)
    cut = pack_stream(Documents(endless), tok, tmp_path / "cut.bin", **parts)
    assert 1000 <= cut.tokens < 1100 and len(cut.source_hashes) == 4


def test_a_source_without_held_out_documents(made, tmp_path):
    home, cfg, tok = made
    few = tmp_path / "few.txt"
    few.write_text(sentence(7))
    cfg = replace(cfg, sources=(cfg.sources[0], SourceConfig(str(few))), holdout=0.1)
    meta = pack_stream(Documents(replace(cfg, split="validation")), tok, tmp_path / "v.bin")
    assert meta.counts[str(few)] == {"rows": 1, "other split": 1} and meta.documents > 2
    alone = replace(cfg, sources=cfg.sources[1:], split="validation")
    with pytest.raises(ValueError, match="no documents"):
        pack_stream(Documents(alone), tok, tmp_path / "alone.bin")
    assert not list(tmp_path.glob("alone*"))


def test_documents_without_an_end(made, tmp_path):
    home, cfg, tok = made
    docs = [Document(sentence(i), "a") for i in range(20)]
    with_end = pack(docs, tok, tmp_path / "with.bin")
    meta = pack(docs, tok, tmp_path / "t.bin", eos=False)
    assert meta.tokens == with_end.tokens - 20
    described = json.loads((tmp_path / "with.bin.json").read_text())
    names = "dtype vocab_size tokens documents text_bytes tokenizer_hash sha256 source_hashes split"
    assert list(described) == [*names.split(), "eos_id", "skipped", "version"]  # as ever
    packed = PackedTokens.open(tmp_path / "t.bin")
    assert tok.eos_id not in packed.tokens
    assert next(loader(packed, LoaderConfig(16, 4, documents="cross")))["mask"].all()
    with pytest.raises(ValueError, match="t.bin: packed without end tokens, so documents='mask'"):
        loader(packed, LoaderConfig(16, 4, documents="mask"))
    with pytest.raises(ValueError, match="packed without end tokens"):
        next(eval_batches(packed, 16, 4, documents="mask"))


def test_shards_that_do_not_belong_together(made, tmp_path):
    home, cfg, tok = made
    docs = [Document(sentence(i), "a") for i in range(20)]
    other = train_tokenizer(map(sentence, range(9)), tmp_path / "o.model", TokenizerConfig(290))
    pack(docs, tok, tmp_path / "a.bin", split="train")
    pack(docs, tok, tmp_path / "b.bin", split="validation")
    pack(docs, other, tmp_path / "c.bin", split="train")
    pack(docs, tok, tmp_path / "d.bin", split="train", eos=False)
    for name, said in {
        "b": "split 'validation', .*a.bin has 'train'",
        "c": "vocab_size 290, .*a.bin has 300",
        "d": "eos False, .*a.bin has True",
        "e": "no packed tokens here",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.bin: {said}"):
            PackedTokens.open([tmp_path / "a.bin", tmp_path / f"{name}.bin"])
    assert len(PackedTokens.open(tmp_path / "a.bin", vocab_size=301))
    with pytest.raises(ValueError, match="a.bin: packed with vocab_size 300, expected at most 299"):
        PackedTokens.open(tmp_path / "a.bin", vocab_size=299)
    with pytest.raises(FileNotFoundError, match="x.*bin: no such regular file"):
        PackedTokens.open(tmp_path / "x*.bin")
    twice = PackedTokens.open([tmp_path / "a.bin", str(tmp_path / "a*.bin")])
    assert twice.path == tmp_path / "a.bin"  # each file once
    both = PackedTokens.open([tmp_path / "a.bin", pack_again(docs, tok, tmp_path)])
    (tmp_path / "again.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match="again.bin: changed while it was in use: 3 bytes"):
        both.check_unchanged()


def pack_again(docs, tok, folder):
    pack(docs[:5], tok, folder / "again.bin", split="train")
    return folder / "again.bin"


def test_bad_use_is_one_line_and_loses_nothing(made, tmp_path, capsys):
    home, cfg, tok = made
    out = tmp_path / "out"
    pack_line = ["pack", "--tokenizer", str(home / "t.model"), "--out", str(out), "--quiet"]
    one = ["--data", str(home / "one.jsonl")]
    shards = ["--stream.holdout", "0", "--shard-tokens", "900"]
    assert main([*pack_line, *one, *shards]) == 0
    assert "shards" in capsys.readouterr().out
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert len(before) > 5
    for line, said in {
        "--shard-tokens -1": "PackJob.shard_tokens=-1: expected at least 0",
        "--max-tokens -5": "PackJob.max_tokens=-5",
        "--max-documents -5": "PackJob.max_documents=-5",
        "--val-documents -5": "PackJob.val_documents=-5",
        "--shard-tokens 800": "shard_tokens 900, expected 800; give another --out",
        "--no-eos": "eos True, expected False",
        "--column body": "no column 'body', there are 'text'",
        "--sample-by word": "invalid choice 'word' for argument '--sample-by'",
        "--separator x": "a separator stands between rows of .txt files only",
        "--corpus.source text --corpus.paths a.txt": "its defaults beside --data",
    }.items():
        found = refused(capsys, [*pack_line, *one, *shards, *line.split()])
        assert said in found, found
    assert "no such" in refused(capsys, [*pack_line, "--data", str(tmp_path / "x.jsonl")])
    packed = refused(capsys, [*pack_line, "--data", str(out / "train-00000.bin")])
    assert "expected one of the endings .parquet" in packed
    assert before == {file: file.read_bytes() for file in out.iterdir()}

    (out / "train.shards.json").write_text('{"shards": 3}')
    assert "missing key 'stream'; give another --out" in refused(
        capsys, [*pack_line, *one, *shards]
    )
    (out / "train.shards.json").unlink()
    assert "train-00000.bin: a shard of another packing" in refused(
        capsys, [*pack_line, *one, *shards]
    )
    mixed = ("a.bin", "b.jsonl")
    with pytest.raises(ValueError, match="packed .bin files or sources of text, not both"):
        TrainConfig(data=mixed)
    with pytest.raises(ValueError, match="packed .bin files or sources of text, not both"):
        TrainConfig(data=mixed[:1], stream=cfg)


def test_rows_between_separators(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo<|x|>three\n<|x|>f\xffur<|x|>\nfive")
    for streaming in (True, False):
        cfg = SourceConfig(str(tmp_path / "a.txt"), separator="<|x|>", streaming=streaming)
        source = Source(cfg, epochs=1)
        found = {source.last_place().rpartition("/")[2]: str(value) for value in source}
        assert list(found.values()) == [
            "one\ntwo",
            "three\n",
            "invalid UTF-8: character 2 of the line",
            "\nfive",
        ]
        assert list(found)[2] == "a.txt: row 3"
    lines = Source(SourceConfig(str(tmp_path / "a.txt"), sample_by="line"), epochs=1)
    assert len(list(lines)) == 4


def large_vocabulary(path, pieces=151_665):
    "As many pieces as Qwen2.5-Coder has, of which a few are ever used; the end is the last."
    vocabulary = {f"unused{i}": i for i in range(pieces - 1)}
    for i, letter in enumerate([*map(chr, range(32, 127)), "\n"]):
        del vocabulary[f"unused{1500 * i}"]
        vocabulary[letter] = 1500 * i
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(path))
    return load_tokenizer(path)


class Stop(Exception):
    pass


def test_a_large_vocabulary_from_shards_of_a_mixture(made, tmp_path, capsys):
    "Qwen2.5-Coder's sizes: packed by the command line, trained, stopped, resumed to the bit"
    home, cfg, _ = made
    tok = large_vocabulary(tmp_path / "tokenizer.json")
    assert tok.vocab_size == 151_665
    sources = [
        dict(name=str(home / "one.jsonl"), weight=3),
        dict(name=str(home / "two.txt"), weight=1, separator="<|next|>"),
    ]
    stream = dict(sources=sources, dedup="minhash", epochs=0, holdout=0.1)
    (tmp_path / "mix.json").write_text(json.dumps({"stream": stream}))
    line = ["pack", "--config", str(tmp_path / "mix.json"), "--quiet", "--out", str(tmp_path)]
    line += ["--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([*line, "--shard-tokens", "10000", "--max-tokens", "40000"]) == 0
    said = capsys.readouterr().out
    assert "in 4 shards" in said and "'minhash duplicate'" in said
    share = re.search(r"one.jsonl: ([\d.]+) % of the bytes", said)
    assert abs(float(share[1]) - 75) < 1
    packed = PackedTokens.open(str(tmp_path / "train-*.bin"))
    assert packed.meta.dtype == "uint32" and packed.meta.vocab_size == 151_665

    model = ModelConfig.tiny(
        vocab_size=151_808, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, residual="plain"
    )
    run = TrainConfig(
        run=str(tmp_path / "straight"),
        data=tuple(str(p) for p in sorted(tmp_path.glob("train-*.bin"))),
        val_bin=str(tmp_path / "validation.bin"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        steps=4,
        log_every=1,
        eval_every=4,
        eval_batches=1,
        checkpoint_every=2,
        model=model,
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=1),
        loader=LoaderConfig(seq_len=16, batch_size=4, documents="mask"),
    )
    pretrain(run)
    stopped = replace(run, run=str(tmp_path / "stopped"))

    def stop(record, state):
        if record["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        pretrain(stopped, hooks=(stop,))
    # and from a glob in place of the list: it is the same data
    stopped = replace(stopped, data=(), train_bin=f"{tmp_path}/train-*.bin", allow_changes=True)
    pretrain(stopped)
    kept = ("step", "loss", "grad_norm", "val_loss", "val_bpb")
    rows = [
        [[row.get(k) for k in kept] for row in read_metrics(Path(r.run) / "metrics.jsonl")]
        for r in (run, stopped)
    ]
    assert rows[0] == rows[1]
    a, b = (
        nnx.to_pure_dict(nnx.state(load_run(r.run)[0], nnx.Param)) for r in (run, stopped)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    data = read_metrics(tmp_path / "straight/metrics.jsonl")[-1]["data"]
    assert data[str(home / "two.txt")]["minhash duplicate"] >= 10  # as a stream reports it

    small = replace(run, model=replace(model, vocab_size=151_664), run=str(tmp_path / "small"))
    with pytest.raises(ValueError, match="vocab_size 151665, expected at most 151664"):
        pretrain(small)
    assert not (tmp_path / "small").exists()
