"""Using a finished run: `afina predict`, `afina export`, `afina.load`."""
