"""evalq: which quantized version of a model keeps the most quality per bit and per GiB."""

from evalq.version import __version__

__all__ = ["__version__"]
