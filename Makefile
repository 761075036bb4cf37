# One-GPU Lab. `make lab` opens the course (and sets it up the first time), `make test` runs all of it on a CPU.
# Options: PYTHON=/path/to/python3.12 (which Python to build on), ARGS="--no-browser --port 8899" (passed to JupyterLab).
SHELL := /bin/sh
VENV  ?= .venv
PY    := $(VENV)/bin/python
# The stamp names the folder, so that a copied or moved checkout is set up anew instead of using the old one's scripts.
STAMP := $(VENV)/.installed-$(shell pwd | cksum | cut -d ' ' -f 1)
FITS  := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c '$(FITS)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: help install lab test test-labkit test-kernels test-notebooks test-site test-browser lint bench site clean
help:
	@echo "make lab      set up (first time) and open the course in JupyterLab"
	@echo "make test     everything on a CPU: lint, the tests of labkit, every notebook"
	@echo "make install  set up only        make lint   ruff, the notebook lint, the prose"
	@echo "make bench    kernel benchmarks  make site   the course as web pages in _site/"
	@echo "make clean    remove caches, built pages and .venv; your predictions and results stay"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt labkit/install.py
	@$(if $(PYTHON),$(PYTHON),false) -c '$(FITS)' 2>/dev/null || { echo "One-GPU Lab needs Python 3.11, 3.12 or 3.13:" \
	  "install one of them, or name the one to use: make lab PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m labkit.install $(VENV)
	@$(VENV)/bin/labkit doctor
	@touch $@

lab: install
	@echo "JupyterLab opens the course in your browser, and runs until you press Ctrl-C here twice."
	@JUPYTERLAB_WORKSPACES_DIR='$(CURDIR)/.labkit/workspaces' $(PY) -m jupyterlab --log-level=WARN \
	  --LabApp.news_url= --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/WELCOME.md \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

test: lint test-labkit test-kernels test-notebooks

# Two files at a time, a file never split: its tests share what they train.
test-labkit: install
	OMP_NUM_THREADS=1 $(PY) -m pytest --timeout 300 -n 2 --dist loadfile tests/

# Two processes at a time, since one that interprets kernels cannot compile them; the compiler's report comes second.
# With a GPU there is a third gate: pytest -m gpu tests/kernels
test-kernels: install
	@report=$$(mktemp); export OMP_NUM_THREADS=1; \
	$(PY) -m pytest --timeout 300 -m compile tests/kernels >$$report 2>&1 & compile=$$!; \
	$(PY) -m pytest --timeout 300 -m "interp or mutations" tests/kernels tests/test_course_check.py; interpreted=$$?; \
	wait $$compile; compiled=$$?; cat $$report; rm -f $$report; [ $$interpreted = 0 ] && [ $$compiled = 0 ]

# LABKIT_WIDGETS=ends takes each widget to its ends: it must draw there, something else, and within 0.4 s.
# Two notebooks at a time, a third faster than one: most of a notebook keeps one core busy.
# One thread: with two, and anything else running, OpenMP threads wait for each other and training slows 3 to 60 times.
test-notebooks: install
	LABKIT_SCALE=quick LABKIT_WIDGETS=ends OMP_NUM_THREADS=1 $(PY) -m pytest --timeout 600 -p no:python \
	  -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout 240 --ignore=notebooks/handout notebooks/

lint: install
	$(PY) -m ruff check .
	$(PY) -m labkit.course.notebook_lint notebooks/
	$(PY) -m labkit.course.prose notebooks/ README.md

bench: install
	$(VENV)/bin/labkit bench

site: install
	$(PY) -m labkit.course.site _site/

# Builds the site into a temporary folder and drives Chromium over every page of it: some minutes, so no part of `test`.
test-site: install
	OMP_NUM_THREADS=1 $(PY) -m pytest --timeout 300 -m site tests/test_site_pages.py

# Every widget of every lab in Chromium, each corner in the kernel, and a table of what a move takes: a quarter of an hour.
test-browser: install
	@times=$$(mktemp -d); export OMP_NUM_THREADS=1; \
	WIDGET_TIMES=$$times $(PY) -m pytest --timeout 1500 -n 2 --dist load -m browser tests/test_browser.py; passed=$$?; \
	$(PY) tests/browser_widgets.py $$times; rm -rf $$times; exit $$passed

clean:
	rm -rf $(VENV) _site build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find labkit tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
