"Timing against other libraries and on an accelerator: the same function first, who is left out by name, what a visit leaves."

import json
import time
from dataclasses import replace

import jax.numpy as jnp
import pytest
from nash_lab.adapt.hf import save_hf
from nash_lab.core.configs import to_json
from nash_lab.lab import bench
from nash_lab.lab.bench import AcceleratorConfig, BenchConfig, PeersConfig, timing_table
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.studies import accelerator, peers

TINY = ModelConfig.tiny()
SMALL = dict(model=TINY, batch_size=2, seq_len=16, rounds=2, steps=1, new_tokens=6)


class Enough(Exception):
    "Ends a task after its first answer"


def first_answer(**task):
    "What a contestant computes, in this process"
    found = []

    def turn(answer):
        found.append(answer)
        raise Enough

    with pytest.raises(Enough):
        peers.TASKS[task["task"]](task, turn)
    return found[0]


# --- the same function -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_peers_compute_what_is_ours(tmp_path):
    "Loss and gradient norm of plain and mHC, tokens of decoding: PyTorch, transformers and ours"
    pytest.importorskip("torch")
    save_hf(LM(TINY.plain()), tmp_path / "hf")
    mixed = replace(TINY, mhc=replace(TINY.mhc, streams=2, iterations=3, alpha=0.7))
    for model in (mixed, TINY.plain()):
        task = dict(task="train", model=to_json(model), rows=2, seq_len=16, steps=1)
        ours = first_answer(**task, form="ours")
        eager = first_answer(**task, form="eager")
        assert peers.other_result(eager, ours) == ""
        assert "norm is" in peers.other_result(eager | {"norm": 1.001 * ours["norm"]}, ours)
        if model.residual == "plain" and not peers.skip_reason("transformers"):
            theirs = first_answer(**task, form="transformers", folder=str(tmp_path / "hf"))
            assert peers.other_result(theirs, ours) == ""
        else:
            other = replace(mixed, mhc=replace(mixed.mhc, iterations=1))
            eager = first_answer(**task | dict(model=to_json(other)), form="eager")
            assert peers.other_result(eager, ours)

    task = dict(task="decode", model=to_json(TINY.plain()), rows=2, prompt=4, copies=1, new=6)
    ours = first_answer(**task, form="ours")
    assert first_answer(**task, form="eager") == ours
    if not peers.skip_reason("transformers"):
        theirs = first_answer(**task, form="transformers", folder=str(tmp_path / "hf"))
        assert theirs == ours
    wider = {"shape": [2, 7]}
    assert "shape [2, 7], ours [2, 6]" in peers.other_result(wider, {"shape": [2, 6]})
    assert "of its tokens differ" in peers.other_result({"tokens": [[0] * 6] * 2}, ours)


# --- who takes part ----------------------------------------------------------------------------------------------------------------------------------


class Fake:
    "A contestant without a process"

    ended = 0

    def __init__(self, form, **task):
        self.found = {"loss": 1.0, "norm": 2.0 if form != "compile" else 2.1}
        self.first_s, self.mb = 0.1, 100.0
        self.wait = 0.004 if form == "eager" else 0.001

    def __call__(self):
        time.sleep(self.wait)

    def end(self):
        Fake.ended += 1


def test_left_out_by_name(monkeypatch):
    "What is not installed, what has no compiler, and what computes something else"
    monkeypatch.setattr(peers, "Contestant", Fake)
    missing = {"transformers", "hyper_connections"}
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr(peers.shutil, "which", lambda name: "/usr/bin/g++")
    cfg = BenchConfig(what=("peers",), **SMALL, peers=PeersConfig(("step",)))
    Fake.ended = 0
    rows = peers.measure_peers(cfg)
    said = {row["name"]: row.get("skipped") for row in rows}
    assert said["transformers"].startswith("transformers is not installed: pip install")
    assert said["hyper-connections, mhc"].startswith("hyper_connections is not installed")
    assert said["torch.compile"] == "its norm is 2.1, ours 2"
    timed = [name for name, reason in said.items() if reason is None]
    assert timed == ["nash_lab", "PyTorch", "nash_lab, mhc", "PyTorch, mhc"]
    assert Fake.ended == 6  # those that differ are let go too
    slow = next(row for row in rows if row["name"] == "PyTorch")
    assert slow["time_ratio"] > 1.5 and slow["ratio_low"] <= slow["ratio_high"]
    assert next(r for r in rows if r["name"] == "PyTorch, mhc")["over_plain"] == pytest.approx(
        1, abs=0.5
    )
    table = timing_table(rows)
    assert "torch.compile" in table and "skipped: its norm is 2.1" in table

    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in peers.skip_reason("compile")
    assert peers.skip_reason("eager") == "" == peers.skip_reason("ours")


