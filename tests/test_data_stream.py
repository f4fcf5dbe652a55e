"Streams from outside: every position, other processes, formats, tokenizers from elsewhere, an unreachable hub, real text."

import hashlib, itertools, json, os, random, shutil, socket, subprocess, sys, threading
from contextlib import closing
from dataclasses import replace
from itertools import islice
import numpy as np
import pytest
from nash_lab.data.corpus import PackedTokens, pack
from nash_lab.data.filters import clean, fault, near_keys, similarity
from nash_lab.data.loader import LoaderConfig, as_batch, loader
from nash_lab.data.sources import Source, SourceConfig, parse_source
from nash_lab.data.stream import (
    Documents,
    StreamConfig,
    merge_states,
    stream_documents,
    stream_loader,
)
from nash_lab.data.tokenizer import (
    EOS,
    HFTokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)


def message(call, kind=ValueError) -> str:
    with pytest.raises(kind) as e:
        call()
    assert "\n" not in str(e.value), "an error is one line"
    return str(e.value)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def qwen_like(texts, size=400, nfc=True):
    "A small byte-level BPE tokenizer in the manner of Qwen2, trained on the spot"
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    if nfc:
        model.normalizer = normalizers.NFC()
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with sources of several kinds, with copies and near copies, and a tokenizer of each kind"
    import datasets

    datasets.disable_progress_bars()
    folder, rng = tmp_path_factory.mktemp("made"), random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(300)]

    def text(n):
        return " ".join(rng.choices(words, k=n))

    texts = [text(rng.randint(5, 60)) for _ in range(60)]
    texts += texts[:6] + [t.replace(" ", "  ", 1) + "." for t in texts[6:12]]
    for i in range(3):
        (folder / f"a{i}.jsonl").write_text(
            "\n".join(json.dumps({"text": t, "n": 1}) for t in texts[i::3])
        )
    datasets.Dataset.from_dict({"body": [text(rng.randint(30, 90)) for _ in range(30)]}).to_parquet(
        folder / "b.parquet"
    )
    (folder / "long.txt").write_text(text(1500))
    tok = train_tokenizer(texts, folder / "tok.model", TokenizerConfig(vocab_size=330))
    qwen_like(texts).save(str(folder / "tokenizer.json"))
    return dict(
        folder=folder,
        tok=tok,
        hf=load_tokenizer(folder / "tokenizer.json"),
        a=SourceConfig(str(folder / "a*.jsonl"), weight=2, shuffle_buffer=7),
        b=SourceConfig(
            str(folder / "b.parquet"), column="body", weight=1, streaming=False, shuffle_buffer=1
        ),
        long=SourceConfig(str(folder / "long.txt"), weight=1),
    )


MODES = dict(
    mask=dict(),
    cross=dict(documents="cross", dedup="none"),
    minhash=dict(dedup="minhash", window=20, clean=False),
    two=dict(sources=("a", "b"), epochs=2),
    endless=dict(sources=("a", "b"), epochs=0),
    lanes=dict(sources=("a", "b"), lanes=2),
    long=dict(sources=("long", "a"), seq_len=33),
    other=dict(tok="hf", holdout=0.2),
    thread=dict(sources=("b",), prefetch=3, epochs=3),
)


def config(made, sources=("a",), tok="tok", **how):
    return StreamConfig(
        tuple(made[s] for s in sources),
        **dict(seq_len=48, batch_size=4, epochs=1, prefetch=0, seed=3) | how,
    ), made[tok]


@pytest.mark.parametrize("mode", MODES)
def test_the_rest_of_the_stream_is_exact_at_every_batch(made, mode):
    cfg, tok = config(made, **MODES[mode])
    once = stream_loader(cfg, tok)
    states, batches = [json.dumps(once.get_state())], []
    for b in islice(once, 40):
        batches.append(b)
        states.append(json.dumps(once.get_state()))
    assert len(batches) >= 12 and len(set(states)) == len(states)
    inside = sum(0 < json.loads(s)["lanes"]["0"]["used"] for s in states)
    assert inside > len(states) // 2, "most positions are inside a group, inside a document"
    fresh = stream_loader(cfg, tok)
    for stop, state in enumerate(states):
        fresh.set_state(json.loads(state))
        rest = list(islice(fresh, len(batches) - stop))
        assert len(rest) == len(batches) - stop and all(map(equal, rest, batches[stop:]))
        if cfg.epochs:
            assert len(batches) == 40 or next(fresh, None) is None
        if len(rest):
            assert fresh.counters() == once.counters() and fresh.get_state() == json.loads(
                states[-1]
            )
    for r in (once, fresh):
        r.close()


