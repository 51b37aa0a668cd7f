"""`python -m evalq` is the `evalq` command."""

from evalq.cli.main import run

run()
