# Sourced by quickstart.sh and test.sh: a .venv in the repository's root with this package, installed only when something changed.
#
#   install EXTRA     EXTRA is quickstart or dev; afterwards $venv/bin/python is ready
#
# $PYTHON names another interpreter to make .venv with. Versions: run_scripts/constraints/.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

die() {
    printf '%s\n' "$*" >&2
    exit 2
}

# LAVIS's tokenizers have no wheel for 3.12. Calling it is the only sure test: a pyenv shim is there and fails when called.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' >/dev/null 2>&1
}

find_python() {
    local name path
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || die "PYTHON is $PYTHON, which is no Python 3.10 or 3.11 with venv."
        printf '%s\n' "$PYTHON"
        return
    fi
    for name in python3.11 python3.10 python3; do
        for path in $(type -aP "$name"); do
            if usable "$path"; then
                printf '%s\n' "$path"
                return
            fi
        done
    done
    die "No Python 3.10 or 3.11 with venv was found (LAVIS 1.0.2 does not install on later ones)." \
        "Install one, or name it: PYTHON=/path/to/python3.11 bash ${0##*/}"
}

# A line for each large download and one for the installation, of pip's several hundred; all of them are in .venv/install.log.
shorten() {
    awk '
        /^ *(Downloading|Using cached|Processing) / {
            size = $NF == "MB)" ? substr($(NF - 1), 2) + 0 : 0
            if (size >= 20) { print "   " $0; fflush() }
        }
        /^Collecting / && ++found % 50 == 0 { print "   " found " packages looked up ..."; fflush() }
        /^Installing collected packages/ {
            count = split($0, names, ",")
            print "   installing " count (count > 20 ? " packages, which takes a few minutes ..." : " packages ..."); fflush()
        }
    '
}

install() {
    local extra=$1 version constraints stamp
    if [ ! -e "$venv" ]; then
        local python
        python=$(find_python)
        echo "== .venv with $("$python" --version), from $python"
        "$python" -m venv "$venv"
    fi
    usable "$venv/bin/python" || die "$venv is not usable: it holds no Python 3.10 or 3.11. Delete it and start again."
    version=$("$venv/bin/python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
    constraints=$root/run_scripts/constraints/$version.txt
    # the root belongs to the stamp since an editable install points there
    stamp=$(cat "$root/setup.py" "$constraints" <(echo "$root") | "$venv/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    local kind
    for kind in "$extra" dev; do # dev holds quickstart
        if [ "$(cat "$venv/.installed-$kind" 2>/dev/null)" = "$stamp" ]; then
            return
        fi
    done
    echo "== pip install '.[$extra]' with the tested versions of ${constraints#"$root"/} (6 GB with PyTorch; the log: .venv/install.log)"
    if ! (cd "$root" && "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        -c "$constraints" -e ".[$extra]" 2>&1 | tee "$venv/install.log" | shorten); then
        grep -v '^WARNING' "$venv/install.log" | tail -n 15 >&2
        die "The installation failed; the whole log is $venv/install.log."
    fi
    echo "$stamp" >"$venv/.installed-$extra"
}
