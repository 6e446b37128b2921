"""What application servers call when they start, fork and end; one module each."""
