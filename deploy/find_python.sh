#!/usr/bin/env bash
# Prints the Python that the environment is made with: the one that PYTHON names, else the first that runs of 3.12,
# 3.11 and 3.13, on PATH or among pyenv's versions. One that brings venv goes before one that does not (Debian's
# may lack it). Exits with 1 and says what is wrong where there is none.
set -euo pipefail

fits() {
    "$1" -c "import sys; sys.exit(not $2)" 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" '(3, 11) <= sys.version_info[:2] <= (3, 13)' || {
        echo "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13 that runs" >&2
        exit 1
    }
    echo "$PYTHON"
    exit
fi

# A name of pyenv on PATH may be there and not run: its versions are asked by their own paths.
candidates() {
    local minor places
    shopt -s nullglob
    for minor in 12 11 13; do
        places=("${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/3.$minor".*/bin/python3)
        printf "$minor %s\n" "python3.$minor" python3
        [ ${#places[@]} = 0 ] || printf "$minor %s\n" "${places[@]}" | sort -Vr
    done
}

for modules in 'import ensurepip, venv, ssl;' ''; do
    while read -r minor name; do
        if fits "$name" "sys.version_info[:2] == (3, $minor)" && "$name" -c "${modules}pass" 2>/dev/null; then
            echo "$name"
            exit
        fi
    done < <(candidates)
done
echo "no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=/path/to/python demo" >&2
exit 1
