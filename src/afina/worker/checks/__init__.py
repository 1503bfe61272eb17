"""Checks of the environment inside the image, and a self-test."""
