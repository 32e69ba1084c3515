-- +goose Up
-- Buckets are written to independently of each other. Empty until build-index says which bucket's a row is.
ALTER TABLE outbox ADD COLUMN bucket TEXT NOT NULL DEFAULT '';
CREATE INDEX outbox_by_bucket ON outbox (bucket, id);

-- Deletions are remembered for ever: by their name alone.
DROP INDEX tombstones_by_generation;

-- +goose Down
CREATE INDEX tombstones_by_generation ON tombstones (generation);
DROP INDEX outbox_by_bucket;
ALTER TABLE outbox DROP COLUMN bucket;
