"Gates of a model: setting, noise, temperature; the environment, its controllers, and a public PPO on it"

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.discover.gates import (
    GateEnv,
    GatesConfig,
    PolicyConfig,
    Question,
    arithmetic,
    final_number,
    read_questions,
    steer,
    train_policy,
)
from nash_lab.discover.prior import prior_run
from nash_lab.discover.problems import character_tokenizer
from nash_lab.model.mhc import MHCConfig
from nash_lab.model.transformer import LM, ModelConfig, gates, set_gate, set_gates

WORDS = character_tokenizer("0123456789+-=")
MHC = MHCConfig(gates=True, start="uniform", alpha=1.0, stream_embedding=1.0, iterations=4)
TINY = ModelConfig.tiny(vocab_size=WORDS.vocab_size, width=16, head_dim=4, max_len=16, mhc=MHC)


@pytest.fixture(scope="module")
def lm():
    return LM(TINY, nnx.Rngs(0))


@pytest.fixture(scope="module")
def run(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    prior_run(lm, WORDS, folder / "gated")
    for name, cfg in (("plain", TINY.plain()), ("ungated", replace(TINY, mhc=MHCConfig()))):
        prior_run(LM(cfg, nnx.Rngs(0)), WORDS, folder / name)
    return folder


def test_gates_of_the_whole_model(lm):
    "One number, one a layer, one a sublayer, one a row; 0 is the model that does not mix; the model itself stays"
    tokens = jnp.arange(24).reshape(2, 12) % TINY.vocab_size
    own = lm(tokens)
    shut = LM(replace(TINY, mhc=replace(MHC, gates=False, h_res="identity")), nnx.Rngs(0))
    n = MHC.streams
    for name in ("attention_hyper", "ffn_hyper"):  # the weights of the other, less those of H_res
        mine, theirs = getattr(lm.blocks, name), getattr(shut.blocks, name)
        theirs.phi[...], theirs.bias[...] = mine.phi[...][..., : 2 * n], mine.bias[...][..., : 2 * n]
    weights = nnx.to_pure_dict(nnx.state(lm, nnx.Param))
    for block in ("attention", "ffn"):
        for key in ("gate", "phi", "bias"):
            del weights["blocks"][f"{block}_hyper"][key]
    nnx.update(shut, weights)
    np.testing.assert_array_equal(set_gate(lm, 0.0).hidden(tokens), shut.hidden(tokens))

    g = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
    np.testing.assert_allclose(gates(set_gate(lm, g)), g, atol=1e-6)
    np.testing.assert_allclose(gates(set_gate(lm, g[0])), g[0][:, None] + 0 * g, atol=1e-6)
    rows = set_gate(lm, np.stack([g, np.zeros_like(g)], -1))(tokens)
    np.testing.assert_allclose(rows[0], set_gate(lm, g)(tokens)[0], atol=1e-5)
    np.testing.assert_allclose(rows[1], set_gate(lm, 0.0)(tokens)[1], atol=1e-5)
    with pytest.raises(RuntimeError), set_gates(lm, 1.0):
        assert float(gates(lm).min()) == 1
        raise RuntimeError
    np.testing.assert_array_equal(lm(tokens), own)


def test_noise_on_gates_is_of_training_alone(lm):
    "Within 0.8 and 1.2, other for each row and step, none without a key; a gate of 0 stays; gradients are finite"
    noisy = nnx.merge(nnx.graphdef(LM(replace(TINY, mhc=replace(MHC, gate_noise=0.2)))), nnx.state(lm))
    tokens = jnp.ones((3, 6), jnp.int32)
    np.testing.assert_array_equal(noisy(tokens), lm(tokens))
    where = dict(targets=tokens)

    def loss(model, key):
        return model.objective(tokens, dropout_key=key, **where)[0]

    mid = set_gate(noisy, 0.5)
    seen = [mid.forward(tokens, dropout_key=jax.random.key(i))[2][0].res for i in (0, 0, 1)]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert float(jnp.abs(seen[0] - seen[2]).max()) > 0.01
    graph = nnx.graphdef(noisy)
    learn = jax.jit(jax.value_and_grad(lambda state, key: loss(nnx.merge(graph, state), key)))
    found = {}
    for g in (0.0, 0.5, 1.0):
        state = nnx.state(set_gate(noisy, g))
        found[g], slopes = learn(state, jax.random.key(0))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(slopes))
    state = nnx.state(set_gate(noisy, 0.0))
    np.testing.assert_array_equal(found[0.0], learn(state, jax.random.key(1))[0])
    assert ModelConfig.preset("gpt-d12-mhc").mhc.gate_noise == 0.2


