// The page: a conversation, and beside it the search for the answer. Text of models is only ever set as text.

const $ = (id) => document.getElementById(id);
const KEPT = "aisp-local.searches";
const MOST_KEPT = 30;
const MOST_SHOWN = 12;

let messages = [];
let running = null; // an AbortController
let shown = null; // the search that the right side shows

function element(name, text, properties = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return Object.assign(made, properties);
}

function number(value, digits = 2) {
  return typeof value === "number" && Number.isFinite(value) ? value.toFixed(digits) : "-";
}

// Past searches: in this browser, nowhere else.

function past() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

function keep(search) {
  try {
    localStorage.setItem(KEPT, JSON.stringify([search, ...past()].slice(0, MOST_KEPT)));
  } catch {
    // Full, or not allowed: then it is not kept.
  }
  listPast();
}

function listPast() {
  $("past").replaceChildren(
    ...past().map((search) => {
      const item = element("li");
      const label = `${search.prompt.slice(0, 60)} (reward ${number(search.result?.reward)})`;
      item.append(element("button", label, { type: "button", onclick: () => show(search) }));
      return item;
    }),
  );
  $("export").disabled = shown === null;
}

// The right side.

const NAMESPACE = "http://www.w3.org/2000/svg";

function draw(name, attributes, text) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function plot(iterations) {
  const rewards = iterations.flatMap((i) => (i.candidates ?? []).map((c) => c.reward)).concat(
    iterations.flatMap((i) => [i.best_so_far, i.mean]),
  ).filter(Number.isFinite);
  if (!rewards.length) return $("plot").replaceChildren();
  const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
  const [width, height, left, bottom] = [480, 200, 44, 26];
  const x = (i) => left + ((i - 0.5) / iterations.length) * (width - left - 8);
  const y = (r) => 8 + (1 - (r - low) / (high - low || 1)) * (height - bottom - 8);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(draw("title", {}, `Rewards of ${rewards.length} candidates in ${iterations.length} iterations, best ${number(high)}`));
  for (const value of [low, high]) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width - 8, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  svg.append(draw("text", { x: width / 2, y: height - 6, "text-anchor": "middle" }, "iterations: dots are candidates, line the best so far, dashes the mean"));
  for (const i of iterations) {
    for (const c of i.candidates ?? []) {
      if (Number.isFinite(c.reward)) svg.append(draw("circle", { cx: x(i.iteration) + ((c.row * 7) % 13) - 6, cy: y(c.reward), r: 3 }));
    }
  }
  for (const [kind, key] of [["best", "best_so_far"], ["mean", "mean"]]) {
    const points = iterations.filter((i) => Number.isFinite(i[key])).map((i) => `${x(i.iteration)},${y(i[key])}`);
    svg.append(draw("polyline", { class: kind, points: points.join(" ") }));
  }
  $("plot").replaceChildren(svg);
}

function figures(iterations) {
  $("figures").querySelector("tbody").replaceChildren(
    ...iterations.map((i) => {
      const row = element("tr");
      const values = [i.iteration, number(i.best), number(i.mean), number(i.kl, 1), number(i.ess, 1), number(i.seconds, 1)];
      row.append(...values.map((value) => element("td", String(value))));
      return row;
    }),
  );
}

// Words that a candidate does not share with the best one are marked.
function told(text, best) {
  const known = new Set(best.split(/\s+/));
  return text.split(/(\s+)/).map((part) => (part.trim() && !known.has(part) ? element("mark", part) : document.createTextNode(part)));
}

function candidates(iterations) {
  const all = iterations.flatMap((i) => i.candidates ?? []).filter((c) => Number.isFinite(c.reward));
  all.sort((a, b) => b.reward - a.reward);
  const distinct = [...new Map(all.map((c) => [c.text, c])).values()].sort((a, b) => b.reward - a.reward);
  $("candidates").replaceChildren(
    ...distinct.slice(0, MOST_SHOWN).map((c, i) => {
      const item = element("li");
      const judged = Number.isFinite(c.judge) ? `, judge ${number(c.judge)}` : "";
      const [first, ...rest] = i ? told(c.text, distinct[0].text) : [document.createTextNode(c.text)];
      const fold = element("details", undefined, { open: i === 0 });
      const summary = element("summary");
      summary.append(element("b", `${number(c.reward)}${judged}`), c.text.slice(0, 70));
      fold.append(summary, first, ...rest);
      item.append(fold);
      return item;
    }),
  );
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
  plot(search.iterations);
  figures(search.iterations);
  candidates(search.iterations);
  const base = result?.baseline;
  $("baseline").textContent = base ? `${base.text}\n(reward ${number(base.reward)})` : "-";
  $("export").disabled = false;
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
  const search = { prompt: text, at: new Date().toISOString(), iterations: [], result: null, answer: "" };
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
        events: true, candidates: true, baseline: true, settle: settles,
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
  localStorage.removeItem(KEPT);
  listPast();
});
$("export").addEventListener("click", () => {
  if (!shown) return;
  const url = URL.createObjectURL(new Blob([JSON.stringify(shown, null, 1)], { type: "application/json" }));
  element("a", "", { href: url, download: "aisp-search.json" }).click();
  URL.revokeObjectURL(url);
});
$("open").addEventListener("change", async () => {
  try {
    const search = JSON.parse(await $("open").files[0].text());
    if (!Array.isArray(search.iterations) || typeof search.prompt !== "string") throw new Error();
    show(search);
    $("error").textContent = "";
  } catch {
    $("error").textContent = "that file holds no search of this page";
  }
});

listPast();
fetch("v1/models").then((answer) => (answer.ok ? answer.json() : null)).then((found) => {
  if (found) $("model").textContent = found.data[0].id;
}).catch(() => {});
$("text").focus();
