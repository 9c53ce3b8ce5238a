"""What pyproject.toml cannot say: kernels/ must stay a bare folder, since a package named `kernels` on the path breaks
transformers and diffusers, which probe a library of that name."""

from pathlib import Path

from setuptools import setup

if (Path(__file__).parent / "kernels" / "__init__.py").exists():
    raise SystemExit("kernels/__init__.py must not exist: a package named `kernels` breaks transformers and diffusers")

setup()
