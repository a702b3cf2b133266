-- The journal: jobs, what they were given, what is posted, and every attempt. Times are UTC, ISO 8601
-- with milliseconds, so that text order is time order. Large values have tables of their own: a move
-- rewrites its row, and must not rewrite a payload.

CREATE TABLE jobs (
    seq             INTEGER PRIMARY KEY,  -- the order of acceptance
    id              TEXT    NOT NULL UNIQUE,
    state           TEXT    NOT NULL
        CHECK (state IN ('accepted', 'running', 'delivering', 'delivered', 'undelivered')),
    outcome         TEXT
        CHECK (outcome IN ('succeeded', 'failed', 'timed_out', 'canceled', 'crashed')),
    postback_url    TEXT,                 -- NULL: the configured POSTBACK_URL
    receiver        TEXT    NOT NULL,     -- the origin of postback_url; '' for the configured one
    starts          INTEGER NOT NULL DEFAULT 0 CHECK (starts >= 0),
    created_at      TEXT    NOT NULL,
    started_at      TEXT,                 -- the last start
    finished_at     TEXT,                 -- the end of the analysis
    next_attempt_at TEXT,                 -- NULL while delivering: an attempt is under way
    ended_at        TEXT,                 -- delivered, or given up
    attempts        INTEGER NOT NULL DEFAULT 0,
    resent_after    INTEGER NOT NULL DEFAULT 0,
    forwarded       TEXT    NOT NULL DEFAULT '{}',
    idempotency_key TEXT,
    body_sha256     TEXT,                 -- what came with the idempotency_key
    CHECK ((outcome IS NULL) = (state IN ('accepted', 'running'))),
    CHECK ((ended_at IS NULL) = (state NOT IN ('delivered', 'undelivered'))),
    CHECK (next_attempt_at IS NULL OR state = 'delivering')
) STRICT;

CREATE INDEX jobs_by_state ON jobs (state);
CREATE UNIQUE INDEX jobs_by_key ON jobs (idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_due ON jobs (receiver, next_attempt_at) WHERE next_attempt_at IS NOT NULL;
CREATE INDEX jobs_ended ON jobs (ended_at) WHERE ended_at IS NOT NULL;

-- When the next attempt for each receiver is due. Steps from one receiver to the next by the index,
-- however many jobs wait for each; unasked, SQLite would take jobs_by_state and read them all.
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

CREATE TABLE events (
    seq    INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    body   BLOB NOT NULL,  -- what every attempt sends
    result TEXT            -- where the body only links to it
) STRICT;

CREATE TABLE attempts (
    seq              INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    number           INTEGER NOT NULL CHECK (number >= 1),  -- 1 is the first
    attempted_at     TEXT    NOT NULL,
    duration_seconds REAL    NOT NULL,
    status_code      INTEGER,  -- NULL: the receiver never answered
    error            TEXT,     -- NULL: delivered
    PRIMARY KEY (seq, number)
) STRICT, WITHOUT ROWID;

-- What the built-in receiver got; its sender may be another service.
CREATE TABLE received (
    seq         INTEGER PRIMARY KEY,
    webhook_id  TEXT NOT NULL UNIQUE,
    received_at TEXT NOT NULL,
    signature   TEXT NOT NULL CHECK (signature IN ('good', 'none')),
    body        BLOB NOT NULL
) STRICT;

CREATE INDEX received_by_age ON received (received_at);
