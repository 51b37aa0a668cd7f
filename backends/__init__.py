"""Engines, one module each; reached by name through `evalq.registry`."""
