# Short names for the commands of scripts/; each also runs alone.
.PHONY: help setup test test-all lint format quickstart doctor clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:           ## make .venv (CPU or GPU set, by what the machine has)
	bash scripts/setup.sh

test:            ## ruff and the fast tests
	bash scripts/test.sh

test-all:        ## the slow real runs too
	bash scripts/test.sh --all

lint:            ## ruff alone
	$${REELRL_VENV:-.venv}/bin/ruff check .

format:          ## fix what ruff can fix, then format
	$${REELRL_VENV:-.venv}/bin/ruff check --fix . && $${REELRL_VENV:-.venv}/bin/ruff format .

quickstart:      ## the whole life of a policy on the playground
	bash scripts/quickstart.sh

doctor:          ## what this machine has
	bash scripts/doctor.sh

clean:           ## remove caches; keeps .venv, runs and the playground
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs -r rm -rf
	rm -rf .pytest_cache .ruff_cache .hypothesis
