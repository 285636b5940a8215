# Sourced by the commands beside it: finds a Python, makes a virtual environment, enters it.
#
#   XZCACHE_PYTHON       the interpreter to use: a path, or a version such as 3.12 (default: the newest that serves)
#   XZCACHE_VENVS        where the environments are kept (default: .venvs in the checkout)
#   XZCACHE_CONSTRAINTS  newest or lowest: the pinned set that ci/test runs on (default: newest)

set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

wanted_python=${XZCACHE_PYTHON:-}
venvs=${XZCACHE_VENVS:-.venvs}
[[ $venvs == /* ]] || venvs=$PWD/$venvs
constraints=${XZCACHE_CONSTRAINTS:-newest}
# The package takes every XZCACHE_* for its own configuration; the others would reach into the environment.
unset XZCACHE_PYTHON XZCACHE_VENVS XZCACHE_CONSTRAINTS PYTHONHOME PYTHONPATH
# Each of the many processes that a test starts would compile the package anew.
unset PYTHONDONTWRITEBYTECODE

# A pyenv shim is found on PATH even where it cannot run: only an answer counts, here and for Python.
for uv in "$(command -v uv || true)" "$venvs/uv/bin/uv" ''; do
    ! "${uv:-false}" --version >/dev/null 2>&1 || break
done

die() {
    printf 'ci/%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Written so that Python 2 answers too. The newest minor version is the last that all pinned packages have wheels for.
probe='
import sys, sysconfig
asked, uv = sys.argv[1:]
version = "%d.%d.%d" % sys.version_info[:3]
path = getattr(sys, "_base_executable", sys.executable)
def answer(word, text):
    print("%s %d%03d%03d %s" % ((word,) + tuple(sys.version_info[:3]) + (text,)))
    sys.exit()
def refuse(why):
    answer("no", "%s is Python %s%s" % (path, version, why))
if sys.version_info < (3, 11):
    refuse("")
if asked and "/" not in asked and not (version + ".").startswith(asked + "."):
    refuse("")
if not asked and sys.version_info >= (3, 15):
    refuse(", too new for the pinned packages")
if sys.version_info[3] != "final" or sys.implementation.name != "cpython":
    refuse(", not a release of CPython")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    refuse(", a free-threaded build")
for module in ["sqlite3"] + ([] if uv else ["venv", "ensurepip"]):
    try:
        __import__(module)
    except ImportError:
        refuse(" without the module " + module)
answer("yes", path)
'

python_candidates() {
    if [[ $wanted_python == */* ]]; then
        printf '%s\n' "$wanted_python"
    fi
    if [[ $1 != */* ]]; then
        type -aP python3.{14,13,12,11} python3 python || true
        printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3.1[0-9]
    fi
}

# find_python [VERSION|PATH]: prints the path of the newest interpreter that serves.
find_python() {
    local asked=${1:-} answers best
    answers=$(python_candidates "$asked" | while read -r candidate; do
        "$candidate" -c "$probe" "$asked" "$uv" </dev/null 2>/dev/null || true
    done | sort -k2,2n)
    if best=$(grep '^yes ' <<<"$answers" | tail -n 1); then
        cut -d ' ' -f 3- <<<"$best"
    else
        best=$(grep '^no ' <<<"$answers" | tail -n 1 | cut -d ' ' -f 3-) || true
        die "no usable Python found; wanted: ${asked:-3.11 or newer}${best:+; found: $best}; XZCACHE_PYTHON can name one"
    fi
}

# What an environment was made from. Kept in it as text and compared whole, so nothing has to be hashed.
stamp() {
    "$venv/bin/python" -VV && printf '%s\n' "$PWD" "$*" && cat pyproject.toml ci/constraints-*.txt
}

# An environment takes uv some seconds and pip half a minute: uv is fetched once where it is not here.
fetch_uv() {
    local wanted=$venvs/uv/bin/uv
    if command -v flock >/dev/null; then
        exec 8>"$venvs/uv.lock"
        flock 8
    fi
    [[ -x $wanted ]] || {
        "$1" -m venv "$venvs/uv" &&
            "$venvs/uv/bin/python" -m pip install --only-binary :all: --constraint ci/constraints-newest.txt uv
    } || true
    exec 8>&-
    [[ ! -x $wanted ]] || uv=$wanted
}

install() {
    local python=$1 pins=ci/constraints-$2.txt
    shift 2
    set -- --constraint "$pins" --build-constraint ci/constraints-newest.txt "$@"
    [[ -n $uv ]] || fetch_uv "$python"
    if [[ -n $uv ]]; then
        "$uv" venv --python "$python" "$venv" && "$uv" pip install --python "$venv/bin/python" "$@" && return
        rm -rf "$venv" # only pip may know of the index that can be reached
    fi
    # The pip that comes with Python 3.11 knows no dependency groups.
    "$python" -m venv "$venv" &&
        "$venv/bin/python" -m pip install --upgrade --constraint ci/constraints-newest.txt pip &&
        # to compile all modules would take most of the time; Python compiles those that are imported
        "$venv/bin/python" -m pip install --no-compile "$@"
}

# enter NAME VERSION|PATH|'' SET ARGUMENT...: enters the environment NAME, making it anew by
# `pip install ARGUMENT...` under ci/constraints-SET.txt unless it stands as it should.
enter() {
    local venv=$venvs/$1 log=$venvs/$1.log asked=$2 python why
    mkdir -p "$venvs"
    if command -v flock >/dev/null; then # two commands at once must not make the same environment
        exec 9>"$venv.lock"
        flock 9
    fi
    if [[ ! -f $venv/stamp || $(stamp "$@" 2>&1) != "$(<"$venv/stamp")" ]]; then
        rm -rf "$venv"
        python=$(find_python "$asked")
        printf 'ci/%s: making %s with %s, once\n' "${0##*/}" "$venv" "$python" >&2
        if ! install "$python" "${@:3}" >"$log" 2>&1 </dev/null; then
            why='the packages could not be installed'
            grep -qiE 'connection|\(connect\)|dns error|timed out' "$log" && why='no package index can be reached'
            [[ -z ${CI:-} ]] || cat "$log" >&2
            die "$why: $log tells more"
        fi
        stamp "$@" >"$venv/stamp" # last: only a finished environment has one
    fi
    exec 9>&-
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
}
