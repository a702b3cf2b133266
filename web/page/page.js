// The page follows the service by polling: a stream held open would hold one of its threads.
// Whatever comes from outside is set as text, never as HTML.

const EVERY_MS = 1500;
const PAGE = 25;
const PATIENCE_MS = 8000;

const find = (id) => document.getElementById(id);
const shown = {
  before: [], // for each page but the first: the id that it lies before
  last: null, // the last id on the page, if there is another page behind it
  job: null, // the job whose dialog is open
  clockOffset: 0, // milliseconds from our clock to the service's
};
let timer = null;
let round = 0; // answers of an earlier round than the latest are not shown

// Asking the service

class Refused extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const signal = AbortSignal.timeout(PATIENCE_MS);
  const answer = await fetch(path, { ...options, headers, signal, cache: "no-store" });
  const text = await answer.text();
  if (answer.status === 401) askForToken(token !== null);
  if (!answer.ok) throw new Refused(detailOf(text) || `The service answered ${answer.status}.`);
  const date = Date.parse(answer.headers.get("Date"));
  if (date) shown.clockOffset = date - Date.now();
  return JSON.parse(text);
}

function detailOf(text) {
  try {
    return JSON.parse(text).detail;
  } catch {
    return null;
  }
}

function askForToken(wasWrong) {
  if (find("token").open) return;
  find("token-title").textContent = wasWrong
    ? "The service refused this token"
    : "This service needs a token";
  find("token").showModal();
}

// Following

async function follow() {
  clearTimeout(timer);
  const mine = ++round;
  try {
    const [jobs, stats, received, job] = await Promise.all([
      ask(`jobs?${jobsQuery()}`),
      ask("stats"),
      ask("postprocessed?limit=10"),
      shown.job && ask(`jobs/${shown.job}`),
    ]);
    if (mine !== round) return;
    connected(true);
    showJobs(jobs.jobs);
    showHour(stats.minutes);
    showReceived(received.received);
    if (job && job.id === shown.job) showJob(job);
  } catch (error) {
    if (mine !== round) return;
    connected(false, error);
  }
  if (!document.hidden) timer = setTimeout(follow, EVERY_MS);
}

function jobsQuery() {
  const query = new URLSearchParams({ limit: PAGE + 1 });
  if (find("filter").value) query.set("state", find("filter").value);
  if (shown.before.length) query.set("before", shown.before.at(-1));
  return query;
}

function connected(isWell, error) {
  const text = isWell
    ? "connected"
    : error instanceof Refused
      ? error.message
      : "The service does not answer; what you see is old. Trying again …";
  put(find("connection"), text);
  document.body.classList.toggle("lost", !isWell);
}

// Jobs

function showJobs(jobs) {
  const page = jobs.slice(0, PAGE);
  shown.last = jobs.length > PAGE ? page.at(-1).id : null;
  find("older").disabled = !shown.last;
  find("newer").disabled = !shown.before.length;
  find("pages").hidden = !shown.last && !shown.before.length;
  rows(find("jobs"), page, (job) => job.id, fillJob);
  const isFiltered = find("filter").value || shown.before.length;
  find("jobs").hidden = !page.length;
  find("no-jobs").hidden = page.length > 0 || isFiltered;
  find("none-found").hidden = page.length > 0 || !isFiltered;
}

function fillJob(row, job) {
  row.dataset.state = job.state;
  const [id, state, outcome, age, analysis, attempts, next] = cells(row, 7);
  jobButton(id, job.id);
  badge(state, job.state);
  badge(outcome, job.outcome ?? "");
  put(age, ago(job.created_at));
  age.title = job.created_at;
  showAnalysis(analysis, job);
  put(attempts, job.attempts_made ? String(job.attempts_made) : "");
  put(next, nextAttempt(job));
}

function jobButton(cell, id) {
  const button = cell.firstElementChild ?? cell.appendChild(document.createElement("button"));
  button.type = "button";
  button.className = "id";
  button.title = `Show job ${id}`;
  button.dataset.id = id;
  put(button, `…${id.slice(-10)}`);
}

function showAnalysis(cell, job) {
  const { progress } = job;
  if (job.state !== "running" || !progress) {
    put(cell, took(job));
    return;
  }
  const bar = cell.querySelector("progress") ?? document.createElement("progress");
  bar.value = progress.fraction;
  bar.title = progress.note ?? "";
  bar.textContent = `${Math.round(progress.fraction * 100)} %`;
  if (bar.parentNode !== cell) cell.replaceChildren(bar);
}

function took(job) {
  if (!job.started_at) return "";
  const end = job.finished_at ? Date.parse(job.finished_at) : now();
  return span((end - Date.parse(job.started_at)) / 1000);
}

