"Tokenizers from elsewhere, whole: special ids, ends, chats, text beside the prompt, and the way back; held against `transformers`."

import json
import pickle

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from nash_lab.adapt.hf import import_run, save_hf
from nash_lab.core.text import continuation, known_ids
from nash_lab.data.corpus import Document, pack
from nash_lab.data.loader import LoaderConfig
from nash_lab.data.tokenizer import (
    EOS,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from nash_lab.lab.cli import main
from nash_lab.lab.run import load
from nash_lab.model.chat import chat_text
from nash_lab.model.generate import SampleConfig, generate, rollout, sampling_rules
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.train.pretrain import write_run
from nash_lab.train.settings import TrainConfig

TEXT = [
    "the quick brown fox jumps over the lazy dog\n",
    "pack my box with five dozen jugs, é 漢字 🙂\n",
] * 4
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|u|>"]
TURNS = (
    "{{ bos_token }}{% for m in messages %}<|u|>{{ m['role'] }}: {{ m['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|u|>{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "chat_template": TURNS,
    "clean_up_tokenization_spaces": True,
}
QUESTION = [{"role": "user", "content": "the quick "}]


def byte_level(size=300):
    "As LLaMA 3: byte-level pieces, and the special ones behind them"
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXT, trainer)
    model.add_special_tokens(SPECIAL)
    return model


def metaspace():
    "As LLaMA 2: a space in front of every text, bytes for the rest, BOS from the template"
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    model.train_from_iterator([w for line in TEXT[:1] for w in line.split()], trainer)
    bytes_back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*bytes_back, decoders.Strip(" ", 1, 0)])
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    data = json.loads(model.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < 3]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


@pytest.fixture(scope="module")
def lm():
    return LM(ModelConfig.tiny(init_std=0.3, residual="plain", vocab_size=320, max_len=128))


@pytest.fixture
def folder(lm, tmp_path):
    "A model folder: 304 pieces, 320 rows"
    folder = save_hf(lm, tmp_path / "model")
    byte_level().save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config=CONFIG)
    return folder


def write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def config_says(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ---- which ids mean something

EOT = {"eos_token": "<|eot_id|>"}
SAID = {  # files beside tokenizer.json -> (eos, ends, bos)
    "a list in generation_config": (
        dict(tokenizer_config=EOT, generation_config={"eos_token_id": [301, 302]}),
        (302, (302, 301), 300),
    ),
    "another end in generation_config": (
        dict(
            tokenizer_config={"eos_token": "<|end_of_text|>"},
            generation_config={"eos_token_id": 302},
        ),
        (301, (301, 302), 300),
    ),
    "generation_config alone": (
        dict(generation_config={"eos_token_id": [302, 301]}),
        (302, (302, 301), 300),
    ),
    "config.json alone": (dict(config={"eos_token_id": 302}), (302, (302,), 300)),
    "generation_config over config.json": (
        dict(config={"eos_token_id": 303}, generation_config={"eos_token_id": 302}),
        (302, (302,), 300),
    ),
    "a null in generation_config": (
        dict(config={"eos_token_id": [302, 301]}, generation_config={"eos_token_id": None}),
        (302, (302, 301), 300),
    ),
    "special_tokens_map": (
        dict(special_tokens_map={"eos_token": {"content": "<|eot_id|>"}}),
        (302, (302,), 300),
    ),
    "special_tokens_map over tokenizer_config": (
        dict(tokenizer_config={"eos_token": "<|end_of_text|>"}, special_tokens_map=EOT),
        (302, (302,), 300),
    ),
    "tokenizer_config with added tokens over special_tokens_map": (
        dict(
            tokenizer_config=EOT | {"added_tokens_decoder": {}},
            special_tokens_map={"eos_token": "<|u|>"},
        ),
        (302, (302,), 300),
    ),
    "no bos": (dict(tokenizer_config=EOT | {"bos_token": None}), (302, (302,), None)),
    "a pad without a piece": (
        dict(tokenizer_config=EOT | {"pad_token": "<nowhere>"}),
        (302, (302,), 300),
    ),
    "an end beyond the pieces": (
        dict(tokenizer_config=EOT, generation_config={"eos_token_id": [310, 302]}),
        (302, (302, 310), 300),
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_special_ids(tmp_path, name):
    files, (eos, ends, bos) = SAID[name]
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, **files)
    found = load_tokenizer(tmp_path)
    assert (found.eos_id, found.end_ids, found.bos_id) == (eos, ends, bos)
    assert found.decode([*found.encode("a b"), *ends]) == "a b"
    if "tokenizer_config" in files or "special_tokens_map" in files:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert theirs.eos_token_id == eos


@pytest.mark.parametrize(
    "files, said",
    [
        (dict(generation_config={"eos_token_id": "</s>"}), "eos_token_id=.*</s>.*expected ids"),
        (
            dict(generation_config={"eos_token_id": [302, None]}),
            "eos_token_id=.*None.*expected ids",
        ),
        (
            dict(tokenizer_config={"eos_token": "<|no|>"}),
            "eos_token '<|no|>' is not in tokenizer.json",
        ),
        (dict(generation_config=[1]), "generation_config.json: a list, expected an object"),
        (dict(special_tokens_map="x"), "special_tokens_map.json: a str, expected an object"),
    ],
)
def test_files_that_say_nonsense(tmp_path, files, said):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path)


def test_a_byte_order_mark_before_each_file(tmp_path):
    "As editors leave it: read as if it were not there"
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config=CONFIG, generation_config={"eos_token_id": [302, 301]})
    plain = load_tokenizer(tmp_path)
    asked = plain.encode(chat_text(tmp_path, QUESTION), special=True)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = load_tokenizer(tmp_path)
    assert (found.pieces, found.end_ids) == (plain.pieces, (302, 301))
    assert found.encode(chat_text(tmp_path, QUESTION), special=True) == asked


