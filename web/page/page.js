// The page follows the service by polling: a stream held open would hold one of its threads.
// Text from outside is set as text, never as HTML. All addresses are relative to the page.

const EVERY_MS = 1500;
const EVERY_SEARCH_MS = 10000;
const PATIENCE_MS = 8000;
const PATIENCE_RESEND_MS = 600000; // a million jobs take minutes
const PAGE = 25;
const SEARCHED = 1000; // jobs that a search looks at in one step

const find = (id) => document.getElementById(id);
const shown = {
  before: [], // for each page but the first: the id that it lies before
  last: null, // the id that the next page lies before, if there is a next page
  job: null, // the job whose dialog is open
  clockOffset: 0, // milliseconds from our clock to the service's
};
let timer = null;
let round = 0; // answers of an earlier round than the latest are not shown

// Asking the service

async function ask(path, { patience = PATIENCE_MS, ...options } = {}) {
  const headers = { "Content-Type": "application/json" };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const signal = AbortSignal.timeout(patience);
  const answer = await fetch(path, { ...options, headers, signal, cache: "no-store" });
  const isJson = answer.headers.get("Content-Type")?.includes("json");
  const value = isJson ? JSON.parse(await answer.text(), exactly) : null;
  if (answer.status === 401) askForToken(token !== null);
  if (!answer.ok) {
    const text = value?.detail ?? `The service answered ${answer.status}.`;
    throw Object.assign(new Error(text), { status: answer.status });
  }
  const date = Date.parse(answer.headers.get("Date"));
  if (date) shown.clockOffset = date - Date.now();
  return value;
}

// JavaScript would round a large integer. Where the browser can, it is kept as it was written.
function exactly(_, value, context) {
  const isRounded = Number.isInteger(value) && !Number.isSafeInteger(value);
  return isRounded && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
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
      shown.job && findJob(shown.job),
    ]);
    if (mine !== round) return;
    connected(true);
    showJobs(jobs.jobs);
    showHour(stats.minutes);
    showReceived(received.received);
    if (job) showJob(job);
  } catch (error) {
    if (mine !== round) return;
    if (error.status === 404) shown.before = []; // the job that the page lay before is deleted
    connected(false, error);
  }
  if (!document.hidden) timer = setTimeout(follow, words().length ? EVERY_SEARCH_MS : EVERY_MS);
}

function jobsQuery() {
  const query = new URLSearchParams({ limit: words().length ? SEARCHED : PAGE + 1 });
  if (find("filter").value) query.set("state", find("filter").value);
  if (shown.before.length) query.set("before", shown.before.at(-1));
  return query;
}

function connected(isWell, error) {
  say(find("connection"), isWell ? "connected" : `${textOf(error)} What you see is old.`);
  document.body.classList.toggle("lost", !isWell);
}

// Jobs

const words = () => find("search").value.trim().toLowerCase().split(/[\s…]+/).filter(Boolean);

function showJobs(jobs) {
  const found = jobs.filter(isSearched);
  const page = found.slice(0, PAGE);
  const isFull = words().length > 0 && jobs.length === SEARCHED;
  shown.last = found.length > PAGE ? page.at(-1).id : isFull ? jobs.at(-1).id : null;
  find("older").disabled = !shown.last;
  find("newer").disabled = !shown.before.length;
  find("pages").hidden = !shown.last && !shown.before.length;
  rows(find("jobs"), page, (job) => job.id, fillJob);
  const isFiltered = find("filter").value || shown.before.length || words().length;
  find("jobs").hidden = !page.length;
  find("no-jobs").hidden = page.length > 0 || isFiltered;
  find("none-found").hidden = page.length > 0 || !isFiltered;
  const more = "Not among these 1,000 jobs. Press Older to search further back.";
  put(find("none-found"), shown.last ? more : "No job was found.");
}

function isSearched(job) {
  const text = `${job.id} ${metadataOf(job)}`.toLowerCase();
  return words().every((word) => text.includes(word));
}

function fillJob(row, job) {
  const [id, state, outcome, age, analysis, attempts, next, metadata] = cells(row, 8);
  jobLink(id, job.id);
  badge(state, job.state);
  badge(outcome, job.outcome ?? "");
  put(age, ago(job.created_at));
  age.title = job.created_at;
  showAnalysis(analysis, job);
  put(attempts, job.attempts_made ? String(job.attempts_made) : "");
  put(next, nextStep(job));
  put(metadata, metadataOf(job));
  metadata.title = metadataOf(job);
}

