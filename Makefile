# Two commands do all the set-up: `make demo` and `make test`.
# SAEREG_PYTHON=python3.12 make … picks the interpreter.

SAEREG_PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(VENV)/bin/accelerate launch --config_file recipes/accelerate/single.yaml \
		--num_cpu_threads_per_process "$$(nproc)" \
		recipes/train_character.py --config recipes/character_demo.yaml \
		--resume_from_checkpoint true

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(SAEREG_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[demo,report,triton,interop,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) runs
