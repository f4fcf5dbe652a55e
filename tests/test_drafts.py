"Drafts wherever text is sampled: the same tokens or the same distribution, counted by position, refused without heads."

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nash_lab.adapt.lora import LoRAConfig
from nash_lab.adapt.sdft import Example, SDFTConfig, distil
from nash_lab.data.loader import LoaderConfig
from nash_lab.discover import ttt
from nash_lab.discover.problems import character_tokenizer, string_match
from nash_lab.discover.search import discover
from nash_lab.evals.lm_eval import Responder
from nash_lab.lab.cli import main
from nash_lab.model.generate import SampleConfig, rollout
from nash_lab.model.mtp import look_ahead
from nash_lab.model.speculative import DraftTally, draft_overlap, draw_rows, probabilities
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.run.rundir import read_metrics
from nash_lab.train.pretrain import pretrain
from nash_lab.train.settings import TrainConfig

WORDS = character_tokenizer("abcdefg ?\n.0123456789")
TINY = ModelConfig.tiny(
    vocab_size=WORDS.vocab_size,
    residual="plain",
    mtp="sequential",
    mtp_depth=2,
    max_len=48,
    init_std=0.2,
)
KEY = jax.random.key(0)
LESSON = SDFTConfig(
    steps=2,
    batch_size=4,
    max_new_tokens=6,
    drafts=True,
    before="none",
    template="{prompt}{demonstration}",
    optim=ttt.steady_adam(1e-3),
)



@pytest.fixture(scope="module")
def lm():
    return LM(TINY)


def test_a_hundred_thousand_draws():
    "Three tokens at temperature 0.9 with filters: every continuation as often as the plain forward pass says"
    scipy = pytest.importorskip("scipy.stats")
    small = LM(replace(TINY, vocab_size=8, init_std=0.3))
    cfg = SampleConfig(3, temperature=0.9, top_k=6, min_p=0.02)
    rows, exact = jnp.array([[3, 1]]), np.ones(1)
    for _ in range(3):
        p = probabilities(small(rows)[:, -1], cfg.sampling(8))
        exact = (exact[:, None] * np.asarray(p, np.float64)).ravel()
        more = jnp.tile(jnp.arange(8), len(rows))[:, None]
        rows = jnp.concatenate([jnp.repeat(rows, 8, 0), more], 1)
    tally = DraftTally(small)
    counts = 0
    for i in range(4):
        key = jax.random.fold_in(KEY, i)
        drawn = draw_rows(small, [[3, 1]], cfg, key, 25_000, tally)
        counts = counts + np.bincount(drawn.tokens @ [64, 8, 1], minlength=512)
    assert counts.sum() == 100_000 and (counts[exact == 0] == 0).all()
    likely = exact * 1e5 >= 5
    merged = [np.append(a[likely], a[~likely].sum()) for a in (counts, exact * 1e5)]
    merged = [a[merged[1] > 0] for a in merged]
    assert scipy.chisquare(merged[0], merged[1] * merged[0].sum() / merged[1].sum()).pvalue > 0.001
    assert 0 < tally.stats.kept[1] < tally.stats.kept[0] < tally.stats.calls


def test_copies_and_tally(lm):
    "Greedy rows of each prompt are those of the plain loop; a tally adds up over calls"
    prompts = [[4, 5, 6], [7]]
    cfg = SampleConfig(6, temperature=0)
    tally = DraftTally(lm)
    for _ in range(2):
        drawn = draw_rows(lm, prompts, cfg, copies=3, tally=tally)
    plain = rollout(lm, prompts, cfg, copies=3)
    np.testing.assert_array_equal(drawn.tokens, plain.tokens)
    np.testing.assert_allclose(drawn.logprobs, plain.logprobs, atol=1e-4)
    assert tally.stats.tokens == 2 * 6 * 5 and len(tally.stats.kept) == 2
    assert 1 <= tally.stats.tokens_per_call <= 3
    record = tally.stats.record()
    assert sum(record["drafts_kept"]) / 2 == pytest.approx(tally.stats.acceptance)
    assert str(tally).startswith("drafts kept at each position: ")
    undrafted = draw_rows(lm, prompts, cfg, copies=3)
    np.testing.assert_array_equal(undrafted.logprobs, plain.logprobs)  # the same program


