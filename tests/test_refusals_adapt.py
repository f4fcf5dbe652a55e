"What the pages of `adapt` and the learning study refuse: the message names the class, the field and the value."

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from nash_lab.adapt.continual import (
    CodeProbe,
    ContinualConfig,
    ReplayBuffer,
    SkillGate,
    Suite,
    TextGate,
    continual,
    evaluate_suite,
    load_suite,
    paired_change,
)
from nash_lab.adapt.hf import chat_text, load_hf, read_config, read_rope, save_hf, write_config
from nash_lab.adapt.lora import LoRAConfig, attach, combine, init_adapter, read_adapters, write_peft
from nash_lab.adapt.sdft import Example, SDFTConfig, distil, divergence, encoder
from nash_lab.core.configs import from_json, to_json
from nash_lab.core.files import read_rows, write_json
from nash_lab.evals.scores import Probe
from nash_lab.model.block import ModelConfig
from nash_lab.model.transformer import LM
from nash_lab.train.settings import TrainConfig
from nash_lab.studies.learning import (
    LearningConfig,
    Symbols,
    demonstrations,
    right_answer,
    skill_suite,
)

PROBE = Probe("a", "b")
REFUSED = [
    (
        lambda: SDFTConfig(batch_size=6, accumulate=4),
        "SDFTConfig.accumulate=4",
        "divisor of batch_size=6",
    ),
    (lambda: SDFTConfig(template="{prompt}"), "SDFTConfig.template=", "{demonstration}"),
    (
        lambda: SDFTConfig(template="{prompt}{demonstration}{x}"),
        "SDFTConfig.template=",
        "no other braces",
    ),
    (lambda: SDFTConfig(steps=0), "steps=0", ""),
    (lambda: SDFTConfig(mix=1.0), "SDFTConfig.mix=1.0", ""),
    (lambda: SDFTConfig(ema_rate=1.5), "SDFTConfig.ema_rate=1.5", ""),
    (lambda: SDFTConfig(replay_ratio=1.0), "SDFTConfig.replay_ratio=1.0", ""),
    (lambda: SDFTConfig(temperature=float("inf")), "SDFTConfig.temperature=inf", ""),
    (lambda: SDFTConfig(divergence="backward"), "SDFTConfig.divergence='backward'", "reverse"),
    (lambda: SDFTConfig(tune="some"), "SDFTConfig.tune='some'", "lora"),
    (lambda: Example("", "b"), "Example.prompt=''", ""),
    (lambda: Example("a", " "), "Example.demonstration=' '", ""),
    (lambda: divergence(np.zeros(3), np.zeros(3), "backward"), "'backward'", "reverse"),
    (lambda: ReplayBuffer(capacity=0), "ReplayBuffer.capacity=0", ""),
    (lambda: ReplayBuffer(policy="newest"), "ReplayBuffer.policy='newest'", "recency"),
    (lambda: CodeProbe("def f():", " "), "CodeProbe.tests=' '", ""),
    (lambda: TextGate("t"), "TextGate.path", "a path or a text"),
    (lambda: TextGate("t", text="a", largest_rise=-0.1), "TextGate.largest_rise=-0.1", ""),
    (lambda: SkillGate("s"), "SkillGate.path", "a path or probes"),
    (lambda: SkillGate("s", probes=(PROBE,), least_change=0), "SkillGate.least_change=0", ""),
    (
        lambda: SkillGate("s", probes=(PROBE,) * 10),
        "SkillGate.least_change=-0.05",
        "73 probes or more",
    ),
    (lambda: Suite(), "Suite", "at least one"),
    (
        lambda: Suite(skills=(SkillGate("s", path="a"), SkillGate("s", path="b"))),
        "['s', 's']",
        "different names",
    ),
    (lambda: ContinualConfig(run="a", out="./a"), "ContinualConfig.out", "another directory"),
    (lambda: paired_change([], []), "0 and 0 outcomes", ""),
    (lambda: LoRAConfig(rank=0), "LoRAConfig.rank=0", "at least 1"),
    (lambda: LoRAConfig(dropout=1.0), "LoRAConfig.dropout=1.0", ""),
    (lambda: LoRAConfig(alpha=0.0), "LoRAConfig.alpha=0.0", ""),
    (lambda: LoRAConfig(targets=()), "LoRAConfig.targets=()", ""),
    (lambda: combine([]), "no adapters", ""),
    (lambda: LearningConfig(arms=("sftt",)), "LearningConfig.arms=('sftt',)", "sft-teacher"),
    (lambda: LearningConfig(seeds=0), "LearningConfig.seeds=0", ""),
    (
        lambda: skill_suite(LearningConfig(probes=32), [], margin=0.05),
        "SkillGate.least_change=-0.05",
        "73 probes or more",
    ),
    (lambda: right_answer("Q", [1] * 5), "'Q'", ""),
    (lambda: Symbols().encode("?"), "", ""),
    (
        lambda: read_rope({"rope_scaling": {"type": "longrope", "factor": 2}}, 64),
        "'longrope'",
        "yarn",
    ),
    (lambda: read_config({"model_type": "mamba"}), "model_type='mamba'", "llama"),
    (lambda: read_config({"model_type": "deepseek_v4"}), "residual='v4', but attention", "attn_sink"),
    (lambda: read_config({"model_type": "qwen4_exp_text"}), "residual='gated'", "gated delta nets"),
    (lambda: read_config({"model_type": "llama", "hidden_act": "gelu"}), "hidden_act='gelu'", ""),
    (lambda: read_config({"model_type": "llama", "mlp_bias": True}), "mlp_bias=True", ""),
    (lambda: read_config({"model_type": "llama"}), "'vocab_size' is missing", ""),
    (lambda: write_config(ModelConfig.tiny()), "ModelConfig.residual='mhc'", "plain"),
    (
        lambda: write_config(ModelConfig.tiny(residual="plain", qkv_bias=True, qk_norm=True)),
        "no family has both",
        "",
    ),
]


