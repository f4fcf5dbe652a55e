"The study of residual connections: what it asks for, pairing by seed, and going on after an interrupt"

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from scipy.stats import t as student

from nash_lab.data.corpus import CorpusConfig
from nash_lab.data.tokenizer import TokenizerConfig
from nash_lab.lab.bench import write_rows
from nash_lab.lab.cli import read_job
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.run.rundir import read_metrics
from nash_lab.studies import residuals as study
from nash_lab.studies.residuals import (
    VARIANTS,
    Config,
    Training,
    chosen_rates,
    equal_time,
    paired,
    plan,
    run_study,
    study_rows,
    study_table,
    variant_model,
)
from nash_lab.train.optim import OptimConfig

TINY = ModelConfig.tiny(vocab_size=300, layers=1, width=16)
TOY = Config(
    variants=("plain", "mhc", "gated"),
    rates=(0.01, 0.02),
    tuning_seeds=2,
    seeds=2,
    leading=1,
    leading_seeds=4,
    steps=100,
    tokenizer=TokenizerConfig(vocab_size=300),
    model=TINY,
    seq_len=32,
)
MS = {"plain": 10.0, "mhc": 20.0, "gated": 9.0}


def fulfilled(cfg, score):
    "Scores of a whole study, each made up by `score(training)`"
    scores = {}
    while todo := [t for t in plan(cfg, scores, MS) if t not in scores]:
        scores |= {t: score(t) for t in todo}
    return scores


def test_every_variant_is_a_model():
    models = {name: variant_model(ModelConfig.preset("demo"), name) for name in VARIANTS}
    assert len(set(models.values())) == len(VARIANTS) == 16
    assert models["plain-zero"].out_init == 0 and models["mhc-lite"].mhc.h_res == "lite"


def test_output_projections_at_zero():
    "Nothing else differs, and 1 is what was there before"
    before = nnx.to_flat_state(nnx.state(LM(TINY.plain(), nnx.Rngs(0)), nnx.Param))
    zero = replace(TINY.plain(), out_init=0.0)
    after = dict(nnx.to_flat_state(nnx.state(LM(zero, nnx.Rngs(0)), nnx.Param)))
    changed = {path[-2:] for path, x in before if not np.array_equal(x[...], after[path][...])}
    assert changed == {("o", "weight"), ("down", "weight")}
    assert all(not np.any(after[p][...]) for p in after if p[-2:] in changed)
    with pytest.raises(ValueError, match="ModelConfig.out_init=-1"):
        replace(TINY, out_init=-1.0)


def test_rates_are_chosen_on_seeds_that_are_not_reported():
    "Scores of reported seeds would choose the other rate"

    def score(t):
        good = 0.02 if t.seed >= 1000 else 0.01
        return 2.0 - (t.rate == good)

    scores = fulfilled(TOY, score)
    assert chosen_rates(TOY, scores) == dict.fromkeys(TOY.variants, 0.02)
    reported = {t for t in scores if t.seed < 1000}
    assert {t.rate for t in reported} == {0.02}
    assert not {t.seed for t in reported} & {t.seed for t in scores if t.seed >= 1000}


def test_equal_time_and_more_seeds_for_those_in_front():
    scores = fulfilled(TOY, lambda t: 2.0 - (t.variant == "mhc"))
    assert equal_time(TOY, MS) == {"plain": 100, "mhc": 50, "gated": 100}
    seeds = {}
    for t in scores:
        if t.seed < 1000:
            seeds.setdefault((t.variant, t.steps), []).append(t.seed)
    four = [0, 1, 2, 3]
    expected = {("plain", 100): four, ("mhc", 100): four, ("mhc", 50): four}
    assert seeds == expected | {("gated", 100): [0, 1]}


def test_pairs_by_seed():
    "Noise of the seed cancels; a seed without partner and one that diverged are left out"

    def score(t):
        if t == Training("gated", 0.01, 1, 100):
            return None
        noise = (t.seed % 1000) * 0.3
        return 2 + noise + {"plain": 0, "mhc": -0.01, "gated": 0.02}[t.variant] + t.rate / 10

    rows = {row["name"]: row for row in study_rows(TOY, fulfilled(TOY, score), MS)}
    assert rows["plain"]["tokens"] == {"delta": 0, "half": 0, "pairs": 4}
    mhc = rows["mhc"]["tokens"]
    assert mhc["pairs"] == 4 and abs(mhc["delta"] + 0.01) < 1e-9 and mhc["half"] < 1e-9
    gated = rows["gated"]
    assert gated["diverged"] == 1 and gated["tokens"]["pairs"] == 1
    assert abs(gated["tokens"]["delta"] - 0.02) < 1e-9 and np.isnan(gated["tokens"]["half"])
    assert len(study_table(TOY, [*rows.values()]).splitlines()) == 5


