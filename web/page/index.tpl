<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>Postback</title>
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <link rel="stylesheet" href="page.css">
  <link rel="icon" href="icon.svg">
  <script src="page.js" type="module"></script>
</head>
<body>
  <header>
    <h1>Postback</h1>
    <p>Answer now, post the result back later.</p>
    <p id="connection" role="status">connecting …</p>
  </header>

  <main>
    <section aria-labelledby="send-title">
      <h2 id="send-title">Send a job</h2>
      <div class="line">
        <code id="curl">curl {{base_url}}/process\\
% if needs_token:
 -H "Authorization: Bearer $API_TOKEN"\\
% end
 -H 'Content-Type: application/json' -d '{"data": [3, 1, 4, 1, 5, 9, 2, 6]}'</code>
        <button type="button" id="copy-curl">Copy</button>
      </div>
      <form id="send">
        <label for="payload">Payload</label>
        <textarea id="payload" rows="2" spellcheck="false" required>{"data": [3, 1, 4, 1, 5, 9, 2, 6]}</textarea>
        <button class="main">Send</button>
        <output id="sent" aria-live="polite"></output>
      </form>
    </section>

    <section aria-labelledby="hour-title">
      <h2 id="hour-title">Last hour</h2>
      <svg id="chart" role="img" viewBox="0 0 600 90" preserveAspectRatio="none"></svg>
      <ul id="legend">
        <li class="accepted">accepted <b>0</b></li>
        <li class="delivered">delivered <b>0</b></li>
        <li class="undelivered">undelivered <b>0</b></li>
        <li class="p99">answers p99 <b>–</b></li>
      </ul>
    </section>

    <section aria-labelledby="jobs-title" class="wide">
      <div class="line">
        <h2 id="jobs-title">Jobs</h2>
        <label>State
          <select id="filter">
            <option value="">every state</option>
% for state in states:
            <option>{{state}}</option>
% end
          </select>
        </label>
      </div>
      <table id="jobs">
        <thead>
          <tr>
            <th>Job</th><th>State</th><th>Outcome</th><th>Accepted</th><th>Analysis</th>
            <th>Attempts</th><th>Next attempt</th>
          </tr>
        </thead>
        <tbody></tbody>
      </table>
      <p id="no-jobs" hidden>No job yet. Press <b>Send</b> above, or paste the curl line into a terminal: the
        job appears here, and a moment later its postback appears below.</p>
      <p id="none-found" hidden>No job is in this state.</p>
      <nav id="pages" aria-label="Pages of jobs" hidden>
        <button type="button" id="newer" disabled>Newer</button>
        <button type="button" id="older" disabled>Older</button>
      </nav>
    </section>

    <section aria-labelledby="received-title" class="wide">
      <h2 id="received-title">Received at <code>/postprocessed</code></h2>
      <table id="received">
        <thead><tr><th>Job</th><th>Event</th><th>Received</th><th>Signature</th></tr></thead>
        <tbody></tbody>
      </table>
      <p id="none-received">Nothing yet. The built-in receiver gets a postback when <code>POSTBACK_URL</code> is not set.</p>
    </section>
  </main>

  <dialog id="job" aria-labelledby="job-title">
    <div class="line">
      <h2 id="job-title"></h2>
      <button type="button" id="close" aria-label="Close">✕</button>
    </div>
    <dl id="facts"></dl>
    <div class="line actions">
      <button type="button" id="resend">Resend</button>
      <button type="button" id="cancel">Cancel</button>
      <button type="button" id="copy-job">Copy as curl</button>
      <output id="acted" aria-live="polite"></output>
    </div>
    <h3>Postback attempts</h3>
    <table id="attempts">
      <thead><tr><th>#</th><th>At</th><th>Status</th><th>Took</th><th>Error</th></tr></thead>
      <tbody></tbody>
    </table>
    <p id="no-attempts">None yet.</p>
    <h3>Data</h3>
    <pre id="data" tabindex="0"></pre>
    <h3 id="ending-title">Result</h3>
    <pre id="ending" tabindex="0"></pre>
  </dialog>

  <dialog id="token" aria-labelledby="token-title">
    <form method="dialog" id="token-form">
      <h2 id="token-title">This service needs a token</h2>
      <label for="token-value">API_TOKEN</label>
      <input id="token-value" type="password" autocomplete="off" required>
      <p>It is kept until this tab is closed.</p>
      <button class="main">Continue</button>
    </form>
  </dialog>
</body>
</html>
