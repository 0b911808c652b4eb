// Two runs side by side.

import { $, bestPlot, element, marked, number, rowOf } from "./draw.js";
import { nameOf } from "./runs.js";

function label(run) {
  return `${run.prompt.slice(0, 50)} (reward ${number(run.result?.reward)}, ${run.at?.slice(0, 16).replace("T", " ") ?? ""})`;
}

const chosen = { first: null, second: null }; // what the user chose

// The choices, of all runs; at first the newest two.
export function offer(runs) {
  Object.keys(chosen).forEach((id, newest) => {
    const known = runs.some((run) => nameOf(run) === chosen[id]);
    const options = runs.map((run, i) => element("option", label(run), { value: String(i), run, selected: known ? nameOf(run) === chosen[id] : i === newest }));
    $(id).replaceChildren(...options);
    $(id).onchange = () => (chosen[id] = nameOf($(id).selectedOptions[0].run));
  });
  $("compare").disabled = runs.length < 2;
  if (runs.length < 2) $("compared").hidden = true;
}

// All that a run was asked for, by name, as text.
function settings(run) {
  const flat = {};
  if (!run.trace) return flat;
  const { search, model, reward, judge, machine, prompt } = run.trace;
  flat.prompt = JSON.stringify(prompt);
  for (const [name, value] of Object.entries(search)) if (name !== "options" && name !== "steering") flat[name] = JSON.stringify(value);
  for (const [name, value] of Object.entries(search.options)) flat[`option ${name}`] = JSON.stringify(value);
  flat.steering = search.steering === null ? "none" : JSON.stringify(search.steering).slice(0, 60);
  for (const [name, value] of Object.entries({ model, reward, judge })) flat[name] = value ? `${value.name} ${String(value.fingerprint).slice(0, 12)}` : "none";
  for (const [name, value] of Object.entries(machine ?? {})) flat[`machine ${name}`] = JSON.stringify(value);
  return flat;
}

// A long value: its end, in which prompts of one conversation differ.
function short(text = "-") {
  return text.length > 160 ? `…${text.slice(-160)}` : text;
}

function figures(run) {
  const last = run.iterations.at(-1);
  return {
    reward: number(run.result?.reward), judge: number(run.result?.judge), rollouts: run.result?.rollouts ?? "-", iterations: run.iterations.length,
    "KL of the last iteration, nats": number(last?.kl, 1), seconds: number(run.result?.seconds, 1), status: run.result?.status ?? "-",
  };
}

export function compare() {
  const [a, b] = ["first", "second"].map((id) => $(id).selectedOptions[0].run);
  const [fa, fb] = [figures(a), figures(b)];
  $("sides").querySelector("tbody").replaceChildren(...Object.keys(fa).map((name) => rowOf([name, fa[name], fb[name]], true)));
  $("answer-a").replaceChildren(...marked(a.answer, b.answer));
  $("answer-b").replaceChildren(...marked(b.answer, a.answer));
  const plot = bestPlot([a, b]);
  $("curves").replaceChildren(...(plot ? [plot] : []));
  const [sa, sb] = [settings(a), settings(b)];
  const differ = [...new Set([...Object.keys(sa), ...Object.keys(sb)])].filter((name) => sa[name] !== sb[name]);
  $("differ").querySelector("tbody").replaceChildren(...differ.map((name) => rowOf([name, short(sa[name]), short(sb[name])], true)));
  $("differ").hidden = differ.length === 0;
  const known = a.trace && b.trace;
  $("alike").textContent = !known ? "A run that was broken off does not say what it was asked for." : differ.length ? `${differ.length} settings differ:` : "Their settings are the same.";
  $("compared").hidden = false;
  $("compared").focus({ preventScroll: true });
  $("compared").scrollIntoView({ block: "start" });
}
