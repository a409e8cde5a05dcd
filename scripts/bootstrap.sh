#!/usr/bin/env bash
# Make .venv with the locked CPU install, or see in a few milliseconds that it is there and current.
# Bash and coreutils only: it runs on a machine where nothing of ours is installed yet.
#   PYTHON=/path/to/python   picks the interpreter
#   --missing-packages       only lists the Debian packages to install first, one a line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly STAMP=$VENV/.pear-ray
readonly TORCH_INDEX=https://download.pytorch.org/whl/cpu
readonly MIN_FREE_GIB=8 # the finished venv, the wheels on their way into it, and a run's outputs

fail() {
    printf 'pear-ray: %s\n' "$1" >&2
    exit 2
}

wanted() { # identity of what should be installed
    cat requirements/cpu.txt pyproject.toml scripts/bootstrap.sh | sha256sum | cut -d ' ' -f 1
}

in_range() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

has_venv() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

find_python() { # the first Python in range, preferring one that can make a venv
    local candidate fallback=""
    if [[ -n ${PYTHON:-} ]]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program; give the path of a Python 3.11, 3.12 or 3.13"
        in_range "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1); wanted 3.11, 3.12 or 3.13"
    fi
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        command -v "$candidate" >/dev/null && in_range "$candidate" || continue
        if has_venv "$candidate"; then
            command -v "$candidate"
            return
        fi
        fallback=${fallback:-$(command -v "$candidate")}
    done
    if [[ -n $fallback ]]; then
        printf '%s\n' "$fallback"
        return
    fi
    local found="no Python 3 found"
    command -v python3 >/dev/null && found="found only $(python3 -V 2>&1)"
    fail "$found, wanted Python 3.11, 3.12 or 3.13; mend: apt-get install python3.11 python3.11-venv, or name one with PYTHON="
}

missing_packages() { # Debian packages that the install or the engine would miss, one a line
    local python=$1 name
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    has_venv "$python" || printf '%s\n' "$name-venv"
    # pycosat, which reasoning-gym imports, is published as C source only.
    command -v cc >/dev/null || command -v gcc >/dev/null || printf '%s\n' gcc libc6-dev
    [[ -e $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] || printf '%s\n' "$name-dev"
    # vLLM's CPU kernels link it, and no wheel carries it.
    "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || printf '%s\n' libnuma1
}

check_machine() { # what would fail later, with a worse message
    local python=$1 free_gib missing
    [[ $(uname -s) == Linux ]] || fail "this is $(uname -s), the CPU engine is for Linux only; mend: use docker/Dockerfile.cpu"
    case $(uname -m) in
        x86_64 | aarch64) ;;
        *) fail "this machine is $(uname -m), vLLM has CPU builds for x86_64 and aarch64 only" ;;
    esac
    missing=$(missing_packages "$python" | tr '\n' ' ')
    [[ -z $missing ]] || fail "system packages are missing; mend: apt-get install ${missing% }"
    free_gib=$(($(df --output=avail -k . | tail -n 1) / 1024 / 1024))
    ((free_gib >= MIN_FREE_GIB)) || fail "$PWD has $free_gib GiB of free disk, the install needs $MIN_FREE_GIB; mend: free some, or clone elsewhere"
}

install() {
    local python=$1 pip quiet=--quiet torch
    [[ -t 1 ]] && quiet=""
    # An interrupted or outdated venv is brought up to date; one whose interpreter is gone is made anew.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$VENV"
    pip=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)
    torch=$(grep '^torch==' requirements/cpu.txt)
    printf 'pear-ray: installing %s pinned packages into %s (one time, some minutes)\n' "$(grep -c == requirements/cpu.txt)" "$VENV"
    # --no-compile: pip compiles in one process; below, all cores do it together.
    # Torch's CPU build is not on the default index. A pip set up with a mirror may know it; only else is
    # PyTorch's index asked, and for this one package: every further name would cost a look-up there.
    "${pip[@]}" install --no-compile --quiet --no-deps "$torch" 2>/dev/null ||
        "${pip[@]}" install --no-compile $quiet --no-deps --extra-index-url "$TORCH_INDEX" "$torch" ||
        fail "could not install $torch; mend: check the network, then run the same command again"
    # --no-deps: the lock is the whole truth, and leaves out what breaks a CPU install.
    "${pip[@]}" install --no-compile $quiet --no-deps -r requirements/cpu.txt ||
        fail "could not install requirements/cpu.txt; mend: see pip's message above, then run the same command again"
    "${pip[@]}" install --no-compile --quiet --no-deps --no-build-isolation -e .
    # Uncompiled, every engine process of the first run would spend half a minute compiling torch and
    # vLLM at the same time; where PYTHONDONTWRITEBYTECODE is set, every process of every run.
    "$VENV/bin/python" -m compileall -q -j 0 "$VENV"/lib/python3.*/site-packages >/dev/null 2>&1 || true
}

main() {
    local key python
    key=$(wanted)
    if [[ $# == 0 && -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$key" ]]; then
        return
    fi
    python=$(find_python)
    if [[ ${1:-} == --missing-packages ]]; then
        missing_packages "$python"
        return
    fi
    check_machine "$python"
    rm -f "$STAMP"
    install "$python"
    printf '%s\n' "$key" >"$STAMP"
    printf 'pear-ray: %s is ready\n' "$VENV"
}

main "$@"
