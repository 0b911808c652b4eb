// Runs: read from traces, kept in this browser and nowhere else, opened from files and written to them.

const KEPT = "aisp-local.runs";
const KEY = "aisp-local.key";
const MOST_KEPT = 30;
const MOST_WRITTEN = 2 ** 20; // characters of a run that is kept
const LARGEST = 64 * 2 ** 20; // bytes of a file

function stored() {
  try {
    return JSON.parse(localStorage.getItem(KEPT) ?? "[]").map(restored).filter(Boolean);
  } catch {
    // Not allowed, or written by something else.
    return [];
  }
}

function restored(run) {
  try {
    if (run.trace) return viewOf(checked(run.trace));
    return isText(run.prompt) && isText(run.at) && isText(run.answer) && Array.isArray(run.iterations) ? run : null;
  } catch {
    return null;
  }
}

// What tells a run from all others.
export const nameOf = (run) => `${run.at} ${run.result?.seconds} ${run.answer}`; // two of a second may have the same answer

export function keep(run) {
  const others = runs.filter((one) => nameOf(one) !== nameOf(run)); // a trace that is opened again
  runs = [run, ...others].slice(0, MOST_KEPT);
  // Where there is no room, the largest and the oldest are kept until the page is closed only.
  const written = new Map(runs.map((one) => [one, JSON.stringify(one.trace ? { trace: one.trace } : one)]));
  const small = runs.filter((one) => written.get(one).length <= MOST_WRITTEN);
  for (let n = small.length; n >= 0; n--) {
    unkept = runs.filter((one) => !small.slice(0, n).includes(one));
    try {
      localStorage.setItem(KEPT, `[${small.slice(0, n).map((one) => written.get(one))}]`);
      return;
    } catch {
      continue;
    }
  }
}

// Calls `then` when the page in another tab has kept or forgotten some.
export function changed(then) {
  window.addEventListener("storage", (event) => {
    if (event.key !== KEPT && event.key !== null) return;
    runs = [...stored(), ...unkept];
    then();
  });
}

export function forget() {
  runs = unkept = [];
  localStorage.removeItem(KEPT);
}

// What the page shows of a trace; see docs/traces.md.
export function viewOf(trace) {
  const found = trace.result;
  const base = found.baseline;
  let seconds = 0;
  const iterations = found.iterations.map((i) => {
    seconds += i.seconds;
    return { ...i, seconds, candidates: found.candidates.filter((c) => c.iteration === i.iteration) };
  });
  const said = Array.isArray(trace.prompt) ? trace.prompt.at(-1).content : trace.prompt;
  const result = { reward: found.reward, judge: found.judge, rollouts: found.candidates.length, seconds: found.seconds, status: found.status, baseline: base };
  return { prompt: said, at: trace.created, iterations, result, answer: found.answer, trace };
}

const isText = (value) => typeof value === "string";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const isMaybe = (value) => value === null || isNumber(value);
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isList = (value, each) => Array.isArray(value) && value.length > 0 && value.every((item) => isObject(item) && each(item));

// The trace, if it is one that the page can show. Throws an Error that says what is wrong.
function checked(trace) {
  if (!isObject(trace) || trace.format !== "aisp-local-trace") throw new Error("that file holds no trace of aisp-local");
  if (trace.version !== 1) throw new Error(`that is a trace of version ${trace.version}; this page reads version 1`);
  const found = trace.result;
  const sound = [
    [isText(trace.created), "created"],
    [isText(trace.prompt) || isList(trace.prompt, (m) => isText(m.role) && isText(m.content)), "prompt"],
    [isObject(trace.search) && isObject(trace.search.options), "search"],
    [isObject(trace.model) && isObject(trace.reward) && (trace.judge === null || isObject(trace.judge)), "model, reward or judge"],
    [isObject(found) && isText(found.answer) && isNumber(found.reward) && isMaybe(found.judge) && isNumber(found.seconds) && isText(found.status), "result"],
    [isObject(found) && isList(found.iterations, (i) => isNumber(i.iteration) && isNumber(i.seconds) && ["best", "mean", "best_so_far", "kl", "ess"].every((key) => isMaybe(i[key]))), "result.iterations"],
    [isObject(found) && isList(found.candidates, (c) => isText(c.text) && isMaybe(c.reward) && isMaybe(c.judge) && isNumber(c.iteration) && isNumber(c.row)), "result.candidates"],
    [isObject(found) && (found.baseline === null || (isObject(found.baseline) && isText(found.baseline.text) && isMaybe(found.baseline.reward))), "result.baseline"],
  ].find(([good]) => !good);
  if (sound) throw new Error(`that trace is broken at ${sound[1]}`);
  return trace;
}

// The run in a file that the user chose, read here and sent nowhere.
export async function open(file) {
  if (file.size > LARGEST) throw new Error("that file is larger than 64 MB; it is no trace");
  let trace;
  try {
    trace = JSON.parse(await file.text());
  } catch {
    throw new Error("that file holds no trace of aisp-local: it is no JSON");
  }
  return viewOf(checked(trace));
}

// Ranks from 1; equal values share the mean of theirs.
function ranks(values) {
  const [first, last] = [new Map(), new Map()];
  [...values].sort((a, b) => a - b).forEach((value, i) => {
    if (!first.has(value)) first.set(value, i);
    last.set(value, i);
  });
  return values.map((value) => (first.get(value) + last.get(value)) / 2 + 1);
}

function correlation(a, b) {
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [ma, mb] = [mean(a), mean(b)];
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const [x, y] = [a.map((value) => value - ma), b.map((value) => value - mb)];
  return dot(x, y) / Math.sqrt(dot(x, x) * dot(y, y));
}

// Candidates that the judge scored, and in a sentence whether it ranks them as the reward does; null without.
export function judgement(run) {
  const judged = run.iterations.flatMap((i) => i.candidates ?? []).filter((c) => Number.isFinite(c.reward) && Number.isFinite(c.judge));
  if (judged.length < 2) return null;
  const rank = correlation(ranks(judged.map((c) => c.reward)), ranks(judged.map((c) => c.judge)));
  let how = "ranks candidates as the reward does";
  if (rank <= 0.5) how = "partly agrees with the reward";
  if (rank <= 0.1) how = "does not agree with the reward";
  if (rank < -0.1) how = "disagrees with the reward";
  const said = Number.isFinite(rank) ? `The judge ${how}: rank correlation ${rank.toFixed(2)} over ${judged.length} candidates.` : "The judge, or the reward, gives all candidates the same.";
  return { judged, said };
}

// The runs that the page knows, newest first. One has a trace, or was stopped and has what was seen of it.
let runs = stored();
let key = null; // where the browser keeps nothing
let unkept = []; // of them those that there is no room for

export const past = () => runs;

// The API key, until the tab is closed.
export function remember(given) {
  key = given;
  try {
    sessionStorage.setItem(KEY, given);
  } catch {
    // Not allowed.
  }
}

export function remembered() {
  try {
    return sessionStorage.getItem(KEY) ?? key;
  } catch {
    return key;
  }
}
