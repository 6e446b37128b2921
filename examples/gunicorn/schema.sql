CREATE TABLE IF NOT EXISTS entries (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    said text NOT NULL,
    written_at timestamptz NOT NULL DEFAULT now()
);
