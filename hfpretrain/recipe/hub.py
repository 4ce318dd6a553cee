"""What all requests to the Hub share: how long they may wait, and what their errors mean."""

from __future__ import annotations

import logging
import re
from typing import Any, NamedTuple

from hfpretrain.recipe.redaction import redact
from hfpretrain.recipe.schema import RecipeError

TIMEOUT_SECONDS = 60
"""A connection fails after so long without an answer; huggingface_hub itself would wait for ever."""


class NotPushableError(Exception):
    """Something that can't be pushed, however often it is tried."""


class Failure(NamedTuple):
    """Why a request to the Hub failed."""

    text: str
    retry_after: int | None
    """Seconds after which the Hub wants to be asked again, where it said so."""
    final: bool
    """Whether trying again is of no use."""


def limit_waiting() -> None:
    """From now on this process's requests to the Hub fail after `TIMEOUT_SECONDS` without an answer.

    huggingface_hub also stops logging, since the addresses of its storage are signed.
    """
    import huggingface_hub
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import disable_progress_bars

    def client() -> Any:
        made = _http.default_client_factory()
        made.timeout = TIMEOUT_SECONDS
        return made

    # `get_session().timeout = ...` would need no private name, but holds only until the first connection error, after
    # which huggingface_hub makes a new client.
    huggingface_hub.set_client_factory(client)
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def explain(error: Exception) -> Failure:
    """What to say about an error of a request, and whether and when to try again.

    The text holds no token and no signed address.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", redact(" ".join(str(error).split())))[:300]
    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        advice = "; `hf auth login` sets a token" if response.status_code in (401, 403) else ""
        wait = response.headers.get("Retry-After", "")
        message = error.server_message or response.reason_phrase
        where = f"{response.request.method} {response.request.url.path}"
        text = f"{response.status_code} {' '.join(message.split()):.200} ({where}){advice}"
        return Failure(text, int(wait) if wait.isdigit() else None, False)
    final = isinstance(error, (NotPushableError, RecipeError, HFValidationError, OfflineModeIsEnabled))
    return Failure(text if final else f"{type(error).__name__}: {text}", None, final)
