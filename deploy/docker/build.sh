#!/usr/bin/env bash
# Builds kraken-<role>:dev for every role from the static binaries in a folder, with docker or, where there is no docker daemon,
# with buildah. Needs no network.
#   build.sh BIN_DIR [ROLE…]
set -euo pipefail
bin=$(cd "${1:?usage: build.sh BIN_DIR [ROLE…]}" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
roles=("$@")
[ ${#roles[@]} -gt 0 ] || roles=(proxy origin build-index tracker agent testfs)

if docker info >/dev/null 2>&1; then
  builder=docker
elif command -v buildah >/dev/null; then
  builder=buildah
else
  echo "build.sh: neither a docker daemon nor buildah was found: install docker.io and start dockerd, or install buildah" >&2
  exit 1
fi

# quiet runs a command and shows what it said only when it fails: builders warn about themselves, once for every role.
quiet() {
  local out
  if ! out=$("$@" 2>&1); then
    echo "$out" >&2
    return 1
  fi
}

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
mkdir "$context/state"
cp "$here/Dockerfile" "$context/"
for role in "${roles[@]}"; do
  if [ ! -x "$bin/kraken-$role" ]; then
    echo "build.sh: $bin/kraken-$role is missing: run \`make build\`" >&2
    exit 1
  fi
  cp "$bin/kraken-$role" "$context/"
  case $builder in
    docker) quiet docker build -q --build-arg "ROLE=$role" -t "kraken-$role:dev" "$context" ;;
    buildah) quiet buildah bud -q --format oci --build-arg "ROLE=$role" -t "kraken-$role:dev" "$context" ;;
  esac
  rm "$context/kraken-$role"
  echo "  kraken-$role:dev built with $builder"
done
