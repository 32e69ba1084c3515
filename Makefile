# Kraken's table of contents: `make help`.

SHELL := /bin/bash
GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
ROLES := proxy origin build-index tracker agent
AGENTS ?= 2
RUNTIME ?= process
STATE := .devcluster
FUZZTIME ?= 60s
BUILD := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X kraken/proto/role.version=$(VERSION)'
TOOL := $(GO) tool -modfile=test/tools/go.mod

.DEFAULT_GOAL := help
.PHONY: help check-go quick build images devcluster stop-devcluster test test-go test-sim test-setup test-python test-containers test-tools chaos sim conformance bench-registry bench-swarm bench-mirror lint fuzz clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

check-go:
	@command -v $(GO) >/dev/null || { echo "make: Go 1.26 or newer is needed, and no '$(GO)' was found in PATH" >&2; exit 1; }
	@v=$$($(GO) env GOVERSION); n=$${v#go}; \
	if [ "$$(printf '%s\n1.26\n' "$${n%%[a-z-]*}" | sort -V | head -1)" != 1.26 ]; then \
		echo "make: Go 1.26 or newer is needed, found $$v at $$(command -v $(GO))" >&2; exit 1; fi

build: check-go ## build every binary, static, into bin/
	@mkdir -p bin
	$(BUILD) -o bin/kraken-proxy ./proxy/cmd/kraken-proxy
	$(BUILD) -o bin/kraken-origin ./origin/cmd/kraken-origin
	$(BUILD) -o bin/kraken-build-index ./buildindex/cmd/kraken-build-index
	$(BUILD) -o bin/kraken-tracker ./tracker/cmd/kraken-tracker
	$(BUILD) -o bin/kraken-agent ./agent/cmd/kraken-agent
	$(BUILD) -o bin/kraken-credential-provider ./agent/cmd/kraken-credential-provider
	$(BUILD) -o bin/kraken ./deploy/cmd/kraken
	$(BUILD) -o bin/kraken-testfs ./test/testfs/cmd/kraken-testfs
	$(BUILD) -o bin/devcluster ./deploy/devcluster/cmd/devcluster
	$(BUILD) -o bin/netns ./test/netns/cmd/netns

images: build ## build an image per role with docker or buildah
	deploy/docker/build.sh bin

devcluster: build $(if $(filter docker,$(RUNTIME)),images) ## start a whole cluster on loopback (AGENTS=n, RUNTIME=process|docker, SECURE=1: TLS everywhere, and a login)
	@bin/devcluster --dir $(STATE) up --agents $(AGENTS) --runtime $(RUNTIME) $(if $(filter-out 0,$(SECURE)),--mutual-tls --login)

stop-devcluster: ## end what devcluster started
	@if [ -x bin/devcluster ]; then bin/devcluster --dir $(STATE) down; else echo "nothing to stop: bin/devcluster was never built"; fi

quick: check-go ## gofmt, vet and short tests of the packages that changed since main (BASE=revision)
	@test/quick.sh $(BASE)

test: test-go test-sim test-python test-containers ## run all tests; installs what is missing when root

test-go: check-go test-tools ## Go tests with the race detector
	@test/setup.sh gcc
	CGO_ENABLED=1 $(GO) test -race -shuffle=on -timeout 20m ./...

test-sim: check-go ## 300 seeds of the cluster in virtual time, without the race detector
	$(GO) test -timeout 30m -run '^TestSeeds$$' ./test/sim -args -seeds 300 -shrink 100 -log warn

test-setup: ## install the clients and runtimes that the tests use
	@test/setup.sh all

test-tools: check-go ## build the test programs that are Go modules, into bin/tools
	@mkdir -p bin/tools
	cd test/tools && CGO_ENABLED=0 $(GO) build -o ../../bin/tools/ sigs.k8s.io/cri-tools/cmd/crictl \
		github.com/google/go-containerregistry/cmd/crane github.com/regclient/regclient/cmd/regctl oras.land/oras/cmd/oras \
		github.com/opencontainers/distribution-spec/conformance
	cd test/tools/containerd && CGO_ENABLED=0 $(GO) build -o ../../../bin/tools/containerd2 github.com/containerd/containerd/v2/cmd/containerd
	cd test/tools/helm && CGO_ENABLED=0 $(GO) build -o ../../../bin/tools/helm helm.sh/helm/v3/cmd/helm
	cd test/tools/dex && CGO_ENABLED=0 $(GO) build -o ../../../bin/tools/dex .
	cd test/tools/kubelet && CGO_ENABLED=0 $(GO) build -o ../../../bin/tools/kubelet-credentials .

test-python: build test-setup test-tools ## tests with real clients and processes, against a plain cluster and a secure one
	cd test/python && /usr/bin/python3 -m pytest -v
	cd test/python && SECURE=1 /usr/bin/python3 -m pytest -v

chaos: check-go ## faults against a cluster of real processes under load (FAULTS=200 SEED=n KINDS=kill,hang,… ROLES=origin,testfs,…); root for all kinds
	@test/setup.sh chaos
	$(GO) test -v -timeout 3h -run '^TestChaos$$' ./test/chaos -args -goals -faults $(or $(FAULTS),200) -seed $(or $(SEED),0) -kinds '$(KINDS)' -roles '$(ROLES)'

sim: check-go ## the cluster in virtual time with faults that a seed decides (SEEDS=2000, FIRST=1), or one seed with its history (SEED=n, LOG=warn)
	$(GO) test -v -timeout 24h -run '^TestSeeds$$' ./test/sim -args $(if $(SEED),-seed $(SEED),-seeds $(or $(SEEDS),2000) -first $(or $(FIRST),1) -shrink 200) -log '$(LOG)'

conformance: build test-tools ## run the distribution specification's own conformance suite, at the proxy and at an agent
	cd test/python && /usr/bin/python3 -m pytest -q -s test_conformance.py

test-containers: test-setup ## the cluster's scenarios once more, against containers; needs a docker daemon
	@if docker info >/dev/null 2>&1; then \
		$(MAKE) images && cd test/python && RUNTIME=docker /usr/bin/python3 -m pytest -v test_oci.py test_docker.py test_devcluster.py; \
	else echo "skipped: no docker daemon answers"; [ "$$KRAKEN_TEST_REQUIRE" != 1 ]; fi

bench-swarm: build ## measure the swarm on shaped links and loopback; needs root (ROWS=regexp, REPEAT=n)
	$(GO) build -o bin/bench-swarm ./test/bench/swarm
	bin/bench-swarm --rows '$(or $(ROWS),.)' --repeat $(or $(REPEAT),3)

bench-mirror: build ## measure first pulls from an upstream on shaped links, beside direct ones; needs root (ROWS=regexp, REPEAT=n)
	$(GO) build -o bin/bench-swarm ./test/bench/swarm
	bin/bench-swarm --rows 'mirror-$(ROWS)' --repeat $(or $(REPEAT),3) --name mirror

bench-registry: build test-tools ## measure the registry beside Debian's docker-registry (ROWS=regexp REPEAT=5)
	@test/setup.sh bench
	$(GO) run ./test/bench/registry -rows '$(ROWS)' $(if $(REPEAT),-repeat $(REPEAT))

lint: check-go ## gofmt, vet, staticcheck, govulncheck
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt would change:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(TOOL) staticcheck ./...
	@out=$$($(TOOL) govulncheck ./... 2>&1); code=$$?; \
	if echo "$$out" | grep -qE 'fetching vulnerabilities|dial tcp|no such host|connection refused|Forbidden|HTTP GET'; then \
		echo "govulncheck skipped: its database can't be reached"; \
	else echo "$$out"; exit $$code; fi

fuzz: check-go ## fuzz every parser that faces the network or a disk, FUZZTIME (60s) each; what fails stays in testdata/fuzz
	@failed=0; for p in $$($(GO) list ./...); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
			echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $(FUZZFLAGS) $$p || { echo "FAILED $$p $$f"; failed=1; }; done; done; exit $$failed

clean: ## remove what was built
	rm -rf bin
