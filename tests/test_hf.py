"HuggingFace folders: logits, greedy text, files and chat templates against `transformers` itself, on tiny random models."

import json

import numpy as np
import pytest

from nash_lab.adapt.hf import chat_text, load_hf, save_hf
from nash_lab.model.generate import generate

torch = pytest.importorskip("torch", reason="needs PyTorch (the parity extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the parity extra)")

pytestmark = pytest.mark.parity

SHAPE = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
KINDS = {
    "llama 2": ("Llama", {}),
    "llama 3": ("Llama", dict(rope_parameters=LLAMA3, rms_norm_eps=1e-5, head_dim=16)),
    "llama 3 tied": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2.5": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2.5 yarn, last layers local": (
        "Qwen2",
        dict(
            rope_parameters=YARN, use_sliding_window=True, sliding_window=13, max_window_layers=1
        ),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=13)),
    "ministral, one layer whole": (
        "Ministral",
        dict(
            sliding_window=13,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            head_dim=8,
        ),
    ),
}


@pytest.fixture(scope="module", params=list(KINDS))
def theirs(request, tmp_path_factory):
    "A random model of `transformers`, weights large enough to matter, and the folder it was saved to."
    name, changes = KINDS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    return model, folder


def ids(length=90):
    return np.random.default_rng(0).integers(3, 128, (2, length))


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def test_logits(theirs):
    model, folder = theirs
    ours = load_hf(folder)
    np.testing.assert_allclose(ours(ids()), logits(model, ids()), atol=1e-4, rtol=1e-4)


def test_greedy(theirs):
    model, folder = theirs
    tokens, _ = generate(load_hf(folder), ids(7).tolist(), max_new_tokens=20, temperature=0.0)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(ids(7)), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
    np.testing.assert_array_equal(tokens, expected[:, 7:].numpy())


def test_export_loads_there(theirs, tmp_path):
    model, folder = theirs
    out = save_hf(load_hf(folder), tmp_path / "out", shard_bytes=30_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(again) is type(model)
    np.testing.assert_allclose(logits(again, ids()), logits(model, ids()), atol=1e-5)


def test_save_load_save_is_stable(theirs, tmp_path):
    _, folder = theirs
    one = save_hf(load_hf(folder), tmp_path / "one")
    two = save_hf(load_hf(one), tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_sharded_bfloat16_folder_of_theirs(tmp_path):
    torch.manual_seed(0)
    model = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16).eval()
    )
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert (tmp_path / "m/model.safetensors.index.json").exists()
    np.testing.assert_allclose(
        load_hf(tmp_path / "m")(ids()), logits(model.float(), ids()), atol=1e-4
    )


def test_memory_of_reading_stays_near_one_copy(tmp_path):
    "Beside the weights, reading holds no more than a few tensors: measured by the interpreter's own allocations."
    import tracemalloc

    config = transformers.LlamaConfig(
        **SHAPE | dict(hidden_size=256, intermediate_size=512, num_hidden_layers=16)
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    size = sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors"))
    load_hf(tmp_path / "m")
    tracemalloc.start()
    load_hf(tmp_path / "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        peak < 0.5 * size
    )  # NumPy's share: one stacked weight and one tensor, never the whole model twice


TEMPLATES = {
    "turns": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "qwen": "{%- for message in messages %}\n{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\n' }}\n{%- endif %}",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("answer", [True, False])
def test_chat_template(tmp_path, name, answer):
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATES[name]
    fast.save_pretrained(tmp_path)
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "2 + 2?"}]
    expected = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    assert chat_text(tmp_path, messages, answer=answer) == expected


def test_template_stays_in_its_sandbox(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    )
    with pytest.raises(ValueError, match="chat template"):
        chat_text(tmp_path, [{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('only users') }}")
    with pytest.raises(ValueError, match="only users"):
        chat_text(tmp_path, [])


def test_broken_index_is_named(theirs, tmp_path):
    _, folder = theirs
    out = save_hf(load_hf(folder), tmp_path / "out", shard_bytes=30_000)
    next(iter(out.glob("model-*.safetensors"))).unlink()
    with pytest.raises(FileNotFoundError, match="model-.*safetensors: no such file"):
        load_hf(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "hidden_size"})
    )
    with pytest.raises(ValueError, match="key 'hidden_size' is missing"):
        load_hf(out)
