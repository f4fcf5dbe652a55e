"Tuning a model of others: what `peft` makes of our adapters and we of its, tables and patterns, names of the hub, and what is refused."

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nash_lab.adapt.hf import hub_folder, import_run, open_model, save_hf
from nash_lab.adapt.instruct import LoRATrainConfig, count_parameters, lora_train, with_adapters
from nash_lab.adapt.lora import (
    LoRAConfig,
    attach,
    init_adapter,
    merge_adapter,
    read_peft,
    run_adapter,
    write_peft,
)
from nash_lab.data.loader import LoaderConfig
from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
from nash_lab.discover.search import discover_run
from nash_lab.discover.ttt import DiscoverConfig
from nash_lab.lab.cli import main
from nash_lab.model.block import ModelConfig
from nash_lab.model.transformer import LM
from nash_lab.train.examples import example_ids, read_examples
from nash_lab.train.optim import OptimConfig
from nash_lab.train.pretrain import load_run, write_run
from nash_lab.train.settings import TrainConfig
from nash_lab.train.tune import linear_layers, target_shapes

TINY = ModelConfig.tiny(residual="plain", vocab_size=320, init_std=0.2, max_len=64)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
PAIRS = {"the sun is": " hot", "the sea is": " blue", "ice is": " cold", "grass is": " green"}
logits = nnx.jit(lambda lm, tokens: lm(tokens))


def filled(adapter, size=0.2):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32), adapter
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Pairs, a tokenizer, and a LLaMA folder with untied tables as its makers would leave it"
    home = tmp_path_factory.mktemp("instruct")
    lines = [json.dumps({"prompt": a, "answer": b}) + "\n" for a, b in PAIRS.items()]
    (home / "pairs.jsonl").write_text("".join(lines))
    texts = [a + b for a, b in PAIRS.items()] * 20
    train_tokenizer(texts, home / "tokenizer.model", TokenizerConfig(vocab_size=290))
    rows = LoaderConfig(seq_len=32, documents="mask")
    cfg = TrainConfig(train_bin="", val_bin="", model=TINY, loader=rows)
    own = write_run(LM(TINY), cfg, home / "own", tokenizer=home / "tokenizer.model")
    save_hf(LM(replace(TINY, tie_embeddings=False)), home / "base", tokenizer_from=own)
    return home


def job(home, **changes):
    cfg = LoRATrainConfig(
        run=str(home / "tuned"),
        base=str(home / "base"),
        data=str(home / "pairs.jsonl"),
        steps=4,
        seq_len=16,
        batch_size=2,
        log_every=1,
        lora=LoRAConfig(
            rank=4,
            alpha=8,
            targets=("blocks/*", "embedding", "head"),
            rank_pattern=(("*/down", 2), ("head", 3)),
            alpha_pattern=(("*/q", 4.0), ("embedding", 2.0)),
            rslora=True,
        ),
        optim=OptimConfig(learning_rate=2e-2, warmup_steps=0),
    )
    return replace(cfg, **changes)


@pytest.fixture(scope="module")
def done(home):
    return lora_train(job(home))


