-- +goose Up
ALTER TABLE outbox ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
UPDATE outbox SET generation = json_extract(CAST(record AS TEXT), '$.generation');
CREATE INDEX outbox_by_generation ON outbox (generation);

-- Of any change that was committed, deletions as well: one row.
CREATE TABLE last_generation (
    generation INTEGER NOT NULL
);
INSERT INTO last_generation (generation)
SELECT max(
    (SELECT ifnull(max(generation), 0) FROM tags),
    (SELECT ifnull(max(generation), 0) FROM manifests),
    (SELECT ifnull(max(generation), 0) FROM outbox));

-- +goose Down
DROP TABLE last_generation;
DROP INDEX outbox_by_generation;
ALTER TABLE outbox DROP COLUMN generation;
