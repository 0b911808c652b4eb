// The page: a conversation, and beside it the search for the answer. Text of models is only ever set as text.

import { compare, offer } from "./compare.js";
import { $, element, judgePlot, marked, number, rewardPlot, rowOf } from "./draw.js";
import { changed, forget, judgement, keep, open, past, remember, remembered, viewOf } from "./runs.js";

const MOST_SHOWN = 12;

let messages = [];
let running = null; // { search, id, abort, stopping }: the search under way, and what ends it
let shown = null; // the search that the right side shows
const folded = new Map(); // what the user opened (true) or closed of the candidates, by text

function listPast() {
  const all = running ? [running.search, ...past()] : past();
  $("past").replaceChildren(
    ...all.map((search) => {
      const item = element("li");
      const label = `${search.prompt.slice(0, 60)} (${search === running?.search ? "under way" : `reward ${number(search.result?.reward)}`})`;
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
  const focused = document.activeElement?.closest("#candidates details")?.candidate;
  const distinct = [...new Map(all.map((c) => [c.text, c])).values()].sort((a, b) => b.reward - a.reward);
  $("candidates").replaceChildren(
    ...distinct.slice(0, MOST_SHOWN).map((c, i) => {
      const item = element("li");
      const judged = Number.isFinite(c.judge) ? `, judge ${number(c.judge)}` : "";
      const fold = element("details", undefined, { open: folded.get(c.text) ?? i === 0, candidate: c.text });
      const summary = element("summary", undefined, { onclick: () => folded.set(c.text, !fold.open) });
      summary.append(element("b", `${number(c.reward)}${judged}`), c.text.slice(0, 70));
      fold.append(summary, ...(i ? marked(c.text, distinct[0].text) : [c.text]));
      item.append(fold);
      return item;
    }),
  );
  if (focused !== undefined) [...$("candidates").querySelectorAll("details")].find((fold) => fold.candidate === focused)?.firstChild.focus({ preventScroll: true });
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
  $("now").textContent = `iteration ${event.iteration} of ${event.iterations}, token ${event.step}, ${event.rows} rollouts decode, ${number(event.seconds, 0)} s` + (best ? `; the best so far of it (${number(best.reward)}): “${best.text}”` : "");
}

function show(search) {
  shown = search;
  $("now").textContent = "";
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
  $("aligned").textContent = result ? search.answer : "-";
  $("baseline").textContent = base ? `${base.text}\n(reward ${number(base.reward)}${Number.isFinite(base.judge) ? `, judge ${number(base.judge)}` : ""})` : "-";
  $("export").disabled = !search.trace;
}

function nameModel() {
  if ($("model").textContent) return;
  fetch("v1/models", { headers: headers() }).then((answer) => (answer.ok ? answer.json() : null)).then((found) => {
    if (found) $("model").textContent = found.data[0].id;
  }).catch(() => {});
}

// The conversation.

// Whoever reads further up stays there.
function say(item, text, note) {
  const turns = $("turns");
  const last = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 50;
  item.firstChild.textContent = text;
  if (note) item.append(element("small", note));
  if (last) turns.scrollTop = turns.scrollHeight;
}

function turn(role, text) {
  const item = element("li", text, { className: role });
  $("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

// For what the browser says when a connection fails; what ends a search here stays what it is.
function gone(error) {
  throw error?.name === "AbortError" ? error : new Error("the server does not answer; is it still running?");
}

function headers() {
  const key = remembered();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// Whether the user gave a key.
function askForKey() {
  const given = window.prompt("API key");
  if (given) remember(given);
  return Boolean(given);
}

async function refusal(answer) {
  const said = await answer.json().catch(() => null);
  return new Error(said?.error?.message ?? `the server answered with status ${answer.status}`);
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(gone);
    if (done) gone();
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
  const conversation = messages; // a new one may have begun when the answer comes
  conversation.push({ role: "user", content: text });
  const said = turn("user", text);
  const item = turn("assistant", "…");
  const mine = { search: { prompt: text, at: new Date().toISOString(), iterations: [], result: null, answer: "" }, id: null, abort: new AbortController(), stopping: false };
  running = mine;
  folded.clear();
  busy(true);
  show(mine.search);
  listPast();
  // Whoever looks at another search meanwhile goes on looking at it.
  const update = (next = mine.search) => {
    const seen = shown === mine.search;
    mine.search = next;
    if (seen) show(next);
  };
  try {
    const body = {
      messages: conversation,
      stream: true,
      aisp: {
        effort: $("effort").value, strength: Number($("strength").value), seed: conversation.length,
        events: true, candidates: true, baseline: true, judge_all: true, trace: true, settle: $("blocks").checked,
      },
    };
    const post = () => fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: mine.abort.signal }).catch(gone);
    let answer = await post();
    if (answer.status === 401 && askForKey()) answer = await post();
    if (!answer.ok) throw await refusal(answer);
    nameModel();
    mine.id = answer.headers.get("X-Request-Id");
    for await (const [name, event] of serverSentEvents(answer.body)) {
      const search = mine.search;
      if (event.error) throw new Error(event.error.message);
      if (name === "aisp.progress") {
        if (shown === search) underway(event);
        continue;
      }
      if (name === "aisp.iteration") search.iterations.push(event);
      else if (name === "aisp.result") search.result = event;
      else if (name === "aisp.trace") {
        update(viewOf(event));
        continue;
      } else {
        search.answer += event.choices[0]?.delta.content ?? "";
        if (search.answer) say(item, search.answer);
        continue;
      }
      update();
    }
  } catch (error) {
    if (error.name !== "AbortError") $("error").textContent = error.message;
    // What was seen of the search is kept.
    const last = mine.search.iterations.at(-1);
    if (!mine.search.result && typeof last?.text === "string") {
      mine.search.answer ||= last.text;
      mine.search.result = { reward: last.best_so_far, rollouts: last.rollouts, seconds: last.seconds, status: "interrupted" };
    }
  }
  const search = mine.search;
  running = null;
  busy(false);
  if (!search.answer) {
    item.remove();
    said.remove();
    conversation.pop();
    if (conversation === messages) $("text").value ||= text;
    if (shown === search) $("status").textContent = "Nothing was found.";
    listPast();
    return;
  }
  const note = search.result && `reward ${number(search.result.reward)}, ${search.result.rollouts} rollouts, ${search.result.status}`;
  say(item, search.answer, note);
  conversation.push({ role: "assistant", content: search.answer });
  update();
  keep(search);
  listPast();
}

// The first time with the best so far; the second time, and where the server knows of no search, at once.
async function stop() {
  const mine = running;
  if (!mine) return;
  if (mine.stopping || !mine.id) {
    mine.abort.abort();
    return;
  }
  mine.stopping = true;
  $("stop").textContent = "Stop now";
  const answer = await fetch(`v1/chat/completions/${mine.id}/cancel`, { method: "POST", headers: headers() }).catch(() => null);
  if (!answer?.ok && answer?.status !== 404) mine.abort.abort(); // 404: its end is on the way
}

function busy(is) {
  const left = document.activeElement === $(is ? "send" : "stop"); // a button that cannot be pressed any more
  $("send").disabled = is;
  $("stop").disabled = !is;
  $("stop").textContent = "Stop";
  $("turns").ariaBusy = String(is);
  if (left) $(is ? "stop" : "send").focus();
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
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => {
  running?.abort.abort();
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

changed(listPast);
listPast();
nameModel();
$("text").focus();
