"Self-distillation: losses against TRL's, masks and teachers by hand, replay, gates, and a block that fails on purpose."

import json, warnings
from dataclasses import replace
from functools import partial
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nash_lab.adapt.continual import (
    REJECTED,
    CodeProbe,
    Rejected,
    SkillGate,
    Suite,
    decide,
    demonstration_nats,
    evaluate_suite,
    gated_update,
    load_suite,
    paired_change,
    read_as,
)
from nash_lab.adapt.lora import LoRAConfig
from nash_lab.adapt.continual import ReplayBuffer
from nash_lab.adapt.sdft import (
    Example,
    SDFTConfig,
    SDFTResult,
    distil,
    divergence,
    encoder,
    loss_mask,
    plan_batches,
    reverse_kl,
    teacher_prompt,
)
from nash_lab.core.configs import from_json, from_row
from nash_lab.core.files import read_rows
from nash_lab.studies.learning import Symbols, demonstrations
from nash_lab.evals.scores import Probe, weights_hash
from nash_lab.adapt.streams import with_streams
from nash_lab.model.block import ModelConfig
from nash_lab.model.transformer import LM
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.step import apply_gradient, fresh_state

CFG = SDFTConfig(
    steps=3,
    batch_size=4,
    max_new_tokens=8,
    template="{demonstration}|{prompt}",
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0),
)
EXAMPLES = demonstrations("X", 6, 0)
LOOKS = ("nats", "entropy")


@pytest.fixture(scope="module")
def lm():
    return LM(
        ModelConfig.tiny(
            vocab_size=Symbols.vocab_size,
            residual="plain",
            width=16,
            heads=2,
            kv_heads=2,
            layers=1,
            ffn_width=32,
            max_len=32,
            init_std=0.4,
        )
    )


def params(lm):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(lm, nnx.Param)))


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def logs(*p):
    return jnp.log(jnp.array(p))


def test_divergences_by_hand():
    "Facts of a three-token vocabulary, and the public mean"
    T, S, one = logs([[0.7, 0.2, 0.1]]), logs([[0.5, 0.3, 0.2]]), jnp.ones((1, 1), bool)
    for how, want in (
        (("forward",), 0.085123),
        (("reverse",), 0.092033),
        (("js",), 0.021901),
        (("js", 0.25), 0.016156),
    ):
        assert float(divergence(S, T, *how)[0, 0]) == pytest.approx(want, abs=1e-6)
    assert float(reverse_kl(S, T, one)) == pytest.approx(0.092033, abs=1e-6)
    slope = lambda kind: jax.grad(lambda z: divergence(jax.nn.log_softmax(z), T, kind).sum())(S)
    np.testing.assert_allclose(slope("forward")[0, 0], [-0.2, 0.1, 0.1], atol=1e-6)
    np.testing.assert_allclose(
        jax.grad(reverse_kl)(S, T, one)[0, 0], [-0.214253, 0.094030, 0.120223], atol=1e-6
    )
    assert not np.any(jax.grad(reverse_kl, 1)(S, T, one))


def test_long_answers_weigh_no_more_and_empty_ones_not_at_all():
    T, S = logs([0.7, 0.2, 0.1]), logs([0.5, 0.3, 0.2])
    rows = jnp.stack(
        [
            jnp.broadcast_to(S, (100, 3)),
            jnp.broadcast_to(T, (100, 3)),
            jnp.broadcast_to(S, (100, 3)),
        ]
    )
    guide = jnp.broadcast_to(T, rows.shape)
    assert float(reverse_kl(rows, guide, loss_mask(np.array([1, 100, 0]), 100))) == pytest.approx(
        0.092033 / 2, abs=1e-6
    )
    assert float(reverse_kl(rows, guide, np.zeros((3, 100), bool))) == 0


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_summaries_bound_the_whole(kind):
    s, t = (jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(i), (5, 40))) for i in (0, 1))
    whole = divergence(s, t, kind)
    assert np.array_equal(divergence(s, t, kind, top_k=40), whole) and np.array_equal(
        divergence(s, t, kind, top_k=0), whole
    )
    few = divergence(s, t, kind, top_k=3)
    assert (few < whole).all() and (few > 0).all()


