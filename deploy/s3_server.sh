#!/usr/bin/env bash
# Builds the S3-compatible server that the tests of object stores run against: versitygw (Apache-2.0), one static
# program without a daemon or an account. Does nothing when it is there. Needs Go and its module proxy; from scratch
# it takes a minute and a half on two cores and 1 GB of Go's caches.
#
#   deploy/s3_server.sh FOLDER      puts FOLDER/versitygw
set -euo pipefail
folder=${1:?usage: s3_server.sh FOLDER}
version=v1.8.0

stop() {
    printf 's3-server: %s\n' "$@" >&2
    exit 1
}

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
binary="$folder/versitygw"
command -v go >/dev/null || {
    [ -x "$binary" ] && exit 0
    stop "Go is not installed; install it (https://go.dev/dl), or name a versitygw you have: FOLDFEED_S3_SERVER=/path"
}
if [ -x "$binary" ] && go version -m "$binary" | grep -q "github.com/versity/versitygw[[:space:]]$version[[:space:]]"; then
    exit 0
fi
printf 's3-server: building versitygw %s\n' "$version"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# A proxy that does not answer must not hold up whoever called this.
GOBIN="$scratch" GOFLAGS="${GOFLAGS:-} -buildvcs=false" timeout 900 \
    go install -trimpath -ldflags='-s -w' "github.com/versity/versitygw/cmd/versitygw@$version" ||
    stop "versitygw could not be built; the tests of object stores will be skipped"
mv "$scratch/versitygw" "$binary"
printf 's3-server: %s is ready\n' "$binary"
