# On a fresh machine with Python >= 3.11, git and make, each of these sets up what it needs, then
#   make book         builds the book:                        _build/html/index.html
#   make test         proves it: ruff, the unit tests, every page run again and its outputs compared
#   make browser      reads the built book in Chromium
#   make notebooks    executes the pages whose source changed (ALL=1: all of them; PAGE=q6: these)
#   make evidence     measures every mechanism against its judge:   book/reference/_data/verified.json
#   make bench        times the mechanisms beside the libraries:    book/reference/_data/benchmarks.json
#   make translator   trains the model of QA-1, Q-8 from scratch (hours on 2 cores)
#   make assets       installs the data that tests and pages read
#   make lock         writes requirements.lock from requirements.in
#   make published    fills BOOK_REPOSITORY into the notebooks, for readers on Colab (deployment only)
#   make clean        removes what was built; make distclean the environment too
#
# BOOK_REPOSITORY and BOOK_URL, the addresses of the repository and of the site, are read by `make book`;
# deployment sets them. Without them the book has no launch buttons and cites pages by their path.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
READY := $(VENV)/.ready
ASSETS := $(VENV)/.assets
JOBS ?= 2

# PyTorch: the CPU build, from the folders of PIP_FIND_LINKS where that is set, else from PyTorch's own index.
TORCH_BACKEND ?= cpu
ifdef PIP_FIND_LINKS
UV_TORCH := $(foreach place,$(PIP_FIND_LINKS),--find-links $(place))
else
UV_TORCH := --torch-backend $(TORCH_BACKEND)
endif

# What runs here has no second use for threads: small models are fastest on one.
export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := book
.PHONY: book test unit browser notebooks check evidence bench translator assets lock published clean distclean

book: $(READY)
	$(BIN)/jupyter-book build . -W -n --keep-going

test: $(READY) $(ASSETS)
	$(BIN)/ruff check .
	$(PYTEST) --nbval --durations 10 tests book

unit: $(READY) $(ASSETS)
	$(PYTEST) tests

browser: $(READY)
	@test -f _build/html/index.html || { echo "The book is not built yet: run \`make book\`."; exit 1; }
	$(BIN)/python -m pytest -m browser tests/test_browser.py

notebooks: $(READY) $(ASSETS)
	$(BIN)/python tools/notebooks.py $(if $(ALL),--all) $(PAGE)

check: $(READY)
	$(BIN)/python tools/notebooks.py --check

evidence: $(READY) $(ASSETS)
	$(PYTEST) tests --evidence book/reference/_data/verified.json

bench: $(READY) $(ASSETS)
	$(BIN)/python -m benchmarks

translator: $(READY) $(ASSETS)
	$(BIN)/python -m companion.translator

assets: $(ASSETS)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The book needs Python 3.11 or newer, \
	this is %d.%d: run make with PYTHON=... naming one." % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	echo "$(PYTHON) cannot make a virtual environment: install its venv package (python3-venv)."; exit 1; }
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(UV) pip install --compile-bytecode --python $(BIN)/python $(UV_TORCH) -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

$(ASSETS): assets.txt $(READY)
	$(UV) pip install --python $(BIN)/python --no-deps -r assets.txt
	@touch $@

# Resolved for the oldest Python, so that one list serves 3.11 to 3.13; `+cpu` and index lines stay out.
lock: $(READY)
	$(UV) pip compile --quiet --upgrade --python-version 3.11 $(UV_TORCH) --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links requirements.in | sed -n 's/+cpu$$//; /==/p' > requirements.lock.part
	mv requirements.lock.part requirements.lock

published: $(READY)
	$(BIN)/python tools/notebooks.py --fill-address "$(BOOK_REPOSITORY)"

clean:
	rm -rf _build build conf.py .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print \
	| xargs rm -rf

distclean: clean
	rm -rf $(VENV)
