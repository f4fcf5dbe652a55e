"use strict";
/* A language model with manifold-constrained hyper-connections, read token by token.

   Nothing here knows of the page around it: `view.js` draws, this file computes. It holds
   a tokenizer, the forward pass of one token, and the mathematics of both. The names are
   those of the paper and of nash_lab's notebooks: n streams of width d, H_pre, H_post and
   H_res; a "site" is one sublayer, so a model of l layers has 2 l sites. */

// ---------------------------------------------------------------- text to tokens and back

const FIRST_BYTE = 4; // byte b is token FIRST_BYTE + b
const FIRST_PIECE = FIRST_BYTE + 256; // pieces follow, the earliest merge first

/** Byte-pair encoding as SentencePiece does it: a space is written as ▁, nothing else changes. */
class Tokenizer {
  constructor(pieces) {
    this.pieces = pieces;
    this.ids = new Map();
    for (let id = FIRST_PIECE; id < pieces.length; id++) this.ids.set(pieces[id], id);
    this.longest = Math.max(...pieces.map((piece) => piece.length));
  }

  encode(text) {
    const ids = [];
    text.split("▁").forEach((part, i) => {
      if (i > 0) ids.push(...this.spell("▁")); // its piece would come back as a space
      ids.push(...this.merge(part.replaceAll(" ", "▁")));
    });
    return ids;
  }

  /** Join the pair of neighbours that was learned first, leftmost of equals, until none is left. */
  merge(text) {
    const symbols = [...text];
    const rankAt = (i) => this.ids.get(symbols[i] + symbols[i + 1]) ?? Infinity;
    const ranks = symbols.slice(1).map((_, i) => rankAt(i));
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (!(ranks[best] < Infinity)) break;
      symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
      ranks.splice(best, 1);
      if (best > 0) ranks[best - 1] = rankAt(best - 1);
      if (best < ranks.length) ranks[best] = rankAt(best);
    }
    return symbols.flatMap((symbol) => this.ids.get(symbol) ?? this.spell(symbol));
  }

  /** The bytes of a text, one token each: what has no piece of its own. */
  spell(text) {
    return [...new TextEncoder().encode(text)].map((byte) => FIRST_BYTE + byte);
  }

  /** The text of tokens; bytes that are no UTF-8 come out as �, special tokens as nothing. */
  decode(ids) {
    const bytes = [];
    for (const id of ids) {
      if (id >= FIRST_PIECE) {
        const text = this.pieces[id].replaceAll("▁", " ");
        bytes.push(...new TextEncoder().encode(text));
      } else if (id >= FIRST_BYTE) {
        bytes.push(id - FIRST_BYTE);
      }
    }
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
  }
}

// ---------------------------------------------------------------- the mathematics

/** y = W x, the rows of W one after the other. Four rows at a time: x is fetched once for all. */
function linear(W, x, y) {
  const inner = x.length;
  let row = 0;
  for (; row + 4 <= y.length; row += 4) {
    const a = row * inner;
    const b = a + inner;
    const c = b + inner;
    const d = c + inner;
    let ya = 0;
    let yb = 0;
    let yc = 0;
    let yd = 0;
    for (let i = 0; i < inner; i++) {
      const xi = x[i];
      ya += W[a + i] * xi;
      yb += W[b + i] * xi;
      yc += W[c + i] * xi;
      yd += W[d + i] * xi;
    }
    y[row] = ya;
    y[row + 1] = yb;
    y[row + 2] = yc;
    y[row + 3] = yd;
  }
  for (; row < y.length; row++) {
    let sum = 0;
    for (let i = 0; i < inner; i++) sum += W[row * inner + i] * x[i];
    y[row] = sum;
  }
  return y;
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));

/** 1 / the root of the mean square. */
function inverseRms(x, eps) {
  let sum = 0;
  for (const value of x) sum += value * value;
  return 1 / Math.sqrt(sum / x.length + eps);
}

