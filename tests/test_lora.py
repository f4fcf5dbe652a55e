"LoRA on every kind of model, and its files against `peft` on a LLaMA of transformers (parity extra)."

import json
from dataclasses import replace
from functools import partial
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nash_lab.adapt.lora import (
    LoRAConfig,
    adapter_update,
    attach,
    combine,
    extract_adapter,
    init_adapter,
    linear_layers,
    merge_adapter,
    peft_adapts,
    peft_name,
    read_peft,
    target_shapes,
    write_peft,
)
from nash_lab.model.block import ModelConfig
from nash_lab.model.generate import _decode, generate
from nash_lab.model.transformer import LM
from nash_lab.train.optim import OptimConfig, optimizer
from nash_lab.train.step import fresh_state

CFG = LoRAConfig(rank=2, alpha=4)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
BATCH = dict(tokens=TOKENS, targets=np.roll(TOKENS, -1, 1), mask=np.ones(TOKENS.shape, bool))


@nnx.jit
def logits(lm, tokens):
    return lm(tokens)


def filled(adapter, size=0.2, seed=1):
    "The same shapes with numbers that do something"
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32), adapter
    )


def plain(**changes):
    return LM(ModelConfig.tiny(residual="plain", layers=2, **changes))


@pytest.mark.parametrize(
    "kind",
    [
        dict(attention="diff1"),
        dict(attention="diff2"),
        dict(attention="mla"),
        dict(attention="maha"),
        dict(ffn="gelu"),
        dict(ffn="moe"),
        dict(mtp="sequential"),
        dict(residual="mhc"),
    ],
    ids=lambda k: "-".join(k.values()),
)
def test_beside_equals_inside(kind, tmp_path):
    "Every kind of model: logits and cached decoding of the adapted model are those of the merged one; the file brings the factors back"
    lm = LM(ModelConfig.tiny(**(dict(residual="plain") | kind)))
    adapter = filled(init_adapter(lm, CFG, jax.random.key(0)))
    one, two = attach(lm, adapter, CFG.scale), merge_adapter(lm, adapter, CFG.scale)
    want = logits(two, TOKENS)
    assert jnp.abs(want - logits(lm, TOKENS)).max() > 0.01
    np.testing.assert_allclose(logits(one, TOKENS), want, atol=2e-4)
    step = nnx.jit(
        lambda lm, cache: lm.logits(
            lm.step(TOKENS, jnp.broadcast_to(jnp.arange(12)[None], (2, 12)), cache)[0]
        )
    )
    np.testing.assert_allclose(step(one, one.init_cache(2, 16)), want, atol=2e-4)
    again, _ = read_peft(write_peft(tmp_path, adapter, CFG, lm), lm)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapter))


def test_targets_reach_multi_token_heads(tmp_path):
    lm = plain(mtp="sequential")
    cfg = replace(CFG, targets=("mtp/*",))
    adapter = filled(init_adapter(lm, cfg, jax.random.key(0)))
    assert "mtp/project" in adapter and all(p.startswith("mtp/") for p in adapter)
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal, read_peft(write_peft(tmp_path, adapter, cfg, lm), lm)[0], adapter
        )
    )


def test_bfloat16():
    "The change is made in the type of the activations; factors and their gradients stay float32"
    lm = plain(compute_dtype="bfloat16", init_std=0.1)
    adapter = filled(init_adapter(lm, CFG, jax.random.key(0)), size=0.1)
    one, two = (logits(use(lm, adapter, CFG.scale), TOKENS) for use in (attach, merge_adapter))
    assert one.dtype == jnp.float32 and jnp.abs(one - two).max() < 0.05 * jnp.abs(two).max()
    slopes = jax.eval_shape(jax.grad(lambda a: attach(lm, a, CFG.scale)(TOKENS).sum()), adapter)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(slopes))


