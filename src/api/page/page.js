"use strict";

// Time between two looks at the service.
const INTERVAL_MS = 2000;
const TOKEN = "moderatord-token";
const get = (id) => document.getElementById(id);

let previous = null;

function headers() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

// Reads Prometheus' text format into a map from a metric's name to its samples.
function parse(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const found = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries([...(found[2] ?? "").matchAll(/(\w+)="([^"]*)"/g)].map((label) => label.slice(1)));
    if (!metrics.has(found[1])) metrics.set(found[1], []);
    metrics.get(found[1]).push({ labels, value: Number(found[3]) });
  }
  return metrics;
}

function sum(metrics, name, wanted = {}) {
  const matches = (sample) => Object.entries(wanted).every(([label, value]) => sample.labels[label] === value);
  return (metrics.get(name) ?? []).filter(matches).reduce((total, sample) => total + sample.value, 0);
}

// Returns the quantile that cumulative buckets give, between the bounds of its bucket.
function quantile(buckets, q) {
  const total = buckets.at(-1)?.count ?? 0;
  if (total === 0) return null;
  let below = { bound: 0, count: 0 };
  for (const bucket of buckets) {
    if (bucket.count >= q * total) {
      if (!Number.isFinite(bucket.bound)) return below.bound;
      const share = (q * total - below.count) / Math.max(bucket.count - below.count, 1e-9);
      return below.bound + share * (bucket.bound - below.bound);
    }
    below = bucket;
  }
  return below.bound;
}

function buckets(metrics, name) {
  const counts = new Map();
  for (const { labels, value } of metrics.get(`${name}_bucket`) ?? []) {
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].map(([bound, count]) => ({ bound, count })).sort((a, b) => a.bound - b.bound);
}

// Returns the buckets of what has been recorded since an earlier look.
function since(now, before) {
  const earlier = new Map(before.map(({ bound, count }) => [bound, count]));
  return now.map(({ bound, count }) => ({ bound, count: count - (earlier.get(bound) ?? 0) }));
}

function element(name, text) {
  const created = document.createElement(name);
  created.textContent = text;
  return created;
}