/** RMSNorm: x divided by its root mean square, times a learned gain. */
function rmsNorm(x, gain, eps) {
  const scale = inverseRms(x, eps);
  return x.map((value, i) => value * scale * gain[i]);
}

/** Rotary positions: turn the pair (i, i + half) of every head by position times frequency. */
function rotate(heads, width, position, { frequencies, scale }) {
  const half = frequencies.length;
  for (let head = 0; head < heads.length; head += width) {
    for (let i = 0; i < half; i++) {
      const angle = Math.fround(position * frequencies[i]);
      const cos = Math.cos(angle) * scale;
      const sin = Math.sin(angle) * scale;
      const a = heads[head + i];
      const b = heads[head + i + half];
      heads[head + i] = a * cos - b * sin;
      heads[head + i + half] = b * cos + a * sin;
    }
  }
  return heads;
}

/** In place: exp of scores, divided by their sum. */
function softmax(scores) {
  const top = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < scores.length; i++) sum += scores[i] = Math.exp(scores[i] - top);
  for (let i = 0; i < scores.length; i++) scores[i] /= sum;
  return scores;
}

/** log of the sum of exp: minus this, a logit is a log-probability. */
function logSumExp(logits) {
  const top = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (const z of logits) sum += Math.exp(z - top);
  return top + Math.log(sum);
}

/** Eq. 9 and 19: exp, then columns and rows are divided by their sums in turns, rows last. */
function sinkhorn(logits, n, iterations, eps) {
  const H = logits.map(Math.exp);
  for (let turn = 0; turn < iterations; turn++) {
    for (let j = 0; j < n; j++) {
      let sum = eps;
      for (let i = 0; i < n; i++) sum += H[i * n + j];
      for (let i = 0; i < n; i++) H[i * n + j] /= sum;
    }
    for (let i = 0; i < n; i++) {
      let sum = eps;
      for (let j = 0; j < n; j++) sum += H[i * n + j];
      for (let j = 0; j < n; j++) H[i * n + j] /= sum;
    }
  }
  return H;
}

const identity = (n) => Array.from({ length: n * n }, (_, i) => (i % (n + 1) === 0 ? 1 : 0));

/** The orders of 0 ... n-1 as a dictionary has them, the identity first. */
function permutations(n) {
  const grow = (order) => {
    if (order.length === n) return [order];
    const rest = [...Array(n).keys()].filter((i) => !order.includes(i));
    return rest.flatMap((i) => grow([...order, i]));
  };
  return grow([]);
}

/** A B of two n x n matrices. */
function product(A, B, n) {
  return A.map((_, at) => {
    const i = Math.floor(at / n);
    const j = at % n;
    let sum = 0;
    for (let k = 0; k < n; k++) sum += A[i * n + k] * B[k * n + j];
    return sum;
  });
}

/** Largest row sum and largest column sum of |H|: most that a signal, or a gradient, can grow. */
function gains(H, n) {
  const rows = Array(n).fill(0);
  const columns = Array(n).fill(0);
  H.forEach((value, at) => {
    rows[Math.floor(at / n)] += Math.abs(value);
    columns[at % n] += Math.abs(value);
  });
  return { forward: Math.max(...rows), backward: Math.max(...columns) };
}

// ---------------------------------------------------------------- weights

/** An IEEE half-precision number from its 16 bits. */
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Unpack all arrays: base64, deflated, first all high bytes of the numbers, then all low ones. */
async function unpackWeights({ shapes, weights }) {
  const packed = Uint8Array.from(atob(weights), (character) => character.charCodeAt(0));
  const inflated = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(inflated).arrayBuffer());
  const count = bytes.length / 2;
  const arrays = {};
  let at = 0;
  for (const [name, shape] of Object.entries(shapes)) {
    const size = shape.reduce((a, b) => a * b, 1);
    const array = new Float32Array(size);
    for (let i = 0; i < size; i++, at++) array[i] = fromHalf((bytes[at] << 8) | bytes[count + at]);
    arrays[name] = array;
  }
  return arrays;
}

