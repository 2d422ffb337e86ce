"""Causes of failed requests to an OpenAI-compatible server, in words for its user.

    diagnose(exception, request)                 why there was no response
    server_message(response)                     what a response says about an error
    hidden_error(response, path_has_answered)    status of an error that came with 200
    Mask(server)                                 removes keys and passwords from all of these

Responses and requests are those of the HTTP library that OpenAI's client uses.
"""

import json
import re
import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from os import environ
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

OPENAI_URL = "https://api.openai.com/v1"
# Error codes of a 429 that waiting does not help against: the account has no money left.
QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
# Statuses of 500 and more that do not pass: not implemented, HTTP version, captive portal.
PERMANENT = (501, 505, 511)


class Server(NamedTuple):
    """Where the requests go."""

    key: str
    base_url: str = OPENAI_URL
    headers: dict[str, str] = {}  # additional ones


class Failure(NamedTuple):
    """Why an attempt failed, for the counts and for the user."""

    name: str  # under which it is counted
    message: str
    may_pass: bool = True  # False if repeating the request does not help


def diagnose(error: BaseException, request) -> Failure:
    """Why there was no response. The cause is deep below the exception of the HTTP library."""
    # Recognized by name, to avoid importing the HTTP library that OpenAI's client uses.
    names = {type(cause).__name__ for cause in causes(error)}
    # Exceptions of Python itself tell most.
    for cause in causes(error):
        if isinstance(cause, socket.gaierror):
            # EAI_AGAIN: the name server did not answer, which may pass. Otherwise the name is
            # wrong.
            message = f"the host name {request.url.host} is unknown ({cause.strerror})"
            return Failure("unknown host", message, may_pass=cause.errno == socket.EAI_AGAIN)
        if isinstance(cause, ssl.SSLCertVerificationError):
            message = (
                f"the TLS certificate is not trusted ({cause.verify_message}): if it is right, "
                "name a file with its authority in SSL_CERT_FILE"
            )
            return Failure("TLS error", message, may_pass=False)
        if isinstance(cause, ssl.SSLError):
            # For example WRONG_VERSION_NUMBER, the usual reason if the server speaks http.
            tls_reason = str(cause.reason or cause).replace("_", " ").lower()
            hint = ": perhaps the server speaks http, not https" if "version" in tls_reason else ""
            is_lost = isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError)
            return Failure("TLS error", f"TLS error ({tls_reason}){hint}", may_pass=is_lost)
        if isinstance(cause, ConnectionRefusedError):
            return Failure("connection refused", "connection refused: is the server running?")

    # Exceptions of the HTTP library, the more specific first.
    if "ConnectTimeout" in names:
        return Failure("timeout", "timeout while connecting: check the host and the port")
    if any("Timeout" in name for name in names):
        return Failure("timeout", "timeout")
    if "ProxyError" in names:
        message = f"the proxy of {', '.join(proxy_variables())} fails ({error})"
        return Failure("proxy error", message, may_pass=False)
    if names & {"RemoteProtocolError", "ReadError", "WriteError", "CloseError"}:
        return Failure("connection lost", f"connection lost ({error})")
    # The text of an error about a header quotes it.
    if "LocalProtocolError" in names:
        return Failure("invalid request", "a header is not valid: check OPENAI_*", may_pass=False)
    if names & {"UnsupportedProtocol", "TooManyRedirects", "InvalidURL"}:
        return Failure("invalid request", f"{error}: check base_url", may_pass=False)

    # Anything else: the system's message if there is one.
    reason = next((c.strerror for c in causes(error) if getattr(c, "errno", None)), None)
    return Failure("no connection", f"no connection ({reason or error})")


def causes(error: BaseException | None):
    """An exception, those in its group, and those that led to it."""
    while error:
        yield error
        # An exception group: a connection that was tried at several addresses, for example.
        for part in getattr(error, "exceptions", ()):
            yield from causes(part)
        error = error.__cause__ or error.__context__


def server_message(response) -> str:
    """What the server says about an error, or what it sent instead."""
    moved = f"; redirected to {shown(response.url)}" if response.history else ""
    try:
        said = response.json()
    except ValueError:
        if not is_page(response):
            return (response.text or "empty response") + moved
        title = re.search(r"<title[^>]*>(.*?)</title", response.text, re.I | re.S)
        named = f" titled {' '.join(title[1].split())!r}" if title else ""
        return f"a web page{named} instead of JSON{moved}"
    # OpenRouter passes on the answer of another server in metadata.raw.
    raw = ""
    # Unwrap {"error": {"message": "..."}} and the like, down to the text.
    while isinstance(said, dict):
        if isinstance(said.get("metadata"), dict):
            raw = str(said["metadata"].get("raw") or "")
        inner = next((said[key] for key in ("error", "message", "detail") if said.get(key)), None)
        if inner is None:
            break
        said = inner
    text = said if isinstance(said, str) else json.dumps(said)
    return f"{text} {raw}".strip() + moved


