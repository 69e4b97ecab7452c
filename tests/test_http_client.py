"""The client of a chat-completions endpoint, against a real server: what it sends, retries, refuses and keeps."""

import collections
import contextlib
import dataclasses
import email.utils
import itertools
import json
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from alignjax.distributed.hosts import Hosts
from alignjax.errors import RunAgain, UserError
from alignjax.preferences import http_client
from alignjax.preferences.http_answers import Answer, request_digest
from alignjax.preferences.http_client import Client, Limits, ask_all, back_off, check_url, read_key, seconds_to_wait
from tests.chat_server import said, serve

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Requests to this machine go to this machine."""
    monkeypatch.setenv("NO_PROXY", "*")


def request(text, **settings):
    return {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": text}], **settings}


def text_of(body):
    return body["messages"][-1]["content"]


def echo(number, body):
    return said(f"echo {text_of(body)}")


class Case:
    """A server with a client whose sleeps are recorded instead of slept."""

    def __init__(self, chat, folder, **limits):
        self.chat, self.slept = chat, []
        words = {"concurrency": 1, "tries": 4, "timeout": 5.0, **limits}
        self.client = Client(chat.url, None, folder, Limits(**words), self.slept.append)

    def ask(self, *bodies, hosts=Hosts(), **changes):
        return ask_all(dataclasses.replace(self.client, **changes), bodies, hosts)


@pytest.fixture
def case(tmp_path):
    """Returns (reply, limits) -> a Case."""
    with contextlib.ExitStack() as stack:
        yield lambda reply, **limits: Case(stack.enter_context(serve(reply)), tmp_path / "answers", **limits)


def kept_files(case):
    return sorted(path for path in case.client.folder.rglob("*") if path.is_file())


# What is sent and returned


def test_a_request_is_a_post_of_its_body_with_the_key_of_the_variable(case, monkeypatch):
    monkeypatch.setenv("THE_KEY", f"{KEY}\n")
    asked = case(lambda *_: said("(A)", [("(", [("(", -0.1)]), ("A", [("A", -0.25), ("B", -1.5)])], (7, 2)))
    body = request("why?", max_tokens=5)
    answers = asked.ask(body, key_variable="THE_KEY")
    tokens = [["(", [["(", -0.1]]], ["A", [["A", -0.25], ["B", -1.5]]]]
    assert answers == [Answer("(A)", tokens, 7, 2, tries=1)]
    assert (asked.chat.bodies, asked.chat.paths) == ([body], ["/v1/chat/completions"])
    assert asked.chat.keys == [f"Bearer {KEY}"]
    assert KEY not in "".join(path.read_text() for path in kept_files(asked)) and len(kept_files(asked)) == 1
    assert KEY not in repr(asked.client)


def test_without_a_variable_no_key_is_sent_and_no_password_is_looked_for(case, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asked = case(echo)
    asked.ask(request("x"))
    asked.ask(request("y"), url=asked.chat.url + "/")
    assert asked.chat.keys == [None, None] and set(asked.chat.paths) == {"/v1/chat/completions"}


def test_answers_come_in_the_order_of_the_requests_and_equal_requests_are_asked_once(case):
    def slow_first(number, body):
        time.sleep(0.1 if text_of(body) in ("0", "1") else 0.01)
        return echo(number, body)

    asked = case(slow_first, concurrency=4)
    texts = [str(i % 12) for i in range(30)]
    assert [answer.text for answer in asked.ask(*map(request, texts))] == [f"echo {text}" for text in texts]
    assert sorted(map(text_of, asked.chat.bodies)) == sorted(set(texts))
    assert 1 < asked.chat.most_at_work <= 4
    assert asked.ask() == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"choices": [{"message": {"content": None}}]}, ""),  # a refusal, or a thought without an end
        ({"choices": [{"message": {"content": "B"}, "logprobs": None}], "usage": None}, "B"),
    ],
)
def test_an_answer_may_lack_text_log_probs_and_usage(case, value, text):
    assert case(lambda *_: value).ask(request("x")) == [Answer(text, [], 0, 0, 1)]


# Tries


PASSING = {
    "429": (429, {}, {"error": {"message": "slow down"}}),
    "408": (408, {}, ""),
    "500": (500, {}, "broken"),
    "503": (503, {}, ""),
    "529": (529, {}, ""),
    "closed": "close",
    "stalled": 0.6,
    "cut short": (200, {"Content-Length": "1000"}, "{"),
    "no JSON": "<html>hello</html>",
    "nonsense": [1, 2],
    "a number": 7,
    "no choices": {"error": {"message": "overloaded"}},
    "empty choices": {"choices": []},
    "no message": {"choices": [{}]},
    "a text that is none": {"choices": [{"message": {"content": 3}}]},
    "damaged log-probs": {
        "choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": [{}]}]}}]
    },
    "a log-prob that is none": said("A", [("A", [("A", float("nan"))])]),
    "tokens that are none": {**said("A"), "usage": {"prompt_tokens": "many", "completion_tokens": 1}},
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_tried_again_after_a_longer_and_longer_wait(case, fault):
    asked = case(lambda number, body: PASSING[fault] if number < 2 else said("(B)"),
                 timeout=0.2 if fault == "stalled" else 5.0)  # fmt: skip
    body = request("x")
    assert asked.ask(body)[0][::4] == ("(B)", 3)
    waits = [back_off(request_digest(body), number, asked.client.limits) for number in range(2)]
    assert asked.slept == waits and len(asked.chat.bodies) == 3
    assert asked.ask(body)[0][::4] == ("(B)", 0)  # what was kept is the good answer
    assert len(asked.chat.bodies) == 3


def test_the_number_of_tries_is_bounded(case):
    for fault, error, words in (("500", RunAgain, "500"), ("closed", RunAgain, "ConnectionError"),
                                ("no choices", UserError, "is no chat-completions endpoint")):  # fmt: skip
        asked = case(lambda *_, fault=fault: PASSING[fault], tries=3)
        with pytest.raises(error, match=words) as raised:
            asked.ask(request("x"))
        assert len(asked.chat.bodies) == 3 and len(asked.slept) == 2
        assert asked.chat.url in str(raised.value) and "\n" not in str(raised.value)
        assert kept_files(asked) == []


def test_nobody_listening_is_an_outage(tmp_path):
    with serve(echo) as chat:
        pass
    slept = []
    with pytest.raises(RunAgain, match=r"gave no answer in 2 tries \(ConnectionError\); answers are kept"):
        ask_all(Client(chat.url, None, tmp_path, Limits(tries=2), slept.append), [request("x")], Hosts())
    assert len(slept) == 1


def test_retry_after_is_honoured_in_both_its_forms(case):
    date = email.utils.format_datetime(email.utils.localtime(), usegmt=False)
    for header, low, high in (("7", 7, 7), ("0", 0, 1), (date, 0, 1), ("soon", 0, 1), ("", 0, 1)):
        asked = case(lambda number, body, h=header: (429, {"Retry-After": h}, "") if not number else said("A"))
        asked.ask(request(f"after {header!r}"))
        assert len(asked.slept) == 1 and low <= asked.slept[0] <= high
    now = time.time()
    assert seconds_to_wait(email.utils.formatdate(now + 30, usegmt=True), lambda: now) == pytest.approx(30, abs=1)
    assert seconds_to_wait(email.utils.formatdate(now - 30, usegmt=True), lambda: now) == 0


def test_a_server_that_asks_to_wait_for_an_hour_ends_the_run_at_once(case):
    asked = case(lambda *_: (429, {"Retry-After": "3600"}, ""))
    with pytest.raises(RunAgain, match=r"asks to wait 3600 s \(429"):
        asked.ask(request("x"))
    assert len(asked.chat.bodies) == 1 and asked.slept == []


def test_the_wait_doubles_up_to_a_bound_and_differs_between_requests():
    limits = Limits(first_wait=2.0, longest_wait=20.0)
    digests = [request_digest(request(str(i))) for i in range(200)]
    for number, full in enumerate((2, 4, 8, 16, 20, 20)):
        waits = [back_off(digest, number, limits) for digest in digests]
        assert full / 2 <= min(waits) < 0.55 * full and 0.95 * full < max(waits) < full
        assert len(set(waits)) == 200
        assert waits == [back_off(digest, number, limits) for digest in digests]


REFUSED = [
    (400, "correct the model 'm', max_tokens or the options"),
    (401, "correct the key in THE_KEY, or its rights to model 'm'"),
    (403, "correct the key in THE_KEY, or its rights to model 'm'"),
    (404, "correct the url, or the model 'm'"),
    (422, "correct the model 'm', max_tokens or the options"),
    (302, "give the url that it redirects to"),
]


@pytest.mark.parametrize(("status", "mend"), REFUSED)
def test_what_will_not_pass_is_refused_at_once_in_one_line(case, monkeypatch, status, mend):
    monkeypatch.setenv("THE_KEY", KEY)
    words = {"error": {"message": f"unknown\nparameter {KEY}"}}
    asked = case(lambda *_: (status, {"Location": "http://127.0.0.1:9/"}, words))
    with pytest.raises(UserError) as error:
        asked.ask(request("x"), key_variable="THE_KEY")
    message = str(error.value)
    assert message.startswith(f"{asked.chat.url} answers {status} ") and message.endswith(mend)
    assert KEY not in message and "\n" not in message
    assert ("unknown parameter ..." in message) == (status not in (401, 403))
    assert len(asked.chat.bodies) == 1 and asked.slept == [] and kept_files(asked) == []


def test_an_endpoint_that_wants_a_key_says_where_to_name_it(case):
    with pytest.raises(UserError, match=r"answers 401 .*; name the environment variable of its key in key_variable"):
        case(lambda *_: (401, {}, "")).ask(request("x"))


def test_a_refusal_ends_the_requests_that_wait(case):
    """Of many, those at work are finished and kept, and no other is asked."""
    asked = case(lambda number, body: (404, {}, "") if number == 3 else echo(number, body), concurrency=2)
    with pytest.raises(UserError, match="404"):
        asked.ask(*(request(str(i)) for i in range(200)))
    assert len(asked.chat.bodies) < 100 and len(kept_files(asked)) == len(asked.chat.bodies) - 1


def test_after_a_refusal_a_request_that_waits_is_not_tried_again(case):
    tried = threading.Event()

    def reply(number, body):
        if text_of(body) == "slow":
            tried.set()
            return 500, {}, ""
        assert tried.wait(5)
        return 404, {}, ""

    asked = case(reply, concurrency=2)
    with pytest.raises(UserError, match="404"):
        asked.ask(request("bad"), request("slow"), sleep=lambda seconds: time.sleep(0.2))
    assert sorted(map(text_of, asked.chat.bodies)) == ["bad", "slow"]


# What is kept


def test_a_second_run_asks_nothing_wherever_the_server_is(case):
    first, bodies = case(echo, concurrency=3), [request(str(i)) for i in range(9)]
    answers = first.ask(*bodies)
    other = case(lambda *_: said("another server"))
    for asked in (first, other):
        assert asked.ask(*bodies) == [answer._replace(tries=0) for answer in answers]
    assert len(first.chat.bodies) == 9 and other.chat.bodies == []


def test_a_request_with_another_model_message_or_setting_is_another(case):
    asked = case(echo)
    bodies = [request("x"), request("y"), {**request("x"), "model": "n"}, request("x", max_tokens=3),
              request("x", temperature=1), request("x", seed=1), request("x", max_tokens=4)]  # fmt: skip
    for body in bodies:
        asked.ask(body)
    assert asked.chat.bodies == bodies and len(kept_files(asked)) == len(bodies)
    asked.ask(dict(reversed(request("x").items())))  # the order of entries means nothing
    assert len(asked.chat.bodies) == len(bodies)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"x"', '"y"'),  # of another request
        lambda text: text.replace('"echo x"', "3"),
        lambda text: text.replace('"prompt_tokens": 11', '"prompt_tokens": "11"'),
        lambda text: text.replace('"tokens": []', '"tokens": [1]'),
        lambda text: text.replace('"tokens": []', '"tokens": [["A", [["A", "high"]]]]'),
        lambda text: text.replace('"tries": 0', '"tries": 0, "more": 1'),
        lambda text: text.replace('"text"', '"words"'),
    ],
)
def test_a_damaged_answer_is_asked_again_and_mended(case, damage):
    asked = case(echo)
    asked.ask(request("x"))
    (path,) = kept_files(asked)
    good = path.read_text()
    path.write_text(damage(good))
    assert path.read_text() != good
    assert asked.ask(request("x"))[0].text == "echo x" and len(asked.chat.bodies) == 2
    assert path.read_text() == good


def test_a_run_that_is_killed_asks_nothing_twice_but_what_was_at_work(tmp_path, environment):
    """SIGKILL in the middle of 60 requests, three at a time."""
    program = (
        "import sys, json; from pathlib import Path; from alignjax.distributed.hosts import Hosts\n"
        "from alignjax.preferences.http_client import Client, Limits, ask_all\n"
        "url, folder, bodies = json.loads(sys.argv[1])\n"
        "ask_all(Client(url, None, Path(folder), Limits(concurrency=3)), bodies, Hosts())\n"
    )
    bodies, enough, killed = [request(str(i)) for i in range(60)], threading.Event(), threading.Event()

    def slow(number, body):
        if number >= 20:
            enough.set()
            killed.wait(60)
        return echo(number, body)

    with serve(slow) as chat:
        words = json.dumps([chat.url, str(tmp_path), bodies])
        process = subprocess.Popen([sys.executable, "-c", program, words], env=environment(1))
        assert enough.wait(60)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed.set()
        before = len(chat.bodies)
        answers = ask_all(Client(chat.url, None, tmp_path, Limits(concurrency=3)), bodies, Hosts())
        assert [answer.text for answer in answers] == [f"echo {i}" for i in range(60)]
        assert 20 < before <= 23
        times = collections.Counter(map(text_of, chat.bodies))
        assert set(times) == {str(i) for i in range(60)} and max(times.values()) <= 2
        assert sum(times.values()) <= 63
        assert before + sum(answer.tries for answer in answers) == len(chat.bodies)


# Several processes


class Store:
    """The coordination service's part that a broadcast uses, between threads."""

    def __init__(self):
        self.values = collections.defaultdict(queue.Queue)

    def key_value_set(self, key, value):
        self.values[key].put(value)

    def blocking_key_value_get(self, key, milliseconds):
        return self.values[key].get(timeout=10)


