"""Broken inputs out of whole ones: bytes, text and JSON, each by a seeded random generator.

A mutator takes the generator and the whole inputs (seeds), and returns one new input. The hostile values are
those that broke readers before: numbers no format holds, numbers with two points, 400 and 5,000 digits, text
that nests, escapes of a terminal, half of a surrogate pair.
"""

import json
import re
from collections.abc import Sequence
from random import Random
from typing import Any

# The longest line, list or text that a mutator makes, so that an input stays below a few hundred kB.
REPEATED_BYTES_MAX = 200_000

_NUMBERS = (
    "0", "-1", "1", "3", "255", "65536", "10000000", "2147483648", "9223372036854775807",
    "9223372036854775808", "-9223372036854775809", "1e999", "-1e999", "1e-999", "0.1", "-0.0", "1.2.3",
    "1..2", ".", "-", ",", "1,2,3", "9" * 400, "9" * 5000, "0." + "0" * 400 + "1", "NaN", "nan", "inf",
    "Infinity", "-Infinity", "١٢٣", "²", "0x10", "1_000", "",
)  # fmt: skip
_WORDS = (
    "", " ", "\0", "a\0b", "~nouser", "/", "..", "../../etc/passwd", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07",
    "\r\n", "\n" * 50, "\u202e", "\ud800", "é" * 300, "None", "True", "null", "float99", "uint4", "FP8",
    "a|b", "=1+1", "[bold]", "{}", "%s", "(" * 300, "[[[", "'", '"', "x" * 300, "F8_E4M3", "bfloat16",
)  # fmt: skip
_DIGITS = re.compile(rb"\d+(?:\.\d+)?")
# json.dumps writes no integer of 5,000 digits: it stands as this text until the very end.
_LONG_INTEGER = "<an integer of 5,000 digits>"
_DEEP = "<a list in a list, 5,000 times>"


def mutate_bytes(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Flip, cut, insert, repeat and swap bytes of a seed, one to eight times."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.randint(1, 8)):
        _BYTE_CHANGES[random.randrange(len(_BYTE_CHANGES))](random, data, seeds)
    return bytes(data)


def mutate_text(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Change numbers, words and lines of a seed; now and then its bytes."""
    lines = random.choice(seeds).split(b"\n")
    for _ in range(random.randint(1, 6)):
        _LINE_CHANGES[random.randrange(len(_LINE_CHANGES))](random, lines)
    data = b"\n".join(lines)
    return mutate_bytes(random, [data]) if random.random() < 0.1 else data


def mutate_json(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Put hostile values into a JSON seed, drop, rename and copy parts of it; now and then break its text."""
    value = json.loads(random.choice(seeds))
    for _ in range(random.randint(1, 5)):
        value = _changed(random, value)
    text = json.dumps(value).replace(f'"{_LONG_INTEGER}"', "9" * 5000)
    data = text.replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000).encode()
    return mutate_bytes(random, [data]) if random.random() < 0.05 else data


def hostile_value(random: Random) -> Any:
    """A JSON value that a reader may not expect where it stands."""
    choices = (
        lambda: None,
        lambda: random.random() < 0.5,
        lambda: random.choice((0, -1, 1, 2, 3, 7, 10**7, 2**31, 2**63, -(2**63), 10**30, 10**400)),
        lambda: random.choice((0.0, -0.5, 0.5, 1e308, float("nan"), float("inf"), float("-inf"))),
        lambda: random.choice(_NUMBERS),
        lambda: random.choice(_WORDS),
        lambda: [],
        lambda: {},
        lambda: [hostile_value(random) for _ in range(random.randint(1, 4))],
        lambda: {random.choice(_WORDS): hostile_value(random)},
        lambda: [random.choice((0, 1, "a", None))] * random.choice((300, 20_000)),
        lambda: {str(i): i for i in range(random.choice((300, 20_000)))},
        lambda: random.choice("ax([") * random.choice((1000, REPEATED_BYTES_MAX)),
        lambda: random.choice((_LONG_INTEGER, _DEEP)),
    )
    return random.choice(choices)()


def _changed(random: Random, value: Any) -> Any:
    """The value with one change at a random place; where it holds nothing, another value."""
    places = list(_places(value))
    if not places or random.random() < 0.02:
        return hostile_value(random)
    holder, key = random.choice(places)
    action = random.random()
    if action < 0.6:
        holder[key] = hostile_value(random)
    elif action < 0.7:
        del holder[key]
    elif action < 0.8:
        other, other_key = random.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key]))  # a copy: no circles
    elif action < 0.9 and isinstance(holder, dict):
        holder[random.choice((*_WORDS, str(random.choice(places)[1])))] = holder.pop(key)
    elif isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * random.choice((-1, 2, 3, 1000, 10**6)) + random.choice((-1, 0, 1))
    else:
        holder[key] = random.choice(([holder[key]], {"a": holder[key]}, str(holder[key])))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))[:200]
            found += [(holder, key) for key in keys]
            waiting += [holder[key] for key in keys]
    return found


