// The page: it gets the whole once, then what changes, and draws at most twice a second.

import { Chart, curve, element, knots, stack, valueAt } from "/charts.js";
import { NONE, ago, bytes, clock, loss, percent, seconds, short, whole } from "/format.js";

const COLOURS = 8;
const MAX_POINTS = 2000;
const FRESH_S = 1800; // a page that is open for long gets the whole again, in which old points are fewer
const EVENTS_SHOWN = 60;
const TIMES = [["training", "training_ms"], ["waiting", "waiting_ms"], ["exchange", "exchange_ms"], ["other", "other_ms"]];

const $ = (id) => document.getElementById(id);
let run = null;
let skew = 0; // of the node's clock against ours
let source = null;
let wholeAt = 0;
let drawing = false;

const now = () => Date.now() / 1000 + skew;
const colourOf = (id) => {
  const drawn = Object.keys(run.speed);
  const place = drawn.indexOf(id);
  return place < 0 ? "var(--soft)" : `var(--s${place % COLOURS})`;
};
const nameOf = (id) => run.members.get(id)?.name ?? id.slice(0, 8);

// --- what comes ------------------------------------------------------------------------------------------------------

function take(message) {
  run = { ...message, members: new Map(message.members.map((m) => [m.id, m])), events: new Map(message.events.map((e) => [e.id, e])) };
  wholeAt = message.now;
  skew = message.now - Date.now() / 1000;
  describe();
  drawSoon();
}

function change(delta) {
  if (!run) return;
  skew = delta.now - Date.now() / 1000;
  run.totals = delta.totals;
  for (const member of delta.members) run.members.set(member.id, member);
  for (const kind of ["loss", "speed"]) {
    for (const [id, at, value] of delta[kind]) append((run[kind][id] ??= []), at, value);
  }
  run.heldout.push(...delta.heldout.filter((h) => !run.heldout.some((known) => known.round === h.round)));
  for (const round of delta.rounds) {
    run.rounds = run.rounds.filter((r) => r.round !== round.round).concat(round).sort((a, b) => a.round - b.round).slice(-48);
  }
  for (const event of delta.events) {
    if (event.text) run.events.set(event.id, event);
    else run.events.delete(event.id);
  }
  if (delta.now - wholeAt > FRESH_S) connect();
  drawSoon();
}

function append(points, at, value) {
  if (points.length && at <= points.at(-1)[0]) return;
  points.push([at, value]);
  if (points.length > MAX_POINTS) points.splice(0, points.length - MAX_POINTS);
}

