"use strict";
// The page of one model: what is said stays in this browser, and whatever the model writes is text, never HTML.

const at = (id) => document.getElementById(id);
const KEPT = "openelm";
const CONTROLS = [
  // field of the API, words, kind, least, most, step, default; an empty number is left out of the request
  ["temperature", "Temperature", "range", 0, 2, 0.05, 0.8],
  ["top_p", "Top p", "range", 0.05, 1, 0.01, 0.95],
  ["min_p", "Min p", "range", 0, 0.5, 0.01, 0],
  ["repetition_penalty", "Repetition penalty", "range", 1, 2, 0.05, 1],
  ["top_k", "Top k", "number", 1, 100000, 1, ""],
  ["max_tokens", "Most tokens", "number", 1, 100000, 1, 256],
  ["seed", "Seed", "number", 0, 2 ** 31, 1, ""],
];
const EXAMPLES = {
  chat: ["Explain what a language model is, in two sentences.", "Write a short poem about rain.", "Give me three names for a cat."],
  text: ["ROMEO.\nBut soft, what light", "Once upon a time", "The storm came in the night, and"],
};

let model = null;
let turns = []; // {role, pieces: [{text, tokens: [{name, p, top: [[name, p], …]}]}]}
let running = null; // the AbortController of the answer that is being made
let charactersPerToken = 3;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- what is kept in the browser

function keep() {
  const settings = Object.fromEntries(CONTROLS.map(([name]) => [name, at(name).value]));
  const kept = { turns, settings, system: at("system").value, tint: at("tint").checked, theme: document.documentElement.dataset.theme };
  const plain = turns.map(({ role, pieces }) => ({ role, pieces: [{ text: textOf({ pieces }), tokens: [] }] }));
  for (const saved of [kept, { ...kept, turns: plain }, { ...kept, turns: [] }]) {
    try {
      localStorage.setItem(KEPT, JSON.stringify(saved));
      return;
    } catch { /* full: with less, then with nothing but the settings */ }
  }
}

function recall() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

// ---- the conversation

const textOf = (turn) => turn.pieces.map((piece) => piece.text).join("");
const shown = (name) => name.replace(/^bytes:/, "").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "␀";

function spanOf(piece) {
  const span = make("span", { textContent: piece.text });
  if (piece.tokens.length) {
    const p = Math.min(...piece.tokens.map((token) => token.p));
    span.className = `token sure-${p < 0.1 ? 0 : p < 0.3 ? 1 : p < 0.6 ? 2 : 3}`;
    span.tokens = piece.tokens;
  }
  return span;
}

function show(turn) {
  const text = make("div", { className: "text" }, ...turn.pieces.map(spanOf));
  if (turn.role === "assistant") {
    text.tabIndex = 0;
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "Reply; left and right arrow keys tell what the model considered");
  }
  const item = make("li", { className: turn.role }, text);
  at("talk").append(item);
  return item;
}

function showAll() {
  at("talk").replaceChildren();
  turns.forEach(show);
  showState();
}

function showState() {
  at("welcome").hidden = turns.length > 0;
  at("actions").hidden = running !== null || turns.at(-1)?.role !== "assistant";
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  at("talk").setAttribute("aria-busy", String(running !== null));
}

let following = false; // asked for, and not yet done: one layout a frame, however fast tokens come

function follow(force = false) {
  const scroll = at("scroll");
  if (following && !force) return;
  following = true;
  requestAnimationFrame(() => {
    following = false;
    if (force || scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 160) scroll.scrollTop = scroll.scrollHeight;
  });
}

function request() {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true } };
  for (const [name] of CONTROLS) if (at(name).value !== "" && at(name).validity.valid) body[name] = Number(at(name).value);
  const roomTokens = Math.min(body.max_tokens ?? 256, model.context_tokens / 2);
  let roomCharacters = (model.context_tokens - roomTokens) * charactersPerToken * 0.95;
  if (!model.chat_tuned) {
    const prompt = turns.map(textOf).join("");
    return ["v1/completions", { ...body, logprobs: 5, prompt: prompt.slice(-Math.floor(roomCharacters)) }];
  }
  const system = at("system").value.trim();
  const messages = turns.map((turn) => ({ role: turn.role, content: textOf(turn) }));
  const size = () => system.length + messages.reduce((sum, message) => sum + message.content.length + 8, 0);
  while (messages.length > 2 && size() > roomCharacters) messages.splice(0, 2);
  if (system) messages.unshift({ role: "system", content: system });
  return ["v1/chat/completions", { ...body, logprobs: true, top_logprobs: 5, messages }];
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of chunks(response.body.getReader())) {
    const blocks = (rest + decoder.decode(bytes, { stream: true })).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function* chunks(reader) { // Safari's streams cannot be iterated
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

function tokensOf(logprobs) {
  if (logprobs?.content)
    return logprobs.content.map((entry) => ({ name: entry.token, p: Math.exp(entry.logprob), top: entry.top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]) }));
  return (logprobs?.tokens ?? []).map((name, index) => ({
    name, p: Math.exp(logprobs.token_logprobs[index]), top: Object.entries(logprobs.top_logprobs[index]).map(([other, logprob]) => [other, Math.exp(logprob)]),
  }));
}

