#!/bin/sh
# Make the virtual environment and install the project in it: uv if it works here, else venv and pip.
# usage: tools/venv.sh FOLDER [EXTRAS]      (PYTHON=... picks the interpreter)
set -eu
venv=$1 what=.${2:+[$2]}
suitable='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'

python=
for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    if "$name" -c "$suitable" 2>/dev/null; then python=$(command -v "$name"); break; fi
done
if [ -z "$python" ]; then
    echo "nash_lab needs Python 3.11 to 3.14, found none (tried: ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}); name one: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi

if [ -x "$venv/bin/python" ] && ! "$venv/bin/python" -c "$suitable" 2>/dev/null; then
    echo "$venv holds a broken Python or one that is not 3.11 to 3.14; remove it: make clean-venv" >&2
    exit 1
fi
# each list was made on the oldest Python that it is for: 3.11, and 3.12 for all later ones
if [ -x "$venv/bin/python" ]; then python=$venv/bin/python; fi
if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then pins=constraints.txt; else pins=constraints-3.12.txt; fi
if uv --version >/dev/null 2>&1; then
    [ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv"
    uv pip install --quiet --python "$venv/bin/python" -e "$what" -c "$pins"
else
    [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
    # as uv does: bytecode of what is imported, when it is imported, and not of 20,000 files now
    bytecode=--no-compile
    if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then bytecode=--compile; fi
    "$venv/bin/python" -m pip install --quiet $bytecode --disable-pip-version-check -e "$what" -c "$pins"
fi
