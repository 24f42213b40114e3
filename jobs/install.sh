# Makes .venv and installs the project with the extra given, demo or test, from its lock: each package
# at its version, and only a file whose hash is known. torch, of which every machine takes another
# build, has its version from constraints.txt, as has what it brings.
# Sourced by jobs/demo.sh and tests/run.sh; does nothing when that has been done already.
extra=$1
stamp=.venv/.installed-$extra
if [ ! -e "$stamp" ] || [ -n "$(find demo.lock test.lock constraints.txt pyproject.toml -newer "$stamp")" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  # Compiled, though that takes half a minute and 0.4 GB: where PYTHONDONTWRITEBYTECODE is set, as in
  # many images, nothing would be later, and each process of Ray's would compile all that it imports.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --require-hashes --no-deps -r "$extra.lock"
  # The build backend comes from the lock as well.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-build-isolation -c constraints.txt -e ".[$extra]"
  touch "$stamp"
fi
