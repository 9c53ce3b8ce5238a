"""What pip does not refuse: two distributions that have the same files."""

from pathlib import Path

from pdfast.io.errors import UsageError


def check_owner_of_kernels(folder: Path) -> None:
    """Raise a UsageError if the distribution pdfast-kernels is installed in `folder`, where pdfast lies.

    pdfast has the files of pdfast_kernels too. Of two such distributions pip lets the later one overwrite them, and removes them
    with either one.
    """
    if any(folder.glob("pdfast_kernels-*.dist-info")):
        raise UsageError(
            f"pdfast and pdfast-kernels are both installed in {folder}, and pdfast has the kernels: pip uninstall pdfast-kernels, "
            "then pip install --force-reinstall --no-deps pdfast"
        )
