"""Kinds of command-line values, with the error that argparse shows."""

import argparse
import math


def count(text: str) -> int:
    """A whole number of 1 or more."""
    value = int(text)
    if not 1 <= value <= 2**53:
        raise argparse.ArgumentTypeError("should be 1 or more" if value < 1 else "is too large")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("should be more than 0")
    return value
