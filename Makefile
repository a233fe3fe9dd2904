# make demo: trains the tiny model end to end, and exports it.  make test: runs the test suite.  make docs: builds the
# documentation.  make faults, make fuzz: the long tests of faults and of damaged files.  Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= workdir
MODEL ?= demo_vlab
VIDEOS ?= demo_videos
PYTEST_ARGS ?= -n 2 --dist loadfile --max-worker-restart=0

.PHONY: demo test lint docs faults fuzz clean

demo: $(VENV)/requirements.done
	$(VENV)/bin/python -m vlab_jax.main --config=configs/pretrain.py --workdir=$(WORKDIR)
	$(VENV)/bin/python -m vlab_jax.export --checkpoint=$(WORKDIR) --out=$(MODEL) --replace
	test -d $(VIDEOS) || $(VENV)/bin/python -m vlab_jax.datasets.unpack --dataset=motion --clips=24 --out=$(VIDEOS)
	@echo "Try what it has learned on clips that it has not seen, or on videos of your own:"
	@echo "  $(VENV)/bin/python -m vlab_jax.predict caption $(VIDEOS) --model=$(MODEL)"

test: $(VENV)/requirements-dev.done
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# Runs that are killed at random moments until they have been killed so often.
KILLS ?= 100
faults: $(VENV)/requirements-dev.done
	$(VENV)/bin/python tests/faults/kill_run.py --kills=$(KILLS)

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
