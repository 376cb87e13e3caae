"""Lets servers that keep a generation's cache in pages run side paths, and refuses what they can't run exactly."""
