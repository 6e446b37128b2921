PYTHON ?= python3
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help venv venv-uwsgi run run-uwsgi demo test check bench venv-bench bench-failover bench-peers crash model chaos layout clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:            ## make or refresh the environment in .venv (PYTHON=python3.12 picks another Python)
	@$(PYTHON) tools/bootstrap.py

venv-uwsgi: venv ## compile uWSGI into it (half a minute, once; without a C compiler its tests are skipped)
	@$(PY) tools/bootstrap.py uwsgi

run: venv        ## run a coordinator and workers against a throw-away PostgreSQL server
	@$(PY) -m tools.run

run-uwsgi: venv-uwsgi ## the same under uWSGI, with the coordinator as its mule
	@$(PY) -m tools.run --server uwsgi

demo: venv       ## the same with a short guided demonstration
	@$(PY) -m tools.run --demo

test: venv-uwsgi ## run the tests, in half as many processes as there are processors
	@$(PY) -m pytest -n auto --dist loadfile

check: venv-uwsgi ## run everything that must pass: format, lint, types, layers, tests, wheel
	@$(PY) -m tools.check

bench: venv-uwsgi ## measure
	@$(PY) -m tools.bench

venv-bench: venv ## install the pools that the comparisons are with
	@$(PY) tools/bootstrap.py bench

bench-failover: venv-bench ## kill, freeze, promote and return servers under four pools (ten minutes)
	@$(PY) -m tools.bench failover

bench-peers: venv-bench ## measure requests beside other pools and PgBouncer (half an hour)
	@$(PY) -m tools.bench peers $(OPTIONS)

crash: venv      ## run the crash tests at every point
	@$(PY) -m pytest -n auto tests/crash --every-point

model: venv      ## explore the protocol's states exhaustively
	@$(PY) -m tools.model

layout: venv     ## print the layout of the shared segment
	@$(PY) -m tools.print_layout

chaos: venv      ## kill, stop and interrupt everything for two minutes; every permit must be accounted for
	@$(PY) -m tools.chaos

clean:           ## remove .venv, builds and caches
	@rm -rf .venv build dist .*_cache .hypothesis && find . -name __pycache__ -prune -exec rm -rf {} +
