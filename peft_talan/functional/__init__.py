"""The mathematics of the side path: `reference` to read, `fused`, `one_token` and `ragged` to run."""