function nextAttempt(job) {
  if (job.state !== "delivering") return "";
  if (!job.next_attempt_at) return "under way";
  const seconds = (Date.parse(job.next_attempt_at) - now()) / 1000;
  return seconds > 0 ? `in ${span(seconds)}` : "due";
}

// One job

async function openJob(id) {
  shown.job = id;
  put(find("acted"), "");
  try {
    showJob(await ask(`jobs/${id}`));
    if (!find("job").open) find("job").showModal();
  } catch (error) {
    shown.job = null;
    put(find("sent"), error.message);
  }
}

function showJob(job) {
  put(find("job-title"), `Job ${job.id}`);
  const facts = {
    State: job.state,
    Outcome: job.outcome,
    Accepted: job.created_at && clock(job.created_at),
    Analysis: took(job) && `${took(job)}${job.starts > 1 ? `, begun ${job.starts} times` : ""}`,
    Progress: job.progress && `${Math.round(job.progress.fraction * 100)} % ${job.progress.note}`,
    "Next attempt": nextAttempt(job),
    "Posted to": job.postback_url,
  };
  rows(find("facts"), Object.entries(facts).filter(([, value]) => value), ([name]) => name, fillFact);
  rows(find("attempts"), job.attempts, (attempt) => attempt.number, fillAttempt);
  find("attempts").hidden = !job.attempts.length;
  find("no-attempts").hidden = job.attempts.length > 0;
  find("resend").disabled = !["delivered", "undelivered"].includes(job.state);
  find("cancel").disabled = !["accepted", "running"].includes(job.state);
  put(find("data"), pretty(job.data));
  put(find("ending-title"), job.error ? "Error" : "Result");
  put(find("ending"), ending(job));
  find("copy-job").dataset.data = JSON.stringify({ data: job.data });
}

function ending(job) {
  if (job.error) return `${job.error.type}: ${job.error.message}`;
  if (job.result_url) return `${job.result_bytes} bytes, at ${job.result_url}`;
  return job.outcome ? pretty(job.result) : "Not there yet.";
}

function fillFact(pair, [name, value]) {
  while (pair.children.length < 2) {
    pair.append(document.createElement(pair.children.length ? "dd" : "dt"));
  }
  put(pair.children[0], name);
  if (["State", "Outcome"].includes(name)) badge(pair.children[1], value);
  else put(pair.children[1], value);
}

function fillAttempt(row, attempt) {
  const [number, at, status, duration, error] = cells(row, 5);
  put(number, String(attempt.number));
  put(at, clock(attempt.attempted_at));
  badge(status, String(attempt.status_code ?? "no answer"), attempt.error ? "undelivered" : "delivered");
  put(duration, span(attempt.duration_seconds));
  put(error, attempt.error ?? "");
}

async function act(what) {
  try {
    const job = await ask(`jobs/${shown.job}/${what}`, { method: "POST" });
    put(find("acted"), what === "cancel" ? "Canceled." : `The job is ${job.state} again.`);
  } catch (error) {
    put(find("acted"), error.message);
  }
  follow();
}

// What was received, and the last hour

function showReceived(postbacks) {
  rows(find("received"), postbacks, (postback) => postback.webhook_id, (row, postback) => {
    const [id, event, at, signature] = cells(row, 4);
    jobButton(id, postback.webhook_id);
    put(event, String(postback.event.type ?? ""));
    put(at, ago(postback.received_at));
    const isGood = postback.signature === "good";
    badge(signature, isGood ? "good" : "not signed", isGood ? "delivered" : "accepted");
  });
  find("received").hidden = !postbacks.length;
  find("none-received").hidden = postbacks.length > 0;
}

function showHour(minutes) {
  const slots = new Map(minutes.map((minute) => [Date.parse(minute.at), minute]));
  const end = Math.floor(now() / 60000) * 60000;
  const hour = Array.from({ length: 60 }, (_, i) => slots.get(end - (59 - i) * 60000) ?? {});
  const most = Math.max(1, ...hour.map((m) => Math.max(m.accepted ?? 0, (m.delivered ?? 0) + (m.undelivered ?? 0))));
  const slowest = Math.max(1e-3, ...hour.map((m) => m.p99_seconds ?? 0));
  const shapes = hour.flatMap((minute, i) => bars(minute, i * 10, 80 / most));
  const points = hour.flatMap(({ p99_seconds: p99 }, i) => {
    const y = 88 - (78 * p99) / slowest;
    return p99 ? [`${i * 10},${y}`, `${i * 10 + 10},${y}`] : [];
  });
  find("chart").replaceChildren(...shapes, svg("polyline", { class: "p99", points: points.join(" ") }));
  legend(hour);
}

