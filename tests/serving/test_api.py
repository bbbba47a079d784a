"""The HTTP API as clients of OpenAI's know it."""

import asyncio
import json

import openai
import pytest
from running_server import CHAT, until, write_adapter


def test_a_chat_is_answered_by_the_model_that_it_names_with_its_own_template(start):
    server = start("pirate", "poet")

    answers = {name: server.chat(name, "ahoy").json() for name in ("base", "pirate", "poet")}

    texts = {name: answer["choices"][0]["message"]["content"] for name, answer in answers.items()}
    assert texts == {"base": "base: ahoy", "pirate": "pirate: u: ahoy\na: ", "poet": "poet: u: ahoy\na: "}
    assert answers["pirate"]["model"] == "pirate"
    assert answers["pirate"]["choices"][0]["finish_reason"] == "stop"
    usage = answers["pirate"]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len("u: ahoy\na: ")


def test_the_openai_client_lists_asks_and_streams(start):
    server = start("pirate")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "ahoy"}]

    models = [model.id for model in client.models.list()]
    whole = client.chat.completions.create(model="pirate", messages=messages, temperature=0)
    stream = client.chat.completions.create(
        model="pirate", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    completion = client.completions.create(model="base", prompt="abc", max_tokens=5, logprobs=2)

    assert models == ["base", "pirate"]
    assert client.models.retrieve("pirate").id == "pirate"
    text = whole.choices[0].message.content
    assert text == "pirate: u: ahoy\na: "
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert completion.choices[0].text == "base:"
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].logprobs.tokens == ["b", "a", "s", "e", ":"]
    assert completion.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4]
    with pytest.raises(openai.NotFoundError, match="'parrot' is not served"):
        client.chat.completions.create(model="parrot", messages=messages)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "text"), [("hoy", "base: a"), (["x", "se"], "ba"), ("hoya", "base: ahoy"), ("b", "")])
def test_an_answer_ends_before_a_stop_string(start, stream, stop, text):
    server = start()

    if stream:
        events = server.events(messages=[{"role": "user", "content": "ahoy"}], stop=stop)
        found = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
        finish = events[-2]["choices"][0]["finish_reason"]
    else:
        choice = server.chat(question="ahoy", stop=stop).json()["choices"][0]
        found, finish = choice["message"]["content"], choice["finish_reason"]

    assert (found, finish) == (text, "stop")
    until(lambda: not server.engine.requests)  # the answer is sent before its request is taken off


def test_log_probabilities_cover_the_text_and_nothing_after_a_stop_string(start):
    server = start()

    choice = server.chat(question="ahoy", logprobs=True, top_logprobs=3, stop="hoy").json()["choices"][0]
    events = server.events(logprobs=True, top_logprobs=3, stop="hi")

    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"] == "base: a"
    assert content[0]["bytes"] == [98]
    assert len(content[0]["top_logprobs"]) == 3
    streamed = [entry for event in events[:-1] for entry in (event["choices"][0]["logprobs"] or {}).get("content", [])]
    assert "".join(entry["token"] for entry in streamed) == "base: "


def test_a_template_without_turns_takes_each_question_as_an_instruction_of_its_own(start):
    server = start()
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]

    answer = server.post(model="base", messages=turns).json()
    system = server.post(model="base", messages=[{"role": "system", "content": "be brief"}, *turns])

    assert "one" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["message"]["content"].endswith("two")
    assert system.status_code == 400
    assert "not on system" in system.json()["error"]["message"]


def test_a_system_prompt_that_the_template_does_not_write_is_refused(start):
    server = start("pirate")
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    folder = write_adapter(server.folder / "deaf")
    (folder / "chat_template.jinja").write_text(users)
    server.catalogue.load("deaf")
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]

    heard = server.post(model="pirate", messages=talk, temperature=0)
    refused = server.post(model="deaf", messages=talk)
    alone = server.post(model="deaf", messages=talk[1:], temperature=0)

    assert heard.json()["choices"][0]["message"]["content"] == "pirate: s: be brief\nu: hi\na: "
    assert refused.status_code == 400
    assert "does not write messages of the role system" in refused.json()["error"]["message"]
    assert alone.json()["choices"][0]["message"]["content"] == "deaf: hi"


@pytest.mark.parametrize("several", [False, True])
def test_the_template_may_be_in_the_settings_of_an_adapters_tokenizer(start, several):
    """Where transformers wrote it before 4.51."""
    server = start()
    folder = write_adapter(server.folder / "older")
    one = {"name": "default", "template": CHAT}
    template = [{"name": "tool_use", "template": "x"}, one] if several else CHAT
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))

    server.catalogue.load("older")

    assert server.chat("older").json()["choices"][0]["message"]["content"] == "older: u: hi\na: "