function jobLink(cell, id) {
  const link = cell.firstElementChild ?? cell.appendChild(document.createElement("a"));
  link.href = `#/jobs/${id}`;
  link.title = `Show job ${id}`;
  put(link, `…${id.slice(-10)}`);
}

function showAnalysis(cell, job) {
  cell.title = job.progress?.note ?? "";
  if (job.state !== "running" || !job.progress) {
    put(cell, took(job));
    return;
  }
  const bar = cell.querySelector("progress") ?? document.createElement("progress");
  const label = cell.querySelector("span") ?? document.createElement("span");
  bar.value = job.progress.fraction;
  bar.ariaLabel = `Progress of job …${job.id.slice(-10)}`;
  put(label, percent(job.progress));
  if (bar.parentNode !== cell) cell.replaceChildren(bar, label);
}

function took(job) {
  if (!job.started_at || job.state === "accepted") return ""; // it waits to be run again
  const end = job.finished_at ? Date.parse(job.finished_at) : now();
  return span((end - Date.parse(job.started_at)) / 1000, job.finished_at ? 10 : 1); // the clock is known to the second
}

function nextStep(job) {
  if (job.next_start_at) return `start ${job.starts + 1} ${until(job.next_start_at)}`;
  if (job.state !== "delivering") return "";
  const when = job.next_attempt_at ? until(job.next_attempt_at) : "now";
  return `attempt ${job.attempts_made + 1} ${when}`;
}

// One job, which has an address of its own

