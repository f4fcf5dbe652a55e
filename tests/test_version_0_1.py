"""A run directory and a search of version 0.1 open, answer and resume.

`fixtures/run_0_1/make.py` made both with the code of that version and wrote down how it continued."""

import json
import tarfile
from pathlib import Path

import pytest

import nash_lab as nl
from nash_lab.core.configs import from_json
from nash_lab.discover.problems import StringMatch
from nash_lab.discover.search import discover
from nash_lab.discover.ttt import DiscoverConfig
from nash_lab.run.rundir import read_metrics
from nash_lab.train.pretrain import load_run, pretrain
from nash_lab.train.settings import saved_config

FIXTURE = Path(__file__).parent / "fixtures/run_0_1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture
def old(tmp_path, monkeypatch):
    "The folder in which version 0.1 was stopped, and the working directory."
    with tarfile.open(FIXTURE / "run_0_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same_lines(found, expected, names, tolerance):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, old_row in zip(found, expected):
        for name in names:
            assert (name in row) == (name in old_row)
            if old_row.get(name) is not None:
                # 1e-7: kl is a mean of differences of float32 log-probabilities
                assert row[name] == pytest.approx(old_row[name], rel=tolerance, abs=1e-7), (
                    name,
                    row,
                )


def test_a_run_opens_and_answers(old):
    model = nl.load("run")
    found = model.logprob(EXPECTED["text"])
    assert found.logprobs.tolist() == pytest.approx(EXPECTED["logprobs"], abs=1e-5)
    prompt = EXPECTED["prompt"]
    assert model.generate(prompt, max_new_tokens=8, temperature=0.0) == EXPECTED["generated"]


def test_a_run_resumes_to_the_same_losses(old):
    result = pretrain(saved_config(Path("run")))
    assert result.step == 6
    names = ("loss", "grad_norm", "lr", "tokens", "skipped", "val_loss", "val_bpb")
    same_lines(read_metrics("run/metrics.jsonl"), EXPECTED["run"], names, 1e-6)


def test_a_search_resumes_to_the_same_answers(old):
    cfg = from_json(DiscoverConfig, json.loads(Path("search/config.json").read_text()))
    model = nl.load("run")
    task = StringMatch("and", prompt="7 ")
    result = discover(task, load_run("run", 3)[0], model.tokenizer, cfg, "search")
    assert result.search.step == 4
    names = ("rollouts", "best", "mean_reward", "distinct", "kl", "grad_norm", "loss")
    same_lines(read_metrics("search/metrics.jsonl"), EXPECTED["search"], names, 1e-4)
    answers = read_metrics("search/discovery_log.jsonl")
    for row, old_row in zip(answers, EXPECTED["answers"], strict=True):
        assert (row["completion"], row["reward"]) == (old_row["completion"], old_row["reward"])
