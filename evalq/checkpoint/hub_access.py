"""Names of models on the hub, whether it answers, and its errors as one line each.

huggingface_hub waits up to 10 s for a server and tries up to six times, with a line on standard error for
each. So a short question comes first here; where there is no answer, what is downloaded has to do.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from evalq.errors import ModelError

_REPOSITORY = r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
_NAME = re.compile(rf"{_REPOSITORY}(?:/(?P<file>(?:[\w.-]+/)*[\w.-]+\.gguf))?", re.ASCII)
_ANSWER_SECONDS = 3.5  # a name server that does not answer counts too, which no timeout of a library covers
_KEPT_SECONDS = 60.0
_answered: dict[str, tuple[float, bool]] = {}


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, owner/name, and a GGUF file in it or None."""

    repo: str
    file: str | None


def hub_name(text: str) -> HubName | None:
    """What `owner/name` or `owner/name/file.gguf` names; None for text of any other form."""
    match = _NAME.fullmatch(text)
    return None if match is None else HubName(match["repo"], match["file"])


def hub_answers() -> bool:
    """Whether the hub can be reached now, known after a few seconds. False where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    asked, answered = _answered.get(constants.ENDPOINT, (-_KEPT_SECONDS, False))
    if time.monotonic() - asked > _KEPT_SECONDS:
        answered = _ask(constants.ENDPOINT)
        _answered[constants.ENDPOINT] = (time.monotonic(), answered)
    return answered


def _ask(endpoint: str) -> bool:
    """Send one small request; any answer will do."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError

    outcome: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_ANSWER_SECONDS, follow_redirects=False)
        except (HTTPError, OSError, ValueError):
            return
        outcome.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return bool(outcome)


@contextmanager
def hub_errors(what: str, repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of huggingface_hub into a ModelError, and keep its warnings from standard error.

    Args:
        what: was asked for, as the message begins.
        repo: owner/name.
        revision: that was asked for, None for the main branch.

    Raises:
        ModelError: model_missing, model_gated or download_failed.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except errors.GatedRepoError:
        remedy = f"accept its terms on https://huggingface.co/{repo}, then: hf auth login"
        raise ModelError(f"{what} is gated", "model_gated", remedy) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f'{what} has no revision "{revision}"', "model_missing") from None
    except errors.LocalEntryNotFoundError:
        what += ": no such file or directory, not downloaded from the hub, and the hub is out of reach"
        raise ModelError(what, "model_missing", "correct the path, or ask again with a network") from None
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, FileNotFoundError):
        what += ": no such file or directory, and no public model of this name on huggingface.co"
        raise ModelError(what, "model_missing") from None
    except errors.HFValidationError:
        what += ": no such file or directory, and no name that the hub allows"
        raise ModelError(what, "model_missing") from None
    except (errors.HTTPError, OSError) as error:  # a lost connection, a full disk
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what}: {first[0]}", "download_failed") from None
    finally:
        logging.set_verbosity(verbosity)
