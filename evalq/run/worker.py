"""The child process that holds an engine: one job on standard input, events as JSON lines on standard output.

A model's crash, hang or hunger for memory ends this process and nothing else. It may run under another
interpreter than the command line's, so it imports little: numpy, safetensors, filelock and the engine.

Everything the engine prints goes to standard error, which the parent keeps as worker.log. The process ends
itself when its parent is gone (standard input closes), whatever the engine is doing.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from evalq.backend import LoadRequest, Tokenizer
from evalq.checkpoint.adapter import read_adapter
from evalq.data.tokens import PROBE_CHARACTERS, PROBE_EXTRA, cut, read_stream, write_stream
from evalq.data.windows import ProtocolSettings, StreamFacts, plan_windows
from evalq.errors import EvalqError, ModelError, StoreError
from evalq.failures import from_exception, remedy_of
from evalq.registry import backend
from evalq.results.store import ResultDir
from evalq.run import scoring as evaluate

Emit = Callable[..., None]


def main() -> int:
    """Do the job on standard input; the exit code is 0 whenever the outcome was told as an event."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    emit = _emitter(out)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stage = _Stage()
    try:
        {"tokenize": tokenize, "score": score}[job["kind"]](job, emit, stage)
    except StoreError as error:
        emit("store_error", message=error.message, remedy=error.remedy)
    except ModelError as error:
        emit("failed", category=error.category, message=error.message, remedy=remedy_of(error))
    except EvalqError as error:
        emit("data_error", message=error.message, remedy=error.remedy)
    except Exception as error:
        traceback.print_exc()
        sorted_error = from_exception(error, stage.name)
        emit(
            "failed",
            category=sorted_error.category,
            message=sorted_error.message,
            remedy=remedy_of(sorted_error),
        )
    out.flush()
    sys.stderr.flush()
    # Engines leave threads and atexit hooks that can hang or crash after the result is safe.
    os._exit(0)


class _Stage:
    """What the worker is doing, for the category of an error."""

    name = "load"


def _emitter(out: TextIO) -> Emit:
    def emit(event: str, **fields: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            out.write(json.dumps({"event": event, **fields}) + "\n")
            out.flush()

    return emit


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


def tokenize(job: dict[str, Any], emit: Emit, stage: _Stage) -> None:
    """Tokenize a text with a backend's tokenizer and keep the stream.

    Job: backend, path, trust_remote_code, texts_file (a JSON list of documents), add_special,
    chat_template, out.
    """
    documents = json.loads(Path(job["texts_file"]).read_text(encoding="utf-8"))
    tokenizer: Tokenizer = backend(job["backend"]).load_tokenizer(  # type: ignore[attr-defined]
        Path(job["path"]), job["trust_remote_code"]
    )
    emit("loaded")
    ids: list[int] = []
    ends: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document, job["add_special"])
        ends.append(len(ids))
    prefix: list[int] = []
    if job["chat_template"]:
        if not hasattr(tokenizer, "chat_prefix"):
            raise ModelError(
                "this tokenizer has no chat template", "tokenizer_mismatch", "remove chat_template"
            )
        prefix = tokenizer.chat_prefix()
    probe_text = documents[0][:PROBE_CHARACTERS] + PROBE_EXTRA
    facts = StreamFacts(
        n_tokens=len(ids),
        document_ends=tuple(ends) if len(ends) > 1 else (),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        adds_bos=tokenizer.adds_bos,
    )
    described = {
        "facts": asdict(facts),
        "probe_text": probe_text,
        "probe_ids": tokenizer.encode(probe_text, False),
        "prefix_ids": prefix,
    }
    write_stream(Path(job["out"]), np.asarray(ids, np.int64), described)
    emit("done")


def score(job: dict[str, Any], emit: Emit, stage: _Stage) -> None:
    """Score every window of a plan that the store does not hold yet.

    Job: load, forward (backends), path, overlay, load_fn, options, trust_remote_code, tokens_file,
    max_tokens, settings (ProtocolSettings), result_dir, lora (path and name, or None), divide_work.
    """
    result = ResultDir(Path(job["result_dir"]))
    with result.lock(on_wait=lambda: emit("waiting")):
        if result.scores() is not None:
            emit("done")
            return
        stream = read_stream(Path(job["tokens_file"]))
        if stream is None:
            raise StoreError(f"cannot read the tokens {job['tokens_file']}", "run again")
        stream = cut(stream, job["max_tokens"])
        settings = ProtocolSettings(**job["settings"] | {"prefix_ids": tuple(job["settings"]["prefix_ids"])})
        plan = plan_windows(settings, stream.facts)
        emit("loading")
        request = LoadRequest(
            path=Path(job["path"]),
            window_tokens=plan.longest_tokens,
            targets_per_window=max(window.n_targets for window in plan.windows),
            options=job["options"],
            trust_remote_code=job["trust_remote_code"],
            overlay=Path(job["overlay"]) if job["overlay"] else None,
            load_fn=job["load_fn"],
            n_windows=len(plan.windows),
            token_ids_max=int(stream.ids_N.max()),
            adapter=read_adapter(Path(job["lora"]["path"]), job["lora"]["name"]) if job["lora"] else None,
            divide_work=job["divide_work"],
        )
        started = time.perf_counter()
        model = backend(job["load"]).load(request)
        load_seconds = time.perf_counter() - started
        if request.divide_work > 1:
            model.batch_windows = max(1, model.batch_windows // request.divide_work)
            model.notes.append("ran out of memory at first; scored with half as much at once")
        evaluate.check_model(model, stream, plan)
        emit("loaded", seconds=load_seconds, device=model.device)
        stage.name = "forward"
        run = evaluate.score_windows(backend(job["forward"]), model, plan, stream.ids_N, result, emit)
        result.finish(run | {"load_seconds": load_seconds})
        backend(job["load"]).close(model)
    emit("done")


if __name__ == "__main__":
    main()
