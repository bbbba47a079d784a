"""What the server refuses, and what it frees: wrong requests, keys, hosts, sizes, queues, clients that leave."""

import http.client
import json
import socket
import threading
from urllib.parse import urlsplit

import pytest
from running_server import until
from scripted_engine import ScriptedEngine

from launcher.serving.limits import Limits, is_local, read_keys

KEY = "a-key-of-24-characters-x"
HI = [{"role": "user", "content": "hi"}]
CHAT = {"model": "base", "messages": HI}
MALFORMED = [  # (body, what the error says)
    ("", "the body is not JSON"),
    ("{", "the body is not JSON"),
    ("[]", "the body is a JSON list"),
    ('{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not JSON"),
    ('{"temperature": NaN}', "the body is not JSON"),
    ("[" * 100_000, "the body is not JSON"),
    (b'{"model": "\xff"}', "the body is not JSON"),
    ({}, "model: Field required"),
    ({"model": "base"}, "messages: Field required"),
    ({**CHAT, "model": 5}, "model: Input should be a valid string, got 5"),
    ({**CHAT, "messages": []}, "messages: List should have at least 1 item"),
    ({**CHAT, "messages": "hi"}, "messages: Input should be a valid list"),
    ({**CHAT, "messages": [{"role": "pirate", "content": "hi"}]}, "messages.0.role: Input should be 'system'"),
    ({**CHAT, "messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    ({**CHAT, "messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url"}]}]},
     "messages.0.content.1: a part of type 'image_url' is not supported: this server reads text alone"),
    ({**CHAT, "messages": [{"role": "tool", "content": "5"}]}, "messages.0.role: Input should be 'system'"),
    ({**CHAT, "messages": [*HI, {"role": "assistant", "content": "yes"}]}, "leaves nothing to answer"),
    ({**CHAT, "messages": [{"role": "system", "content": "x"}, *HI]}, "not on system"),  # without turns
    ({**CHAT, "temperature": -1}, "temperature: Input should be greater than or equal to 0, got -1"),
    ({**CHAT, "temperature": "hot"}, "temperature: Input should be a valid number, got 'hot'"),
    ({**CHAT, "temperature": 3}, "temperature: Input should be less than or equal to 2"),
    ({**CHAT, "top_p": 0}, "top_p: Input should be greater than 0"),
    ({**CHAT, "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ({**CHAT, "max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
    ({**CHAT, "max_tokens": 3000}, "max_tokens 3,000 is more than this server allows (2,048"),
    ({**CHAT, "max_tokens": 600}, "the model's context is 512: give max_tokens of at most 50"),
    ({**CHAT, "max_tokens": 5, "max_completion_tokens": 6}, "differ: give max_completion_tokens alone"),
    ({**CHAT, "messages": [{"role": "user", "content": "x" * 600}]}, "the prompt has 601 tokens with its template"),
    ({**CHAT, "stop": [""]}, "stop is at most 16 texts"),
    ({**CHAT, "stop": 5}, "stop: Input should be a valid string"),
    ({**CHAT, "top_logprobs": 2}, "top_logprobs needs logprobs"),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20"),
    ({**CHAT, "seed": 2**70}, "seed: "),
    ({**CHAT, "n": 2}, "n 2 is not supported: send the request once for each answer"),
    ({**CHAT, "n": True}, "n True is not supported"),
    ({**CHAT, "presence_penalty": 0.5}, "presence_penalty 0.5 is not supported"),
    ({**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
    ({**CHAT, "logit_bias": {"5": 1}}, "logit_bias"),
    ({**CHAT, "temprature": 0.5}, "unknown field 'temprature'; did you mean temperature?"),
    ({**CHAT, "top_k": 5}, "unknown field 'top_k'"),
    ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options needs stream"),
    ({**CHAT, "stream": "yes"}, "stream: Input should be a valid boolean"),
]  # fmt: skip
MALFORMED_COMPLETIONS = [
    ({"model": "base"}, "prompt: Field required"),
    ({"model": "base", "prompt": [[]]}, "prompt is empty"),
    ({"model": "base", "prompt": []}, "prompt is a list of 0"),
    ({"model": "base", "prompt": ["a", "b"]}, "prompt is a list of 2, and one prompt is answered per request"),
    ({"model": "base", "prompt": [5, 9999]}, "prompt: 9999 is no token"),
    ({"model": "base", "prompt": [-1]}, "prompt: -1 is no token"),
    ({"model": "base", "prompt": {"text": "a"}}, "prompt: "),
    ({"model": "base", "prompt": "a", "echo": True}, "echo True is not supported"),
    ({"model": "base", "prompt": "a", "best_of": 3}, "best_of 3 is not supported"),
    ({"model": "base", "prompt": "a", "suffix": "b"}, "suffix 'b' is not supported"),
    ({"model": "base", "prompt": "x" * 600}, "the model's context is 512"),
]


def test_each_malformed_request_gets_an_error_that_names_the_fault(start):
    server = start()
    cases = [("/v1/chat/completions", *case) for case in MALFORMED]
    cases += [("/v1/completions", *case) for case in MALFORMED_COMPLETIONS]

    for path, body, said in cases:
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        response = server.client.post(path, content=content, headers={"content-type": "application/json"})
        error = response.json()["error"]

        assert response.status_code == 400, (body, response.text)
        assert said in error["message"], (body, error)
        assert error["type"] == "invalid_request_error"
        assert error.keys() == {"message", "type", "param", "code"}
    assert len(cases) > 30
    until(lambda: not server.engine.requests)
    assert server.chat().status_code == 200


def test_neutral_values_and_fields_without_effect_are_accepted(start):
    server = start()

    answer = server.chat(
        n=1, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, tools=None, response_format={"type": "text"},
        user="me", metadata={"a": "b"}, seed=None, stop=None, max_completion_tokens=4, max_tokens=4, store=True,
    )  # fmt: skip
    message = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}
    turns = server.post(model="base", messages=[*HI, message, *HI])

    assert answer.json()["choices"][0]["message"]["content"] == "base"
    assert turns.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/../../etc/passwd", 404),
     ("GET", "/v1/models/parrot", 404), ("DELETE", "/v1/adapters/parrot", 404), ("GET", "/docs", 404),
     ("OPTIONS", "/v1/models", 405), ("DELETE", "/v1/chat/completions", 405)],
)  # fmt: skip
def test_unknown_paths_and_methods_are_errors_in_the_same_shape(start, method, path, status):
    response = start().client.request(method, path)

    error = response.json()["error"]
    assert response.status_code == status
    assert error.keys() == {"message", "type", "param", "code"}
    if status == 405:
        assert error["message"].endswith(f"use {response.headers['allow']}")


def test_a_load_balancer_asks_for_the_health_by_head(start):
    response = start().client.head("/health")

    assert (response.status_code, response.content) == (200, b"")


def test_a_stream_that_nobody_reads_frees_its_slot(start, monkeypatch):
    """Its answer is larger than what the connection holds."""
    monkeypatch.setattr("launcher.serving.app.UNREAD_S", 0.0)
    server = start(limits=Limits(request_timeout_s=0.5), engine=ScriptedEngine("x" * 3_000))
    server.engine.context_length = 100_000
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps({**CHAT, "max_tokens": 2000, "logprobs": True, "top_logprobs": 20, "stream": True}).encode()

    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        until(lambda: server.service.metrics.duration.counts != [0] * len(server.service.metrics.duration.counts))

    assert not server.service.active
    assert not server.engine.requests


def test_a_key_is_needed_for_everything_that_tells_about_models(start):
    server = start("pirate", keys=(KEY, "another-key-of-24-letters"))
    paths = ["/v1/models", "/v1/models/pirate", "/v1/adapters", "/metrics", "/v1/chat/completions"]

    without = [server.client.get(path) for path in paths]
    wrong = [server.client.get("/v1/models", headers={"authorization": given}) for given in
             ("Bearer nope", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer", "Bearer \x7f")]  # fmt: skip
    right = [server.client.get("/v1/models", headers={"authorization": f"Bearer {key}"}) for key in
             (KEY, "another-key-of-24-letters")]  # fmt: skip
    open_ones = [server.client.get(path) for path in ("/health", "/", "/page.js", "/page.css")]

    assert {response.status_code for response in [*without, *wrong]} == {401}
    assert without[0].json()["error"]["code"] == "invalid_api_key"
    assert {response.status_code for response in [*right, *open_ones]} == {200}


def test_a_page_of_another_site_cannot_ask_a_local_server(start):
    """It can send forms and plain text unasked, and can make its own name lead here; neither is answered."""
    server = start(hosts=("localhost", "127.0.0.1", "::1"))

    rebound = server.client.get("/v1/models", headers={"host": "evil.example:8000"})
    plain = server.client.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    asked = server.client.options("/v1/chat/completions", headers={"origin": "https://evil.example",
                                  "access-control-request-method": "POST"})  # fmt: skip
    local = server.client.get("/v1/models", headers={"host": "LOCALHOST:8000"})

    assert (rebound.status_code, plain.status_code, local.status_code) == (403, 415, 200)
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_without_reading_it_all(start, chunked):
    server = start(limits=Limits(max_request_kb=4))
    body = json.dumps({**CHAT, "user": "x" * 10_000}).encode()
    content = iter([body[i : i + 1000] for i in range(0, len(body), 1000)]) if chunked else body

    response = server.client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})

    assert response.status_code == 413
    assert "larger than 4,096 bytes" in response.json()["error"]["message"]
    assert server.chat().status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(start, monkeypatch):
    monkeypatch.setattr("launcher.serving.limits.BODY_S", 0.2)
    server = start()
    place = urlsplit(server.url)

    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = connection.recv(100)

    assert b"408" in answer.split(b"\r\n")[0]


def test_a_full_queue_answers_429_and_says_when_to_come_back(start):
    server = start(limits=Limits(queue=3))
    server.engine.hold_at = 0  # no first token
    threads = [threading.Thread(target=server.chat) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: server.service.waiting == 3)

    refused = server.chat()
    server.engine.hold_at = None
    for thread in threads:
        thread.join()

    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "queue_full"
    assert server.chat().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(start, stream):
    server = start()
    server.engine.hold_at = 3
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname, place.port)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": stream}), {"Content-Type": "application/json"}
    )
    until(lambda: [each for each in server.engine.requests.values() if each.made == 3])

    connection.close()

    until(lambda: not server.service.active)
    until(lambda: len(server.engine.cancelled) == 1)
    until(lambda: not server.engine.requests)


def test_a_file_of_keys_that_others_can_read_is_warned_of(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o600)
    read_keys(None, str(file))
    assert not caplog.text

    file.chmod(0o640)
    read_keys(None, str(file))

    assert f"can access {file} (mode 640): chmod 600 {file}" in caplog.text
    assert KEY not in caplog.text


def test_keys_come_from_an_option_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{KEY}\n\n{KEY}2\n")
    monkeypatch.setenv("LOLDU_API_KEY", KEY + "3")

    assert read_keys(None, str(file)) == (KEY, KEY + "2")
    assert read_keys(KEY, None) == (KEY,)
    assert read_keys(None, None) == (KEY + "3",)
    monkeypatch.delenv("LOLDU_API_KEY")
    assert read_keys(None, None) == ()


@pytest.mark.parametrize(("key", "text", "said"), [
    ("short", None, "at least 16 ASCII characters"), ("", None, "at least 16"), ("ä" * 20, None, "ASCII"),
    (None, "\n# nothing\n", "holds no key"), (None, None, "cannot be read"), (KEY, KEY, "cannot be combined"),
])  # fmt: skip
def test_a_key_that_protects_nothing_is_refused_and_never_shown(key, text, said, tmp_path, monkeypatch):
    monkeypatch.delenv("LOLDU_API_KEY", raising=False)
    file = None if key and text is None else str(tmp_path / "keys")
    if text is not None:
        (tmp_path / "keys").write_text(text)

    with pytest.raises(ValueError, match=said) as raised:
        read_keys(key, None if key == "" else file)

    assert not key or key not in str(raised.value)


def test_only_this_machines_own_addresses_are_local():
    assert [is_local(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_local(host) for host in ("0.0.0.0", "::", "10.0.0.1")] == [False] * 3
    with pytest.raises(ValueError, match="--host no such host"):
        is_local("no such host")


@pytest.mark.parametrize(
    "wrong", [{"queue": 0}, {"max_tokens": 0}, {"request_timeout_s": 0.0}, {"drain_s": float("nan")}]
)
def test_limits_have_ranges(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        Limits(**wrong)


def test_no_key_and_no_text_is_in_the_log(start, caplog):
    caplog.set_level("DEBUG")
    server = start(keys=(KEY,))

    server.client.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": "my secret"}]},
                       headers={"authorization": f"Bearer {KEY}"})  # fmt: skip
    server.client.get("/v1/models", headers={"authorization": f"Bearer {KEY}-wrong"})

    assert "chatcmpl-" in caplog.text
    assert KEY not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("launcher"))
    assert "my secret" not in caplog.text
