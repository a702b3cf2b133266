-- The journal: jobs, what they were given, what is posted, and every attempt. Times are UTC in
-- ISO 8601 with milliseconds, so text order is time order. Large values have tables of their own,
-- because a move rewrites its row and must not rewrite a payload.

-- A CHECK with IN and more than two values would fill a temporary table at each write.
-- Below seq come the attributes of model.Job, in their order.
CREATE TABLE jobs (
    seq             INTEGER PRIMARY KEY,  -- the order of acceptance
    id              TEXT    NOT NULL UNIQUE,
    state           TEXT    NOT NULL
        CHECK (state = 'accepted' OR state = 'running' OR state = 'delivering'
               OR state = 'delivered' OR state = 'undelivered'),
    outcome         TEXT
        CHECK (outcome = 'succeeded' OR outcome = 'failed' OR outcome = 'timed_out'
               OR outcome = 'canceled' OR outcome = 'crashed'),
    postback_url    TEXT,                 -- NULL: the configured POSTBACK_URL
    receiver        TEXT    NOT NULL,     -- the origin of postback_url; '' for the configured one
    metadata        TEXT,                 -- a JSON object of the caller's
    forwarded       TEXT    NOT NULL DEFAULT '{}',
    starts          INTEGER NOT NULL DEFAULT 0 CHECK (starts >= 0),
    failures        INTEGER NOT NULL DEFAULT 0,  -- runs that raised and were to be repeated
    interrupted     INTEGER NOT NULL DEFAULT 0,  -- unclean ends of the service while it ran
    alone           INTEGER NOT NULL DEFAULT 0 CHECK (alone BETWEEN 0 AND 2),  -- why it may not share
    created_at      TEXT    NOT NULL,
    started_at      TEXT,                 -- the last start of the analysis; NULL: not yet
    finished_at     TEXT,                 -- the end of the analysis
    next_start_at   TEXT,                 -- not to be started before
    next_attempt_at TEXT,                 -- NULL while delivering: an attempt is under way
    ended_at        TEXT,                 -- delivered, or given up
    attempts        INTEGER NOT NULL DEFAULT 0,
    resent_after    INTEGER NOT NULL DEFAULT 0,
    last_error      TEXT,                 -- JSON: why the analysis is to run again
    idempotency_key TEXT,
    body_sha256     TEXT,                 -- what came with the idempotency_key
    CHECK ((outcome IS NULL) = (state IN ('accepted', 'running'))),
    CHECK ((ended_at IS NULL) = (state NOT IN ('delivered', 'undelivered'))),
    CHECK (next_start_at IS NULL OR state = 'accepted'),
    CHECK (next_attempt_at IS NULL OR state = 'delivering')
) STRICT;

CREATE INDEX jobs_by_state ON jobs (state);
CREATE INDEX jobs_startable ON jobs (alone) WHERE state = 'accepted' AND next_start_at IS NULL;
CREATE INDEX jobs_to_start ON jobs (next_start_at) WHERE next_start_at IS NOT NULL;
CREATE INDEX jobs_due ON jobs (receiver, next_attempt_at) WHERE next_attempt_at IS NOT NULL;
CREATE INDEX jobs_undelivered ON jobs (ended_at) WHERE state = 'undelivered';
CREATE INDEX jobs_ended ON jobs (ended_at) WHERE ended_at IS NOT NULL;
CREATE UNIQUE INDEX jobs_by_key ON jobs (idempotency_key) WHERE idempotency_key IS NOT NULL;

-- The jobs whose analysis may start now.
CREATE VIEW startable AS
    SELECT seq, alone FROM jobs INDEXED BY jobs_startable
     WHERE state = 'accepted' AND next_start_at IS NULL;

