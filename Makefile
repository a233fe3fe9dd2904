# make demo: trains the tiny model end to end, and exports it.  make test: runs the test suite.  Both make their own
# environment.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= workdir
MODEL ?= demo_vlab
VIDEOS ?= demo_videos
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: demo test lint clean

demo: $(VENV)/requirements.done
	$(VENV)/bin/python -m vlab_jax.main --config=configs/pretrain.py --workdir=$(WORKDIR)
	$(VENV)/bin/python -m vlab_jax.export --checkpoint=$(WORKDIR) --out=$(MODEL) --replace
	test -d $(VIDEOS) || $(VENV)/bin/python -m vlab_jax.data.unpack --dataset=motion --clips=24 --out=$(VIDEOS)
	@echo "Try what it has learned on clips that it has not seen, or on videos of your own:"
	@echo "  $(VENV)/bin/python -m vlab_jax.predict caption $(VIDEOS) --model=$(MODEL)"

test: $(VENV)/requirements-dev.done
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/requirements-dev.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(WORKDIR) $(MODEL) $(VIDEOS)

$(VENV)/requirements.done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/requirements-dev.done: requirements-dev.txt $(VENV)/requirements.done
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@