@pytest.mark.parametrize(
    "make, found, expected",
    REFUSED,
    ids=[f"{i}-{found}" for i, (_, found, _) in enumerate(REFUSED)],
)
def test_refused(make, found, expected):
    with pytest.raises(ValueError) as error:
        make()
    assert (
        found in str(error.value) and expected in str(error.value) and "\n" not in str(error.value)
    )


@pytest.fixture(scope="module")
def lm():
    return LM(ModelConfig.tiny(residual="plain", max_len=32, vocab_size=64))


class Bare(Symbols):
    bos_id = None


def test_what_does_not_fit_the_model(lm):
    cfg, examples = (
        SDFTConfig(steps=20, max_new_tokens=8, template="{demonstration}|{prompt}"),
        demonstrations("X", 4, 0),
    )
    long = [*examples, Example("1" * 30, "2" * 20)]
    with pytest.raises(
        ValueError, match="example 5: 31 and 52 tokens .* max_new_tokens=8, .* max_len=32"
    ):
        distil(lm, Symbols(), long, cfg)
    with pytest.raises(ValueError, match="no examples"):
        distil(lm, Symbols(), [], cfg)
    with (
        pytest.warns(UserWarning, match="chases its own changes"),
        pytest.raises(ValueError, match="no examples"),
    ):
        distil(lm, Symbols(), [], SDFTConfig(steps=20, teacher="live"))
    with pytest.raises(ValueError, match="no BOS token"):
        encoder(Bare(), "bos")


def test_suites_that_cannot_be_examined(lm, tmp_path):
    with pytest.raises(ValueError, match="'a' still names a file"):
        evaluate_suite(lm, Symbols(), Suite((TextGate("a", path="a.txt"),)))
    with pytest.raises(ValueError, match="text 'short': .* at least 10"):
        evaluate_suite(lm, Symbols(), Suite((TextGate("short", text="012"),), seq_len=16))
    (tmp_path / "suite.json").write_text('{"texts": [{"name": "t", "path": "gone.txt"}]}')
    with pytest.raises(FileNotFoundError, match="gone.txt"):
        load_suite(tmp_path / "suite.json")
    with pytest.raises(FileNotFoundError, match="none.json"):
        load_suite(tmp_path / "none.json")
    (tmp_path / "suite.json").write_text('{"skils": []}')
    with pytest.raises(ValueError, match="suite.json: Suite: unknown key 'skils'"):
        load_suite(tmp_path / "suite.json")
    SkillGate("s", probes=(PROBE,) * 73, least_change=-0.05)
    with pytest.raises(ValueError, match="73 probes or more .*found 72"):
        SkillGate("s", probes=(PROBE,) * 72, least_change=-0.05)


