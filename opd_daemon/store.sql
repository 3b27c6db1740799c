-- Version 1 of the store's schema. It is never changed: what comes later is in schema.py.
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO facts VALUES ('store_id', lower(hex(randomblob(16))));
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    revision INTEGER NOT NULL UNIQUE,  -- of the event that accepted it: the order of creation, whatever the clock says
    state TEXT NOT NULL,
    request_id TEXT NOT NULL,
    request_digest TEXT NOT NULL,
    document TEXT NOT NULL
);
CREATE UNIQUE INDEX runs_by_request ON runs (request_id) WHERE request_id != '';
CREATE TABLE events (
    revision INTEGER PRIMARY KEY,
    batch_end INTEGER NOT NULL,  -- the last revision stored together with this one
    run_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    time TEXT NOT NULL,
    payload TEXT NOT NULL
);
CREATE INDEX events_by_run ON events (run_id, revision);
CREATE TABLE metrics (
    run_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    step INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    time TEXT NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (run_id, kind, step)
) WITHOUT ROWID;
CREATE TABLE checkpoints (
    run_id TEXT NOT NULL,
    path TEXT NOT NULL,
    step INTEGER NOT NULL,
    created_at TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    is_best INTEGER NOT NULL,
    is_final INTEGER NOT NULL,
    validation_kl REAL,
    PRIMARY KEY (run_id, path)  -- best/ and final/ move from step to step
) WITHOUT ROWID;
CREATE TABLE workers (run_id TEXT PRIMARY KEY, pid INTEGER NOT NULL, started REAL NOT NULL) WITHOUT ROWID;
