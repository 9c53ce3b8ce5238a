"""The version, which the package, its distributions and what a run writes take from here."""

__version__ = "0.1.0"
