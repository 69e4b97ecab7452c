# make quickstart : install, then the main job, into runs/quickstart/
# make test       : install, then every test, format and type check
# make parity     : torch and PEFT too, then every model family against them, over freshly drawn models
# make bucket     : gcsfs and a store on this machine too, then the line with its work in gs://
# make plan       : libtpu too, then what compiles for TPUs that are not here
# make mutants    : small wrong changes over the wiring, each of which must turn a test red (half an hour)
# make fuzz       : torch and PEFT too, then every entry and line of what is read, damaged (a quarter of an hour)
# make install    : the environment alone (.venv); PYTHON= picks another interpreter
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More than cores: the tests of several processes mostly wait.
JOBS ?= 3

.PHONY: install quickstart test parity bucket plan mutants fuzz lock
install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml requirements.lock
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint requirements.lock --editable ".[test,stories]"
	touch $@

quickstart: install
	$(BIN)/alignjax run experiments/quickstart.py --workdir runs/quickstart

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# The referees. pip, and not uv, because it takes a torch that the machine offers for its CPU. An older transformers
# lies in a folder of its own, for one process that has it first on its path.
TORCH ?= torch==2.13.0
SPIEL := open_spiel==2.0.2 cvxpy==1.9.3
OLDER := transformers==4.57.6 huggingface-hub==0.36.0 tokenizers==0.22.1
$(VENV)/parity: $(VENV)/installed
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock "peft>=0.21" $(SPIEL)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/older --upgrade $(OLDER)
	touch $@

parity: $(VENV)/parity
	$(BIN)/python -m pytest tests/parity -o addopts=-q

$(VENV)/bucket: $(VENV)/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock gcp-storage-emulator==2026.7.19 --editable ".[gs]"
	touch $@

bucket: $(VENV)/bucket
	$(BIN)/python -m pytest tests/bucket -o addopts=-q

$(VENV)/plan: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[plan]"
	touch $@

plan: $(VENV)/plan
	$(BIN)/python -m pytest tests/test_topology.py tests/test_plan.py -k tpu

mutants: install
	$(BIN)/python -m tests.mutants

fuzz: $(VENV)/parity
	$(BIN)/python -m tests.fuzz

# One lock for every Python and platform: universal markers, newest versions that each allows.
lock: install
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra test --extra stories --extra notebooks --extra gs \
		--no-emit-index-url --no-header --upgrade --quiet --output-file requirements.lock setup.cfg
