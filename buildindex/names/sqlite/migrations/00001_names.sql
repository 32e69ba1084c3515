-- +goose Up
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE repositories (
    name TEXT PRIMARY KEY
) WITHOUT ROWID;

-- Bytes of manifests, each once, whatever repositories have it.
CREATE TABLE contents (
    digest TEXT PRIMARY KEY,
    bytes  BLOB NOT NULL
);

CREATE TABLE manifests (
    repository    TEXT NOT NULL,
    digest        TEXT NOT NULL,
    media_type    TEXT NOT NULL,
    artifact_type TEXT NOT NULL,
    subject       TEXT NOT NULL, -- empty for none
    generation    INTEGER NOT NULL,
    PRIMARY KEY (repository, digest)
) WITHOUT ROWID;
CREATE INDEX manifests_by_subject ON manifests (repository, subject, digest) WHERE subject <> '';
CREATE INDEX manifests_by_digest ON manifests (digest);

CREATE TABLE tags (
    repository TEXT NOT NULL,
    tag        TEXT NOT NULL,
    digest     TEXT NOT NULL,
    generation INTEGER NOT NULL,
    PRIMARY KEY (repository, tag)
) WITHOUT ROWID;
CREATE INDEX tags_by_digest ON tags (repository, digest);

CREATE TABLE layers (
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    size       INTEGER NOT NULL,
    PRIMARY KEY (repository, digest)
) WITHOUT ROWID;
CREATE INDEX layers_by_digest ON layers (digest, repository);

-- Changes that are not in the bucket yet; also the tombstones of deletions.
CREATE TABLE outbox (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    record TEXT NOT NULL
);

-- +goose Down
DROP TABLE outbox;
DROP TABLE layers;
DROP TABLE tags;
DROP TABLE manifests;
DROP TABLE contents;
DROP TABLE repositories;
DROP TABLE meta;
