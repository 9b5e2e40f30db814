-- +goose Up
ALTER TABLE sandboxes ADD COLUMN auto_pause BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE sandboxes ADD COLUMN auto_pause_memory BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE sandboxes ADD COLUMN auto_resume BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE sandboxes ADD COLUMN memory_kept BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE sandboxes ADD COLUMN image_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN snapshot_id TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN source_id TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN changed BIGINT NOT NULL DEFAULT 0;
UPDATE sandboxes SET changed = CASE WHEN ended > 0 THEN ended WHEN started > 0 THEN started ELSE created END;

-- Events outlive their sandboxes: no reference to them. Numbers are never given
-- twice, so that who follows events by their number misses none; in PostgreSQL
-- that is BIGINT GENERATED ALWAYS AS IDENTITY.
CREATE TABLE events (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    sandbox_id TEXT    NOT NULL,
    team_id    TEXT    NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    time       BIGINT  NOT NULL,
    from_state TEXT    NOT NULL,
    state      TEXT    NOT NULL,
    cause      TEXT    NOT NULL,
    duration   BIGINT  NOT NULL -- nanoseconds
);
CREATE INDEX events_by_sandbox ON events (sandbox_id, seq);
CREATE INDEX events_by_team ON events (team_id, seq);

-- A snapshot outlives its sandbox and its template: no reference to them.
CREATE TABLE snapshots (
    id             TEXT    NOT NULL PRIMARY KEY,
    team_id        TEXT    NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    host_id        TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    sandbox_id     TEXT    NOT NULL,
    template_id    TEXT    NOT NULL,
    build_id       TEXT    NOT NULL,
    alias          TEXT    NOT NULL,
    cpus           INTEGER NOT NULL,
    memory_mib     BIGINT  NOT NULL,
    disk_mib       BIGINT  NOT NULL,
    pids           BIGINT  NOT NULL,
    secured        BOOLEAN NOT NULL,
    allow_internet BOOLEAN NOT NULL,
    kind           TEXT    NOT NULL,
    default_user   TEXT    NOT NULL,
    workdir        TEXT    NOT NULL,
    envd_version   TEXT    NOT NULL,
    size_bytes     BIGINT  NOT NULL,
    state          TEXT    NOT NULL,
    created        BIGINT  NOT NULL
);
CREATE INDEX snapshots_by_team ON snapshots (team_id, created, id);
CREATE INDEX snapshots_by_name ON snapshots (team_id, name, created, id);
CREATE INDEX snapshots_by_host ON snapshots (host_id, created, id);

-- +goose Down
DROP TABLE snapshots;
DROP TABLE events;
ALTER TABLE sandboxes DROP COLUMN changed;
ALTER TABLE sandboxes DROP COLUMN source_id;
ALTER TABLE sandboxes DROP COLUMN snapshot_id;
ALTER TABLE sandboxes DROP COLUMN image_bytes;
ALTER TABLE sandboxes DROP COLUMN memory_kept;
ALTER TABLE sandboxes DROP COLUMN auto_resume;
ALTER TABLE sandboxes DROP COLUMN auto_pause_memory;
ALTER TABLE sandboxes DROP COLUMN auto_pause;
