# Each target is one script in tools/; read those. `make help` lists the targets.
.PHONY: help demo test check check-all lint fmt deep bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## set up, then show what works on this machine
	@tools/setup
	@tools/demo

test: ## set up, build, lint, and run every test, as CI does
	@tools/test

check: ## linters and quick unit tests, two at a time; starts no cluster
	@tools/check

check-all: ## the same with the slow unit tests
	@tools/check --all

lint: ## linters only
	@tools/setup
	@bash -c '. tools/environment.sh && use_project_programs && python tools/lint.py'

fmt: ## format Python and Rust
	@tools/fmt

deep: ## long simulations and crash runs into docs/reference/ledger.md; MINUTES=60
	@tools/deep --minutes $(or $(MINUTES),60)

bench: ## measure every row of docs/reference/performance.md that has a script; ~13 minutes
	@tools/setup
	@bash -c '. tools/environment.sh && use_project_programs && exec python -m bench.all'

clean: ## delete everything that was built, the venv included
	rm -rf target .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f python/pureflash/_core*.so