def test_the_base_is_left_and_the_adapter_is_the_difference(home, done, capsys):
    base, _ = open_model(home / "base")
    frozen, adapter, lora = run_adapter(done.run)
    same = [jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (base, frozen)]
    assert all(np.array_equal(a, b) for a, b in zip(*same))
    assert adapter["blocks/ffn/down"].a.shape[-1] == 2 and adapter["head"].a.shape[-1] == 3
    assert all(np.any(own.a) and np.any(own.b) for own in adapter.values())
    want = logits(load_run(done.run)[0], TOKENS)
    assert jnp.abs(want - logits(base, TOKENS)).max() > 0.1
    again = with_adapters(base, [done.run / "adapter"])
    np.testing.assert_allclose(logits(again, TOKENS), want, atol=1e-5)
    assert main(["lora", "export", "--run", str(done.run), "--out", str(home / "own-peft")]) == 0
    assert f"own-peft: the adapter of {done.run}, 9 linear maps" in capsys.readouterr().out
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        found = [
            (folder / name).read_bytes() for folder in (done.run / "adapter", home / "own-peft")
        ]
        assert found[0] == found[1]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_was_trained(home, done):
    "Embedding, head, patterns and rsLoRA; and vLLM's reading, which knows one scale and no patterns"
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(home / "base").eval()
    model = peft.PeftModel.from_pretrained(theirs, done.run / "adapter").eval()
    with torch.no_grad():
        want = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    got = logits(load_run(done.run)[0], TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())

    config = json.loads((done.run / "adapter/adapter_config.json").read_text())
    assert config["bias"] == "none" and config["r"] == 4 and config["use_rslora"]
    assert not {"use_dora", "modules_to_save", "lora_bias"} & config.keys()
    scale = config["lora_alpha"] / config["r"] ** 0.5
    for name, rank in config["rank_pattern"].items():
        assert rank <= config["r"]
        assert config["alpha_pattern"][name] / rank**0.5 == pytest.approx(scale)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tables_both_ways(tied, tmp_path):
    "An adapter on embedding and head: ours in peft, and theirs here; of a tied table as ensure_weight_tying has it"
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    lm = LM(replace(TINY, tie_embeddings=tied))
    folder = save_hf(lm, tmp_path / "base")
    open_theirs = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    targets = ("*/q", "embedding") if tied else ("*/q", "embedding", "head")
    cfg = LoRAConfig(rank=3, alpha=6, targets=targets)
    adapter = filled(init_adapter(lm, cfg, jax.random.key(0)))
    beside = logits(attach(lm, adapter, cfg.scales(adapter)), TOKENS)
    inside = logits(merge_adapter(lm, adapter, cfg.scales(adapter)), TOKENS)
    np.testing.assert_allclose(beside, inside, atol=1e-4)
    ours = write_peft(tmp_path / "ours", adapter, cfg, lm)
    same, _ = read_peft(ours, lm)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, adapter))
    model = peft.PeftModel.from_pretrained(open_theirs(), ours).eval()
    with torch.no_grad():
        want = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(beside, want, atol=1e-5 * np.abs(want).max())

    torch.manual_seed(1)
    names = ["q_proj", "embed_tokens"] + ([] if tied else ["lm_head"])
    rules = dict(r=3, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(
        open_theirs(), peft.LoraConfig(**rules, ensure_weight_tying=tied)
    ).eval()
    for key, weight in model.named_parameters():
        if "lora_" in key:
            weight.data = 0.2 * torch.randn_like(weight)
    if tied:  # as training leaves it: one adapter, two places
        head, table = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
        head.lora_A["default"].weight.data = table.lora_embedding_B["default"].data.T
        head.lora_B["default"].weight.data = table.lora_embedding_A["default"].data.T
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    read, told = read_peft(tmp_path / "theirs", lm)
    got = logits(attach(lm, read, told.scale), TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    if tied:  # one end alone cannot be had
        path = tmp_path / "theirs/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ensure_weight_tying": False}))
        with pytest.raises(ValueError, match="embed_tokens and lm_head are one table"):
            read_peft(tmp_path / "theirs", lm)
    other = LM(replace(TINY, tie_embeddings=tied), nnx.Rngs(7))
    with pytest.raises(ValueError, match="of another base"):
        read_peft(tmp_path / "theirs", other)


def test_counts(home):
    cfg = job(home).train_config()
    counts = count_parameters(cfg)
    lm = LM(cfg.model)
    adapter = init_adapter(lm, cfg.lora, jax.random.key(0))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert counts == (size(adapter), size(adapter) + size(nnx.state(lm, nnx.Param)))
    assert f"{counts.trained:,} of {counts.total:,} parameters are trained" in str(counts)
    full = count_parameters(replace(cfg, tune="full"))
    assert full.trained == full.total == size(nnx.state(lm, nnx.Param))


CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS = CHAT.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '...' }}"
)


class Bytes:
    "A character is its code point, </s> is 2 and nothing else special"

    eos_id, vocab_size, hash, path, end_ids, front = 2, 256, "bytes", None, (2,), (1,)

    def encode(self, text, special=False):
        return [
            2 if c == "\x02" else ord(c)
            for c in (text.replace("</s>", "\x02") if special else text)
        ]

    def decode(self, ids):
        return "".join(map(chr, ids))


def learned_text(row, folder, chat=False):
    ids, learned = example_ids(row, Bytes(), (1,), folder, chat)
    return "".join(chr(i) for i in ids), "".join(chr(i) for i, own in zip(ids, learned) if own)