/** [in, out] to [out, in]. */
function transpose(W, inner) {
  const outer = W.length / inner;
  const T = new Float32Array(W.length);
  for (let i = 0; i < inner; i++) {
    for (let o = 0; o < outer; o++) T[o * inner + i] = W[i * outer + o];
  }
  return T;
}

/** Weights of a model, ready for `linear`, and the sizes that follow from its settings. */
class Model {
  static async load(data) {
    return new Model(data, await unpackWeights(data));
  }

  constructor(data, arrays) {
    const cfg = data.config;
    const n = cfg.mhc.streams;
    const d = cfg.width;
    Object.assign(this, { cfg, n, d, sites: 2 * cfg.layers });
    this.rotary = { frequencies: data.frequencies, scale: data.rotary_scale };
    this.embedding = arrays["embedding"];
    this.head = arrays["head"] ?? this.embedding; // tied: one table reads and writes tokens
    this.norm = arrays["norm/gain"];
    this.streamEmbedding = arrays["ends/embedding"] ?? new Float32Array(n * d);
    this.orders = cfg.mhc.h_res === "lite" ? permutations(n) : [];

    const layer = (name, l) => {
      const size = arrays[name].length / cfg.layers;
      return arrays[name].subarray(l * size, (l + 1) * size);
    };
    const matrix = (name, l, inner) => transpose(layer(`blocks/${name}/weight`, l), inner);
    this.layers = [];
    for (let l = 0; l < cfg.layers; l++) {
      this.layers.push({
        q: matrix("attention/q", l, d),
        k: matrix("attention/k", l, d),
        v: matrix("attention/v", l, d),
        o: matrix("attention/o", l, cfg.heads * cfg.head_dim),
        gate: matrix("ffn/gate", l, d),
        up: matrix("ffn/up", l, d),
        down: matrix("ffn/down", l, cfg.ffn_width),
      });
    }
    this.hypers = [];
    for (let site = 0; site < this.sites; site++) {
      const kind = site % 2 === 0 ? "attention" : "ffn";
      const own = (name) => layer(`blocks/${kind}_${name}`, site >> 1);
      const phi = transpose(own("hyper/phi"), n * d);
      if (cfg.mhc.gain) {
        const gain = own("hyper/gain");
        for (let i = 0; i < phi.length; i++) phi[i] *= gain[i % (n * d)];
      }
      const g = cfg.mhc.gates ? sigmoid(own("hyper/gate")[0]) : 1;
      const [alpha, bias] = [own("hyper/alpha"), own("hyper/bias")];
      this.hypers.push({ phi, alpha, bias, g, norm: own("norm/gain") });
    }
  }

  /** The model as it was trained; change a copy to intervene. */
  switches() {
    return {
      mixing: "trained", // or identity, uniform
      iterations: this.cfg.mhc.iterations,
      silent: Array(this.n).fill(false), // streams held at zero
      gates: this.hypers.map((hyper) => hyper.g), // H_res becomes (1 - g) I + g H_res
    };
  }
}

// ---------------------------------------------------------------- the forward pass

/** One text, read token by token. Keys, values and maps stay, so a new token costs only itself. */
class Reading {
  constructor(model, switches = model.switches()) {
    const { cfg, n, sites } = model;
    const slots = cfg.layers * cfg.max_len * cfg.kv_heads * cfg.head_dim;
    Object.assign(this, { model, switches, ids: [] });
    this.keys = new Float32Array(slots);
    this.values = new Float32Array(slots);
    this.logits = []; // of every position: what comes next
    this.losses = []; // of every position: minus its log-probability in nats, null at the start
    this.maps = []; // of every position and site: {pre, post, res}
    this.levels = []; // of every position: RMS of the n streams at the start and after each site
  }