function bars(minute, x, unit) {
  const bar = (name, from, width, inset) => {
    const height = (minute[name] ?? 0) * unit;
    return svg("rect", { class: name, x: x + inset, y: 90 - from * unit - height, width, height });
  };
  return [
    bar("accepted", 0, 8, 1),
    bar("delivered", 0, 4, 3),
    bar("undelivered", minute.delivered ?? 0, 4, 3),
  ];
}

function legend(hour) {
  const sum = (name) => hour.reduce((total, minute) => total + (minute[name] ?? 0), 0);
  const latest = hour.findLast((minute) => minute.p99_seconds)?.p99_seconds;
  const texts = [sum("accepted"), sum("delivered"), sum("undelivered"), latest ? span(latest) : "–"];
  document.querySelectorAll("#legend b").forEach((number, i) => put(number, String(texts[i])));
  find("chart").setAttribute("aria-label", find("legend").innerText.replaceAll("\n", ", "));
}

// Small things

function put(element, text) {
  if (element.textContent !== text) element.textContent = text; // a screen reader hears changes only
}

function badge(cell, text, kind = text) {
  const word = cell.firstElementChild ?? cell.appendChild(document.createElement("span"));
  word.className = `badge ${kind}`;
  put(word, text);
}

// Keep one row for each item, by its key, so that the focus stays where it is.
function rows(list, items, keyOf, fill) {
  const body = list.tBodies?.[0] ?? list;
  const old = new Map([...body.children].map((row) => [row.dataset.key, row]));
  items.forEach((item, i) => {
    const key = String(keyOf(item));
    const row = old.get(key) ?? document.createElement(list.tBodies ? "tr" : "div");
    old.delete(key);
    row.dataset.key = key;
    fill(row, item);
    if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
  });
  old.forEach((row) => row.remove());
}

function cells(row, count) {
  while (row.children.length < count) row.append(document.createElement("td"));
  return row.children;
}

function svg(name, attributes) {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => shape.setAttribute(key, value));
  return shape;
}

const now = () => Date.now() + shown.clockOffset;
const clock = (text) => {
  const at = new Date(text);
  const day = at.toDateString() === new Date(now()).toDateString() ? "" : `${at.toLocaleDateString()} `;
  return day + at.toLocaleTimeString([], { hourCycle: "h23" });
};
const ago = (text) => `${span(Math.max(0, now() - Date.parse(text)) / 1000, 1)} ago`;
const pretty = (value) => JSON.stringify(value, null, 2);

// From seconds to "3 ms", "1.4 s", "5 min"; in whole units from `whole` seconds on.
function span(seconds, whole = 10) {
  if (seconds < 1) return whole === 1 ? "0 s" : `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < whole ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // without https the browser offers no clipboard
    const area = document.createElement("textarea");
    area.value = text;
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  put(button, "Copied");
  setTimeout(() => put(button, label), 1500);
}

function curlOf(payload) {
  const [before] = find("curl").textContent.split(" -d ");
  return `${before} -d '${payload.replaceAll("'", "'\\''")}'`;
}

function turn(change) {
  change();
  follow();
}

// What a person does

find("copy-curl").onclick = (event) => copy(find("curl").textContent, event.target);
find("copy-job").onclick = (event) => copy(curlOf(event.target.dataset.data), event.target);
find("filter").onchange = () => turn(() => (shown.before = []));
find("older").onclick = () => turn(() => shown.before.push(shown.last));
find("newer").onclick = () => turn(() => shown.before.pop());
find("resend").onclick = () => act("resend");
find("cancel").onclick = () => act("cancel");
find("close").onclick = () => find("job").close();
find("job").onclose = () => (shown.job = null);
document.querySelector("main").onclick = (event) => {
  const { id } = event.target.dataset;
  if (id) openJob(id);
};
find("payload").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("send").requestSubmit();
};
find("send").onsubmit = async (event) => {
  event.preventDefault();
  const headers = { "Content-Type": "application/json" };
  try {
    const job = await ask("process", { method: "POST", headers, body: find("payload").value });
    put(find("sent"), `Accepted as …${job.id.slice(-10)}.`);
    shown.before = [];
  } catch (error) {
    put(find("sent"), error instanceof Refused ? error.message : "The service does not answer.");
  }
  follow();
};
find("token-form").onsubmit = () => {
  sessionStorage.setItem("token", find("token-value").value);
  find("token-value").value = "";
  setTimeout(follow);
};
document.onvisibilitychange = () => !document.hidden && follow();
follow();
