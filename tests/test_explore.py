"The laboratory's page: the same model as JAX's and the same tokens as ours, in Node; clicked through in a browser; what it refuses."

import json, random, re, shutil, subprocess
from dataclasses import replace
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.data.loader import LoaderConfig
from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
from nash_lab.lab import explore
from nash_lab.lab.cli import main
from nash_lab.lab.explore import write_explore
from nash_lab.model.layers import RopeConfig
from nash_lab.model.mhc import MHCConfig
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.train.pretrain import write_run
from nash_lab.train.settings import TrainConfig

TEXT = "def add(a, b):\n    return a + b  # naïve, 日本 </script>\n\n" * 30
PROMPT = "def sub(a, b):\n    return 'ü▁日本' - b\n"
TINY = ModelConfig.tiny(vocab_size=320)
MODELS = {
    "sinkhorn": TINY,
    "lite": replace(TINY, mhc=MHCConfig(h_res="lite", streams=3), tie_embeddings=False),
    "identity": replace(TINY, mhc=MHCConfig(h_res="identity"), kv_heads=1),
    "gates": replace(
        TINY,
        mhc=MHCConfig(
            gates=True, gain=False, stream_embedding=0.0, iterations=2, clamp=1.0, norm_eps=1e-4
        ),
        rope=RopeConfig(scaling="yarn", factor=2.0, original_len=32, rotary_fraction=0.5),
    ),
}

SHORT = LoaderConfig(seq_len=32)
RUNS = {"sinkhorn": "<script>alert(1)"}  # a run may have any name


def rough(cfg, seed=0):
    "A model far from its initial state, so that every part of it shows in its logits"
    lm = LM(cfg, nnx.Rngs(seed))
    leaves, tree = jax.tree.flatten(nnx.state(lm, nnx.Param))
    draw = np.random.default_rng(seed)
    moved = [x + jnp.asarray(draw.normal(0, 0.2, x.shape), x.dtype) for x in leaves]
    nnx.update(lm, jax.tree.unflatten(tree, moved))
    return lm


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("explore")
    train_tokenizer([TEXT], home / "t.model", TokenizerConfig(vocab_size=320))
    return home


def make_run(home, name, lm):
    config = TrainConfig(model=lm.cfg, loader=SHORT)
    return write_run(lm, config, home / name, tokenizer=home / "t.model")


@pytest.fixture(scope="module")
def pages(home):
    "{name: (model, page)}"
    made = {}
    for name, cfg in MODELS.items():
        lm = rough(cfg)
        made[name] = lm, write_explore(make_run(home, RUNS.get(name, name), lm))
    return made


def strings(count):
    "Texts of all scripts, of code, and of what a tokenizer may stumble over"
    r = random.Random(0)
    ranges = [(32, 127), (0, 0x500), (0x2000, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1F700)]
    odd = [
        "",
        " ",
        "  \n\t\r\n",
        "▁",
        "a▁▁ ▁",
        "<s></s><pad><0x41>",
        "e\u0301é\ufeff\0\u200b",
        "👩‍👩‍👧 ﬁ Ａ①",
    ]
    for _ in range(count):
        start = r.randrange(len(TEXT) - 80)
        odd.append(TEXT[start : start + r.randrange(80)])
        text = [chr(r.randrange(*r.choice(ranges))) for _ in range(r.randrange(40))]
        odd.append("".join(c if r.random() < 0.8 else r.choice(" \n▁a") for c in text))
    return odd