def test_base_is_untouched_and_only_factors_have_moments():
    lm = plain(init_std=0.2)
    graph, params = nnx.split(lm, nnx.Param)
    params = nnx.to_pure_dict(params)
    before = jax.tree.map(np.array, params)
    tx = optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant"), 9)
    state, losses = fresh_state(init_adapter(lm, CFG, jax.random.key(0)), tx), []
    step = partial(adapter_update, graphdef=graph, tx=tx, cfg=replace(CFG, dropout=0.2))
    programs = adapter_update._cache_size()
    for _ in range(8):
        state, metrics = step(state, params, BATCH, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert (
        losses[-1] < losses[0]
        and int(state.step) == 8
        and adapter_update._cache_size() == programs + 1
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, before, params))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 3 * sum(
        x.size for x in jax.tree.leaves(state.params)
    )


def test_a_loss_of_nan_changes_nothing():
    lm = plain()
    graph, params = nnx.split(lm, nnx.Param)
    tx = optimizer(OptimConfig(warmup_steps=0, schedule="constant"), 9)
    start = filled(init_adapter(lm, CFG, jax.random.key(0)))
    step = partial(
        adapter_update,
        graphdef=graph,
        tx=tx,
        cfg=CFG,
        loss=lambda lm, batch, key: (jnp.nan * lm(batch["tokens"]).sum(), jnp.float32(1)),
    )
    state, metrics = step(
        fresh_state(jax.tree.map(jnp.copy, start), tx), params, BATCH, jax.random.key(0)
    )
    assert (
        jax.tree.all(jax.tree.map(np.array_equal, start, state.params))
        and int(metrics["skipped"]) == 1
    )


def test_each_layer_and_map_has_its_own_dropout():
    "A one-layer model cut from a two-layer one would share keys if they were drawn for the map alone"
    lm = plain(init_std=0.2)
    own = attach(lm, init_adapter(lm, CFG, jax.random.key(0)), rate=0.5, key=jax.random.key(0))
    keys = [jax.random.key_data(getattr(own.blocks.attention, n).key[...]) for n in "qkvo"]
    assert (
        len({tuple(row) for k in keys for row in np.asarray(k).reshape(-1, k.shape[-1]).tolist()})
        == 8
    )