  /** Forget all after the first `length` tokens; what is left does not depend on it. */
  cut(length) {
    const { ids, logits, losses, maps, levels } = this;
    for (const kept of [ids, logits, losses, maps, levels]) kept.length = length;
  }

  /** Keep what `ids` and the present text have in common. */
  keep(ids) {
    let same = 0;
    while (same < this.ids.length && this.ids[same] === ids[same]) same++;
    this.cut(same);
  }

  /** Read one more token. */
  read(id) {
    const { cfg, n, d, layers, hypers } = this.model;
    const position = this.ids.length;
    const maps = [];
    let streams = this.begin(id);
    const levels = [this.levelsOf(streams)];

    hypers.forEach((hyper, site) => {
      const layer = layers[site >> 1];
      const { pre, post, res } = this.route(streams, hyper, site);

      // the sublayer reads one vector: the streams weighted by H_pre
      let x = new Float32Array(d);
      for (let j = 0; j < n; j++) {
        for (let c = 0; c < d; c++) x[c] += pre[j] * streams[j * d + c];
      }
      x = rmsNorm(x, hyper.norm, cfg.norm_eps);
      const y = site % 2 === 0 ? this.attend(x, site >> 1, position) : this.feed(x, layer);

      // Eq. 3: H_res mixes the streams, H_post writes the output to each
      const next = new Float32Array(n * d);
      for (let i = 0; i < n; i++) {
        if (this.switches.silent[i]) continue;
        for (let c = 0; c < d; c++) {
          let value = post[i] * y[c];
          for (let j = 0; j < n; j++) value += res[i * n + j] * streams[j * d + c];
          next[i * d + c] = value;
        }
      }
      streams = next;
      maps.push({ pre, post, res });
      levels.push(this.levelsOf(streams));
    });

    const before = this.logits[position - 1];
    this.losses.push(before ? logSumExp(before) - before[id] : null);
    this.ids.push(id);
    this.maps.push(maps);
    this.levels.push(levels);
    this.logits.push(this.end(streams));
  }

  /** n copies of the token's embedding, each with a learned vector of its stream. */
  begin(id) {
    const { n, d, embedding, streamEmbedding } = this.model;
    const streams = new Float32Array(n * d);
    for (let i = 0; i < n * d; i++) {
      const silent = this.switches.silent[Math.floor(i / d)];
      streams[i] = silent ? 0 : embedding[id * d + (i % d)] + streamEmbedding[i];
    }
    return streams;
  }

  /** Eqs. 14-19: the three maps of one sublayer, made from all streams of this token. */
  route(streams, { phi, alpha, bias }, site) {
    const { n, cfg, orders } = this.model;
    const { mixing, iterations, gates } = this.switches;
    const { h_res, clamp, eps, norm_eps, tau = 1 } = cfg.mhc;
    const scale = inverseRms(streams, norm_eps ?? eps);
    const u = linear(phi, streams, new Float64Array(bias.length));
    const block = (i, start, end) =>
      Array.from(u.subarray(start, end), (h, at) => alpha[i] * h * scale + bias[start + at]);

    const pre = block(0, 0, n).map(sigmoid);
    const post = block(1, n, 2 * n).map((h) => 2 * sigmoid(h));
    let logits = block(2, 2 * n, u.length).map((h) => h / tau);
    let res = identity(n);
    if (mixing === "uniform") {
      res.fill(1 / n);
    } else if (mixing === "trained" && h_res === "sinkhorn") {
      if (clamp > 0) logits = logits.map((h) => Math.min(Math.max(h, -clamp), clamp));
      res = sinkhorn(logits, n, iterations, eps);
    } else if (mixing === "trained" && h_res === "lite") {
      const weights = softmax(logits);
      res.fill(0);
      orders.forEach((order, p) => order.forEach((j, i) => (res[i * n + j] += weights[p])));
    }
    const g = gates[site];
    res = identity(n).map((one, at) => (1 - g) * one + g * res[at]);
    return { pre, post, res };
  }

