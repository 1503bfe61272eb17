"""The version of afina; the same as in pyproject.toml. And the interface between the host and the image."""

__all__ = ["INTERFACE", "__version__"]

__version__ = "0.1.0"

#: One more with every change of what the host sends into the image, its plans first: an image with another number is refused.
#: `tests/unit/run/test_plan.py` fails where it was forgotten.
INTERFACE = 11
