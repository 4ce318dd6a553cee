"""Undocumented names of huggingface_hub that recipe/hub.py uses."""

import logging

import huggingface_hub
import pytest
from huggingface_hub.utils import _http, get_session

from hfpretrain.recipe import hub


@pytest.fixture
def client():
    """The client after `limit_request_time`, whose changes are undone afterward."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    assert hasattr(_http, "default_client_factory"), (
        "huggingface_hub no longer has utils._http.default_client_factory: find what creates its default client now, "
        "and call that in recipe/hub.py"
    )
    hub.limit_request_time()
    yield get_session()
    huggingface_hub.set_client_factory(_http.default_client_factory)
    huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()
    logger.setLevel(level)


def test_a_request_fails_after_the_time_limit(client):
    timeout = client.timeout
    assert timeout.connect == timeout.read == timeout.write == hub.TIMEOUT_SECONDS, (
        "the client of huggingface_hub has another timeout than recipe/hub.py gives it: requests may wait forever"
    )


def test_a_failure_message_hides_secrets():
    error = ConnectionError("refused: https://storage.host/file?X-Amz-Signature=0123 with hf_abcdefghijklmnopqrst")
    text = hub.explain_failure(error).text
    assert "https://storage.host/file" in text and "0123" not in text and "abcdefgh" not in text
    assert not hub.explain_failure(error).is_final and hub.explain_failure(hub.NotPushableError("damaged")) == (
        "damaged",
        None,
        True,
    )
