"""The server's demo page: type a prompt or chat, and watch the text grow beside its neighbors.

The page loads no other resources. Content from the server is inserted as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 1rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; } label { margin-right: 1rem; white-space: nowrap; }
textarea { width: 100%; box-sizing: border-box; font: inherit; padding: .5rem; }
input { font: inherit; width: 5rem; } input[type=checkbox] { width: auto; }
#key { width: 12rem; } button { font: inherit; padding: .2rem 1rem; }
form > p { margin: .5rem 0; }
main { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.5rem; }
@media (max-width: 50rem) { main { grid-template-columns: minmax(0, 1fr); } }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
#text { background: var(--soft); padding: .6rem .8rem; border-radius: .3rem; min-height: 6rem; }
#text .prompt, #text .user { opacity: .65; }
#text .user, #text .assistant { margin-bottom: .6rem; }
#mode[hidden] { display: none; }
.chunk { border-top: 1px solid var(--line); padding: .4rem 0; }
.query { font-size: .85rem; opacity: .7; }
.neighbor { background: var(--soft); padding: .3rem .6rem; margin: .4rem 0; border-radius: .3rem;
  font: 13px/1.5 ui-monospace, monospace; }
.about { font: .8rem system-ui, sans-serif; opacity: .8; }
.continuation { border-top: 1px dashed var(--line); }
#status[data-error] { color: #c33; }
"""

_SCRIPT = """
const $ = id => document.getElementById(id);
let running = null, turns = [];
const chats = () => !$("mode").hidden && $("chat").checked;

function add(parent, kind, text) {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  parent.append(element);
  return element;
}

function showChunk(chunk) {
  const section = add($("neighbors"), "chunk", "");
  section.dataset.chunk = chunk.chunk;
  add(section, "query text", `chunk ${chunk.chunk}: ${chunk.text}`);
  for (const [rank, neighbor] of chunk.neighbors.entries()) {
    const box = add(section, "neighbor", "");
    box.style.borderLeft = `.25rem solid ${color(rank, 0.8)}`;
    const distance = "distance" in neighbor ? `, distance ${neighbor.distance.toFixed(4)}` : "";
    add(box, "about", neighbor.source + distance);
    add(box, "text", neighbor.text);
    if (neighbor.continuation) add(box, "text continuation", neighbor.continuation);
  }
  if (!chunk.neighbors.length) add(section, "about", "no neighbors");
}

function color(rank, depth) {
  return `hsl(${(48 + rank * 137) % 360} 90% 50% / ${depth.toFixed(2)})`;
}

// Tint each token in the color of the neighbor that lowered its loss most.
function showCredit(credit, output) {
  const sums = {};
  output.replaceChildren(...credit.tokens.map((text, place) => {
    const span = document.createElement("span"), gains = credit.gain[place];
    span.textContent = text;
    const chunk = credit.chunk[place];
    if (chunk === null) return span;
    const sum = sums[chunk] ??= {count: 0, gains: gains.map(() => 0)};
    sum.count += 1;
    gains.forEach((gain, rank) => sum.gains[rank] += gain);
    span.title = gains.map((gain, rank) => `neighbor ${rank + 1}: ${gain.toFixed(2)} nats`)
      .join("\\n");
    const best = gains.indexOf(Math.max(...gains));
    if (gains[best] > 0) {
      span.style.backgroundColor = color(best, Math.min(gains[best] / 2, 1) * 0.6);
    }
    return span;
  }));
  for (const [chunk, sum] of Object.entries(sums)) {
    document.querySelectorAll(`[data-chunk="${chunk}"] .neighbor .about`).forEach((about, rank) => {
      const gain = sum.gains[rank] / sum.count;
      about.append(`, gain ${gain.toFixed(3)} nats per token of the next chunk`);
    });
  }
}

function status(text, isError) {
  $("status").textContent = text;
  $("status").toggleAttribute("data-error", Boolean(isError));
}

function body() {
  const value = {
    stream: true,
    max_tokens: Number($("max_tokens").value), temperature: Number($("temperature").value),
    top_p: Number($("top_p").value), retrieve: $("retrieve").checked,
    two_chunks: $("two_chunks").checked, neighbor_credit: $("credit").checked,
  };
  if ($("seed").value !== "") value.seed = Number($("seed").value);
  const given = $("given").value.split("\\n").map(line => line.trim()).filter(Boolean);
  if (given.length) value.neighbors = given;
  const prompt = $("prompt").value;
  if (chats()) value.messages = [...turns, {role: "user", content: prompt}];
  else value.prompt = prompt;
  return value;
}

function take(line, output) {
  if (!line.startsWith("data: ") || line === "data: [DONE]") return;
  const message = JSON.parse(line.slice(6));
  if (message.error) throw new Error(message.error.message);
  for (const choice of message.choices) {
    output.append(choice.delta ? choice.delta.content || "" : choice.text);
    for (const chunk of choice.neighbors || []) showChunk(chunk);
    const cut = choice.neighbors_cut ? `; ${choice.neighbors_cut} given neighbors are cut` : "";
    if (choice.neighbor_credit) showCredit(choice.neighbor_credit, output);
    if (choice.finish_reason) status(`done (${choice.finish_reason}${cut})`);
  }
}

async function generate() {
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  running = new AbortController();
  $("go").textContent = "Stop";
  status("…");
  $("neighbors").replaceChildren();
  const chat = chats(), prompt = $("prompt").value, sent = JSON.stringify(body());
  const output = chat ? beginReply(prompt) : beginText(prompt);
  let failed = false;
  try {
    const response = await fetch(chat ? "v1/chat/completions" : "v1/completions",
      {method: "POST", headers, body: sent, signal: running.signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\\n");
      rest = lines.pop();
      for (const line of lines) take(line, output);
    }
  } catch (error) {
    failed = error.name !== "AbortError";
    status(failed ? error.message : "stopped", failed);
  } finally {
    running = null;
    if (chat) endReply(prompt, output, failed);
    showMode();
  }
}

function beginText(prompt) {
  const shown = document.createElement("span"), output = document.createElement("span");
  shown.className = "prompt";
  shown.textContent = prompt;
  $("text").replaceChildren(shown, output);
  return output;
}

function beginReply(prompt) {
  add($("text"), "user", prompt);
  $("prompt").value = "";
  return add($("text"), "assistant", "");
}

// A message without a reply goes back to where it was typed.
function endReply(prompt, output, failed) {
  if (!output.isConnected) return;  // a new chat has begun
  const reply = output.textContent;
  if (failed || !reply) {
    output.previousSibling.remove();
    output.remove();
    $("prompt").value = prompt;
  } else {
    turns.push({role: "user", content: prompt}, {role: "assistant", content: reply});
  }
}

function showMode() {
  $("go").textContent = chats() ? "Send" : "Continue the text";
}

function startAgain() {
  if (running) running.abort();
  turns = [];
  $("text").replaceChildren();
  $("neighbors").replaceChildren();
  showMode();
}

$("chat").addEventListener("change", startAgain);
$("new").addEventListener("click", startAgain);
showMode();

$("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) running.abort(); else generate();
});
const asked = new URLSearchParams(location.hash.slice(1));
for (const [name, value] of asked) if ($(name) && name !== "key") $(name).value = value;
if (asked.has("prompt")) generate();
"""

