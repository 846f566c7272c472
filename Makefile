# GNU make. Nothing but a C compiler and make is needed; `make help` lists what can be made.
# Options: CC=clang   SAN=address,undefined or thread (clang: memory)   FAST=1 (-Ofast). Each set has its own folder.

.DEFAULT_GOAL := all

# Builds and tests use every processor; -j on the command line wins.
JOBS := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
MAKEFLAGS += -j$(JOBS)

WARN    = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wcast-align \
          -Wstrict-prototypes -Wundef
OPTIMISE = $(if $(FAST),-Ofast,-O2)
SANITISE = $(if $(SAN),-g -fno-omit-frame-pointer -fsanitize=$(SAN) -fno-sanitize-recover=all)
PYTHON  = python3
COMPILE = $(CC) -std=c99 $(WARN) $(OPTIMISE) $(SANITISE) $(CFLAGS)
DEFINES =# what a target adds; CFLAGS belong to the user
LIBS    = -lm -pthread

empty   =
space   = $(empty) $(empty)
comma   = ,
named   = $(if $(filter command,$(firstword $(origin CC))),$(notdir $(CC))) $(SAN) $(if $(FAST),fast)
folder  = $(subst $(comma),-,$(subst $(space),-,$(strip $(named))))
BUILD  := build$(if $(folder),/$(folder))

HEADERS  := $(wildcard *.h *.cuh examples/*.h examples/*.cuh tests/*.h tests/*/*.h)
EXAMPLES := $(patsubst %.c,$(BUILD)/%,$(wildcard examples/*.c))
TESTS    := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/unit/*.c tests/parity/*.c tests/train/*.c))
LONG     := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/long/*.c))
SCRIPTS  := $(shell for f in $(filter-out tests/long/%,$(wildcard tests/*/*.sh)); do test -x $$f && echo $$f; done)
RUN_TESTS = CC='$(CC)' BUILD=$(BUILD) JOBS=$(JOBS) sh tests/run.sh

# has COMPILER,LANGUAGE,HEADER: `yes` if the compiler finds the header. The `\#` has a variable of its own because some
# versions of make remove the backslash before it and others keep it, and the preprocessor reads `\#include` as text.
hash   := \#
has     = $(shell echo '$(hash)include <$(3)>' | $(1) -E -x $(2) - >/dev/null 2>&1 && echo yes)

# zlib is optional: with it the trainer reads .gz files as they are.
ZLIB   := $(call has,$(CC),c,zlib.h)
PACKED := $(BUILD)/examples/train $(BUILD)/examples/train_mpi $(BUILD)/tests/train/readers
$(PACKED): private DEFINES = $(if $(ZLIB),-DMPT_TRAINER_ZLIB)
$(PACKED): private LIBS += $(if $(ZLIB),-lz)
$(BUILD)/tests/train/readers: examples/train.c

# MPI is optional: if mpicc is installed and CC links with the flags that it adds (`mpicc -show` prints a compiler and
# these flags), a trainer for several ranks is built.
MPI    := $(shell flags=$$(mpicc -show 2>/dev/null | cut -d' ' -f2-) && \
	echo 'int main(void) { return 0; }' | $(CC) -x c - $$flags -o /dev/null 2>/dev/null && echo "$$flags")
RANKS  := $(if $(MPI),$(BUILD)/examples/train_mpi)

