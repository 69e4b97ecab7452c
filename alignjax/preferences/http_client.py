"""Asks a chat-completions endpoint (OpenAI's form, which vLLM and others serve), and keeps every answer on disk."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import email.utils
import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from alignjax.distributed.hosts import Hosts
from alignjax.errors import POSITIVE, RunAgain, UserError, check_range, one_line
from alignjax.preferences.http_answers import Answer, Body, parse_response, read_answer, request_digest, write_answer

_TRANSIENT = (408, 409, 425, 429)  # statuses below 500 that may be another in a moment
_UPDATE_SECONDS = 60.0  # that the other processes wait for news from process 0; far below ``Hosts.timeout``
_UPDATE_ANSWERS = 64  # answers that process 0 sends to the others at once


@dataclasses.dataclass(frozen=True)
class Limits:
    """How hard an endpoint is asked. Nothing here changes an answer."""

    concurrency: int = 8  # requests at a time
    tries: int = 6  # of one request, in all
    timeout: float = 120.0  # seconds without a byte after which a try has failed
    first_wait: float = 1.0  # seconds before the second try; it doubles with every further one
    longest_wait: float = 60.0  # seconds; a server that asks for more ends the run

    def __post_init__(self) -> None:
        check_range(self, 1, 1024, "concurrency", "tries")
        check_range(self, POSITIVE, 86400, "timeout", "first_wait", "longest_wait")


class Failure(NamedTuple):
    """Why a request has no answer yet."""

    reason: str
    retry_after: float  # seconds that the endpoint asks to wait; 0 where it does not say
    is_outage: bool  # the endpoint may answer later; otherwise it is not the kind of endpoint that is asked here


@dataclasses.dataclass(frozen=True)
class Client:
    """An endpoint, and where its answers are kept."""

    url: str  # up to and without /chat/completions
    key_variable: str | None  # the environment variable that holds the key; None: no key is sent
    folder: Path
    limits: Limits
    sleep: Callable[[float], None] = time.sleep


def check_url(url: str) -> None:
    """Raises UserError when the url of an endpoint is malformed, holds a password, or is the url of one request."""
    if re.search(r"//[^/]*@", url):
        raise UserError("the url holds a user or password; leave it out, and name the key's variable in key_variable")
    try:
        parts = urlsplit(url)
        _ = requests.Request("POST", url).prepare(), parts.port
    except ValueError:
        raise UserError(f"the url {url!r} is malformed; give one such as http://localhost:8000/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise UserError(f"the url {url!r} is not http(s)://HOST/...; give one such as http://localhost:8000/v1")
    if parts.query or parts.fragment:
        raise UserError(f"the url of {parts.hostname} has a ? or #; give what stands before it")
    if url.rstrip("/").endswith("/chat/completions"):
        raise UserError(f"the url {url!r} ends in /chat/completions, which is added to it; leave that out")


def read_key(variable: str | None) -> str | None:
    """Returns the key in an environment variable; None without a variable.

    Raises UserError when the variable is not set or holds what cannot be a key. The message never shows the key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} is not set; put the endpoint's key there")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {variable} holds white space or no ASCII; put the bare key there")
    return key


def ask_all(
    client: Client, bodies: Sequence[Body], hosts: Hosts, progress: Callable[[int], Any] = lambda count: None
) -> list[Answer]:
    """Returns the answer to each request, in their order; equal requests are asked once.

    Process 0 alone asks, ``limits.concurrency`` requests at a time, and the others receive its answers. ``progress`` is
    told of every few answers. Every answer is kept on disk as it comes.

    Raises UserError when the endpoint refuses a request or is no such endpoint, and RunAgain when it gives no answer in
    ``limits.tries`` tries.
    """
    digests = [request_digest(body) for body in bodies]
    distinct = dict(zip(digests, bodies, strict=True))
    answers: dict[str, Answer] = {}
    with _asking(client, distinct if hosts.is_first else {}) as finished:
        while len(answers) < len(distinct):
            news = hosts.broadcast(lambda: _next_answers(finished))
            answers |= {digest: Answer(*fields) for digest, *fields in news}
            progress(len(news))
    return [answers[digest] for digest in digests]