# ---- import and export


def test_all_that_was_read_comes_back(lm, folder, tmp_path):
    "template, generation_config, special_tokens_map, tokenizer_config byte for byte; ends that LlamaConfig does not guess"
    write(folder, generation_config={"eos_token_id": [302, 301], "temperature": 0.6})
    write(folder, special_tokens_map={"eos_token": "<|eot_id|>"})
    (folder / "chat_template.jinja").write_text(TURNS)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "bare.jinja").write_text("{{ messages[0].content }}")
    config_says(folder, eos_token_id=302, bos_token_id=300, pad_token_id=301)
    run = import_run(folder, tmp_path / "run")
    again = save_hf(load(run).lm, tmp_path / "out", tokenizer_from=run)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "config.json":
            assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    config = json.loads((again / "config.json").read_text())
    assert [config[f"{kind}_token_id"] for kind in ("eos", "bos", "pad")] == [302, 300, 301]
    assert not (again / "hf_config.json").exists()
    assert load(run).tokenizer.end_ids == load_tokenizer(again).end_ids == (302, 301)
    assert chat_text(run, QUESTION, template="bare") == "the quick "
    # a run made of the run, as lora merge and sdft make it, has them too
    cfg = load(run).config
    after = write_run(lm, cfg, tmp_path / "after", tokenizer=run / "tokenizer.json")
    assert load(after).tokenizer.end_ids == (302, 301)
    twice = save_hf(lm, tmp_path / "twice", tokenizer_from=after)
    for path in again.rglob("*.j*"):
        assert (twice / path.relative_to(again)).read_bytes() == path.read_bytes(), path


def test_an_export_names_its_own_end(lm, folder, tmp_path):
    "no file names an id: config.json repeats those of the tokenizer; without a tokenizer it names none"
    run = import_run(folder, tmp_path / "run")
    config = json.loads(
        (save_hf(lm, tmp_path / "a", tokenizer_from=run) / "config.json").read_text()
    )
    assert (config["eos_token_id"], config["bos_token_id"]) == (302, 300)
    (folder / "tokenizer.json").unlink()
    run = import_run(folder, tmp_path / "bare")
    config = json.loads(
        (save_hf(lm, tmp_path / "b", tokenizer_from=run) / "config.json").read_text()
    )
    assert config["eos_token_id"] is None


