-- +goose Up
-- Who has a manifest is looked up by its digest, as for blobs.
CREATE INDEX mirrored_manifests_by_digest ON mirrored_manifests (digest, repository);

-- +goose Down
DROP INDEX mirrored_manifests_by_digest;
