#!/usr/bin/env bash
# Installs what tests need from Debian's packages.
#   setup.sh gcc    what Go tests need: a compiler for the race detector, what cuts networks and fills disks, other programs to talk to, runtimes
#   setup.sh all    clients and runtimes as well, and a docker daemon when none answers
#   setup.sh chaos  what cuts networks and fills disks
#   setup.sh bench  what benchmarks run beside Kraken; its service is not started
# Without root nothing is installed: what is missing is named, and with KRAKEN_TEST_REQUIRE=1 that is an error.
set -euo pipefail
what=${1:?usage: setup.sh gcc|all|chaos|bench}

# command:package
[ "$what" = all ] || export RUNLEVEL=1 # Debian starts a service that it installs, except in single-user mode
need=(gcc:gcc docker:docker.io dockerd:docker.io containerd:containerd skopeo:skopeo podman:podman docker-registry:docker-registry aria2c:aria2 iptables:iptables ip:iproute2 unshare:util-linux mkfs.ext4:e2fsprogs mount:mount)
if [ "$what" = all ]; then
  need+=(docker:docker.io dockerd:docker.io skopeo:skopeo podman:podman buildah:buildah zstd:zstd containerd:containerd ctr:containerd runc:runc
    aria2c:aria2 nginx:nginx-light ip:iproute2 curl:curl openssl:openssl unshare:util-linux /usr/share/doc/python3-pytest:python3-pytest
    /usr/share/doc/python3-requests:python3-requests)
fi
if [ "$what" = chaos ]; then
  need=(iptables:iptables ip:iproute2 unshare:util-linux mkfs.ext4:e2fsprogs mount:mount)
fi
if [ "$what" = bench ]; then
  need=(docker-registry:docker-registry)
fi

missing=()
for n in "${need[@]}"; do
  c=${n%%:*} p=${n##*:}
  if [[ $c = /* ]]; then [ -e "$c" ] || missing+=("$p"); else command -v "$c" >/dev/null || [ -x "/usr/sbin/$c" ] || [ -x "/sbin/$c" ] || missing+=("$p"); fi
done

if [ ${#missing[@]} -gt 0 ]; then
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "as root on Debian: installing packages that the tests need: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    if ! { apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
      tail -30 "$log" >&2
      exit 1
    fi
  else
    echo "not installed, because this is not root on Debian: ${missing[*]}; tests that need them are skipped"
    [ "${KRAKEN_TEST_REQUIRE:-}" != 1 ] || exit 1
  fi
fi

if [ "$what" = all ] && [ "$(id -u)" = 0 ] && command -v dockerd >/dev/null && ! docker info >/dev/null 2>&1; then
  echo "starting a docker daemon"
  mkdir -p /var/log
  setsid nohup dockerd >/var/log/kraken-test-dockerd.log 2>&1 </dev/null &
  for _ in $(seq 150); do
    docker info >/dev/null 2>&1 && break
    sleep 0.2
  done
  docker info >/dev/null 2>&1 || { echo "dockerd did not start:"; tail -20 /var/log/kraken-test-dockerd.log; [ "${KRAKEN_TEST_REQUIRE:-}" != 1 ]; }
fi
