"Run notebooks on the CPU from top to bottom, each in a fresh kernel, and store what they show."
import argparse, difflib, os, sys, time
os.environ['IN_TEST'] = '1'                       # `nbdev_export()` in a page does nothing
from hashlib import sha256
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives
from pages import ROOT, notebooks

ENV = dict(JAX_PLATFORMS='cpu', JAX_NUMPY_RANK_PROMOTION='raise', JAX_NUMPY_DTYPE_PROMOTION='strict',
           JAX_COMPILATION_CACHE_DIR=str(ROOT/'.jax_cache'), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')

class Client(NotebookClient):
    "Runs every cell but those with a flag of `skip` or `#| eval: false`; their stored output stays"
    skip = frozenset()
    async def async_execute_cell(self, cell, *args, **kwargs):
        flags = extract_directives(cell, remove=False) if cell.cell_type == 'code' else {}
        if flags.get('eval:') == ['false'] or self.skip & flags.keys() or 'nbdev_export(' in cell.source: return cell
        return await super().async_execute_cell(cell, *args, **kwargs)

def run(path: Path, skip: set):
    "The notebook at `path` with fresh outputs, cleaned as `nbdev_clean` does it; raises CellExecutionError"
    cfg, nb = get_config(path=ROOT), nbformat.read(path, as_version=4)
    client = Client(nb, timeout=None, record_timing=False, coalesce_streams=True,
                    resources={'metadata': {'path': str(path.parent)}}, extra_arguments=['--log-level=ERROR'])
    client.skip = skip
    client.execute()
    clean_nb(nb, False, cfg.allowed_metadata_keys.split(), cfg.allowed_cell_metadata_keys.split())
    return nb

def shown(nb) -> list[str]:
    "Every line a reader sees as output, pictures by their digest"
    lines = []
    for i, c in enumerate(nb.cells):
        for o in c.get('outputs', ()):
            data = o.get('data', {'text/plain': o.get('text', '')})
            for k, v in sorted(data.items()):
                lines += [f'cell {i}: {s}' for s in (v.splitlines() if k.startswith('text') else [f'{k} {sha256(str(v).encode()).hexdigest()[:12]}'])]
    return lines

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebooks', nargs='*', type=Path, help='default: all')
    p.add_argument('--with', dest='also', nargs='+', default=[], metavar='FLAG', help='also run cells flagged slow, gpu or tpu')
    p.add_argument('--check', action='store_true', help='write nothing; fail when a stored output differs from a fresh one')
    args = p.parse_args()
    if not {'gpu', 'tpu'} & set(args.also): os.environ.update(ENV)
    skip, bad = set(get_config(path=ROOT).tst_flags.split()) - set(args.also), 0
    for path in args.notebooks or notebooks():
        start, name = time.monotonic(), path.resolve().relative_to(ROOT)
        before = shown(nbformat.read(path, as_version=4))
        try: nb = run(path.resolve(), skip)
        except CellExecutionError as e:
            print(f'{name}: failed\n{e}', file=sys.stderr)
            bad += 1
            continue
        diff = list(difflib.unified_diff(before, shown(nb), 'stored', 'fresh', lineterm='', n=0))
        print(f'{name}: {time.monotonic() - start:.0f} s' + (', outputs changed' if diff else ''), flush=True)
        if args.check: bad += bool(diff); print('\n'.join(diff), end='\n' if diff else '')
        else: nbformat.write(nb, path)
    sys.exit(bad > 0)

if __name__ == '__main__': main()
