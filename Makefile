# make demo                      stream text from the shipped model, on NumPy alone
# make demo BACKENDS=torch,mlx   the same text on these backends too, and check that they agree
# make test                      every check: ruff, pyright, and the tests on all backends
# make lint                      ruff and pyright alone
# make bench                     the CPU benchmark beside other packages; 50 minutes on an idle machine, and before the
#                                first run a build of llama.cpp, which needs a C++ compiler and minutes
#
# PYTHON=...  the interpreter to make .venv from (3.10 to 3.13; found by itself when not given)
# JOBS=...    test processes (2)      ARGS=...  more arguments for pytest, such as ARGS='-k state', or for the
#                                               benchmark, such as ARGS='--only scan --quick'
#
# Needs GNU Make 3.81 or later and a POSIX shell. On Windows, use the pip commands of the README.

VENV = .venv
PYTHON =
BACKENDS =
JOBS = 2
ARGS =

comma := ,
space := $(subst x,,x x)
backends := $(filter-out numpy,$(subst $(comma),$(space),$(BACKENDS)))
extras := $(subst $(space),$(comma),$(strip $(backends)))

# What an installation depends on: where it is, and what it was asked to install.
state := $(shell (pwd; cat pyproject.toml constraints.txt) | cksum | cut -d ' ' -f 1)
demo_installed := $(VENV)/installed-$(state)-demo-$(extras)
dev_installed := $(VENV)/installed-$(state)-dev
bench_installed := $(VENV)/installed-$(state)-bench

.PHONY: help demo test lint bench

help:
	@sed -n -e '/^#/!q' -e 's/^# \{0,1\}//p' Makefile

demo: $(demo_installed)
	@$(VENV)/bin/python examples/demo.py numpy $(backends)

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(JOBS) $(ARGS)

lint: $(dev_installed)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(bench_installed)
	$(VENV)/bin/python -m benchmarks.cpu $(ARGS)

# An environment made by other means, such as uv, may lack pip. The core takes seconds; what takes longer shows
# its progress.
define install
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(VENV)/bin/python -m ensurepip
	$(VENV)/bin/python -m pip install $(if $(1),,--quiet) --disable-pip-version-check -c constraints.txt -e '.$(1)'
	@touch $@
endef

$(demo_installed): $(VENV)/pyvenv.cfg
	$(call install,$(if $(extras),[$(extras)]))

$(dev_installed): $(VENV)/pyvenv.cfg
	$(call install,[dev])

$(bench_installed): $(VENV)/pyvenv.cfg
	$(call install,[bench])

$(VENV)/pyvenv.cfg:
	@python='$(PYTHON)'; \
	for candidate in python3 python3.13 python3.12 python3.11 python3.10; do \
		[ -z "$$python" ] || break; \
		if $$candidate -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then \
			python=$$candidate; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'mambax needs Python 3.10 to 3.13, and none was found on the PATH.' >&2; \
		echo 'Install one, or say where it is: make demo PYTHON=/path/to/python3.12' >&2; \
		exit 1; \
	fi; \
	echo "$$python -m venv $(VENV)"; \
	"$$python" -m venv $(VENV) || { rm -f $(VENV)/pyvenv.cfg; exit 1; }
