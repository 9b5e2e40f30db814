-- Times are nanoseconds since 1970, 0 for "not yet"; maps are JSON text.

-- +goose Up
CREATE TABLE teams (
    id      TEXT   NOT NULL PRIMARY KEY,
    slug    TEXT   NOT NULL UNIQUE,
    name    TEXT   NOT NULL,
    created BIGINT NOT NULL
);

CREATE TABLE api_keys (
    id      TEXT   NOT NULL PRIMARY KEY,
    team_id TEXT   NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name    TEXT   NOT NULL,
    hash    TEXT   NOT NULL UNIQUE, -- SHA-256 of the key, hex
    created BIGINT NOT NULL
);
CREATE INDEX api_keys_by_team ON api_keys (team_id);

CREATE TABLE templates (
    id           TEXT    NOT NULL PRIMARY KEY,
    alias        TEXT    NOT NULL UNIQUE,
    team_id      TEXT    NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    public       BOOLEAN NOT NULL,
    build_id     TEXT    NOT NULL,
    cpus         INTEGER NOT NULL,
    memory_mib   BIGINT  NOT NULL,
    disk_mib     BIGINT  NOT NULL,
    default_user TEXT    NOT NULL,
    workdir      TEXT    NOT NULL,
    envd_version TEXT    NOT NULL,
    created      BIGINT  NOT NULL,
    updated      BIGINT  NOT NULL
);

-- A sandbox's record outlives its template: no reference to it.
CREATE TABLE sandboxes (
    id             TEXT    NOT NULL PRIMARY KEY,
    team_id        TEXT    NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    host_id        TEXT    NOT NULL,
    template_id    TEXT    NOT NULL,
    build_id       TEXT    NOT NULL,
    alias          TEXT    NOT NULL,
    cpus           INTEGER NOT NULL,
    memory_mib     BIGINT  NOT NULL,
    disk_mib       BIGINT  NOT NULL,
    pids           BIGINT  NOT NULL,
    metadata       TEXT    NOT NULL,
    secured        BOOLEAN NOT NULL,
    allow_internet BOOLEAN NOT NULL,
    timeout        BIGINT  NOT NULL, -- nanoseconds
    state          TEXT    NOT NULL,
    reason         TEXT    NOT NULL,
    address        TEXT    NOT NULL,
    envd_version   TEXT    NOT NULL,
    created        BIGINT  NOT NULL,
    started        BIGINT  NOT NULL,
    ends           BIGINT  NOT NULL,
    ended          BIGINT  NOT NULL
);
CREATE INDEX sandboxes_by_team ON sandboxes (team_id, state, started, id);
CREATE INDEX sandboxes_by_host ON sandboxes (host_id, state, ends);
CREATE INDEX sandboxes_by_end ON sandboxes (ended);

-- The same pairs as sandboxes.metadata, for filtering.
CREATE TABLE sandbox_metadata (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    name       TEXT NOT NULL,
    value      TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, name)
);

-- +goose Down
DROP TABLE sandbox_metadata;
DROP TABLE sandboxes;
DROP TABLE templates;
DROP TABLE api_keys;
DROP TABLE teams;
