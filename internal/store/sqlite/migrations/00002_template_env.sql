-- +goose Up
ALTER TABLE templates ADD COLUMN env_vars TEXT NOT NULL DEFAULT '{}'; -- JSON

-- +goose Down
ALTER TABLE templates DROP COLUMN env_vars;
