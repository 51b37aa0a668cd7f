"""`--config`: the evalq.toml to use, for every command that looks engines up."""

import argparse
import os
from pathlib import Path


def add_config(parser: argparse._ActionsContainer) -> None:
    """Declare --config."""
    text = "evalq.toml with the engines' interpreters, which this command may then run (default: your own)"
    parser.add_argument("--config", type=Path, action=_UseConfig, metavar="FILE", help=text)


class _UseConfig(argparse.Action):
    """Keep it where every part of evalq looks, and the workers too."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Set the variable."""
        from evalq.spec.config import ENVIRONMENT_VARIABLE

        os.environ[ENVIRONMENT_VARIABLE] = str(values)