function connect() {
  source?.close();
  source = new EventSource("/api/events");
  source.addEventListener("whole", (e) => take(JSON.parse(e.data)));
  source.addEventListener("delta", (e) => change(JSON.parse(e.data)));
  source.onopen = () => drawSoon();
  source.onerror = () => {
    showLive();
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
}

// --- numbers ---------------------------------------------------------------------------------------------------------

function put(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function describe() {
  const about = run.about;
  document.title = `${about.run} · prime_async`;
  put("run", about.run);
  const rounds = about.round_seconds ? `rounds of ${seconds(about.round_seconds)}` : `${whole(about.inner_steps)} inner steps a round`;
  put("about", `${about.model.split(":").pop()} on ${about.data.split(":").pop()} · ${about.mode}, ${about.codec} · ${rounds} · seen from ${about.node}`);
  put("foot", `prime_async ${about.version} · run ${about.run_id.slice(0, 12)} · node ${about.node_id.slice(0, 12)}`);
}

function showLive() {
  const open = source?.readyState === EventSource.OPEN;
  const state = !open ? "lost" : run && !run.totals.connected ? "lost" : run ? "live" : "connecting";
  const text = !open ? "no answer from this node" : state === "lost" ? "this node hears no leader" : state;
  $("live").dataset.state = state;
  put("live-text", text);
}

function drawTiles() {
  const { totals, about } = run;
  put("t-heldout", loss(totals.heldout_loss));
  const began = totals.first_heldout_loss;
  const after = totals.heldout_round === null ? "not measured yet" : `after round ${whole(totals.heldout_round)}`;
  put("t-heldout-sub", began !== null && totals.heldout_round ? `${after}, from ${loss(began)}` : after);
  put("t-round", about.rounds ? `${whole(totals.round)} / ${whole(about.rounds)}` : whole(totals.round));
  put("t-round-sub", totals.checkpoint_round ? `checkpoint after ${whole(totals.checkpoint_round)}` : "no checkpoint yet");
  put("t-tokens", short(totals.tokens));
  put("t-tokens-sub", `${short(totals.tokens_per_s)} per second`);
  put("t-share", percent(totals.training_share));
  put("t-share-sub", totals.training_share === null ? "after the first round" : "of all members' time");
  put("t-members", whole(totals.members));
  put("t-members-sub", [`${whole(totals.active)} active`, ...(totals.lost ? [`${whole(totals.lost)} lost so far`] : [])].join(", "));
  put("t-sent", bytes(totals.sent_bytes));
  put("t-sent-sub", `${bytes(totals.received_bytes)} received`);
}

// --- charts ----------------------------------------------------------------------------------------------------------

const curves = (kind) => Object.entries(run[kind]).filter(([, points]) => points.length);

function span() {
  const starts = [...curves("loss"), ...curves("speed")].map(([, points]) => points[0][0]).concat(run.heldout.map((h) => h.at));
  const from = Math.min(...starts, now() - 20);
  const ends = [...curves("loss"), ...curves("speed")].map(([, points]) => points.at(-1)[0]);
  return [from, Math.max(now(), from + 20, ...ends)];
}

const marks = () => [...run.events.values()].filter((e) => e.kind === "bad").map((e) => e.at);

const lossChart = new Chart($("c-loss"), "Loss over time", {
  format: (v) => (v >= 10 ? v.toFixed(0) : v.toFixed(2).replace(/0$/, "")),
  read: (at) => {
    const held = valueAt(heldout(), at);
    const nodes = curves("loss").map(([id, points]) => [colourOf(id), nameOf(id), valueAt(points, at, patience())]);
    return [["var(--ink)", "held-out", held], ...nodes].filter(([, , v]) => v !== null).map(([c, n, v]) => [c, n, loss(v)]);
  },
});

const speedChart = new Chart($("c-speed"), "Tokens per second over time", {
  format: (v) => short(v),
  read: (at) => {
    const each = curves("speed").map(([id, points]) => [colourOf(id), nameOf(id), valueAt(points, at, patience()) ?? 0]);
    const all = each.reduce((sum, [, , v]) => sum + v, 0);
    return all ? [["var(--ink)", "all", short(all)], ...each.filter(([, , v]) => v).map(([c, n, v]) => [c, n, short(v)])] : [];
  },
});

const heldout = () => run.heldout.map((h) => [h.at, h.loss]);
const patience = () => Math.max(10, 4 * run.about.heartbeat_s, (span()[1] - span()[0]) / 40); // of a member that is silent

function drawLoss() {
  const nodes = curves("loss");
  const held = heldout();
  const values = nodes.flatMap(([, points]) => points.map((p) => p[1])).concat(held.map((p) => p[1]));
  if (!values.length) return lossChart.draw({ note: "The first loss comes with the first inner steps." });
  const [least, most] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const air = Math.max((most - least) * 0.06, 0.02);
  lossChart.draw({
    span: span(),
    range: [Math.max(0, least - air), most + air],
    marks: marks(),
    says: `held-out ${loss(run.totals.heldout_loss)}, mean of the members ${loss(run.totals.loss)}`,
    shapes: (x, y) => [
      ...nodes.map(([id, points]) => curve(points, x, y, colourOf(id), "", patience() / 2)),
      curve(held, x, y, "var(--ink)", "heldout"),
      ...knots(held, x, y),
    ],
  });
}

function drawSpeed() {
  const nodes = curves("speed");
  if (!nodes.length) return speedChart.draw({ note: "The speed comes with the first inner steps." });
  const [from, to] = span();
  const count = Math.min(240, Math.max(20, Math.floor(to - from)));
  const times = Array.from({ length: count + 1 }, (_, i) => from + ((to - from) * i) / count);
  const layers = nodes.map(([id, points]) => [colourOf(id), times.map((t) => valueAt(points, t, patience()) ?? 0)]);
  const totals = times.map((_, i) => layers.reduce((sum, [, values]) => sum + values[i], 0));
  speedChart.draw({
    span: [from, to],
    range: [0, Math.max(1, ...totals) * 1.08],
    marks: marks(),
    says: `${short(run.totals.tokens_per_s)} now`,
    shapes: (x, y) => stack(times, layers, x, y),
  });
}

function drawLegends() {
  const item = (colour, name, line) => element("li", {}, element("i", { class: `key ${line}`, colour }), name);
  const drawn = Object.keys(run.speed);
  const more = [...run.members.values()].filter((m) => !m.gone && !m.witness && !drawn.includes(m.id)).length;
  const rest = more ? [element("li", {}, `and ${more} more`)] : [];
  const names = (line) => drawn.map((id) => item(colourOf(id), nameOf(id), line));
  renew($("l-loss"), [item("var(--ink)", "held-out", "line"), ...names("line"), ...rest]);
  renew($("l-speed"), [...names(""), ...rest]);
}

const drawnAs = new WeakMap(); // what is in a host, as it was before widths were set

/** Put `children` into `host` unless they are there already, so that nothing flickers or loses the pointer. */
function renew(host, children) {
  const fresh = element("div", {}, ...children);
  const html = fresh.innerHTML;
  if (drawnAs.get(host) === html) return;
  drawnAs.set(host, html);
  host.replaceChildren(...fresh.childNodes);
  host.querySelectorAll("[data-share]").forEach((part) => (part.style.width = `${part.dataset.share}%`));
}

// --- rounds ----------------------------------------------------------------------------------------------------------

function drawRounds() {
  const host = $("c-rounds");
  const width = host.clientWidth;
  const columns = Math.max(3, Math.min(16, Math.floor((width - 150) / (width < 600 ? 52 : 74))));
  const rounds = run.rounds.slice(-columns);
  const ids = Object.keys(run.speed).filter((id) => rounds.some((r) => r.members[id]));
  if (!rounds.length || !ids.length) {
    renew(host, [element("p", { class: "sub" }, "The first round has not ended yet.")]);
    return;
  }
  host.style.gridTemplateColumns = `minmax(70px, max-content) repeat(${rounds.length}, minmax(0, 1fr)) max-content`;
  const length = (times) => (times ? TIMES.reduce((sum, [, key]) => sum + times[key], 0) : 0);
  const longest = rounds.map((r) => Math.max(1, ...Object.values(r.members).map(length)));
  const cells = ids.flatMap((id) => [
    element("div", { class: "who", title: nameOf(id) }, nameOf(id)),
    ...rounds.map((r, i) => cell(id, r, longest[i], length)),
    element("div", { class: "share", title: "of its time spent training" }, percent(run.members.get(id)?.training_share)),
  ]);
  const ends = rounds.map((r, i) =>
    element("div", { class: "round" }, element("b", {}, `${whole(r.round)}`), ` ${seconds(longest[i] / 1000)}`));
  renew(host, [...cells, element("div", { class: "who sub" }, "round"), ...ends, element("div", { class: "share" }, "training")]);
}

function cell(id, round, longest, length) {
  const times = round.members[id];
  if (!times) return element("div", { class: "cell", title: `${nameOf(id)}: not in round ${round.round}` });
  const parts = TIMES.filter(([, key]) => times[key]);
  const says = `${nameOf(id)}, round ${round.round}: ${parts.map(([name, key]) => `${name} ${seconds(times[key] / 1000)}`).join(", ")}`;
  const bar = element("div", { class: "bar", "data-share": ((100 * length(times)) / longest).toFixed(2) },
    ...parts.map(([name, key]) => element("i", { class: name, "data-share": ((100 * times[key]) / length(times)).toFixed(2) })));
  return element("div", { class: "cell", title: says, role: "img", "aria-label": says }, bar);
}

// --- events and members ----------------------------------------------------------------------------------------------

function drawEvents() {
  const list = $("events");
  const shown = [...run.events.values()].sort((a, b) => b.at - a.at || b.id - a.id).slice(0, EVENTS_SHOWN);
  const known = new Map([...list.children].map((li) => [li.dataset.id, li]));
  shown.forEach((event, place) => {
    let item = known.get(String(event.id));
    if (!item) {
      item = element("li", { "data-id": event.id }, element("p", {}), element("time", {}));
    }
    known.delete(String(event.id));
    item.className = event.kind;
    const [text, time] = item.children;
    if (text.textContent !== event.text) text.textContent = event.text;
    time.setAttribute("datetime", new Date(event.at * 1000).toISOString());
    time.setAttribute("title", new Date(event.at * 1000).toLocaleString());
    const said = `${clock(event.at, true)}, ${ago(event.at, now())}`;
    if (time.textContent !== said) time.textContent = said;
    if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
  });
  known.forEach((item) => item.remove());
}

const GOING = ["training", "evaluating", "exchanging", "serving"];

function pill(member) {
  const silent = !member.gone && member.silent_s > 3 * run.about.heartbeat_s;
  const text = silent ? `silent for ${seconds(member.silent_s)}` : member.state;
  const kind = member.gone || silent ? "gone" : GOING.includes(member.state) ? "go" : "wait";
  return element("span", { class: `pill ${member.gone === "left" ? "" : kind}` }, text);
}

function row(member, place, most) {
  const tags = [...(member.leads ? ["leader"] : []), ...(member.witness ? ["witness"] : []), ...(member.id === run.about.node_id ? ["this node"] : [])];
  const drawn = member.id in run.speed;
  const number = (label, text, ...more) => element("td", { class: "num", "data-label": label }, text, ...more);
  const part = element("span", { class: "part", colour: colourOf(member.id) }, element("i", { "data-share": ((100 * member.tokens) / Math.max(1, most)).toFixed(1) }));
  return element("tr", { class: member.gone ? "away" : null, "data-member": member.name, "data-state": member.state },
    element("td", { class: "rank" }, String(place + 1)),
    element("td", { class: "who" }, element("span", { class: "name", title: `key ${member.id}` },
      element("i", { class: "key", colour: drawn ? colourOf(member.id) : "var(--line)" }), element("b", {}, member.name), ...tags.map((t) => element("span", { class: "tag" }, t)))),
    element("td", { class: "state" }, pill(member)),
    number("Round", whole(member.round)),
    number("Tokens", member.witness ? NONE : short(member.tokens), ...(member.witness ? [] : [part])),
    number("Tokens/s", member.witness || member.gone ? NONE : whole(member.tokens_per_s)),
    number("Loss", loss(member.loss)),
    number("Training", percent(member.training_share)),
    number("Sent", bytes(member.sent_bytes)),
    number("Received", bytes(member.received_bytes)),
    number("Checkpoint", member.snapshot_round ? `round ${whole(member.snapshot_round)}` : NONE));
}

function drawMembers() {
  const members = [...run.members.values()].sort((a, b) => b.tokens - a.tokens || a.name.localeCompare(b.name));
  const most = members[0]?.tokens ?? 0;
  renew($("rows"), members.map((m, i) => row(m, i, most)));
}

// --- drawing, and the colours ----------------------------------------------------------------------------------------

function draw() {
  drawing = false;
  showLive();
  if (!run) return;
  drawTiles();
  drawLegends();
  drawLoss();
  drawSpeed();
  drawRounds();
  drawEvents();
  drawMembers();
}

function drawSoon() {
  if (!drawing) {
    drawing = true;
    setTimeout(draw, 60);
  }
}

const system = matchMedia("(prefers-color-scheme: dark)");
const THEMES = { auto: ["◐", "as the system has them"], light: ["☀", "light"], dark: ["☾", "dark"] };
let theme = localStorage.getItem("theme") ?? "auto";

function applyTheme() {
  if (!(theme in THEMES)) theme = "auto";
  document.documentElement.dataset.theme = theme === "auto" ? (system.matches ? "dark" : "light") : theme;
  const [sign, says] = THEMES[theme];
  put("theme", sign);
  $("theme").setAttribute("aria-label", `Colours: ${says}`);
}

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  localStorage.setItem("theme", theme);
  applyTheme();
});
system.addEventListener("change", applyTheme);
addEventListener("resize", drawSoon);
document.addEventListener("visibilitychange", drawSoon);
applyTheme();
connect();
setInterval(drawSoon, 1000);
