"""OpenAIChatModel against a real HTTP server on this machine: what it asks, says, refuses and survives."""

import contextlib
import gzip
import json
import logging
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_chat import CHAT, HELLO

import companion.chat
from companion.chat import ChatPiece, ChatServerError, Message, OpenAIChatModel

KEY = "sk-test-0123456789"


class Handler(BaseHTTPRequestHandler):
    """Hands each request to the server's script, which writes what it likes."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers, body))
        with contextlib.suppress(ConnectionError):
            self.server.script(self, body)
        self.close_connection = True

    def log_message(self, *_):
        pass

    def begin(self, status=200, kind="text/event-stream", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def say(self, *parts):
        """Write events: a dict is a chunk, a str the bytes as they are."""
        for part in parts:
            text = part if isinstance(part, str) else f"data: {json.dumps(part)}\n\n"
            self.wfile.write(text.encode("utf-8"))
            self.wfile.flush()


@pytest.fixture
def server(monkeypatch):
    """`server(script)` runs the script (a function of handler and body, or parts to say) for each request."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    running.requests = []
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def serve(script, **options):
        if not callable(script):
            parts = script

            def script(handler, _):
                handler.begin()
                handler.say(*parts)

        running.script = script
        serve.requests = running.requests
        return OpenAIChatModel(running.url, "tiny", **{"retries": 0, "timeout": 5.0, **options})

    serve.url = running.url
    yield serve
    running.shutdown()
    running.server_close()


def chunk(text=None, finish=None, log_probs=None):
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    if log_probs is not None:
        choice["logprobs"] = {
            "content": [{"token": "?", "logprob": each, "bytes": None} for each in log_probs]
        }
    return {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny", "choices": [choice]}


END = (chunk(finish="stop"), "data: [DONE]\n\n")


def failure(model, match=".", **options):
    with pytest.raises(ChatServerError, match=match) as caught:
        model.complete(HELLO, **options)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return caught.value


# --- What it asks and says ----------------------------------------------------------------------------------


def answered_here(handler, body):
    """Answer as a server would whose model is the small one of this machine."""
    messages = [Message(each["role"], each["content"]) for each in body["messages"]]
    options = {
        name: body[name] for name in ("max_tokens", "temperature", "top_p", "seed", "stop") if name in body
    }
    handler.begin()
    handler.say(": a comment\n\n", chunk(""))
    for piece in CHAT.stream(messages, **options, log_probs=body.get("logprobs", False)):
        handler.say(chunk(piece.text, piece.finish, piece.log_probs))
    handler.say({**chunk(), "choices": [], "usage": {"total_tokens": 9}}, "data: [DONE]\n\n")


@pytest.mark.verifies("companion.chat.OpenAIChatModel", against="LocalChatModel behind http.server")
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 9},
        {"max_tokens": 40, "temperature": 0.8, "seed": 5},
        {"max_tokens": 40, "temperature": 1.3, "top_p": 0.9, "seed": 6, "stop": ["th", " c", "a"]},
    ],
)
def test_a_server_says_what_its_model_says(agree, server, options):
    model = server(answered_here)
    theirs = list(CHAT.stream(HELLO, **options, log_probs=True))
    mine = list(model.stream(HELLO, **options, log_probs=True))
    agree(
        [score for piece in mine for score in piece.log_probs],
        [score for piece in theirs for score in piece.log_probs],
        tolerance=0,
        quantity="log-probabilities of an answer",
    )
    agree(
        "".join(piece.text for piece in mine),
        "".join(piece.text for piece in theirs),
        tolerance=0,
        quantity="text of an answer",
    )
    assert [piece.finish for piece in mine][-1] == theirs[-1].finish
    assert not any(piece.finish or piece.log_probs == () for piece in mine[:-1])
    assert model.complete(HELLO, **options) == "".join(piece.text for piece in theirs)


