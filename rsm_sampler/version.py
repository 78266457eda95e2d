"""The version, alone in a file so that any module may read it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
