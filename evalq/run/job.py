"""The message from the command line to a worker: one JSON line, typed and versioned.

The worker may belong to another installation of evalq. What both must agree on is this message and the
windows, so the message names its version and the digest of the windows, and a worker that differs refuses the
job. A version of evalq that differs in nothing else is welcome.
"""

import json
import shlex
import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from evalq.data.windows import ProtocolSettings
from evalq.errors import ModelError
from evalq.results.speed import Part, SpeedSettings
from evalq.version import JOB_VERSION, __version__

ChatKind = Literal["", "answers", "prompts"]


class _Job(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    job_version: int = JOB_VERSION


class TokenizeJob(_Job):
    """Tokenize a text with a backend's tokenizer and keep the stream.

    Args:
        backend: canonical name.
        path: of the tokenizer's directory or file.
        trust_remote_code: whether the checkpoint's own code may run.
        documents: the text.
        add_special: whether the tokenizer adds its special tokens.
        chat_template: whether an empty chat goes before every window.
        chat: "answers": the documents are conversations, and what the assistant says counts; "prompts": they
            are conversations that the assistant is to go on with; "" for plain texts.
        out: file for the stream.
    """

    kind: Literal["tokenize"] = "tokenize"
    backend: str
    path: str
    trust_remote_code: bool
    documents: tuple[str, ...]
    add_special: bool
    chat_template: bool
    chat: ChatKind = ""
    out: str


class DecodePiece(BaseModel):
    """Tokens that may follow a text.

    Args:
        before: ids of the text.
        tokens: each of them on its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: tuple[int, ...]
    tokens: tuple[int, ...]


class DecodeJob(_Job):
    """Tell the text of token ids, an event for each piece. No code of the checkpoint is run.

    Args:
        backend: canonical name, of one with tokenizers.
        path: of the tokenizer's directory or file.
        pieces: what to decode.
    """

    kind: Literal["decode"] = "decode"
    backend: str
    path: str
    pieces: tuple[DecodePiece, ...]


class LoraJob(BaseModel):
    """An adapter to put on the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    name: str


class TextJob(BaseModel):
    """One text that a model scores: the windows of its plan that the store does not hold yet.

    Args:
        name: what it is called in this run; no two of a job have the same.
        tokens_file: the stream.
        max_tokens: only its first ones; None for all.
        settings: the protocol's.
        plan_digest: of the windows that they must give.
        columns: names of the per-token columns wanted.
        result_dir: where scores go.
        identity: of the result, kept beside them.
        keep_reference: folder for what KL divergence against this model needs of it, None where nothing does.
        reference: folder of the model that this one is compared with, None without.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tokens_file: str
    max_tokens: int | None
    settings: ProtocolSettings
    plan_digest: str
    columns: tuple[str, ...]
    result_dir: str
    identity: dict[str, Any]
    keep_reference: str | None = None
    reference: str | None = None


class ModelJob(_Job):
    """What every job says of the model that it loads.

    Args:
        load, forward: canonical names of the backends that load it, and that score or generate with it.
        load_fn: the name the spec used.
        path: of the model.
        overlay: of the tensors put over it, or None.
        options: for the engine, checked.
        trust_remote_code: whether the checkpoint's own code may run.
        lora: adapter, or None.
    """

    load: str
    forward: str
    load_fn: str
    path: str
    overlay: str | None = None
    options: dict[str, Any]
    trust_remote_code: bool
    lora: LoraJob | None = None


class ScoreJob(ModelJob):
    """Load a model once and score texts with it, one after the other.

    Args:
        versions: what the results' identities say of an engine that runs elsewhere; {} for one here.
        texts: what to score, at least one; their references, where they have some, share one head.
        keep_most_bytes: the most that what is kept of one text may take, None for any.
        divide_work: by how much to divide what is computed at once.
    """

    kind: Literal["score"] = "score"
    versions: dict[str, str] = {}
    texts: tuple[TextJob, ...] = Field(min_length=1)
    divide_work: int = 1
    keep_most_bytes: int | None = None


class SpeedJob(ModelJob):
    """Time a model: load it once, repeat each part of what is asked.

    Args:
        tokens_file: the stream that prompts are cut from.
        parts: what to measure.
        settings: lengths, batch and repetitions.
    """

    kind: Literal["speed"] = "speed"
    tokens_file: str
    parts: tuple[Part, ...]
    settings: SpeedSettings


class GenerateJob(ModelJob):
    """Have a model answer the prompts of a stream whose answers are not kept yet.

    Args:
        prompts_file: the stream; each of its documents is a prompt.
        new_tokens: the most that an answer has.
        at_once: prompts that are answered together.
        answers_dir: where answers go.
    """

    kind: Literal["generate"] = "generate"
    prompts_file: str
    new_tokens: int
    at_once: int
    answers_dir: str


Job = TokenizeJob | ScoreJob | DecodeJob | SpeedJob | GenerateJob
_JOBS: TypeAdapter[Job] = TypeAdapter(Job)


def to_line(job: Job) -> str:
    """A job as the line that a worker reads."""
    return job.model_dump_json() + "\n"


def from_line(line: str) -> Job:
    """The job of a line.

    Raises:
        ModelError: engine_missing, when the line is a message of another version.
    """
    try:
        raw = json.loads(line)
        version = raw.get("job_version") if isinstance(raw, dict) else None
    except ValueError:
        version = None
    if version != JOB_VERSION:
        raise other_evalq(sys.executable, f"reads messages of version {JOB_VERSION}, not {version}")
    try:
        return _JOBS.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise other_evalq(sys.executable, f"cannot read the message: {place}: {first['msg']}") from None


def other_evalq(python: str, what: str, version: str = __version__) -> ModelError:
    """The error for an interpreter whose evalq differs in what both sides must share."""
    return ModelError(
        f"the evalq {version} of {python} {what}",
        "engine_missing",
        f"install there the evalq that runs this command: {shlex.quote(python)} -m pip install -U evalq",
    )
