# Sourced by tools/setup, tools/test and tools/check: where the programs are, in one place.
#
# Nothing here installs or builds. It exports PATH so that `cargo` is one that is new enough and
# the venv's programs win, and PYO3_* so that every Cargo command configures PyO3 alike: two
# spellings would rebuild the extension's dependencies at each change between maturin and clippy.

# rust-version of Cargo.toml, the only place that states it.
required_rust() { sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1; }

version_at_least() { # HAVE WANT
  [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# Print the folder of the first cargo that is new enough; fails if there is none. An old cargo
# early on PATH must not hide Debian's newer one, so each is asked for its version.
find_cargo() {
  local want candidate have
  want=$(required_rust)
  for candidate in "$(command -v cargo || true)" "${HOME:-}/.cargo/bin/cargo" /usr/bin/cargo; do
    [ -x "$candidate" ] || continue
    have=$("$candidate" --version 2>/dev/null | awk '{print $2}')
    if [ -n "$have" ] && version_at_least "$have" "$want"; then
      dirname "$candidate"
      return 0
    fi
  done
  return 1
}

# Print the first Python >= 3.11; fails if there is none.
find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

use_project_programs() { # after setup: cargo and the venv are there
  local cargo_folder
  cargo_folder=$(find_cargo) || { echo "no cargo >= $(required_rust): run tools/setup" >&2; return 2; }
  export VIRTUAL_ENV="$PWD/.venv"
  export PATH="$VIRTUAL_ENV/bin:$cargo_folder:$PATH:/usr/sbin:/sbin"
  unset PYTHONDONTWRITEBYTECODE # the tests start hundreds of Pythons; each would compile all anew
  export PYO3_PYTHON="$VIRTUAL_ENV/bin/python" PYO3_BUILD_EXTENSION_MODULE=1
}
