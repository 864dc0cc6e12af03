#!/usr/bin/env bash
# Packs foldfeed, its tests and benchmarks, and what a machine with Python 3.12 and torch lacks, into one archive for a
# GPU machine without a network (x86-64, Linux).
#
#     bench/gpu/pack.sh OUT_DIR [DATA_DIR]      makes OUT_DIR/foldfeed-gpu.tar.xz; the last line says what to run there
#
# There must be torch with what it brings, numpy and pyarrow. DATA_DIR is the test data (FOLDFEED_TEST_DATA): its
# A3M alignments, queries and search databases go along. Wheels come from pip's usual index, at the versions of
# constraints.txt; what is committed and what is not yet both go along. The compiled modules are those of the
# environment that runs this (PYTHON, python3 by default), or are made there by its C compiler. XZ_LEVEL=-1 is quicker,
# and its archive a sixth larger.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
[ $# -ge 1 ] || { sed -n '5p' "$0"; exit 2; }
mkdir -p "$1"; out=$(cd "$1" && pwd); data=${2:-}; python=${PYTHON:-python3}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
# What such machines do not have, and small things that they may have: those are looked for last there.
lacking="zarr numcodecs donfig google-crc32c deltalake arro3-core Deprecated zstandard pyhmmer hmmer"
small="click pytest pluggy iniconfig Pygments packaging hypothesis sortedcontainers pytest-timeout psutil wrapt pyyaml"
small="$small typing_extensions rich markdown-it-py mdurl fsspec"
platforms=$(for version in 2_34 2_28 2_27 2_24 2_17 2_12 2_5; do printf -- '--platform manylinux_%s_x86_64 ' "$version"; done)
platforms="$platforms --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64"
sed 's/ *#.*//' "$root/constraints.txt" >"$work/constraints.txt"
for group in lacking small; do
    # shellcheck disable=SC2086 # several words
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
        -c "$work/constraints.txt" -d "$work/wheels-$group" ${!group}
    mkdir -p "$work/pack/$group"
    for wheel in "$work/wheels-$group"/*.whl; do "$python" -m zipfile -e "$wheel" "$work/pack/$group"; done
    # Scripts of wheels lose their mode, and HMMER's programs are such.
    find "$work/pack/$group" -path '*.data/scripts/*' -exec chmod +x {} + -o -path '*/bin/*' -exec chmod +x {} +
done
find "$work/pack" -name '*.so' -exec strip --strip-unneeded {} + 2>/dev/null || true
# Of HMMER's forty programs, each with all of it inside, the scan is compared with few.
find "$work/pack/lacking/hmmer/data/bin" -type f ! -name jackhmmer ! -name phmmer ! -name hmmsearch ! -name hmmbuild ! -name hmmpgmd -delete
# Found after everything else of that Python.
printf 'import os\nimport sys\n\nsys.path.append(os.environ["FOLDFEED_SMALL"])\n' >"$work/pack/lacking/sitecustomize.py"
mkdir -p "$work/pack/lacking/foldfeed" "$work/pack/project"
tar -C "$root" --exclude=__pycache__ --exclude='*.so' --exclude='bench/results' --exclude='tests/data' -c \
    feature_store loader pipelines trainer tests bench pyproject.toml CONTRIBUTING.md README.md | tar -C "$work/pack/project" -x
[ ! -d "$root/tests/data" ] || cp -r "$root/tests/data" "$work/pack/project/tests/"
for room in feature_store loader pipelines trainer; do ln -s "../../project/$room" "$work/pack/lacking/foldfeed/$room"; done
for module in foldfeed.pipelines.fast_scan._scan foldfeed.feature_store.format._permute foldfeed.loader.order._draw; do
    # An environment of an older version may not even have the package.
    file=$("$python" - "$module" <<'PY'
import importlib.util, sys
try:
    found = importlib.util.find_spec(sys.argv[1])
except ModuleNotFoundError:
    found = None
print(found.origin if found else "")
PY
    )
    folder=$(echo "${module%.*}" | sed 's/^foldfeed\.//; s/\./\//g')
    if [ -n "$file" ]; then cp "$file" "$work/pack/project/$folder/"; else echo "$module: not built here; compiled there" >&2; fi
done
if [ -n "$data" ]; then
    mkdir -p "$work/pack/data"
    for part in msas queries searchdb; do [ ! -d "$data/$part" ] || cp -rL "$data/$part" "$work/pack/data/"; done
    # Benchmarks read nothing else of the alignments, and the other files are compressed as they are.
    [ ! -d "$work/pack/data/msas" ] || { chmod -R u+w "$work/pack/data"; find "$work/pack/data/msas" -type f ! -name '*.a3m*' -delete; }
fi
cp "$root/bench/gpu/run.sh" "$work/pack/"
tar -C "$work/pack" -c . | xz -T0 "${XZ_LEVEL:--6}" >"$out/foldfeed-gpu.tar.xz"
ls -l "$out/foldfeed-gpu.tar.xz"
[ "$(wc -c <"$out/foldfeed-gpu.tar.xz")" -le $((64 << 20)) ] || echo "larger than 64 MiB, which some ways there do not take" >&2
echo "there: mkdir W && tar -C W -xJf foldfeed-gpu.tar.xz && OUT=... bash W/run.sh"
