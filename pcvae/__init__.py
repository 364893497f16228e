"""Posterior collapse in VAEs: methods explained, papers rerun, numbers checked.

The names below are found on first use, so that `import pcvae` stays quick: torch is imported with the first of them.
"""
from importlib import import_module

__version__ = "0.1.0"

_home = dict(
    DiagGaussian="gaussian", VAE="models.vae", Method="method", Trained="method",
    Run="studies", Study="studies", run_study="studies",
    load="data", evaluate="metrics.evaluate", audit="metrics.audit", diagnose="diagnosis",
)


def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_home[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *_home})
