"What the guards cost: the loop beside a bare one, a save beside Orbax alone. Timings, so never part of `make test`."
import shutil, statistics, time
from contextlib import closing
from dataclasses import replace
import jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
import pytest
import test_faults
from nash_lab.model.transformer import ModelConfig
from nash_lab.train import checkpoint, pretrain as module
from nash_lab.train.checkpoint import Checkpoints
from nash_lab.train.guard import Guard, run_lock

cfg, shakespeare = test_faults.cfg, test_faults.shakespeare             # its fixtures
pytestmark = [pytest.mark.faults, pytest.mark.slow]

def test_guarded_loop_beside_a_bare_one(cfg, tmp_path, monkeypatch, capsys):
    "Tokens per second with lock, guard, watchdog, ledger, positions and the search for bad steps: at least 98 % of those without"
    from nash_lab.data.loader import LoaderConfig
    cfg = replace(cfg, run=str(tmp_path/'run'), steps=10_000, log_every=10, eval_every=10_000, checkpoint_every=10_000, val_bin='', accumulate=1,
                  model=ModelConfig.tiny(vocab_size=400, width=128, residual='plain', layers=2), loader=LoaderConfig(seq_len=64, batch_size=16))
    ratios, n = [], 60
    with run_lock(tmp_path/'run'), Guard(tmp_path/'run', watchdog_s=1800.) as guard, closing(Checkpoints(tmp_path/'run/checkpoints')) as points:
        mesh = module.make_mesh(cfg.mesh)
        job = module.start(cfg, module.open_data(cfg, mesh)[0], None, points, mesh)
        job.due, job.ledger = None, guard.ledger
        compiled = module.compile_step(job)
        monkeypatch.setattr(module, 'compile_step', lambda job: compiled)
        monkeypatch.setattr(module, 'save', lambda job: None)
        def bare():
            begin = time.monotonic()
            for i in range(n):
                job.state, metrics = compiled(job.state, module._next_batch(job), job.key)
                if i % 10 == 9: jax.device_get(metrics)
            return time.monotonic() - begin
        def guarded():
            job.cfg, job.step, job.since = replace(cfg, steps=n + 10), 10, []
            job.good, job.skipped, job.logged = module.Seen(10, 0, dict), 0, 10
            begin = time.monotonic()
            module.run_steps(job, lambda record: None, guard.signals)
            return time.monotonic() - begin
        bare(), guarded()
        for _ in range(12): ratios.append(bare() / guarded())
    ratio = statistics.median(ratios)
    with capsys.disabled(): print(f'\nguarded loop: {100 * ratio:.1f} % of the bare loop (median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f})')
    assert ratio >= .98

def test_manifest_beside_orbax_alone(tmp_path, monkeypatch, capsys):
    "A state of 120 million parameters with two moments, 1.44 GB, beside Orbax as it comes: what training waits for, and the whole save"
    rng, spent = np.random.default_rng(0), []
    state = {'model': {}, 'optimizer': {}}
    for i in range(30): state['model' if i < 10 else 'optimizer'][f'w{i}'] = jnp.asarray(rng.standard_normal((12, 1000, 1000), dtype=np.float32))
    jax.block_until_ready(state)
    real = checkpoint.write_manifest
    def timed(*args):
        begin = time.monotonic()
        real(*args)
        spent.append(time.monotonic() - begin)
    monkeypatch.setattr(checkpoint, 'write_manifest', timed)
    alone, waits, ours, waited = [], [], [], []
    orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    for i in range(3):
        begin = time.monotonic()
        orbax.save(tmp_path/f'alone{i}', args=ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in state.items()}))
        waits.append(time.monotonic() - begin)
        orbax.wait_until_finished()
        alone.append(time.monotonic() - begin)
        shutil.rmtree(tmp_path/f'alone{i}')
        with closing(Checkpoints(tmp_path/'run/points', keep=1)) as points:
            begin = time.monotonic()
            with run_lock(tmp_path/'run'): points.save(i, state)
            waited.append(time.monotonic() - begin)
            points.wait()
            ours.append(time.monotonic() - begin)
        shutil.rmtree(tmp_path/'run/points')
    show = lambda times: ', '.join(f'{o:.2f}' for o in times)
    with capsys.disabled(): print(f'\nsave of 1.44 GB: training waits {show(waits)} s for Orbax alone, {show(waited)} s with lock and manifest; the whole save {show(alone)} s and {show(ours)} s, of which the manifest {show(spent)} s')
    assert min(waited) - min(waits) < .05 * min(alone) and min(ours) < 1.05 * min(alone)
