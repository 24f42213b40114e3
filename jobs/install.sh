# Makes .venv and installs the project with the extra given, at the versions of constraints.txt.
# Sourced by jobs/demo.sh and tests/run.sh; does nothing when that has been done already.
extra=$1
stamp=.venv/.installed-$extra
if [ ! -e "$stamp" ] || [ constraints.txt -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  # The build backend comes from the lock as well, so PIP_CONSTRAINT rather than -c.
  PIP_CONSTRAINT=$PWD/constraints.txt .venv/bin/python -m pip install --quiet \
    --disable-pip-version-check -e ".[$extra]"
  touch "$stamp"
fi
