# The two commands: `make train` and `make test`. Both make .venv and install what they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?= --quiet --disable-pip-version-check
BIN := .venv/bin
# A file at a time, since the tests of a file share what they have made.
PYTEST_FLAGS ?= -n 2 --dist loadfile
DATA := data
ROWS := 1000000

.PHONY: train test test-slow lint clean

train: .venv/installed $(DATA)/train.csv
	$(BIN)/python -m dlrm_jax.main --config=configs/quickstart.py --config.data_location=$(DATA)

test: .venv/installed lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# Everything, also what takes minutes: real kills, large files.
test-slow: .venv/installed
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m 'slow or not slow'

lint: .venv/installed
	$(BIN)/ruff check

# Never writes over data that is there.
$(DATA)/train.csv: | .venv/installed
	$(BIN)/python -m dlrm_jax.data.synthetic --rows $(ROWS) --out $(DATA)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) -r requirements.txt
	touch $@

clean:
	rm -rf .venv