function rows(table, entries) {
  table.replaceChildren(
    ...entries.map(([name, value]) => {
      const row = document.createElement("tr");
      const head = element("th", name);
      head.scope = "row";
      row.append(head, element("td", value));
      return row;
    }),
  );
}

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(1)} s`;
}

function showRates(status, metrics) {
  const at = performance.now();
  const counters = {
    "comments decided / s": sum(metrics, "moderatord_decisions_total") + sum(metrics, "moderatord_api_decisions_total"),
    "requests / s": sum(metrics, "moderatord_api_requests_total"),
  };
  const latencies = {
    request: buckets(metrics, "moderatord_api_request_seconds"),
    stream: buckets(metrics, "moderatord_append_to_commit_seconds"),
  };
  const figures = [];
  if (previous) {
    const elapsed = (at - previous.at) / 1000;
    for (const [name, value] of Object.entries(counters)) {
      figures.push([name, (Math.max(0, value - previous.counters[name]) / elapsed).toFixed(1)]);
    }
    for (const [name, now] of Object.entries(latencies)) {
      if (now.length === 0) continue;
      const recent = since(now, previous.latencies[name]);
      const spread = [0.5, 0.99].map((q) => seconds(quantile(recent, q)));
      figures.push([`${name} p50 / p99`, spread.join(" / ")]);
    }
  }
  figures.push(["requests waiting", sum(metrics, "moderatord_api_waiting").toFixed(0)]);
  if (metrics.has("moderatord_consumer_lag_records")) {
    figures.push(["lag in records", sum(metrics, "moderatord_consumer_lag_records").toFixed(0)]);
  }
  for (const action of ["allow", "review", "block"]) {
    const total = sum(metrics, "moderatord_decisions_total", { action }) + sum(metrics, "moderatord_api_decisions_total", { action });
    figures.push([action, total.toLocaleString("en")]);
  }
  get("rates").replaceChildren(
    ...figures.map(([name, value]) => {
      const group = document.createElement("div");
      group.append(element("dt", name), element("dd", value));
      return group;
    }),
  );
  previous = { at, counters, latencies };
}

function showHistogram(metrics) {
  const cumulative = buckets(metrics, "moderatord_probability").filter(({ bound }) => Number.isFinite(bound));
  const counts = cumulative.map(({ count }, index) => count - (cumulative[index - 1]?.count ?? 0));
  const most = Math.max(1, ...counts);
  const svg = get("histogram");
  const draw = (name, attributes, text) => {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    if (text !== undefined) shape.textContent = text;
    svg.append(shape);
    return shape;
  };
  svg.replaceChildren();
  counts.forEach((count, index) => {
    // A logarithm, because nearly all comments are harmless.
    const height = count === 0 ? 0 : (110 * Math.log1p(count)) / Math.log1p(most);
    const bar = draw("rect", { x: 10 + index * 20, y: 125 - height, width: 18, height });
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = `up to ${cumulative[index].bound}: ${count}`;
    bar.append(title);
  });
  draw("line", { x1: 10, x2: 410, y1: 125, y2: 125 });
  for (const tick of [0, 0.5, 1]) {
    draw("text", { x: 10 + tick * 400, y: 140, "text-anchor": ["start", "middle", "end"][tick * 2] }, tick);
  }
}

function showNewest(newest) {
  get("newest").hidden = !newest;
  if (!newest) return;
  if (newest.error) {
    rows(get("version"), [["registry", newest.error]]);
    return;
  }
  const passed = newest.promote === true ? "passed the gate" : newest.promote === false ? "failed the gate" : "was not judged";
  rows(get("version"), [
    ["version", newest.version],
    ["trained", newest.created_at],
    ["verdict", newest.verdict ?? passed],
  ]);
}

function show(status) {
  const metrics = parse(status.metrics);
  const state = get("state");
  state.textContent = status.ready === true ? `ready, version ${status.version}` : `not ready: ${status.ready}`;
  state.className = status.ready === true ? "good" : "bad";
  showRates(status, metrics);
  showHistogram(metrics);
  const thresholds = status.thresholds;
  rows(get("model"), [
    ...Object.entries(status.model),
    ["policy", `review from ${thresholds.review}, block from ${thresholds.block}; ${status.policy}`],
  ]);
  showNewest(status.newest_version);
  rows(get("configuration"), Object.entries(status.configuration));
}

async function look() {
  let status;
  try {
    const answer = await fetch("v1/status", { headers: headers() });
    if (answer.status === 401) {
      get("content").hidden = true;
      if (get("login").hidden) {
        get("login").hidden = false;
        get("token").focus();
      }
      get("state").textContent = sessionStorage.getItem(TOKEN) ? "the token is not valid" : "expects a token";
      get("state").className = "bad";
      return;
    }
    status = await answer.json();
  } catch {
    get("state").textContent = "does not answer";
    get("state").className = "bad";
    return;
  }
  get("login").hidden = true;
  get("content").hidden = false;
  show(status);
}

async function ask(event) {
  event.preventDefault();
  const output = get("decision");
  output.textContent = "…";
  try {
    const answer = await fetch("v1/score", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify({ text: get("text").value }),
    });
    const decision = await answer.json();
    if (!answer.ok) {
      output.textContent = `${answer.status}: ${decision.detail}`;
      return;
    }
    output.replaceChildren(
      element("strong", decision.action),
      ` with probability ${decision.probability.toFixed(4)} (margin ${decision.margin.toFixed(3)}, ${decision.windows} window${decision.windows === 1 ? "" : "s"})`,
    );
  } catch {
    output.textContent = "The service does not answer.";
  }
}

get("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, get("token").value);
  look();
});
get("ask").addEventListener("submit", ask);
look();
setInterval(look, INTERVAL_MS);
