-- +goose Up
-- A mount has a generation, a push of a blob has none.
ALTER TABLE layers ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;

-- Deletions of late: a change of the same name that is older and comes later must not win.
CREATE TABLE tombstones (
    repository TEXT NOT NULL,
    kind       TEXT NOT NULL, -- tag, manifest or layer
    name       TEXT NOT NULL, -- a tag or a digest
    generation INTEGER NOT NULL,
    PRIMARY KEY (repository, kind, name)
) WITHOUT ROWID;
CREATE INDEX tombstones_by_generation ON tombstones (generation);

-- +goose Down
DROP TABLE tombstones;
ALTER TABLE layers DROP COLUMN generation;
