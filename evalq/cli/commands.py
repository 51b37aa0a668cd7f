"""What each command does; `evalq.cli.main` reads the command line."""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evalq.data.windows import protocol_named
from evalq.errors import ModelError, SpecError
from evalq.files import read_json, write_atomic
from evalq.interpreters import versions
from evalq.machine import environment
from evalq.registry import ALIASES, backend, backend_names
from evalq.results.record import ResultRecord
from evalq.results.store import ResultDir, Store, default_root
from evalq.run.compare import compare as run_comparison
from evalq.run.outcome import with_reference
from evalq.run.process import RunSettings
from evalq.show import table
from evalq.show.progress import ConsoleReporter
from evalq.spec import DataSpec, ModelSpec, find_spec, find_specs, load_data_spec, load_model_specs


def compare(arguments: argparse.Namespace) -> int:
    """Score, print, draw. Exit code 0, or 1 when a model failed."""
    data = _data_spec(arguments)
    specs = _model_specs(arguments)
    _check_outputs(arguments)
    if arguments.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    store = Store(arguments.store or default_root())
    errors = Console(stderr=True)
    settings = RunSettings(arguments.offline, arguments.timeout, arguments.clear_cache, arguments.try_anyway)
    with ConsoleReporter(errors, len(specs), arguments.quiet) as reporter:
        records = run_comparison(data, specs, store, settings, reporter)
    _write(arguments, records, errors)
    if arguments.memory:
        _print_memory(records, errors)
    if arguments.plot or arguments.plot_file or arguments.show:
        _plot(arguments, records, errors)
    return 0 if all(record.status == "ok" for record in records) else 1


def _data_spec(arguments: argparse.Namespace) -> DataSpec:
    spec = load_data_spec(find_spec(arguments.dataspec))
    changes: dict[str, object] = {}
    if arguments.protocol is not None and arguments.protocol != spec.protocol:
        changes |= {"protocol": arguments.protocol, "eval_stride": None}
    if arguments.max_rows is not None:
        changes["max_rows"] = arguments.max_rows
    spec = spec.model_copy(update=changes)
    protocol_named(spec.protocol)
    return spec


def _model_specs(arguments: argparse.Namespace) -> list[ModelSpec]:
    specs = [spec for path in find_specs(arguments.modelspec) for spec in load_model_specs(path)]
    if arguments.mask is None:
        return specs
    masks = [mask.strip().upper() for mask in arguments.mask.split(";") if mask.strip()]
    kept = [spec for spec in specs if any(mask in spec.plain_label.upper() for mask in masks)]
    if not kept:
        labels = ", ".join(spec.plain_label for spec in specs)
        raise SpecError(f'-mask "{arguments.mask}" matches no label', f"labels: {labels}")
    return kept


def _check_outputs(arguments: argparse.Namespace) -> None:
    """A wrong output must not be found after a night of scoring."""
    if arguments.plot_file is not None and arguments.plot_file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SpecError(
            f"-o {arguments.plot_file}: unknown kind of picture", "name a .png, .svg or .pdf file"
        )
    for flag, name in (
        ("--json", arguments.json),
        ("--csv", arguments.csv),
        ("--markdown", arguments.markdown),
    ):
        if name in (None, "-"):
            continue
        try:
            Path(name).absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(f"{flag} {name}: cannot make its folder: {error.strerror}") from None
    if sum(name == "-" for name in (arguments.json, arguments.csv, arguments.markdown)) > 1:
        raise SpecError("only one of --json, --csv and --markdown can go to standard output")


def _write(arguments: argparse.Namespace, records: Sequence[ResultRecord], errors: Console) -> None:
    to_stdout = False
    for name, render in (
        (arguments.json, table.as_json),
        (arguments.csv, table.as_csv),
        (arguments.markdown, table.markdown),
    ):
        if name == "-":
            to_stdout = True
            sys.stdout.write(render(records))
        elif name is not None:
            write_atomic(Path(name), render(records).encode())
    if not arguments.quiet:
        table.print_table(records, errors if to_stdout else _output())
    else:
        for record in records:
            if record.error:
                message = f"evalq: {record.label}: {record.error.message} ({record.error.remedy})"
                print(message, file=sys.stderr)


def _print_memory(records: Sequence[ResultRecord], errors: Console) -> None:
    from evalq.vllm_memory.output import print_runs
    from evalq.vllm_memory.reader import runs_from_records

    print_runs(runs_from_records(records), errors)


