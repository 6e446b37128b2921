PYTHON ?= python3
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help venv run demo test check bench crash model chaos layout clean

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:            ## make or refresh the environment in .venv (PYTHON=python3.12 picks another Python)
	@$(PYTHON) tools/bootstrap.py

run: venv        ## run a coordinator and workers against a throw-away PostgreSQL server
	@$(PY) -m tools.run

demo: venv       ## the same with a short guided demonstration
	@$(PY) -m tools.run --demo

test: venv       ## run the tests
	@$(PY) -m pytest

check: venv      ## run everything that must pass: format, lint, types, layers, tests, wheel
	@$(PY) -m tools.check

bench: venv      ## measure
	@$(PY) -m tools.bench

crash: venv      ## run the crash tests at every point
	@$(PY) -m pytest tests/crash --every-point

model: venv      ## explore the protocol's states exhaustively
	@$(PY) -m tools.model

layout: venv     ## print the layout of the shared segment
	@$(PY) -m tools.print_layout

chaos: venv      ## kill, stop and interrupt everything for two minutes; every permit must be accounted for
	@$(PY) -m tools.chaos

clean:           ## remove .venv, builds and caches
	@rm -rf .venv build dist .*_cache .hypothesis && find . -name __pycache__ -prune -exec rm -rf {} +