def test_resume_in_another_process_is_exact(made, tmp_path):
    cfg, tok = config(made, ("a", "b"), epochs=0, dedup="minhash", documents="mask")
    once = stream_loader(cfg, tok)
    for _ in range(11):
        next(once)
    (tmp_path / "state.json").write_text(json.dumps(once.get_state()))
    want = hashlib.sha256(
        b"".join(b[k].tobytes() for b in islice(once, 9) for k in sorted(b))
    ).hexdigest()
    code = """if 1:
        import hashlib, json, sys
        from itertools import islice
        from nash_lab.data.stream import StreamConfig, stream_loader
        from nash_lab.data.tokenizer import load_tokenizer
        from nash_lab.core.configs import from_json
        folder, state, cfg = sys.argv[1:]
        data = stream_loader(from_json(StreamConfig, json.loads(cfg)), load_tokenizer(folder + '/tok.model'))
        data.set_state(json.load(open(state)))
        print(hashlib.sha256(b''.join(b[k].tobytes() for b in islice(data, 9) for k in sorted(b))).hexdigest())"""
    from nash_lab.core.configs import to_json

    out = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(made["folder"]),
            str(tmp_path / "state.json"),
            json.dumps(to_json(cfg)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | dict(PYTHONHASHSEED="5"),
    )
    assert out.returncode == 0 and out.stdout.split() == [want], out.stderr


@pytest.mark.parametrize("lanes, shards", [(1, 2), (2, 2), (4, 2), (2, 4), (4, 4)])
def test_processes_divide_every_batch_and_may_change_their_number(made, lanes, shards):
    cfg, tok = config(made, ("a", "b"), batch_size=8, lanes=lanes, epochs=0)
    whole = list(islice(stream_loader(cfg, tok), 10))
    parts = [stream_loader(cfg, tok, shard=p, shards=shards) for p in range(shards)]
    for step in whole[:5]:
        mine = [next(p) for p in parts]
        assert equal(step, {k: np.concatenate([m[k] for m in mine]) for k in mine[0]})
    state = json.loads(json.dumps(merge_states([p.get_state() for p in parts])))
    for other in {1, 2, 4} - {3}:
        again = [stream_loader(cfg, tok, shard=p, shards=other) for p in range(other)]
        for p in again:
            p.set_state(state)
        for step in whole[5:]:
            mine = [next(p) for p in again]
            assert equal(step, {k: np.concatenate([m[k] for m in mine]) for k in mine[0]})


@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_lanes_never_overlap_and_cover(made, lanes):
    for name in ("a", "b"):
        cfg = made[name]
        parts = [
            list(Source(cfg, seed=1, lane=lane, lanes=lanes, epochs=1)) for lane in range(lanes)
        ]
        assert sorted(sum(parts, [])) == sorted(Source(cfg, epochs=1))
        assert all(parts)


def test_epochs_are_counted_per_source(made):
    cfg, tok = config(made, ("a", "b"), epochs=0)
    run, seen = stream_loader(cfg, tok), []
    for _ in range(150):
        next(run)
        seen.append(tuple(c["epoch"] for c in run.counters().values()))
    assert all(
        x <= y for k in (0, 1) for (x, y) in zip([o[k] for o in seen], [o[k] for o in seen][1:])
    ), "epochs only grow"
    assert min(seen[-1]) >= 1 and any(x != y for x, y in seen), (
        "each source is in a pass of its own"
    )
    counts = run.counters()[str(made["folder"] / "b.parquet")]
    assert (
        counts["documents"] == counts["rows"] == 30 * counts["epoch"] + counts["documents"] % 30
    )  # no pass drops what an earlier one had


def test_weights_hold_over_every_window(made):
    cfg, _ = config(made, ("a", "b"), epochs=0, dedup="none", clean=False)
    names = [source.name for source in cfg.sources]
    given = [
        (names.index(d.source), len(d.text.encode())) for d in islice(Documents(cfg), 600)
    ]
    bytes_ = np.cumsum([[n if i == k else 0 for k in range(2)] for i, n in given], axis=0)
    largest = max(n for _, n in given)
    for window in (5, 20, 100):
        part = bytes_[window:] - bytes_[:-window]
        assert abs(part[:, 0] - 2 / 3 * part.sum(1)).max() < 2 * largest


