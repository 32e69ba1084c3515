-- +goose Up
-- Changes that were refused although an origin may have a record of them. since is in milliseconds since 1970.
CREATE TABLE refused (
    key        TEXT NOT NULL, -- of the record
    generation INTEGER NOT NULL,
    repository TEXT NOT NULL,
    since      INTEGER NOT NULL,
    PRIMARY KEY (key, generation)
) WITHOUT ROWID;

-- Under which key origins keep the record of a row; empty for rows from before.
ALTER TABLE outbox ADD COLUMN key TEXT NOT NULL DEFAULT '';
CREATE INDEX outbox_by_key ON outbox (key, generation);

-- +goose Down
DROP INDEX outbox_by_key;
ALTER TABLE outbox DROP COLUMN key;
DROP TABLE refused;
