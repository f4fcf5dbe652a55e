"The report names what is missing, escapes what it shows, fetches nothing, and is the same file for the same run."

import json, re, shutil, subprocess
from dataclasses import replace
from html.parser import HTMLParser
import pytest
import tinycss2
from flax import nnx

from nash_lab.data.corpus import Document, pack
from nash_lab.data.loader import LoaderConfig
from nash_lab.data.tokenizer import TokenizerConfig, train_tokenizer
from nash_lab.evals.scores import EvalReport, Probe, Score, run_probes
from nash_lab.lab.report import STYLE, cell_text, html_table, paragraph, write_report
from nash_lab.lab.run import load
from nash_lab.adapt.continual import Check, GateDecision
from nash_lab.core.configs import to_json
from nash_lab.core.files import write_json
from nash_lab.model.transformer import LM, ModelConfig
from nash_lab.run.checkpoint import Checkpoints
from nash_lab.train.optim import OptimConfig
from nash_lab.train.pretrain import TrainConfig

TEXT = "def add(a, b):\n    return a + b\n\n" * 30
EVIL = '</pre><script>alert("x")</script> & more'


def stats(k):
    return dict(
        row_max=[1.0] * 4,
        row_min=[1.0] * 4,
        col_max=[1 + k] * 4,
        col_min=[1 - k] * 4,
        identity=[k] * 4,
        uniform=[1.7 - k] * 4,
        pre_entropy=[1.3] * 4,
        usage=[[0.25] * 4] * 4,
    )


def write_run(folder, residual="mhc", h_res="sinkhorn", **changes):
    "A run directory as pretraining leaves it, without a checkpoint"
    model = ModelConfig.tiny(vocab_size=300, residual=residual)
    config = TrainConfig(
        run=str(folder),
        steps=20,
        optim=OptimConfig(warmup_steps=5),
        loader=LoaderConfig(seq_len=48),
        model=replace(model, mhc=replace(model.mhc, h_res=h_res)),
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json(replace(config, **changes))))
    (folder / "goodput.json").write_text(
        json.dumps(dict(goodput=0.8, total_s=60.0, productive_s=48.0, lost_s={"compile": 12.0}))
    )
    (folder / "environment.json").write_text(
        json.dumps({"command": f"nash_lab pretrain {EVIL}", "git": None})
    )
    rows = [
        dict(
            step=s,
            tokens=100 * s,
            time_s=0.1 * s,
            loss=6 - s / 10,
            val_loss=6 - s / 10,
            val_bpb=3 - s / 20,
        )
        for s in (0, 10, 20)
    ]
    if residual == "mhc":
        rows = [row | {"routing": stats(row["step"] / 100)} for row in rows]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "lo'
    )
    return folder


class Reader(HTMLParser):
    "Checks that tags are balanced; keeps what is fetched and every tag"

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("bare") / "run")
    return run, write_report(run).read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run with weights, baselines, evaluation and samples"
    home = tmp_path_factory.mktemp("whole")
    docs = [Document(TEXT, f"{i}.py") for i in range(3)]
    tokenizer = train_tokenizer([TEXT], home / "t.model", TokenizerConfig(vocab_size=300))
    pack(docs, tokenizer, home / "val.bin", split="validation")
    run = write_run(home / "run", val_bin=str(home / "val.bin"), tokenizer=str(home / "t.model"))
    lm = LM(ModelConfig.tiny(vocab_size=300, residual="mhc"), rngs=nnx.Rngs(0))
    points = Checkpoints(run / "checkpoints", asynchronous=False)
    points.save(20, {"model": nnx.to_pure_dict(nnx.state(lm, nnx.Param))})
    points.close()
    write_run(run / "plain", residual="plain")
    write_run(run / "identity", h_res="identity")
    probes = run_probes(
        lambda prompts: [EVIL] * len(prompts), [Probe("1 + 1 =", "2"), Probe(EVIL, "x", "contains")]
    )
    tables = {
        name: Score(10, 20.0, 2.0, 7.4, bits, bits - 0.1, bits + 0.1)
        for name, bits in (("uniform", 3.5), (EVIL, 2.5))
    }
    for at, bits, extra in (
        (run, 1.875, dict(tables=tables, probes=probes)),
        (run / "plain", 1.9, dict(tables={}, probes=None)),
        (run / "identity", 1.88, dict(tables={}, probes=None)),
    ):
        (at / "eval.json").write_text(
            json.dumps(to_json(EvalReport(Score(10, 20.0, 2.0, 7.4, bits, 1.8, 1.9), **extra)))
        )
    (run / "samples").mkdir()
    (run / "samples/samples.jsonl").write_text(
        json.dumps({"prompt": EVIL, "text": "x = 1 < 2", "seed": 3}) + "\n"
    )
    return run


