-- +goose Up
-- A manifest's bytes are in contents; a change of names in the outbox does not repeat them.
UPDATE outbox SET record = json_remove(CAST(record AS TEXT), '$.bytes') WHERE json_valid(CAST(record AS TEXT));

-- +goose Down
SELECT 1;