def test_diverged_rate_is_not_chosen():
    scores = fulfilled(TOY, lambda t: None if t.rate == 0.02 else 2.0)
    assert set(chosen_rates(TOY, scores).values()) == {0.01}


@pytest.mark.parametrize("freedom", (1, 4, 9, 30))
def test_interval_is_students(freedom):
    values = np.random.default_rng(freedom).normal(size=freedom + 1)
    half = paired(dict(enumerate(values)), dict.fromkeys(range(freedom + 1), 0.0))["half"]
    error = values.std(ddof=1) / np.sqrt(freedom + 1)
    assert abs(half / (student.ppf(0.975, freedom) * error) - 1) < 1e-3


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--variants plain nothing", "some of plain, plain-zero"),
        ("--variants mhc", "plain among them"),
        ("--variants plain plain", "each of them once"),
        ("--rates 0.01 0", "all above 0"),
        ("--baseline mhc --variants plain gated", "one of plain, gated"),
        ("--leading-seeds 3", "at least 5"),
        ("--limit-s -1", "at least 0"),
        ("--seq-len 1024", "at most model.max_len=512"),
        ("--tokenizer.vocab-size 512", "vocab_size of model.vocab_size=2048"),
    ],
)
def test_refuses(line, expected):
    with pytest.raises(ValueError, match=expected):
        read_job(["study", "residuals", *line.split()])


def test_is_a_verb():
    _, job, _ = read_job("study residuals --rates 0.1 0.2 --limit-s 60".split())
    assert job == Config(rates=(0.1, 0.2), limit_s=60.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Config:
    "A finished study: four trainings choose rates, two seeds of both variants are reported"
    home = tmp_path_factory.mktemp("residuals")
    (home / "texts").mkdir()
    for i in range(30):
        lines = [f"def name_{i * j}(x):\n    return x * {j} + {i}" for j in range(20)]
        (home / f"texts/{i}.txt").write_text("\n".join(lines))
    cfg = Config(
        out=str(home / "study"),
        variants=("plain", "plain-zero"),
        rates=(0.003, 0.01),
        seeds=2,
        leading=0,
        leading_seeds=2,
        steps=3,
        batch_size=4,
        seq_len=32,
        eval_batches=2,
        corpus=CorpusConfig("text", (str(home / "texts"),), holdout=0.3),
        tokenizer=TokenizerConfig(vocab_size=300),
        model=TINY,
        optim=OptimConfig("adamw"),
    )
    write_rows(f"{cfg.out}/times.json", cfg, [{"name": "plain", "ms": 10.0}])
    assert "missing" not in run_study(cfg)
    return cfg


def lines(cfg):
    "Finished trainings of a folder, without their seconds"
    records = read_metrics(Path(cfg.out) / "trainings.jsonl")
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_goes_on_after_an_interrupt(whole, tmp_path, monkeypatch):
    "With equal results, to the last bit"
    cfg = replace(whole, out=str(tmp_path / "moved"))
    shutil.copytree(whole.out, cfg.out)
    path = Path(cfg.out) / "trainings.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    measured = []

    def interrupted(*args):
        measured.append(evaluate(*args))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measured[-1]

    evaluate = study.evaluate_loss
    monkeypatch.setattr(study, "evaluate_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(cfg)
    assert lines(cfg) == lines(whole)[:5]
    monkeypatch.undo()
    said = run_study(replace(cfg, limit_s=1e-9))
    assert lines(cfg) == lines(whole)[:6]
    assert "2 trainings of this stage are missing; the same command goes on" in said
    run_study(cfg)
    assert lines(cfg) == lines(whole) and len(lines(whole)) == 8
    seeds = [[t["seed"] for t in lines(whole) if t["variant"] == name] for name in cfg.variants]
    assert seeds == [[1000, 1000, 0, 1]] * 2


def test_nothing_is_trained_twice(whole, monkeypatch):
    monkeypatch.setattr(study, "seed_scores", None)
    assert run_study(whole) == run_study(replace(whole, limit_s=9.0))
    assert "differences to plain-zero" in run_study(replace(whole, baseline="plain-zero"))


@pytest.mark.parametrize("change", ({"steps": 4}, {"seeds": 1}, {"rates": (0.01,)}))
def test_refuses_the_folder_of_other_settings(whole, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*choose another --out"):
        run_study(replace(whole, **change))


def test_says_which_line_is_no_training(whole, tmp_path):
    cfg = replace(whole, out=str(tmp_path / "broken"))
    shutil.copytree(whole.out, cfg.out)
    path = Path(cfg.out) / "trainings.jsonl"
    path.write_text(path.read_text().replace('"seed": 0, ', "", 1))
    with pytest.raises(ValueError, match=r"trainings.jsonl:\d+: no 'seed' in this line"):
        run_study(cfg)
