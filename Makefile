# lorasync.h is used by copying it; this file is for its tests, examples and benchmark. Everything built lies in build/.
# A tool that is missing (clang, C++, Python, valgrind, MPI, nvcc) skips what needs it, and says so.

CC           ?= cc
CXX          ?= g++
GCC          ?= gcc
GXX          ?= g++
CLANG        ?= clang
CLANGXX      ?= clang++
CUDA_HOME    ?= /usr/local/cuda
NVCC         ?= $(CUDA_HOME)/bin/nvcc
MPICC        ?= mpicc
MPIRUN       ?= mpirun
PYTHON       ?= python3
VALGRIND     ?= valgrind
CPPCHECK     ?= cppcheck
CLANG_FORMAT ?= clang-format

BUILD  ?= build
STD    ?= -std=gnu99
OPT    ?= -O2
# Tests spend more time in the compiler than running: -O2 is for .ci/run.
TEST_OPT ?= -O0
WARN   ?= -Wall -Wextra
JOBS   ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
LDLIBS ?= -lm -lpthread -lrt

SANITIZER ?= compute-sanitizer
GPU_CASES ?= 2

# make demo DEMO_ARGS="...", make bench BENCH_ARGS="..."
DEMO_ARGS  ?=
BENCH_ARGS ?=

# JOBS programs are compiled and run at a time; a caller's own -j is taken instead.
PARALLEL = $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(JOBS))

TESTS          ?= $(patsubst tests/%.c,%,$(sort $(wildcard tests/test_*.c)))
SLOW_TESTS     ?= $(patsubst tests/%.c,%,$(sort $(wildcard tests/slow_*.c)))
THREAD_TESTS   ?= test_doors test_comm test_session test_directory test_nccl test_publish test_shm test_base
VALGRIND_TESTS ?= test_doors test_names test_config test_declare test_image test_delta test_layout test_plan \
    test_directory test_session test_policy test_publish test_shm test_base
INTEROP        ?= $(sort $(wildcard tests/interop_*.py))