def _output() -> Console:
    """Standard output; wide enough for the whole table where no terminal says otherwise."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def _plot(arguments: argparse.Namespace, records: Sequence[ResultRecord], errors: Console) -> None:
    try:
        from evalq.plots import scatter
    except ImportError as error:
        raise SpecError(f"cannot draw: {error}", 'pip install "evalq[plot]"') from None
    options = scatter.ChartOptions(
        title=arguments.title,
        x="vram" if arguments.vram else "bpw",
        max_x=arguments.max_x,
        max_y=arguments.max_y,
        dark=arguments.dark,
    )
    if not any(record.status == "ok" for record in records):
        errors.print("no chart: no model was scored", markup=False)
        return
    figure = scatter.draw(records, options)
    path = arguments.plot_file or _default_plot_file(arguments)
    scatter.save(figure, path)
    errors.print(f"chart: {path}", markup=False, highlight=False, soft_wrap=True)
    if arguments.show:
        scatter.show(figure)


def _default_plot_file(arguments: argparse.Namespace) -> Path:
    names = [Path(arguments.dataspec).stem, *(Path(name).stem for name in arguments.modelspec)]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(names)).strip("-")[:80]
    suffix = ("-vram" if arguments.vram else "") + ("-dark" if arguments.dark else "")
    return Path("plots") / "out" / f"{slug}{suffix}.png"


def results(arguments: argparse.Namespace) -> int:
    """What the store holds: one table per group of comparable results, then unfinished and failed ones."""
    store = Store(arguments.store or default_root())
    groups: dict[str, list[ResultRecord]] = {}
    others = Table(
        "model", "state", "key", title="unfinished or failed", title_justify="left", title_style="dim"
    )
    for result in store.results():
        record = _stored_record(result)
        if record is not None:
            groups.setdefault(json.dumps(record.comparison, sort_keys=True), []).append(record)
            continue
        identity, failure = (
            read_json(result.path / "identity.json") or {},
            read_json(result.path / "failure.json"),
        )
        done = len(set(result.parts().window.tolist()))
        state = f"{done}/{identity.get('windows', '?')} windows"
        if failure:
            state += f", {failure['category']}: {failure['message']}"
        others.add_row(str(identity.get("label", "?")), state, result.path.name[:12])
    compared = [with_reference(group, [], store) for group in groups.values()]
    if arguments.json:
        sys.stdout.write(table.as_json([record for group in compared for record in group]))
        return 0
    console = _output()
    for group in compared:
        table.print_table(group, console)
        console.print()
    if others.row_count:
        console.print(others)
    if not groups and not others.row_count:
        console.print(f"{store.root} holds no results yet", markup=False)
    return 0


def _stored_record(result: ResultDir) -> ResultRecord | None:
    """The record of a finished run; None when there is none, or another version of evalq wrote it."""
    try:
        return ResultRecord.model_validate(read_json(result.path / "record.json"))
    except ValidationError:
        return None


def backends(arguments: argparse.Namespace) -> int:
    """Every engine: what is installed, or what to install."""
    shown = Table("load_fn", "also", "engine", title_justify="left", box=SIMPLE_HEAD)
    for name in sorted(backend_names()):
        aliases = ", ".join(alias for alias, target in ALIASES.items() if target.backend == name)
        shown.add_row(name, aliases, _engine_state(name))
    console = _output()
    console.print(shown)
    if arguments.verbose:
        for name in sorted(backend_names()):
            with contextlib.suppress(ModelError):
                console.print(_options_table(name))
    return 0


def _engine_state(name: str) -> str:
    try:
        found, install = versions(name, _configured_python(name)), backend(name).INSTALL
    except ModelError as error:
        return f"[red]{escape(str(error))}[/]"
    if not found:
        return f"[yellow]not installed:[/] {escape(install)}"
    return ", ".join(f"{dist} {version}" for dist, version in found.items())


def _options_table(name: str) -> Table:
    options = Table(
        "option", "type", "meaning", title=f"options of {name}", title_justify="left", box=SIMPLE_HEAD
    )
    for key, option in backend(name).OPTIONS.items():
        options.add_row(key, escape(" | ".join(kind.__name__ for kind in option.kind)), escape(option.help))
    return options


def _configured_python(name: str) -> str | None:
    from evalq.spec.config import python_for

    return python_for(ModelSpec(load_fn=name, model_dir="."), name)


def env(arguments: argparse.Namespace) -> int:
    """The machine and its software."""
    engines = {}
    for name in sorted(backend_names()):
        with contextlib.suppress(ModelError):
            engines[name] = versions(name, _configured_python(name))
    found = environment() | {"engines": engines}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    shown = Table(show_header=False, box=None)
    for key, value in found.items():
        if key == "gpus":
            value = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in value) or "none visible"
        if key == "engines":
            value = "\n".join(
                f"{n}: " + ", ".join(f"{d} {v}" for d, v in e.items()) for n, e in value.items() if e
            )
        shown.add_row(key, str(value if value is not None else "–"))
    _output().print(shown)
    return 0
