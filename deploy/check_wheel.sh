#!/usr/bin/env bash
# Builds the wheel, installs it with its core dependencies alone into an empty environment, and runs the command
# line there: a package or a dependency that was forgotten shows here and nowhere else.
set -euo pipefail
venv=${1:?usage: check_wheel.sh VENV}
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$venv/bin/pip" wheel --quiet --disable-pip-version-check --no-deps -w "$folder" .
"$venv/bin/python" -m venv "$folder/empty"
"$folder/empty/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt "$folder"/foldfeed-*.whl
cd "$folder"
unset PYTHONPATH
run="$folder/empty/bin/foldfeed"
"$run" --version
"$run" --help >/dev/null
"$folder/empty/bin/python" - <<'PY'
import importlib.util

import foldfeed.feature_store as room

assert importlib.util.find_spec("apache_beam") is None and importlib.util.find_spec("torch") is None
store = room.FeatureStore.create("store")
assert len(room.FeatureStore.open("store")) == 0
for name in ("loader", "pipelines", "trainer"):
    spec = importlib.util.find_spec(f"foldfeed.{name}")
    assert spec is not None and importlib.util.find_spec(name) is None, name
PY
"$run" query store "select count(*) as records from records"
code=0
"$run" build --queries x.fasta --database uniref90=x.fasta --store other 2>message || code=$?
grep -q "foldfeed\[pipelines\]" message && [ "$code" = 1 ] ||
    { echo "build without Beam must name the missing extra and exit 1; it exited $code with:"; cat message; exit 1; }
echo "wheel: ok"
