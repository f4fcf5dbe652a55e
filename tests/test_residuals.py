"""The family of residual connections against float64 numbers of public reference code.

Sizes and constants come from the files. NASH_LAB_FIXTURES names another folder of the same form.
`python tests/test_residuals.py` prints the worst error of each variant."""

import os
from itertools import combinations, permutations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nash_lab.model.block import MAHAConfig, ModelConfig
from nash_lab.model.residuals import RESIDUALS, ResidualConfig, Sources
from nash_lab.model.transformer import LM
from test_combinations import train_and_decode

FOLDER = (
    Path(os.environ.get("NASH_LAB_FIXTURES") or Path(__file__).parent / "fixtures") / "residuals"
)
# of values and of gradients; in float32 the gradient of one scale is a sum of thousands of terms that cancel
TOLERANCES = {"float64": (1e-9, 1e-9), "float32": (1e-5, 5e-5)}


class LayerNorm(nnx.Module):
    "What two of the references use in place of an RMSNorm."

    def __init__(self, eps, weight=None, bias=None):
        self.eps, self.weight, self.bias = eps, weight, bias

    def __call__(self, x):
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        if self.weight is None:
            return x
        return x * jnp.broadcast_to(self.weight, x.shape) + jnp.broadcast_to(self.bias, x.shape)


def fill(module, **values):
    "The module with parameters of the fixture; a dot leads into a part of it."
    for path, value in values.items():
        *parts, name = path.split(".")
        owner = module
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, nnx.Param(value))
    return module


def hc(w, z, prefix):
    site = RESIDUALS["hc"].site(
        w["dynamic_alpha_fn"].shape[0], streams(w["static_beta"].shape[0]), rngs=nnx.Rngs(0)
    )
    phi = jnp.concatenate([w["dynamic_alpha_fn"], w["dynamic_beta_fn"][:, None]], 1)
    scale = jnp.stack([w["dynamic_alpha_scale"], w["dynamic_beta_scale"]])
    fill(site, phi=phi, scale=scale, alpha=w["static_alpha"], beta=w["static_beta"])
    if "norm_gamma" in w:
        return fill(site, **{"norm.gain": w["norm_gamma"]})
    site.norm = LayerNorm(float(z["ln_eps"]))
    return site


def frac(w, z, prefix):
    part, m = w["dyn_alpha"].shape[0], w["static_beta"].shape[0]
    site = RESIDUALS["frac"].site(m * part, streams(m), rngs=nnx.Rngs(0))
    phi = jnp.concatenate([w["dyn_alpha"], w["dyn_beta"][:, None]], 1)
    scale = jnp.stack([w["alpha_scale"], w["beta_scale"]])
    fill(site, phi=phi, scale=scale, alpha=w["static_alpha"], beta=w["static_beta"])
    if "norm_bias" in w:
        site.norm = LayerNorm(float(z["ln_eps"]), w["norm_weight"], w["norm_bias"])
    else:
        site.norm.eps = float(z["rms_eps"])
        fill(site, **{"norm.gain": w["norm_weight"]})
    return site


def streams(n, **settings):
    return ResidualConfig(streams=n, **settings)


