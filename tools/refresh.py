"Run notebooks on the CPU from top to bottom, each in a fresh kernel, and store what they show."

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["IN_TEST"] = "1"  # `nbdev_export()` in a page does nothing
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from pages import ROOT, directives, notebooks, quick_compile, same_text, text_outputs

ENV = dict(  # as in tests/conftest.py, which compares what is stored with what it sees
    JAX_PLATFORMS="cpu",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    XLA_FLAGS=quick_compile(),
)


class Client(NotebookClient):
    "Runs every cell but those with a flag of `skip` or `#| eval: false`; their stored output stays."

    skip = frozenset()

    async def async_execute_cell(self, cell, *args, **kwargs):
        flags = directives(cell.source) if cell.cell_type == "code" else {}
        if (
            flags.get("eval") == "false"
            or self.skip & flags.keys()
            or "nbdev_export(" in cell.source
        ):
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def run(path: Path, skip: set):
    "The notebook at `path` with fresh outputs, cleaned as `nbdev_clean` does it; raises CellExecutionError."
    cfg = get_config(path=ROOT)
    nb = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    client = Client(
        nb,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources=place,
        extra_arguments=["--log-level=ERROR"],
    )
    client.skip = skip
    client.execute()
    clean_nb(nb, False, cfg.allowed_metadata_keys.split(), cfg.allowed_cell_metadata_keys.split())
    return nb


def changes(before, after) -> list[str]:
    "The cells whose text output differs by more than the last digits, old and new."
    rows = []
    for i, (old, new) in enumerate(zip(before.cells, after.cells)):
        stored, fresh = text_outputs(old), text_outputs(new)
        if not same_text(stored, fresh):
            rows.append(f"cell {i}\n  stored: {stored}\n  fresh:  {fresh}")
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    p.add_argument(
        "--with",
        dest="also",
        nargs="+",
        default=[],
        metavar="FLAG",
        help="also run cells flagged slow, gpu or tpu",
    )
    p.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail when a stored output differs from a fresh one",
    )
    args = p.parse_args()
    if not {"gpu", "tpu", "slow"} & set(args.also):
        os.environ.update(ENV)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    skip = set(get_config(path=ROOT).tst_flags.split()) - set(args.also)
    bad = 0
    for path in args.notebooks or notebooks():
        start = time.monotonic()
        name = path.resolve().relative_to(ROOT)
        before = nbformat.read(path, as_version=4)
        try:
            nb = run(path.resolve(), skip)
        except CellExecutionError as error:
            print(f"{name}: failed\n{error}", file=sys.stderr)
            bad += 1
            continue
        rows = changes(before, nb)
        print(
            f"{name}: {time.monotonic() - start:.0f} s" + (", outputs changed" if rows else ""),
            flush=True,
        )
        if args.check:
            bad += bool(rows)
            print("\n".join(rows), end="\n" if rows else "")
        else:
            nbformat.write(nb, path)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
