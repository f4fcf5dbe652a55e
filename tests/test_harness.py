"Evaluation from outside: tables against dictionaries, scores against sums, intervals, probe files."

import gzip
import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nash_lab.data.corpus import PackedMeta, PackedTokens
from nash_lab.evals.scores import (
    EvalReport,
    Probe,
    bigram_logprobs,
    bootstrap,
    evaluate,
    model_rows,
    run_probes,
    score,
    table_rows,
    wilson,
)
from nash_lab.core.configs import from_json, to_json
from nash_lab.core.files import read_rows
from nash_lab.model.transformer import LM, ModelConfig


def packed(ids, v=256, bytes_per_token=3, name="a.bin", tokenizer="t"):
    ids = np.asarray(ids, np.uint16)
    return PackedTokens(
        ids,
        PackedMeta("uint16", v, len(ids), 1, len(ids) * bytes_per_token, tokenizer, "s", {}),
        Path(name),
    )


TEXT = np.random.default_rng(0).zipf(1.5, 3000) % 256


def test_unigram_and_bigram_sum_to_one():
    each = table_rows(packed(TEXT), packed([0, *range(256)]), seq_len=1)  # a row for each token
    assert np.exp(-each["unigram"].nats).sum() == pytest.approx(1)
    for u in (0, 1, 2, 255):
        assert np.exp(
            bigram_logprobs(TEXT, 256, np.full(256, u), np.arange(256))
        ).sum() == pytest.approx(1)


def test_bigram_by_dictionaries():
    pairs = Counter(zip(TEXT[:-1].tolist(), TEXT[1:].tolist()))
    n, contexts = Counter(pairs.values()), Counter(w for _, w in pairs)
    D = [0.0] + [k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k] for k in (1, 2, 3)]
    for (u, w), c in list(pairs.items())[:50]:
        total = sum(c for (a, _), c in pairs.items() if a == u)
        spare = sum(D[min(c, 3)] for (a, _), c in pairs.items() if a == u)
        want = (c - D[min(c, 3)] + spare * (contexts[w] + 1) / (len(pairs) + 256)) / total
        assert bigram_logprobs(TEXT, 256, np.array([u]), np.array([w]))[0] == pytest.approx(
            math.log(want), abs=1e-12
        )


@pytest.mark.parametrize("text", [[1, 1], [0, 1, 2, 3, 4], [7] * 50])
def test_bigram_of_tiny_texts_is_finite(text):
    u, w = (a.ravel() for a in np.meshgrid(np.arange(8), np.arange(8)))
    assert np.isfinite(bigram_logprobs(np.array(text), 8, u, w)).all()


def test_scores_add_up():
    rows = table_rows(packed(TEXT), packed(TEXT[:1000]), seq_len=64)
    uniform = score(rows["uniform"])
    assert (uniform.tokens, uniform.text_bytes) == (999, 2997)
    assert uniform.bits_per_byte == pytest.approx(8 / 3) and uniform.perplexity == pytest.approx(
        256
    )
    assert len(rows["uniform"].nats) == math.ceil(999 / 64)
    for name, r in rows.items():
        assert score(r).low <= score(r).bits_per_byte <= score(r).high, name


def test_model_and_tables_score_the_same_targets():
    lm, held = LM(ModelConfig.tiny(residual="plain")), packed(TEXT[:1000])
    for batches in (None, 0, 3):
        where = dict(seq_len=64, batch_size=4, batches=batches)
        rows = model_rows(lm, held, **where)
        np.testing.assert_array_equal(
            rows.targets, table_rows(packed(TEXT), held, **where)["bigram"].targets
        )
        assert score(rows).bits_per_byte == pytest.approx(
            8 / 3, abs=0.1
        )  # untrained is nearly uniform
    report = evaluate(
        lm,
        held,
        train=packed(TEXT),
        seq_len=64,
        batch_size=4,
        probes=[Probe("a", "b")],
        generate_text=lambda p: ["b"],
    )
    assert from_json(EvalReport, json.loads(json.dumps(to_json(report)))) == report