def test_a_process_takes_turns():
    "Its first answer, two turns, its memory; one that fails says why in one line"
    task = dict(task="decode", form="ours", rows=1, prompt=4, copies=2, new=2)
    peer = peers.Contestant(**task, model=to_json(TINY.plain()))
    assert peer.found["shape"] == [2, 2] and peer.first_s > 0
    assert peer() == {"mb": peer.mb} and peer.mb > 50
    peer.end()
    assert peer.process.returncode == 0
    with pytest.raises(ValueError, match="a contestant ended early: .*unknown key 'widht'"):
        peers.Contestant(**task, model={"widht": 3})


# --- one visit to an accelerator ---------------------------------------------------------------------------------------------------------------------


def test_visit_refuses_a_cpu(tmp_path):
    out = tmp_path / "a.json"
    cfg = BenchConfig(what=("accelerator",), out=str(out))
    with pytest.raises(ValueError, match=r"only a CPU here; --accelerator.tiny") as error:
        bench.bench(cfg)
    assert "\n" not in str(error.value) and not out.exists()


@pytest.fixture
def visit(monkeypatch, tmp_path, capsys):
    "A visit with made-up kernels and steps; gives what it left in its file"

    def run(cases=(), turn=None, **changes):
        monkeypatch.setattr(
            accelerator, "kernel_cases", lambda tiny: iter([c for c in cases for _ in "ab"])
        )
        monkeypatch.setattr(accelerator, "TrainTurn", turn)
        own = AcceleratorConfig(tiny=True, batch_size=4, seq_len=16, **changes)
        out = tmp_path / "visit.json"
        out.unlink(missing_ok=True)
        try:
            accelerator.measure_accelerator(BenchConfig(accelerator=own, out=str(out)))
            error = ""
        except ValueError as problem:
            error = str(problem)
        capsys.readouterr()
        return json.loads(out.read_text()), error

    return run


def test_visit_leaves_everything_in_its_file(visit):
    "A wrong kernel, one for another platform, one that does not compile; rows are halved where they do not fit"
    tried = []

    class Turn:
        compile_s, temporary_mb = 1.5, 250.0
        metrics = {"loss": jnp.float32(3), "skipped": jnp.int32(0)}

        def __init__(self, model, cfg, optim):
            tried.append((model.residual, cfg.batch_size))
            if cfg.batch_size > 2:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 9 bytes")
            if model.residual == "mhc":
                raise RuntimeError("INTERNAL: the compiler\nhas a bug")

        def __call__(self):
            time.sleep(0.001)

    def breaks(x):
        raise RuntimeError("Mosaic failed\nlong")

    x = jnp.arange(4.0)
    right = ("sine", jnp.sin, lambda x: jnp.sin(x), (x,), "float32")
    wrong = ("worse", jnp.sin, lambda x: 0.9 * jnp.sin(x), (x,), "float32")
    cases = [right, wrong, ("streams", "for a TPU"), ("broken", jnp.sin, breaks, (x,), "float32")]
    found, error = visit(cases, Turn)
    assert error == "2 kernels are wrong here: worse; broken"
    assert [row["ok"] for row in found["checks"]] == [True, False, None, False]
    assert found["checks"][2]["not_here"] == "for a TPU"
    assert found["checks"][3]["failed"] == "Mosaic failed"
    assert set(found) == {
        *("config", "where", "stage", "took_s", "checks", "rows", "over_plain", "left_out")
    }
    assert found["stage"] == "done" and found["where"]["peak_tflops"] is None
    plain, mixed = found["rows"]
    assert tried[:2] == [("plain", 4), ("plain", 2)] and plain["rows"] == 2
    assert plain["tokens_per_s"] > 0 and plain["mfu"] is None and plain["ms_low"] <= plain["ms"]
    assert mixed["failed"] == "INTERNAL: the compiler" and "tiny mHC" not in found["over_plain"]


def test_visit_names_what_it_left_out(visit, monkeypatch):
    clock = iter(range(0, 100_000, 50))
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: next(clock))
    case = ("sine", jnp.sin, jnp.sin, (jnp.arange(4.0),), "float32")
    found, error = visit([case], None, budget_s=60)
    assert found["left_out"][0] == "sine" and found["left_out"][1].startswith("tiny plain, ")
    assert error == "" and found["checks"] == [] and found["stage"] == "done"


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: PeersConfig(()), "PeersConfig.groups"),
        (lambda: PeersConfig(("fast",)), "some of step, wide, long, decode, best, sdft"),
        (lambda: PeersConfig(decode_rows=(0,)), "PeersConfig.decode_rows"),
        (lambda: bench.CostConfig(layers=()), "CostConfig.layers"),
        (lambda: bench.CostConfig(streams=(0, 2)), "CostConfig.streams"),
        (lambda: AcceleratorConfig(budget_s=10), "AcceleratorConfig.budget_s=10"),
        (lambda: AcceleratorConfig(models=("mhc-1t",)), "preset 'mhc-1t'"),
        (lambda: BenchConfig(what=("accelerator", "decode")), "accelerator alone"),
    ],
)
def test_refused_settings(make, says):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
