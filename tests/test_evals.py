"Evaluation from outside: likelihoods against lm-eval's own HuggingFace model, its tasks on real files, code in the box, reports compared."

import gzip
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'nash_lab[eval]'")

from nash_lab.adapt.hf import load_hf
from nash_lab.data.tokenizer import load_tokenizer
from nash_lab.evals.compare import EvalConfig, compare, describe, evaluate_tasks
from nash_lab.evals.lm_eval import (
    Answers,
    Responder,
    front_of,
    lm_eval_model,
    score_pairs,
    score_texts,
    windows,
)
from nash_lab.evals.code_tasks import (
    BENCHMARKS,
    Attempts,
    best_of,
    load_task,
    pass_at_k,
    quiet,
    read_data,
    score_programs,
    shown_tests,
)
from nash_lab.core.files import read_rows, write_json

TEXT = [
    "Question: Natalia sold clips to 48 of her friends in April. How many clips did she sell? Answer: 48 + 24 = 72 #### 72\n",
    "def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5\n",
    "Which piece of equipment keeps spores out? A breathing mask.\n",
    "The quick brown fox jumps over the lazy dog, and the man in the blue shirt sits on the chair near the sink.\n",
]


def write_llama(folder: Path, bos: str, window: int = 1024) -> Path:
    "A random LLaMA and a byte-level tokenizer, as `transformers` writes them; `bos`: template or none"
    import tokenizers as T
    import torch
    import transformers

    made = T.Tokenizer(T.models.BPE())
    made.pre_tokenizer, made.decoder = (
        T.pre_tokenizers.ByteLevel(add_prefix_space=False),
        T.decoders.ByteLevel(),
    )
    alphabet = T.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT * 4,
        T.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if bos != "none":
        made.post_processor = T.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["template", "none"])
def llama(request, tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return write_llama(tmp_path_factory.mktemp("llama"), request.param, window=64), request.param


def hf_model(folder):
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def ours(folder, **kw):
    return Responder(load_hf(folder), load_tokenizer(folder), batch_size=4, **kw)


def asked(*requests):
    return [SimpleNamespace(args=r, task_name=None) for r in requests]


REQUESTS = [
    ("Question: how many clips?\nAnswer:", " 72"),
    ("The quick brown ", "fox jumps"),
    ("", "def add"),
    ("a", "b c d e"),
    ("The man sits on the chair. " * 12, "near the sink"),
    ("Answer:", " 48 + 24 = 72 #### 72"),
]


@pytest.mark.parity
def test_rows_that_unpack_to_more_than_the_limit(tmp_path, monkeypatch):
    "Packed to next to nothing or not packed: refused before all of it is in memory"
    from nash_lab.core import files

    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10_000)
    for name, write in (("rows.jsonl.gz", gzip.compress), ("rows.jsonl", bytes)):
        (tmp_path / name).write_bytes(write(b'{"a": 1}\n' * 1000))
        assert len(read_rows(tmp_path / name)) == 1000
        (tmp_path / name).write_bytes(write(b'{"a": 1}\n' * 2000))
        with pytest.raises(ValueError, match=f"{name}: more than 10000 bytes, unpacked"):
            read_rows(tmp_path / name)


def test_likelihoods_of_lm_eval(llama):
    "Continuations, long contexts cut on the left, empty contexts, whole texts longer than the window: all within 1e-3"
    folder, bos = llama
    theirs, mine = hf_model(folder), ours(folder)
    assert mine.front == ([0] if bos == "template" else [])
    a, b = (
        theirs.loglikelihood(asked(*REQUESTS), disable_tqdm=True),
        lm_eval_model(mine).loglikelihood(asked(*REQUESTS)),
    )
    np.testing.assert_allclose([x for x, _ in b], [x for x, _ in a], atol=1e-3)
    assert [g for _, g in a] == [g for _, g in b]
    long = [("".join(TEXT),), ("short",)]
    with quiet():
        a = theirs.loglikelihood_rolling(asked(*long), disable_tqdm=True)
    np.testing.assert_allclose(
        lm_eval_model(mine).loglikelihood_rolling(asked(*long)), a, atol=1e-3
    )
    assert mine.counts["contexts cut"] == 1


