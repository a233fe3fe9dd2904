# make demo: trains the tiny model and exports it.  make test: runs the tests.  make test-all: runs the long ones, too.
# make test-newest: runs some of them under Python 3.13, with the newest JAX.
# make lint: runs the linter.  make docs: builds the documentation.  make faults, make fuzz: many kills, damaged files.
# Each target makes the environment that it needs.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= workdir
MODEL ?= demo_vlab
VIDEOS ?= demo_videos
PYTEST_ARGS ?= -n 2 --dist loadfile --max-worker-restart=0

.PHONY: demo test test-all test-newest lint docs faults fuzz clean

demo: $(VENV)/requirements.done
	$(VENV)/bin/python -m vlab_jax.main --config=configs/pretrain.py --workdir=$(WORKDIR)
	$(VENV)/bin/python -m vlab_jax.export --checkpoint=$(WORKDIR) --out=$(MODEL) --replace
	test -d $(VIDEOS) || $(VENV)/bin/python -m vlab_jax.datasets.unpack --dataset=motion --clips=24 --out=$(VIDEOS)
	@echo "Try the model on these new clips, or on your own videos:"
	@echo "  $(VENV)/bin/python -m vlab_jax.predict caption $(VIDEOS) --model=$(MODEL)"

test: $(VENV)/requirements-dev.done
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)
	VLAB_TEST_DEVICES=8 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# One process: some of them need much memory.
test-all: test
	$(VENV)/bin/python -m pytest -m long

# JAX 0.11 and later need Python 3.12. The parity tests need VLAB_REFERENCE_OUTPUTS (tests/reference_models.py) there.
PYTHON_3_13 ?= $(shell for python in python3.13 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.13*/bin/python; do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)
# Of training, those that depend on JAX and Flax; not those of kills, outages, several processes and official data.
NEWEST_TESTS ?= tests/models tests/runtime tests/test_config.py tests/pretrained/test_parity.py \
	tests/test_saved_by_older_commits.py \
	$(patsubst %,tests/training/test_%.py,frozen gradient_cache health loop objectives optim resume setup)
test-newest:
ifeq ($(PYTHON_3_13),)
	@echo "There is no Python 3.13 here; nothing is tested with the newest JAX."
else
	$(MAKE) PYTHON=$(PYTHON_3_13) VENV=.venv-3.13 .venv-3.13/requirements-dev.done
	.venv-3.13/bin/python -m pytest $(PYTEST_ARGS) $(NEWEST_TESTS)
endif

# Kills a run at random moments, this many times.
KILLS ?= 100
faults: $(VENV)/requirements-dev.done
	$(VENV)/bin/python tests/faults/kill_run.py --kills=$(KILLS)

# Reads 2,000 damaged media files, 10,000 damaged lines and 2,000 damaged files of annotations; SEED=1 makes others.
FUZZ ?= 2000
SEED ?= 0
fuzz: $(VENV)/requirements-dev.done
	PYTHONPATH=.:tests $(VENV)/bin/python tests/faults/fuzz_media.py --count=$(FUZZ) --seed=$(SEED)
	PYTHONPATH=. $(VENV)/bin/python tests/faults/fuzz_annotations.py --seed=$(SEED)

lint: $(VENV)/requirements-dev.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(VENV)/requirements-docs.done
	rm -rf docs/_reference
	$(VENV)/bin/python -m sphinx --fail-on-warning --quiet --builder html --conf-dir docs . docs/_build
	@echo "open docs/_build/docs/index.html"

clean:
	rm -rf $(VENV) $(WORKDIR) $(MODEL) $(VIDEOS) docs/_build docs/_reference

$(VENV)/requirements.done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/requirements-dev.done: requirements-dev.txt $(VENV)/requirements.done
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/requirements-docs.done: requirements-docs.txt $(VENV)/requirements.done
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-docs.txt
	touch $@
