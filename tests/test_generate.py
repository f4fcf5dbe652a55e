"Generation from outside: ragged batches, residuals and dtypes, edges of the context, the sampler's edges, one program a bucket."

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.model import generate as generating
from nash_lab.model.generate import (
    SampleConfig,
    _decode,
    best_of_n,
    filtered_logits,
    generate,
    rollout,
    sample,
    sampling_rules,
    sequence_logprobs,
    unpad,
    upper_set,
)
from nash_lab.model.transformer import LM, ModelConfig

PROMPTS = [[5, 6, 7], [9], list(range(20, 33)), [4, 4]]
MODELS = {
    "plain": dict(residual="plain"),
    "mhc": {},
    "untied": dict(tie_embeddings=False, ffn="relu2", residual="plain"),
}


@pytest.fixture(scope="module", params=MODELS)
def lm(request):
    return LM(ModelConfig.tiny(init_std=0.3, **MODELS[request.param]))


@pytest.fixture(scope="module")
def plain():
    return LM(ModelConfig.tiny(init_std=0.3, residual="plain"))


_logits = nnx.jit(lambda lm, tokens: lm(tokens))


def greedy(lm, prompt, n):
    "the whole model for every token, at one padded length"
    tokens = list(prompt)
    for _ in range(n):
        row = np.zeros((1, lm.cfg.max_len), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(_logits(lm, row)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def full_logprobs(lm, prompt, new):
    row = np.zeros((1, lm.cfg.max_len), np.int32)
    row[0, : len(prompt) + len(new)] = [*prompt, *new]
    return jax.nn.log_softmax(_logits(lm, row)[0])[
        np.arange(len(new)) + len(prompt) - 1, np.asarray(new)
    ]


def test_greedy_is_the_naive_loop(lm):
    tokens, lengths = generate(lm, PROMPTS, max_new_tokens=8, temperature=0)
    assert lengths.tolist() == [8] * 4
    for prompt, row in zip(PROMPTS, tokens):
        assert row.tolist() == greedy(lm, prompt, 8)


def test_cached_logprobs_are_those_of_the_full_pass(lm):
    drawn = rollout(
        lm, PROMPTS, SampleConfig(max_new_tokens=8, temperature=1.5, top_p=0.95), jax.random.key(1)
    )
    for prompt, new, logprobs in zip(PROMPTS, drawn.tokens, drawn.logprobs):
        np.testing.assert_allclose(logprobs, full_logprobs(lm, prompt, new), atol=2e-4)


def test_the_whole_context_can_be_filled(plain):
    prompt = list(range(56))  # 56 + 8 = max_len: prompt bucket and room are clipped to it
    tokens, _ = generate(plain, [prompt, [1]], max_new_tokens=8, temperature=0)
    assert tokens[0].tolist() == greedy(plain, prompt, 8)
    assert tokens[1].tolist() == greedy(plain, [1], 8)
    with pytest.raises(ValueError, match="57 tokens and 8 new ones exceed"):
        generate(plain, [[*prompt, 1]], max_new_tokens=8, temperature=0)


def test_eos_ends_rows_one_by_one(plain):
    free = [greedy(plain, p, 8) for p in PROMPTS]
    for eos in {free[0][0], free[2][1]}:
        tokens, lengths = generate(plain, PROMPTS, max_new_tokens=8, temperature=0, eos_id=eos)
        for row, n, want in zip(tokens, lengths, free):
            assert n == (want.index(eos) + 1 if eos in want else 8)
            assert row.tolist() == want[:n] + [eos] * (8 - n)


def test_a_row_ends_at_the_first_of_several_ends(plain):
    "int, tuple, list and array; what follows is filled with the first of them"
    free = [greedy(plain, p, 8) for p in PROMPTS]
    ends = [free[2][1], free[0][3], 255]
    for given in (tuple(ends), ends, np.array(ends)):
        tokens, lengths = generate(plain, PROMPTS, max_new_tokens=8, temperature=0, eos_id=given)
        for row, n, want in zip(tokens, lengths, free):
            hits = [i for i, token in enumerate(want) if token in ends]
            assert n == (hits[0] + 1 if hits else 8)
            assert row.tolist() == want[:n] + [ends[0]] * (8 - n)
    with pytest.raises(ValueError, match="eos_id=.*999.*from 0 to 255"):
        generate(plain, PROMPTS, max_new_tokens=8, temperature=0, eos_id=(3, 999))


def test_ids_without_a_piece_are_never_drawn(plain):
    "beyond the tokenizer or a hole in it; an end without a row is no end"

    class Words:
        pieces = ["</s>", *"abcd", "", "e"]
        end_ids = (0, 300)

    rules = sampling_rules(Words(), plain)
    assert rules["eos_id"] == (0,) and rules["forbidden"] == (5, *range(7, 256))
    how = SampleConfig(8, temperature=5.0, **rules)
    drawn = rollout(plain, PROMPTS, how, jax.random.key(0), copies=4).tokens
    assert set(drawn.ravel().tolist()) <= {0, 1, 2, 3, 4, 6}
    best = best_of_n(plain, [1], 4, key=jax.random.key(1), cfg=how)
    assert {token for _, sample in best for token in sample} <= {0, 1, 2, 3, 4, 6}


def test_logprobs_are_zero_after_the_end(plain):
    eos = greedy(plain, PROMPTS[0], 2)[1]
    drawn = rollout(plain, PROMPTS, SampleConfig(max_new_tokens=8, temperature=0, eos_id=eos))
    for logprobs, n in zip(drawn.logprobs, drawn.lengths):
        assert (logprobs[:n] < 0).all() and (logprobs[n:] == 0).all()


def test_neighbours_and_padding_rows_change_nothing(plain):
    how, key = SampleConfig(max_new_tokens=8), jax.random.key(4)
    whole = rollout(plain, PROMPTS, how, key)
    for n in (1, 3):
        part = rollout(plain, PROMPTS[:n], how, key)
        np.testing.assert_array_equal(part.tokens, whole.tokens[:n])
    other = rollout(plain, [PROMPTS[0], [200] * 13, [7], [8]], how, key)
    np.testing.assert_array_equal(other.tokens[0], whole.tokens[0])
    same = rollout(plain, [PROMPTS[0]] * 4, how, key).tokens
    assert len({tuple(row) for row in same.tolist()}) == 4  # rows draw independently


def test_one_program_a_bucket(plain):
    generate(plain, PROMPTS, max_new_tokens=8, temperature=0)
    before = _decode._cache_size()
    for how in (
        dict(temperature=0.3),
        dict(top_k=5),
        dict(top_p=0.5),
        dict(min_p=0.2),
        dict(eos_id=3),
        dict(eos_id=[3, 5]),
        dict(forbidden=(1,)),
        dict(max_new_tokens=5),
        dict(temperature=0),
    ):
        generate(plain, PROMPTS[1:], **(dict(max_new_tokens=8, key=jax.random.key(0)) | how))
    other = LM(plain.cfg, nnx.Rngs(1))  # other weights, same program
    generate(other, PROMPTS, max_new_tokens=8, temperature=0)
    assert _decode._cache_size() == before


@pytest.mark.parametrize("attention", ["gqa", "diff1"])
def test_rows_decoded_together_are_the_scanned_ones(attention, monkeypatch):
    "Ragged prompts over three sizes of the cache, copies too: same tokens, chances of the full pass."
    lm = LM(ModelConfig.tiny(init_std=0.3, attention=attention))
    how = SampleConfig(max_new_tokens=17, temperature=1.0)
    key = jax.random.key(3)
    monkeypatch.setattr(generating, "STAGE", 8)
    together = rollout(lm, PROMPTS, how, key, copies=4)  # 16 rows, room for 8, 16, 32
    for i in (0, 7, 11, 15):
        new, logprobs = together.tokens[i], together.logprobs[i]
        np.testing.assert_allclose(logprobs, full_logprobs(lm, PROMPTS[i // 4], new), atol=2e-4)

    monkeypatch.setattr(generating, "FEW", 1)
    one_by_one = [p for p in PROMPTS for _ in range(4)]  # another program: 16 prompts
    scanned = rollout(lm, one_by_one, how, key)
    np.testing.assert_array_equal(scanned.tokens, together.tokens)
    np.testing.assert_allclose(scanned.logprobs, together.logprobs, atol=2e-4)


def test_forbidden_tokens_never_appear(plain):
    allowed = [3, 5, 8]
    tokens, _ = generate(
        plain,
        PROMPTS,
        max_new_tokens=8,
        temperature=2.0,
        forbidden=set(range(256)) - set(allowed),
        key=jax.random.key(0),
    )
    assert set(tokens.ravel().tolist()) == set(allowed)
    cold, _ = generate(
        plain, PROMPTS, max_new_tokens=8, temperature=0, forbidden=set(range(256)) - {8}
    )
    assert (cold == 8).all()


def test_bfloat16_decodes():
    lm = LM(ModelConfig.tiny(init_std=0.3, residual="plain", compute_dtype="bfloat16"))
    drawn = rollout(lm, PROMPTS, SampleConfig(max_new_tokens=8), jax.random.key(0))
    for prompt, new, logprobs in zip(PROMPTS, drawn.tokens, drawn.logprobs):
        np.testing.assert_allclose(logprobs, full_logprobs(lm, prompt, new), atol=0.15)


def test_sequence_logprobs_with_mask(plain):
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = jnp.array([[False, False, True, True], [False, True, False, False]])
    got = sequence_logprobs(plain, tokens, mask)
    np.testing.assert_allclose(got[0, 2:], full_logprobs(plain, [1, 2], [3, 4]), atol=1e-4)
    np.testing.assert_allclose(got[1, 1], full_logprobs(plain, [5], [6])[0], atol=1e-4)
    assert (np.asarray(got)[~np.asarray(mask)] == 0).all()
    assert (sequence_logprobs(plain, tokens)[:, 0] == 0).all()


def test_best_of_n_sorts(plain):
    how = SampleConfig(max_new_tokens=8)
    ranked = best_of_n(plain, [1, 2], 3, key=jax.random.key(0), cfg=how)
    drawn = rollout(plain, [[1, 2]] * 3, how, jax.random.key(0))
    assert {tuple(s) for _, s in ranked} == {tuple(s) for s in unpad(drawn.tokens, drawn.lengths)}
    np.testing.assert_allclose(
        [s for s, _ in ranked], sorted(drawn.logprobs.sum(1) / 8, reverse=True), rtol=1e-6
    )
    with pytest.raises(ValueError, match="n=0"):
        best_of_n(plain, [1], 0, key=jax.random.key(0))


def naive_set(z, weight, enough):
    order = np.argsort(-z, kind="stable")
    edge = z[order][min(int((np.cumsum(weight[order]) < enough).sum()), len(z) - 1)]
    return z >= edge


@pytest.mark.parametrize(
    "special", [[], [0.0, -0.0, 0.0], [-np.inf, -np.inf], [1e30, -1e30], [3.5] * 6]
)
def test_upper_set_at_the_edges(special):
    rng = np.random.default_rng(0)
    z = rng.permutation(np.concatenate([special, rng.normal(size=20 - len(special))])).astype(
        np.float32
    )
    for weight, amounts in [
        (np.ones(20, np.float32), (1, 2, 7, 19, 20)),
        (np.exp(np.minimum(z, 5)), (0.01, 1.0, 5.0)),
    ]:
        for enough in amounts:
            np.testing.assert_array_equal(
                upper_set(z[None], weight[None], np.float32(enough))[0],
                naive_set(z, weight, enough),
            )


def settings(v, **how):
    return SampleConfig(**how).sampling(v)


def test_off_is_off():
    z = jax.random.normal(jax.random.key(0), (3, 50)) * 30  # tails of probability 0 in fp32
    np.testing.assert_array_equal(filtered_logits(z, settings(50)), z)
    np.testing.assert_array_equal(filtered_logits(z, settings(50, top_k=50)), z)
    np.testing.assert_array_equal(filtered_logits(z, settings(50, top_k=500)), z)


@pytest.mark.parametrize(
    "how", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=1e-4)]
)
def test_narrow_settings_are_greedy(how):
    z = jax.random.normal(jax.random.key(1), (64, 50))
    keys = jax.random.split(jax.random.key(2), 64)
    np.testing.assert_array_equal(sample(z, keys, settings(50, **how)), z.argmax(-1))


def test_frequencies_are_the_probabilities():
    z = jnp.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    keys = jax.random.split(jax.random.key(3), 30_000)
    for how in (
        dict(),
        dict(temperature=0.5),
        dict(temperature=2.0, top_k=4),
        dict(top_p=0.85),
        dict(min_p=0.15),
        dict(forbidden=(0, 2)),
    ):
        p = np.asarray(jax.nn.softmax(filtered_logits(z[None], settings(6, **how))))[0]
        found = np.bincount(
            sample(jnp.broadcast_to(z[None], (30_000, 6)), keys, settings(6, **how)), minlength=6
        )
        live = p > 0
        assert found[~live].sum() == 0
        assert (
            (found - 30_000 * p)[live] ** 2 / (30_000 * p[live])
        ).sum() < 20.5  # chi-square, 5 degrees, p = 0.001


@pytest.mark.parametrize(
    "prompts, how, message",
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, r"prompts\[1\] is empty"),
        ([[-1]], {}, "token id -1, expected 0 to 255"),
        ([[256]], {}, r"prompts\[0\]: token id 256"),
        ([[1] * 60], dict(max_new_tokens=5), "60 tokens and 5 new ones exceed"),
        ([[1]], dict(temperature=1.0), "give a key"),
        ([[1]], dict(temperature=float("nan")), "temperature=nan"),
        ([[1]], dict(top_p=1.1), "top_p=1.1"),
        ([[1]], dict(eos_id=256), "eos_id=256"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0"),
    ],
)
def test_mistakes_are_one_line(plain, prompts, how, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(plain, prompts, **(dict(max_new_tokens=4, temperature=0) | how))
    assert "\n" not in str(error.value)