# Tests share one compiled mpt.h. Those that use its private names say so and compile it themselves.
SHARED := $(filter-out $(patsubst %.c,$(BUILD)/%,$(shell grep -l mpt__ tests/*/*.c)),$(TESTS))
$(SHARED): private DEFINES += -DMPT__IMPLEMENTED
$(SHARED): private LIBS := $(BUILD)/tests/mpt.o $(LIBS)
$(SHARED): $(BUILD)/tests/mpt.o

# The libraries that peers.cpp measures beside mpt, if they are installed.
PEERS := $(strip $(if $(call has,$(CXX),c++,openblas_config.h),OPENBLAS) $(if $(call has,$(CXX),c++,dnnl.hpp),ONEDNN))

.PHONY: all run course test test-long test-cuda portable fuzz coverage mutants bench bench-peers bench-cuda clean \
	help detect FORCE

all: detect $(EXAMPLES) $(RANKS)

run: detect $(BUILD)/examples/train
	$(BUILD)/examples/train --csv $(BUILD)/digits.csv

course: detect $(EXAMPLES)
	@BUILD=$(BUILD) JOBS=$(JOBS) sh examples/course.sh

test: detect $(filter %/train %/csv,$(EXAMPLES)) $(TESTS)
	@$(RUN_TESTS) $(SCRIPTS) $(TESTS)

test-long: detect $(LONG)
	@$(RUN_TESTS) $(LONG)

test-cuda: detect
	@BUILD=$(BUILD) JOBS=$(JOBS) sh tests/cuda/run.sh
	@BUILD=$(BUILD) JOBS=$(JOBS) sh tests/cuda/ways.sh
	@BUILD=$(BUILD) sh tests/cuda/nccl.sh
	@BUILD=$(BUILD) sh tests/cuda/library.sh
	@BUILD=$(BUILD) sh tests/cuda/static.sh

portable:
	@BUILD=$(BUILD) sh tests/compile/portable.sh

fuzz:
	@BUILD=$(BUILD) sh tests/fuzz/fuzz.sh $(or $(SECONDS),60)

coverage:
	@BUILD=$(BUILD) sh tests/coverage/coverage.sh

mutants:
	@python3 tests/mutants/mutants.py $(or $(N),30) $(BUILD)/mutants

bench: detect $(BUILD)/tests/bench/bench
	@$(BUILD)/tests/bench/bench
	@sh tests/bench/compile.sh '$(CC)'

bench-peers: detect $(BUILD)/tests/bench/bench $(if $(PEERS),$(BUILD)/tests/bench/peers)
	@$(if $(PEERS),for t in 1 2; do OMP_NUM_THREADS=$$t OPENBLAS_NUM_THREADS=$$t $(BUILD)/tests/bench/peers $$t; done)
	@$(PYTHON) tests/bench/peers.py $(BUILD)/tests/bench/bench

$(BUILD)/examples/train_mpi: examples/train.c $(HEADERS) $(BUILD)/flags
	@mkdir -p $(@D)
	$(COMPILE) $(DEFINES) -DMPT_TRAINER_MPI -I. $< -o $@ $(MPI) $(LIBS)

$(BUILD)/examples/train_nccl: examples/train.c $(HEADERS)
	@mkdir -p $(@D)
	nvcc -ccbin mpicxx -x cu -O2 -std=c++17 -arch=native -DMPT_TRAINER_CUDA -DMPT_TRAINER_MPI -DMPT_TRAINER_NCCL -I. \
		$< -o $@ -lcublas -lcublasLt -lnccl

$(BUILD)/tests/bench/peers: tests/bench/peers.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) -std=c++11 -Wall -Wextra -Wpedantic $(OPTIMISE) -I. $(patsubst %,-DBENCH_%,$(PEERS)) $< -o $@ $(LIBS) \
		$(if $(filter OPENBLAS,$(PEERS)),-lopenblas) $(if $(filter ONEDNN,$(PEERS)),-ldnnl)

bench-cuda: detect
	@mkdir -p $(BUILD)/cuda
	nvcc -x cu -O2 -std=c++17 -arch=native -I. tests/bench/bench_cuda.c -o $(BUILD)/cuda/bench -lcublas -lcublasLt
	@$(BUILD)/cuda/bench --csv $(BUILD)/cuda/bench.csv

clean:
	rm -rf build

help: detect
	@echo 'make            builds the examples in build/examples'
	@echo 'make build/examples/train_mpi  the trainer for several ranks, if mpicc is installed (make builds it too)'
	@echo 'make build/examples/train_nccl  the same for several GPUs, with nvcc, mpicxx and NCCL'
	@echo 'make run        trains on the digits and writes build/digits.csv'
	@echo 'make course     runs the lessons of examples/README.md; with gnuplot it also draws build/figures'
	@echo 'make test       runs all tests; the last line is their sum'
	@echo 'make test-long  runs the tests that take minutes'
	@echo 'make test-cuda  builds the tests with nvcc and runs them on a GPU, or on the CPU runner in CUDACPU=folder'
	@echo 'make portable   builds and tests for every target that is installed; CELLS="s390x gcc-O0" picks some'
	@echo 'make fuzz       runs each fuzzer for a minute, or for SECONDS=10; needs clang'
	@echo 'make coverage   prints which lines of mpt.h the tests run, from gcov'
	@echo 'make mutants    changes 30 operators in a copy of mpt.h, or N=300, and tells which changes no test notices'
	@echo 'make bench      prints one row per measured speed, beside the peak of this machine'
	@echo 'make bench-peers  the same beside those of OpenBLAS, oneDNN and PyTorch that are installed; PYTHON=... picks the Python'
	@echo 'make bench-cuda  as bench, for mpt_cuda.cuh on a GPU; also writes build/cuda/bench.csv'
	@echo 'make clean      removes build/'
	@echo 'Options, each set built in its own folder under build/: CC=clang SAN=address,undefined FAST=1'

detect:
	@echo "compiler    $(CC): $$($(CC) --version 2>/dev/null | head -n 1)"
	@echo "processors  $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo unknown)"
	@echo "nvcc        $$(nvcc --version 2>/dev/null | grep release || echo 'none; only needed for mpt_cuda.cuh')"

$(BUILD)/tests/mpt.o: mpt.h $(BUILD)/flags
	@mkdir -p $(@D)
	$(COMPILE) -DMPT_IMPLEMENTATION -x c -c $< -o $@

$(BUILD)/%: %.c $(HEADERS) $(BUILD)/flags
	@mkdir -p $(@D)
	$(COMPILE) $(DEFINES) -I. $< -o $@ $(LIBS)

# Written only when the command has changed; then everything is rebuilt.
$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(COMPILE)' | cmp -s - $@ || echo '$(COMPILE)' >$@