def test_what_is_missing_is_named(bare):
    run, html = bare
    for text in (
        "no folder plain",
        "unigram and bigram models, because eval.json is missing",
        "Not shown: samples/samples.jsonl: no such file",
        "checkpoint",
    ):
        assert text in html, text
    assert (
        html.count("Not shown") == 5 and html.count("<img") == 5
    )  # loss twice, gain, drift, usage are drawn
    assert sorted(p.stem for p in (run / "plots").iterdir()) == [
        "drift",
        "gain",
        "loss_time",
        "loss_tokens",
        "usage",
    ]


def test_a_whole_report(whole):
    path = write_report(whole)
    html = path.read_text()
    assert (
        path == whole / "report.html"
        and "Not shown" not in html
        and html.count("<img") == 8
        and len(html) < 3_000_000
    )
    for text in (
        "Against plain residual: -0.025 bits per byte",
        "Against mHC, H_res = I: -0.005",
        "worth 0.020 bits per byte here, mixing them with H_res 0.005",
        "3.500",
        "3.400 to 3.600",
        "1 + 1 =",
        "x = 1 &lt; 2",
        "nash_lab pretrain",
        "seed 3",
        'name="viewport"',
        "&quot;learning_rate&quot;",
    ):
        assert text in html, text
    assert write_report(whole).read_bytes() == path.read_bytes()


def rules(nodes):
    "{selector: {property: value}} of parsed style rules"
    out = {}
    for rule in nodes:
        assert rule.type == "qualified-rule", tinycss2.serialize([rule])
        found = tinycss2.parse_blocks_contents(
            rule.content, skip_comments=True, skip_whitespace=True
        )
        assert all(o.type == "declaration" for o in found), found
        out.setdefault(tinycss2.serialize(rule.prelude).strip(), {}).update(
            {o.lower_name: tinycss2.serialize(o.value).strip() for o in found}
        )
    return out


def test_every_rule_of_the_style_sheet_lives():
    "Parsed as a browser does it: no rule is dropped, both media blocks are there with their rules"
    sheet = tinycss2.parse_stylesheet(STYLE, skip_comments=True, skip_whitespace=True)
    media = {
        tinycss2.serialize(o.prelude).strip(): tinycss2.parse_rule_list(
            o.content, skip_whitespace=True
        )
        for o in sheet
        if o.type == "at-rule"
    }
    assert media.keys() == {"(prefers-color-scheme: dark)", "print"}
    light, dark, paper = (
        rules([o for o in sheet if o.type != "at-rule"]),
        rules(media["(prefers-color-scheme: dark)"]),
        rules(media["print"]),
    )
    colours = {name for name in light[":root"] if name.startswith("--")}
    assert colours == dark[":root"].keys() and all(
        dark[":root"][name] != light[":root"][name] for name in colours
    )
    assert set(re.findall(r"var\((--\w+)\)", STYLE)) == colours
    assert (
        paper["nav"]["display"] == "none"
        and paper["details::details-content"]["content-visibility"] == "visible"
    )