def test_overlap_by_hand(lm):
    "Mean of sum min(p, q) over the positions that have a token to draft, documents kept apart"
    tokens = jnp.arange(16).reshape(2, 8) % 9 + 3
    found = draft_overlap(lm, tokens)
    hidden = lm.hidden(tokens)
    positions = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))
    states, _ = look_ahead(TINY, lm.mtp, hidden, tokens, lm.embed, positions=positions)
    for k, state in enumerate(states, 1):
        p = jax.nn.softmax(lm.logits(hidden[:, k:]))
        q = jax.nn.softmax(lm.logits(state[:, :-k]))
        assert float(found[k - 1]) == pytest.approx(float(jnp.minimum(p, q).sum(-1).mean()), abs=1e-5)
    segments = jnp.array([[1] * 4 + [2] * 4, [1] * 6 + [0] * 2])
    apart = draft_overlap(lm, tokens, positions, segments)
    assert np.isfinite(apart).all() and not np.allclose(apart, found)


def test_learning_and_searching_with_drafts(lm, tmp_path):
    "Records of SDFT and of a search say what was kept; both learn from what was drawn"
    done = distil(lm, WORDS, [Example("ab?", "cd")], LESSON)
    assert all(len(row["drafts_kept"]) == 2 for row in done.metrics)
    assert all(1 <= row["tokens_per_call"] <= 3 for row in done.metrics)
    search = ttt.DiscoverConfig(
        steps=1,
        groups=2,
        rollouts=4,
        max_new_tokens=6,
        think_tokens=2,
        force="?",
        drafts=True,
        lora=LoRAConfig(rank=2, alpha=2),
        optim=ttt.steady_adam(1e-2),
        save_every=1,
    )
    found = discover(string_match("face", prompt="?"), lm, WORDS, search, tmp_path / "search")
    assert len(found.metrics[0]["drafts_kept"]) == 2


def test_answers_of_an_evaluation(lm):
    "Greedy answers are the same with drafts, and are counted"
    asked = [("ab?", {"max_gen_toks": 6}), ("cd", {"max_gen_toks": 4})]
    plain = Responder(lm, WORDS, batch_size=2)
    fast = Responder(lm, WORDS, batch_size=2, drafts=True)
    assert fast.generate(asked) == plain.generate(asked)
    assert fast.tally.stats.tokens > 0 and plain.tally is None


@pytest.fixture(scope="module")
def run(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts") / "run"
    cfg = TrainConfig(
        run=str(folder),
        **packed,
        steps=2,
        eval_batches=1,
        model=replace(TINY, vocab_size=300, layers=1),
        loader=LoaderConfig(seq_len=16, batch_size=4),
    )
    pretrain(cfg)
    return folder


def test_shares_while_training(run):
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]
    assert rows and all(len(row["drafts_kept"]) == 2 for row in rows)
    assert all(0 < share <= 1 for row in rows for share in row["drafts_kept"])


def test_command(run, capsys):
    "generate --drafts writes the same greedy text, and says on stderr what it kept"
    args = ["generate", "--run", str(run), "--max-new-tokens", "6", "--temperature", "0"]
    said = []
    for more in ([], ["--drafts"]):
        capsys.readouterr()
        assert main(args + more) == 0
        said.append(capsys.readouterr())
    assert said[0].out.splitlines()[-1] == said[1].out.splitlines()[-1]
    assert "drafts kept at each position" in said[1].err
    assert "drafts kept" not in said[0].err


@pytest.mark.parametrize("how", ["tally", "eval", "sdft"])
def test_refused_without_heads(how):
    plain = LM(replace(TINY, mtp="none", layers=1))
    with pytest.raises(ValueError, match="has no heads to draft with") as error:
        if how == "tally":
            DraftTally(plain)
        elif how == "eval":
            Responder(plain, WORDS, drafts=True)
        else:
            distil(plain, WORDS, [Example("a", "b")], LESSON)
    assert "\n" not in str(error.value)