def in_two_processes(asked, bodies):
    """Returns what ``ask_all`` returns, or raises, in process 0 and in process 1."""
    store, outcomes = Store(), [None, None]

    def work(index):
        try:
            outcomes[index] = asked.ask(*bodies, hosts=Hosts(index, 2, client=store))
        except UserError as error:
            outcomes[index] = str(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_process_0_alone_asks_and_all_receive_its_answers(case, monkeypatch):
    monkeypatch.setattr(http_client, "_UPDATE_SECONDS", 0.01)  # many updates, some of them empty
    monkeypatch.setattr(http_client, "_UPDATE_ANSWERS", 2)

    def slow(number, body):
        time.sleep(0.03)
        return said(text_of(body), [("A", [("A", -0.5)])])

    asked, bodies = case(slow, concurrency=3), [request(str(i)) for i in range(13)]
    first, second = in_two_processes(asked, bodies)
    assert first == second == [Answer(str(i), [["A", [["A", -0.5]]]], 11, 3, 1) for i in range(13)]
    assert sorted(map(text_of, asked.chat.bodies)) == sorted(str(i) for i in range(13))


def test_a_refusal_is_raised_in_all_processes(case):
    first, second = in_two_processes(case(lambda *_: (404, {}, "")), [request("x")])
    assert first == second and "answers 404" in first


# What is wrong from the start


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000/v1", "is not http"),
        ("", "is malformed"),
        ("ftp://host/v1", "is not http"),
        ("http://", "malformed"),
        ("http:///v1", "malformed"),
        ("http://host:port/v1", "malformed"),
        ("http://host:99999/v1", "malformed"),
        ("http://[::1/v1", "malformed"),
        ("http://host/v1?key=1", "has a [?] or #"),
        ("http://host/v1#x", "has a [?] or #"),
        ("http://ho st/v1", "url"),
        ("http://host/v1/chat/completions/", "leave that out"),
        (f"http://me:{KEY}@host/v1", "holds a user or password"),
        (f"http://me:{KEY}@host:port/v1", "holds a user or password"),
    ],
)
def test_a_url_that_cannot_be_asked_is_refused(url, words):
    with pytest.raises(UserError, match=words) as error:
        check_url(url)
    assert KEY not in str(error.value) and "\n" not in str(error.value)


def test_urls_that_can_be_asked_pass():
    for url in ("http://localhost:8000/v1", "https://api.example.org/v1/", "http://[::1]:80/v1", "http://10.0.0.1"):
        check_url(url)


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "line\nbreak", "clé"])
def test_a_variable_without_a_key_is_refused_without_showing_it(monkeypatch, value):
    monkeypatch.delenv("THE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(UserError, match=r"environment variable THE_KEY (is not set|holds)") as error:
        read_key("THE_KEY")
    assert not (value or "").strip() or value not in str(error.value)
    assert read_key(None) is None


@pytest.mark.parametrize(
    "wrong", [{"concurrency": 0}, {"tries": 0}, {"timeout": 0.0}, {"first_wait": -1.0}, {"longest_wait": float("inf")}]
)
def test_limits_have_a_range(wrong):
    with pytest.raises(UserError, match=rf"Limits\.{next(iter(wrong))}="):
        Limits(**wrong)


def test_digests_of_different_requests_differ():
    bodies = [request(text, max_tokens=n) for text, n in itertools.product("abcdef", range(5))]
    assert len({request_digest(body) for body in bodies}) == len(bodies)