def test_gates_cost_nothing_where_they_are_off(lm):
    "The same program: noise in evaluation, and a temperature of 1 with other places to start, on a model without gates"

    def program(model, **how):
        graph, state = nnx.split(model)
        run = jax.jit(lambda state, tokens: nnx.merge(graph, state).hidden(tokens, **how))
        return run.lower(state, jnp.ones((2, 6), jnp.int32)).as_text()

    noisy = LM(replace(TINY, mhc=replace(MHC, gate_noise=0.2)))
    assert program(noisy) == program(lm)
    ungated = [LM(replace(TINY, mhc=replace(MHC, gates=False, **kind))) for kind in ({}, dict(start="first", tau=1.0))]
    off, other = map(program, ungated)
    assert off == other != program(lm)
    assert "uniform" not in off and len(off) < len(program(lm))


def test_questions_of_both_splits_are_apart():
    "No prompt is learned on and measured on; broken rows of a file are refused with their line"
    one, other = (arithmetic(200, 0, 20, split) for split in ("train", "test"))
    assert len(one) == len(other) == 200
    assert not {q.prompt for q in one} & {q.prompt for q in other}
    assert all(q.value == float(q.answer) == final_number(q.answer) for q in one + other)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "How many?"}, "keys ['question'], expected question and answer or final_answer"),
        ({"question": "How many?", "answer": "some"}, "answer 'some', expected a number in it"),
        (["How many?"], "svamp/test.jsonl:2: "),
    ],
)
def test_broken_questions_are_refused(tmp_path, row, message):
    good = {"question": "How many?", "final_answer": "4"}
    (tmp_path / "svamp").mkdir()
    lines = "\n".join(json.dumps(line) for line in (good, row))
    (tmp_path / "svamp/test.jsonl").write_text(lines)
    with pytest.raises(ValueError) as error:
        read_questions("svamp", "test", 2, folder=str(tmp_path))
    assert "svamp/test.jsonl:2: " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tau=0.0), "tau"),
        (dict(gate_noise=0.2), "gates=False: expected True"),
        (dict(gates=True, gate_start=1.5), "gate_start=1.5"),
        (dict(start="middle"), "start='middle'"),
    ],
)
def test_settings_of_gates_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        MHCConfig(**changes)
    assert message.split(":")[0] in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_gate_is_refused(lm):
    for g, message in ((1.2, "gates from 1.2"), (float("nan"), "gates from nan"), (np.zeros(3), "shape (3,)")):
        with pytest.raises(ValueError, match="gates") as error:
            set_gate(lm, g)
        assert message in str(error.value)
    env = GateEnv((lm, WORDS), arithmetic(4, 0))
    with pytest.raises(ValueError, match="gates from -0.5 to -0.5, expected 0 to 1"):
        env.step(np.array([-0.5], np.float32))
    for how, message in ((dict(mode="token"), "mode 'token'"), (dict(reward="bleu"), "reward 'bleu'")):
        with pytest.raises(ValueError, match=message):
            GateEnv((lm, WORDS), arithmetic(4, 0), **how)
    with pytest.raises(ValueError, match="no questions"):
        GateEnv((lm, WORDS), [])
    with pytest.raises(ValueError, match="the model reads at most 16"):
        GateEnv((lm, WORDS), [Question("1+" * 12, "7", 7.0)])


@pytest.mark.parametrize("mode", ["global", "layer"])
def test_gymnasium_accepts_the_environment(lm, mode):
    pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    env = GateEnv((lm, WORDS), arithmetic(32, 0), mode=mode)
    check_env(env, skip_render_check=True)
    assert env.action_space.shape == ({"global": 1, "layer": 2}[mode],)