@pytest.mark.parametrize(
    "template, row, chat, learned",
    [
        (CHAT, {"question": "a", "response": "b"}, False, "b\x02"),
        (CHAT, {"instruction": "a", "input": "x", "output": "b"}, True, "b\x02"),
        (CHAT, {"messages": [("user", "a"), ("assistant", "b")]}, False, "b\x02"),
        (
            CHAT,
            {"messages": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]},
            False,
            "b\x02d\x02",
        ),
        (
            FORGETS,
            {"messages": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]},
            False,
            "d\x02",
        ),
    ],
    ids=["plain", "alpaca as a chat", "messages", "every answer", "a template that forgets"],
)
def test_what_is_learned(template, row, chat, learned, tmp_path):
    settings = {"chat_template": template, "eos_token": "</s>", "bos_token": "\x01"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if "messages" in row:
        row = {"messages": [dict(zip(("role", "content"), turn)) for turn in row["messages"]]}
    text, answers = learned_text(row, tmp_path, chat)
    assert answers == learned and text.endswith("\x02") and text[0] == "\x01"
    assert text.count("\x01") == 1


def test_rows_are_shared_or_not(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": "ab", "answer": "c"}, {"prompt": "de", "answer": "f" * 30}]
    rows += [{"prompt": "gh", "answer": "i"}] * 2
    path.write_text("\n".join(map(json.dumps, rows)))
    shared = read_examples(path, Bytes(), 16, "mask")
    alone = read_examples(path, Bytes(), 16, "cross")
    assert shared.tokens.shape == (1, 17) and alone.tokens.shape == (3, 17)
    assert shared.meta.skipped == alone.meta.skipped == {"longer than seq_len": 1}
    assert alone.tokens[0, 0] == 2 and shared.tokens[0, 0] == 1  # the front of each
    assert shared.meta.tokens == alone.meta.tokens == 6  # one letter and the end, three times
    batch = alone.batch(np.array([1, -1]))
    assert batch["mask"][0].sum() == 2 and not batch["mask"][1].any()


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"prompt": "a"}', "x.jsonl:1: no answer among 'prompt': expected one of answer"),
        ('{"answer": "a"}', "x.jsonl:1: no question among 'answer'"),
        ('{"prompt": "a", "answer": ""}', "x.jsonl:1: answer='': expected text"),
        ('{"prompt": "a", "answer": 3}', "x.jsonl:1: answer=3: expected text"),
        ('{"prompt": "a", "answer": "b", "output": "c"}', "no answer among 'answer', 'output'"),
        ('{"messages": []}', "x.jsonl:1: messages: expected turns"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "expected an answer of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no chat_template in"),
        ("[1]", "x.jsonl:1: a list, expected an object"),
        ("{", "x.jsonl:1: "),
        ("", "x.jsonl: no examples in this file"),
        (
            '{"prompt": "a", "answer": "%s"}' % ("b" * 99),
            "no example fits into seq_len=16; 101 would",
        ),
    ],
)
def test_refused_examples(line, says, tmp_path):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(ValueError) as error:
        read_examples(tmp_path / "x.jsonl", Bytes(), 16, "mask", folder=tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--base nowhere", "nowhere/config.json: no such file"),
        ("--base no/where", "no/where: no such folder, and as a name of the hub it is not in"),
        ("--data none.jsonl", "none.jsonl"),
        ("--data pairs.txt", "data='pairs.txt': expected a file .jsonl or .bin"),
        ("--lora.rank 0", "rank=0: expected at least 1"),
        ("--lora.targets */none", "no linear layer fits target '*/none'"),
        ("--lora.rank-pattern */none 3", "no adapted layer fits rank_pattern '*/none'"),
        ("--lora.rank-pattern */q 0", "rank_pattern"),
        ("--lora.alpha-pattern */q 0", "alpha_pattern"),
        ("--chat", "no chat_template in"),
        ("--seq-len 2", "no example fits into seq_len=2"),
        ("--seq-len 999", "loader.seq_len=999 is above model.max_len=64"),
        ("--steps 0", "steps=0: expected at least 1"),
    ],
)
def test_refused_flags(home, flags, says, capsys):
    "One line, and no run is left behind"
    given = f"--run {home}/never --base {home}/base --data {home}/pairs.jsonl --seq-len 16 {flags}"
    assert main(["--quiet", "lora", "train", *given.split()]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0], said
    assert not (home / "never").exists()


def test_head_of_a_tied_model(home):
    with pytest.raises(ValueError, match="the head of this model is its embedding"):
        target_shapes(LM(TINY), LoRAConfig(targets=("head",)))