def test_a_prompt_may_be_token_ids(start):
    server = start()
    ids = server.engine.tokenizer("abc", add_special_tokens=False)["input_ids"]

    answers = [
        server.post("/v1/completions", model="base", prompt=prompt, max_tokens=20).json()
        for prompt in (ids, [ids], "abc")
    ]

    assert {answer["choices"][0]["text"] for answer in answers} == {"base: abc"}


def test_many_requests_at_once_are_answered_in_one_batch_and_none_is_mixed_up(start):
    names = [f"a{i}" for i in range(16)]
    server = start(*names)
    server.engine.hold_at = 3  # until all have come

    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)

        async def one(i):
            messages = [{"role": "user", "content": f"question {i}"}]
            answer = await client.chat.completions.create(model=names[i % 16], messages=messages, temperature=0)
            return answer.choices[0].message.content

        answers = asyncio.gather(*(one(i) for i in range(96)))
        while len(server.engine.requests) < 96:
            await asyncio.sleep(0.01)
        server.engine.hold_at = None
        return await answers

    answers = asyncio.run(ask())

    assert answers == [f"a{i % 16}: u: question {i}\na: " for i in range(96)]
    assert server.engine.most_running == 64
    assert not server.service.active


def test_health_answers_at_once_and_everything_else_waits_for_the_model(start):
    server = start()
    models, server.service.models = server.service.models, None

    loading = [server.client.get("/health"), server.chat()]
    server.service.models = models
    ready = server.client.get("/health")

    assert [response.status_code for response in loading] == [503, 503]
    assert loading[1].headers["retry-after"] == "5"
    assert loading[1].json()["error"]["code"] == "loading"
    assert (ready.status_code, ready.json()) == (200, {"status": "ok"})


def test_an_engine_that_has_failed_makes_the_server_unhealthy(start):
    server = start()

    def submit(request, emit):
        raise RuntimeError("the engine has failed: out of memory")

    server.engine.submit = submit
    refused, health = server.chat(), server.client.get("/health")

    assert refused.status_code == 503
    assert "the engine has failed: out of memory" in refused.json()["error"]["message"]
    assert (health.status_code, health.json()) == (503, {"status": "failed"})
    assert not server.service.active


def test_metrics_are_prometheus_text(start):
    server = start("pirate")
    server.chat("pirate")
    server.chat("parrot")
    server.client.get("/nowhere/at/all")
    until(lambda: 'path="unknown"' in server.client.get("/metrics").text)  # counted after the answer is sent

    lines = server.client.get("/metrics").text.splitlines()

    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['loldu_http_responses_total{path="/v1/chat/completions",status="200"}'] == "1"
    assert values['loldu_http_responses_total{path="/v1/chat/completions",status="404"}'] == "1"
    assert values['loldu_http_responses_total{path="unknown",status="404"}'] == "1"
    assert values["loldu_adapters"] == "1"
    assert values["loldu_answer_seconds_count"] == "1"
    assert int(values["loldu_completion_tokens_total"]) > 10
    assert values["loldu_engine_running"] == "0"
    assert "# TYPE loldu_engine_tokens counter" in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_a_failed_answer_is_an_error_also_within_a_stream(start):
    server = start()
    server.engine.fail = "out of memory"

    whole, events = server.chat(), server.events()

    assert whole.status_code == 500
    assert "out of memory" in whole.json()["error"]["message"]
    assert "out of memory" in events[-1]["error"]["message"]


def test_an_answer_that_takes_too_long_is_cancelled(start):
    from launcher.serving.limits import Limits

    server = start(limits=Limits(request_timeout_s=0.3))
    server.engine.hold_at = 3

    whole, events = server.chat(), server.events()

    assert whole.status_code == 504
    assert events[-1]["error"]["code"] == "timeout"
    until(lambda: len(server.engine.cancelled) == 2)
    until(lambda: not server.engine.requests)


def test_the_events_of_a_stream_come_one_by_one(start):
    """Held after three tokens, the client has these three."""
    server = start()
    server.engine.hold_at = 3
    found = []

    with server.client.stream(
        "POST", "/v1/chat/completions",
        json={"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True},
    ) as response:  # fmt: skip
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
            if "".join(found) == "bas":
                server.engine.hold_at = None

    assert "".join(found) == "base: hi"