def test_masks():
    "The EOS counts, also where the tokenizer pads with it; the skip scales"
    assert loss_mask(np.array([0, 2, 3, 4, 9]), 9, skip=3, share=1.0).sum(1).tolist() == [
        0,
        0,
        0,
        1,
        6,
    ]
    assert loss_mask(np.array([4, 10, 29, 30, 80]), 80).sum(1).tolist() == [4, 9, 27, 27, 77]
    assert loss_mask(np.array([2]), 4, skip=0).tolist() == [
        [True, True, False, False]
    ]  # of 5, EOS, and two of padding with the EOS


def test_data_errors(tmp_path):
    bad = tmp_path / "data.jsonl"
    for text, said in (
        (
            '{"prompt": "a", "demonstration": "b"}\n{"prompt": "a"}',
            ":2: Example: missing key 'demonstration'",
        ),
        ('{"prompt": "a", "demonstration": "b", "x": 1}', ":1: Example: unknown key 'x'"),
        ('{"prompt": "a", "demonstration": ""}', ":1: Example.demonstration="),
        ("\n\n{", ":3: "),
        ("[]", ":1: Example: expected an object"),
        ("", "no examples"),
    ):
        bad.write_text(text)
        with pytest.raises(ValueError, match="data.jsonl") as error:
            read_rows(bad, partial(from_json, Example), "examples")
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        read_rows(tmp_path / "none.jsonl", partial(from_json, Example), "examples")
    assert (
        "first {x}\n\nThis is an example for a response to the question:\nsecond\n\nNow answer with a response of your own, including the thinking process."
        == teacher_prompt("first {x}", "second")
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(tune="lora", lora=LoRAConfig(rank=2), accumulate=2, teacher="frozen", top_k=5),
        dict(author="teacher", teacher="live", divergence="forward", temperature=0.7),
        dict(tune="lora+maps", lora=LoRAConfig(rank=2)),
    ],
    ids=["lora-accumulate-frozen-top", "offline-live-forward", "lora-maps"],
)
def test_distil(lm, changes):
    "Every branch of the update: something is learned, the model that was given is not touched"
    if "maps" in changes.get("tune", ""):
        lm = with_streams(lm, "wide")
    before, seen = params(lm), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = distil(
            lm,
            Symbols(),
            EXAMPLES,
            replace(CFG, **changes),
            hooks=[lambda record, now: seen.append((record["step"], weights_hash(now())))],
        )
    assert any("chases" in str(w.message) for w in told) == (changes.get("teacher") == "live")
    assert equal(before, params(lm)) and not equal(before, params(out.lm))
    assert [r["step"] for r in out.metrics] == [1, 2, 3] and all(
        np.isfinite(r["loss"]) and r["skipped"] == 0 and r["answers"] == 4 for r in out.metrics
    )
    for row in out.metrics:
        looks = [row[f"{who}_{what}"] for who in ("student", "teacher") for what in LOOKS]
        assert min(looks) >= 0 and max(looks[1::2]) <= np.log(Symbols.vocab_size)
    assert len({h for _, h in seen}) == 3 and seen[-1][1] == weights_hash(out.lm)
    assert (out.adapter is None) == ("lora" not in changes.get("tune", ""))
    if "maps" in changes.get("tune", ""):
        maps = [nnx.to_pure_dict(nnx.state(m.blocks.ffn_hyper, nnx.Param)) for m in (lm, out.lm)]
        assert not equal(*maps)