-- How many jobs are in each state, and when the oldest was accepted. The delivered ones are left
-- out, because to count them would take long.
CREATE VIEW census AS
    SELECT value AS state, (SELECT count(*) FROM jobs WHERE state = value) AS jobs,
           (SELECT created_at FROM jobs
             WHERE seq = (SELECT min(seq) FROM jobs WHERE state = value)) AS created_at
      FROM json_each('["accepted", "running", "delivering", "undelivered"]');

-- When the next attempt for each receiver is due. It steps from one receiver to the next by the
-- index, however many jobs wait for each. Without INDEXED BY, SQLite would read them all.
CREATE VIEW receivers AS
    WITH RECURSIVE step (receiver) AS (
        SELECT min(receiver) FROM jobs INDEXED BY jobs_due WHERE next_attempt_at IS NOT NULL
        UNION ALL
        SELECT (SELECT min(jobs.receiver) FROM jobs INDEXED BY jobs_due
                 WHERE next_attempt_at IS NOT NULL AND jobs.receiver > step.receiver)
          FROM step WHERE step.receiver IS NOT NULL
    )
    SELECT receiver,
           (SELECT min(next_attempt_at) FROM jobs INDEXED BY jobs_due
             WHERE next_attempt_at IS NOT NULL AND jobs.receiver = step.receiver) AS due_at
      FROM step WHERE receiver IS NOT NULL;

CREATE TABLE payloads (
    seq  INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    body BLOB NOT NULL  -- as the caller sent it
) STRICT;

-- What the analysis saved with job.progress(keep=...). It goes when the analysis ends.
CREATE TABLE kept (
    seq   INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    value TEXT NOT NULL  -- JSON
) STRICT;

CREATE TABLE events (
    seq        INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    body       BLOB NOT NULL,  -- what every attempt sends
    result_at  INTEGER,        -- where the result begins in body; NULL: it is not there
    result     BLOB,           -- where the body only links to it
    result_key TEXT            -- what the link contains in place of a token
) STRICT;

CREATE TABLE attempts (
    seq              INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    number           INTEGER NOT NULL CHECK (number >= 1),  -- 1 is the first
    attempted_at     TEXT    NOT NULL,
    duration_seconds REAL    NOT NULL,
    status_code      INTEGER,  -- NULL: the receiver never answered
    error            TEXT,     -- NULL: delivered
    answer           TEXT,     -- the beginning of a failed answer
    PRIMARY KEY (seq, number)
) STRICT, WITHOUT ROWID;

-- A job as `GET /jobs/<id>` shows it, but for its event.
CREATE VIEW details AS
    SELECT jobs.*, payloads.body AS payload,
           (SELECT json_group_array(json_object(
                       'number', number, 'attempted_at', attempted_at,
                       'duration_seconds', round(duration_seconds, 3),
                       'status_code', status_code, 'error', error, 'answer', answer))
              FROM (SELECT * FROM attempts WHERE attempts.seq = jobs.seq ORDER BY number)
           ) AS attempts_made
      FROM jobs JOIN payloads USING (seq);

-- The result of each job, and NULL where there is none.
CREATE VIEW results AS
    SELECT id, coalesce(outcome, state) AS state, result_key,
           coalesce(result, substr(body, result_at + 1, length(body) - result_at - 2)) AS result
      FROM jobs LEFT JOIN events USING (seq);

-- What the built-in receiver got. Its sender may be another service.
CREATE TABLE received (
    seq         INTEGER PRIMARY KEY,
    webhook_id  TEXT NOT NULL UNIQUE,
    received_at TEXT NOT NULL,
    signature   TEXT NOT NULL CHECK (signature IN ('good', 'none')),
    body        BLOB NOT NULL
) STRICT;

CREATE INDEX received_by_age ON received (received_at);

-- One row: whether the service was told to stop, so that its end is nobody's fault.
CREATE TABLE service (
    planned_stop INTEGER NOT NULL CHECK (planned_stop IN (0, 1))
) STRICT;
INSERT INTO service (planned_stop) VALUES (0);
