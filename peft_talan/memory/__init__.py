"""Carries the latent memory of a generation from one call to the next."""
