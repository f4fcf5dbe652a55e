"Bad values of the floors run and train: refused, with the name of what is wrong and its value."

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from nash_lab.run.checkpoint import Checkpoints
from nash_lab.run.rundir import MetricsLog, read_metrics
from nash_lab.train.parallel import (
    AXES,
    AxisRules,
    MeshConfig,
    MeshSlice,
    check_rows,
)
from nash_lab.train.settings import (
    TrainConfig,
    claim_run,
    joined_position,
    own_position,
    saved_config,
)

CFG = TrainConfig(tokenizer="", steps=200)
ONE = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
EIGHT = AbstractMesh((2, 2, 2, 1), AXES)
STREAMS = joined_position([{"row": 3}, {"row": 4}])

REFUSED = {
    r"TrainConfig\.accumulate=3": lambda: replace(CFG, accumulate=3),
    r"TrainConfig\.steps=0": lambda: replace(CFG, steps=0),
    r"TrainConfig\.keep=0": lambda: replace(CFG, keep=0),
    r"TrainConfig\.max_bad_steps=-1": lambda: replace(CFG, max_bad_steps=-1),
    r"TrainConfig\.trackers=.*abacus": lambda: replace(CFG, trackers=("abacus",)),
    r"TrainConfig\.accumulate_dtype=": lambda: replace(CFG, accumulate_dtype="int8"),
    r"MeshConfig\.fsdp=0": lambda: MeshConfig(fsdp=0),
    r"MeshConfig\.data=-2": lambda: MeshConfig(data=-2),
    r"data=3 .* does not make 8 devices": lambda: MeshConfig(data=3).sizes(8),
    r"tp=3 .* does not make 8 devices": lambda: MeshConfig(data=-1, tp=3).sizes(8),
    r"AxisRules\.ffn=.*model": lambda: AxisRules(ffn=("model",)),
    r"axis 'pipe'": lambda: MeshSlice(ONE)[{"pipe": 0}],
    r"leaves no device": lambda: MeshSlice(ONE)[{"tp": slice(2, 4)}],
    r"ellipsis": lambda: MeshSlice(ONE)[..., 0],
    r"6 rows .* do not divide": lambda: check_rows(6, EIGHT),
    r"2 processes cannot be continued by 3": lambda: own_position(STREAMS, 0, 3),
    r"keep=0": lambda: Checkpoints("unused", keep=0),
}


@pytest.mark.parametrize("said", REFUSED)
def test_bad_values(said):
    with pytest.raises(ValueError, match=said):
        REFUSED[said]()


def test_directories_that_are_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        saved_config(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl: exists without config.json"):
        claim_run(CFG, tmp_path)
    (tmp_path / "config.json").write_text('{"stepz": 3}')
    with pytest.raises(ValueError, match="config.json: .*unknown key 'stepz'"):
        saved_config(tmp_path)


def test_logs_that_something_else_wrote(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: not a JSON object: 'oops'"):
        read_metrics(log)
    with pytest.raises(ValueError):  # NaN is no JSON
        MetricsLog(tmp_path / "new.jsonl").write({"step": 1, "loss": float("nan")})


def test_checkpoints_that_are_not_what_is_asked_for(tmp_path):
    points = Checkpoints(tmp_path, asynchronous=False, facts={"tokenizer": "1234"})
    points.save(8, {"model": {"up": np.ones((2, 3), np.float32)}})
    good = {"model": {"up": jax.ShapeDtypeStruct((2, 3), np.float32)}}
    wide = {"model": {"up": jax.ShapeDtypeStruct((2, 4), np.float32)}}
    refused = {
        "no checkpoint of step 5, found": dict(step=5, template=good),
        r"model/up: the checkpoint has float32\[2,3\]": dict(step=8, template=wide),
        "rng/up: the checkpoint has nothing": dict(step=8, template={"rng": good["model"]}),
        "another tokenizer, 1234, not abcd": dict(template=good, facts={"tokenizer": "abcd"}),
    }
    for said, asked in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            points.restore(**asked)
    with pytest.raises(ValueError, match="already saved"):
        points.save(8, {"data": {}})
    points.close()