JOINED = [  # context and continuation that one token spans, or that lm-eval cannot take
    ("The qui", "ck"),
    ("The quick br", "own fox jumps"),
    ("asse", "rt"),
    ("Ans", "wer:"),
    ("Answer", ": 7"),
    ("", "quick"),
    ("   ", "quick fox"),
    ("The quick", "   "),
    ("The quick ", ""),
    ("The chair ", " and"),
    ("G\u00f6", "del"),
    ("o", "\u0308"),
    ("the \U0001f469", "\u200d\U0001f4bb"),
    ("chair " * 40, "near the sink"),
]


@pytest.mark.parity
def test_a_token_that_spans_context_and_continuation(llama):
    "What is left of the whole after the context's number of tokens, one token at least, as transformers finds it likely"
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, bos = llama
    mine = ours(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(folder)
    merged = 0
    for (context, continuation), (nats, greedy) in zip(JOINED, mine.log_likelihoods(JOINED)):
        whole = words(context + continuation)["input_ids"]
        alone = words(context.rstrip())["input_ids"]
        start = min(len(alone), len(whole) - 1)
        merged += start < len(alone)
        before, after = whole[:start] if start < len(alone) else alone, whole[start:]
        ids = ((before or [0]) + after)[-65:]
        with torch.no_grad():
            z = theirs(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-len(after) :]
        want = sum(float(row[i]) for row, i in zip(z, after))
        assert nats == pytest.approx(want, abs=1e-3), (context, continuation)
        assert greedy == (z.argmax(-1).tolist() == after)
    assert merged >= 1 and not mine.faults


def test_continuations_longer_than_the_window(llama):
    "Window by window, as a whole text; the token before the continuation is its first condition"
    mine = ours(llama[0])
    long = "".join(TEXT)
    whole, alone = mine.encode_text("The" + long), mine.encode_text("The")
    parts = windows(whole[len(alone) :], alone[-1], 64)
    want = sum(nats for _, (nats, _) in score_pairs(mine.lm, parts))
    assert len(whole) - len(alone) > 64
    assert mine.log_likelihoods([("The", long)])[0] == (pytest.approx(want, abs=1e-3), False)
    ((one, _),) = mine.log_likelihoods([("", "a")])
    rolled = lm_eval_model(mine).loglikelihood_rolling(asked(("a",), ("",)))
    assert math.isfinite(rolled[0]) and (mine.front or rolled == [pytest.approx(one), 0])


class Picky:
    "A tokenizer that cannot read some of the text"

    def __init__(self, inner, *words):
        self.inner, self.words = inner, words

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, text, **where):
        for word in self.words:
            if word in text:
                raise ValueError(f"cannot read {word!r}")
        return self.inner.encode(text, **where)