def test_adapters_that_do_not_fit(lm, tmp_path):
    cfg = LoRAConfig(rank=2)
    adapter = init_adapter(lm, cfg, jax.random.key(0))
    for skip, targets, said in (
        ((), ("blocks/mlp/*",), "no linear layer fits target 'blocks/mlp/"),
        (("*",), ("*",), "LoRAConfig.skip="),
    ):
        with pytest.raises(ValueError) as error:
            init_adapter(lm, LoRAConfig(targets=targets, skip=skip), jax.random.key(0))
        assert said in str(error.value)
    narrow = LM(ModelConfig.tiny(residual="plain", width=16, heads=2, kv_heads=2))
    with pytest.raises(ValueError, match="the adapter is for .* the model has"):
        attach(narrow, adapter)
    with pytest.raises(
        ValueError, match="the adapter has blocks/attention/k, the model's linear layers are"
    ):
        attach(attach(lm, adapter), adapter)
    with pytest.raises(ValueError, match="rank 2, the config says 3"):
        write_peft(tmp_path, adapter, LoRAConfig(rank=3), lm)
    folder = write_peft(tmp_path / "a", adapter, cfg, lm)
    with pytest.raises(ValueError, match="2 weights for 1 adapters"):
        read_adapters(lm, [folder], [1.0, 2.0])
    with pytest.raises(ValueError, match="no adapters"):
        read_adapters(lm, [])


def test_adapter_with_a_block_missing(lm, tmp_path):
    from safetensors.numpy import load_file, save

    cfg = LoRAConfig(rank=2)
    folder = write_peft(tmp_path, init_adapter(lm, cfg, jax.random.key(0)), cfg, lm)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(
        save(
            {
                k: v
                for k, v in load_file(file).items()
                if not k.endswith("1.mlp.up_proj.lora_B.weight")
            }
        )
    )
    with pytest.raises(ValueError, match="1.mlp.up_proj.lora_B.weight is missing"):
        read_adapters(lm, [folder])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="which may change the base"):
        read_adapters(lm, [folder])


def test_folders_that_are_no_model(tmp_path):
    lm = LM(ModelConfig.tiny(residual="plain", qk_norm=True))
    whole = save_hf(lm, tmp_path / "whole")
    with pytest.raises(ValueError, match="there are weights already"):
        save_hf(lm, whole)
    with pytest.raises(FileNotFoundError, match="no such file, so this is no model folder"):
        load_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match="chat_template.jinja"):
        chat_text(whole, [])
    config = json.loads((whole / "config.json").read_text())
    for changes, said in (
        (dict(model_type="llama"), "k_norm.weight: the model has no such weight"),
        (dict(num_hidden_layers=3), "model.layers.2.input_layernorm.weight: missing"),
        (dict(intermediate_size=63), "mlp.gate_proj.weight: shape .64, 32., expected .63, 32."),
        (dict(model_type="mamba"), "config.json: model_type"),
    ):
        (whole / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=said):
            load_hf(whole)
    (whole / "config.json").write_text(json.dumps(config))
    (whole / "model.safetensors").write_bytes(b"PK" * 40)
    with pytest.raises(ValueError, match="model.safetensors: "):
        load_hf(whole)
    (whole / "model.safetensors").unlink()
    (whole / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../other/model.safetensors"}})
    )
    with pytest.raises(ValueError, match="is not a file of this folder"):
        load_hf(whole)


def test_block_with_other_settings(tmp_path):
    "A finished block is read only by the settings that made it"
    cfg = ContinualConfig(run=str(tmp_path / "base"), out=str(tmp_path / "block"))
    write_json(tmp_path / "block/config.json", {})
    with pytest.raises(ValueError, match="there is a run already"):
        continual(cfg)
    write_json(tmp_path / "block/continual.json", to_json(cfg))
    with pytest.raises(ValueError, match="made with other settings: capacity: 50000 -> 7"):
        continual(ContinualConfig(run=cfg.run, out=cfg.out, capacity=7))


def test_blocks_without_a_suite(tmp_path, monkeypatch):
    "A file that is missing says what can stand in its place; a run that holds out nothing is refused"
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "demonstration": "b"}')
    cfg = ContinualConfig(run="base", out="block", data="rows.jsonl")
    with pytest.raises(FileNotFoundError, match="suite.json: no such file; --suite '' takes"):
        continual(cfg)
    write_json("base/config.json", to_json(TrainConfig(val_bin="held-out.jsonl")))
    with pytest.raises(ValueError, match="base: holds out no packed text, --suite needs a file"):
        continual(replace(cfg, suite=""))
    assert not Path("block").exists()


def test_examples_name_their_line(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '{"prompt": "a", "demonstration": "b"}\n{"prompt": "a", "demonstration": " "}'
    )
    with pytest.raises(ValueError, match="data.jsonl:2: Example.demonstration="):
        read_rows(tmp_path / "data.jsonl", partial(from_json, Example), "examples")