MPI_EXAMPLES := $(patsubst %.c,$(BUILD)/%,$(wildcard examples/mpi*.c))
EXAMPLES     := $(filter-out $(MPI_EXAMPLES),$(patsubst %.c,$(BUILD)/%,$(wildcard examples/*.c)))

# One folder per flavour of the tests: test, asan-gcc, tsan-gcc, ...
B       = $(BUILD)/test
COMPILE = $(CC) $(STD) $(OPT) $(WARN) -I. $(CPPFLAGS) $(CFLAGS) $(LDFLAGS)
CHECKED = $(COMPILE) -include tests/asserts.h # the library's invariants are looked at in tests
DEPENDS = -MMD -MP -MF $@.d -MT $@ # the headers that a file includes
MAKEFLAGS += --no-print-directory

export BUILD GCC GXX CLANG CLANGXX NVCC CUDA_HOME MPICC MPIRUN PYTHON CPPCHECK LDLIBS

.DELETE_ON_ERROR:
.PHONY: gpu-build test-gpu sanitize-gpu ptx help test check test-slow test-asan test-tsan test-valgrind matrix model \
    interop examples mpi-examples demo bench bench-wake bench-gpu format check-format clean \
        programs run FORCE

help: ## lists the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F '|' '{ printf "%-24s%s\n", $$1, $$2 }'

# ---- tests: a program that does not compile is missing, and tests/run.sh counts that

test: ## builds and runs all tests, the examples and the short compile matrix (two minutes on two cores)
	@MATRIX=quick STD='$(STD)' $(MAKE) run OPT='$(TEST_OPT)' ALSO='$(EXAMPLES)' \
	    EXTRA='tests/examples.sh tests/matrix.sh tests/contents.sh tests/sections.sh'

check: ## only the test programs, for the impatient (a minute on two cores)
	@$(MAKE) run OPT='$(TEST_OPT)'

test-slow: ## the tests that take minutes (tests/slow_*.c)
	@TIMEOUT=1800 $(MAKE) run B=$(BUILD)/slow TESTS='$(SLOW_TESTS)'

run: ## some tests: make run TESTS="test_plan test_shm"
	@$(MAKE) $(PARALLEL) -k programs $(ALSO) || true
	@LOGS=$(B)/logs JOBS='$(JOBS)' CC='$(CC)' CXX='$(CXX)' sh tests/run.sh $(EXTRA) $(addprefix $(B)/,$(TESTS))

programs: $(addprefix $(B)/,$(TESTS))
	@:

$(B)/%: tests/%.c $(B)/flags
	@rm -f $@
	$(CHECKED) $(DEPENDS) -o $@ $< $(filter %.o,$^) $(LDLIBS)

-include $(wildcard $(B)/*.d)

# Programs that define no LORASYNC_IMPLEMENTATION share one. The others look at what is private, or stand in for system
# calls, and have their own: with LORASYNC_STATIC only as much of it as they use is compiled.
$(B)/lorasync.o: lorasync.h $(B)/flags
	$(CHECKED) $(DEPENDS) -DLORASYNC_IMPLEMENTATION -x c -c -o $@ $<

LINKED := $(shell grep -L LORASYNC_IMPLEMENTATION $$(grep -l '^.include "lorasync.h"' tests/test_*.c tests/slow_*.c))
$(patsubst tests/%.c,$(B)/%,$(LINKED)): $(B)/lorasync.o

# Tests of the GPU and NCCL code, on fakes: they need headers, no library and no GPU, and skip where the headers
# are not.
FAKED = $(addprefix $(B)/,test_nccl test_cuda_fake test_plans_cuda test_base_cuda test_shm_cuda test_in_place_cuda \
    test_lend_cuda test_replicas_cuda \
        test_example_cuda)
$(FAKED): private CPPFLAGS += -isystem $(CUDA_HOME)/include

# Changes only when the command does: other flags, new programs.
$(B)/flags: FORCE
	@mkdir -p $(@D); command='$(subst ','\'',$(CHECKED) $(LDLIBS))'; \
	[ "$$command" = "$$(cat $@ 2>/dev/null)" ] || echo "$$command" >$@

# $(call sanitized,name,flags,tests). Sanitizers want fixed addresses on kernels that randomise many bits.
define sanitized
	+@mkdir -p $(BUILD)/probe; p=$(BUILD)/probe/$(1)-$$$$; r=; \
	if setarch -R true 2>/dev/null; then r='setarch -R'; fi; \
	if printf 'int main(void) { return 0; }\n' | $(CC) $(2) -x c - -o $$p 2>/dev/null && $$r $$p 2>/dev/null; then \
	    rm -f $$p; RUN="$$r" $(MAKE) run B=$(BUILD)/$(1)-$(lastword $(notdir $(CC))) \
	        OPT='-O1 -g -fno-omit-frame-pointer $(2)' TESTS='$(3)'; \
	else \
	    rm -f $$p; echo 'skip $(1): $(CC) cannot build or run such a program here'; echo '0 passed, 0 failed, 1 skipped'; \
	fi
endef

test-asan: export ASAN_OPTIONS ?= detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1
test-asan: export UBSAN_OPTIONS ?= print_stacktrace=1
test-asan: ## all tests under the address and undefined behaviour sanitizers (CC=clang for clang's)
	$(call sanitized,asan,-fsanitize=address$(,)undefined -fno-sanitize-recover=all,$(TESTS))

test-tsan: export TSAN_OPTIONS ?= halt_on_error=1:second_deadlock_stack=1
test-tsan: ## the tests with threads under the thread sanitizer
	$(call sanitized,tsan,-fsanitize=thread,$(filter $(THREAD_TESTS),$(TESTS)))

, := ,

test-valgrind: ## some tests under valgrind (VALGRIND_TESTS="...")
	@if $(VALGRIND) -q true 2>/dev/null; then \
	    RUN='$(VALGRIND) -q --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite,indirect' TIMEOUT=600 \
	    $(MAKE) run B=$(BUILD)/valgrind OPT='-O1 -g' TESTS='$(filter $(VALGRIND_TESTS),$(TESTS))'; \
	else \
	    echo 'skip valgrind: $(VALGRIND) does not run here'; echo '0 passed, 0 failed, 1 skipped'; \
	fi

matrix: ## compiles the header with every compiler, standard and order of includes, and checks its symbols
	@LOGS=$(BUILD)/logs TIMEOUT=1200 CC='$(CC)' CXX='$(CXX)' sh tests/run.sh tests/matrix.sh

model: ## the model of the shared-memory protocol (tests/shm.pml) with spin
	@LOGS=$(BUILD)/logs TIMEOUT=300 V=1 CC='$(CC)' sh tests/run.sh tests/model.sh

interop: examples ## other programs against the same files (tests/interop_*.py)
	@if ! $(PYTHON) -c '' 2>/dev/null; then \
	    echo 'skip interop: $(PYTHON) does not run here'; echo '0 passed, 0 failed, 1 skipped'; \
	elif [ -z '$(INTEROP)' ]; then \
	    echo 'skip interop: no tests/interop_*.py'; echo '0 passed, 0 failed, 1 skipped'; \
	else \
	    LOGS=$(BUILD)/logs LORASYNC_BUILD='$(BUILD)' CC='$(CC)' sh tests/run.sh $(INTEROP); \
	fi

# ---- programs to look at

# DEMO_ARGS="..."; on all GPUs: CUDA=1, with NCCL: CUDA=1 NCCL=1
demo: $(BUILD)/examples/demo$(if $(CUDA),-cuda)$(if $(NCCL),-nccl) ## builds and runs examples/demo.c
	@$< $(DEMO_ARGS)

# With the GPU: the CUDA runtime's headers and library, no nvcc. NCCL_HOME where nccl.h is not beside them.
CUDA_FLAGS = -DDEMO_CUDA -isystem $(CUDA_HOME)/include
CUDA_LIBS  = -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcudart
NCCL_FLAGS = -DDEMO_NCCL $(if $(NCCL_HOME),-isystem $(NCCL_HOME)/include)
NCCL_LIBS  = $(if $(NCCL_HOME),-L$(NCCL_HOME)/lib -Wl$(,)-rpath$(,)$(NCCL_HOME)/lib -l:libnccl.so.2,-lnccl)
,         := ,

# Compiles and links the GPU build where the toolkit is, and compares the kernel's text with its source where nvcc is.
gpu-build: ## builds the GPU demo without running it, and checks the PTX text
	@mkdir -p $(BUILD); p=0; f=0; s=0; \
	for program in demo-cuda demo-cuda-nccl; do \
	    probe='\043include <cuda_runtime_api.h>\nint main(void) { return cudaGetDeviceCount(0); }\n'; \
	    [ $$program = demo-cuda ] || probe="\\043include <nccl.h>\n$$probe"; \
	    libs='$(CUDA_LIBS)'; [ $$program = demo-cuda ] || libs='$(NCCL_LIBS) $(CUDA_LIBS)'; \
	    if ! printf "$$probe" | $(CC) -x c $(CUDA_FLAGS) $(NCCL_FLAGS) - -o $(BUILD)/gpu-probe $$libs 2>/dev/null; then \
	        echo "skip $$program: no CUDA or NCCL to link with (CUDA_HOME, NCCL_HOME)"; s=$$((s + 1)); \
	    elif $(MAKE) $(BUILD)/examples/$$program; then p=$$((p + 1)); else echo "FAIL $$program"; f=$$((f + 1)); fi; \
	done; \
	NVCC='$(NVCC)' sh tests/ptx.sh --check; \
	case $$? in 0) p=$$((p + 1));; 77) s=$$((s + 1));; *) echo FAIL ptx; f=$$((f + 1));; esac; \
	echo "$$p passed, $$f failed, $$s skipped"; [ $$f = 0 ]

$(BUILD)/gpu_plan: tests/gpu_plan.c tests/test.h tests/ranks.h tests/random_case.h tests/device_case.h lorasync.h
	@mkdir -p $(@D)
	$(CHECKED) -isystem $(CUDA_HOME)/include $(if $(NCCL_HOME),-isystem $(NCCL_HOME)/include) -o $@ $< \
	    $(NCCL_LIBS) $(CUDA_LIBS) $(LDLIBS)

$(BUILD)/gpu_shm: tests/gpu_shm.c tests/test.h lorasync.h
	@mkdir -p $(@D)
	$(CHECKED) -isystem $(CUDA_HOME)/include -o $@ $< $(CUDA_LIBS) $(LDLIBS)

$(BUILD)/gpu_in_place: tests/test_in_place_cuda.c tests/test_in_place.c tests/in_place_cuda.h tests/test.h \
    tests/ranks.h lorasync.h
	@mkdir -p $(@D)
	$(CHECKED) -DIN_PLACE_GPU -isystem $(CUDA_HOME)/include -o $@ $< $(CUDA_LIBS) $(LDLIBS)

$(BUILD)/gpu_lend: tests/test_lend_cuda.c tests/test_lend.c tests/in_place_cuda.h tests/test.h tests/ranks.h lorasync.h
	@mkdir -p $(@D)
	$(COMPILE) -DIN_PLACE_GPU -isystem $(CUDA_HOME)/include -o $@ $< $(CUDA_LIBS) $(LDLIBS)

$(BUILD)/gpu_replicas: tests/test_replicas_cuda.c tests/test_replicas.c tests/test.h tests/ranks.h lorasync.h
	@mkdir -p $(@D)
	$(CHECKED) -DREPLICAS_GPU -isystem $(CUDA_HOME)/include $(if $(NCCL_HOME),-isystem $(NCCL_HOME)/include) -o $@ $< \
	    $(NCCL_LIBS) $(CUDA_LIBS) $(LDLIBS)

test-gpu: ## tests on the GPUs of this machine
	@if ! [ -e $(CUDA_HOME)/include/cuda_runtime_api.h ]; then echo "skip test-gpu: no CUDA in CUDA_HOME"; else \
	    $(MAKE) $(BUILD)/gpu_shm $(BUILD)/gpu_in_place $(BUILD)/gpu_lend $(BUILD)/gpu_replicas \
	        $(BUILD)/gpu_plan && \
	    $(BUILD)/gpu_shm && $(BUILD)/gpu_in_place && $(BUILD)/gpu_lend && $(BUILD)/gpu_replicas && \
	    $(BUILD)/gpu_plan; fi

# Calls that fail and are handled (NCCL makes some at its start; peer access may be on already) are not errors.
# initcheck does not see what other processes write into memory that they have opened, so it looks at ranks that are
# threads.
sanitize-gpu: ## a few of the GPU tests under memcheck, racecheck and initcheck of compute-sanitizer (GPU_CASES=2)
	@if ! command -v $(SANITIZER) >/dev/null 2>&1; then echo "skip sanitize-gpu: no $(SANITIZER)"; else \
	    $(MAKE) $(BUILD)/gpu_plan && s="$(SANITIZER) --error-exitcode 9 --target-processes all" && \
	    $$s --tool memcheck --report-api-errors no $(BUILD)/gpu_plan $(GPU_CASES) && \
	    $$s --tool racecheck $(BUILD)/gpu_plan $(GPU_CASES) && \
	    $$s --tool initcheck $(BUILD)/gpu_plan $(GPU_CASES) direct direct_kept_on_device over_the_host \
	        processes_over_nccl; fi

ptx: ## makes the PTX text in lorasync.h from its CUDA C block (needs nvcc)
	@NVCC='$(NVCC)' sh tests/ptx.sh

$(BUILD)/examples/demo-cuda: examples/demo.c lorasync.h
	@mkdir -p $(@D)
	$(COMPILE) $(CUDA_FLAGS) -o $@ $< $(CUDA_LIBS) $(LDLIBS)

$(BUILD)/examples/demo-cuda-nccl: examples/demo.c lorasync.h
	@mkdir -p $(@D)
	$(COMPILE) $(CUDA_FLAGS) $(NCCL_FLAGS) -o $@ $< $(NCCL_LIBS) $(CUDA_LIBS) $(LDLIBS)

examples: $(EXAMPLES) mpi-examples ## builds the examples into build/examples

bench: $(BUILD)/bench/bench ## builds and runs bench/bench.c (BENCH_ARGS="...")
	@$(BUILD)/bench/bench $(BENCH_ARGS)

bench-wake: $(BUILD)/bench/bench_wake ## until an engine of another process holds a version (BENCH_ARGS=--publish)
	@$(BUILD)/bench/bench_wake $(BENCH_ARGS)

bench-gpu: ## on GPUs, beside NCCL, plain copies and torch (BENCH_ARGS="2 --quick")
	@bench/run_gpu.sh $(BENCH_ARGS)

mpi-examples:
	@if [ -z '$(MPI_EXAMPLES)' ]; then :; \
	elif mkdir -p $(BUILD)/probe && printf '#include <mpi.h>\nint main(void) { return 0; }\n' | \
	        $(MPICC) -x c - -o $(BUILD)/probe/mpi 2>/dev/null; then \
	    $(MAKE) $(MPI_EXAMPLES) CC='$(MPICC)'; \
	else \
	    echo 'skip $(MPI_EXAMPLES): $(MPICC) does not compile here'; \
	fi

$(BUILD)/examples/%: examples/%.c lorasync.h
	@mkdir -p $(@D)
	$(COMPILE) -o $@ $< $(LDLIBS)

# With libcurl where it compiles; the program does without, too.
CURL = $(shell mkdir -p $(BUILD)/probe; \
    printf '\043include <curl/curl.h>\nint main(void) { return curl_global_init(0); }\n' | \
         $(CC) -x c - -o $(BUILD)/probe/curl -lcurl 2>/dev/null && echo -DUSE_CURL -lcurl)
$(BUILD)/examples/transport_full: LDLIBS += $(CURL)

$(BUILD)/bench/%: bench/%.c lorasync.h
	@mkdir -p $(@D)
	$(COMPILE) -DBENCH_FLAGS='"$(OPT)"' -o $@ $< $(LDLIBS)

# ---- housekeeping

SOURCES = $(wildcard lorasync.h examples/*.c tests/*.c tests/*.h bench/*.c)

format: ## formats the sources in place (clang-format 14)
	$(CLANG_FORMAT) -i $(SOURCES)

check-format: ## says which sources clang-format would change
	@if $(CLANG_FORMAT) --version >/dev/null 2>&1; then $(CLANG_FORMAT) --dry-run --Werror $(SOURCES); \
	else echo 'skip check-format: $(CLANG_FORMAT) does not run here'; fi

clean: ## removes build/
	rm -rf $(BUILD)
