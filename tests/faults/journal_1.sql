-- A journal of schema 1 with three jobs: delivering, running and accepted.
PRAGMA application_id = 1349481332;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE attempts (
    seq              INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    number           INTEGER NOT NULL CHECK (number >= 1),  -- 1 is the first
    attempted_at     TEXT    NOT NULL,
    duration_seconds REAL    NOT NULL,
    status_code      INTEGER,  -- NULL: the receiver never answered
    error            TEXT,     -- NULL: delivered
    PRIMARY KEY (seq, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE events (
    seq    INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    body   BLOB NOT NULL,  -- what every attempt sends
    result TEXT            -- where the body only links to it
) STRICT;
INSERT INTO "events" VALUES(1,X'7B2274797065223A20226A6F622E737563636565646564222C202274696D657374616D70223A2022323032362D30312D30325430333A30343A30352E3637385A222C202264617461223A207B226964223A20223031396237636139386632653439306364346266323334363038396666636163222C20226F7574636F6D65223A2022737563636565646564222C20226572726F72223A206E756C6C2C2022637265617465645F6174223A2022323032362D30312D30325430333A30343A30352E3637385A222C2022737461727465645F6174223A2022323032362D30312D30325430333A30343A30352E3637385A222C202266696E69736865645F6174223A2022323032362D30312D30325430333A30343A30352E3637385A222C2022726573756C74223A20317D7D',NULL);
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
    idempotency_key TEXT    UNIQUE,
    body_sha256     TEXT,                 -- what came with the idempotency_key
    CHECK ((outcome IS NULL) = (state IN ('accepted', 'running'))),
    CHECK ((ended_at IS NULL) = (state NOT IN ('delivered', 'undelivered'))),
    CHECK (next_attempt_at IS NULL OR state = 'delivering')
) STRICT;
INSERT INTO "jobs" VALUES(1,'019b7ca98f2e490cd4bf2346089ffcac','delivering','succeeded',NULL,'',1,'2026-01-02T03:04:05.678Z','2026-01-02T03:04:05.678Z','2026-01-02T03:04:05.678Z','2026-01-02T03:04:05.678Z',NULL,0,0,'{}',NULL,NULL);
INSERT INTO "jobs" VALUES(2,'019b7ca98f2e4e2fb19a1e689566d677','running',NULL,NULL,'',1,'2026-01-02T03:04:05.678Z','2026-01-02T03:04:05.678Z',NULL,NULL,NULL,0,0,'{}',NULL,NULL);
INSERT INTO "jobs" VALUES(3,'019b7ca98f2e1255b932170a43cf3240','accepted',NULL,NULL,'',0,'2026-01-02T03:04:05.678Z',NULL,NULL,NULL,NULL,0,0,'{}',NULL,NULL);
CREATE TABLE payloads (
    seq  INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    body BLOB NOT NULL  -- as the caller sent it
) STRICT;
INSERT INTO "payloads" VALUES(1,X'7B2264617461223A20317D');
INSERT INTO "payloads" VALUES(2,X'7B2264617461223A20327D');
INSERT INTO "payloads" VALUES(3,X'7B2264617461223A20337D');
CREATE TABLE received (
    seq         INTEGER PRIMARY KEY,
    webhook_id  TEXT NOT NULL UNIQUE,
    received_at TEXT NOT NULL,
    signature   TEXT NOT NULL CHECK (signature IN ('good', 'none')),
    body        BLOB NOT NULL
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state);
CREATE INDEX jobs_due ON jobs (receiver, next_attempt_at) WHERE state = 'delivering';
CREATE INDEX jobs_ended ON jobs (ended_at) WHERE ended_at IS NOT NULL;
CREATE VIEW receivers AS
    WITH RECURSIVE step (receiver) AS (
        SELECT min(receiver) FROM jobs INDEXED BY jobs_due WHERE state = 'delivering'
        UNION ALL
        SELECT (SELECT min(jobs.receiver) FROM jobs INDEXED BY jobs_due
                 WHERE state = 'delivering' AND jobs.receiver > step.receiver)
          FROM step WHERE step.receiver IS NOT NULL
    )
    SELECT receiver,
           (SELECT min(next_attempt_at) FROM jobs
             WHERE state = 'delivering' AND jobs.receiver = step.receiver) AS due_at
      FROM step WHERE receiver IS NOT NULL;
CREATE INDEX received_by_age ON received (received_at);
COMMIT;
