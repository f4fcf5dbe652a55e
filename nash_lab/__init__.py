"New language-model papers as JAX notebooks; `nash_lab.load(run_dir)` opens a trained model."

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["load"]

# imported when first asked for: `import nash_lab` stays quick
_HOME = {"load": "nash_lab.lab.run", "Model": "nash_lab.lab.run"}


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'nash_lab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__():
    return sorted([*globals(), *_HOME])
