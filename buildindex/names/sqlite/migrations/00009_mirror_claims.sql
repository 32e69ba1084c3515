-- +goose Up
-- What a manifest says that its repository has is a claim, which goes with the manifest.
CREATE TABLE mirrored_claims (
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    manifest   TEXT NOT NULL,
    size       INTEGER NOT NULL,
    PRIMARY KEY (repository, digest, manifest)
) WITHOUT ROWID;
INSERT INTO mirrored_claims (repository, digest, manifest, size)
SELECT m.repository, json_extract(d.value, '$.digest'), m.digest, l.size
FROM mirrored_manifests m,
    json_each(CASE WHEN json_valid(CAST(m.bytes AS TEXT)) THEN json_insert(
        ifnull(json_extract(CAST(m.bytes AS TEXT), '$.layers'), '[]'), '$[#]', json_extract(CAST(m.bytes AS TEXT), '$.config')) ELSE '[]' END) d
    JOIN mirrored_layers l ON l.repository = m.repository AND l.digest = json_extract(d.value, '$.digest')
WHERE d.type = 'object' AND json_extract(d.value, '$.data') IS NULL
    AND ifnull(json_extract(d.value, '$.mediaType'), '') NOT LIKE '%nondistributable%' AND ifnull(json_extract(d.value, '$.mediaType'), '') NOT LIKE '%foreign%'
ON CONFLICT DO NOTHING;
DROP TABLE mirrored_layers;
ALTER TABLE mirrored_claims RENAME TO mirrored_layers;
CREATE INDEX mirrored_layers_by_digest ON mirrored_layers (digest, repository);
CREATE INDEX mirrored_layers_by_manifest ON mirrored_layers (repository, manifest);

-- What the registry itself has said that a repository has. used is in milliseconds since 1970, as below.
CREATE TABLE mirrored_proofs (
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    size       INTEGER NOT NULL,
    used       INTEGER NOT NULL,
    PRIMARY KEY (repository, digest)
) WITHOUT ROWID;
CREATE INDEX mirrored_proofs_by_digest ON mirrored_proofs (digest, repository);
CREATE INDEX mirrored_proofs_by_use ON mirrored_proofs (used);

ALTER TABLE mirrored_referrers ADD COLUMN size INTEGER NOT NULL DEFAULT 0;
ALTER TABLE mirrored_referrers ADD COLUMN used INTEGER NOT NULL DEFAULT 0;
UPDATE mirrored_referrers SET size = length(descriptors), used = checked;
CREATE INDEX mirrored_referrers_by_use ON mirrored_referrers (used, size);

-- +goose Down
DROP INDEX mirrored_referrers_by_use;
ALTER TABLE mirrored_referrers DROP COLUMN used;
ALTER TABLE mirrored_referrers DROP COLUMN size;
DROP TABLE mirrored_proofs;
CREATE TABLE mirrored_sizes (
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    size       INTEGER NOT NULL,
    PRIMARY KEY (repository, digest)
) WITHOUT ROWID;
INSERT INTO mirrored_sizes SELECT repository, digest, max(size) FROM mirrored_layers GROUP BY repository, digest;
DROP TABLE mirrored_layers;
ALTER TABLE mirrored_sizes RENAME TO mirrored_layers;