@pytest.fixture(scope="module")
def answers(pages, home):
    "What Node says about every page"
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed here: the page's forward pass is not run")
    words = explore.load(home / RUNS["sinkhorn"]).tokenizer
    ids = [2, *words.encode(PROMPT)]
    asked = []
    for name, (lm, page) in pages.items():
        sites = 2 * lm.cfg.layers
        switches = [
            {},
            {"mixing": "identity"},
            {"gates": [0] * sites},
            {"iterations": 3},
            {"mixing": "uniform"},
        ]
        texts = strings(400) if name == "sinkhorn" else []
        asked.append(dict(page=str(page), ids=ids, texts=texts, switches=switches))
    (home / "asked.json").write_text(json.dumps(asked))
    command = [node, Path(__file__).with_name("explore_child.js"), home / "asked.json"]
    r = subprocess.run(command, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return ids, dict(zip(pages, json.loads(r.stdout)))


def logits(lm, ids, **changes):
    "JAX's logits, with other settings of the same weights"
    if changes:
        graph, weights = nnx.split(lm, nnx.Param)
        other = LM(replace(lm.cfg, mhc=replace(lm.cfg.mhc, **changes)), nnx.Rngs(0))
        nnx.update(other, weights)
        lm = other
    return np.asarray(lm(jnp.array([ids]))[0])


def rounded(lm):
    "The same model with weights in half precision"
    copy = nnx.clone(lm)
    halves = jax.tree.map(lambda w: w.astype(jnp.float16).astype(w.dtype), nnx.state(lm, nnx.Param))
    nnx.update(copy, halves)
    return copy


@pytest.mark.parametrize("name", MODELS)
def test_logits(pages, answers, name):
    "Within 1e-4 of JAX with the same rounded weights, so that rounding alone parts it from the original"
    ids, found = answers
    lm, _ = pages[name]
    ours = logits(rounded(lm), ids)
    theirs = np.array(found[name]["logits"][0])
    assert ours.std() > 0.5  # a test that would see a missing part
    assert abs(theirs - ours).max() < 1e-4
    exact = logits(lm, ids)
    rounding = abs(ours - exact).max()  # what half precision does, whoever computes
    assert 1e-4 < rounding < 2e-3 * abs(exact).max()
    assert abs(theirs - exact).max() < rounding + 1e-4
    nats = jax.nn.logsumexp(ours[:-1], axis=-1) - ours[range(len(ids) - 1), ids[1:]]
    assert found[name]["losses"][0] is None
    np.testing.assert_allclose(found[name]["losses"][1:], nats, atol=1e-4)
    np.testing.assert_array_equal(found[name]["again"], theirs)  # kept prefix = read anew
    assert found[name]["kept"] == 5


def test_maps(pages, answers):
    "The maps of the last token are JAX's, and so is their product over depth"
    ids, found = answers
    lm, _ = pages["sinkhorn"]
    maps = rounded(lm).routing(jnp.array([ids]))
    flat = [np.asarray(m)[:, :, 0, -1].reshape(2 * lm.cfg.layers, -1) for m in maps]
    for name, ours in zip(("pre", "post", "res"), flat):
        theirs = [site[name] for site in found["sinkhorn"]["maps"]]
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    product = np.linalg.multi_dot(flat[2].reshape(-1, 4, 4)[::-1])
    np.testing.assert_allclose(np.reshape(found["sinkhorn"]["product"], (4, 4)), product, atol=1e-5)


def test_switches(pages, answers):
    "Each switch does to the logits what the same change does in JAX"
    ids, found = answers
    lm, _ = pages["sinkhorn"]
    trained, identity, shut, three, uniform = map(np.array, found["sinkhorn"]["logits"])
    np.testing.assert_allclose(three, logits(rounded(lm), ids, iterations=3), atol=1e-4)
    np.testing.assert_array_equal(shut, identity)
    for changed in (identity, uniform):
        assert abs(changed - trained).max() > 0.01
    gated = rounded(pages["gates"][0])
    for hyper in (gated.blocks.attention_hyper, gated.blocks.ffn_hyper):
        hyper.gate[...] = jnp.full_like(hyper.gate[...], -100.0)
    np.testing.assert_allclose(found["gates"]["logits"][2], logits(gated, ids), atol=1e-4)
    assert np.all(np.array(found["sinkhorn"]["silenced"]) == 0)


def test_tokens(answers, home):
    "Every text is encoded as our tokenizer does it, and comes back"
    words = explore.load(home / RUNS["sinkhorn"]).tokenizer
    _, found = answers
    texts = strings(400)
    assert found["sinkhorn"]["front"] == [2]
    assert found["sinkhorn"]["encoded"] == words.encode_batch(texts)
    assert found["sinkhorn"]["decoded"] == texts


def test_sampling(pages, answers):
    "Greedy is the likeliest token that may be drawn, and a draw follows the distribution"
    ids, found = answers
    z = logits(rounded(pages["sinkhorn"][0]), ids)[-1].copy()
    z[[0, 1, 3]] = -np.inf
    assert found["sinkhorn"]["greedy"] == z.argmax()
    shares = np.cumsum(np.asarray(jax.nn.softmax(jnp.array(z / 0.7))))
    assert found["sinkhorn"]["drawn"][1] == np.searchsorted(shares, 0.5)
    first, _, last = found["sinkhorn"]["drawn"]
    assert first not in (0, 1, 3) and last not in (0, 1, 3)


def test_one_file(pages):
    "Nothing is fetched, nothing can be, and no piece of the vocabulary ends a script"
    html = pages["sinkhorn"][1].read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"""<[^>]* (src|href)=|@import|url\(|fetch\(|import\(|XMLHttp""", html)
    assert html.count("</script>") == html.count("<script") == 3
    data = json.loads(re.search(r'"application/json">(.*?)</script>', html, re.S)[1])
    assert data["run"] == RUNS["sinkhorn"] and any("<" in piece for piece in data["pieces"])