def packed(name):
    "v4, v41 and ihc keep one matrix of all maps, [out, in]."

    def build(w, z, prefix):
        n = w["base"].shape[0] // 2 if name == "ihc" else round((1 + w["base"].shape[0]) ** 0.5) - 1
        iterations = dict(iterations=int(z["iterations"])) if "iterations" in z else {}
        cfg = streams(n, eps=float(z["hc_eps"]), **iterations)
        site = RESIDUALS[name].site(w["fn"].shape[1] // n, cfg, rngs=nnx.Rngs(0))
        if name == "ihc":
            site.norm_eps, site.magnitude = float(z["norm_eps"]), float(z["magnitude"])
        return fill(site, phi=w["fn"].T, alpha=w["scale"], bias=w["base"])

    return build


def head(name):
    def build(w, z, n, sites):
        ends = RESIDUALS[name].ends(
            w["head_fn"].shape[1] // n, streams(n, eps=float(z["hc_eps"])), sites, rngs=nnx.Rngs(0)
        )
        return fill(ends, phi=w["head_fn"].T, alpha=w["head_scale"], bias=w["head_base"])

    return build


def exact(name):
    "lite and kromhc pack pre and residual apart from post; the reference applies what it stores transposed."

    def build(w, z, prefix):
        n = w["static_beta"].shape[0]
        site = RESIDUALS[name].site(w["norm_gamma"].shape[0] // n, streams(n), rngs=nnx.Rngs(0))
        order = np.arange(w["static_alpha"].shape[0] - n)
        if name == "lite":
            theirs = np.swapaxes(z["permutations"], -1, -2).reshape(len(order), -1)
            ours = np.stack([np.eye(n)[list(p)] for p in permutations(range(n))]).reshape(
                len(order), -1
            )
            order = (ours[:, None] == theirs[None]).all(-1).argmax(1)
        alpha, fn = w["static_alpha"], w["dynamic_alpha_fn"]
        bias = jnp.concatenate([alpha[:n], w["static_beta"], alpha[n:][order]])
        phi = jnp.concatenate([fn[:, :n], w["dynamic_beta_fn"], fn[:, n:][:, order]], 1)
        scales = [w["pre_branch_scale"][0], w["h_post_scale"], w["residual_scale"][0]]
        return fill(site, phi=phi, bias=bias, alpha=jnp.stack(scales), gain=1 + w["norm_gamma"])

    return build


def gated(w, z, prefix):
    nd, n = w["norm"].shape[0], w["inject"].shape[0]
    site = RESIDUALS["gated"].site(nd // n, streams(n, rank=w["down"].shape[0]), rngs=nnx.Rngs(0))
    site.norm_eps = float(z["norm_eps"])
    return fill(site, gain=w["norm"], down=w["down"].T, up=w["up"].T, inject=w["inject"].T)


def gated_ends(w, z, n, sites):
    cfg = streams(n, rank=w["head_down"].shape[0])
    ends = RESIDUALS["gated"].ends(w["head_norm"].shape[0] // n, cfg, sites, rngs=nnx.Rngs(0))
    ends.mixer.norm_eps = float(z["norm_eps"])
    fill(ends.mixer, gain=w["head_norm"], down=w["head_down"].T, up=w["head_up"].T)
    return ends


def wide(w, z, prefix):
    n = w["read_logit"].shape[0]
    forget = float(z["max_forget"]) if "retention_logit" in w else 0.0
    site = RESIDUALS["wide"].site(8, streams(n, forget=forget), rngs=nnx.Rngs(0))
    fill(site, pre=w["read_logit"], post=w["write_logit"])
    return fill(site, keep=w["retention_logit"]) if forget else site


def wide_ends(w, z, n, sites):
    return fill(
        RESIDUALS["wide"].ends(8, streams(n), sites, rngs=nnx.Rngs(0)), pre=w["head_read_logit"]
    )


def bare_ends(name):
    return lambda w, z, n, sites: RESIDUALS[name].ends(8, streams(n), sites, rngs=nnx.Rngs(0))


def stream_axes(x):
    return tuple(x[:, :, i] for i in range(x.shape[2]))


def in_fractions(w, x):
    return tuple(jnp.split(x, w["static_beta"].shape[0], -1))


# file: (site, ends, prefixes of single sites, maps as the file has them)
VARIANTS = {
    "hc_dynamic": (hc, bare_ends("hc"), ("one", "ln")),
    "frac_dynamic": (frac, bare_ends("frac"), ("one", "rms")),
    "mhc_v4_stack": (packed("v4"), head("v4"), ()),
    "mhc_v41_single_pass": (packed("v41"), bare_ends("v41"), ("one",)),
    "mhc_lite": (exact("lite"), bare_ends("lite"), ("one",)),
    "kromhc": (exact("kromhc"), bare_ends("kromhc"), ("one",)),
    "ihc_hy_v4": (packed("ihc"), head("ihc"), ("one",)),
    "gated_qwen4": (gated, gated_ends, ("one",)),
    "wide_mirrored": (wide, wide_ends, ("one", "plain")),
}


def part_of(z, prefix, dtype):
    "Inputs and weights of the file that a gradient is given for."
    grads = [k.removeprefix(f"{prefix}_grad_") for k in z if k.startswith(f"{prefix}_grad_")]
    return {k: jnp.asarray(z[f"{prefix}_{k}"], dtype) for k in grads}


def token_first(a):
    return jnp.moveaxis(a, (-2, -1), (0, 1))


def one_site(name, z, prefix, w):
    "What one site reads, writes and makes, by the file's names."
    build, _, _ = VARIANTS[name]
    site = build(w, z, prefix)
    parts = name == "frac_dynamic"
    state = in_fractions(w, w["x"]) if parts else stream_axes(w["x"])
    if name == "mhc_v41_single_pass":
        state = state, stream_axes(w["pre_before"])
    read, maps = site.read(state)
    after = site.write(state, w["y"], maps)
    made = {"read": read}
    if name == "mhc_v41_single_pass":
        after, handed = after
        made["pre"] = jnp.stack(handed, -1)
    made["next"] = jnp.concatenate(after, -1) if parts else jnp.stack(after, 2)
    pre, post, res = (None if m is None else token_first(m) for m in maps)
    if name == "hc_dynamic":
        made["alpha"] = jnp.concatenate([pre[..., None], jnp.swapaxes(res, -1, -2)], -1)
        made["beta"] = post
    elif parts:
        made["alpha"] = jnp.concatenate([jnp.swapaxes(pre, -1, -2), jnp.swapaxes(res, -1, -2)], -1)
        made["beta"] = post
    elif name == "gated_qwen4":
        made["write"] = post
    elif name == "wide_mirrored":
        made |= {"read_factor": pre[0, 0], "write_factor": post[0, 0]}
    else:
        made |= {"pre": pre, "post": post}
        if res is not None:
            made["comb" if "comb" in str(list(z)) else "stored"] = jnp.swapaxes(res, -1, -2)
    return made


def stack(name, z, w):
    "A stack of sites around tanh sublayers, and the streams before each of them."
    build, ends_of, _ = VARIANTS[name]
    sites = w["w"].shape[0]
    own = {k: v for k, v in w.items() if k not in ("x", "w") and not k.startswith("head_")}
    n = z["stack_streams"].shape[3] if z["stack_streams"].ndim == 5 else w["static_beta"].shape[1]
    ends = ends_of(w, z, n, sites)
    state = ends.begin(w["x"])
    seen = []
    for i in range(sites + 1):
        streams_now = state[0] if name == "mhc_v41_single_pass" else state
        joined = (
            jnp.concatenate(streams_now, -1)
            if name == "frac_dynamic"
            else jnp.stack(streams_now, 2)
        )
        seen.append(joined)
        if i < sites:
            site = build({k: v[i] for k, v in own.items()}, z, "stack")
            read, context = site.read(state)
            state = site.write(state, jnp.tanh(read @ w["w"][i]), context)
    return {"out": ends.end(state), "streams": jnp.stack(seen)}


def errors(z, prefix, made_by, dtype):
    "Largest difference of each value and of each gradient."
    w = part_of(z, prefix, dtype)
    cots = {k.removeprefix(f"{prefix}_cot_"): z[k] for k in z if k.startswith(f"{prefix}_cot_")}
    made = jax.jit(made_by)(w)
    found = {k: distance(v, z[f"{prefix}_{k}"]) for k, v in made.items() if f"{prefix}_{k}" in z}
    assert set(cots) <= set(found), f"{prefix}: {sorted(cots)} are not all made"

    def pulled(w):
        made = made_by(w)
        return sum(jnp.vdot(jnp.asarray(c, dtype), made[k]) for k, c in cots.items())

    for k, g in jax.jit(jax.grad(pulled))(w).items():
        found[f"grad {k}"] = distance(g, z[f"{prefix}_grad_{k}"])
    return found


def distance(found, want):
    "Largest difference, absolute for small numbers and relative to the largest for others."
    return np.abs(np.asarray(found, np.float64) - want).max() / max(1.0, np.abs(want).max())


def attention_site(w, z, block):
    site = RESIDUALS["attnres"].site(8, ResidualConfig(block=block), rngs=nnx.Rngs(0))
    site.eps = float(z["norm_eps"])
    return fill(site, query=w["query"], gain=w["gain"])


def attention_one(z, w):
    "All sources given, in the full form."
    b, t, k, d = w["x"].shape
    state = Sources(w["x"], jnp.zeros((b, t, d), w["x"].dtype), jnp.full(b, k - 1, jnp.int32))
    read, maps = attention_site(w, z, 1).read(state)
    return {"read": read, "weights": maps.pre}


def attention_stack(z, block):
    def run(w):
        sites = w["w"].shape[0]
        cfg = ResidualConfig(block=block)
        ends = RESIDUALS["attnres"].ends(w["x"].shape[-1], cfg, sites, rngs=nnx.Rngs(0))
        ends.last = attention_site({"query": w["head_query"], "gain": w["head_gain"]}, z, block)
        state = ends.begin(w["x"])
        made = {}
        for i in range(sites + 1):
            site = (
                ends.last
                if i == sites
                else attention_site({"query": w["query"][i], "gain": w["gain"][i]}, z, block)
            )
            read, maps = site.read(state)
            there = list(range(i // block + 1)) + ([maps.pre.shape[0] - 1] if i % block else [])
            made["head_weights" if i == sites else f"weights{i}"] = maps.pre[np.array(there)]
            if i < sites:
                state = site.write(state, jnp.tanh(read @ w["w"][i]), maps)
        return made | {"out": ends.end(state)}

    return run


def attention_parts(z, prefix, dtype):
    grads = [k.removeprefix(f"{prefix}_grad_") for k in z if k.startswith(f"{prefix}_grad_")]
    return {k: jnp.asarray(z[f"stack_{k}"], dtype) for k in grads}


def cases():
    "(file, prefix) of everything that the folder holds."
    found = []
    for path in sorted(FOLDER.glob("*.npz")):
        name = path.stem
        if name == "attention_residuals":
            blocks = {k.split("_")[0] for k in np.load(path).files if k.startswith("block")}
            found += [(name, "one"), *((name, b) for b in sorted(blocks))]
        elif name in VARIANTS:
            found += [(name, p) for p in VARIANTS[name][2]] + [(name, "stack")]
    return found


def worst(name, prefix, dtype):
    "Differences of one part of one file in one dtype."
    with jax.enable_x64(dtype == "float64"):
        file = np.load(FOLDER / f"{name}.npz")
        z = {k: file[k] for k in file.files}
        if name != "attention_residuals":
            made_by = (
                (lambda w: stack(name, z, w))
                if prefix == "stack"
                else (lambda w: one_site(name, z, prefix, w))
            )
        elif prefix == "one":
            made_by = lambda w: attention_one(z, w)
        else:
            made_by = attention_stack(z, int(prefix.removeprefix("block")))
            z |= {f"{prefix}_{k}": z[f"stack_{k}"] for k in attention_parts(z, prefix, dtype)}
        return errors(z, prefix, made_by, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name, prefix", cases())
def test_fixture(name, prefix, dtype):
    "Values and all gradients, in both precisions"
    found = worst(name, prefix, dtype)
    values, gradients = TOLERANCES[dtype]
    far = {
        k: v for k, v in found.items() if not v <= (gradients if k.startswith("grad") else values)
    }
    assert not far


def test_fixtures_of_residuals_are_all_tried():
    "A file that no variant claims would be passed over in silence"
    if not list(FOLDER.glob("*.npz")):
        pytest.skip(f"no files in {FOLDER}")
    known = {*VARIANTS, "attention_residuals", "vwn_ghc_unofficial"}
    assert {path.stem for path in FOLDER.glob("*.npz")} <= known


# every pair of switches meets in one of these: five rows for each residual, eleven for each attention
SWITCHES = {
    "residual": [name for name in RESIDUALS if name not in ("plain", "mhc")],
    "attention": ["gqa", "diff1", "diff2", "mla", "maha"],
    "ffn": ["swiglu", "gelu", "moe"],
    "mtp": ["none", "parallel", "sequential"],
    "remat": ["none", "block", "dots"],
    "compute_dtype": ["float32", "bfloat16"],
}


def rows_of_switches():
    "Every residual with every attention; the others turn so that any two values meet."
    rows = []
    for i, residual in enumerate(SWITCHES["residual"]):
        for j, attention in enumerate(SWITCHES["attention"]):
            turns = dict(
                ffn=i + j, mtp=2 * i + j + j // 3, remat=j + i // 3, compute_dtype=i + j + j // 2
            )
            others = {name: SWITCHES[name][at % len(SWITCHES[name])] for name, at in turns.items()}
            rows.append(dict(residual=residual, attention=attention, **others))
    return rows


def test_every_pair_of_switches_meets():
    met = {
        frozenset((a, b)) for row in rows_of_switches() for a in row.items() for b in row.items()
    }
    for (a, values), (b, others) in combinations(SWITCHES.items(), 2):
        assert all(frozenset(((a, x), (b, y))) in met for x in values for y in others), (a, b)


def model_of(residual, **changes):
    small = dict(vocab_size=64, init_std=0.2, maha=MAHAConfig(scales=2), residual=residual)
    settings = ResidualConfig(rank=4, block=2 if residual == "attnres" else 1)
    return ModelConfig.tiny(**small | dict(residuals=settings) | changes)


@pytest.mark.parametrize("row", rows_of_switches(), ids=lambda row: "-".join(row.values()))
def test_composes_with(row):
    "One step moves every weight that can move and lowers the loss; decoding with a cache equals the full pass"
    cfg = model_of(**row)
    _, still, cached, full = train_and_decode(cfg)
    if row["residual"] == "attnres":  # a first site has one source and nothing to choose
        still = [
            path for path in still if not path.startswith("['mtp']['block']['attention_hyper']")
        ]
    assert not still, still
    if cfg.compute_dtype == "float32":
        np.testing.assert_allclose(cached, full, atol=2e-4, rtol=2e-4)
    else:  # one rounding turns a token to another expert, and then all its logits are others
        far = np.abs(np.asarray(cached) - np.asarray(full)) > 0.25 * np.asarray(full).std()
        assert far.mean() < 0.06


@pytest.mark.parametrize("residual", SWITCHES["residual"])
def test_sites_start_alike_or_in_turn(residual):
    "Built under vmap, each layer has the values of its own index; the maps have the shapes that viewers expect"
    cfg = model_of(residual, layers=3)
    lm = LM(cfg)
    variant = RESIDUALS[residual]
    for layer in range(3):
        for which, name in enumerate(("attention_hyper", "ffn_hyper")):
            alone = variant.site(cfg.width, cfg.residuals, 2 * layer + which, rngs=nnx.Rngs(0))
            ours = nnx.to_pure_dict(nnx.state(getattr(lm.blocks, name), nnx.Param))
            for key, value in nnx.to_pure_dict(nnx.state(alone, nnx.Param)).items():
                if key in ("bias", "alpha", "beta", "pre", "post", "scale"):
                    np.testing.assert_array_equal(ours[key][layer], value)
    if residual == "wider":
        with pytest.raises(ValueError, match="residual='wider' has no maps"):
            lm.routing(jnp.ones((2, 5), jnp.int32))
        return
    maps = lm.routing(jnp.ones((2, 5), jnp.int32))
    assert maps.pre.shape[:2] == (3, 2) and (maps.res is not None) >= variant.mixes
    if variant.mixes:
        assert maps.res.shape == (3, 2, 2, 5, 4, 4)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (
            dict(residual="residuum"),
            "ModelConfig.residual='residuum': expected one of plain, wider",
        ),
        (
            dict(residual="kromhc", residuals=ResidualConfig(streams=3)),
            "ResidualConfig.streams=3: expected a power of two",
        ),
        (
            dict(residual="lite", residuals=ResidualConfig(streams=6)),
            "ResidualConfig.streams=6: expected at most 5",
        ),
        (
            dict(residual="wide", residuals=ResidualConfig(streams=1)),
            "ResidualConfig.streams=1: expected at least 2",
        ),
        (
            dict(residual="frac", residuals=ResidualConfig(streams=5)),
            "ResidualConfig.streams=5: expected a divisor of width=32",
        ),
    ],
)
def test_a_variant_that_cannot_be(wrong, says):
    "One line with the field, the value and what was expected"
    with pytest.raises(ValueError) as error:
        ModelConfig.tiny(**wrong)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("forget", [-0.1, 1.0, 1.5])
def test_retention_lies_inside_its_interval(forget):
    "What a stream forgets is a share of it"
    with pytest.raises(ValueError, match="ResidualConfig.forget="):
        ResidualConfig(forget=forget)


@pytest.mark.parametrize("name", [name for name in RESIDUALS if name != "reminder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extreme_logits(name, dtype):
    "Weights and streams a thousand times too large, or all zero: no NaN, no Inf, finite gradients"
    variant = RESIDUALS[name]
    settings = (
        ModelConfig.tiny().mhc if variant.settings == "mhc" else ResidualConfig(rank=4, forget=0.1)
    )
    ends = variant.ends(8, settings, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(variant.site(8, settings, 0, rngs=nnx.Rngs(1)))

    @jax.jit
    def run(params, e):
        site = nnx.merge(graph, params)
        state = ends.begin(e)
        read, context = site.read(state)
        state = site.write(state, jnp.tanh(read), context)
        return ends.end(state).astype(jnp.float32).sum()

    rng = np.random.default_rng(0)
    for size in (0.0, 1e-3, 1e3, 1e6):
        e = jnp.asarray(size * rng.normal(size=(2, 3, 8)), dtype)
        for factor in (1.0, 1e3):
            drawn = jax.tree.map(
                lambda w: jnp.asarray(factor * rng.normal(size=w.shape), w.dtype), params
            )  # noqa: B023
            value, grads = jax.value_and_grad(run, (0, 1))(drawn, e)
            assert all(
                np.isfinite(np.asarray(leaf, np.float32)).all()
                for leaf in jax.tree.leaves((value, grads))
            )


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    for name, prefix in cases():
        for dtype in TOLERANCES:
            found = worst(name, prefix, dtype)
            values = max(v for k, v in found.items() if not k.startswith("grad"))
            grads = max(v for k, v in found.items() if k.startswith("grad"))
            print(f"{name:22s} {prefix:7s} {dtype}  values {values:.1e}  gradients {grads:.1e}")
