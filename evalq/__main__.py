"""`python -m evalq` is the `evalq` command."""

from evalq.cli import run

run()