REFUSED = {
    "plain": (TINY.plain(), "model.residual='mhc', found 'plain'"),
    "diff": (replace(TINY, attention="diff2"), "model.attention='gqa', found 'diff2'"),
    "relu2": (replace(TINY, ffn="relu2"), "model.ffn='swiglu', found 'relu2'"),
    "deepseek": (replace(TINY, mhc=MHCConfig.deepseek_v4()), "model.mhc.convention='paper'"),
    "rows": (replace(TINY, vocab_size=384), "320 pieces, but 384 rows"),
    "large": (replace(TINY, width=512, ffn_width=2048), "weights, a page of 5,000,000 bytes holds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(home, name, capsys):
    "In one line, and no page is left behind"
    cfg, says = REFUSED[name]
    run = make_run(home, f"refused-{name}", LM(cfg, nnx.Rngs(0)))
    capsys.readouterr()
    assert main(["explore", "--run", str(run)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line and str(run) in line
    assert not (run / "explore.html").exists()


def test_other_vocabularies_and_sizes(home, tmp_path, monkeypatch, pages, capsys):
    "Another kind of vocabulary, pairs in another order, a page above the limit: one line each"
    import sentencepiece
    import tokenizers

    shutil.copytree(home / RUNS["sinkhorn"], tmp_path / "run")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(explore, "LIMIT", 100_000)
        with pytest.raises(ValueError, match="weights make a page of .* bytes, 100,000 at most"):
            write_explore(run, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 3),
        model_prefix=str(tmp_path / "unigram"),
        model_type="unigram",
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    shutil.rmtree(run)
    settings = TrainConfig(model=TINY, loader=SHORT)
    lm = pages["sinkhorn"][0]
    write_run(lm, settings, run, tokenizer=tmp_path / "unigram.model")
    with pytest.raises(ValueError, match="encodes by byte pairs that leave a text as it is"):
        write_explore(run)

    words = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "a": 1}, []))
    (tmp_path / "other").mkdir()
    words.save(str(tmp_path / "other/tokenizer.json"))
    shutil.rmtree(run)
    write_run(lm, settings, run, tokenizer=tmp_path / "other/tokenizer.json")
    with pytest.raises(ValueError, match="needs a SentencePiece vocabulary"):
        write_explore(run)
    capsys.readouterr()
    assert main(["explore", "--run", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed here")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium here: the page is not clicked through")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def until(page, expression):
    "Ask until it holds; the page's own policy forbids Playwright's way of waiting, which is eval"
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never: {expression}")


def test_clicked_through(browser, pages):
    "Typing, pointing, every switch, writing and its stop, by mouse and by keyboard, on a desk and on a phone"
    said = []
    page = browser.new_page(viewport=dict(width=390, height=844), color_scheme="dark")
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pages["sinkhorn"][1].as_uri())
    until(page, "globalThis.laboratory?.trained.ids.length > 1")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than a phone"

    page.fill("#input", "<img src=x onerror=alert(1)> </script><b>bold</b>")
    assert page.locator("#tokens img, #tokens b, #next b").count() == 0
    assert "onerror" in page.inner_text("#tokens").replace("\n", "")

    assert RUNS["sinkhorn"] in page.inner_text("#about")

    page.fill("#input", "def f(a):\n    return a")
    count = page.locator("#tokens .token").count()
    assert count == page.evaluate("laboratory.ids.length") > 5
    before = page.inner_text("#loss")
    assert not page.is_visible("#change-box")

    def changed():
        assert page.is_visible("#change-box") and page.inner_text("#untouched") == before
        found = page.inner_text("#loss")
        page.click("#reset")
        assert page.inner_text("#loss") == before and not page.is_visible("#change-box")
        return found

    page.check("[value=identity]")
    apart = changed()
    page.check("[value=uniform]")
    assert len({before, apart, changed()}) == 3
    page.locator("#iterations").fill("0")
    assert page.locator("#depth .alarm").count() > 0  # without Sinkhorn the product grows
    assert changed() != before
    page.locator("#streams input").nth(1).uncheck()
    assert changed() != before
    page.locator(".gate").nth(1).fill("0")
    assert page.locator("#maps .site").nth(1).locator(".cell").all_inner_texts()[:5] == [
        "1.00", ".00", ".00", ".00", ".00"
    ]  # fmt: skip
    changed()

    page.locator("#tokens .token").nth(2).hover()
    at = page.inner_text("#next-title ~ p code")
    page.locator("#tokens .token").nth(2).focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tokens [aria-selected=true]").get_attribute("tabindex") == "0"
    assert page.evaluate("laboratory.position()") == 3
    assert page.locator("#next li").count() == 10 and at

    page.fill("#input", "")
    page.evaluate("laboratory.data.forbidden.push(2)")  # an untrained model would end at once
    page.locator("#temperature").fill("0")
    page.focus("#input")
    page.keyboard.press("Control+Enter")
    until(page, "laboratory.ids.length > 4")
    page.keyboard.press("Escape")
    ids = page.evaluate("laboratory.ids")
    assert page.input_value("#input") and not page.evaluate("laboratory.writing")
    assert page.evaluate("ids => laboratory.tokenizer.decode(ids)", ids) == page.input_value(
        "#input"
    )

    page.fill("#input", "é" * 3000)
    assert "first 63 tokens are read" in page.inner_text("#message")
    until(page, "laboratory.trained.ids.length === 64")
    page.click("#write")
    assert "context of this model is full" in page.inner_text("#message")
    assert not said, said
    page.close()
