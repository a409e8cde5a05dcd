#!/usr/bin/env bash
# Put Debian's prometheus and promtool into .tools/, where tests look for them; at once when there.
# Not `apt-get install`: it needs root, and starts a server on some machines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly DIR=.tools/prometheus
folder=""

fail() {
    printf 'pear-ray: %s\n' "$1" >&2
    exit 2
}

main() {
    if [[ -x $DIR/prometheus && -x $DIR/promtool ]] ||
        { command -v prometheus && command -v promtool; } >/dev/null; then
        return
    fi
    command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
        fail "no prometheus on PATH, and no apt-get to get it with; mend: install Prometheus with its promtool"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    (cd "$folder" && apt-get download -qq prometheus >/dev/null 2>log) ||
        fail "could not download Debian's prometheus ($(tail -n 1 "$folder/log")); mend: apt-get update, then run the same command again"
    # The two programs only: the rest is its start-up files and its web pages.
    dpkg --fsys-tarfile "$folder"/prometheus_*.deb | tar -x -C "$folder" ./usr/bin
    mkdir -p .tools
    rm -rf "$DIR"
    mv "$folder/usr/bin" "$DIR" # whole or not at all
}

main
