"""Replace secrets in addresses by `***` before a text is written, logged or published."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
SECRETS = "HFPRETRAIN_SECRETS"
"""Environment variable with which a command passes secrets to the run that it starts. It holds a JSON list of complete
addresses. The recipe file has the same addresses without their secrets."""
_USER = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*)://([^\s/?#'\"<>`\\]+)@")
_QUERY = re.compile(r"([?#])([^\s'\"<>`\\?#]*=[^\s'\"<>`\\?#]*)")
_TOKEN = re.compile(r"\b(hf_)[A-Za-z0-9]{16,}|\b([Bb]earer )[A-Za-z0-9._~+/=-]{16,}")
_SECRET = re.compile(
    r"token(?!iz|s)|secret|passw|pwd|api[-_]?key|access[-_]?key|credential|signature|authorization|jwt|hmac"
    r"|(^|[-_])(sig|sas|auth|pass|pw|session|sessionid)$"
)
# Query parameters of signed addresses of S3, Google, Azure and CloudFront that change with each signature.
_SIGNED = re.compile(
    r"x-(amz|goog|oss|ms)-|(expires|expiry|exp|policy|key-pair-id|googleaccessid|algorithm"
    r"|s[evrtpisd]|spr|sip|sk[etsv]|skoid|sktid|srt|ss|sdd|scid|saoid|suoid)$"
)


def redact(text: str) -> str:
    """`text` with `***` for each user and password, signature, token or key in an address.

    In a signed address, all parameters that change with the signature are replaced. Addresses that differ only in their
    signatures give the same result.
    """
    if "://" not in text and "?" not in text and "hf_" not in text and "earer " not in text:
        return text
    text = _TOKEN.sub(lambda match: f"{match[1] or match[2]}{HIDDEN}", text)
    return _QUERY.sub(_without_values, _USER.sub(_without_user, text))


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match[1], match[2]
    # In other schemes the part before `@` is a bucket, a container or a user. In `hub://` it is a repo.
    is_secret = ":" in user or scheme in ("http", "https")
    return f"{scheme}://{HIDDEN}@" if is_secret and scheme != "hub" else match[0]


def _without_values(match: re.Match[str]) -> str:
    parts = re.split(r"([&;])", match[2])
    names = [unquote(part.partition("=")[0]).lower() for part in parts]
    is_signed = any(name in ("sig", "hmac") or name.endswith("signature") for name in names)
    for number, (name, part) in enumerate(zip(names, parts, strict=True)):
        value = part.partition("=")[2]
        is_key = name == "key" and re.fullmatch(r"[\w-]{20,}", value) is not None
        if value and (_SECRET.search(name) or is_key or (is_signed and _SIGNED.match(name))):
            parts[number] = f"{part.partition('=')[0]}={HIDDEN}"
    return match[1] + "".join(parts)


def redact_all(value: Any) -> Any:
    """A copy of nested mappings and lists in which every string is redacted."""
    if isinstance(value, dict):
        return {redact_all(key): redact_all(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def find_secrets(value: Any) -> list[str]:
    """The strings with a secret in nested mappings and lists: those that `redact_all` would change."""
    if isinstance(value, dict):
        return [found for item in value.values() for found in find_secrets(item)]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in find_secrets(item)]
    return [value] if isinstance(value, str) and redact(value) != value else []


def restore_secrets(value: Any, secrets: Collection[str]) -> Any:
    """The inverse of `redact_all`: put back the strings that `find_secrets` returned."""
    if isinstance(value, dict):
        return {key: restore_secrets(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [restore_secrets(item, secrets) for item in value]
    return next((secret for secret in secrets if redact(secret) == value), value)


def strip_folders(value: Any, texts: Collection[str] = ()) -> Any:
    """A copy of nested mappings and lists in which absolute paths are cut to their last part.

    `texts`: keys below which strings are not paths.
    """
    if isinstance(value, dict):
        return {key: item if key in texts else strip_folders(item, texts) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strip_folders(item, texts) for item in value]
    is_path = isinstance(value, str) and re.match(r"(file://)?(/|~|[A-Za-z]:\\)[^\n]*$", value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value


def is_redacted(address: str) -> bool:
    """Whether an address has `***` instead of its secret, so that it can't be opened."""
    return f"://{HIDDEN}@" in address or f"={HIDDEN}" in address


def redact_logs() -> None:
    """Redact all log records of this process, and the message of an uncaught exception."""
    import logging
    import sys
    import traceback

    make_record, hook = logging.getLogRecordFactory(), sys.excepthook
    if getattr(make_record, "redacts", False):
        return

    def redacted_record(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        made = make_record(*arguments, **keywords)
        try:
            text = made.getMessage()
        except (TypeError, ValueError):  # logging itself reports wrong arguments
            return made
        if redact(text) != text:
            made.msg, made.args = redact(text), ()
        if made.exc_info and made.exc_info[0] is not None:
            text = logging.Formatter().formatException(made.exc_info)
            made.exc_text = redact(text) if redact(text) != text else None
        return made

    def print_redacted(kind: Any, error: Any, trace: Any) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        if redact(text) == text:
            hook(kind, error, trace)
        else:
            print(redact(text), end="", file=sys.stderr)

    redacted_record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacted_record)
    sys.excepthook = print_redacted
