"""Undo WikiText's tokenization the way lm-evaluation-harness' task `wikitext` does before it scores a page.

WikiText writes " , ", " @-@ " and "( word )"; the task turns them back. The rules, their order and their
quirks are the task's, because every one of them changes the token stream:
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/tasks/wikitext/preprocess_wikitext.py
"""

import re
from functools import reduce

# The task means to close "/' 5/" up, but writes its own pattern in place of the digit.
_SLASHED_DIGIT = re.compile(r"/' [0-9]/")
_SLASHED_DIGIT_BECOMES = "/'[0-9]/"

# Literal replacements before and after the paired marks; the order matters inside each table too.
_POSSESSIVE = ("s '", "s'")
_SPACING_BEFORE = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_SPACING_AFTER = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def _tight(opening: str, closing: str) -> re.Pattern[str]:
    """Match an opening mark to the next closing one, with the text between them bare of outer whitespace."""
    return re.compile(rf"({re.escape(opening)})\s*([^{re.escape(closing)}]*?)\s*({re.escape(closing)})")


# The text between two quotes is whatever stands between an odd and an even one, over line ends too.
_PAIRED_MARKS = tuple(_tight(*pair) for pair in ("()", "[]", "{}", '""', "''"))


def detokenize(page: str) -> str:
    """The page as lm-evaluation-harness scores it."""
    page = _SLASHED_DIGIT.sub(_SLASHED_DIGIT_BECOMES, page.replace(*_POSSESSIVE))
    page = reduce(lambda text, rule: text.replace(*rule), _SPACING_BEFORE, page)
    page = reduce(lambda text, pattern: pattern.sub(r"\1\2\3", text), _PAIRED_MARKS, page)
    return reduce(lambda text, rule: text.replace(*rule), _SPACING_AFTER, page)


def word_count(page: str) -> int:
    r"""Words of an original page as the task counts them: pieces between runs of whitespace.

    Whitespace at either end adds an empty piece, so a WikiText page counts two more than page.split() has.
    """
    return len(re.split(r"\s+", page))
