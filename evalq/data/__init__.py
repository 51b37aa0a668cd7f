"""Texts that ship with evalq."""
