# make demo: trains the tiny model end to end.  make test: runs the test suite.  make docs: builds the documentation.
# make fuzz: damaged files.  Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= workdir
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: demo test lint docs fuzz clean

demo: $(VENV)/requirements.done
	$(VENV)/bin/python -m vlab_jax.main --config=configs/pretrain.py --workdir=$(WORKDIR)

test: $(VENV)/requirements-dev.done
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# 2,000 damaged media files, 10,000 damaged lines and 2,000 damaged files of annotations; SEED=1 makes others.
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
	rm -rf $(VENV) $(WORKDIR) docs/_build docs/_reference

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
