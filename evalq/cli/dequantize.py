"""`evalq dequantize`."""

import argparse
import os
from pathlib import Path

DESCRIPTION = """\
Write a quantized checkpoint's weights as plain BF16 safetensors.

SRC is a checkpoint directory: compressed-tensors (INT4, INT8, FP8, NVFP4, MXFP4, MXFP8), DeepSeek FP8,
ModelOpt FP8 and NVFP4, AWQ, gpt-oss MXFP4. Tokenizer and config go along, the config without its
quantization. The weights pass through memory one shard at a time; DST appears when it is complete."""

EXAMPLES = """\
examples:
  evalq dequantize models/int4 models/int4-plain
  evalq dequantize models/awq models/awq-plain --dtype float16    in the precision AWQ computes in

exit code: 0 written, 2 nothing was written, and why"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", type=Path, metavar="SRC", help="directory of the quantized checkpoint")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to make; must not exist")
    add_dtype(parser, "default: bfloat16")


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare --dtype."""
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help=f"of the weights ({default}); what a checkpoint keeps in float32 stays",
    )


def run(arguments: argparse.Namespace) -> int:
    """Dequantize. Returns the exit code; raises EvalqError."""
    # compressed-tensors compiles helpers when it is imported, which costs more than it saves here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from evalq.convert.dequantize import dequantize
    from evalq.show.conversion import report, track

    written = dequantize(arguments.source, arguments.target, arguments.dtype, track)
    report(arguments.target, written)
    return 0
