"""`python kernels/assemble.py OUT_DIR`: writes the kernels as a kernel repository, as Hugging Face's `kernels` loads it.

    OUT_DIR/build/README.md                           the card of the repository
    OUT_DIR/build/torch-cuda/metadata.json            name, version, and what the operations and the module are registered as
                             __init__.py              the public names
                             pdfast_kernels/          the package, with relative imports
                             pdfast_kernels/configs/  its launch configurations, a file per architecture
    OUT_DIR/build/torch-cpu/...                       the same, where torch is built without CUDA

The id in metadata.json ends with a hash of the files: torch.ops has room for each version that a process loads, and for an installed
package beside them.
"""

import argparse
import base64
import hashlib
import json
import re
import runpy
import sys
from pathlib import Path

import pdfast_kernels
from pdfast_kernels.runtime.configs import ANY, UNBOUNDED, Row, Table, kernel_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kernels" / "pdfast_kernels"
BACKENDS = ("cpu", "cuda")
INIT = '''"""{}"""

from .pdfast_kernels import *

__all__ = {}
'''
CARD = """---
library_name: kernels
license: apache-2.0
---

# pdfast-kernels

Fused Triton kernels for diffusion models and their distillation, and `accelerate`, which puts them into a model.

```python
from kernels import get_kernel

kernels = get_kernel("OWNER/pdfast-kernels", version={version}, trust_remote_code=True)
print(kernels.accelerate(model))
y = kernels.group_norm(x, 32, weight, bias, silu=True)
```

The public names are {names}. The operations run in Triton on a GPU of compute capability 8.0 or newer, and in PyTorch elsewhere.
"""


def with_relative_imports(text: str, depth: int) -> str:
    """Return the text of a module, `depth` folders below the package, that imports the package by dots."""
    return re.sub(r"^from pdfast_kernels\b\.?", f"from {'.' * (depth + 1)}", text, flags=re.MULTILINE)


def encoded(row: Row) -> dict[str, object]:
    """Return a row of a table as JSON has it."""
    return {
        field: None if value == UNBOUNDED else kernel_name(value) if callable(value) else value
        for field, value in row._asdict().items()
    }


def configurations() -> dict[str, str]:
    """Return the files of launch configurations by their names: all tables of the package."""
    modules = [module for name, module in sys.modules.items() if name.startswith("pdfast_kernels.")]
    tables = {value.name: value for module in modules for value in vars(module).values() if isinstance(value, Table)}
    files: dict[str, list[str]] = {}
    for name, table in sorted(tables.items()):
        for arch, rows in table.rows.items():
            file = f"configs/{'any' if arch == ANY else f'sm_{arch}'}.json"
            lines = ",\n".join(f"  {json.dumps(encoded(row))}" for row in rows)
            files.setdefault(file, []).append(f" {json.dumps(name)}: [\n{lines}\n ]")
    return {file: "{\n" + ",\n".join(lists) + "\n}\n" for file, lists in files.items()}


def package() -> dict[str, str]:
    """Return the files of the package by their paths in it."""
    files = {}
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix == ".py" or path.name == "py.typed":
            inside = path.relative_to(PACKAGE)
            files[inside.as_posix()] = with_relative_imports(path.read_text(encoding="utf-8"), len(inside.parts) - 1)
    return files | configurations()


def write_variant(folder: Path, backend: str, files: dict[str, str], version: int) -> None:
    """Write the package for one backend of torch."""
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    identity = f"_pdfast_kernels_{backend}_{content}"
    namespace = files["runtime/namespace.py"].replace('= "pdfast_kernels"', f'= "{identity}"')
    init = INIT.format(pdfast_kernels.__doc__, json.dumps(pdfast_kernels.__all__, indent=4))
    written = {f"pdfast_kernels/{name}": text for name, text in (files | {"runtime/namespace.py": namespace}).items()}
    written |= {"__init__.py": init, "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8")}
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in written.items()
    }
    metadata = {
        "id": identity,
        "name": "pdfast-kernels",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    for name, text in (written | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def assemble(folder: Path) -> None:
    """Write the repository into a folder."""
    version = int(runpy.run_path(str(ROOT / "pdfast/io/version.py"))["__version__"].partition(".")[0])
    files = package()
    for backend in BACKENDS:
        write_variant(folder / "build" / f"torch-{backend}", backend, files, version)
    names = ", ".join(f"`{name}`" for name in pdfast_kernels.__all__)
    (folder / "build" / "README.md").write_bytes(CARD.format(version=version, names=names).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser("assemble.py", description="Write the kernels as a kernel repository.")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="a new folder, or an empty one")
    given = parser.parse_args().folder
    if given.exists() and (not given.is_dir() or any(given.iterdir())):
        parser.error(f"{given} is not empty: give a new folder")
    assemble(given)
