# The newcomer's commands. `make demo` and `make test` work on a bare machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test check bench serve clean

help:
	@echo "make demo     the whole road on MovieLens-100k (about 4 minutes the first time)"
	@echo "make test     the test suite"
	@echo "make check    lint, types, import layers"
	@echo "make bench    list the benchmarks; make bench NAME=quality/run runs one"
	@echo "make serve    serve what is published in the default registry"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt install.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh install.sh
	@touch $(STAMP)

# DATA=path/to/ml-100k uses files you already have.
demo: $(STAMP)
	$(BIN)/raysys demo $(if $(DATA),--data $(DATA))

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check raysys jobs tests benchmarks
	$(BIN)/ruff format --check raysys jobs tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/raysys bench $(NAME) $(ARGS)

serve: $(STAMP)
	$(BIN)/raysys serve

clean:
	rm -rf $(VENV) runs build *.egg-info