def test_switching_adapters_compiles_nothing():
    lm = plain(init_std=0.2)
    one, two = (
        filled(init_adapter(lm, replace(CFG, targets=t), jax.random.key(0)), seed=i)
        for i, t in enumerate([("*/q", "*/up"), ("*/v", "*/up")])
    )
    write = lambda parts: generate(
        attach(lm, combine(parts)), [[1, 2, 3]], max_new_tokens=8, temperature=0.0
    )[0].tolist()
    out, sizes = [], []
    for a, b in ((0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (2.0, 2.0)):
        out.append(write([(one, a), (two, b)]))
        sizes.append(_decode._cache_size())
    assert sizes[0] == sizes[-1]
    alone = lambda adapter: generate(
        merge_adapter(lm, adapter, 2.0), [[1, 2, 3]], max_new_tokens=8, temperature=0.0
    )[0].tolist()
    assert (
        out[1:3] == [alone(one), alone(two)]
        and out[0] == generate(lm, [[1, 2, 3]], max_new_tokens=8, temperature=0.0)[0].tolist()
    )


def test_extraction_is_exact_at_full_rank():
    lm, other = plain(), LM(ModelConfig.tiny(residual="plain"), nnx.Rngs(1))
    cfg = LoRAConfig(
        rank=64, alpha=8, rslora=True
    )  # above the 16 and 32 dimensions of some maps: padded with zeros
    adapter, _ = extract_adapter(lm, other, cfg)
    merged = merge_adapter(lm, adapter, cfg.scale)
    for (path, a), b in zip(linear_layers(merged).items(), linear_layers(other).values()):
        if path == "embedding":  # no target
            continue
        np.testing.assert_allclose(a.weight[...], b.weight[...], atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (dict(peft_type="IA3"), "peft_type 'IA3'"),
        (dict(use_dora=True), "use_dora"),
        (dict(bias="all"), "bias"),
        (dict(rank_pattern={"q_proj": 4}), "expected (4, 32)"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern: 'q_proj' is 0"),
        (dict(rank_pattern=[4]), "rank_pattern is [4], expected dict"),
        (dict(alpha_pattern={"q_proj": "x"}), "alpha_pattern: 'q_proj' is 'x'"),
        (dict(rank_pattern={"(": 4}), "no regular expression"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(use_new_variant=True), "use_new_variant"),
        (dict(new_config={"a": 1}), "new_config"),
        (dict(init_lora_weights="pissa_niter_4"), "which may change the base"),
        (dict(init_lora_weights="loftq"), "which may change the base"),
        (dict(target_modules=["q_proj"]), "belongs to no linear layer that is adapted"),
        (dict(target_modules=["lm_head"]), "lm_head.lora_A.weight is missing"),
        (dict(target_modules=3), "target_modules is 3, expected str or list"),
        (
            dict(exclude_modules=["layers.1.mlp.up_proj"]),
            "layers.1.mlp.up_proj.lora_A.weight belongs",
        ),
        (dict(layers_to_transform=[0]), "layers.1.mlp.down_proj.lora_A.weight belongs"),
        (
            dict(layers_to_transform=[0], target_modules="all-linear"),
            "layers_to_transform needs target_modules as a list",
        ),
        (dict(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
        (dict(r=5), "expected (5, 32)"),
        (dict(r="x"), "rank: expected int, found 'x'"),
    ],
    ids=lambda x: None,
)
def test_refused_configs(spoil, says, tmp_path):
    lm = plain()
    write_peft(tmp_path, init_adapter(lm, CFG, jax.random.key(0)), CFG, lm)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | spoil))
    with pytest.raises(ValueError) as error:
        read_peft(tmp_path, lm)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_refused_files(tmp_path):
    lm = plain()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        read_peft(tmp_path, lm)
    write_peft(tmp_path, init_adapter(lm, CFG, jax.random.key(0)), CFG, lm)
    with pytest.raises(ValueError, match="belongs to no linear layer"):
        read_peft(tmp_path, plain(ffn="gelu"))
    (tmp_path / "adapter_model.safetensors").write_bytes(b'{"a": 1}')
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_peft(tmp_path, lm)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        read_peft(tmp_path, lm)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match="adapter_model.bin: expected adapter_model.safetensors"):
        read_peft(tmp_path, lm)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="adapter_config.json: "):
        read_peft(tmp_path, lm)


def test_an_adapter_that_changes_nothing_is_written_whole(tmp_path):
    lm = plain()
    zero = jax.tree.map(jnp.zeros_like, init_adapter(lm, CFG, jax.random.key(0)))
    again, told = read_peft(write_peft(tmp_path, zero, CFG, lm), lm)
    assert told.targets == tuple(zero) and not any(x.any() for x in jax.tree.leaves(again))


@pytest.fixture(scope="module")
def pair():
    "A random LLaMA of transformers, and ours with its weights"
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            initializer_range=0.2,
            rope_parameters=dict(rope_type="default", rope_theta=1e4),
            attn_implementation="eager",
        )
    ).eval()
    ours, state = plain(), theirs.state_dict()
    tensor = lambda name: jnp.asarray(state[name].numpy())
    ours.embedding[...] = tensor("model.embed_tokens.weight")
    ours.norm.gain[...] = tensor("model.norm.weight")
    for ln, name in (
        (ours.blocks.attention_norm, "input_layernorm"),
        (ours.blocks.ffn_norm, "post_attention_layernorm"),
    ):
        ln.gain[...] = jnp.stack([tensor(f"model.layers.{i}.{name}.weight") for i in range(2)])
    for path, m in linear_layers(ours).items():
        if path == "embedding":
            continue
        rows = [
            tensor(f"{peft_name(path, (i,)).removeprefix('base_model.model.')}.weight").T
            for i in range(2)
        ]
        m.weight[...] = jnp.stack(rows).reshape(m.weight.shape)
    return ours, theirs


