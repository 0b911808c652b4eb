// The page: a conversation, and beside it the search for the answer. Text of models is only ever set as text.

import { compare, offer } from "./compare.js";
import { $, element, judgePlot, marked, number, rewardPlot, rowOf } from "./draw.js";
import { forget, judgement, keep, open, past, viewOf } from "./runs.js";

const MOST_SHOWN = 12;

let messages = [];
let running = null; // an AbortController
let shown = null; // the search that the right side shows

function listPast() {
  $("past").replaceChildren(
    ...past().map((search) => {
      const item = element("li");
      const label = `${search.prompt.slice(0, 60)} (reward ${number(search.result?.reward)})`;
      item.append(element("button", label, { type: "button", onclick: () => show(search) }));
      return item;
    }),
  );
  offer(past());
}

// The right side.

function figures(iterations) {
  $("figures").querySelector("tbody").replaceChildren(
    ...iterations.map((i) => rowOf([i.iteration, number(i.best), number(i.mean), number(i.kl, 1), number(i.ess, 1), number(i.seconds, 1)])),
  );
}

function candidates(iterations) {
  const all = iterations.flatMap((i) => i.candidates ?? []).filter((c) => Number.isFinite(c.reward));
  all.sort((a, b) => b.reward - a.reward);
  const distinct = [...new Map(all.map((c) => [c.text, c])).values()].sort((a, b) => b.reward - a.reward);
  $("candidates").replaceChildren(
    ...distinct.slice(0, MOST_SHOWN).map((c, i) => {
      const item = element("li");
      const judged = Number.isFinite(c.judge) ? `, judge ${number(c.judge)}` : "";
      const fold = element("details", undefined, { open: i === 0 });
      const summary = element("summary");
      summary.append(element("b", `${number(c.reward)}${judged}`), c.text.slice(0, 70));
      fold.append(summary, ...(i ? marked(c.text, distinct[0].text) : [c.text]));
      item.append(fold);
      return item;
    }),
  );
}

function judged(search) {
  const found = judgement(search);
  $("judge").hidden = found === null;
  if (!found) return;
  $("agreement").textContent = found.said;
  $("judged").replaceChildren(judgePlot(found.judged, found.judged.find((c) => c.text === search.answer)));
}

// What an iteration that runs has so far.
function underway(event) {
  const best = event.unfinished;
  $("status").textContent = `iteration ${event.iteration} of ${event.iterations}, token ${event.step}, ${event.rows} rollouts decode, ${number(event.seconds, 0)} s` + (best ? `; the best so far of it (${number(best.reward)}): “${best.text}”` : "");
}

function show(search) {
  shown = search;
  const last = search.iterations.at(-1);
  const result = search.result;
  if (result) {
    const judge = Number.isFinite(result.judge) ? `, judge ${number(result.judge)}` : "";
    $("status").textContent = `“${search.prompt.slice(0, 60)}”: reward ${number(result.reward)}${judge}, ${result.rollouts} rollouts, ${number(result.seconds, 1)} s, ${result.status}`;
  } else if (last) {
    const left = (last.seconds / last.rollouts) * (last.budget - last.rollouts);
    $("status").textContent = `iteration ${last.iteration} of ${last.iterations}, ${last.rollouts} of ${last.budget} rollouts, best ${number(last.best_so_far)}, about ${number(left, 0)} s left`;
  } else {
    $("status").textContent = "Searching…";
  }
  const plot = rewardPlot(search.iterations);
  $("plot").replaceChildren(...(plot ? [plot] : []));
  figures(search.iterations);
  candidates(search.iterations);
  judged(search);
  const base = result?.baseline;
  $("baseline").textContent = base ? `${base.text}\n(reward ${number(base.reward)}${Number.isFinite(base.judge) ? `, judge ${number(base.judge)}` : ""})` : "-";
  $("export").disabled = !search.trace;
}

// The conversation.