@contextlib.contextmanager
def _asking(client: Client, bodies: Mapping[str, Body]) -> Iterator[queue.SimpleQueue[concurrent.futures.Future]]:
    """Asks in threads inside the block. Yields the queue of what is finished: futures of (digest, answer)."""
    finished: queue.SimpleQueue[concurrent.futures.Future] = queue.SimpleQueue()
    stopped, count = threading.Event(), client.limits.concurrency
    with requests.Session() as session, concurrent.futures.ThreadPoolExecutor(count) as pool:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=count))
        session.auth = _bearer(read_key(client.key_variable) if bodies else None)
        try:
            for digest, body in bodies.items():
                future = pool.submit(_answer, client, session, digest, body, stopped)
                future.add_done_callback(finished.put)
            yield finished
        finally:  # after an error nobody waits for the others
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _bearer(key: str | None) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """Returns what adds the key to a request. Without a key it adds nothing, and keeps ``requests`` from looking for a
    password in the user's .netrc."""

    def add_key(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if key is not None:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    return add_key


def _next_answers(finished: queue.SimpleQueue[concurrent.futures.Future]) -> list[list[Any]]:
    """Returns [digest, *answer] of some that are finished, none when a minute brings none. Raises what a request
    raised."""
    news: list[list[Any]] = []
    with contextlib.suppress(queue.Empty):
        while len(news) < _UPDATE_ANSWERS:
            digest, answer = finished.get(block=not news, timeout=_UPDATE_SECONDS).result()
            news.append([digest, *answer])
    return news


def _answer(
    client: Client, session: requests.Session, digest: str, body: Body, stopped: threading.Event
) -> tuple[str, Answer]:
    """Returns the digest and its answer, which is read from the disk or asked for and then kept."""
    path, limits = client.folder / digest[:2] / f"{digest}.json", client.limits
    if kept := read_answer(path, body):
        return digest, kept
    for number in range(limits.tries):
        if stopped.is_set():
            break
        outcome = _try_once(client, session, body)
        if isinstance(outcome, Answer):
            write_answer(path, body, outcome)
            return digest, outcome._replace(tries=number + 1)
        wait = max(back_off(digest, number, limits), outcome.retry_after)
        if number + 1 == limits.tries or wait > limits.longest_wait:
            raise _final_error(client, outcome, number + 1, wait)
        client.sleep(wait)
    raise RunAgain("another request has failed")  # nobody reads it


def _final_error(client: Client, failure: Failure, tries: int, wait: float) -> UserError | RunAgain:
    """Returns the error of a request that is not tried again."""
    if not failure.is_outage:
        return UserError(f"{client.url} is no chat-completions endpoint ({failure.reason}); correct the url")
    if wait > client.limits.longest_wait:
        what = f"asks to wait {wait:.0f} s ({failure.reason})"
    else:
        what = f"gave no answer in {tries} tries ({failure.reason})"
    return RunAgain(f"{client.url} {what}; answers are kept, the same command goes on from them")


def back_off(digest: str, number: int, limits: Limits) -> float:
    """Returns the seconds to wait after try ``number`` of a request: twice as long each time, up to ``longest_wait``,
    times a factor in [1/2, 1) that differs between requests, so that they do not all come back at once."""
    fraction = int(hashlib.sha256(f"{digest}/{number}".encode()).hexdigest()[:8], 16) / 2**32
    return min(limits.first_wait * 2.0**number, limits.longest_wait) * (1 + fraction) / 2


def _try_once(client: Client, session: requests.Session, body: Body) -> Answer | Failure:
    """Sends a request once. Raises UserError when the endpoint refuses it for good."""
    url = f"{client.url.rstrip('/')}/chat/completions"
    try:
        response = session.post(url, json=body, timeout=client.limits.timeout, allow_redirects=False)
    except requests.RequestException as error:
        return Failure(type(error).__name__, 0.0, True)
    status = f"{response.status_code} {response.reason or ''}".strip()
    if response.status_code in _TRANSIENT or response.status_code >= 500:
        return Failure(status, seconds_to_wait(response.headers.get("Retry-After", "")), True)
    if response.status_code != 200:
        raise UserError(f"{client.url} answers {status}{_server_words(response, client)}; "
                        f"{_mend(response.status_code, client, body)}")  # fmt: skip
    try:
        answer = parse_response(response.json())
    except ValueError:
        answer = None
    return answer or Failure("it answers without choices", 0.0, False)


def _mend(status: int, client: Client, body: Body) -> str:
    """Returns what to do about a refusal."""
    if status in (401, 403) and client.key_variable is None:
        return "name the environment variable of its key in key_variable"
    if status in (401, 403):
        return f"correct the key in {client.key_variable}, or its rights to model {body['model']!r}"
    if status == 404:
        return f"correct the url, or the model {body['model']!r}"
    if status < 400:
        return "give the url that it redirects to"
    return f"correct the model {body['model']!r}, max_tokens or the options"


def _server_words(response: requests.Response, client: Client) -> str:
    """Returns the beginning of the server's own message in brackets, without the key; nothing where there is none."""
    if response.status_code in (401, 403):  # some servers show a part of the key
        return ""
    try:
        message = one_line(str(response.json()["error"]["message"]))
    except (ValueError, LookupError, TypeError):
        return ""
    if key := read_key(client.key_variable):
        message = message.replace(key, "...")
    return f" ({message[:120]})"


def seconds_to_wait(text: str, now: Callable[[], float] = time.time) -> float:
    """Returns the seconds that a Retry-After header asks for, given as seconds or as a date; 0 where it is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now())
    except (ValueError, TypeError, OverflowError):
        return 0.0