function route() {
  shown.job = location.hash.match(/^#\/jobs\/(\w+)$/)?.[1] ?? null;
  say(find("acted"), "");
  if (shown.job) say(find("notice"), "");
  else find("job").close();
  follow();
}

async function findJob(id) {
  try {
    return await ask(`jobs/${id}`);
  } catch (error) {
    if (error.status !== 404) throw error;
    if (id === shown.job) leave(error.message, true);
    return null;
  }
}

function leave(text, isError = false) {
  history.replaceState(null, "", "#/");
  route();
  say(find("notice"), text, isError);
}

function showJob(job) {
  put(find("job-title"), `Job ${job.id}`);
  const facts = Object.entries(factsOf(job)).filter(([, value]) => value);
  rows(find("facts"), facts, ([name]) => name, fillFact);
  rows(find("attempts"), job.attempts, (attempt) => attempt.number, fillAttempt);
  find("attempts").hidden = !job.attempts.length;
  find("no-attempts").hidden = job.attempts.length > 0;
  const hasEnded = ["delivered", "undelivered"].includes(job.state);
  find("resend").disabled = find("delete").disabled = !hasEnded;
  find("cancel").disabled = !["accepted", "running"].includes(job.state);
  put(find("data"), pretty(job.data));
  put(find("ending-title"), job.error ? "Error" : "Result");
  put(find("ending"), ending(job));
  const fields = { data: job.data };
  if (job.postback_url) fields.postback_url = job.postback_url;
  if (job.metadata) fields.metadata = job.metadata;
  find("copy-job").dataset.payload = JSON.stringify(fields);
  if (!find("job").open) find("job").showModal();
}

function factsOf(job) {
  return {
    State: job.state,
    Outcome: job.outcome,
    Accepted: clock(job.created_at),
    Analysis: took(job),
    Starts: job.starts > 1 && String(job.starts),
    Progress: job.progress && `${percent(job.progress)} ${job.progress.note}`,
    "Next step": nextStep(job),
    "Crashes of the service": job.interrupted && String(job.interrupted),
    "Kept until": job.expires_at && clock(job.expires_at),
    "Last error": job.last_error && `${job.last_error.type}: ${job.last_error.message}`,
    "Posted to": job.postback_url,
    Metadata: metadataOf(job),
  };
}

function ending(job) {
  if (job.error) return `${job.error.type}: ${job.error.message}`;
  if (job.result_url) return `The result is too large to be shown. Read it at ${job.result_url}`;
  return job.outcome ? pretty(job.result) : "Not there yet.";
}

function fillFact(pair, [name, value]) {
  while (pair.children.length < 2) {
    pair.append(document.createElement(pair.children.length ? "dd" : "dt"));
  }
  pair.className = ["Last error", "Posted to", "Metadata"].includes(name) ? "long" : "";
  put(pair.children[0], name);
  if (["State", "Outcome"].includes(name)) badge(pair.children[1], value);
  else put(pair.children[1], value);
}

function fillAttempt(row, attempt) {
  const [number, at, status, duration, error, answer] = cells(row, 6);
  put(number, String(attempt.number));
  put(at, clock(attempt.attempted_at));
  const kind = attempt.error ? "undelivered" : "delivered";
  badge(status, String(attempt.status_code ?? "no answer"), kind);
  put(duration, span(attempt.duration_seconds));
  put(error, attempt.error ?? "");
  put(answer, attempt.answer ?? "");
}

async function act(work, place) {
  try {
    await work();
  } catch (error) {
    say(place, textOf(error), true);
  }
  follow();
}

async function change(what, text) {
  await ask(`jobs/${shown.job}/${what}`, { method: "POST" });
  say(find("acted"), text);
}

async function deleteJob() {
  const id = shown.job;
  if (!confirm("Delete this job, with its data, its result and its attempts?")) return;
  await ask(`jobs/${id}`, { method: "DELETE" });
  leave(`Job …${id.slice(-10)} is deleted.`);
}

async function resendAll() {
  if (!confirm("Send the event of every undelivered job again?")) return;
  say(find("notice"), "Resending …");
  const body = JSON.stringify({ state: "undelivered" });
  const options = { method: "POST", body, patience: PATIENCE_RESEND_MS };
  const { resent } = await ask("jobs/resend", options);
  const text = resent === 1 ? "1 event is sent again." : `${resent} events are sent again.`;
  say(find("notice"), resent ? text : "No job is undelivered.");
}

// What was received, and the last hour

function showReceived(postbacks) {
  rows(find("received"), postbacks, (postback) => postback.webhook_id, (row, postback) => {
    const [id, event, at, signature] = cells(row, 4);
    jobLink(id, postback.webhook_id);
    put(event, typeof postback.event.type === "string" ? postback.event.type : "");
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
  const none = { accepted: 0, delivered: 0, undelivered: 0, p99_seconds: null };
  const hour = Array.from({ length: 60 }, (_, i) => slots.get(end - (59 - i) * 60000) ?? none);
  const most = axis(hour.map((m) => Math.max(m.accepted, m.delivered + m.undelivered)));
  const slowest = axis(hour.map((m) => m.p99_seconds * 1000)) / 1000;
  const shapes = hour.flatMap((minute, i) => bars(minute, i * 10, 90 / most));
  const points = hour.flatMap(({ p99_seconds: p99 }, i) => {
    const y = 90 - (90 * p99) / slowest;
    return p99 ? [`${i * 10},${y}`, `${i * 10 + 10},${y}`] : [];
  });
  const line = svg("polyline", { class: "p99", points: points.join(" ") });
  find("chart").replaceChildren(svg("path", { d: "M0 45H600" }), ...shapes, line);
  const times = [end - 59 * 60000, end - 29 * 60000, end + 60000].map(hourMinute);
  const texts = [most, most / 2, 0, span(slowest), span(slowest / 2), 0, ...times];
  document.querySelectorAll("#hour span").forEach((label, i) => put(label, String(texts[i])));
  legend(hour);
}

// Returns the end of an axis: a round number, whose half is whole, that holds every value.
function axis(values) {
  const most = Math.max(2, ...values);
  const unit = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 4, 6, 10].map((n) => n * unit).find((end) => end >= most);
}

function bars(minute, x, unit) {
  const bar = (name, from, width, inset) => {
    const height = minute[name] * unit;
    return svg("rect", { class: name, x: x + inset, y: 90 - from * unit - height, width, height });
  };
  return [
    bar("accepted", 0, 8, 1),
    bar("delivered", 0, 4, 3),
    bar("undelivered", minute.delivered, 4, 3),
  ];
}

function legend(hour) {
  const sum = (name) => hour.reduce((total, minute) => total + minute[name], 0);
  const latest = hour.findLast((minute) => minute.p99_seconds)?.p99_seconds;
  const texts = [sum("accepted"), sum("delivered"), sum("undelivered"), latest ? span(latest) : "–"];
  document.querySelectorAll("#legend b").forEach((number, i) => put(number, String(texts[i])));
  find("chart").setAttribute("aria-label", find("legend").innerText.replaceAll("\n", ", "));
}

// Sending

function payload() {
  const data = jsonOf("send-data", "Data", '"text" or [1, 2]');
  const metadata = jsonOf("send-metadata", "Metadata", '{"order": 17}');
  const url = find("send-url").value.trim();
  const fields = [`"data": ${data}`];
  if (url) fields.push(`"postback_url": ${JSON.stringify(url)}`);
  if (metadata) fields.push(`"metadata": ${metadata}`);
  return `{${fields.join(", ")}}`;
}

// Returns what was written, not what JavaScript would make of it.
function jsonOf(id, name, example) {
  const text = find(id).value.trim();
  find(id).ariaInvalid = "false";
  try {
    if (text) JSON.parse(text);
    return text;
  } catch {
    find(id).ariaInvalid = "true";
    throw new Error(`${name} is not valid JSON. Write it like ${example}.`);
  }
}

function curlOf(text) {
  const token = sessionStorage.getItem("token") ? ' -H "Authorization: Bearer $API_TOKEN"' : "";
  const start = `curl ${new URL("process", location)}${token} -H 'Content-Type: application/json'`;
  return `${start} -d '${text.replaceAll("'", "'\\''")}'`;
}

function showCurl() {
  try {
    put(find("curl"), curlOf(payload()));
    say(find("sent"), "");
  } catch (error) {
    say(find("sent"), error.message, true);
  }
}

async function send() {
  const job = await ask("process", { method: "POST", body: payload() });
  say(find("sent"), `Accepted as …${job.id.slice(-10)}.`);
  shown.before = [];
}

// Small things

function put(element, text) {
  if (element.textContent !== text) element.textContent = text; // a screen reader hears changes only
}

function say(element, text, isError = false) {
  put(element, text);
  element.classList.toggle("error", isError);
}

// Errors of other names come from the browser, when it could not ask or was not answered.
const textOf = (error) => (error.name === "Error" ? error.message : "The service does not answer.");

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
const hourMinute = (at) => new Date(at).toTimeString().slice(0, 5);
const clock = (text) => {
  const at = new Date(text);
  const day = at.toDateString() === new Date(now()).toDateString() ? "" : `${at.toLocaleDateString()} `;
  return day + at.toLocaleTimeString([], { hourCycle: "h23" });
};
const ago = (text) => `${span(Math.max(0, now() - Date.parse(text)) / 1000, 1)} ago`;
const until = (text) => {
  const seconds = (Date.parse(text) - now()) / 1000;
  return seconds > 0 ? `in ${span(seconds, 1)}` : "due";
};
const percent = (progress) => `${Math.round(progress.fraction * 100)} %`;
const pretty = (value) => JSON.stringify(value, null, 2);
const metadataOf = (job) => (job.metadata === null ? "" : JSON.stringify(job.metadata));

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

function turn(before) {
  shown.before = before;
  follow();
}

// What a person does

find("copy-curl").onclick = (event) => copy(find("curl").textContent, event.target);
find("copy-job").onclick = (event) => copy(curlOf(event.target.dataset.payload), event.target);
find("filter").onchange = () => turn([]);
find("search").oninput = () => {
  shown.before = [];
  const [id] = words();
  if (/^[0-9a-f]{32}$/.test(id)) location.hash = `#/jobs/${id}`;
  clearTimeout(timer);
  timer = setTimeout(follow, 250); // not for each letter
};
find("older").onclick = () => turn([...shown.before, shown.last]);
find("newer").onclick = () => turn(shown.before.slice(0, -1));
find("resend-all").onclick = () => act(resendAll, find("notice"));
find("resend").onclick = () => act(() => change("resend", "The event is sent again."), find("acted"));
find("cancel").onclick = () => act(() => change("cancel", "The job is canceled."), find("acted"));
find("delete").onclick = () => act(deleteJob, find("acted"));
find("close").onclick = () => find("job").close();
find("job").onclose = () => shown.job && (location.hash = "#/"); // by its button or by Escape
find("send").oninput = showCurl;
find("send-data").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("send").requestSubmit();
};
find("send").onsubmit = (event) => {
  event.preventDefault();
  act(send, find("sent"));
};
find("token-form").onsubmit = () => {
  sessionStorage.setItem("token", find("token-value").value);
  find("token-value").value = "";
  showCurl();
  setTimeout(follow);
};
document.onvisibilitychange = () => !document.hidden && follow();
window.onhashchange = route;
showCurl();
route();