def test_the_command_on_a_run(run, tmp_path):
    "Table and JSON; models that have no gates, and questions without a file, in one line"
    few = dict(train=16, held_out=16, rows=16, policy=PolicyConfig(rounds=2, episodes=32))
    out = tmp_path / "gates.json"
    table = steer(GatesConfig(run=str(run / "gated"), mode="layer", out=str(out), **few))
    found = json.loads(out.read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == ["fixed", "random", "oracle", "ppo", "reinforce", "constant"]
    assert all(name in table for name in names) and len(found["grid"]) == 11 + 9
    oracle = {row["name"]: row for row in found["rows"]}["oracle"]
    assert oracle["gain"] >= 0
    for name in ("plain", "ungated"):
        with pytest.raises(ValueError, match="this model has none"):
            steer(GatesConfig(run=str(run / name), **few))
    with pytest.raises(FileNotFoundError, match="no folder of benchmark files|svamp"):
        read_questions("svamp", "test", 4, folder=str(tmp_path / "nowhere"))


def test_real_questions(data):
    "GSM8K and SVAMP: every answer has a number"
    for name, split, count in (("gsm8k", "train", 200), ("svamp", "test", 300), ("svamp", "train", 5)):
        asked = read_questions(name, split, count, folder=str(data))
        assert len(asked) == count
        for question in asked:
            assert question.value == final_number(question.answer)


@pytest.mark.parity
def test_stable_baselines_reaches_the_same(lm):
    "A public PPO drives the environment as it is, and ends where ours does"
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = GateEnv((lm, WORDS), arithmetic(128, 0))
    best = np.array([[0.9] if "+" in q.prompt else [0.2] for q in env.questions])
    env.rewards = lambda which, actions: np.float32(-((actions - best[which]) ** 2).sum(-1))
    around = VecNormalize(DummyVecEnv([lambda: env]))
    peer = PPO(
        "MlpPolicy",
        around,
        learning_rate=3e-3,
        n_steps=256,
        batch_size=32,
        n_epochs=4,
        gamma=0.0,
        policy_kwargs=dict(net_arch=[32, 32], log_std_init=-1.2),
        seed=0,
        device="cpu",
    )
    peer.learn(8 * 256)
    theirs, _ = peer.predict(around.normalize_obs(env.features), deterministic=True)
    ours, _ = train_policy(env, PolicyConfig(rounds=8, learning_rate=3e-3))
    every = np.arange(128)
    lost = [-float(env.rewards(every, np.clip(a, 0, 1)).mean()) for a in (theirs, ours(env.features))]
    assert max(lost) < 0.05, lost  # a constant loses 0.1225


def test_the_tables_of_the_study(tmp_path):
    "Means over seeds and the standard error of the gain; a missing benchmark keeps its reason; other settings are refused"
    from nash_lab.core.files import write_json
    from nash_lab.studies import gates as study

    cfg = study.Config(out=str(tmp_path / "study"), seeds=2)
    names = ("fixed", "random", "constant", "reinforce", "ppo", "oracle")
    made = {}
    for seed in range(2):
        rows = [{"name": n, "reward": i + seed, "gain": 0.5 + seed} for i, n in enumerate(names)]
        made |= {f"{family}-{seed}": {"global logprob": {"rows": rows}} for family in study.FAMILIES}
        for variant in study.VARIANTS:
            scores = {"val_bpb": 2.0 + seed, "arc_easy": "skipped: no folder of benchmark files"}
            made[f"{variant}-{seed}"] = {"curve": []} | scores
    made["tuned-0"] = made["tuned-1"] = {"val_bpb": "skipped: gsm8k"}
    text = study.tables(cfg, made)
    means = " | ".join(f"{i + 0.5:.3f}" for i in range(6))
    assert f"| switch | global | logprob | {means} | +1.000 ± 0.500 | +1.000 ± 0.500 |" in text
    assert "| baseline | 2.500 ± 0.500 | skipped: no folder" in text
    assert "| tuned | skipped: gsm8k | - |" in text
    (tmp_path / "study").mkdir()
    other = json.loads(json.dumps({"seeds": 5}))
    write_json(tmp_path / "study/study.json", other)
    with pytest.raises(ValueError, match="choose another --out"):
        study.run_study(cfg)
    with pytest.raises(ValueError, match="expected residual mhc with mhc.gates"):
        study.Config(model=ModelConfig.preset("gpt-d12"))
