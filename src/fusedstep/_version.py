"""The version, for the package, its builds and its checkpoints."""

__version__ = "0.1.0"