def test_a_killed_block_goes_on(lm, tmp_path):
    "killed behind a checkpoint, and before the first: the same weights to the bit; another block is refused"
    suite = probes(lm)
    cfg = replace(CFG, base_weight=0.5, teacher="ema")
    run = partial(gated_update, lm, Symbols(), EXAMPLES, cfg, suite, None, save_every=1)
    straight, verdict = run(tmp_path / "straight")
    assert not (tmp_path / "straight/sdft").exists()  # decided
    rows = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    changes = {"own": verdict.checks[0].change}
    assert rows[-1] == {"step": 3, "accepted": verdict.accepted, "changes": changes}
    assert rows[0]["base_kl"] == 0 < rows[2]["base_kl"]
    assert all(1 <= r["shortest"] <= r["answer_tokens"] <= r["longest"] <= 8 for r in rows[:3])
    assert rows[0]["lr"] == pytest.approx(3e-3) and rows[2]["lr"] < rows[1]["lr"]

    def killed(*given, hooks, **how):
        def kill(record, now):
            if record["step"] == 2:
                raise KeyboardInterrupt

        return distil(*given, hooks=[*hooks, kill], **how)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", update=killed)
    assert [p.name for p in (tmp_path / "cut/sdft").iterdir()] == ["1"]
    with pytest.raises(ValueError, match="sdft: of a block with other settings"):
        gated_update(
            lm, Symbols(), EXAMPLES[1:], cfg, suite, None, tmp_path / "cut", save_every=1
        )
    again, same = run(tmp_path / "cut")
    assert equal(params(again), params(straight))
    assert same == verdict  # of what was learned too, by its hash
    assert [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").open()] == rows


def test_the_base_holds_the_student(lm):
    "KL to the untouched model: its weight changes the first gradient only through the model's own motion"
    moved = {}
    losses = []
    for weight in (0.0, 30.0):
        out = distil(lm, Symbols(), EXAMPLES, replace(CFG, base_weight=weight, steps=3))
        start, end = params(lm), params(out.lm)
        steps = jax.tree.map(lambda a, b: float(((a - b) ** 2).sum()), start, end)
        moved[weight] = sum(jax.tree.leaves(steps))
        losses.append(out.metrics[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # nothing has moved yet
    assert moved[30.0] < moved[0.0]


def test_several_demonstrations():
    one = Example("ab", "c", also=("d", "e"))
    assert from_row(Example, {"prompt": "ab", "demonstration": "c", "also": ["d", "e"]}) == one
    encode = lambda text: seen.append(text) or [1]
    seen = []
    model = LM(ModelConfig.tiny(vocab_size=Symbols.vocab_size, max_len=32))
    plan_batches(model, [one], None, CFG, encode, np.random.default_rng(0))
    assert seen == ["ab", "c\n\nd\n\ne|ab"]
    for bad in (("",), ("d", " ")):
        with pytest.raises(ValueError, match="Example.also"):
            Example("ab", "c", also=bad)


def test_bad_steps_change_nothing(lm):
    state = fresh_state(params(lm), tx := optimizer(CFG.optim, 3))
    grads = jax.tree.map(jnp.ones_like, state.params)
    apply = jax.jit(lambda loss: apply_gradient(tx, state, loss, grads)[0])
    after = apply(jnp.float32(jnp.nan))
    assert (
        equal(after.params, state.params)
        and equal(after.opt_state, state.opt_state)
        and (int(after.step), int(after.skipped)) == (1, 1)
    )
    after = apply(jnp.float32(1))
    assert not equal(after.params, state.params) and int(after.skipped) == 0


def test_replay_in_batches(lm):
    buffer, rng = ReplayBuffer(), np.random.default_rng(0)
    old = demonstrations("Y", 5, 1)
    encode = lambda text: [ord(text[0])]
    todo, share, _ = plan_batches(
        lm, EXAMPLES, buffer, replace(CFG, batch_size=10, steps=4), encode, rng
    )
    assert share == 0 and all(p.student == [ord("X")] for batch in todo for p in batch)
    buffer.remember(old)
    todo, share, _ = plan_batches(
        lm, EXAMPLES, buffer, replace(CFG, batch_size=10, steps=4), encode, rng
    )
    assert share == 2 and all(
        sum(p.student == [ord("Y")] for p in batch) == 2 and len(batch) == 10 for batch in todo
    )


def test_buffer(tmp_path):
    "Recency keeps the last, reservoir is fair, both survive a file and go on alike"
    some = [Example(f"p{i}", "a") for i in range(60)]
    for policy in ("recency", "reservoir"):
        one = ReplayBuffer(capacity=8, policy=policy, half_life=2, seed=3)
        one.remember(some[:40])
        one.write_to(tmp_path / "replay.json")
        two = read_as(ReplayBuffer, tmp_path / "replay.json")
        for b in (one, two):
            b.remember(some[40:])
        assert one == two and len(one) == 8 and one.seen == 60
    assert [k.arrival for k in ReplayBuffer(capacity=2, policy="recency").kept] == []
    counts = np.zeros(30)
    for seed in range(300):
        b = ReplayBuffer(capacity=6, seed=seed)
        b.remember(some[:30])
        for k in b.kept:
            counts[k.arrival] += 1
    assert counts.sum() == 1800 and counts.min() > 30 and counts.max() < 95  # mean 60, deviation 7


def test_replay_by_surprise(lm, tmp_path):
    "what the model finds surprising is kept and drawn; the measure is the demonstration's own nats"
    nats = demonstration_nats(lm, Symbols(), EXAMPLES, Symbols().encode)
    for example, found in list(zip(EXAMPLES, nats))[:2]:
        ids = Symbols().encode(example.prompt + example.demonstration)
        n = len(Symbols().encode(example.demonstration))
        logprobs = jax.nn.log_softmax(lm(jnp.array([ids])))[0]
        own = -np.array([logprobs[i - 1, ids[i]] for i in range(len(ids) - n, len(ids))])
        assert found == pytest.approx(own.mean(), rel=1e-4)
    buffer = ReplayBuffer(capacity=3, policy="surprise")
    some = [Example(f"p{i}", "a") for i in range(5)]
    buffer.remember(some, [0.5, 2.0, 0.1, 0.0, 1.0])
    assert [k.surprise for k in buffer.kept] == [0.5, 2.0, 1.0]
    assert buffer.chances() == pytest.approx(np.array([0.51, 2.01, 1.01]) / 3.53)
    buffer.write_to(tmp_path / "replay.json")
    assert read_as(ReplayBuffer, tmp_path / "replay.json") == buffer
    for bad in (np.nan, -1.0, np.inf):
        with pytest.raises(ValueError, match="surprise"):
            buffer.remember(some[:1], [bad])
    learned = ReplayBuffer(policy="surprise")
    gated_update(lm, Symbols(), EXAMPLES, CFG, probes(lm), learned, tmp_path / "b", update=keep)
    assert [k.surprise for k in learned.kept] == pytest.approx(
        demonstration_nats(lm, Symbols(), EXAMPLES, encoder(Symbols())), rel=1e-5
    )


def test_a_buffer_above_the_limit_of_one_json_value(tmp_path):
    "50,000 examples are some 50 MB, more than one line of data may have"
    buffer = ReplayBuffer()
    buffer.remember([Example(f"{i}", "x" * 1_000_000) for i in range(18)])
    buffer.write_to(tmp_path / "replay.json")
    assert (tmp_path / "replay.json").stat().st_size > 1 << 24 and read_as(
        ReplayBuffer, tmp_path / "replay.json"
    ) == buffer


def test_paired_change():
    "Published examples, and an interval that does not vanish when nothing flips"
    table = lambda both, first, second, never: (
        np.repeat([1, 1, 0, 0], [both, first, second, never]),
        np.repeat([1, 0, 1, 0], [both, first, second, never]),
    )
    assert paired_change(*table(36, 12, 2, 0)) == pytest.approx((-0.2, -0.3404, -0.0569), abs=1e-4)
    assert paired_change(*table(14, 5, 0, 22)) == pytest.approx((-0.122, -0.226, -0.011), abs=6e-4)
    assert paired_change(*table(1, 1, 7, 12))[1:] == pytest.approx((0.0256, 0.5069), abs=1e-3)
    assert -0.1 < paired_change(*table(50, 0, 0, 0))[1] < -0.05


def test_suites(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "target": "b"}\n{"prompt": "def f():\\n", "tests": "assert f() == 1"}\n'
    )
    (tmp_path / "t.txt").write_text("0123456789" * 3)
    (tmp_path / "suite.json").write_text(
        json.dumps(
            {
                "texts": [{"name": "t", "path": "t.txt"}],
                "skills": [{"name": "s", "path": "p.jsonl", "least_change": -0.9}],
            }
        )
    )
    suite = load_suite(tmp_path / "suite.json")
    assert suite.skills[0].probes == (
        Probe("a", "b"),
        CodeProbe("def f():\n", "assert f() == 1"),
    ) and suite.texts[0].text.startswith("0123")
    before = suite.hash
    (tmp_path / "t.txt").write_text("0123456789" * 4)
    assert load_suite(tmp_path / "suite.json").hash != before, (
        "the content of the files decides, so it is in the hash"
    )
    (tmp_path / "p.jsonl").write_text('\n{"prompt": "a"}')
    with pytest.raises(ValueError, match="p.jsonl:2: Probe: missing key"):
        load_suite(tmp_path / "suite.json")
    (tmp_path / "suite.json").write_text('{"skills": [{"name": "s", "path": "gone.jsonl"}]}')
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        load_suite(tmp_path / "suite.json")
    with pytest.raises(ValueError, match="73 probes or more"):
        SkillGate("s", probes=(Probe("a", "b"),) * 72)
    SkillGate("s", probes=(Probe("a", "b"),) * 73)


def test_rows_with_further_keys_are_kept(tmp_path):
    "Demonstrations through a buffer and its file; probes of both kinds in a suite, whose hash they do not change"
    file = tmp_path / "d.jsonl"
    notes = {"source": "x", "tags": ["a"], "reward": 0.5, "metadata": {"id": None}, "type": "t"}
    file.write_text(json.dumps({"prompt": "p", "demonstration": "d"} | notes))
    examples = read_rows(file, partial(from_row, Example), "examples")
    assert examples[0].more == notes and hash(examples[0]) == hash(Example("p", "d"))
    buffer = ReplayBuffer()
    buffer.remember(examples)
    buffer.write_to(tmp_path / "replay.json")
    assert read_as(ReplayBuffer, tmp_path / "replay.json").kept[0].example == examples[0]

    hashes = []
    for i, further in enumerate(({}, notes)):
        rows = [{"prompt": "a", "target": "b"}, {"prompt": "def f():\n", "tests": "assert f()"}]
        text = "\n".join(json.dumps(row | further) for row in rows)
        (tmp_path / f"{i}.jsonl").write_text(text)
        gate = {"name": "s", "path": f"{i}.jsonl", "least_change": -0.9}
        (tmp_path / "suite.json").write_text(json.dumps({"skills": [gate]}))
        suite = load_suite(tmp_path / "suite.json")
        assert [probe.more for probe in suite.skills[0].probes] == [further, further]
        hashes.append(suite.hash)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "cls, row, meant",
    [
        (Example, {"promt": "p", "demonstration": "d"}, "prompt"),
        (Example, {"Prompt": "p", "demonstration": "d"}, "prompt"),
        (Example, {"prompt": "p", "demonstration": "d", "shwon": "s"}, "shown"),
        (Probe, {"prompt": "p", "taget": "t"}, "target"),
        (Probe, {"prompt": "p", "target": "t", "knd": "exact"}, "kind"),
        (CodeProbe, {"prompt": "p", "tests": "t", "stops": ["a"]}, "stop"),
    ],
    ids=lambda x: None,
)
def test_a_misspelt_key_of_a_row(cls, row, meant):
    with pytest.raises(ValueError, match=f"did you mean {meant!r}"):
        from_row(cls, row)
    with pytest.raises(ValueError, match="missing key"):
        from_row(cls, {"text": "t"})
    assert from_row(Example, {"prompt": "p", "demonstration": "d", "prompts": 1}).more


def test_probes_with_unit_tests_in_a_suite(lm):
    "They are asked and judged like the others; every symbol ends the answer, so the tests alone decide"
    stop = tuple(Symbols().decode(range(Symbols.vocab_size)))
    probes = tuple(CodeProbe("", tests, stop) for tests in ("assert True", "assert False"))
    gate = SkillGate("s", probes=(*probes, Probe("1", ".*", "regex")), least_change=-0.99)
    report = evaluate_suite(lm, Symbols(), Suite(skills=(gate,), max_new_tokens=4))
    assert report.skills[0].passed == (True, False, True)


def probes(lm, n=40):
    "Probes that this very model passes"
    suite = Suite(
        skills=(
            SkillGate(
                "own",
                probes=tuple(Probe(e.prompt, ".", "regex") for e in demonstrations("R", n, 5)),
                least_change=-0.2,
            ),
        ),
        batch_size=64,
        max_new_tokens=8,
    )
    answers = evaluate_suite(lm, Symbols(), suite).skills[0].answers
    return replace(
        suite,
        skills=(
            replace(
                suite.skills[0],
                probes=tuple(
                    Probe(p.prompt, a or "!", "exact")
                    for p, a in zip(suite.skills[0].probes, answers)
                ),
            ),
        ),
    )


def spoil(lm, *_, **how):
    return SDFTResult(nnx.merge(nnx.graphdef(lm), jax.tree.map(lambda x: -x, params(lm))), [], None)


def keep(lm, *_, **how):
    return SDFTResult(nnx.merge(nnx.graphdef(lm), jax.tree.map(jnp.array, params(lm))), [], None)


def test_gates(lm, tmp_path):
    "What changes nothing passes and its examples are kept; what spoils is refused, and the same bytes go on"
    suite, buffer, mark = probes(lm), ReplayBuffer(), weights_hash(lm)
    same, good = gated_update(
        lm, Symbols(), EXAMPLES, CFG, suite, buffer, tmp_path / "good", update=keep
    )
    assert good.accepted and len(buffer) == 6 and same is not lm and weights_hash(same) == mark
    kept, bad = gated_update(
        lm, Symbols(), EXAMPLES, CFG, suite, buffer, tmp_path / "bad", update=spoil
    )
    assert (
        not bad.accepted
        and kept is lm
        and bad.weights_kept == mark == weights_hash(kept) != bad.weights_after
        and len(buffer) == 6
    )
    with pytest.raises(Rejected, match="rejected.*own") as error:
        bad.enforce()
    assert error.value.exit_code == REJECTED == 3 and "\n" not in str(error.value)
    assert {p.name for p in (tmp_path / "bad").iterdir()} == {
        "eval_before.json",
        "eval_after.json",
        "gate_decision.json",
        "metrics.jsonl",
    }
    with pytest.raises(ValueError, match="was decided here"):
        gated_update(lm, Symbols(), EXAMPLES, CFG, suite, buffer, tmp_path / "bad", update=keep)


def test_an_update_that_changes_its_model_is_caught(lm, tmp_path):
    mine = keep(lm).lm

    def sly(lm, *_, **how):
        lm.norm.gain[...] = lm.norm.gain[...] * 3
        return spoil(lm)

    with pytest.raises(ValueError, match="changed the weights it was given"):
        gated_update(mine, Symbols(), EXAMPLES, CFG, probes(mine), None, tmp_path, update=sly)


def test_a_new_skill_is_demanded(lm):
    suite = probes(lm)
    strict = replace(suite, skills=(replace(suite.skills[0], least_change=0.3),))
    report = evaluate_suite(lm, Symbols(), strict)
    assert not decide(report, report, strict).accepted
    with pytest.raises(ValueError, match="the report before is of suite"):
        decide(evaluate_suite(lm, Symbols(), suite), report, strict)


# --- against TRL: the parity extra -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kind, alpha", [("forward", 0.0), ("reverse", 1.0), ("js", 0.3)])
def test_losses_of_trl(kind, alpha):
    "Their divergence of random logits is ours, and so is its gradient"
    torch, theirs = (
        pytest.importorskip("torch"),
        pytest.importorskip("trl.experimental.sdft.loss_utils"),
    )
    s, t = (np.random.default_rng(i).normal(size=(2, 5, 30)).astype(np.float32) for i in (0, 1))
    z = torch.tensor(s, requires_grad=True)
    loss = theirs.compute_full_logit_self_distillation_loss(
        z, torch.tensor(t), distillation_alpha=alpha
    ).mean()
    loss.backward()
    ours = lambda z: divergence(
        jax.nn.log_softmax(z), jax.nn.log_softmax(t), kind, alpha if kind == "js" else 0.5
    ).mean()
    value, grad = jax.value_and_grad(ours)(jnp.asarray(s))
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(grad, z.grad, atol=1e-6)