def test_bad_problems_end_no_evaluation(tmp_path):
    "Named and counted, left out of every mean and of both reports; a score that is no number, and a task without any score, too"
    import jax.numpy as jnp
    from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
    from nash_lab.model.transformer import LM, ModelConfig

    words = train_tokenizer(TEXT * 3, tmp_path / "t.model", TokenizerConfig(vocab_size=320))
    lm = LM(ModelConfig.tiny(vocab_size=320, max_len=512))
    (tmp_path / "arc").mkdir()
    (tmp_path / "gsm8k").mkdir()
    rows = [
        {"query": f"Question: {i}?", "choices": ["one", f"two {i}"], "gold": i % 2, "source": "x"}
        for i in range(5)
    ]
    (tmp_path / "arc/arc_easy_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sums = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}", "tags": [i]} for i in range(9)]
    for split in ("train", "test"):
        (tmp_path / f"gsm8k/{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sums))
    cfg = EvalConfig(
        tasks=("arc_easy", "gsm8k"),
        limit=(5, 3),
        shots=0,
        data=str(tmp_path),
        max_new_tokens=4,
        answers=str(tmp_path / "answers.jsonl"),
    )
    full = evaluate_tasks(lm, words, cfg)
    holey = evaluate_tasks(lm, Picky(words, "two 3", "1 + 1?"), cfg)
    for task, gone, why in (("arc_easy", 3, "two 3"), ("gsm8k", 1, "1 + 1?")):
        part, whole = holey["tasks"][task], full["tasks"][task]
        assert part["lost"] == [{"id": gone, "why": f"cannot read {why!r}"}]
        assert part["counts"]["left out"]["without a score"] == 1 and whole["lost"] == []
        assert part["items"] == [item for item in whole["items"] if item["id"] != gone]
        for name, metric in part["metrics"].items():
            scores = [item["scores"][name] for item in part["items"]]
            assert metric["items"] == len(scores) and metric["value"] == np.mean(scores)
        assert f"{task} problem {gone} has no score: cannot read {why!r}" in describe(holey)
    found = compare(full, holey)
    assert {(row.task, row.items) for row in found.rows} == {("arc_easy", 4), ("gsm8k", 2)}
    assert "arc_easy: 1 problems without a score in one of them" in found.left_out
    json.dumps(holey, allow_nan=False)

    lm.norm.gain[...] = jnp.full_like(lm.norm.gain[...], jnp.nan)
    for _ in range(2):  # what is no number is not in the file of answers
        broken = evaluate_tasks(lm, words, replace(cfg, tasks=("arc_easy",), limit=(5,)))
        part = broken["tasks"]["arc_easy"]
        assert part["metrics"] == {} and part["items"] == [] and len(part["lost"]) == 5
        assert part["lost"][0]["why"] == "the model's log-likelihood is nan"
    with pytest.raises(ValueError, match="no task in common"):
        compare(full, {**broken, "tasks": {"arc_easy": part}})


@pytest.mark.parity
def test_answers_of_lm_eval(llama):
    "Greedy answers with stop strings; where the tokens decode to whole characters they are the same text"
    folder, _ = llama
    theirs, mine = hf_model(folder), ours(folder)
    contexts = ["Question: how many", "def add(a, b):", "The man in the blue"]
    settings = [
        {"until": until, "max_gen_toks": 24, "do_sample": False}
        for until in (["\n\n\n"], [" "], ["e", "o"])
    ]
    requests = [(c, s) for c in contexts for s in settings]
    with quiet():
        a = theirs.generate_until(asked(*((c, dict(s)) for c, s in requests)), disable_tqdm=True)
    assert lm_eval_model(mine).generate_until(asked(*requests)) == a
    greedy = mine.generate([(contexts[0], {"max_gen_toks": 3})])[0]
    if "\ufffd" not in greedy:
        assert (
            mine.log_likelihoods([(contexts[0], greedy)])[0][0]
            > mine.log_likelihoods([(contexts[0], " zzz")])[0][0]
        )


@pytest.mark.parity
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("bos", ["template", "none"])
def test_front_follows_the_tokenizer(tmp_path, bos, said):
    "The template in tokenizer.json decides, whatever add_bos_token says beside it, as in transformers"
    transformers = pytest.importorskip("transformers")
    folder = write_llama(tmp_path, bos)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": said}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)("clips")["input_ids"]
    tokenizer = load_tokenizer(folder)
    assert [*front_of(tokenizer), *tokenizer.encode("clips")] == theirs


def test_requests_that_cannot_be_asked(tmp_path):
    from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
    from nash_lab.evals.lm_eval import split_pair
    from nash_lab.model.transformer import LM, ModelConfig

    tokenizer = train_tokenizer(TEXT * 3, tmp_path / "t.model", TokenizerConfig(vocab_size=320))
    model = Responder(LM(ModelConfig.tiny(vocab_size=320)), tokenizer)
    for call, said in (
        (
            lambda: split_pair(tokenizer.encode, "a", "", 0),
            "the continuation '' has no token of its own",
        ),
        (
            lambda: [*score_pairs(model.lm, [([1], [5] * 65)])],
            "a continuation of 65 tokens, the model reads",
        ),
        (lambda: score_texts(model, ["a", ""]), "2 documents, 1 of them empty"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    small = Responder(LM(ModelConfig.tiny(vocab_size=300)), tokenizer)
    found = small.log_likelihoods([("a", "b"), ("a", TEXT[0])])
    assert math.isfinite(found[0][0]) and found[1] == (-math.inf, False)
    (why,) = small.faults.values()
    assert "the model has only 300 rows" in why


def test_windows_of_lm_eval():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for n, length in itertools.product((1, 4, 5, 9, 30), (1, 2, 4, 7)):
        ids = list(range(n))
        assert windows(ids, -1, length) == list(
            map(make_disjoint_window, get_rolling_token_windows(ids, -1, length, 1))
        )


@pytest.mark.parity
def test_bytes_are_those_of_the_text(llama):
    "Bits per byte: nats of the tokens after the front over UTF-8 bytes, however the text is cut"
    model, text = ours(llama[0]), "Gödel’s naïve 😀 proof"
    found = score_texts(model, [text])
    ((nats, _),) = dict(
        score_pairs(model.lm, [(model.front or [0], model.tokenizer.encode(text))])
    ).values()
    assert found.text_bytes == len(text.encode()) > len(text)
    assert found.bits_per_byte == pytest.approx(-nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_pass_at_k_by_counting():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            sets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-12)


# ---- tasks on the real files

PROBLEMS = {
    "gsm8k": 1319,
    "hellaswag": 1000,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "humaneval": 164,
    "mbpp": 500,
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_tasks_load_offline(data, name):
    "Every problem of the published set is there, and its first prompts can be made"
    loaded = load_task(name, data)
    assert len(loaded.task.eval_docs) == PROBLEMS[name]
    with quiet():
        loaded.task.build_all_requests(limit=3)
    assert {i.doc_id for i in loaded.task.instances} == {0, 1, 2} and loaded.code == (
        name in ("humaneval", "mbpp")
    )
    assert set(loaded.data.files) == set(BENCHMARKS[name].files.values())
    if name == "mbpp":
        assert loaded.data.left_out == {"not in the test set": 474}


def test_prompts_are_those_of_the_task(data):
    "Text of the files, in the form of lm-eval's YAML"
    row = read_rows(data / "hellaswag/val_1000.jsonl")[7]
    with quiet():
        task = load_task("hellaswag", data).task
        task.build_all_requests(limit=8)
        assert [i.args for i in task.instances[-4:]] == [
            (row["query"], " " + c) for c in row["choices"]
        ]
        assert task.doc_to_target(task.instances[-1].doc) == row["gold"]
        row = read_rows(data / "arc/arc_challenge_test.jsonl")[0]
        task = load_task("arc_challenge", data).task
        task.build_all_requests(limit=1)
        assert [i.args for i in task.instances] == [
            (row["query"] + "\nAnswer:", " " + c) for c in row["choices"]
        ]
        task = load_task("gsm8k", data, shots=8, seed=3).task
        task.build_all_requests(limit=2)
        prompt = task.instances[1].args[0]
        assert prompt.count("Question:") == 9 and prompt.count("####") == 8
        again = load_task("gsm8k", data, shots=8, seed=3).task
        again.build_all_requests(limit=2)
        other = load_task("gsm8k", data, shots=8, seed=4).task
        other.build_all_requests(limit=2)
    assert again.instances[1].args[0] == prompt != other.instances[1].args[0]


def test_repeated_options_are_taken_out(data):
    for name, count in (("arc_easy", 7), ("arc_challenge", 4)):
        rows, raw = (
            read_data(name, data).splits["test"],
            read_rows(data / BENCHMARKS[name].files["test"]),
        )
        assert sum(len(r["choices"]["text"]) == 3 for r in rows) == count
        for r, old in zip(rows, raw):
            assert len(set(r["choices"]["text"])) == len(r["choices"]["text"])
            assert (
                r["choices"]["text"][r["choices"]["label"].index(r["answerKey"])]
                == old["choices"][old["gold"]]
            )


@pytest.mark.parametrize("name, step", [("humaneval", 20), ("mbpp", 40)])
def test_reference_solutions_pass(data, name, step, tmp_path):
    "Through filter, metric and box; a wrong answer, an early exit and a file written outside do not"
    task, mark = load_task(name, data).task, tmp_path / "outside"
    with quiet():
        task.build_all_requests(samples=(some := list(range(1, PROBLEMS[name], step))))
    tmp_path.chmod(0o777)
    for i, request in enumerate(list(task.instances)):
        good = request.doc["canonical_solution"] if name == "humaneval" else request.doc["code"]
        bad = [
            "    return None\n",
            "import os; os._exit(0)",
            f"open({str(mark)!r}, 'w').write('x')\n",
        ][i % 3]
        outcome = []
        for answer in (good, bad):
            request.resps = [answer]
            task._instances = [request]
            task.apply_filters()
            scores = task.process_results(
                request.doc, [next(iter(request.filtered_resps.values()))]
            )
            outcome.append(next(iter(scores.values())))
        assert outcome == [1.0, 0.0], request.doc["task_id"]
    assert not mark.exists() and i + 1 == len(some) > 8


def test_shown_tests_hold_for_the_reference(data):
    "About half of HumanEval's docstrings have examples in the form of a session; nearly all of them pass with the reference solution"
    from nash_lab.evals.sandbox import run_many

    rows = read_rows(data / "humaneval/HumanEval.jsonl.gz")[::8]
    tests = [shown_tests(r) for r in rows]
    with_tests = [(r["prompt"] + r["canonical_solution"], t) for r, t in zip(rows, tests) if t]
    assert len(with_tests) > len(rows) / 3 and sum(
        r.passed for r in run_many(with_tests)
    ) >= 0.9 * len(with_tests)


def test_best_of_n_orders():
    "Tests first, likelihood among equals, an empty answer last"
    likely = SimpleNamespace(
        log_likelihoods=lambda pairs: [(-len(a) / 1.0, False) for _, a in pairs],
        tokenizer=SimpleNamespace(encode=lambda a: [0]),
    )
    doc = {"test_list": ["assert f(1) == 1", "assert f(2) == 4"], "test_setup_code": ""}
    short, right, empty = "f=abs", "def f(x): return x * x", ""
    tries, passed = [[empty, short, right]], [[False, False, True]]
    three, record = Attempts(3), {"doc": doc, "arguments": [["?"]], "resps": tries}
    found = score_programs(likely, [record], tries, passed, three)
    assert found["pass@1"][0] == pytest.approx(1 / 3)
    assert (found["best of 3 by likelihood"][0], found["best of 3 by tests"][0]) == (
        0.0,
        0.0,
    )  # both pass the shown test, the shorter one is likelier
    record["doc"] = doc | {"test_list": doc["test_list"][::-1]}
    assert score_programs(likely, [record], tries, passed, three)["best of 3 by tests"][0] == 1.0


def test_problems_that_cannot_be_asked(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "arc").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"gsm8k/{split}.jsonl").write_text(
            '{"question": "1 + 1?", "answer": "#### 2"}\n' * 12
        )
    (tmp_path / "arc/arc_challenge_test.jsonl").write_text(
        '{"query": "?", "choices": ["a"], "gold": 4}'
    )
    (tmp_path / "arc/arc_easy_test.jsonl").write_text('{"query": NaN}')
    for call, said in (
        (lambda: load_task("gsm8k", tmp_path, shots=50), "gsm8k: 50 shots, there are 12 examples"),
        (lambda: load_task("hellaswag", tmp_path), "val_1000.jsonl: no such file of problems"),
        (
            lambda: load_task("no_such_task", tmp_path),
            "task 'no_such_task', expected gsm8k, hellaswag",
        ),
        (lambda: read_data("gsm8k", tmp_path / "none"), "none: no such folder of benchmark files"),
        (
            lambda: read_data("arc_challenge", tmp_path),
            "arc_challenge_test.jsonl:1: gold=4 of 1 choices",
        ),
        (lambda: read_data("arc_easy", tmp_path), "arc_easy_test.jsonl:1: NaN"),
        (lambda: Attempts(samples=2, k=(3,)), r"Attempts.k=\(3,\)"),
        (lambda: Attempts(samples=0), "Attempts.samples=0"),
        (lambda: pass_at_k(3, 1, 4), "pass@k of n=3, c=1, k=4"),
        (lambda: best_of([[1.0]], [[True, False]]), "shapes .1, 1. of scores and .1, 2. differ"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            call()


def test_rows_with_further_keys_and_misspelt_ones(tmp_path):
    "Metadata of any type stays in the row; a key that a task needs is named with its line and the one that was meant"
    (tmp_path / "gsm8k").mkdir()
    rows = [
        {"question": f"{i}?", "answer": f"#### {i}", "tags": tags, "source": None}
        for i, tags in enumerate(([1], "one", {"a": 1}, None, [["x"]], 2.5))
    ]
    for split in ("train", "test"):
        path = tmp_path / f"gsm8k/{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_task("gsm8k", tmp_path, shots=1)
    assert loaded.data.splits["test"] == rows
    assert [json.loads(doc["tags"]) for doc in loaded.task.eval_docs] == [r["tags"] for r in rows]
    with quiet():
        loaded.task.build_all_requests()
    assert len(loaded.task.instances) == 6

    rows[4]["anwser"] = rows[4].pop("answer")
    path.write_text("\n".join(json.dumps(row) + "\n" for row in rows))  # with blank lines
    with pytest.raises(ValueError, match="test.jsonl:9: no key 'answer' .* mean 'anwser'"):
        read_data("gsm8k", tmp_path)
    path.write_text('["question"]')
    with pytest.raises(ValueError, match="test.jsonl:1: "):
        read_data("gsm8k", tmp_path)


# ---- end to end


@pytest.mark.parity
def test_an_imported_llama_end_to_end(data, tmp_path):
    "GSM8K 20, HellaSwag 50, ARC-Easy 50, HumanEval 5 without a network, into a report that compares with itself"
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = write_llama(tmp_path / "hf", "template")
    lm, tokenizer = load_hf(folder), load_tokenizer(folder)
    wanted = {"gsm8k": 20, "hellaswag": 50, "arc_easy": 50, "humaneval": 5}
    cfg = EvalConfig(
        tasks=(",".join(wanted),),
        limit=tuple(wanted.values()),
        shots=0,
        data=str(data),
        max_new_tokens=32,
    )
    report = evaluate_tasks(lm, tokenizer, cfg, name="tiny")
    for task, n in wanted.items():
        part = report["tasks"][task]
        assert part["counts"]["problems"] == n == len(part["items"]) and part["counts"][
            "left out"
        ] == {"beyond the limit": PROBLEMS[task] - n}
        for m in part["metrics"].values():
            assert 0 <= m["low"] <= m["value"] <= m["high"] <= 1 and m["items"] == n
        assert all(len(digest) == 64 for digest in part["files"].values()) and part["files"]
    assert report["model"]["front"] == [0] and len(report["model"]["weights"]) == 64
    assert set(report["tasks"]["gsm8k"]["metrics"]) == {
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    }
    assert set(report["tasks"]["humaneval"]["metrics"]) == {"pass@1"} and list(
        report["tasks"]
    ) == list(wanted)
    write_json(tmp_path / "a.json", report)
    found = compare(tmp_path / "a.json", tmp_path / "a.json")
    assert len(found.rows) == 7 and {r.verdict for r in found.rows} == {"no difference shown"}
    assert len(describe(found).splitlines()) == len(describe(report).splitlines()) == 7


@pytest.mark.parity
def test_an_evaluation_goes_on(data, tmp_path):
    "Answers in a file: the second evaluation asks only what is new, gives the same scores, and survives a half-written line"
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = write_llama(tmp_path / "hf", "template", window=512)
    lm, tokenizer = load_hf(folder), load_tokenizer(folder)
    cfg = dict(tasks=("arc_easy",), data=str(data), answers=str(tmp_path / "answers.jsonl"))
    first = evaluate_tasks(lm, tokenizer, EvalConfig(limit=(4,), **cfg))
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"key": "half')
    second = evaluate_tasks(lm, tokenizer, EvalConfig(limit=(8,), **cfg))
    later = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert later[: len(lines)] == lines and len(later) == 32 == len(
        {json.loads(o)["key"] for o in later}
    )
    assert [i["scores"] for i in second["tasks"]["arc_easy"]["items"][:4]] == [
        i["scores"] for i in first["tasks"]["arc_easy"]["items"]
    ]
    assert Answers("another model", tmp_path / "answers.jsonl").key("x") != Answers("a", None).key(
        "x"
    )
    with pytest.raises(ValueError, match="arc_easy: 4 and 8 problems"):
        compare(first, second)


@pytest.mark.parity
def test_several_attempts(data, tmp_path):
    "pass@1 and pass@2 of drawn programs, and the best of them, for both code tasks"
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = write_llama(tmp_path / "hf", "none")
    cfg = EvalConfig(
        tasks=("humaneval", "mbpp"),
        limit=(2,),
        data=str(data),
        max_new_tokens=8,
        attempts=Attempts(2, (1, 2)),
    )
    report = evaluate_tasks(load_hf(folder), load_tokenizer(folder), cfg)
    for part in report["tasks"].values():
        assert set(part["metrics"]) == {
            "pass@1",
            "pass@2",
            "best of 2 by likelihood",
            "best of 2 by tests",
        }
        assert (
            all(len(item["answers"]) == 2 for item in part["items"])
            and part["settings"]["attempts"]["samples"] == 2
        )


@pytest.mark.slow
def test_simple_evaluate(data):
    "The adapter works with lm-eval's own front door, which first spends ten seconds on describing the machine"
    from lm_eval import simple_evaluate
    from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
    from nash_lab.model.transformer import LM, ModelConfig
    import tempfile

    tokenizer = train_tokenizer(
        TEXT * 3, Path(tempfile.mkdtemp()) / "t.model", TokenizerConfig(vocab_size=320)
    )
    model = lm_eval_model(Responder(LM(ModelConfig.tiny(vocab_size=320, max_len=256)), tokenizer))
    task = load_task("arc_easy", data).task
    with quiet():
        found = simple_evaluate(model=model, tasks=[task], limit=2, bootstrap_iters=0)
    assert (
        found["results"]["arc_easy"]["sample_len"] == 2
        and "acc,none" in found["results"]["arc_easy"]
    )


def test_the_hub_without_a_network():
    "One line, not a page of retries; a task that lm-eval has but no file here; a name that nobody has"
    with pytest.raises(ValueError, match="gsm8k: no data from the hub: ") as said:
        load_task("gsm8k", "hub")
    assert "\n" not in str(said.value)


def test_measures_and_hashes():
    "Shares get Wilson's interval, other scores the bootstrap; a hash changes with one bit of one weight"
    from flax import nnx
    from nash_lab.evals.scores import mean_interval, weights_hash, wilson
    from nash_lab.model.transformer import LM, ModelConfig

    assert (m := mean_interval([1.0, 0.0, 1.0])).interval == "wilson" and (m.low, m.high) == wilson(
        2, 3
    )
    x = np.random.default_rng(0).normal(2.0, 1.0, 400)
    assert (m := mean_interval(x)).interval == "bootstrap" and m.high - m.low == pytest.approx(
        2 * 1.96 * x.std() / 20, rel=0.15
    )
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="expected at least 1, all finite"):
            mean_interval(bad)
    lm = LM(ModelConfig.tiny())
    before = weights_hash(lm)
    assert before == weights_hash(nnx.clone(lm))
    lm.norm.gain[...] = lm.norm.gain[...].at[3].set(np.nextafter(np.float32(1), np.float32(2)))
    assert weights_hash(lm) != before


def test_paired_tests():
    "McNemar by summing the binomial, for numpy's integers too; sign flips agree with all patterns; Holm never shrinks a p-value"
    from nash_lab.evals.compare import holm, mcnemar, sign_flip

    for a, b in itertools.product(range(5), repeat=2):
        tail = [math.comb(a + b, j) / 2 ** (a + b) for j in range(a + b + 1)]
        assert mcnemar(a, b) == pytest.approx(
            min(1.0, sum(p for p in tail if p <= tail[a] + 1e-12))
        )
    assert (
        mcnemar(np.int64(80), np.int64(80)) == 1.0
        and 0 < mcnemar(np.int64(300), np.int64(900)) < 1e-60
    )
    d = np.array([0.5, -0.25, 1.0, 0.75, 0.0, 0.25])
    exact = np.mean(
        [abs(np.dot(s, d)) >= d.sum() - 1e-12 for s in itertools.product((-1, 1), repeat=6)]
    )
    assert sign_flip(d) == pytest.approx(exact, abs=0.02)
    p = [0.04, 0.01, 0.5, 0.03]
    assert all(a >= b for a, b in zip(holm(p), p)) and holm(p)[1] == pytest.approx(0.04)


def test_reports_that_cannot_be_compared(tmp_path):
    "Different settings, prompts or numbers of problems, other formats, nothing in common, settings out of range"

    def report_of(n, task="t", **changes):
        items = [
            {"id": i, "problem": str(i), "prompt": str(i), "scores": {"m": 0.0}} for i in range(n)
        ]
        part = {
            "metrics": {"m": {}},
            "lower_is_better": [],
            "version": "1",
            "settings": {},
            "items": items,
        } | changes
        return {"format": "nash_lab eval 1", "model": {}, "tasks": {task: part}}

    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "cut.json").write_text('{"format": ')
    good = report_of(9)
    for call, said in (
        (lambda: compare(good, report_of(60)), "t: 9 and 60 problems"),
        (lambda: compare(good, report_of(9, settings={"shots": 8})), "t: settings differ"),
        (lambda: compare(good, report_of(9, version="2")), "t: version differ"),
        (lambda: compare(good, report_of(9, task="u")), "no task in common: t and u"),
        (
            lambda: compare(tmp_path / "old.json", good),
            "old.json: format None, expected 'nash_lab eval 1'",
        ),
        (lambda: compare(tmp_path / "cut.json", good), "cut.json: "),
        (lambda: compare(tmp_path / "none.json", good), "none.json: no such file"),
        (lambda: EvalConfig(tasks=()), r"EvalConfig.tasks=\(\)"),
        (lambda: EvalConfig(tasks=("gsm8k,gsm8k",)), "EvalConfig.tasks=.*each task once"),
        (lambda: EvalConfig(limit=(5, 5)), r"EvalConfig.limit=\(5, 5\)"),
        (lambda: EvalConfig(batch_size=0), "EvalConfig.batch_size=0"),
        (lambda: EvalConfig(shots=-1), "EvalConfig.shots=-1"),
        (lambda: EvalConfig(max_new_tokens=-1), "EvalConfig.max_new_tokens=-1"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            call()