function turn(role, text, note) {
  const item = element("li", text, { className: role });
  if (note) item.append(element("small", note));
  $("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let name = "";
      let data = "";
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data === "[DONE]") return;
      if (data) yield [name, JSON.parse(data)];
    }
  }
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  turn("user", text);
  const item = turn("assistant", "…");
  let search = { prompt: text, at: new Date().toISOString(), iterations: [], result: null, answer: "" };
  running = new AbortController();
  busy(true);
  show(search);
  try {
    const settles = $("blocks").checked;
    const body = {
      messages,
      stream: true,
      aisp: {
        effort: $("effort").value, strength: Number($("strength").value), seed: messages.length,
        events: true, candidates: true, baseline: true, judge_all: true, trace: true, settle: settles,
      },
    };
    const headers = { "Content-Type": "application/json" };
    const key = sessionStorage.getItem("aisp-local.key");
    if (key) headers.Authorization = `Bearer ${key}`;
    const answer = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: running.signal });
    if (answer.status === 401) {
      const given = window.prompt("API key");
      if (given) sessionStorage.setItem("aisp-local.key", given);
      throw new Error("the API key was missing or wrong; send again");
    }
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const [name, event] of serverSentEvents(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      if (name === "aisp.progress") {
        underway(event);
        continue;
      }
      if (name === "aisp.iteration") search.iterations.push(event);
      else if (name === "aisp.result") search.result = event;
      else if (name === "aisp.trace") search = viewOf(event);
      else {
        search.answer += event.choices[0]?.delta.content ?? "";
        if (search.answer) item.firstChild.textContent = search.answer;
        continue;
      }
      show(search);
    }
  } catch (error) {
    if (error.name === "AbortError") {
      const best = search.iterations.at(-1)?.text;
      search.answer ||= best ?? "";
      search.result ??= best === undefined ? null : { reward: search.iterations.at(-1).best_so_far, rollouts: search.iterations.at(-1).rollouts, seconds: search.iterations.at(-1).seconds, status: "interrupted" };
    } else {
      $("error").textContent = error.message;
    }
  }
  running = null;
  busy(false);
  if (!search.answer) {
    item.remove();
    messages.pop();
    $("text").value ||= text;
    return;
  }
  item.firstChild.textContent = search.answer;
  messages.push({ role: "assistant", content: search.answer });
  if (search.result) item.append(element("small", `reward ${number(search.result.reward)}, ${search.result.rollouts} rollouts, ${search.result.status}`));
  show(search);
  keep(search);
  listPast();
}

function busy(is) {
  $("send").disabled = is;
  $("stop").disabled = !is;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("error").textContent = "";
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("turns").replaceChildren();
  $("text").focus();
});
$("strength").addEventListener("input", () => ($("strong").textContent = $("strength").value));
$("forget").addEventListener("click", () => {
  forget();
  listPast();
});
$("export").addEventListener("click", () => {
  if (!shown?.trace) return;
  const url = URL.createObjectURL(new Blob([JSON.stringify(shown.trace, null, 1)], { type: "application/json" }));
  element("a", "", { href: url, download: "trace.json" }).click();
  URL.revokeObjectURL(url);
});
// A file that was chosen or dropped: a past run.
async function opened(file) {
  if (!file) return;
  $("error").textContent = "";
  try {
    const run = await open(file);
    keep(run);
    listPast();
    if (!running) show(run);
  } catch (error) {
    $("error").textContent = error.message;
  }
}
$("open").addEventListener("change", async () => {
  await opened($("open").files[0]);
  $("open").value = ""; // so that the same file can be chosen again
});
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    if (kind === "drop") opened(event.dataTransfer.files[0]);
  });
}
$("versus").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});

listPast();
fetch("v1/models").then((answer) => (answer.ok ? answer.json() : null)).then((found) => {
  if (found) $("model").textContent = found.data[0].id;
}).catch(() => {});
$("text").focus();