async function answer() {
  const turn = { role: "assistant", pieces: [] };
  const [path, body] = request();
  turns.push(turn);
  running = new AbortController();
  const item = show(turn);
  item.classList.add("writing");
  say("");
  showState();
  follow(true);
  const clock = { began: performance.now(), first: 0, last: 0, tokens: 0 };
  try {
    const response = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    await receive(response, turn, item.firstChild, clock);
  } catch (error) {
    if (error.name !== "AbortError") say(error instanceof TypeError ? "The server does not answer." : error.message);
  }
  item.classList.remove("writing");
  running = null;
  if (!turn.pieces.length) {
    turns.pop();
    item.remove();
  }
  showState();
  follow();
  keep();
}

async function receive(response, turn, element, clock) {
  let held = []; // tokens without text of their own: parts of one character
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) count(event.usage, turn);
    const choice = event.choices[0];
    if (!choice) continue;
    const tokens = tokensOf(choice.logprobs);
    if (tokens.length) measure(clock, tokens.length);
    held.push(...tokens);
    const text = choice.text ?? choice.delta?.content ?? "";
    if (!text) continue;
    const piece = { text, tokens: held };
    held = [];
    turn.pieces.push(piece);
    element.append(spanOf(piece));
    follow();
  }
}

function measure(clock, tokens) {
  clock.last = performance.now();
  clock.first ||= clock.last;
  clock.tokens += tokens;
  at("first").textContent = `${Math.round(clock.first - clock.began)} ms`;
  if (clock.tokens < 2) return;
  const rate = `${((1000 * (clock.tokens - 1)) / (clock.last - clock.first || 1)).toFixed(1)}`;
  at("rate").textContent = rate;
  at("measured").textContent = `${clock.tokens} tokens, ${rate} a second`;
}

function count(usage, turn) {
  at("used").textContent = `${usage.total_tokens} of ${model.context_tokens}`;
  const characters = textOf(turn).length;
  if (usage.completion_tokens > 16) charactersPerToken = Math.max(1, characters / usage.completion_tokens);
}

const say = (text) => { at("notice").textContent = text; };

function send(text) {
  if (running || !model) return;
  if (!text && (model.chat_tuned || !turns.length)) return at("message").focus();
  if (text) {
    const last = turns.at(-1);
    const joined = !model.chat_tuned && last && !/\s$/.test(textOf(last)) && !/^\s/.test(text) ? " " + text : text;
    turns.push({ role: "user", pieces: [{ text: joined, tokens: [] }] });
    show(turns.at(-1));
  }
  at("message").value = "";
  fit();
  answer();
}

function again() {
  if (running || turns.at(-1)?.role !== "assistant") return;
  turns.pop();
  at("talk").lastChild.remove();
  answer();
}

// ---- what the model considered

