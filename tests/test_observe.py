"Watching the streams: nothing that is trained changes, a resumed run records the same, faults are said once; interventions are what they are called."

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from nash_lab.data.loader import LoaderConfig
from nash_lab.evals.probe import Intervention, measure_effects
from nash_lab.lab.viz import PANELS, drift_plot
from nash_lab.model.mhc import MHCConfig
from nash_lab.model.residuals import RESIDUALS
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.run.rundir import as_record, scalars
from nash_lab.train.observe import Observer, make_look, routing_stats, symptoms
from nash_lab.train.optim import OptimConfig
from nash_lab.train.pretrain import load_run, pretrain, read_metrics
from nash_lab.train.settings import TrainConfig

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def cfg(packed, tmp_path_factory):
    return TrainConfig(
        run=str(tmp_path_factory.mktemp("watched") / "run"),
        **packed,
        steps=12,
        log_every=4,
        observe_every=3,
        eval_every=6,
        eval_batches=1,
        checkpoint_every=6,
        model=ModelConfig.tiny(vocab_size=300, dropout=0.1),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        loader=LoaderConfig(seq_len=16, batch_size=4),
    )


@pytest.fixture(scope="module")
def run(cfg):
    return pretrain(cfg).run


def rows_of(run):
    return read_metrics(run / "metrics.jsonl")


def weights(run):
    return nnx.to_pure_dict(nnx.state(load_run(run)[0], nnx.Param))


def test_a_watched_run_learns_the_same(cfg, run):
    "Every look has a line of its own, and losses and weights are those of a run that nobody watches"
    blind = pretrain(replace(cfg, run=f"{cfg.run}-blind", observe_every=0)).run
    watched, alone = rows_of(run), rows_of(blind)
    assert [row["step"] for row in watched] == [0, 3, 4, 6, 8, 9, 12]
    assert [row["step"] for row in alone] == [0, 4, 6, 8, 12]
    looks = [row["step"] for row in watched if "routing" in row]
    assert looks == [0, 3, 6, 9, 12]
    assert [row["step"] for row in alone if "routing" in row] == [0, 6, 12]
    by_step = {row["step"]: row for row in watched}
    for row in alone:
        for name in ("loss", "grad_norm", "val_loss", "val_bpb", "routing"):
            assert row.get(name) == by_step[row["step"]].get(name)
    jax.tree.map(np.testing.assert_array_equal, weights(run), weights(blind))


def test_a_resumed_run_records_the_same(cfg, run):
    again = replace(cfg, run=f"{cfg.run}-again")

    def hook(record, state):
        if record["step"] == 9:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        pretrain(again, hooks=[hook])
    resumed = pretrain(again).run
    names = ("step", "loss", "routing", "val_loss")
    pick = lambda rows: [[row.get(name) for name in names] for row in rows]
    assert pick(rows_of(resumed)) == pick(rows_of(run))


def test_the_trap_is_said_once_while_training(cfg, capfd):
    "Without a stream embedding and with equal maps the streams are copies; a control that was chosen is silent"
    trap = replace(cfg.model, mhc=MHCConfig(stream_embedding=0.0, phi_std=0.0))
    done = pretrain(replace(cfg, run=f"{cfg.run}-trap", model=trap)).run
    said = [line for line in capfd.readouterr().err.splitlines() if "copies" in line]
    assert len(said) == 1 and said[0].startswith("step 6: the streams are copies of each other")
    assert max(rows_of(done)[-1]["routing"]["spread"]) < 1e-5


def test_symptoms():
    "Copies and a frozen H_res are named after two looks in a row, once, and never at step 0"
    far = dict(spread=np.full(4, 0.5), identity=np.full(4, 0.1))
    bad = dict(spread=np.full(4, 1e-6), identity=np.full(4, 1e-9))
    assert symptoms(far) == {} and symptoms({}) == {} and symptoms({"spread": [None]}) == {}
    assert set(symptoms(bad)) == {"copies", "frozen"}
    assert symptoms(far | {"identity": np.array([1e-9, 0.1])}) == {}


def test_each_is_said_once(capsys):
    looks = iter(["bad", "bad", "far", "bad", "bad", "bad"])
    stats = dict(bad={"identity": np.zeros(2)}, far={"identity": np.ones(2)})
    observer = Observer(lambda params, batch: stats[next(looks)], {})
    said = []
    for step in range(6):
        observer({}, step)
        said.append(capsys.readouterr().err)
    assert [bool(text) for text in said] == [False, False, False, False, True, False]
    assert said[4].startswith("step 4: H_res stays at the identity")
    silent = Observer(lambda params, batch: stats["bad"], {}, ("frozen",))
    for step in range(4):
        silent({}, step)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["frac", "wide", "attnres", "v41"])
