"""Data and model specs that ship with evalq; every file here is loaded by a test."""
