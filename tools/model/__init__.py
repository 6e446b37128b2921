"""The permit protocol as a model that explores every interleaving of a small pool: `make model`, README.md."""