def test_every_kind_of_maps_gives_finite_numbers(name):
    "Fractions, static maps, reads alone, maps that are handed on"
    lm = LM(ModelConfig.tiny(residual=name, layers=1))
    graph, params = nnx.split(lm, nnx.Param)
    stats = make_look(graph)(params, {"tokens": TOKENS})
    assert all(np.isfinite(value).all() for value in stats.values())
    assert {len(value) for value in stats.values()} == {2}
    assert ("identity" in stats) == (RESIDUALS[name].mixes or name == "frac")


def test_statistics_are_those_of_the_maps():
    lm = LM(ModelConfig.tiny(mhc=MHCConfig(phi_std=0.3, alpha=1.0, gates=True)))
    stats = nnx.jit(routing_stats)(lm, TOKENS)
    maps = nnx.jit(lambda lm, tokens: lm.routing(tokens))(lm, TOKENS)
    res = np.asarray(maps.res, np.float64).reshape(4, -1, 4, 4)
    entropy = -(res * np.log(res)).sum(-1).mean((1, 2))
    np.testing.assert_allclose(stats["entropy"], entropy, atol=1e-5)
    np.testing.assert_allclose(stats["res_col_max"], res.sum(-2).max((1, 2)), atol=1e-5)
    pre = np.asarray(maps.pre).reshape(4, -1, 4)
    usage = (pre / pre.sum(-1, keepdims=True)).mean(1)
    np.testing.assert_allclose(stats["usage"], usage, atol=1e-5)
    assert stats["alpha"].shape == (4, 3) and stats["gate"].shape == (4,)


def test_records_go_to_trackers_as_numbers():
    record = as_record({"step": 3, "routing": {"spread": np.array([0.5, 0.25])}, "note": "x"})
    found = scalars(record)
    assert found == {"step": 3, "routing/spread/00": 0.5, "routing/spread/01": 0.25}


def test_small_multiples_leave_out_what_is_missing():
    "A run that was watched from its middle on has short lines in some panels"
    old = {"identity": [0.1, 0.2], "uniform": [1.6, 1.5]}
    rows = [dict(step=0, routing=old), dict(step=5, routing=old | {"spread": [None, 0.5]})]
    axes = drift_plot(rows).axes
    assert [ax.get_title(loc="left") for ax in axes] == [p[0] for p in PANELS if p[2][0] in rows[1]["routing"]]
    assert [len(ax.lines[0].get_xdata()) for ax in axes] == [2, 2, 1]


@pytest.fixture(scope="module")
def model():
    lm = LM(ModelConfig.tiny(mhc=MHCConfig(phi_std=0.5, alpha=1.0)))
    batch = {"tokens": TOKENS, "targets": (TOKENS * 7 + 1) % 256, "mask": TOKENS >= 0}
    return SimpleNamespace(lm=lm, batch=batch)


def test_interventions_by_hand(model):
    "A mean is the same for all tokens, and the parts of the cost are those of the maps that are replaced"
    kinds = [Intervention(how) for how in ("identity", "uniform", "mean", "permuted")]
    found = measure_effects(model.lm, [model.batch], 2.0, kinds)
    identity, uniform, mean, permuted = found.effects
    for one in (identity, uniform, mean):
        np.testing.assert_allclose(one.gain, 1, atol=1e-2)  # doubly stochastic, by the claim
    assert len({round(one.cost, 6) for one in found.effects}) == 4
    assert found.targets == TOKENS.size and len(found.distance) == 4


def test_a_silent_stream_is_not_read(model):
    "With all four streams silent at the last site the model reads nothing there"
    one = Intervention("silent", (1,), "ffn", 2).change(np.zeros((2, 2, 4, 4)), 4)
    assert one.keep[1, 1].tolist() == [1, 1, 0, 1] and one.keep.sum() == 15 and not one.on.any()


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda m: Intervention("shuffled"), r"how='shuffled'"),
        (lambda m: Intervention(stream=-1), r"stream=-1"),
        (lambda m: [Intervention(layers=(2,))], r"no layer 2, the model has layers 0 to 1"),
        (lambda m: [Intervention("silent", stream=4)], r"stream=4: the model has 4 streams"),
    ],
)
def test_refusals(model, wrong, says):
    with pytest.raises(ValueError, match=says):
        measure_effects(model.lm, [model.batch], 2.0, wrong(model))


@pytest.mark.parametrize("residual, says", [("plain", "no streams"), ("wide", "no H_res to change")])
def test_models_that_cannot_be_probed(model, residual, says):
    lm = LM(ModelConfig.tiny(residual=residual))
    with pytest.raises(ValueError, match=says):
        measure_effects(lm, [model.batch], 2.0, [Intervention()])