def scores(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


LIKE_PEFT = [
    LoRAConfig(rank=4, alpha=8),
    LoRAConfig(rank=3, alpha=5, rslora=True),
    LoRAConfig(rank=2, alpha=2.5, dropout=0.1, targets=("*/q", "*/v"), skip=()),
    LoRAConfig(targets=("blocks/ffn/*",)),
]


@pytest.mark.parity
@pytest.mark.parametrize("cfg", LIKE_PEFT, ids=["all", "rslora", "q-v", "ffn"])
def test_peft_loads_ours(pair, cfg, tmp_path):
    peft = pytest.importorskip("peft")
    import copy

    ours, theirs = pair
    np.testing.assert_allclose(logits(ours, TOKENS), scores(theirs), atol=1e-4)  # the bases agree
    adapter = filled(init_adapter(ours, cfg, jax.random.key(0)))
    model = peft.PeftModel.from_pretrained(
        copy.deepcopy(theirs), write_peft(tmp_path, adapter, cfg, ours)
    ).eval()
    want, got = scores(model), logits(attach(ours, adapter, cfg.scale), TOKENS)
    assert np.abs(want - scores(theirs)).max() > 0.1
    np.testing.assert_allclose(got, want, atol=3e-5)
    np.testing.assert_allclose(
        logits(merge_adapter(ours, adapter, cfg.scale), TOKENS),
        scores(model.merge_and_unload()),
        atol=1e-4,
    )


@pytest.mark.parity
@pytest.mark.parametrize("cfg", LIKE_PEFT, ids=["all", "rslora", "q-v", "ffn"])
def test_we_load_what_peft_wrote(pair, cfg, tmp_path):
    peft = pytest.importorskip("peft")
    import copy, torch

    ours, theirs = pair
    names = sorted({peft_name(path, (0,)).rsplit(".", 1)[1] for path in target_shapes(ours, cfg)})
    torch.manual_seed(1)
    model = peft.get_peft_model(
        copy.deepcopy(theirs),
        peft.LoraConfig(
            r=cfg.rank,
            lora_alpha=cfg.alpha,
            lora_dropout=cfg.dropout,
            use_rslora=cfg.rslora,
            target_modules=names,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    ).eval()
    model.save_pretrained(tmp_path / "theirs")
    adapter, told = read_peft(tmp_path / "theirs", ours)
    assert (told.rank, told.alpha, told.dropout, told.rslora) == (
        cfg.rank,
        cfg.alpha,
        cfg.dropout,
        cfg.rslora,
    ) and set(told.targets) == set(target_shapes(ours, cfg))
    got, want = logits(attach(ours, adapter, told.scale), TOKENS), scores(model)
    assert np.abs(want - scores(theirs)).max() > 0.1
    np.testing.assert_allclose(got, want, atol=3e-5)
    write_peft(
        tmp_path / "ours", adapter, told, ours
    )  # and back: the same tensors under the same names
    from safetensors.numpy import load_file

    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


Q1 = "model.layers.1.self_attn.q_proj"
PEFT_RULES = {
    "suffixes": dict(target_modules=["self_attn.v_proj", "up_proj"]),
    "whole paths": dict(target_modules=[Q1, "model.layers.0.mlp.down_proj"]),
    "regular expression": dict(target_modules=r".*layers\.1\..*(q|v)_proj"),
    "all-linear": dict(target_modules="all-linear", exclude_modules=["o_proj"]),
    "the family's own": dict(target_modules=None),
    "excluded end": dict(target_modules=["q_proj", "k_proj"], exclude_modules=[Q1]),
    "excluded by expression": dict(
        target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.0\..*q_proj"
    ),
    "one block": dict(target_modules=["q_proj", "gate_proj"], layers_to_transform=1),
    "list of blocks": dict(target_modules=["q_proj", "gate_proj"], layers_to_transform=[0]),
    "no blocks": dict(target_modules=["q_proj"], layers_to_transform=[]),
    "a path beside a block": dict(
        target_modules=[Q1, "v_proj"], layers_to_transform=[0], layers_pattern=["h", "layers"]
    ),
    "ranks": dict(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}),
    "alphas": dict(target_modules=["q_proj", "v_proj"], alpha_pattern={"q_proj": 32}),
    "ranks by block": dict(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"layers\.0\..*": 2, "self_attn.q_proj": 5},
        alpha_pattern={"^" + Q1.replace(".", r"\."): 3, Q1: 7.5, "layers.*v_proj": 1},
    ),
    "ranks of all": dict(target_modules=["q_proj"], rank_pattern={".*": 3}),
    "roots of ranks": dict(
        target_modules=["q_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"down_proj": 9},
        alpha_pattern={Q1: 5},
    ),
    "another start": dict(target_modules=["q_proj"], init_lora_weights="orthogonal"),
    "turned": dict(target_modules=["q_proj"], fan_in_fan_out=True),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(PEFT_RULES))
def test_layers_ranks_and_scales_are_those_of_peft(pair, name, tmp_path):
    "Logits of what peft wrote, and of what we write of it when peft reads that"
    peft = pytest.importorskip("peft")
    import copy
    import torch

    ours, theirs = pair
    rules = dict(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(
        copy.deepcopy(theirs), peft.LoraConfig(**rules | PEFT_RULES[name])
    ).eval()
    for key, weight in model.named_parameters():
        if "lora_" in key:
            weight.data = 0.2 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "theirs")
    want = scores(model)
    assert np.abs(want - scores(theirs)).max() > 0.01

    adapter, told = read_peft(tmp_path / "theirs", ours)
    np.testing.assert_allclose(logits(attach(ours, adapter, told.scale), TOKENS), want, atol=5e-5)
    write_peft(tmp_path / "ours", adapter, told, ours)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    np.testing.assert_allclose(scores(again), want, atol=5e-5)
    adapted = {k for k, _ in model.named_parameters() if "lora_A" in k}
    assert {k for k, _ in again.named_parameters() if "lora_A" in k} == adapted


def test_what_peft_would_not_adapt_is_zero():
    "The rules on paths alone: no more and no fewer than peft's"
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    for config, want in (
        ({"layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [1, 11]}, [1, 11]),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, [3]),
        ({"layers_to_transform": [3], "layers_pattern": "h"}, []),
        ({"exclude_modules": names[2:]}, [0, 1]),
        ({"exclude_modules": r".*\.1\d?\..*"}, [0, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"target_modules": r"layers\.1\..*"}, []),
        ({"target_modules": ["proj"]}, []),
        ({"target_modules": "ALL-linear"}, list(range(12))),
    ):
        config = {"target_modules": ["q_proj"]} | config
        assert [i for i, n in enumerate(names) if peft_adapts(config, n)] == want, config
    assert not peft_adapts({"target_modules": "all-linear"}, "lm_head")


@pytest.mark.parity
def test_two_adapters_as_in_peft(pair, tmp_path):
    "peft's weighted combination by concatenation is ours"
    peft = pytest.importorskip("peft")
    import copy

    ours, theirs = pair
    cfgs = LoRAConfig(rank=2, alpha=4), LoRAConfig(rank=3, alpha=3)
    adapters = [
        filled(init_adapter(ours, c, jax.random.key(i)), seed=i) for i, c in enumerate(cfgs)
    ]
    folders = [
        write_peft(tmp_path / str(i), a, c, ours) for i, (a, c) in enumerate(zip(adapters, cfgs))
    ]
    model = peft.PeftModel.from_pretrained(
        copy.deepcopy(theirs), folders[0], adapter_name="one"
    ).eval()
    model.load_adapter(folders[1], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    both = combine([(adapters[0], cfgs[0].scale), (adapters[1], 0.5 * cfgs[1].scale)])
    np.testing.assert_allclose(logits(attach(ours, both), TOKENS), scores(model), atol=1e-4)
