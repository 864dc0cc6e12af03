# The commands of foldfeed. `make demo` and `make test` set up everything they need by themselves.
#
#   make demo     search real proteins, build a store, ask it, draw it, train on it (10 minutes at most)
#   make test     all tests, in two processes (TEST_PROCESSES=1 for one)
#   make check    format, lint, types, wheel, tests: what CI runs
#   make bench    benchmarks; one JSON row each
#   make s3-server  build the server that the tests of object stores need (Go, two minutes); without it they skip
#   make test-spark builds on a real Spark with two workers (Java 17 and Maven; 700 MB the first time)
#   make test-neon the fast scan's ARM kernel under an emulator (gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)
#   make spark      fetch that Spark, or say why it cannot run here
#   make clean    remove the demo's output and the environment

VENV ?= .venv
DEMO ?= demo-output
SPARK ?= .spark
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
PY_FILES := $(shell find feature_store loader pipelines trainer -name '*.py' | LC_ALL=C sort)
# The environment is made again when a file comes or goes, or a dependency or C changes; other edits need nothing.
STAMP := $(VENV)/.ready-$(shell (echo "$(PY_FILES)"; cat pyproject.toml constraints.txt deploy/*.sh pipelines/fast_scan/scan.c pipelines/fast_scan/scan_kernel.h feature_store/format/permute.c loader/order/draw.c) | cksum | cut -d' ' -f1)

# Where HMMER's tutorial lies: unpacked beside the environment where the system leaves documentation out.
EXAMPLES = $$([ -d "$(VENV)/examples/tutorial" ] && echo "$(abspath $(VENV))/examples" || echo "$${FOLDFEED_EXAMPLES:-/usr/share/doc/hmmer/examples}")

.PHONY: demo test spark test-spark test-neon check lint format types wheel bench clean setup s3-server

setup: $(STAMP)

$(STAMP): 
	@bash deploy/setup.sh "$(VENV)"
	@rm -f $(VENV)/.ready-* && touch $@

demo: setup
	@FOLDFEED_EXAMPLES="$(EXAMPLES)" $(BIN)/python deploy/demo/run_demo.py --output "$(DEMO)"

test: setup
	FOLDFEED_EXAMPLES="$(EXAMPLES)" $(BIN)/python -m pytest -p xdist -n $(TEST_PROCESSES) --dist loadfile \
	    --no-loadscope-reorder

spark: setup
	@bash deploy/spark/local_cluster.sh fetch "$(SPARK)" "$(abspath $(BIN))/python"

# SPARK_TESTS: options of pytest, e.g. -m "not slow" for the part that CI runs.
test-spark: spark
	@bash deploy/spark/local_cluster.sh up "$(SPARK)" "$(abspath $(BIN))/python"
	@FOLDFEED_EXAMPLES="$(EXAMPLES)" FOLDFEED_SPARK="$(abspath $(SPARK))" $(BIN)/python -m pytest $(SPARK_TESTS) tests/test_pipelines_spark.py; \
	    status=$$?; bash deploy/spark/local_cluster.sh down "$(SPARK)"; exit $$status

test-neon:
	aarch64-linux-gnu-gcc -O3 -Wall -Wextra -Werror -static tests/kernels_agree.c -o kernels_agree.so -lm
	qemu-aarch64 kernels_agree.so; status=$$?; rm -f kernels_agree.so; exit $$status

check: lint types wheel test

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: setup
	$(BIN)/mypy -p foldfeed.feature_store -p foldfeed.loader -p foldfeed.pipelines -p foldfeed.trainer

wheel: setup
	@bash deploy/check_wheel.sh "$(VENV)"

s3-server:
	@bash deploy/s3_server.sh "$(BIN)"

bench: setup
	@for script in bench/*.py; do echo "$$script"; $(BIN)/python "$$script" || [ $$? = 69 ] || exit 1; done

clean:
	rm -rf "$(VENV)" "$(DEMO)" build dist foldfeed.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
