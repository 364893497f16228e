"The package's facts stand in settings.ini, which nbdev reads too; this hands them to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser()
cfg.read(here / "settings.ini", encoding="utf8")
c = cfg["DEFAULT"]
readme = here / "README.md"

setup(
    name=c["lib_name"],
    version=c["version"],
    license="Apache-2.0",
    description=c["description"],
    long_description=readme.read_text(encoding="utf8") if readme.exists() else c["description"],
    long_description_content_type="text/markdown",
    author=c["author"],
    author_email=c["author_email"],
    url=c["git_url"],
    keywords=c["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    python_requires=f">={c['min_python']}",
    packages=[*find_packages(include=["pcvae", "pcvae.*"]), "pcvae.published"],  # the last holds data files only
    package_data={"pcvae.published": ["*.csv"]},
    include_package_data=False,
    install_requires=c["requirements"].split(),
    extras_require={name: c[f"{name}_requirements"].split() for name in ("dev", "bench", "batch")},
    entry_points={"console_scripts": c["console_scripts"].split()},
    zip_safe=False,
)
