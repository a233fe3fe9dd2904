# make demo: trains the tiny model end to end.  make test: runs the test suite.  Both make their own environment.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= workdir
PYTEST_ARGS ?= -n 2 --dist loadfile

KILLS ?= 100

.PHONY: demo test faults lint clean

demo: $(VENV)/requirements.done
	$(VENV)/bin/python -m vlab_jax.main --config=configs/pretrain.py --workdir=$(WORKDIR)

test: $(VENV)/requirements-dev.done
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# Kills a short run so many times, at random moments, and compares how it ends.
faults: $(VENV)/requirements-dev.done
	$(VENV)/bin/python tests/faults/kill_run.py --kills=$(KILLS)

lint: $(VENV)/requirements-dev.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(WORKDIR)

$(VENV)/requirements.done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/requirements-dev.done: requirements-dev.txt $(VENV)/requirements.done
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@