def contrast(a, b):
    "Ratio of the luminances of two colours rgb(r, g, b), as WCAG 2 defines it"

    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


PROBE = """<script>
const at = (what, of) => getComputedStyle(document.querySelector(what))[of];
document.title = JSON.stringify({paper: at('body', 'backgroundColor'), ink: at('body', 'color'), box: at('pre', 'backgroundColor'),
  bar: at('.bar i', 'backgroundColor'), soft: at('figcaption', 'color'), picture: at('img', 'backgroundColor'),
  page: document.documentElement.scrollWidth, window: innerWidth})
</script>"""


@pytest.mark.parametrize("width", [500, 1400])
def test_colours_in_a_browser(whole, tmp_path, width):
    "A browser that prefers dark shows light letters on dark paper, one that prefers light the reverse; no width scrolls sideways"
    browser = next(
        filter(
            None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
        ),
        None,
    )
    if not browser:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    page = tmp_path / "probe.html"
    page.write_text(write_report(whole, tmp_path / "r.html").read_text() + PROBE)
    seen = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/{scheme}",
            f"--window-size={width},900",
            f"--blink-settings=preferredColorScheme={number}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            page.as_uri(),
        ]
        html = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
        ).stdout
        seen[scheme] = json.loads(re.search("<title>(.*?)</title>", html)[1])
    dark, light = seen["dark"], seen["light"]
    assert (dark["paper"], light["paper"]) == ("rgb(21, 21, 23)", "rgb(255, 255, 255)")
    for one in (dark, light):
        assert contrast(one["ink"], one["paper"]) > 12 and contrast(one["ink"], one["box"]) > 10
        assert contrast(one["soft"], one["paper"]) > 4.5 and contrast(one["bar"], one["paper"]) > 3
        assert one["picture"] == "rgb(255, 255, 255)" and one["page"] <= one["window"]
    assert all(dark[name] != light[name] for name in ("paper", "ink", "box", "bar", "soft"))


def test_a_run_of_version_0_1(whole, tmp_path):
    "Its plain baseline was called twin"
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "plain").rename(run / "twin")
    shutil.rmtree(run / "identity")
    html = write_report(run).read_text()
    assert "Against plain residual: -0.025" in html and "Not shown" not in html


def test_stands_alone_and_escapes(whole, bare):
    for html in (write_report(whole).read_text(), bare[1]):
        reader = Reader(html)
        assert (
            not {"script", "link", "iframe", "object"} & set(reader.tags)
            and "url(" not in html
            and "@import" not in html
        )
        assert all(link.startswith(("data:image/png;base64,", "#")) for link in reader.links)
        assert "<script" not in html and html.count("&lt;script&gt;") >= 1


def test_own_sections_and_place(whole, tmp_path):
    def broken(files):
        yield paragraph("first part")
        raise ValueError("gate.json: no score")

    extra = {
        "Adaptation": lambda files: [html_table([["steps", files.config.steps]])],
        "Gates": broken,
    }
    html = write_report(whole, tmp_path / "deep/r.html", extra=extra).read_text()
    assert (
        html.index(">Evaluation and probes</h2>")
        < html.index(">Adaptation</h2>")
        < html.index(">Gates</h2>")
        < html.index(">How to make it again</h2>")
    )
    assert "first part" in html and "Not shown: gate.json: no score" in html


def test_unfinished_skipped_and_plain(tmp_path):
    run = write_run(tmp_path / "run", residual="plain")
    row = dict(step=5, tokens=500, time_s=0.5, loss=None, skipped=2)
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "tokens": 9, "time_s": 0.1, "loss": 4.0})
        + "\n"
        + json.dumps(row)
        + "\n"
    )
    html = write_report(run).read_text()
    assert (
        "stopped at step 5 of 20" in html
        and "2 steps were not finite" in html
        and "does not mix streams" in html
    )


