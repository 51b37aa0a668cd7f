"""Kinds of command-line values, with the error that argparse shows."""

import argparse
import math

# About 30 years; what the system's clocks take ends at ten times that.
_SECONDS_MAX = 1e9


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


def share(text: str) -> float:
    """A part of 1 above 0 and below 1, such as 0.005, or in percent with its sign, such as 0.5%."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is neither a percentage such as 0.5% nor 0.005') from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} should be more than 0 and less than 100%")
    return value


def seconds(text: str) -> float:
    """A time in seconds, above 0."""
    value = positive(text)
    if value > _SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"should be {_SECONDS_MAX:,.0f} or less; leave it out for no limit")
    return value