function tell(span) {
  document.querySelector(".token.here")?.classList.remove("here");
  const box = at("alternatives");
  box.hidden = !span;
  if (!span) return;
  span.classList.add("here");
  box.replaceChildren(...span.tokens.flatMap((token, index) => [...(index ? [make("hr")] : []), ...rows(token)]));
  const place = span.getClientRects()[0];
  const width = box.offsetWidth, height = box.offsetHeight;
  box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - width - 8))}px`;
  box.style.top = `${place.top > height + 12 ? place.top - height - 6 : place.bottom + 6}px`;
}

function rows(token) {
  const others = token.top.filter(([name]) => name !== token.name);
  const all = [[token.name, token.p, true], ...others.map(([name, p]) => [name, p, false])].sort((a, b) => b[1] - a[1]);
  return all.map(([name, p, chosen]) => {
    const bar = make("span", { className: "bar" });
    bar.style.width = `${Math.max(2, 100 * p)}%`;
    const percent = make("span", { className: "number", textContent: `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %` });
    return make("div", { className: chosen ? "chosen" : "" }, make("code", { textContent: shown(name) }), make("span", {}, bar), percent);
  });
}

function walk(event) {
  const text = event.target;
  if (!text.classList.contains("text")) return;
  if (event.key === "Escape") return tell(null);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const spans = [...text.querySelectorAll(".token")];
  const here = spans.indexOf(text.querySelector(".here"));
  const next = spans[Math.max(0, Math.min(spans.length - 1, here + step))];
  if (!next) return;
  next.scrollIntoView({ block: "nearest" });
  tell(next);
  at("alternatives").setAttribute("aria-live", "polite");
}

// ---- the panel

function showControls(settings) {
  for (const [name, words, kind, min, max, step, standard] of CONTROLS) {
    const input = make("input", { id: name, type: kind, min, max, step, value: settings[name] ?? standard });
    if (standard === "") input.placeholder = name === "seed" ? "random" : "off";
    const output = make("output", { textContent: kind === "range" ? input.value : "" });
    input.addEventListener("input", () => {
      if (kind === "range") output.textContent = input.value;
      keep();
    });
    const label = make("label", {}, make("span", { textContent: words }), ...(kind === "range" ? [output, input] : [input]));
    at("controls").append(label);
  }
}

function defaults() {
  for (const [name, , , , , , standard] of CONTROLS) {
    at(name).value = standard;
    at(name).dispatchEvent(new Event("input"));
  }
}

function showShape() {
  const most = { query_heads: 1, ffn_dim: 1 };
  for (const layer of model.layers) for (const key in most) most[key] = Math.max(most[key], layer[key]);
  const bar = (key, value, text) => {
    const element = make("span", { className: "bar", textContent: text });
    element.style.width = `${(100 * value) / most[key]}%`;
    return make("td", {}, element);
  };
  at("shape").tBodies[0].replaceChildren(...model.layers.map((layer, index) => make(
    "tr", {}, make("th", { scope: "row", textContent: index + 1 }),
    bar("query_heads", layer.query_heads, `${layer.query_heads} : ${layer.kv_heads}`),
    bar("ffn_dim", layer.ffn_dim, layer.ffn_dim.toLocaleString("en")),
  )));
  at("shape-text").textContent = `${model.layers.length} layers, each as wide as its place asks for; heads are query : key-value.`;
}

const short = (number) => Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(number);

function showModel() {
  const chat = model.chat_tuned;
  at("model").textContent = `${model.id} · ${short(model.parameters)} parameters · ${chat ? "tuned to chat" : "base model"}`;
  document.title = `${model.id} – openelm`;
  at("talk").classList.toggle("document", !chat);
  at("message").placeholder = chat ? "Ask something" : "Type how a text begins";
  at("message-label").textContent = at("message").placeholder;
  at("send").textContent = chat ? "Send" : "Continue";
  at("system").disabled = !chat;
  at("system-remark").hidden = chat;
  at("welcome-title").textContent = chat ? "What is on your mind?" : "How does it begin?";
  at("welcome-text").textContent = chat
    ? "Nothing you write leaves your browser and this server. Point at a word of a reply to see what else the model considered."
    : "This model was not tuned to answer: it continues the text you give it. With an empty box, Continue asks for more. Point at a word to see what else the model considered.";
  at("examples").replaceChildren(...EXAMPLES[chat ? "chat" : "text"].map((text) =>
    make("button", { type: "button", textContent: text, onclick: () => send(text) })));
  at("max_tokens").max = model.context_tokens;
  showShape();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  at("theme").textContent = dark ? "Light" : "Dark";
  return dark;
}

function setPanel(open) {
  at("panel").classList.toggle("open", open);
  at("open-panel").setAttribute("aria-expanded", String(open));
  at(open ? "close-panel" : "open-panel").focus();
}

function fit() {
  const box = at("message");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function listen() {
  at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(at("message").value); });
  at("message").addEventListener("input", fit);
  at("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send(at("message").value);
  });
  at("stop").addEventListener("click", () => { running?.abort(); at("message").focus(); });
  at("again").addEventListener("click", again);
  at("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(model.chat_tuned ? textOf(turns.at(-1)) : turns.map(textOf).join(""));
    say("Copied.");
  });
  at("new").addEventListener("click", () => { running?.abort(); turns = []; say(""); showAll(); keep(); at("message").focus(); });
  at("theme").addEventListener("click", () => { setTheme(setTheme(document.documentElement.dataset.theme) ? "light" : "dark"); keep(); });
  at("open-panel").addEventListener("click", () => setPanel(!at("panel").classList.contains("open")));
  at("close-panel").addEventListener("click", () => setPanel(false));
  at("defaults").addEventListener("click", defaults);
  at("system").addEventListener("input", keep);
  at("tint").addEventListener("change", () => { at("talk").classList.toggle("tinted", at("tint").checked); keep(); });
  at("talk").addEventListener("pointerover", (event) => tell(event.target.closest(".token")));
  at("talk").addEventListener("pointerleave", () => tell(null));
  at("talk").addEventListener("keydown", walk);
  at("talk").addEventListener("focusout", () => tell(null));
  at("scroll").addEventListener("scroll", () => tell(null), { passive: true });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (at("panel").classList.contains("open")) setPanel(false);
    else running?.abort();
  });
}

async function start() {
  const kept = recall();
  showControls(kept.settings ?? {});
  at("system").value = kept.system ?? "";
  at("tint").checked = kept.tint ?? false;
  at("talk").classList.toggle("tinted", at("tint").checked);
  setTheme(kept.theme);
  listen();
  try {
    const response = await fetch("v1/models");
    model = (await response.json()).data[0];
  } catch {
    return say("The server does not answer.");
  }
  turns = kept.turns ?? [];
  showModel();
  showAll();
  follow(true);
}

start();
