"Sinkhorn against the independent fixture of paper Eq. 9, in value and gradient, and under the transformations a model uses."

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nash_lab.maths.birkhoff import (
    birkhoff_residual,
    composite,
    gains,
    mixing_distances,
    permutations,
    sinkhorn,
    sinkhorn_leading,
)

CASES = [f"s{scale}_n{n}" for scale in (0.5, 1.0, 2.0, 4.0) for n in (2, 4, 8)]


def naive(logits, n_iters=20, eps=0.0):
    def once(_, m):
        m = m / (m.sum(-2, keepdims=True) + eps)
        return m / (m.sum(-1, keepdims=True) + eps)

    return jax.lax.fori_loop(0, n_iters, once, jnp.exp(logits))


def value_and_vjp(f):
    return jax.jit(lambda x, cot: (lambda h, vjp: (h, vjp(cot)[0]))(*jax.vjp(f, x)))


def weighted(logits):
    return (sinkhorn(logits) * jnp.sin(jnp.arange(16.0).reshape(4, 4)).astype(logits.dtype)).sum()


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 2e-5)])
def test_fixture(fixtures, dtype, tolerance):
    # values and gradients of the fixture lie within about 1, so the tolerance is absolute
    with jax.enable_x64(dtype == "float64"), np.load(fixtures / "sinkhorn_paper.npz") as file:
        for case in CASES:
            logits, h, cot, grad = (
                file[f"{case}_{part}"] for part in ("logits", "H", "cot", "grad")
            )
            ours, ours_grad = value_and_vjp(sinkhorn)(
                jnp.asarray(logits, dtype), jnp.asarray(cot, dtype)
            )
            assert ours.dtype == dtype
            np.testing.assert_allclose(ours, h, rtol=0, atol=tolerance, err_msg=case)
            np.testing.assert_allclose(ours_grad, grad, rtol=0, atol=tolerance, err_msg=case)


@pytest.mark.parametrize("n_iters", [1, 3, 20])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_gradient_is_that_of_the_naive_form(n_iters, eps):
    with jax.enable_x64(True):
        logits, cot = jax.random.normal(jax.random.key(0), (2, 60, 4, 4), jnp.float64)
        pairs = [value_and_vjp(lambda x, f=f: f(x, n_iters, eps)) for f in (sinkhorn, naive)]
        for scale in (0.3, 3.0, 15.0):
            (ours, grad), (theirs, grad_) = (pair(scale * logits, cot) for pair in pairs)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
            np.testing.assert_allclose(grad, grad_, rtol=0, atol=1e-13)
            assert abs(grad).max() > 1e-6


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize(
    "make",
    [
        lambda z: 1e4 * z,
        lambda z: 1e4 + z,
        lambda z: z - 1e4,
        lambda z: jnp.where(z > 0, 1e4, -1e4),
    ],
    ids=["wide", "high", "low", "two values"],
)
def test_huge_logits_stay_finite(make, eps):
    logits = make(jax.random.normal(jax.random.key(1), (200, 4, 4)))
    h, grad = (
        sinkhorn(logits, eps=eps),
        jax.grad(lambda x: (jnp.cos(x) * sinkhorn(x, eps=eps)).sum())(logits),
    )
    assert jnp.isfinite(h).all() and jnp.isfinite(grad).all()
    assert birkhoff_residual(h)[0] < 1e-4


def test_low_precision_input_is_computed_in_float32():
    logits = jax.random.normal(jax.random.key(2), (8, 4, 4)).astype(jnp.bfloat16)
    assert sinkhorn(logits).dtype == jnp.float32
    np.testing.assert_array_equal(sinkhorn(logits), sinkhorn(logits.astype(jnp.float32)))
    assert jax.grad(lambda x: sinkhorn(x)[..., 0].max())(logits).dtype == jnp.bfloat16


def test_layouts_and_transformations():
    logits = 2 * jax.random.normal(jax.random.key(3), (3, 5, 4, 4))
    grad = jax.jit(jax.grad(weighted))
    leading = sinkhorn_leading(jnp.moveaxis(logits, (-2, -1), (0, 1)))
    np.testing.assert_allclose(jnp.moveaxis(leading, (0, 1), (-2, -1)), sinkhorn(logits), atol=1e-6)
    plain = jnp.stack([jnp.stack([grad(x) for x in row]) for row in logits])
    under = jax.jit(jax.vmap(jax.vmap(jax.grad(jax.checkpoint(weighted)))))(logits)
    scanned = jax.lax.scan(lambda c, x: (c, jax.vmap(jax.grad(weighted))(x)), 0, logits)[1]
    np.testing.assert_allclose(under, plain, atol=1e-6)
    np.testing.assert_allclose(scanned, plain, atol=1e-6)


def test_backward_saves_only_the_logits():
    logits = jnp.zeros((4, 4, 64))
    _, vjp = jax.vjp(sinkhorn_leading, logits)
    saved = sum(x.size for x in jax.tree.leaves(vjp) if hasattr(x, "size"))
    assert 0 < saved <= logits.size


def test_one_stream_and_refusals():
    assert sinkhorn(jnp.full((3, 1, 1), 7.0)).tolist() == [[[1.0]]] * 3
    with pytest.raises(ValueError, match=r"found \(3, 4\)"):
        sinkhorn(jnp.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"found \(4,\)"):
        sinkhorn(jnp.zeros(4))
    with pytest.raises(ValueError, match=r"found \(3, 4\)"):
        sinkhorn_leading(jnp.zeros((3, 4, 2)))
    with pytest.raises(ValueError, match="n_iters=0"):
        sinkhorn(jnp.zeros((4, 4)), 0)
    with pytest.raises(ValueError, match="n=6"):
        permutations(6)


def test_depth_and_distances():
    h = sinkhorn(jax.random.normal(jax.random.key(4), (5, 7, 4, 4)))
    product = h[0]
    for layer in h[1:]:
        product = layer @ product
    np.testing.assert_allclose(composite(h)[-1], product, atol=1e-6)
    found = gains(composite(h))
    assert (
        found.row_max.shape == (5, 7)
        and abs(found.row_max - 1).max() < 1e-5
        and abs(found.row_min - 1).max() < 1e-5
    )
    assert (found.col_min <= 1 + 1e-6).all() and (found.col_max >= 1 - 1e-6).all()
    uniform, corners = jnp.full((1, 4, 4), 0.25), permutations(4)
    assert corners.shape == (24, 4, 4) and max(birkhoff_residual(corners)) == 0
    assert len({tuple(p.ravel().tolist()) for p in corners}) == 24
    to_identity, to_uniform = mixing_distances(uniform)
    np.testing.assert_allclose(to_uniform, 0, atol=1e-6)
    np.testing.assert_allclose(to_identity, 3**0.5, atol=1e-6)
    assert mixing_distances(corners)[0][0] == 0
