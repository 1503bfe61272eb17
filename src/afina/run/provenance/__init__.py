"""How a run was made: `record.json`, the state of its git repository, a methods paragraph, looks at its test split."""
