"""`evalq compare`, and `compare.py`: score models on texts, show them in a table and charts."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evalq.cli.charts import drawing
from evalq.cli.config import add_config
from evalq.cli.numbers import count, positive, seconds, share

if TYPE_CHECKING:
    from rich.console import Console

    from evalq.results.record import ResultRecord
    from evalq.results.speed import SpeedSettings
    from evalq.results.store import Store
    from evalq.results.tokens import TokenColumns
    from evalq.spec import DataSpec, ModelSpec

# As in evalq.data.protocols, whose import is too slow for --help.
PROTOCOL_NAMES = ("exllamav3", "qbench", "hf-strided", "gptq", "llama.cpp", "lm-eval", "long", "chat")

DESCRIPTION = """\
Score quantized models on one text, or several, and compare perplexity per bit.

Each model runs in a process of its own; one that fails is reported and the others go on. Results are kept:
the same command again shows them at once, and a run that was interrupted continues where it was. Every model
is also compared, token by token, with a reference: the unquantized model where there is one."""

EXAMPLES = """\
examples:
  %(prog)s -d sample.json -m bf16.json int4.json -p        a first comparison, without WikiText-2
  %(prog)s -d wiki2.json -m nvfp4.json exl3.json -p        WikiText-2, chart in plots/out/
  %(prog)s -d wiki.test.raw -m bf16/ a.gguf owner/name     no specs: a text, a folder, a file, a hub name
  %(prog)s -d wiki2.json -m my/*.json --markdown           your own models, as a table for a README
  %(prog)s -d wiki2.json -m gguf.json --protocol llama.cpp  the windows of llama-perplexity
  %(prog)s -d wiki2.json -m exl3.json -p -v -dark          GiB instead of bits per weight, dark
  %(prog)s -d wiki2.json -m bf16/ *.gguf --chart-speed     tokens per second beside quality, and as a chart
  %(prog)s -d wiki2.json -m bf16/ Q4_K_M.gguf -kld         KL divergence from bf16/ instead of perplexity
  %(prog)s -d wiki2 sample-code mine.txt -m bf16/ a.gguf   several texts: a column each, and their mean

a data spec:
  {"dataset": "text", "path": "my.txt", "protocol": "gptq", "eval_len": 2048}
a model spec, or a list of these:
  {"load_fn": "hf", "label": "INT4 g128", "model_dir": "models/int4"}

A spec without a path that is not in this folder is looked up among the shipped ones (evalq/specs).
"evalq backends -v" lists load_fn and the options of each engine.

exit code: 0 all scored, 1 some model failed, 2 bad usage, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line: what to score, the chart, the output, how to run."""
    _add_what(parser.add_argument_group("what to score"))
    _add_chart(parser.add_argument_group("chart"))
    _add_output(parser.add_argument_group("output"))
    _add_how(parser.add_argument_group("how to run"))
    _add_speed(parser.add_argument_group("speed"))


def _add_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "-d",
        "--dataspec",
        required=True,
        nargs="+",
        metavar="SPEC",
        help="data specs (JSON), names of shipped ones (wiki2, sample-code) or text files; each model is "
        "loaded once and scored on all of them",
    )
    what.add_argument(
        "-m",
        "--modelspec",
        required=True,
        nargs="+",
        metavar="SPEC",
        help="model specs (JSON), model folders, GGUF files, owner/name[@revision] on the hub; wildcards too",
    )
    what.add_argument(
        "--engine", metavar="NAME", help="for models named without a spec (default: by their files)"
    )
    what.add_argument("-mask", "--mask", metavar='"A;B"', help="only models whose label contains A or B")
    what.add_argument(
        "--protocol",
        metavar="NAME",
        help="instead of the data spec's, with its own stride: " + ", ".join(PROTOCOL_NAMES),
    )
    what.add_argument(
        "--eval-len",
        type=count,
        metavar="L",
        help="tokens per window, instead of the data spec's (long takes 8192 without it)",
    )
    what.add_argument(
        "--reference",
        metavar="LABEL",
        help="compare the others with it (default: the unquantized model)",
    )
    what.add_argument(
        "--per-byte",
        action="store_true",
        help="bits per byte instead of perplexity, each model with its own tokenizer (docs/sources.md)",
    )
    what.add_argument("--max-rows", type=count, metavar="N", help="at most N windows, for a quick look")


def _add_chart(plot: argparse._ArgumentGroup) -> None:
    plot.add_argument("-p", "--plot", action="store_true", help="draw bits per weight against perplexity")
    plot.add_argument(
        "-o", "--plot-file", type=Path, metavar="FILE", help="png, svg or pdf (default: in plots/out/)"
    )
    plot.add_argument("-t", "--title", metavar="TEXT", help="title of the chart")
    x = plot.add_mutually_exclusive_group()
    x.add_argument(
        "-v", "--vram", action="store_true", help="x is GiB of layers and head, not bits per weight"
    )
    x.add_argument("--kv-bits", action="store_true", help="x is bits per element of the KV cache")
    plot.add_argument(
        "-kld",
        "--chart-kld",
        action="store_true",
        help="--kld, and a chart of the mean KL divergence from the reference instead of perplexity",
    )
    plot.add_argument(
        "--chart-mean",
        action="store_true",
        help="with several texts: one chart of the means over them instead of one for each",
    )
    plot.add_argument(
        "--by-position",
        action="store_true",
        help="x is the position in the window: a line a model (docs/long-context.md)",
    )
    plot.add_argument(
        "--chart-speed",
        nargs="?",
        const="one",
        choices=("one", "batch"),
        metavar="batch",
        help="--speed, and x is new tokens per second of one prompt, or of a batch, with the Pareto frontier",
    )
    plot.add_argument("-mx", "--max_x", type=float, metavar="X", help="leave out points right of X")
    plot.add_argument("-my", "--max_y", type=float, metavar="Y", help="leave out points above Y")
    plot.add_argument("-dark", "--dark", action="store_true", help="chart with a dark background")
    plot.add_argument("--show", action="store_true", help="open a window as well, where there is a display")


def _add_output(out: argparse._ArgumentGroup) -> None:
    out.add_argument("--json", metavar="FILE", help="all that is known of each model; - for standard output")
    out.add_argument("--csv", metavar="FILE", help="one line per model; - for standard output")
    out.add_argument(
        "--markdown", nargs="?", const="-", metavar="FILE", help="a table for a README (default: -)"
    )
    out.add_argument(
        "--significance",
        action="store_true",
        help="matrices of all pairs: which of the models differ; in --json and --csv too",
    )
    out.add_argument(
        "--resolve",
        type=share,
        metavar="0.5%",
        help="how many windows it takes to know each perplexity's ratio to the reference's within ± 0.5%%",
    )
    out.add_argument(
        "--positions",
        action="store_true",
        help="perplexity by position in the window, 0-1k, 1k-2k, 2k-4k, ...; with --kld the divergence too",
    )
    out.add_argument("--memory", action="store_true", help="a second table: where each model's memory went")
    out.add_argument(
        "-q", "--quiet", action="store_true", help="no progress, no table; failures on standard error"
    )


def _add_how(how: argparse._ArgumentGroup) -> None:
    add_store(how)
    how.add_argument(
        "-cc",
        "--clear_cache",
        action="store_true",
        help="score these models on this data again, although they are stored",
    )
    how.add_argument(
        "--kld",
        action="store_true",
        help="KL divergence from the reference, over the whole vocabulary (docs/divergence.md)",
    )
    how.add_argument(
        "--noise-floor",
        action="store_true",
        help="--kld, and the reference once more with every layer's output times (1 + 2**-9 normal): "
        "what rounding alone may do",
    )
    how.add_argument(
        "--reference-max-gb",
        type=positive,
        default=50.0,
        metavar="GB",
        help="with --kld: the most that the store keeps of the reference on each text (default 50)",
    )
    how.add_argument("--timeout", type=seconds, metavar="S", help="give a model up after S seconds")
    how.add_argument(
        "--try-anyway", action="store_true", help="start engines that are predicted to run out of memory too"
    )
    add_config(how)
    how.add_argument("--offline", action="store_true", help="never use the network")


def _add_speed(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--speed",
        action="store_true",
        help="time each model too: generating one prompt and a batch, first token, scoring (docs/speed.md)",
    )
    group.add_argument(
        "--speed-batch", type=count, metavar="N", help="prompts of the batch (default: 32 with a GPU, else 4)"
    )
    group.add_argument(
        "--speed-prompt", type=count, default=512, metavar="N", help="tokens of a prompt (default 512)"
    )
    group.add_argument(
        "--speed-new", type=count, default=128, metavar="N", help="tokens generated after it (default 128)"
    )
    group.add_argument(
        "--speed-repeats", type=count, default=3, metavar="N", help="times that each is measured (default 3)"
    )


def add_store(parser: argparse._ActionsContainer) -> None:
    """Declare --store."""
    text = "folder of results (default: $EVALQ_STORE, else the user's data folder)"
    parser.add_argument("--store", type=Path, metavar="DIR", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Score, print, draw. Exit code 0, or 1 when a model failed."""
    import os

    from rich.console import Console

    from evalq.results.store import Store, default_root
    from evalq.run.compare import compare
    from evalq.run.process import RunSettings
    from evalq.show.progress import ConsoleReporter

    arguments.kld = arguments.kld or arguments.noise_floor or arguments.chart_kld
    data = [_data_spec(name, arguments) for name in arguments.dataspec]
    _check_per_byte(arguments, data)
    specs = _model_specs(arguments)
    speed = _speed_settings(arguments)
    draw = drawing(arguments)
    _check_outputs(arguments)
    if arguments.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    store = Store(arguments.store or default_root())
    errors = Console(stderr=True)
    settings = RunSettings(
        offline=arguments.offline,
        timeout_seconds=arguments.timeout,
        clear_cache=arguments.clear_cache,
        try_anyway=arguments.try_anyway,
        reference=arguments.reference,
        kld=arguments.kld,
        noise_floor=arguments.noise_floor,
        reference_most_bytes=int(arguments.reference_max_gb * 10**9),
        per_byte=arguments.per_byte,
        speed=speed,
    )
    n_models = len(specs) + arguments.noise_floor
    with ConsoleReporter(errors, n_models, arguments.quiet) as reporter:
        records = compare(data, specs, store, settings, reporter)
    _print(arguments, records, errors)
    _write(arguments, _with_statistics(arguments, records, store, errors))
    if draw is not None:
        draw(records, errors)
    return 0 if all(record.status == "ok" for record in records) else 1


def _speed_settings(arguments: argparse.Namespace) -> "SpeedSettings | None":
    """What to time, None where nobody asks for it. Raises SpecError for sizes that cannot be."""
    if not arguments.speed and arguments.chart_speed is None:
        return None
    from evalq.run.speed import speed_settings

    return speed_settings(
        batch=arguments.speed_batch,
        new_tokens=arguments.speed_new,
        prompt_tokens=arguments.speed_prompt,
        repeats=arguments.speed_repeats,
    )


def _check_per_byte(arguments: argparse.Namespace, data: "Sequence[DataSpec]") -> None:
    """Raise SpecError for what needs the same tokens for all models."""
    from evalq.errors import SpecError

    if not arguments.per_byte:
        return
    of_tokens = {
        "--kld": arguments.kld,
        "--significance": arguments.significance,
        "--resolve": arguments.resolve is not None,
        "--positions": arguments.positions,
        "--by-position": arguments.by_position,
    }
    for flag, given in of_tokens.items():
        if given:
            raise SpecError(f"--per-byte and {flag} exclude each other", f"{flag} compares the same tokens")
    for spec in data:
        if spec.tokenizer_dir is not None:
            raise SpecError(
                '--per-byte: the data spec has a "tokenizer_dir", one for all models',
                "remove it: each model reads its own tokenizer's tokens",
            )


def _data_spec(name: str, arguments: argparse.Namespace) -> "DataSpec":
    from evalq.cli.given import data_spec
    from evalq.data.windows import protocol_named
    from evalq.errors import SpecError

    spec = data_spec(name)
    changes: dict[str, object] = {}
    if arguments.protocol is not None and arguments.protocol != spec.protocol:
        changes |= {"protocol": arguments.protocol, "eval_stride": None}
        if arguments.protocol == "long":
            changes["eval_len"] = None
    if arguments.eval_len is not None:
        changes["eval_len"] = arguments.eval_len
    if arguments.max_rows is not None:
        changes["max_rows"] = arguments.max_rows
    spec = spec.model_copy(update=changes)
    protocol_named(spec.protocol)
    if spec.wrong_protocol is not None:
        raise SpecError(f"--protocol {spec.protocol}: {spec.wrong_protocol}")
    return spec


def _model_specs(arguments: argparse.Namespace) -> "list[ModelSpec]":
    from evalq.cli.given import model_specs
    from evalq.errors import SpecError

    specs = model_specs(arguments.modelspec, arguments.engine, arguments.offline)
    if arguments.mask is None:
        return specs
    masks = [mask.strip().upper() for mask in arguments.mask.split(";") if mask.strip()]
    kept = [spec for spec in specs if any(mask in spec.plain_label.upper() for mask in masks)]
    if not kept:
        labels = ", ".join(spec.plain_label for spec in specs)
        raise SpecError(f'-mask "{arguments.mask}" matches no label', f"labels: {labels}")
    return kept


def _files(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The flags that name an output, each with its file."""
    named = (
        ("--json", arguments.json),
        ("--csv", arguments.csv),
        ("--markdown", arguments.markdown),
        ("-o", None if arguments.plot_file is None else str(arguments.plot_file)),
    )
    return [(flag, name) for flag, name in named if name is not None]


def _check_outputs(arguments: argparse.Namespace) -> None:
    """A wrong output must not be found after a night of scoring. Raises SpecError."""
    import os

    from evalq.errors import SpecError

    for flag, name in _files(arguments):
        path = Path(name).absolute()
        if name == "-":
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise SpecError(
                    f"{flag} {name}: this is a folder", f"name a file in it: {flag} {path / 'FILE'}"
                )
            able = os.access(path if path.exists() and not path.is_file() else path.parent, os.W_OK)
        except OSError as error:
            raise SpecError(f"{flag} {name}: cannot make its folder: {error.strerror}") from None
        if not able:
            raise SpecError(f"{flag} {name}: its folder cannot be written", "name a file somewhere else")
    if sum(name == "-" for _, name in _files(arguments)) > 1:
        raise SpecError("only one of --json, --csv and --markdown can go to standard output")


def _print(arguments: argparse.Namespace, records: "Sequence[ResultRecord]", errors: "Console") -> None:
    """The table, where standard output is not taken; with --quiet only what failed."""
    from evalq.results.texts import by_text
    from evalq.show import table, texts
    from evalq.show.console import output, say

    taken = any(name == "-" for _, name in _files(arguments))
    console, several = errors if taken else output(), by_text(records)
    if not arguments.quiet and several is not None:
        texts.print_texts(texts.TextsTable(several, arguments.kld), console)
    elif not arguments.quiet:
        table.print_table(records, console, arguments.kld)
    else:
        for name, of_text in _by_text(records).items():
            where = f" on {name}" if name else ""
            for record in of_text:
                if record.error:
                    why = f"{record.error.message} ({record.error.remedy})"
                    say(errors, f"evalq: {record.label}{where}: {why}")
    if arguments.positions and not arguments.quiet:
        from evalq.show.positions import print_positions

        for name, of_text in _by_text(records).items():
            print_positions(of_text, console, arguments.kld, name)
    if arguments.memory:
        from evalq.vllm_memory.reader import runs_from_records
        from evalq.vllm_memory.run_output import print_runs

        print_runs(runs_from_records(records), errors)


def _with_statistics(
    arguments: argparse.Namespace, records: "Sequence[ResultRecord]", store: "Store", errors: "Console"
) -> "Sequence[ResultRecord]":
    """What --significance and --resolve ask for, text by text: printed where the table goes or would go.

    Returns:
        The records, with --significance each with its row of every matrix.
    """
    if not arguments.significance and arguments.resolve is None:
        return records
    from evalq.results.resolution import resolutions_of
    from evalq.results.significance import matrices_of, with_pairs
    from evalq.show.console import output, say
    from evalq.show.significance import print_matrices, resolution_lines

    taken = any(name == "-" for _, name in _files(arguments))
    console = errors if taken else output()
    found: dict[int, ResultRecord] = {}

    def scores_of(record: "ResultRecord") -> "TokenColumns | None":
        return store.result(str(record.key)).scores()

    for name, of_text in _by_text(records).items():
        if arguments.significance:
            console.print()
            if name:
                say(console, (f"{name}:", "bold"))
            matrices = matrices_of(of_text, scores_of)
            print_matrices(matrices, console)
            found |= zip(map(id, of_text), with_pairs(of_text, matrices), strict=True)
        if arguments.resolve is not None:
            resolutions = resolutions_of(of_text, scores_of, arguments.resolve)
            where = f"{name}: " if name else ""
            for line in resolution_lines(resolutions):
                say(console, where + line)
            if not resolutions:
                say(console, f"{where}--resolve: no model was compared with a reference")
    return [found.get(id(record), record) for record in records]


def _by_text(records: "Sequence[ResultRecord]") -> "dict[str, list[ResultRecord]]":
    """The records of each text by its name, which is "" where there is one text."""
    from evalq.results.texts import by_text

    several = by_text(records)
    return {"": list(records)} if several is None else several.texts


def _renderers(
    arguments: argparse.Namespace, records: "Sequence[ResultRecord]"
) -> "dict[str, Callable[[], str]]":
    """What makes the content of each flag's file."""
    from evalq.results.texts import by_text
    from evalq.show import table, texts

    several = by_text(records)
    if several is None:
        return {
            "--json": partial(table.as_json, records),
            "--csv": partial(table.as_csv, records),
            "--markdown": partial(
                _markdown, arguments, records, partial(table.markdown, records, arguments.kld)
            ),
        }
    shown = texts.TextsTable(several, arguments.kld)
    return {
        "--json": partial(texts.as_json, shown),
        "--csv": partial(texts.as_csv, shown),
        "--markdown": partial(_markdown, arguments, records, partial(texts.markdown, shown)),
    }


def _write(arguments: argparse.Namespace, records: "Sequence[ResultRecord]") -> None:
    """The records to the files that were asked for. Raises StoreError."""
    from evalq.errors import StoreError
    from evalq.files import write_atomic

    renderers = _renderers(arguments, records)
    for flag, name in _files(arguments):
        if flag not in renderers:
            continue
        text, path = renderers[flag](), Path(name)
        if name == "-":
            sys.stdout.write(text)
            continue
        try:
            if path.exists() and not path.is_file():  # a device or a named pipe
                path.write_text(text, encoding="utf-8")
            else:
                write_atomic(path.resolve(), text.encode())
        except (OSError, StoreError) as error:
            raise StoreError(
                f"{flag} {name} cannot be written: {error}",
                "the same command with another file shows it at once",
            ) from None


def _markdown(
    arguments: argparse.Namespace, records: "Sequence[ResultRecord]", tables: Callable[[], str]
) -> str:
    """The table, and those by position where they are asked for."""
    from evalq.show.positions import markdown_positions

    texts = _by_text(records) if arguments.positions else {}
    return tables() + "".join(markdown_positions(r, arguments.kld, name) for name, r in texts.items())
