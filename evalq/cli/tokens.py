"""`evalq tokens`: where a model differs most from the reference."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evalq.cli.compare import add_store
from evalq.cli.config import add_config
from evalq.cli.numbers import count

if TYPE_CHECKING:
    from evalq.results.positions import By, Position
    from evalq.results.record import ResultRecord
    from evalq.results.store import Store
    from evalq.results.tokens import TokenColumns
    from evalq.run.decoding import Decoding
    from evalq.show.tokens import Reading

DESCRIPTION = """\
The scored tokens on which a model differs most from the reference, with the text before them, their
probability by both, and what each finds most probable. It reads the store: nothing is scored."""

EXAMPLES = """\
examples:
  evalq tokens INT4                         the 20 worst by KL divergence, else by the change of p
  evalq tokens INT4 -d wiki2.json -n 100    where INT4 was scored on several texts
  evalq tokens INT4 --by ln_ratio --json    for a script

exit code: 0, or 2 where there is no such result"""

_KEY = re.compile(r"[0-9a-f]{8,64}")
_MATCHES_SHOWN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("label", metavar="LABEL", help="of a stored result, or its key (8 digits or more)")
    add_store(parser)
    parser.add_argument(
        "-d", "--dataspec", metavar="SPEC", help="which of several texts: a data spec, or the text file"
    )
    parser.add_argument("-n", "--count", type=count, default=20, metavar="N", help="how many (default 20)")
    parser.add_argument(
        "--by",
        choices=("kld", "delta_p", "ln_ratio"),
        help="KL divergence, change of the token's p, or ln of the ratio (default: the first that is known)",
    )
    parser.add_argument("--json", action="store_true", help="all that is known of each position")
    add_config(parser)
    parser.add_argument("--offline", action="store_true", help="never use the network")


def run(arguments: argparse.Namespace) -> int:
    """Find the result, its reference and its tokens; print. Exit code 0."""
    import sys

    from evalq.errors import SpecError
    from evalq.results.positions import most_diverging, quantities, stream_of
    from evalq.results.store import Store, default_root, family_of
    from evalq.show.console import output
    from evalq.show.tokens import TokensReport, print_tokens, tokens_json

    root = arguments.store or default_root()
    if not root.is_dir():
        raise SpecError(f"{root} holds no results yet", "name another one with --store")
    store = Store(root, read_only=True)
    model, reference = _with_its_reference(_chosen(arguments, store), store)
    mine, theirs = _scores(model, store).beside(family_of(reference.identity)), _scores(reference, store)
    by = _quantity(arguments.by, quantities(mine), model)
    stream = stream_of(model, store)
    positions = most_diverging(mine, theirs, stream.ids_N, by, arguments.count)
    readings, why_ids = _read(positions, [reference, model], arguments.offline)
    report = TokensReport(model, reference, by, readings, why_ids)
    if arguments.json:
        sys.stdout.write(tokens_json(report))
    else:
        print_tokens(report, output())
    return 0


def _stored(store: "Store") -> "list[ResultRecord]":
    from evalq.results.record import read_record

    found = (read_record(result.path) for result in store.results())
    return [record for record in found if record is not None and record.status == "ok" and record.key]


def _chosen(arguments: argparse.Namespace, store: "Store") -> "ResultRecord":
    """The one result that LABEL and -d name. Raises SpecError for none and for several."""
    from evalq.errors import SpecError
    from evalq.spec.files import nearest

    records, label = _stored(store), arguments.label
    named = [record for record in records if record.label == label]
    if not named and _KEY.fullmatch(label):
        named = [record for record in records if str(record.key).startswith(label)]
    if not named:
        known = sorted({record.label for record in records})
        remedy = nearest(label, known) if known else "evalq results shows what is there"
        raise SpecError(f'{store.root} holds no result called "{label}"', remedy)
    if arguments.dataspec is not None:
        on_any = named
        named = _on(arguments, named, store)
        if not named:
            raise SpecError(f'"{label}" was not scored on {arguments.dataspec}', f"stored: {_listed(on_any)}")
    if len(named) > 1:
        raise SpecError(
            f'{len(named)} results are called "{label}": {_listed(named)}',
            "choose the text with -d, or name a key instead of the label",
        )
    return named[0]


def _listed(records: "Sequence[ResultRecord]") -> str:
    """What tells results of one label apart."""
    from evalq.results.record import windows_text

    shown = []
    for record in records[:_MATCHES_SHOWN]:
        facts, engine = record.comparison, record.engine_version or record.engine
        what = f"{facts.get('dataset')}, {record.protocol}, {windows_text(facts)}, {engine}"
        shown.append(f"{str(record.key)[:12]} ({what})")
    more = f", {len(records) - _MATCHES_SHOWN} more" if len(records) > _MATCHES_SHOWN else ""
    return ", ".join(shown) + more


def _on(
    arguments: argparse.Namespace, records: "Sequence[ResultRecord]", store: "Store"
) -> "list[ResultRecord]":
    """Those that were scored on the text of -d, with its windows."""
    from evalq.cli.given import data_spec
    from evalq.data.sources import load_text, settings_of

    spec = data_spec(arguments.dataspec)
    settings = settings_of(spec, ())
    asked = {
        "text_sha256": load_text(spec, store.texts, offline=True).sha256,
        "protocol": settings.name,
        "eval_len": settings.eval_len,
        "eval_stride": settings.stride,
    }
    same = [r for r in records if all(r.comparison.get(name) == value for name, value in asked.items())]
    if settings.max_rows:
        return [r for r in same if r.comparison.get("windows") == settings.max_rows] or same
    most = max((int(r.comparison.get("windows") or 0) for r in same), default=0)
    return [r for r in same if r.comparison.get("windows") == most]


def _with_its_reference(model: "ResultRecord", store: "Store") -> "tuple[ResultRecord, ResultRecord]":
    """A result and the one it was compared with last, else the reference of all on the same tokens."""
    from evalq.errors import SpecError
    from evalq.results.record import same_comparison
    from evalq.results.reference import choose_stored

    records = [r for r in _stored(store) if same_comparison(r.comparison, model.comparison) is None]
    against = model.against_reference
    if against is not None:
        found = next((r for r in records if r.key == against.key), None)
        if found is not None:
            return model, found
    chosen = choose_stored(records)
    found = next((r for r in records if chosen is not None and r.label == chosen.label), None)
    if found is None or found.key == model.key:
        others = sorted({record.label for record in records} - {model.label})
        what = "is itself the reference" if found is not None else "was not compared with a reference"
        remedy = f"compared with it: {', '.join(others)}" if others else "score it beside one: evalq compare"
        raise SpecError(f'"{model.label}" {what}', remedy)
    return model, found


def _scores(record: "ResultRecord", store: "Store") -> "TokenColumns":
    from evalq.errors import StoreError

    found = store.result(str(record.key)).scores()
    if found is None:
        raise StoreError(f'the scores of "{record.label}" cannot be read', "run the comparison again")
    return found


def _quantity(asked: "By | None", known: "Sequence[By]", model: "ResultRecord") -> "By":
    """What to order by. Raises SpecError where it was not measured."""
    from evalq.errors import SpecError

    if asked is None:
        return known[0]
    if asked not in known:
        bound = model.against_reference is not None and "kld_bound" in model.against_reference.metrics
        what = "has a lower bound of KL divergence only" if bound else "has no KL divergence"
        raise SpecError(f'"{model.label}" {what}', "take --by delta_p, or score it with evalq compare --kld")
    return asked


def _read(
    positions: "Sequence[Position]", records: "Sequence[ResultRecord]", offline: bool
) -> "tuple[list[Reading], str]":
    """Positions with their text, and why ids stand for it where they do."""
    from evalq.run.decoding import decoded
    from evalq.run.job import DecodePiece
    from evalq.show.tokens import Reading

    pieces = []
    for at in positions:
        guesses = [token for token in (at.reference_guess, at.model_guess) if token is not None]
        pieces.append(DecodePiece(before=at.before, tokens=(at.token, *guesses)))
    found: Decoding = decoded(pieces, records, offline)
    readings = []
    for at, text in zip(positions, found.pieces, strict=True):
        token, *guesses_left = text.tokens
        reference = guesses_left.pop(0) if at.reference_guess is not None else None
        own = guesses_left.pop(0) if at.model_guess is not None else None
        readings.append(Reading(at, text.before, token, reference, own))
    return readings, found.why_ids
