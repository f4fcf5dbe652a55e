"Every public sampler of text: an id without a piece is never drawn, each end token ends an answer, a larger tokenizer works."

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from nash_lab.adapt.continual import SkillGate, Suite, evaluate_suite
from nash_lab.adapt.lora import LoRAConfig
from nash_lab.adapt.sdft import Example, SDFTConfig, distil
from nash_lab.data.loader import LoaderConfig
from nash_lab.discover import ttt
from nash_lab.discover.consolidate import measure_run
from nash_lab.discover.problems import character_tokenizer, string_match
from nash_lab.discover.search import discover
from nash_lab.evals.lm_eval import Responder
from nash_lab.evals.scores import Probe
from nash_lab.lab.run import Model
from nash_lab.model.generate import (
    SampleConfig,
    best_of_n,
    generate,
    sampling_rules,
    unpad,
)
from nash_lab.model.speculative import draw_rows, speculate
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.train.settings import TrainConfig

WORDS = character_tokenizer("abcdefg ?\n.0123456789")
ROWS = 40  # of the embedding: 15 of them beyond the tokenizer
TASK = string_match("face", prompt="?")
KEY = jax.random.key(0)
SEARCH = ttt.DiscoverConfig(
    steps=1,
    groups=2,
    rollouts=8,
    max_new_tokens=6,
    lora=LoRAConfig(rank=2, alpha=2),
    optim=ttt.steady_adam(1e-2),
    save_every=1,
)


LESSON = SDFTConfig(
    steps=1,
    batch_size=4,
    max_new_tokens=6,
    before="none",
    template="{prompt}{demonstration}",
    optim=ttt.steady_adam(1e-3),
)


BEYOND = tuple(range(WORDS.vocab_size, ROWS))


def model(favourites=(), rows=ROWS, **changes):
    "A model that gives its favourites nearly all of the probability"
    cfg = ModelConfig.tiny(vocab_size=rows, residual="plain", layers=1, max_len=48)
    lm = LM(replace(cfg, tie_embeddings=False, **changes), rngs=nnx.Rngs(0))
    lm.embedding[...] = lm.embedding[...].at[:, 0].set(1.0)  # the same direction everywhere
    lm.head[...] = lm.head[...].at[np.array(favourites, int), 0].add(5.0)
    return lm


@pytest.fixture(scope="module")
def leaning():
    return model(BEYOND)


def two_ends():
    "The tokenizer, with `b` as a second end token"
    words = character_tokenizer("abcdefg ?\n.0123456789")
    words.end_ids = (words.eos_id, 5)
    return words


def rollouts_of_sdft(lm, words, monkeypatch):
    "The answers that one step of self-distillation learns from"
    from nash_lab.adapt import sdft

    seen = []

    def watched(*given, **where):
        seen.append(draw_rows(*given, **where))
        return seen[-1]

    monkeypatch.setattr(sdft, "draw_rows", watched)
    result = distil(lm, words, [Example("ab?", "cd")], LESSON)
    return unpad(seen[0].tokens, seen[0].lengths), result.metrics[0]


def text_of_everything(lm, words, tmp_path, monkeypatch):
    "What each sampler writes, by name"
    from nash_lab.discover import consolidate

    rules = sampling_rules(words, lm)
    cfg = SampleConfig(6, temperature=1.0, **rules)
    responder = Responder(lm, words, batch_size=2)
    asked = [("ab?", {"max_gen_toks": 6}), ("", {"do_sample": True, "max_gen_toks": 6})]
    suite = Suite(
        skills=(SkillGate("one", probes=(Probe("ab?", "c"),) * 80),),
        before="none",
        max_new_tokens=6,
    )
    run = TrainConfig(model=lm.cfg, loader=LoaderConfig(seq_len=32, documents="mask"))
    monkeypatch.setattr(consolidate, "load_run", lambda _: (lm, None))
    monkeypatch.setattr(consolidate, "run_tokenizer", lambda _: words)
    drawn = ttt.sample_rollouts(
        lm, words, [[4, 5]], 4, KEY, max_new_tokens=6, think_tokens=2, force="?"
    )
    found = discover(TASK, lm, words, SEARCH, tmp_path / "search")
    lines = (tmp_path / "search/discovery_log.jsonl").read_text().splitlines()
    texts = {
        "eval": responder.generate(asked),
        "gates": list(evaluate_suite(lm, words, suite).skills[0].answers),
        "chat": [Model(lm, run, words, tmp_path).generate("ab?", max_new_tokens=6)],
        "rollouts": drawn.texts,
        "search": lines,
        "best of n": [words.decode(ids) for _, ids in best_of_n(lm, [4], 3, key=KEY, cfg=cfg)],
        "sdft": [words.decode(ids) for ids in rollouts_of_sdft(lm, words, monkeypatch)[0]],
        "generate": [
            words.decode(row) for row in generate(lm, [[4]], max_new_tokens=6, key=KEY, **rules)[0]
        ],
    }
    measure_run("run", [(TASK, SEARCH)], 4)
    assert len(found.metrics) == 1
    return texts


def test_an_id_without_a_piece_is_never_drawn(leaning, tmp_path, monkeypatch):
    "A model with padded rows that wants nothing else: evaluation, gates, chat, search, learning and night go on"
    texts = text_of_everything(leaning, WORDS, tmp_path, monkeypatch)
    assert all(len(rows) and all(map(str, rows)) for rows in texts.values())
    free, _ = generate(leaning, [[4]], max_new_tokens=6, key=KEY)
    assert set(free.ravel()) <= set(BEYOND)  # it would, if it were let


def test_speculation_never_drafts_an_id_without_a_piece():
    lm = model(BEYOND, mtp="sequential", mtp_depth=1)
    for temperature in (0.0, 1.0):
        cfg = SampleConfig(8, temperature, **sampling_rules(WORDS, lm))
        drawn, _ = speculate(lm, [[4, 5], [6]], cfg, KEY)
        assert drawn.tokens.max() < WORDS.vocab_size


def test_every_end_token_ends_an_answer(tmp_path, monkeypatch):
    "The second of two end tokens, drawn first: an answer is this one token, or its text"
    lm, words = model([5]), two_ends()
    texts = text_of_everything(lm, words, tmp_path, monkeypatch)
    del texts["search"]
    assert set(itertools.chain(*texts.values())) <= {"", "b"}
    answers, record = rollouts_of_sdft(lm, words, monkeypatch)
    assert answers == [[5]] * 4 and record["ended"] == 1.0 and record["answer_tokens"] == 1.0
    forced = ttt.sample_rollouts(
        lm, words, [[4]], 2, KEY, max_new_tokens=6, think_tokens=2, force="?"
    )
    assert forced.drawn.sum() == 2  # an answer that has ended is not asked to go on


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows():
    "A piece that no text needs costs nothing; one that a text holds is named"
    lm = model(rows=WORDS.vocab_size - 1)
    responder = Responder(lm, WORDS)
    assert responder.generate([("ab?", {"max_gen_toks": 4})]) and not responder.faults
    nats = responder.log_likelihoods([("ab", "c"), ("ab", "9")])
    assert np.isfinite(nats[0][0]) and nats[1] == (-np.inf, False)
    assert "'9'" in next(iter(responder.faults.values()))
    drawn = ttt.sample_rollouts(lm, WORDS, [[4]], 4, KEY, max_new_tokens=6)
    assert drawn.tokens.max() < lm.cfg.vocab_size
    with pytest.raises(ValueError, match="holds '9'"):
        distil(lm, WORDS, [Example("ab?", "9")], LESSON)