def test_what_is_asked(server):
    model = server([chunk("yes"), *END], api_key=KEY)
    assert model.complete(HELLO) == "yes"
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    plain = {"model": "tiny", "stream": True, "temperature": 0.0, "max_tokens": 512}
    assert body == plain | {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat 🐈?"}]
    }
    model = server([chunk("yes"), *END], limit="max_completion_tokens")
    stop = ["a", "b", "c", "d", "e"]
    model.complete(HELLO, max_tokens=7, temperature=0.5, top_p=0.25, seed=3, stop=stop)
    _, headers, body = server.requests[1]
    del body["messages"], plain["max_tokens"]
    more = {"max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.25, "seed": 3, "stop": stop[:4]}
    assert body == plain | more
    assert headers["Authorization"] == "Bearer no-key"


def test_the_request_waits_for_the_first_piece(server):
    pieces = server([chunk("yes"), *END]).stream(HELLO)
    assert server.requests == []
    assert list(pieces) == [ChatPiece("yes"), ChatPiece("", (), "stop")]
    assert len(server.requests) == 1


def test_pieces_come_as_they_are_said(server):
    heard = threading.Event()

    def script(handler, _):
        handler.begin()
        handler.say(chunk("one"))
        assert heard.wait(5)
        handler.say(chunk(" two"), *END)

    pieces = server(script).stream(HELLO)
    assert next(pieces).text == "one"
    heard.set()
    assert [piece.text for piece in pieces] == [" two", ""]


@pytest.mark.parametrize("stop", [["END"], ["x", "1", "2", "3", "END"]])
def test_stop_strings_hold_where_the_server_ignores_them(server, stop):
    left = threading.Event()

    def script(handler, _):
        handler.begin()
        handler.say(chunk("say E"), chunk("NO, say EN"), chunk("D and mo"))
        try:
            while True:
                handler.say(chunk("re"))
        except ConnectionError:
            left.set()

    pieces = list(server(script).stream(HELLO, stop=stop))
    assert "".join(piece.text for piece in pieces) == "say ENO, say "
    assert [piece.finish for piece in pieces][-1] == "stop"
    assert left.wait(5)  # the connection ends with the answer


def test_held_text_and_the_end(server):
    said = [chunk("say EN"), chunk(finish="length"), "data: [DONE]\n\n"]
    assert list(server(said).stream(HELLO, stop=["END"]))[-1] == ChatPiece("EN", (), "length")
    odd = server([chunk("yes"), chunk(finish="eos")])  # other servers have other names for it
    assert list(odd.stream(HELLO))[-1].finish == "stop"


def test_halves_of_a_character(server):
    cat = json.dumps("🐈")[1:-1]
    halves = [f"data: {json.dumps(chunk('@')).replace('@', half)}\n\n" for half in (cat[:6], cat[6:])]
    assert server([*halves, *END]).complete(HELLO) == "🐈"
    assert server([halves[0], *END]).complete(HELLO) == "\N{REPLACEMENT CHARACTER}"


def test_a_closed_iterator_ends_the_answer(server):
    left = threading.Event()

    def script(handler, _):
        handler.begin()
        try:
            while True:
                handler.say(chunk("more"))
        except ConnectionError:
            left.set()

    pieces = server(script).stream(HELLO)
    next(pieces)
    pieces.close()
    assert left.wait(5)


# --- What goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "match"),
    [
        (400, {"error": {"message": "bad temperature"}}, r"does not accept the request .*400\): bad temper"),
        (
            401,
            {"error": {"message": f"Incorrect key: {KEY}."}},
            r"refuses the key .*: Incorrect key: \[key\]\.$",
        ),
        (403, {"error": {"message": "no"}}, r"does not allow it to this key \(HTTP 403\): no$"),
        (404, {"detail": "Not Found"}, r"knows no such model or path \(HTTP 404\): Not Found$"),
        (422, {"error": "too hot"}, r"does not accept the request \(HTTP 422\): too hot$"),
        (429, {}, r"is busy, or the quota is used up \(HTTP 429\)"),
        (500, "<html>\n\x1b[31moops" + "!" * 5000, r"failed \(HTTP 500\): <html> \[31moops!+…$"),
        (503, "", r"failed \(HTTP 503\)$"),
    ],
)
def test_errors_of_the_server_are_clear(server, status, body, match):
    def script(handler, _):
        text = body if isinstance(body, str) else json.dumps(body)
        handler.begin(status, "application/json")
        handler.say(text)

    error = failure(server(script, api_key=KEY), rf"^http://127\.0\.0\.1:\d+/v1 .*{match}")
    assert error.status == status


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (["data: {not json}\n\n"], "no stream of chat completions"),
        (["data: 5\n\n"], "a chunk has no choices"),
        (["data: null\n\n"], "a chunk has no choices"),
        ([{"object": "list"}], "a chunk has no choices"),
        ([{"choices": "abc"}], "a chunk has no choices"),
        ([chunk(5)], "content is of type int"),
        ([chunk(["a"])], "content is of type list"),
        ([chunk("a", finish=7)], "finish_reason is of type int"),
        ([chunk("a", log_probs=["high"])], "log-probabilities are not all numbers"),
        ([chunk("a", log_probs=[None])], "log-probabilities are not all numbers"),
        ([chunk("a", log_probs=[float("nan")])], "log-probabilities are not all numbers"),
        ([{"choices": [{"delta": {"content": "a"}, "logprobs": {"content": 5}}]}], "not all numbers"),
        ([{"choices": [5]}], "broke off its answer"),
        (["data: " + "[" * 100_000 + "\n\n"], "no stream of chat completions"),
        ([chunk("half of")], "broke off its answer"),
        (["data: [DONE]\n\n"], "broke off its answer"),
        (["Hello"], "broke off its answer"),
        (["\n\n"], "broke off its answer"),
        ([chunk("a"), {"error": {"message": "out of memory"}}], "reports an error: out of memory"),
        ([chunk("a"), chunk(finish="content_filter")], "withheld the answer"),
    ],
)
def test_malformed_answers_are_refused(server, parts, match):
    failure(server(parts), match)


def test_bytes_that_are_no_text(server):
    def script(handler, _):
        handler.begin()
        handler.wfile.write(b"data: \xff\xfe\n\n")

    failure(server(script), "no stream of chat completions")


