"use strict";
/* The page around `model.js`: what is typed goes in, pictures come out.

   Two readings of the same tokens stand side by side: `trained`, the model as it is, and
   `changed`, the same model behind the switches, which is null while nothing is switched.
   All text of the model and of the reader reaches the page through textContent. */

const EXAMPLES = ["def ", "class Counter:\n", "import ", "for i in range("];
const FIRST_TEXT = `class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
`;
const SLICE = 60; // milliseconds of reading between two pictures
const WORST = 10; // nats at which a token is as red as it gets

const $ = (id) => document.getElementById(id);

/** An element with a class, text, and whatever else it is given. */
function make(tag, className = "", text = "", more = {}) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return Object.assign(element, more);
}

/** As many children as there are items, made once and then used again. */
function resize(parent, count, create) {
  while (parent.children.length > count) parent.lastChild.remove();
  while (parent.children.length < count) parent.append(create(parent.children.length));
  return [...parent.children];
}

class Page {
  constructor(data, model) {
    Object.assign(this, { data, model, tokenizer: new Tokenizer(data.pieces) });
    this.switches = model.switches();
    this.trained = new Reading(model);
    this.changed = null;
    this.ids = [...data.front];
    this.selected = null; // a position, or null for the last one
    this.writing = false;
    this.timer = 0;
    this.names = model.hypers.map((_, site) => (site % 2 ? "feed-forward" : "attention"));
    this.build();
    $("input").value = FIRST_TEXT;
    this.typed();
  }

  // -------------------------------------------------------------- what the reader does

