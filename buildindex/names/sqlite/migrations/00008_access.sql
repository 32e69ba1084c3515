-- +goose Up
-- What proxies share of who may come in: robots' hashed keys, and the public keys that tokens are signed with.
CREATE TABLE access (
    kind    TEXT NOT NULL,
    name    TEXT NOT NULL,
    value   TEXT NOT NULL,
    expires INTEGER NOT NULL, -- seconds since 1970, 0 for never
    PRIMARY KEY (kind, name)
) WITHOUT ROWID;

-- +goose Down
DROP TABLE access;