def test_intervals():
    assert bootstrap(np.ones(9), np.full(9, 2.0)) == (0.5, 0.5)
    assert bootstrap(TEXT * 1.0, np.ones(3000)) == bootstrap(TEXT * 1.0, np.ones(3000))
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(10, 10)[1] == 1.0 and 0.7 < wilson(10, 10)[0] < 0.73


@pytest.mark.parametrize(
    "kind, target, answer, passed",
    [
        ("exact", "np", " np\n", True),
        ("exact", "np", "np.", False),
        ("contains", "range(", "in range(3)", True),
        ("contains", "range[", "in range(3)", False),
        ("regex", r"^\s*return \w+$", " return x", True),
        ("regex", "^x", " x", False),
    ],
)
def test_probe_kinds(kind, target, answer, passed):
    report = run_probes(lambda prompts: [answer], [Probe("p", target, kind)])
    assert report.items[0].passed is passed


def load_probes(path):
    return read_rows(path, partial(from_json, Probe), "probes")


def test_probe_files(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "é", "target": "x"}\r\n\r\n{"prompt": "b", "target": "y", "kind": "exact"}\n'
    )
    probes = load_probes(path)
    assert probes == [Probe("é", "x"), Probe("b", "y", "exact")]
    report = run_probes(lambda some: ["x" for _ in some], probes, batch_size=1)
    assert [i.passed for i in report.items] == [True, False] and report.share == 0.5


@pytest.mark.parametrize(
    "text, message",
    [
        (b'{"prompt": "a"}', ":1: Probe: missing key 'target'"),
        (b"\n\n[1]", ":3: Probe: expected an object"),
        (b'{"prompt": "a", "target": 3}', ":1: Probe.target: expected str, found 3"),
        (b'{"prompt": "\xff"}', ":1: 'utf-8' codec"),
        (b'{"prompt": "a", "target": ""}', ":1: Probe.target=''"),
        (b'{"prompt": "a", ', ":1: "),
        (b'{"prompt": "a", "target": "(", "kind": "regex"}', ":1: Probe.target='('"),
        (
            b'{"prompt": "a", "target": "b", "kind": "fuzzy"}',
            ":1: Probe.kind: expected 'exact' | 'contains' | 'regex', found 'fuzzy'",
        ),
        (b'{"prompt": "a", "target": "b", "kinds": 1}', ":1: Probe: unknown key 'kinds'"),
        (b"\n \n", ": no probes in this file"),
    ],
)
def test_bad_probe_files_name_the_line(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_bytes(text)
    with pytest.raises(ValueError) as error:
        load_probes(tmp_path / "p.jsonl")
    assert f"p.jsonl{message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit():
    held = packed(TEXT[:100])
    with pytest.raises(ValueError, match="different tokenizers"):
        table_rows(packed(TEXT, tokenizer="u"), held)
    with pytest.raises(ValueError, match="seq_len=128 is longer"):
        model_rows(LM(ModelConfig.tiny()), held)
    found = model_rows(LM(ModelConfig.tiny()), packed(TEXT, 300), seq_len=8, batches=1)
    assert len(found.nats)  # pieces that no text holds
    beyond = packed(TEXT, 300)
    beyond.tokens[7] = 260
    with pytest.raises(ValueError, match="vocabulary of 300, id 260, the model has 256 rows"):
        model_rows(LM(ModelConfig.tiny()), beyond, seq_len=8)


def test_packed_probe_files_that_are_cut(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    with pytest.raises(FileNotFoundError, match="cut.jsonl.gz: no such file of probes"):
        load_probes(path)
    for data in (gzip.compress(b"{}")[:-9], b"no gzip at all"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cut.jsonl.gz: "):
            load_probes(path)


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="Probe.kind='fuzzy'"):
        Probe("a", "b", "fuzzy")
    with pytest.raises(ValueError, match="passed=0 of total=0 is no proportion"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="0 answers to 1 prompts"):
        run_probes(lambda prompts: [], [Probe("a", "b")])
    with pytest.raises(ValueError, match="1 probes need generate_text"):
        evaluate(LM(ModelConfig.tiny()), packed(TEXT[:100]), probes=[Probe("a", "b")])
