-- +goose Up
-- Of what is mirrored the least recently used goes when there is too much. used is in milliseconds since 1970.
ALTER TABLE mirrored_manifests ADD COLUMN size INTEGER NOT NULL DEFAULT 0;
ALTER TABLE mirrored_manifests ADD COLUMN used INTEGER NOT NULL DEFAULT 0;
UPDATE mirrored_manifests SET size = length(bytes);
CREATE INDEX mirrored_by_use ON mirrored_manifests (used, size);
CREATE INDEX mirrored_tags_by_digest ON mirrored_tags (repository, digest);

-- +goose Down
DROP INDEX mirrored_tags_by_digest;
DROP INDEX mirrored_by_use;
ALTER TABLE mirrored_manifests DROP COLUMN used;
ALTER TABLE mirrored_manifests DROP COLUMN size;
