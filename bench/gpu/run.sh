#!/usr/bin/env bash
# On a GPU machine, from where pack.sh's archive was unpacked: the tests marked cuda, then what only a GPU can measure.
#
#     OUT=FOLDER bash W/run.sh                 six minutes at most (FOLDFEED_TOTAL_S); one step's limit is in its line
#     OUT=FOLDER bash W/run.sh --device cpu    the same steps at tiny sizes without a GPU, to try the archive
#     bash W/run.sh --only NAME[,NAME...]      some steps
#
# OUT gets `log` (everything), `rows.jsonl` (one row of each benchmark) and `summary` (a line for each step: seconds,
# exit code, or why it was left out), which is printed last. A step that fails or takes too long does not end the others.
# The exit code is the number of those. What takes longest comes last: compiling.
set -u
here=$(cd "$(dirname "$0")" && pwd); device=cuda; only=
while [ $# -gt 0 ]; do
    case "$1" in
        --device) device=$2; shift 2 ;;
        --only) only=,$2,; shift 2 ;;
        *) sed -n '4,6p' "$0"; exit 2 ;;
    esac
done
python=${PYTHON:-python3}
out=${OUT:-$here/out}; mkdir -p "$out"; out=$(cd "$out" && pwd); : >"$out/summary"
total=${FOLDFEED_TOTAL_S:-360}; started=$SECONDS; failures=0
export PYTHONPATH=$here/lacking FOLDFEED_SMALL=$here/small PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PATH=$here/lacking/hmmer/data/bin:$PATH TMPDIR=${TMPDIR:-/tmp}
[ ! -d "$here/data" ] || export FOLDFEED_TEST_DATA=$here/data
cd "$here/project" || exit 99

# step NAME LIMIT_S COMMAND...: runs it unless time is up.
step() {
    local name=$1 limit=$2 left code began; shift 2
    case "$only" in '' | *",$name,"*) ;; *) return ;; esac
    left=$((total - (SECONDS - started)))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        printf '%-28s left out: no time\n' "$name" >>"$out/summary"; failures=$((failures + 1)); return
    fi
    printf '\n== %s\n' "$name" | tee -a "$out/log"
    began=$SECONDS
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$out/log" | tail -n 25 | cut -c1-400
    code=${PIPESTATUS[0]}
    # Benchmarks say by 69 that there is nothing to measure here.
    case "$code" in
        0) verdict=ok ;; 69) verdict='nothing to do here' ;; 124 | 137) verdict="cut off after $limit s" ;; *) verdict="FAILED ($code)" ;;
    esac
    case "$code" in 0 | 69) ;; *) failures=$((failures + 1)) ;; esac
    printf '%-28s %4d s  %s\n' "$name" $((SECONDS - began)) "$verdict" >>"$out/summary"
}
bench() { step "$1" "$2" "$python" "bench/$3.py" --output "$out/rows.jsonl" "${@:4}"; }
tests() { step "$1" "$2" "$python" -m pytest -q --no-header -p no:cacheprovider -o timeout="${3}" -m cuda -rfExX --durations=8 "${@:4}"; }
# Those of another version would be left aside without a word, and be slow.
is_usable() { "$python" -c "import importlib, sys; sys.exit(not importlib.import_module('foldfeed.$1').is_usable())"; }
modules() {
    local kernel module source missing=0 target suffix include
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    while read -r kernel module source; do
        if is_usable "$kernel"; then echo "$kernel: as it came"; continue; fi
        target=$(dirname "$source")/$module$suffix
        rm -f "$target"
        if gcc -O3 -fvisibility=hidden -shared -fPIC -I"$include" "$source" -o "$target" && is_usable "$kernel"; then
            echo "$kernel: compiled here"
        else
            echo "$kernel: NOT COMPILED, what follows is slower than it should be"; missing=1
        fi
    done <<'LIST'
pipelines.fast_scan.kernels _scan pipelines/fast_scan/scan.c
feature_store.format.permute_kernel _permute feature_store/format/permute.c
loader.order.draw_kernel _draw loader/order/draw.c
LIST
    return "$missing"
}
export -f modules is_usable; export python

step machine 40 bash -c '
    nvidia-smi -L; nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,power.draw --format=csv,noheader
    nproc; "$python" -c "import sys, numpy, pyarrow, torch; print(sys.version); print(torch.__version__, torch.version.cuda, torch.cuda.is_available(), numpy.__version__, pyarrow.__version__)"'
step modules 60 bash -c modules

if [ "$device" = cuda ]; then
    tests loader-tests 70 40 tests/test_loader_cuda.py
    tests trainer-tests 80 60 tests/test_trainer_cuda.py -k 'not compile'
    tests scan-tests 45 40 tests/test_pipelines_scan_cuda.py
    bench overlap 60 loader_overlap --device cuda --steps 25 --rounds 2 --seconds 4 --threads 4 --processes 4
    bench overlap-compact 25 loader_overlap --device cuda --steps 15 --rounds 1 --seconds 2 --threads 4 --processes 4 --features compact
    bench throughput 40 loader_throughput --device cuda --batch 8 --threads 8 --seconds 4
    bench lock 45 loader_lock --device cuda --rounds 1 --steps 100 --processes 2
    bench step 60 trainer_step --device cuda --rounds 6
    FOLDFEED_SCAN_DEVICE=cuda bench scan 60 search_scan --targets 100000 --queries 24 --kernels --streamed 0
    bench slots 40 loader_slots --device cuda --samples 60 --passes 3 --rounds 1 --seconds 0.6
    bench meters 20 loader_meters --device cuda --samples 40
    bench nccl 30 trainer_nccl
    bench step-compiled 110 trainer_step --device cuda --rounds 6 --compiled
    tests compile-tests 120 100 tests/test_trainer_cuda.py -k 'compile'
else
    small="--crop 32 --clusters 8 --extra 16"
    step loader-tests 200 "$python" -m pytest -q --no-header -p no:cacheprovider tests/test_loader_cuda.py tests/test_trainer_cuda.py tests/test_loader_labels.py
    step scan-tests 100 "$python" -m pytest -q --no-header -p no:cacheprovider tests/test_pipelines_scan_cuda.py
    # shellcheck disable=SC2086 # several words
    bench overlap 200 loader_overlap --steps 3 --rounds 1 --seconds 0.5 --batch 2 --step-ms 5 $small
    # shellcheck disable=SC2086
    bench throughput 200 loader_throughput --batch 2 --threads 2 --seconds 0.5 $small
    bench lock 200 loader_lock --rounds 1 --steps 3 --warm 2 --batch 2
    bench step 200 trainer_step --rounds 2
    bench scan 200 search_scan --targets 500 --queries 1 --streamed 0
    bench slots 200 loader_slots --samples 8 --passes 1 --rounds 1 --seconds 0.1
    bench meters 200 loader_meters --samples 5
    bench nccl 120 trainer_nccl
fi
echo; cat "$out/summary"
exit "$failures"
