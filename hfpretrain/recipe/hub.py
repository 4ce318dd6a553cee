"""How long requests to the Hub may wait, and what their errors mean."""

from __future__ import annotations

import logging
import re
from typing import Any, NamedTuple

from hfpretrain.recipe.redaction import redact
from hfpretrain.recipe.schema import RecipeError

TIMEOUT_SECONDS = 60
"""A request fails after this time without an answer. huggingface_hub itself would wait forever."""


class NotPushableError(Exception):
    """A file or folder that can't be pushed; a retry would fail as well."""


class Failure(NamedTuple):
    """Why a request to the Hub failed."""

    text: str
    retry_after: int | None
    """Seconds to wait before a retry, if the Hub sent a `Retry-After` header."""
    is_final: bool
    """Whether a retry would fail as well."""


def limit_request_time() -> None:
    """Make this process's requests to the Hub fail after `TIMEOUT_SECONDS` without an answer.

    Also silences huggingface_hub's log, because it holds signed addresses.
    """
    import huggingface_hub
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import disable_progress_bars

    def make_client() -> Any:
        client = _http.default_client_factory()
        client.timeout = TIMEOUT_SECONDS
        return client

    # `get_session().timeout = ...` would need no private name. But after the first connection error, huggingface_hub
    # makes a new client, which would have no timeout.
    huggingface_hub.set_client_factory(make_client)
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def explain_failure(error: Exception) -> Failure:
    """Describe an error of a request, and whether and when to try again.

    The text contains no token and no signed address.
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
    is_final = isinstance(error, (NotPushableError, RecipeError, HFValidationError, OfflineModeIsEnabled))
    return Failure(text if is_final else f"{type(error).__name__}: {text}", None, is_final)
