"""`evalq merge-lora`."""

import argparse
import os
from pathlib import Path

from evalq.cli.dequantize import add_dtype

DESCRIPTION = """\
Merge a LoRA adapter into its base and write the result as plain safetensors.

BASE is a checkpoint directory, dense or quantized (it is dequantized on the way, as by evalq dequantize);
ADAPTER is a PEFT directory. An adapter that was trained for another model is refused with the layer and the
shapes that differ, one with more than LoRA on linear layers (DoRA, trained biases, ...) with its feature."""

EXAMPLES = """\
examples:
  evalq merge-lora models/bf16 adapters/mine models/merged
  evalq merge-lora models/int4 adapters/mine models/merged        the INT4 weights, dense, plus the adapter

exit code: 0 written, 2 nothing was written, and why"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("base", type=Path, metavar="BASE", help="directory of the base checkpoint")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="PEFT directory of the adapter")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to make; must not exist")
    add_dtype(parser, "default: the base's own, bfloat16 for a quantized one")


def run(arguments: argparse.Namespace) -> int:
    """Merge. Returns the exit code; raises EvalqError."""
    # compressed-tensors compiles helpers when it is imported, which costs more than it saves here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from evalq.convert.merge import merge_lora
    from evalq.show.conversion import report, track

    written = merge_lora(arguments.base, arguments.adapter, arguments.target, arguments.dtype, track)
    report(arguments.target, written)
    return 0
