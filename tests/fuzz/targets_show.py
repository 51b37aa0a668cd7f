"""What people see: records of any content in every table, a store of any content in `evalq results`."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

from fuzz.harness import Target
from fuzz.mutators import mutate_json
from pydantic import ValidationError
from result_records import against, failed, record, terminal

from evalq.cli.main import main
from evalq.errors import SpecError
from evalq.results.record import ResultRecord
from evalq.show import table

_RECORDS = [
    record("BF16", 9.87, layer_bpw=16.0, notes=["a note | with <b>"]),
    record("INT4 g128", 10.5, against_reference=against("BF16"), format="INT4 group 128"),
    failed("=EXL3 \x1b[2J"),
    record("per word", 20.0, word_ppl=55.0, comparison={"unit": "word", "protocol": "lm-eval"}),
]
_ORDERS = set(map(chr, (*range(10), *range(11, 32), *range(0x7F, 0xA0), 0x202E, 0x2066)))


def _show(data: bytes) -> None:
    """A list of records: on two terminals, as Markdown, as CSV, as JSON."""
    records = _read(data)
    records = [one.model_copy(update={"comparison": records[0].comparison}) for one in records]
    for columns in (40, 160):
        shown = terminal(lambda console: table.print_table(records, console), columns)
        assert not _ORDERS & set(shown), "a terminal would obey this"
    assert not _ORDERS & set(table.markdown(records))
    table.as_csv(records).encode()
    json.loads(table.as_json(records), parse_constant=_no_constant)


def _read(data: bytes) -> list[ResultRecord]:
    """Those that are records, at least one. Raises SpecError."""
    records = []
    try:
        for one in json.loads(data):
            with contextlib.suppress(ValidationError):
                records.append(ResultRecord.model_validate(one))
    except (ValueError, RecursionError, TypeError) as error:
        raise SpecError("no records") from error
    if not records:
        raise SpecError("no records")
    return records


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _results(data: bytes) -> None:
    """Every JSON file of a store's results at once."""
    with tempfile.TemporaryDirectory() as root:
        for number, names in enumerate((("record",), ("identity", "failure"), ("identity", "run"))):
            folder = Path(root) / "results" / f"{number:064x}"
            folder.mkdir(parents=True)
            (folder / "identity.json").write_text("{}")
            for name in names:
                (folder / f"{name}.json").write_bytes(data)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["results", "--store", root]) == 0
        assert not _ORDERS & set(out.getvalue()), "a terminal would obey this"
    if "cannot be read" in out.getvalue():
        raise SpecError("no record")


def _one_record() -> list[bytes]:
    facts = {"category": "oom_load", "message": "no memory", "windows": 5}
    return [json.dumps(one.model_dump() | facts).encode() for one in _RECORDS[:1]] + [
        json.dumps(_RECORDS[0].model_dump()).encode()
    ]


def _all_records() -> list[bytes]:
    return [json.dumps([one.model_dump() for one in _RECORDS]).encode()]


TARGETS = (
    Target("show.records", _all_records, _show, mutate_json),
    Target("show.results", _one_record, _results, mutate_json),
)