@pytest.mark.parity
def test_transformers_stops_where_we_do(lm, folder, tmp_path):
    "the second of two ends is what the model draws third; a round trip changes nothing of it"
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    words = load_tokenizer(folder)
    ids = words.encode("the quick")
    free = generate(lm, [ids], max_new_tokens=8, temperature=0)[0][0].tolist()
    write(folder, generation_config={"eos_token_id": [302, free[2]]})
    run = import_run(folder, tmp_path / "run")
    out = save_hf(lm, tmp_path / "out", tokenizer_from=run)
    new = {}
    for place in (folder, out):
        model = transformers.AutoModelForCausalLM.from_pretrained(place)
        given = transformers.AutoTokenizer.from_pretrained(place)("the quick", return_tensors="pt")
        drawn = model.generate(given["input_ids"], max_new_tokens=8, do_sample=False)
        new[place.name] = drawn[0, len(ids) :].tolist()
    assert new["model"] == new["out"] == free[: free.index(free[2]) + 1]
    opened = load(run)
    rules = sampling_rules(opened.tokenizer, lm)
    tokens, lengths = generate(lm, [ids], max_new_tokens=8, temperature=0, **rules)
    assert tokens[0, : lengths[0]].tolist() == new["out"]
    shown = opened.generate("the quick", max_new_tokens=8, temperature=0)
    assert shown == words.decode(free[: free.index(free[2]) + 1])  # a piece of text stays


def test_a_sentencepiece_run_leaves_with_its_tokenizer(lm, tmp_path):
    "ids and texts stay, whatever the text; the EOS of training goes in front; the run that comes back draws the same"
    code = "def f(x):\n    return  x * 1024  # déjà vu\n\n"
    ours = train_tokenizer(
        [line + code for line in TEXT], tmp_path / "t.model", TokenizerConfig(vocab_size=320)
    )
    texts = [
        code,
        *TEXT,
        "",
        " ",
        "  a",
        "▁x▁",
        "</s><pad>",
        "\t\r\n\0",
        "日本語 e\u0301 🙂🙂",
        "▅",
        "1234 56",
    ]
    rng = np.random.default_rng(0)
    for _ in range(40):
        texts.append("".join(map(chr, rng.integers(1, 0xD000, 30))))
        texts.append("".join(rng.choice(list(" \nabcdefgxyz()=*12"), 60)))
    for documents in ("cross", "mask"):
        home = tmp_path / documents
        cfg = TrainConfig(model=lm.cfg, loader=LoaderConfig(documents=documents))
        run = write_run(lm, cfg, home / "run", tokenizer=ours.path)
        folder = save_hf(lm, home / "out", tokenizer_from=run)
        back = import_run(folder, home / "back")
        theirs = load(back).tokenizer
        assert theirs.encode_batch(texts) == ours.encode_batch(texts)
        assert [theirs.decode(ids) for ids in theirs.encode_batch(texts)] == texts
        assert theirs.front == ((EOS,) if documents == "cross" else ())
        assert (theirs.eos_id, theirs.bos_id, theirs.pad_id, theirs.unk_id) == (2, 1, 0, 3)
        drawn = []
        for opened in (load(run), load(back)):
            rules = sampling_rules(opened.tokenizer, opened.lm)
            how = dict(max_new_tokens=12, temperature=0) | rules
            drawn.append(generate(opened.lm, [opened.token_ids(code)], **how)[0].tolist())
        assert drawn[0] == drawn[1]
        assert load(back).generate("def ", max_new_tokens=3, temperature=0)
        config = json.loads((folder / "config.json").read_text())
        assert config["eos_token_id"] == EOS

    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "cross" / "out")
    plain = [t for t in texts if "</s>" not in t]  # there the name of a piece is the piece
    assert auto(plain)["input_ids"] == [[EOS, *ids] for ids in ours.encode_batch(plain)]
    assert [auto.decode(ids[1:]) for ids in auto(plain)["input_ids"]] == plain
    assert (auto.eos_token_id, auto.bos_token_id, auto.pad_token_id) == (2, 1, 0)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_of_others(lm, folder, tmp_path, kind):
    "taken with the special ids it has: encoded as by its own library, imported, exported"
    import sentencepiece

    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (tmp_path / "t.txt").write_text("\n".join(TEXT))

    def foreign(**flags):
        flags = dict(vocab_size=60, model_type=kind, minloglevel=2) | flags
        flags["hard_vocab_limit"] = kind == "bpe"
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "t.txt"), model_prefix=str(folder / "tokenizer"), **flags
        )
        return folder / "tokenizer.model"

    words = load_tokenizer(foreign(eos_id=5, bos_id=3, unk_id=1, pad_id=-1))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(words.path))
    assert (words.eos_id, words.bos_id, words.unk_id, words.pad_id) == (5, 3, 1, 5)
    assert words.encode_batch(TEXT) == theirs.encode(TEXT)
    assert words.decode([3, *words.encode(TEXT[0].strip()), 5]) == TEXT[0].strip()
    spelled = "a</s>b"
    assert 5 not in words.encode(spelled) and words.encode(spelled, special=True).count(5) == 1
    write(folder, tokenizer_config={"add_bos_token": True})
    write(folder, generation_config={"eos_token_id": [5, 7]})
    words = load_tokenizer(folder)  # the folder that holds it
    assert words.front == (3,) and words.end_ids == (5, 7)
    assert pickle.loads(pickle.dumps(words)).end_ids == (5, 7)

    run = import_run(folder, tmp_path / "run")
    model = load(run)
    assert model.tokenizer.eos_id == 5
    assert isinstance(model.generate("the", max_new_tokens=3, temperature=0), str)
    assert main(["hf", "export", "--run", str(run), "--folder", str(tmp_path / "out")]) == 0
    back = load_tokenizer(tmp_path / "out")
    assert back.hash == words.hash and back.eos_id == 5

    (folder / "generation_config.json").unlink()
    config_says(folder, eos_token_id=None)
    foreign(eos_id=-1)
    with pytest.raises(ValueError, match="tokenizer.model: no piece that ends a document"):
        load_tokenizer(folder)
    foreign(eos_id=-1, user_defined_symbols="<|im_end|>")
    with pytest.raises(ValueError, match="'<.im_end.>', is no control piece"):
        load_tokenizer(folder)
    with pytest.warns(UserWarning, match="read without it"):
        run = import_run(folder, tmp_path / "without")
    with pytest.raises(ValueError, match="the run has no tokenizer"):
        load(run)