def test_the_files_of_the_run_itself(tmp_path, whole):
    "A run that was moved is read with its own tokenizer; what the demo was asked for is shown"
    run = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    shutil.copy(config["tokenizer"], run / "tokenizer.model")
    (run / "config.json").write_text(json.dumps(config | {"tokenizer": "gone.model"}))
    (run / "demo.json").write_text(json.dumps({"asked": EVIL}))
    html = write_report(run).read_text()
    assert "Not shown" not in html and "demo.json" in html and "<script" not in html
    (run / "tokenizer.model").unlink()
    assert "Not shown: gone.model" in write_report(run).read_text()


def test_bad_input(tmp_path, whole):
    with pytest.raises(FileNotFoundError, match="config.json"):
        write_report(tmp_path)
    run = write_run(tmp_path / "run")
    (run / "eval.json").write_text("{")
    assert "eval.json: Expecting" in write_report(run).read_text()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        write_report(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl: no line"):
        write_report(run)


def test_a_chain_of_updates(tmp_path):
    "In the order of the chain, not of the names; a rejected update keeps what was; a broken file is named"
    scores = {"c": ("base", 0.9, 0.8), "a": ("c", 0.8, 0.1), "b": ("a", 0.8, 0.85)}
    for name, (run, before, after) in scores.items():
        good = after > 0.5
        check = Check("<sums>", "skill", before, after, after - before, 0, 0, -0.1, good)
        verdict = GateDecision(good, (check, replace(check, kind="share")), "s", "x", "y", "y")
        write_json(tmp_path / name / "gate_decision.json", to_json(verdict))
        write_json(tmp_path / name / "continual.json", {"run": f"runs/{run}"})
        lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "accepted": good}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    html = write_report(tmp_path).read_text()
    assert (tmp_path / "report.html").exists() and "2 of 3 updates accepted" in html
    updates = html[html.index("Updates</h2>") :]
    assert re.findall(r"<tr><td>(\w)</td><td>(\w+)</td>", updates) == [
        ("c", "base"),
        ("a", "c"),
        ("b", "a"),
    ]
    assert "<sums>" not in html and "&lt;sums&gt;" in html
    total = re.search(r"&lt;sums&gt;</td>(.*?)</tr>", html)[1]
    assert re.findall(r">([-.\d]+)<", total) == ["0.900", "0.850", "-0.05", "3"]
    assert re.findall(r"<span>([.\d]+)</span>", html) == ["0.900", "0.800", "0.800", "0.850"]
    write_json(tmp_path / "a/continual.json", {"run": "b"})  # a circle still ends
    assert write_report(tmp_path).exists()
    write_json(tmp_path / "a/gate_decision.json", {"accepted": 1})
    with pytest.raises(ValueError, match="a/gate_decision.json: GateDecision"):
        write_report(tmp_path)


def test_numbers():
    assert [cell_text(x) for x in (None, True, 0, 12345, 0.5, 1e-5, 45.678, float("nan"), "a")] == [
        "–",
        "True",
        "0",
        "12,345",
        "0.500",
        "1e-05",
        "45.678",
        "nan",
        "a",
    ]


def test_loaded_run(whole):
    model = load(whole)
    scored = model.logprob("def add")
    assert (
        float(scored) == scored.total == pytest.approx(scored.logprobs.sum(), rel=1e-6)
        and scored.total < 0
    )
    assert len(scored.pieces) == len(scored.logprobs)
    assert [row["step"] for row in model.metrics] == [0, 10, 20]  # the cut last line is left out
    assert model.routing("def").res.shape[:3] == (2, 2, 1) and "parameters" in repr(model)
    with pytest.raises(ValueError, match="the model reads at most 64"):
        model.logprob("é" * 100)
    with pytest.raises(FileNotFoundError, match="none.model"):
        load(whole, tokenizer="none.model")


def test_load_at_the_top_level():
    import nash_lab

    assert nash_lab.load is load
