"""Engines, one module each; reached by name through `evalq.engine.registry`."""