def test_stream_and_packed_file_give_the_same_batches(made, tmp_path):
    for kind, mode in itertools.product(("tok", "hf"), ("cross", "mask")):
        cfg, tok = config(made, ("a", "b"), tok=kind, documents=mode)
        meta = pack(stream_documents(cfg), tok, tmp_path / "t.bin")
        assert meta.eos_id == tok.eos_id
        packed = PackedTokens.open(tmp_path / "t.bin", tokenizer_hash=tok.hash)
        want = list(loader(packed, LoaderConfig(48, 4, shuffle=False, epochs=1, documents=mode)))
        got = list(stream_loader(cfg, tok))
        assert len(got) == len(want) > 5 and all(map(equal, got, want))


def test_validation_documents_are_never_trained_on(made):
    cfg, _ = config(made, ("a", "b"), holdout=0.3)
    train, held = (
        {d.text for d in stream_documents(replace(cfg, split=s))} for s in ("train", "validation")
    )
    assert train and held and not train & held


# ---- rows of several documents, in the model


def test_documents_of_a_row_do_not_see_each_other(made):
    "Loss of a row of three documents = the sum of the losses of each alone"
    import jax.numpy as jnp
    from flax import nnx
    from nash_lab.model.transformer import LM, ModelConfig

    hf = made["hf"]
    lm = LM(ModelConfig.tiny(vocab_size=hf.vocab_size), rngs=nnx.Rngs(0))
    docs = [hf.encode(t, eos=True) for t in ("one document", "and another one", "the third")]

    def nats(ids):
        row = np.full((1, 49), hf.pad_id, np.int32)
        row[0, : len(ids)] = ids
        b = {
            k: jnp.asarray(v)
            for k, v in as_batch(row, np.arange(49)[None] < len(ids), "mask", hf.eos_id).items()
        }
        total, count = lm.loss(
            b["tokens"], b["targets"], b["mask"], positions=b["positions"], segments=b["segments"]
        )
        return float(total), int(count)

    whole, alone = nats(sum(docs, [])), [nats(d) for d in docs]
    assert whole[1] == sum(n for _, n in alone) == sum(map(len, docs)) - 3
    assert abs(whole[0] - sum(x for x, _ in alone)) < 1e-3


# ---- tokenizers from elsewhere


def test_a_tokenizer_json_in_place_of_sentencepiece(made, tmp_path):
    hf = made["hf"]
    assert (
        isinstance(hf, HFTokenizer) and hf.eos_id == hf.vocab_size - 3 != EOS and hf.bos_id is None
    )
    for text in ("", " a  b\n\n", "<|endoftext|>", "<|im_start|>x", "漢字 🙂", "\t\0", "e\u0301"):
        assert hf.eos_id not in hf.encode(text)
        assert hf.decode(hf.encode(text, eos=True)) == (
            "é" if text == "e\u0301" else text
        )  # the file says NFC
    assert hf.encode_batch(["a b", "c"]) == [hf.encode("a b"), hf.encode("c")]
    assert "U+D800" in message(lambda: hf.encode("\ud800"))
    assert "no tokenizer file here" in message(
        lambda: load_tokenizer(tmp_path / "none.json"), FileNotFoundError
    )
    for bad in (b"", b'{"model": 1}', b"\xff"):
        (tmp_path / "bad.json").write_bytes(bad)
        assert "bad.json: not a tokenizer.json" in message(
            lambda: load_tokenizer(tmp_path / "bad.json")
        )


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path):
    model = qwen_like(["some text to train on"] * 3, 280)
    model.enable_truncation(3)
    model.enable_padding(length=9, pad_token="<|im_end|>", pad_id=model.token_to_id("<|im_end|>"))
    model.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(tmp_path)
    assert len(tok.encode("some text to train on, and more")) > 10 and len(tok.encode("a")) == 1


def test_the_published_gpt2_vocabulary(data, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = Tokenizer(
        models.BPE.from_file(
            str(data / "tokenizer/gpt2_vocab.json"), str(data / "tokenizer/gpt2_merges.txt")
        )
    )
    model.pre_tokenizer, model.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tok.vocab_size, tok.eos_id) == (50_257, 50_256)
    assert tok.encode("Hello world") == [15496, 995]
    names = SourceConfig(str(data / "text/names.txt"), sample_by="line")
    batch = next(
        stream_loader(StreamConfig((names,), seq_len=128, batch_size=2, epochs=1, prefetch=0), tok)
    )
    assert (batch["tokens"] == 50_256).any() and batch["segments"].max() > 1
    ends = batch["tokens"] == 50_256
    assert not batch["mask"][ends].any()


# ---- the hub