  /** Attention of this token to itself and all before; groups of heads share keys and values. */
  attend(x, l, position) {
    const { cfg, layers, rotary } = this.model;
    const { heads, kv_heads, head_dim, max_len } = cfg;
    const { q: Wq, k: Wk, v: Wv, o: Wo } = layers[l];
    const row = kv_heads * head_dim;
    const start = l * max_len * row;
    const slot = start + position * row;
    const q = rotate(linear(Wq, x, new Float32Array(heads * head_dim)), head_dim, position, rotary);
    const k = this.keys.subarray(slot, slot + row);
    rotate(linear(Wk, x, k), head_dim, position, rotary);
    linear(Wv, x, this.values.subarray(slot, slot + row));

    const y = new Float32Array(heads * head_dim);
    for (let h = 0; h < heads; h++) {
      const own = h * head_dim;
      const shared = start + Math.floor((h * kv_heads) / heads) * head_dim;
      const scores = new Float64Array(position + 1);
      for (let s = 0; s <= position; s++) {
        for (let c = 0; c < head_dim; c++) {
          scores[s] += q[own + c] * this.keys[shared + s * row + c];
        }
        scores[s] /= Math.sqrt(head_dim);
      }
      softmax(scores);
      for (let s = 0; s <= position; s++) {
        for (let c = 0; c < head_dim; c++) {
          y[own + c] += scores[s] * this.values[shared + s * row + c];
        }
      }
    }
    return linear(Wo, y, new Float32Array(x.length));
  }

  /** SwiGLU: one projection gates the other. */
  feed(x, { gate, up, down }) {
    const inner = new Float32Array(this.model.cfg.ffn_width);
    const a = linear(gate, x, new Float32Array(inner.length));
    const b = linear(up, x, new Float32Array(inner.length));
    for (let i = 0; i < inner.length; i++) inner[i] = a[i] * sigmoid(a[i]) * b[i];
    return linear(down, inner, new Float32Array(x.length));
  }

  /** The mean of the streams, its norm, and one logit for each token. */
  end(streams) {
    const { cfg, n, d, norm, head } = this.model;
    const mean = new Float32Array(d);
    for (let i = 0; i < n * d; i++) mean[i % d] += streams[i] / n;
    return linear(head, rmsNorm(mean, norm, cfg.norm_eps), new Float32Array(cfg.vocab_size));
  }

  /** How full each stream is: its root mean square. */
  levelsOf(streams) {
    const { n, d } = this.model;
    return Array.from({ length: n }, (_, i) => {
      let sum = 0;
      for (let c = 0; c < d; c++) sum += streams[i * d + c] ** 2;
      return Math.sqrt(sum / d);
    });
  }

  /** The product of all H_res up to each site, H_site ... H_2 H_1, for one token. */
  products(position) {
    const { n } = this.model;
    let whole = identity(n);
    return this.maps[position].map(({ res }) => (whole = product(res, whole, n)));
  }

  /** Draw the next token: the likeliest at temperature 0, `forbidden` ones never. */
  next(temperature, forbidden, random = Math.random) {
    const logits = Float64Array.from(this.logits[this.logits.length - 1]);
    for (const id of forbidden) logits[id] = -Infinity;
    if (temperature === 0) return logits.indexOf(Math.max(...logits));
    const p = softmax(logits.map((z) => z / temperature));
    let left = random();
    const drawn = p.findIndex((share) => (left -= share) < 0);
    return drawn >= 0 ? drawn : p.indexOf(Math.max(...p));
  }
}

// Node reads this file as a module; in the page it is one of two scripts
if (typeof module !== "undefined") {
  module.exports = { Tokenizer, Model, Reading, sinkhorn, permutations, product, gains, logSumExp };
}