_BODY = """
<h1>retro-mcore</h1>
<form id="form">
<p id="mode" MODE><label><input id="chat" type="checkbox" checked> chat</label>
<button id="new" type="button">New chat</button></p>
<p><textarea id="prompt" rows="5" placeholder="A text to continue" required></textarea></p>
<p>
<label>new tokens <input id="max_tokens" type="number" value="64" min="1"></label>
<label>temperature <input id="temperature" type="number" value="0.7" min="0" step="0.1"></label>
<label>top p <input id="top_p" type="number" value="0.95" min="0" max="1" step="0.05"></label>
<label>seed <input id="seed" type="number" min="0"></label>
<label><input id="retrieve" type="checkbox" checked> retrieve</label>
<label><input id="two_chunks" type="checkbox"> two chunks</label>
<label title="Nats by which each neighbor lowers the loss of each new token">
<input id="credit" type="checkbox"> credit neighbors</label>
<label>key <input id="key" type="password" autocomplete="off"></label>
</p>
<details><summary>Neighbors of your own</summary>
<p><textarea id="given" rows="3" placeholder="One per line, instead of retrieved"></textarea></p>
</details>
<p><button id="go">Continue the text</button> <span id="status"></span></p>
</form>
<main><div><h2>Text</h2><div id="text" class="text"></div></div>
<div><h2>Neighbors</h2><div id="neighbors"></div></div></main>
"""


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def page_of(chats: bool) -> str:
    """The page.

    Args:
        chats: Whether the model has a chat template: then the page begins with a chat.
    """
    body = _BODY.replace(" MODE>", ">" if chats else " hidden>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>retro-mcore</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head><body>{body}<script>{_SCRIPT}</script></body></html>"
    )


#: Content security policy: run this script and call this server, nothing else.
PAGE_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_hash(_STYLE)}'; "
    f"script-src 'sha256-{_hash(_SCRIPT)}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
