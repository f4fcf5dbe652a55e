"""A dense model that is given streams: the same logits at step 0, streams that part, one line for what cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nash_lab.adapt.streams import with_streams
from nash_lab.model.block import ModelConfig
from nash_lab.model.residuals import ResidualConfig
from nash_lab.model.transformer import LM


@pytest.fixture(scope="module")
def dense():
    "A plain model with heads that draft, so that their streams are tried too"
    lm = LM(ModelConfig.tiny(residual="plain", mtp="sequential", init_std=0.2, vocab_size=64))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 64)
    return lm, tokens, objective(lm, tokens), lm(tokens)


def objective(lm, tokens):
    return jax.jit(lambda tokens: lm.objective(tokens, jnp.roll(tokens, -1, 1))[1])(tokens)


@pytest.mark.parametrize("residual", ["hc", "frac", "mhc", "v4", "v41", "ihc", "wide"])
def test_logits_stay_and_streams_part(dense, residual):
    "Same logits and drafts; a gradient step moves the streams apart where the variant keeps whole streams"
    lm, tokens, terms, logits = dense
    ours = with_streams(lm, residual)
    np.testing.assert_allclose(ours(tokens), logits, atol=1e-5 * float(jnp.abs(logits).max()))
    found = objective(ours, tokens)
    np.testing.assert_allclose(found["mtp"], terms["mtp"], rtol=1e-5)
    assert ours.cfg.residual == residual and lm.cfg.residual == "plain"
    if residual in ("mhc", "v4", "ihc", "wide"):
        positions = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
        from nash_lab.model.block import run_stack

        state = run_stack(
            ours.cfg, ours.blocks, ours.ends.begin(ours.embed(tokens)), positions=positions
        )[0]
        apart = jnp.stack(state).std(0)
        assert float(apart.mean()) > 1e-4


@pytest.mark.parametrize(
    "residual, says", [("attnres", "expected one of hc, frac"), ("plainer", "expected one of")]
)
def test_no_such_start(dense, residual, says):
    with pytest.raises(ValueError, match=says):
        with_streams(dense[0], residual)


def test_only_a_plain_model(dense):
    ours = with_streams(dense[0], "wide", ResidualConfig(streams=2))
    with pytest.raises(ValueError, match="only a plain model"):
        with_streams(ours, "mhc")


def test_import_with_streams(tmp_path):
    "The flag of `hf import` gives a run with the logits of the folder; a variant without such a start is named before work"
    from nash_lab.adapt.hf import save_hf
    from nash_lab.lab.jobs import ImportJob
    from nash_lab.train.pretrain import load_run

    lm = LM(ModelConfig.tiny(residual="plain", init_std=0.2, vocab_size=64))
    save_hf(lm, tmp_path / "folder")
    ImportJob(str(tmp_path / "folder"), str(tmp_path / "run"), residual="wide")()
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 64)
    ours, _ = load_run(tmp_path / "run")
    assert ours.cfg.residual == "wide"
    np.testing.assert_allclose(ours(tokens), lm(tokens), atol=2e-5)
    with pytest.raises(ValueError, match="ImportJob.residual='attnres': expected one of plain, hc"):
        ImportJob(residual="attnres")
