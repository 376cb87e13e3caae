"""The mathematics of the side path: `reference` to read, `fused` to run; same names, same signatures."""
