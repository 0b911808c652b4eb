// What the page draws with. Text is only ever set as text.

export const $ = (id) => document.getElementById(id);

export function element(name, text, properties = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return Object.assign(made, properties);
}

export function number(value, digits = 2) {
  return typeof value === "number" && Number.isFinite(value) ? value.toFixed(digits) : "-";
}

export function rowOf(cells, head = false) {
  const row = element("tr");
  row.append(...cells.map((cell, i) => (head && i === 0 ? element("th", String(cell), { scope: "row" }) : element("td", String(cell)))));
  return row;
}

const NAMESPACE = "http://www.w3.org/2000/svg";
const MOST_DOTS = 2000;
const [WIDTH, HEIGHT, LEFT, BOTTOM] = [480, 200, 44, 26];

function draw(name, attributes, text) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A frame: `said` is for those who do not see it, `below` under it; x and y are [least, greatest].
function frame(said, below, [left, right], [low, high]) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  svg.append(draw("title", {}, said));
  const x = (value) => LEFT + ((value - left) / (right - left || 1)) * (WIDTH - LEFT - 8);
  const y = (value) => 8 + (1 - (value - low) / (high - low || 1)) * (HEIGHT - BOTTOM - 8);
  for (const value of new Set([low, high])) {
    svg.append(draw("line", { class: "axis", x1: LEFT, x2: WIDTH - 8, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  svg.append(draw("text", { x: WIDTH / 2, y: HEIGHT - 6, "text-anchor": "middle" }, below));
  return { svg, x, y };
}

function spread(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// At most so many dots, evenly taken.
function some(dots) {
  const every = Math.ceil(dots.length / MOST_DOTS);
  return dots.filter((_, i) => i % every === 0);
}

function line({ svg, x, y }, kind, points) {
  svg.append(draw("polyline", { class: kind, points: points.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") }));
}

// Rewards of all candidates by iteration; null without any.
export function rewardPlot(iterations) {
  const rewards = iterations.flatMap((i) => (i.candidates ?? []).map((c) => c.reward).concat(i.best_so_far, i.mean)).filter(Number.isFinite);
  if (!rewards.length) return null;
  const count = iterations.reduce((sum, i) => sum + (i.candidates ?? []).length, 0);
  const range = spread(rewards);
  const said = `Rewards of ${count} candidates in ${iterations.length} iterations, best ${number(range[1])}`;
  const axes = frame(said, "iterations: dots are candidates, line the best so far, dashes the mean", [0.5, iterations.length + 0.5], range);
  for (const c of some(iterations.flatMap((i) => (i.candidates ?? []).map((c) => ({ ...c, iteration: i.iteration }))))) {
    if (Number.isFinite(c.reward)) axes.svg.append(draw("circle", { cx: axes.x(c.iteration) + ((c.row * 7) % 13) - 6, cy: axes.y(c.reward), r: 3 }));
  }
  for (const [kind, key] of [["best", "best_so_far"], ["mean", "mean"]]) {
    const points = iterations.filter((i) => Number.isFinite(i[key])).map((i) => [i.iteration, i[key]]);
    // Of a single iteration a level line.
    line(axes, kind, points.length === 1 ? [[0.5, points[0][1]], [iterations.length + 0.5, points[0][1]]] : points);
  }
  return axes.svg;
}

// What the judge gives against the reward; the answer's dot is larger.
export function judgePlot(judged, answer) {
  const axes = frame(
    `Judge against reward of ${judged.length} candidates`, "across: reward, up: judge; the large dot is the answer",
    spread(judged.map((c) => c.reward)), spread(judged.map((c) => c.judge)),
  );
  for (const c of some(judged)) axes.svg.append(draw("circle", { cx: axes.x(c.reward), cy: axes.y(c.judge), r: c === answer ? 6 : 3 }));
  return axes.svg;
}

// The best reward so far of two runs by their rollouts.
export function bestPlot(views) {
  const curves = views.map((view) => {
    const points = [];
    let rollouts = 0;
    for (const i of view.iterations) {
      rollouts += (i.candidates ?? []).length;
      if (Number.isFinite(i.best_so_far)) points.push([rollouts, i.best_so_far]);
    }
    // Of a single iteration a level line.
    return points.length === 1 ? [[0, points[0][1]], points[0]] : points;
  });
  const all = curves.flat();
  if (!all.length) return null;
  const said = `Best reward so far: ${curves.map((points, i) => `run ${"AB"[i]} ends at ${number(points.at(-1)?.[1])}`).join(", ")}`;
  const axes = frame(said, "rollouts: the line is run A, the dashes run B", [0, spread(all.map(([x]) => x))[1]], spread(all.map(([, y]) => y)));
  curves.forEach((points, i) => line(axes, ["best", "mean"][i], points));
  return axes.svg;
}

const MOST_WORDS = 1500;

// Nodes of a text in which words are marked that another text does not have in that order.
export function marked(text, other) {
  const words = text.split(/(\s+)/).filter(Boolean);
  const a = words.slice(0, MOST_WORDS);
  const b = other.split(/(\s+)/).filter(Boolean).slice(0, MOST_WORDS);
  const wide = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * wide); // common subsequence of what begins at i and j
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * wide + j] = a[i] === b[j] ? longest[(i + 1) * wide + j + 1] + 1 : Math.max(longest[(i + 1) * wide + j], longest[i * wide + j + 1]);
    }
  }
  const nodes = [];
  let j = 0;
  a.forEach((word, i) => {
    while (j < b.length && word !== b[j] && longest[i * wide + j + 1] > longest[(i + 1) * wide + j]) j++;
    const same = j < b.length && word === b[j];
    if (same) j++;
    nodes.push(same || !word.trim() ? document.createTextNode(word) : element("mark", word));
  });
  nodes.push(document.createTextNode(words.slice(MOST_WORDS).join("")));
  return nodes;
}
