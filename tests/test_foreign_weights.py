"""Folders of weights as other tools leave them: read with the logits of transformers, or refused in one line.

The sound model is a random LLaMA of two layers; each test changes one thing in its config.json or its tensors."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nash_lab.adapt.hf import import_run, load_hf, read_config, read_rope, save_hf, write_config
from nash_lab.model.layers import RopeConfig
from nash_lab.model.transformer import LM

IDS = np.random.default_rng(0).integers(0, 320, (1, 120))
SHAPE = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "A folder that loads, and the logits of its model."
    cfg = read_config({"model_type": "llama"} | SHAPE)
    lm = LM(cfg)
    rng = np.random.default_rng(1)
    for _, leaf in weights_of(lm):
        leaf[...] = 0.3 * rng.standard_normal(leaf.shape) + (leaf.ndim == 2 and leaf.shape[0] == 2)
    folder = save_hf(lm, tmp_path_factory.mktemp("sound") / "m")
    return folder, np.asarray(load_hf(folder)(IDS))


def weights_of(lm):
    from flax import nnx

    return nnx.to_flat_state(nnx.state(lm, nnx.Param))


def changed(sound, where, config=None, tensors=None, drop=(), files=None):
    "A copy of the folder: keys of config.json over the old ones, `tensors` maps the dictionary of tensors to another."
    where.mkdir(parents=True, exist_ok=True)
    old = json.loads((sound / "config.json").read_text())
    new = {k: v for k, v in (old | (config or {})).items() if k not in drop}
    (where / "config.json").write_text(json.dumps(new))
    held = load_file(sound / "model.safetensors")
    save_file(tensors(held) if tensors else held, where / "model.safetensors")
    return where


def renamed(old, new):
    return lambda held: {
        new + k[len(old) :] if k.startswith(old) else k: v for k, v in held.items()
    }


def with_more(**more):
    return lambda held: held | {k.replace("__", "."): v for k, v in more.items()}


def halved(dtype):
    return lambda held: {k: v.astype(dtype) for k, v in held.items()}


INV = "model__layers__0__self_attn__rotary_emb__inv_freq"
READ = {
    "old buffers": dict(
        tensors=with_more(
            **{
                INV: np.ones(4, np.float32),
                "model__rotary_emb__inv_freq": np.ones(4, np.float32),
                "model__layers__1__self_attn__masked_bias": np.float32(-1e4).reshape(1),
            }
        )
    ),
    "no prefix": dict(tensors=renamed("model.", "")),
    "parallel trainer": dict(tensors=lambda held: {f"module.{k}": v for k, v in held.items()}),
    "compiler": dict(tensors=lambda held: {f"_orig_mod.{k}": v for k, v in held.items()}),
    "language model": dict(
        tensors=lambda held: {f"language_model.{k}": v for k, v in held.items()}
    ),
    "nulls": dict(
        config=dict(
            rope_scaling=None,
            rope_parameters=None,
            rope_theta=None,
            head_dim=None,
            sliding_window=None,
            quantization_config=None,
            attention_bias=None,
            layer_types=None,
            tie_word_embeddings=None,
            rms_norm_eps=None,
            hidden_act=None,
        )
    ),
    "keys that are absent": dict(
        drop=("head_dim", "rope_theta", "rope_parameters", "attention_bias", "hidden_act")
    ),
    "swish is silu": dict(config=dict(hidden_act="swish")),
    "notes of tools": dict(
        config=dict(unsloth_version="2025.1", my_note={"a": 1}, is_decoder=False)
    ),
    "a window of Mistral's that is off": dict(config=dict(sliding_window=64)),
    "dynamic rope": dict(config=dict(rope_scaling=dict(type="dynamic", factor=2.0))),
    "mathematics that is off": dict(config=dict(use_qk_norm=False, final_logit_softcapping=None)),
    "float64": dict(tensors=halved(np.float64)),
}


@pytest.mark.parametrize("name", list(READ))
def test_read(sound, name, tmp_path):
    folder, want = sound
    np.testing.assert_allclose(
        load_hf(changed(folder, tmp_path / "m", **READ[name]))(IDS), want, atol=1e-5
    )


def test_what_was_left_out_is_told(sound, tmp_path):
    inv = {INV: np.ones(4, np.float32)}
    folder = changed(sound[0], tmp_path / "m", config=dict(my_note=1), tensors=with_more(**inv))
    left_out = []
    load_hf(folder, left_out=left_out)
    assert left_out == ["config.json: my_note", INV.replace("__", ".")]
    run = import_run(folder, tmp_path / "run")
    assert json.loads((run / "imported.json").read_text())["left_out"] == left_out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(sound, dtype, tmp_path):
    import ml_dtypes

    folder, want = sound
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    half = changed(folder, tmp_path / "m", tensors=halved(kind))
    rounded = changed(folder, tmp_path / "r", tensors=lambda h: halved(np.float32)(halved(kind)(h)))
    np.testing.assert_array_equal(load_hf(half)(IDS), load_hf(rounded)(IDS))


def fp8(held):
    import ml_dtypes

    name = "model.layers.0.mlp.up_proj.weight"
    return held | {name: held[name].astype(ml_dtypes.float8_e4m3fn)}


UP = "model.layers.0.mlp.up_proj"
REFUSED = {
    "turned matrix": (
        dict(tensors=lambda h: h | {f"{UP}.weight": np.ascontiguousarray(h[f"{UP}.weight"].T)}),
        "up_proj.weight: shape [32, 48], expected [48, 32]",
    ),
    "flat norm": (
        dict(tensors=lambda h: h | {"model.norm.weight": h["model.norm.weight"][None]}),
        "model.norm.weight: shape [1, 32], expected [32]",
    ),
    "heads of the wrong number": (
        dict(config=dict(num_key_value_heads=4)),
        "k_proj.weight: shape [16, 32], expected [32, 32]",
    ),
    "vocabulary": (
        dict(config=dict(vocab_size=321)),
        "embed_tokens.weight: shape [320, 32], expected [321, 32]",
    ),
    "quantised by its config": (
        dict(config=dict(quantization_config=dict(quant_method="gptq", bits=4))),
        "quantization_config: method 'gptq'",
    ),
    "quantised by MLX": (dict(config=dict(quantization=dict(bits=4))), "quantization="),
    "fp8": (dict(tensors=fp8), "up_proj.weight of type F8_E4M3, quantised"),
    "int8": (
        dict(tensors=halved(np.int8)),
        "of type I8, quantised weights are not read",
    ),
    "scales": (
        dict(tensors=with_more(**{f"{UP}.weight_scale_inv": np.ones(1, np.float32)})),
        "weight_scale_inv of type F32, quantised",
    ),
    "gptq": (
        dict(tensors=with_more(**{f"{UP}.qweight": np.ones(4, np.int32)})),
        "qweight of type I32, quantised",
    ),
    "awq scales": (
        dict(tensors=with_more(**{f"{UP}.scales": np.ones(4, np.float16)})),
        "scales of type F16, quantised",
    ),
    "one weight twice": (
        dict(tensors=lambda h: h | {"norm.weight": h["model.norm.weight"]}),
        "norm.weight are one weight",
    ),
    "a bias": (
        dict(tensors=with_more(**{f"{UP}.bias": np.ones(48, np.float32)})),
        "up_proj.bias: the model has no such weight",
    ),
    "no head": (
        dict(tensors=lambda h: {k: v for k, v in h.items() if k != "lm_head.weight"}),
        "lm_head.weight: missing",
    ),
    "attention bias": (dict(config=dict(attention_bias=True)), "attention_bias=True"),
    "mlp bias": (dict(config=dict(mlp_bias=True)), "mlp_bias=True"),
    "activation": (dict(config=dict(hidden_act="gelu_pytorch_tanh")), "hidden_act='gelu_pyt"),
    "layer types": (
        dict(config=dict(layer_types=["full_attention", "sliding_attention"])),
        "layer_types: sliding_attention",
    ),
    "chunked attention": (
        dict(config=dict(layer_types=["chunked_attention"] * 2)),
        "layer_types: chunked_attention",
    ),
    "not causal": (dict(config=dict(is_causal=False)), "is_causal=False"),
    "softcap": (dict(config=dict(final_logit_softcapping=30.0)), "final_logit_softcapping=30.0"),
    "multiplier": (dict(config=dict(embedding_multiplier=12)), "embedding_multiplier=12"),
    "experts": (dict(config=dict(num_local_experts=8)), "num_local_experts=8"),
    "partial rotary": (dict(config=dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
    "no number": (dict(config=dict(hidden_size="32")), "hidden_size='32', expected a number"),
    "missing key": (dict(drop=("num_hidden_layers",)), "key 'num_hidden_layers' is missing"),
    "null size": (dict(config=dict(vocab_size=None)), "key 'vocab_size' is missing"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(sound, name, tmp_path):
    changes, says = REFUSED[name]
    with pytest.raises(ValueError) as error:
        load_hf(changed(sound[0], tmp_path / "m", **changes))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def tied(sound, where, head, table):
    "The folder with tie_word_embeddings; of lm_head and embed_tokens those that are not None."

    def tensors(held):
        names = {"lm_head.weight": head, "model.embed_tokens.weight": table}
        rest = {k: v for k, v in held.items() if k not in names}
        return rest | {k: held[v] for k, v in names.items() if v}

    return changed(sound, where, config=dict(tie_word_embeddings=True), tensors=tensors)


def test_a_tied_head_is_in_whichever_tensor_is_there(sound, tmp_path):
    folder, table = sound[0], "model.embed_tokens.weight"
    want = load_hf(tied(folder, tmp_path / "0", None, table))(IDS)
    for i, (head, embedding) in enumerate([(table, None), (table, table)], start=1):
        one = tied(folder, tmp_path / str(i), head, embedding)
        np.testing.assert_array_equal(load_hf(one)(IDS), want)
    with pytest.raises(ValueError, match="lm_head.weight and model.embed_tokens.weight differ"):
        load_hf(tied(folder, tmp_path / "3", "lm_head.weight", table))


def sharded(sound, where):
    save_hf(load_hf(sound), where, shard_bytes=20_000)
    return where, where / "model.safetensors.index.json"


def test_an_index_and_its_files_agree(sound, tmp_path):
    folder, index = sharded(sound[0], tmp_path / "m")
    np.testing.assert_allclose(load_hf(folder)(IDS), sound[1], atol=1e-5)
    whole = json.loads(index.read_text())
    places = whole["weight_map"]
    files = sorted(set(places.values()))
    one = "model.norm.weight"
    assert list(places.values()).count(places[one]) > 1
    for changes, says in (
        (places | {"model.extra": files[0]}, f"names model.extra in {files[0]}"),
        (places | {one: files[0]}, f"holds {one}, .* says {files[0]}"),
        ({k: v for k, v in places.items() if k != one}, f"holds {one}, .* says no file"),
        (places | {one: "gone.safetensors"}, "gone.safetensors: no such file"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps(whole | {"weight_map": changes}))
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            load_hf(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match="no weight_map"):
        load_hf(folder)


def test_which_files_are_read(sound, tmp_path):
    "One whole file before an index, as in transformers; safetensors beside other files; only others are refused with the way out"
    folder, _ = sharded(sound[0], tmp_path / "m")
    changed(sound[0], folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    np.testing.assert_allclose(load_hf(folder)(IDS), sound[1], atol=1e-5)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match="weights in pytorch_model.bin, .*save_pretrained"):
        load_hf(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file"):
        load_hf(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load_hf(folder)


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
ROPE_READ = {
    "linear": dict(rope_type="linear", factor=3.0),
    "linear, old name": dict(type="linear", factor=3.0),
    "yarn": YARN,
    "yarn, factor of lengths": YARN | dict(factor=None),
    "yarn, equal mscale": YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    "yarn, two mscale": YARN | dict(mscale=0.707, mscale_all_dim=0.5),
    "yarn, one mscale": YARN | dict(mscale=0.707),
    "yarn, told factor": YARN | dict(attention_factor=1.3, mscale=2.0, mscale_all_dim=1.0),
    "yarn, betas": YARN | dict(beta_fast=20, beta_slow=2.0),
    "yarn, slow beta beyond": YARN | dict(beta_fast=32, beta_slow=9.0),
    "yarn, not truncated": YARN | dict(truncate=False, original_max_position_embeddings=64),
    "yarn, no length": dict(rope_type="yarn", factor=4.0),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", list(ROPE_READ))
def test_rotary_positions_are_those_of_transformers(name):
    "Frequencies and the factor of cos and sin, for both spellings, and after write_config"
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from nash_lab.model.layers import rope_frequencies

    given = ROPE_READ[name]
    spellings = [
        dict(rope_parameters=given | dict(rope_theta=5e5)),
        dict(rope_scaling=given, rope_theta=5e5),
        dict(rope_scaling=given | dict(rope_theta=5e5), rope_theta=7e3, rope_parameters=None),
    ]
    for config in spellings:
        config = json.loads(json.dumps(SHAPE | dict(head_dim=16, model_type="llama") | config))
        theirs = transformers.LlamaConfig(**json.loads(json.dumps(config)))
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        cfg = read_config(config)
        for rope in (cfg.rope, read_config(write_config(cfg)).rope):
            ours = rope_frequencies(16, rope)
            np.testing.assert_allclose(ours.frequencies, rotary.inv_freq.numpy(), rtol=2e-6)
            assert ours.scale == pytest.approx(rotary.attention_scaling, rel=1e-6)
    assert torch.equal(rotary.inv_freq, rotary.original_inv_freq)


@pytest.mark.parametrize(
    "given, says",
    [
        (YARN | dict(mrope_section=[1, 2]), "'mrope_section' is no key of yarn"),
        (dict(rope_type="linear", factor=2.0, mscale=1.0), "'mscale' is no key of linear"),
        (dict(rope_type="default", short_factor=[1.0]), "'short_factor' is no key of default"),
        (dict(rope_type="longrope", factor=2.0), "rope_type='longrope', expected default"),
        (dict(type="su"), "rope_type='su'"),
        (dict(rope_type="proportional"), "rope_type='proportional'"),
        (dict(rope_type="linear"), "linear needs the key 'factor'"),
        (dict(rope_type="llama3", factor=8.0), "llama3 needs the key 'low_freq_factor'"),
        (YARN | dict(factor="4"), "factor='4', expected a number"),
        (YARN | dict(factor=0.5), "RopeConfig.factor=0.5"),
        (YARN | dict(attention_factor=0), "attention_factor=0"),
        (YARN | dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(full_attention=dict(rope_type="default")), "'full_attention' is no key"),
        ("linear", "rope_scaling='linear', expected an object"),
    ],
    ids=lambda x: None,
)
def test_rotary_keys_that_are_refused(given, says):
    for key in ("rope_scaling", "rope_parameters")[: 1 if isinstance(given, str) else 2]:
        with pytest.raises(ValueError) as error:
            read_rope({key: given}, 128)
        assert says in str(error.value) and "\n" not in str(error.value)


def test_a_theta_inside_stands_before_the_one_outside():
    inside = dict(rope_type="default", rope_theta=5e5)
    assert read_rope(dict(rope_parameters=inside, rope_theta=1e4), 64) == RopeConfig(5e5)
    assert read_rope(dict(rope_theta=1e6), 64) == RopeConfig(1e6)
    assert read_rope({}, 64) == RopeConfig()


def test_what_an_absent_key_stands_for():
    "The defaults of each family's class in transformers; a null is derived from the other keys"
    sizes = {k: v for k, v in SHAPE.items() if k not in ("head_dim", "num_key_value_heads")}
    llama = read_config(sizes | {"model_type": "llama"})
    assert (llama.head_dim, llama.kv_heads) == (8, 4)
    wide = sizes | {"num_attention_heads": 32, "hidden_size": 512}
    qwen = read_config(wide | {"model_type": "qwen3"})
    assert (qwen.head_dim, qwen.kv_heads) == (128, 32)
    null = {"model_type": "qwen3", "head_dim": None, "num_key_value_heads": None}
    derived = read_config(sizes | null)
    assert (derived.head_dim, derived.kv_heads) == (8, 4)


def test_windows():
    "which layers of which family have one; one as wide as the model is none"
    on = SHAPE | {"model_type": "qwen2", "use_sliding_window": True}
    wide = {"sliding_window": 128, "max_window_layers": 0}
    late = {"sliding_window": 16, "max_window_layers": 1}
    named = {"layer_types": ["sliding_attention", "full_attention"]}
    mistral = SHAPE | {"model_type": "mistral"}
    long = {"max_position_embeddings": 8192}
    for config, want in (
        (on | wide, (0, ())),
        (on | late | {"max_window_layers": 2}, (0, ())),
        (on | {"sliding_window": None}, (0, ())),
        (on | late | {"use_sliding_window": False, "attention_bias": True}, (0, ())),
        (on | late, (16, (0,))),
        (on | late | named, (16, (1,))),
        (mistral | long, (4096, ())),  # the default of its class
        (mistral | {"sliding_window": None}, (0, ())),
        (mistral | {"sliding_window": 16}, (16, ())),
        (mistral | named | {"model_type": "ministral", "sliding_window": 16}, (16, (1,))),
        (SHAPE | {"model_type": "llama", "sliding_window": 16}, (0, ())),
    ):
        cfg = read_config(config)
        assert (cfg.window, cfg.full_layers) == want
        if want[0]:
            back = read_config(write_config(cfg))
            assert (back.window, back.full_layers) == want


@pytest.mark.parametrize(
    "family, config, message",
    [
        ("mistral", {"sliding_window": -4}, "sliding_window=-4, expected a number"),
        ("mistral", {"sliding_window": "16"}, "sliding_window='16', expected a number"),
        (
            "mistral",
            {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
            "a mistral has one kind of layer",
        ),
        ("ministral", {"layer_types": ["sliding_attention"] * 3}, "expected a list of 2"),
        ("ministral", {"layer_types": 2}, "layer_types=2, expected a list of 2"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers='1'"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "sliding_window=None"),
    ],
)
def test_windows_that_are_refused(family, config, message):
    with pytest.raises(ValueError, match=message):
        read_config(SHAPE | {"model_type": family} | config)