@pytest.mark.parametrize(
    "line, says",
    [
        ("generate {base} --adapter {home}/nothing", "adapter_config.json"),
        ("generate {own} --adapter {run}/adapter", "expected"),
        ("generate {base} --step 3", "a folder of transformers has no step 3"),
        ("generate {own} --step 3", "3"),
        ("generate {base} --adapter {run}/adapter --weights 1 2", "one for each of 1 adapters"),
        ("eval {own} --step 7 --data {home}/pairs.jsonl", "7"),
        ("eval {own}", "no validation file of its own, give --data"),
        ("lora export {own} --out {home}/x", "trains no adapter of its own, give either --adapters or --tuned"),
        ("lora apply {base} --adapters", "adapters"),
        ("discover --run {own} --adapter {home}/nothing --out {home}/found", "adapter_config.json"),
    ],
)
def test_refused_adapters_and_steps(home, done, line, says, capsys):
    places = dict(base=home / "base", own=home / "own", run=done.run, home=home)
    line = line.format(**places)
    assert main(["--quiet", *line.split()]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0], said
    assert not (home / "x").exists() and not (home / "found").exists()


def test_eval_and_generate_with_an_adapter(home, done, capsys):
    "The base with the adapter's folder scores and writes as the tuned run does; a step is its own"
    scores = []
    for given in (
        f"{home}/base --adapter {done.run}/adapter",
        f"{done.run}",
        f"{done.run} --step 4",
        f"{home}/base",
    ):
        data = f"--data {home}/pairs.jsonl --out {home}/report.json"
        assert main(["--quiet", "eval", *given.split(), *data.split()]) == 0
        scores.append(json.loads((home / "report.json").read_text())["model"]["nats_per_token"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and scores[1] == scores[2]
    assert scores[3] > scores[1] + 0.1
    capsys.readouterr()
    said = []
    sampling = ["--prompt", "the sun is", "--temperature", "0", "--max-new-tokens", "4"]
    for given in (f"generate {home}/base --adapter {done.run}/adapter", f"generate {done.run}"):
        assert main(["--quiet", *given.split(), *sampling]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("the sun is")


def test_a_search_begins_with_an_adapter(home):
    "What it leaves is one folder for the run as it is: the given change, and what was learned after"
    lm, _ = load_run(home / "own")
    cfg = LoRAConfig(rank=2, targets=("*/q", "embedding"))
    given = filled(init_adapter(lm, cfg, jax.random.key(0)))
    folder = write_peft(home / "given", given, cfg, lm)
    search = DiscoverConfig(
        problem="string",
        options='{"target": "e", "prompt": "the sun"}',
        run=str(home / "own"),
        adapter=(str(folder),),
        out=str(home / "search"),
        steps=1,
        groups=1,
        rollouts=4,
        max_new_tokens=2,
        lora=LoRAConfig(rank=2, targets=("*/q",)),
    )
    discover_run(search)
    config = json.loads((home / "search/adapters/1/adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == str(home / "own")
    base, before, after = (
        linear_layers(with_adapters(lm, folders))["blocks/attention/q"].weight[...]
        for folders in ([], [folder], [home / "search/adapters/1"])
    )
    np.testing.assert_allclose(after, before, atol=1e-3)
    assert np.abs(before - base).max() > 0.05


def test_names_of_the_hub(home, tmp_path, monkeypatch, capsys):
    "A cache as huggingface_hub leaves it, no network: the name is found, another one is told what to do"
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--maker--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (home / "base").rename(repository / "snapshots" / ("a" * 40))
    try:
        run = import_run("maker/tiny", tmp_path / "run")
        told = json.loads((run / "imported.json").read_text())
        assert told["folder"] == "maker/tiny"
        assert hub_folder("maker/tiny@main") == hub_folder("maker/tiny")
    finally:
        (repository / "snapshots" / ("a" * 40)).rename(home / "base")
    np.testing.assert_array_equal(
        logits(load_run(run)[0], TOKENS), logits(open_model(home / "base")[0], TOKENS)
    )
    given = ["hf", "import", "--folder", "maker/other", "--run", str(tmp_path / "never")]
    assert main(["--quiet", *given]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "HF_HUB_OFFLINE is set, `hf download maker/other`" in said[0]
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="as a name of the hub it is refused") as error:
        hub_folder("maker/a--b")
    assert "\n" not in str(error.value)