# ---- chats


def test_a_chat_has_its_special_ids(folder):
    "one BOS, an end at the end; the same text read as text spells them out"
    words = load_tokenizer(folder)
    ids = words.encode(chat_text(folder, QUESTION, answer=False), special=True)
    assert (ids[:2], ids[-1], ids.count(300)) == ([300, 303], 302, 1)
    assert len(ids) < len(words.encode(chat_text(folder, QUESTION, answer=False))) / 2


TEMPLATES = {
    "a text": TURNS,
    "a list": [
        {"name": "default", "template": TURNS},
        {"name": "tool_use", "template": "T" + TURNS},
    ],
    "blocks for training": "{% for m in messages %}\n  {%- generation %}{% set x = 1 %}{{ m.content }}{{ eos_token }}{% endgeneration -%}\n{{ x }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "a namespace": "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.role %}{% endfor %}{{ n.x }}",
    "the date": "{{ strftime_now('%Y') }}{{ messages[0]['content'] }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "absent names": "{% if tools is none and not documents and tools is not defined == false %}{{ messages[0].content }}{% endif %}",
    "lines": "{%- for m in messages %}\n    {% if true %}\n{{ '<|u|>' + m.role }}\n    {% endif %}\n{% endfor %}\n",
    "unset pieces": "{{ pad_token }}{{ bos_token }}{{ messages[0].content }}",
}


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_as_in_transformers(tmp_path, name):
    "text and ids; in tokenizer_config.json and, where it is one text, in its own file"
    transformers = pytest.importorskip("transformers")
    byte_level().save(str(tmp_path / "tokenizer.json"))
    messages = [{"role": "system", "content": "é <b>"}, *QUESTION]
    write(tmp_path, tokenizer_config=CONFIG | {"chat_template": TEMPLATES[name]})
    for place in ("config", "file"):
        if place == "file":
            if not isinstance(TEMPLATES[name], str):
                continue
            write(tmp_path, tokenizer_config=CONFIG)
            (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        for answer in (True, False):
            how = dict(add_generation_prompt=answer)
            text = theirs.apply_chat_template(messages, tokenize=False, **how)
            ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
            assert chat_text(tmp_path, messages, answer=answer) == text
            assert load_tokenizer(tmp_path).encode(text, special=True) == ids


def test_named_templates(tmp_path):
    write(tmp_path, tokenizer_config=CONFIG | {"chat_template": TEMPLATES["a list"]})
    plain = chat_text(tmp_path, QUESTION)
    assert chat_text(tmp_path, QUESTION, template="tool_use") == "T" + plain
    assert chat_text(tmp_path, QUESTION, tools=[{"name": "f"}]) == "T" + plain
    with pytest.raises(
        ValueError, match="no chat template 'rag', expected one of default, tool_use"
    ):
        chat_text(tmp_path, QUESTION, template="rag")
    write(tmp_path, tokenizer_config={"chat_template": {"default": "{{ messages[0].role }}"}})
    assert chat_text(tmp_path, QUESTION) == "user"
    (tmp_path / "chat_template.jinja").write_text("\ufeff{{ messages[0].content }}")
    assert chat_text(tmp_path, QUESTION) == "the quick "


@pytest.mark.parametrize(
    "template, said",
    [
        ([{"template": "x"}], "expected names and templates"),
        ([{"name": "default", "template": 3}], "chat_template: expected text"),
        ("{% for m in messages %}", "chat template: Unexpected end"),
        ("{{ messages[0].content + 1 }}", "chat template: can only concatenate"),
        ("{{ messages.append(1) }}", "chat template: .*unsafe|chat template: .*not safe"),
        ("{{ raise_exception('turns must alternate') }}", "chat template: turns must alternate"),
    ],
)
def test_templates_that_fail(tmp_path, template, said):
    write(tmp_path, tokenizer_config=CONFIG | {"chat_template": template})
    with pytest.raises(ValueError, match=said):
        chat_text(tmp_path, QUESTION)


def test_a_chat_from_the_command_line(folder, tmp_path, capsys):
    run = import_run(folder, tmp_path / "run")
    flags = [
        "generate",
        "--run",
        str(run),
        "--prompt",
        "the quick",
        "--max-new-tokens",
        "6",
        "--temperature",
        "0",
    ]
    assert main([*flags, "--chat", "--system", "over"]) == 0
    shown = capsys.readouterr().out
    opened = load(run)
    how = dict(max_new_tokens=6, temperature=0)
    answer = opened.chat("the quick", system="over", **how)
    assert shown.endswith(answer + "\n")
    turns = [{"role": "system", "content": "over"}, {"role": "user", "content": "the quick"}]
    assert opened.chat(turns, **how) == answer
    ids = opened.tokenizer.encode(chat_text(run, turns), special=True)
    never = (*sampling_rules(opened.tokenizer, opened.lm)["forbidden"], 300)
    new, lengths = generate(opened.lm, [ids], eos_id=302, forbidden=never, **how)
    assert answer == opened.tokenizer.decode(new[0, : lengths[0]])
    assert main([*flags, "--system", "over"]) != 0
    assert "--chat" in capsys.readouterr().err
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    assert main([*flags[:2], str(import_run(folder, tmp_path / "bare")), *flags[3:], "--chat"]) != 0
    assert "chat_template.jinja: no such file" in capsys.readouterr().err


# ---- text beside the prompt


def test_a_space_stays_between_prompt_and_answer(lm, tmp_path):
    folder = save_hf(lm, tmp_path / "model")
    metaspace().save(str(folder / "tokenizer.json"))
    words = load_tokenizer(folder)
    whole = words.encode("the quick fox")
    assert words.pieces[whole[-1]] == "▁fox" and words.decode(whole[-1:]) == "fox"
    assert continuation(words, whole[:-1], whole[-1:]) == " fox"
    for cut in range(len(whole)):
        before, after = whole[:cut], whole[cut:]
        assert words.decode(before) + continuation(words, before, after) == "the quick fox"


@pytest.mark.parity
def test_shown_text_is_that_of_transformers(lm, tmp_path):
    "BOS in front as its template says, and new text as a part of the whole"
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = LM(ModelConfig.tiny(init_std=0.3, residual="plain", vocab_size=340, max_len=128))
    folder = save_hf(model, tmp_path / "model")
    metaspace().save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"} | special)
    config_says(folder, bos_token_id=1, eos_token_id=2)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    opened = load(import_run(folder, tmp_path / "run"))
    for prompt in ("the quick", "over the lazy", "jumps "):
        ids = theirs(prompt, return_tensors="pt")["input_ids"]
        assert opened.token_ids(prompt) == ids[0].tolist()
        never = (0, 1, *range(opened.tokenizer.vocab_size, 340))  # what we never show
        forbid = [[i] for i in never]
        drawn = reference.generate(ids, max_new_tokens=12, do_sample=False, bad_words_ids=forbid)
        shown = opened.generate(prompt, max_new_tokens=12, temperature=0)
        whole = theirs.decode(drawn[0], skip_special_tokens=True)
        assert prompt + shown == whole


def test_a_character_cut_in_two(tmp_path):
    byte_level(260).save(str(tmp_path / "tokenizer.json"))
    words = load_tokenizer(tmp_path)
    ids = words.encode("a漢🙂b")
    for cut in range(len(ids)):
        shown = continuation(words, ids[:cut], ids[cut:])
        assert "a漢🙂b".endswith(shown) and "\ufffd" not in shown
    grown = [continuation(words, ids[:k], ids[k : k + 1]) for k in range(len(ids))]
    assert [piece for piece in grown if "\ufffd" not in piece and piece] == ["a", "漢", "🙂", "b"]


# ---- pieces without a row, rows without a piece


def test_a_larger_tokenizer_works_until_it_is_used(lm, folder, tmp_path, capsys):
    "a pad that somebody added; refused only where a text or a chat holds the piece"
    model = byte_level()
    filled = [f"<|extra_{i}|>" for i in range(320 - model.get_vocab_size())]
    model.add_special_tokens([*filled, "<pad>"])  # 320 pieces and one
    model.save(str(folder / "tokenizer.json"))
    pad = model.token_to_id("<pad>")
    assert pad == 320 == lm.cfg.vocab_size
    write(folder, tokenizer_config=CONFIG | {"pad_token": "<pad>"})
    run = import_run(folder, tmp_path / "run")
    opened = load(run)
    assert (opened.tokenizer.pad_id, opened.tokenizer.vocab_size) == (320, 321)
    assert isinstance(opened.generate(["the quick", "fox"], max_new_tokens=4), list)
    assert opened.logprob("the quick").total < 0
    with pytest.raises(ValueError, match="'<pad>', id 320, and the model has only 320 rows"):
        opened.chat("the <pad> quick", max_new_tokens=4)
    assert main(["generate", "--run", str(run), "--prompt", "<pad>", "--chat"]) != 0
    assert "'<pad>', id 320" in capsys.readouterr().err
    with pytest.raises(ValueError, match="<pad>"):
        known_ids(opened.tokenizer, [5, 320], 320)


def test_packed_text_of_a_larger_tokenizer_is_scored(lm, folder, tmp_path, capsys):
    "its file names more pieces than the model has rows, and no text holds the last"
    model = byte_level()
    filled = [f"<|extra_{i}|>" for i in range(321 - model.get_vocab_size())]
    model.add_special_tokens(filled)
    model.save(str(folder / "tokenizer.json"))
    words = load_tokenizer(folder)
    assert words.vocab_size == 321 > lm.cfg.vocab_size
    run = import_run(folder, tmp_path / "run")
    pack([Document(line, "a") for line in TEXT], words, tmp_path / "text.bin")
    assert main(["eval", "--run", str(run), "--data", str(tmp_path / "text.bin")]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_rows_without_a_piece_are_never_shown(lm, folder, tmp_path):
    "320 rows, 304 pieces; hot draws from every sampler, and a user's own forbidden ids on top"
    opened = load(import_run(folder, tmp_path / "run"))
    rules = sampling_rules(opened.tokenizer, lm)
    assert rules == {"eos_id": (302,), "forbidden": tuple(range(304, 320))}
    how = SampleConfig(16, temperature=9.0, **rules)
    drawn = rollout(lm, [[5]], how, jax.random.key(0), copies=32)
    assert drawn.tokens.max() < 304
    text = opened.generate(["the"] * 16, max_new_tokens=16, temperature=9.0, forbidden=(5, 6))
    assert len(text) == 16
