"""Data sets by name: `load("gmm")`; `sources()` lists them, `fetch(name)` downloads what is missing."""
from pcvae.data.core import Dataset, fetch, load, sources
from pcvae.data import images, synthetic, text  # importing a module registers its loaders