  build() {
    const { data, model } = this;
    const { cfg, n } = model;
    document.documentElement.style.setProperty("--n", n);
    $("about").textContent =
      `This is the run “${data.run}”: ${data.parameters.toLocaleString("en")} weights, ` +
      `${cfg.layers} layers of width ${cfg.width}, ${n} streams, ` +
      `${data.steps.toLocaleString("en")} steps.`;
    $("made").textContent =
      `Made by nash_lab ${data.version} (nash_lab explore). Weights in half precision, ` +
      `arithmetic in single; nothing is loaded and nothing is sent.`;

    $("input").addEventListener("input", () => this.typed());
    $("write").addEventListener("click", () => this.write(!this.writing));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.write(true);
      if (event.key === "Escape") this.write(false);
    });
    $("temperature").addEventListener("input", () => {
      $("temperature-value").textContent = Number($("temperature").value).toFixed(2);
    });
    for (const text of EXAMPLES) {
      const button = make("button", "", text.trim(), { type: "button" });
      button.addEventListener("click", () => {
        $("input").value = text;
        this.typed();
      });
      $("examples").append(button);
    }

    const tokens = $("tokens");
    const pick = (event) => {
      const at = [...tokens.children].indexOf(event.target.closest(".token"));
      if (at >= 0) this.select(at);
    };
    tokens.addEventListener("pointerover", pick);
    tokens.addEventListener("click", pick);
    tokens.addEventListener("keydown", (event) => this.walk(event));

    this.buildSwitches();
    this.buildMaps();
  }

  buildSwitches() {
    const { model, switches } = this;
    const kind = model.cfg.mhc.h_res;
    const choices = { trained: "as trained", identity: "none (identity)", uniform: "uniform" };
    for (const [value, text] of Object.entries(choices)) {
      const checked = value === "trained";
      const box = make("input", "", "", { type: "radio", name: "mixing", value, checked });
      box.addEventListener("change", () => this.turn(() => (switches.mixing = value)));
      const label = make("label");
      label.append(box, text);
      $("mixing").append(label);
    }
    const dial = $("iterations");
    dial.max = Math.max(20, model.cfg.mhc.iterations);
    dial.value = model.cfg.mhc.iterations;
    const set = () => (switches.iterations = Number(dial.value));
    dial.addEventListener("input", () => this.turn(set));
    $("iterations-dial").hidden = kind !== "sinkhorn";
    switches.silent.forEach((_, stream) => {
      const box = make("input", "", "", { type: "checkbox", checked: true });
      const silence = () => (switches.silent[stream] = !box.checked);
      box.addEventListener("change", () => this.turn(silence));
      const label = make("label");
      label.append(box, this.swatch(stream), `stream ${stream + 1}`);
      $("streams").append(label);
    });
    $("reset").addEventListener("click", () => this.reset());
  }

  buildMaps() {
    const { model, switches } = this;
    for (let l = 0; l < model.cfg.layers; l++) {
      const card = make("div", "layer");
      card.append(make("h3", "", `Layer ${l + 1}`));
      for (const site of [2 * l, 2 * l + 1]) {
        const box = make("div", "site");
        const dial = make("input", "gate", "", { type: "range", min: 0, max: 1, step: 0.05 });
        dial.value = switches.gates[site];
        dial.setAttribute("aria-label", `gate of layer ${l + 1}, ${this.names[site]}`);
        const set = () => (switches.gates[site] = Number(dial.value));
        dial.addEventListener("input", () => this.turn(set));
        const label = make("label", "dial", "gate");
        label.append(dial, make("output"));
        box.append(make("h4", "", this.names[site]), make("div", "figure-map"), label);
        card.append(box);
      }
      $("maps").append(card);
    }
  }

  swatch(stream) {
    const dot = make("span", "swatch");
    dot.style.setProperty("--own", `var(--stream-${stream % 8})`);
    return dot;
  }

  /** Tokens of what is typed; what does not fit into the context is left out, and said. */
  typed() {
    this.write(false);
    const { data, model, tokenizer } = this;
    const room = model.cfg.max_len - data.front.length;
    const text = $("input").value;
    const part = text.slice(0, room * tokenizer.longest); // more cannot fit, so it is not encoded
    const ids = tokenizer.encode(part);
    const whole = ids.length <= room && part.length === text.length;
    $("message").textContent = whole
      ? ""
      : `The text is longer than the context of this model: its first ${room} tokens are read.`;
    this.ids = [...data.front, ...ids.slice(0, room)];
    this.selected = null;
    this.work();
  }

  /** Change the switches, then read everything again behind them. */
  turn(change) {
    change();
    const touched = JSON.stringify(this.switches) !== JSON.stringify(this.model.switches());
    this.changed = touched ? new Reading(this.model, structuredClone(this.switches)) : null;
    this.work();
  }

  reset() {
    this.turn(() => Object.assign(this.switches, this.model.switches()));
    document.querySelector("[name=mixing][value=trained]").checked = true;
    $("iterations").value = this.switches.iterations;
    for (const box of $("streams").querySelectorAll("input")) box.checked = true;
    document.querySelectorAll(".gate").forEach((dial, site) => {
      dial.value = this.switches.gates[site];
    });
  }

  select(position) {
    this.selected = position === this.ids.length - 1 ? null : position;
    this.draw();
  }

  walk(event) {
    const at = this.position();
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: Infinity };
    Object.assign(to, { ArrowUp: at - 1, ArrowDown: at + 1 });
    if (!(event.key in to)) return;
    event.preventDefault();
    this.select(Math.min(Math.max(to[event.key], 0), this.shown().ids.length - 1));
    $("tokens").children[this.position()].focus();
  }

  write(on) {
    if (on && !this.writing && this.ids.length >= this.model.cfg.max_len) {
      $("message").textContent = "The context of this model is full: delete some text first.";
      return;
    }
    if (on && this.ids.length === 0) {
      $("message").textContent = "This model needs a first token: type something.";
      return;
    }
    this.writing = on;
    $("write").textContent = on ? "Stop" : "Let it write";
    if (on) {
      this.selected = null;
      this.work();
    }
  }

  // -------------------------------------------------------------- reading

  /** The reading that the pictures show. */
  shown() {
    return this.changed ?? this.trained;
  }

  /** The position that the pictures show, among those read so far. */
  position() {
    const last = this.shown().ids.length - 1;
    return Math.min(this.selected ?? last, last);
  }

  /** Read for a moment, draw, and come back while tokens are left to read or to write. */
  work() {
    clearTimeout(this.timer);
    const { ids } = this;
    const readings = this.changed ? [this.changed, this.trained] : [this.trained];
    for (const reading of readings) reading.keep(ids);
    const behind = () => readings.find((reading) => reading.ids.length < ids.length);
    const until = performance.now() + SLICE;
    for (let reading = behind(); reading && performance.now() < until; reading = behind()) {
      reading.read(ids[reading.ids.length]);
    }
    this.draw();
    if (behind()) {
      this.timer = setTimeout(() => this.work());
    } else if (this.writing) {
      this.timer = setTimeout(() => this.writeOne());
    }
  }

  writeOne() {
    if (!this.writing) return; // stopped since this was put on the clock
    const { data, ids, model } = this;
    const id = this.shown().next(Number($("temperature").value), data.forbidden);
    if (data.ends.includes(id) || ids.length + 1 >= model.cfg.max_len) this.write(false);
    if (data.ends.includes(id)) {
      $("message").textContent = "The model ended the text here.";
    } else {
      ids.push(id);
      $("input").value = this.tokenizer.decode(ids);
      $("input").scrollTop = $("input").scrollHeight;
    }
    this.work();
  }

  // -------------------------------------------------------------- drawing

  draw() {
    const reading = this.shown();
    const position = this.position();
    $("iterations-value").textContent = this.switches.iterations;
    this.drawScore();
    this.drawTokens(reading, position);
    if (position < 0) return;
    const at = this.label(reading.ids[position]);
    for (const element of document.querySelectorAll(".at")) element.textContent = at;
    this.drawNext(reading, position);
    this.drawFill(reading.levels[position]);
    this.drawMaps(reading.maps[position]);
    this.drawDepth(reading.products(position));
  }

  /** A token as a reader knows it: spaces are spaces, a line end is ⏎, a byte its letter or number. */
  label(id) {
    const piece = this.data.pieces[id];
    if (id >= FIRST_PIECE) return piece.replaceAll("▁", " ").replaceAll("\n", "⏎");
    if (id >= FIRST_BYTE) {
      const byte = id - FIRST_BYTE;
      if (byte === 9) return "⇥";
      if (byte === 10) return "⏎";
      if (byte >= 32 && byte < 127) return String.fromCharCode(byte);
      return `‹${byte.toString(16).padStart(2, "0")}›`;
    }
    return id === this.data.ends[0] ? "start" : piece;
  }

  drawScore() {
    const mean = (reading) => {
      let sum = 0;
      let count = 0;
      for (let at = 1; at < reading.ids.length; at++, count++) sum += reading.losses[at];
      return { sum, count, value: count ? sum / count : NaN };
    };
    const now = mean(this.shown());
    const before = mean(this.trained);
    const shown = (value) => (Number.isFinite(value) ? value.toFixed(3) : "–");
    $("loss").textContent = shown(now.value);
    $("loss-name").textContent = `loss, nats a token${this.changed ? ", switched" : ""}`;
    $("beside").hidden = $("change-box").hidden = !this.changed;
    if (this.changed) {
      const change = now.value - before.value;
      $("untouched").textContent = shown(before.value);
      $("change").textContent = (change < 0 ? "−" : "+") + shown(Math.abs(change));
      let verdict = "same";
      if (change > 0.0005) verdict = "worse";
      if (change < -0.0005) verdict = "better";
      $("change-name").textContent = verdict;
      $("change-box").className = `figure ${verdict}`;
    }
    const text = this.tokenizer.decode(this.shown().ids.slice(1));
    const bytes = new TextEncoder().encode(text).length;
    const parts = [`${this.ids.length} / ${this.model.cfg.max_len} tokens`];
    if (now.count) {
      parts.unshift(`${short(now.sum / Math.LN2 / bytes)} bits per byte`);
      parts.unshift(`as unsure as 1 in ${short(Math.exp(now.value))}`);
    }
    $("other-units").textContent = parts.join(" · ");
  }

  drawTokens(reading, position) {
    const spans = resize($("tokens"), this.ids.length, () => {
      const span = make("span", "token");
      span.setAttribute("role", "option");
      return span;
    });
    this.ids.forEach((id, at) => {
      const span = spans[at];
      const text = this.label(id);
      const shown = text.includes("⏎") ? text.replaceAll("⏎", "⏎\n") : text;
      const loss = reading.losses[at];
      const share = loss === undefined || loss === null ? 0 : Math.min(loss / WORST, 1) * 0.85;
      if (span.textContent !== shown) span.textContent = shown;
      span.classList.toggle("mark", id < FIRST_PIECE && !text.includes("⏎"));
      span.classList.toggle("unread", at >= reading.ids.length);
      span.style.setProperty("--share", share.toFixed(3));
      const given = loss ? percent(Math.exp(-loss)) : "";
      span.title = loss ? `${loss.toFixed(2)} nats: the model gave it ${given}` : "";
      span.setAttribute("aria-selected", at === position);
      span.tabIndex = at === position ? 0 : -1;
    });
    if (this.writing) $("tokens").scrollTop = $("tokens").scrollHeight;
  }

  drawNext(reading, position) {
    const logits = reading.logits[position];
    const total = logSumExp(logits);
    const beside = this.changed && this.trained.logits[position];
    const besideTotal = beside && logSumExp(beside);
    const best = [];
    logits.forEach((z, id) => {
      if (best.length === 10 && z <= logits[best[9]]) return;
      const at = best.findIndex((other) => logits[other] < z);
      best.splice(at < 0 ? best.length : at, 0, id);
      best.length = Math.min(best.length, 10);
    });
    const follows = this.ids[position + 1];
    const rows = resize($("next"), best.length, () => {
      const row = make("li");
      const track = make("span", "track");
      track.append(make("i"), make("s"));
      row.append(make("span", "dot"), make("span", "piece"), track, make("span", "share"));
      return row;
    });
    best.forEach((id, i) => {
      const [, piece, track, share] = rows[i].children;
      const [bar, line] = track.children;
      const p = Math.exp(logits[id] - total);
      rows[i].className = id === follows ? "true" : "";
      piece.textContent = id === this.data.ends[0] ? "(end)" : this.label(id).replaceAll(" ", "·");
      share.textContent = percent(p);
      bar.style.width = `${100 * p}%`;
      line.hidden = !beside;
      if (beside) line.style.left = `${100 * Math.exp(beside[id] - besideTotal)}%`;
    });
  }

  /** `levels[s][i]`: root mean square of stream i after s sublayers. */
  drawFill(levels) {
    const top = Math.max(...levels.flat(), 1e-9);
    const lanes = resize($("fill"), this.model.n + 1, (stream) => {
      const lane = make("div", stream < this.model.n ? "lane" : "lane axis");
      const name = make("span");
      if (stream < this.model.n) name.append(this.swatch(stream), `stream ${stream + 1}`);
      lane.append(name, make("div", "bars"), make("span", "share"));
      lane.style.setProperty("--own", `var(--stream-${stream % 8})`);
      return lane;
    });
    lanes.forEach((lane, stream) => {
      const [, bars, share] = lane.children;
      if (stream === this.model.n) {
        const name = (s) => (s === 0 ? "in" : `${s % 2 === 1 ? "A" : "F"}${(s + 1) >> 1}`);
        resize(bars, levels.length, (s) => make("span", "", name(s)));
        return;
      }
      lane.classList.toggle("silent", this.switches.silent[stream]);
      const columns = resize(bars, levels.length, () => make("i"));
      columns.forEach((column, s) => (column.style.height = `${(100 * levels[s][stream]) / top}%`));
      share.textContent = short(levels[levels.length - 1][stream]);
    });
  }

  drawMaps(maps) {
    const { n } = this.model;
    document.querySelectorAll("#maps .site").forEach((box, site) => {
      const { pre, post, res } = maps[site];
      const [, figure, dial] = box.children;
      dial.lastChild.textContent = this.switches.gates[site].toFixed(2);
      const parts = resize(figure, n + 1 + n * (n + 1), (at) => {
        const row = Math.floor(at / (n + 1)); // the first row holds H_pre
        const column = at % (n + 1); // the last column holds H_post
        if (row > 0 && column < n) return make("div", "cell");
        const part = make("div", row === 0 ? "pre" : "post");
        part.style.setProperty("--own", `var(--stream-${(row === 0 ? column : row - 1) % 8})`);
        if (row > 0 || column < n) part.append(make("i"));
        return part;
      });
      for (let j = 0; j < n; j++) {
        const [read, written] = [parts[j], parts[(j + 1) * (n + 1) + n]];
        read.firstChild.style.height = `${100 * Math.min(pre[j], 1)}%`;
        read.title = `reads ${pre[j].toFixed(3)} of stream ${j + 1}`;
        written.firstChild.style.width = `${100 * Math.min(post[j], 1)}%`;
        written.title = `writes ${post[j].toFixed(3)} to stream ${j + 1}`;
      }
      res.forEach((value, at) => {
        const row = Math.floor(at / n) + 1;
        paint(parts[row * (n + 1) + (at % n)], value);
      });
      const numbers = res.map((value) => value.toFixed(2)).join(" ");
      figure.setAttribute("role", "img");
      figure.setAttribute("aria-label", `H_res of ${this.names[site]}: ${numbers}`);
    });
  }

  drawDepth(products) {
    const { n } = this.model;
    const boxes = resize($("depth"), products.length, (site) => {
      const box = make("div", "site");
      const title = `${(site >> 1) + 1} ${this.names[site]}`;
      box.append(make("h4", "", title), make("div", "figure-map"), make("p"));
      return box;
    });
    boxes.forEach((box, site) => {
      const [, figure, line] = box.children;
      const cells = resize(figure, n * n, () => make("div", "cell"));
      products[site].forEach((value, at) => paint(cells[at], value));
      const { forward, backward } = gains(products[site], n);
      line.textContent = `→ ${short(forward)}  ← ${short(backward)}`;
      line.className = Math.max(forward, backward) > 1.5 ? "alarm" : "";
    });
  }
}

/** A cell of a matrix whose rows and columns add up to 1. */
function paint(cell, value) {
  const share = Math.min(Math.max(value, 0), 1);
  cell.style.setProperty("--share", share.toFixed(3));
  cell.classList.toggle("deep", share > 0.6);
  cell.textContent = value < 9.995 ? value.toFixed(2).replace(/^0/, "") : short(value);
}

const percent = (p) => `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`;

/** A number in few characters. */
function short(value) {
  if (!Number.isFinite(value)) return "∞";
  if (value >= 1000) return value.toExponential(0).replace("e+", "e");
  return value.toFixed(value < 10 ? 2 : 0);
}

(async () => {
  const data = JSON.parse($("data").textContent);
  try {
    const model = await Model.load(data);
    globalThis.laboratory = new Page(data, model);
  } catch (error) {
    $("message").textContent = `This browser cannot open the model: ${error.message}`;
  }
})();