HUB = """if 1:
    import sys, time
    from nash_lab.data.sources import Source, parse_source
    start = time.monotonic()
    try: print(*Source(parse_source(sys.argv[1], streaming=sys.argv[2] == 'stream'), epochs=1), sep='|')
    except Exception as error: print(f'{type(error).__name__}|{time.monotonic() - start:.1f}|{error}')"""


def hub(name, how="stream", **env):
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | env
    out = subprocess.run(
        [sys.executable, "-c", HUB, name, how], capture_output=True, text=True, timeout=90, env=env
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


@pytest.mark.parametrize("how", ["stream", "disk"])
def test_an_unreachable_hub_is_one_line_within_thirty_seconds(tmp_path, how):
    out = hub("nobody/nothing:some", how, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    kind, seconds, text = out.split("|")
    assert kind == "ConnectionError" and float(seconds) < 30 and "\n" not in out
    assert text.startswith(
        "nobody/nothing:some: the hub cannot be reached and nothing is cached (ConnectError"
    )


def test_a_hub_that_accepts_and_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        kind, seconds, text = hub(
            "nobody/nothing",
            HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}",
            HF_HOME=str(tmp_path),
        ).split("|")
    assert (
        kind == "ConnectionError"
        and float(seconds) < 30
        and "nobody/nothing: the hub cannot be reached" in text
    )


def test_offline_mode_and_what_is_cached(tmp_path):
    "A data set an earlier run left in the cache is used when the hub is away, streamed or not"
    import datasets

    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(5)))
    datasets.load_dataset(
        "json",
        data_files=str(tmp_path / "x.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "made"),
    )
    made = next(p for p in (tmp_path / "made/json").glob("*/*/*") if p.is_dir())
    cached = tmp_path / "cache/user___data/default/0.0.0/abc"
    cached.mkdir(parents=True)
    for f in made.iterdir():
        shutil.copy(f, cached / f.name.replace("json-", "data-"))
    info = json.loads((cached / "dataset_info.json").read_text()) | dict(dataset_name="data")
    (cached / "dataset_info.json").write_text(json.dumps(info))
    env = dict(HF_HOME=str(tmp_path), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    for more in (dict(HF_HUB_OFFLINE="1"), dict(HF_ENDPOINT="http://127.0.0.1:9")):
        for how in ("stream", "disk"):
            assert hub("user/data", how, **env, **more) == "|".join(f"row {i}" for i in range(5))
    kind, seconds, text = hub("user/other", HF_HUB_OFFLINE="1", **env).split("|")
    assert (
        kind == "ConnectionError"
        and "nothing is cached (HF_HUB_OFFLINE is set)" in text
        and float(seconds) < 10
    )


def test_a_hub_that_says_no(tmp_path):
    "404 and 401 are answers, not an absence: another error, and the cache is not asked"

    def serve(server, answer):
        while True:
            try:
                c, _ = server.accept()
            except OSError:
                return
            c.recv(9999)
            c.sendall(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            c.close()

    for answer in (b"404 Not Found", b"401 Unauthorized"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=serve, args=(server, answer), daemon=True).start()
            out = hub(
                "nobody/nothing",
                HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}",
                HF_HOME=str(tmp_path),
            )
        assert (
            out.startswith("FileNotFoundError|")
            and f"or it needs HF_TOKEN ({answer[:3].decode()})" in out
        )


def test_a_missing_column_names_those_there_are(made):
    for name in ("a", "b"):
        for streaming in (True, False):
            cfg = replace(made[name], column="content", streaming=streaming)
            error = message(lambda: stream_loader(StreamConfig((cfg,)), made["tok"]))
            assert "no column 'content', there are " in error and repr(made[name].column) in error


# ---- positions that do not fit


def test_a_position_of_another_stream_is_refused(made, tmp_path):
    cfg, tok = config(made, ("a", "b"))
    state = json.loads(json.dumps(stream_loader(cfg, tok).get_state()))
    for change in (
        dict(seq_len=47),
        dict(batch_size=8),
        dict(seed=4),
        dict(documents="cross"),
        dict(dedup="none"),
        dict(holdout=0.1),
        dict(max_chars=99),
    ):
        assert next(iter(change)) in message(
            lambda: stream_loader(replace(cfg, **change), tok).set_state(state)
        )
    assert "tokenizer" in message(lambda: stream_loader(cfg, made["hf"]).set_state(state))
    assert "sources[0]" in message(
        lambda: stream_loader(replace(cfg, sources=cfg.sources[::-1]), tok).set_state(state)
    )
    for free in (dict(epochs=5), dict(prefetch=2), dict(on_error="skip")):
        stream_loader(replace(cfg, **free), tok).set_state(state)
    for p in made["folder"].glob("a*.jsonl"):
        shutil.copy(p, tmp_path)
    moved = StreamConfig((SourceConfig(str(tmp_path / "a*.jsonl")),), prefetch=0)
    state = stream_loader(moved, tok).get_state()
    with open(tmp_path / "a1.jsonl", "a") as f:
        f.write('\n{"text": "one more", "n": 1}')
    assert "sources[0] files" in message(lambda: stream_loader(moved, tok).set_state(state))


# ---- real text


def test_cleaning_keeps_real_text(data):
    "Novels, a play, stories, code and questions pass; so does text in scripts without spaces"
    for name in (
        "alice_in_wonderland",
        "pride_and_prejudice",
        "tinyshakespeare",
        "tinystories_val",
        "names",
    ):
        text = (data / f"text/{name}.txt").read_text()
        assert fault(clean(text)) == "" and len(clean(text)) > 0.98 * len(text)
    import textwrap, inspect

    for module in (json.decoder, textwrap, shutil, subprocess):
        assert fault(clean(inspect.getsource(module))) == ""
    questions = [
        json.loads(o)["question"] for o in (data / "gsm8k/train.jsonl").read_text().splitlines()
    ]
    assert sum(fault(clean(q)) != "" for q in questions) == 0
    chinese = (
        "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈剑号巨阙珠称夜光"
        * 4
    )
    assert fault(chinese) == ""


def test_near_copies_of_real_questions_are_found(data):
    questions = [
        json.loads(o)["question"] for o in (data / "gsm8k/train.jsonl").read_text().splitlines()
    ][:800]
    rng, keys = random.Random(0), {}
    for q in questions:
        k = near_keys(q, 0.7)
        keys.update({k[i : i + 8]: q for i in range(0, len(k), 8)})

    def hit(q):
        return next(
            (
                keys[k[i : i + 8]]
                for k in [near_keys(q, 0.7)]
                for i in range(0, len(k), 8)
                if k[i : i + 8] in keys
            ),
            None,
        )

    found = total = 0
    for q in questions[:200]:
        words = q.split()
        words[rng.randrange(len(words))] = "another"
        if similarity(q, " ".join(words)) > 0.8:
            total, found = total + 1, found + (hit(" ".join(words)) == q)
    assert total > 150 and found / total > 0.85
    strangers = [
        json.loads(o)["question"] for o in (data / "gsm8k/train.jsonl").read_text().splitlines()
    ][2000:2400]
    wrong = [q for q in strangers if (o := hit(q)) and similarity(q, o) < 0.5]
    assert not wrong


def test_a_mixture_of_real_sources(data, tmp_path):
    sources = (
        SourceConfig(
            str(data / "gsm8k/train.jsonl"), column="question", weight=0.5, shuffle_buffer=500
        ),
        SourceConfig(
            str(data / "text/tinystories_val.txt"),
            sample_by="paragraph",
            weight=0.3,
            shuffle_buffer=100,
        ),
        SourceConfig(str(data / "text/pride_and_prejudice.txt"), sample_by="paragraph", weight=0.2),
    )
    cfg = StreamConfig(sources, seq_len=256, batch_size=8, dedup="exact")
    texts = [d.text for d in islice(Documents(cfg), 400)]
    tok = train_tokenizer(texts, tmp_path / "t.model", TokenizerConfig(vocab_size=1024))
    with closing(stream_loader(cfg, tok)) as run:
        batches = list(islice(run, 40))
        state, rest = run.get_state(), list(islice(run, 5))
        counts = run.counters()
    total = sum(c["bytes"] for c in counts.values())
    for s, c in zip(sources, counts.values()):
        assert abs(c["bytes"] / total - s.weight) < 0.03
    assert all(b["mask"].mean() > 0.9 for b in batches)
    with closing(stream_loader(cfg, tok)) as again:
        again.set_state(state)
        assert all(map(equal, islice(again, 5), rest))


def test_compressed_files(data):
    rows = list(
        Source(SourceConfig(str(data / "humaneval/HumanEval.jsonl.gz"), column="prompt"), epochs=1)
    )
    assert len(rows) == 164 and all("def " in r for r in rows)


def test_names_in_one_word(tmp_path):
    assert parse_source("user/data:subset") == SourceConfig("user/data", "subset")
    (tmp_path / "a:b.txt").write_text("x")
    assert parse_source(str(tmp_path / "a:b.txt")).subset == ""
