// A page to try models: it lists them, sends a question to each chosen one, and shows the answers as they come.
"use strict";

const MOST_CHOSEN = 4, MOST_LISTED = 300;
const at = (id) => document.getElementById(id);
const state = { key: "", models: [], columns: new Map(), running: null };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never HTML: names and answers come from elsewhere
  return made;
}

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  const settings = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await fetch(path, { ...settings, headers, signal });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const error = new Error(said?.error?.message ?? `the server answered with status ${response.status}`);
  error.status = response.status;
  throw error;
}

async function loadModels() {
  const before = state.models.map((model) => model.id).join();
  try {
    const response = await call("v1/models");
    state.models = (await response.json()).data;
    at("key-form").hidden = true;
    notice("");
  } catch (error) {
    at("key-form").hidden = error.status !== 401;
    notice(error.status === 401 && !state.key ? "This server needs an API key." : error.message);
    if (error.status === 503) setTimeout(loadModels, 1000); // still loading
    return;
  }
  for (const id of [...state.columns.keys()]) if (!state.models.some((model) => model.id === id)) toggle(id, false);
  if (!state.columns.size && state.models.length) toggle((state.models[1] ?? state.models[0]).id, true);
  if (state.models.map((model) => model.id).join() !== before) listModels();
}

function listModels() {
  const wanted = at("filter").value.trim().toLowerCase();
  const found = state.models.filter((model) => model.id.toLowerCase().includes(wanted));
  at("count").textContent = `(${found.length.toLocaleString()})`;
  const rows = found.slice(0, MOST_LISTED).map((model) => {
    const row = element("li"), label = element("label"), box = element("input");
    box.type = "checkbox";
    box.value = model.id;
    box.checked = state.columns.has(model.id);
    box.disabled = !box.checked && state.columns.size >= MOST_CHOSEN;
    box.addEventListener("change", () => { toggle(model.id, box.checked); listModels(); });
    label.append(box, element("span", "", model.id));
    if (!model.parent) label.append(element("small", "", "base"));
    row.append(label);
    return row;
  });
  if (found.length > MOST_LISTED) rows.push(element("li", "hint", `${found.length - MOST_LISTED} more: type to filter`));
  at("models").replaceChildren(...rows);
}

function toggle(id, chosen) {
  if (!chosen) {
    state.columns.get(id)?.node.remove();
    state.columns.delete(id);
    return;
  }
  const node = element("section", "column"), messages = element("div", "messages");
  messages.setAttribute("aria-live", "polite");
  node.append(element("h2", "", id), messages);
  at("columns").append(node);
  state.columns.set(id, { node, messages, history: [] });
}

function show(column, kind, text) {
  const message = element("div", `message ${kind}`), body = element("span", "", text);
  message.append(body);
  column.messages.append(message);
  column.messages.scrollTop = column.messages.scrollHeight;
  return { message, body };
}

// The JSON of each server-sent event of a response.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(id, column, question, signal) {
  const system = at("system").value.trim();
  const asked = [...column.history, { role: "user", content: question }];
  show(column, "user", question);
  const { message, body } = show(column, "waiting", "");
  const began = performance.now();
  let text = "", finish = "", tokens = 0;
  try {
    const response = await call("v1/chat/completions", {
      model: id, stream: true, stream_options: { include_usage: true },
      messages: system ? [{ role: "system", content: system }, ...asked] : asked,
      temperature: Number(at("temperature").value), max_tokens: Number(at("max-tokens").value),
    }, signal);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      text += choice?.delta?.content ?? "";
      finish = choice?.finish_reason ?? finish;
      tokens = event.usage?.completion_tokens ?? tokens;
      body.textContent = text;
      column.messages.scrollTop = column.messages.scrollHeight;
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const cut = finish === "length" ? ", cut at the maximum" : "";
    message.append(element("small", "", `${tokens} tokens in ${seconds} s${cut}`));
    column.history = [...asked, { role: "assistant", content: text }];
  } catch (error) {
    if (error.name === "AbortError") message.append(element("small", "", "stopped"));
    else {
      message.classList.add("error");
      message.append(element("small", "", error.message));
    }
  } finally {
    message.classList.remove("waiting");
  }
}

async function ask(event) {
  event.preventDefault();
  const question = at("question").value;
  if (!question.trim() || state.running) return;
  if (!state.columns.size) return notice("Choose a model first.");
  notice("");
  at("question").value = "";
  state.running = new AbortController();
  busy(true);
  await Promise.all([...state.columns].map(([id, column]) => answer(id, column, question, state.running.signal)));
  state.running = null;
  busy(false);
  at("question").focus();
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  at("clear").disabled = yes;
}

function notice(text) {
  at("notice").textContent = text;
}

at("ask").addEventListener("submit", ask);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
at("stop").addEventListener("click", () => state.running?.abort());
at("clear").addEventListener("click", () => {
  for (const column of state.columns.values()) {
    column.history = [];
    column.messages.replaceChildren();
  }
});
at("filter").addEventListener("input", listModels);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = at("key").value.trim(); // kept in this page alone
  loadModels();
});
setInterval(() => { if (!document.hidden && !state.running && state.models.length) loadModels(); }, 10000); // new adapters
loadModels();
