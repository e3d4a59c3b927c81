"""Block-sparse attention from per-query-block lists of key blocks; see `api` and README.md."""
