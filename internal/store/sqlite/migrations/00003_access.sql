-- +goose Up
ALTER TABLE sandboxes ADD COLUMN protected BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE sandboxes ADD COLUMN mask_request_host TEXT NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE sandboxes DROP COLUMN mask_request_host;
ALTER TABLE sandboxes DROP COLUMN protected;
