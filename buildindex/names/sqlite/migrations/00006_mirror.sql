-- +goose Up
-- What registries outside the cluster said: a cache, with no generations, which no bucket has.
CREATE TABLE mirrored_manifests (
    repository    TEXT NOT NULL,
    digest        TEXT NOT NULL,
    media_type    TEXT NOT NULL,
    artifact_type TEXT NOT NULL,
    subject       TEXT NOT NULL, -- empty for none
    bytes         BLOB NOT NULL,
    PRIMARY KEY (repository, digest)
) WITHOUT ROWID;

-- checked is when the registry said so last, in milliseconds since 1970.
CREATE TABLE mirrored_tags (
    repository TEXT NOT NULL,
    tag        TEXT NOT NULL,
    digest     TEXT NOT NULL,
    checked    INTEGER NOT NULL,
    PRIMARY KEY (repository, tag)
) WITHOUT ROWID;

CREATE TABLE mirrored_layers (
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    size       INTEGER NOT NULL,
    PRIMARY KEY (repository, digest)
) WITHOUT ROWID;

CREATE TABLE mirrored_referrers (
    repository  TEXT NOT NULL,
    subject     TEXT NOT NULL,
    descriptors BLOB NOT NULL, -- JSON
    checked     INTEGER NOT NULL,
    PRIMARY KEY (repository, subject)
) WITHOUT ROWID;

-- +goose Down
DROP TABLE mirrored_referrers;
DROP TABLE mirrored_layers;
DROP TABLE mirrored_tags;
DROP TABLE mirrored_manifests;