def is_page(response) -> bool:
    """Whether a response is an HTML page, by its header or by its beginning."""
    is_html = "html" in response.headers.get("content-type", "") and "<" in response.text
    return is_html or response.text.lstrip()[:15].lower().startswith(("<!doctype", "<html"))


def hidden_error(response, path_has_answered: bool) -> tuple[int, str] | None:
    """The status that a response with status 200 should have, and a name; None if it is right."""
    try:
        body = response.json()
    except ValueError:
        # Once this path has answered, the page is perhaps about the server's maintenance.
        status = 502 if path_has_answered else 404
        return (status, "web page") if is_page(response) else None
    # Neither a list nor a chat completion is an error object.
    if not isinstance(body, dict) or body.get("choices"):
        return None
    error = body.get("error") or body.get("detail") or body.get("message")
    if not error:
        return None

    # The error may contain its status. Otherwise, its words tell of which kind it is.
    name = "error in status 200"
    kinds = str(error)
    if isinstance(error, dict):
        for field in ("code", "status"):
            code = str(error.get(field, ""))
            if re.fullmatch(r"[45]\d\d", code):
                return int(code), name
        kinds = f"{error.get('code')} {error.get('type')} {error.get('message')}"

    # Of several patterns that match, the first one decides.
    patterns = {
        429: r"rate.?limit|too many requests|" + "|".join(QUOTA),
        401: r"invalid.?api.?key|authentication|unauthorized|incorrect api key",
        404: r"not.?found|unexpected endpoint|does not exist",
        400: r"invalid.?request|bad.?request|unsupported|unrecognized|extra_forbidden",
    }
    for status, pattern in patterns.items():
        if re.search(pattern, kinds, re.I):
            return status, name
    # An error of unknown kind counts as one of the server, which may pass.
    return 502, name


def is_transient(status: int) -> bool:
    """Is a request with this HTTP status repeated?"""
    return status in (408, 409, 429) or (status >= 500 and status not in PERMANENT)


def is_out_of_quota(response) -> bool:
    """Whether the account has no money left. Its 429 does not pass, unlike that of a rate limit."""
    return response.status_code == 429 and any(code in response.text for code in QUOTA)


def status_name(response) -> str:
    """A short name of an error, for messages and counts."""
    status = response.status_code
    name = "rate limit (429)" if status == 429 else f"status {status}"
    return response.extensions.get("name", name)


def retry_count(request) -> int:
    """OpenAI's client counts the retries of a request in this header."""
    return int(request.headers.get("x-stainless-retry-count", 0))


def requested_wait(response) -> float:
    """Seconds that the server asks to wait, 0 if it does not."""
    # Retry-After is a number of seconds, or a date like "Wed, 21 Oct 2026 07:28:00 GMT".
    text = response.headers.get("retry-after", "")
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0


class Mask:
    """Makes text of a server printable: one line, at most 300 characters, without secrets."""

    def __init__(self, server: Server):
        url = urlsplit(server.base_url)
        query = parse_qs(url.query)
        named = [(name, value) for name, values in query.items() for value in values]
        named += server.headers.items()

        # The key and the password are secret, and so are values whose names say so: a parameter
        # like ?sig=..., a header like X-Auth-Token.
        secret = re.compile("key|token|code|sig|secret|password|auth|cookie", re.I)
        secrets = {value for name, value in named if secret.search(name)}
        secrets |= {server.key, unquote(url.password or "")}
        # Short ones are placeholders, such as "x" or "none". Elsewhere they are ordinary words.
        long = [re.escape(value) for value in secrets if len(value) >= 8]
        short = [re.escape(value) for value in secrets if 0 < len(value) < 8]
        # The longest first, because one secret may begin another. (?!) matches nothing.
        self.long = re.compile("|".join(sorted(long, key=len, reverse=True)) or r"(?!)")
        # Matches "Bearer none" and "API key provided: x", but not a word that begins with it.
        self.short = re.compile(
            rf"((?:bearer|key)\W+(?:provided\W+)?)(?:{'|'.join(short) or '(?!)'})(?!\w)", re.I
        )

    def __call__(self, text: str) -> str:
        """The text without secrets, on one line."""
        text = self.long.sub("***", text)
        text = self.short.sub(r"\1***", text)
        # Control characters could change the terminal.
        printable = "".join(char if char.isprintable() else " " for char in text)
        return " ".join(printable.split())[:300]


def proxy_variables() -> list[str]:
    """The environment variables that name a proxy."""
    names = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")
    return [name for name in environ if name.upper() in names and environ[name]]


def shown(url) -> str:
    """A URL for messages: without a password and without its query, which may hold a key."""
    parts = urlsplit(str(url))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl().rstrip("/")
