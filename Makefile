# Two commands do all the set-up: `make demo` and `make test`.
# SAEREG_PYTHON=python3.12 make … picks the interpreter; one that is named, and is another than that
# of .venv, makes a new .venv.

VENV := .venv
INSTALLED := $(VENV)/.installed
ORIGIN := -c 'import sys; print(sys.base_prefix, *sys.version_info[:2])'

ifdef SAEREG_PYTHON
ifneq ($(shell $(SAEREG_PYTHON) $(ORIGIN)),$(shell $(VENV)/bin/python $(ORIGIN) 2>&1))
.PHONY: $(VENV)/bin/python
endif
endif

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

$(VENV)/bin/python:
	$(or $(SAEREG_PYTHON),python3) -m venv --clear $(VENV)

$(INSTALLED): $(VENV)/bin/python setup.cfg pyproject.toml constraints.txt
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[demo,report,triton,interop,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) runs
