"Sweeps: the points, what is refused before anything runs, a run that fails, going on where it was."

import json
from dataclasses import replace

import numpy as np
import pytest
from nash_lab.data.loader import LoaderConfig
from nash_lab.lab.cli import main
from nash_lab.model.transformer import ModelConfig
from nash_lab.train import sweep as page
from nash_lab.train.pretrain import pretrain
from nash_lab.train.sweep import SweepConfig, sweep, sweep_table


@pytest.fixture(scope="module")
def small(packed, tmp_path_factory):
    return SweepConfig(
        run=str(tmp_path_factory.mktemp("sweep") / "runs"),
        **packed,
        steps=4,
        checkpoint_every=2,
        model=ModelConfig.tiny(vocab_size=300, layers=1, residual="plain"),
        loader=LoaderConfig(seq_len=16, batch_size=4, epochs=0),
        over=("optim.learning_rate=1e-3,1e-2", "seed=0,1"),
    )


def test_points():
    "A grid is every combination; draws lie in their range, log-uniform, whole where both ends are"
    grid = SweepConfig(over=("seed=0,1", "optim.name=adamw,muon"))
    assert [tuple(p.values()) for p in grid.points()] == [
        *((0, "adamw"), (0, "muon"), (1, "adamw"), (1, "muon"))
    ]
    over = ("optim.learning_rate=1e-4..1e-2", "optim.weight_decay=0..0.2", "seed=1..9")
    points = SweepConfig(over=over, samples=400).points()
    rates, decays, seeds = (np.array([list(p.values())[i] for p in points]) for i in range(3))
    assert (1e-4 <= rates).all() and (rates <= 1e-2).all()
    assert 0.4 < (rates < 1e-3).mean() < 0.6  # as many below the middle of the logarithm
    assert 0.4 < (decays < 0.1).mean() < 0.6
    assert set(seeds.tolist()) == set(range(1, 10)) and all(type(p["seed"]) is int for p in points)
    assert points == SweepConfig(over=over, samples=400).points()
    assert points != SweepConfig(over=over, samples=400, draw_seed=1).points()


def test_goes_on(small, monkeypatch):
    "Stopped inside the second run, it repeats nothing that is done and ends with what one go gives"
    begun = []

    def stops(cfg):
        begun.append(cfg.run)
        if len(begun) == 2:
            pretrain(cfg, hooks=[interrupt])
        return pretrain(cfg)

    def interrupt(record, state):
        if record["step"] >= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(page, "pretrain", stops)
        with pytest.raises(KeyboardInterrupt):
            sweep(replace(small, log_every=1))
    rows = json.loads((page.Path(small.run) / "results.json").read_text())
    assert len(rows) == 1
    done = sweep(replace(small, log_every=1))
    assert [row["step"] for row in done] == [4] * 4 and done[0] == rows[0]
    whole = sweep(replace(small, log_every=1, run=small.run + "_whole"))
    assert [row["val_bpb"] for row in done] == [row["val_bpb"] for row in whole]
    table = sweep_table(small, done).splitlines()
    assert table[0].split()[:2] == ["optim.learning_rate", "seed"] and len(table) == 5
    with pytest.raises(ValueError, match="choose another --run"):
        sweep(replace(small, log_every=1, steps=5))


def test_a_run_that_fails(small, monkeypatch):
    "It has its reason in the table, the others go on, and it is tried again"

    def fails(cfg):
        if cfg.seed == 1:
            raise ValueError("no finite loss\nfor long")
        return pretrain(cfg)

    cfg = replace(small, run=small.run + "_failed", steps=1, over=("seed=1,0",))
    with monkeypatch.context() as patch:
        patch.setattr(page, "pretrain", fails)
        rows = sweep(cfg, say=lambda line: None)
    assert rows[0]["failed"] == "no finite loss" and rows[1]["step"] == 1
    last = sweep_table(cfg, rows).splitlines()[-1]
    assert last.startswith("1") and last.endswith("000: no finite loss")
    assert all("failed" not in row for row in sweep(cfg, say=lambda line: None))


def test_command(small, capsys, tmp_path):
    "The verb: a table, the best first, and a picture"
    (tmp_path / "c.json").write_text(json.dumps(page.to_json(replace(small, steps=1))))
    flags = ["--run", str(tmp_path / "s"), "--over", "optim.learning_rate=1e-5,1e-1"]
    assert main(["sweep", "--config", str(tmp_path / "c.json"), *flags]) == 0
    said = capsys.readouterr().out
    assert "bits per byte" in said and said.index("0.1 ") < said.index("1e-05")
    assert (tmp_path / "s/sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "over, says",
    [
        ((), "at least one FIELD=A,B,C"),
        (("optim.learning_rat=1,2",), "fields of pretrain, found 'optim.learning_rat'"),
        (("seed",), "FIELD=A,B,C once, found 'seed'"),
        (("seed=0,1", "seed=2"), "FIELD=A,B,C once, found 'seed=2'"),
        (("run=a,b",), "fields of pretrain, found 'run'"),
        (("over=a,b",), "fields of pretrain, found 'over'"),
        (("seed=1..5",), "LOW..HIGH and --samples"),
        (("model.heads=3,4",), "a multiple of kv_heads"),
        (("optim.name=adam",), "optim"),
        (("steps=0",), "TrainConfig.steps=0"),
    ],
)
def test_refused_before_anything_runs(over, says):
    with pytest.raises(ValueError) as error:
        SweepConfig(over=over)
    assert says.lower() in str(error.value).lower() and "\n" not in str(error.value)