def test_a_connection_that_breaks(server):
    def script(handler, _):
        handler.begin(Content_Length=100_000)
        handler.say(chunk("a"))

    failure(server(script), "cannot be reached, or broke off: .+")


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = OpenAIChatModel(f"http://127.0.0.1:{port}/v1", "tiny", retries=0)
    failure(model, "cannot be reached, or broke off: .*refused")


@pytest.mark.parametrize("begun", [False, True])
def test_a_stall(server, begun):
    done = threading.Event()

    def script(handler, _):
        if begun:
            handler.begin()
            handler.say(chunk("one"))
        done.wait(10)

    start, heard = time.monotonic(), []
    with pytest.raises(ChatServerError, match="was silent for 0.3 s$"):
        for piece in server(script, timeout=0.3).stream(HELLO):
            heard.append(piece.text)
    done.set()
    assert heard == ["one"] * begun
    assert time.monotonic() - start < 5


def test_an_answer_without_end(server, monkeypatch):
    def script(handler, _):
        handler.begin()
        while True:
            handler.say(": still thinking\n\n")
            time.sleep(0.01)

    failure(server(script, deadline=0.2), r"takes more than 0.2 s for an answer$")
    monkeypatch.setattr(companion.chat, "MAX_RESPONSE_BYTES", 1000)
    failure(server(script), "sends more than 1000 bytes$")


def test_one_endless_line(server, monkeypatch):
    def script(handler, _):
        handler.begin()
        while True:
            handler.say("data: " + "x" * 10_000)

    monkeypatch.setattr(companion.chat, "MAX_RESPONSE_BYTES", 100_000)
    failure(server(script), "sends more than 100000 bytes$")


def test_compressed_answers_are_refused(server):
    def script(handler, _):
        assert handler.headers["Accept-Encoding"] == "identity"
        handler.begin(Content_Encoding="gzip")
        handler.wfile.write(gzip.compress(b"data: " + bytes(10**6)))

    failure(server(script), "compresses its answers")


def test_log_probabilities_that_do_not_come(server):
    model = server([chunk("yes"), *END])
    assert model.complete(HELLO) == "yes"
    failure(model, "gives no log-probabilities", log_probs=True)


def test_a_busy_server_is_asked_again(server):
    def script(handler, _):
        if len(server.requests) < 3:
            handler.begin(503, retry_after_ms="1")
        else:
            handler.begin()
            handler.say(chunk("yes"), *END)

    assert server(script, retries=2).complete(HELLO) == "yes"
    assert len(server.requests) == 3
    server.requests.clear()
    assert failure(server(script, retries=1)).status == 503
    assert len(server.requests) == 2


def test_the_key_is_never_told(server, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    model = server([chunk("yes"), *END])
    assert model.complete(HELLO) == "yes"
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(model) + str(vars(model)) and KEY not in caplog.text
    with pytest.raises(ValueError) as caught:
        OpenAIChatModel(server.url, "tiny", api_key=f"{KEY} \n")
    assert KEY not in str(caught.value)


# --- Bad input ----------------------------------------------------------------------------------------------

URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (("localhost:80", "m"), {}, ValueError, "base_url must be an http:// or https:// URL"),
        (("http:///v1", "m"), {}, ValueError, "base_url must be an http:// or https:// URL"),
        (("http://a:99999/v1", "m"), {}, ValueError, "base_url must be an http:// or https:// URL"),
        ((None, "m"), {}, ValueError, "base_url must be .* got one NoneType"),
        (("http://me:secret@a/v1", "m"), {}, ValueError, "base_url must hold no user and no password"),
        ((URL, ""), {}, ValueError, "model must be the name of a model at the server, got ''"),
        ((URL, None), {}, TypeError, "model must be a str, got NoneType"),
        ((URL, "m"), {"api_key": ""}, ValueError, "api_key must be printable ASCII"),
        ((URL, "m"), {"api_key": "ключ"}, ValueError, "api_key must be printable ASCII"),
        ((URL, "m"), {"timeout": 0}, ValueError, "timeout must be positive and finite, got 0"),
        ((URL, "m"), {"deadline": None}, TypeError, "deadline must be a number, got NoneType"),
        ((URL, "m"), {"retries": -1}, ValueError, "retries must be an int in 0 … 10, got -1"),
        ((URL, "m"), {"limit": "tokens"}, ValueError, "limit must be one of 'max_tokens'"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, match):
    with pytest.raises(error, match=match) as caught:
        OpenAIChatModel(*arguments, **options)
    assert "secret" not in str(caught.value)


def test_bad_calls_send_nothing(server):
    model = server([chunk("yes"), *END])
    for messages, options in (([], {}), (HELLO, {"max_tokens": 0}), (HELLO, {"stop": [""]})):
        with pytest.raises(ValueError):
            model.stream(messages, **options)
    assert server.requests == []


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        ImportError, match=r"needs the package openai: install the extra `app` \(pip .*\[app\]'\)$"
    ):
        OpenAIChatModel(URL, "m")
