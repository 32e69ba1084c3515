#!/usr/bin/env bash
# gofmt, vet and short tests of the packages that changed since a revision, committed or not.
#   quick.sh [BASE]   default main, or HEAD where there is no main
set -euo pipefail
cd "$(dirname "$0")/.."
base=${1:-main}
git rev-parse -q --verify "$base^{commit}" >/dev/null || base=HEAD
base=$(git merge-base HEAD "$base")
mapfile -t files < <({ git diff --name-only "$base"; git ls-files --others --exclude-standard; } | sort -u)
pkgs=(./test/arch)
for d in $(printf '%s\n' "${files[@]}" | xargs -r -n1 dirname | sort -u); do
  case $d in test/tools*) continue ;; esac
  if [ "$d" != test/arch ] && compgen -G "$d/*.go" >/dev/null; then pkgs+=("./$d"); fi
done
gofiles=()
for f in "${files[@]}"; do case $f in *.go) if [ -f "$f" ]; then gofiles+=("$f"); fi ;; esac; done
if [ ${#gofiles[@]} -gt 0 ]; then
  out=$(gofmt -l "${gofiles[@]}")
  [ -z "$out" ] || { printf 'gofmt would change:\n%s\n' "$out"; exit 1; }
fi
echo "since ${base:0:12}: ${pkgs[*]}"
go vet "${pkgs[@]}"
go test -short -shuffle=on -timeout 5m "${pkgs[@]}"
