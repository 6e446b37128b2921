"""Developer tools: environment, checks, throw-away servers; nothing here is shipped."""