def _span(random: Random, data: bytearray) -> tuple[int, int]:
    begin = random.randint(0, len(data))
    return begin, min(len(data), begin + random.choice((1, 2, 8, 64, 1024)))


def _flip(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _cut(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    begin, end = _span(random, data)
    del data[begin:end]


def _end(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    del data[random.randint(0, len(data)) :]


def _insert(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    word = random.choice((*_NUMBERS, *_WORDS)).encode(errors="surrogatepass")
    begin = random.randint(0, len(data))
    data[begin:begin] = word


def _overwrite(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    """A length or an offset of 4 or 8 bytes, at the ends of its range."""
    width = random.choice((4, 8))
    number = random.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), random.getrandbits(16)))
    begin = random.randint(0, max(0, len(data) - width))
    data[begin : begin + width] = number.to_bytes(width, "little")


def _repeat(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    begin, end = _span(random, data)
    if end > begin:
        times = min(random.choice((2, 50, 100_000)), REPEATED_BYTES_MAX // (end - begin))
        data[begin:end] = bytes(data[begin:end]) * times


def _splice(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = random.choice(seeds)
    begin, from_ = random.randint(0, len(data)), random.randint(0, len(other))
    data[begin : begin + 1024] = other[from_ : from_ + 1024]


def _number(random: Random, lines: list[bytes]) -> None:
    """Another number for one that stands in a line."""
    i = random.randrange(len(lines))
    found = list(_DIGITS.finditer(lines[i]))
    if found:
        match = random.choice(found)
        number = random.choice(_NUMBERS).encode()
        lines[i] = lines[i][: match.start()] + number + lines[i][match.end() :]


def _word(random: Random, lines: list[bytes]) -> None:
    i = random.randrange(len(lines))
    at = random.randint(0, len(lines[i]))
    word = random.choice(_WORDS).encode(errors="surrogatepass")
    lines[i] = lines[i][:at] + word + lines[i][at + random.choice((0, 0, 5)) :]


def _drop_line(random: Random, lines: list[bytes]) -> None:
    if len(lines) > 1:
        del lines[random.randrange(len(lines))]


def _copy_line(random: Random, lines: list[bytes]) -> None:
    line = random.choice(lines)
    times = min(random.choice((1, 2, 2000)), 1 + REPEATED_BYTES_MAX // (len(line) + 1))
    at = random.randint(0, len(lines))
    lines[at:at] = [line] * times


def _long_line(random: Random, lines: list[bytes]) -> None:
    """A line that repeats a part of itself, as far as 200 kB."""
    i = random.randrange(len(lines))
    begin = random.randint(0, len(lines[i]))
    part = lines[i][begin : begin + random.choice((1, 1, 5, 40))] or b"a"
    longer = part * random.choice((100, REPEATED_BYTES_MAX // len(part)))
    lines[i] = lines[i][:begin] + longer + lines[i][begin:]


def _join_lines(random: Random, lines: list[bytes]) -> None:
    if len(lines) > 1:
        i = random.randrange(len(lines) - 1)
        lines[i : i + 2] = [lines[i] + random.choice((b"", b" ", b"\r")) + lines[i + 1]]


_BYTE_CHANGES = (_flip, _flip, _cut, _end, _insert, _overwrite, _repeat, _splice)
_LINE_CHANGES = (_number, _number, _number, _word, _drop_line, _copy_line, _long_line, _join_lines)
